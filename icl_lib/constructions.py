"""Weights written by hand: attention that is gradient descent, ridge, lasso, and the choice between models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib import _check
from icl_lib._check import Number

__all__ = [
    "Attention",
    "FeedForward",
    "Network",
    "gradient_descent",
    "model_selection",
    "proximal_descent",
    "softmax_descent",
]

ACTIVATIONS = ("linear", "relu", "softmax")
MASKS = ("all", "context", "causal")
Head = tuple[Tensor, Tensor, Tensor]  # query (rank, width), key (rank, width), value (width, width)


@dataclass(frozen=True)
class Attention:
    """A layer of attention with a residual connection and any number of heads h.

    .. math::
        e_i \\leftarrow e_i + \\sum_h \\sum_{j \\text{ seen}} a\\bigl(\\langle Q_h e_i, K_h e_j \\rangle\\bigr) V_h e_j

    The activation a acts entry by entry, or is the softmax over the tokens j that token i sees.

    Args:
        query, key: :math:`Q_h` and :math:`K_h`, shape ``(heads, rank, width)``.
        value: :math:`V_h`, shape ``(heads, width, width)``.
        activation: ``"linear"``, ``"relu"`` or ``"softmax"``.
        mask: which tokens are seen: ``"all"``; ``"context"``: all but the last, the query; ``"causal"``: those up to
            the token itself.

    Raises:
        ValueError: for shapes that do not fit, or an unknown activation or mask.

    Source: [von Oswald et al. 2023, self-attention; Bai et al. 2023, ReLU attention]
    """

    query: Float[Tensor, "heads rank width"]
    key: Float[Tensor, "heads rank width"]
    value: Float[Tensor, "heads width width"]
    activation: str = "linear"
    mask: str = "all"

    def __post_init__(self) -> None:
        heads, rank, width = _check.array("query", self.query, shape=("heads", "rank", "width")).shape
        _check.array("key", self.key, shape=(heads, rank, width))
        _check.array("value", self.value, shape=(heads, width, width))
        _check.among("activation", self.activation, ACTIVATIONS)
        _check.among("mask", self.mask, MASKS)

    def __call__(self, tokens: Float[Tensor, "*batch tokens width"]) -> Float[Tensor, "*batch tokens width"]:
        """The tokens after the layer."""
        _check.array("tokens", tokens, shape=("...", "tokens", self.query.shape[-1]))
        each = tokens[..., None, :, :]  # (..., 1, tokens, width)
        query, key, value = (each @ weights.to(tokens).mT for weights in (self.query, self.key, self.value))
        scores = query @ key.mT  # (..., heads, tokens, tokens)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=tokens.device)
        if self.mask == "context":
            seen[:, -1] = False
        elif self.mask == "causal":
            seen = seen.tril()
        if self.activation == "softmax":
            weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
        else:
            weights = (scores if self.activation == "linear" else scores.relu()).masked_fill(~seen, 0.0)
        return tokens + (weights @ value).sum(-3)


@dataclass(frozen=True)
class FeedForward:
    """A two-layer network that acts on every token, with a residual connection.

    .. math:: e_i \\leftarrow e_i + W_2 \\, \\mathrm{relu}(W_1 e_i)

    Args:
        first: :math:`W_1`, shape ``(hidden, width)``.
        second: :math:`W_2`, shape ``(width, hidden)``.

    Raises:
        ValueError: for shapes that do not fit.

    Source: [Bai et al. 2023, MLP layer]
    """

    first: Float[Tensor, "hidden width"]
    second: Float[Tensor, "width hidden"]

    def __post_init__(self) -> None:
        hidden, width = _check.array("first", self.first, shape=("hidden", "width")).shape
        _check.array("second", self.second, shape=(width, hidden))

    def __call__(self, tokens: Float[Tensor, "*batch tokens width"]) -> Float[Tensor, "*batch tokens width"]:
        """The tokens after the layer."""
        _check.array("tokens", tokens, shape=("...", "tokens", self.first.shape[-1]))
        return tokens + (tokens @ self.first.to(tokens).mT).relu() @ self.second.to(tokens).mT


@dataclass(frozen=True)
class Network:
    """A Transformer with given weights: how a prompt becomes tokens, the layers, and where the prediction stands.

    The network is a function of a prompt: ``network(inputs, labels, query)`` are the predictions, for inputs of shape
    ``(..., l, d)``, labels of shape ``(..., l)`` and queries of shape ``(..., d)``.

    Args:
        layers: what acts on the tokens, in order.
        template: what the tokens hold besides the prompt, shape ``(l + 1, width)``.
        readout: the prediction is its inner product with the last token, shape ``(width,)``.
        start: weights :math:`w_0` of a first prediction, shape ``(d,)``; the label slot of the query begins as
            :math:`-\\langle w_0, x_{l+1} \\rangle`.
        slots: which entries of a token hold what; inputs are in ``"x"`` and labels in ``"y"``.

    Raises:
        ValueError: for a template or read-out of another width than the layers have, or slots without x and y.

    Source: [von Oswald et al. 2023, token construction; Bai et al. 2023, input format]
    """

    layers: tuple[Attention | FeedForward, ...]
    template: Float[Tensor, "tokens width"]
    readout: Float[Tensor, " width"]
    start: Float[Tensor, " d"]
    slots: Mapping[str, slice]

    def __post_init__(self) -> None:
        width = _check.array("template", self.template, shape=("tokens", "width")).shape[-1]
        _check.array("readout", self.readout, shape=(width,))
        if not {"x", "y"} <= set(self.slots):
            raise ValueError(f"slots are {sorted(self.slots)}, expected x and y among them")
        _check.array("start", self.start, shape=(self.slots["x"].stop - self.slots["x"].start,))
        for layer in self.layers:
            last = layer.query if isinstance(layer, Attention) else layer.first
            if last.shape[-1] != width:
                raise ValueError(f"a layer has width {last.shape[-1]}, expected {width}")

    def tokens(
        self, inputs: Float[Tensor, "*batch l d"], labels: Float[Tensor, "*batch l"], query: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch tokens width"]:
        """The tokens of a prompt: a token an example, and the query last.

        Raises:
            ValueError: for a prompt of another length or dimension.
        """
        length, dim = len(self.template) - 1, len(self.start)
        batch = _check.array("inputs", inputs, shape=("...", length, dim)).shape[:-2]
        _check.array("labels", labels, shape=(*batch, length))
        _check.array("query", query, shape=(*batch, dim))
        tokens = self.template.to(inputs).repeat(*batch, 1, 1)
        tokens[..., self.slots["x"]] = torch.cat([inputs, query[..., None, :]], dim=-2)
        first = -(query @ self.start.to(inputs))
        tokens[..., self.slots["y"]] = torch.cat([labels, first[..., None]], dim=-1)[..., None]
        return tokens

    def states(
        self, inputs: Float[Tensor, "*batch l d"], labels: Float[Tensor, "*batch l"], query: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "depth *batch tokens width"]:
        """The tokens before the first layer and after each one, shape ``(layers + 1, ..., l + 1, width)``.

        Raises:
            ValueError: for a prompt of another length or dimension.
        """
        states = [self.tokens(inputs, labels, query)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return torch.stack(states)

    def __call__(
        self, inputs: Float[Tensor, "*batch l d"], labels: Float[Tensor, "*batch l"], query: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch"]:
        """The predictions, shape ``(...)``.

        Raises:
            ValueError: for a prompt of another length or dimension.
        """
        tokens = self.tokens(inputs, labels, query)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[..., -1, :] @ self.readout.to(tokens)


def gradient_descent(
    dim: int,
    length: int,
    rates: Sequence[Number | Tensor] | Float[Tensor, " steps"],
    *,
    start: Float[Tensor, " d"] | None = None,
    shrink: Number = 0.0,
) -> Network:
    """Linear attention whose layers are steps of gradient descent on the squared error of the context.

    .. math::
        w_{k+1} = w_k - \\eta_k \\nabla L(w_k), \\qquad
        L(w) = \\frac1{2l} \\sum_{i \\le l} (\\langle w, x_i \\rangle - y_i)^2

    Tokens are :math:`(x_i; y_i)` and :math:`(x_{l+1}; -\\langle w_0, x_{l+1} \\rangle)`. Scores are inner products of
    inputs; the value of an example is :math:`\\eta_k (\\langle w_0, x_j \\rangle - y_j) / l` in the label slot. After
    k layers the label slots hold :math:`y_i - \\langle w_k - w_0, x_i \\rangle` and, for the query, minus the
    prediction. A matrix :math:`\\eta_k` preconditions the step. With ``shrink`` (GD++) a second head adds
    :math:`-\\gamma \\sum_j x_j x_j^\\top x_i` to the inputs, which turns their singular values s into
    :math:`s (1 - \\gamma s^2)` in each layer.

    Args:
        dim: dimension d.
        length: number l of examples.
        rates: learning rates :math:`\\eta_k`, one a layer; each a number or a matrix of shape ``(d, d)``.
        start: :math:`w_0`, shape ``(d,)``; 0 if missing.
        shrink: :math:`\\gamma` of GD++, at least 0; a start is not possible with it.

    Returns:
        :class:`Network` with one layer a rate.

    Raises:
        ValueError: for sizes below 1, no rates or rates that are not finite, a start of another shape, or a start
            together with a positive shrink.

    Source: [von Oswald et al. 2023, Proposition 1 and GD++; preconditioned: Ahn et al. 2023]
    """
    dim, length = _check.integer("dim", dim), _check.integer("length", length)
    shrink = _check.number("shrink", shrink, least=0.0)
    eye = _eye(dim + 1)
    start = eye.new_zeros(dim) if start is None else _check.array("start", start, shape=(dim,)).double().cpu()
    if shrink > 0 and start.any():
        raise ValueError(f"start is {start.tolist()} with shrink {shrink:g}, expected one of the two")
    x, y = eye[:dim], eye[dim:]
    residual = y.mT @ (start @ x - y) / length
    shrinking = [(x, x, -shrink * x.mT @ x)] if shrink > 0 else []
    layers = [
        _attention([(rate.mT @ x, x, residual), *shrinking], "linear", "context") for rate in _matrices(rates, dim)
    ]
    return _plain(layers, start, length)


def softmax_descent(
    dim: int, length: int, rates: Sequence[Number | Tensor] | Float[Tensor, " steps"], *, sharpness: Number
) -> Network:
    """Softmax attention whose layers are nearly steps of gradient descent, on inputs less their mean.

    .. math::
        \\frac{\\mathrm{softmax}_j(\\beta s_j) - \\mathrm{softmax}_j(-\\beta s_j)}{2 \\beta}
        = \\frac1l (s_j - \\bar s) + O(\\beta^2), \\qquad s_j = \\langle x_i, \\eta_k x_j \\rangle

    Two heads with opposite scores do what one linear head does, except that a softmax cannot see what all scores
    have in common. So the layers descend the squared error of a regression with an intercept, which is fitted at
    every step and left out of the prediction: :math:`\\nabla L` is taken at the inputs :math:`x_i - \\bar x`.

    Args:
        dim: dimension d.
        length: number l of examples.
        rates: learning rates :math:`\\eta_k`, one a layer; each a number or a matrix of shape ``(d, d)``.
        sharpness: :math:`\\beta`, above 0; the error is of order :math:`\\beta^2` for small :math:`\\beta`.

    Returns:
        :class:`Network` with one layer a rate.

    Raises:
        ValueError: for sizes below 1, no rates or rates that are not finite, or a sharpness that is not above 0.

    Source: [this book, "One layer is one step"; two softmax heads: von Oswald et al. 2023]
    """
    dim, length = _check.integer("dim", dim), _check.integer("length", length)
    sharpness = _check.number("sharpness", sharpness, above=0.0)
    eye = _eye(dim + 1)
    x, y = eye[:dim], eye[dim:]
    layers = [
        _attention(
            [(sign * sharpness * rate.mT @ x, x, -sign / (2 * sharpness) * y.mT @ y) for sign in (1, -1)],
            "softmax",
            "context",
        )
        for rate in _matrices(rates, dim)
    ]
    return _plain(layers, eye.new_zeros(dim), length)


def proximal_descent(
    dim: int,
    length: int,
    rate: Number,
    steps: int,
    *,
    ridge: Number = 0.0,
    lasso: Number = 0.0,
    bound: Number = 1e6,
) -> Network:
    """ReLU attention and small networks that run ridge regression and the lasso by proximal gradient descent.

    .. math::
        w \\leftarrow S_{\\eta \\, \\mathrm{lasso} / 2l} \\Bigl( w - \\frac\\eta l \\Bigl[
        \\sum_{i \\le l} (\\langle w, x_i \\rangle - y_i) \\, x_i + \\mathrm{ridge} \\; w \\Bigr] \\Bigr), \\qquad
        S_t(w) = \\mathrm{relu}(w - t) - \\mathrm{relu}(-w - t)

    which descends
    :math:`\\lVert y - X w \\rVert^2 + \\mathrm{ridge} \\lVert w \\rVert^2 + \\mathrm{lasso} \\lVert w \\rVert_1`.
    Every token keeps a copy of w. Two heads with the scores :math:`\\pm(\\langle w, x_j \\rangle - y_j)` add
    :math:`\\mp \\frac\\eta l x_j` to it, for :math:`\\mathrm{relu}(z) - \\mathrm{relu}(-z) = z`; a third, whose
    score is 1, shrinks it; a network of 4 d neurons is the soft threshold. The query is kept out by subtracting
    ``bound`` from its scores. A last layer writes :math:`\\langle w, x_i \\rangle` into every token.

    Args:
        dim: dimension d.
        length: number l of examples.
        rate: learning rate :math:`\\eta`, above 0.
        steps: number of steps.
        ridge, lasso: penalties against the summed squared error, at least 0.
        bound: larger than any misfit of the query token, which else counts as an example.

    Returns:
        :class:`Network`; a token holds w in the slot ``"w"`` and its prediction in ``"p"``.

    Raises:
        ValueError: for sizes below 1, a rate or bound that is not above 0, or a negative penalty.

    Source: [Bai et al. 2023, in-context ridge regression and lasso]
    """
    bench = _Workbench(dim, _check.integer("length", length), 0, 1, bound)
    ridge, lasso = _check.number("ridge", ridge, least=0.0), _check.number("lasso", lasso, least=0.0)
    rate = _check.number("rate", rate, above=0.0)
    step: list[Attention | FeedForward] = [bench.descend(rate, [ridge])]
    if lasso > 0:
        step.append(bench.threshold(rate * lasso / (2 * bench.n_train)))
    return bench.network([*step * _check.integer("steps", steps), bench.predict()], "p")


def model_selection(
    dim: int,
    n_train: int,
    n_valid: int,
    penalties: Sequence[Number],
    *,
    rate: Number,
    steps: int,
    gap: Number,
    bound: Number = 1e6,
) -> Network:
    """A Transformer that fits several ridge regressions in context, and answers with the one that validates best.

    .. math::
        L_k = \\frac1{n_{\\mathrm{valid}}} \\sum_{j \\text{ valid}} (\\langle w_k, x_j \\rangle - y_j)^2, \\qquad
        c_k = \\mathrm{relu}\\Bigl(1 - \\frac1{\\mathrm{gap}} \\sum_{j \\ne k} \\mathrm{relu}(L_k - L_j)\\Bigr), \\qquad
        \\hat y = \\sum_k c_k \\langle w_k, x_{l+1} \\rangle

    The models descend side by side on the first examples, as in :func:`proximal_descent`; the others validate. c is
    exactly one-hot if the best loss is smaller than all others by ``gap``; if not, close models count too.

    Args:
        dim: dimension d.
        n_train: number of examples that train; they come first.
        n_valid: number of examples that validate.
        penalties: of the models, against the summed squared error of the training examples, at least 0.
        rate: learning rate :math:`\\eta`, above 0.
        steps: number of steps.
        gap: smallest difference of losses that decides alone, above 0.
        bound: larger than any misfit, or examples count where they should not.

    Returns:
        :class:`Network` for prompts of ``n_train + n_valid`` examples; a token holds the weights in the slot ``"w"``,
        predictions in ``"p"``, losses in ``"loss"`` and c in ``"chosen"``, one entry or block a model.

    Raises:
        ValueError: for sizes below 1, fewer than two penalties or a negative one, or a rate, gap or bound that is not
            above 0.

    Source: [Bai et al. 2023, post-ICL validation]
    """
    values = [_check.number("penalty", penalty, least=0.0) for penalty in _check.numbers_of("penalties", penalties)]
    if len(values) < 2:
        raise ValueError(f"penalties is {values}, expected at least two numbers")
    bench = _Workbench(dim, n_train, _check.integer("n_valid", n_valid), len(values), bound)
    rate, gap = _check.number("rate", rate, above=0.0), _check.number("gap", gap, above=0.0)
    step = [bench.descend(rate, values)]
    vote: list[Attention | FeedForward] = [bench.predict(), bench.validate(), *bench.choose(gap), bench.combine()]
    return bench.network([*step * _check.integer("steps", steps), *vote], "out")


class _Workbench:
    """Tokens with named slots, and the layers that compute with them; all scores are relu of sums of products."""

    def __init__(self, dim: int, n_train: int, n_valid: int, models: int, bound: Number) -> None:
        self.dim, self.n_train, self.n_valid = _check.integer("dim", dim), _check.integer("n_train", n_train), n_valid
        self.models, self.bound = models, _check.number("bound", bound, above=0.0)
        self.n_tokens = self.n_train + n_valid + 1
        sizes = {"x": dim, "y": 1, "one": 1, "train": 1, "valid": 1, "w": models * dim, "p": models}
        if n_valid:
            sizes |= {"loss": models, "worse": models, "chosen": models, "out": 1}
        self.slots, width = {}, 0
        for name, size in sizes.items():
            self.slots[name] = slice(width, width + size)
            width += size
        self.eye = _eye(width)

    def rows(self, name: str, model: int = 0) -> Tensor:
        """The rows that read a slot, or the part of it that belongs to a model, shape (size, width)."""
        rows = self.eye[self.slots[name]]
        size = len(rows) // self.models if name in ("w", "p", "loss", "worse", "chosen") else len(rows)
        return rows[model * size : (model + 1) * size]

    def product(self, query: Tensor, key: Tensor, value: Tensor, seen: str | None = None) -> list[Head]:
        """Two heads that add <query e_i, key e_j> value e_j for the tokens j whose slot ``seen`` is 1."""
        if seen is None:
            return [(query, key, value), (-query, key, -value)]
        one = self.rows("one")
        key = torch.cat([key, one - self.rows(seen)])
        return [(torch.cat([sign * query, -self.bound * one]), key, sign * value) for sign in (1, -1)]

    def misfit(self, model: int, value: Tensor, seen: str) -> list[Head]:
        """Two heads that add (<w, x_j> - y_j) value e_j."""
        query = torch.cat([self.rows("w", model), -self.rows("one")])
        return self.product(query, torch.cat([self.rows("x"), self.rows("y")]), value, seen)

    def descend(self, rate: float, penalties: Sequence[float]) -> Attention:
        """A step of gradient descent for every model; all tokens hold the same w, so that its mean is w."""
        heads, one = [], self.rows("one")
        for model, penalty in enumerate(penalties):
            w, scale = self.rows("w", model), rate / self.n_train
            heads += self.misfit(model, -scale * w.mT @ self.rows("x"), "train")
            shrink = scale * penalty / self.n_tokens
            heads += [(one, one, -shrink * w.mT @ w)] if shrink > 0 else []
        return _attention(heads, "relu", "all")

    def threshold(self, level: float) -> FeedForward:
        """w becomes relu(w - level) - relu(-w - level), entry by entry."""
        w, one = self.rows("w"), self.rows("one")
        first = torch.cat([w - level * one, -w - level * one, w, -w])
        return FeedForward(first, torch.cat([w.mT, -w.mT, -w.mT, w.mT], dim=1))

    def predict(self) -> Attention:
        """Every token computes <w, x_i> for every model."""
        heads, one = [], self.rows("one")
        for model in range(self.models):
            value = self.rows("p", model).mT @ one / self.n_tokens
            heads += self.product(self.rows("x"), self.rows("w", model), value)
        return _attention(heads, "relu", "all")

    def validate(self) -> Attention:
        """Every token computes the losses: the score is a misfit, the value is the same misfit."""
        heads = []
        for model in range(self.models):
            value = self.rows("loss", model).mT @ (self.rows("p", model) - self.rows("y")) / self.n_valid
            heads += self.misfit(model, value, "valid")
        return _attention(heads, "relu", "all")

    def choose(self, gap: float) -> list[FeedForward]:
        """First by how much a model is worse than others, then 1 for the best and 0 for those worse by the gap."""
        loss, worse = self.eye[self.slots["loss"]], self.eye[self.slots["worse"]]
        k, j = (1 - _eye(self.models)).nonzero().T
        compare = FeedForward(loss[k] - loss[j], worse[k].mT)
        return [compare, FeedForward(self.rows("one") - worse / gap, self.eye[self.slots["chosen"]].mT)]

    def combine(self) -> Attention:
        """Every token computes the sum of its predictions, weighted by the choice."""
        heads, value = [], self.rows("out").mT @ self.rows("one") / self.n_tokens
        for model in range(self.models):
            heads += self.product(self.rows("p", model), self.rows("chosen", model), value)
        return _attention(heads, "relu", "all")

    def network(self, layers: Sequence[Attention | FeedForward], output: str) -> Network:
        """The layers with the tokens they expect."""
        template = self.eye.new_zeros(self.n_tokens, len(self.eye))
        template[:, self.slots["one"]] = 1
        template[: self.n_train, self.slots["train"]] = 1
        template[self.n_train : -1, self.slots["valid"]] = 1
        start = self.eye.new_zeros(self.dim)
        return Network(tuple(layers), template, self.rows(output)[0], start, self.slots)


def _eye(size: int) -> Tensor:
    """The identity; weights are written on the CPU, and go to the tokens when they meet them."""
    return torch.eye(size, dtype=torch.float64, device="cpu")


def _attention(heads: Sequence[Head], activation: str, mask: str) -> Attention:
    """A layer with the given heads; queries and keys of smaller rank are filled up with zeros."""
    rank = max(len(query) for query, _, _ in heads)
    query, key = (
        torch.stack([torch.nn.functional.pad(head[i], (0, 0, 0, rank - len(head[i]))) for head in heads])
        for i in (0, 1)
    )
    return Attention(query, key, torch.stack([value for _, _, value in heads]), activation, mask)


def _matrices(rates: Sequence[Number | Tensor] | Tensor, dim: int) -> list[Tensor]:
    """One matrix of shape (dim, dim) a learning rate."""
    values = _check.numbers_of("rates", rates)
    if not values:
        raise ValueError("rates is empty, expected at least one learning rate")
    eye = _eye(dim)
    return [
        _check.array("rate", rate, shape=(dim, dim)).double().cpu()
        if isinstance(rate, Tensor) and rate.ndim > 0
        else _check.number("rate", rate) * eye
        for rate in values
    ]


def _plain(layers: Sequence[Attention], start: Tensor, length: int) -> Network:
    """Tokens that hold an input and a label; the prediction is minus the label slot of the query."""
    dim = len(start)
    readout = -_eye(dim + 1)[dim]
    slots = {"x": slice(0, dim), "y": slice(dim, dim + 1)}
    return Network(tuple(layers), readout.new_zeros(length + 1, dim + 1), readout, start, slots)
