"""Chapter "mode-dynamics": moments, conservation, time constants, alignment and waits, without the chapter's code."""

import math

import numpy as np
import torch

from icl_lib import training
from icl_lib.dynamics import LinearDynamics, population_gradient
from icl_lib.sweeps import deviation_limit
from tests.zscore import assert_mean

D = torch.float64


def descend(law, p, q, steps, batch, seed, tasks=None, every=10):
    g = torch.Generator().manual_seed(seed)
    tasks = training.antithetic_tasks(law.n_tasks, p.shape[-1], generator=g) if tasks is None else tasks
    options = {"covariance": law.eigenvalues.diag(), "length": law.length, "learning_rate": law.learning_rate}
    blocks = training.join_blocks(p, q)  # float32 or float64
    options |= {"n_steps": steps, "batch": batch, "every": every, "frozen": ("P1", "Q2")}
    return training.train(tasks, *blocks, **options, generator=g)


def aligned_descent(law, size, steps):
    """Whole steps on the exact mean loss, whitened diagonal tasks, written out: strengths (steps + 1, d)."""
    s, inverse = law.eigenvalues, 1 / law.length
    p = q = torch.full_like(s, size)
    kept = [p * q]
    for _ in range(steps):
        m = (1 + inverse) * s**3 * q**2 + inverse * s * (s**2 * q**2).sum()  # M_jj
        n = (1 + inverse) * s**2 * p**2 + inverse * s * (s * p**2).sum()  # N_j
        rate = law.learning_rate * law.n_tasks
        p, q = p + rate * (s**2 * q - m * p), q + rate * (s**2 * p - s * n * q)
        kept.append(p * q)
    return torch.stack(kept)


def half_times(strengths, limits, every=1):
    y = torch.log(2 * strengths.double().clamp_min(1e-9) / limits)
    after = (y > 0).long().argmax(0, keepdim=True)
    low, high = y.gather(0, after - 1)[0], y.gather(0, after)[0]
    return every * (after[0] - high / (high - low))


def test_moment():
    g = torch.Generator().manual_seed(0)
    s, a = torch.diag(torch.tensor([1.0, 0.5, 0.2], dtype=D)), torch.randn(3, 3, generator=g, dtype=D)
    for length in (2, 7):
        root = s.sqrt() @ training.sample_covariances(3, length, (20_000,), generator=g)
        hat = root @ root.mT
        assert_mean(hat @ a @ hat, s @ a @ s + (s @ a.mT @ s + torch.trace(a @ s) * s) / length)


def test_minibatches():
    g, law = torch.Generator().manual_seed(1), LinearDynamics([1.0, 0.5, 0.25], 6, 8, 0.01)
    p, q = 0.4 * torch.randn(2, 8, 3, 3, generator=g, dtype=D)
    path = descend(law, p, q, 50, 4, 2, tasks=torch.randn(8, 3, 3, generator=g, dtype=D), every=1)
    inner = lambda x, y: (x * y).sum((-1, -2))  # noqa: E731
    p, q, dp, dq = path.p2, path.q1, path.p2.diff(dim=0), path.q1.diff(dim=0)
    rounding = torch.finfo(D).eps * (inner(p, p) + inner(q, q))[:-1]
    assert ((inner(p[:-1], dp) - inner(q[:-1], dq)).abs() < rounding).all()  # half of it from storing the weights
    assert (inner(p[:-1], dp).abs() > 1e6 * rounding).double().mean() > 0.9  # the products themselves are not small
    change = (inner(p, p) - inner(q, q)).diff(dim=0)
    assert ((change - inner(dp, dp) + inner(dq, dq)).abs() < 4 * rounding).all()


