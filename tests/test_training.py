"""Training: gradients against autograd, drawn covariances against Wishart moments, runs against theory."""

import math

import pytest
import torch

from icl_lib import dynamics, training
from icl_lib.dynamics import LinearDynamics
from tests.zscore import assert_mean

D = torch.float64


def prompt(length, dim, noise, n_tasks, generator):
    w = torch.randn(n_tasks, dim, dim, generator=generator, dtype=D)
    x = torch.randn(n_tasks, dim, length + 1, generator=generator, dtype=D)
    e = noise * torch.randn(n_tasks, dim, length, generator=generator, dtype=D)
    return w, x, e


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients_are_those_of_autograd_through_the_whole_model(length, noise, diagonal, generator):
    dim = 3
    w, x, e = prompt(length, dim, noise, 2, generator)
    w = torch.diag_embed(w[..., 0]) if diagonal else w
    value = torch.randn(1, dim, 2 * dim, generator=generator, dtype=D)
    query = torch.randn(1, 2 * dim, dim, generator=generator, dtype=D)
    labels = torch.cat([w @ x[..., :-1] + e, torch.zeros_like(x[..., -1:])], -1)
    full_value, full_query = torch.zeros(2 * dim, 2 * dim, dtype=D), torch.zeros(2 * dim, 2 * dim, dtype=D)
    full_value[dim:], full_query[:, :dim] = value[0], query[0]
    full_value.requires_grad_(), full_query.requires_grad_()
    z = torch.cat([x, labels], -2)
    answer = training.attention_output(z, full_value, full_query, length)[:, dim:, -1:]
    (0.5 * (answer - w @ x[..., -1:]).square().sum()).backward()
    root = torch.tensor([[1.0, 0.2, 0.0], [0.2, 0.7, 0.1], [0.0, 0.1, 0.4]], dtype=D)
    white = torch.linalg.solve(root, x[..., :-1])
    factor = (torch.cat([white, e / noise], -2) if noise else white) / math.sqrt(length)
    queries = x[..., -1].mT[:, None]  # (d, 1, 2)
    got = training._gradients(
        value, query, training._spread(w, 1, 1, dim), queries, factor.permute(1, 2, 0)[:, :, None], length, root, noise
    )
    torch.testing.assert_close(got[0][0], full_value.grad[dim:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got[1][0], full_query.grad[:, :dim], rtol=1e-10, atol=1e-10)
    assert not full_value.grad[:dim].any() and not full_query.grad[:, dim:].any()  # the other blocks


@pytest.mark.parametrize("length", [2, 3, 7])
def test_sampled_covariances_have_the_moments_of_wishart_matrices(length):
    generator = torch.Generator().manual_seed(0)
    factor = training.sample_covariances(3, length, (200_000,), generator=generator)
    assert factor.shape == (200_000, 3, min(3, length))
    s = factor @ factor.mT
    assert_mean(s[:, 0, 0], 1.0)
    assert_mean(s[:, 0, 1], 0.0)
    assert_mean(s[:, 2, 2], 1.0)
    assert_mean((s @ s)[:, 0, 0], 1 + 4 / length)  # S S + (S S + Tr(S) S) / N at S = I
    assert_mean((s @ s)[:, 2, 2], 1 + 4 / length)
    assert_mean(s[:, 0, 0] * s[:, 1, 1], 1.0)


def start(runs, d, size):
    block = size * torch.eye(d, dtype=D).expand(runs, d, d)
    return training.join_blocks(block, block)


def test_training_follows_the_theory():
    """Sixteen runs of the full model, aligned, N = 2048: all modes within 0.05 of their logistic curves."""
    generator = torch.Generator().manual_seed(0)
    s = torch.logspace(0, math.log10(0.4), 4, dtype=D)
    law = LinearDynamics(s, 2048, n_tasks=16, learning_rate=0.05 / 16)
    tasks = training.antithetic_tasks(16, 4, generator=generator)
    options = {"covariance": s.diag(), "length": 2048, "learning_rate": 0.05 / 16, "n_steps": 150, "batch": 8}
    run = training.train(tasks, *start(16, 4, 0.1), **options, generator=generator, every=15, frozen=("P1", "Q2"))
    assert isinstance(run, training.Trajectory) and run.steps.tolist() == list(range(0, 151, 15))
    gap = (run.strengths().mean(1) - law.logistic(run.steps, 0.01)).abs() / law.limits
    assert gap.max() < 0.05
    assert not run.value[..., :4].any() and not run.query[..., 4:, :].any()
    torch.testing.assert_close(run.strengths(torch.eye(4, dtype=D)), run.strengths())


def test_training_with_noise_and_fresh_tasks_lowers_the_population_loss(generator):
    s = torch.diag(torch.tensor([1.0, 0.5], dtype=D))

    def fresh(g):
        return torch.randn(8, 8, 2, 2, generator=g, dtype=D)  # eight tasks for each of eight runs

    options = {"covariance": s, "length": 6, "learning_rate": 0.004, "n_steps": 200, "batch": 8, "noise": 0.3}
    run = training.train(fresh, *start(8, 2, 0.2), **options, generator=generator, every=200)
    law = {"covariance": s, "length": 6, "tasks": "gaussian", "noise": 0.3}
    losses = dynamics.population_loss(run.p2, run.q1, **law).mean(-1)
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("diagonal", [True, False])
def test_runs_with_tasks_of_their_own_are_separate_runs(diagonal, generator):
    """The gradient of each of three runs, on its own tasks, is that of a run alone."""
    runs, n_tasks, d, length, batch = 3, 4, 2, 3, 2
    w = torch.randn(runs, n_tasks, d, d, generator=generator, dtype=D)
    w = torch.diag_embed(w[..., 0]) if diagonal else w
    value = torch.randn(runs, d, 2 * d, generator=generator, dtype=D)
    query = torch.randn(runs, 2 * d, d, generator=generator, dtype=D)
    x = torch.randn(d, runs, n_tasks * batch, generator=generator, dtype=D)
    factor = training.sample_covariances(d, length, (runs, n_tasks * batch), generator=generator).permute(2, 3, 0, 1)
    rest = (length, torch.eye(d, dtype=D), 0.0)
    together = training._gradients(value, query, training._spread(w, batch, runs, d), x, factor, *rest)
    for i in range(runs):
        only = slice(i, i + 1)
        spread = training._spread(w[i], batch, 1, d)
        alone = training._gradients(value[only], query[only], spread, x[:, only], factor[:, :, only], *rest)
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[i])
