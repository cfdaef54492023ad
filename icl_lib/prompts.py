"""What a model sees: full prompts Z, and the exact O(length + dim) sampler of their summaries b and H_Z."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check, hermite
from icl_lib.tasks import square_root

__all__ = ["Moments", "Prompts", "Summaries", "sample_prompts", "sample_summaries", "summary_moments"]

SCALINGS = ("unit", "lu")
Target = str | hermite.Function


@dataclass(frozen=True)
class Summaries:
    """All that linear attention reads of a prompt: the query and the context summary.

    .. math:: H_Z = x_{l+1} b^\\top, \\qquad b = \\Bigl(\\frac1l \\sum_i y_i x_i; \\; \\frac1l \\sum_i y_i^2\\Bigr)

    Args:
        query: :math:`x_{l+1}`, shape ``(..., n, d)``.
        summary: b, shape ``(..., n, d + 1)``.
        answer: :math:`y_{l+1}` with its noise, shape ``(..., n)``.
        trace: :math:`t = \\mathrm{Tr}\\,\\mathrm{Cov}\\,\\mathrm{vec}(H_Z)`, which scales the models' first layer.

    Source: [DD25a, linear attention; Lu25, reduced attention]
    """

    query: Tensor
    summary: Tensor
    answer: Tensor
    trace: float

    def __post_init__(self) -> None:
        _check.array("query", self.query, shape=("...", "n", "d"))
        dim = self.query.shape[-1]
        if self.summary.shape != (*self.query.shape[:-1], dim + 1):
            expected = (*self.query.shape[:-1], dim + 1)
            raise ValueError(f"summary has shape {tuple(self.summary.shape)}, expected {expected}")
        if self.answer.shape != self.query.shape[:-1]:
            raise ValueError(f"answer has shape {tuple(self.answer.shape)}, expected {tuple(self.query.shape[:-1])}")
        _check.array("summary", self.summary)
        _check.array("answer", self.answer)
        _check.number("trace", self.trace, above=0.0)

    def __len__(self) -> int:
        return self.answer.shape[-1]

    def __getitem__(self, rows: slice) -> Summaries:
        """The prompts of a slice, with the same trace."""
        return dataclasses.replace(
            self, query=self.query[..., rows, :], summary=self.summary[..., rows, :], answer=self.answer[..., rows]
        )

    @property
    def dim(self) -> int:
        """Input dimension d."""
        return self.query.shape[-1]

    def features(self) -> Float[Tensor, "*batch n features"]:
        """vec(H_Z), shape ``(..., n, d (d + 1))``; entry ``i (d + 1) + j`` is :math:`x_i b_j`."""
        return (self.query[..., :, None] * self.summary[..., None, :]).flatten(-2)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Summaries:
        """The summaries on another device or in another dtype."""
        query, summary, answer = (x.to(device, dtype) for x in (self.query, self.summary, self.answer))
        return dataclasses.replace(self, query=query, summary=summary, answer=answer)


@dataclass(frozen=True)
class Prompts:
    """Full prompts: l examples, a query, and the answer that the model must give.

    Args:
        inputs: :math:`x_1, \\dots, x_l`, shape ``(n, l, d)``.
        labels: :math:`y_1, \\dots, y_l`, shape ``(n, l)``.
        query: :math:`x_{l+1}`, shape ``(n, d)``.
        answer: :math:`y_{l+1}` with its noise, shape ``(n,)``.
        scaling: ``"unit"`` or ``"lu"``, the convention of the summary.
        trace: as in :class:`Summaries`.

    Source: [DD25a, data model; Lu25, Eq. for Z]
    """

    inputs: Tensor
    labels: Tensor
    query: Tensor
    answer: Tensor
    scaling: str
    trace: float

    def matrix(self) -> Float[Tensor, "n tokens columns"]:
        """Z, shape ``(n, d + 1, l + 1)``: a token a column, label below input, 0 in the place of the answer."""
        inputs = torch.cat([self.inputs, self.query[:, None, :]], dim=1)  # (n, l + 1, d)
        labels = torch.cat([self.labels, torch.zeros_like(self.answer)[:, None]], dim=1)  # (n, l + 1)
        return torch.cat([inputs.mT, labels[:, None, :]], dim=1)

    def summaries(self) -> Summaries:
        """The summaries computed from the examples themselves, the slow way, at a cost of length times dim."""
        length, dim = self.inputs.shape[1:]
        factor = dim / length if self.scaling == "lu" else 1 / length
        linear = factor * torch.einsum("nl,nld->nd", self.labels, self.inputs)
        square = (self.labels**2).mean(-1, keepdim=True)
        return Summaries(self.query, torch.cat([linear, square], dim=-1), self.answer, self.trace)


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


def summary_moments(dim: int, length: int, *, target: Target, noise: float) -> Moments:
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
    linear, square, quartic, excess = _label_moments(hermite.activation(target), torch.ones(1), noise)[:, 0].tolist()
    beta = ((1 - 1 / length) * linear**2 + (dim * square + excess) / length) / dim
    gamma = (1 - 1 / length) * square**2 + quartic / length
    return Moments(beta, gamma, dim * (dim * beta + gamma))


def sample_summaries(
    tasks: Float[Tensor, "*batch n d"],
    length: int,
    *,
    target: Target,
    noise: float,
    covariance: Tensor | None = None,
    scaling: str = "unit",
    generator: torch.Generator,
) -> Summaries:
    """Draw one prompt a task and return its summary, exactly in law, at a cost of length + dim a prompt.

    Only the projections :math:`u_i` of the inputs on the task matter to the labels; given these, the rest is one
    Gaussian vector:

    .. math::
        \\sum_i y_i g_i = \\Bigl(\\sum_i y_i u_i\\Bigr) e + \\lVert y \\rVert z_\\perp, \\qquad
        z_\\perp \\sim N(0, I - e e^\\top)

    in whitened coordinates :math:`x = \\Sigma^{1/2} g`, with :math:`e = \\Sigma^{1/2} w / \\lVert \\Sigma^{1/2} w
    \\rVert`. No array of size n × length × dim ever exists.

    Args:
        tasks: task vectors, shape ``(..., n, d)``; leading axes are Monte Carlo runs.
        length: number l of examples in each prompt.
        target: link function, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise, of the examples and of the answer.
        covariance: :math:`\\Sigma` of the inputs, shape ``(d, d)``; the identity if missing.
        scaling: ``"unit"``: :math:`x \\sim N(0, \\Sigma)`,
            :math:`y = \\varphi(\\langle w, x \\rangle / (\\lVert w \\rVert \\, \\lVert \\Sigma \\rVert_2^{1/2}))
            + \\varepsilon`,
            :math:`b = (\\frac1l \\sum y x; \\frac1l \\sum y^2)`;
            ``"lu"``: :math:`x \\sim N(0, \\Sigma / d)`, :math:`y = \\varphi(\\langle w, x \\rangle) + \\varepsilon`,
            :math:`b = (\\frac dl \\sum y x; \\frac1l \\sum y^2)`.
        generator: source of randomness, on the device of the tasks.

    Returns:
        :class:`Summaries` with a leading shape equal to that of the tasks.

    Raises:
        ValueError: for wrong shapes or dtypes, non-finite entries, a zero task, a length below 1, a negative noise,
            an unknown target or scaling, or labels that are not finite.

    Source: [DD25a, data model; Lu25, data model; sampler: this book, "In-context regression"]
    """
    setup = _Setup(tasks, length, target, noise, covariance, scaling, generator)
    projections = setup.normal(length)  # (..., n, l)
    labels = setup.labels(projections, setup.scale[..., None])  # (..., n, l)
    across = setup.normal(setup.dim)  # (..., n, d)
    across -= (across * setup.axis).sum(-1, keepdim=True) * setup.axis
    along = (labels * projections).sum(-1, keepdim=True)
    linear = setup.colour(along * setup.axis + labels.norm(dim=-1, keepdim=True) * across)
    factor = math.sqrt(setup.dim) / length if scaling == "lu" else 1 / length
    square = (labels**2).mean(-1, keepdim=True)
    query, answer = setup.question()
    return Summaries(query, torch.cat([factor * linear, square], dim=-1), answer, setup.trace())


def sample_prompts(
    tasks: Float[Tensor, "n d"],
    length: int,
    *,
    target: Target,
    noise: float,
    covariance: Tensor | None = None,
    scaling: str = "unit",
    generator: torch.Generator,
) -> Prompts:
    """Draw one full prompt a task: the slow, direct way, which costs n × length × dim numbers.

    Args:
        tasks: task vectors, shape ``(n, d)``.
        length, target, noise, covariance, scaling, generator: as in :func:`sample_summaries`.

    Returns:
        :class:`Prompts`.

    Raises:
        ValueError: as :func:`sample_summaries`.

    Source: [DD25a, data model; Lu25, data model]
    """
    _check.array("tasks", tasks, shape=("n", "d"))
    setup = _Setup(tasks, length, target, noise, covariance, scaling, generator)
    white = setup.normal(length, setup.dim)  # (n, l, d)
    labels = setup.labels((white @ setup.axis[..., None])[..., 0], setup.scale[..., None])
    inputs = setup.colour(white) * (1 / math.sqrt(setup.dim) if scaling == "lu" else 1.0)
    query, answer = setup.question()
    return Prompts(inputs, labels, query, answer, scaling, setup.trace())


class _Setup:
    """The checked arguments of a sampler, and what both samplers compute from them in the same way."""

    def __init__(
        self,
        tasks: Tensor,
        length: int,
        target: Target,
        noise: float,
        covariance: Tensor | None,
        scaling: str,
        generator: torch.Generator,
    ) -> None:
        self.tasks = _check.array("tasks", tasks, shape=("...", "n", "d"))
        self.dim = tasks.shape[-1]
        self.length = _check.integer("length", length)
        self.target = hermite.activation(target)
        self.noise = _check.number("noise", noise, least=0.0)
        if scaling not in SCALINGS:
            raise ValueError(f"scaling is {scaling!r}, expected one of {', '.join(SCALINGS)}")
        self.scaling = scaling
        self.generator = _check.random("generator", generator)
        root = None if covariance is None else square_root("covariance", covariance, self.dim).to(tasks)
        self.root = root
        white = tasks if root is None else tasks @ root  # Sigma^{1/2} w
        size = white.norm(dim=-1)
        if not (size > 0).all():
            raise ValueError(f"tasks holds {int((size == 0).sum())} tasks whose labels do not depend on the inputs")
        self.axis = white / size[..., None]  # e
        if scaling == "lu":
            self.scale = size / math.sqrt(self.dim)  # standard deviation of the argument of the target
        elif root is None:
            self.scale = torch.ones_like(size)
        else:
            self.scale = size / (tasks.norm(dim=-1) * torch.linalg.matrix_norm(root, 2))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, one array of the given shape for every task."""
        like = self.tasks
        return torch.randn(*like.shape[:-1], *shape, generator=self.generator, device=like.device, dtype=like.dtype)

    def labels(self, projections: Tensor, scale: Tensor) -> Tensor:
        """Noisy labels of inputs with the given whitened projections."""
        values = self.target(projections * scale)
        if not isinstance(values, Tensor) or values.shape != projections.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"target returned {got}, expected a tensor of shape {tuple(projections.shape)}")
        noise = torch.randn(
            projections.shape, generator=self.generator, device=projections.device, dtype=projections.dtype
        )
        labels = values + self.noise * noise
        if not torch.isfinite(labels).all():
            raise ValueError("target returned labels that are not finite")
        return labels

    def colour(self, white: Tensor) -> Tensor:
        """Multiply whitened vectors by the square root of the input covariance."""
        return white if self.root is None else white @ self.root

    def question(self) -> tuple[Tensor, Tensor]:
        """Query and noisy answer."""
        white = self.normal(self.dim)
        answer = self.labels((white * self.axis).sum(-1), self.scale)
        query = self.colour(white) * (1 / math.sqrt(self.dim) if self.scaling == "lu" else 1.0)
        return query, answer

    def trace(self) -> float:
        """Tr Cov vec(H_Z): the exact mean of |x_q|^2 |b|^2 given a task, averaged over the tasks.

        Given the task, query and summary are independent, so that only moments of the labels are needed. They
        depend on the task through the scale alone: with one scale (isotropic inputs, scaling "unit", or tasks on
        the sphere) the result is exact; otherwise it is the mean over the tasks at hand.
        """
        d, length = self.dim, self.length
        sigma = torch.eye(d, dtype=torch.float64) if self.root is None else (self.root @ self.root).double().cpu()
        axis, scale = self.axis.double().cpu().reshape(-1, d), self.scale.double().cpu().flatten()
        total = sigma.trace().item()
        stretch = ((axis @ sigma) * axis).sum(-1)  # e^T Sigma e
        low, high = scale.min().item(), scale.max().item()
        if high - low < 1e-6 * high:
            linear, square, quartic, excess = _label_moments(self.target, scale[:1], self.noise)
        else:
            linear, square, quartic, excess = _interpolated_moments(self.target, scale, self.noise)
        vector = (1 - 1 / length) * linear**2 * stretch + (square * total + excess * stretch) / length
        last = (1 - 1 / length) * square**2 + quartic / length
        if self.scaling == "lu":  # x carries 1/sqrt(d) and the first block of b carries d
            vector, total = vector * d, total / d
        return total * (vector + last).mean().item()


def _label_moments(target: hermite.Activation, scales: Tensor, noise: float) -> Tensor:
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
    return torch.tensor(rows, dtype=torch.float64).T


def _interpolated_moments(target: hermite.Activation, scales: Tensor, noise: float) -> Tensor:
    """The same for many scales: computed at 33 Chebyshev points of their range and interpolated (they are smooth)."""
    import numpy as np

    low, high = scales.min().item(), scales.max().item()
    angle = torch.arange(33, dtype=torch.float64) * (math.pi / 32)
    nodes = (low + high) / 2 + (high - low) / 2 * torch.cos(angle)
    values = _label_moments(target, nodes, noise)
    fit = np.polynomial.chebyshev.Chebyshev.fit
    rows = [fit(nodes.numpy(), row.numpy(), 32, domain=[low, high])(scales.numpy()) for row in values]
    return torch.from_numpy(np.stack(rows))
