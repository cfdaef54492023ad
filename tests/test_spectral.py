"""Macroscopic measures: brute force, hand-made spectra, invariances, and the linear model where all is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import spectral
from icl_lib.dynamics import LinearDynamics
from tests.zscore import assert_mean

D = torch.float64
PUBLISHED = [3.0, 1.0, 0.5, 0.1, 0.0]


def normal(*shape, seed=0, dtype=D):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(size, seed=0):
    return torch.linalg.qr(normal(size, size, seed=seed)).Q


def with_spectrum(sigma, rows, columns, seed=0):
    n = len(sigma)
    return rotation(rows, seed)[:, :n] * torch.tensor(sigma, dtype=D) @ rotation(columns, seed + 1)[:n]


def by_hand(sigma):
    """The definition, term by term."""
    shares = [s / math.fsum(sigma) for s in sigma]
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0))


def test_effective_rank_of_the_published_spectrum():
    assert by_hand(PUBLISHED) == pytest.approx(2.5471, abs=5e-5)
    for matrix in (torch.diag(torch.tensor(PUBLISHED, dtype=D)), with_spectrum(PUBLISHED, 6, 9)):
        assert spectral.effective_rank(matrix).item() == pytest.approx(by_hand(PUBLISHED), rel=1e-12)
        for skip in (1, 2, 3):
            expected = by_hand(PUBLISHED[skip:])
            assert spectral.effective_rank(matrix, skip).item() == pytest.approx(expected, rel=1e-10)
    assert spectral.effective_rank(torch.eye(7)).item() == pytest.approx(7, rel=1e-6)


def test_effective_rank_of_a_batch_is_that_of_each_matrix():
    batch = normal(2, 3, 5, 4)
    expected = [[by_hand(torch.linalg.svdvals(m).tolist()[1:]) for m in row] for row in batch]
    torch.testing.assert_close(spectral.effective_rank(batch, 1), torch.tensor(expected, dtype=D))


@given(
    sigma=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    scale=st.floats(1e-6, 1e6),
    sign=st.sampled_from([-1, 1]),
    seed=st.integers(0, 99),
)
def test_effective_rank_depends_on_the_shape_of_the_spectrum_only(sigma, scale, sign, seed):
    matrix = with_spectrum(sigma, 6, 7, seed)
    rank = spectral.effective_rank(matrix).item()
    assert 1 - 1e-12 <= rank <= len(sigma) + 1e-9
    assert rank == pytest.approx(by_hand(sigma), rel=1e-9)
    assert spectral.effective_rank(sign * scale * matrix).item() == pytest.approx(rank, rel=1e-9)
    assert spectral.effective_rank(rotation(6, seed) @ matrix).item() == pytest.approx(rank, rel=1e-9)
    assert spectral.effective_rank(matrix.mT).item() == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_the_rank_of_a_product_is_that_of_the_formed_product(skip):
    left, right = normal(3, 2, 32, 6), normal(3, 2, 6, 20, seed=1)
    left[..., 1:] *= 1e-3
    assert spectral.product_rank(left, right).shape == (3, 2)
    sigma = torch.linalg.svdvals(left @ right)[..., skip:6]
    expected = torch.special.entr(sigma / sigma.sum(-1, keepdim=True)).sum(-1).exp()
    torch.testing.assert_close(spectral.product_rank(left, right, skip), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(spectral.effective_rank(left @ right, skip), expected, rtol=1e-9, atol=1e-9)


def test_the_product_is_not_formed_because_float32_would_spoil_what_is_left_of_it():
    """Rank 8 of 128, spectrum falling to 1e-6 of its top: what the float32 product adds is as large as what is left."""
    decay = torch.logspace(0, -3, 8, dtype=D)
    left = (rotation(128)[:, :8] * decay).float()
    right = (decay[:, None] * rotation(128, 1)[:8]).float()
    exact = torch.linalg.svdvals(left.double() @ right.double())[6:8].tolist()
    assert spectral.product_rank(left, right, 6).item() == pytest.approx(by_hand(exact), rel=1e-6)
    naive = by_hand(torch.linalg.svdvals(left @ right).tolist()[6:])
    assert naive > by_hand(exact) + 1


def test_wide_factors_are_no_exception():
    left, right = normal(4, 9), normal(9, 5, seed=1)
    torch.testing.assert_close(spectral.product_rank(left, right), spectral.effective_rank(left @ right))


def test_factors_that_cancel_have_no_rank():
    left, right = rotation(4)[:, :2], rotation(4, 1)[:2]
    with pytest.raises(ValueError, match="product has no nonzero singular value beyond the first 2"):
        spectral.product_rank(left, right, 2)
    with pytest.raises(ValueError, match="product has no nonzero"):
        spectral.product_rank(left.mT, rotation(4)[:, 2:])  # orthogonal up to rounding


def test_extreme_sizes_make_no_difference():
    matrix, other = normal(4, 4), normal(4, 4, seed=1)
    for scale in (1e-160, 1e160):
        torch.testing.assert_close(spectral.effective_rank(scale * matrix), spectral.effective_rank(matrix))
        rank = spectral.product_rank(scale * matrix, scale * other)
        torch.testing.assert_close(rank, spectral.product_rank(matrix, other))
        distance = spectral.subspace_distance(matrix[:2], scale * other)
        torch.testing.assert_close(distance, spectral.subspace_distance(matrix[:2], other))
        torch.testing.assert_close(spectral.frequency_count(scale * matrix), spectral.frequency_count(matrix))


@pytest.mark.parametrize(("rows", "rank"), [(3, 3), (8, 3), (5, 5)])
def test_subspace_distance_is_the_residual_of_least_squares(rows, rank):
    matrix, reference = normal(rows, rank) @ normal(rank, 8, seed=1), normal(4, 8, seed=2)
    fit = torch.linalg.lstsq(matrix.mT, reference.mT, driver="gelsd").solution.mT
    expected = torch.linalg.norm(fit @ matrix - reference) / torch.linalg.norm(reference)
    torch.testing.assert_close(spectral.subspace_distance(matrix, reference), expected, rtol=1e-10, atol=1e-10)
    mixed = normal(rows, rows, seed=4) @ matrix @ rotation(8, 5)
    turned = spectral.subspace_distance(mixed, 7 * rotation(4, 3) @ reference @ rotation(8, 5))
    torch.testing.assert_close(turned, expected, rtol=1e-10, atol=1e-10)


def test_subspace_distance_at_its_ends():
    eye = torch.eye(6, dtype=D)
    assert spectral.subspace_distance(eye[:2], eye[2:4]).item() == 1
    assert spectral.subspace_distance(eye[:3], 5 * eye[1:3]).item() == 0
    assert spectral.subspace_distance(0 * eye, eye[:2]).item() == 1
    assert spectral.subspace_distance(normal(6, 6), normal(4, 6, seed=1)).item() < 1e-12  # full row space
    half = spectral.subspace_distance(eye[:1], eye[:2])
    assert half.item() == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_the_thin_factor_stands_for_the_product_and_leading_axes_broadcast():
    left, right, end = normal(5, 2, 12, 3), normal(5, 2, 3, 12, seed=1), normal(2, 12, 12, seed=2)
    of_products = spectral.subspace_distance(left @ right, end)
    assert of_products.shape == (5, 2)
    torch.testing.assert_close(spectral.subspace_distance(right, end), of_products, rtol=1e-9, atol=1e-9)
    single = spectral.subspace_distance((left @ right).float(), end)  # rounding errors are no directions
    torch.testing.assert_close(single, of_products, rtol=1e-4, atol=1e-5)


def test_the_distance_of_random_subspaces_is_that_of_the_docstring():
    random, reference = normal(4000, 5, 16), with_spectrum([3.0, 1.0, 0.1], 7, 16)
    assert_mean(spectral.subspace_distance(random, reference) ** 2, 1 - 5 / 16)


def test_frequency_count():
    p, angle = 13, 2 * math.pi / 13 * torch.arange(13, dtype=D)[:, None]
    columns = [f(k * angle) for k in (1, 4, 6) for f in (torch.cos, torch.sin)]
    table = torch.cat(columns, -1) @ rotation(6)
    assert spectral.frequency_count(table).item() == pytest.approx(3, rel=1e-9)
    assert spectral.frequency_count(5 + table.roll(3, 0)).item() == pytest.approx(3, rel=1e-9)
    assert spectral.frequency_count(torch.cos(2 * angle)).item() == pytest.approx(1, rel=1e-9)
    noise = normal(40, p, 48)
    power = torch.stack([(noise.mT @ torch.cat([torch.cos(k * angle), torch.sin(k * angle)], -1)) for k in range(1, 7)])
    share = power.square().sum((-1, -2)) / power.square().sum((0, -1, -2))
    torch.testing.assert_close(spectral.frequency_count(noise), torch.special.entr(share).sum(0).exp())


def test_autocorrelation_and_its_curvature_by_loops():
    losses = normal(2, 3, 15).abs()
    lags = [0, 4, 1]
    a = spectral.loss_autocorrelation(losses, torch.tensor(lags))
    assert a.shape == (2, 3, 3)
    for i, lag in enumerate(lags):
        expected = sum(losses[1, 2, t] * losses[1, 2, t + lag] for t in range(11)) / 11
        torch.testing.assert_close(a[1, 2, i], expected)
    curvature = spectral.curvature(losses, 5)
    assert curvature.shape == (2, 3, 11)
    for i in range(11):
        window = losses[0, 1, i : i + 5]
        expected = sum(window[t] * (window[t + 2] - 2 * window[t + 1] + window[t]) for t in range(3)) / 3
        torch.testing.assert_close(curvature[0, 1, i], expected)
    torch.testing.assert_close(spectral.curvature(losses)[..., 0], spectral.curvature(losses[..., :11])[..., 0])


def test_autocorrelation_of_losses_that_are_known():
    t = torch.arange(40, dtype=D)
    fall = torch.exp(-t / 8)
    a = spectral.loss_autocorrelation(fall, range(6))
    torch.testing.assert_close(a / a[0], torch.exp(-torch.arange(6, dtype=D) / 8))
    mean = fall[:-2].square().unfold(-1, 9, 1).mean(-1)
    torch.testing.assert_close(spectral.curvature(fall), mean * (1 - math.exp(-1 / 8)) ** 2)
    assert spectral.curvature(3 - 0.1 * t[:20]).abs().max() < 1e-12
    step = 1 / (1 + torch.exp((t - 20) / 2))
    early, late = spectral.curvature(step).argmin() + 5, spectral.curvature(step).argmax() + 5  # middles of windows
    assert early < 20 < late


def test_all_measures_on_the_linear_model():
    """Strengths of the modes are singular values of P_2 Q_1 in any basis: equal at first, then learned one by one."""
    law = LinearDynamics([2.0, 1.0, 0.5, 0.25], math.inf, learning_rate=0.05)
    times, basis = torch.linspace(0, 3000, 61, dtype=D), rotation(4)
    p, q = law.modes(times, 0.1, 0.1)
    left, right = basis * p[:, None], q[..., None] * basis.mT
    rank = spectral.product_rank(left, right)
    expected = [by_hand(row.tolist()) for row in law.logistic(times, 0.01)]
    torch.testing.assert_close(rank, torch.tensor(expected, dtype=D), rtol=1e-9, atol=1e-9)
    assert rank[0].item() == pytest.approx(4, rel=1e-9)
    assert rank.min() < rank[-1] - 0.5  # a dip and a rebound
    assert rank[-1].item() == pytest.approx(by_hand(law.limits.tolist()), rel=1e-6)
    assert spectral.subspace_distance(left @ right, (left @ right)[-1]).max() < 1e-7  # full row space at every time
    top = basis[:, :2].mT
    expected = law.limits[2:].square().sum().sqrt() / law.limits.square().sum().sqrt()
    torch.testing.assert_close(spectral.subspace_distance(top, (left @ right)[-1]), expected, rtol=1e-6, atol=0)


def test_products_on_both_sides_of_the_switch(generator):
    """Gram matrices where they are exact enough, QR elsewhere in the same batch; and factors with a zero column."""
    left, right = (torch.linalg.qr(torch.randn(40, 16, 6, generator=generator, dtype=D)).Q for _ in range(2))
    mix = torch.linalg.qr(torch.randn(40, 6, 6, generator=generator, dtype=D)).Q
    decades = torch.linspace(2, 7, 40, dtype=D)  # of the singular values, over the batch
    sigma = 10 ** (-decades[:, None] * torch.linspace(0, 1, 6, dtype=D))
    left = left * sigma.sqrt()[:, None] @ mix
    right = mix.mT @ (right * sigma.sqrt()[:, None]).mT
    for skip in (0, 2, 4):
        share = sigma[:, skip:] / sigma[:, skip:].sum(-1, keepdim=True)
        exact = torch.special.entr(share).sum(-1).exp()
        torch.testing.assert_close(spectral.product_rank(left, right, skip), exact, rtol=1e-6, atol=0)
    left[:, :, 0], right[:, 0] = 0, 0
    formed = spectral.effective_rank(left @ right)
    torch.testing.assert_close(spectral.product_rank(left, right), formed, rtol=1e-6, atol=0)
