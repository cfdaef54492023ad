"""Learning curves of linear attention: published numbers, limits, exact errors of given weights, and simulation."""

import math
from itertools import pairwise
from pathlib import Path

import mpmath
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import asymptotics, dynamics
from icl_lib.asymptotics import AttentionErrors, linear_attention_errors, marchenko_pastur_resolvent
from icl_lib.models import LinearTransformer, dmmse, icl_error, population_error
from icl_lib.prompts import sample_prompts, sample_summaries
from icl_lib.ridge import ridge
from icl_lib.sweeps import deviation_limit
from icl_lib.tasks import TaskPrior
from tests.zscore import assert_mean

D = torch.float64
# Values of two public implementations, and simulations published with Lu et al. 2025.
REFERENCE = pd.read_csv(Path(__file__).parent / "reference" / "linear_attention.csv")
FORMULA, SIMULATION, LIMIT = (REFERENCE[REFERENCE.kind == kind] for kind in ("formula", "simulation", "limit"))


def law(alpha, kappa, tau, rho, lam):
    return {"alpha": alpha, "kappa": kappa, "tau": tau, "rho": rho, "lam": lam}


def errors(alpha, kappa, tau, rho, lam) -> AttentionErrors:
    return linear_attention_errors(**law(alpha, kappa, tau, rho, lam))


def experiment(dim, alpha, kappa, tau, rho, lam, seed, dtype=D):
    """Sample, fit, and the errors of the fitted weights: exact for fresh tasks and for the pool; and in training."""
    generator = torch.Generator().manual_seed(seed)
    n, length = round(tau * dim**2), round(alpha * dim)
    prior = TaskPrior(dim, n_tasks=None if kappa == math.inf else int(kappa * dim), sphere=True)
    tasks = prior.sample(n, generator=generator, dtype=dtype)
    train = sample_summaries(tasks, length, target="linear", noise=rho**0.5, scaling="lu", generator=generator)
    model = LinearTransformer().fit(train, n * lam / dim)
    exact = [population_error(model.gamma, p, length, noise=rho**0.5) for p in (prior.fresh(), prior)]
    return torch.stack([*exact, icl_error(model.predict(train), train.answer)])


@pytest.mark.parametrize("row", list(FORMULA.itertuples()), ids=lambda row: f"{row.alpha}-{row.kappa}-{row.tau}")
def test_published_values_of_the_formula(row):
    e = errors(row.alpha, row.kappa, row.tau, row.rho, float(row.lam))
    assert (e.icl, e.idg) == (pytest.approx(row.icl, abs=1e-8), pytest.approx(row.idg, abs=1e-8))


@pytest.mark.parametrize("row", list(LIMIT.itertuples()), ids=lambda row: f"{row.kappa}")
def test_published_gaps_in_high_dimension(row):
    assert errors(row.alpha, row.kappa, row.tau, row.rho, 0).gap == pytest.approx(row.gap, abs=5.1e-6)


def test_further_values():
    """Computed from the published formulas by an independent script."""
    for point, icl, idg in (
        ((1, 0.5, 0.5, 0.01, 0.1), 1.1804458316, 0.7412802062),
        ((4, 2, 3, 0.25, 0.1), 0.7695973270, 0.6305462330),
    ):
        e = errors(*point)
        assert (e.icl, e.idg) == (pytest.approx(icl, abs=1e-10), pytest.approx(idg, abs=1e-10))


@pytest.mark.parametrize("row", list(SIMULATION[SIMULATION.dim < 64].itertuples()), ids=lambda r: f"{r.dim}-{r.kappa}")
@pytest.mark.usefixtures("untyped")
def test_published_simulations(row):
    """Ours agree with the published ones within three joint standard errors; both lie above the limit."""
    dim, seeds = int(row.dim), 8 if row.dim > 10 else 100 if row.kappa < 1 else 40
    runs = [
        experiment(dim, row.alpha, row.kappa, row.tau, row.rho, float(row.lam), seed, torch.float32)
        for seed in range(seeds)
    ]
    gaps = torch.stack([icl - idg for icl, idg, _ in runs])
    se = math.hypot(row.gap_se, gaps.std().item() / seeds**0.5)
    assert abs(gaps.mean().item() - row.gap) < 3 * se
    assert gaps.mean() > errors(row.alpha, row.kappa, row.tau, row.rho, 0).gap