def test_conservation():
    times, start = torch.linspace(0, 300, 31), ([0.3, 0.1, 0.2], [0.1, 0.4, 0.2])
    for length in (4, 8, math.inf):
        p, q = LinearDynamics([1.0, 0.5, 0.25], length, learning_rate=0.1).flow(times, *start)
        delta = p**2 - q**2
        assert (delta.sum(-1) - delta[0].sum()).abs().max() < 1e-8
        assert ((delta - delta[0]).abs().amax(0) < 1e-8).all() == math.isinf(length)
    s, g = torch.tensor([1.0, 0.5, 0.25], dtype=D), torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 3, 3, generator=g, dtype=D)  # not aligned: columns of P against rows of Q
    for tasks, length, alone in (
        (torch.randn(5, 3, generator=g, dtype=D), math.inf, True),
        (torch.randn(5, 3, generator=g, dtype=D), 8, False),
        (torch.randn(5, 3, 3, generator=g, dtype=D), math.inf, False),
    ):
        dp, dq = population_gradient(p, q, covariance=s.diag(), length=length, tasks=tasks)
        gap, size = (p * dp).sum(0) - (q * dq).sum(1), (p * dp).abs().sum()
        assert gap.sum().abs() < 1e-13 * size
        assert (gap.abs().max() < 1e-13 * size) == alone and (alone or gap.abs().max() > 1e-3 * size)
    law, tasks = LinearDynamics(s, math.inf, 6, 0.02), training.antithetic_tasks(6, 3, generator=torch.Generator())
    p, q = torch.tensor([0.3, -0.1, 0.7], dtype=D), torch.tensor([0.9, 0.4, 0.2], dtype=D)
    dp, dq = population_gradient(p.diag(), q.diag(), covariance=s.diag(), length=math.inf, tasks=tasks)
    after = (p - 0.02 * dp.diag()) ** 2 - (q - 0.02 * dq.diag()) ** 2  # a whole step: delta (1 - gap^2 / T^2)
    shrink = 1 - ((1 - p * q / law.limits) / law.timescales) ** 2
    torch.testing.assert_close(after, (p**2 - q**2) * shrink, rtol=1e-12, atol=1e-13)


def test_time_constants():
    s = torch.from_numpy(np.geomspace(1, 0.3, 6))
    law = LinearDynamics(s, 8192, 16, 0.1 / 16)
    wait = 0.5 * torch.log(law.limits / 0.01 - 1)
    small = torch.eye(6, dtype=D) * 1e-9
    tasks = torch.randn(16, 6, generator=torch.Generator().manual_seed(3), dtype=D)
    gradient = population_gradient(small, small, covariance=s.diag(), length=8192, tasks=tasks)[0]
    torch.testing.assert_close(-gradient.diag() / 1e-9, tasks.square().sum(0) * s**2, rtol=1e-12, atol=0.0)
    start = 0.1 * torch.eye(6).expand(16, 6, 6)
    half = half_times(descend(law, start, start, 420, 4, 4, every=1).strengths(), law.limits)
    constants = 1 / torch.expm1(wait / (half + 0.75 * math.log(2)))
    x = torch.log(s) - torch.log(s).mean()
    assert_mean(torch.log(constants) @ x / (x @ x), -2.0)
    assert_mean(torch.log(constants / law.timescales).mean(-1), 0.0)  # the factor in front
    rest = []
    for step in (0.2, 0.1):  # without noise, in whole steps: the half step is right to first order
        endless = LinearDynamics(s, math.inf, learning_rate=step)
        half = half_times(aligned_descent(endless, 0.1, round(60 / step))[:, None], endless.limits)[0]
        wait = 0.5 * torch.log(endless.limits / 0.01 - 1)
        rest.append(half - wait / torch.log1p(1 / endless.timescales) + 0.75 * math.log(2))
    for step, miss in zip((0.2, 0.1), rest, strict=True):
        assert (miss.abs() < step * s**2).all()


