"""Closed-form errors against Monte Carlo, against explicit least squares, and in their limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from icl_lib import asymptotics, hermite, models, moments, prompts, sweeps, tasks

TARGETS = ("linear", "relu", "tanh", "abs")


def best(target, length, dim=6, noise=0.2, **options):
    law = {"n_prompts": math.inf, "penalty": 0.0, "intercept": True} | options
    return asymptotics.linear_transformer_error(dim=dim, length=length, target=target, noise=noise, **law)


def draw(n, length, target, seed, dim=6, noise=0.2):
    generator = torch.Generator().manual_seed(seed)
    fresh = tasks.TaskPrior(dim).sample(n, generator=generator)
    return prompts.sample_summaries(fresh, length, target=target, noise=noise, generator=generator)


def optimum(summaries, target, length, noise=0.2):
    """Predictions of the best linear Transformer with intercept, from the derivation and not from the library."""
    mean, slope = hermite.expand(target, 1).coefficients.tolist()
    dim = summaries.dim
    beta = moments.summary_moments(dim, length, target=target, noise=noise).beta
    return mean + slope**2 / (dim * beta) * (summaries.query * summaries.summary[:, :dim]).sum(-1)


def mean_and_se(values):
    values = np.asarray(values)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [1, 4, 30])
def test_best_error(target, length):
    errors = []
    for seed in range(12):
        summaries = draw(4000, length, target, seed)
        errors.append(models.icl_error(optimum(summaries, target, length), summaries.answer).item())
    mean, se = mean_and_se(errors)
    assert abs(mean - best(target, length)) < sweeps.deviation_limit(len(TARGETS) * 3, 12) * se


@pytest.mark.parametrize("target", TARGETS)
def test_best_error_is_the_minimum_of_least_squares(target):
    """Ridge on 60 000 prompts comes within its own known excess of the formula, from above on average."""
    length = 5
    train, test = draw(60_000, length, target, 1), draw(60_000, length, target, 2)
    model = models.LinearTransformer(intercept=True).fit(train, 1e-3)
    squares = (model.predict(test) - test.answer) ** 2
    se = squares.std().item() / math.sqrt(len(test))
    excess = best(target, length) * 42 / 60_000
    assert abs(squares.mean().item() - best(target, length) - excess) < 5 * se


def test_foreign_examples():
    """A prediction from another task's examples adds its own variance to the second moment of the answer."""
    errors = []
    for seed in range(12):
        summaries = draw(4000, 8, "linear", seed)
        guess = optimum(summaries, "linear", 8)
        shrink = guess / (summaries.query * summaries.summary[:, :6]).sum(-1)
        wrong = shrink * (summaries.query * summaries.summary[:, :6].roll(1, dims=0)).sum(-1)
        errors.append(models.icl_error(wrong, summaries.answer).item())
    mean, se = mean_and_se(errors)
    assert abs(mean - (2 * (1 + 0.2**2) - best("linear", 8))) < sweeps.deviation_limit(1, 12) * se


@pytest.mark.parametrize("target", ["linear", "relu"])
def test_finite_n(target):
    """Many prompts per feature: the trained model's error is the formula's within Monte Carlo error."""
    n, errors = 60 * 42, []
    for seed in range(16):
        model = models.LinearTransformer(intercept=True).fit(draw(n, 12, target, 100 + seed), 1.0)
        test = draw(20_000, 12, target, 200 + seed)
        errors.append(models.icl_error(model.predict(test), test.answer).item())
    mean, se = mean_and_se(errors)
    assert abs(mean - best(target, 12, n_prompts=n, penalty=1.0)) < sweeps.deviation_limit(2, 16) * se


