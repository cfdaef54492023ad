"""Spectral measures: ranks, distances and curvatures on a linear Transformer whose training is solved."""

import math

import numpy as np
import pytest
import torch

from icl_lib import spectral, training
from icl_lib.dynamics import LinearDynamics, population_loss
from icl_lib.sweeps import deviation_limit, largest_deviation
from tests.zscore import assert_mean

D = torch.float64
SPECTRUM = torch.tensor([1.0, 0.5, 0.25], dtype=D)
RUNS, STEPS, EVERY = 12, 540, 10
LAW = LinearDynamics(SPECTRUM, 10**6, n_tasks=6, learning_rate=0.1 / 6)


def exp_entropy(x):
    return torch.special.entr(x / x.sum(-1, keepdim=True)).sum(-1).exp()


def course(start, steps=STEPS, every=EVERY):
    """The balanced modes in whole steps, at the recorded ones."""
    path = [torch.as_tensor(start, dtype=D) * torch.ones(3, dtype=D)]
    for _ in range(steps):
        path.append(path[-1] + path[-1] * (1 - path[-1] ** 2 / LAW.limits) / LAW.timescales)
    return torch.stack(path)[::every]


def descend(start, seed, steps=STEPS, runs=RUNS):
    generator, w = torch.Generator().manual_seed(seed), torch.diag(torch.as_tensor(start) * torch.ones(3))
    tasks = training.antithetic_tasks(6, 3, generator=generator)
    value, query = training.join_blocks(*2 * [w.repeat(runs, 1, 1)])
    options = {"length": 10**6, "learning_rate": 0.1 / 6, "n_steps": steps, "batch": 16, "every": EVERY}
    law = {"covariance": SPECTRUM.diag(), "generator": generator, "frozen": ("P1", "Q2")}
    return training.train(tasks, value, query, **law, **options)


@pytest.fixture(scope="module")
def runs():
    return descend(0.03, 0)


def miss(samples, theory):
    """Distance of the means over runs (second axis) in parts of what is allowed; all runs agree at time 0."""
    mean, se = samples[1:].mean(1), samples[1:].std(1) / samples.shape[1] ** 0.5
    return largest_deviation(mean, se, theory[1:]) / deviation_limit(len(mean), samples.shape[1])


def test_ranks(runs):
    theta = course(0.03) ** 2
    for skip in (0, 1):
        ranks = spectral.product_rank(runs.p2, runs.q1, skip)
        kept = theta.sort(-1).values[:, : 3 - skip]
        assert miss(ranks, exp_entropy(kept)) < 1 < miss(ranks, exp_entropy(kept**2))  # shares of squares
        assert miss(ranks, exp_entropy(kept.sqrt())) > 1  # rank of a factor
        assert miss(ranks, exp_entropy(theta)) > 1 or skip == 0


def test_four_definitions():
    spectrum = torch.tensor([3, 1, 0.5, 0.1, 0], dtype=D)
    shares = [spectrum, spectrum**2, spectrum.exp()]
    assert [round(exp_entropy(x).item(), 3) for x in shares] == [2.547, 1.551, 2.394]
    share = spectrum / spectrum.sum()
    assert torch.exp(-(share * share.log()).sum()).isnan()
    assert spectral.effective_rank(spectrum.diag()).item() == pytest.approx(2.547, abs=5e-4)
    torch.testing.assert_close(spectral.effective_rank(10 * spectrum.diag()), exp_entropy(spectrum))
    factor = torch.diag(spectrum.sqrt())  # shares of the squares of a balanced factor are those of the product
    torch.testing.assert_close(exp_entropy(torch.linalg.svdvals(factor) ** 2), spectral.product_rank(factor, factor))


def test_rate_of_the_rank():
    t = torch.linspace(1, 500, 250, dtype=D)
    for start in (0.001, torch.tensor([0.001, 0.01, 0.3], dtype=D)):
        before, theta, after = (LAW.logistic(t + h, start) for h in (-0.001, 0, 0.001))
        share, growth = theta / theta.sum(-1, keepdim=True), 2 * (1 - theta / LAW.limits) / LAW.timescales
        centred = theta.log() - (share * theta.log()).sum(-1, keepdim=True)
        rate = -(share * centred * growth).sum(-1)
        slope = (exp_entropy(after).log() - exp_entropy(before).log()) / 0.002
        assert (rate - slope).abs().max() < 1e-7 < rate.abs().max()


