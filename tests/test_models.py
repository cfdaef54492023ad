"""The models: equal to ridge on explicit features, exact limits, shared first layers, noise where it belongs."""

import math

import pytest
import torch
from zscore import assert_mean

from icl_lib import hermite
from icl_lib.models import ROWS, HermiteTwin, LinearTransformer, RandomTransformer, icl_error
from icl_lib.prompts import Summaries, sample_summaries, summary_moments
from icl_lib.tasks import TaskPrior

DIM, FEATURES = 4, 20
PENALTIES = [0.3, 5.0]
SIZES = {"dual": 12, "dual above": 22, "primal": 60, "primal in chunks": 2 * ROWS + 7}


def draw(n, generator, target="relu", dtype=torch.float64, dim=DIM):
    tasks = TaskPrior(dim).sample(n, generator=generator, dtype=dtype)
    return sample_summaries(tasks, 6, target=target, noise=0.1, generator=generator)


def explicit_ridge(train, test, penalty, intercept):
    """Ridge on the written-out features; an intercept is a centring of features and labels."""
    h, y = train.features().double(), train.answer.double()
    mean_h, mean_y = (h.mean(0), y.mean()) if intercept else (torch.zeros_like(h[0]), torch.zeros_like(y[0]))
    h, y = h - mean_h, y - mean_y
    weights = torch.linalg.solve(h.mT @ h + penalty * torch.eye(h.shape[1], dtype=h.dtype), h.mT @ y)
    return weights, mean_y + (test.features().double() - mean_h) @ weights


def polynomial(x):
    return x**3 - 2 * x**2 + 0.5


