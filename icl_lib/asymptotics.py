"""Closed-form errors: plain numbers in, plain numbers out. An independent witness: nothing here simulates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check, hermite
from icl_lib._check import Number
from icl_lib.moments import Moments, Target, summary_moments

__all__ = [
    "AttentionErrors",
    "bayes_ridge_error",
    "dmmse_error",
    "linear_attention_errors",
    "linear_attention_optimum",
    "linear_transformer_error",
    "marchenko_pastur_resolvent",
    "optimal_penalty",
    "random_transformer_error",
]

R = TypeVar("R")
ROUNDING = 1e-12  # a smaller denominator, or variance relative to that at r = 1, is rounding error
NEGLIGIBLE = 1e-24  # share of a second moment below which a coefficient is rounding error and counts as 0


def linear_transformer_error(
    *,
    dim: int,
    length: int,
    n_prompts: Number,
    penalty: Number,
    target: Target,
    noise: Number,
    intercept: bool = False,
    norm_samples: Tensor | np.ndarray | Sequence[Number] | None = None,
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
    regression, which treats the features as if they were Gaussian; with infinitely many prompts it is exact. The
    second moments :math:`\\beta` and :math:`\\gamma` are those of ``moments.summary_moments``, t is the mean of
    :math:`\\lVert h \\rVert^2`, and the first equation fixes :math:`\\nu`, the effective ridge.

    This treats all feature vectors as if they had the same norm. Samples of :math:`R = \\lVert h \\rVert^2 / t`
    correct for their norms, which matters where the penalty is small and n is not large; the first line fixes
    :math:`\\nu` and :math:`\\eta`, and the last one Q:

    .. math::
        \\begin{aligned}
        &\\eta \\, T_1 \\nu = \\mathrm{penalty}, \\qquad T_1 = n \\, \\mathbb{E}[\\omega] =
        \\frac{d^2 \\beta}{\\beta + \\nu} + \\frac{d \\gamma}{\\gamma + \\nu}, \\qquad
        \\omega = \\frac{R}{R + \\eta} \\\\
        &e = Q + \\sigma^2 + \\frac{\\nu^2 B}{(\\beta + \\nu)^2}, \\qquad
        Q = \\frac{n T_2}{T_1^2} \\, \\mathbb{E}\\Bigl[\\omega^2 \\Bigl(Q + \\frac{\\sigma^2}R +
        \\frac{\\nu^2 B}{(\\beta + \\nu)^2}\\Bigr)\\Bigr]
        \\end{aligned}

    Args:
        dim: dimension d.
        length: number l of examples in a prompt.
        n_prompts: number n of training prompts; ``math.inf`` for the best linear Transformer.
        penalty: coefficient of the squared norm against the summed squared error, at least 0.
        target: link function, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise.
        intercept: whether the model fits a constant.
        norm_samples: samples of R, shape ``(samples,)``, above 0; R = 1 for every prompt if missing.

    Returns:
        The error, for isotropic inputs, scaling ``"unit"`` and fresh tasks.

    Raises:
        ValueError: for sizes below 1, a negative penalty or noise, samples that are not above 0, or at the pole:
            penalty 0 and n = d (d + 1).

    Source: [this book, "In-context regression"; finite n: Defilippis et al. 2024, ridge regression]
    """
    penalty = _check.number("penalty", penalty, least=0.0)
    answer = _answer(target, dim, length, noise)
    moments, explained = answer.moments, answer.explained
    rest = answer.rest + (0.0 if intercept else answer.mean**2)
    if n_prompts == math.inf:
        return rest
    n = _check.integer("n_prompts", n_prompts)
    norms = _norms(norm_samples)
    groups = ((moments.beta, dim**2), (moments.gamma, dim))
    nu, eta = _linear_fixed_point(groups, n, penalty, norms)
    weight = norms / (norms + eta)  # omega
    two = sum(m * e**2 / (e + nu) ** 2 for e, m in groups)
    factor = two / (n * weight.mean() ** 2)  # n T_2 / T_1^2
    left = 1 - factor * (weight**2).mean()
    if left < ROUNDING:
        raise ValueError(
            f"n_prompts is {n} at penalty {penalty:g}, expected another number than d (d + 1): the error is infinite"
        )
    missed = nu**2 * explained / (moments.beta + nu) ** 2
    return float(rest + missed + factor * (weight**2 * (rest / norms + missed)).mean() / left)


