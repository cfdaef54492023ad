"""How the tests compare means: in standard errors of the sample itself, against the quantile for so many means."""

import torch
from torch import Tensor

from icl_lib.sweeps import deviation_limit, largest_deviation


def assert_mean(samples: Tensor, expected: Tensor | float) -> None:
    """The mean over the first axis is the expected one; the level 1e-3 is shared by all means of the call."""
    samples = samples.double().flatten(1) if samples.ndim > 1 else samples.double()[:, None]
    mean, se = samples.mean(0), samples.std(0) / len(samples) ** 0.5
    theory = torch.as_tensor(expected, dtype=torch.float64).flatten().expand(mean.shape)
    assert largest_deviation(mean, se, theory) < deviation_limit(mean.numel(), len(samples))


def assert_same_mean(one: Tensor, other: Tensor) -> None:
    """Two independent samples have the same mean over the first axis."""
    one, other = one.double().reshape(len(one), -1), other.double().reshape(len(other), -1)
    difference = one.mean(0) - other.mean(0)
    se = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    limit = deviation_limit(difference.numel(), min(len(one), len(other)))
    assert largest_deviation(difference, se, torch.zeros_like(se)) < limit