def test_logistic():
    times = torch.linspace(0, 150, 16, dtype=D)
    flat, free = (LinearDynamics(x, n, learning_rate=0.1) for x, n in (([0.7] * 3, 5), ([1.0, 0.5, 0.25], math.inf)))
    for law in (flat, free):
        assert (math.prod(law.flow(times, 0.2, 0.2)) - law.logistic(times, 0.04)).abs().max() < 1e-8
    tasks, errors = training.antithetic_tasks(6, 3, generator=torch.Generator().manual_seed(9)), []
    for step in (0.2, 0.1, 0.05):  # descent on the exact loss for endless prompts: an error of first order
        law = LinearDynamics([1.0, 0.5, 0.25], math.inf, 6, step / 6)
        p = q = 0.2 * torch.eye(3, dtype=D)
        path = [p.diag() * q.diag()]
        for _ in range(round(12 / step)):
            moves = population_gradient(p, q, covariance=law.eigenvalues.diag(), length=math.inf, tasks=tasks)
            p, q = (x - law.learning_rate * dx for x, dx in zip((p, q), moves, strict=True))
            path.append(p.diag() * q.diag())
        errors.append((torch.stack(path) - law.logistic(torch.arange(len(path)), 0.04)).abs().max().item())
    assert abs(2 * errors[2] - errors[1]) < abs(2 * errors[1] - errors[0]) < 0.1 * errors[1]
    misses = []
    for length in (10_000, 100_000):  # unequal modes at finite length: off at order 1/l
        law = LinearDynamics([1.0, 0.5, 0.25], length, learning_rate=0.1)
        misses.append((math.prod(law.flow(times * 6, 0.1, 0.1)) - law.logistic(times * 6, 0.01)).abs().max().item())
    assert abs(misses[0] / misses[1] - 10) < 0.1
    short = LinearDynamics([1.0, 0.5, 0.25], 8, 8, 0.2 / 8)  # areas between curves in simulations, in standard errors
    start = 0.1 * torch.eye(3).expand(8, 3, 3)
    path = descend(short, start, start, 300, 8, 5)
    area = lambda theory: ((theory[:, None] - path.strengths()) / short.limits).sum(0)  # noqa: E731
    z = lambda x: (x.mean(0) / x.std(0) * 8**0.5).abs().max()  # noqa: E731
    exact = aligned_descent(short, 0.1, 300)[::10]
    assert z(area(exact)) < deviation_limit(3, 8) < z(area(short.logistic(path.steps, 0.01)))


def test_delays():
    """Delays of four modes against descent on the mean loss, in standard errors; two laws nearly right fail."""
    law = LinearDynamics(np.geomspace(1, 0.4, 4), 1024, 8, 0.05 / 8)
    s, times = law.eigenvalues, torch.arange(561)
    start = 0.1 * torch.eye(4).expand(16, 4, 4)
    path = descend(law, start, start, 560, 8, 10, every=20)
    exact, logistic = aligned_descent(law, 0.1, 560), law.logistic(times, 0.01)
    step = torch.log(law.limits / 0.01 - 1) / (8 * law.timescales)
    flow = math.prod(law.flow(times[::20], 0.1, 0.1))
    closure = ((flow - logistic[::20]) / law.limits).abs().amax(0)
    assert (((exact - logistic) / law.limits).abs().amax(0) < step + closure).all()
    softer = torch.stack([law.logistic(times * s[j] ** -0.1, 0.01)[:, j] for j in range(4)], 1)
    endless = LinearDynamics(s, math.inf, 8, 0.05 / 8).logistic(times, 0.01)
    delays = lambda theory: ((theory[path.steps, None] - path.strengths()) / law.limits).sum(0)  # noqa: E731
    assert_mean(delays(exact), 0.0)
    for wrong in (softer, endless):
        x = delays(exact + wrong - logistic)
        assert (x.mean(0) / x.std(0) * 4).abs().max() > deviation_limit(4, 16)