def ridgeless(alpha, kappa, tau, rho):
    """The two published branches at lambda = 0."""
    q = (1 + rho) / alpha
    if tau > 1:
        m, step = marchenko_pastur_resolvent(q, kappa), 1e-5 * q
        slope = (marchenko_pastur_resolvent(q + step, kappa) - marchenko_pastur_resolvent(q - step, kappa)) / (2 * step)
        e0 = rho + q - q**2 * m
        return rho + q - 2 * q**2 * m - (1 + q) * q**2 * slope + (1 + q) * m * e0 / (tau - 1), tau * e0 / (tau - 1)
    mu = q * marchenko_pastur_resolvent(q, kappa / tau)
    icl = 1 + rho - 2 * tau * (1 - mu) + (1 + q) * tau / (1 - tau) * (mu * rho / q + (1 - mu) * (1 - tau * (1 - mu)))
    return icl, None


RATIOS = [
    (a, k, t, r) for a in (0.3, 30) for k in (0.4, 1, 3, math.inf) for t in (0.2, 0.95, 1.05, 4) for r in (0, 0.5)
]


@pytest.mark.parametrize("point", RATIOS, ids=str)
def test_the_branches_without_penalty_are_the_published_ones_and_limits(point):
    bare = errors(*point, 0)
    icl, idg = ridgeless(*point)
    assert bare.icl == pytest.approx(icl, rel=1e-8)  # by a numerical derivative
    assert idg is None or bare.idg == pytest.approx(idg, rel=1e-12)
    near = errors(*point, 1e-15)
    for name in ("icl", "idg", "train", "ridge"):
        assert getattr(near, name) == pytest.approx(getattr(bare, name), rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("kappa", [0.3, 1, 2.5, math.inf])
def test_infinite_ratios_are_limits(kappa):
    for lam in (0, 0.2):
        for one, other in (((kappa, math.inf), (kappa, 1e12)), ((math.inf, 3), (1e12, 3))):
            exact, near = (errors(2, *ratios, 0.1, lam) for ratios in (one, other))
            for name in ("icl", "idg", "train", "ridge"):
                assert getattr(exact, name) == pytest.approx(getattr(near, name), rel=1e-9, abs=1e-11)
        endless = errors(2, math.inf, math.inf, 0.1, lam)
        assert endless.icl == pytest.approx(endless.idg, rel=1e-14) and endless.gap == pytest.approx(0, abs=1e-14)
    best = errors(2, math.inf, math.inf, 0.1, 0).icl
    assert best == pytest.approx(0.1 + 1.1 / (2 + 1.1), rel=1e-14)


@pytest.mark.parametrize("kappa", [0.5, 4])
def test_the_pole_and_its_cure(kappa):
    """Ridgeless errors grow like 1 / |tau - 1|, those with a penalty like its inverse root; a tuned one has no peak."""
    q = 1.1 / 2
    m = marchenko_pastur_resolvent(q, kappa)
    height = (1 + q) * m * (0.1 + q - q**2 * m)
    for tau in (1 - 1e-6, 1 + 1e-6):
        assert errors(2, kappa, tau, 0.1, 0).icl * abs(tau - 1) == pytest.approx(height, rel=1e-4)
    low, high = (errors(2, kappa, 1, 0.1, lam).icl for lam in (1e-10, 1e-8))
    assert low / high == pytest.approx(10, rel=1e-3)

    def tuned(tau):
        return asymptotics.optimal_penalty(lambda lam: errors(2, kappa, tau, 0.1, lam).icl, 1e-3, 10)[1]

    assert tuned(0.8) > tuned(1) > tuned(1.25)


def test_memorisation_and_generalisation():
    """With a long context and endless training, fresh tasks cost 1 - kappa below kappa = 1 and nothing above."""
    for kappa in (0.2, 0.7, 1.5, 3):
        gap = errors(1e9, kappa, math.inf, 0.1, 0).gap
        assert gap == pytest.approx(max(1 - kappa, 0), abs=1e-6)
    curve = [errors(alpha, 0.5, 1.5, 0.1, 0).icl for alpha in (0.3, 3, 300)]
    assert curve[0] > curve[1] and curve[2] > 1.5 * curve[1]  # a longer context can hurt where tasks are few
    heavy = errors(2, 0.5, 3, 0.1, 1e9)
    for value in (heavy.icl, heavy.idg, heavy.train):
        assert value == pytest.approx(1.1, rel=1e-6)
    noisy = errors(9, 1, 0.25, 2, 0)
    assert noisy.gap < 0  # overfitted noise weighs more in the directions of the pool


ratio = st.floats(0.05, 50)


@given(
    ratio,
    ratio,
    ratio.filter(lambda t: abs(t - 1) > 1e-3),
    st.floats(0, 2),
    st.one_of(st.just(0.0), st.floats(1e-8, 1e3)),
)
def test_properties_of_the_errors(alpha, kappa, tau, rho, lam):
    e = errors(alpha, kappa, tau, rho, lam)
    assert min(e.icl, e.idg) > rho and e.idg >= e.train >= 0
    assert e.icl >= asymptotics.bayes_ridge_error(alpha, rho) * (1 - 1e-9)
    q, tiny = (1 + rho) / alpha, 1e-9 * (1 + tau)
    share = e.ridge * marchenko_pastur_resolvent(q + e.ridge, kappa)
    assert share == pytest.approx(1 - tau + (tau * lam / e.ridge if lam > 0 else max(tau - 1, 0)), abs=tiny)


@given(st.floats(1e-12, 1e6), st.floats(1e-3, 1e3))
def test_resolvent_to_rounding_error(x, kappa):
    with mpmath.workdps(60):
        b = mpmath.mpf(x) + 1 - 1 / mpmath.mpf(kappa)
        exact = 2 / (b + mpmath.sqrt(b**2 + 4 * mpmath.mpf(x) / mpmath.mpf(kappa)))
        assert abs(marchenko_pastur_resolvent(x, kappa) / exact - 1) < 1e-14 * (1 + 1 / abs(b) / kappa)


def test_resolvent_at_its_ends():
    assert marchenko_pastur_resolvent(0.3, math.inf) == 1 / 1.3
    assert marchenko_pastur_resolvent(0, 4) == pytest.approx(4 / 3)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("point", "seeds"), [((1, 2, 0.5, 0.1, 1.0), 30), ((1, 0.5, 3, 0.1, 0.1), 30)], ids=str)
