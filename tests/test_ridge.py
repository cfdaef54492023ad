"""Ridge regression against augmented least squares, its optimality conditions, and its hard cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import ridge as module
from icl_lib.ridge import ridge, ridge_path

FEW, MANY = [10.0, 0.3, 2.0], torch.logspace(-3, 3, module.EIGEN_FROM + 2, dtype=torch.float64)
SHAPES = {"tall": (40, 7), "square": (12, 12), "wide": (7, 40)}


def problem(shape, generator, dtype=torch.float64, batch=()):
    features = torch.randn(*batch, *shape, generator=generator, dtype=dtype)
    return features, torch.randn(*batch, shape[0], generator=generator, dtype=dtype)


def by_least_squares(features, targets, penalty):
    """The same weights as the least-squares solution with sqrt(penalty) I below the features."""
    x, y = features.double().numpy(), targets.double().numpy()
    k = x.shape[1]
    stacked = np.vstack([x, np.sqrt(penalty) * np.eye(k)])
    return torch.from_numpy(np.linalg.lstsq(stacked, np.concatenate([y, np.zeros(k)]), rcond=None)[0])


def ill_conditioned(shape, generator, decades):
    """float32 features whose singular values span so many decades."""
    n, k = shape
    left = torch.linalg.qr(torch.randn(n, min(n, k), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(k, min(n, k), generator=generator, dtype=torch.float64))[0]
    return (left @ torch.diag(torch.logspace(0, -decades, min(n, k), dtype=torch.float64)) @ right.mT).float()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("penalty", [1e-4, 1.0, 1e4])
def test_agrees_with_augmented_least_squares(shape, penalty, generator):
    x, y = problem(shape, generator)
    torch.testing.assert_close(ridge(x, y, penalty), by_least_squares(x, y, penalty), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_agrees_with_primal_and_dual_normal_equations(shape, generator):
    x, y = problem(shape, generator)
    primal = torch.linalg.solve(x.mT @ x + 0.7 * torch.eye(shape[1]).double(), x.mT @ y)
    dual = x.mT @ torch.linalg.solve(x @ x.mT + 0.7 * torch.eye(shape[0]).double(), y)
    for expected in (primal, dual):
        torch.testing.assert_close(ridge(x, y, 0.7), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("penalties", [FEW, MANY, [0.0, 1.0, 0.0]], ids=["few", "many", "with zeros"])
def test_a_path_is_single_solves(shape, dtype, penalties, generator):
    x, y = problem(shape, generator, dtype)
    path = ridge_path(x, y, penalties)
    assert path.shape == (len(penalties), shape[1]) and path.dtype == torch.float64
    for weights, penalty in zip(path, penalties, strict=True):
        torch.testing.assert_close(weights, ridge(x, y, float(penalty)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("penalties", [FEW, MANY, [0.0]], ids=["few", "many", "zero"])
def test_a_batch_is_a_loop(shape, penalties, generator):
    x, y = problem(shape, generator, batch=(2, 3))
    path = ridge_path(x, y, penalties)
    assert path.shape == (2, 3, len(penalties), shape[1])
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(path[i, j], ridge_path(x[i, j], y[i, j], penalties), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [3, 7])
def test_penalty_zero_is_the_solution_of_minimum_norm(shape, rank, generator):
    x, y = problem(shape, generator)
    x = x[:, :rank] @ torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.pinv(x.numpy(), rcond=1e-12)) @ y
    torch.testing.assert_close(ridge(x, y, 0.0), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ridge(x, y, 1e-4), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("shape", [(100, 30), (30, 100), (3000, 10)])
@pytest.mark.parametrize("penalties", [[1e-2, 1e-5, 1e-9], np.logspace(-9, 0, 14).tolist()], ids=["few", "many"])
@pytest.mark.parametrize("decades", [0, 3, 5])
def test_float32_features_give_the_float64_solution(shape, penalties, decades, generator):
    """The hard cases need the float64 Gram matrix: small penalties against a large condition number."""
    x = ill_conditioned(shape, generator, decades)
    y = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    for weights, penalty in zip(ridge_path(x, y, penalties), penalties, strict=True):
        expected = by_least_squares(x, y, penalty)
        assert (weights - expected).norm() <= 1e-8 * expected.norm()


def test_the_float64_gram_matrix_is_formed_only_if_needed(generator, monkeypatch):
    calls = []
    solve = module.solve

    def counted(gram, right, penalties, apply, exact=None):
        calls.append(len(penalties))
        return solve(gram, right, penalties, apply, exact)

    monkeypatch.setattr(module, "solve", counted)
    y = torch.randn(300, generator=generator, dtype=torch.float64)
    ridge_path(ill_conditioned((300, 60), generator, 0), y, [1.0, 1e-3])
    assert calls == [2]
    ridge_path(ill_conditioned((300, 60), generator, 5), y, [1.0, 1e-9])
    assert calls == [2, 2, 1]


def test_features_that_overflow_in_float32(generator):
    x, y = problem((8, 5), generator, torch.float32)
    expected = ridge(x, y, 1e-20) * 1e-25
    for penalties in ([1e30], [1e30] * module.EIGEN_FROM):
        torch.testing.assert_close(ridge_path(x * 1e25, y, penalties)[0], expected, rtol=1e-5, atol=0)


@given(seed=st.integers(0, 2**20), n=st.integers(1, 9), k=st.integers(1, 9), power=st.floats(-6, 6))
def test_the_gradient_vanishes_and_the_norm_falls_with_the_penalty(seed, n, k, power):
    x, y = problem((n, k), torch.Generator().manual_seed(seed))
    penalty = 10.0**power
    w, larger = ridge_path(x, y, [penalty, 2 * penalty])
    gradient = x.mT @ (x @ w - y) + penalty * w
    assert gradient.norm() <= 1e-9 * (1 + (x.mT @ y).norm() + (x.norm() ** 2 + penalty) * w.norm())
    assert larger.norm() < w.norm()


def test_limits_of_the_penalty(generator):
    x, y = problem((30, 6), generator)
    huge = ridge(x, y, 1e12)
    torch.testing.assert_close(1e12 * huge, x.mT @ y, rtol=1e-9, atol=0)
    torch.testing.assert_close(ridge(x, y, 1e-12), ridge(x, y, 0.0), rtol=1e-9, atol=0)


def test_scaling_of_features_targets_and_penalty(generator):
    x, y = problem((20, 30), generator)
    torch.testing.assert_close(ridge(3 * x, 2 * y, 9 * 0.5), ridge(x, y, 0.5) * 2 / 3)
    assert not ridge(x, 0 * y, 0.5).any() and not ridge(0 * x, y, 0.5).any()


@pytest.mark.parametrize("count", [1, module.EIGEN_FROM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_penalty_that_float64_cannot_resolve_is_refused(count, dtype):
    with pytest.raises(ValueError, match="penalty is 1e-20, too small for a system of trace 40"):
        ridge_path(torch.ones(8, 5, dtype=dtype), torch.arange(8, dtype=dtype), [1e-20] * count)


def test_arguments_are_left_as_they_were(generator):
    x, y = problem((9, 4), generator)
    before = x.clone(), y.clone()
    ridge_path(x, y, FEW)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-60, 1e-35, 1e60])
def test_tiny_and_huge_targets_keep_their_digits(dtype, scale, generator):
    x = torch.randn(30, 12, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ridge(x, scale * y, 2.0) / scale, ridge(x, y, 2.0), rtol=1e-10, atol=0)
