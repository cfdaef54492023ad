"""Exact learning dynamics of the linear Transformer: closed forms, the exact flow, population losses, and its SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number
from icl_lib.tasks import square_root

__all__ = [
    "LinearDynamics",
    "SeparateHeads",
    "Trajectory",
    "antithetic_tasks",
    "attention_output",
    "population_gradient",
    "population_loss",
    "sample_covariances",
    "train",
]

Values = Tensor | np.ndarray | Sequence[Number] | Number
ENSEMBLES = ("gaussian", "symmetric")
TOLERANCE = 1e-11  # of the numerical integration of a flow


class LinearDynamics:
    """Learning dynamics of the modes of a linear Transformer, trained on P linear tasks in context.

    The model predicts :math:`\\hat y = p_2 W \\hat S q_1 x_q`; in the eigenbasis of the covariance, mode a learns the
    strength :math:`a_a = p_a q_a`. Time is counted in steps of gradient descent with the learning rate :math:`\\eta`
    on the summed loss :math:`\\frac12 \\sum_\\mu \\mathbb{E} \\lVert y - \\hat y \\rVert^2`.

    Args:
        eigenvalues: :math:`s_1, \\dots, s_d` of the input covariance, shape ``(d,)``, above 0.
        length: number N of examples in a prompt; ``math.inf`` for prompts without end.
        n_tasks: number P of tasks.
        learning_rate: :math:`\\eta`, above 0.

    Raises:
        ValueError: for eigenvalues, a length, a number of tasks or a learning rate that are not positive.

    Source: [MT25, mode equations, as summarised; exact at finite N: this book, "Finite context"]
    """

    def __init__(
        self,
        eigenvalues: Values,
        length: Number,
        n_tasks: int = 1,
        learning_rate: Number = 1.0,
    ) -> None:
        self.eigenvalues = _vector("eigenvalues", eigenvalues)
        if self.eigenvalues.min() <= 0:
            raise ValueError(
                f"eigenvalues hold {self.eigenvalues.min().item():g}, expected numbers above 0"
            )
        self.length = length if length == math.inf else _check.integer("length", length)
        self.n_tasks = _check.integer("n_tasks", n_tasks)
        self.learning_rate = _check.number("learning_rate", learning_rate, above=0.0)

    @property
    def timescales(self) -> Float[Tensor, " d"]:
        """Time constants :math:`\\tau_a = 1 / (\\eta P s_a^2)`, shape ``(d,)``.

        Source: [MT25, timescales set by the covariance]
        """
        return 1 / (self.learning_rate * self.n_tasks * self.eigenvalues**2)

    @property
    def limits(self) -> Float[Tensor, " d"]:
        """Strengths at the fixed point, :math:`a^\\infty_a = N / ((N + 1) s_a + \\sum_b s_b)`, shape ``(d,)``.

        Source: [MT25, fixed point]
        """
        s = self.eigenvalues
        return 1 / (s + (s + s.sum()) / self.length)

    def half_time(self, a0: Values) -> Float[Tensor, " d"]:
        """Time at which a balanced mode has reached half of its limit, shape ``(d,)``.

        .. math:: t_{1/2} = \\frac{\\tau}2 \\ln \\frac{a^\\infty - a_0}{a_0}

        Args:
            a0: strengths at time 0, one number or shape ``(d,)``, between 0 and the limits.

        Raises:
            ValueError: if a strength is not between 0 and its limit.

        Source: [MT25, logistic solution]
        """
        a0 = self._start("a0", a0)
        if (a0 <= 0).any() or (a0 >= self.limits).any():
            raise ValueError(
                f"a0 is {a0.tolist()}, expected numbers between 0 and the limits {self.limits.tolist()}"
            )
        return self.timescales / 2 * torch.log((self.limits - a0) / a0)

    def logistic(self, t: Values, a0: Values) -> Float[Tensor, "*times d"]:
        """Strengths of balanced modes, p = q at the start.

        .. math:: a(t) = \\frac{a^\\infty a_0}{a_0 + (a^\\infty - a_0) e^{-2 t / \\tau}}

        Exact for endless prompts, for equal eigenvalues with equal starts, and where :math:`p_2` is a multiple of the
        identity; else the modes couple at order 1/N: see :meth:`flow`.

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
        if (a0 < 0).any():
            raise ValueError(f"a0 is {a0.tolist()}, expected numbers of at least 0")
        decay = torch.exp(-2 * time / self.timescales)
        return (
            self.limits
            * a0
            / (a0 + (self.limits - a0) * decay).where(a0 > 0, torch.ones_like(decay))
        )

    def modes(self, t: Values, p0: Values, q0: Values) -> tuple[Tensor, Tensor]:
        """Weights of modes from any start, balanced or not, in the closure of :meth:`logistic`.

        .. math::
            \\tau \\dot p = q (1 - p q / a^\\infty), \\qquad \\tau \\dot q = p (1 - p q / a^\\infty), \\qquad
            p^2 - q^2 = c

        :math:`U = (p + q)^2` solves a Riccati equation. Its fixed points are :math:`U_+ = 2 a^\\infty (1 + \\rho)` and
        :math:`U_- = -c^2 / (2 a^\\infty (1 + \\rho))` with :math:`\\rho = \\sqrt{1 + (c / 2 a^\\infty)^2}`, and

        .. math::
            U(t) = \\frac{U_+ (U_0 - U_-) + U_- (U_+ - U_0) E}{(U_0 - U_-) + (U_+ - U_0) E}, \\qquad
            E = e^{-2 \\rho t / \\tau}

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
        c, rate = p0**2 - q0**2, 1 / self.timescales
        rho = torch.sqrt(1 + (c / (2 * self.limits)) ** 2)
        upper = 2 * self.limits * (1 + rho)
        lower = -(c**2) / upper
        start = (p0 + q0) ** 2
        decay = torch.exp(-2 * rho * rate * time)
        bottom = (start - lower) + (upper - start) * decay
        top = upper * (start - lower) + lower * (upper - start) * decay
        value = top / bottom.where(bottom != 0, torch.ones_like(bottom))
        plus = torch.sign(p0 + q0) * value.clamp_min(0).sqrt()
        minus = c / plus.where(plus != 0, torch.ones_like(plus))
        fall = torch.exp(-2 * rate * time)  # for p0 = -q0, which leads to the saddle
        saddle = p0**2 * fall / (1 + p0**2 / self.limits * (1 - fall))
        still = (p0 + q0 == 0).expand_as(plus)
        minus = torch.where(still, 2 * torch.sign(p0) * saddle.sqrt(), minus)
        plus = torch.where(still, torch.zeros_like(plus), plus)
        return (plus + minus) / 2, (plus - minus) / 2

    def flow(self, t: Values, p0: Values, q0: Values) -> tuple[Tensor, Tensor]:
        """Weights of modes under the exact gradient flow at finite N, where the modes are coupled.

        .. math::
            \\begin{aligned}
            \\dot p_a &= \\eta P s_a^2 \\Bigl[q_a - p_a \\Bigl(\\tfrac{N + 1}N s_a q_a^2 + \\tfrac1{N s_a}
            \\sum_b s_b^2 q_b^2\\Bigr)\\Bigr] \\\\
            \\dot q_a &= \\eta P s_a^2 \\Bigl[p_a - \\tfrac{N + 1}N s_a p_a^2 q_a - \\tfrac{q_a}N \\sum_b s_b p_b^2
            \\Bigr]
            \\end{aligned}

        Args:
            t: times in steps, at least 0, shape ``(times,)``, increasing.
            p0, q0: weights at time 0, one number or shape ``(d,)``.

        Returns:
            p and q, each of shape ``(times, d)``, on the CPU.

        Raises:
            ValueError: for times that are negative or do not increase, or weights that are not finite.

        Source: [this book, "Finite context"]
        """
        from scipy.integrate import solve_ivp

        time = self._times(t)[..., 0]
        if time.ndim != 1 or (time.diff() <= 0).any():
            raise ValueError(
                f"t has shape {tuple(time.shape)}, expected increasing times of shape (times,)"
            )
        start = torch.cat([self._start("p0", p0), self._start("q0", q0)]).cpu().numpy()
        s, inverse = self.eigenvalues.cpu().numpy(), 1 / self.length
        speed, d = self.learning_rate * self.n_tasks * s**2, len(s)

        def slope(_: float, state: np.ndarray) -> np.ndarray:
            p, q = state[:d], state[d:]
            dp = q - p * ((1 + inverse) * s * q**2 + inverse / s * (s**2 * q**2).sum())
            dq = p - (1 + inverse) * s * p**2 * q - inverse * q * (s * p**2).sum()
            return np.concatenate([speed * dp, speed * dq])

        times = time.cpu().numpy()
        if times[-1] == 0:
            states = start[None]
        else:
            options = {
                "method": "DOP853",
                "rtol": TOLERANCE,
                "atol": TOLERANCE * max(np.abs(start).max(), 1e-3),
            }
            states = solve_ivp(
                slope, (0.0, times[-1]), start, t_eval=times, **options
            ).y.T
        result = torch.from_numpy(np.ascontiguousarray(states))
        return result[:, :d], result[:, d:]

    def loss(self, p: Values, q: Values) -> Tensor:
        """Exact population loss per task of aligned weights, at any N.

        .. math::
            \\frac L P = \\frac12 \\sum_a \\Bigl\\{ s_a - 2 p_a q_a s_a^2 + p_a^2 \\Bigl[\\tfrac{N + 1}N q_a^2 s_a^3 +
            \\tfrac{s_a}N \\sum_b s_b^2 q_b^2\\Bigr] \\Bigr\\}

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
        couple = (s**2 * q**2).sum(-1, keepdim=True)
        return 0.5 * (
            s
            - 2 * p * q * s**2
            + p**2 * ((1 + inverse) * q**2 * s**3 + inverse * s * couple)
        ).sum(-1)

    def paper_loss(self, a: Values) -> Tensor:
        """Loss per task as a function of the strengths alone.

        .. math:: \\frac L P = \\frac12 \\sum_a s_a (s_a a_a^2 / a^\\infty_a - 2 s_a a_a + 1)

        Exact for endless prompts, equal eigenvalues, or :math:`p_2` a multiple of the identity; else too low.

        Args:
            a: strengths of the modes, shape ``(..., d)``.

        Returns:
            Losses of shape ``(...)``.

        Source: [MT25, Eq. 14, as summarised]
        """
        s, a = self.eigenvalues, self._weights("a", a)
        return 0.5 * (s * (s * a**2 / self.limits - 2 * s * a + 1)).sum(-1)

    def minimum(self) -> tuple[Tensor, float]:
        """Strengths and loss per task at the exact minimum over aligned weights.

        .. math::
            a^*_a = \\frac N{(N + 1) s_a} \\Bigl[1 - \\frac R{\\sqrt{s_a}}\\Bigr]_+, \\qquad
            R = \\frac{\\sum_{b \\text{ active}} \\sqrt{s_b}}{N + 1 + \\#\\text{active}}

        Modes with :math:`\\sqrt{s_a} \\le R` are never learned.

        Returns:
            Strengths of shape ``(d,)`` and the loss per task.

        Source: [this book, "Finite context"]
        """
        root = self.eigenvalues.sqrt()
        order = root.argsort(descending=True)
        active = torch.ones_like(root, dtype=torch.bool)
        level = 0.0
        for last in reversed(range(len(root))):
            level = (root[active].sum() / (self.length + 1 + active.sum())).item()
            if root[order[last]] > level:
                break
            active[order[last]] = False
        strength = torch.where(
            active, (1 - level / root) / (self.eigenvalues * (1 + 1 / self.length)), 0.0
        )
        return strength, 0.5 * (
            self.eigenvalues.sum() - (strength * self.eigenvalues**2).sum()
        ).item()

    def _times(self, t: Values) -> Tensor:
        time = _real("t", t).to(self.eigenvalues.device)
        if time.min() < 0:
            raise ValueError(
                f"t holds {time.min().item():g}, expected times of at least 0"
            )
        return time[..., None]

    def _start(self, name: str, value: Values) -> Tensor:
        start = _real(name, value).to(self.eigenvalues.device)
        if start.ndim > 1 or (
            start.ndim == 1 and start.shape != self.eigenvalues.shape
        ):
            raise ValueError(
                f"{name} has shape {tuple(start.shape)}, expected () or {tuple(self.eigenvalues.shape)}"
            )
        return start.expand(self.eigenvalues.shape).clone()

    def _weights(self, name: str, value: Values) -> Tensor:
        weights = _real(name, value).to(self.eigenvalues.device)
        if weights.ndim == 0 or weights.shape[-1] != len(self.eigenvalues):
            raise ValueError(
                f"{name} has shape {tuple(weights.shape)}, expected (..., {len(self.eigenvalues)})"
            )
        return weights


