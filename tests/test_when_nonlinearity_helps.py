"""When a random head beats linear attention: never at leading order on fresh tasks, with few tasks it does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor
from zscore import assert_mean

from icl_lib import asymptotics, hermite, models, moments, prompts, tasks
from icl_lib.prompts import Summaries
from icl_lib.sweeps import deviation_limit

SEEDS = 12
Array = np.ndarray
ROOT = math.sqrt(2 * math.pi)
HEADS = {  # relu without its mean, and without its second coefficient
    "centred": hermite.Activation("centred", lambda g: torch.relu(g) - 1 / ROOT, (0.0,)),
    "flat": hermite.Activation("flat", lambda g: torch.relu(g) - (g**2 - 1) / (2 * ROOT), (0.0,)),
}


def draw(dim: int, length: int, n: int, prior: tasks.TaskPrior, g: torch.Generator, target: str = "relu") -> Summaries:
    return prompts.sample_summaries(prior.sample(n, generator=g), length, target=target, noise=0.01, generator=g)


def errors(
    jobs: list[tuple[str, int, float]], dim: int, length: int, n: int, seed: int, target: str = "relu",
    pool: int | None = None,
) -> tuple[Tensor, Array | None]:  # fmt: skip
    """Errors (jobs, 2) on tasks of the pool and on fresh ones; the pool's unit tasks."""
    g = torch.Generator().manual_seed(10_000 * dim + seed)
    prior = tasks.TaskPrior(dim, n_tasks=pool)
    train = draw(dim, length, n, prior, g, target)
    tests = [draw(dim, length, 1000, p, g, target) for p in (prior, prior.fresh())]
    rows = []
    for model, width, level in jobs:
        fit: models.LinearTransformer | models.RandomTransformer
        if model.startswith("linear"):
            fit = models.LinearTransformer(intercept=model != "linear")
        else:
            fit = models.RandomTransformer(dim, width, HEADS.get(model, model), generator=g, dtype=torch.float32)
        fit.fit(train, n * level)
        rows.append([models.icl_error(fit.predict(s), s.answer).item() for s in tests])
    units = None if prior.pool is None else torch.nn.functional.normalize(prior.pool, dim=1).numpy()
    return torch.tensor(rows, dtype=torch.float64), units


def best(model: str, dim: int, length: int, n: int, width: float, target: str = "relu") -> tuple[float, float]:
    known: dict[str, Any] = {"dim": dim, "length": length, "n_prompts": n, "target": target, "noise": 0.01}

    def value(p: float) -> float:
        if model.startswith("linear"):
            return asymptotics.linear_transformer_error(penalty=p, intercept=model != "linear", **known)
        return asymptotics.random_transformer_error(penalty=p, activation=HEADS.get(model, model), width=width, **known)

    penalty, e = asymptotics.optimal_penalty(value, 1e-2, 1e7)
    return penalty / n, e


def score(gap: Tensor) -> Tensor:
    return gap.mean(0) / gap.std(0) * len(gap) ** 0.5


def test_the_intercept_is_the_advantage() -> None:
    """Paired: relu beats linear attention, with and without its mean, tanh does not; the intercept beats relu."""
    names = ["relu", "centred", "tanh", "linear", "linear + intercept"]
    jobs = [(m, 288, best(m, 12, 96, 288, 288)[0]) for m in names]
    e = torch.stack([errors(jobs, 12, 96, 288, seed)[0].mean(1) for seed in range(SEEDS)])
    limit = deviation_limit(5, SEEDS)
    assert score(e[:, 0] - e[:, 3]) < -limit
    assert score(e[:, 1] - e[:, 3]) < -limit
    assert score(e[:, 1] - e[:, 2]) < -limit
    assert score(e[:, 2] - e[:, 3]) > -limit
    assert score(e[:, 0] - e[:, 4]) > limit


# The theorem, in the library's own functions and by another solver than the chapter's.


