"""Grokking: the stored runs, one network trained here, the leak of ordered splits, and the only query."""

import importlib.resources
import math
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from scipy import stats

from icl_lib import spectral, transformers
from icl_lib.sequences import ModularAddition
from tests.zscore import assert_mean

M, D = 31, torch.float64
LAYER = transformers.Architecture(layers=1, heads=4, dim=48, width=128)
TABLE = pandas.read_csv(importlib.resources.files("icl_lib.data") / "grokking.csv")
PAIRS = torch.cartesian_prod(torch.arange(M), torch.arange(M), torch.tensor([M]))[None]
SUMS = PAIRS[0, :, :2].sum(-1) % M


def wide(column, name="sums"):
    return TABLE[TABLE["run"] == name].pivot(index="step", columns="seed", values=column)


def first(holds):
    return np.where(holds.any(), holds.idxmax(), np.nan)


GENERALISED = first(wide("held_out_accuracy") > 0.5)
LEARNED = np.isfinite(GENERALISED)


def slope(steps, chosen=LEARNED):
    """Slope of log steps against log time of generalisation, its error, half width of its interval at level 0.001."""
    fit = stats.linregress(np.log(GENERALISED[chosen]), np.log(steps[chosen]))
    return fit.slope, fit.stderr, stats.t.ppf(1 - 5e-4, chosen.sum() - 2) * fit.stderr


def fallen(column, name="sums", end=2400, level=0.5):
    frame = wide(column, name).loc[:end]
    return first(frame < level * frame.iloc[0])


@pytest.fixture(scope="module")
def quick():
    """Seed 6, which is not the one of the chapter, and generalises first."""
    generators = [torch.Generator().manual_seed(6)]
    setting = {"learning_rate": 0.01, "weight_decay": 2, "warm_up": 10}
    return transformers.train(ModularAddition(), LAYER, generators=generators, n_steps=280, **setting)


def test_stored_and_live(quick):
    sums, shuffled = (wide("held_out_accuracy", name) for name in ("sums", "shuffled"))
    memorised = first(wide("train_accuracy") > 0.99)
    assert (sums > 0.95).any().sum() == LEARNED.sum() == 11 and shuffled.max().max() < 0.1
    assert memorised.max() == 60 and (GENERALISED / memorised)[LEARNED].min() == 3
    then = np.array([sums[seed][step] for seed, step in enumerate(memorised)])
    assert then.max() < 1 / M + stats.norm.isf(1e-3) * math.sqrt((M - 1) / M**2 / 148)
    assert (then < 1 / M).sum() == 11  # below guessing
    assert stats.ttest_1samp(then, 1 / M, alternative="less").pvalue < 1e-3
    delays = (first(wide("held_out_loss") < 0.1) / first(wide("train_loss") < 0.01))[LEARNED]
    assert delays.min() == pytest.approx(1.2) and delays.max() < 8.5
    stored = np.log([wide(f"{part}_loss").iloc[:2] for part in ("train", "held_out")])
    fresh = np.log([quick.loss[part][:2] for part in ("train", "held_out")])
    far, near = (np.square(stored - x).mean((0, 1)) for x in (fresh, stored[..., 6:7]))
    assert far[6] < np.delete(near, 6).min() / 100 and far.argmin() == 6


def leak(modulus, share):
    m = round(share * modulus**2) / (modulus**2 - 1)
    return (1 - 1 / modulus) * (m + (1 - m) / modulus) + 1 / modulus**2


def test_leak():
    """A reader that knows mirrors and nothing else, on 200 shuffled tables; no mirrors are seen if pairs are split."""
    scores, mirrored = [], []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        sets = ModularAddition(shuffled=True, ordered=True).sets(generator=g)
        seen = torch.full((M, M), -1)
        seen[sets["train"].tokens[:, 0], sets["train"].tokens[:, 1]] = sets["train"].targets[:, 0]
        a, b, _ = sets["held_out"].tokens.T
        answers = torch.where(seen[b, a] < 0, torch.randint(M, a.shape, generator=g), seen[b, a])
        scores.append((answers == sets["held_out"].targets[:, 0]).double().mean())
        sets = ModularAddition(shuffled=True).sets(generator=g)
        both = [{tuple(pair) for pair in part.tokens[:, :2].tolist()} for part in sets.values()]
        mirrored.append(any((b, a) in both[0] for a, b in both[1]))
    assert_mean(torch.stack(scores), leak(M, 0.7))
    assert not any(mirrored)