def test_simulations_tend_to_the_formula(point, seeds):
    """The bias is of order 1/d: twice the mean at 2 d less that at d is within Monte Carlo error of the formula."""
    small, large = (torch.stack([experiment(d, *point, seed) for seed in range(seeds)]) for d in (8, 16))
    e = errors(*point)
    theory = torch.tensor([e.icl, e.idg, e.train], dtype=D)
    se = (4 * large.var(0) + small.var(0)).div(seeds).sqrt()
    assert ((2 * large.mean(0) - small.mean(0) - theory) / se).abs().max() < deviation_limit(6, seeds)
    bias = (small.mean(0) - theory) / (small.std(0) / seeds**0.5)
    assert bias.abs().max() > deviation_limit(6, seeds)  # at d = 8 alone it shows


@pytest.mark.usefixtures("untyped")
def test_the_training_error_differs_by_the_number_of_weights():
    """Without penalty its bias is that of a share of d^2 in place of d (d + 1) weights."""
    dim, tau, seeds = 16, 1.5, 30
    runs = torch.stack([experiment(dim, 2, 2, tau, 0.1, 1e-6, seed)[2] for seed in range(seeds)])
    formula = errors(2, 2, tau, 0.1, 0).train
    se, share = runs.std().item() / seeds**0.5, (1 - (dim + 1) / (dim * tau)) / (1 - 1 / tau)
    assert abs(runs.mean().item() - share * formula) < deviation_limit(1, seeds) * se
    assert abs(runs.mean().item() - formula) > deviation_limit(1, seeds) * se


COVARIANCE = torch.tensor([[1.0, 0.3, 0, 0], [0.3, 2, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.2]], dtype=D)
TASKS = torch.diag(torch.tensor([1.0, 2.0, 0.5, 0.2], dtype=D))
PRIORS = {
    "gaussian": (TaskPrior(4), None),
    "sphere": (TaskPrior(4, sphere=True), COVARIANCE),
    "correlated": (TaskPrior(4, TASKS), COVARIANCE),
    "pool": (TaskPrior(4, n_tasks=3), COVARIANCE),
}


