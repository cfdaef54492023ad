"""Claims of the chapter on in-context regression that no test of a single module covers."""

from __future__ import annotations

import math

import pytest
import torch
from zscore import assert_mean

from icl_lib import asymptotics, hermite, models, moments, prompts, sweeps, tasks


def draw(n, dim, length, target, seed, **options):
    generator = torch.Generator().manual_seed(seed)
    u = tasks.TaskPrior(dim, sphere=True).sample(n, generator=generator)
    return prompts.sample_summaries(u, length, target=target, noise=0.1, generator=generator, **options)


def best(length, dim, **options):
    law = {"n_prompts": math.inf, "penalty": 0.0, "intercept": True} | options
    return asymptotics.linear_transformer_error(dim=dim, length=length, target="relu", noise=0.1, **law)


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize("dim", [6, 24])
def test_share_of_the_label_square(scaling, dim):
    """gamma / (d beta + gamma) in the default scaling, gamma / (d^2 beta + gamma) in the other: z = 0 in the mean."""
    moment = moments.summary_moments(dim, dim, target="relu", noise=0.1)
    share = moment.gamma / (dim ** (1 if scaling == "unit" else 2) * moment.beta + moment.gamma)
    b2 = draw(100_000, dim, dim, "relu", dim, scaling=scaling).summary.square()
    assert_mean(b2[:, -1] - share * b2.sum(-1), 0.0)


@pytest.mark.parametrize("length", [3, 20])
def test_intercept(length):
    """The best linear Transformer without a constant has the squared mean label as additional error."""
    summaries = draw(100_000, 6, length, "relu", length)
    mean, slope = hermite.expand("relu", 1).coefficients.tolist()
    shrink = slope**2 / (6 * moments.summary_moments(6, length, target="relu", noise=0.1).beta)
    guess = shrink * (summaries.query * summaries.summary[:, :6]).sum(-1)
    assert_mean((guess - summaries.answer) ** 2 - (guess + mean - summaries.answer) ** 2, mean**2)
    assert best(length, 6, intercept=False) - best(length, 6) == pytest.approx(mean**2, rel=1e-12)


def test_price_of_training():
    """The excess of trained models is that of least squares with unequal errors, and not that of Gaussian features."""
    dim, length, n, runs = 6, 12, 40 * 42, 64
    moment = moments.summary_moments(dim, length, target="relu", noise=0.1)
    mean, slope = hermite.expand("relu", 1).coefficients.tolist()
    optimum = slope**2 / (dim * moment.beta) * torch.eye(dim, dim + 1, dtype=torch.float64)
    variances = torch.tensor([moment.beta] * dim + [moment.gamma], dtype=torch.float64)
    excess = []
    for seed in range(runs):
        model = models.LinearTransformer(intercept=True).fit(draw(n, dim, length, "relu", seed), 1e-6)
        excess.append(((model.gamma - optimum) ** 2 * variances).sum().item() + (model.offset.item() - mean) ** 2)
    excess = torch.tensor(excess) * n / (dim * (dim + 1))  # the price, times the best error, as n grows

    summaries = draw(400_000, dim, length, "relu", 1000)
    guess = mean + ((summaries.query @ optimum) * summaries.summary).sum(-1)
    size = summaries.query.square().sum(-1) * (summaries.summary.square() / variances).sum(-1) / (dim * (dim + 1))
    price = ((guess - summaries.answer) ** 2 * size).mean().item()
    limit, error = sweeps.deviation_limit(1, runs), excess.std().item() / math.sqrt(runs)
    next_order = 2 * price / 40  # the price is exact as n grows; at n = 40 D the next order is D / n of it
    assert abs(excess.mean().item() - price) < limit * error + next_order
    assert price > 1.1 * best(length, dim)
    assert excess.mean().item() > best(length, dim) + limit * error
