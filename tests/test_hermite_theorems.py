"""The theorems of the chapter on Hermite expansions, each against a second way that knows nothing of the expansion."""

import math

import numpy as np
import pytest
import torch
from scipy import special
from zscore import assert_mean

from icl_lib.hermite import ACTIVATIONS, expand, polynomials
from icl_lib.sweeps import deviation_limit, largest_deviation

EPS = torch.finfo(torch.float64).eps
CORRELATIONS = (-0.9, -0.5, 0.0, 0.3, 0.7, 0.95)
FACTORIAL = np.array([float(math.factorial(i)) for i in range(151)])


def shares(name, degree=150):
    return (expand(name, degree).coefficients ** 2).numpy() / FACTORIAL[: degree + 1]


def normal_rule(kink=0.0):
    """Nodes and weights for the normal law: the trapezoidal rule in t, where x = kink ± exp(t)."""
    distance = np.exp(np.arange(-760, 59) / 20)
    x = np.concatenate([kink - distance[::-1], kink + distance])
    weights = np.concatenate([distance[::-1], distance]) / 20 * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return torch.from_numpy(x), torch.from_numpy(weights)


def uniform_size(name, degree):
    """Mean square of the rest under the uniform law of variance 1; the kink may sit at 0."""
    node, weight = map(torch.from_numpy, np.polynomial.legendre.leggauss(40))
    expansion, total = expand(name, degree), 0.0
    for side in (-1, 1):
        x = (node + side) * math.sqrt(3) / 2
        total += (weight / 4 * (ACTIVATIONS[name](x) - expansion.polynomial(x)) ** 2).sum().item()
    return total


def test_the_rule_of_this_file():
    for kink in (0.0, -0.7):
        x, weights = normal_rule(kink)
        for power, moment in enumerate((1, 0, 1, 0, 3, 0, 15)):
            assert abs((x**power @ weights).item() - moment) < len(x) * EPS * (x.abs() ** power @ weights).item()


@pytest.mark.parametrize("r", [*CORRELATIONS, 1.0])
def test_mean_products(r):
    """Two neurons, degrees up to 10: i! r^i on the diagonal and 0 elsewhere, by the trapezoidal rule in the plane."""
    step, x = 0.2, torch.arange(-70, 71, dtype=torch.float64) / 5
    weights = step * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    one, two = polynomials(x, 10), polynomials(r * x[:, None] + math.sqrt(1 - r**2) * x, 10)
    means = torch.einsum("a,b,ai,abj->ij", weights, weights, one, two)
    sizes = torch.einsum("a,b,ai,abj->ij", weights, weights, one.abs(), two.abs())
    expected = torch.diag(torch.tensor([math.factorial(i) * r**i for i in range(11)], dtype=torch.float64))
    assert ((means - expected).abs() <= len(x) * EPS * sizes).all()


def test_table_of_closed_forms():
    j = range(6)
    binomial = [math.comb(2 * m, m) / 4**m for m in j]
    odd = [math.prod(range(2 * m - 1, 0, -2)) for m in j]
    root = math.sqrt(2 * math.pi)
    table = {
        "sign": (
            {2 * m + 1: math.sqrt(2 / math.pi) * (-1) ** m * odd[m] for m in j},
            {2 * m + 1: 2 / math.pi * binomial[m] / (2 * m + 1) for m in j},
            lambda s: math.erf(s / math.sqrt(2)),
        ),
        "erf": (
            {2 * m + 1: math.sqrt(2 / math.pi) * (-1) ** m * odd[m] * (2 / 3) ** (m + 0.5) for m in j},
            {2 * m + 1: 4 / (3 * math.pi) * (4 / 9) ** m * binomial[m] / (2 * m + 1) for m in j},
            lambda s: math.erf(s / math.sqrt(3)),
        ),
        "relu": (
            {0: 1 / root, 1: 0.5} | {2 * m: (-1) ** (m - 1) * odd[m - 1] / root for m in j if m},
            {1: 0.25} | {2 * m: binomial[m] / (2 * math.pi * (2 * m - 1) ** 2) for m in j},
            lambda s: s / 2 * (1 + math.erf(s / math.sqrt(2))) + math.exp(-(s**2) / 2) / root,
        ),
    }
    for name, (coefficients, parts, blurred) in table.items():
        x, weights = normal_rule()
        function = ACTIVATIONS[name]
        for i in range(11):
            he = polynomials(x, i)[:, -1]
            bound = len(x) * EPS * ((function(x) * he).abs() @ weights).item()
            found = (function(x) * he @ weights).item()
            assert abs(found - coefficients.get(i, 0.0)) <= bound, (name, i)
            assert math.isclose(coefficients.get(i, 0.0) ** 2 / FACTORIAL[i], parts.get(i, 0.0), rel_tol=16 * EPS)
        for s in (-2.0, -0.3, 0.0, 0.4, 1.5):
            x, weights = normal_rule(-s)
            bound = len(x) * EPS * (function(x + s).abs() @ weights).item()
            assert abs((function(x + s) @ weights).item() - blurred(s)) <= bound, (name, s)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_size_of_the_rest(name):
    """The squared residual is the mean of (f - polynomial)^2, integrated."""
    x, weights = normal_rule()
    for degree in range(13):
        expansion = expand(name, degree)
        found = ((ACTIVATIONS[name](x) - expansion.polynomial(x)) ** 2 @ weights).item()
        # The residual rounds at the size of the second moment, the sum at its own.
        bound = 20 * EPS * expansion.second_moment + len(x) * EPS * found
        assert abs(found - expansion.residual**2) <= bound, degree


