"""Emergence of copying: the stored runs, their measures, and one run that is trained here."""

import functools
import importlib.resources

import numpy as np
import pandas
import pytest
import torch
from scipy import stats

from icl_lib import spectral, transformers
from icl_lib.sequences import Repeats
from icl_lib.sweeps import deviation_limit
from icl_lib.transformers import Architecture
from tests.zscore import assert_mean

PLACES = [(period, t) for period in range(5, 11) for t in range(period, 24)]


@pytest.fixture(scope="module")
def rows():
    return pandas.read_csv(importlib.resources.files("icl_lib.data") / "emergence.csv")


@pytest.fixture(scope="module")
def stored(rows):
    @functools.cache
    def table(name, column="accuracy"):
        return rows[rows["run"] == name].pivot(index="step", columns="seed", values=column)

    return table


@pytest.fixture(scope="module")
def emerged(rows, stored):
    def windows(name):
        table = stored(name)
        steps = torch.tensor(table.index)
        return {
            seed: transformers.emergence_window(steps, torch.tensor(table[seed].to_numpy()))
            for seed in table
            if table[seed].max() > 0.9
        }

    return {name: windows(name) for name in rows["run"].unique()}


def learn(task, architecture, seeds, n_steps):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    setting = {"n_steps": n_steps, "learning_rate": 3e-3, "weight_decay": 0.01}
    return transformers.train(task, architecture, generators=generators, **setting)


@pytest.fixture(scope="module")
def live():
    return learn(Repeats(), Architecture(scale=0.05), [3], 600)


def rise(table, when, start=-60):
    return np.array([table[s].loc[w[0] + start + 120] - table[s].loc[w[0] + start] for s, w in when.items()])


def excess(stored, emerged, two, one, start=-60):
    """Rise of the last layer's rank, minus that of one layer in the same steps."""
    when = emerged[two]
    return rise(stored(two, "qk1_rank"), when, start) - rise(stored(one, "qk0_rank"), when, start)


def sign_test(x):
    return stats.binomtest(int((np.array(x) > 0).sum()), len(x)).pvalue


def clear(x):
    """The mean is above 0 by the level of the book."""
    return np.mean(x) > deviation_limit(1, len(x)) * stats.sem(x)


def test_live_runs_repeat_the_stored_ones(stored, live):
    paths = {"2 layers": live}
    paths["1 layer"] = learn(Repeats(), Architecture(layers=1, scale=0.05), [3], 60)
    paths["shuffled"] = learn(Repeats(shuffled=True), Architecture(scale=0.05), [3], 60)
    for name, path in paths.items():
        known = stored(name, "loss").loc[:60, 3].to_numpy()
        assert abs(path.loss["held_out"][:4, 0].numpy() - known).max() < torch.finfo(torch.float32).eps ** 0.5
        assert abs(path.loss["held_out"][:4, 0].numpy() - stored(name, "loss").loc[:60, 4]).max() > 1e-3
    # Rounding errors grow with the steps, but the run emerges when the stored one does.
    when = transformers.emergence_window(live.steps, live.accuracy["held_out"][:, 0])
    table = stored("2 layers")
    known = transformers.emergence_window(torch.tensor(table.index), torch.tensor(table[3].to_numpy()))
    assert known[1] <= when[0] <= known[2]


def test_who_emerges(stored, emerged):
    assert {name: len(when) for name, when in emerged.items()} == {
        "2 layers": 10,
        "1 layer": 0,
        "2 layers, fresh": 9,
        "1 layer, fresh": 0,
        "larger start": 12,
        "1 layer, larger start": 0,
        "shuffled": 0,
        "held": 10,
        "held at start": 10,
        "4 heads": 7,
    }
    two, one = (len(emerged[name]) for name in ("2 layers", "1 layer"))
    assert stats.fisher_exact([[two, 12 - two], [one, 12 - one]]).pvalue < 1e-3
    assert max(stored(name).max().max() for name in ("1 layer", "shuffled")) < 0.45
    assert np.median([when[0] for when in emerged["2 layers"].values()]) == 550


def test_reader_blind_to_order():
    def best(period, t):
        return 1 / (period - 1 - t % period) if t % period < period - 1 else 1 / (period - 1)

    for period in range(5, 11):  # a whole period
        harmonic = sum(1 / i for i in range(1, period)) + 1 / (period - 1)
        assert sum(best(period, period + r) for r in range(period)) == pytest.approx(harmonic)
    values = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        drawn = Repeats().sample(500, generator=generator)
        counts = torch.nn.functional.one_hot(drawn.tokens, 16).cumsum(1)
        barred = (counts == 0) | (torch.arange(16) == drawn.tokens[..., None])
        guess = (counts + 99 * barred + torch.rand(counts.shape, generator=generator)).argmin(-1)
        values.append((guess == drawn.targets)[drawn.scored].double().mean())
    assert_mean(torch.stack(values), np.mean([best(*place) for place in PLACES]))


def rotation(a, b):
    return torch.cat([torch.cat([a.diag(), -b.diag()], 1), torch.cat([b.diag(), a.diag()], 1)])


