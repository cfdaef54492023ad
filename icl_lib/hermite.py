"""Hermite polynomials and the expansion of an activation: coefficients, residual, truncation with its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check

__all__ = ["ACTIVATIONS", "Activation", "Expansion", "activation", "expand", "gaussian_mean", "polynomials"]

Function = Callable[[Tensor], Tensor]
HIGHEST_DEGREE = 150  # sqrt(150!) is 1e131; beyond, c_i leaves the range in which its square is a float64


@dataclass(frozen=True)
class Activation:
    """A scalar function with what is known about it.

    Args:
        name: how the book calls it.
        function: maps a tensor to a tensor of the same shape.
        kinks: the points at which the function or one of its derivatives jumps.
        closed_form: ``degree -> [c_0, …, c_degree]`` where the coefficients are known exactly.
        second_moment: :math:`\\mathbb{E}[\\sigma(g)^2]` where it is known exactly.

    Source: [DD25a, model]
    """

    name: str
    function: Function
    kinks: tuple[float, ...] = ()
    closed_form: Callable[[int], list[float]] | None = None
    second_moment: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)


@dataclass(frozen=True)
class Expansion:
    """An activation written as a Hermite polynomial plus noise.

    .. math:: \\sigma(g) \\simeq \\sum_{i \\le p} \\frac{c_i}{i!} He_i(g) + c^*_p z, \\qquad z \\sim N(0, 1)

    Args:
        name: the activation's name.
        coefficients: :math:`c_i = \\mathbb{E}[\\sigma(g) He_i(g)]`, shape ``(degree + 1,)``, float64.
        residual: :math:`c^*_p`, standard deviation of what the polynomial leaves out.
        second_moment: :math:`\\mathbb{E}[\\sigma(g)^2]`.

    Source: [DD25a, Hermite model]
    """

    name: str
    coefficients: Tensor
    residual: float
    second_moment: float

    @property
    def degree(self) -> int:
        """Degree p of the polynomial."""
        return self.coefficients.numel() - 1

    def polynomial(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The polynomial part :math:`\\sum_{i \\le p} c_i He_i(x) / i!`, with three buffers of the size of x."""
        _check.array("x", x)
        before, now = torch.zeros_like(x), torch.ones_like(x)
        total = torch.full_like(x, self.coefficients[0].item())
        for i in range(1, self.degree + 1):  # He_i / sqrt(i!), which stays in the range of float32
            before, now = now, (x * now).mul_(1 / math.sqrt(i)).sub_(before, alpha=math.sqrt((i - 1) / i))
            total.add_(now, alpha=self.coefficients[i].item() / math.exp(0.5 * math.lgamma(i + 1)))
        return total

    def activate(self, x: Float[Tensor, "*shape"], *, generator: torch.Generator) -> Float[Tensor, "*shape"]:
        """The truncated activation: polynomial part plus :math:`c^*_p z` with z drawn afresh for every entry."""
        _check.array("x", x)
        _check.random("generator", generator)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.polynomial(x).add_(noise, alpha=self.residual)


def polynomials(x: Float[Tensor, "*shape"], degree: int) -> Float[Tensor, "*shape degrees"]:
    """Probabilists' Hermite polynomials of degree 0 to ``degree``.

    .. math:: He_{i+1}(x) = x He_i(x) - i He_{i-1}(x), \\qquad He_0 = 1, \\quad He_1 = x

    Args:
        x: points, any shape, float32 or float64.
        degree: highest degree, a non-negative integer.

    Returns:
        Tensor of shape ``(..., degree + 1)``; entry i is :math:`He_i(x)`.

    Raises:
        ValueError: if x is not a finite real tensor or the degree is negative.

    Source: [Olver et al. 2010, Table 18.9.1]
    """
    _check.array("x", x)
    _check.integer("degree", degree, least=0)
    rows = [torch.ones_like(x), x]
    for i in range(1, degree):
        rows.append(x * rows[i] - i * rows[i - 1])
    return torch.stack(rows[: degree + 1], dim=-1)


def gaussian_mean(function: Function, kinks: Sequence[float] = ()) -> Float[Tensor, "*values"]:
    """Mean of a function of a standard normal variable, to about 15 digits.

    .. math:: \\mathbb{E}[f(g)] = \\int f(x) \\frac{e^{-x^2/2}}{\\sqrt{2\\pi}} \\, dx

    Composite Gauss–Legendre quadrature with a panel edge at every kink, so that each panel sees a smooth function.

    Args:
        function: maps points of shape ``(nodes,)`` to values of shape ``(..., nodes)``.
        kinks: where the function or a derivative of it jumps.

    Returns:
        The mean, float64, of the leading shape of the values (a scalar tensor for one function).

    Raises:
        ValueError: if values are not finite, the function has an undeclared kink, or its mean does not exist.

    Source: [Trefethen 2008, Section 2; panels split at the kinks]
    """
    if not callable(function):
        raise ValueError(f"function is {function!r}, expected a callable on tensors")
    return _mean(function, _points(kinks), reach=13.0)


