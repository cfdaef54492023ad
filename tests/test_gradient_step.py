"""One gradient step on the first layer, and training sets from several sources."""

import math

import pytest
import torch

from icl_lib import models
from icl_lib.models import RandomTransformer
from icl_lib.prompts import Source, Summaries, sample_mixture, sample_summaries
from icl_lib.tasks import TaskPrior, power_law_covariance, spiked_covariance
from tests.zscore import assert_mean, assert_same_mean

DIM, LENGTH, WIDTH = 5, 7, 9


def draw(n: int, generator: torch.Generator) -> Summaries:
    fresh = TaskPrior(DIM).sample(n, generator=generator)
    return sample_summaries(fresh, LENGTH, target="relu", noise=0.1, generator=generator)


def network(activation, generator, **changes) -> tuple[RandomTransformer, torch.Tensor]:
    model = RandomTransformer(DIM, WIDTH, activation, generator=generator, **changes)
    return model, torch.randn(WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)


@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus", lambda a: a + 0.1 * a**2])
def test_gradient_is_that_of_autograd(activation, generator, monkeypatch):
    monkeypatch.setattr(models, "ROWS", 16)  # the last block of prompts is a short one
    model, readout = network(activation, generator)
    batch = draw(40, generator)
    first = (model.first / math.sqrt(batch.trace)).requires_grad_()
    output = model.activation(batch.features() @ first.mT) @ readout / math.sqrt(WIDTH)
    (0.5 * (batch.answer - output) ** 2).mean().backward()
    torch.testing.assert_close(model.gradient(batch, readout=readout), -first.grad, rtol=1e-10, atol=1e-13)


def test_gradient_against_finite_differences(generator):
    model, readout = network("tanh", generator)
    batch = draw(40, generator)

    def loss(first: torch.Tensor) -> float:
        output = torch.tanh(batch.features() @ first.mT) @ readout / math.sqrt(WIDTH)
        return 0.5 * ((batch.answer - output) ** 2).mean().item()

    first, step = model.first / math.sqrt(batch.trace), 1e-5
    direction = torch.randn(first.shape, generator=generator, dtype=torch.float64)
    slope = (loss(first + step * direction) - loss(first - step * direction)) / (2 * step)
    expected = -(model.gradient(batch, readout=readout) * direction).sum().item()
    assert slope == pytest.approx(expected, rel=1e-6)


def test_the_step_moves_the_preactivations_and_nothing_else(generator):
    model, readout = network("relu", generator)
    before, batch, other = model.first.clone(), draw(40, generator), draw(12, generator)
    stepped = model.gradient_step(batch, 3.0, readout=readout)
    moved = 3.0 * other.features() @ model.gradient(batch, readout=readout).mT
    torch.testing.assert_close(stepped.preactivations(other), model.preactivations(other) + moved)
    assert torch.equal(model.first, before) and stepped.first is not model.first
    assert stepped.weights is None and type(stepped) is RandomTransformer
    assert torch.equal(model.gradient_step(batch, 0.0, readout=readout).first, before)
    trained = stepped.fit(batch, 1.0)
    assert trained.weights is not None and model.weights is None


@pytest.mark.parametrize("activation", ["sign", "step"])
def test_a_step_function_has_no_gradient(activation, generator):
    model, readout = network(activation, generator)
    assert not model.gradient(draw(20, generator), readout=readout).any()


def test_a_small_step_lowers_the_loss_of_the_untrained_model(generator):
    model, readout = network("relu", generator)
    batch = draw(200, generator)

    def loss(candidate: RandomTransformer) -> float:
        output = candidate.features(candidate.preactivations(batch)) @ readout / math.sqrt(WIDTH)
        return 0.5 * ((batch.answer - output) ** 2).mean().item()

    rate = 1e-4
    fall = loss(model) - loss(model.gradient_step(batch, rate, readout=readout))
    squared = model.gradient(batch, readout=readout).square().sum().item()
    assert fall == pytest.approx(rate * squared, rel=1e-3)


def test_the_readout_of_the_step_has_the_variance_of_the_theory_and_the_seed_fixes_it():
    batch = draw(30, torch.Generator().manual_seed(1))
    wide = RandomTransformer(DIM, 20_000, "identity", generator=torch.Generator().manual_seed(2))
    wide.first.zero_()  # without a first layer, G = (1/sqrt(k)) w times the mean of y h
    step = wide.gradient_step(batch, 1.0).first / math.sqrt(batch.trace)
    signal = (batch.answer[:, None] * batch.features()).mean(0)
    assert_mean((step @ signal / signal.square().sum()) ** 2 * 20_000**2, 1.0)  # k w^2 has mean 1

    def first(seed: int) -> torch.Tensor:
        model = RandomTransformer(DIM, WIDTH, "relu", generator=torch.Generator().manual_seed(seed))
        return model.gradient_step(batch, 1.0).first

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