def accuracy_of(weights):
    test = Repeats().sample(256, generator=torch.Generator().manual_seed(5))
    right = transformers.logits(weights, test.tokens[None])[0].argmax(-1) == test.targets
    return right[test.scored].double().mean()


def test_one_layer_built_by_hand():
    """The answer is the token not seen for longest: one layer can compare ages."""
    age, (low, high) = torch.arange(24.0), torch.eye(32).split(16, 1)
    angle = age[:, None] * 2 * torch.pi * torch.arange(1, 9) / 24
    waves = torch.cat([angle.cos(), angle.sin()], 1)

    def read(goal, exact):
        care = torch.where(exact, 30.0, 1.0)[:, None]
        fit = torch.linalg.lstsq(care * torch.cat([waves, torch.ones(24, 1)], 1), care * goal[:, None]).solution
        return fit[:16, 0]

    rising = read(torch.where(age < 10, age, torch.tensor(-6.0)), (age > 3) & (age < 10))
    young = read((age < 4).float(), age < 4)
    shape = waves @ rising  # as a function of age, up to a constant
    assert (shape[4:10].diff() > 0.9).all() and shape[4] > shape[10:].max() + 1

    def accuracy(taken):
        query = torch.stack([8 * high @ rotation(*rising.split(8)), 80 * high @ rotation(*young.split(8))], 1)
        weights = {
            "embed": low.mT[None],
            "unembed": low[None],
            "position": torch.cat([torch.zeros(24, 16), waves], 1)[None],
            "query": query[None, None],
            "key": torch.stack([high, high], 1)[None, None],
            "value": torch.stack([low, low], 1)[None, None],
            "output": torch.stack([1e4 * low.mT, -taken * low.mT])[None, None],
        }
        return accuracy_of(weights)

    assert accuracy(2e5) == 1
    assert accuracy(0) < 0.5  # the second head is needed


def test_heads_of_a_run(live):
    """Scores and ablations of one live run, from the library and by hand."""
    weights = {name: table[-1] for name, table in live.weights.items()}
    test = Repeats().sample(128, generator=torch.Generator().manual_seed(1))
    patterns = transformers.attention_patterns(weights, test.tokens[None])
    gap = torch.arange(24)[:, None] - torch.arange(24)
    period = (~test.scored).sum(1)[:, None, None]
    behind = ((gap + 1) % period == 0) & (gap > 0) & test.scored[:, :, None] & (torch.arange(24) > 0)
    by_hand = (patterns[0] * behind).sum((-1, -2, -3)) / test.scored.sum()
    previous, induction = transformers.head_scores(patterns, test.tokens[None])
    assert torch.allclose(induction[0], by_hand, atol=1e-5)
    assert induction[0, 1].max() > 0.5 and previous[0, 0].max() > 0.2

    def without(head):
        output = weights["output"].clone()
        output[:, 0, head] = 0
        right = transformers.logits(weights | {"output": output}, test.tokens[None])[0].argmax(-1) == test.targets
        return right[test.scored].double().mean().item()

    best = int(previous[0, 0].argmax())
    assert without(best) < 0.36 and without(1 - best) > 0.9


def test_the_circuit_carries_the_ability(stored, emerged):
    seeds = list(emerged["2 layers"])
    for score in ("previous", "induction"):
        last = stored("2 layers", score).loc[1500]
        others = [last.drop(seeds), *(stored(name, score).loc[1500] for name in ("1 layer", "shuffled"))]
        assert last[seeds].min() > 2 * max(x.max() for x in others)
        half = (stored("2 layers", score)[seeds] > last[seeds] / 2).idxmax()
        late = half - [when[0] for when in emerged["2 layers"].values()]
        assert late.min() >= -60  # not before the window
    for name, level in (("2 layers", 2 / 2**10), ("2 layers, fresh", 2 / 2**9), ("held", 2 / 2**10)):
        without, kept = (stored(name, f"without_{x}").loc[1500, list(emerged[name])] for x in ("previous", "others"))
        assert sign_test(kept - without) == level
        assert name != "2 layers" or clear(kept - without)
    control = stored("1 layer", "without_others").loc[1500] - stored("1 layer", "without_previous").loc[1500]
    assert control.mean() < 0  # in one layer that head is not special
    large = stored("larger start", "induction").loc[1500]
    assert len(emerged["larger start"]) == 12 and (large < 0.5).sum() == 4  # another way to copy


def test_ranks_dip_before_the_window(stored, emerged):
    for run in ("2 layers", "2 layers, fresh"):
        spans = np.array(list(emerged[run].values()))
        for name in ("qk0_rank", "qk1_rank"):
            ranks = stored(run, name)[list(emerged[run])]
            early = spans[:, 1] - ranks.idxmin()
            assert early.min() > (spans[:, 2] - spans[:, 1]).max() and (ranks.min() < ranks.loc[0] / 3).all()
    when = emerged["larger start"]  # a shallow dip, nearer to the window
    ranks, spans = stored("larger start", "qk1_rank"), np.array(list(when.values()))
    early = spans[:, 1] - ranks.idxmin().to_numpy()
    assert (ranks.min() > ranks.loc[0] / 2).all()
    assert ((early >= 0) & (early <= spans[:, 2] - spans[:, 1])).sum() == 6


