"""What predicts: the linear Transformer, the random Transformer and its Hermite twin, and Bayes on a pool of tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check, hermite
from icl_lib._check import Number
from icl_lib.prompts import Prompts, Summaries
from icl_lib.ridge import check_penalties, ridge_bytes, ridge_path, solve, solve_bytes
from icl_lib.tasks import TaskPrior

__all__ = [
    "HermiteTwin",
    "LinearTransformer",
    "RandomTransformer",
    "dmmse",
    "icl_error",
    "population_error",
    "training_memory",
]

Penalty = Number | Sequence[Number]
PRIMAL_FROM = 1.2  # the Gram matrix of the features is cheaper than that of the prompts from n = 1.2 d (d + 1) on
ROWS = 1024  # prompts whose features, or temporaries of whose activations, exist at the same time
TEMPORARIES = 6  # arrays of the size of the pre-activations that an activation or a polynomial may make
SMALL = 128  # prompts whose misfits to every task of a pool exist at the same time


def icl_error(predictions: Float[Tensor, "*models n"], answers: Float[Tensor, "*runs n"]) -> Float[Tensor, "*models"]:
    """In-context error: mean squared error over the prompts.

    .. math:: e_{\\mathrm{ICL}} = \\frac1n \\sum_{\\mu} (y_\\mu - \\hat y_\\mu)^2

    The answers carry label noise, so the noise variance is part of the error.

    Args:
        predictions: shape ``(..., n)``; leading axes are models or penalties.
        answers: shape ``(n,)``, or the shape of the predictions.

    Returns:
        Errors of the leading shape of the predictions.

    Raises:
        ValueError: for wrong shapes or non-finite entries.

    Source: [DD25a, in-context error; Lu25, ICL error]
    """
    _check.array("predictions", predictions, shape=("...", "n"))
    same = isinstance(answers, Tensor) and answers.ndim > 1
    _check.array("answers", answers, shape=predictions.shape if same else predictions.shape[-1:])
    return ((predictions - answers) ** 2).mean(-1)


def population_error(
    gamma: Float[Tensor, "*models d e"],
    tasks: TaskPrior | Float[Tensor, "K d"],
    length: int,
    *,
    noise: Number,
    covariance: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*models"]:
    """Exact error of linear attention with given weights on linear labels: no test set, any size.

    .. math::
        e(\\Gamma) = \\bar v - \\frac2d \\mathrm{Tr}(\\Gamma A^\\top)
        + \\frac1d \\mathrm{Tr}(\\Sigma \\Gamma B \\Gamma^\\top), \\qquad
        v = \\frac1d \\xi^\\top \\Sigma \\xi + \\rho, \\qquad
        A = \\Sigma \\begin{bmatrix} \\overline{\\xi \\xi^\\top} \\Sigma & \\overline{v \\xi} \\end{bmatrix}

    .. math::
        B = \\begin{bmatrix}
        \\frac{l + 1}l \\Sigma \\overline{\\xi \\xi^\\top} \\Sigma + \\frac dl \\bar v \\Sigma &
        \\frac{l + 2}l \\Sigma \\overline{v \\xi} \\\\
        \\frac{l + 2}l \\overline{v \\xi}^\\top \\Sigma & \\frac{l + 2}l \\overline{v^2}
        \\end{bmatrix}

    The bar is the mean over the tasks. Inputs are :math:`N(0, \\Sigma / d)`, labels :math:`\\langle \\xi, x \\rangle`
    with noise of variance :math:`\\rho`: target ``"linear"``, scaling ``"lu"``. An intercept would add its square.

    Args:
        gamma: :math:`\\Gamma`, shape ``(..., d, d + 1)``; leading axes are models.
        tasks: equally likely tasks, shape ``(K, d)``, or the law of the tasks; a pool must have been drawn.
        length: number l of examples in a prompt.
        noise: standard deviation of the label noise, of the examples and of the answer.
        covariance: :math:`\\Sigma`, shape ``(d, d)``; the identity if missing.

    Returns:
        Errors of shape ``(...)``, label noise included, float64.

    Raises:
        ValueError: for wrong shapes, a length below 1, a negative noise, a pool that is not drawn, or tasks on the
            sphere with a covariance, whose moments have no closed form.

    Source: [Lu25, error of given weights; any covariance: this book, "Learning curves"]
    """
    dim = _check.array("gamma", gamma, shape=("...", "d", "e")).shape[-2]
    gamma = _check.array("gamma", gamma, shape=("...", dim, dim + 1)).double()
    inverse, rho = 1 / _check.integer("length", length), _check.number("noise", noise, least=0.0) ** 2
    eye = torch.eye(dim, dtype=gamma.dtype, device=gamma.device)
    sigma = eye if covariance is None else _check.covariance("covariance", covariance, dim)[0].to(gamma)
    second, power, mixed, square = _task_moments(tasks, sigma, rho)
    cross = sigma @ torch.cat([second @ sigma, mixed[:, None]], 1)  # A, (d, d + 1)
    block = (1 + inverse) * sigma @ second @ sigma + dim * inverse * power * sigma
    column = (1 + 2 * inverse) * torch.cat([sigma @ mixed, square[None]])[:, None]
    moments = torch.cat([torch.cat([block, column[:-1].mT]), column], 1)  # B, (d + 1, d + 1)
    return power + ((sigma @ gamma @ moments - 2 * cross) * gamma).sum((-1, -2)) / dim


def _task_moments(tasks: TaskPrior | Tensor, sigma: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means over the tasks of xi xi^T, v, v xi and v^2, where v = xi^T Sigma xi / d + rho."""
    dim, pool = len(sigma), tasks
    if isinstance(tasks, TaskPrior):
        if tasks.dim != dim:
            raise ValueError(f"tasks has dim {tasks.dim}, expected {dim}")
        if tasks.n_tasks is None:
            return _fresh_moments(tasks, sigma, rho)
        if tasks.pool is None:
            raise ValueError("tasks is a pool that is not drawn, expected a call of sample before")
        pool = tasks.pool
    pool = _check.array("tasks", pool, shape=("K", dim)).to(sigma)
    v = ((pool @ sigma) * pool).sum(-1) / dim + rho
    return pool.mT @ pool / len(pool), v.mean(), (v[:, None] * pool).mean(0), (v**2).mean()