def test_theorem() -> None:
    """At every penalty of the head, not only at the best one; the level is read off the head's own spectrum."""
    rng = np.random.default_rng(1)
    for _ in range(25):
        head = str(rng.choice(["relu", "tanh", "softplus", "gelu", "erf"]))
        target = str(rng.choice(["relu", "linear", "abs", "sign"]))
        d, alpha = int(rng.integers(10, 60)), float(rng.uniform(0.5, 8))
        n, k = int(d * d * rng.uniform(0.1, 8)), int(d * d * rng.uniform(0.1, 8))
        known: dict[str, Any] = {"dim": d, "length": max(1, int(alpha * d)), "target": target, "noise": 0.01}
        m = moments.summary_moments(**known)
        penalty = n * 10 ** rng.uniform(-4, 1)
        own = asymptotics.random_transformer_error(n_prompts=n, width=k, penalty=penalty, activation=head, **known)
        e, (c0, c1, c2) = hermite.expand(head, 2), hermite.expand(head, 2).coefficients.square().tolist()
        o = (d * m.beta**2 + m.gamma**2) / (d * m.beta + m.gamma) ** 2
        s = np.array([c0 + c2 * o / 2 / d, c1 * m.beta / m.trace, c1 * m.gamma / m.trace, c2 * o / (d * (d + 2))])
        count = np.array([1, d * d, d, (d - 1) * (d + 2) / 2])
        theta = e.second_moment - s @ count

        def degrees(nu: float, s: Array = s, count: Array = count, theta: float = theta) -> float:
            return float((count * s / (s + nu)).sum() + theta / nu)

        def excess(u: float, n: int = n, k: int = k, penalty: float = penalty, degrees: object = degrees) -> float:
            one = degrees(math.exp(u))  # type: ignore[operator]
            return (n - one) * (k - one) * math.exp(u) - penalty if one < min(n, k) else -1.0

        nu = math.exp(optimize.brentq(excess, -60, 30, xtol=1e-13)) * m.trace / c1  # level of linear attention
        sizes = np.array([m.beta, m.gamma])
        same = nu * (n - (np.array([d * d, d]) * sizes / (sizes + nu)).sum())
        fair = asymptotics.linear_transformer_error(n_prompts=n, penalty=float(same), intercept=True, **known)
        assert same > 0
        assert own > fair


def test_tiny_penalty() -> None:
    """Few neurons win at a tiny penalty and lose at the best of a grid of penalties, found on the test prompts."""
    levels = [1e-5, 3e-2, 0.1, 0.3, 1.0]
    jobs = [(m, k, p) for m, k in (("relu", 25), ("linear + intercept", 1)) for p in levels]
    e = torch.stack([errors(jobs, 10, 40, 105, seed)[0].mean(1) for seed in range(SEEDS)]).view(SEEDS, 2, 5)
    relu, fair = (e[:, i, e[:, i].mean(0).argmin()] for i in (0, 1))
    limit = deviation_limit(2, SEEDS)
    assert score(e[:, 1, 0] - e[:, 0, 0]) > limit
    assert score(relu - fair) > limit


def second_moments(u: Array, length: int, target: str) -> tuple[Array, Array]:
    """E[b b^T | task] and E[b | task] by quadrature over the projection of one example."""
    d, phi = u.shape[1], hermite.activation(target)

    def one(f: object) -> float:
        return hermite.gaussian_mean(f, phi.kinks).item()  # type: ignore[arg-type]

    c1, m2 = one(lambda g: phi(g) * g), one(lambda g: phi(g) ** 2) + 1e-4
    along = one(lambda g: (phi(g) ** 2 + 1e-4) * g**2)  # E[y^2 g^2]
    cross = one(lambda g: (phi(g) ** 3 + 3e-4 * phi(g)) * g)  # E[y^3 g]
    quartic = one(lambda g: phi(g) ** 4 + 6e-4 * phi(g) ** 2) + 3e-8
    mean = np.column_stack([c1 * u, np.full(len(u), m2)])
    diagonal = np.zeros((len(u), d + 1, d + 1))
    diagonal[:, :d, :d] = m2 * np.eye(d) + (along - m2) * u[:, :, None] * u[:, None]
    diagonal[:, :d, d] = diagonal[:, d, :d] = cross * u
    diagonal[:, d, d] = quartic
    return diagonal / length + (1 - 1 / length) * mean[:, :, None] * mean[:, None], mean


def linear_errors(u: Array, length: int, n: int, lam: float, target: str = "relu") -> tuple[float, float]:
    """On the pool and on fresh tasks, from the self-consistent equations in matrix form."""
    d = u.shape[1]
    blocks, mean = second_moments(u, length, target)
    cov = blocks.mean(0)
    c0, c1 = hermite.expand(target, 1).coefficients.tolist()
    link = c1 * u.T @ mean / len(u)
    variance = hermite.expand(target, 0).residual ** 2 + 1e-4
    nu = 1.0
    for _ in range(200):
        nu = (
            n * lam / (n - d * np.trace(cov @ np.linalg.inv(cov + nu * np.eye(d + 1)))) * 0.5 + nu * 0.5
            if (n > d * np.trace(cov @ np.linalg.inv(cov + nu * np.eye(d + 1))))
            else 2 * nu
        )
    resolvent = np.linalg.inv(cov + nu * np.eye(d + 1))
    weights = link @ resolvent
    overlap = d * np.trace(cov @ resolvent @ cov @ resolvent)
    own = variance - 2 * (weights * link).sum() + np.trace(weights @ cov @ weights.T)
    own /= 1 - overlap / n
    m = moments.summary_moments(d, length, target=target, noise=0.01)
    fresh = np.diag([m.beta] * d + [m.gamma])
    new = variance - 2 * c1**2 / d * np.trace(weights[:, :d]) + np.trace(weights @ fresh @ weights.T)
    return own, new + own * d / n * np.trace(resolvent @ cov @ resolvent @ fresh)


