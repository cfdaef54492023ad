"""Hermite polynomials and expansions: identities, independent quadrature, published numbers, what must be refused."""

import itertools
import math
from pathlib import Path

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zscore import assert_mean

from icl_lib import hermite
from icl_lib.hermite import ACTIVATIONS, expand, gaussian_mean, polynomials

EPS = torch.finfo(torch.float64).eps
REFERENCE = pd.read_csv(Path(__file__).parent / "reference" / "hermite.csv")
DEGREE = 12
ROOTS = [math.sqrt(math.factorial(i)) for i in range(DEGREE + 2)]

# The activations once more, in arithmetic of 40 digits.
PRECISE = {
    "relu": lambda x: x if x > 0 else mpmath.mpf(0),
    "tanh": mpmath.tanh,
    "gelu": lambda x: x * mpmath.ncdf(x),
    "erf": mpmath.erf,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "sign": mpmath.sign,
    "step": lambda x: mpmath.mpf(1 if x > 0 else 0),
    "abs": abs,
    "sin": mpmath.sin,
    "identity": lambda x: x,
}


def precise_mean(function, kinked):
    """Gaussian mean by the trapezoidal rule, exponentially accurate; on both sides of a kink at 0 with x = exp(t)."""
    with mpmath.workdps(30):
        if not kinked:
            step = mpmath.mpf(1) / 6
            return step * mpmath.fsum(function(i * step) * mpmath.npdf(i * step) for i in range(-90, 91))
        step, points = mpmath.mpf(1) / 10, (mpmath.exp(mpmath.mpf(i) / 10) for i in range(-360, 28))
        return step * mpmath.fsum((function(x) + function(-x)) * x * mpmath.npdf(x) for x in points)


def hermite_at(x, degree):
    before, now = mpmath.mpf(0), mpmath.mpf(1)
    for i in range(degree):
        before, now = now, x * now - i * before
    return now


def kinked_examples():
    return {
        "shifted relu": (lambda x: torch.relu(x - 0.3), (0.3,)),
        "hard tanh": (lambda x: x.clamp(-1, 1), (-1.0, 1.0)),
        "box": (lambda x: (x.abs() < 0.7).to(x.dtype), (-0.7, 0.7)),
    }


def test_polynomials_are_orthogonal():
    degree = 12
    means = gaussian_mean(lambda x: torch.einsum("xi,xj->ijx", polynomials(x, degree), polynomials(x, degree)))
    roots = torch.tensor([math.sqrt(math.factorial(i)) for i in range(degree + 1)], dtype=torch.float64)
    normalised = means / torch.outer(roots, roots)
    torch.testing.assert_close(normalised, torch.eye(degree + 1, dtype=torch.float64), rtol=0, atol=200 * EPS)


@pytest.mark.parametrize("degree", [0, 1, 2, 7, 30])
def test_polynomials_agree_with_numpy(degree):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).view(1, 41)
    values = polynomials(x, degree)
    assert values.shape == (1, 41, degree + 1)
    expected = np.polynomial.hermite_e.hermevander(x.numpy(), degree)
    scale = np.abs(expected).max(axis=(0, 1))
    np.testing.assert_allclose(values.numpy() / scale, expected / scale, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype, generator):
    x = torch.linspace(-2, 2, 5, dtype=dtype)
    expansion = expand("relu", 3)
    assert polynomials(x, 3).dtype == expansion.polynomial(x).dtype == dtype
    assert expansion.activate(x, generator=generator).dtype == dtype
    assert expansion.coefficients.dtype == torch.float64


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_coefficients_agree_with_precise_quadrature(name):
    expansion, entry = expand(name, DEGREE), ACTIVATIONS[name]
    for i, c in enumerate(expansion.coefficients.tolist()):
        expected = precise_mean(lambda x, i=i: PRECISE[name](x) * hermite_at(x, i), entry.kinks)
        assert abs(c - float(expected)) < 1e-12 * ROOTS[i], i
    square = float(precise_mean(lambda x: PRECISE[name](x) ** 2, entry.kinks))
    assert math.isclose(expansion.second_moment, square, rel_tol=1e-13)


@pytest.mark.parametrize("name", [name for name, entry in ACTIVATIONS.items() if entry.closed_form])
def test_closed_forms_agree_with_our_own_quadrature(name):
    entry = ACTIVATIONS[name]
    exact, numeric = expand(name, 40), expand(entry.function, 40, entry.kinks)
    roots = torch.tensor([math.exp(0.5 * math.lgamma(i + 1)) for i in range(41)], dtype=torch.float64)
    torch.testing.assert_close(exact.coefficients / roots, numeric.coefficients / roots, rtol=0, atol=1e-13)
    assert math.isclose(exact.second_moment, numeric.second_moment, rel_tol=1e-13)