def test_alignment():
    g, s = torch.Generator().manual_seed(6), torch.tensor([1.0, 0.7, 0.5], dtype=D)
    law, tasks = LinearDynamics(s, 64, 8, 0.1 / 8), training.antithetic_tasks(8, 3, generator=g)
    start = 0.1 * torch.linalg.qr(torch.randn(32, 3, 3, generator=g, dtype=D))[0]
    p, q, off = start, start, 1 - torch.eye(3, dtype=D)
    columns, rows = [p * off], [q * off]
    for n in range(240):
        a, v = q.square() @ s, p.square().sum(-2)
        rate = [8 * (65 / 64 * s**2 * x + s / 64 * (x * s).sum(-1, keepdim=True)) for x in (a, v)]
        drive = [8 * torch.diag_embed(s**2 * x.diagonal(dim1=1, dim2=2)) for x in (q, p)]
        dp, dq = p * rate[0][:, None] - drive[0], q * rate[1][..., None] * s - drive[1]
        if n % 80 == 0:
            exact = population_gradient(p, q, covariance=s.diag(), length=64, tasks=tasks)
            torch.testing.assert_close((dp, dq), exact)
        p, q = p - law.learning_rate * dp, q - law.learning_rate * dq
        columns += [p * off] if n % 10 == 9 else []
        rows += [q * off] if n % 10 == 9 else []
    path = descend(law, start, start, 240, 10, 7, tasks)
    overlap = lambda x, axis: (x * x[0]).sum(axis) / x[0].square().sum(axis)  # noqa: E731
    both = lambda x, y: torch.cat([overlap(x, -2), overlap(y, -1)], -1)  # noqa: E731
    found, theory = both(path.p2 * off, path.q1 * off), both(torch.stack(columns), torch.stack(rows))
    assert_mean((found - theory).sum(0), 0.0)  # areas: three columns of P_2, three rows of Q_1
    for power in (2, 0.5):  # controls: off-diagonal entries that decay twice, or half, as fast
        x = (found - theory.clamp_min(0) ** power).sum(0)
        z = (x.mean(0) / x.std(0) * 32**0.5).abs()
        assert min(z[:3].max(), z[3:].max()) > deviation_limit(6, 32)


def test_generic_tasks():
    """A tenth of the start: the spacing of half times hardly moves for generic tasks, for two spectra."""
    step, spacing = 0.1, {}
    for s in ([1.0, 0.5, 0.25], [1.0, 0.4, 0.2]):
        law = LinearDynamics(s, 256, 1, step)
        x, options = law.eigenvalues, {"covariance": law.eigenvalues.diag(), "length": 256, "tasks": "gaussian"}
        for size in (0.1, 0.01, 0.001):
            shared, own, path = size, torch.full((3,), size, dtype=D), []
            while not path or path[-1][2] < 0.6 * law.limits[2]:
                path.append(shared * own)
                gap = x**2 * (1 - shared * own / law.limits)
                moves = (own * gap).sum().item(), 3 * shared * gap
                if len(path) % 100 == 1:  # one value for all modes: the matrices are compared from time to time
                    dp, dq = population_gradient(shared * torch.eye(3, dtype=D), own.diag(), **options)
                    torch.testing.assert_close(-dp, moves[0] * torch.eye(3, dtype=D), rtol=1e-12, atol=1e-14)
                    torch.testing.assert_close(-dq, moves[1].diag(), rtol=1e-12, atol=1e-14)
                shared, own = shared + step * moves[0], own + step * moves[1]
            half = half_times(torch.stack(path)[:, None], law.limits)[0] * step
            spacing[s[1], size] = (half[2] - half[0]).item()
        wait = (1 / s[2] ** 2 - 1) * math.log(10)  # what commuting tasks add for a tenth of the start
        growth = [spacing[s[1], size / 10] - spacing[s[1], size] for size in (0.1, 0.01)]
        assert 0 < growth[1] < growth[0] / 5 and growth[0] < 0.05 * wait  # the spacing has a limit
    law = LinearDynamics([1.0, 0.5, 0.25], 256, 8, step / 8)
    start = torch.tensor([0.1, 0.01]).repeat_interleave(16)[:, None, None] * torch.eye(3)
    path = descend(law, start, start, 180, 8, 8, lambda g: torch.randn(32, 8, 3, 3, generator=g), every=1)
    half = half_times(path.strengths(), law.limits) * step
    near, far = (half[:, 2] - half[:, 0]).reshape(2, 16)
    assert_mean(far - near, spacing[0.5, 0.01] - spacing[0.5, 0.1])