def random_transformer_error(
    *,
    dim: int,
    length: int,
    n_prompts: Number,
    width: Number,
    penalty: Number,
    activation: Target,
    target: Target,
    noise: Number,
    norm_samples: Tensor | np.ndarray | Sequence[Number] | None = None,
) -> float:
    """In-context error of the random Transformer after ridge regression on n prompts, label noise included.

    The features are treated as Gaussian ones; :math:`\\beta`, :math:`\\gamma` and t are those of
    :func:`linear_transformer_error`. Their covariance has four eigenvalues e of multiplicity m, and a tail
    of weight :math:`\\theta` in some :math:`d^3` directions, which n prompts or k neurons are too few to learn. With
    the coefficients :math:`c_i` of the activation and :math:`o = (d \\beta^2 + \\gamma^2) / (d \\beta + \\gamma)^2`,

    .. math::
        \\begin{aligned}
        &e_1 = c_1^2 \\beta / t, \\; m = d^2 \\qquad e_2 = c_1^2 \\gamma / t, \\; m = d \\qquad
        e_3 = \\frac{c_2^2 o}{d (d + 2)}, \\; m = \\tfrac12 (d - 1)(d + 2) \\\\
        &e_0 = c_0^2 + \\frac{c_2^2 o}{2 d}, \\; m = 1 \\qquad \\theta = (c^*_2)^2 + \\tfrac12 c_2^2 (1 - o)
        \\end{aligned}

    Of the answer's second moment :math:`m_2`, :math:`B_1 = c_1(\\varphi)^4 / (d \\beta)` lies on the first group,
    :math:`B_0 = c_0(\\varphi)^2` on the constant, whose eigenvalue is :math:`e_0`, and :math:`\\sigma^2 = m_2 - B_0 -
    B_1` on none. One equation fixes :math:`\\nu`, with :math:`T_1 < \\min(n, k)`:

    .. math::
        (n - T_1)(k - T_1) \\nu = \\mathrm{penalty}, \\qquad
        T_1 = \\sum \\frac{m e}{e + \\nu} + \\frac{\\theta}{\\nu}, \\qquad
        T_2 = \\sum \\frac{m e^2}{(e + \\nu)^2}, \\qquad \\chi = \\nu \\frac{T_1 - T_2}{k - T_2}

    .. math::
        e_{\\mathrm{ICL}} = n \\,
        \\frac{\\sum_{i = 0, 1} B_i (\\nu^2 + \\chi e_i) / (e_i + \\nu)^2 + \\sigma^2}
        {n - T_1 + (k - T_1)(T_1 - T_2) / (k - T_2)}

    This treats all feature vectors as if they had the same norm. Samples of :math:`r = \\lVert h \\rVert^2 / t`, which
    the page on notation writes R, correct for their norms; the first line fixes :math:`\\nu` and :math:`\\eta`.
    Every prompt has its own :math:`c_i(r) = \\mathbb{E}[\\sigma(\\sqrt r g) He_i(g)]` then, and v(r) is the
    variance of :math:`\\sigma(\\sqrt r g)` over its value at r = 1. The parts :math:`B_0` and :math:`B_1` of the answer
    have the sizes :math:`a_0 = 1` and :math:`a_1 = \\sqrt r`; the features that carry them have the sizes
    :math:`p_0 = [c_0(r)^2 + (e_0 - c_0^2) c_2(r)^2 / c_2^2]^{1/2}` and :math:`p_1 = c_1(r) (\\beta / t)^{1/2}`:

    .. math::
        \\begin{aligned}
        &\\eta \\, T_1 (k - T_1) \\nu = \\mathrm{penalty}, \\qquad T_1 = n \\, \\mathbb{E}[\\omega], \\qquad
        \\omega = \\frac{v}{v + \\eta} \\\\
        &\\sigma^2(r) = \\sigma^2 + \\sum_{i = 0, 1} B_i (a_i - A_i p_i)^2, \\qquad
        A_i = \\frac{\\mathbb{E}[a_i p_i / (v + \\eta)]}{\\mathbb{E}[(p_i^2 + \\nu v) / (v + \\eta)]} \\\\
        &Q = \\frac{\\chi \\sum_i B_i A_i^2 + n U T_1^{-2} \\, \\mathbb{E}[\\omega^2 \\sigma^2(r) / v]}
        {1 - n U T_1^{-2} \\, \\mathbb{E}[\\omega^2]}, \\qquad
        U = \\frac{T_1^2}{k} + \\frac{(k - T_1)^2 T_2}{k (k - T_2)} \\\\
        &e_{\\mathrm{ICL}} = \\mathbb{E}[v] \\, Q + \\mathbb{E}[\\sigma^2(r)]
        \\end{aligned}

    If r = 1 always, that is the first formula. Corrections of order 1/d are left out: for instance, a long query has
    both large features and large answers.

    Args:
        dim: dimension d.
        length: number l of examples in a prompt.
        n_prompts: number n of training prompts; ``math.inf`` for the best read-out of k neurons.
        width: number k of neurons; ``math.inf`` for the limit at a fixed penalty, which acts like penalty 0.
        penalty: coefficient of the squared norm against the summed squared error, at least 0.
        activation: activation of the neurons, a name in ``hermite.ACTIVATIONS`` or a callable.
        target: link function, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise.
        norm_samples: samples of :math:`r = \\lVert x_{l+1} \\rVert^2 \\lVert b \\rVert^2 / t`, shape ``(samples,)``,
            above 0; r = 1 for every prompt if missing.

    Returns:
        The error, for isotropic inputs, scaling ``"unit"`` and fresh tasks.

    Raises:
        ValueError: for sizes below 1, a negative penalty or noise, samples that are not above 0, an activation that
            is 0, or at a pole: penalty 0 and n = k, or n = the number of features where that is smaller than k.

    Source: [Defilippis et al. 2024, deterministic equivalents; spectrum and norms: this book, "Random Transformers"]
    """
    n, k = _size("n_prompts", n_prompts), _size("width", width)
    penalty = _check.number("penalty", penalty, least=0.0)
    answer = _answer(target, dim, length, noise)
    kernel = _kernel(activation, dim, answer.moments)
    norms, means, scale = _lengths(activation, kernel, norm_samples)
    nu, eta = _fixed_point(kernel, n, k, penalty, scale)

    one, two, spread = kernel.overlaps(nu)
    chi = spread / (k - two) if spread > 0 else 0.0
    weight = 1 / (scale + eta) if n < math.inf else np.ones_like(scale)
    bias, rest = 0.0, np.full_like(scale, answer.rest)
    lengths = np.ones_like(norms), np.sqrt(norms)  # a_0 and a_1
    powers = answer.mean**2, answer.explained
    for power, part, mean in zip(powers, lengths, means, strict=True):
        squares = (weight * (mean**2 + nu * scale)).mean()
        fitted = (weight * part * mean).mean() / squares if squares > 0 else 0.0
        rest += power * (part - fitted * mean) ** 2
        bias += chi * power * fitted**2
    if n == math.inf:
        return float(scale.mean() * bias + rest.mean())
    variance = n * (one**2 / k + ((1 - one / k) ** 2 * two / (1 - two / k) if two < k else 0.0))  # n U
    weight /= one
    left = 1 - variance * ((weight * scale) ** 2).mean()
    if left < ROUNDING:
        raise ValueError(f"penalty is {penalty:g} at n = min(width, features), expected more: the error is infinite")
    return float(scale.mean() * (bias + variance * (weight**2 * scale * rest).mean()) / left + rest.mean())