@pytest.mark.parametrize(
    "row", list(REFERENCE.itertuples()), ids=lambda row: f"{row.activation}-{row.quantity}-{row.index}"
)
def test_reference_values(row):
    expansion = expand(row.activation, row.index)
    value = {
        "coefficient over factorial": expansion.coefficients[-1].item() / math.factorial(row.index),
        "residual": expansion.residual,
        "second moment": expansion.second_moment,
    }[row.quantity]
    assert abs(value - row.value) <= 0.51 * 10.0**-row.digits


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_parseval_and_monotone_residual(name):
    expansions = [expand(name, degree) for degree in range(25)]
    for p, expansion in enumerate(expansions):
        shares = expansion.coefficients**2 / torch.tensor(
            [math.factorial(i) for i in range(p + 1)], dtype=torch.float64
        )
        left = expansion.second_moment - shares.sum().item()
        assert abs(expansion.residual**2 - left) <= 20 * EPS * expansion.second_moment
    squares = [expansion.residual**2 for expansion in expansions]
    assert all(b <= a + 2 * EPS * expansions[0].second_moment for a, b in itertools.pairwise(squares))
    assert expansions[0].degree == 0 and expansions[24].degree == 24


@pytest.mark.parametrize("degree", range(1, 11))
def test_polynomials_have_no_residual_from_their_degree_on(degree):
    def function(x):
        return 0.5 - x + 0.1 * x**degree

    assert expand(function, degree).residual == expand(function, degree + 3).residual == 0
    if degree > 1:
        assert expand(function, degree - 1).residual > 0
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    size = function(x).abs().max().item() + 3.0**degree
    torch.testing.assert_close(expand(function, degree).polynomial(x), function(x), rtol=0, atol=1e-13 * size)


@pytest.mark.parametrize("name", kinked_examples())
def test_kinked_callables_with_their_kinks(name):
    function, kinks = kinked_examples()[name]
    expansion = expand(function, 6, kinks)
    for i in range(7):
        with mpmath.workdps(30):
            expected = mpmath.quad(
                lambda x, i=i: (
                    float(function(torch.tensor(float(x), dtype=torch.float64))) * hermite_at(x, i) * mpmath.npdf(x)
                ),
                [-14, *kinks, 14],
                maxdegree=6,
            )
        assert abs(expansion.coefficients[i].item() - float(expected)) < 1e-12 * ROOTS[i]


@pytest.mark.parametrize("name", kinked_examples())
def test_undeclared_kinks_are_noticed(name):
    function, _ = kinked_examples()[name]
    with pytest.raises(ValueError, match="kinks"):
        expand(function, 3)


@pytest.mark.parametrize(
    "function", [lambda x: torch.exp(x**2 / 4), lambda x: torch.exp(x**2 / 2), lambda x: torch.exp(0.3 * x**2)]
)
def test_functions_without_second_moment_are_refused(function):
    with pytest.raises(ValueError, match="too fast|not finite"):
        expand(function, 2)


@pytest.mark.parametrize("steepness", [1.0, 5.0, 10.0, 40.0])
def test_steep_smooth_functions_need_no_kinks(steepness):
    c = expand(lambda x: torch.tanh(steepness * x), 1).coefficients[1].item()
    stein = gaussian_mean(lambda x: steepness / torch.cosh((steepness * x).clamp(-300, 300)) ** 2).item()
    assert math.isclose(c, stein, rel_tol=1e-11)


def test_stein_identity_and_derivatives():
    derivatives = {
        "tanh": lambda x: 1 - torch.tanh(x) ** 2,
        "sin": torch.cos,
        "erf": lambda x: 2 / math.sqrt(math.pi) * torch.exp(-(x**2)),
        "softplus": torch.sigmoid,
    }
    for name, derivative in derivatives.items():
        of_function, of_derivative = expand(name, 11).coefficients, expand(derivative, 10).coefficients
        for i in range(11):
            assert abs(of_derivative[i] - of_function[i + 1]) < 1e-13 * ROOTS[i + 1], (name, i)
        mean = gaussian_mean(lambda x, name=name: x * ACTIVATIONS[name](x)).item()
        assert math.isclose(mean, gaussian_mean(derivative).item(), rel_tol=1e-13)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_coefficients_are_linear(a, b):
    mixed = expand(lambda x: a * torch.tanh(x) + b * torch.sin(x), 8).coefficients
    separate = a * expand("tanh", 8).coefficients + b * expand("sin", 8).coefficients
    roots = torch.tensor(ROOTS[:9], dtype=torch.float64)
    torch.testing.assert_close(mixed / roots, separate / roots, rtol=0, atol=1e-14)


