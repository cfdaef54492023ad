"""What a model sees: full prompts Z, and the exact O(length + dim) sampler of their summaries b and H_Z."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check, hermite
from icl_lib._check import Number
from icl_lib.moments import Target, interpolated_moments, label_moments, summary_moments
from icl_lib.tasks import TaskPrior, square_root

__all__ = ["Prompts", "Source", "Summaries", "sample_mixture", "sample_prompts", "sample_summaries", "summary_moments"]

SCALINGS = ("unit", "lu")
LONG = 1000  # for more examples than these the sums of linear labels are drawn without the labels


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
        for name in ("query", "summary", "answer"):
            _check.array(name, getattr(self, name), shape=("...", "n", "d")[: 2 if name == "answer" else 3])
        dim = self.query.shape[-1]
        if self.summary.shape != (*self.query.shape[:-1], dim + 1):
            expected = (*self.query.shape[:-1], dim + 1)
            raise ValueError(f"summary has shape {tuple(self.summary.shape)}, expected {expected}")
        if self.answer.shape != self.query.shape[:-1]:
            raise ValueError(f"answer has shape {tuple(self.answer.shape)}, expected {tuple(self.query.shape[:-1])}")
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

    def __post_init__(self) -> None:
        n, length, dim = _check.array("inputs", self.inputs, shape=("n", "l", "d")).shape
        _check.array("labels", self.labels, shape=(n, length))
        _check.array("query", self.query, shape=(n, dim))
        _check.array("answer", self.answer, shape=(n,))
        _check.among("scaling", self.scaling, SCALINGS)
        _check.number("trace", self.trace, above=0.0)

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


def sample_summaries(
    tasks: Float[Tensor, "*batch n d"],
    length: int,
    *,
    target: Target,
    noise: Number,
    covariance: Tensor | None = None,
    scaling: str = "unit",
    generator: torch.Generator,
) -> Summaries:
    """Draw one prompt a task and return its summary, exactly in law, at a cost of at most length + dim a prompt.

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
    if setup.length > LONG and target in ("linear", "identity"):
        match, power = setup.linear_sums()
        size, square = power.sqrt(), power / setup.length
    else:
        projections = setup.normal(length)  # (..., n, l)
        labels = setup.labels(projections, setup.scale[..., None])  # (..., n, l)
        match, square = (labels * projections).sum(-1, keepdim=True), (labels**2).mean(-1, keepdim=True)
        size = labels.norm(dim=-1, keepdim=True)
    across = setup.normal(setup.dim)  # (..., n, d)
    along = match - size * (across * setup.axis).sum(-1, keepdim=True)
    linear = setup.colour(size * across + along * setup.axis)
    factor = math.sqrt(setup.dim) / length if scaling == "lu" else 1 / length
    query, answer = setup.question()
    return Summaries(query, torch.cat([factor * linear, square], dim=-1), answer, setup.trace())


