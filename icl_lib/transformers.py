"""Small softmax Transformers trained for real, many runs at once, with snapshots: emergence and grokking."""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from icl_lib import _check, sweeps
from icl_lib._check import Number
from icl_lib.sequences import Examples, ModularAddition, Repeats

__all__ = [
    "Architecture",
    "Trajectory",
    "answer_logits",
    "attention_factors",
    "attention_patterns",
    "emergence_window",
    "head_scores",
    "initial_weights",
    "logits",
    "train",
]

Task = Repeats | ModularAddition
Weights = dict[str, Tensor]  # by name, see initial_weights
BETAS, EPSILON = (0.9, 0.98), 1e-8  # of AdamW
SAVE_EVERY = 60.0  # seconds from one write of an unfinished training to the next
_FILES = [Path(__file__).with_name(f"{name}.py") for name in ("sequences", "transformers")]
_SOURCE = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()  # stored trainings depend on it


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Transformer without LayerNorm and without biases.

    Args:
        layers: number of layers, each of attention and, if there are neurons, an MLP.
        heads: number of heads of a layer, a divisor of ``dim``; a head has the dimension ``dim / heads``.
        dim: dimension D of the residual stream.
        width: number of ReLU neurons of the MLP; 0 for attention only.
        scale: standard deviation of the initial weights; :math:`1 / \\sqrt D` if missing.

    Raises:
        ValueError: for sizes below 1, heads that do not divide the dimension, or a scale that is not above 0.

    Source: [this book, "Emergence"]
    """

    layers: int = 2
    heads: int = 2
    dim: int = 32
    width: int = 0
    scale: Number | None = None

    def __post_init__(self) -> None:
        _check.integer("layers", self.layers), _check.integer("width", self.width, least=0)
        if _check.integer("dim", self.dim) % _check.integer("heads", self.heads):
            raise ValueError(f"heads is {self.heads}, expected a divisor of {self.dim}, the dimension")
        if self.scale is not None:
            _check.number("scale", self.scale, above=0.0)

    def shapes(self, inputs: int, outputs: int, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of one run, by name, for given numbers of input and output tokens and positions."""
        d, d_h = self.dim, self.dim // self.heads
        read = (self.layers, d, self.heads, d_h)
        shapes: dict[str, tuple[int, ...]] = {"embed": (inputs, d), "position": (length, d)}
        shapes |= {"query": read, "key": read, "value": read, "output": (self.layers, self.heads, d_h, d)}
        if self.width:
            shapes |= {"mlp_in": (self.layers, d, self.width), "mlp_out": (self.layers, self.width, d)}
        return shapes | {"unembed": (d, outputs)}


@dataclass(frozen=True)
class Trajectory:
    """Training runs of one setting: weights and scores at the recorded steps.

    Args:
        steps: numbers of the recorded steps, shape ``(times,)``, on the CPU.
        weights: weights by name, shapes ``(times, runs, ...)``, see :func:`initial_weights`.
        loss: mean cross-entropy on each set, by the name of the set, shape ``(times, runs)``.
        accuracy: part of the scored answers that are right, alike.
        sets: the sets themselves, by name, with a leading axis of runs.

    Source: [this book, "Emergence"]
    """

    steps: Int[Tensor, " times"]
    weights: Weights
    loss: dict[str, Tensor]
    accuracy: dict[str, Tensor]
    sets: dict[str, Examples]


