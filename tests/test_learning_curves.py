"""What the chapter on learning curves measures, in smaller runs: leave-one-out steps, peak, cure, size."""

import functools
import math

import numpy as np
import pytest
import torch

from icl_lib.asymptotics import linear_attention_errors, marchenko_pastur_resolvent, optimal_penalty
from icl_lib.models import LinearTransformer, population_error
from icl_lib.prompts import sample_summaries
from icl_lib.sweeps import deviation_limit, largest_deviation
from icl_lib.tasks import TaskPrior
from tests.zscore import assert_mean

ALPHA, KAPPA, RHO = 2, 0.5, 0.1
PSI = (1 + RHO) / ALPHA


def formula(tau, lam):
    return linear_attention_errors(alpha=ALPHA, kappa=KAPPA, tau=tau, rho=RHO, lam=lam)


def errors(dim, n, lams, generator):
    """Exact errors on fresh tasks and on the pool, shape (2, penalties)."""
    prior = TaskPrior(dim, n_tasks=round(KAPPA * dim), sphere=True)
    options = {"target": "linear", "noise": RHO**0.5, "scaling": "lu", "generator": generator}
    data = sample_summaries(prior.sample(n, generator=generator), ALPHA * dim, **options)
    layer = LinearTransformer().fit(data, [n * lam / dim for lam in lams])
    laws = prior.fresh(), prior
    return torch.stack([population_error(layer.gamma, law, ALPHA * dim, noise=RHO**0.5) for law in laws])


def repeat(seeds, dim, n, lams, generator):
    return torch.stack([errors(dim, n, lams, generator) for _ in range(seeds)])


def z(one, other):
    """By how much the mean of one sample is above that of another, in standard errors."""
    return (one.mean() - other.mean()).item() / math.sqrt(one.var() / len(one) + other.var() / len(other))


def spectrum(dim, kappa, generator):
    pool = TaskPrior(dim, sphere=True).sample(round(kappa * dim), generator=generator)
    return torch.linalg.eigvalsh(pool.T @ pool / len(pool)).clamp_min(0)


def moments(second, mean, exact):
    """E[b b^T] and E[xi b^T] for the context length alpha d; or their leading order, without the label square."""
    dim = len(second)
    length, block = ALPHA * dim, second + PSI * torch.eye(dim)
    if not exact:
        return block, second
    column = (1 + RHO) * mean[:, None]
    last = torch.cat([column, column.new_full((1, 1), (1 + RHO) ** 2)]) * (1 + 2 / length)
    return torch.cat([torch.cat([block + second / length, last[:-1].T]), last], 1), torch.cat([second, column], 1)


def risk(layer, block, cross):
    return 1 + RHO + ((layer @ block - 2 * cross) * layer).sum() / len(layer)


def normal(dim, tau, lam, generator, exact=False):
    """Ridge on normal features: share of its error that a prompt keeps, trace, squared norm, two errors."""
    pool, n = TaskPrior(dim, sphere=True).sample(round(KAPPA * dim), generator=generator), round(tau * dim**2)
    fresh = moments(torch.eye(dim).double(), torch.zeros(dim).double(), exact)
    block, cross = moments(pool.T @ pool / len(pool), pool.mean(0), exact)
    best = cross @ torch.linalg.inv(block)
    root = torch.linalg.cholesky(block / dim)
    h = (torch.randn(n, *cross.shape, generator=generator).double() @ root.T).flatten(1)
    y = h @ best.flatten() + risk(best, block, cross).sqrt() * torch.randn(n, generator=generator)
    penalty, gram = n * lam / dim, h.T @ h
    layer = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), h.T @ y).view_as(cross)
    values = torch.linalg.eigvalsh(gram)
    kept = 1 - (values / (values + penalty)).sum() / n
    learned = [kept, layer.diagonal().sum() / dim, layer.square().sum() / dim]
    return torch.stack([*learned, risk(layer, *fresh), risk(layer, block, cross)])


@functools.cache
def measured():
    """Per cent above the formula in 8, 16 and 32 dimensions: (seeds, tau, fresh and pool, penalties 1 and 0.1)."""
    generator, taus, lams = torch.Generator().manual_seed(11), (0.25, 0.5, 1, 2), (1, 0.1)
    theory = [[[formula(tau, lam).icl for lam in lams], [formula(tau, lam).idg for lam in lams]] for tau in taus]
    theory, found = torch.tensor(theory), {}
    for dim, seeds in ((8, 200), (16, 30), (32, 20)):
        some = taus if dim < 32 else taus[:3]
        layers = torch.stack([repeat(seeds, dim, round(tau * dim**2), lams, generator) for tau in some], 1)
        found[dim] = 100 * (layers / theory[: len(some)] - 1)
    found["swapped"] = (found[32] + 100) * theory[:3] / theory[:3].flip(-1) - 100  # the other formula
    return found


@pytest.fixture
def excess(untyped):
    return measured()


def test_last_entry(generator):
    """The moment of the label square is (1 + 2/l)(1 + rho)^2; three other entries are rejected."""
    gamma, prior = torch.tensor(4 * [4 * [0.3] + [0.6]]).double(), TaskPrior(4, sphere=True)
    options = {"target": "linear", "noise": 1.0, "scaling": "lu", "generator": generator}
    data = sample_summaries(prior.sample(20_000, generator=generator), 3, **options)
    squares = (((data.query @ gamma) * data.summary).sum(-1) - data.answer) ** 2
    theory = population_error(gamma, prior, 3, noise=1.0)
    assert_mean(squares, theory)
    mean, se = squares.mean().item(), squares.std().item() / 20_000**0.5
    for rival in (2, (1 + 2 / 3) * 2, 4):
        wrong = theory.item() - ((1 + 2 / 3) * 4 - rival) * 0.6**2
        assert abs(mean - wrong) > deviation_limit(1, 20_000) * se