def test_leak_of_networks():
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in range(8)]
    task, setting = ModularAddition(shuffled=True, ordered=True), {"learning_rate": 0.01, "weight_decay": 2}
    run = transformers.train(task, LAYER, generators=generators, n_steps=80, warm_up=10, every=80, **setting)
    assert run.accuracy["train"][-1].min() > 0.99
    assert_mean(run.accuracy["held_out"][-1], leak(M, 0.7))
    assert_mean(torch.tensor(wide("held_out_accuracy", "shuffled").loc[80].to_numpy()), 1 / M)  # split by pairs


def test_one_query():
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    start = transformers.initial_weights(ModularAddition(), LAYER, generators=generators, dtype=D)
    weights = {name: w.clone().requires_grad_() for name, w in start.items()}
    tokens = PAIRS[:, ::5].repeat(8, 1, 1)
    out = transformers.answer_logits(weights, tokens)
    v = (weights["embed"][:, M] + weights["position"][:, 2])[:, None]
    flat = torch.einsum("rij,rljhk->rlihk", v.mT @ v / v.square().sum(-1, keepdim=True), weights["query"])
    torch.testing.assert_close(transformers.answer_logits(weights | {"query": flat}, tokens), out)
    torch.testing.assert_close(transformers.logits(weights, tokens)[:, :, -1], out)
    left, right = transformers.attention_factors(weights | {"query": flat}, "QK")
    torch.testing.assert_close(spectral.product_rank(left.detach(), right.detach()), torch.ones(8, 1, 4, dtype=D))
    torch.nn.functional.cross_entropy(out.flatten(0, 1), SUMS[::5].repeat(8)).backward()
    for name in ("query", "key", "value"):
        sigma = torch.linalg.svdvals(weights[name].grad.movedim(-2, -3))
        ratio = sigma[..., 1] / sigma[..., 0]
        assert ratio.min() > 0.05 if name == "value" else ratio.max() < 1e-12


def test_distance():
    falls, spikes = {}, {}
    for name in ("sums", "shuffled"):
        spikes[name] = (np.log10(wide("train_loss", name)).diff().loc[1200:] > 1).any().to_numpy()
        for end, part in ((1200, "half"), (2400, "end")):
            assert wide(f"ov0_distance_{part}", name).loc[end].max() < 1e-9
            falls[name, end] = fallen(f"ov0_distance_{part}", name, end)
        assert ((falls[name, 2400] > 2000) == spikes[name]).all()
    assert spikes["shuffled"].all() and np.flatnonzero(spikes["sums"]).tolist() == [3, 7, 8, 11]
    for level in (0.7, 0.6, 0.5, 0.4):
        value, _, width = slope(fallen("ov0_distance_half", end=1200, level=level))
        assert abs(value) < width and value + width < 0.5
    value, _, width = slope(fallen("ov0_distance_end"))
    assert value - width < 0 and value + width > 0.5  # decides nothing
    quiet = ~spikes["sums"]
    value, _, width = slope(falls["sums", 2400], LEARNED & quiet)
    assert abs(value) < width and value + width < 0.5
    moved = (falls["sums", 2400] / falls["sums", 1200])[quiet]
    assert 1.2 < moved.min() and moved.max() < 1.4  # a walk: 2