def _fresh_moments(prior: TaskPrior, sigma: Tensor, rho: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same means over a Gaussian law, or over the sphere."""
    if prior.sphere and prior.covariance is not None:
        raise ValueError("tasks lie on the sphere and have a covariance, expected one of the two, or a pool")
    dim = len(sigma)
    eye = torch.eye(dim, dtype=sigma.dtype, device=sigma.device)
    second = eye if prior.covariance is None else prior.covariance.to(sigma)
    signal = second @ sigma
    mean, variance = signal.trace() / dim, 2 * (signal @ signal).trace() / dim**2
    if prior.sphere:
        variance = (variance - 2 * mean**2 / dim) * dim / (dim + 2)
    return second, mean + rho, torch.zeros_like(sigma[0]), (mean + rho) ** 2 + variance


def dmmse(prompts: Prompts, pool: Float[Tensor, "K d"], *, noise: Number) -> Float[Tensor, " n"]:
    """Predictions of the Bayes-optimal model for a pool of equally likely tasks and linear labels.

    .. math::
        \\hat y = \\sum_k p_k \\langle \\xi_k, x_{l+1} \\rangle, \\qquad
        p_k \\propto \\exp \\Bigl(-\\frac1{2 \\rho} \\sum_{i \\le l} (y_i - \\langle \\xi_k, x_i \\rangle)^2\\Bigr)

    Its counterpart for fresh Gaussian tasks is ridge regression within the prompt, with penalty :math:`\\rho`:
    ``ridge(prompts.inputs, prompts.labels, rho)``.

    Args:
        prompts: n full prompts, of target ``"linear"`` and scaling ``"lu"``.
        pool: :math:`\\xi_1, \\dots, \\xi_K`, shape ``(K, d)``.
        noise: standard deviation :math:`\\sqrt\\rho` of the label noise, above 0.

    Returns:
        Predictions of shape ``(n,)``.

    Raises:
        ValueError: for prompts in scaling ``"unit"``, a pool of another dimension, or a noise that is not above 0.

    Source: [Raventós et al. 2023, discrete MMSE; Lu25, dMMSE estimator]
    """
    _check.instance("prompts", prompts, Prompts)
    if prompts.scaling != "lu":
        raise ValueError(f"prompts have the scaling {prompts.scaling!r}, expected 'lu'")
    pool = _check.array("pool", pool, shape=("K", prompts.query.shape[-1])).to(prompts.query)
    rho = _check.number("noise", noise, above=0.0) ** 2
    guesses = []
    parts = [part.split(SMALL) for part in (prompts.inputs, prompts.labels, prompts.query)]
    for x, y, query in zip(*parts, strict=True):
        misfit = (y[..., None] - x @ pool.mT).square().sum(1)  # (prompts, K)
        guesses.append((torch.softmax(-misfit / (2 * rho), dim=-1) * (query @ pool.mT)).sum(-1))
    return torch.cat(guesses)


def training_memory(
    dim: int, n_prompts: int, width: int, *, dtype: torch.dtype = torch.float32, penalties: int = 1
) -> int:
    """Bytes that a :class:`RandomTransformer` and one call of its ``fit`` take at the worst.

    With s bytes a number and for fewer than 13 penalties these are, up to one block of prompts,

    .. math:: s \\, k d (d + 1) + s \\, n k + c \\, \\min(n, k)^2

    for the first layer, the activations, and the Gram matrices with their factors; c is 32 in float32, where a float64
    copy may be needed, and 28 in float64. A sweep needs this much in each worker, and about 0.3 GB for Python and torch
    besides.

    Args:
        dim: dimension d of the inputs.
        n_prompts: number n of prompts.
        width: number k of neurons.
        dtype: of the first layer and of the activations.
        penalties: number of positive penalties in one call of ``fit``.

    Returns:
        The estimate, in bytes.

    Raises:
        ValueError: for sizes below 1 or another dtype.

    Source: [this book, "Running at scale"]
    """
    dim, width = _check.integer("dim", dim), _check.integer("width", width)
    n, penalties = _check.integer("n_prompts", n_prompts), _check.integer("penalties", penalties)
    return _bytes(dim, n, width, _check.dtype(dtype), [1.0] * penalties)


def _bytes(dim: int, n: int, width: int, dtype: torch.dtype, penalties: Sequence[Number]) -> int:
    """As :func:`training_memory`, for given penalties: one that is 0 takes a singular value decomposition."""
    block = dtype.itemsize * min(ROWS, n) * max(dim * (dim + 1), TEMPORARIES * width)
    held = dtype.itemsize * width * (dim * (dim + 1) + n)
    return held + max(block, ridge_bytes((n, width), dtype, penalties))


class LinearTransformer:
    """Linear attention with one matrix, trained by ridge regression on vec(H_Z).

    .. math:: \\hat y = \\langle \\Gamma, H_Z \\rangle + c = x_{l+1}^\\top \\Gamma b + c

    Without ``intercept`` c = 0. With it, c is fitted and not penalised: the fair baseline when the labels have a
    non-zero mean. The features are never written out: between two prompts
    :math:`\\langle H_Z, H_{Z'} \\rangle = (x^\\top x') (b^\\top b')`.

    Args:
        intercept: fit a constant besides the matrix.
        memory: bytes that :meth:`fit` may take besides the summaries; any number if missing.

    Source: [Lu25, reduced linear attention; DD25a, linear baseline]
    """

    def __init__(self, intercept: bool = False, *, memory: Number | None = None) -> None:
        self.intercept, self.memory = intercept, memory
        self.gamma: Tensor | None = None
        self.offset: Tensor | None = None

    def fit(self, summaries: Summaries, penalty: Penalty) -> LinearTransformer:
        """Train on summaries.

        Args:
            summaries: n prompts.
            penalty: coefficient of :math:`\\lVert \\Gamma \\rVert_F^2` against the summed squared error, above 0; a
                sequence trains one model for each entry.

        Returns:
            The model itself, with ``gamma`` of shape ``(..., d, d + 1)`` and ``offset`` of shape ``(...,)``, where
            ``...`` is the shape of the penalty: empty, or ``(n_penalties,)``.

        Raises:
            ValueError: if the penalty is not positive, or too small to solve in float64.
            MemoryError: if it would take more bytes than ``memory``; nothing large has been made by then.

        Source: [Lu25, ridge estimate of Gamma; conventions: this book, notation]
        """
        penalties = _positive(penalty)
        _check.instance("summaries", summaries, Summaries)
        if summaries.query.ndim != 2:
            raise ValueError(f"query has shape {tuple(summaries.query.shape)}, expected (n, d)")
        n, size = len(summaries), summaries.dim * (summaries.dim + 1)
        dual = n < PRIMAL_FROM * size
        need = solve_bytes(n if dual else size, torch.float64, len(penalties)) + 24 * size * min(ROWS, n)
        _check.memory(self.memory, need, f"a linear Transformer with {size} weights and {n} prompts")
        x, b, y = summaries.query.double(), summaries.summary.double(), summaries.answer.double()
        mean_y = y.mean() if self.intercept else torch.zeros((), dtype=y.dtype, device=y.device)
        mean_h = (x.mT @ b) / len(summaries) if self.intercept else torch.zeros_like(x[:1].mT @ b[:1])
        gamma = torch.stack((_dual_fit if dual else _primal_fit)(x, b, y - mean_y, mean_h, penalties))
        offset = mean_y - (gamma * mean_h).sum((-1, -2))
        many = isinstance(penalty, Sequence)
        self.gamma, self.offset = (gamma, offset) if many else (gamma[0], offset[0])
        return self

    def predict(self, summaries: Summaries) -> Float[Tensor, "*penalties n"]:
        """Predictions for the queries, shape ``(n,)``, or ``(n_penalties, n)`` after training with several.

        Raises:
            ValueError: if the model is not trained or was trained in another dimension.

        Source: [Lu25, reduced linear attention]
        """
        if self.gamma is None or self.offset is None:
            raise ValueError("the model is not trained, expected a call of fit before predict")
        _check.instance("summaries", summaries, Summaries)
        if summaries.dim != self.gamma.shape[-2]:
            raise ValueError(f"summaries have dim {summaries.dim}, expected {self.gamma.shape[-2]}")
        x, b = summaries.query.double(), summaries.summary.double()
        return ((x @ self.gamma) * b).sum(-1) + self.offset[..., None]


class RandomTransformer:
    """Linear attention followed by a fixed random layer and a trained read-out.

    .. math:: \\hat y = w^\\top \\sigma(F \\, \\mathrm{vec}(H_Z)), \\qquad F_{ij} \\sim N(0, 1/t)

    with t the trace of the covariance of vec(H_Z), so that a pre-activation has variance 1; w is trained by ridge
    regression. t is taken from the training prompts.

    Args:
        dim: dimension d of the inputs.
        width: number k of neurons.
        activation: :math:`\\sigma`, a name in ``hermite.ACTIVATIONS`` or a callable.
        generator: source of F, and later of the twin's noise.
        dtype: of F and of the features; float32 takes half the time and less memory, and the read-out is still solved
            in float64.
        memory: bytes that the model and its training may take; any number if missing. :func:`training_memory` tells
            how many it takes.

    Raises:
        ValueError: for sizes below 1, an unknown activation or another dtype.
        MemoryError: if F would take more bytes than ``memory``.

    Source: [DD25a, random Transformer]
    """

    def __init__(
        self,
        dim: int,
        width: int,
        activation: str | hermite.Function,
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float64,
        memory: Number | None = None,
    ) -> None:
        self.dim, self.width = _check.integer("dim", dim), _check.integer("width", width)
        self.activation = hermite.activation(activation)
        self.generator = _check.random("generator", generator)
        self.memory = memory
        size = (self.width, self.dim * (self.dim + 1))
        _check.memory(memory, math.prod(size) * _check.dtype(dtype).itemsize, f"a first layer of shape {size}")
        self.first = torch.randn(size, generator=generator, device=generator.device, dtype=dtype)  # sqrt(t) F
        self.trace: float | None = None
        self.weights: Tensor | None = None

    def preactivations(self, summaries: Summaries) -> Float[Tensor, "n width"]:
        """F vec(H_Z) for every prompt, shape ``(n, width)``: the expensive product, which twins can share.

        Raises:
            ValueError: if the summaries have another dimension.

        Source: [DD25a, random Transformer]
        """
        _check.instance("summaries", summaries, Summaries)
        if summaries.query.ndim != 2 or summaries.dim != self.dim:
            raise ValueError(f"query has shape {tuple(summaries.query.shape)}, expected (n, {self.dim})")
        prompts = summaries.to(self.first.device, self.first.dtype)
        trace = summaries.trace if self.trace is None else self.trace
        out = torch.empty(len(prompts), self.width, dtype=self.first.dtype, device=self.first.device)
        for rows in _blocks(len(prompts)):
            torch.mm(prompts[rows].features(), self.first.mT, out=out[rows])
        return out.mul_(1 / math.sqrt(trace))

    def features(self, preactivations: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """What the read-out sees, :math:`\\sigma(F h)`, shape ``(n, width)``.

        Source: [DD25a, random Transformer]
        """
        return self._head(preactivations, torch.empty_like(preactivations))

    def _head(self, preactivations: Tensor, out: Tensor) -> Tensor:
        """The features, a block of prompts at a time; ``out`` may be the pre-activations themselves."""
        for rows in _blocks(len(preactivations)):
            out[rows] = self._activate(preactivations[rows])
        return out

    def _activate(self, preactivations: Tensor) -> Tensor:
        return self.activation(preactivations)

    def fit(self, summaries: Summaries, penalty: Penalty, *, preactivations: Tensor | None = None) -> RandomTransformer:
        """Train the read-out by ridge regression.

        Args:
            summaries: n prompts.
            penalty: coefficient of :math:`\\lVert w \\rVert^2` against the summed squared error, at least 0; a
                sequence trains one read-out for each entry.
            preactivations: the result of :meth:`preactivations` for these summaries, if it is already there.

        Returns:
            The model itself, with ``weights`` of shape ``(width,)`` or ``(n_penalties, width)``.

        Raises:
            ValueError: for a negative penalty, another dimension, or pre-activations of another shape.
            MemoryError: if it would take more bytes than the model's ``memory``; nothing large has been made by then.

        Source: [DD25a, training of the second layer]
        """
        values = check_penalties(penalty if isinstance(penalty, Sequence) else [penalty])
        n = len(_check.instance("summaries", summaries, Summaries))
        need = _bytes(self.dim, n, self.width, self.first.dtype, values)
        need += 0 if preactivations is None else preactivations.nbytes  # these exist besides
        _check.memory(self.memory, need, f"a random Transformer with {self.width} neurons and {n} prompts")
        self.trace = summaries.trace
        path = ridge_path(self._seen(summaries, preactivations), summaries.answer.to(self.first.device), values)
        self.weights = path if isinstance(penalty, Sequence) else path[0]
        return self

    def predict(self, summaries: Summaries, *, preactivations: Tensor | None = None) -> Float[Tensor, "*penalties n"]:
        """Predictions for the queries, shape ``(n,)``, or ``(n_penalties, n)`` after training with several.

        Raises:
            ValueError: if the model is not trained, or the summaries have another dimension.

        Source: [DD25a, random Transformer]
        """
        if self.weights is None:
            raise ValueError("the model is not trained, expected a call of fit before predict")
        features = self._seen(summaries, preactivations)
        weights = self.weights.to(features.dtype)
        return (weights @ features.mT).double()

    def hermite_twin(self, degree: int) -> HermiteTwin:
        """The model with the activation replaced by its Hermite polynomial of a degree plus noise.

        Args:
            degree: degree p of the polynomial.

        Returns:
            A :class:`HermiteTwin` that shares F; it has its own read-out, to be trained by its own ``fit``.

        Raises:
            ValueError: if the degree is negative.

        Source: [DD25a, equivalent Hermite model]
        """
        return HermiteTwin(self, degree)

    def gradient(self, summaries: Summaries, *, readout: Float[Tensor, " width"]) -> Float[Tensor, "width features"]:
        """The direction in which one gradient step moves the first layer.

        .. math::
            G = \\frac1{n \\sqrt k} \\sum_\\mu (y_\\mu - f_\\mu) \\, (w \\circ \\sigma'(F h_\\mu)) \\, h_\\mu^\\top,
            \\qquad f_\\mu = \\frac1{\\sqrt k} w^\\top \\sigma(F h_\\mu)

        It is minus the gradient of half the mean squared error with respect to F, at a read-out that is not trained.

        Args:
            summaries: n prompts.
            readout: w, shape ``(width,)``.

        Returns:
            G in units of F, shape ``(width, d (d + 1))``, in the precision of F.

        Raises:
            ValueError: for a read-out of another shape, summaries of another dimension, or an activation that is not
                finite at a pre-activation.

        Source: [DD25b, one gradient step on the first layer]
        """
        _check.array("readout", readout, shape=(self.width,))
        _check.instance("summaries", summaries, Summaries)
        outer = readout.to(self.first) / math.sqrt(self.width)
        total = torch.zeros_like(self.first)
        for start in range(0, len(summaries), ROWS):
            rows = summaries[start : start + ROWS].to(self.first.device, self.first.dtype)
            value, slope = _slope(self.activation, self.preactivations(rows))
            missing = rows.answer - value @ outer
            total.addmm_((slope * missing[:, None]).mT, rows.features())
        total.mul_(outer[:, None] / len(summaries))
        if not _check.all_finite(total):
            raise ValueError(
                "gradient is not finite, expected an activation with values and slopes at all pre-activations"
            )
        return total

    def gradient_step(
        self, summaries: Summaries, rate: Number, *, readout: Float[Tensor, " width"] | None = None
    ) -> RandomTransformer:
        """The model after one gradient step on its first layer.

        .. math:: \\hat F = F + \\eta \\, G

        Train its read-out on other prompts than those of the step, as the theory assumes.

        Args:
            summaries: the prompts of the step.
            rate: learning rate :math:`\\eta`, at least 0.
            readout: w of the step, shape ``(width,)``; drawn from N(0, 1/k) by the model's generator if missing.

        Returns:
            A new :class:`RandomTransformer` without a trained read-out; the model itself stays as it is.

        Raises:
            ValueError: for a negative rate, and as :meth:`gradient`.

        Source: [DD25b, one gradient step on the first layer]
        """
        rate = _check.number("rate", rate, least=0.0)
        _check.instance("summaries", summaries, Summaries)
        if readout is None:
            source = self.generator
            readout = torch.randn(self.width, generator=source, device=source.device, dtype=torch.float32)
            readout /= math.sqrt(self.width)
        stepped = copy.copy(self)
        trace = summaries.trace if self.trace is None else self.trace
        stepped.first = self.first + rate * math.sqrt(trace) * self.gradient(summaries, readout=readout)
        stepped.trace, stepped.weights = None, None
        return stepped

    def _seen(self, summaries: Summaries, preactivations: Tensor | None) -> Tensor:
        """The features of the prompts; pre-activations that are given stay as they are."""
        if preactivations is None:
            own = self.preactivations(summaries)
            return self._head(own, own)
        _check.array("preactivations", preactivations, shape=(len(summaries), self.width))
        if not torch.allclose(self.preactivations(summaries[:1]), preactivations[:1].to(self.first), 1e-3, 1e-3):
            raise ValueError("preactivations differ from those of the summaries, expected the same prompts and trace")
        return self.features(preactivations)


class HermiteTwin(RandomTransformer):
    """The equivalent model: the same F, a polynomial activation of finite degree, and fresh noise.

    .. math:: \\sigma_p(a) = \\sum_{i \\le p} \\frac{c_i}{i!} He_i(a) + c^*_p z, \\qquad z \\sim N(0, 1)

    z is drawn afresh for every prompt and neuron, at every evaluation, in training and in testing, from the parent's
    generator.

    Args:
        parent: the random Transformer.
        degree: degree p.

    Source: [DD25a, equivalent Hermite model]
    """

    def __init__(self, parent: RandomTransformer, degree: int) -> None:
        _check.instance("parent", parent, RandomTransformer)
        self.dim, self.width, self.activation = parent.dim, parent.width, parent.activation
        self.generator, self.memory = parent.generator, parent.memory
        self.first, self.trace = parent.first, parent.trace
        self.expansion = hermite.expand(parent.activation, degree)
        self.weights = None

    def features(self, preactivations: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        """The truncated activation of the pre-activations, with fresh noise, shape ``(n, width)``.

        Source: [DD25a, equivalent Hermite model]
        """
        return super().features(preactivations)

    def _activate(self, preactivations: Tensor) -> Tensor:
        return self.expansion.activate(preactivations, generator=self.generator)

    def gradient(self, summaries: Summaries, *, readout: Float[Tensor, " width"]) -> Float[Tensor, "width features"]:
        """Not defined: the step is taken by the random Transformer, and its twin is made afterwards.

        Raises:
            ValueError: always.

        Source: [DD25b, equivalent Hermite model after the step]
        """
        raise ValueError("the model is a Hermite twin, expected its parent: take the step first, then make the twin")


def _blocks(n: int) -> list[slice]:
    """Blocks of prompts that give the same numbers as one block, noise included, on the CPU.

    There torch draws normal numbers sixteen at a time: a block is a multiple of sixteen, and the last one, which takes
    the rest, has at least sixteen.
    """
    ends = [*range(ROWS, n - 15, ROWS), n]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _slope(function: hermite.Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and derivatives of a scalar function, entry by entry; a function of steps has the derivative 0."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        slope = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)
    return value.detach(), slope


def _positive(penalty: Penalty) -> list[float]:
    values = check_penalties(penalty if isinstance(penalty, Sequence) else [penalty])
    if min(values) == 0:
        raise ValueError("penalty is 0, expected a number above 0")
    return values


def _dual_fit(x: Tensor, b: Tensor, y: Tensor, mean_h: Tensor, penalties: list[float]) -> list[Tensor]:
    """Ridge from the n × n kernel (x^T x')(b^T b'), centred; one matrix of shape (d, d + 1) a penalty."""
    kernel = (x @ x.mT).mul_(b @ b.mT)
    if mean_h.any():
        row = ((x @ mean_h) * b).sum(-1)
        kernel.add_((mean_h * mean_h).sum() - row[:, None]).sub_(row)
    solutions = solve(kernel, y, penalties, lambda v: kernel @ v)
    return [x.mT @ (v[:, None] * b) - v.sum() * mean_h for v in solutions]


def _primal_fit(x: Tensor, b: Tensor, y: Tensor, mean_h: Tensor, penalties: list[float]) -> list[Tensor]:
    """Ridge from the Gram matrix of the features, built from the distinct products x_i x_j and b_a b_c only."""
    n, d = x.shape
    e = b.shape[1]
    i, j = torch.triu_indices(d, d, device=x.device)
    a, c = torch.triu_indices(e, e, device=x.device)
    gram = torch.zeros(i.numel(), a.numel(), dtype=x.dtype, device=x.device)
    for start in range(0, n, ROWS):
        u, v = x[start : start + ROWS], b[start : start + ROWS]
        gram.addmm_((u[:, i] * u[:, j]).mT, v[:, a] * v[:, c])
    left = torch.empty(d, d, dtype=torch.long, device=x.device)
    left[i, j] = left[j, i] = torch.arange(i.numel(), device=x.device)
    right = torch.empty(e, e, dtype=torch.long, device=x.device)
    right[a, c] = right[c, a] = torch.arange(a.numel(), device=x.device)
    gram = gram[left[:, None, :, None], right[None, :, None, :]].reshape(d * e, d * e)
    gram.addr_(mean_h.flatten(), mean_h.flatten(), alpha=-n)
    target = (x.mT @ (y[:, None] * b)).flatten() - y.sum() * mean_h.flatten()
    return [v.view(d, e) for v in solve(gram, target, penalties, lambda v: gram @ v)]
