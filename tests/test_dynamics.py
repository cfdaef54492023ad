"""Learning dynamics: closed forms against integrators, finite differences, simulation and published levels."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from icl_lib import dynamics, training
from icl_lib.dynamics import LinearDynamics, SeparateHeads
from tests.zscore import assert_mean

D = torch.float64
SPECTRUM = [2.0, 1.0, 0.5, 0.25]
STARTS = [(0.1, 0.3), (-0.2, 0.1), (0.3, -0.3), (0.1, -0.30001), (0.0, 0.2), (0.2, 0.2), (-0.4, -0.1)]


def integrate(slope, start, times):
    return solve_ivp(slope, (0, times[-1]), start, t_eval=times, rtol=1e-12, atol=1e-14, method="DOP853").y.T


@pytest.mark.parametrize(("p0", "q0"), STARTS)
def test_modes_solve_their_equation(p0, q0):
    law = LinearDynamics(SPECTRUM, 100, n_tasks=4, learning_rate=0.01)
    times, s = np.linspace(0, 200, 9), law.limits.numpy()

    def slope(_, z):
        p, q = z[:4], z[4:]
        rest = (1 - p * q / s) / law.timescales.numpy()
        return np.concatenate([q * rest, p * rest])

    expected = integrate(slope, [p0] * 4 + [q0] * 4, times)
    p, q = law.modes(times, p0, q0)
    np.testing.assert_allclose(np.hstack([p, q]), expected, atol=1e-9)
    torch.testing.assert_close(p**2 - q**2, torch.full_like(p, p0**2 - q0**2), atol=1e-12, rtol=1e-9)


def test_logistic_is_the_balanced_case_and_half_time_is_where_it_says():
    law = LinearDynamics(SPECTRUM, 32, n_tasks=3, learning_rate=0.02)
    times = torch.linspace(0, 300, 50, dtype=D)
    p, q = law.modes(times, 0.2, 0.2)
    torch.testing.assert_close(law.logistic(times, 0.04), p * q, atol=1e-13, rtol=1e-12)
    half = law.half_time(0.04)
    torch.testing.assert_close(law.logistic(half, 0.04).diagonal(), law.limits / 2)
    assert (law.logistic(1e6, 0.04) - law.limits).abs().max() < 1e-12
    assert not law.logistic(5.0, 0.0).any()
    torch.testing.assert_close(law.timescales, 1 / (0.02 * 3 * torch.tensor(SPECTRUM, dtype=D) ** 2))


def test_flow_is_the_gradient_of_the_loss():
    law = LinearDynamics(SPECTRUM, 6, n_tasks=5, learning_rate=0.01)
    p0, q0 = torch.tensor([0.3, 0.1, -0.2, 0.4], dtype=D), torch.tensor([0.2, 0.5, 0.1, 0.4], dtype=D)
    p, q = p0.clone().requires_grad_(), q0.clone().requires_grad_()
    law.loss(p, q).backward()
    step = 1e-4
    ps, qs = law.flow([0.0, step], p0, q0)
    torch.testing.assert_close((ps[1] - ps[0]) / step, -0.01 * 5 * p.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close((qs[1] - qs[0]) / step, -0.01 * 5 * q.grad, rtol=1e-3, atol=1e-6)
    long = law.flow([0.0, 1.0, 50.0, 1e4], 0.1, 0.1)
    losses = law.loss(*long)
    assert (losses.diff() < 0).all()
    strengths, least = law.minimum()
    torch.testing.assert_close(long[0][-1] * long[1][-1], strengths, atol=1e-6, rtol=1e-6)
    assert losses[-1].item() == pytest.approx(least, abs=1e-9)


def test_flow_without_end_is_the_closed_form():
    law = LinearDynamics(SPECTRUM, math.inf, learning_rate=0.1)
    times = [0.0, 3.0, 10.0, 40.0]
    for one, other in zip(law.flow(times, 0.1, 0.3), law.modes(times, 0.1, 0.3), strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_published_example_of_the_minimum():
    law = LinearDynamics(SPECTRUM, 6)
    strengths, least = law.minimum()
    np.testing.assert_allclose(strengths, [0.32881, 0.57496, 0.91616, 1.17112], atol=5e-6)
    assert least == pytest.approx(0.778791, abs=5e-7)
    np.testing.assert_allclose(law.limits, [0.33803, 0.55814, 0.82759, 1.09091], atol=5e-6)
    weak = LinearDynamics([1.0, 0.01], 2).minimum()[0]
    assert weak[1] == 0 and weak[0] > 0  # a mode that is never learned


def test_paper_loss_is_exact_for_equal_eigenvalues_or_endless_prompts_only():
    p = torch.tensor([0.6, 0.4, 0.3, 0.5], dtype=D)
    flat = LinearDynamics([0.7] * 4, 5)
    same = torch.full((4,), 0.5, dtype=D)
    torch.testing.assert_close(flat.loss(same, same), flat.paper_loss(same * same))
    law = LinearDynamics(SPECTRUM, math.inf)
    torch.testing.assert_close(law.loss(p, 2 * p), law.paper_loss(2 * p * p))
    short = LinearDynamics(SPECTRUM, 6)
    assert abs(short.paper_loss(p * p) / short.loss(p, p) - 1) > 0.01


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 3), min_size=1, max_size=5), st.integers(1, 60), st.floats(0.01, 0.3))
def test_the_flow_never_raises_the_loss_and_its_minimum_is_stationary(spectrum, length, start):
    law = LinearDynamics(spectrum, length, learning_rate=0.1)
    p, q = law.flow(torch.linspace(0, 200, 20), start, start)
    losses = law.loss(p, q)
    assert (losses.diff() <= 1e-9).all() and losses[-1] >= law.minimum()[1] - 1e-9
    assert (p * q > -1e-9).all()
    logistic = law.logistic(torch.linspace(0, 200, 20), min(start, law.limits.min().item()))
    assert (logistic.diff(dim=0) >= -1e-12).all() and (logistic <= law.limits + 1e-12).all()


@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("tasks", ["gaussian", "symmetric", "given"])
def test_population_loss_against_simulation(tasks, noise):
    generator = torch.Generator().manual_seed(1)
    d, length, n = 3, 4, 100_000
    p, q = (torch.randn(d, d, generator=generator, dtype=D) for _ in range(2))
    s, s_q = (torch.diag(torch.tensor(v, dtype=D)) for v in ([1.0, 0.5, 0.3], [0.4, 0.6, 1.0]))
    fixed = torch.randn(2, d, d, generator=generator, dtype=D)
    w = torch.randn(n, d, d, generator=generator, dtype=D)
    if tasks == "symmetric":
        w = (w + w.mT) / math.sqrt(2)
    if tasks == "given":
        w = fixed[torch.arange(n) % 2]
    x = s.sqrt() @ torch.randn(n, d, length, generator=generator, dtype=D)
    y = w @ x + noise * torch.randn(n, d, length, generator=generator, dtype=D)
    query = s_q.sqrt() @ torch.randn(n, d, 1, generator=generator, dtype=D)
    error = 0.5 * (p @ (y @ x.mT / length) @ q @ query - w @ query).square().sum((-1, -2))
    law = {"covariance": s, "length": length, "query_covariance": s_q, "noise": noise}
    given_tasks = fixed if tasks == "given" else tasks
    expected = dynamics.population_loss(p, q, tasks=given_tasks, **law).item()
    assert_mean(error, expected / (2 if tasks == "given" else 1))


def test_population_gradient_against_finite_differences(generator):
    d, step = 3, 1e-6
    p, q, dp, dq = (torch.randn(d, d, generator=generator, dtype=D) for _ in range(4))
    s = torch.diag(torch.tensor([1.0, 0.5, 0.3], dtype=D))
    law = {"covariance": s, "length": 5, "tasks": "gaussian", "n_tasks": 3, "noise": 0.2}
    plus, minus = (dynamics.population_loss(p + x * dp, q + x * dq, **law).item() for x in (step, -step))
    gp, gq = dynamics.population_gradient(p, q, **law)
    assert (plus - minus) / (2 * step) == pytest.approx(((gp * dp).sum() + (gq * dq).sum()).item(), rel=1e-6)


def test_aligned_diagonal_case_is_the_loss_of_the_modes():
    law = LinearDynamics(SPECTRUM, 6)
    tasks = training.antithetic_tasks(8, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tasks.mT @ tasks, 8 * torch.eye(4, dtype=D))
    assert not tasks.sum(0).abs().max() > 1e-12
    p, q = torch.tensor([0.3, 0.1, -0.2, 0.4], dtype=D), torch.tensor([0.2, 0.5, 0.1, 0.4], dtype=D)
    s = torch.diag(torch.tensor(SPECTRUM, dtype=D))
    loss = dynamics.population_loss(p.diag(), q.diag(), covariance=s, length=6, tasks=tasks)
    torch.testing.assert_close(loss / 8, law.loss(p, q))


def test_published_saddle_levels_and_the_flow_that_visits_them():
    """The levels are twice the losses published with Zhang, Singh, Latham & Saxe 2025, for d = 4 and 31 examples."""
    published = pd.read_csv(Path(__file__).parent / "reference" / "saddle_levels.csv")
    heads = SeparateHeads([0.4, 0.3, 0.2, 0.1], int(published.n_context[0]))
    np.testing.assert_allclose(2 * heads.plateaus(), published.loss, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    v0 = torch.full((4,), 1e-2, dtype=D)
    k0, q0 = (torch.nn.functional.normalize(torch.randn(4, 4, generator=generator, dtype=D), dim=1) for _ in range(2))
    k0, q0 = 1e-2 * k0, 1e-2 * q0
    v, k, q = heads.flow(torch.tensor([0.0, 10.0, 1e3, 2e4], dtype=D), v0, k0, q0)
    for t in range(4):  # conserved
        torch.testing.assert_close(v[t] ** 2, k[t].square().sum(-1), atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(v[t] ** 2, q[t].square().sum(-1), atol=1e-7, rtol=1e-6)
    losses = heads.loss(torch.einsum("th,thi,thj->tij", v, k, q))
    assert (losses.diff() <= 1e-12).all() and losses[-1] >= heads.plateaus()[-1] - 1e-9


def test_the_loss_of_separate_heads_has_their_flow(generator):
    heads = SeparateHeads([0.5, 0.3, 0.2], 8)
    matrix = torch.randn(3, 3, generator=generator, dtype=D).requires_grad_()
    heads.loss(matrix).backward()
    s, m = heads.eigenvalues, heads.eigenvalues / heads.limits
    expected = torch.diag(s**2) - m[:, None] * matrix.detach() * s
    torch.testing.assert_close(-matrix.grad, expected)