def test_float32_step_is_close_to_float64(generator):
    wide, readout = network("tanh", generator)
    slim = RandomTransformer(DIM, WIDTH, "tanh", generator=generator, dtype=torch.float32)
    slim.first = wide.first.float()
    batch = draw(40, generator)
    gradient = slim.gradient(batch, readout=readout)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), wide.gradient(batch, readout=readout), rtol=1e-4, atol=1e-7)


def test_the_twin_takes_the_stepped_layer_and_no_step_of_its_own(generator):
    model, readout = network("relu", generator)
    batch = draw(40, generator)
    stepped = model.gradient_step(batch, 2.0, readout=readout)
    assert stepped.hermite_twin(2).first is stepped.first
    with pytest.raises(ValueError, match="Hermite twin, expected its parent"):
        model.hermite_twin(2).gradient_step(batch, 2.0, readout=readout)


def sources() -> list[Source]:
    spiked = TaskPrior(DIM, spiked_covariance(DIM, 20.0))
    coloured = power_law_covariance(DIM, 1.0)
    return [Source(spiked, "relu", 0.1, share=3), Source(TaskPrior(DIM), "abs", 0.5, coloured, share=1)]


def test_a_mixture_has_the_counts_the_law_and_the_trace_of_its_sources():
    generator = torch.Generator().manual_seed(0)
    mixed = sample_mixture(sources(), 40_000, LENGTH, generator=generator)
    alone = [source.sample(40_000, LENGTH, generator=generator) for source in sources()]
    assert len(mixed) == 40_000
    for moment in (
        lambda p: p.answer**2,
        lambda p: p.summary[:, 0] ** 2,
        lambda p: p.summary[:, -1],
        lambda p: p.query[:, -1] ** 2,
        lambda p: p.answer * p.query[:, 0] * p.summary[:, 0],
    ):
        expected = torch.cat([moment(alone[0])[:30_000], moment(alone[1])[:10_000]])
        assert_same_mean(moment(mixed), expected)
    assert mixed.trace == pytest.approx(0.75 * alone[0].trace + 0.25 * alone[1].trace, rel=1e-2)


@pytest.mark.parametrize(
    ("shares", "n", "expected"), [([1, 1], 10, [5, 5]), ([1, 2], 10, [3, 7]), ([0, 1], 4, [0, 4]), ([1, 1, 1], 2, None)]
)
def test_shares_give_fixed_counts_in_random_order(shares, n, expected, generator):
    level = [TaskPrior(2) for _ in shares]

    def constant(value: float):
        return lambda x: torch.full_like(x, value)

    both = enumerate(zip(level, shares, strict=True), start=1)
    parts = [Source(prior, constant(float(i)), 0.0, share=share) for i, (prior, share) in both]
    answers = sample_mixture(parts[::-1], n, 3, generator=generator).answer
    counts = torch.bincount(answers.long() - 1, minlength=len(shares)).tolist()
    assert sum(counts) == n and all(abs(c - n * s / sum(shares)) <= 1 for c, s in zip(counts, shares, strict=True))
    assert expected is None or counts == expected


def test_the_order_of_a_mixture_is_random(generator):
    """Of 1000 prompts, half from each source, the first half holds 250 ± 8 of the first source."""
    plain = [Source(TaskPrior(2), lambda x, v=v: torch.full_like(x, v), 0.0) for v in (1.0, 2.0)]
    answers = sample_mixture(plain, 1000, 3, generator=generator).answer
    assert abs((answers[:500] == 1.0).sum().item() - 250) < 5 * math.sqrt(1000 / 16)


def test_one_source_is_its_own_mixture():
    one = sources()[:1]
    mixed = sample_mixture(one, 50, LENGTH, scaling="lu", generator=torch.Generator().manual_seed(5))
    alone = one[0].sample(50, LENGTH, scaling="lu", generator=torch.Generator().manual_seed(5))
    assert mixed.trace == alone.trace
    torch.testing.assert_close(mixed.answer.sort().values, alone.answer.sort().values)