@pytest.mark.parametrize(("prior", "covariance"), PRIORS.values(), ids=PRIORS)
def test_population_error_is_the_mean_over_prompts(prior, covariance, generator):
    gamma = 0.3 * torch.randn(2, 4, 5, generator=generator, dtype=D)
    tasks = prior.sample(30_000, generator=generator)
    options = {"noise": 0.5, "covariance": covariance}
    test = sample_summaries(tasks, 6, target="linear", scaling="lu", generator=generator, **options)
    squares = (torch.einsum("ni,mij,nj->nm", test.query, gamma, test.summary) - test.answer[:, None]) ** 2
    assert_mean(squares, population_error(gamma, prior, 6, **options))
    if prior.pool is not None:
        again = population_error(gamma, prior.pool, 6, **options)
        assert torch.equal(again, population_error(gamma, prior, 6, **options))
    assert population_error(gamma[0], prior, 6, **options).shape == ()


def test_population_error_of_a_large_pool_is_that_of_fresh_tasks(generator):
    gamma = 0.3 * torch.randn(4, 5, generator=generator, dtype=D)
    for sphere in (True, False):
        prior = TaskPrior(4, sphere=sphere)
        pools = prior.sample(40_000, generator=generator).view(20, 2000, 4)
        values = torch.stack([population_error(gamma, pool, 6, noise=0.5) for pool in pools])
        assert_mean(values, population_error(gamma, prior, 6, noise=0.5))


def test_the_best_layer(generator):
    """Its risk is the exact error of its matrix, every other matrix has more, and prompts confirm it."""
    best, risk = asymptotics.linear_attention_optimum(COVARIANCE, 6, 0.25, TASKS)
    prior, stretched = TaskPrior(4, TASKS), 4 * COVARIANCE  # scaling "lu" divides by d

    def error(matrix):
        gamma = torch.cat([matrix / 4, torch.zeros(4, 1, dtype=D)], dim=1)
        return population_error(gamma, prior, 6, noise=0.5, covariance=stretched).item()

    assert error(best) == pytest.approx(risk, rel=1e-12)
    for _ in range(10):
        step = 1e-2 * torch.randn(4, 4, generator=generator, dtype=D)
        up, down = error(best + step) - risk, error(best - step) - risk
        assert up > 0 and up == pytest.approx(down, rel=1e-6)
    tasks = prior.sample(30_000, generator=generator)
    options = {"target": "linear", "noise": 0.5, "covariance": stretched, "scaling": "lu", "generator": generator}
    prompts = sample_prompts(tasks, 6, **options)
    gradient = torch.einsum("nl,nld->nd", prompts.labels, prompts.inputs) / 6
    assert_mean((torch.einsum("ni,ij,nj->n", prompts.query, best, gradient) - prompts.answer) ** 2, risk)


def test_special_cases_of_the_best_layer():
    """A known value; C = I without noise is the fixed point of learning dynamics; and the end of a learning curve."""
    spectrum = torch.tensor([0.2, 0.5, 1, 1.5, 3], dtype=D)
    assert asymptotics.linear_attention_optimum(spectrum.diag(), 12, 0.3)[1] == pytest.approx(2.1890109890, abs=1e-10)
    matrix, _ = asymptotics.linear_attention_optimum(spectrum.diag(), 12, 0)
    torch.testing.assert_close(matrix, dynamics.LinearDynamics(spectrum, 12).limits.diag())
    gaps = []
    for dim in (20, 40):  # labels of variance 1
        _, risk = asymptotics.linear_attention_optimum(torch.eye(dim, dtype=D) / dim, 2 * dim, 0.1)
        gaps.append(risk / errors(2, math.inf, math.inf, 0.1, 0).icl - 1)
    assert abs(gaps[1]) < 0.02 and gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(("alpha", "rho"), [(0.5, 0.3), (2, 0.1), (0.5, 0.0)])
def test_ridge_within_the_prompt(alpha, rho, generator):
    """At the penalty rho its error is that of the formula, and other penalties do worse."""
    dim = 50
    tasks = TaskPrior(dim).sample(200, generator=generator)
    options = {"target": "linear", "noise": rho**0.5, "scaling": "lu", "generator": generator}
    prompts = sample_prompts(tasks, int(alpha * dim), **options)
    least = max(rho, 1e-6)
    tuned, light, heavy = (
        (tasks - ridge(prompts.inputs, prompts.labels, penalty)).square().mean(-1) + rho
        for penalty in (least, least / 3, 3 * least + 0.1)
    )
    assert_mean(tuned, asymptotics.bayes_ridge_error(alpha, rho))
    assert tuned.mean() < heavy.mean() and tuned.mean() < light.mean() + 1e-6