def test_walk_with_steps_of_any_size():
    """Shrinking steps, and the same with a burst: the half-fall of the distance to its own end."""
    at = np.arange(100)
    still = 0.97**at
    for seed, sizes in enumerate((still, np.where((at >= 85) & (at < 95), 1.0, still))):
        g = torch.Generator().manual_seed(seed)
        jumps = torch.randn(100, 20, 12, 48, generator=g, dtype=D)  # steps, walks, rows, columns
        walk = (jumps * torch.tensor(sizes)[:, None, None, None]).cumsum(0)
        curve = spectral.subspace_distance(walk, walk[-1]).square().mean(1)
        walked = np.cumsum(sizes**2) / np.sum(sizes**2)
        half = [int(np.argmax(x)) for x in ((curve < curve[0] / 4).numpy(), walked >= 0.75)]
        assert abs(half[0] - half[1]) <= 3 and (half[1] < 30 if seed == 0 else half[1] > 85)


def test_frequencies():
    control, steps = wide("frequencies", "shuffled"), fallen("frequencies")
    value, _, width = slope(steps)
    assert value - width > 0.5 and abs(value - 1) < width
    assert control.min().min() > 14 and wide("frequencies").iloc[-1][LEARNED].max() < 5 < 10
    assert wide("frequencies")[8].iloc[-1] > 10
    accuracy = wide("held_out_accuracy")
    then = [accuracy[seed][step] for seed, step in enumerate(steps) if LEARNED[seed]]
    assert 0.2 < min(then) and max(then) < 0.7  # no forecast


def test_qk_rank():
    for name in ("sums", "shuffled"):
        assert (fallen("qk0_rank", name) == 40).all() and wide("qk0_rank", name).iloc[-1].max() < 1.01
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]  # without decay
    setting = {"learning_rate": 0.01, "warm_up": 10, "every": 60}
    run = transformers.train(ModularAddition(), LAYER, generators=generators, n_steps=60, **setting)
    rank = spectral.product_rank(*transformers.attention_factors(run.weights, "QK")).mean((-1, -2))
    assert (rank[-1] > rank[0] / 2).all()


def test_summed_rank():
    summed, control = wide("ov_summed_rank"), wide("ov_summed_rank", "shuffled")
    gaps = (control - summed).iloc[-1]
    assert stats.ttest_1samp(gaps[LEARNED], 0, alternative="greater").pvalue < 1e-3 and gaps[8] < 0
    assert summed.iloc[-1][LEARNED].max() < control.iloc[-1].min()
    early = fallen("ov_summed_rank")  # of its start: memorisation
    assert early.max() <= 100 < GENERALISED[LEARNED].min()
    value, _, width = slope(early)
    assert value - width < 0.5
    single = [wide("ov0_rank", name).iloc[-1] for name in ("sums", "shuffled")]
    assert single[0].min() < single[1].min() and single[0].max() > single[1].max()


def test_stored_circuit():
    last = {name: wide(name).iloc[-1] for name in ("keys", "only_keys", "without_keys", "without_others", "explained")}
    assert last["keys"][LEARNED].between(2, 4).all()
    assert min(last["only_keys"][LEARNED].min(), last["without_others"][LEARNED].min()) > 0.95
    assert_mean(torch.tensor(last["without_keys"][LEARNED].to_numpy()), 1 / M)
    assert last["explained"][LEARNED].min() > 0.7 > 0.5 > last["explained"][8]
    for name in ("sums", "shuffled"):
        assert wide("explained_others", name).iloc[-1].max() < 0.05
    assert wide("explained", "shuffled").iloc[-1].max() < 0.05


