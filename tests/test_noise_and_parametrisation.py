"""Noise as a clock, generic tasks, separate heads: the chapter's formulas against independent implementations."""

import csv
import importlib.resources
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from scipy.signal import find_peaks

from icl_lib import dynamics, training
from icl_lib.dynamics import LinearDynamics, SeparateHeads
from icl_lib.sweeps import deviation_limit
from tests.zscore import assert_mean

D = torch.float64
SPECTRUM = [0.4, 0.3, 0.2, 0.1]


def shared_value(law, times, p0, q0, outputs):
    """Weights p and q_j of generic tasks, by integration of their equations."""
    s, limits = law.eigenvalues.numpy(), law.limits.numpy()

    def slope(_, z):
        force = law.learning_rate * law.n_tasks * s**2 * (1 - z[0] * z[1:] / limits)
        return np.append(z[1:] @ force, outputs * z[0] * force)

    start = np.append(p0, np.broadcast_to(q0, s.shape))
    options = {"method": "LSODA", "rtol": 1e-11, "atol": 1e-15}
    z = solve_ivp(slope, (0, times[-1]), start, t_eval=times, **options).y
    return z[0], z[1:].T


def random_heads(size, runs, seed, heads=8):
    generator = torch.Generator().manual_seed(seed)
    k, q = torch.randn(2, runs, heads, 4, generator=generator, dtype=D)
    unit = torch.nn.functional.normalize
    return torch.full((runs, heads), size, dtype=D), size * unit(k, dim=-1), size * unit(q, dim=-1)


def drops(loss, times):
    return len(find_peaks(-np.gradient(loss.numpy(), np.log(times)), prominence=0.01)[0])


@pytest.mark.parametrize("spectrum", [SPECTRUM, [1.0, 0.3, 0.09]])
@pytest.mark.parametrize("outputs", [1, 4])
def test_one_shared_escape(spectrum, outputs):
    """A smaller start delays all modes by the same time, up to what is in proportion to the start."""
    law, times = LinearDynamics(spectrum, 31), np.geomspace(0.5, 500, 20001)
    half_times = []
    for start in (1e-3, 1e-4, 1e-5, 1e-6):
        p, q = shared_value(law, times, start, start, outputs)
        x = p[:, None] * q / law.limits.numpy()
        after, modes = (x >= 0.5).argmax(0), np.arange(len(spectrum))
        old, new = x[after - 1, modes], x[after, modes]
        half_times.append(times[after] - (new - 0.5) / (new - old) * (times[after] - times[after - 1]))
    delays = np.diff(half_times, axis=0) / math.log(10)
    together = 1 / math.sqrt(outputs * (np.array(spectrum) ** 4).sum())
    excess = abs(delays / together - 1).max(1)
    assert excess[2] < 1e-2 and abs(excess[:-1] / excess[1:] - 10).max() < 1
    apart = law.half_time(1e-12) - law.half_time(1e-10)  # commuting tasks, weights of 1e-6 and of 1e-5
    assert ((apart / math.log(10)).numpy()[1:] > 1.5 * together).all()


def test_number_of_drops():
    law, heads, times = LinearDynamics(SPECTRUM, 31), SeparateHeads(SPECTRUM, 31), np.geomspace(1, 6000, 600)
    assert drops(law.loss(*law.flow(times, 0.03, 0.03)), times) == 4
    for outputs in (1, 4):
        p, q = shared_value(law, times, 0.03, 0.03, outputs)
        assert drops(law.paper_loss(p[:, None] * q), times) == 1
        wide = LinearDynamics([1.0, 0.3], 31)  # the number depends on the spectrum
        p, q = shared_value(wide, times / 10, 0.03, 0.03, outputs)
        assert drops(wide.paper_loss(p[:, None] * q), times) == 2
    v, k, q = heads.flow(times, *(x[0] for x in random_heads(0.1, 1, 0)))
    assert drops(heads.loss(torch.einsum("th,thi,thj->tij", v, k, q)), times) == 4


@pytest.mark.parametrize("length", [2, 31])
def test_shared_value_is_the_exact_gradient(length):
    law, rng = LinearDynamics(SPECTRUM, length), np.random.default_rng(0)
    s, limits = law.eigenvalues.numpy(), law.limits.numpy()
    for _ in range(4):
        p, q = rng.normal(), rng.normal(size=4)
        options = {"covariance": law.eigenvalues.diag(), "length": length, "tasks": "gaussian", "n_tasks": 3}
        dp, dq = dynamics.population_gradient(torch.tensor(p * np.eye(4)), torch.tensor(np.diag(q)), **options)
        force = 3 * s**2 * (1 - p * q / limits)
        np.testing.assert_allclose(dp, -(q @ force) * np.eye(4), atol=1e-12)
        np.testing.assert_allclose(dq, -4 * p * np.diag(force), atol=1e-12)
    p, q = shared_value(law, np.array([0.0, 10.0, 9000.0]), 0.05, 0.02, 4)
    assert np.ptp(4 * p**2 - (q**2).sum(1)) < 1e-6
    np.testing.assert_allclose(p[-1] * q[-1], limits, rtol=1e-6)