def activation(name_or_function: str | Function, kinks: Sequence[float] = ()) -> Activation:
    """Look up an activation by name, or wrap a callable.

    Args:
        name_or_function: a name in :data:`ACTIVATIONS`, ``"linear"`` for the identity, or a callable on tensors.
        kinks: where a callable or one of its derivatives jumps.

    Raises:
        ValueError: if the name is unknown or the kinks are not finite.

    Source: [this book, "Hermite expansions"]
    """
    if isinstance(name_or_function, Activation):
        return name_or_function
    if isinstance(name_or_function, str):
        name = "identity" if name_or_function == "linear" else name_or_function
        if name not in ACTIVATIONS:
            raise ValueError(f"activation is {name_or_function!r}, expected one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]
    if not callable(name_or_function):
        raise ValueError(f"activation is {name_or_function!r}, expected a name or a callable")
    return Activation(getattr(name_or_function, "__name__", "callable"), name_or_function, _points(kinks))


def expand(activation: str | Function, degree: int, kinks: Sequence[float] = ()) -> Expansion:
    """Hermite expansion of an activation up to a degree.

    .. math::
        c_i = \\mathbb{E}[\\sigma(g) He_i(g)], \\qquad
        (c^*_p)^2 = \\mathbb{E}[\\sigma(g)^2] - \\sum_{i \\le p} \\frac{c_i^2}{i!}

    Closed forms are used where they are known (relu, abs, sign, step, erf, gelu, sin, identity) and quadrature
    split at the kinks elsewhere. A squared residual below the rounding error of the sum is returned as 0.

    Args:
        activation: a name in :data:`ACTIVATIONS` or a callable on tensors.
        degree: highest degree p, from 0 to 150.
        kinks: where a callable or one of its derivatives jumps.

    Returns:
        :class:`Expansion` with coefficients, residual and second moment.

    Raises:
        ValueError: for an unknown name, a bad degree, an undeclared kink, or a function without second moment.

    Source: [DD25a, Hermite model; closed forms: this book, "Hermite expansions"]
    """
    _check.integer("degree", degree, least=0)
    if degree > HIGHEST_DEGREE:
        raise ValueError(f"degree is {degree}, expected at most {HIGHEST_DEGREE}")
    chosen = _lookup(activation, kinks)
    square = chosen.second_moment
    if square is None:
        square = gaussian_mean(lambda x: chosen(x) ** 2, chosen.kinks).item()
    factorials = [math.exp(0.5 * math.lgamma(i + 1)) for i in range(degree + 1)]
    roots = torch.tensor(factorials, dtype=torch.float64, device="cpu")  # sqrt(i!)
    if chosen.closed_form is not None:
        coefficients = torch.tensor(chosen.closed_form(degree), dtype=torch.float64, device="cpu")
    else:
        scaled = _mean(lambda x: chosen(x) * _normalised(x, degree), chosen.kinks, reach=13.0 + 2 * math.sqrt(degree))
        coefficients = scaled * roots
    shares = (coefficients / roots) ** 2
    left = square - math.fsum(shares.tolist())
    rounding = 8 * torch.finfo(torch.float64).eps * max(square, torch.finfo(torch.float64).tiny)
    return Expansion(chosen.name, coefficients, math.sqrt(left) if left > rounding else 0.0, square)


def _points(kinks: Sequence[float]) -> tuple[float, ...]:
    return tuple(_check.number("kink", kink) for kink in _check.numbers_of("kinks", kinks))


_lookup = activation  # `expand` has an argument of that name


def _normalised(x: Tensor, degree: int) -> Tensor:
    """Orthonormal polynomials He_i / sqrt(i!), shape (degree + 1, nodes): the same recurrence without overflow."""
    rows = [torch.ones_like(x), x]
    for i in range(1, degree):
        rows.append((x * rows[i] - math.sqrt(i) * rows[i - 1]) / math.sqrt(i + 1))
    return torch.stack(rows[: degree + 1])


@cache
def _panel() -> tuple[Tensor, Tensor]:
    """Nodes and weights of 24-point Gauss–Legendre quadrature on [-1, 1]."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(24)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


@cache
def _rule(reach: float, width: float, kinks: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the standard normal density on [-reach, reach], panels no wider than ``width``."""
    inner = sorted({kink for kink in kinks if -reach < kink < reach})
    stops = [-reach, *inner, reach]
    edges = [-reach]
    for left, right in zip(stops[:-1], stops[1:], strict=True):
        count = math.ceil((right - left) / width)
        edges += [left + (right - left) * j / count for j in range(1, count + 1)]
    edge = torch.tensor(edges, dtype=torch.float64, device="cpu")
    middle, half = (edge[1:] + edge[:-1]) / 2, (edge[1:] - edge[:-1]) / 2
    nodes, weights = _panel()
    x = (middle[:, None] + half[:, None] * nodes).flatten()
    w = (half[:, None] * weights).flatten() * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return x, w


def _mean(function: Function, kinks: tuple[float, ...], reach: float) -> Tensor:
    """Gaussian mean on [-reach, reach]; two rules must agree, or panels are made narrower, for steep functions."""
    for width in (1.0, 0.3, 0.1):
        coarse, _ = _quadrature(function, kinks, reach, width)
        mean, size = _quadrature(function, kinks, reach, 0.7 * width)
        error = ((coarse - mean).abs() / (size + torch.finfo(torch.float64).tiny)).max().item()
        if error <= 1e-11:
            return mean
    raise ValueError(f"quadrature rules differ by {error:.1e}: declare where the function jumps as kinks")


def _quadrature(function: Function, kinks: tuple[float, ...], reach: float, width: float) -> tuple[Tensor, Tensor]:
    """Gaussian means of a function and of its absolute value by one rule."""
    x, w = _rule(reach, width, kinks)
    values = function(x)
    if not isinstance(values, Tensor) or values.ndim == 0 or values.shape[-1] != x.numel():
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"function returned {got} at {x.numel()} points, expected shape (..., {x.numel()})")
    values = values.to(torch.float64)
    if not _check.all_finite(values):
        raise ValueError("function returned values that are not finite at standard normal points")
    mean, size = (values * w).sum(-1), (values.abs() * w).sum(-1)
    tail = (values[..., [0, -1]].abs() * w[[0, -1]] / w.max()).max()
    if tail > 1e-12 * max(size.max().item(), 1e-20):  # a function that vanishes but for the tails is fine
        raise ValueError(f"function grows too fast: its mean has not converged at |x| = {reach:g}")
    return mean, size


