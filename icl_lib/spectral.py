"""Macroscopic measures of training: effective ranks, subspaces, frequencies, and how the loss remembers itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_lib import _check

__all__ = [
    "curvature",
    "effective_rank",
    "frequency_count",
    "loss_autocorrelation",
    "product_rank",
    "subspace_distance",
]

SQUARED = 1e-10  # squares of singular values below this share of the norms of the factors' Gram matrices lose too much


def effective_rank(matrix: Float[Tensor, "*batch rows columns"], skip: int = 0) -> Float[Tensor, "*batch"]:
    """Effective rank: the exponential of the entropy of the normalised singular values.

    .. math:: r(M) = \\exp\\Bigl(-\\sum_i \\pi_i \\ln \\pi_i\\Bigr), \\qquad
        \\pi_i = \\frac{\\sigma_i}{\\sum_j \\sigma_j}, \\qquad 0 \\ln 0 = 0

    It lies between 1 and the number of nonzero singular values. With ``skip=k`` the k largest ones are left out: the
    marginalised rank, which sees what the leading directions hide. Singular values at rounding level, below
    :math:`\\epsilon \\max(\\mathrm{rows}, \\mathrm{columns}) \\, \\sigma_1` with :math:`\\epsilon` that of the matrix's
    dtype, count as 0.

    Args:
        matrix: M, shape ``(..., rows, columns)``. For a product of thin factors take :func:`product_rank`.
        skip: number k of leading singular values to leave out.

    Returns:
        Ranks of shape ``(...)``, float64.

    Raises:
        ValueError: for a matrix that is not finite, or one without a nonzero singular value beyond the skipped ones.

    Source: [Roy & Vetterli 2007, definition; marginalised: MT25, as summarised]
    """
    _check.array("matrix", matrix, shape=("...", "rows", "columns"))
    sigma = torch.linalg.svdvals(matrix.double())
    return _entropy_rank("matrix", sigma, _rounding(matrix) * sigma[..., :1], skip)


def product_rank(
    left: Float[Tensor, "*batch rows inner"], right: Float[Tensor, "*batch inner columns"], skip: int = 0
) -> Float[Tensor, "*batch"]:
    """Effective rank of the product of two thin factors, which is never formed.

    .. math:: A B = Q_A \\, (R_A R_B^\\top) \\, Q_B^\\top, \\qquad A = Q_A R_A, \\quad B^\\top = Q_B R_B

    The small core :math:`R_A R_B^\\top` has the nonzero singular values of the product. Where these span less than five
    decades, and the factors do not cancel, they come from the factors' Gram matrices, which is faster. In float32
    the formed product would add rounding errors of the size of its smaller singular values, which the marginalised rank
    counts.

    Args:
        left: A, shape ``(..., rows, inner)``.
        right: B, shape ``(..., inner, columns)``.
        skip: number of leading singular values to leave out.

    Returns:
        Ranks of shape ``(...)``, float64: those of :func:`effective_rank` of the exact product, up to about 1e-7.

    Raises:
        ValueError: for factors that do not fit or are not finite, or a product without a nonzero singular value beyond
            the skipped ones.

    Source: [Roy & Vetterli 2007, definition; computation: this book, "Spectral measures"]
    """
    inner = _check.array("left", left, shape=("...", "rows", "inner")).shape[-1]
    _check.array("right", right, shape=("...", inner, "columns"))
    if left.shape[:-2] != right.shape[:-2]:
        expected = f"({', '.join([*map(str, left.shape[:-2]), 'inner', 'columns'])})"
        raise ValueError(f"right has shape {tuple(right.shape)}, expected {expected}")
    a, b = _unit_peak("left", left), _unit_peak("right", right.mT)
    gram, other = a.mT @ a, b.mT @ b
    scale = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(other)
    root, failed = torch.linalg.cholesky_ex(gram)  # R_A^T, at once where the product is well conditioned
    squares = torch.linalg.eigvalsh((root.mT @ other @ root).nan_to_num()).flip(-1)
    sigma = squares.clamp_min(0).sqrt()
    good = (failed == 0) & (squares[..., -1] > SQUARED * scale)
    if not _check.every(good):
        r_a, r_b = (torch.linalg.qr(factor[~good], mode="r").R for factor in (a, b))
        exact = torch.linalg.svdvals(r_a @ r_b.mT)
        sigma[~good] = torch.nn.functional.pad(exact, (0, sigma.shape[-1] - exact.shape[-1]))
    floor = _rounding(gram) * torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    return _entropy_rank("product", sigma, floor[..., None], skip)


def subspace_distance(
    matrix: Float[Tensor, "*batch rows columns"], reference: Float[Tensor, "*reference columns"]
) -> Float[Tensor, "*distances"]:
    """Part of a reference matrix that lies outside the row space of another matrix.

    .. math:: d(M, N) = \\min_A \\frac{\\lVert A M - N \\rVert_F}{\\lVert N \\rVert_F}
        = \\frac{\\lVert N (I - \\Pi_M) \\rVert_F}{\\lVert N \\rVert_F}

    with the projector :math:`\\Pi_M` onto the row space of M, for a uniformly random one of rank r in D columns
    :math:`\\sqrt{1 - r / D}` in the root mean square. The paper takes M = M(t) and N = M(T) at the end of training: the
    distance is then 0 at t = T by construction, and tells something only beside a second end point and a control. It
    is 0 at every t if the rank of M is the number of its columns, as for a sum over many heads. For a product M = A B
    with A of full column rank, the row space is that of the thin factor B: pass B.

    Args:
        matrix: M, shape ``(..., rows, columns)``.
        reference: N, shape ``(..., rows', columns)``; leading axes broadcast against those of M.

    Returns:
        Distances between 0 and 1, float64, of the broadcast leading shape. Directions of M at rounding level do not
        count, as in :func:`effective_rank`.

    Raises:
        ValueError: for matrices that are not finite or do not fit, or a reference that is 0.

    Source: [MT25, subspace distance, as summarised; row space of a factor: this book, "Spectral measures"]
    """
    columns = _check.array("matrix", matrix, shape=("...", "rows", "columns")).shape[-1]
    _check.array("reference", reference, shape=("...", "rows", columns))
    try:
        torch.broadcast_shapes(matrix.shape[:-2], reference.shape[:-2])
    except RuntimeError:
        message = f"reference has shape {tuple(reference.shape)}, expected leading axes that broadcast against"
        raise ValueError(f"{message} {tuple(matrix.shape[:-2])}") from None
    n = _unit_peak("reference", reference)
    _, sigma, rows = torch.linalg.svd(matrix.double(), full_matrices=False)
    basis = rows * (sigma > _rounding(matrix) * sigma[..., :1])[..., None]
    return torch.linalg.matrix_norm(n - n @ basis.mT @ basis) / torch.linalg.matrix_norm(n)


def frequency_count(table: Float[Tensor, "*batch modulus dim"]) -> Float[Tensor, "*batch"]:
    """Effective number of frequencies of a table over the residues modulo p, as an embedding of numbers is one.

    .. math:: \\exp\\Bigl(-\\sum_{f = 1}^{\\lfloor p/2 \\rfloor} \\pi_f \\ln \\pi_f\\Bigr), \\qquad
        \\pi_f \\propto \\sum_i \\Bigl| \\sum_{a=0}^{p-1} E_{ai} \\, e^{-2 \\pi \\mathrm{i} f a / p} \\Bigr|^2

    Args:
        table: E, one row a residue, shape ``(..., p, dim)`` with p at least 2.

    Returns:
        Numbers of shape ``(...)``, float64, between 1 and the largest frequency.

    Raises:
        ValueError: for a table that is not finite, or is the same for all residues.

    Source: [Nanda et al. 2023, Fourier analysis of the embedding; count by entropy: this book, "Grokking"]
    """
    _check.array("table", table, shape=("...", "modulus", "dim"))
    if table.shape[-2] < 2 or not _check.every((table != table[..., :1, :]).any(-1).any(-1)):
        raise ValueError("table is the same for all residues, expected rows that differ")
    centred = table.double() - table.double().mean(-2, keepdim=True)
    power = torch.fft.rfft(_unit_peak("table", centred), dim=-2)[..., 1:, :].abs().square().sum(-1)
    return _exp_entropy(power)


def loss_autocorrelation(
    losses: Float[Tensor, "*batch times"], lags: Sequence[int] | Int[Tensor, " lags"]
) -> Float[Tensor, "*batch lags"]:
    """Autocorrelation of a loss over the recorded steps, not centred.

    .. math:: A(\\tau) = \\frac1n \\sum_{t=1}^{n} L(t) \\, L(t + \\tau), \\qquad n = \\mathrm{times} - \\tau_{\\max}

    All lags average over the same starts t, so that differences between lags are differences of the loss, and not of
    the stretches that are averaged over. Take a held-out loss: the noise of mini-batches would add its variance to
    A(0) alone.

    Args:
        losses: L, equally spaced in time, shape ``(..., times)``.
        lags: lags :math:`\\tau` in recorded steps, each from 0 to below the number of times.

    Returns:
        Values of shape ``(..., lags)``, float64.

    Raises:
        ValueError: for losses that are not finite, or a lag outside the range.

    Source: [MT25, loss autocorrelation, as summarised]
    """
    times = _check.array("losses", losses, shape=("...", "times")).shape[-1]
    steps = [_check.integer("lag", lag, least=0) for lag in _check.numbers_of("lags", lags)]
    if not steps or max(steps) >= times:
        raise ValueError(f"lags is {steps}, expected at least one, each below {times}, the number of times")
    loss, n = losses.double(), times - max(steps)
    return torch.stack([(loss[..., :n] * loss[..., lag : lag + n]).mean(-1) for lag in steps], dim=-1)


def curvature(losses: Float[Tensor, "*batch times"], window: int = 11) -> Float[Tensor, "*batch windows"]:
    """Curvature of the autocorrelation at the smallest lags, in a sliding window.

    .. math:: A(2) - 2 A(1) + A(0) = \\frac1n \\sum_t L(t) \\, [L(t + 2) - 2 L(t + 1) + L(t)]

    It is negative where the loss begins to fall, positive where it levels off, and 0 where it is a straight line.

    Args:
        losses: L, equally spaced in time, shape ``(..., times)``.
        window: number of recorded steps in a window, at least 3.

    Returns:
        Values of shape ``(..., times - window + 1)``, float64; entry i is that of the window from i to
        i + window − 1, whose middle is i + (window − 1) / 2.

    Raises:
        ValueError: for losses that are not finite, or a window that is longer than they are.

    Source: [MT25, loss autocorrelation, as summarised; window: this book, "Spectral measures"]
    """
    times = _check.array("losses", losses, shape=("...", "times")).shape[-1]
    if _check.integer("window", window, least=3) > times:
        raise ValueError(f"window is {window}, expected at most {times}, the number of times")
    a = loss_autocorrelation(losses.unfold(-1, window, 1), (0, 1, 2))
    return a[..., 2] - 2 * a[..., 1] + a[..., 0]


def _rounding(matrix: Tensor) -> float:
    """Singular values of a matrix of norm 1 below this are rounding errors."""
    return torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])


def _unit_peak(name: str, matrix: Tensor) -> Tensor:
    """The matrix in float64, scaled to a largest entry of 1: its squares neither overflow nor vanish."""
    matrix = matrix.double().contiguous()  # factors of heads are strided views, which are slow to read
    peak = matrix.abs().amax((-2, -1), keepdim=True)
    if not _check.every(peak > 0):
        raise ValueError(f"{name} is the zero matrix, expected one with a nonzero entry")
    return matrix / peak


def _entropy_rank(name: str, sigma: Tensor, floor: Tensor, skip: int) -> Tensor:
    """Effective rank from singular values in falling order; those below the floor are rounding errors."""
    kept = (sigma * (sigma > floor))[..., _check.integer("skip", skip, least=0) :]
    if not _check.every(kept.sum(-1) > 0):
        raise ValueError(f"{name} has no nonzero singular value beyond the first {skip}, expected at least one")
    return _exp_entropy(kept)


def _exp_entropy(weights: Tensor) -> Tensor:
    share = weights / weights.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()