@pytest.mark.parametrize("length", [3, 31])
def test_published_levels(length):
    heads = SeparateHeads(SPECTRUM, length)
    levels = 2 * heads.plateaus()
    for m in range(5):
        size = torch.cat([heads.limits[:m] ** (1 / 3), torch.zeros(5 - m, dtype=D)])
        v, k = size.clone().requires_grad_(), (size[:, None] * torch.eye(5, 4, dtype=D)).requires_grad_()
        loss = heads.loss((v[:, None] * k).mT @ k)
        assert 2 * loss.item() == pytest.approx(levels[m].item(), abs=1e-12)
        assert all(x.abs().max() < 1e-12 for x in torch.autograd.grad(loss, (v, k)))
    if length == 31:
        with open(Path(__file__).parent / "reference" / "saddle_levels.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["n_context"] == "31"]
        np.testing.assert_allclose(levels, [float(row["loss"]) for row in rows], atol=5e-7)


def descend(heads, v, k, q, rate, steps, omega):
    """Losses of gradient descent on the heads, (steps + 1, runs)."""
    losses = []
    for _ in range(steps + 1):
        a = (v[..., None] * k).mT @ q
        losses.append(heads.loss(a.double()))
        w = omega(a)
        dv, dk, dq = (k * (q @ w.mT)).sum(-1), v[..., None] * (q @ w.mT), v[..., None] * (k @ w)
        v, k, q = v + rate * dv, k + rate * dk, q + rate * dq
    return torch.stack(losses).numpy()


def exact_force(heads):
    s, ratio = heads.eigenvalues, heads.eigenvalues / heads.limits
    return lambda a: torch.diag(s**2) - ratio[:, None] * a * s


def crossing(losses, level):
    """Step at which each run falls below a level, interpolated."""
    after = (losses <= level).argmax(0)
    assert after.min() > 0
    old, new = (np.take_along_axis(losses, i[None], 0)[0] for i in (after - 1, after))
    return after - (level - new) / (old - new)


def test_time_of_the_first_drop():
    heads, size, rate = SeparateHeads(SPECTRUM, 31), 0.1, 0.5
    v, k, q = random_heads(1.0, 8, 1)
    s, limit = heads.eigenvalues.numpy(), heads.limits[0].item()
    middle = (heads.plateaus()[:-1] + heads.plateaus()[1:]).numpy() / 2

    def inverse(r, x, y):
        return 2 / np.linalg.norm(np.exp(s**2 * r) * (x + y) + np.exp(-(s**2) * r) * (x - y))

    runs = zip(k.numpy(), q.numpy(), strict=True)
    ends = [min(quad(inverse, 0, 400, head)[0] for head in zip(*run, strict=True)) for run in runs]
    end = ((1 - math.sqrt(0.5)) * limit) ** (1 / 3)
    constant = (1 / end - quad(lambda a: a / (limit - a**3), 0, end)[0]) / s[0] ** 2
    times = []
    for start in (size, size / 2):
        losses = descend(heads, start * v, start * k, start * q, rate, round(45 / start / rate), exact_force(heads))
        times.append([rate * crossing(losses, level) for level in middle[:2]])
        theory = np.array(ends) / start - constant + rate * math.log(end / start)
        if start == size / 2:
            late = (times[-1][0] - theory) / rate  # in steps
            assert abs(late).mean() < 2
            assert abs(late - constant / rate).mean() > 4  # without the constant
            assert abs(late + math.log(end / start)).mean() > 2  # without the delay of whole steps
    assert abs(np.mean(times[1], 1) / np.mean(times[0], 1) - 2).max() < 0.15  # more exactly the smaller the start


def test_runs_of_separate_heads():
    heads, rate, n = SeparateHeads(SPECTRUM, 31), 0.5, 48
    generator, root = torch.Generator().manual_seed(0), heads.eigenvalues.sqrt().float()

    def prompts(*shape):  # the covariance of 31 drawn inputs, not a drawn covariance
        x = root[:, None] * torch.randn(*shape, 4, 32, generator=generator)
        return torch.randn(*shape, 4, 1, generator=generator), x[..., :31], x[..., 31:]

    def estimate(a, n=n):
        task, x, query = prompts(len(a), n)
        context = x @ (x.mT @ task) / 31
        error = task.mT @ query - context.mT @ a.float()[:, None] @ query
        return (error * context @ query.mT).mean(1).double()

    v, k, q = (x[0].float().requires_grad_() for x in random_heads(0.5, 1, 2))
    task, x, query = prompts()
    answer = task.mT @ (x @ x.mT / 31) @ ((v[:, None] * k).mT @ q) @ query  # the model itself
    dv, dk, dq = torch.autograd.grad(-0.5 * (task.mT @ query - answer).square().sum(), (v, k, q))
    context = x @ x.mT @ task / 31
    force = ((task.mT @ query - answer) * context @ query.mT).detach()
    torch.testing.assert_close(dk, (v[:, None] * (q @ force.mT)).detach())
    torch.testing.assert_close(dq, (v[:, None] * (k @ force)).detach())
    torch.testing.assert_close(dv, (k * (q @ force.mT)).sum(-1).detach())
    a = 0.5 * torch.randn(4, 4, generator=generator, dtype=D)
    assert_mean(estimate(a.expand(4000, 4, 4), n=1), exact_force(heads)(a))

    start = random_heads(0.2, 24, 3)  # one run from each of 24 starts
    middle = (heads.plateaus()[:-1] + heads.plateaus()[1:]).numpy() / 2
    exact = descend(heads, *start, rate, 550, exact_force(heads))
    noisy = descend(heads, *start, rate, 550, estimate)
    times = [np.array([crossing(x, level) for level in middle[:3]]) for x in (noisy, exact)]

    def furthest(late):  # end of the intervals of confidence
        return (abs(late.mean(1)) + deviation_limit(3, 24) * late.std(1, ddof=1) / math.sqrt(24)).max()

    assert furthest(times[0] / times[1] - 1) < 0.1
    assert furthest(times[0] / np.roll(times[1], 1, 1) - 1) > 0.1  # the exact descent from another start


def clock(t, batch, length, runs, seed, fresh=False, ratio=1e-3):
    """Half times of a mode by its own recursion, with contexts drawn as chi-square variables."""
    rng = np.random.default_rng(seed)
    p, done = np.full(runs, math.sqrt(ratio)), np.full(runs, np.nan)
    step = 0
    while np.isnan(done).any():
        task = rng.normal(size=(runs, batch)) if fresh else 1.0
        chi = rng.chisquare(length, (runs, batch)) / length
        tick = task**2 * rng.normal(size=(runs, batch)) ** 2 * chi * (1 - p[:, None] ** 2 * chi / (1 + 2 / length))
        new, step = p * (1 + tick.mean(1) / t), step + 1
        hit = np.isnan(done) & (new**2 >= 0.5)
        done[hit] = (step - (new**2 - 0.5) / (new**2 - p**2))[hit]
        p = np.where(np.isnan(done), new, 0.7)  # what is done does not matter any more
    return done


def mean_time(t, noise, ratio=1e-3):
    bracket = 0.5 * math.log(0.5 / ratio) + math.log(0.5) + 1
    return t / 2 * math.log((1 - ratio) / ratio) + (1 + noise) / 2 * bracket - 0.5


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_whole_steps(level):
    """Gradient descent without noise is late by half the logarithm of the ratio of its speeds."""
    t, ratio, p = 40, 1e-3, [math.sqrt(1e-3)]
    while p[-1] ** 2 < level:
        p.append(p[-1] * (1 + (1 - p[-1] ** 2) / t))
    found = len(p) - 1 - (p[-1] ** 2 - level) / (p[-1] ** 2 - p[-2] ** 2)
    flow = t / 2 * math.log(level * (1 - ratio) / ratio / (1 - level))
    delay = 0.5 * math.log(math.sqrt(level / ratio) * (1 - level) / (1 - ratio))
    assert abs(found - flow - delay) < 1 / t


@pytest.mark.parametrize(("fresh", "batch"), [(False, 1), (False, 4), (True, 8)])
def test_mean_time(fresh, batch):
    length, runs, t = 64, 2000, 40
    nu = 9 * (1 + 2 / length) - 1 if fresh else 2 + 6 / length
    half = torch.from_numpy(clock(t, batch, length, runs, seed=batch, fresh=fresh))
    assert_mean(half, mean_time(t, nu / batch))
    assert (half.mean() - mean_time(t, 0)) > 4 * half.std() / math.sqrt(runs)  # without noise: refuted


@pytest.mark.parametrize("length", [2, 16])
@pytest.mark.parametrize("fresh", [True, False])
def test_variance_of_a_tick(length, fresh):
    generator, n = torch.Generator().manual_seed(0), 200_000
    x, w = torch.randn(2, n, generator=generator, dtype=D)
    tasks = w if fresh else torch.tensor([0.5, math.sqrt(1.75)], dtype=D).repeat(n // 2)
    fourth = 3.0 if fresh else (0.5**4 + 1.75**2) / 2
    chi = training.sample_covariances(1, length, (n,), generator=generator)[:, 0, 0] ** 2
    tick = tasks**2 * x**2 * chi
    if fresh:
        assert_mean((tick - 1) ** 2, 3 * fourth * (1 + 2 / length) - 1)
    else:  # fixed tasks: the mean of the tasks does not fluctuate
        assert_mean((tick - tasks**2) ** 2, fourth * (2 + 6 / length))


def test_spread():
    """Over the square root of the variance of the ticks: 1, less a correction of first order in the step."""
    runs, length, excess = 4000, 1000, []
    for t, batch in ((20, 2), (40, 2), (40, 8)):
        nu = (2 + 6 / length) / batch
        half = clock(t, batch, length, runs, seed=t + batch)
        excess.append(half.std() / math.sqrt(nu * mean_time(t, nu)) - 1 + (4 / batch + 1 - nu) / (2 * t))
    assert abs(np.mean(excess)) < deviation_limit(1, runs) / math.sqrt(2 * runs * len(excess))


def test_noise_that_stays():
    length, t, batch = 8, 20, 8
    p0 = torch.full((128, 1, 1), math.sqrt(LinearDynamics([1.0], length).limits.item()))
    value, query = training.join_blocks(p0, p0)
    law = {"covariance": torch.eye(1), "length": length, "learning_rate": 1 / t, "n_steps": 10 * t, "batch": batch}
    generator = torch.Generator().manual_seed(t)
    run = training.train(torch.ones(1, 1), value, query, **law, generator=generator, frozen=("P1", "Q2"))
    x = run.strengths()[3 * t :, :, 0].double().numpy() / p0[0].item() ** 2
    variance = ((x - x.mean()) ** 2).mean(0) / (6 * 14 / (8 * 10) / batch / (t - 1))
    error = variance.std() / 128**0.5 / 2
    assert abs(variance.mean() ** 0.5 - 1) < 0.05 + 4 * error  # first order in the step


def test_generic_tasks():
    d, length, k, rate, steps, runs = 3, 16, 16, 0.02, 120, 8
    law = LinearDynamics(np.geomspace(1, 0.4, d), length, learning_rate=rate)
    limits, times = law.limits.numpy(), np.arange(0, steps + 1, 10)
    block, mean = 0.1 * torch.eye(d).expand(runs, d, d), []

    def draw(g):
        return torch.randn(runs, k, d, d, generator=g)

    for fixed in (False, True):
        generator = torch.Generator().manual_seed(0)
        found = training.train(
            draw(generator) if fixed else draw,
            *training.join_blocks(block, block),
            covariance=law.eigenvalues.diag().float(),
            length=length,
            learning_rate=rate / k,
            n_steps=steps,
            batch=8,
            generator=generator,
            every=10,
        )
        mean.append(found.strengths().mean(1).numpy() / limits)
    weights, theory = (0.1, np.full(d, 0.1)), []
    for _ in range(steps + 1):  # the equations in whole steps
        p, q = weights
        theory.append(p * q / limits)
        force = (1 - theory[-1]) / law.timescales.numpy()
        weights = p + q @ force, q + d * p * force

    def far(x):
        return abs(x - np.array(theory)[times]).max(0).mean()

    assert far(mean[0]) < 0.05
    assert far(mean[1]) > 0.05  # fixed tasks
    assert far(law.logistic(times, 0.01).numpy() / limits) > 0.4


def test_stored_generic_runs():
    law = LinearDynamics(np.geomspace(1, 0.4, 4), 32, learning_rate=0.02)
    with importlib.resources.files("icl_lib.data").joinpath("dynamics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["setting"] == "generic"]
    steps = sorted({int(row["step"]) for row in rows})
    p, q = shared_value(law, np.array(steps, dtype=float), 0.1, 0.1, 4)
    theory = p[:, None] * q
    miss = [abs(float(r["strength"]) - theory[steps.index(int(r["step"])), int(r["mode"])]) for r in rows]
    scale = law.limits.numpy()[[int(r["mode"]) for r in rows]]
    assert len(rows) == 4 * len(steps) and (np.array(miss) / scale).max() < 0.05
