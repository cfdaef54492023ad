"""Closed-form errors: plain numbers in, plain numbers out. An independent witness: nothing here simulates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icl_lib import _check, hermite
from icl_lib._check import Number
from icl_lib.moments import Target, summary_moments

__all__ = ["linear_transformer_error"]


def linear_transformer_error(
    *,
    dim: int,
    length: int,
    n_prompts: Number,
    penalty: Number,
    target: Target,
    noise: Number,
    intercept: bool = False,
) -> float:
    """In-context error of the linear Transformer after ridge regression on n prompts, label noise included.

    .. math::
        n - \\frac{\\mathrm{penalty}}{\\nu} = \\frac{d^2 \\beta}{\\beta + \\nu} + \\frac{d \\gamma}{\\gamma + \\nu},
        \\qquad
        e = \\frac{\\nu^2 B / (\\beta + \\nu)^2 + \\sigma^2}{1 - T_2 / n},
        \\qquad
        T_2 = \\frac{d^2 \\beta^2}{(\\beta + \\nu)^2} + \\frac{d \\gamma^2}{(\\gamma + \\nu)^2}

    with :math:`B = c_1^4 / (d \\beta)`, the variance of the answer that the features explain, and
    :math:`\\sigma^2 = m_2 - B`, less :math:`c_0^2` with an intercept. It is the deterministic equivalent of ridge
    regression, which treats the features as if they were Gaussian; with infinitely many prompts it is exact.

    Args:
        dim: dimension d.
        length: number l of examples in a prompt.
        n_prompts: number n of training prompts; ``math.inf`` for the best linear Transformer.
        penalty: coefficient of the squared norm against the summed squared error, at least 0.
        target: link function, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise.
        intercept: whether the model fits a constant.

    Returns:
        The error, for isotropic inputs, scaling ``"unit"`` and fresh tasks.

    Raises:
        ValueError: for sizes below 1, a negative penalty or noise, or at the pole: penalty 0 and n = d (d + 1).

    Source: [this book, "In-context regression"; finite n: Defilippis et al. 2024, ridge regression]
    """
    moments = summary_moments(dim, length, target=target, noise=noise)
    penalty = _check.number("penalty", penalty, least=0.0)
    phi = hermite.activation(target)
    mean, slope = (hermite.expand(phi, 1).coefficients).tolist()
    square = hermite.gaussian_mean(lambda g: phi(g) ** 2, phi.kinks).item() + noise**2
    explained = slope**4 / (dim * moments.beta)
    rest = square - explained - (mean**2 if intercept else 0.0)
    if n_prompts == math.inf:
        return rest
    n = _check.integer("n_prompts", n_prompts)
    groups = [(moments.beta, dim**2), (moments.gamma, dim)]
    nu = effective_ridge(groups, n, penalty)
    overlap = sum(m * e**2 / (e + nu) ** 2 for e, m in groups)
    if overlap >= n:
        raise ValueError(
            f"n_prompts is {n} at penalty 0, expected another number than d (d + 1): the error is infinite"
        )
    return (nu**2 * explained / (moments.beta + nu) ** 2 + rest) / (1 - overlap / n)


def effective_ridge(groups: Sequence[tuple[float, int]], n: int, penalty: Number) -> float:
    """The root nu of n - penalty / nu = sum of m e / (e + nu) over the groups (e, m); 0 if there is none above 0."""
    from scipy.optimize import brentq

    def excess(log_nu: float) -> float:
        nu = math.exp(log_nu)
        return n - penalty / nu - sum(m * e / (e + nu) for e, m in groups)

    rank = sum(m for e, m in groups if e > 0)
    if penalty == 0 and n >= rank:
        return 0.0
    high = math.log((penalty + sum(m * e for e, m in groups)) / n) + 1e-9  # excess is positive from here on
    low = high - 1.0
    while excess(low) > 0:
        low -= 2.0
    return math.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-15))