@pytest.mark.parametrize("n", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_transformer_is_explicit_ridge(n, intercept, dtype, generator):
    train, test = draw(n, generator, dtype=dtype), draw(9, generator, dtype=dtype)
    path = LinearTransformer(intercept).fit(train, PENALTIES)
    assert path.gamma.shape == (2, DIM, DIM + 1) and path.offset.shape == (2,)
    for i, penalty in enumerate(PENALTIES):
        weights, predictions = explicit_ridge(train, test, penalty, intercept)
        single = LinearTransformer(intercept).fit(train, penalty)
        assert single.gamma.shape == (DIM, DIM + 1) and single.offset.shape == ()
        rtol = 1e-9 if dtype == torch.float64 else 1e-5  # explicit float32 features are rounded products
        torch.testing.assert_close(single.gamma.flatten(), weights, rtol=rtol, atol=rtol)
        torch.testing.assert_close(single.predict(test), predictions, rtol=rtol, atol=rtol)
        torch.testing.assert_close(path.predict(test)[i], single.predict(test), rtol=1e-10, atol=1e-10)
        assert intercept or not single.offset.any()


def test_the_intercept_is_not_penalised(generator):
    train = draw(50, generator)
    model = LinearTransformer(intercept=True).fit(train, 1e9)
    torch.testing.assert_close(model.predict(train), train.answer.mean().expand(50), rtol=0, atol=1e-5)
    shifted = Summaries(train.query, train.summary, train.answer + 3, train.trace)
    moved = LinearTransformer(intercept=True).fit(shifted, 0.5).predict(train)
    torch.testing.assert_close(moved, 3 + LinearTransformer(intercept=True).fit(train, 0.5).predict(train))


def test_both_branches_give_the_same_model(generator, monkeypatch):
    train = draw(30, generator)
    for intercept in (False, True):
        primal = LinearTransformer(intercept).fit(train, 0.2)
        monkeypatch.setattr("icl_lib.models.PRIMAL_FROM", 1e9)
        dual = LinearTransformer(intercept).fit(train, 0.2)
        monkeypatch.undo()
        torch.testing.assert_close(primal.gamma, dual.gamma, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(primal.offset, dual.offset, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["relu", "tanh"])
def test_preactivations_have_variance_one(target):
    """Averaged over first layers and prompts; each run is one independent pair."""
    runs = torch.stack(
        [
            (RandomTransformer(DIM, 40, "relu", generator=g).preactivations(draw(200, g, target)) ** 2).mean()
            for g in (torch.Generator().manual_seed(seed) for seed in range(60))
        ]
    )
    assert_mean(runs, 1.0)


def test_preactivations_by_hand_and_in_chunks(generator):
    model = RandomTransformer(DIM, 5, "relu", generator=generator)
    batch = draw(2 * ROWS + 3, generator)
    assert model.first.shape == (5, FEATURES)
    expected = batch.features() @ model.first.mT / math.sqrt(batch.trace)
    torch.testing.assert_close(model.preactivations(batch), expected, rtol=1e-12, atol=1e-13)
    assert batch.trace == summary_moments(DIM, 6, target="relu", noise=0.1).trace


@pytest.mark.parametrize("activation", ["relu", "tanh", polynomial])
@pytest.mark.parametrize(("n", "width"), [(60, 15), (15, 60)])
def test_random_transformer_is_explicit_ridge(activation, n, width, generator):
    train, test = draw(n, generator), draw(9, generator)
    model = RandomTransformer(DIM, width, activation, generator=generator).fit(train, 0.7)
    function = hermite.activation(activation)
    first = model.first / math.sqrt(train.trace)
    phi, phi_test = (function(batch.features() @ first.mT) for batch in (train, test))
    weights = torch.linalg.solve(phi.mT @ phi + 0.7 * torch.eye(width).double(), phi.mT @ train.answer)
    torch.testing.assert_close(model.weights, weights, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(model.predict(test), phi_test @ weights, rtol=1e-8, atol=1e-9)


def test_a_path_of_penalties_is_single_fits_and_refits_are_fresh(generator):
    train, test = draw(40, generator), draw(9, generator)
    model = RandomTransformer(DIM, 15, "relu", generator=generator)
    path = model.fit(train, [0.0, *PENALTIES]).predict(test)
    assert path.shape == (3, 9) and model.weights.shape == (3, 15)
    for row, penalty in zip(path, [0.0, *PENALTIES], strict=True):
        torch.testing.assert_close(row, model.fit(train, penalty).predict(test), rtol=1e-9, atol=1e-10)
    other = draw(30, generator, "abs")
    model.fit(other, 1.0)
    fresh = RandomTransformer(DIM, 15, "relu", generator=generator)
    fresh.first = model.first
    assert torch.equal(model.predict(test), fresh.fit(other, 1.0).predict(test))
    assert model.trace == other.trace != train.trace


def test_given_preactivations_are_used_and_checked(generator):
    train, test, other = draw(40, generator), draw(9, generator), draw(40, generator, "abs")
    model = RandomTransformer(DIM, 15, "relu", generator=generator)
    inputs = model.preactivations(train)
    expected = model.fit(train, 1.0).predict(test)
    given = model.fit(train, 1.0, preactivations=inputs)
    assert torch.equal(given.predict(test), expected)
    torch.testing.assert_close(given.predict(test, preactivations=model.preactivations(test)), expected)
    with pytest.raises(ValueError, match="same prompts and trace"):
        model.fit(draw(40, generator), 1.0, preactivations=inputs)
    with pytest.raises(ValueError, match="same prompts and trace"):
        model.fit(other, 1.0, preactivations=model.fit(train, 1.0).preactivations(other))


def test_float32_is_close_to_float64(generator):
    train, test = draw(60, generator), draw(20, generator)
    wide = RandomTransformer(DIM, 30, "relu", generator=generator)
    slim = RandomTransformer(DIM, 30, "relu", generator=generator, dtype=torch.float32)
    slim.first = wide.first.float()
    assert slim.preactivations(train).dtype == torch.float32
    predictions = slim.fit(train, 0.5).predict(test)
    assert predictions.dtype == slim.weights.dtype == torch.float64
    torch.testing.assert_close(predictions, wide.fit(train, 0.5).predict(test), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "degree"), [(polynomial, 3), (polynomial, 5), ("identity", 1)])
def test_the_twin_of_a_polynomial_is_the_model_itself(activation, degree, generator):
    train, test = draw(60, generator), draw(20, generator)
    model = RandomTransformer(DIM, 25, activation, generator=generator)
    twin = model.hermite_twin(degree).fit(train, PENALTIES)
    assert twin.expansion.residual == 0
    expected = model.fit(train, PENALTIES).predict(test)
    torch.testing.assert_close(twin.predict(test), expected, rtol=1e-8, atol=1e-8)


def test_the_twin_shares_the_first_layer_and_keeps_its_own_read_out(generator):
    train = draw(30, generator)
    model = RandomTransformer(DIM, 10, "relu", generator=generator)
    early = model.hermite_twin(2)
    model.fit(train, 1.0)
    late = model.hermite_twin(2)
    for twin in (early, late):
        assert isinstance(twin, HermiteTwin) and twin.first is model.first and twin.generator is model.generator
        assert twin.weights is None
        twin.fit(train, 1.0, preactivations=model.preactivations(train))
        assert twin.trace == model.trace == train.trace
        assert not torch.equal(twin.weights, model.weights)


def test_the_noise_of_the_twin_is_fresh_in_training_and_testing(generator):
    train, test = draw(30, generator), draw(9, generator)
    twin = RandomTransformer(DIM, 10, "relu", generator=generator).hermite_twin(1)
    one, other = (twin.fit(train, 1.0).weights for _ in range(2))
    assert (one != other).all()
    assert (twin.predict(test) != twin.predict(test)).all()
    a = torch.zeros(20_000, 10, dtype=torch.float64)
    noise = twin.features(a) - twin.expansion.polynomial(a)
    assert_mean(noise, 0.0)
    assert_mean(noise**2, twin.expansion.residual**2)
    assert_mean(noise[:, :-1] * noise[:, 1:], 0.0)


def test_the_seed_fixes_model_and_twin():
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        train = draw(30, generator)
        model = RandomTransformer(DIM, 10, "relu", generator=generator).fit(train, 1.0)
        results.append((model.weights, model.hermite_twin(2).fit(train, 1.0).weights))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_identity_head_with_huge_width_is_the_linear_transformer():
    """F F^T / k tends to the identity: the error of the kernel falls like one over the root of the width."""
    generator = torch.Generator().manual_seed(1)
    train, test = draw(40, generator), draw(50, generator)
    linear = LinearTransformer().fit(train, 1.0).predict(test)
    gaps = []
    for width in (2_000, 200_000):
        model = RandomTransformer(DIM, width, "identity", generator=generator)
        predictions = model.fit(train, width / train.trace).predict(test)  # the penalty in units of the features
        gaps.append((predictions - linear).norm().item() / linear.norm().item())
    assert gaps[1] < 0.3 * gaps[0]  # expected 0.1


def test_icl_error():
    predictions = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    answers = torch.tensor([1.0, 4.0])
    assert icl_error(predictions, answers).tolist() == [2.0, 8.5]
    assert icl_error(predictions[0], answers).item() == 2.0
    assert icl_error(predictions, answers.expand(2, 2)).tolist() == [2.0, 8.5]
