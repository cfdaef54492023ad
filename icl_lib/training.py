"""Stochastic gradient descent of the full linear Transformer on fresh prompts, for many runs at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number
from icl_lib.dynamics import full_tasks
from icl_lib.tasks import square_root

__all__ = ["Trajectory", "antithetic_tasks", "attention_output", "join_blocks", "sample_covariances", "train"]

BLOCKS = ("P1", "P2", "Q1", "Q2")


@dataclass(frozen=True)
class Trajectory:
    """Training runs: the learned blocks at the recorded steps.

    Args:
        steps: numbers of the recorded steps, shape ``(times,)``, on the CPU.
        value: :math:`[P_1 \\; P_2]`, shape ``(times, runs, d, 2 d)``.
        query: :math:`[Q_1 ; Q_2]`, shape ``(times, runs, 2 d, d)``.

    Source: [MT25, learned blocks of the weights]
    """

    steps: Int[Tensor, " times"]
    value: Float[Tensor, "times runs d e"]
    query: Float[Tensor, "times runs e d"]

    @property
    def p1(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`P_1`, which reads inputs; 0 in the reduced predictor."""
        return self.value[..., : self.value.shape[-2]]

    @property
    def p2(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`P_2`, which reads labels."""
        return self.value[..., self.value.shape[-2] :]

    @property
    def q1(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`Q_1`, which compares with inputs."""
        return self.query[..., : self.query.shape[-1], :]

    @property
    def q2(self) -> Float[Tensor, "times runs d d"]:
        """The block :math:`Q_2`, which compares with labels; 0 in the reduced predictor."""
        return self.query[..., self.query.shape[-1] :, :]

    def strengths(self, basis: Float[Tensor, "d d"] | None = None) -> Float[Tensor, "times runs d"]:
        """Strengths :math:`\\theta_j = (P_2)_{jj} (Q_1)_{jj}` of the modes, shape ``(times, runs, d)``.

        Args:
            basis: eigenvectors of the covariance as columns, shape ``(d, d)``; the coordinate axes if missing.

        Raises:
            ValueError: for a basis of another shape.
        """
        p, q = self.p2, self.q1
        if basis is not None:
            basis = _check.array("basis", basis, shape=(p.shape[-1], p.shape[-1])).to(p)
            p, q = basis.mT @ p @ basis, basis.mT @ q @ basis
        return p.diagonal(dim1=-2, dim2=-1) * q.diagonal(dim1=-2, dim2=-1)


def join_blocks(
    p2: Float[Tensor, "runs d d"],
    q1: Float[Tensor, "runs d d"],
    p1: Float[Tensor, "runs d d"] | None = None,
    q2: Float[Tensor, "runs d d"] | None = None,
) -> tuple[Float[Tensor, "runs d e"], Float[Tensor, "runs e d"]]:
    """Weights made of their blocks, :math:`[P_1 \\; P_2]` and :math:`[Q_1 ; Q_2]`.

    Args:
        p2, q1: blocks of the reduced predictor, shape ``(runs, d, d)``.
        p1, q2: the null blocks, of the same shape; 0 if missing.

    Returns:
        The weights as :func:`train` takes them, of shapes ``(runs, d, 2 d)`` and ``(runs, 2 d, d)``.

    Raises:
        ValueError: for blocks of different shapes.

    Source: [MT25, learned blocks of the weights]
    """
    runs, d, _ = _check.array("p2", p2, shape=("runs", "d", "d")).shape
    p1, q2 = (torch.zeros_like(p2) if block is None else block for block in (p1, q2))
    for name, block in {"p2": p2, "q1": q1, "p1": p1, "q2": q2}.items():
        _check.array(name, block, shape=(runs, d, d))
    return torch.cat([p1, p2], dim=-1), torch.cat([q1, q2], dim=-2)


def attention_output(
    prompt: Float[Tensor, "*batch rows columns"],
    value: Float[Tensor, "rows rows"],
    query: Float[Tensor, "rows rows"],
    length: int,
) -> Float[Tensor, "*batch rows columns"]:
    """Linear attention on a whole prompt, the slow and literal way.

    .. math:: f(Z) = Z + W^V \\frac{Z Z^\\top}{l} W^Q Z, \\qquad Z = \\begin{bmatrix} x_1 & \\dots & x_l & x_{l+1} \\\\
        y_1 & \\dots & y_l & 0 \\end{bmatrix}

    The prediction for the query is the lower half of the last column.

    Args:
        prompt: Z, shape ``(..., 2 d, l + 1)``.
        value: :math:`W^V`, shape ``(2 d, 2 d)``; its lower half is :math:`[P_1 \\; P_2]`.
        query: :math:`W^Q`, shape ``(2 d, 2 d)``; its left half is :math:`[Q_1 ; Q_2]`.
        length: l, by which the sum over tokens is divided.

    Returns:
        f(Z), of the shape of Z.

    Raises:
        ValueError: for wrong shapes, or a length below 1.

    Source: [MT25, model, as summarised]
    """
    rows = _check.array("prompt", prompt, shape=("...", "2d", "l+1")).shape[-2]
    _check.array("value", value, shape=(rows, rows))
    _check.array("query", query, shape=(rows, rows))
    length = _check.integer("length", length)
    return prompt + value @ (prompt @ prompt.mT / length) @ query @ prompt


def sample_covariances(
    dim: int,
    length: int,
    shape: Sequence[int] = (),
    *,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "*shape dim rank"]:
    """Square roots of sample covariances of standard normal inputs: :math:`T T^\\top = \\frac1l \\sum_i x_i x_i^\\top`.

    Bartlett's decomposition: T is lower triangular (a trapezoid if l < d) with independent entries, standard normal
    below the diagonal and chi distributed with l, l - 1, ... degrees of freedom on it, over :math:`\\sqrt l`. The cost
    does not depend on l.

    Args:
        dim: dimension d.
        length: number l of inputs.
        shape: leading shape of independent draws.
        generator: source of randomness; the factors live on its device.
        dtype: float32 or float64.

    Returns:
        Factors T of shape ``(*shape, d, min(d, l))``, a view of memory in which the draws lie side by side.

    Raises:
        ValueError: for sizes below 1 or another dtype.

    Source: [Bartlett 1933, decomposition of the sample covariance]
    """
    dim, length = _check.integer("dim", dim), _check.integer("length", length)
    _check.random("generator", generator)
    _check.dtype(dtype)
    return _factors(dim, length, shape, generator, dtype).movedim((0, 1), (-2, -1))


def _factors(dim: int, length: int, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """The factors of :func:`sample_covariances`, shape (d, min(d, l), *shape)."""
    rank, device = min(dim, length), generator.device
    factor = torch.zeros(dim, rank, *shape, device=device, dtype=dtype)
    row, column = torch.tril_indices(dim, rank, -1, device=device)
    factor[row, column] = torch.randn(len(row), *shape, generator=generator, device=device, dtype=dtype)
    freedom = torch.arange(length, length - rank, -1, device=device, dtype=dtype)
    freedom = freedom.reshape(rank, *(1 for _ in shape)).expand(rank, *shape)
    diagonal = torch.arange(rank, device=device)
    factor[diagonal, diagonal] = (2 * torch._standard_gamma(freedom / 2, generator=generator)).sqrt()
    return factor / math.sqrt(length)


def antithetic_tasks(n_tasks: int, dim: int, *, generator: torch.Generator) -> Float[Tensor, "n_tasks dim"]:
    """Diagonal tasks in pairs of opposite sign, and whitened.

    .. math:: \\sum_\\mu W^\\mu_{jj} W^\\mu_{mm} = K \\, \\delta_{jm}

    With them, equations for the mean over tasks hold exactly for a finite set.

    Args:
        n_tasks: number K of tasks, even and at least 2 d.
        dim: dimension d.
        generator: source of randomness.

    Returns:
        Diagonals of the tasks, shape ``(K, d)``, float64.

    Raises:
        ValueError: for an odd number of tasks, or fewer than 2 d.

    Source: [this book, "Reduced predictor"]
    """
    n_tasks, dim = _check.integer("n_tasks", n_tasks), _check.integer("dim", dim)
    _check.random("generator", generator)
    if n_tasks % 2 or n_tasks < 2 * dim:
        raise ValueError(f"n_tasks is {n_tasks}, expected an even number of at least {2 * dim}")
    half = torch.randn(n_tasks // 2, dim, generator=generator, device=generator.device, dtype=torch.float64)
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
    noise: Number = 0.0,
    frozen: Sequence[str] = (),
) -> Trajectory:
    """Stochastic gradient descent of the full model on fresh prompts, for many runs at once.

    At each step every task sees ``batch`` prompts of its own. The gradients are those of the loss
    :math:`\\frac12 \\sum_\\mu \\lVert y - \\hat y \\rVert^2`, averaged over the batch, of the prediction

    .. math::
        \\hat y = [P_1 \\; P_2] \\, G \\begin{bmatrix} Q_1 \\\\ Q_2 \\end{bmatrix} x_{l+1}, \\qquad
        G = \\begin{bmatrix} I \\\\ W \\end{bmatrix} \\hat S \\begin{bmatrix} I & W^\\top \\end{bmatrix} + \\frac1l
        \\begin{bmatrix} x_{l+1} x_{l+1}^\\top & 0 \\\\ 0 & 0 \\end{bmatrix}

    with the sample covariance :math:`\\hat S` drawn by :func:`sample_covariances`, jointly with the label noise if
    there is any. The other blocks of the weights have no gradient. Computes in the dtype and on the device of the
    weights; float32 is one and a half times to twice as fast on a CPU, and its rounding is far below the noise of the
    gradients.

    Args:
        tasks: shape ``(K, d)`` (diagonal) or ``(K, d, d)`` for all runs, or ``(runs, K, d, d)`` for each its own; or a
            function of a generator that draws such a tensor anew for each step.
        value: :math:`[P_1 \\; P_2]` at the start, shape ``(runs, d, 2 d)``.
        query: :math:`[Q_1 ; Q_2]` at the start, shape ``(runs, 2 d, d)``.
        covariance: S of the inputs, shape ``(d, d)``.
        length: number l of examples.
        learning_rate: :math:`\\eta`, above 0.
        n_steps: number of steps.
        batch: number of prompts per task and step.
        generator: source of randomness, on the device of the weights.
        every: record every so many steps; step 0 and the last one are always recorded.
        noise: standard deviation of the noise of the examples' labels.
        frozen: names of blocks that stay as they are: ``"P1"``, ``"P2"``, ``"Q1"``, ``"Q2"``.

    Returns:
        :class:`Trajectory` of the recorded steps.

    Raises:
        ValueError: for wrong shapes, sizes below 1, a learning rate that is not above 0, an unknown block, or weights
            that diverge.

    Source: [MT25, model and training, as summarised; drawing of covariances: this book, "Reduced predictor"]
    """
    runs, d, _ = _check.array("value", value, shape=("runs", "d", "2d")).shape
    _check.array("value", value, shape=(runs, d, 2 * d))
    _check.array("query", query, shape=(runs, 2 * d, d))
    root = square_root("covariance", covariance, d).to(value)
    length, batch = _check.integer("length", length), _check.integer("batch", batch)
    rate = _check.number("learning_rate", learning_rate, above=0.0)
    n_steps, every = _check.integer("n_steps", n_steps), _check.integer("every", every)
    noise = _check.number("noise", noise, least=0.0)
    _check.random("generator", generator)
    if unknown := set(frozen) - set(BLOCKS):
        raise ValueError(f"frozen holds {sorted(unknown)}, expected names among {', '.join(BLOCKS)}")
    value_rate, query_rate = (
        value.new_tensor([0.0 if name in frozen else rate / batch for name in names]).repeat_interleave(d)
        for names in (BLOCKS[:2], BLOCKS[2:])
    )
    value, query = value.clone(), query.clone()
    steps, values, queries = [0], [value.clone()], [query.clone()]
    spread = None if callable(tasks) else _spread(tasks, batch, runs, d).to(value)
    for step in range(1, n_steps + 1):
        w = _spread(tasks(generator), batch, runs, d).to(value) if callable(tasks) else spread
        assert w is not None
        prompts = (runs, w.shape[-1])
        normal = torch.randn(d, *prompts, generator=generator, device=value.device, dtype=value.dtype)
        x = torch.einsum("ij,jrm->irm", root, normal)
        wide = 2 * d if noise > 0 else d
        factor = _factors(wide, length, prompts, generator, value.dtype)
        dvalue, dquery = _gradients(value, query, w, x, factor, length, root, noise)
        value -= value_rate * dvalue
        query -= query_rate[:, None] * dquery
        if step % every == 0 or step == n_steps:
            if not (_check.all_finite(value) and _check.all_finite(query)):
                raise ValueError(f"learning_rate is {rate:g}, expected a smaller one: weights diverge by step {step}")
            steps.append(step)
            values.append(value.clone())
            queries.append(query.clone())
    return Trajectory(torch.tensor(steps, device="cpu"), torch.stack(values), torch.stack(queries))


def _spread(tasks: Tensor, batch: int, runs: int, dim: int) -> Tensor:
    """Tasks prompt by prompt, those of a task side by side: shape (d, runs or 1, m) if all are diagonal, else
    (d, d, runs or 1, m), with m = K batch.
    """
    if isinstance(tasks, Tensor) and tasks.ndim == 4:
        w = _check.array("tasks", tasks, shape=(runs, "K", dim, dim))
    else:
        w = full_tasks(tasks, dim)[None]
    diagonal = w.diagonal(dim1=-2, dim2=-1)
    if torch.equal(torch.diag_embed(diagonal), w):
        return diagonal.permute(2, 0, 1).repeat_interleave(batch, -1)
    return w.permute(2, 3, 0, 1).repeat_interleave(batch, -1)


def _gradients(
    value: Tensor,
    query: Tensor,
    w: Tensor,
    x: Tensor,
    factor: Tensor,
    length: int,
    root: Tensor,
    noise: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of half the squared error, summed over the m prompts of each run.

    value (runs, d, 2d); query (runs, 2d, d); w as :func:`_spread` gives it; x (d, runs, m), the queries; factor
    (d or 2d, rank, runs, m), the standard factor of inputs, and of label noise if there is any. Prompts come last, so
    that products run over memory side by side.
    """
    rest = w, x, factor, length, root, noise
    seen = _attend(torch.einsum("rij,jrm->irm", query, x), *rest)
    error = torch.einsum("rij,jrm->irm", value, seen) - _answer(w, x)
    back = _attend(torch.einsum("rji,jrm->irm", value, error), *rest)
    return torch.einsum("irm,jrm->rij", error, seen), torch.einsum("irm,jrm->rij", back, x)


def _answer(w: Tensor, v: Tensor) -> Tensor:
    """W v, prompt by prompt."""
    return w * v if w.ndim == 3 else (w * v).sum(1)


def _attend(v: Tensor, w: Tensor, x: Tensor, factor: Tensor, length: int, root: Tensor, noise: float) -> Tensor:
    """G v, prompt by prompt; v (2d, runs, m). G is symmetric."""
    d = len(x)
    top, bottom = v[:d], v[d:]
    back = w * bottom if w.ndim == 3 else (w * bottom[:, None]).sum(0)  # W^T v
    u = torch.einsum("ij,jrm->irm", root, top + back)
    if noise > 0:
        u = torch.cat([u, noise * bottom])
    u = (factor * (factor * u[:, None]).sum(0)).sum(1)
    inputs = torch.einsum("ij,jrm->irm", root, u[:d])
    below = _answer(w, inputs) + noise * u[d:] if noise > 0 else _answer(w, inputs)
    return torch.cat([inputs + x * ((x * top).sum(0) / length), below])