@dataclass(frozen=True)
class Trajectory:
    """A training run, or many at once: the learned blocks at the recorded steps.

    Args:
        steps: numbers of the recorded steps, shape ``(times,)``.
        value: :math:`[p_1 \\; p_2]`, shape ``(times, runs, d, 2 d)``.
        query: :math:`[q_1 ; q_2]`, shape ``(times, runs, 2 d, d)``.

    Source: [MT25, learned blocks of the weights]
    """

    steps: Tensor
    value: Tensor
    query: Tensor

    @property
    def p(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`p_2`, which reads labels, shape ``(times, runs, d, d)``."""
        return self.value[..., self.value.shape[-2] :]

    @property
    def q(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`q_1`, which reads inputs, shape ``(times, runs, d, d)``."""
        return self.query[..., : self.query.shape[-1], :]

    def strengths(self, basis: Tensor | None = None) -> Float[Tensor, "times runs d"]:
        """Strengths :math:`(p_2)_{aa} (q_1)_{aa}` of the modes, shape ``(times, runs, d)``.

        Args:
            basis: eigenvectors of the covariance as columns, shape ``(d, d)``; the coordinate axes if missing.
        """
        p, q = self.p, self.q
        if basis is not None:
            p, q = basis.mT @ p @ basis, basis.mT @ q @ basis
        return p.diagonal(dim1=-2, dim2=-1) * q.diagonal(dim1=-2, dim2=-1)


def attention_output(
    prompt: Float[Tensor, "*batch rows columns"],
    value: Tensor,
    query: Tensor,
    length: int,
) -> Float[Tensor, "*batch rows columns"]:
    """Linear attention on a whole prompt, the slow and literal way.

    .. math:: f(Z) = Z + W^P \\frac{Z Z^\\top}{N} W^Q Z, \\qquad Z = \\begin{bmatrix} x_1 & \\dots & x_N & x_q \\\\
        y_1 & \\dots & y_N & 0 \\end{bmatrix}

    The prediction for the query is the lower half of the last column.

    Args:
        prompt: Z, shape ``(..., 2 d, N + 1)``.
        value: :math:`W^P`, shape ``(2 d, 2 d)``.
        query: :math:`W^Q`, shape ``(2 d, 2 d)``.
        length: N.

    Returns:
        f(Z), of the shape of Z.

    Raises:
        ValueError: for wrong shapes.

    Source: [MT25, model]
    """
    rows = _check.array("prompt", prompt, shape=("...", "2d", "N+1")).shape[-2]
    _check.array("value", value, shape=(rows, rows))
    _check.array("query", query, shape=(rows, rows))
    _check.integer("length", length)
    return prompt + value @ (prompt @ prompt.mT / length) @ query @ prompt


def population_loss(
    p: Float[Tensor, "*batch d d"],
    q: Float[Tensor, "*batch d d"],
    *,
    covariance: Float[Tensor, "d d"],
    length: Number,
    tasks: str | Tensor,
    n_tasks: int = 1,
    query_covariance: Tensor | None = None,
    label_noise: Number = 0.0,
) -> Float[Tensor, "*batch"]:
    """Exact population loss of the reduced predictor :math:`\\hat y = p_2 W \\hat S q_1 x_q`, summed over the tasks.

    .. math::
        \\begin{aligned}
        L = \\tfrac12 \\bigl\\{ &\\mathrm{Tr}(E_W[I] S_q) - 2 \\, \\mathrm{Tr}(E_W[p] S q S_q) +
        \\mathrm{Tr}(E_W[p^\\top p] K) \\\\
        &+ \\tfrac{P \\sigma^2}N \\lVert p \\rVert_F^2 \\, \\mathrm{Tr}(S A) \\bigr\\}, \\qquad A = q S_q q^\\top,
        \\qquad E_W[X] = \\sum_\\mu W_\\mu^\\top X W_\\mu \\\\
        K = &\\; S A S + \\tfrac1N (S A S + \\mathrm{Tr}(A S) \\, S)
        \\end{aligned}

    Args:
        p, q: the blocks :math:`p_2` and :math:`q_1`, shape ``(..., d, d)``.
        covariance: S of the examples, shape ``(d, d)``.
        length: number N of examples; ``math.inf`` for prompts without end.
        tasks: the tasks themselves, shape ``(P, d, d)``, or ``(P, d)`` for diagonal ones; ``"gaussian"`` for the mean
            over tasks with independent standard normal entries, ``"symmetric"`` for that over Gaussian symmetric
            ones (variance 1 off the diagonal, 2 on it).
        n_tasks: number P of tasks of an ensemble given by name.
        query_covariance: :math:`S_q` of the query; that of the examples if missing.
        label_noise: standard deviation :math:`\\sigma` of the noise of the examples' labels.

    Returns:
        Losses of shape ``(...)``.

    Raises:
        ValueError: for wrong shapes, an unknown ensemble, or a length or number of tasks below 1.

    Source: [this book, "Finite context"]
    """
    _check.array("p", p, shape=("...", "d", "d"))
    d = p.shape[-1]
    _check.array("q", q, shape=("...", d, d))
    s = _check.array("covariance", covariance, shape=(d, d))
    s_q = (
        s
        if query_covariance is None
        else _check.array("query_covariance", query_covariance, shape=(d, d))
    )
    inverse = 1 / (length if length == math.inf else _check.integer("length", length))
    noise = _check.number("label_noise", label_noise, least=0.0)
    mean, count = _ensemble(tasks, n_tasks, d)
    a = q @ s_q @ q.mT
    spread = _trace(a @ s)
    k = (1 + inverse) * s @ a @ s + inverse * spread[..., None, None] * s
    loss = _trace(
        mean(torch.eye(d, dtype=p.dtype, device=p.device)) @ s_q
    ) - 2 * _trace(mean(p) @ s @ q @ s_q)
    loss = loss + _trace(mean(p.mT @ p) @ k)
    return 0.5 * (loss + count * noise**2 * inverse * p.square().sum((-1, -2)) * spread)


def population_gradient(p: Tensor, q: Tensor, **law: object) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`population_loss` with respect to p and q.

    Args:
        p, q: shape ``(..., d, d)``.
        law: as for :func:`population_loss`.

    Returns:
        Two tensors of the shapes of p and q.

    Raises:
        ValueError: as :func:`population_loss`.

    Source: [this book, "Finite context"]
    """
    with torch.enable_grad():
        p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
        dp, dq = torch.autograd.grad(population_loss(p, q, **law).sum(), (p, q))  # type: ignore[arg-type]
    return dp, dq


def sample_covariances(
    dim: int,
    length: int,
    shape: Sequence[int] = (),
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "*shape dim rank"]:
    """Square roots of Wishart matrices: factors T with :math:`T T^\\top = \\frac1N \\sum_i x_i x_i^\\top`, x standard.

    Bartlett's decomposition: T is lower triangular (a trapezoid if N < d) with independent entries, standard normal
    below the diagonal and chi distributed with N, N - 1, ... degrees of freedom on it, over :math:`\\sqrt N`. The cost
    does not depend on N.

    Args:
        dim: dimension d.
        length: N.
        shape: leading shape of independent draws.
        generator: source of randomness.
        dtype: float32 or float64.

    Returns:
        Factors of shape ``(*shape, d, min(d, N))``.

    Raises:
        ValueError: for sizes below 1 or another dtype.

    Source: [Bartlett 1933, decomposition of the sample covariance]
    """
    dim, length = _check.integer("dim", dim), _check.integer("length", length)
    _check.random("generator", generator)
    if dtype not in _check.FLOATS:
        raise ValueError(f"dtype is {dtype}, expected torch.float32 or torch.float64")
    rank, device = min(dim, length), generator.device
    factor = torch.randn(
        *shape, dim, rank, generator=generator, device=device, dtype=dtype
    ).tril(-1)
    freedom = torch.arange(
        length, length - rank, -1, device=device, dtype=dtype
    ).expand(*shape, rank)
    chi = (2 * torch._standard_gamma(freedom / 2, generator=generator)).sqrt()
    factor.diagonal(dim1=-2, dim2=-1).copy_(chi)
    return factor / math.sqrt(length)


def antithetic_tasks(
    n_tasks: int, dim: int, *, generator: torch.Generator
) -> Float[Tensor, "n_tasks dim"]:
    """Diagonal tasks in pairs of opposite sign, and whitened.

    .. math:: \\sum_\\mu \\lambda^\\mu_a \\lambda^\\mu_b = P \\, \\delta_{ab}

    With them, the equations for the mean over tasks hold for a finite set exactly.

    Args:
        n_tasks: number P of tasks, even and at least 2 d.
        dim: dimension d.
        generator: source of randomness.

    Returns:
        Diagonals of shape ``(P, d)``, float64.

    Raises:
        ValueError: for an odd number of tasks, or fewer than 2 d.

    Source: [this book, "Mode dynamics"]
    """
    n_tasks, dim = _check.integer("n_tasks", n_tasks), _check.integer("dim", dim)
    _check.random("generator", generator)
    if n_tasks % 2 or n_tasks < 2 * dim:
        raise ValueError(
            f"n_tasks is {n_tasks}, expected an even number of at least {2 * dim}"
        )
    half = torch.randn(
        n_tasks // 2,
        dim,
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    left, _, right = torch.linalg.svd(half, full_matrices=False)
    white = math.sqrt(n_tasks / 2) * left @ right
    return torch.cat([white, -white])


def train(
    tasks: Tensor | Callable[[torch.Generator], Tensor],
    value: Float[Tensor, "runs d e"],
    query: Float[Tensor, "runs e d"],
    *,
    covariance: Float[Tensor, "d d"],
    length: int,
    learning_rate: Number,
    n_steps: int,
    batch: int,
    generator: torch.Generator,
    every: int = 1,
    label_noise: Number = 0.0,
    frozen: Sequence[str] = (),
) -> Trajectory:
    """Stochastic gradient descent of the full model on fresh prompts, for many runs at once.

    At each step every task sees ``batch`` prompts of its own. The gradients are those of the loss
    :math:`\\frac12 \\sum_\\mu \\lVert y - \\hat y \\rVert^2`, averaged over the batch, of the prediction

    .. math::
        \\hat y = [p_1 \\; p_2] \\, G \\begin{bmatrix} q_1 \\\\ q_2 \\end{bmatrix} x_q, \\qquad
        G = \\begin{bmatrix} I & 0 \\\\ W & I \\end{bmatrix} \\hat S
        \\begin{bmatrix} I & W^\\top \\\\ 0 & I \\end{bmatrix} + \\frac1N
        \\begin{bmatrix} x_q x_q^\\top & 0 \\\\ 0 & 0 \\end{bmatrix}

    with :math:`\\hat S` the sample covariance of inputs and label noise, drawn by :func:`sample_covariances`. The
    other blocks of the weights have no gradient.

    Args:
        tasks: shape ``(P, d)`` (diagonal) or ``(P, d, d)``, or a function of a generator that draws them anew.
        value: :math:`[p_1 \\; p_2]` at the start, shape ``(runs, d, 2 d)``.
        query: :math:`[q_1 ; q_2]` at the start, shape ``(runs, 2 d, d)``.
        covariance: S of the inputs, shape ``(d, d)``.
        length: number N of examples.
        learning_rate: :math:`\\eta`, above 0.
        n_steps: number of steps.
        batch: number of prompts per task and step.
        generator: source of randomness, on the device of the weights.
        every: record every so many steps; step 0 and the last one are always recorded.
        label_noise: standard deviation of the noise of the examples' labels.
        frozen: names of blocks that stay as they are: ``"p1"``, ``"p2"``, ``"q1"``, ``"q2"``.

    Returns:
        :class:`Trajectory` of the recorded steps.

    Raises:
        ValueError: for wrong shapes, sizes below 1, a learning rate that is not above 0, an unknown block, or weights
            that diverge.

    Source: [MT25, model and training; Bartlett sampling: this book, "Mode dynamics"]
    """
    runs, d, _ = _check.array("value", value, shape=("runs", "d", "2d")).shape
    _check.array("value", value, shape=(runs, d, 2 * d))
    _check.array("query", query, shape=(runs, 2 * d, d))
    root = square_root("covariance", covariance, d).to(value)
    length, batch = _check.integer("length", length), _check.integer("batch", batch)
    rate = _check.number("learning_rate", learning_rate, above=0.0)
    n_steps, every = _check.integer("n_steps", n_steps), _check.integer("every", every)
    noise = _check.number("label_noise", label_noise, least=0.0)
    _check.random("generator", generator)
    unknown = set(frozen) - {"p1", "p2", "q1", "q2"}
    if unknown:
        raise ValueError(
            f"frozen holds {sorted(unknown)}, expected names among p1, p2, q1, q2"
        )
    keep_value, keep_query = torch.ones(2 * d).to(value), torch.ones(2 * d, 1).to(value)
    for name in frozen:
        block = slice(0, d) if name[1] == "1" else slice(d, 2 * d)
        (keep_value if name[0] == "p" else keep_query)[block] = 0.0
    value, query = value.clone(), query.clone()
    steps, values, queries = [0], [value.clone()], [query.clone()]
    for step in range(1, n_steps + 1):
        w = _full_tasks(tasks(generator) if callable(tasks) else tasks, d).to(value)
        x = torch.randn(
            runs,
            len(w),
            batch,
            d,
            1,
            generator=generator,
            device=value.device,
            dtype=value.dtype,
        )
        wide = 2 * d if noise > 0 else d
        factor = sample_covariances(
            wide, length, (runs, len(w), batch), generator=generator, dtype=value.dtype
        )
        dvalue, dquery = _gradients(
            value, query, w[:, None], root @ x, _colour(factor, root, noise), length
        )
        value -= rate * dvalue * keep_value
        query -= rate * dquery * keep_query
        if step % every == 0 or step == n_steps:
            if not (_check.all_finite(value) and _check.all_finite(query)):
                raise ValueError(
                    f"learning_rate is {rate:g}, expected a smaller one: the weights diverge by step {step}"
                )
            steps.append(step)
            values.append(value.clone())
            queries.append(query.clone())
    return Trajectory(torch.tensor(steps), torch.stack(values), torch.stack(queries))


def _colour(factor: Tensor, root: Tensor, noise: float) -> Tensor:
    """Factors of the covariance of inputs (and label noise) from those of standard normal variables."""
    if noise == 0:
        return root @ factor
    d = len(root)
    return torch.cat([root @ factor[..., :d, :], noise * factor[..., d:, :]], dim=-2)


def _gradients(
    value: Tensor, query: Tensor, w: Tensor, x: Tensor, factor: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss, averaged over the batch.

    value (runs, d, 2d); query (runs, 2d, d); w (P, 1, d, d); x (runs, P, batch, d, 1); factor (runs, P, batch, d or
    2d, rank) with factor factor^T the sample covariance.
    """
    d = w.shape[-1]
    noisy = factor.shape[-2] > d
    value, query = value[:, None, None], query[:, None, None]

    def attend(v: Tensor) -> Tensor:  # G v, with G symmetric
        top, bottom = v[..., :d, :], v[..., d:, :]
        u = top + w.mT @ bottom
        if noisy:
            u = torch.cat([u, bottom], dim=-2)
        u = factor @ (factor.mT @ u)
        inputs, noise = u[..., :d, :], u[..., d:, :]
        below = w @ inputs + noise if noisy else w @ inputs
        return torch.cat([inputs + x * ((x.mT @ top) / length), below], dim=-2)

    seen = attend(query @ x)  # (runs, P, batch, 2d, 1)
    error = value @ seen - w @ x
    back = attend(value.mT @ error)
    batch = x.shape[2]
    return torch.einsum("rpbio,rpbjo->rij", error, seen) / batch, torch.einsum(
        "rpbio,rpbjo->rij", back, x
    ) / batch


class SeparateHeads:
    """Dynamics of attention heads with separate keys and queries, for scalar answers of isotropic Gaussian tasks.

    .. math::
        \\dot v_i = k_i^\\top D q_i, \\quad \\dot k_i = v_i D q_i, \\quad \\dot q_i = v_i D^\\top k_i, \\qquad
        D = S^2 - M \\Bigl(\\sum_i v_i k_i q_i^\\top\\Bigr) S, \\qquad M = S \\, \\mathrm{diag}(1 / a^\\infty)

    Args:
        eigenvalues: of the input covariance, shape ``(d,)``, above 0.
        length: number N of examples in a prompt; ``math.inf`` for prompts without end.

    Raises:
        ValueError: for eigenvalues or a length that are not positive.

    Source: [Zhang et al. 2025, separate key and query]
    """

    def __init__(self, eigenvalues: Values, length: Number) -> None:
        self._modes = LinearDynamics(eigenvalues, length)
        self.eigenvalues, self.limits = self._modes.eigenvalues, self._modes.limits

    def loss(self, matrix: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
        """Population loss :math:`\\frac12 \\{\\mathrm{Tr} S - 2 \\mathrm{Tr}(S Q S) + \\mathrm{Tr}(Q^\\top M Q S)\\}`.

        Args:
            matrix: :math:`Q = \\sum_i v_i k_i q_i^\\top`, shape ``(..., d, d)``.

        Source: [Zhang et al. 2025, population loss]
        """
        d = len(self.eigenvalues)
        q = _check.array("matrix", matrix, shape=("...", d, d)).double()
        s, m = self.eigenvalues, self.eigenvalues / self.limits
        linear = (q.diagonal(dim1=-2, dim2=-1) * s**2).sum(-1)
        return 0.5 * (s.sum() - 2 * linear + (q**2 * m[:, None] * s).sum((-1, -2)))

    def plateaus(self) -> Float[Tensor, " levels"]:
        """Losses at which training halts, with 0, 1, ... d directions learned, shape ``(d + 1,)``.

        .. math:: L_m = \\frac12 \\Bigl[\\mathrm{Tr} S - \\sum_{a \\le m} s_a^2 a^\\infty_a\\Bigr]

        The eigenvalues count from the largest one.

        Source: [Zhang et al. 2025, saddle-to-saddle dynamics]
        """
        s, order = self.eigenvalues, self.eigenvalues.argsort(descending=True)
        gains = (s**2 * self.limits)[order]
        return 0.5 * (s.sum() - torch.cat([gains.new_zeros(1), gains.cumsum(0)]))

    def flow(
        self, t: Values, v0: Tensor, k0: Tensor, q0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient flow of the heads.

        Args:
            t: times, at least 0, shape ``(times,)``, increasing.
            v0: values at time 0, shape ``(heads,)``.
            k0, q0: keys and queries at time 0, shape ``(heads, d)``.

        Returns:
            v, k, q with a leading axis of times.

        Raises:
            ValueError: for wrong shapes, or times that are negative or do not increase.

        Source: [Zhang et al. 2025, gradient flow]
        """
        from scipy.integrate import solve_ivp

        heads, d = (
            _check.array("v0", v0, shape=("heads",)).shape[0],
            len(self.eigenvalues),
        )
        _check.array("k0", k0, shape=(heads, d))
        _check.array("q0", q0, shape=(heads, d))
        time = self._modes._times(t)[..., 0]
        if time.ndim != 1 or (time.diff() <= 0).any():
            raise ValueError(
                f"t has shape {tuple(time.shape)}, expected increasing times of shape (times,)"
            )
        s, m = (
            self.eigenvalues.cpu().numpy(),
            (self.eigenvalues / self.limits).cpu().numpy(),
        )

        def slope(_: float, state: np.ndarray) -> np.ndarray:
            v, k, q = state[:heads], *state[heads:].reshape(2, heads, d)
            drive = np.diag(s**2) - m[:, None] * ((v[:, None] * k).T @ q) * s
            right, left = q @ drive.T, k @ drive
            return np.concatenate(
                [
                    (k * right).sum(1),
                    (v[:, None] * right).ravel(),
                    (v[:, None] * left).ravel(),
                ]
            )

        start = (
            torch.cat(
                [v0.double().flatten(), k0.double().flatten(), q0.double().flatten()]
            )
            .cpu()
            .numpy()
        )
        options = {
            "method": "DOP853",
            "rtol": TOLERANCE,
            "atol": TOLERANCE * max(np.abs(start).max(), 1e-3),
        }
        times = time.cpu().numpy()
        states = (
            start[None]
            if times[-1] == 0
            else solve_ivp(slope, (0.0, times[-1]), start, t_eval=times, **options).y.T
        )
        result = torch.from_numpy(np.ascontiguousarray(states))
        k, q = result[:, heads:].reshape(-1, 2, heads, d).unbind(1)
        return result[:, :heads], k, q


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _full_tasks(tasks: Tensor, dim: int) -> Tensor:
    """Tasks of shape (P, d, d); a table of shape (P, d) holds diagonals."""
    _check.array("tasks", tasks)
    if tasks.ndim == 2 and tasks.shape[-1] == dim:
        return torch.diag_embed(tasks)
    return _check.array("tasks", tasks, shape=("P", dim, dim))


def _ensemble(
    tasks: str | Tensor, n_tasks: int, dim: int
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The map X -> sum over the tasks of W^T X W, and the number of tasks."""
    if isinstance(tasks, str):
        count = _check.integer("n_tasks", n_tasks)
        if tasks not in ENSEMBLES:
            raise ValueError(
                f"tasks is {tasks!r}, expected one of {', '.join(ENSEMBLES)} or a tensor"
            )
        symmetric = tasks == "symmetric"

        def mean(x: Tensor) -> Tensor:
            eye = torch.eye(dim, dtype=x.dtype, device=x.device)
            return count * (
                _trace(x)[..., None, None] * eye + (x.mT if symmetric else 0.0)
            )

        return mean, count
    w = _full_tasks(tasks, dim)
    return lambda x: (w.mT @ x[..., None, :, :] @ w).sum(-3), len(w)


def _real(name: str, value: Values) -> Tensor:
    """Finite float64 numbers of any shape."""
    try:
        tensor = (
            value.double()
            if isinstance(value, Tensor)
            else torch.as_tensor(np.asarray(value, dtype=np.float64))
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {value!r}, expected numbers") from error
    if tensor.numel() == 0 or not _check.all_finite(tensor):
        raise ValueError(f"{name} is {value!r}, expected finite numbers")
    return tensor


def _vector(name: str, value: Values) -> Tensor:
    tensor = _real(name, value)
    if tensor.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (d,)")
    return tensor