@pytest.mark.parametrize("r", CORRELATIONS)
def test_series_in_the_correlation(r):
    """Arcsine laws of sign and erf, arc-cosine kernel of relu."""
    closed = {
        "sign": 2 / math.pi * math.asin(r),
        "erf": 2 / math.pi * math.asin(2 * r / 3),
        "relu": (math.sqrt(1 - r**2) + r * (math.pi / 2 + math.asin(r))) / (2 * math.pi),
    }
    for name, expected in closed.items():
        beyond = abs(r) ** 151 * expand(name, 150).residual ** 2
        terms = shares(name) * r ** np.arange(151)
        assert abs(terms.sum() - expected) <= beyond + 151 * EPS * np.abs(terms).sum()


@pytest.mark.parametrize("r", CORRELATIONS)
@pytest.mark.parametrize("degree", [0, 1, 2, 4])
def test_products_of_two_neurons(r, degree):
    """Mean products of two relu neurons and of their rests: the second neuron is averaged first, given the first."""
    x, weights = normal_rule()
    centre, spread = r * x.numpy(), math.sqrt(1 - r**2)
    density = np.exp(-((centre / spread) ** 2) / 2) / math.sqrt(2 * math.pi)
    output = centre * special.ndtr(centre / spread) + spread * density  # mean of relu(centre + spread z)
    node, weight = np.polynomial.hermite_e.hermegauss(8)  # exact for the polynomial part
    expansion, weight = expand("relu", degree), torch.from_numpy(weight / weight.sum())
    cut = expansion.polynomial(torch.from_numpy(centre[:, None] + spread * node)) @ weight
    relu, polynomial, other = torch.relu(x), expansion.polynomial(x), torch.from_numpy(output)
    terms = shares("relu") * r ** np.arange(151)
    beyond = abs(r) ** 151 * expand("relu", 150).residual ** 2
    for one, two, expected in (
        (relu, other, terms.sum()),
        (polynomial, cut, terms[: degree + 1].sum()),
        (relu - polynomial, other - cut, terms[degree + 1 :].sum()),
        (relu - polynomial, cut, 0.0),
    ):
        bound = beyond + len(x) * EPS * ((one.abs() + polynomial.abs()) * (two.abs() + cut.abs()) @ weights).item()
        assert abs((one * two @ weights).item() - expected) <= bound
    assert abs(terms[degree + 1 :].sum()) <= abs(r) ** (degree + 1) * expansion.residual**2 * (1 + 151 * EPS)


def test_truncated_activation_keeps_the_second_moments(generator):
    expansion, r = expand("sign", 1), 0.4
    g, z = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    one = expansion.activate(g, generator=generator)
    two = expansion.activate(r * g + math.sqrt(1 - r**2) * z, generator=generator)
    kept = shares("sign", 1)
    assert_mean(torch.stack([one * two, one**2], 1), torch.tensor([kept[0] + kept[1] * r, 1.0]))
    assert abs(kept[0] + kept[1] * r - 2 / math.pi * math.asin(r)) <= expansion.residual**2 * r**2


