"""Pre-activations of a random layer: normal given the prompt, a scale mixture over prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor
from zscore import assert_mean

from icl_lib import hermite, models, moments, prompts, tasks
from icl_lib.prompts import Summaries

SEEDS = 16
STEP = math.sqrt(3 - math.sqrt(6))  # where the distance from N(0, 1) is largest, in many dimensions


def draw(
    seed: int, n: int, dim: int, length: int, target: str = "relu", noise: float = 0.0, scaling: str = "unit"
) -> Summaries:
    generator = torch.Generator().manual_seed(1000 * dim + seed)
    fresh = tasks.TaskPrior(dim, sphere=True).sample(n, generator=generator)
    return prompts.sample_summaries(fresh, length, target=target, noise=noise, scaling=scaling, generator=generator)


def norms(p: Summaries) -> Tensor:
    return p.query.square().sum(-1) * p.summary.square().sum(-1) / p.trace


def preactivations(p: Summaries, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(10**6 + seed)
    return models.RandomTransformer(p.dim, width, "relu", generator=generator).preactivations(p)


def over_seeds(function: Callable[[int], object]) -> Tensor:
    return torch.tensor([function(seed) for seed in range(SEEDS)], dtype=torch.float64)


# Exact moments by another road than the chapter's: sums over set partitions, label moments in closed form.


def set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in set_partitions(rest):
        yield [[first], *partition]
        for i, block in enumerate(partition):
            yield [*partition[:i], [first, *block], *partition[i + 1 :]]


def relu_label(j: int, k: int) -> float:
    """E[(y g)^j y^(2k)] for y = relu(g): half of an absolute moment of g."""
    n = 2 * j + 2 * k
    return 1.0 if n == 0 else 0.5 * 2 ** (n / 2) * math.gamma((n + 1) / 2) / math.sqrt(math.pi)


def noisy_linear_label(j: int, k: int, noise: float = 0.5) -> float:
    """The same for y = g + noise z: the binomial formula."""
    total, power = 0.0, j + 2 * k
    for i in range(0, power + 1, 2):
        n = power - i + j
        if n % 2 == 0:
            odd = math.prod(range(i - 1, 0, -2)) * math.prod(range(n - 1, 0, -2))  # E[z^i] E[g^n]
            total += math.comb(power, i) * noise**i * odd
    return total


def sum_moment(label: Callable[[int, int], float], length: int, j: int, k: int) -> float:
    """E[T^j S^k]: over the partitions of the j + k factors, the number of ways to place the blocks on examples."""
    total = 0.0
    for partition in set_partitions(list(range(j + k))):
        ways = float(math.prod(range(length, length - len(partition), -1)))
        total += ways * math.prod(label(sum(q < j for q in b), sum(q >= j for q in b)) for b in partition)
    return total


def exact_variance(label: Callable[[int, int], float], dim: int, length: int, scaling: str = "unit") -> float:
    def m(j: int, k: int) -> float:
        return sum_moment(label, length, j, k)

    factor = dim if scaling == "lu" else 1
    mean = factor * (m(2, 0) + (dim - 1) * m(0, 1)) + m(0, 2)
    block = m(4, 0) + 2 * (dim - 1) * m(2, 1) + (dim**2 - 1) * m(0, 2)
    square = factor**2 * block + 2 * factor * (m(2, 2) + (dim - 1) * m(0, 3)) + m(0, 4)
    return (1 + 2 / dim) * square / mean**2 - 1


def test_normal_given_prompt() -> None:
    """Each prompt alone: 20000 neurons, whatever the dimension, the length and the scaling."""
    p_values = []
    for seed in range(8):
        p = draw(seed, 1, 2 + seed % 3, 1 + seed % 4, scaling=("unit", "lu")[seed % 2], noise=0.1)
        numbers = preactivations(p, 20000, seed)[0] / norms(p).sqrt()
        p_values.append(stats.kstest(numbers.numpy(), "norm").pvalue)
    assert min(p_values) > 1e-3 / 8


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize("label", [relu_label, noisy_linear_label])
@pytest.mark.parametrize("ratio", [0.2, 1, 3])
def test_rate_of_other_cases(ratio: float, label: Callable[[int, int], float], scaling: str) -> None:
    """d Var R tends to A: first-order error propagation as a gradient times a covariance matrix."""
    c1, m2, unit = label(1, 0), label(0, 1), float(scaling == "unit")
    # |b|^2 as a function of T/l, S/l and chi/l, whose covariance is that of one example over l, and 2/(ratio^2 d)
    gradient = np.array([2 * c1, 1 / ratio + 2 * m2 * unit, m2])
    covariance = np.zeros((3, 3))
    covariance[:2, :2] = np.array([[label(2, 0) - c1**2, label(1, 1) - c1 * m2], [0, label(0, 2) - m2**2]]) / ratio
    covariance[1, 0], covariance[2, 2] = covariance[0, 1], 2 / ratio**2
    expected = 2 + gradient @ covariance @ gradient / (c1**2 + m2 / ratio + unit * m2**2) ** 2
    small, large = (d * exact_variance(label, d, int(ratio * d), scaling) for d in (5000, 10000))
    assert 2 * large - small == pytest.approx(expected, abs=abs(large - small) / 10)
    assert expected > 2


def test_rate() -> None:
    """d Var R tends to 55/4 for relu with l = d; without the label square to 2 + 11/2, the label square alone 5/4."""
    small, large = (d * exact_variance(relu_label, d, d) for d in (1000, 2000))
    assert 2 * large - small == pytest.approx(55 / 4, abs=abs(large - small) / 100)

    def block(d: int) -> float:  # relative to the whole of E|b|^2
        m = {key: sum_moment(relu_label, d, *key) for key in ((2, 0), (0, 1), (4, 0), (2, 1), (0, 2))}
        first = m[2, 0] + (d - 1) * m[0, 1]
        square = m[4, 0] + 2 * (d - 1) * m[2, 1] + (d**2 - 1) * m[0, 2]
        return d * (square - first**2) / (first + m[0, 2]) ** 2

    def last(d: int) -> float:
        m = {k: sum_moment(relu_label, d, 0, k) for k in (1, 2, 4)}
        return d * (m[4] - m[2] ** 2) / (sum_moment(relu_label, d, 2, 0) + (d - 1) * m[1] + m[2]) ** 2

    for part, limit in ((block, 5.5), (last, 1.25)):
        small, large = part(1000), part(2000)
        assert 2 * large - small == pytest.approx(limit, abs=max(abs(large - small) / 10, 1e-6))


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize(("dim", "length"), [(10, 10), (20, 5), (15, 30)])
def test_variance(scaling: str, dim: int, length: int) -> None:
    """Simulated prompts against the sum over set partitions."""
    relu = over_seeds(lambda seed: (norms(draw(seed, 3000, dim, length, scaling=scaling)) - 1).square().mean().item())
    assert_mean(relu, exact_variance(relu_label, dim, length, scaling))
    noisy = over_seeds(
        lambda seed: (norms(draw(seed, 3000, dim, length, "linear", 0.5, scaling)) - 1).square().mean().item()
    )
    assert_mean(noisy, exact_variance(noisy_linear_label, dim, length, scaling))


def test_shared_norm() -> None:
    """Squares of two neurons have the covariance Var R at one prompt and 0 at two; no linear correlation."""
    variance = exact_variance(relu_label, 15, 15)

    def run(seed: int) -> list[float]:
        a = preactivations(draw(seed, 1000, 15, 15), 8, seed)
        other = torch.stack([column.roll(i) for i, column in enumerate(a.mT)], dim=-1)
        rows = []
        for x in (a, other):
            square = x.square() - 1
            pairs = (square.sum(-1).square() - square.square().sum(-1)).mean() / (8 * 7)
            rows += [pairs.item(), (x.square().mean(-1) - 1).square().mean().item()]
        return [*rows, (a[:, 0] * a[:, 1]).mean().item()]

    expected = [variance, variance + 2 * (1 + variance) / 8, 0, (2 + 3 * variance) / 8, 0]
    assert_mean(over_seeds(run), torch.tensor(expected))


def test_kurtosis_and_mean_output() -> None:
    """A real layer, and the same with equal norms; E sqrt(R) by Gauss–Laguerre quadrature (linear target, no noise)."""
    dim = length = 12
    trace = moments.summary_moments(dim, length, target="linear", noise=0.0).trace

    chi, s = (special.roots_genlaguerre(60, k / 2 - 1) for k in (dim - 1, length))  # half of a chi-square variable
    weights = chi[1][:, None] / chi[1].sum() * s[1] / s[1].sum()
    mean_b = (weights * np.sqrt(8 * s[0] ** 2 + 4 * s[0] * chi[0][:, None])).sum() / length  # T = S because y = g
    mean_x = math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    variance = exact_variance(lambda j, k: noisy_linear_label(j, k, 0.0), dim, length)

    def run(seed: int) -> list[float]:
        p = draw(seed, 2000, dim, length, "linear")
        a = preactivations(p, 16, seed)
        equal = a / norms(p).sqrt()[:, None]
        return [f(x).mean().item() for x in (a, equal) for f in (lambda v: v**4, torch.relu)]

    c0 = 1 / math.sqrt(2 * math.pi)
    assert mean_x * mean_b / math.sqrt(trace) < 0.98  # the effect is there
    expected = [3 * (1 + variance), c0 * mean_x * mean_b / math.sqrt(trace), 3.0, c0]
    assert_mean(over_seeds(run), torch.tensor(expected))


def relu_law(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and weights of R for relu without noise, l = d: normal nodes sent through chi-square quantiles."""
    z, w = special.roots_hermitenorm(16)
    u, w = special.ndtr(z), w / w.sum()
    count = np.arange(1, dim + 1)
    share = stats.binom.pmf(count, dim, 0.5)
    count, share = count[share > 1e-13], share[share > 1e-13]
    s = stats.chi2.ppf(u, count[:, None])[..., None, None]  # (counts, 16, 1, 1)
    chi, query = stats.chi2.ppf(u, dim - 1)[:, None], stats.chi2.ppf(u, dim)
    trace = moments.summary_moments(dim, dim, target="relu", noise=0.0).trace
    r = (2 * s**2 + s * chi) * query / dim**2 / trace
    return r.ravel(), np.einsum("n,i,j,k->nijk", share, w, w, w).ravel()