def test_formula_for_a_pool() -> None:
    """E[b b^T] of a pool against samples; gap of linear attention between fresh and own tasks against trained ones."""
    prior, g = tasks.TaskPrior(4, n_tasks=2), torch.Generator().manual_seed(5)
    samples = []
    for _ in range(16):
        b = draw(4, 6, 4000, prior, g).summary
        samples.append((b.mT @ b / len(b)).flatten())
    assert prior.pool is not None
    u = torch.nn.functional.normalize(prior.pool, dim=1).numpy()
    assert_mean(torch.stack(samples), torch.from_numpy(second_moments(u, 6, "relu")[0].mean(0)).flatten())
    rows = []
    for seed in range(16):
        e, units = errors([("linear + intercept", 1, 0.02)], 16, 64, 512, 200 + seed, pool=4)
        assert units is not None
        own, new = linear_errors(units, 64, 512, 0.02)
        rows.append((e[0, 1] - e[0, 0]) / (new - own) - 1)
    gap = torch.stack(rows)
    assert abs(gap.mean()) < deviation_limit(1, 16) * gap.std() / 4
    assert gap.std() / 4 < 0.05  # so that an error of a quarter is seen


def overlaps(blocks: Array, t: float) -> Array:
    """Tr A A' d^2 / (K t^2)."""
    return np.tensordot(blocks, blocks, ([1, 2], [1, 2])) * (blocks.shape[1] - 1) ** 2 / (len(blocks) * t**2)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_quadratic_directions(pool: int) -> None:
    """Queries of equal length, activation He_2: projections of neurons have the eigenvalues c_2^2 omega / d(d + 2)."""
    d, n, ratios = 6, 4000, []
    i, j = torch.triu_indices(d, d, 1)
    for seed in range(SEEDS):
        g, prior = torch.Generator().manual_seed(7000 + seed), tasks.TaskPrior(d, n_tasks=pool)
        w = prior.sample(n, generator=g)
        s = prompts.sample_summaries(w, 12, target="relu", noise=0.01, generator=g)
        assert prior.pool is not None
        u = torch.nn.functional.normalize(prior.pool)
        omega, v = np.linalg.eigh(overlaps(second_moments(u.numpy(), 12, "relu")[0], s.trace))
        x = math.sqrt(d) * torch.nn.functional.normalize(s.query)
        h = torch.einsum("ni,nj->nij", x, s.summary).flatten(1) / math.sqrt(s.trace)
        out = (h @ torch.randn(h.shape[1], 150, generator=g, dtype=h.dtype)) ** 2 - 1
        task = math.sqrt(pool) * torch.from_numpy(v)[(w @ u.T).argmax(1)]
        psi = torch.einsum("ni,na->nia", x[:, i] * x[:, j], task).flatten(1) * math.sqrt((d + 2) / d)
        one, two = (psi[part].T @ out[part] / (n / 2) for part in (slice(n // 2), slice(n // 2, n)))
        ratios.append((one * two).mean(1).view(-1, pool).mean(0) / torch.from_numpy(4 * omega / (d * (d + 2))))
    sample = torch.stack(ratios)
    assert_mean(sample, 1.0)
    assert (sample.std(0) / SEEDS**0.5).max() < 0.06


def head_error(u: Array, length: int, n: int, lam: float, half: float = 1.0, target: str = "abs") -> float:
    """Error of a relu head, k = n, on its pool: one fixed point by bisection; ``half`` scales the quadratic part."""
    d, pool = u.shape[1], len(u)
    blocks, mean = second_moments(u, length, target)
    own, v = np.linalg.eigh(blocks.mean(0))
    c1 = hermite.expand(target, 1).coefficients[1].item()
    power = ((c1 * u.T @ mean / pool @ v) ** 2).sum(0) / own
    t = moments.summary_moments(d, length, target=target, noise=0.01).trace
    omega, w = np.linalg.eigh(overlaps(blocks, t))
    o = overlaps(blocks, t).sum() / pool
    e, f = hermite.expand("relu", 2), hermite.expand(target, 2)
    a, b = e.coefficients.square().numpy(), f.coefficients.square().numpy()
    harmonic = b[2] / 2 * np.diag(w.T @ ((u @ u.T) ** 2 - 1 / d) @ w) / pool
    s = np.concatenate([[a[0] + a[2] * o / 2 / d, a[2] * o / d**2], a[1] * own / t, half * a[2] * omega / d / (d + 2)])
    count = np.concatenate([[1, 1], np.full(d + 1, d), np.full(pool, (d - 1) * (d + 2) / 2)])
    carried = np.concatenate([[b[0], b[2] / 2 / d], power, harmonic])
    theta = e.second_moment - s @ count
    low, high = -30.0, 30.0
    while high - low > 1e-9:
        nu = math.exp((low + high) / 2)
        one = (count * s / (s + nu)).sum() + theta / nu
        low, high = (low, (low + high) / 2) if one < n and (n - one) ** 2 * nu > n * lam else ((low + high) / 2, high)
    two = (count * (s / (s + nu)) ** 2).sum()
    chi = nu * (one - two) / (n - two)
    rest = f.second_moment + 1e-4 - carried.sum()
    top = (carried * (nu**2 + chi * s) / (s + nu) ** 2).sum() + rest
    return float(top / (1 - (two + (one - two) ** 2 / (n - two)) / n))


def test_heads_on_a_pool() -> None:
    """Relu heads on one and two tasks: the mean deviation is within 1/d; with half of the quadratic part it is not."""
    rows = []
    for seed in range(SEEDS):
        row = []
        for pool, n in ((1, 144), (1, 288), (2, 288)):
            e, u = errors([("relu", n, 0.1)], 12, 96, n, 600 + seed, "abs", pool)
            assert u is not None
            row.append([e[0, 0].item() / head_error(u, 96, n, 0.1, half) - 1 for half in (1.0, 0.5)])
        rows.append(row)
    gap = torch.tensor(rows, dtype=torch.float64).mean(1)
    mean, room = gap.mean(0), 1 / 12 + deviation_limit(1, SEEDS) * gap.std(0) / SEEDS**0.5
    assert abs(mean[0]) < room[0]
    assert abs(mean[1]) > room[1]


def test_the_win_is_on_the_pool() -> None:
    """One task, target |.|: relu beats the intercept, without c_2 it does not, and on fresh tasks it loses."""
    limit = deviation_limit(5, SEEDS)
    for n, tuned, flat in ((72, 0.5, 1.2), (288, 0.054, 2.7)):  # penalties about the best by the closed form
        jobs = [("relu", n, tuned), ("linear + intercept", 1, 1000.0), ("flat", n, flat)]
        e = torch.stack([errors(jobs, 12, 96, n, 300 + s, "abs", 1)[0] for s in range(SEEDS)])
        assert score(e[:, 2, 0] - e[:, 1, 0]) > -limit
    assert score(e[:, 0, 0] - e[:, 1, 0]) < -limit
    assert score(e[:, 0, 1] - e[:, 1, 1]) > limit


def test_cubic_directions() -> None:
    """Ten dimensions, one task, target sign: a tanh head wins without c_2; relu without c_2 and c_3 does not."""
    jobs = [("tanh", 400, 0.1), ("linear + intercept", 1, 0.05), ("flat", 400, 0.5)]
    e = torch.stack([errors(jobs, 10, 80, 400, 700 + s, "sign", 1)[0][:, 0] for s in range(SEEDS)])
    limit = deviation_limit(2, SEEDS)
    assert score(e[:, 0] - e[:, 1]) < -limit
    assert score(e[:, 2] - e[:, 1]) > -limit


@pytest.mark.parametrize("model", ["linear + intercept", "relu"])
def test_finite_pool(model: str) -> None:
    """Fresh tasks are harder than those of the pool, and less so with more tasks."""
    jobs, gaps = [(model, 200, 0.01 if model != "relu" else 0.3)], []
    for pool in (3, 10, 200):
        e = torch.stack([errors(jobs, 10, 20, 200, 400 + pool + s, pool=pool)[0][0] for s in range(SEEDS)])
        gaps.append(e[:, 1] - e[:, 0])
    limit = deviation_limit(2, SEEDS)
    assert score(gaps[0]) > limit
    assert score(gaps[0] - gaps[2]) > limit


@pytest.mark.parametrize("dim", [6, 12])
def test_query_length(dim: int) -> None:
    """Target |.|, n = 8 d^2: relu beats linear + intercept, by less than a model that knows the length."""
    n = 8 * dim * dim
    jobs = [(m, 288, best(m, dim, 8 * dim, n, 288, "abs")[0]) for m in ("relu", "linear + intercept")]
    e = torch.stack([errors(jobs, dim, 8 * dim, n, 500 + s, "abs")[0].mean(1) for s in range(24)])
    gain = e[:, 1] - e[:, 0]
    root = math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))  # mean length of a query
    limit = deviation_limit(2, 24)
    assert score(gain) > limit
    assert score(2 / math.pi * (dim / root**2 - 1) - gain) > limit