def _double_factorial(n: int) -> int:
    """n!! for odd n, with (-1)!! = 1."""
    return math.prod(range(n, 0, -2))


def _relu_coefficients(degree: int) -> list[float]:
    """relu: c_0 = 1/sqrt(2 pi), c_1 = 1/2, c_{2m} = (-1)^{m-1} (2m-3)!! / sqrt(2 pi)."""
    root = math.sqrt(2 * math.pi)
    even = [1 / root] + [(-1) ** (m - 1) * _double_factorial(2 * m - 3) / root for m in range(1, degree // 2 + 1)]
    return [0.5 if i == 1 else 0.0 if i % 2 else even[i // 2] for i in range(degree + 1)]


def _abs_coefficients(degree: int) -> list[float]:
    """|x| = 2 relu(x) - x: twice the even coefficients of relu."""
    return [0.0 if i % 2 else 2 * c for i, c in enumerate(_relu_coefficients(degree))]


def _erf_like(degree: int, factor: float, ratio: float) -> list[float]:
    """Odd coefficients factor * ratio^m (-1)^m (2m-1)!!: sign (ratio 1) and erf (ratio 2/3)."""
    return [
        0.0 if i % 2 == 0 else factor * ratio ** (i // 2) * (-1) ** (i // 2) * _double_factorial(i - 2)
        for i in range(degree + 1)
    ]


def _sign_coefficients(degree: int) -> list[float]:
    return _erf_like(degree, math.sqrt(2 / math.pi), 1.0)


def _step_coefficients(degree: int) -> list[float]:
    return [0.5 if i == 0 else c / 2 for i, c in enumerate(_sign_coefficients(degree))]


def _erf_coefficients(degree: int) -> list[float]:
    return _erf_like(degree, 2 / math.sqrt(3 * math.pi), 2 / 3)


def _gelu_coefficients(degree: int) -> list[float]:
    """x Phi(x): c_i = a_{i+1} + i a_{i-1}, with a the coefficients of the normal distribution function Phi."""
    a = [0.5 if i == 0 else c for i, c in enumerate(_erf_like(degree + 1, 0.5 / math.sqrt(math.pi), 0.5))]
    return [a[i + 1] + (i * a[i - 1] if i else 0.0) for i in range(degree + 1)]


def _sin_coefficients(degree: int) -> list[float]:
    return [0.0 if i % 2 == 0 else (-1) ** (i // 2) * math.exp(-0.5) for i in range(degree + 1)]


def _identity_coefficients(degree: int) -> list[float]:
    return [1.0 if i == 1 else 0.0 for i in range(degree + 1)]


ACTIVATIONS: dict[str, Activation] = {
    entry.name: entry
    for entry in (
        Activation("relu", torch.relu, (0.0,), _relu_coefficients, 0.5),
        Activation("tanh", torch.tanh),
        Activation("gelu", torch.nn.functional.gelu, (), _gelu_coefficients, 1 / 3 + 1 / (2 * math.pi * math.sqrt(3))),
        Activation("erf", torch.erf, (), _erf_coefficients, 2 / math.pi * math.asin(2 / 3)),
        Activation("sigmoid", torch.sigmoid),
        Activation("softplus", torch.nn.functional.softplus),
        Activation("sign", torch.sign, (0.0,), _sign_coefficients, 1.0),
        Activation("step", lambda x: (x > 0).to(x.dtype), (0.0,), _step_coefficients, 0.5),
        Activation("abs", torch.abs, (0.0,), _abs_coefficients, 1.0),
        Activation("sin", torch.sin, (), _sin_coefficients, (1 - math.exp(-2)) / 2),
        Activation("identity", lambda x: x, (), _identity_coefficients, 1.0),
    )
}
