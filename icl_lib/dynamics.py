"""Exact learning dynamics of the linear Transformer: closed forms, exact flows and population losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number

__all__ = ["LinearDynamics", "SeparateHeads", "population_gradient", "population_loss"]

Values = Tensor | np.ndarray | Sequence[Number] | Number
ENSEMBLES = ("gaussian", "symmetric")
TOLERANCE = 1e-12  # of the numerical integration of a flow, relative


class LinearDynamics:
    """Learning dynamics of the modes of a linear Transformer that learns K linear tasks in context.

    The model predicts :math:`\\hat y = P_2 W \\hat S Q_1 x_{l+1}`. In the eigenbasis of the covariance, mode j has the
    weights :math:`p_j = (P_2)_{jj}` and :math:`q_j = (Q_1)_{jj}` and the strength :math:`\\theta_j = p_j q_j`. Tasks
    are diagonal in that basis, independent from mode to mode, with unit variance. Time is counted in steps of gradient
    descent with learning rate :math:`\\eta` on the summed loss
    :math:`L = \\frac12 \\sum_\\mu \\mathbb{E} \\lVert y - \\hat y \\rVert^2`.

    Args:
        eigenvalues: :math:`s_1, \\dots, s_d` of the input covariance, shape ``(d,)``, above 0.
        length: number l of examples in a prompt; ``math.inf`` for prompts without end.
        n_tasks: number K of tasks.
        learning_rate: :math:`\\eta`, above 0.

    Raises:
        ValueError: for eigenvalues, a length, a number of tasks or a learning rate that are not positive.

    Source: [MT25, mode equations, as summarised; exact at finite length: this book, "Finite context"]
    """

    def __init__(self, eigenvalues: Values, length: Number, n_tasks: int = 1, learning_rate: Number = 1.0) -> None:
        self.eigenvalues = _real("eigenvalues", eigenvalues)
        if self.eigenvalues.ndim != 1:
            raise ValueError(f"eigenvalues has shape {tuple(self.eigenvalues.shape)}, expected (d,)")
        if not _check.every(self.eigenvalues > 0):
            raise ValueError(f"eigenvalues hold {self.eigenvalues.min().item():g}, expected numbers above 0")
        self.length = _length(length)
        self.n_tasks = _check.integer("n_tasks", n_tasks)
        self.learning_rate = _check.number("learning_rate", learning_rate, above=0.0)

    @property
    def timescales(self) -> Float[Tensor, " d"]:
        """Time constants :math:`T_j = 1 / (\\eta K s_j^2)` in steps, shape ``(d,)``.

        Source: [MT25, timescales set by the covariance]
        """
        return 1 / (self.learning_rate * self.n_tasks * self.eigenvalues**2)

    @property
    def limits(self) -> Float[Tensor, " d"]:
        """Strengths at the fixed point, :math:`\\theta^\\infty_j = l / ((l + 1) s_j + \\sum_m s_m)`, shape ``(d,)``.

        Source: [MT25, fixed point]
        """
        s = self.eigenvalues
        return 1 / (s + (s + s.sum()) / self.length)

    def half_time(self, a0: Values) -> Float[Tensor, " d"]:
        """Steps after which a balanced mode has reached half of its limit, shape ``(d,)``.

        .. math:: t_{1/2} = \\frac{T_j}2 \\ln \\frac{\\theta^\\infty_j - \\theta_j(0)}{\\theta_j(0)}

        It is negative for a mode that starts above half of its limit.

        Args:
            a0: strengths at time 0, one number or shape ``(d,)``, above 0 and below the limits.

        Raises:
            ValueError: if a strength is not between 0 and its limit.

        Source: [MT25, logistic solution]
        """
        a0 = self._start("a0", a0)
        if not _check.every((a0 > 0) & (a0 < self.limits)):
            raise ValueError(f"a0 is {a0.tolist()}, expected numbers between 0 and the limits {self.limits.tolist()}")
        return self.timescales / 2 * torch.log((self.limits - a0) / a0)

    def logistic(self, t: Values, a0: Values) -> Float[Tensor, "*times d"]:
        """Strengths of balanced modes, which start with p = q.

        .. math::
            \\theta_j(t) = \\frac{\\theta^\\infty_j \\theta_j(0)}
            {\\theta_j(0) + (\\theta^\\infty_j - \\theta_j(0)) \\, e^{-2 t / T_j}}

        Exact for endless prompts, and for equal eigenvalues with equal starts; else the modes couple at order 1/l: see
        :meth:`flow`.

        Args:
            t: times in steps, at least 0, any shape.
            a0: strengths at time 0, one number or shape ``(d,)``, at least 0.

        Returns:
            Strengths of shape ``(*times, d)``.

        Raises:
            ValueError: for a negative time or strength.

        Source: [MT25, logistic solution]
        """
        time, a0 = self._times(t), self._start("a0", a0)
        if not _check.every(a0 >= 0):
            raise ValueError(f"a0 is {a0.tolist()}, expected numbers of at least 0")
        bottom = a0 + (self.limits - a0) * torch.exp(-2 * time / self.timescales)
        return self.limits * a0 / bottom.where(a0 > 0, torch.ones_like(bottom))

    def modes(self, t: Values, p0: Values, q0: Values) -> tuple[Tensor, Tensor]:
        """Weights of the modes from any start, balanced or not, in the closure of :meth:`logistic`.

        .. math::
            T \\dot p = q \\Bigl(1 - \\frac{p q}{\\theta^\\infty}\\Bigr), \\qquad
            T \\dot q = p \\Bigl(1 - \\frac{p q}{\\theta^\\infty}\\Bigr), \\qquad p^2 - q^2 = \\delta

        :math:`U = (p + q)^2` solves a Riccati equation with the fixed points :math:`U_+ = 2 \\theta^\\infty (1 + r)`
        and :math:`U_- = -\\delta^2 / U_+`, where :math:`r = \\sqrt{1 + (\\delta / 2 \\theta^\\infty)^2}`:

        .. math::
            U(t) = \\frac{U_+ (U_0 - U_-) + U_- (U_+ - U_0) E}{(U_0 - U_-) + (U_+ - U_0) E}, \\qquad
            E = e^{-2 r t / T}

        Then :math:`p + q = \\pm \\sqrt U` with the sign of the start, and :math:`p - q = \\delta / (p + q)`. A start
        with p = -q leads to the saddle at 0.

        Args:
            t: times in steps, at least 0, any shape.
            p0, q0: weights at time 0, one number or shape ``(d,)``, of any sign.

        Returns:
            p and q, each of shape ``(*times, d)``.

        Raises:
            ValueError: for a negative time, or weights that are not finite.

        Source: [MT25, conservation law; solution for unbalanced starts: this book, "Mode dynamics"]
        """
        time, p0, q0 = self._times(t), self._start("p0", p0), self._start("q0", q0)
        imbalance, limits = (p0 - q0) * (p0 + q0), self.limits
        r = torch.sqrt(1 + (imbalance / (2 * limits)) ** 2)
        upper = 2 * limits * (1 + r)
        lower = -(imbalance**2) / upper
        start = (p0 + q0) ** 2
        decay = torch.exp(-2 * r * time / self.timescales)
        bottom = (start - lower) + (upper - start) * decay
        top = upper * (start - lower) + lower * (upper - start) * decay
        square = top / bottom.where(bottom != 0, torch.ones_like(bottom))
        plus = torch.sign(p0 + q0) * square.clamp_min(0).sqrt()
        minus = imbalance / plus.where(plus != 0, torch.ones_like(plus))
        fall = torch.exp(-2 * time / self.timescales)
        saddle = p0**2 * fall / (1 + p0**2 / limits * (1 - fall))  # p^2 = q^2 on the way to the saddle
        still = (p0 + q0 == 0).expand_as(plus)
        minus = torch.where(still, 2 * torch.sign(p0) * saddle.sqrt(), minus)
        plus = torch.where(still, torch.zeros_like(plus), plus)
        return (plus + minus) / 2, (plus - minus) / 2

    def flow(self, t: Values, p0: Values, q0: Values) -> tuple[Tensor, Tensor]:
        """Weights of the modes under the exact gradient flow at finite length, where the modes are coupled.

        .. math::
            \\begin{aligned}
            T_j \\dot p_j &= q_j - p_j \\Bigl(\\frac{l + 1}l s_j q_j^2 + \\frac1{l s_j} \\sum_m s_m^2 q_m^2\\Bigr) \\\\
            T_j \\dot q_j &= p_j - q_j \\Bigl(\\frac{l + 1}l s_j p_j^2 + \\frac1l \\sum_m s_m p_m^2\\Bigr)
            \\end{aligned}

        Args:
            t: times in steps, at least 0, shape ``(times,)``, increasing.
            p0, q0: weights at time 0, one number or shape ``(d,)``.

        Returns:
            p and q, each of shape ``(times, d)``, integrated on the CPU to a relative tolerance of 1e-12.

        Raises:
            ValueError: for times that are negative or do not increase, or weights that are not finite.

        Source: [this book, "Finite context"]
        """
        s, inverse, d = self.eigenvalues.cpu().numpy(), 1 / self.length, len(self.eigenvalues)
        rate = 1 / self.timescales.cpu().numpy()

        def slope(_: float, state: np.ndarray) -> np.ndarray:
            p, q = state[:d], state[d:]
            dp = q - p * ((1 + inverse) * s * q**2 + inverse / s * (s**2 * q**2).sum())
            dq = p - q * ((1 + inverse) * s * p**2 + inverse * (s * p**2).sum())
            return np.concatenate([rate * dp, rate * dq])

        start = torch.cat([self._start("p0", p0), self._start("q0", q0)])
        states = _integrate(slope, start, t)
        return states[:, :d], states[:, d:]

    def loss(self, p: Values, q: Values) -> Tensor:
        """Exact population loss per task of aligned weights, at any length.

        .. math::
            \\frac L K = \\frac12 \\sum_j \\Bigl\\{ s_j - 2 p_j q_j s_j^2 + p_j^2 \\Bigl[\\frac{l + 1}l q_j^2 s_j^3 +
            \\frac{s_j}l \\sum_m s_m^2 q_m^2\\Bigr] \\Bigr\\}

        Args:
            p, q: weights of the modes, shape ``(..., d)``.

        Returns:
            Losses of shape ``(...)``.

        Raises:
            ValueError: for weights of another number of modes.

        Source: [this book, "Finite context"]
        """
        s, inverse = self.eigenvalues, 1 / self.length
        p, q = self._weights("p", p), self._weights("q", q)
        total = (s**2 * q**2).sum(-1, keepdim=True)
        square = p**2 * ((1 + inverse) * q**2 * s**3 + inverse * s * total)
        return 0.5 * (s - 2 * p * q * s**2 + square).sum(-1)

    def paper_loss(self, a: Values) -> Tensor:
        """Loss per task as a function of the strengths alone.

        .. math::
            \\frac L K = \\frac12 \\sum_j s_j \\Bigl(\\frac{s_j \\theta_j^2}{\\theta^\\infty_j}
            - 2 s_j \\theta_j + 1\\Bigr)

        Exact where :math:`p_j^2` or :math:`s_j q_j^2` is the same for all modes: equal eigenvalues with equal weights,
        or :math:`P_2` a multiple of the identity; and for endless prompts. Elsewhere it differs from :meth:`loss` at
        order 1/l, to either side; near the minimum the loss itself is no larger than that.

        Args:
            a: strengths of the modes, shape ``(..., d)``.

        Returns:
            Losses of shape ``(...)``.

        Raises:
            ValueError: for another number of modes.

        Source: [MT25, Eq. 14, as summarised]
        """
        s, a = self.eigenvalues, self._weights("a", a)
        return 0.5 * (s * (s * a**2 / self.limits - 2 * s * a + 1)).sum(-1)

    def minimum(self) -> tuple[Float[Tensor, " d"], float]:
        """Strengths and loss per task at the exact minimum over aligned weights.

        .. math::
            \\theta^*_j = \\frac l{(l + 1) s_j} \\Bigl[1 - \\frac \\omega{\\sqrt{s_j}}\\Bigr]_+, \\qquad
            \\omega = \\frac{\\sum_{m \\text{ active}} \\sqrt{s_m}}{l + 1 + \\#\\text{active}}, \\qquad
            \\frac{L^*}K = \\frac12 \\Bigl[\\mathrm{Tr} S - \\sum_j \\theta^*_j s_j^2\\Bigr]

        Modes with :math:`\\sqrt{s_j} \\le \\omega` are never learned: they are dropped one by one, from the smallest.

        Returns:
            Strengths of shape ``(d,)`` and the loss per task.

        Source: [this book, "Finite context"]
        """
        s, root = self.eigenvalues, self.eigenvalues.sqrt()
        largest = root.sort(descending=True).values
        levels = largest.cumsum(0) / (self.length + 1 + torch.arange(1, len(s) + 1, device=s.device))
        active = int((largest > levels).nonzero().max()) + 1  # the largest mode is always active
        threshold = levels[active - 1]
        strength = (1 - threshold / root).clamp_min(0) / (s * (1 + 1 / self.length))
        return strength, 0.5 * (s.sum() - (strength * s**2).sum()).item()

    def _times(self, t: Values) -> Tensor:
        time = _real("t", t).to(self.eigenvalues.device)
        if not _check.every(time >= 0):
            raise ValueError(f"t holds {time.min().item():g}, expected times of at least 0")
        return time[..., None]

    def _start(self, name: str, value: Values) -> Tensor:
        start = _real(name, value).to(self.eigenvalues.device)
        if start.ndim > 1 or (start.ndim == 1 and start.shape != self.eigenvalues.shape):
            expected = f"() or {tuple(self.eigenvalues.shape)}"
            raise ValueError(f"{name} has shape {tuple(start.shape)}, expected {expected}")
        return start.expand(self.eigenvalues.shape).clone()

    def _weights(self, name: str, value: Values) -> Tensor:
        weights = _real(name, value).to(self.eigenvalues.device)
        if weights.ndim == 0 or weights.shape[-1] != len(self.eigenvalues):
            raise ValueError(f"{name} has shape {tuple(weights.shape)}, expected (..., {len(self.eigenvalues)})")
        return weights


def population_loss(
    p: Float[Tensor, "*batch d d"],
    q: Float[Tensor, "*batch d d"],
    *,
    covariance: Float[Tensor, "d d"],
    length: Number,
    tasks: str | Tensor,
    n_tasks: int = 1,
    query_covariance: Float[Tensor, "d d"] | None = None,
    noise: Number = 0.0,
) -> Float[Tensor, "*batch"]:
    """Exact population loss of the predictor :math:`\\hat y = P_2 W \\hat S Q_1 x_{l+1}`, summed over the tasks.

    .. math::
        \\begin{aligned}
        L = \\tfrac12 \\bigl\\{ &\\mathrm{Tr}(E_W[I] S_q) - 2 \\, \\mathrm{Tr}(E_W[P_2] S Q_1 S_q) +
        \\mathrm{Tr}(E_W[P_2^\\top P_2] M) \\\\
        &+ \\tfrac{K \\Delta^2}l \\lVert P_2 \\rVert_F^2 \\, \\mathrm{Tr}(S A) \\bigr\\}, \\qquad
        A = Q_1 S_q Q_1^\\top, \\qquad E_W[X] = \\sum_\\mu W_\\mu^\\top X W_\\mu \\\\
        M = &\\; S A S + \\tfrac1l (S A S + \\mathrm{Tr}(A S) \\, S)
        \\end{aligned}

    Args:
        p, q: the blocks :math:`P_2` and :math:`Q_1`, shape ``(..., d, d)``.
        covariance: S of the examples, shape ``(d, d)``.
        length: number l of examples; ``math.inf`` for prompts without end.
        tasks: the tasks themselves, shape ``(K, d, d)``, or ``(K, d)`` for diagonal ones; ``"gaussian"`` for the mean
            over tasks with independent standard normal entries, ``"symmetric"`` for that over Gaussian symmetric
            ones (variance 1 off the diagonal, 2 on it).
        n_tasks: number K of tasks of an ensemble given by name.
        query_covariance: :math:`S_q` of the query; that of the examples if missing.
        noise: standard deviation :math:`\\Delta` of the noise of the examples' labels; the answer has none.

    Returns:
        Losses of shape ``(...)``.

    Raises:
        ValueError: for wrong shapes, an unknown ensemble, or a length or number of tasks below 1.

    Source: [this book, "Finite context"]
    """
    d = _check.array("p", p, shape=("...", "d", "d")).shape[-1]
    _check.array("p", p, shape=("...", d, d))
    _check.array("q", q, shape=("...", d, d))
    s = _check.array("covariance", covariance, shape=(d, d)).to(p)
    s_q = s if query_covariance is None else _check.array("query_covariance", query_covariance, shape=(d, d)).to(p)
    inverse, noise = 1 / _length(length), _check.number("noise", noise, least=0.0)
    over_tasks, count = _ensemble(tasks, n_tasks, d)
    a = q @ s_q @ q.mT
    spread = _trace(a @ s)
    m = (1 + inverse) * s @ a @ s + inverse * spread[..., None, None] * s
    answers = _trace(over_tasks(torch.eye(d, dtype=p.dtype, device=p.device)) @ s_q)
    loss = answers - 2 * _trace(over_tasks(p) @ s @ q @ s_q) + _trace(over_tasks(p.mT @ p) @ m)
    return 0.5 * (loss + count * noise**2 * inverse * p.square().sum((-1, -2)) * spread)


def population_gradient(
    p: Float[Tensor, "*batch d d"], q: Float[Tensor, "*batch d d"], **law: object
) -> tuple[Float[Tensor, "*batch d d"], Float[Tensor, "*batch d d"]]:
    """Gradients :math:`\\partial L / \\partial P_2` and :math:`\\partial L / \\partial Q_1` of :func:`population_loss`.

    Args:
        p, q: the blocks :math:`P_2` and :math:`Q_1`, shape ``(..., d, d)``.
        law: keyword arguments of :func:`population_loss`.

    Returns:
        Two tensors of the shapes of p and q.

    Raises:
        ValueError: as :func:`population_loss`.

    Source: [this book, "Finite context"]
    """
    _check.array("p", p), _check.array("q", q)
    with torch.enable_grad():
        p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
        dp, dq = torch.autograd.grad(population_loss(p, q, **law).sum(), (p, q))  # type: ignore[arg-type]
    return dp, dq


class SeparateHeads:
    """Learning dynamics of linear attention with separate keys and queries, in heads of rank one.

    Labels are numbers, tasks isotropic Gaussian vectors of variance 1; head h adds :math:`v_h k_h q_h^\\top` to the
    matrix A that the predictor :math:`\\hat y = \\langle w, \\hat S A x_{l+1} \\rangle` reads prompts with.

    .. math::
        \\dot v_h = k_h^\\top \\Omega q_h, \\quad \\dot k_h = v_h \\Omega q_h, \\quad
        \\dot q_h = v_h \\Omega^\\top k_h, \\qquad \\Omega = S^2 - S \\Theta_\\infty^{-1} A S, \\qquad
        A = \\sum_h v_h k_h q_h^\\top

    with :math:`\\Theta_\\infty = \\mathrm{diag}(\\theta^\\infty_j)` of :class:`LinearDynamics`, in the eigenbasis of S.

    Args:
        eigenvalues: of the input covariance, shape ``(d,)``, above 0.
        length: number l of examples in a prompt; ``math.inf`` for prompts without end.

    Raises:
        ValueError: for eigenvalues or a length that are not positive.

    Source: [Zhang et al. 2025, separate key and query]
    """

    def __init__(self, eigenvalues: Values, length: Number) -> None:
        modes = LinearDynamics(eigenvalues, length)
        self.eigenvalues, self.limits = modes.eigenvalues, modes.limits

    def loss(self, matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
        """Population loss :math:`\\frac12 [\\mathrm{Tr} S - 2 \\mathrm{Tr}(S A S) + \\mathrm{Tr}(A^\\top S
        \\Theta_\\infty^{-1} A S)]`.

        Args:
            matrix: :math:`A = \\sum_h v_h k_h q_h^\\top`, shape ``(..., d, d)``.

        Raises:
            ValueError: for a matrix of another size.

        Source: [Zhang et al. 2025, population loss]
        """
        s, d = self.eigenvalues, len(self.eigenvalues)
        a = _check.array("matrix", matrix, shape=("...", d, d)).to(s)
        linear = (a.diagonal(dim1=-2, dim2=-1) * s**2).sum(-1)
        return 0.5 * (s.sum() - 2 * linear + (a**2 * (s / self.limits)[:, None] * s).sum((-1, -2)))

    def plateaus(self) -> Float[Tensor, " levels"]:
        """Losses at which training halts, with 0, 1, ..., d directions learned, shape ``(d + 1,)``.

        .. math:: L_m = \\frac12 \\Bigl[\\mathrm{Tr} S - \\sum_{j \\le m} s_j^2 \\theta^\\infty_j\\Bigr]

        The directions count from the largest eigenvalue.

        Source: [Zhang et al. 2025, saddle-to-saddle dynamics]
        """
        s, order = self.eigenvalues, self.eigenvalues.argsort(descending=True)
        gains = (s**2 * self.limits)[order]
        return 0.5 * (s.sum() - torch.cat([gains.new_zeros(1), gains.cumsum(0)]))

    def flow(
        self, t: Values, v0: Float[Tensor, " heads"], k0: Float[Tensor, "heads d"], q0: Float[Tensor, "heads d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient flow of the heads, at learning rate 1 per unit of time.

        Args:
            t: times, at least 0, shape ``(times,)``, increasing.
            v0: values at time 0, shape ``(heads,)``.
            k0, q0: keys and queries at time 0, shape ``(heads, d)``.

        Returns:
            v, k, q with a leading axis of times, integrated on the CPU to a relative tolerance of 1e-12.

        Raises:
            ValueError: for wrong shapes, or times that are negative or do not increase.

        Source: [Zhang et al. 2025, gradient flow]
        """
        heads, d = _check.array("v0", v0, shape=("heads",)).shape[0], len(self.eigenvalues)
        _check.array("k0", k0, shape=(heads, d))
        _check.array("q0", q0, shape=(heads, d))
        s, limits = self.eigenvalues.cpu().numpy(), self.limits.cpu().numpy()

        def slope(_: float, state: np.ndarray) -> np.ndarray:
            v, (k, q) = state[:heads], state[heads:].reshape(2, heads, d)
            omega = np.diag(s**2) - (s / limits)[:, None] * ((v[:, None] * k).T @ q) * s
            right, left = q @ omega.T, k @ omega
            return np.concatenate([(k * right).sum(1), (v[:, None] * right).ravel(), (v[:, None] * left).ravel()])

        states = _integrate(slope, torch.cat([x.double().flatten() for x in (v0, k0, q0)]), t)
        k, q = states[:, heads:].reshape(-1, 2, heads, d).unbind(1)
        return states[:, :heads], k, q


def _integrate(slope: Callable[[float, np.ndarray], np.ndarray], start: Tensor, t: Values) -> Tensor:
    """Solution of an ordinary differential equation at the times t, shape (times, size), where the start lives."""
    from scipy.integrate import solve_ivp

    times = _real("t", t).cpu().numpy()
    if times.ndim != 1 or times.min() < 0 or (np.diff(times) <= 0).any():
        raise ValueError(f"t is {times.tolist()}, expected increasing times of at least 0, shape (times,)")
    state = start.cpu().numpy()
    if times[-1] == 0:
        return start[None]
    smallest = TOLERANCE * max(np.abs(state).max(), 1e-3)
    options = {"method": "LSODA", "rtol": TOLERANCE, "atol": smallest}
    solution = solve_ivp(slope, (0.0, times[-1]), state, t_eval=times, **options)
    if not solution.success:
        raise ValueError(f"weights start at up to {np.abs(state).max():g}, expected smaller ones: {solution.message}")
    return torch.from_numpy(np.ascontiguousarray(solution.y.T)).to(start.device)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _length(length: Number) -> Number:
    return length if length == math.inf else _check.integer("length", length)


def _ensemble(tasks: str | Tensor, n_tasks: int, dim: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """The map X -> sum over the tasks of W^T X W, and the number of tasks."""
    if isinstance(tasks, Tensor) and tasks.ndim == 2:
        full_tasks(tasks, dim)
        products = tasks.mT @ tasks
        return lambda x: products.to(x) * x, len(tasks)
    if not isinstance(tasks, str):
        w = full_tasks(tasks, dim)
        return lambda x: (w.to(x).mT @ x[..., None, :, :] @ w.to(x)).sum(-3), len(w)
    count = _check.integer("n_tasks", n_tasks)
    if tasks not in ENSEMBLES:
        raise ValueError(f"tasks is {tasks!r}, expected one of {', '.join(ENSEMBLES)} or a tensor")
    transposed = float(tasks == "symmetric")

    def mean(x: Tensor) -> Tensor:
        eye = torch.eye(dim, dtype=x.dtype, device=x.device)
        return count * (_trace(x)[..., None, None] * eye + transposed * x.mT)

    return mean, count


def full_tasks(tasks: Tensor, dim: int) -> Tensor:
    """Tasks of shape (K, d, d); a table of shape (K, d) holds diagonals."""
    _check.array("tasks", tasks)
    if tasks.ndim == 2 and tasks.shape[-1] == dim:
        return torch.diag_embed(tasks)
    return _check.array("tasks", tasks, shape=("K", dim, dim))


def _real(name: str, value: Values) -> Tensor:
    """Finite float64 numbers of any shape."""
    try:
        tensor = value.double() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected numbers") from error
    if tensor.numel() == 0 or not _check.all_finite(tensor):
        raise ValueError(f"{name} is {value!r}, expected finite numbers")
    return tensor