def test_decay_bounds():
    """The bounds of the proposition; each is within 8 % of the truth at the highest degree, so none is idle."""
    even = np.arange(2, 129, 2)
    jump, kink = (2 / math.pi) ** 1.5, math.sqrt(2) / (6 * math.pi**1.5)
    sizes = {name: np.array([expand(name, i).residual ** 2 for i in even.tolist()]) for name in ("sign", "relu")}
    tails = np.array([math.fsum(shares("erf")[i + 1 :]) for i in range(43)])  # no difference, hence no cancellation
    p = np.arange(2, 41, 2)
    ratio = tails[p + 2] / tails[p]
    for lower, value, upper in (
        (jump / (even + 1) ** 0.5, sizes["sign"], jump / (even - 1) ** 0.5),
        (kink / (even + 3) ** 1.5, sizes["relu"], kink / even**1.5),
        (4 / 9 * (p + 1) ** 2 / ((p + 2) * (p + 3)), ratio, np.full(len(p), 4 / 9)),
    ):
        assert (lower < value).all() and (value < upper).all()
        assert lower[-1] > 0.92 * value[-1] and upper[-1] < 1.08 * value[-1]


@pytest.mark.parametrize("name", ["relu", "sign", "tanh"])
def test_uniform_pre_activations_miss_the_formula(name, generator):
    """Simulated rests at uniform pre-activations meet the uniform integral and miss the normal formula."""
    batches = math.sqrt(12) * (torch.rand(50, 20_000, generator=generator, dtype=torch.float64) - 0.5)
    degrees = range(1, 6)
    squares = torch.stack(
        [((ACTIVATIONS[name](batches) - expand(name, i).polynomial(batches)) ** 2).mean(1) for i in degrees], 1
    )
    assert_mean(squares, torch.tensor([uniform_size(name, i) for i in degrees], dtype=torch.float64))
    mean, se = squares.mean(0), squares.std(0) / math.sqrt(50)
    predicted = torch.tensor([expand(name, i).residual ** 2 for i in degrees], dtype=torch.float64)
    assert ((mean - predicted).abs() > deviation_limit(5, 50) * se).all()
    assert largest_deviation(mean, se, predicted) > 10 * deviation_limit(5, 50)


@pytest.mark.parametrize("dim", [3, 30, 100])
def test_low_dimension_gives_the_rests_away(dim, generator):
    """What 99 rests say about another: about the sum of squared correlations in high, nearly all in low dimension."""
    size, parts = expand("relu", 2).residual ** 2, shares("relu")
    F = torch.nn.functional.normalize(torch.randn(100, dim, generator=generator, dtype=torch.float64), dim=1)
    rho = sum(parts[i] * (F @ F.T) ** i for i in range(3, 151)) / size
    rho.fill_diagonal_(1.0)
    others = [[j for j in range(100) if j != i] for i in range(100)]
    known = torch.stack(  # by regression on the others, one neuron at a time
        [rho[i, rest] @ torch.linalg.solve(rho[rest][:, rest], rho[i, rest]) for i, rest in enumerate(others)]
    )
    off = rho - torch.eye(100, dtype=torch.float64)
    squares, norm = off.square().sum(1), torch.linalg.matrix_norm(off, 2).item()
    torch.testing.assert_close(1 - known, 1 / torch.linalg.inv(rho).diagonal(), rtol=1e-6, atol=0)
    if dim == 3:
        assert known.mean() > 0.9
    else:
        assert norm < 1
        assert (squares / (1 + norm) <= known).all() and (known <= squares / (1 - norm)).all()


@pytest.mark.parametrize("dim", [3, 10, 30])
def test_eighth_moment_of_a_correlation(dim, generator):
    F = torch.nn.functional.normalize(torch.randn(100_000, dim, generator=generator, dtype=torch.float64), dim=1)
    assert_mean(F[:, 0] ** 8, 105 / (dim * (dim + 2) * (dim + 4) * (dim + 6)))


def test_normalised_squares_at_another_variance():
    """E[He_p(sqrt(v) g)^2] / p! is the middle coefficient of ((v-1)/2 + v x + (v-1)/2 x^2)^p."""
    x, weights = normal_rule()
    for variance in (1.0, 1.5, 2.0):
        for degree in range(9):
            values = polynomials(math.sqrt(variance) * x, degree)[:, -1] ** 2 / FACTORIAL[degree]
            side = (variance - 1) / 2
            expected = np.polynomial.polynomial.polypow([side, variance, side], degree)[degree]
            assert math.isclose((values @ weights).item(), expected, rel_tol=len(x) * EPS)