@dataclass(frozen=True)
class AttentionErrors:
    """Errors of trained linear attention on fresh tasks, on the tasks of its training, and on its training set.

    Args:
        icl: :math:`e_{\\mathrm{ICL}}`, for fresh tasks, label noise included.
        idg: :math:`e_{\\mathrm{IDG}}`, for new prompts of the K training tasks, label noise included.
        train: mean squared error on the training prompts.
        ridge: :math:`\\zeta`, the effective ridge of a finite training set.

    Source: [Lu25, ICL and IDG errors]
    """

    icl: float
    idg: float
    train: float
    ridge: float

    @property
    def gap(self) -> float:
        """:math:`e_{\\mathrm{ICL}} - e_{\\mathrm{IDG}}`, the price of a task that is new.

        Source: [Lu25, task generalisation]
        """
        return self.icl - self.idg


def marchenko_pastur_resolvent(x: Number, kappa: Number) -> float:
    """Mean of 1 / (v + x) over the eigenvalues v of the second moment of a pool of tasks, in high dimension.

    .. math::
        M_\\kappa(x) = \\Bigl\\langle \\frac1{v + x} \\Bigr\\rangle
        = \\lim_{d \\to \\infty} \\frac1d \\mathrm{Tr}
        \\Bigl(\\frac1K \\sum_{k \\le K} \\xi_k \\xi_k^\\top + x I\\Bigr)^{-1}
        = \\frac2{x + 1 - \\kappa^{-1} + \\sqrt{(x + 1 - \\kappa^{-1})^2 + 4 x / \\kappa}}

    The tasks are isotropic, with entries of variance 1, and :math:`K = \\kappa d`. Below :math:`\\kappa = 1` the pool
    does not span the space: a share :math:`1 - \\kappa` of the eigenvalues is 0, and the formula is evaluated in a
    form without cancellation.

    Args:
        x: shift, above 0; it may be 0 where kappa is above 1.
        kappa: tasks per dimension, above 0; ``math.inf`` for fresh tasks, whose second moment is the identity.

    Returns:
        The mean, above 0.

    Raises:
        ValueError: for a negative shift, a kappa that is not above 0, or x = 0 and kappa of at most 1.

    Source: [Marchenko and Pastur 1967; Lu25, resolvent of the task covariance]
    """
    x, inverse = _check.number("x", x, least=0.0), 1 / _ratio("kappa", kappa)
    if x == 0 and inverse >= 1:
        raise ValueError(f"x is 0 at kappa {kappa:g}, expected a number above 0: the mean is infinite")
    return _resolvent(x, inverse)[0]


