"""Task priors and covariances: moments, norms, pools shared between calls, reproducibility."""

import math

import pytest
import torch
from scipy import stats
from zscore import assert_mean

from icl_lib.tasks import TaskPrior, power_law_covariance, spiked_covariance, square_root

N = 40_000


def full_covariance(dim, generator):
    factor = torch.randn(dim, dim + 1, generator=generator, dtype=torch.float64)
    return factor @ factor.mT / dim


def second_moments(x):
    return x[:, :, None] * x[:, None, :]


def test_isotropic_tasks(generator):
    tasks = TaskPrior(4).sample(N, generator=generator)
    assert tasks.shape == (N, 4) and tasks.dtype == torch.float64
    assert_mean(tasks, 0.0)
    assert_mean(second_moments(tasks), torch.eye(4))
    assert_mean(tasks**4, 3.0)


def test_tasks_of_a_full_covariance(generator):
    covariance = full_covariance(3, generator)
    tasks = TaskPrior(3, covariance).sample(N, generator=generator)
    assert_mean(tasks, 0.0)
    assert_mean(second_moments(tasks), covariance)


def test_tasks_of_a_singular_covariance_stay_in_its_range(generator):
    covariance = torch.diag(torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64))
    tasks = TaskPrior(3, covariance).sample(50, generator=generator)
    assert not tasks[:, 1].any() and tasks[:, 0].all()


@pytest.mark.parametrize("covariance", [None, spiked_covariance(5, 3.0)], ids=["isotropic", "spiked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_on_the_sphere(covariance, dtype, generator):
    tasks = TaskPrior(5, covariance, sphere=True).sample(N, generator=generator, dtype=dtype)
    assert tasks.dtype == dtype
    norms = tasks.norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(5)), rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert_mean(tasks, 0.0)
    if covariance is None:
        assert_mean(second_moments(tasks), torch.eye(5))
    else:
        assert (tasks[:, 0] ** 2).mean() > 1.5


def test_a_pool_is_drawn_once_and_shared(generator):
    prior = TaskPrior(3, n_tasks=6)
    samples = [prior.sample(200, generator=generator) for _ in range(2)]
    rows = [{tuple(row) for row in sample.tolist()} for sample in samples]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert prior.pool is not None and rows[0] == {tuple(row) for row in prior.pool.tolist()}
    single = prior.sample(200, generator=generator, dtype=torch.float32)
    assert single.dtype == torch.float32 and len({tuple(row) for row in single.tolist()}) == 6


def test_tasks_of_a_pool_are_equally_likely(generator):
    prior = TaskPrior(2, n_tasks=8)
    tasks = prior.sample(16_000, generator=generator)
    counts = [(tasks == task).all(-1).sum().item() for task in prior.pool]
    assert sum(counts) == 16_000
    assert stats.chisquare(counts).pvalue > 1e-3


def test_pool_tasks_follow_the_prior(generator):
    covariance = full_covariance(3, generator)
    prior = TaskPrior(3, covariance, n_tasks=N)
    prior.sample(1, generator=generator)
    assert_mean(second_moments(prior.pool), covariance)


def test_fresh_prior_has_no_pool(generator):
    prior = TaskPrior(3, spiked_covariance(3, 1.0), n_tasks=2, sphere=True)
    prior.sample(5, generator=generator)
    fresh = prior.fresh()
    assert fresh.n_tasks is None and fresh.pool is None and fresh.sphere and fresh.covariance is prior.covariance
    tasks = fresh.sample(100, generator=generator)
    assert len({tuple(row) for row in tasks.tolist()}) == 100
    torch.testing.assert_close(tasks.norm(dim=-1), torch.full((100,), math.sqrt(3), dtype=torch.float64))


@pytest.mark.parametrize("n_tasks", [None, 4])
def test_the_seed_fixes_the_tasks(n_tasks):
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        draws.append(TaskPrior(3, n_tasks=n_tasks).sample(10, generator=generator))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    narrow = TaskPrior(3, n_tasks=n_tasks).sample(
        10, generator=torch.Generator().manual_seed(1), device="cpu", dtype=torch.float32
    )
    assert torch.equal(narrow, draws[0].float())


@pytest.mark.parametrize("strength", [-0.5, 0.0, 7.0])
@pytest.mark.parametrize("direction", [None, torch.tensor([1.0, -2.0, 0.5, 0.0])])
def test_spiked_covariance(strength, direction):
    covariance = spiked_covariance(4, strength, direction)
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0 + strength], dtype=torch.float64).sort().values
    torch.testing.assert_close(torch.linalg.eigvalsh(covariance), expected)
    gamma = torch.eye(4)[0] if direction is None else direction
    gamma = gamma.double()
    torch.testing.assert_close(covariance @ gamma, (1 + strength) * gamma)
    assert covariance.dtype == torch.float64


@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0])
def test_power_law_covariance(exponent):
    spectrum = power_law_covariance(6, exponent).diagonal()
    assert torch.equal(torch.diag(spectrum), power_law_covariance(6, exponent))
    assert spectrum.sum().item() == pytest.approx(6)
    ranks = torch.arange(1, 7, dtype=torch.float64)
    torch.testing.assert_close(spectrum / spectrum[0], ranks**-exponent)


def test_square_root(generator):
    covariance = full_covariance(5, generator)
    root = square_root("covariance", covariance, 5)
    torch.testing.assert_close(root @ root, covariance)
    assert torch.equal(root, root.mT) or (root - root.mT).abs().max() < 1e-14
    slim = square_root("covariance", covariance.float(), 5)
    assert slim.dtype == torch.float64
    torch.testing.assert_close(slim @ slim, covariance, rtol=1e-5, atol=1e-5)
