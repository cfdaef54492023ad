"""Ridge regression as the papers use it: primal or dual by size, a whole penalty path, float32 features made exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number

__all__ = ["ridge", "ridge_path"]

EIGEN_FROM = 13  # from so many penalties on, one eigendecomposition is cheaper than a Cholesky factor for each
COARSE = 2e-7  # a float32 factor is refined fast for penalties above so many traces
REFINEMENTS = 8
TINY = 1e-300
ROWS = 2048  # rows or columns of float32 features that are widened to float64 at a time


def ridge(
    features: Float[Tensor, "*batch n k"], targets: Float[Tensor, "*batch n"], penalty: Number
) -> Float[Tensor, "*batch k"]:
    """Ridge regression.

    .. math:: \\hat w = \\arg\\min_w \\lVert y - X w \\rVert^2 + \\mathrm{penalty} \\, \\lVert w \\rVert^2

    Solves the smaller of the primal (k unknowns) and the dual system (n unknowns). At penalty 0 it returns the
    solution of minimum norm among the minimisers.

    Args:
        features: X, shape ``(..., n, k)``, float64, or float32 to save time and memory: the Gram matrix is then
            formed in float32 and the solution refined in float64, so that the answer is that of float64.
        targets: y, shape ``(..., n)``.
        penalty: coefficient of the squared norm, at least 0 (not divided by n).

    Returns:
        Weights of shape ``(..., k)``, float64.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite entries, a negative penalty, or a penalty so small that
            the system cannot be solved in float64.

    Source: [DD25a, training of the read-out; penalty convention: this book, notation]
    """
    return ridge_path(features, targets, [penalty])[..., 0, :]


def ridge_path(
    features: Float[Tensor, "*batch n k"],
    targets: Float[Tensor, "*batch n"],
    penalties: Sequence[Number] | Float[Tensor, " n_penalties"],
    *,
    memory: Number | None = None,
) -> Float[Tensor, "*batch n_penalties k"]:
    """Ridge regression for several penalties that share one Gram matrix.

    Args:
        features: X, shape ``(..., n, k)``, float32 or float64.
        targets: y, shape ``(..., n)``.
        penalties: coefficients of the squared norm, each at least 0.
        memory: bytes that may be taken besides the features; any number if missing.

    Returns:
        Weights of shape ``(..., n_penalties, k)``, float64, in the order of the penalties.

    Raises:
        ValueError: as :func:`ridge`.
        MemoryError: if more bytes than ``memory`` would be needed at the worst; nothing large has been made by then.

    Source: [DD25a, training of the read-out; penalty convention: this book, notation]
    """
    _check.array("features", features, shape=("...", "n", "k"))
    _check.array("targets", targets, shape=("...", features.shape[-2]))
    if features.shape[:-1] != targets.shape:
        raise ValueError(f"targets has shape {tuple(targets.shape)}, expected {tuple(features.shape[:-1])}")
    values = check_penalties(penalties)
    need = ridge_bytes(tuple(features.shape), features.dtype, values)
    _check.memory(memory, need, f"ridge regression on features of shape {tuple(features.shape)}")
    y = targets.double()
    dual = features.shape[-2] < features.shape[-1]
    slim = features.dtype == torch.float32
    single = features @ features.mT if dual else features.mT @ features  # in the features' own precision

    def apply(v: Tensor) -> Tensor:
        return _gram_times(features, v, dual)

    def exact() -> Tensor:
        total = torch.zeros(single.shape, dtype=torch.float64, device=features.device)
        for matrix, rows in zip(
            total.view(-1, *total.shape[-2:]), features.reshape(-1, *features.shape[-2:]), strict=True
        ):
            for block in rows.split(ROWS, dim=1 if dual else 0):
                wide = block.double()
                matrix.addmm_(*((wide, wide.mT) if dual else (wide.mT, wide)))
        return total

    right = y if dual else _transposed_times(features, y)
    positive = [value for value in values if value > 0]
    solved = iter(solve(single, right, positive, apply, exact if slim else None)) if positive else iter(())
    paths = []
    for value in values:
        if value > 0:
            solution = next(solved)
            paths.append(_transposed_times(features, solution) if dual else solution)
        else:
            paths.append((torch.linalg.pinv(features.double()) @ y[..., None])[..., 0])
    return torch.stack(paths, dim=-2)


def solve_bytes(size: int, dtype: torch.dtype, n_penalties: int) -> int:
    """Bytes that :func:`solve` takes at the worst for so many unknowns, the Gram matrix included.

    With a Cholesky factor: the shifted matrix and its factor in float64, beside the last factor in float32. With an
    eigendecomposition: the vectors and LAPACK's workspace of two matrices. With float32 features, which may prove too
    coarse, also the Gram matrix in float64, and the vectors of the coarse one.
    """
    slim, eigen = dtype == torch.float32, n_penalties >= EIGEN_FROM
    return size**2 * ((12 if slim else 8) + (24 + 8 * slim if eigen else 20))


def ridge_bytes(shape: Sequence[int], dtype: torch.dtype, penalties: Sequence[Number]) -> int:
    """Bytes that :func:`ridge_path` takes at the worst besides the features."""
    *batch, n, k = shape
    wide = 8 * min(ROWS * max(n, k), n * k)  # a block of float64
    pseudo = 56 * n * k if 0 in penalties else 0  # copies and factors of a singular value decomposition
    return math.prod(batch) * max(solve_bytes(min(n, k), dtype, len(penalties)) + wide, pseudo)


def check_penalties(penalties: Sequence[Number] | Tensor) -> list[float]:
    """A non-empty list of finite, non-negative penalties."""
    entries = _check.numbers_of("penalties", penalties)
    if not entries:
        raise ValueError("penalties is empty, expected at least one number")
    return [_check.number("penalty", entry, least=0.0) for entry in entries]


def solve(
    gram: Tensor,
    right: Tensor,
    penalties: Sequence[Number],
    apply: Callable[[Tensor], Tensor],
    exact: Callable[[], Tensor] | None = None,
) -> list[Tensor]:
    """Solve ``(K + penalty I) v = right`` for several penalties, with K known to float64 through ``apply`` only.

    Args:
        gram: K, or K rounded to float32, shape ``(..., m, m)``.
        right: right-hand side, shape ``(..., m)``, float64.
        penalties: positive numbers.
        apply: ``v -> K v`` in float64, used for iterative refinement.
        exact: recomputes K in float64, for the case that the rounded one is too coarse; None if ``gram`` is float64.

    Returns:
        One solution of shape ``(..., m)`` a penalty.
    """
    if not _check.all_finite(gram):
        if exact is not None:
            return solve(exact(), right, penalties, apply)
        raise ValueError("features are so large that their products are not finite, expected rescaled features")
    eigen = torch.linalg.eigh(gram.double()) if len(penalties) >= EIGEN_FROM else None
    size = gram.diagonal(dim1=-2, dim2=-1).double().sum(-1).max().item()

    def inverses(penalty: Number) -> Iterator[Callable[[Tensor], Tensor]]:
        if eigen is not None:
            yield _spectral(eigen.eigenvalues, eigen.eigenvectors, penalty)
            return
        if penalty > COARSE * size:
            yield from _cholesky(gram, penalty, torch.float32)
        yield from _cholesky(gram, penalty, torch.float64)

    solutions: list[Tensor] = []
    for penalty in penalties:
        refined = (_refine(inverse, right, penalty, apply) for inverse in inverses(penalty))
        solution = next((v for v in refined if v is not None), None)
        if solution is None and exact is not None:
            rest = penalties[len(solutions) :]
            return solutions + solve(exact(), right, rest, apply)
        if solution is None:
            raise ValueError(
                f"penalty is {penalty:g}, too small for a system of trace {size:.3g}: expected, to be "
                f"safe, {2e-7 * size:.1g} or more, or 0 for the solution of minimum norm"
            )
        solutions.append(solution)
    return solutions


def _cholesky(gram: Tensor, penalty: Number, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
    """Multiplication by the inverse of K + penalty I, from a factor in the given precision, if there is one."""
    shifted = gram.to(dtype, copy=True)
    shifted.diagonal(dim1=-2, dim2=-1).add_(penalty)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if not info.any():  # two triangular solves: torch.cholesky_solve would copy the factor at each call
        half = partial(torch.linalg.solve_triangular, factor, upper=False)
        rest = partial(torch.linalg.solve_triangular, factor.mT, upper=True)

        def inverse(v: Tensor) -> Tensor:
            size = v.abs().amax(-1, keepdim=True).clamp_min(TINY)  # float32 ends at 1e-38, residuals do not
            return rest(half((v / size).to(dtype)[..., None]))[..., 0].double() * size

        yield inverse


def _spectral(values: Tensor, vectors: Tensor, penalty: Number) -> Callable[[Tensor], Tensor]:
    scale = 1 / (values + penalty)
    return lambda v: (vectors @ (scale * (vectors.mT @ v[..., None])[..., 0])[..., None])[..., 0]


def _refine(
    inverse: Callable[[Tensor], Tensor], right: Tensor, penalty: Number, apply: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Iterative refinement until the last correction is at rounding level; None if the corrections do not shrink."""
    solution = inverse(right)
    size = torch.linalg.vector_norm(solution, dim=-1)
    last = size
    for _ in range(REFINEMENTS):
        step = inverse(right - apply(solution) - penalty * solution)
        change = torch.linalg.vector_norm(step, dim=-1)
        if not torch.isfinite(change).all() or (change > 0.5 * last).logical_and(change > 1e-9 * size).any():
            return None
        solution = solution + step
        if (change * change <= 1e-13 * size * last).all():  # corrections shrink like a geometric series
            return solution
        last = change
    return solution if (last <= 1e-9 * size).all() else None


def _transposed_times(features: Tensor, v: Tensor) -> Tensor:
    """X^T v in float64, widening a block of rows at a time."""
    total = torch.zeros(*v.shape[:-1], features.shape[-1], dtype=torch.float64, device=v.device)
    for start in range(0, features.shape[-2], ROWS):
        block = features[..., start : start + ROWS, :].double()
        total += (block.mT @ v[..., start : start + ROWS, None])[..., 0]
    return total


def _gram_times(features: Tensor, v: Tensor, dual: bool) -> Tensor:
    """X X^T v (dual) or X^T X v (primal) in float64, widening a block of rows at a time."""
    inner = _transposed_times(features, v) if dual else v
    blocks, total = [], torch.zeros_like(v)
    for start in range(0, features.shape[-2], ROWS):
        block = features[..., start : start + ROWS, :].double()
        product = (block @ inner[..., None])[..., 0]
        if dual:
            blocks.append(product)
        else:
            total += (block.mT @ product[..., None])[..., 0]
    return torch.cat(blocks, dim=-1) if dual else total