def linear_attention_errors(*, alpha: Number, kappa: Number, tau: Number, rho: Number, lam: Number) -> AttentionErrors:
    """Learning curves of linear attention after ridge regression on n prompts about K tasks, in high dimension.

    With :math:`\\psi = (1 + \\rho) / \\alpha`, the noise that a short context adds, and the mean over the eigenvalues
    v of :func:`marchenko_pastur_resolvent`, one equation fixes the effective ridge :math:`\\zeta`:

    .. math::
        \\frac\\lambda\\zeta = 1 - \\frac1\\tau \\Bigl\\langle \\frac{v + \\psi}{v + \\nu} \\Bigr\\rangle
        = 1 - \\frac{1 - \\zeta M_\\kappa(\\nu)}\\tau, \\qquad \\nu = \\psi + \\zeta, \\qquad
        V_i = \\Bigl\\langle \\frac{v^i}{(v + \\nu)^2} \\Bigr\\rangle

    .. math::
        \\begin{aligned}
        e_{\\mathrm{IDG}} &= \\frac{\\rho + \\nu^2 V_1 + \\psi V_2}
        {\\lambda / \\zeta + \\zeta (V_1 + \\psi V_0) / \\tau}, \\qquad
        e_{\\mathrm{train}} = \\Bigl(\\frac\\lambda\\zeta\\Bigr)^2 e_{\\mathrm{IDG}} \\\\
        e_{\\mathrm{ICL}} &= \\rho + \\nu^2 V_0 + \\psi V_2
        + (1 + \\psi) (V_1 + \\psi V_0) \\, \\frac{e_{\\mathrm{IDG}}}\\tau
        \\end{aligned}

    The denominator is :math:`1 - \\frac1\\tau \\langle (v + \\psi)^2 / (v + \\nu)^2 \\rangle`; every term is positive.
    Without a penalty, :math:`\\tau > 1` has :math:`\\zeta = 0` and :math:`\\lambda / \\zeta \\to 1 - 1 / \\tau`; and
    :math:`\\tau < 1` has :math:`\\lambda / \\zeta \\to 0`, :math:`\\tau \\zeta M_{\\kappa / \\tau}(\\psi) = 1 - \\tau`.

    Inputs are N(0, I / d), the label is :math:`\\langle \\xi, x \\rangle` plus noise (target ``"linear"``, scaling
    ``"lu"``), tasks are isotropic with entries of variance 1. For the best penalty, pass the error as a function of
    ``lam`` to :func:`optimal_penalty`.

    Args:
        alpha: examples per dimension, l / d, above 0.
        kappa: tasks per dimension, K / d, above 0; ``math.inf`` for a fresh task in each prompt.
        tau: prompts per weight, n / d^2, above 0; ``math.inf`` for endless training.
        rho: :math:`\\rho`, variance of the label noise, at least 0.
        lam: :math:`\\lambda` in the convention of Lu et al., at least 0: ``penalty = n * lam / d``.

    Returns:
        :class:`AttentionErrors`.

    Raises:
        ValueError: for a ratio that is not above 0, a negative rho or lam, or at the pole: lam = 0 and tau = 1.

    Source: [Lu25, ICL and IDG errors; this form, and the training error: this book, "Learning curves"]
    """
    psi = (1 + _check.number("rho", rho, least=0.0)) / _check.number("alpha", alpha, above=0.0)
    inverse, tau = 1 / _ratio("kappa", kappa), _ratio("tau", tau)
    lam = _check.number("lam", lam, least=0.0)
    if lam == 0 and tau == 1:
        raise ValueError(f"tau is {tau:g} at lam 0, expected another number: the error is infinite")
    ridge = _effective_ridge(psi, inverse, tau, lam)
    left = lam / ridge if lam > 0 else max(1 - 1 / tau, 0.0)  # lambda / zeta
    nu = psi + ridge
    _, v0, v1, v2 = _means(nu, inverse)
    spread, context = v1 + psi * v0, rho + psi * v2
    idg = (context + nu**2 * v1) / (left + ridge * spread / tau)
    icl = context + nu**2 * v0 + (1 + psi) * spread * idg / tau
    return AttentionErrors(icl, idg, left**2 * idg, ridge)


def bayes_ridge_error(alpha: Number, rho: Number) -> float:
    """Error of the Bayes-optimal prediction for fresh Gaussian tasks: ridge regression within the prompt.

    .. math:: e = \\rho + \\frac\\rho\\alpha M_\\alpha \\Bigl(\\frac\\rho\\alpha\\Bigr)

    The penalty of that regression is :math:`\\rho`. The limit at :math:`\\rho = 0` is :math:`(1 - \\alpha)_+`.

    Args:
        alpha: examples per dimension, l / d, above 0.
        rho: variance of the label noise, at least 0.

    Returns:
        The error in high dimension, label noise included.

    Raises:
        ValueError: for an alpha that is not above 0 or a negative rho.

    Source: [Lu25, ridge estimator; Raventós et al. 2023, ridge]
    """
    alpha, rho = _check.number("alpha", alpha, above=0.0), _check.number("rho", rho, least=0.0)
    if rho == 0:
        return max(1 - alpha, 0.0)
    return rho + rho / alpha * _resolvent(rho / alpha, 1 / alpha)[0]


