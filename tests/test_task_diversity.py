"""Memorising against learning: the gap, its limits and rounding, the mean task of a pool, and Bayes on a pool."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special

from icl_lib import asymptotics
from icl_lib.models import LinearTransformer, dmmse, icl_error, population_error
from icl_lib.prompts import sample_prompts, sample_summaries
from icl_lib.sweeps import deviation_limit
from icl_lib.tasks import TaskPrior
from tests.zscore import assert_mean

pytestmark = pytest.mark.usefixtures("untyped")
INF = math.inf


def theory(alpha, kappa, tau, rho, lam=0.0):
    return asymptotics.linear_attention_errors(alpha=alpha, kappa=kappa, tau=tau, rho=rho, lam=lam)


def means(x, kappa):
    """Means of 1 / (v + x) and v^i / (v + x)^2 from the resolvent and its derivative."""
    m = asymptotics.marchenko_pastur_resolvent(x, kappa)
    v0 = (m**2 / kappa + m) / math.sqrt((x + 1 - 1 / kappa) ** 2 + 4 * x / kappa)
    return m, v0, m - x * v0, 1 - 2 * x * m + x**2 * v0


def train(dim, length, n_tasks, n, rho, generator, lam=1e-6):
    prior = TaskPrior(dim, n_tasks=n_tasks, sphere=True)
    tasks = prior.sample(n, generator=generator, dtype=torch.float32)
    options = {"target": "linear", "noise": rho**0.5, "scaling": "lu", "generator": generator}
    model = LinearTransformer().fit(sample_summaries(tasks, length, **options), n * lam / dim)
    icl, idg = (population_error(model.gamma, law, length, noise=rho**0.5).item() for law in (prior.fresh(), prior))
    return icl, idg, prior


def test_lead_over_the_pool(generator):
    """Twice as many tasks as dimensions: trained linear attention beats the Bayes predictor of its pool."""
    leads = []
    for _ in range(8):
        icl, _, prior = train(16, 160, 32, 1280, 0.1, generator)
        fresh = prior.fresh().sample(64, generator=generator)
        options = {"target": "linear", "noise": 0.1**0.5, "scaling": "lu", "generator": generator}
        prompts = sample_prompts(fresh, 160, **options)
        leads.append(icl_error(dmmse(prompts, prior.pool, noise=0.1**0.5), prompts.answer).item() - icl)
    mean, se = np.mean(leads), np.std(leads, ddof=1) / 8**0.5
    assert mean > deviation_limit(1, 8) * se


def test_gap_is_a_covariance():
    """Against the errors themselves, and its sign where the effective ridge is below the context's noise."""
    rng, negative = np.random.default_rng(1), 0
    for _ in range(200):
        alpha, kappa, tau, lam = np.exp(rng.uniform(np.log([0.1, 0.05, 0.05, 1e-4]), np.log([300, 20, 20, 10])))
        rho, lam = rng.uniform(0, 3), lam * rng.integers(2)
        e, psi = theory(alpha, kappa, tau, rho, lam), (1 + rho) / alpha
        nu = psi + e.ridge
        _, v0, v1, v2 = means(nu, kappa)
        assert e.gap == pytest.approx(nu**2 * (v0 - v1) + (v1 - v2 + psi * (v0 - v1)) * e.idg / tau, abs=1e-9 * e.icl)
        assert e.gap > -1e-9 * e.icl or e.ridge > psi
        negative += e.gap < -1e-3 * e.icl
    assert negative > 5


def test_corner():
    def gap(psi, kappa):
        _, v0, v1, _ = means(psi, kappa)
        return psi**2 * (v0 - v1)

    for kappa in (0.3, 1, 4):
        assert gap(0.2, kappa) == pytest.approx(theory(1.1 / 0.2, kappa, INF, 0.1).gap, rel=1e-9)
    assert gap(1e-9, 0.3) == pytest.approx(0.7, rel=1e-6)
    assert gap(1e-8, 1) == pytest.approx(1e-4 / 2, rel=1e-3)
    assert gap(1e-6, 4) == pytest.approx(1e-12 * (0.75**-3 - 1 / 0.75), rel=1e-3)
    for psi in (1e-5, 1e-7):
        for z in (-8, -2, 0, math.sqrt(2), 2, 8):  # kappa - 1 in units of the width of the corner
            step, omega = z * psi**0.5, math.sqrt((z**2 + 4) * psi)
            corner, following = (omega - step) ** 2 / (4 * omega), 3 * psi**2 * step / omega**3
            assert abs(gap(psi, 1 + step) - corner) < 0.3 * psi  # the next term is at most 0.289 psi
            assert abs(gap(psi, 1 + step) - corner - following) < psi**1.5