@given(shift=st.floats(-2, 2))
def test_translation_is_generated_by_the_coefficients(shift):
    """E[f(g + s)] is the sum of c_i s^i / i!."""
    c = expand("sin", 60).coefficients
    series = sum(c[i].item() * shift**i / math.factorial(i) for i in range(61))
    assert abs(gaussian_mean(lambda x: torch.sin(x + shift)).item() - series) < 1e-13


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("degree", [0, 1, 5])
def test_polynomial_part_is_the_sum_over_hermite_polynomials(name, degree):
    x = torch.linspace(-4, 4, 9, dtype=torch.float64)
    expansion = expand(name, degree)
    factorials = torch.tensor([math.factorial(i) for i in range(degree + 1)], dtype=torch.float64)
    expected = polynomials(x, degree) @ (expansion.coefficients / factorials)
    torch.testing.assert_close(expansion.polynomial(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_high_degrees_stay_finite(name):
    expansion = expand(name, 150)
    assert torch.isfinite(expansion.polynomial(torch.linspace(-8, 8, 33, dtype=torch.float32))).all()


def test_noise_of_the_truncated_activation(generator):
    expansion = expand("relu", 2)
    x = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64).repeat(50_000, 1)
    noise = expansion.activate(x, generator=generator) - expansion.polynomial(x)
    assert_mean(noise, 0.0)
    assert_mean(noise**2, expansion.residual**2)
    assert_mean(noise[:, :-1] * noise[:, 1:], 0.0)


def test_noise_is_fresh_at_each_call_and_reproducible():
    expansion, x = expand("relu", 2), torch.zeros(7, dtype=torch.float64)
    runs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        runs.append([expansion.activate(x, generator=generator) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert (runs[0][0] != runs[0][1]).all()
    assert torch.equal(x, torch.zeros(7))


@pytest.mark.parametrize("degree", [2, 4, 6])
@pytest.mark.parametrize("count", [100, 200])
def test_gauss_hermite_quadrature_is_wrong_for_relu(degree, count):
    """Nodes on both sides of the kink give relu's residual too low, by a predictable amount: why we split at kinks."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    weights = weights / weights.sum()
    relu = np.maximum(nodes, 0)
    c = [weights @ (relu * row) for row in np.polynomial.hermite_e.hermevander(nodes, degree).T]
    assert math.isclose(weights @ relu**2, 0.5, rel_tol=count * EPS)  # by symmetry, half the mean of x^2
    square = weights @ relu**2 - sum(c[i] ** 2 / math.factorial(i) for i in range(degree + 1))
    exact = expand("relu", degree)
    # Midpoint rule at the kink: each c_i is too high by the error of the mean times He_i(0).
    error = math.pi**2 / (24 * math.sqrt(2 * math.pi) * count)
    expected = error * exact.polynomial(torch.zeros(1, dtype=torch.float64)).item() / exact.residual**2
    assert abs(1 - math.sqrt(square) / exact.residual - expected) < expected / count


def test_lookup_of_activations():
    assert hermite.activation("linear") is ACTIVATIONS["identity"]
    assert hermite.activation(ACTIVATIONS["relu"]) is ACTIVATIONS["relu"]
    wrapped = hermite.activation(torch.nn.functional.hardtanh, (-1.0, 1.0))
    assert wrapped.name == "hardtanh" and wrapped.kinks == (-1.0, 1.0)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    assert torch.equal(wrapped(x), x.clamp(-1, 1))
    for name, function in PRECISE.items():
        expected = torch.tensor([float(function(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)
        torch.testing.assert_close(ACTIVATIONS[name](x), expected, rtol=1e-14, atol=1e-15)


def test_gaussian_mean_of_many_functions_at_once():
    means = gaussian_mean(lambda x: torch.stack([x**2, x**4, torch.cos(x)]))
    expected = torch.tensor([1.0, 3.0, math.exp(-0.5)], dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=1e-14, atol=0)
    assert gaussian_mean(lambda x: (x > 0.3).double(), (0.3,)).item() == pytest.approx(
        0.5 * math.erfc(0.3 / math.sqrt(2)), rel=1e-13
    )


def test_an_activation_carries_what_is_known_about_it():
    """A wrong closed form is believed: who wraps a function answers for it. Without one, quadrature takes over."""
    cube = hermite.Activation("cube", lambda x: x**3)
    expansion = expand(cube, 3)
    assert expansion.residual == 0.0 and expansion.name == "cube"
    torch.testing.assert_close(expansion.coefficients, torch.tensor([0.0, 3.0, 0.0, 6.0], dtype=torch.float64))
    told = hermite.Activation("cube", lambda x: x**3, (), lambda degree: [0.0, 3.0, 0.0, 6.0][: degree + 1], 15.0)
    assert expand(told, 1).residual == pytest.approx(math.sqrt(6), rel=1e-14)