def test_one_layer_dips_as_well(stored):
    for two, one in (("2 layers", "1 layer"), ("larger start", "1 layer, larger start")):
        last, single = stored(two, "qk1_rank"), stored(one, "qk0_rank")
        falls = [ranks.loc[0] - ranks.min() for ranks in (last, single)]
        assert falls[1].mean() > 0.9 * falls[0].mean() and clear(falls[1])
    last, single = stored("2 layers", "qk1_rank"), stored("1 layer", "qk0_rank")
    difference = (last.loc[0] - last.min()) - (single.loc[0] - single.min())
    bound = abs(difference.mean()) + deviation_limit(1, 12) * difference.sem()
    assert bound < 0.1 * (last.loc[0] - last.min()).mean()  # equal within a tenth


def test_the_rebound(stored, emerged):
    for two, one in (("2 layers", "1 layer"), ("2 layers, fresh", "1 layer, fresh")):
        gain = excess(stored, emerged, two, one)
        assert clear(gain) and (gain > 0).all()
        assert (gain > excess(stored, emerged, two, one, 60)).all()  # slower after the window
        assert (excess(stored, emerged, two, one, -180) > 0).all()  # but there before it, too
        ranks, when = stored(two, "qk1_rank"), emerged[two]
        idle = ranks.drop(columns=list(when))
        own = rise(ranks, when)
        for seed in idle:  # more than where nothing emerges, in the same steps
            assert (own > [idle[seed][w[0] + 60] - idle[seed][w[0] - 60] for w in when.values()]).mean() >= 0.8
    assert (excess(stored, emerged, "larger start", "1 layer, larger start") > 0).sum() == 10


def test_the_rebound_is_tied_to_the_window(stored, emerged):
    for name in ("2 layers", "held"):
        when = emerged[name]
        ranks, middles = stored(name, "qk1_rank"), np.array([x[0] for x in when.values()])
        rises = np.array([ranks[s].loc[middles + 60].to_numpy() - ranks[s].loc[middles - 60].to_numpy() for s in when])
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(len(when)), (4000, 1)), axis=1)
        sums = rises[np.arange(len(when)), orders].sum(1)
        assert (1 + (sums >= np.trace(rises) - 1e-9).sum()) / 4001 < 0.01


def test_distance_is_not_specific(stored, emerged):
    when = emerged["2 layers"]

    def reached(name, layer, end="end"):
        return np.array([stored(name, f"qk{layer}_distance_{end}")[s].loc[w[1]] for s, w in when.items()])

    start = stored("2 layers", "qk1_distance_end").loc[0, list(when)].to_numpy()
    assert (reached("2 layers", 1) < 2 / 3 * start).all()  # it falls before the window
    for end in ("end", "half"):  # and further without the ability
        for layer in (0, 1):
            assert clear(reached("2 layers", layer, end) - reached("1 layer", 0, end))
            assert clear(reached("2 layers", layer, end) - reached("shuffled", layer, end))
    single, last = stored("1 layer", "qk0_distance_end"), stored("2 layers", "qk1_distance_end")
    assert clear(rise(single, when) - rise(last, when))  # fastest through the window
    assert not clear(rise(single, when, -240) - rise(last, when, -240))


def test_holding_delays(stored, emerged):
    free, held, random = (emerged[name] for name in ("2 layers", "held", "held at start"))
    assert set(free) == set(held)
    delay = [held[seed][0] - free[seed][0] for seed in free]
    assert clear(delay) and sign_test(delay) == 2 / 2**10
    assert stored("held", "qk0_distance_end").loc[160:].max().max() < 1e-3
    assert stored("held at start", "qk1_distance_end").max().max() < 1e-3
    difference = stored("held", "loss").loc[:140] - stored("2 layers", "loss").loc[:140]
    assert difference.abs().max().max() < 1e-4  # the same runs until step 150
    assert (stored("held at start", "loss").loc[0] == stored("2 layers", "loss").loc[0]).all()
    assert set(random) - set(free) == {8} and set(free) - set(random) == {3}
    assert all(random[seed][0] > free[seed][0] for seed in set(free) & set(random))


def test_curvature_comes_too_late(stored, emerged):
    when = emerged["2 layers"]
    spans = np.array(list(when.values()))

    def middle(name, records):
        curves = spectral.curvature(torch.tensor(stored(name, "loss").to_numpy()).mT, records)
        return pandas.Series(20 * (curves.argmin(1).numpy() + (records - 1) // 2), stored(name, "loss").columns)

    assert (spans[:, 0] - middle("2 layers", 11)[list(when)]).min() > 0  # before t*
    for records in (7, 11):  # but known only when its window is full
        assert (spans[:, 1] - middle("2 layers", records)[list(when)] - 10 * (records - 1)).max() <= 0
        assert (middle("1 layer", records) <= 120).sum() == 11  # and there without the ability
