"""Closed-form moments of labels and of context summaries: exact at every size, no sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icl_lib import _check, hermite
from icl_lib._check import Number

__all__ = ["Moments", "summary_moments"]

Target = str | hermite.Function


@dataclass(frozen=True)
class Moments:
    """Second moments of the summary: :math:`\\mathbb{E}[b b^\\top] = \\mathrm{diag}(\\beta I_d, \\gamma)`.

    Args:
        beta: :math:`\\beta`, second moment of each of the first d coordinates.
        gamma: :math:`\\gamma`, second moment of the last coordinate.
        trace: :math:`t = d (d \\beta + \\gamma)`.

    Source: [this book, "In-context regression"]
    """

    beta: float
    gamma: float
    trace: float


def summary_moments(dim: int, length: int, *, target: Target, noise: Number) -> Moments:
    """Second moments of the summary for isotropic inputs, scaling ``"unit"`` and any tasks.

    .. math::
        \\beta = \\frac1d \\Bigl[\\Bigl(1 - \\frac1l\\Bigr) c_1^2 + \\frac{d m_2 + q}{l}\\Bigr], \\qquad
        \\gamma = \\Bigl(1 - \\frac1l\\Bigr) m_2^2 + \\frac{m_4}{l}, \\qquad t = d (d \\beta + \\gamma)

    with :math:`c_1 = \\mathbb{E}[\\varphi(g) g]`, :math:`m_2 = \\mathbb{E}[y^2]`, :math:`m_4 = \\mathbb{E}[y^4]` and
    :math:`q = \\mathbb{E}[\\varphi(g)^2 (g^2 - 1)]`.

    Args:
        dim: dimension d.
        length: number l of examples.
        target: link function :math:`\\varphi`, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise.

    Returns:
        :class:`Moments`.

    Raises:
        ValueError: for sizes below 1, a negative noise, or an unknown target.

    Source: [DD25a, setting; formula: this book, "In-context regression"]
    """
    _check.integer("dim", dim)
    _check.integer("length", length)
    one = torch.ones(1, device="cpu")
    linear, square, quartic, excess = label_moments(hermite.activation(target), one, noise)[:, 0].tolist()
    beta = ((1 - 1 / length) * linear**2 + (dim * square + excess) / length) / dim
    gamma = (1 - 1 / length) * square**2 + quartic / length
    return Moments(beta, gamma, dim * (dim * beta + gamma))


def label_moments(target: hermite.Activation, scales: Tensor, noise: Number) -> Tensor:
    """E[y g], E[y^2], E[y^4] and E[y^2 (g^2 - 1)] for y = target(scale g) + noise; shape (4, scales)."""
    _check.number("noise", noise, least=0.0)
    rows = []
    for scale in scales.tolist():
        kinks = tuple(kink / scale for kink in target.kinks)

        def powers(g: Tensor, scale: float = scale) -> Tensor:
            phi = target(scale * g)
            return torch.stack([phi * g, phi**2, phi**4, phi**2 * (g**2 - 1)])

        linear, square, quartic, excess = hermite.gaussian_mean(powers, kinks).tolist()
        rows.append([linear, square + noise**2, quartic + 6 * noise**2 * square + 3 * noise**4, excess])
    return torch.tensor(rows, dtype=torch.float64, device="cpu").T


def interpolated_moments(target: hermite.Activation, scales: Tensor, noise: Number) -> Tensor:
    """The same for many scales: computed at 33 Chebyshev points of their range and interpolated (they are smooth)."""
    import numpy as np

    low, high = scales.min().item(), scales.max().item()
    angle = torch.arange(33, dtype=torch.float64, device="cpu") * (math.pi / 32)
    nodes = (low + high) / 2 + (high - low) / 2 * torch.cos(angle)
    values = label_moments(target, nodes, noise)
    fit = np.polynomial.chebyshev.Chebyshev.fit
    rows = [fit(nodes.numpy(), row.numpy(), 32, domain=[low, high])(scales.numpy()) for row in values]
    return torch.from_numpy(np.stack(rows))
