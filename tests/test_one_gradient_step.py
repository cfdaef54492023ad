"""The claims of the chapter on one gradient step, at small sizes and with random numbers of their own."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor
from zscore import assert_mean

from icl_lib import hermite, models, moments, prompts, ridge, tasks
from icl_lib.sweeps import deviation_limit

D = 12
K, N, RUNS = D * D, 2 * D * D, 16
SPIKE = float(D)
Target = str | hermite.Activation
centred = hermite.activation(lambda g: torch.relu(g) - (2 * math.pi) ** -0.5, kinks=[0.0])


def world(dim: int, theta: float, noise: float = 0.01, axis: int = 0) -> tuple[Tensor, Tensor, float, float]:
    """Diagonal of the signal and of (B, gamma), both of shape (dim + 1,), and m_2 and q."""
    a = np.ones(dim)
    a[axis] += theta

    def integrand(v: float, i: int) -> float:
        return float(a[i] / (1 + 2 * a[i] * v) * np.prod((1 + 2 * a * v) ** -0.5))

    share = torch.tensor([integrate.quad(integrand, 0, np.inf, (i,))[0] for i in range(dim)])
    assert abs(share.sum() - 1) < 1e-6
    known = moments.summary_moments(dim, dim, target=centred, noise=noise)
    c1, m2 = hermite.expand(centred, 1).coefficients[1].item(), hermite.expand(centred, 0).second_moment + noise**2
    q = hermite.gaussian_mean(lambda g: centred(g) ** 2 * (g**2 - 1), [0.0]).item()
    block = ((1 - 1 / dim) * c1**2 + q / dim) * share + m2 / dim
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([c1**2 * share, zero]), torch.cat([block, zero + known.gamma]), m2, q


def narrow_world(dim: int, theta: float, variance: float) -> tuple[Tensor, Tensor, float]:
    """Diagonals (dim, dim + 1) of S and T, and m_2, for inputs of another variance on the spike axis, by integrals.

    With s the standard deviation of what the target sees, relu(s g) = s relu(g), so that the moments of the labels
    given the task are polynomials in s.
    """
    noise, m = 0.01, (2 * math.pi) ** -0.5
    beta = stats.beta(0.5, (dim - 1) / 2)

    def mean(f: Callable[[float, float], float]) -> float:
        """The mean of f(u_1^2, s) over the tasks."""

        def integrand(x: float) -> float:  # the angle removes the root at 0
            first = (1 + theta) * math.sin(x) ** 2 / (1 + theta * math.sin(x) ** 2)
            density = beta.pdf(math.sin(x) ** 2) * 2 * math.sin(x) * math.cos(x)
            return float(f(first, math.sqrt(1 - (1 - variance) * first)) * density)

        return float(integrate.quad(integrand, 0, math.pi / 2)[0])

    def power(s: float, order: int) -> float:
        """E[(relu(s g) - m)^order]."""
        half = [1.0, m, 0.5, 2 * m, 1.5]  # E[relu(g)^j]
        return sum(math.comb(order, j) * s**j * half[j] * (-m) ** (order - j) for j in range(order + 1))

    def second(s: float) -> float:
        return power(s, 2) + noise**2

    def fourth(s: float) -> float:
        return power(s, 4) + 6 * noise**2 * power(s, 2) + 3 * noise**4

    sigma = torch.ones(dim, dtype=torch.float64)
    sigma[0] = variance
    sides = torch.full((dim,), 1 / (dim - 1), dtype=torch.float64)  # all other axes are alike

    def along(f: Callable[[float], float]) -> Tensor:
        """The means of f(s) u_i^2, times Sigma_ii^2."""
        values = sides * mean(lambda a, s: f(s) * (1 - a))
        values[0] = mean(lambda a, s: f(s) * a)
        return values * sigma**2

    signal, excess = along(lambda s: 0.25), along(lambda s: 1 - 1 / (math.pi * s))
    m2 = mean(lambda _, s: second(s))
    last = (1 - 1 / dim) * mean(lambda _, s: second(s) ** 2) + mean(lambda _, s: fourth(s)) / dim
    block = torch.cat([(1 - 1 / dim) * signal + (excess + m2 * sigma) / dim, torch.tensor([last])])
    return torch.cat([torch.diag(signal), torch.zeros(dim, 1)], 1), torch.outer(sigma, block), m2


def draw(n: int, g: torch.Generator, theta: float = 0.0, target: Target = centred) -> prompts.Summaries:
    xi = tasks.TaskPrior(D, tasks.spiked_covariance(D, theta)).sample(n, generator=g)
    return prompts.sample_summaries(xi, D, target=target, noise=0.01, generator=g)


def begin(seed: int, theta: float, n: int = N) -> tuple[torch.Generator, models.RandomTransformer, Tensor]:
    g = torch.Generator().manual_seed(seed)
    layer = models.RandomTransformer(D, K, "relu", generator=g)
    return g, layer, torch.randn(K, generator=g, dtype=torch.float64) / math.sqrt(K)


@pytest.mark.parametrize("theta", [0.0, SPIKE])
def test_moments(theta: float) -> None:
    signal, second, _, _ = world(D, theta)
    p = draw(40000, torch.Generator().manual_seed(1), theta)
    assert abs(D * second.sum() - p.trace) < 1e-6
    assert_mean(p.answer[:, None] * p.query * p.summary[:, :-1], signal[:-1])
    assert_mean(p.summary**2, second)


@pytest.mark.parametrize("theta", [0.0, SPIKE])
def test_size_and_direction(theta: float) -> None:
    signal, second, m2, q = world(D, theta)
    total = (1 - 1 / N) * signal @ signal + (m2 + q / D) * D * second.sum() / N
    flat = torch.diag(signal)[:D].flatten()
    rows = []
    for seed in range(RUNS):
        g, layer, w = begin(seed, theta)
        _, values, right = torch.linalg.svd(layer.gradient(draw(N, g, theta), readout=w), full_matrices=False)
        assert values[0] > 1.5 * values[1]
        rows.append([4 * K * values[0] ** 2 / w.norm() ** 2, (right[0] @ flat / flat.norm()) ** 2])
    chance = m2 * (signal**2 @ second) / (signal @ signal) / N
    assert_mean(torch.tensor(rows), torch.stack([total, (signal @ signal + chance) / total]))


def errors(
    seed: int, theta: float, rates: tuple[float, ...], target: Target = centred, *, mixed: bool = False
) -> list[float]:
    """Error at each rate; mixed: the answers of the step are shuffled."""
    g, layer, w = begin(seed, theta)
    p, train, test = (draw(n, g, theta, target) for n in (N, N, 1000))
    order = torch.randperm(N, generator=g)
    step = prompts.Summaries(p.query, p.summary, p.answer[order] if mixed else p.answer, p.trace)
    found = []
    for rate in rates:
        stepped = layer.gradient_step(step, rate * K, readout=w).fit(train, N)
        found.append(models.icl_error(stepped.predict(test), test.answer).item())
    return found


def expected_error(theta: float, rate: float) -> float:
    """Error after a step from the covariance of all D (D + 1) linear features, with a noise vector drawn many times."""
    signal, second, m2, q = (x.numpy() if isinstance(x, Tensor) else x for x in world(D, theta))
    t, full = D * second.sum(), np.tile(second, D)
    mean = np.append(np.diag(signal[:-1]), np.zeros((D, 1)), axis=1).ravel()
    rng, values = np.random.default_rng(5), []
    o, square = (second @ second) * D**2 / t**2, 1 / (2 * math.pi)
    for _ in range(8):
        noisy = mean + np.sqrt((m2 + q / D) / N * full) * rng.standard_normal(full.size)
        root = np.sqrt(full)
        kernel = (np.diag(full / t) + rate**2 / 4 * np.outer(root * noisy, root * noisy)) / 4
        s, vectors = np.linalg.eigh(kernel)
        power = (vectors.T @ (mean / root)) ** 2
        s = np.append(s, [square * (1 + o / (2 * D)), square * o / (D * (D + 2))])
        many = np.append(np.ones(full.size), [1, (D - 1) * (D + 2) / 2])
        power, tail = np.append(power, [0, 0]), 0.25 - square * (1 + o / 2)

        def one(nu: float, s=s, many=many, tail=tail) -> float:  # type: ignore[no-untyped-def]
            return float((many * s / (s + nu)).sum() + tail / nu)

        def level(x: float, one=one) -> float:  # type: ignore[no-untyped-def]
            return max(N - one(math.exp(x)), 0) * max(K - one(math.exp(x)), 0) * math.exp(x) - N

        nu = math.exp(optimize.brentq(level, -25, 10))
        first, two = one(nu), (many * (s / (s + nu)) ** 2).sum()
        chi, spent = nu * (first - two) / (K - two), two + (first - two) ** 2 / (K - two)
        values.append(((power * (nu**2 + chi * s) / (s + nu) ** 2).sum() + m2 - power.sum()) / (1 - spent / N))
    return float(np.mean(values))


def falls(values: Tensor) -> bool:
    """The mean is below 0 by more than chance allows."""
    return bool(values.mean() < -deviation_limit(1, len(values)) * values.std() / math.sqrt(len(values)))


def test_gain() -> None:
    gains = {}
    for theta in (0.0, SPIKE):
        rows = torch.tensor([errors(100 + seed, theta, (0.0, 4.0)) for seed in range(RUNS)])
        gains[theta] = rows[:, 1] - rows[:, 0]
        assert_mean(gains[theta], expected_error(theta, 4.0) - expected_error(theta, 0.0))
    assert falls(gains[SPIKE] - gains[0.0])


def test_isotropic_gain() -> None:
    rows, shuffled = (
        torch.tensor([errors(100 + seed, 0.0, (0.0, 4.0), mixed=mixed) for seed in range(24)])
        for mixed in (False, True)
    )
    assert falls((rows[:, 1] - rows[:, 0]) - (shuffled[:, 1] - shuffled[:, 0]))


def test_shuffled_answers_gain_little() -> None:
    rows, shuffled = (
        torch.tensor([errors(800 + seed, SPIKE, (0.0, 8.0), mixed=mixed) for seed in range(RUNS)])
        for mixed in (False, True)
    )
    gain, nothing = rows[:, 0] - rows[:, 1], shuffled[:, 0] - shuffled[:, 1]
    assert falls(nothing.abs() - gain / 4)


def contest(seed: int, theta: float, target: Target) -> tuple[float, float, float]:
    g, layer, w = begin(seed, theta)
    p, train, test = (draw(n, g, theta, target) for n in (N, N, 1000))
    query, summary, answer = (torch.cat([getattr(s, x) for s in (p, train)]) for x in ("query", "summary", "answer"))
    both = prompts.Summaries(query, summary, answer, p.trace)
    linear = models.LinearTransformer(intercept=True)
    linear.fit(both, [2 * N * x for x in (0.003, 0.01, 0.03, 0.1, 0.3)])
    stepped = layer.gradient_step(p, 16 * K, readout=w).fit(train, N)
    rival = models.icl_error(linear.predict(test), test.answer).min().item()
    tables = [torch.cat([x.features(), torch.ones(len(x), 1), x.query[:, :1].abs()], 1) for x in (both, test)]
    path = ridge.ridge_path(tables[0], both.answer, [2 * N * x for x in (0.003, 0.01, 0.03, 0.1, 0.3)])
    helped = models.icl_error(path @ tables[1].mT, test.answer).min().item()
    return models.icl_error(stepped.predict(test), test.answer).item(), rival, helped


def test_fair_contest() -> None:
    strong = 8 * SPIKE
    for theta, target, sign in ((strong, centred, -1), (strong, "relu", 1), (strong, "tanh", 1), (SPIKE, centred, 1)):
        pairs = np.array([contest(200 + seed, theta, target) for seed in range(RUNS)])
        margin = sign * (pairs[:, 0] - pairs[:, 1])
        assert margin.mean() > deviation_limit(1, RUNS) * margin.std(ddof=1) / math.sqrt(RUNS)
        if sign < 0:  # with the feature |x_1| the linear Transformer wins
            assert falls(torch.from_numpy(pairs[:, 2] - pairs[:, 0]))


def test_twin_after_the_step() -> None:
    rows = []
    for seed in range(RUNS):
        g, layer, w = begin(300 + seed, 8 * SPIKE)
        p, train, test = (draw(n, g, 8 * SPIKE) for n in (N, N, 1000))
        for rate in (0, 4, 32):
            stepped = layer.gradient_step(p, rate * K, readout=w)
            for model in (stepped, stepped.hermite_twin(2), stepped.hermite_twin(4)):
                rows.append(models.icl_error(model.fit(train, N).predict(test), test.answer).item())
    found = torch.tensor(rows).view(RUNS, 3, 3)
    ratio = (found[:, :, 1:] / found[:, :, :1]).log()
    assert_mean(ratio[:, 1, 0] - ratio[:, 0, 0], 0.0)  # degree 2 survives a small step
    assert falls(ratio[:, 0, 0] - ratio[:, 2, 0]) and falls(ratio[:, 0, 1] - ratio[:, 2, 1])


@pytest.mark.parametrize("variance", [1.0, 0.25])
def test_moments_of_narrow_inputs(variance: float) -> None:
    dim = 6
    signal, second, m2 = narrow_world(dim, 2.0 * dim, variance)
    if variance == 1:
        known = world(dim, 2.0 * dim)
        assert torch.allclose(signal, torch.diag(known[0])[:dim]) and torch.allclose(second, known[1].expand(dim, -1))
    prior = tasks.TaskPrior(dim, tasks.spiked_covariance(dim, 2 * dim))
    source = prompts.Source(prior, centred, 0.01, tasks.spiked_covariance(dim, variance - 1))
    p = source.sample(40000, dim, generator=torch.Generator().manual_seed(2))
    assert_mean(p.answer[:, None] * p.features(), signal.flatten())
    assert_mean(p.features() ** 2, second.flatten())
    assert_mean(p.answer**2, m2)


@pytest.mark.parametrize("kind", ["another axis", "noisy labels", "narrow inputs"])
def test_mixture(kind: str) -> None:
    dim, n, lam = 8, 256, 0.03
    noise, axis, variance = {
        "another axis": (0.01, 1, 1.0),
        "noisy labels": (0.7, 0, 1.0),
        "narrow inputs": (0.01, 0, 0.25),
    }[kind]
    other = world(dim, 2.0 * dim, noise, axis)
    parts = [narrow_world(dim, 2.0 * dim, 1.0)]
    if variance < 1:
        parts.append(narrow_world(dim, 2.0 * dim, variance))
    else:
        parts.append((torch.diag(other[0])[:dim], other[1].expand(dim, -1), other[2]))
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    signal, second = (torch.stack([part[i].flatten() for part in parts]) for i in (0, 1))
    m2, leverage = torch.tensor([part[2] for part in parts], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(300):
        inverse = 1 / ((weights / (1 + leverage)) @ second + lam)
        leverage = second @ inverse / n
    mean = inverse * ((weights / (1 + leverage)) @ signal)
    spill = (second * inverse) @ (second * inverse).T / n * weights / (1 + leverage) ** 2
    expected = torch.linalg.solve(torch.eye(2).double() - spill, m2 - 2 * signal @ mean + second @ mean**2)
    sources = []
    for z, (delta, i, v) in zip(weights.tolist(), ((0.01, 0, 1.0), (noise, axis, variance)), strict=True):
        prior = tasks.TaskPrior(dim, tasks.spiked_covariance(dim, 2 * dim, torch.eye(dim)[i]))
        sources.append(prompts.Source(prior, centred, delta, tasks.spiked_covariance(dim, v - 1), share=z))
    rows = []
    for seed in range(RUNS):
        g = torch.Generator().manual_seed(400 + seed)
        fit = models.LinearTransformer().fit(prompts.sample_mixture(sources, n, dim, generator=g), lam * n)
        assert fit.gamma is not None
        found = fit.gamma.flatten()
        rows.append(m2 - 2 * signal @ found + second @ found**2)  # moments checked by the tests above
    assert_mean(torch.stack(rows), expected)


def test_digits() -> None:
    pixels = pytest.importorskip("sklearn.datasets").load_digits().data
    dim = 16
    scores = torch.from_numpy(np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[0][:, :dim])
    scores *= math.sqrt(len(scores))
    assert torch.allclose(scores.T @ scores / len(scores), torch.eye(dim).double(), atol=1e-10)
    trace = moments.summary_moments(dim, dim, target=centred, noise=0.01).trace
    gaps, margins = [], []
    for seed in range(RUNS):
        g = torch.Generator().manual_seed(500 + seed)
        m, rows = 2 * dim**2, []
        for n in (m, m, 1000):
            u = tasks.TaskPrior(dim, sphere=True).sample(n, generator=g) / math.sqrt(dim)
            x = scores[torch.randint(len(scores), (n, dim + 1), generator=g)]
            y = centred((x @ u[..., None])[..., 0]) + 0.01 * torch.randn(n, dim + 1, generator=g).double()
            rows.append(prompts.Prompts(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1], "unit", trace).summaries())
        p, train, test = rows
        layer = models.RandomTransformer(dim, dim**2, "relu", generator=g)
        for model in (layer, layer.gradient_step(p, 4 * dim**2)):
            fits = [fit.fit(train, m).predict(test) for fit in (model, model.hermite_twin(2))]
            one, two = (models.icl_error(guess, test.answer).item() for guess in fits)
            gaps.append(100 * (two / one - 1))
            margins.append(one - (test.answer - train.answer.mean()).square().mean().item())
    assert falls(torch.tensor(gaps).view(RUNS, 2).max(1).values - 3)
    assert falls(torch.tensor(margins).view(RUNS, 2).max(1).values)


def test_a_step_in_law() -> None:
    differences = []
    for seed in range(RUNS):
        g, layer, w = begin(600 + seed, SPIKE)
        p, train, test = (draw(n, g, SPIKE) for n in (N, N, 1000))
        made = layer.gradient_step(p, 0.0)
        mean = (p.answer @ p.features()) / N
        made.first = layer.first + math.sqrt(p.trace) * 4 * torch.outer(torch.randn(K, generator=g).double(), mean)
        one, two = (
            models.icl_error(model.fit(train, N).predict(test), test.answer).item()
            for model in (layer.gradient_step(p, 8 * K, readout=w), made)
        )
        differences.append(one - two)
    assert_mean(torch.tensor(differences), 0.0)