def dmmse_error(*, dim: int, n_tasks: int, alpha: Number, rho: Number) -> float:
    """Error for fresh tasks of the Bayes-optimal prediction for a pool of K tasks, which takes them for pool tasks.

    .. math::
        \\begin{aligned}
        &e_{\\mathrm{ICL}} = \\rho + \\Bigl(2 x - \\frac\\rho\\alpha\\Bigr) M_\\alpha(x), \\qquad
        \\alpha \\Bigl[\\ln(1 + M) - \\frac M{1 + M}\\Bigr]
        - \\ln \\Bigl[x^2 V_0 + \\Bigl(2 x - \\frac\\rho\\alpha\\Bigr) V_1\\Bigr] = \\frac{m_K^2}d \\\\
        &M = \\frac{M_\\alpha(x)}\\alpha, \\qquad
        V_i = \\Bigl\\langle \\frac{v^i}{(v + x)^2} \\Bigr\\rangle_\\alpha, \\qquad
        m_K = \\mathbb{E} \\max(g_1, \\dots, g_K) \\approx \\sqrt{2 \\ln K}
        \\end{aligned}

    A small pool holds no task like the fresh one. The posterior picks the likeliest, and that overlaps with the fresh
    task as far as the luckiest of K random tasks does: :math:`e \\approx 2 + \\rho - m_K (2 \\alpha + \\rho) / [d
    \\alpha (\\alpha + \\frac32 + \\rho)]^{1/2}`. The left side is :math:`\\frac2d` times the information that picks a
    task. The root ends at :math:`x = \\rho / \\alpha`, where it is all the information in the prompt: from there on the
    pool is as good as fresh tasks, with the error of :func:`bayes_ridge_error`.

    Args:
        dim: dimension d.
        n_tasks: number K of tasks in the pool, on the sphere of radius :math:`\\sqrt d`.
        alpha: examples per dimension, l / d, above 0.
        rho: variance of the label noise, above 0.

    Returns:
        The error, label noise included: within about 1/d for K ~ d, and up to 8 per cent off near the transition at
        d = 16.

    Raises:
        ValueError: for sizes below 1, or an alpha or rho that is not above 0.

    Source: [Raventós et al. 2023, discrete MMSE; formula, not proved: this book, "Task diversity"]
    """
    from scipy.integrate import quad
    from scipy.special import log_ndtr, ndtr

    dim, n_tasks = _check.integer("dim", dim), _check.integer("n_tasks", n_tasks)
    alpha, rho = _check.number("alpha", alpha, above=0.0), _check.number("rho", rho, above=0.0)
    if n_tasks == 1:
        return 2 + rho
    largest = quad(lambda g: -math.expm1(n_tasks * log_ndtr(g)) - ndtr(-g) ** n_tasks, 0, 40)[0]  # m_K
    least = rho / alpha

    def balance(x: float) -> float:
        mean, v0, v1, _ = _means(x, 1 / alpha)
        mean /= alpha
        needed = alpha * (math.log1p(mean) - mean / (1 + mean)) - math.log(x**2 * v0 + (2 * x - least) * v1)
        return largest**2 / (dim * needed)

    x = least if balance(least) >= 1 else least + _root(lambda extra: balance(least + extra))
    return rho + (2 * x - least) * _means(x, 1 / alpha)[0]


