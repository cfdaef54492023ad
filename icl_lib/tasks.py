"""What is to be learned: priors over task vectors, finite pools of tasks, covariances."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number

__all__ = ["TaskPrior", "power_law_covariance", "spiked_covariance"]


class TaskPrior:
    """Distribution of the task vectors.

    .. math:: \\xi \\sim N(0, C), \\qquad \\text{on the sphere: } \\sqrt{d} \\, \\xi / \\lVert \\xi \\rVert

    With ``n_tasks=K`` the prior is a finite pool of K such tasks, each drawn with the same probability. The pool is
    drawn at the first call of :meth:`sample` from that call's generator, and kept: two samples of one prior share it.

    Args:
        dim: dimension d of the tasks.
        covariance: C, shape ``(dim, dim)``, symmetric positive semi-definite; the identity if missing.
        n_tasks: size K of the pool; a fresh task for every draw if missing.
        sphere: scale every task to the norm :math:`\\sqrt{d}`.

    Raises:
        ValueError: for a dimension or pool size below 1, or a matrix that is not a covariance of that dimension.

    Source: [DD25a, data model; Lu25, task diversity]
    """

    def __init__(
        self, dim: int, covariance: Tensor | None = None, n_tasks: int | None = None, sphere: bool = False
    ) -> None:
        self.dim = _check.integer("dim", dim)
        self.n_tasks = None if n_tasks is None else _check.integer("n_tasks", n_tasks)
        self.sphere = sphere
        self.covariance = covariance
        self.root = None if covariance is None else square_root("covariance", covariance, self.dim)
        self.pool: Tensor | None = None

    def fresh(self) -> TaskPrior:
        """The same prior without a pool: what in-context learning is tested on."""
        return TaskPrior(self.dim, self.covariance, None, self.sphere)

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Float[Tensor, "n dim"]:
        """Draw n task vectors.

        Args:
            n: number of tasks.
            generator: source of randomness.
            device: where the tasks live; the generator's device if missing.
            dtype: float32 or float64.

        Returns:
            Tasks of shape ``(n, dim)``.

        Raises:
            ValueError: for n below 1 or another dtype.
        """
        _check.integer("n", n)
        _check.random("generator", generator)
        _check.dtype(dtype)
        device = device or generator.device
        if self.n_tasks is None:
            return self._draw(n, generator).to(device, dtype)
        if self.pool is None:
            self.pool = self._draw(self.n_tasks, generator)
        rows = torch.randint(self.n_tasks, (n,), generator=generator, device=generator.device)
        return self.pool[rows.to(self.pool.device)].to(device, dtype)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        tasks = torch.randn(n, self.dim, generator=generator, device=generator.device, dtype=torch.float64)
        if self.root is not None:
            tasks = tasks @ self.root.to(tasks)
        if self.sphere:
            tasks = tasks * (math.sqrt(self.dim) / tasks.norm(dim=-1, keepdim=True))
        return tasks


def spiked_covariance(dim: int, strength: Number, direction: Tensor | None = None) -> Float[Tensor, "dim dim"]:
    """Identity plus one spike.

    .. math:: C = I + \\theta \\gamma \\gamma^\\top, \\qquad \\lVert \\gamma \\rVert = 1

    Args:
        dim: dimension d.
        strength: :math:`\\theta`, above -1.
        direction: :math:`\\gamma` up to its length, shape ``(dim,)``; the first coordinate axis if missing.

    Returns:
        Covariance of shape ``(dim, dim)``, float64.

    Raises:
        ValueError: for a dimension below 1, a strength of -1 or less, or a direction that is zero or misshapen.

    Source: [DD25b, spiked tasks]
    """
    _check.integer("dim", dim)
    _check.number("strength", strength, above=-1.0)
    gamma = torch.eye(dim, dtype=torch.float64, device="cpu")[0] if direction is None else direction
    _check.array("direction", gamma, shape=(dim,))
    length = torch.linalg.vector_norm(gamma.double())
    if not _check.every(length > 0):
        raise ValueError("direction is the zero vector, expected a direction")
    gamma = gamma.double() / length
    return torch.eye(dim, dtype=torch.float64, device=gamma.device) + strength * torch.outer(gamma, gamma)


def power_law_covariance(dim: int, exponent: Number) -> Float[Tensor, "dim dim"]:
    """Diagonal covariance with a power-law spectrum and mean eigenvalue 1.

    .. math::
        C = \\mathrm{diag}(s_1, \\dots, s_d), \\qquad s_a \\propto a^{-\\mathrm{exponent}}, \\quad \\mathrm{Tr}\\, C = d

    Args:
        dim: dimension d.
        exponent: decay of the spectrum, at least 0 (0 gives the identity).

    Returns:
        Covariance of shape ``(dim, dim)``, float64.

    Raises:
        ValueError: for a dimension below 1 or a negative exponent.

    Source: [this book, notation; power-law spectra as in MT25]
    """
    _check.integer("dim", dim)
    _check.number("exponent", exponent, least=0.0)
    spectrum = torch.arange(1, dim + 1, dtype=torch.float64, device="cpu") ** -exponent
    return torch.diag(spectrum * (dim / spectrum.sum()))


def square_root(name: str, covariance: Tensor, dim: int) -> Tensor:
    """Symmetric square root of a covariance of shape (dim, dim), float64; ValueError if it is not a covariance."""
    _, values, vectors = _check.covariance(name, covariance, dim)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.mT