def test_dmmse_is_the_posterior_mean(generator):
    prior = TaskPrior(4, n_tasks=3, sphere=True)
    tasks = prior.sample(200, generator=generator)
    prompts = sample_prompts(tasks, 5, target="linear", noise=0.8, scaling="lu", generator=generator)
    guesses = dmmse(prompts, prior.pool, noise=0.8)
    for n in (0, 130, 199):
        densities = [
            torch.distributions.Normal(prompts.inputs[n] @ task, 0.8).log_prob(prompts.labels[n]).sum().exp()
            for task in prior.pool
        ]
        expected = sum(p * (task @ prompts.query[n]) for p, task in zip(densities, prior.pool, strict=True))
        torch.testing.assert_close(guesses[n], expected / sum(densities))
    calibrated = (guesses - prompts.answer) ** 2
    for other in (
        dmmse(prompts, prior.pool, noise=0.3),
        dmmse(prompts, prior.fresh().sample(3, generator=generator), noise=0.8),
    ):
        assert icl_error(other, prompts.answer) > calibrated.mean()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("dim", "n_tasks", "alpha", "rho"), [(16, 16, 2, 0.1), (32, 8, 2, 0.1), (16, 16, 2, 1.0)])
def test_bayes_on_a_pool(dim, n_tasks, alpha, rho, generator):
    """Its error for fresh tasks is that of the formula up to 1/d; for its own tasks it is the noise."""
    runs = []
    for _ in range(12):
        prior = TaskPrior(dim, n_tasks=n_tasks, sphere=True)
        own, fresh = prior.sample(40, generator=generator), prior.fresh().sample(40, generator=generator)
        row = []
        for tasks in (fresh, own):
            options = {"target": "linear", "noise": rho**0.5, "scaling": "lu", "generator": generator}
            prompts = sample_prompts(tasks, int(alpha * dim), **options)
            misfit = (prompts.labels[..., None] - prompts.inputs @ prior.pool.mT).square().sum(1)
            guess = torch.softmax(-misfit / (2 * rho), dim=-1) @ prior.pool
            row.append((tasks - guess).square().mean() + rho)
        runs.append(torch.stack(row))
    runs = torch.stack(runs)
    formula = asymptotics.dmmse_error(dim=dim, n_tasks=n_tasks, alpha=alpha, rho=rho)
    mean, se = runs[:, 0].mean().item(), runs[:, 0].std().item() / 12**0.5
    assert abs(mean - formula) < deviation_limit(3, 12) * se + formula / (2 * dim)
    assert 2 + rho - formula > 3 * abs(mean - formula)  # far from the limit 2 + rho
    assert rho >= 1 or runs[:, 1].mean().item() == pytest.approx(rho, rel=1e-3)


def test_limits_of_bayes_on_a_pool():
    """One task is always wrong, two rarely help, and e to the prompt's information are as good as fresh ones."""
    options = {"alpha": 2, "rho": 0.1}
    assert asymptotics.dmmse_error(dim=32, n_tasks=1, **options) == 2.1
    drop = 2.1 - asymptotics.dmmse_error(dim=10**8, n_tasks=2, **options)  # m_2 = 1 / sqrt(pi)
    assert drop == pytest.approx(4.1 / math.sqrt(math.pi * 10**8 * 2 * 3.6), rel=1e-4)
    spectrum = torch.randn(800, 400, generator=torch.Generator().manual_seed(0)).div(400**0.5).svd().S ** 2
    information = 16 * torch.log1p(spectrum / 0.1).mean().item() / 2
    below, above = (
        asymptotics.dmmse_error(dim=16, n_tasks=int(math.exp(factor * information)), **options)
        for factor in (0.97, 1.2)
    )
    assert above == asymptotics.bayes_ridge_error(2, 0.1) < below < 1.3 * above
    for rho in (1e-6, 0.1):
        sizes = [asymptotics.dmmse_error(dim=16, n_tasks=2**k, alpha=2, rho=rho) for k in range(20)]
        assert all(more < less for less, more in pairwise(sizes))