def test_even_target():
    """With slope 0 the best error is the variance of the answer, at any context length."""
    for length in (1, 10, 10**6):
        assert best("abs", length) == pytest.approx(1 + 0.2**2 - 2 / math.pi, abs=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_limits(target):
    residual = hermite.expand(target, 1).residual
    assert best(target, 10**10) == pytest.approx(residual**2 + 0.2**2, abs=1e-8)
    many = best(target, 9, n_prompts=10**9, penalty=1.0)
    assert many == pytest.approx(best(target, 9), rel=1e-6)
    phi = hermite.activation(target)
    second = hermite.gaussian_mean(lambda g: phi(g) ** 2, phi.kinks).item() + 0.2**2
    heavy = best(target, 9, n_prompts=50, penalty=1e12)
    assert heavy == pytest.approx(second - hermite.expand(target, 0).coefficients[0].item() ** 2, rel=1e-8)


@pytest.mark.parametrize(("spread", "penalty"), [(0.0, 3.0), (0.8, 3.0), (0.8, 0.05)])
def test_gaussian_features_by_brute_force(spread, penalty):
    """Ridge on Gaussian features with the same covariance, lengths and signal, at d = 12."""
    dim, length, n, noise = 12, 12, 200, 0.2
    m = moments.summary_moments(dim, length, target="linear", noise=noise)
    spectrum = np.array(([m.beta] * dim + [m.gamma]) * dim)
    rng, errors = np.random.default_rng(0), []
    explained = 1 / (dim * m.beta)
    norms = np.exp(spread * rng.standard_normal(20_000))
    norms /= norms.mean()
    for _ in range(40):
        signal = rng.standard_normal(spectrum.size) * (np.arange(spectrum.size) % (dim + 1) < dim)
        signal *= math.sqrt(explained / (signal**2 * spectrum).sum())
        rest = 1 + noise**2 - explained
        x = rng.standard_normal((n, spectrum.size)) * np.sqrt(spectrum * rng.choice(norms, n)[:, None])
        y = x @ signal + math.sqrt(rest) * rng.standard_normal(n)
        w = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(n), y)
        errors.append(((w - signal) ** 2 * spectrum).sum() + rest)
    mean, se = mean_and_se(errors)
    law = {"dim": dim, "n_prompts": n, "penalty": penalty, "intercept": False}
    formula = best("linear", length, **law, norm_samples=norms if spread else None)
    assert abs(mean - formula) < sweeps.deviation_limit(3, 40) * se + 2 * formula / n  # the equivalent errs by O(1/n)
    if penalty < 1:
        assert (
            abs(mean - best("linear", length, **law)) > sweeps.deviation_limit(3, 40) * se
        )  # equal lengths would not do


def test_equal_lengths_are_the_first_formula():
    for n, penalty in ((5, 0.0), (5, 1e-6), (500, 1e-9), (500, 10.0), (110, 1e-3), (2000, 0.0)):
        m = moments.summary_moments(10, 6, target="relu", noise=0.2)
        groups = [(m.beta, 100), (m.gamma, 10)]
        error = best("relu", 6, dim=10, n_prompts=n, penalty=penalty)
        assert error == pytest.approx(best("relu", 6, dim=10, n_prompts=n, penalty=penalty, norm_samples=[1.0, 1.0]))
        nu = 0.0
        if penalty > 0 or n < 110:
            nu = brentq(lambda nu: n - penalty / nu - sum(m * e / (e + nu) for e, m in groups), 1e-15, 1e3, xtol=1e-16)  # noqa: B023
        two = sum(m * e**2 / (e + nu) ** 2 for e, m in groups)
        mean, slope = hermite.expand("relu", 1).coefficients.tolist()
        explained = slope**4 / (10 * m.beta)
        rest = 0.5 + 0.2**2 - mean**2 - explained
        expected = (explained * nu**2 / (m.beta + nu) ** 2 + rest) / (1 - two / n)
        assert error == pytest.approx(expected, rel=1e-6)


def test_unequal_lengths_are_continuous_at_penalty_0():
    norms = [0.2, 0.5, 1.0, 2.3]
    for n in (20, 60):  # fewer and more prompts than features
        law = {"n_prompts": n, "norm_samples": norms}
        limit = best("relu", 5, **law, penalty=0.0)
        assert best("relu", 5, **law, penalty=1e-9) == pytest.approx(limit, rel=1e-4)


def test_pole_and_bad_input(untyped):
    with pytest.raises(ValueError, match="n_prompts is 42 at penalty 0"):
        best("linear", 5, n_prompts=42, penalty=0.0)
    for value in ([1.0, 0.0], [math.nan], [], "r", [[1.0]]):
        with pytest.raises(ValueError, match="norm_samples"):
            best("linear", 5, n_prompts=30, penalty=1.0, norm_samples=value)
    for name, value in (("dim", 0), ("length", 2.5), ("n_prompts", -1), ("penalty", -1.0), ("noise", math.nan)):
        with pytest.raises(ValueError, match=name):
            arguments = {"dim": 4, "length": 5, "n_prompts": 10, "penalty": 1.0, "noise": 0.1} | {name: value}
            asymptotics.linear_transformer_error(target="relu", **arguments)
    assert best("linear", 5, n_prompts=41, penalty=0.0) > best("linear", 5, n_prompts=20, penalty=0.0)