@pytest.mark.usefixtures("untyped")
def test_resolvent(generator):
    for kappa in (0.25, 1, 4):
        shifts = torch.tensor([0.1, 1.0]).double()
        small, large = (
            torch.stack([(1 / (spectrum(d, kappa, generator)[:, None] + shifts)).mean(0) for _ in range(20)])
            for d in (40, 80)
        )
        expected = torch.tensor([marchenko_pastur_resolvent(x, kappa) for x in shifts.tolist()])
        assert_mean(2 * large - small, expected)


def test_gaussian_features(generator):
    """Share of its error that a prompt keeps, trace and squared norm of the weights, two errors."""
    dim, tau, lam = 14, 1, 0.1
    e = formula(tau, lam)
    nu, step = PSI + e.ridge, 1e-5
    mean = marchenko_pastur_resolvent(nu, KAPPA)
    v0 = (marchenko_pastur_resolvent(nu - step, KAPPA) - marchenko_pastur_resolvent(nu + step, KAPPA)) / (2 * step)
    norm = 1 - 2 * nu * mean + nu**2 * v0 + e.idg / tau * (mean - nu * v0 + PSI * v0)
    runs = torch.stack([normal(dim, tau, lam, generator) for _ in range(60)])
    assert_mean(runs, torch.tensor([lam / e.ridge, 1 - nu * mean, norm, e.icl, e.idg]))
    without = 1 - PSI * marchenko_pastur_resolvent(PSI, KAPPA)  # the trace if there were no effective ridge
    assert z(without - runs[:, 1], torch.zeros(60)) > deviation_limit(1, 60)


@pytest.mark.usefixtures("untyped")
def test_peak(generator):
    """It is at n = d (d + 1), not d^2, and grows with a small penalty as the formula does; at d^2 it does not."""
    lams = [1e-5, 1e-4, 1e-3, 1e-2]
    sizes = {n: repeat(20, 12, n, [1e-6, *lams], generator)[:, 0].numpy() for n in (156, 144, 150, 162)}
    for n in (144, 150, 162):
        assert z(*(torch.tensor(np.log(sizes[size][:, 0])) for size in (156, n))) > deviation_limit(3, 20)
    x = np.log(lams) - np.log(lams).mean()
    x /= (x**2).sum()
    expected = x @ np.log([formula(1, lam).icl for lam in lams])
    for n, meets in ((156, True), (144, False)):
        mean = sizes[n][:, 1:].mean(0)
        se = (sizes[n][:, 1:] / mean @ x).std(ddof=1) / 20**0.5
        assert (abs(x @ np.log(mean) - expected) < deviation_limit(1, 20) * se) == meets


@pytest.mark.usefixtures("untyped")
def test_the_cure(generator):
    """With the best penalty the error falls through the place of the peak; with a small one it rises up to it."""
    runs = []
    for n in (128, 272, 512):
        best = optimal_penalty(lambda lam, n=n: formula(n / 256, lam).icl, 1e-2, 100)[0]
        runs.append(repeat(20, 16, n, [best, 1e-3], generator)[:, 0])
    for before, after in ((0, 1), (1, 2)):
        assert z(runs[before][:, 0], runs[after][:, 0]) > deviation_limit(2, 20)
    assert z(runs[1][:, 1], runs[0][:, 1]) > deviation_limit(1, 20) < z(runs[1][:, 1], runs[2][:, 1])


def test_32_dimensions(excess):
    """Mean errors on new prompts are within 5 and 9 per cent of the formula, and above it on average.

    The same criterion rejects the formula of the other penalty, and layers in 8 dimensions at the small one.
    """
    bounds = torch.tensor([5, 9])
    assert (excess[32].mean(0).abs() < bounds).all()
    assert (excess["swapped"].mean(0).abs().amax((0, 1)) > bounds).all()
    assert excess[8].mean(0).abs().amax((0, 1))[1] > 9
    average = excess[32].mean((1, 2, 3))
    assert average.mean() > deviation_limit(1, len(average)) * average.std() / len(average) ** 0.5


def test_finite_size(excess):
    """The excess on fresh tasks at the small penalty is of order 1/d: other powers are excluded."""
    samples = {dim: excess[dim][:, 1:3, 0, 1].mean(1).numpy() for dim in (8, 16, 32)}
    mean = np.array([x.mean() for x in samples.values()])
    se = np.array([x.std(ddof=1) / len(x) ** 0.5 for x in samples.values()])
    (power, _), variance = np.polyfit(-np.log(list(samples)), np.log(mean), 1, w=mean / se, cov="unscaled")
    distance = [abs(power - order) / variance[0, 0] ** 0.5 for order in (1, 0.5, 2)]
    assert distance[0] < deviation_limit(1, 20) < min(distance[1:])


def test_exact_moments(excess, generator):
    """Normal features with the exact moments show more than half of it; with the leading covariance less."""
    theory = torch.tensor([formula(tau, 0.1).icl for tau in (0.5, 1, 2)])
    half = excess[8][:, 1:, 0, 1].mean(1) / 2
    full, leading = (
        torch.stack([torch.stack([normal(8, x, 0.1, generator, exact)[3] for x in (0.5, 1, 2)]) for _ in range(n)])
        for n, exact in ((300, True), (100, False))
    )
    full, leading = (100 * (x / theory - 1).mean(1) for x in (full, leading))
    assert z(full, half) > deviation_limit(2, 100) and z(half, leading) > deviation_limit(2, 100)
    assert largest_deviation(leading.mean(), leading.std() / 10, 0.0) < deviation_limit(1, 100)