def linear_attention_optimum(
    covariance: Float[Tensor, "d d"],
    length: int,
    noise_variance: Number,
    task_covariance: Float[Tensor, "d d"] | None = None,
) -> tuple[Float[Tensor, "d d"], float]:
    """The best layer of linear attention for inputs and tasks of any covariance, exact at every length.

    .. math::
        \\hat y = \\frac1l \\sum_i y_i \\, x_{l+1}^\\top G_* x_i, \\qquad
        G_* = C \\Bigl[\\frac{l + 1}l \\Sigma C + \\frac{\\mathrm{Tr}(C \\Sigma) + \\rho}l I\\Bigr]^{-1}, \\qquad
        e_* = \\rho + \\mathrm{Tr}(\\Sigma C) - \\mathrm{Tr}(\\Sigma G_* \\Sigma C)

    for inputs :math:`x \\sim N(0, \\Sigma)`, labels :math:`y = \\langle \\xi, x \\rangle + \\varepsilon` and tasks of a
    symmetric law with :math:`\\mathbb{E}[\\xi \\xi^\\top] = C`. It is one preconditioned step of gradient descent.

    Args:
        covariance: :math:`\\Sigma`, shape ``(d, d)``.
        length: number l of examples.
        noise_variance: :math:`\\rho`, at least 0.
        task_covariance: C, shape ``(d, d)``; the identity if missing.

    Returns:
        The matrix :math:`G_*`, shape ``(d, d)``, float64, and the error :math:`e_*`, label noise included.

    Raises:
        ValueError: for matrices that are no covariances, a length below 1 or a negative noise variance.

    Source: [Ahn et al. 2023 and Mahankali et al. 2023, one layer; any C: this book, "One layer is one step"]
    """
    dim = _check.array("covariance", covariance, shape=("d", "e")).shape[-1]
    sigma, length = _check.covariance("covariance", covariance, dim)[0], _check.integer("length", length)
    rho = _check.number("noise_variance", noise_variance, least=0.0)
    eye = torch.eye(dim, dtype=sigma.dtype, device=sigma.device)
    c = eye if task_covariance is None else _check.covariance("task_covariance", task_covariance, dim)[0].to(sigma)
    signal = sigma @ c
    power = signal.trace().item()
    system = (1 + 1 / length) * signal + (power + rho) / length * eye
    matrix = torch.linalg.solve(system, c, left=False)
    return matrix, rho + power - (sigma @ matrix @ signal).trace().item()


def optimal_penalty(error: Callable[[float], Number], low: Number = 1e-6, high: Number = 1e6) -> tuple[float, float]:
    """The penalty with the smallest error, from a grid that is refined around each of its local minima.

    .. math:: \\lambda^* = \\arg\\min_{\\mathrm{low} \\le \\lambda \\le \\mathrm{high}} e(\\lambda)

    Args:
        error: maps a penalty to an error, smoothly on the scale of the grid: four points a decade.
        low: smallest penalty, above 0.
        high: largest penalty, above ``low``.

    Returns:
        The penalty and its error. A penalty of ``low`` or ``high`` says that better ones may lie outside.

    Raises:
        ValueError: if the range is empty or reaches 0, or an error is not finite.

    Source: [this book, "Random Transformers"]
    """
    from scipy.optimize import minimize_scalar

    if not callable(error):
        raise ValueError(f"error is {error!r}, expected a function of the penalty")
    low = _check.number("low", low, above=0.0)
    high = _check.number("high", high, above=low)

    def value(log_penalty: float) -> float:
        penalty = min(max(math.exp(log_penalty), low), high)
        return _check.number(f"error at penalty {penalty:g}", error(penalty))

    points = np.linspace(math.log(low), math.log(high), 3 + math.ceil(4 * math.log10(high / low))).tolist()
    values = [value(point) for point in points]
    found = [(values[0], points[0]), (values[-1], points[-1])]
    for i in range(1, len(points) - 1):
        if values[i] <= min(values[i - 1], values[i + 1]):
            bounds = (points[i - 1], points[i + 1])
            best = minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-6})
            found += [(values[i], points[i]), (float(best.fun), float(best.x))]
    smallest, log_penalty = min(found)
    return min(max(math.exp(log_penalty), low), high), smallest


@dataclass(frozen=True)
class _Answer:
    """The answer's second moment, by the feature that carries it."""

    moments: Moments
    mean: float  # c_0 of the target, carried by a constant
    explained: float  # B_1, carried by the features x_i b_j
    rest: float  # sigma^2, carried by none


@dataclass(frozen=True)
class _Kernel:
    """Spectrum of the random features: groups (e, m), the constant first, then the features x_i b_j; and the tail."""

    groups: tuple[tuple[float, int], ...]
    tail: float
    extra: float  # e_0 - c_0^2, from the unequal lengths of the neurons
    variance: float  # of the activation

    @property
    def rank(self) -> float:
        """Number of directions."""
        return math.inf if self.tail > 0 else float(sum(m for e, m in self.groups if e > 0))

    def overlaps(self, nu: float) -> tuple[float, float, float]:
        """T_1, T_2 and nu (T_1 - T_2); nu = 0 stands for the limit."""
        if nu == 0:
            return self.rank, self.rank, 0.0
        learned = [(m, e / (e + nu)) for e, m in self.groups]
        one = sum(m * f for m, f in learned) + self.tail / nu
        two = sum(m * f**2 for m, f in learned)
        return one, two, nu * sum(m * f * (1 - f) for m, f in learned) + self.tail


def _by_name(function: Callable[..., R]) -> Callable[..., R]:
    """Remember the results for a target or activation given by name; a callable may change between two calls."""
    remembered = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(name: Target, *rest: Number) -> R:
        return (remembered if isinstance(name, str) else function)(name, *rest)

    return call


def _size(name: str, value: Number) -> Number:
    return math.inf if value == math.inf else _check.integer(name, value)


def _ratio(name: str, value: Number) -> float:
    return math.inf if value == math.inf else _check.number(name, value, above=0.0)