def test_starts(runs):
    ahead = [0.03, 0.2, 0.9]
    ranks = exp_entropy(course(ahead, 200) ** 2)
    assert ranks.argmin() == 0
    assert exp_entropy(course(0.03) ** 2).min() < 1.5
    trained = descend(ahead, 1, 200)
    assert miss(spectral.product_rank(trained.p2, trained.q1), ranks) < 1
    rise = spectral.product_rank(trained.p2, trained.q1)[5:] - ranks[0]
    assert (rise.mean(1) / rise.std(1)).min() > deviation_limit(len(rise), RUNS) / RUNS**0.5
    dip = spectral.product_rank(runs.p2, runs.q1)[4] - 1.5
    assert dip.mean() < -deviation_limit(1, RUNS) * dip.std() / RUNS**0.5


def test_products():
    generator, decay = torch.Generator().manual_seed(0), torch.logspace(0, -3.5, 8, dtype=D)
    left, right = torch.linalg.qr(torch.randn(2, 10, 96, 8, generator=generator, dtype=D)).Q
    factors = (left * decay).float(), (right * decay).float().mT
    exact = exp_entropy(decay[6:] ** 2)
    assert (spectral.product_rank(*factors, skip=6) - exact).abs().max() < 96 * torch.finfo(torch.float32).eps
    assert exp_entropy(torch.linalg.svdvals(factors[0] @ factors[1])[:, 6:].double()).min() > 2


BASIS = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=D)).Q


def row_distance(q, end, i=0):
    one, other = BASIS[:, i] * q, BASIS[:, i] * q[end]
    return (1 - (one * other).sum(-1) ** 2 / one.square().sum(-1) / other.square().sum()).clamp_min(0).sqrt()


def test_rows(runs):
    """One row in a rotated basis, in single runs, to two end points; the wrong end point misses."""
    q, rows = course(0.03), BASIS.mT @ runs.q1.double() @ BASIS
    for i, end, other in ((0, 54, 20), (0, 20, 54), (2, 54, 20)):
        distance = spectral.subspace_distance(rows[:, :, i : i + 1], rows[end, :, i : i + 1])
        clear = (row_distance(q, end, i) > 0.1) & (row_distance(q, other, i) > 0.1)  # noise lifts distances near 0
        clear[0] = False
        mean, se = distance[clear].mean(1), distance[clear].std(1) / RUNS**0.5
        limit = deviation_limit(int(clear.sum()), RUNS)
        assert largest_deviation(mean, se, row_distance(q, end, i)[clear]) < limit
        assert largest_deviation(mean, se, row_distance(q, other, i)[clear]) > 2 * limit
    assert spectral.subspace_distance(runs.q1, runs.q1[-1:]).max() < 1e-6  # full row rank


def drift(steps, begin, factor, seed, shape=(400, 3, 24)):
    generator, path = torch.Generator().manual_seed(seed), []
    x = begin * torch.randn(shape, generator=generator, dtype=D)
    for _ in range(steps):
        x = factor * x + torch.randn(shape, generator=generator, dtype=D)
        path.append(x)
    return torch.stack(path)


def test_drifts():
    """Walk from 0, from a random start, with decay, past its end, with unequal steps, and as factor of a product."""
    t = torch.arange(1, 21, dtype=D)
    scale = torch.exp(-t / 8)
    uneven = (scale[:, None, None, None] * drift(20, 0, 0, 3)).cumsum(0)
    plain, path = drift(20, 0, 1, 0), scale.square().cumsum(0)
    left = torch.randn(400, 5, 3, generator=torch.Generator().manual_seed(9), dtype=D)
    for walk, end, square, mix in (
        (plain, 20, t / 20, None),
        (plain, 10, torch.minimum(t / 10, 10 / t), None),
        (drift(20, 3, 1, 1), 20, (9 + t) / 29, None),
        (drift(20, (1 - 0.64) ** -0.5, 0.8, 2), 20, 0.64 ** (20 - t), None),
        (uneven, 20, path / path[-1], None),
        (plain, 20, t / 20, left),
    ):
        last = walk[end - 1] if mix is None else mix @ walk[end - 1]
        keep = t != end
        size = last.square().sum((-1, -2))
        outside = size * spectral.subspace_distance(walk[keep], last) ** 2
        mean = size * 0.875 * (1 - square[keep, None])
        assert_mean((outside - mean).T, 0.0)
        with pytest.raises(AssertionError):  # without the baseline
            assert_mean((outside - mean / 0.875).T, 0.0)
    own = spectral.subspace_distance(left @ plain, (left @ plain)[-1])
    torch.testing.assert_close(own[:-1], spectral.subspace_distance(plain, (left @ plain)[-1])[:-1])


def half_fall(steps, distance, baseline):
    above = distance > baseline / 2
    return steps[len(above) - 1 - above.flip(0).int().argmax(0)].double()