def test_circuit(quick):
    train, held_out = quick.accuracy["train"][:, 0], quick.accuracy["held_out"][:, 0]
    assert train[3] > 0.99 and held_out[3] < 0.1 and held_out[-1] > 0.95  # at step 60, and in the end
    w = {name: table[-1].double() for name, table in quick.weights.items()}
    wave = torch.fft.rfft(w["embed"][0, :M], dim=0)
    power = wave[1:].abs().square().sum(-1)
    key = power > power.mean()
    others = ~key & (power >= power[~key].topk(int(key.sum())).values[-1])
    assert key.sum() <= 5
    a, b, _ = quick.sets["held_out"].tokens[0].T
    held = torch.zeros(M, M, dtype=torch.bool).index_put((a, b), torch.tensor(True)).flatten()

    def accuracy(stay):
        rows = torch.fft.irfft(wave * torch.cat([torch.tensor([True]), stay])[:, None], n=M, dim=0)
        changed = w | {"embed": torch.cat([rows, w["embed"][0, M:]])[None]}
        return (transformers.answer_logits(changed, PAIRS)[0].argmax(-1) == SUMS)[held].double().mean()

    chance = 1 / M + stats.norm.isf(1e-3) * math.sqrt((M - 1) / M**2 / (held.sum().item() / 2))
    assert accuracy(key) > 0.95 and accuracy(~others) > 0.95 and accuracy(~key) < chance
    logits = transformers.answer_logits(w, PAIRS)[0]
    rows = (logits - logits.mean(-1, keepdim=True)).gather(1, (SUMS[:, None] + torch.arange(M)) % M)
    angles = 2 * math.pi * torch.arange(1, 16, dtype=D)[:, None] * torch.arange(M) / M
    amplitude = 2 * rows[~held].mean(0) @ angles.cos().T / M
    for chosen, least, most in ((key, 0.5, 1), (others, -1, 0.05)):
        rest = rows[held] - amplitude[chosen] @ angles[chosen].cos()
        assert least < 1 - rest.square().sum() / rows[held].square().sum() < most
    assert (amplitude[key] > 0).all()


def test_below_guessing(quick):
    """Having memorised, networks answer what they have seen with a or with b: never the right answer."""
    a, b, _ = PAIRS[0].T
    familiar = []
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        start = transformers.initial_weights(ModularAddition(), LAYER, generators=[g])
        train = ModularAddition().sets(generator=g)["train"]
        known = torch.zeros(M, M, dtype=torch.bool)
        known[train.tokens[:, 0], train.targets[:, 0]] = True
        held = ~known[a, SUMS]
        assert not (known[a, SUMS] | known[b, SUMS])[held].any() and len(train.tokens) + held.sum() == M**2
        if seed == 6:
            torch.testing.assert_close({name: w[0] for name, w in quick.weights.items()}, start)
            w = {name: table[3] for name, table in quick.weights.items()}
            given = transformers.answer_logits(w, PAIRS)[0].argmax(-1)
            share = (known[a, given] | known[b, given])[held].double().mean()
        familiar.append((known[a[held]] | known[b[held]]).double().mean())  # of random answers
    assert share > 0.97 > 0.9 > max(familiar)


def test_published_size():
    """One run: it memorises when the published one does, to a record, and generalises earlier."""
    big, crossed = TABLE[TABLE["run"] == "published size"].set_index("step"), {}
    published = pandas.read_csv(Path(__file__).parent / "reference" / "grokking.csv")
    assert published["run"].nunique() == 1
    for row in published.itertuples():
        loss = big["train_loss" if row.quantity == "train" else "held_out_loss"]
        crossed[row.quantity, row.threshold] = int((loss < row.threshold).idxmax()), row.epoch
    for (quantity, _), (step, epoch) in crossed.items():
        assert 0 <= step - epoch < 100 if quantity == "train" else step < epoch / 2
    ours, theirs = np.divide(crossed["test", 0.1], crossed["train", 0.01])
    delays = first(wide("held_out_loss") < 0.1) / first(wide("train_loss") < 0.01)
    assert np.nanmax(delays) < 12 <= ours < theirs / 2 and theirs == pytest.approx(9300 / 275)
    columns = "frequencies", "ov0_distance_end", "ov0_distance_half"
    halves = [fallen(name, "published size", 6000)[0] for name in columns]
    assert halves[2] < halves[1] / 5 and big["held_out_accuracy"].loc[halves[0]] > 0.9
    last = big.iloc[-1]
    assert last["keys"] == 5 and min(last["only_keys"], last["without_others"]) > 0.99 > last["explained"] > 0.95
    assert last["without_keys"] < 2 / 113 and big["held_out_accuracy"].loc[200] < leak(113, 0.3) / 3