def _resolvent(x: float, inverse: float) -> tuple[float, float]:
    """M at a shift x and a given 1 / kappa, and the square root in its denominator; sums of positive numbers only."""
    middle = x + 1 - inverse
    root = math.sqrt(middle**2 + 4 * x * inverse)
    return (2 / (middle + root) if middle > 0 else (root - middle) / (2 * x * inverse)), root


def _means(x: float, inverse: float) -> tuple[float, float, float, float]:
    """Means of 1 / (v + x) and of v^i / (v + x)^2, i = 0, 1, 2, at a shift x and a given 1 / kappa."""
    mean, root = _resolvent(x, inverse)
    learned = mean / (1 + inverse * mean)  # <v / (v + x)>
    two = learned * (2 * x * (1 + inverse) + (1 - inverse) ** 2) / (root * (root + x))
    return mean, mean * (1 + inverse * mean) / root, learned / root, two


def _effective_ridge(psi: float, inverse: float, tau: float, lam: float) -> float:
    """The root zeta of zeta (tau - 1 + zeta M(psi + zeta)) = tau lam, or its limit at lam = 0."""
    if tau == math.inf:
        return lam
    if lam == 0:
        return (1 - tau) / (tau * _resolvent(psi, tau * inverse)[0]) if tau < 1 else 0.0

    def balance(ridge: float) -> float:
        return ridge * max(tau - 1 + ridge * _resolvent(psi + ridge, inverse)[0], 0.0) / (tau * lam)

    return _root(balance)


def _answer(target: Target, dim: int, length: int, noise: Number) -> _Answer:
    dim, length = _check.integer("dim", dim), _check.integer("length", length)
    return _answer_of(target, dim, length, _check.number("noise", noise, least=0.0))


@_by_name
def _answer_of(target: Target, dim: int, length: int, noise: float) -> _Answer:
    moments = summary_moments(dim, length, target=target, noise=noise)
    phi = hermite.activation(target)
    mean, slope = hermite.expand(phi, 1).coefficients.tolist()
    square = hermite.gaussian_mean(lambda g: phi(g) ** 2, phi.kinks).item() + noise**2
    explained = slope**4 / (dim * moments.beta)
    return _Answer(moments, mean, explained, square - mean**2 - explained)


@_by_name
def _head(activation: Target) -> tuple[list[float], float, float]:
    """c_0^2, c_1^2 and c_2^2 without rounding errors, the squared residual after c_2, and the second moment."""
    expansion = hermite.expand(activation, 2)
    if expansion.second_moment == 0:
        raise ValueError(f"activation {expansion.name} is 0 at standard normal points, expected a function that is not")
    squares = [c**2 if c**2 > NEGLIGIBLE * expansion.second_moment else 0.0 for c in expansion.coefficients.tolist()]
    return squares, expansion.residual**2, expansion.second_moment