def best_step(r: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    """The Kolmogorov distance of the scale mixture from N(0, 1), and the s > 0 that shows it."""

    def gap(s: float) -> float:
        return float(w @ special.ndtr(s / np.sqrt(r)) - special.ndtr(s))

    coarse = np.arange(0.1, 4, 0.1)
    start = coarse[np.argmax([abs(gap(s)) for s in coarse])]
    best = optimize.minimize_scalar(lambda s: -gap(s), bounds=(start - 0.1, start + 0.1), method="bounded")
    return gap(best.x), float(best.x)


@pytest.mark.parametrize("dim", [20, 40])
def test_layer_has_the_distance_of_its_mixture(dim: int) -> None:
    """Relu, l = d: a real layer at the s of the largest difference; with equal norms there is none."""
    distance, s = best_step(*relu_law(dim))

    def run(seed: int) -> list[float]:
        p = draw(seed, 1000, dim, dim)
        a = preactivations(p, 32, seed)
        equal = a / norms(p).sqrt()[:, None]
        return [((1 + (x.abs() < s).double().mean()) / 2 - special.ndtr(s)).item() for x in (a, equal)]

    found = over_seeds(run)
    assert_mean(found, torch.tensor([distance, 0.0]))
    assert found[:, 0].mean() > 0.8 * distance > 0.01


def test_kolmogorov_distance() -> None:
    """The mixture of chi-square factors is what a layer sees, and its distance from N(0, 1) follows 0.0688 Var R."""
    rng = np.random.default_rng(5)

    def sample(d: int, n: int) -> np.ndarray:  # linear target without noise, l = d: T = S
        s, chi, query = (rng.chisquare(k, n) for k in (d, d - 1, d))
        return query * (2 * s**2 + s * chi) / d**2 / moments.summary_moments(d, d, target="linear", noise=0.0).trace

    def inside(seed: int) -> float:
        return (preactivations(draw(seed, 2000, 12, 12, "linear"), 16, seed).abs() < STEP).double().mean().item()

    assert_mean(over_seeds(inside), 2 * special.ndtr(STEP / np.sqrt(sample(12, 10**6))).mean() - 1)
    ratio = []
    for d in (40, 80):
        gaps = special.ndtr(STEP / np.sqrt(sample(d, 10**6))) - special.ndtr(STEP)
        predicted = 0.0688 * exact_variance(lambda j, k: noisy_linear_label(j, k, 0.0), d, d)
        ratio.append((gaps.mean() / predicted, gaps.std() / 1000 / predicted))
    (one, one_se), (two, two_se) = ratio
    assert abs(2 * two - one - 1) < 4 * math.hypot(2 * two_se, one_se) + (1 - two) ** 2  # error 1/d, then 1/d^2
    assert 0 < 1 - two < 1 - one


def test_distance_falls_like_one_over_d() -> None:
    """Relu, l = d: the place of the Kolmogorov distance tends to sqrt(3 - sqrt 6), d times it to 55/4 |c_4| / 8."""
    found = {}
    for d in (80, 160, 320):
        r, w = relu_law(d)
        assert w @ r**2 - 1 == pytest.approx(exact_variance(relu_label, d, d), abs=1e-8)
        distance, place = best_step(r, w)
        found[d] = np.array([d * distance, place])
    limits = [55 / 4 * (3 * STEP - STEP**3) * stats.norm.pdf(STEP) / 8, STEP]
    first, second = found[160] - found[80], found[320] - found[160]
    assert np.abs(second / first - 0.5).max() < 0.1  # errors of order 1/d
    assert (np.abs(2 * found[320] - found[160] - limits) < np.abs(second) / 10).all()


def test_fixed_context() -> None:
    """With 4 examples for ever Var R falls to (m_4 / m_2^2 - 1) / l = 5/4, but to 0 where all labels have one size."""
    assert exact_variance(relu_label, 10**6, 4) == pytest.approx(5 / 4, abs=1e-4)
    found = over_seeds(lambda seed: (norms(draw(seed, 2000, 100, 4)) - 1).square().mean().item())
    assert_mean(found, exact_variance(relu_label, 100, 4))
    assert found.mean() > 5 / 4

    def sign_label(j: int, k: int) -> float:  # E|g|^j
        return 2 ** (j / 2) * math.gamma((j + 1) / 2) / math.sqrt(math.pi)

    small, large = (d * exact_variance(sign_label, d, 8) for d in (5000, 10000))
    assert 2 * large - small == pytest.approx(4, abs=abs(large - small) / 10)
    found = over_seeds(lambda seed: (norms(draw(seed, 2000, 100, 4, "sign")) - 1).square().mean().item())
    assert_mean(found, exact_variance(sign_label, 100, 4))
    assert found.mean() < 0.1


def test_taylor_polynomial() -> None:
    """A polynomial neuron's mean is a Taylor polynomial in R; degree 8 is worse in mean square at d = 20 only."""

    def taylor(r: Tensor, p: int) -> Tensor:
        return sum(special.binom(0.5, j) * (r - 1) ** j for j in range(p // 2 + 1))

    for p in (2, 4, 5, 8):
        cut = hermite.expand("relu", p)
        for r in (0.0, 0.3, 1.0, 2.5, 6.0):
            mean = hermite.gaussian_mean(lambda g, r=r, cut=cut: cut.polynomial(math.sqrt(r) * g)).item()
            expected = float(taylor(torch.tensor(r, dtype=torch.float64), p))
            assert mean * math.sqrt(2 * math.pi) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    for d, better in ((20, 2), (160, 8)):
        r = norms(draw(0, 20000, d, d))
        square = {p: (taylor(r, p) - r.sqrt()).square() for p in (2, 8)}
        assert min(square, key=lambda p: square[p].mean().item()) == better
        assert square[8].median() < square[2].median()  # the tail alone makes degree 8 worse


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize("dim", [10, 40])
def test_overlap(scaling: str, dim: int) -> None:
    """Mean square of <h, h'> / t over independent prompts."""
    m = moments.summary_moments(dim, dim, target="relu", noise=0.0)
    beta = m.beta * (dim if scaling == "lu" else 1)

    def run(seed: int) -> float:
        p = draw(seed, 1000, dim, dim, scaling=scaling)
        one, two = ((v[::2] * v[1::2]).sum(-1) for v in (p.query, p.summary))
        return (one * two / p.trace).square().mean().item()

    assert_mean(over_seeds(run), (dim * beta**2 + m.gamma**2) / (dim * (dim * beta + m.gamma) ** 2))
