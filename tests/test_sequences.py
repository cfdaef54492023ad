"""Sequences for small Transformers: what repeats, what is split, and what the controls keep."""

import pytest
import torch

from icl_lib.sequences import Examples, ModularAddition, Repeats
from tests.zscore import assert_mean


def test_repeats_have_their_period_and_distinct_tokens(generator):
    examples = Repeats().sample(3000, generator=generator)
    assert examples.tokens.shape == examples.targets.shape == examples.scored.shape == (3000, 24)
    assert torch.equal(examples.tokens[:, 1:], examples.targets[:, :-1])
    assert (examples.tokens.min(), examples.tokens.max()) == (0, 15)
    periods = 24 - examples.scored.sum(1)
    assert set(periods.tolist()) == {5, 6, 7, 8, 9, 10}
    for period in range(5, 11):
        assert_mean((periods == period).double(), 1 / 6)
    for tokens, targets, scored, period in zip(
        examples.tokens, examples.targets, examples.scored, periods, strict=True
    ):
        assert len(tokens[:period].unique()) == period
        assert torch.equal(tokens[period:], tokens[:-period]) and targets[-1] == tokens[24 - period]
        assert scored[period:].all() and not scored[:period].any()


def test_shuffled_repeats_keep_the_tokens_and_lose_the_order(generator):
    task = Repeats(shuffled=True)
    examples = task.sample(500, generator=generator)
    periods = 24 - examples.scored.sum(1)
    assert torch.equal(examples.tokens[:, 1:], examples.targets[:, :-1])
    whole = torch.cat([examples.tokens, examples.targets[:, -1:]], 1)
    for row, period in zip(whole, periods, strict=True):
        counts = row.unique(return_counts=True)[1]
        assert len(counts) == period and counts.max() - counts.min() <= 1  # 25 tokens in turns of the period
    ordered = sum(torch.equal(row[p:], row[:-p]) for row, p in zip(examples.tokens, periods.tolist(), strict=True))
    assert ordered == 0
    sets = task.sets(generator=generator)
    assert set(sets) == {"held_out"} and isinstance(sets["held_out"], Examples)


@pytest.mark.parametrize("shuffled", [False, True])
def test_sums_are_split_by_unordered_pairs(shuffled, generator):
    sets = ModularAddition(31, 0.7, shuffled).sets(generator=generator)
    train, held_out = sets["train"], sets["held_out"]
    assert len(train.tokens) == 2 * 326 + 22 and len(train.tokens) + len(held_out.tokens) == 31**2
    assert train.scored.all() and held_out.scored.all() and train.targets.shape == (674, 1)
    table = torch.full((31, 31), -1)
    for examples in (train, held_out):
        a, b, equals = examples.tokens.T
        assert (equals == 31).all()
        assert set(zip(a.tolist(), b.tolist(), strict=True)) == set(zip(b.tolist(), a.tolist(), strict=True))
        table[a, b] = examples.targets[:, 0]
    sums = (torch.arange(31)[:, None] + torch.arange(31)) % 31
    assert torch.equal(table, table.T)  # both orders have the same answer
    assert torch.equal(table, sums) != shuffled
    i, j = torch.triu_indices(31, 31)
    assert torch.equal(table[i, j].bincount(), sums[i, j].bincount())  # the control permutes the answers


def test_ordered_pairs_are_split_on_request(generator):
    sets = ModularAddition(31, 0.3, ordered=True).sets(generator=generator)
    train, held_out = (set(map(tuple, sets[name].tokens[:, :2].tolist())) for name in ("train", "held_out"))
    assert len(train) == round(0.3 * 31**2) and len(train | held_out) == 31**2 and not train & held_out
    mirrored = sum((b, a) in train for a, b in held_out if a != b) / sum(a != b for a, b in held_out)
    expected = len(train) / (31**2 - 1)
    assert abs(mirrored - expected) < 5 * (expected * (1 - expected) / 673) ** 0.5  # mirrors leak


def test_splits_differ_from_generator_to_generator():
    first, second = (ModularAddition().sets(generator=torch.Generator().manual_seed(s))["train"] for s in (0, 1))
    assert first.tokens.shape == second.tokens.shape and not torch.equal(first.tokens, second.tokens)