def _kernel(activation: Target, dim: int, moments: Moments) -> _Kernel:
    (constant, linear, quadratic), residual, _ = _head(activation)
    beta, gamma = dim * moments.beta, moments.gamma
    beta, gamma = beta / (beta + gamma), gamma / (beta + gamma)  # shares of the trace
    focus = beta**2 / dim + gamma**2  # o
    extra = quadratic * focus / (2 * dim)
    groups = (
        (constant + extra, 1),
        (linear * beta / dim**2, dim**2),
        (linear * gamma / dim, dim),
        (quadratic * focus / (dim * (dim + 2)), (dim - 1) * (dim + 2) // 2),
    )
    return _Kernel(groups, residual + quadratic * (1 - focus) / 2, extra, linear + quadratic / 2 + residual)


def _norms(samples: Tensor | np.ndarray | Sequence[Number] | None) -> np.ndarray:
    """Samples of the relative squared norm, or 1 for all prompts."""
    if samples is None:
        return np.ones(1)
    try:
        norms = np.array(_check.numbers_of("norm_samples", samples), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm_samples is {samples!r}, expected numbers in one axis") from error
    if norms.ndim != 1 or norms.size == 0 or not (np.isfinite(norms).all() and (norms > 0).all()):
        wrong = norms[~(np.isfinite(norms) & (norms > 0))]
        raise ValueError(f"norm_samples has shape {norms.shape} and holds {wrong[:3]}, expected finite numbers above 0")
    return norms


def _lengths(
    activation: Target, kernel: _Kernel, samples: Tensor | np.ndarray | Sequence[Number] | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Samples of r, the lengths p_0(r) and p_1(r) of the features that carry the answer, and their variance v(r)."""
    e_0, e_1 = kernel.groups[0][0], kernel.groups[1][0]
    if samples is None:
        return np.ones(1), (np.full(1, math.sqrt(e_0)), np.full(1, math.sqrt(e_1))), np.ones(1)
    norms = _norms(samples)
    low, high = math.log(norms.min()), math.log(norms.max())
    middle, half = (low + high) / 2, (high - low) / 2 + 1e-3
    profile = _profile(activation, middle, half)
    constant, slope, curvature, variance = np.polynomial.chebyshev.chebval((np.log(norms) - middle) / half, profile)
    (_, linear, quadratic), _, second_moment = _head(activation)
    if quadratic > 0:
        constant = np.sqrt(constant**2 + kernel.extra * curvature**2 / quadratic)
    constant[constant**2 < NEGLIGIBLE * second_moment] = 0.0
    slope *= math.sqrt(e_1 / linear) if linear > 0 else 0.0
    scale = variance / kernel.variance if kernel.variance > 0 else np.ones_like(norms)
    if scale.min() < ROUNDING:
        raise ValueError(f"norm_samples holds {norms[scale < ROUNDING].min():.3g}, at which the activation is constant")
    return norms, (constant, slope), scale


@_by_name
def _profile(activation: Target, middle: float, half: float) -> np.ndarray:
    """c_0(r), c_1(r), c_2(r) and the variance as 33 Chebyshev coefficients in log r = middle ± half, shape (33, 4)."""
    sigma = hermite.activation(activation)
    nodes = np.cos((np.arange(33) + 0.5) * (math.pi / 33))
    rows = []
    for scale in np.exp((middle + half * nodes) / 2).tolist():

        def powers(g: Tensor, scale: float = scale) -> Tensor:
            value = sigma(scale * g)
            return torch.stack([value, value * g, value * (g**2 - 1), value**2])

        means = hermite.gaussian_mean(powers, tuple(kink / scale for kink in sigma.kinks)).tolist()
        rows.append((*means[:3], means[3] - means[0] ** 2))
    return np.polynomial.chebyshev.chebfit(nodes, np.array(rows), 32)


def _fixed_point(kernel: _Kernel, n: Number, k: Number, penalty: float, scale: np.ndarray) -> tuple[float, float]:
    """The pair nu, eta. Without a penalty per prompt and neuron, T_1 is the smallest of n, k and the rank."""
    limit = min(n, k)
    if penalty > 0 and max(n, k) < math.inf:

        def balance(nu: float) -> float:
            one, _, _ = kernel.overlaps(nu)
            return _prompt_ridge(one / n, scale) * one * (k - one) * nu / penalty if one < limit else 0.0

        nu = _root(balance)
        return nu, _prompt_ridge(min(kernel.overlaps(nu)[0] / n, 1.0), scale)
    if n < math.inf and n == min(k, kernel.rank):
        raise ValueError(
            f"n_prompts is {n} = min(width, features) at penalty {penalty:g}, expected another number: infinite error"
        )
    nu = 0.0 if kernel.rank <= limit else _root(lambda nu: limit / kernel.overlaps(nu)[0])
    return nu, math.inf if n == math.inf else _prompt_ridge(min(limit, kernel.rank) / n, scale)


def _linear_fixed_point(
    groups: Sequence[tuple[float, int]], n: int, penalty: float, norms: np.ndarray
) -> tuple[float, float]:
    """The pair nu, eta of linear features. Without a penalty, T_1 is the smaller of n and their number."""

    def one(nu: float) -> float:
        return sum(m * e / (e + nu) for e, m in groups)

    if penalty > 0:
        nu = _root(lambda nu: _prompt_ridge(one(nu) / n, norms) * one(nu) * nu / penalty if one(nu) < n else 0.0)
        return nu, _prompt_ridge(min(one(nu) / n, 1.0), norms)
    rank = sum(m for _, m in groups)
    if n < rank:
        return _root(lambda nu: n / one(nu)), 0.0
    return 0.0, _prompt_ridge(rank / n, norms)


def _root(balance: Callable[[float], float]) -> float:
    """Where an increasing function of a positive number passes 1."""
    from scipy.optimize import brentq

    def excess(log_nu: float) -> float:
        return 1 - 2 / (1 + balance(math.exp(log_nu)))

    low, high = -1.0, 1.0
    while excess(low) > 0:
        low *= 2
    while excess(high) < 0:
        high *= 2
    return math.exp(brentq(excess, low, high, xtol=1e-13, rtol=1e-15))


def _prompt_ridge(fraction: float, scale: np.ndarray) -> float:
    """The root eta of E[v / (v + eta)] = fraction in (0, 1], by Newton's method.

    The reciprocal of the left side is concave and increasing in eta (a harmonic mean of affine functions), so that
    the iterates climb from 0 to the root; for v = 1 the first one is the root.
    """
    eta = 0.0
    while True:
        weight = 1 / (scale + eta)
        left = (scale * weight).mean().item()
        if abs(left / fraction - 1) < 1e-13:
            return eta
        eta = max(eta + (left / fraction - 1) / (scale * weight * (weight / left)).mean().item(), 0.0)