def endless(pool, length, rho):
    """The weights with the smallest error on the pool, from the exact error alone: its gradient is linear in them."""
    dim = pool.shape[1]
    basis = torch.eye(dim * (dim + 1), dtype=torch.float64).view(-1, dim, dim + 1)

    def error(gamma):
        return population_error(gamma, pool, length, noise=rho**0.5)

    nothing = error(torch.zeros(1, dim, dim + 1, dtype=torch.float64))
    one, minus = error(basis), error(-basis)
    slope, curvature = (one - minus) / 2, one + minus - 2 * nothing
    rows = torch.arange(len(basis))
    hessian = torch.stack([error(basis + basis[i]) for i in rows]) - one[:, None] - one + nothing
    hessian[rows, rows] = curvature
    return -torch.linalg.solve(hessian, slope).view(dim, dim + 1)


def test_mean_of_the_pool(generator):
    """Long contexts: a pool of Gaussian directions costs (1 + 1/K)(1 - (K - 1)/d), a pool of twins 1 - K/d."""
    dim, sizes, length = 5, (2, 3, 5), 8 * 10**6
    gaps = {False: [], True: []}
    for twins, found in gaps.items():
        for size in sizes:
            for _ in range(16):
                pool = TaskPrior(dim, sphere=True).sample(size, generator=generator)
                pool = torch.cat([pool, -pool]) if twins else pool
                gamma = endless(pool, length, 0.1)
                laws = (TaskPrior(dim, sphere=True), pool)
                icl, idg = (population_error(gamma, law, length, noise=0.1**0.5).item() for law in laws)
                found.append(icl - idg)
    single, twin = (torch.tensor(gaps[x], dtype=torch.float64).view(3, 16).T for x in (False, True))
    assert_mean(single, torch.tensor([(1 + 1 / k) * (1 - (k - 1) / dim) for k in sizes]))
    assert (twin - torch.tensor([1 - k / dim for k in sizes]))[:, :2].abs().max() < 1e-4  # K = d has a heavy tail


def test_order_of_limits():
    assert theory(1e9, 0.4, INF, 0.2).gap == pytest.approx(0.6, rel=1e-6)
    for tau in (1.5, 4):
        e = theory(1e9, 0.4, tau, 0.2)
        assert e.icl * 1.2e-9 == pytest.approx(0.6 * 0.2 / (tau - 1), rel=1e-6)
        psi = 1e-5  # the constant behind the pole
        constant = 0.2 + 0.6 + (0.6 * (0.4 + 0.2) + 0.2 * 0.4**2 / 0.6) / (tau - 1)
        assert theory(1.2 / psi, 0.4, tau, 0.2).icl - 0.12 / (tau - 1) / psi == pytest.approx(constant, abs=1e-3)
        assert theory(1e9, 3, tau, 0.2).gap == pytest.approx(0.2 / ((tau - 1) * 2), rel=1e-6)
        assert theory(1e9, INF, tau, 0.2).gap == pytest.approx(0, abs=1e-12)
    off = []
    for tau in (1e4, 1e6, 1e8):
        star = math.sqrt(0.7 * 0.2 / (0.3 * tau))
        psi, least = asymptotics.optimal_penalty(lambda psi, t=tau: theory(1.2 / psi, 0.3, t, 0.2).icl, 1e-7, 1)
        off.append((abs(psi / star - 1), abs((least - 0.9) / (0.6 * star) - 1)))
    for one, two in zip(off, off[1:], strict=False):
        assert all(8 < a / b < 12.5 for a, b in zip(one, two, strict=True))  # the next order is tau^(-1/2)


def test_longer_contexts_hurt(generator):
    """Few tasks, finite training, no penalty: ten times the examples, a larger error for fresh tasks."""
    for kappa, sign in ((0.5, 1), (2, -1)):
        short, long = (
            torch.tensor([train(8, alpha * 8, int(kappa * 8), 192, 0.1, generator)[0] for _ in range(12)])
            for alpha in (10, 100)
        )
        se = math.hypot(short.std() / 12**0.5, long.std() / 12**0.5)
        assert sign * (long.mean() - short.mean()) > deviation_limit(1, 12) * se


def test_floor(generator):
    for alpha, kappa, tau in ((0.3, 0.2, 2), (1e3, 0.2, 0.4), (1e3, 0.8, 2), (1e3, 1.2, 2)):
        curve = [theory(alpha, kappa, tau, 0.1, lam).icl for lam in np.geomspace(1e-3, 1e3, 25)]
        assert 0.1 + max(1 - kappa, 0) < min(curve) < 1.1 + 1e-2  # to answer 0 costs 1.1
    lam, _ = asymptotics.optimal_penalty(lambda lam: theory(10, 0.5, 3, 0.1, lam).icl, 1e-3, 1e3)
    found = torch.tensor([train(12, 120, 6, 432, 0.1, generator, lam)[0] for _ in range(12)])
    assert found.mean() - 0.6 > deviation_limit(1, 12) * found.std() / 12**0.5
    assert found.mean() < 1.1  # and the penalty leaves something to learn with


