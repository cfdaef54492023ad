"""Claims of the chapter on double descent: where the peak is, how high, and what removes it."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from zscore import assert_mean

from icl_lib import asymptotics, hermite, models, moments, prompts, sweeps, tasks

RUNS = 16
VARIANCE, MEAN = hermite.expand("relu", 0).residual ** 2 + 0.01**2, hermite.expand("relu", 0).coefficients.item()


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(dim: int, n: int, generator: torch.Generator, length: int | None = None) -> prompts.Summaries:
    xi = tasks.TaskPrior(dim).sample(n, generator=generator)
    return prompts.sample_summaries(xi, length or dim, target="relu", noise=0.01, generator=generator)


@cache
def norms(dim: int, length: int | None = None) -> Tensor:
    p = draw(dim, 20000, rng(dim), length)
    r = (p.query.square().sum(-1) * p.summary.square().sum(-1)).sort().values.view(200, -1).mean(1)
    return r / r.mean()


def formula(
    dim: int, n: int, k: int, lam: float, r: Tensor | None = None, head: str = "relu", length: int | None = None
) -> float:
    return asymptotics.random_transformer_error(
        dim=dim,
        length=length or dim,
        n_prompts=n,
        width=k,
        penalty=n * lam,
        activation=head,
        target="relu",
        noise=0.01,
        norm_samples=r,
    )


def best(
    dim: int, n: int, k: int, r: Tensor | None = None, head: str = "relu", length: int | None = None
) -> tuple[float, float]:
    return asymptotics.optimal_penalty(lambda lam: formula(dim, n, k, lam, r, head, length), 1e-3, 1e3)


def beyond(runs: Tensor, law: list[float], dim: int) -> float:
    """Largest relative deviation beyond 1/d, in standard errors."""
    relative = runs / torch.tensor(law, dtype=torch.float64)
    se = relative.std(0) / len(runs) ** 0.5
    return (((relative.mean(0) - 1).abs() - 1 / dim) / se).max().item()


def fit(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Ridge regression from the smaller of the two systems."""
    if len(x) < x.shape[1]:
        return x.mT @ torch.linalg.solve(x @ x.mT + penalty * torch.eye(len(x)), y)
    return torch.linalg.solve(x.mT @ x + penalty * torch.eye(x.shape[1]), x.mT @ y)


def train(
    dim: int, jobs: list[tuple[int, int, float]], seed: int, length: int | None = None, shuffled: bool = False
) -> Tensor:
    """Errors of relu heads on the same prompts; a job: prompts, neurons, penalty on the mean squared error."""
    g = rng(1000 + seed)
    n, k = (int(max(job[i] for job in jobs)) for i in (0, 1))
    p, test = draw(dim, n, g, length), draw(dim, 600, g, length)
    layer = models.RandomTransformer(dim, k, "relu", generator=g)
    a, b = (layer.features(layer.preactivations(s)) for s in (p, test))
    y = p.answer[torch.randperm(n, generator=g)] if shuffled else p.answer
    guess = [b[:, :k] @ fit(a[:n, :k], y[:n], n * lam) for n, k, lam in jobs]
    luck = (test.answer - MEAN).square().mean() - VARIANCE
    return models.icl_error(torch.stack(guess), test.answer) - luck


def z(difference: Tensor) -> Tensor:
    return difference.mean(0) / difference.std(0) * len(difference) ** 0.5


def test_white_amplification() -> None:
    g = rng(1)
    for n, k in [(30, 10), (30, 40), (30, 60)]:
        x = torch.randn(24, 10, n, k, generator=g, dtype=torch.float64)
        assert_mean(torch.linalg.svdvals(x).pow(-2).sum(-1).mean(-1), min(n, k) / (abs(n - k) - 1))


def test_heavy_tail_at_the_peak() -> None:
    from scipy import stats

    x = torch.linalg.inv(torch.randn(4000, 8, 8, generator=rng(2), dtype=torch.float64))
    assert stats.kstest((1 / x[:, 0].square().sum(-1)).numpy(), stats.chi2(1).cdf).pvalue > 1e-3