def initial_weights(
    task: Task,
    architecture: Architecture,
    *,
    generators: Sequence[torch.Generator],
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Independent normal weights, one run a generator.

    ``embed`` (inputs, D), ``position`` (length, D), ``query``, ``key``, ``value`` (layers, D, heads, d_h), ``output``
    (layers, heads, d_h, D), ``mlp_in`` (layers, D, width), ``mlp_out`` (layers, width, D), ``unembed`` (D, outputs).

    Args:
        task: :class:`Repeats` or :class:`ModularAddition`, which fix the numbers of tokens and positions.
        architecture: the other sizes, and the standard deviation.
        generators: sources of randomness, one a run; the weights live on their device.
        dtype: float32 or float64.

    Returns:
        Weights by name, each with a leading axis of runs.

    Raises:
        ValueError: for another task, no generator, or another dtype.

    Source: [this book, "Emergence"]
    """
    if not isinstance(task, (Repeats, ModularAddition)):
        raise ValueError(f"task is of type {type(task).__name__}, expected Repeats or ModularAddition")
    _check.instance("architecture", architecture, Architecture)
    _check.dtype(dtype)
    shapes = architecture.shapes(*task.sizes)
    size = sum(map(math.prod, shapes.values()))
    scale = architecture.dim**-0.5 if architecture.scale is None else architecture.scale
    rows = [torch.randn(size, generator=g, device=g.device, dtype=dtype) for g in _sources(generators)]
    return _named(scale * torch.stack(rows), shapes)


def logits(weights: Weights, tokens: Int[Tensor, "runs n length"]) -> Float[Tensor, "runs n length outputs"]:
    """Outputs of the Transformer at all positions.

    .. math::
        \\begin{aligned}
        h_t &\\leftarrow h_t + \\sum_{\\text{heads}} \\sum_{s \\le t} A_{ts} \\, h_s W_V W_O, \\qquad
            A_{ts} = \\mathrm{softmax}_{s \\le t} \\,
            \\frac{(h_t + \\pi_t) W_Q W_K^\\top (h_s + \\pi_s)^\\top}{\\sqrt{d_h}} \\\\
        h_t &\\leftarrow h_t + \\mathrm{ReLU}(h_t W_{\\mathrm{in}}) \\, W_{\\mathrm{out}}
            \\qquad \\text{(with an MLP)}
        \\end{aligned}

    layer by layer, from the embedded tokens to the logits :math:`h_t W_U`. The positions :math:`\\pi` enter queries and
    keys only: heads compare places, but move nothing but content.

    Args:
        weights: weights by name, each with a leading axis of runs, see :func:`initial_weights`.
        tokens: one set of sequences a run, shape ``(runs, n, length)``.

    Returns:
        Logits of shape ``(runs, n, length, outputs)``; those of a run depend on its own weights and tokens only.

    Raises:
        ValueError: for weights that are missing or not finite, or tokens that the embedding does not have.

    Source: [Elhage et al. 2021, attention-only Transformers; positions: this book, "Emergence"]
    """
    _check_call(weights, tokens)
    return _logits(weights, tokens)


def answer_logits(weights: Weights, tokens: Int[Tensor, "runs n length"]) -> Float[Tensor, "runs n outputs"]:
    """Logits at the last position of one layer, for sequences that all end in the same token: an exact shortcut.

    The query is then a constant, and a head reads tables over tokens x and positions t, with one row to add up a place:

    .. math::
        \\frac{\\sum_t e^{s_t(x_t)} E_{x_t} W_V}{\\sum_t e^{s_t(x_t)}}, \\qquad
        s_t(x) = \\frac{(E_x + \\pi_t) W_K W_Q^\\top (E_{x_T} + \\pi_T)^\\top}{\\sqrt{d_h}}

    Args:
        weights: weights of one layer by name, each with a leading axis of runs.
        tokens: one set of sequences a run, shape ``(runs, n, length)``, all with the same last token.

    Returns:
        Those of :func:`logits` at the last position, shape ``(runs, n, outputs)``.

    Raises:
        ValueError: as :func:`logits`, and for more layers, different last tokens, or scores of a head that lie so far
            apart (87 in float32) that exponentials vanish.

    Source: [this book, "Grokking"]
    """
    _check_call(weights, tokens)
    if (layers := weights["query"].shape[1]) != 1:
        raise ValueError(f"weights have {layers} layers, expected 1")
    if not _check.every((last := tokens[..., -1]) == last[0, 0]):
        raise ValueError(f"tokens end in {last.unique().tolist()}, expected the same last token everywhere")
    result = _answer_logits(weights, tokens)
    if not _check.all_finite(result):
        raise ValueError("weights give scores that lie too far apart, expected smaller ones, or a call of logits")
    return result


def attention_patterns(
    weights: Weights, tokens: Int[Tensor, "runs n length"]
) -> Float[Tensor, "runs layers heads n length length"]:
    """Attention weights :math:`A_{ts}` of all heads, as in :func:`logits`: how much position t takes from position s.

    Args:
        weights: weights by name, each with a leading axis of runs, see :func:`initial_weights`.
        tokens: one set of sequences a run, shape ``(runs, n, length)``.

    Returns:
        Weights of shape ``(runs, layers, heads, n, t, s)``; they sum to 1 over s, and vanish for s > t.

    Raises:
        ValueError: as :func:`logits`.

    Source: [Elhage et al. 2021, attention patterns]
    """
    _check_call(weights, tokens)
    seen: list[Tensor] = []
    _logits(weights, tokens, seen)
    (runs, n, t), (layers, _, heads, _) = tokens.shape, weights["query"].shape[1:]
    return torch.stack(seen).view(layers, heads, runs, n, t, t).movedim(2, 0)


def head_scores(
    patterns: Float[Tensor, "runs layers heads n length length"], tokens: Int[Tensor, "runs n length"]
) -> tuple[Float[Tensor, "runs layers heads"], Float[Tensor, "runs layers heads"]]:
    """How far each head looks at the previous token, and how far behind an earlier copy of the current one.

    .. math::
        \\mathrm{previous} = \\langle A_{t,t-1} \\rangle_{t \\ge 1}, \\qquad
        \\mathrm{induction} = \\Bigl\\langle \\sum_{s \\le t:\\, x_{s-1} = x_t} A_{ts} \\Bigr\\rangle

    The second mean is over positions whose token has occurred before.

    Args:
        patterns: attention weights from :func:`attention_patterns`.
        tokens: the sequences they belong to, shape ``(runs, n, length)``, with some token that occurs twice.

    Returns:
        Previous-token scores and induction scores, each between 0 and 1, shape ``(runs, layers, heads)``.

    Raises:
        ValueError: for tokens that do not fit the patterns, or sequences of a run without any repetition.

    Source: [Olsson et al. 2022, as summarised: previous-token heads and induction heads]
    """
    runs, n, length = tokens.shape
    _check.array("patterns", patterns, shape=(runs, "layers", "heads", n, length, length))
    before = torch.arange(length, device=tokens.device)
    copies = (tokens[..., :, None] == tokens[..., None, :]) & (before < before[:, None])  # x_t = x_s with s < t
    has_copy = copies.any(-1)  # (runs, n, t)
    if not _check.every(has_copy.any(-1).any(-1)):
        raise ValueError("tokens has a run in which no token occurs twice, expected sequences that repeat some")
    behind = functional.pad(copies[..., :-1], (1, 0))  # one place on
    found = (patterns * behind[:, None, None]).sum((-1, -2, -3))
    return patterns.diagonal(-1, -2, -1).mean((-1, -2)), found / has_copy.sum((-1, -2))[:, None, None]


def attention_factors(weights: Weights, circuit: str, summed: bool = False) -> tuple[Tensor, Tensor]:
    """Thin factors A and B of what a head compares (QK), or of what it moves (OV).

    .. math:: M_{QK} = W_Q W_K^\\top, \\qquad M_{OV} = W_V W_O, \\qquad M = A B

    Args:
        weights: weights by name with any leading axes, as in :class:`Trajectory`.
        circuit: ``"QK"`` or ``"OV"``.
        summed: take the sum over the heads of a layer instead of one product a head.

    Returns:
        A of shape ``(..., layers, heads, D, d_h)`` and B of shape ``(..., layers, heads, d_h, D)``; if summed, both of
        shape ``(..., layers, D, D)``.

    Raises:
        ValueError: for another circuit.

    Source: [Elhage et al. 2021, QK and OV circuits]
    """
    names = ("query", "key") if _check.among("circuit", circuit, ("QK", "OV")) == "QK" else ("value", "output")
    for name in names:
        _check.array(f"weights[{name!r}]", weights.get(name), shape=("...", "layers", "", "", ""))
    left, right = (weights[name] for name in names)  # (..., layers, D, heads, d_h), the output (..., heads, d_h, D)
    right = right.movedim(-3, -1) if circuit == "QK" else right
    return (left.flatten(-2), right.flatten(-3, -2)) if summed else (left.movedim(-2, -3), right)


def train(
    task: Task,
    architecture: Architecture,
    *,
    generators: Sequence[torch.Generator],
    n_steps: int,
    learning_rate: Number,
    weight_decay: Number = 0.0,
    warm_up: int = 0,
    every: int = 20,
    hold: int | None = None,
    dtype: torch.dtype = torch.float32,
    store: str | os.PathLike[str] | None = None,
) -> Trajectory:
    """Train Transformers with AdamW on the mean cross-entropy, one run a generator, stacked along a leading axis.

    .. math:: w \\leftarrow (1 - \\eta \\lambda) \\, w - \\eta \\, \\frac{\\hat m}{\\sqrt{\\hat v} + 10^{-8}}

    with the running means :math:`\\hat m` and :math:`\\hat v` of the gradient and of its square, which forget by .9 and
    .98 a step. A run takes its weights, sets and batches from its own generator and nothing mixes the runs: each is
    what it would be alone, up to rounding.

    Args:
        task: :class:`Repeats` or :class:`ModularAddition`.
        architecture: sizes and scale of the weights.
        generators: sources of randomness, one a run; everything lives on their device.
        n_steps: number of steps.
        learning_rate: :math:`\\eta`, above 0.
        weight_decay: :math:`\\lambda`, at least 0.
        warm_up: number of first steps in which the learning rate grows to its value, linearly.
        every: record every so many steps; step 0 and the last one are always recorded.
        hold: step from which on :math:`W_Q` and :math:`W_K` of every head keep the column spaces that they have then.
        dtype: of the weights, float32 or float64.
        store: file for the state of the training, written about once a minute and at the end. A call with the same
            arguments goes on from there, to the same bits as without the interruption.

    Returns:
        :class:`Trajectory`.

    Raises:
        ValueError: for sizes below 1, a learning rate that is not above 0, a negative weight decay, weights that
            diverge, or a store that holds something else.

    Source: [Loshchilov & Hutter 2019, AdamW; setting: this book, "Emergence"]
    """
    n_steps, every = _check.integer("n_steps", n_steps), _check.integer("every", every)
    rate = _check.number("learning_rate", learning_rate, above=0.0)
    decay = _check.number("weight_decay", weight_decay, least=0.0)
    warm_up = _check.integer("warm_up", warm_up, least=0)
    hold = None if hold is None else _check.integer("hold", hold, least=0)
    setting = (task, architecture, n_steps, rate, decay, warm_up, every, hold, dtype, str(torch.__version__), _SOURCE)
    states = b"".join(g.get_state().numpy().tobytes() for g in _sources(generators))
    identity = hashlib.sha256(repr(setting).encode() + states).hexdigest()

    weights = initial_weights(task, architecture, generators=generators, dtype=dtype)
    sets = {name: _stack(rows) for name, rows in _by_name([task.sets(generator=g) for g in generators]).items()}
    flat = torch.cat([weight.flatten(1) for weight in weights.values()], 1)  # (runs, weights)
    state: dict[str, Any] = {"identity": identity, "step": 0, "flat": flat, "bases": {}, "records": []}
    state |= {"first": torch.zeros_like(flat), "second": torch.zeros_like(flat)}
    state |= {"generators": [g.get_state() for g in generators]}
    if store is not None:
        store = Path(store).expanduser()
        store.parent.mkdir(parents=True, exist_ok=True)
        state = _load(store, state)
    for g, drawn in zip(generators, state["generators"], strict=True):
        g.set_state(drawn.cpu())

    shapes = architecture.shapes(*task.sizes)
    flat, bases, records = state["flat"], state["bases"], state["records"]
    weights, saved = _named(flat, shapes), time.monotonic()  # views: they follow the table
    for step in range(state["step"], n_steps + 1):
        if step % every == 0 or step == n_steps:
            if not _check.all_finite(flat):
                raise ValueError(f"learning_rate is {rate:g}, expected a smaller one: weights diverge by step {step}")
            if store is not None and time.monotonic() - saved >= SAVE_EVERY:
                _save(store, state | {"step": step}, generators)
                saved = time.monotonic()
            scores = {name: _scores(task, weights, examples) for name, examples in sets.items()}
            records.append({"step": step, "flat": flat.clone(), **scores})
        if step == hold:
            bases |= {name: torch.linalg.qr(weights[name].movedim(-2, -3)).Q for name in ("query", "key")}
        if step < n_steps:
            fresh = [task.sample(task.batch, generator=g) for g in generators] if isinstance(task, Repeats) else None
            gradient = _gradient(task, flat, shapes, _stack(fresh) if fresh else sets["train"])
            pace = min(1.0, (step + 1) / max(warm_up, 1))
            _adamw(flat, gradient, state["first"], state["second"], step + 1, pace * rate, decay)
            for name, basis in bases.items():
                head = weights[name].movedim(-2, -3)  # (runs, layers, heads, D, d_h)
                head.copy_(basis @ (basis.mT @ head))
    if store is not None and state["step"] <= n_steps:
        _save(store, state | {"step": n_steps + 1}, generators)
    table = _by_name(records)
    losses, accuracies = ({name: torch.stack(table[name])[:, i] for name in sets} for i in (0, 1))
    steps = torch.tensor(table["step"], device="cpu")
    return Trajectory(steps, _named(torch.stack(table["flat"]), shapes), losses, accuracies, sets)


def emergence_window(
    steps: Int[Tensor, " times"], accuracy: Float[Tensor, " times"], threshold: Number = 0.4
) -> tuple[int, int, int] | None:
    """When an ability emerges: the step of the steepest rise, and the window around it with half of that slope.

    Args:
        steps: recorded steps, shape ``(times,)``, increasing.
        accuracy: held-out accuracy at these steps, shape ``(times,)``.
        threshold: the steepest rise is sought from where the accuracy first exceeds this.

    Returns:
        Steps :math:`(t^*, t_1, t_2)`: steepest slope, and first and last recorded step of the stretch around it where
        the slope exceeds half of the largest; ``None`` if the accuracy never exceeds the threshold.

    Raises:
        ValueError: for fewer than two steps, or shapes that do not fit.

    Source: [MT25, emergence window, as summarised; definition: this book, "Emergence"]
    """
    times = len(_check.array("accuracy", accuracy, shape=("times",)))
    if times < 2 or steps.shape != accuracy.shape:
        raise ValueError(f"steps has shape {tuple(steps.shape)}, accuracy ({times},), expected the same, at least (2,)")
    above = (accuracy > _check.number("threshold", threshold)).nonzero().flatten().tolist()
    if not above:
        return None
    (slope,) = torch.gradient(accuracy, spacing=(steps.to(accuracy),))
    peak = above[0] + int(slope[above[0] :].argmax())
    slow = (slope <= slope[peak] / 2).nonzero().flatten().tolist()
    first = max((i + 1 for i in slow if i < peak), default=0)
    last = min((i - 1 for i in slow if i > peak), default=times - 1)
    return int(steps[peak]), int(steps[first]), int(steps[last])


# The model.


def _logits(weights: Weights, tokens: Tensor, seen: list[Tensor] | None = None) -> Tensor:
    """:func:`logits`, unchecked; attention weights are put into `seen`, head by head.

    Products are batched over the r runs, in a head over runs and the n sequences.
    """
    embed, position = weights["embed"], weights["position"]
    (r, n, t), (heads, d_h) = tokens.shape, weights["query"].shape[-2:]
    mask = torch.full((t, t), -math.inf, dtype=embed.dtype, device=embed.device).triu(1)
    place = position[:, :t].repeat(1, n, 1)
    x = torch.bmm(_one_hot(tokens, embed), embed)  # (r, n t, D); indexing would scatter its gradient, slowly
    for layer in range(weights["query"].shape[1]):
        w_q, w_k, w_v = (weights[name][:, layer].flatten(-2) for name in ("query", "key", "value"))
        y = x + place
        read = (torch.bmm(y, w_q), torch.bmm(y, w_k), torch.bmm(x, w_v))  # (r, n t, heads d_h) each
        by_head = zip(*(z.view(r * n, t, heads, d_h).unbind(2) for z in read), strict=True)
        for (q, k, v), w_o in zip(by_head, weights["output"][:, layer].unbind(1), strict=True):
            attention = torch.baddbmm(mask, q, k.mT, alpha=d_h**-0.5).softmax(-1)
            if seen is not None:
                seen.append(attention)
            x = torch.baddbmm(x, torch.bmm(attention, v).view(r, n * t, d_h), w_o)
        x = _mlp(weights, layer, x)
    return torch.bmm(x, weights["unembed"]).view(r, n, t, -1)


def _answer_logits(weights: Weights, tokens: Tensor) -> Tensor:
    """:func:`answer_logits`, unchecked."""
    embed, position = weights["embed"], weights["position"]
    (r, n, t), (heads, d_h) = tokens.shape, weights["query"].shape[-2:]
    w_q, w_k, w_v, w_o = (weights[name][:, 0] for name in ("query", "key", "value", "output"))
    final = embed.index_select(1, tokens[0, 0, -1:])[:, 0]  # (r, D)
    query = torch.bmm((final + position[:, t - 1])[:, None], w_q.flatten(-2)).view(r, 1, heads, d_h) * d_h**-0.5
    key = (w_k * query).sum(-1)  # (r, D, heads)
    scores = torch.bmm(embed, key)[:, None] + torch.bmm(position[:, :t], key)[:, :, None]  # (r, t, inputs, heads)
    share = (scores - scores.detach().amax((1, 2), keepdim=True)).exp()[..., None]
    value = torch.bmm(embed, w_v.flatten(-2)).view(r, 1, -1, heads, d_h)
    table = torch.cat([share * value, share], -1).view(r, -1, heads * (d_h + 1))  # one row a place and token
    total = torch.bmm(_one_hot(tokens, embed).view(r, n, -1), table).view(r, n, heads, d_h + 1)  # summed over places
    norm = total[..., -1:].masked_fill(total[..., -1:] < torch.finfo(embed.dtype).tiny, math.nan)  # digits are lost
    seen = (total[..., :-1] / norm).flatten(-2)
    x = final[:, None] + torch.bmm(seen, w_o.flatten(-3, -2))
    return torch.bmm(_mlp(weights, 0, x), weights["unembed"])


def _predict(task: Task, weights: Weights, tokens: Tensor) -> Tensor:
    """Logits at the positions that have an answer; in float64 for sums, whose losses get tiny."""
    if isinstance(task, Repeats):
        return _logits(weights, tokens)
    one = weights["query"].shape[1] == 1
    return (_answer_logits(weights, tokens)[:, :, None] if one else _logits(weights, tokens)[:, :, -1:]).double()


def _mlp(weights: Weights, layer: int, x: Tensor) -> Tensor:
    if "mlp_in" not in weights:
        return x
    return torch.baddbmm(x, torch.bmm(x, weights["mlp_in"][:, layer]).relu(), weights["mlp_out"][:, layer])


def _one_hot(tokens: Tensor, embed: Tensor) -> Tensor:
    """Shape (runs, n t, inputs), in the dtype of the embedding."""
    places = tokens.flatten(1)[..., None]
    return embed.new_zeros(*places.shape[:2], embed.shape[-2]).scatter_(-1, places, 1.0)


# Training.


def _gradient(task: Task, flat: Tensor, shapes: dict[str, tuple[int, ...]], batch: Examples) -> Tensor:
    """Gradient of the loss of each run with respect to its own weights, shape (runs, weights)."""
    with torch.enable_grad():
        leaf = flat.detach().requires_grad_()
        loss = _cross_entropy(_predict(task, _named(leaf, shapes), batch.tokens), batch.targets)
        return torch.autograd.grad(loss.sum(), leaf)[0]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the answers of each run, shape (runs,)."""
    losses = functional.cross_entropy(outputs.flatten(0, 2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


@torch.no_grad()
def _scores(task: Task, weights: Weights, examples: Examples) -> Tensor:
    """Loss and accuracy of each run, shape (2, runs)."""
    outputs = _predict(task, weights, examples.tokens).double()
    right = (outputs.argmax(-1) == examples.targets) & examples.scored
    accuracy = right.double().sum((1, 2)) / examples.scored.sum((1, 2))
    return torch.stack([_cross_entropy(outputs, examples.targets), accuracy])


def _adamw(w: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float, decay: float) -> None:
    """One step of AdamW, in place."""
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    size = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    w.mul_(1 - rate * decay).addcdiv_(first, size, value=-rate / (1 - BETAS[0] ** step))


def _named(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Views of a table of shape (..., weights), by name."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()], -1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _by_name(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _stack(rows: list[Examples]) -> Examples:
    return Examples(*(torch.stack([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "scored")))


def _sources(generators: Sequence[torch.Generator]) -> list[torch.Generator]:
    if not isinstance(generators, Sequence) or not generators:
        raise ValueError(f"generators is {generators!r}, expected a sequence of torch.Generator, one a run")
    if len({id(g) for g in generators}) < len(generators):
        raise ValueError("generators holds one twice, expected a generator of its own for each run")
    return [_check.random("generator", g) for g in generators]


def _check_call(weights: Weights, tokens: Tensor) -> None:
    sizes = {name: "runs rows columns" for name in ("embed", "position", "unembed")} | {
        "query": "runs layers D heads d_h"
    }
    for name, axes in sizes.items():
        _check.array(f"weights[{name!r}]", weights.get(name), shape=tuple(axes.split()))
    inputs, length, outputs = weights["embed"].shape[1], weights["position"].shape[1], weights["unembed"].shape[2]
    runs, layers, _, heads, d_h = weights["query"].shape
    width = weights["mlp_in"].shape[-1] if "mlp_in" in weights else 0
    for name, shape in Architecture(layers, heads, heads * d_h, width).shapes(inputs, outputs, length).items():
        _check.array(f"weights[{name!r}]", weights.get(name), shape=(runs, *shape))
    if tokens.ndim != 3 or len(tokens) != runs or not 0 < tokens.shape[2] <= length or not tokens.numel():
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, expected ({runs}, n, at most {length})")
    if tokens.dtype != torch.int64 or not _check.every((tokens >= 0) & (tokens < inputs)):
        low, high = tokens.min().item(), tokens.max().item()
        raise ValueError(f"tokens are {tokens.dtype} from {low} to {high}, expected int64 from 0 to {inputs - 1}")


# The store.


def _save(store: str | os.PathLike[str], state: dict[str, Any], generators: Sequence[torch.Generator]) -> None:
    content = io.BytesIO()
    torch.save(state | {"generators": [g.get_state() for g in generators]}, content)
    sweeps._write(Path(store), content.getvalue())


def _load(store: str | os.PathLike[str], start: dict[str, Any]) -> dict[str, Any]:
    """The stored state of the training that begins so; its beginning if there is no file."""
    if not os.path.exists(store):
        return start
    try:
        state = torch.load(store, map_location=start["flat"].device, weights_only=True)
        same = state["identity"] == start["identity"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"store {store} cannot be read, expected the state of a training") from error
    if not same:
        raise ValueError(f"store {store} holds another training, expected one with these arguments and generators")
    return state
