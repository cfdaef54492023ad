"""Finite contexts: exact loss, flow and minimum of aligned weights, and where the published formulas hold."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from icl_lib import dynamics, training
from icl_lib.dynamics import LinearDynamics
from icl_lib.sweeps import deviation_limit, largest_deviation
from tests.zscore import assert_mean

D = torch.float64
SPECTRUM = torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=D)


def blocks(p, q, runs):
    return training.join_blocks(*(x.diag().expand(runs, len(p), len(p)) for x in (p, q)))


def optimum(law):
    """Weights at the exact minimum, with the shares p^2 / q^2 = s."""
    theta, root = law.minimum()[0], law.eigenvalues.sqrt()
    return (theta * root).sqrt(), (theta / root).sqrt()


@pytest.mark.parametrize(("length", "noise", "shift"), [(1, 0.0, False), (6, 0.0, True), (6, 0.7, True)])
def test_loss_and_shift(length, noise, shift):
    generator = torch.Generator().manual_seed(length)
    p, q = torch.rand(2, 4, generator=generator, dtype=D)
    s = SPECTRUM.flip(0) if shift else SPECTRUM
    query = torch.tensor([0.3, 2.0, 1.0, 0.5], dtype=D) if shift else s
    alone = query - 2 * p * q * s * query + (1 + 1 / length) * (p * q * s) ** 2 * query
    cross = ((s + noise**2) * p**2).sum() * (s * query * q**2).sum() / length
    expected = (alone.sum() + cross) / 2
    n, value, attention = 30_000, torch.zeros(8, 8, dtype=D), torch.zeros(8, 8, dtype=D)
    value[4:, 4:], attention[:4, :4] = p.diag(), q.diag()
    w = torch.randn(n, 4, 1, generator=generator, dtype=D)
    x = s.sqrt()[:, None] * torch.randn(n, 4, length + 1, generator=generator, dtype=D)
    x[..., -1] *= (query / s).sqrt()
    y = w * x + noise * torch.randn(n, 4, length + 1, generator=generator, dtype=D)
    y[..., -1] = 0
    guess = training.attention_output(torch.cat([x, y], 1), value, attention, length)[:, 4:, -1]
    assert_mean((guess - w[..., 0] * x[..., -1]).square().sum(-1) / 2, expected)


def test_critical_length():
    s = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1, 0.02], dtype=D)
    root = s.sqrt()
    for j in range(1, 6):
        critical = ((root[:j] / root[j]) - 1).sum().item() - 1
        below, above = max(1, math.floor(critical)), max(1, math.floor(critical) + 1)
        assert LinearDynamics(s, above).minimum()[0][j] > 0
        if critical >= 1:
            assert LinearDynamics(s, below).minimum()[0][j] == 0
    exactly = LinearDynamics([1.0, 1 / 9], 1).minimum()[0]  # at its critical length 1 the second mode is silent
    assert exactly[0] > 0 == exactly[1]
    law = LinearDynamics(s, 3)  # a silent mode fades in the flow, whatever its start
    p, q = law.flow([0.0, 200.0, 1000.0], 0.5, 0.5)
    silent = law.minimum()[0] == 0
    assert silent.any() and ((p * q).diff(dim=0)[1:, silent] < 0).all()


def gradients(s, p, q, tasks, length=6, noise=0.0):
    law = {"covariance": s.diag(), "length": length, "tasks": tasks, "noise": noise}
    return torch.stack(dynamics.population_gradient(p.diag(), q.diag(), **law))


@pytest.mark.parametrize("length", [1, 6, 100])
def test_published_fixed_point(length):
    """It is exact for generic tasks (with label noise, too) and equal eigenvalues; else the gradient is known."""
    law, one, rounding = LinearDynamics(SPECTRUM, length), torch.ones(4, dtype=D), 1e-13
    pool, trace, limits = (
        training.antithetic_tasks(8, 4, generator=torch.Generator().manual_seed(0)),
        SPECTRUM.sum(),
        law.limits,
    )
    assert gradients(SPECTRUM, one, limits, "gaussian", length).abs().max() < rounding
    assert gradients(SPECTRUM, 2 * one, limits / 2, "gaussian", length).abs().max() < rounding
    noisy = 1 / ((1 + 1 / length) * SPECTRUM + (trace + 0.09) / length)
    assert gradients(SPECTRUM, one, noisy, "gaussian", length, 0.3).abs().max() < rounding
    assert gradients(SPECTRUM, one, limits, "gaussian", length, 0.3).abs().max() > rounding
    assert gradients(one, one, LinearDynamics(one, length).limits, pool, length).abs().max() < 8 * rounding
    for p, q in ((one, limits), (limits.sqrt(), limits.sqrt())):
        nu_p, nu_q = (SPECTRUM * p**2).sum(), (SPECTRUM**2 * q**2).sum()
        dp = SPECTRUM * p * (nu_q - SPECTRUM * q**2 * trace) / length
        dq = SPECTRUM**2 * q * (nu_p - p**2 * trace) / length
        found = gradients(SPECTRUM, p, q, pool, length) / 8
        assert (found - torch.stack([dp.diag(), dq.diag()])).abs().max() < rounding < found.abs().max()
    assert gradients(SPECTRUM, *optimum(law), pool, length).abs().max() < 8 * rounding


def test_coincidence_of_two_eigenvalues():
    """With (l + 1) sqrt(s s') = s + s' the published fixed point of aligned tasks is the exact minimum."""
    pool, one = training.antithetic_tasks(4, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2, dtype=D)
    for length in (2, 5):
        root = (length + 1 - math.sqrt((length + 1) ** 2 - 4)) / 2
        for s, holds in (([1.0, root**2], True), ([1.0, 1.1 * root**2], False)):
            law = LinearDynamics(s, length)
            same = (law.limits - law.minimum()[0]).abs().max() < 1e-13
            flat = gradients(law.eigenvalues, one, law.limits, pool, length).abs().max() < 1e-13
            assert same == flat == holds


def test_gap_of_the_published_loss():
    law, share = LinearDynamics(SPECTRUM, 6), SPECTRUM / SPECTRUM.sum()

    def gap(p, q):
        x, y = p**2, SPECTRUM * q**2
        return (share * x * y).sum(-1) - (share * x).sum(-1) * (share * y).sum(-1)

    p, q = torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    expected = law.paper_loss(p * q) - SPECTRUM.sum() ** 2 / 12 * gap(p, q)
    torch.testing.assert_close(law.loss(p, q), expected, rtol=1e-11, atol=1e-11)
    times = torch.linspace(0, 300, 60)
    p, q = law.flow(times, 0.03, 0.03)
    excess = law.paper_loss(p * q) - law.loss(p, q)
    torch.testing.assert_close(excess, SPECTRUM.sum() ** 2 / 12 * gap(p, q), rtol=0, atol=1e-12)
    assert excess.min() > -1e-12  # never too low in this run ...
    two = LinearDynamics([1.0, 0.35], 128)
    p, q = two.flow(times, 0.03, 0.03)
    assert (two.paper_loss(p * q) - two.loss(p, q)).min() < -1e-5  # ... but in this one, from the same start
    balanced = law.limits.sqrt()
    assert law.paper_loss(law.limits) < law.loss(balanced, balanced)  # and here it is too low


def test_the_gap_of_long_contexts():
    """The limit of the ratio; and that a fixed time and a time in proportion to the length give different limits."""
    trace, roots = SPECTRUM.sum().item(), SPECTRUM.sqrt().sum().item()
    limit = 5 * trace / (trace + roots**2)
    laws = [LinearDynamics(SPECTRUM, length) for length in (10**4, 10**5, 10**6)]
    far = [law.paper_loss(law.limits).item() / law.minimum()[1] - limit for law in laws]
    assert far[0] / far[1] == pytest.approx(10, rel=1e-2) and far[1] / far[2] == pytest.approx(
        10, rel=1e-2
    )  # order 1/l
    early, late = [], []
    for length in (2**11, 2**13, 2**15):
        law = LinearDynamics(SPECTRUM, length)
        p, q = law.flow([250.0, 25.0 * length], 0.03, 0.03)  # 1000 T_1, and 100 l T_1
        excess = (law.paper_loss(p * q) / law.loss(p, q) - 1).tolist()
        early.append(excess[0]), late.append(excess[1])
    assert early[0] > early[1] > early[2] and late[0] < late[1] < late[2] < limit - 1
    assert (limit - 1 - late[0]) / (limit - 1 - late[1]) == pytest.approx(4, rel=2e-2)  # order 1/l, again


def test_no_drift_at_the_exact_minimum():
    """One step of all four blocks: no entry of P_2 and Q_1 moves on average, while the published strengths do."""
    s = torch.tensor([1.0] * 4 + [0.5, 0.3], dtype=D)
    law = LinearDynamics(s, 2)
    assert law.minimum()[0][5] == 0
    tasks = training.antithetic_tasks(16, 6, generator=torch.Generator().manual_seed(0))
    options = {"covariance": s.diag(), "length": 2, "learning_rate": 0.01, "n_steps": 1, "batch": 200}
    balanced, largest = law.limits.sqrt(), []
    for p, q in (optimum(law), (balanced, balanced)):
        generator = torch.Generator().manual_seed(1)
        step = training.train(tasks, *blocks(p, q, 16), **options, generator=generator)
        change = torch.stack([x.diff(dim=0)[0] for x in (step.p2, step.q1)], 1).flatten(1)
        largest.append(largest_deviation(change.mean(0), change.std(0) / 4, torch.zeros(72)))
    assert largest[0] < deviation_limit(72, 16) < largest[1]


@pytest.mark.parametrize(("length", "grows"), [(1, False), (2, False), (4, True), (16, True)])
def test_growth_of_a_silent_mode(length, grows):
    """The critical length of the last mode is 2.6. Pairs of steps that differ in the sign of its weights only."""
    s, small = torch.tensor([1.0] * 4 + [0.5, 0.3], dtype=D), 0.03
    p, q = optimum(LinearDynamics(s[:-1], length))
    a, b = ((s[:-1] ** 2 * q**2).sum() / (length * s[-1])).item(), ((s[:-1] * p**2).sum() / length).item()
    rates, vectors = np.linalg.eigh([[-a, 1], [1, -b]])
    v = torch.tensor(np.abs(vectors[:, 1]))
    tasks, moved = training.antithetic_tasks(16, 6, generator=torch.Generator().manual_seed(length)), []
    for sign in (1, -1):
        begin = blocks(torch.cat([p, sign * small * v[:1]]), torch.cat([q, sign * small * v[1:]]), 16)
        generator = torch.Generator().manual_seed(10 + length)
        step = training.train(
            tasks,
            *(x.float() for x in begin),
            covariance=s.diag(),
            length=length,
            batch=1000,
            n_steps=1,
            learning_rate=0.05 / 16,
            generator=generator,
            frozen=("P1", "Q2"),
        )
        moved.append(torch.stack([x.diff(dim=0)[0, :, -1, -1] for x in (step.p2, step.q1)], -1).double() @ v)
    rate = (moved[0] - moved[1]) / (2 * small * 0.05 * s[-1] ** 2)
    assert_mean(rate, rates[1])
    z = rate.mean() / rate.std() * 4
    assert (z > deviation_limit(4, 16)) if grows else (z < -deviation_limit(4, 16))


def strengths(s, length, n_tasks, value, query, batch, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    tasks = training.antithetic_tasks(n_tasks, len(s), generator=generator)
    options = {
        "covariance": s.diag(),
        "length": length,
        "learning_rate": 0.05 / n_tasks,
        "n_steps": steps,
        "batch": batch,
    }
    run = training.train(tasks, value, query, **options, generator=generator, every=20, frozen=("P1", "Q2"))
    return run.steps, run.strengths().double(), LinearDynamics(s, length, n_tasks=n_tasks, learning_rate=0.05 / n_tasks)


def test_training_follows_the_flow():
    """Aligned starts: the exact flow passes the z-test over all modes and times; three other theories fail it."""
    s = torch.tensor(np.geomspace(1, 0.3, 6))
    start = torch.full((6,), 0.1)
    steps, found, law = strengths(s, 8, 16, *blocks(start, start, 16), batch=2, steps=400, seed=5)
    mean, se = found.mean(1)[1:], found.std(1)[1:] / 4

    def largest(theory):
        return largest_deviation(mean, se, theory[1:])

    def changed(factor):  # another number for (l + 1) / l
        def slope(_, z):
            p, q = z[:6], z[6:]
            nu_p, nu_q = (s.numpy() * p**2).sum(), (s.numpy() ** 2 * q**2).sum()
            dp = q - factor * s.numpy() * p * q**2 - nu_q * p / (8 * s.numpy())
            dq = p - factor * s.numpy() * q * p**2 - nu_p * q / 8
            return 0.05 * np.tile(s.numpy() ** 2, 2) * np.concatenate([dp, dq])

        times = steps.numpy()
        z = integrate.solve_ivp(
            slope, (0, times[-1]), [0.1] * 12, t_eval=times, method="LSODA", rtol=1e-9, atol=1e-11
        ).y.T
        return z[:, :6] * z[:, 6:]

    p, q = law.flow(steps, 0.1, 0.1)
    np.testing.assert_allclose(changed(9 / 8), p * q, rtol=1e-5)
    alone = [LinearDynamics([x], 8, 16, 0.05 / 16).flow(steps, 0.1, 0.1) for x in s.tolist()]
    controls = law.logistic(steps, 0.01), torch.cat([p * q for p, q in alone], 1), changed(1.0)
    limit = deviation_limit(mean.numel(), 16)
    assert largest(p * q) < limit < min(largest(x) for x in controls)


def test_finite_differences_of_the_loss():
    law = LinearDynamics(SPECTRUM, 6)
    p, q = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    nudge = 1e-5 * torch.eye(4, dtype=D)
    s, nu_p, nu_q = SPECTRUM, (SPECTRUM * p**2).sum(), (SPECTRUM**2 * q**2).sum()
    dp = s**2 * (q - 7 / 6 * s * p * q**2 - nu_q * p / (6 * s))
    dq = s**2 * (p - 7 / 6 * s * q * p**2 - nu_p * q / 6)
    torch.testing.assert_close((law.loss(p + nudge, q) - law.loss(p - nudge, q)) / 2e-5, -dp, atol=1e-8, rtol=0)
    torch.testing.assert_close((law.loss(p, q + nudge) - law.loss(p, q - nudge)) / 2e-5, -dq, atol=1e-8, rtol=0)
    assert abs((p * dp - q * dq).sum()) < 1e-12 < (p * dp - q * dq).abs().min()