def test_relu_amplification() -> None:
    """The derivative of T_1 for unequal lengths is met within 1/d; the one for equal lengths is not."""
    dim, n = 16, 128
    cases = [(k, lam) for lam in (1e-4, 1.0) for k in (n // 4, n, 4 * n)]
    line = []
    for r in (norms(dim), torch.ones(1)):
        pairs = [[trace(dim, n, k, lam * x, r) for x in (0.999, 1.001)] for k, lam in cases]
        line.append([(low - high) / (0.002 * n * lam) for (low, high), (_, lam) in zip(pairs, cases, strict=True)])
    sample = []
    for seed in range(RUNS):
        g = rng(100 + seed)
        net = models.RandomTransformer(dim, 4 * n, "relu", generator=g)
        x = net.features(net.preactivations(draw(dim, n, g)))
        zeta = {k: torch.linalg.svdvals(x[:, :k]).square() for k, _ in cases}
        sample.append(torch.stack([(zeta[k] / (zeta[k] + n * lam) ** 2).sum() for k, lam in cases]))
    limit = sweeps.deviation_limit(len(cases), RUNS)
    assert beyond(torch.stack(sample), line[0], dim) < limit < beyond(torch.stack(sample), line[1], dim)


def trace(dim: int, n: int, k: int, lam: float, samples: Tensor) -> float:
    """T_1 by bisection on T itself: nu from the directions, eta from the prompts."""
    m, c, r = moments.summary_moments(dim, dim, target="relu", noise=0.01), hermite.expand("relu", 2), samples.numpy()
    c0, c1, c2 = c.coefficients.square().tolist()
    o = (dim * m.beta**2 + m.gamma**2) * dim**2 / m.trace**2
    groups = [
        (c0 + c2 * o / (2 * dim), 1),
        (c1 * m.beta / m.trace, dim**2),
        (c1 * m.gamma / m.trace, dim),
        (c2 * o / (dim * (dim + 2)), (dim - 1) * (dim + 2) / 2),
    ]
    tail = c.second_moment - sum(s * N for s, N in groups)

    def bisect(
        function: Callable[[float], float], low: float, high: float
    ) -> float:  # root of a decreasing function of a logarithm
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if function(math.exp(middle)) > 0 else (low, middle)
        return math.exp(low)

    def excess(T: float) -> float:
        nu = bisect(lambda nu: sum(N * s / (s + nu) for s, N in groups) + tail / nu - T, -40, 20)
        eta = bisect(lambda eta: (r / (r + eta)).mean() - T / n, -40, 40)
        return eta * T * (k - T) * nu - n * lam

    low, high = 0.0, float(min(n, k))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def test_peak_height() -> None:
    """Heads at n = k follow the formula for unequal lengths, not the one for equal ones; both grow like a root."""
    for r in (None, norms(12)):
        ratio = formula(12, 72, 72, 1e-12, r) / formula(12, 72, 72, 1e-10, r)
        assert abs(ratio / 10 - 1) < 1e-3
    lams = (2e-5, 1e-4, 1e-3, 1e-2, 1.0)
    runs = torch.stack([train(12, [(72, 72, lam) for lam in lams], 100 + seed) for seed in range(64)])
    limit = sweeps.deviation_limit(len(lams), 64)
    assert beyond(runs, [formula(12, 72, 72, lam, norms(12)) for lam in lams], 12) < limit
    assert beyond(runs, [formula(12, 72, 72, lam) for lam in lams], 12) > limit


@pytest.mark.parametrize("head", ["relu", "tanh", "softplus"])
def test_more_never_hurts_at_the_best_penalty(head: str) -> None:
    """One per cent more prompts or neurons, at the penalty that was best, bounds the least error from above."""
    for n, k in [(200, 800), (800, 200)]:
        lam, least = best(12, n, k, norms(12), head)
        larger = (n + n // 100, k), (n, k + k // 100)
        assert max(formula(12, *size, lam, norms(12), head) for size in larger) < least


def test_at_a_fixed_level_more_never_hurts() -> None:
    """The step of the proof: lambda = (n - T) (k - T) nu / n keeps the level."""
    T = trace(12, 60, 60, 0.1, torch.ones(1))
    nu = 60 * 0.1 / (60 - T) ** 2
    e = [[formula(12, n, k, (n - T) * (k - T) * nu / n) for k in (60, 90, 400)] for n in (60, 90, 400)]
    assert max(np.diff(e, axis=0).max(), np.diff(e, axis=1).max()) < 0


CROSS = [(72, 9), (72, 36), (72, 72), (72, 144), (72, 288)]
CROSS = CROSS + [(k, n) for n, k in CROSS]


@cache
def crossing() -> tuple[Tensor, list[tuple[int, int, float]]]:
    """Errors at the penalties 1e-4, 0.1 and the best, in 12 dimensions; across the width, then the sample size."""
    jobs = [(n, k, lam or best(12, n, k, norms(12)[::4])[0]) for lam in (1e-4, 0.1, 0.0) for n, k in CROSS]
    return torch.stack([train(12, jobs, seed) for seed in range(32)]), jobs


def test_heads_follow_the_formula() -> None:
    runs, jobs = crossing()
    limit = sweeps.deviation_limit(len(jobs), len(runs))
    assert beyond(runs, [formula(12, *job, norms(12)) for job in jobs], 12) < limit
    assert beyond(runs, [formula(12, *job) for job in jobs], 12) > limit


def test_double_descent_and_its_cure() -> None:
    """A peak at n = k against all other sizes; at the best penalty no step rises, and the ends fall."""
    runs = crossing()[0].view(32, 3, 2, 5)
    tiny, cured = runs[:, 0], runs[:, 2]
    others = tiny[..., [0, 1, 3, 4]]
    assert z((tiny[..., 2:3] / others).log()).min() > sweeps.deviation_limit(8, 32)
    assert z(cured.diff(dim=-1)).max() < sweeps.deviation_limit(8, 32)
    assert z(cured[..., 0] - cured[..., -1]).min() > sweeps.deviation_limit(2, 32)


def test_a_fixed_penalty_leaves_a_hump() -> None:
    """In 20 dimensions, at 0.1: a rise and fall with n, a rise with k; scaled features may do without a peak."""
    jobs = [(100, 200, 0.1), (25, 200, 0.1), (800, 200, 0.1), (200, 800, 0.1), (200, 25, 0.1)]
    runs, r = torch.stack([train(20, jobs, 300 + seed) for seed in range(36)]), norms(20)
    assert z(runs[:, [0, 0, 3]] - runs[:, [1, 2, 4]]).min() > sweeps.deviation_limit(3, 36)
    enough, less = (np.diff([formula(20, 200, k, lam * k, r) for k in (25, 100, 200, 800)]) for lam in (5e-3, 5e-4))
    assert enough.max() < 0 < less.max()


def test_longer_contexts_lower_the_error() -> None:
    """At the penalty 0.1 and at the best one; at the best, shuffled answers do not profit as much."""
    dim, n, k, sizes = 10, 400, 200, (5, 14, 40)
    jobs = [[(n, k, 0.1), (n, k, best(dim, n, k, norms(dim, x)[::4], length=x)[0])] for x in sizes]
    own = [[train(dim, job, seed, x) for job, x in zip(jobs, sizes, strict=True)] for seed in range(18)]
    errors = torch.stack([torch.stack(row) for row in own])
    assert z(errors[:, :-1] - errors[:, 1:]).min() > sweeps.deviation_limit(4, 18)
    lost = torch.stack([torch.stack([train(dim, jobs[i], s, sizes[i], True)[1] for i in (0, 2)]) for s in range(8)])
    assert z((lost - errors[:8, [0, 2], 1]).diff()[:, 0]) > sweeps.deviation_limit(1, 8)


def linear(dim: int, n: int, lam: float, r: Tensor) -> float:
    """The error of linear attention with intercept, solved for Q, at a level found by bisection."""
    m, phi = moments.summary_moments(dim, dim, target="relu", noise=0.01), hermite.expand("relu", 1)
    power = phi.coefficients[1].item() ** 4 / (dim * m.beta)

    def traces(nu: float) -> list[float]:
        return [dim**2 * (m.beta / (m.beta + nu)) ** p + dim * (m.gamma / (m.gamma + nu)) ** p for p in (1, 2)]

    def ridge_of(T: float) -> float:  # eta
        low, high = -40.0, 40.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if (r / (r + math.exp(middle))).mean() > T / n else (low, middle)
        return math.exp(low)

    low, high = -40.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        T = traces(math.exp(middle))[0]
        small = T >= n or ridge_of(T) * T * math.exp(middle) < n * lam
        low, high = (middle, high) if small else (low, middle)
    nu = math.exp(high)
    T1, T2 = traces(nu)
    factor = n * T2 / T1**2 * (r / (r + ridge_of(T1))) ** 2
    missed, rest = power * (nu / (m.beta + nu)) ** 2, VARIANCE - power
    Q = (factor * (rest / r + missed)).mean() / (1 - factor.mean())
    return (Q + rest + missed).item()


def test_linear_attention_peaks_at_its_number_of_features() -> None:
    """The peak is at n = d (d + 1); the formula for unequal lengths is met, the one for equal lengths is not."""
    dim, features, runs = 12, 156, []
    sizes = [78, 117, 156, 234, 624]
    for seed in range(RUNS):
        g = rng(seed)
        p, test = draw(dim, 4 * features, g), draw(dim, 1000, g)
        fits = [models.LinearTransformer(intercept=True).fit(p[:n], n * 1e-4) for n in sizes]
        runs.append(torch.stack([models.icl_error(fit.predict(test), test.answer) for fit in fits]))
    e = torch.stack(runs)
    assert z((e[:, [2, 2]] / e[:, [1, 3]]).log()).min() > sweeps.deviation_limit(2, RUNS)
    limit = sweeps.deviation_limit(len(sizes), RUNS)
    law = [linear(dim, n, 1e-4, norms(dim)) for n in sizes]
    assert beyond(e, law, dim) < limit < beyond(e, [linear(dim, n, 1e-4, torch.ones(1)) for n in sizes], dim)
    for n, value in zip(sizes, law, strict=True):
        given = asymptotics.linear_transformer_error(
            dim=dim,
            length=dim,
            n_prompts=n,
            penalty=n * 1e-4,
            target="relu",
            noise=0.01,
            intercept=True,
            norm_samples=norms(dim),
        )
        assert math.isclose(value, given, rel_tol=1e-6)