def sample_prompts(
    tasks: Float[Tensor, "n d"],
    length: int,
    *,
    target: Target,
    noise: Number,
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


@dataclass(frozen=True)
class Source:
    """One of several sources of prompts: its tasks, its inputs, its noise, and its share of the training set.

    Args:
        prior: distribution of the tasks.
        target: link function, a name in ``hermite.ACTIVATIONS``, ``"linear"``, or a callable.
        noise: standard deviation of the label noise.
        covariance: :math:`\\Sigma` of the inputs, shape ``(d, d)``; the identity if missing.
        share: part of the prompts that come from this source, in proportion to the shares of the others; at least 0.

    Source: [DD25b, data sources]
    """

    prior: TaskPrior
    target: Target
    noise: Number
    covariance: Tensor | None = None
    share: Number = 1.0

    def __post_init__(self) -> None:
        _check.instance("prior", self.prior, TaskPrior)
        _check.number("share", self.share, least=0.0)

    def sample(self, n: int, length: int, *, scaling: str = "unit", generator: torch.Generator) -> Summaries:
        """Summaries of n prompts of this source alone; see :func:`sample_summaries`.

        Source: [DD25b, data sources]
        """
        tasks = self.prior.sample(n, generator=generator)
        return sample_summaries(
            tasks,
            length,
            target=self.target,
            noise=self.noise,
            covariance=self.covariance,
            scaling=scaling,
            generator=generator,
        )


def sample_mixture(
    sources: Sequence[Source], n: int, length: int, *, scaling: str = "unit", generator: torch.Generator
) -> Summaries:
    """Draw a training set from several sources, in random order.

    .. math:: n_s \\approx n \\, \\frac{\\mathrm{share}_s}{\\sum_{s'} \\mathrm{share}_{s'}}, \\qquad \\sum_s n_s = n

    The numbers of prompts are fixed; each differs by at most 1 from its part of n.

    Args:
        sources: what is mixed; all of one dimension.
        n: number of prompts.
        length: number l of examples in each prompt.
        scaling: as in :func:`sample_summaries`.
        generator: source of randomness.

    Returns:
        :class:`Summaries` of n prompts, with the traces of the sources averaged in proportion to their prompts.

    Raises:
        ValueError: for no source, sources of different dimensions, shares that are all 0, or n below 1, and as
            :func:`sample_summaries`.

    Source: [DD25b, mixing ratio of the sources]
    """
    sources, n = list(sources), _check.integer("n", n)
    _check.random("generator", generator)
    dims = {_check.instance("source", source, Source).prior.dim for source in sources}
    if len(dims) != 1:
        raise ValueError(f"sources have the dimensions {sorted(dims)}, expected one dimension for all")
    total = math.fsum(source.share for source in sources)
    if total == 0:
        raise ValueError("shares are all 0, expected one above 0")
    ends = [round(n * math.fsum(source.share for source in sources[: i + 1]) / total) for i in range(len(sources))]
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    parts = [
        (size, source.sample(size, length, scaling=scaling, generator=generator))
        for source, size in zip(sources, sizes, strict=True)
        if size > 0
    ]
    order = torch.randperm(n, generator=generator, device=generator.device)
    query, summary, answer = (
        torch.cat([getattr(part, name) for _, part in parts])[order.to(parts[0][1].answer.device)]
        for name in ("query", "summary", "answer")
    )
    return Summaries(query, summary, answer, math.fsum(size * part.trace for size, part in parts) / n)


class _Setup:
    """The checked arguments of a sampler, and what both samplers compute from them in the same way."""

    def __init__(
        self,
        tasks: Tensor,
        length: int,
        target: Target,
        noise: Number,
        covariance: Tensor | None,
        scaling: str,
        generator: torch.Generator,
    ) -> None:
        self.tasks = _check.array("tasks", tasks, shape=("...", "n", "d"))
        self.dim = tasks.shape[-1]
        self.length = _check.integer("length", length)
        self.target = hermite.activation(target)
        self.noise = _check.number("noise", noise, least=0.0)
        self.scaling = _check.among("scaling", scaling, SCALINGS)
        self.generator = _check.random("generator", generator)
        root = None if covariance is None else square_root("covariance", covariance, self.dim).to(tasks)
        self.root = root
        white = tasks if root is None else tasks @ root  # Sigma^{1/2} w
        size = white.norm(dim=-1)
        if not _check.every(size > 0):
            raise ValueError(f"tasks holds {int((size == 0).sum())} tasks whose labels do not depend on the inputs")
        if not _check.all_finite(size):
            raise ValueError(f"tasks holds {tasks.abs().max().item():.3g}, expected entries whose squares are finite")
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
        if not _check.all_finite(labels):
            raise ValueError("target returned labels that are not finite")
        return labels

    def linear_sums(self) -> tuple[Tensor, Tensor]:
        """Sums of y u and of y^2 for linear labels, shape (..., n, 1), from three random numbers a prompt.

        The projections u and the noise have the Gram matrix of two vectors of l normal numbers, whose triangular factor
        is known in law: Bartlett's decomposition.
        """
        like, degrees = self.axis[..., :1], (self.length, self.length - 1)
        first, rest = (
            2 * torch._standard_gamma(torch.full_like(like, degree / 2), generator=self.generator) for degree in degrees
        )
        shared, scale = self.normal(1), self.scale[..., None]
        cross = first.sqrt() * shared  # u times noise
        power = scale**2 * first + 2 * scale * self.noise * cross + self.noise**2 * (shared**2 + rest)
        return scale * first + self.noise * cross, power

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
        scale = self.scale.double().cpu().flatten()
        if self.root is None:
            total, stretch = float(d), torch.ones_like(scale)
        else:
            root = self.root.double().cpu()
            total = root.square().sum().item()  # Tr Sigma
            stretch = (self.axis.double().cpu().reshape(-1, d) @ root).square().sum(-1)  # e^T Sigma e
        low, high = scale.min().item(), scale.max().item()
        if high - low < 1e-6 * high:
            linear, square, quartic, excess = label_moments(self.target, scale[:1], self.noise)
        else:
            linear, square, quartic, excess = interpolated_moments(self.target, scale, self.noise)
        vector = (1 - 1 / length) * linear**2 * stretch + (square * total + excess * stretch) / length
        last = (1 - 1 / length) * square**2 + quartic / length
        if self.scaling == "lu":  # x carries 1/sqrt(d) and the first block of b carries d
            vector, total = vector * d, total / d
        return total * (vector + last).mean().item()