def test_half_falls():
    """Once all modes are learned the date of the fall stays; that of a walk doubles with the end."""
    ends, level = (STEPS // EVERY, 2 * STEPS // EVERY), (2 / 3) ** 0.5

    def date(q, end):
        return half_fall(EVERY * torch.arange(end + 1), row_distance(q[: end + 1], end)[:, None], level)

    more, q = descend(0.3, 7, 2 * STEPS, 8), course(0.3, 2 * STEPS)
    rows = (BASIS.mT @ more.q1.double() @ BASIS)[:, :, :1]
    found = [half_fall(more.steps, spectral.subspace_distance(rows[: n + 1], rows[n]), level) for n in ends]
    assert all(((dates - date(q, n)).abs() <= 2 * EVERY).all() for dates, n in zip(found, ends, strict=True))
    assert (found[1] / found[0]).max() < 1.2  # a walk would move by 2
    later = course(0.03, 2 * STEPS)  # here the last mode is still to come at the first end
    assert date(later, ends[1]) / date(later, ends[0]) > 1.3
    walk, t = drift(100, 0, 1, 8, (RUNS, 16, 48)), torch.arange(1, 101)
    dates = [half_fall(t, spectral.subspace_distance(walk[:n], walk[n - 1]), level) for n in (50, 100)]
    assert_mean(dates[1] / dates[0], 2.0)


def test_times_of_the_curvature():
    grid = torch.linspace(-2, 1, 6001, dtype=D)
    zeta = 1 / (1 + torch.exp(2 * grid))
    times = []
    for c in (0, 0.1, 1, 10, 1000):
        bend = spectral.curvature(c + zeta**2, 3)
        polynomial = (c + zeta**2) * zeta**2 * (1 - zeta) * (2 - 3 * zeta)
        times.append([grid[1 + bend.argmin()].item(), grid[1 + bend.argmax()].item()])
        assert times[-1] == pytest.approx(
            [grid[polynomial.argmin()].item(), grid[polynomial.argmax()].item()], abs=1e-3
        )
    assert (np.diff(times, axis=0) > 0).all()
    assert times[0] == pytest.approx([-1.5 * math.log(2), 0], abs=1e-3)
    assert times[-1] == pytest.approx([-0.926, 0.233], abs=1e-3)


def test_curvature(runs):
    p = course(0.03)
    tasks = 3**0.5 * torch.eye(3, dtype=D)
    law = {"covariance": SPECTRUM.diag(), "length": 10**6, "tasks": tasks}
    losses = population_loss(runs.p2.double(), runs.q1.double(), **law) / 3
    bend, exact = spectral.curvature(losses.mT, 5).mT, spectral.curvature(LAW.loss(p, p), 5)
    assert miss(bend, exact) < 1
    assert miss(bend[:-2], exact[2:]) > 1  # two records early
    assert miss(bend, exact.abs()) > 1  # without the sign
    around = (EVERY * (torch.arange(len(exact)) + 2) - LAW.half_time(0.03**2)[1]) / LAW.timescales[1]
    near = (around > -1.6) & (around < 1.5)
    assert around[near][exact[near].argmin()].item() == pytest.approx(-1, abs=0.26)  # records are T / 4 apart
    assert around[near][exact[near].argmax()].item() == pytest.approx(0.1, abs=0.26)


def test_noise_of_minibatches():
    """Noise of single prompts lifts lag 0 by its variance; constant losses scatter by 2 L chi / n to first order."""
    zeta, size = 1 - course(0.03)[:30] ** 2 / LAW.limits, 8
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(2, 2000, 30, size, 3, generator=generator, dtype=D)
    noisy = 0.5 * ((w * x * zeta[:, None]) ** 2 * SPECTRUM).sum(-1).mean(-1)
    clean = spectral.loss_autocorrelation(0.5 * (SPECTRUM * zeta**2).sum(-1), range(5))
    chi2 = 2 / size * (SPECTRUM**2 * zeta**4).sum(-1)
    lift = chi2[:26].mean() * (torch.arange(5) == 0)
    values = spectral.loss_autocorrelation(noisy, range(5))
    assert_mean(values, clean + lift)
    with pytest.raises(AssertionError):
        assert_mean(values, clean)
    for n in (3, 9):
        level, chi = 0.4, 0.05
        losses = level + chi * torch.randn(4000, n + 2, generator=generator, dtype=D)
        bend = spectral.curvature(losses, n + 2)[:, 0]
        assert_mean(bend, chi**2)
        assert_mean((bend - chi**2) ** 2, 4 * level**2 * chi**2 / n**2 + 7 * chi**4 / n)
        with pytest.raises(AssertionError):  # no cancelling
            assert_mean((bend - chi**2) ** 2, 6 * level**2 * chi**2 / n)