def tilt(s, alpha, rho):
    """Twice the information per dimension, and the error, at the shift s."""
    m, v0, v1, _ = means(s, alpha)
    a = m / (alpha * (s**2 * v0 + (2 * s - rho / alpha) * v1))
    mean_log = alpha * (math.log1p(m / alpha) - m / (m + alpha)) - math.log(m)
    return mean_log + math.log(a * alpha), rho + (2 * s - rho / alpha) * m


def pool_error(pool, new, length, rho, generator):
    """Error of Bayes' rule for a pool on a prompt for each of the new tasks; 8 tasks: as the library."""
    options = {"target": "linear", "noise": rho**0.5, "scaling": "lu", "generator": generator}
    prompts = sample_prompts(new, length, **options)
    pairs = (pool[:, :, None] * pool[:, None]).flatten(1)
    size = (prompts.inputs.mT @ prompts.inputs).flatten(1) @ pairs.mT
    p = torch.softmax(((prompts.labels[:, None] @ prompts.inputs @ pool.mT)[:, 0] - size / 2) / rho, dim=-1)
    if len(pool) == 8:
        guess = ((p @ pool) * prompts.query).sum(-1)
        torch.testing.assert_close(guess, dmmse(prompts, pool, noise=rho**0.5))
    return (new - p @ pool).square().mean().item() + rho


def test_random_energy(generator):
    """K = d: the error of the chapter's equations up to 1/d, with the record of K normals and not with 2 ln K."""
    alpha, rho, runs = 2, 0.1, 40
    limit = deviation_limit(2, runs)
    for dim in (8, 32):
        record = integrate.quad(lambda g, k=dim: 1 - special.ndtr(g) ** k - special.ndtr(-g) ** k, 0, 40)[0]
        errors = []
        for goal in (record**2 / dim, 2 * math.log(dim) / dim):
            s = optimize.brentq(lambda s, x=goal: tilt(s, alpha, rho)[0] - x, rho / alpha, 1e3, xtol=1e-14)
            errors.append(tilt(s, alpha, rho)[1])
        library = asymptotics.dmmse_error(dim=dim, n_tasks=dim, alpha=alpha, rho=rho)
        assert errors[0] == pytest.approx(library, rel=1e-8)
        found = []
        for _ in range(runs):
            prior = TaskPrior(dim, n_tasks=dim, sphere=True)
            prior.sample(1, generator=generator)
            fresh = prior.fresh().sample(64, generator=generator)
            found.append(pool_error(prior.pool, fresh, alpha * dim, rho, generator))
        mean, se = np.mean(found), np.std(found, ddof=1) / runs**0.5
        assert abs(mean / errors[0] - 1) + limit * se / errors[0] < 1 / dim
        assert abs(mean / errors[1] - 1) - limit * se / errors[1] > 1 / dim


def test_end_of_memory(generator):
    """On its own tasks: better with d below the predicted size of the pool, worse above, and equal at it."""
    information = tilt(0.5, 1, 0.5)[0] / 2
    x = np.linspace(-1, 1, 200_001)[1:-1] * 2 + 2  # support of the spectrum at alpha = 1: 0 to 4
    density = np.sqrt((4 - x) * x) / (2 * math.pi * x)
    assert information == pytest.approx((density * np.log1p(x / 0.5)).sum() * (x[1] - x[0]) / 2, rel=1e-2)
    runs, changes = 24, []
    for share in (0.75, 1, 1.25):
        found = []
        for dim in (6, 14):
            size, errors = round(math.exp(share * dim * information)), []
            for _ in range(runs):
                pool = TaskPrior(dim, sphere=True).sample(size, generator=generator)
                own = pool[torch.randint(size, (128,), generator=generator)]
                errors.append(pool_error(pool, own, dim, 0.5, generator))
            found.append((np.mean(errors), np.std(errors, ddof=1) / runs**0.5))
        (one, one_se), (two, two_se) = found
        changes.append((two - one) / math.hypot(one_se, two_se))
    limit = deviation_limit(3, runs)
    assert changes[0] < -limit and abs(changes[1]) < limit and changes[2] > limit


def test_negative_gap(generator):
    gaps = []
    for _ in range(10):
        icl, idg, _ = train(24, 2400, 6, 115, 1.0, generator)
        gaps.append(icl - idg)
    assert theory(100, 0.25, 0.2, 1).gap < -0.9 and theory(100, 0.25, 0.2, 1).ridge > 0.02
    assert np.mean(gaps) < -deviation_limit(1, 10) * np.std(gaps, ddof=1) / 10**0.5
