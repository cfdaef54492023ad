"""Small Transformers: against a literal model, torch's AdamW, separate and interrupted runs; and what they learn."""

import math

import pytest
import torch

from icl_lib import spectral, transformers
from icl_lib.sequences import ModularAddition, Repeats
from icl_lib.transformers import Architecture

D = torch.float64
SMALL = Architecture(layers=2, heads=2, dim=8, width=6)
EMERGENCE = {"learning_rate": 3e-3, "weight_decay": 0.01}
GROKKING = {"learning_rate": 1e-2, "weight_decay": 2.0, "warm_up": 10}
TOKENS = torch.tensor([[[0, 2, 1, 4, 4], [3, 3, 0, 1, 4]], [[1, 2, 3, 0, 4], [2, 2, 4, 1, 4]]])  # (runs, n, length)


def sources(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def small_weights(architecture=SMALL, scale=1.0):
    weights = transformers.initial_weights(Repeats(5, 6, 2, 3), architecture, generators=sources(0, 1), dtype=D)
    return {name: scale * weight for name, weight in weights.items()}


def literal(weights, tokens, seen=None):
    """One run, one sequence, one position and one head after the other; attention weights go into `seen`."""
    x = weights["embed"][tokens]
    for layer in range(len(weights["query"])):
        y, moved = x + weights["position"][: len(x)], torch.zeros_like(x)
        for head in range(weights["query"].shape[2]):
            w_q, w_k, w_v = (weights[name][layer, :, head] for name in ("query", "key", "value"))
            for t in range(len(x)):
                scores = torch.stack([(y[t] @ w_q) @ (y[s] @ w_k) for s in range(t + 1)]) / math.sqrt(w_q.shape[1])
                share = scores.exp() / scores.exp().sum()
                if seen is not None:
                    seen[layer, head, t, : t + 1] = share
                moved[t] += (share @ x[: t + 1]) @ w_v @ weights["output"][layer, head]
        x = x + moved
        if "mlp_in" in weights:
            x = x + (x @ weights["mlp_in"][layer]).clamp_min(0) @ weights["mlp_out"][layer]
    return x @ weights["unembed"]


@pytest.mark.parametrize("architecture", [SMALL, Architecture(1, 4, 8), Architecture(3, 1, 4)])
def test_logits_are_those_of_the_literal_model(architecture):
    weights = small_weights(architecture)
    got = transformers.logits(weights, TOKENS)
    for run in range(2):
        own = {name: weight[run] for name, weight in weights.items()}
        for sequence in range(2):
            torch.testing.assert_close(got[run, sequence], literal(own, TOKENS[run, sequence]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [0, 6])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_shortcut_is_exact_and_so_are_its_gradients(width, scale):
    weights = small_weights(Architecture(1, 2, 8, width), scale)
    leaves = [weight.requires_grad_() for weight in weights.values()]
    short, full = transformers.answer_logits(weights, TOKENS), transformers.logits(weights, TOKENS)[:, :, -1]
    torch.testing.assert_close(short, full, rtol=1e-11, atol=1e-11)
    mix = torch.linspace(-1, 1, short.numel(), dtype=D).view_as(short)
    for a, b in zip(*(torch.autograd.grad((mix * x).sum(), leaves) for x in (short, full)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    single = {
        name: weight.detach().float() for name, weight in small_weights(Architecture(1, 2, 8, width), 0.5).items()
    }
    gap = transformers.answer_logits(single, TOKENS) - transformers.logits(single, TOKENS)[:, :, -1]
    assert gap.abs().max() < 1e-6


def test_the_shortcut_refuses_scores_that_exponentials_cannot_span():
    with pytest.raises(ValueError, match="scores that lie too far apart"):
        transformers.answer_logits(small_weights(Architecture(1, 2, 8), 30.0), TOKENS)


def test_factors_of_the_heads_are_their_matrices():
    weights = {name: weight[None] for name, weight in small_weights().items()}  # an axis of recorded steps
    for circuit, expected in (
        ("QK", torch.einsum("trldhe,trlfhe->trlhdf", weights["query"], weights["key"])),
        ("OV", torch.einsum("trldhe,trlhef->trlhdf", weights["value"], weights["output"])),
    ):
        left, right = transformers.attention_factors(weights, circuit)
        assert left.shape == (1, 2, 2, 2, 8, 4) and right.shape == (1, 2, 2, 2, 4, 8)
        torch.testing.assert_close(left @ right, expected)
        left, right = transformers.attention_factors(weights, circuit, summed=True)
        torch.testing.assert_close(left @ right, expected.sum(3))


def test_attention_patterns_and_head_scores_are_those_of_the_literal_model():
    weights = small_weights()
    patterns = transformers.attention_patterns(weights, TOKENS)
    previous, induction = transformers.head_scores(patterns, TOKENS)
    for run in range(2):
        own = {name: weight[run] for name, weight in weights.items()}
        seen = torch.zeros(2, 2, 2, 5, 5, dtype=D)  # (n, layers, heads, t, s)
        for sequence in range(2):
            literal(own, TOKENS[run, sequence], seen[sequence])
        torch.testing.assert_close(patterns[run], seen.movedim(0, 2))
        torch.testing.assert_close(previous[run], seen[..., range(1, 5), range(4)].mean((0, -1)))
        found = []  # at each place whose token came before: weight on the places behind earlier copies
        for sequence, tokens in enumerate(TOKENS[run].tolist()):
            for t, token in enumerate(tokens):
                places = [s for s in range(1, t + 1) if tokens[s - 1] == token]
                if places:
                    found.append(seen[sequence, ..., t, places].sum(-1))
        torch.testing.assert_close(induction[run], torch.stack(found).mean(0))


def test_adamw_is_that_of_torch(generator):
    start, gradients = torch.randn(2, 5, generator=generator), torch.randn(30, 2, 5, generator=generator)
    own, first, second = start.clone(), torch.zeros(2, 5), torch.zeros(2, 5)
    other = start.clone().requires_grad_()
    optimiser = torch.optim.AdamW([other], lr=0.02, betas=(0.9, 0.98), weight_decay=0.5, foreach=False)
    for step, gradient in enumerate(gradients, 1):
        transformers._adamw(own, gradient, first, second, step, 0.02, 0.5)
        other.grad = gradient.clone()
        optimiser.step()
    torch.testing.assert_close(own, other.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "architecture", "setting"),
    [(Repeats(), Architecture(scale=0.2), EMERGENCE), (ModularAddition(7), Architecture(1, 2, 8, 6), GROKKING)],
)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_stacked_runs_are_separate_runs(task, architecture, setting, dtype):
    setting = setting | {"n_steps": 12, "every": 5, "hold": 6, "dtype": dtype}
    stacked = transformers.train(task, architecture, generators=sources(3, 4), **setting)
    assert stacked.steps.tolist() == [0, 5, 10, 12]
    small = 1e-9 if dtype == D else 2e-3  # rounding, which AdamW magnifies where gradients are tiny
    for run, seed in enumerate((3, 4)):
        alone = transformers.train(task, architecture, generators=sources(seed), **setting)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(stacked.weights[name][:, run], weight[:, 0], rtol=small, atol=small)
        for name, loss in alone.loss.items():
            torch.testing.assert_close(stacked.loss[name][:, run], loss[:, 0], rtol=small, atol=small)
    start = transformers.initial_weights(task, architecture, generators=sources(3, 4), dtype=dtype)
    for name, weight in start.items():
        assert torch.equal(stacked.weights[name][0], weight)


@pytest.mark.parametrize("stop", [0, 7, 10, 14])
def test_a_killed_training_goes_on_to_the_same_bits(stop, tmp_path, monkeypatch):
    store, task = tmp_path / "new" / "state.pt", Repeats(5, 6, 2, 3)
    setting = EMERGENCE | {"n_steps": 15, "every": 5, "hold": 6}
    whole = transformers.train(task, SMALL, generators=sources(0, 1), **setting)
    update, done = transformers._adamw, []

    def killed(*arguments):
        done.append(1)
        if len(done) > stop:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(transformers, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(transformers, "_adamw", killed)
    with pytest.raises(KeyboardInterrupt):
        transformers.train(task, SMALL, generators=sources(0, 1), **setting, store=store)
    assert [path.name for path in store.parent.iterdir()] == ["state.pt"]
    monkeypatch.setattr(transformers, "_adamw", update)
    again = transformers.train(task, SMALL, generators=sources(0, 1), **setting, store=store)
    monkeypatch.setattr(transformers, "_adamw", None)  # a finished training is only read
    read = transformers.train(task, SMALL, generators=sources(0, 1), **setting, store=store)
    for run in (again, read):
        assert torch.equal(run.steps, whole.steps)
        for field in ("weights", "loss", "accuracy"):
            assert all(torch.equal(getattr(run, field)[name], x) for name, x in getattr(whole, field).items())
    for changes in ({"n_steps": 20}, {"generators": sources(0, 2)}, {"learning_rate": 1e-3}):
        with pytest.raises(ValueError, match="holds another training"):
            transformers.train(task, SMALL, **({"generators": sources(0, 1)} | setting | changes), store=store)
    store.write_bytes(store.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read, expected the state of a training"):
        transformers.train(task, SMALL, generators=sources(0, 1), **setting, store=store)


def test_held_column_spaces_do_not_move():
    setting = EMERGENCE | {"n_steps": 40, "every": 10}
    free = transformers.train(Repeats(), Architecture(), generators=sources(0), **setting)
    held = transformers.train(Repeats(), Architecture(), generators=sources(0), **setting, hold=20)
    for name in ("query", "key"):
        spaces = [run.weights[name].movedim(-2, -3).mT for run in (free, held)]  # rows span the column space
        moved, still = (spectral.subspace_distance(space[3:], space[2]) for space in spaces)
        assert moved.min() > 1e-2 and still.max() < 1e-6
        assert torch.equal(*(space[:3] for space in spaces))
        assert not torch.equal(*(space[3] for space in spaces))  # within the space they go on learning
    assert not torch.equal(free.weights["value"][4], held.weights["value"][4])


def test_more_layers_can_learn_sums_too():
    run = transformers.train(
        ModularAddition(5), SMALL, generators=sources(0), n_steps=40, **GROKKING | {"weight_decay": 0.0}
    )
    assert run.accuracy["train"][-1] > run.accuracy["train"][0] + 0.3
    for name, n in (("train", 18), ("held_out", 7)):
        share = run.accuracy[name] * n
        torch.testing.assert_close(share, share.round())  # every answer counts


def test_emergence_window_of_a_known_curve():
    t = torch.arange(0, 1500, 20)
    rise = 0.2 + 0.8 / (1 + torch.exp(-(t - 700.0) / 40))
    assert transformers.emergence_window(t, rise) == (700, 640, 760)  # half of the slope at 1.76 time constants
    assert transformers.emergence_window(t, rise.double() * 0.39) is None
    early = rise + 0.3 / (1 + torch.exp(-(t - 100.0) / 10)) - 0.3  # steeper, but below the threshold
    assert transformers.emergence_window(t, early) == (700, 640, 760)
    assert transformers.emergence_window(t[:36], rise[:36]) == (700, 640, 700)  # cut off at the end
