"""Prompts and their summaries: the fast sampler has the law of the direct one; moments and trace against simulation."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from scipy import stats
from zscore import assert_mean, assert_same_mean

from icl_lib import hermite, prompts
from icl_lib.moments import Moments
from icl_lib.prompts import Prompts, Summaries, sample_prompts, sample_summaries, summary_moments
from icl_lib.tasks import TaskPrior, power_law_covariance, spiked_covariance

REFERENCE = pd.read_csv(Path(__file__).parent / "reference" / "moments.csv")
DIM = 3


def second_hermite(x):
    return x**2 - 1


def oblique():
    """A covariance with correlations and eigenvalues 0.3 to 2."""
    angle = torch.linalg.qr(torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3) ** 0.5)[0]
    return angle @ torch.diag(torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)) @ angle.mT


def statistics(batch, tasks):
    """Everything compared between the two samplers, one row a prompt: moments up to order four, with the answer."""
    b, x, y = batch.summary, batch.query, batch.answer
    unit = tasks / tasks.norm(dim=-1, keepdim=True)
    linear, square = b[:, :-1], b[:, -1]
    along = (linear * unit).sum(-1)
    second = (b[:, :, None] * b[:, None, :]).flatten(1)
    joint = (y[:, None, None] * x[:, :, None] * b[:, None, :]).flatten(1)  # E[y vec(H_Z)]
    size = (linear**2).sum(-1)
    fourth = torch.stack([size**2, square**2, size * square, along**2, along**4, (y * (x * linear).sum(-1)) ** 2], -1)
    mixed = torch.stack([along * y, along * (x * unit).sum(-1) * y, square * y, square * y**2, size * y**2], -1)
    return torch.cat([b, second, joint, fourth, mixed], dim=-1)


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize(
    ("target", "length", "covariance"),
    [
        ("linear", 1, None),
        ("linear", 5, oblique()),
        ("relu", 2, oblique()),
        ("relu", 5, None),
        ("abs", 5, power_law_covariance(DIM, 1.0)),
        (second_hermite, 5, oblique()),
        ("sign", 7, power_law_covariance(DIM, 1.0)),
        ("tanh", 2, oblique()),
    ],
)
def test_the_fast_sampler_has_the_law_of_the_direct_one(scaling, covariance, target, length, generator):
    arguments = dict(target=target, noise=0.3, covariance=covariance, scaling=scaling, generator=generator)
    tasks = TaskPrior(DIM).sample(12_000, generator=generator)
    fast = sample_summaries(tasks, length, **arguments)
    slow = sample_prompts(tasks, length, **arguments).summaries()
    assert fast.trace == slow.trace
    one, other = statistics(fast, tasks), statistics(slow, tasks)
    assert_same_mean(one, other)

    unit = tasks / tasks.norm(dim=-1, keepdim=True)
    across = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for project in (
        lambda s: (s.summary[:, :-1] * unit).sum(-1),
        lambda s: s.summary[:, :-1] @ across,
        lambda s: s.summary[:, -1],
        lambda s: s.answer,
        lambda s: s.answer * (s.query * s.summary[:, :-1]).sum(-1),
    ):
        assert stats.ks_2samp(project(fast).numpy(), project(slow).numpy()).pvalue > 1e-5


@pytest.mark.parametrize("scaling", ["unit", "lu"])
@pytest.mark.parametrize(("length", "noise"), [(2, 0.3), (5, 1.0), (40, 0.0)])
def test_sums_of_linear_labels_have_the_law_of_the_labels(scaling, length, noise, generator, monkeypatch):
    """Bartlett's decomposition, which is for long prompts, against labels that are drawn, in short ones."""
    tasks = TaskPrior(DIM).sample(12_000, generator=generator)
    arguments = dict(target="linear", noise=noise, covariance=oblique(), scaling=scaling, generator=generator)
    slow = sample_prompts(tasks, length, **arguments).summaries()
    other = sample_prompts(tasks, length, **(arguments | {"noise": noise + 0.3})).summaries()
    monkeypatch.setattr(prompts, "LONG", 1)
    fast = sample_summaries(tasks, length, **arguments)
    assert_same_mean(statistics(fast, tasks), statistics(slow, tasks))
    with pytest.raises(AssertionError):  # the control: more noise
        assert_same_mean(statistics(fast, tasks), statistics(other, tasks))
    unit = tasks / tasks.norm(dim=-1, keepdim=True)
    for project in (lambda s: (s.summary[:, :-1] * unit).sum(-1), lambda s: s.summary[:, -1]):
        assert stats.ks_2samp(project(fast).numpy(), project(slow).numpy()).pvalue > 1e-5


def test_any_length_costs_linear_labels_the_same(generator):
    tasks = TaskPrior(DIM).sample(500, generator=generator)
    drawn = sample_summaries(tasks, 10**12, target="linear", noise=0.5, generator=generator)
    unit = tasks / tasks.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(drawn.summary[:, :-1], unit, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.summary[:, -1], torch.full((500,), 1.25, dtype=torch.float64), rtol=0, atol=1e-5)


def test_the_samplers_can_be_told_apart():
    """A control: with another length, noise or covariance the same comparison fails."""
    generator = torch.Generator().manual_seed(3)
    tasks = TaskPrior(DIM).sample(20_000, generator=generator)
    reference = dict(length=5, target="relu", noise=0.3, covariance=oblique(), generator=generator)
    slow = statistics(sample_prompts(tasks, **reference).summaries(), tasks)
    for change in ({"length": 6}, {"noise": 0.4}, {"covariance": None}, {"target": "softplus"}):
        fast = statistics(sample_summaries(tasks, **(reference | change)), tasks)
        with pytest.raises(AssertionError):
            assert_same_mean(fast, slow)


@pytest.mark.parametrize("n", [1, 4])
def test_the_decomposition_behind_the_sampler_is_an_identity(n, generator):
    """For given inputs, sum y g is its part along e plus |y| times a vector orthogonal to e."""
    g = torch.randn(n, 6, DIM, generator=generator, dtype=torch.float64)
    axis = torch.nn.functional.normalize(torch.randn(n, DIM, generator=generator, dtype=torch.float64), dim=-1)
    u = (g @ axis[..., None])[..., 0]
    y = torch.relu(u) + 0.1
    across = (y[..., None] * (g - u[..., None] * axis[:, None, :])).sum(1) / y.norm(dim=-1, keepdim=True)
    rebuilt = (y * u).sum(-1, keepdim=True) * axis + y.norm(dim=-1, keepdim=True) * across
    torch.testing.assert_close(rebuilt, (y[..., None] * g).sum(1))
    torch.testing.assert_close((across * axis).sum(-1), torch.zeros(n, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("row", list(REFERENCE.itertuples()), ids=lambda row: row.quantity)
def test_reference_moments(row):
    moments = summary_moments(row.dim, row.length, target=row.target, noise=row.noise)
    assert moments == Moments(moments.beta, moments.gamma, row.dim * (row.dim * moments.beta + moments.gamma))
    assert abs(getattr(moments, row.quantity) - row.value) <= 0.51 * 10.0**-row.digits


@pytest.mark.parametrize("target", ["linear", "relu", "tanh", "sign", second_hermite])
@pytest.mark.parametrize(("length", "noise"), [(1, 0.0), (2, 0.5), (9, 1.0)])
def test_moments_agree_with_simulation(target, length, noise, generator):
    moments = summary_moments(DIM, length, target=target, noise=noise)
    tasks = TaskPrior(DIM).sample(60_000, generator=generator)
    b = sample_summaries(tasks, length, target=target, noise=noise, generator=generator).summary
    squares = (b[:, :-1] ** 2).mean(-1)
    assert moments.trace == pytest.approx(DIM * (DIM * moments.beta + moments.gamma), rel=1e-14)
    assert_mean(squares, moments.beta)
    if b[:, -1].std() > 1e-12:
        assert_mean(b[:, -1] ** 2, moments.gamma)
    else:
        assert b[0, -1].item() ** 2 == pytest.approx(moments.gamma, rel=1e-12)
    products = torch.stack([b[:, i] * b[:, j] for i in range(DIM) for j in range(i + 1, DIM + 1)], dim=-1)
    assert_mean(products, 0.0)


@pytest.mark.parametrize("target", ["linear", "relu", second_hermite])
def test_moments_of_linear_labels_by_hand(target):
    """Wick's formula gives every moment of a polynomial label; E relu^k is half of E |g|^k."""
    c1, m2, m4, q = {
        "linear": (1.0, 1.0, 3.0, 2.0),
        "relu": (0.5, 0.5, 1.5, 1.0),
        second_hermite: (0.0, 2.0, 60.0, 8.0),
    }[target]
    s = 0.7
    m4, m2 = m4 + 6 * s**2 * m2 + 3 * s**4, m2 + s**2
    moments = summary_moments(4, 5, target=target, noise=s)
    assert moments.beta == pytest.approx((0.8 * c1**2 + (4 * m2 + q) / 5) / 4, rel=1e-12)
    assert moments.gamma == pytest.approx(0.8 * m2**2 + m4 / 5, rel=1e-12)


PRIORS = {
    "gaussian": TaskPrior(DIM),
    "sphere": TaskPrior(DIM, sphere=True),
    "spiked": TaskPrior(DIM, spiked_covariance(DIM, 4.0)),
    "pool": TaskPrior(DIM, n_tasks=2),
}


@pytest.mark.parametrize(
    ("prior", "covariance"), [*((prior, oblique()) for prior in PRIORS.values()), (PRIORS["spiked"], None)]
)
@pytest.mark.parametrize(
    ("scaling", "target"), [("unit", "relu"), ("lu", hermite.activation(lambda x: (x - 0.3).relu(), (0.3,)))]
)
def test_trace_is_the_mean_square_of_the_features(prior, covariance, scaling, target, generator):
    tasks = prior.sample(400, generator=generator)
    arguments = dict(target=target, noise=0.2, covariance=covariance, scaling=scaling, generator=generator)
    batch = sample_summaries(tasks.repeat(1000, 1), 4, **arguments)
    assert_mean((batch.query**2).sum(-1) * (batch.summary**2).sum(-1), batch.trace)


@pytest.mark.parametrize("length", [1, 6])
def test_trace_for_isotropic_tasks_is_the_closed_form(length, generator):
    tasks = TaskPrior(DIM).sample(5, generator=generator)
    moments = summary_moments(DIM, length, target="relu", noise=0.2)
    for dtype, eps in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        batch = sample_summaries(tasks.to(dtype), length, target="relu", noise=0.2, generator=generator)
        assert batch.trace == pytest.approx(moments.trace, rel=eps)


def test_the_two_scalings_agree_for_isotropic_linear_tasks(generator):
    """For linear labels on unit tasks, x / sqrt(d) with tasks of norm sqrt(d) is the same experiment."""
    tasks = TaskPrior(DIM, sphere=True).sample(100, generator=generator)
    batches = {}
    for scaling in ("unit", "lu"):
        fixed = torch.Generator().manual_seed(7)
        batches[scaling] = sample_summaries(tasks, 4, target="linear", noise=0.1, scaling=scaling, generator=fixed)
    unit, lu = batches["unit"], batches["lu"]
    root = DIM**0.5
    torch.testing.assert_close(lu.query * root, unit.query)
    torch.testing.assert_close(lu.answer, unit.answer)
    torch.testing.assert_close(lu.summary[:, :-1] / root, unit.summary[:, :-1])
    torch.testing.assert_close(lu.summary[:, -1], unit.summary[:, -1])


def test_the_answer_follows_the_target(generator):
    tasks = TaskPrior(DIM).sample(60_000, generator=generator)
    for target in ("relu", "tanh", "abs"):
        expansion = hermite.expand(target, 1)
        batch = sample_summaries(tasks, 2, target=target, noise=0.4, generator=generator)
        assert_mean(batch.answer, expansion.coefficients[0].item())
        assert_mean(batch.answer**2, expansion.second_moment + 0.16)
        unit = tasks / tasks.norm(dim=-1, keepdim=True)
        assert_mean(batch.answer * (batch.query * unit).sum(-1), expansion.coefficients[1].item())
        residual = batch.answer - hermite.ACTIVATIONS[target]((batch.query * unit).sum(-1))
        assert_mean(residual**2, 0.16)


def test_query_and_summary_are_independent_given_the_task(generator):
    task = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    tasks = task.expand(60_000, 3)
    batch = sample_summaries(tasks, 4, target="relu", noise=0.3, generator=generator)
    b = batch.summary - batch.summary.mean(0)
    left = torch.cat([batch.query, batch.query**2 - 1, (batch.answer - batch.answer.mean())[:, None]], dim=-1)
    assert_mean(left[:, :, None] * b[:, None, :], 0.0)


@pytest.mark.parametrize("sampler", [sample_prompts, sample_summaries])
def test_the_seed_fixes_the_sample(sampler):
    tasks = torch.ones(6, DIM, dtype=torch.float64)
    draws = []
    for seed in (1, 1, 2):
        batch = sampler(tasks, 3, target="relu", noise=0.1, generator=torch.Generator().manual_seed(seed))
        batch = batch.summaries() if isinstance(batch, Prompts) else batch
        draws.append(torch.cat([batch.query, batch.summary, batch.answer[:, None]], dim=-1))
    assert torch.equal(draws[0], draws[1]) and (draws[0] != draws[2]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance", [None, oblique()])
def test_dtype_is_kept(dtype, covariance, generator):
    tasks = TaskPrior(DIM).sample(8, generator=generator, dtype=dtype)
    arguments = dict(target="relu", noise=0.1, covariance=covariance, generator=generator)
    prompts = sample_prompts(tasks, 4, **arguments)
    for batch in (sample_summaries(tasks, 4, **arguments), prompts.summaries()):
        assert batch.query.dtype == batch.summary.dtype == batch.answer.dtype == dtype
        assert batch.features().dtype == dtype
    assert prompts.inputs.dtype == prompts.labels.dtype == prompts.matrix().dtype == dtype


def test_leading_axes_are_independent_runs(generator):
    tasks = TaskPrior(DIM).sample(12_000, generator=generator).view(2, 3, 2000, DIM)
    batch = sample_summaries(tasks, 4, target="relu", noise=0.1, covariance=oblique(), generator=generator)
    assert batch.query.shape == (2, 3, 2000, DIM) and batch.summary.shape == (2, 3, 2000, DIM + 1)
    assert batch.answer.shape == (2, 3, 2000) and len(batch) == 2000 and batch.dim == DIM
    assert batch.features().shape == (2, 3, 2000, DIM * (DIM + 1))
    flat = tasks.reshape(-1, DIM)
    merged = Summaries(batch.query.view(-1, DIM), batch.summary.view(-1, DIM + 1), batch.answer.flatten(), batch.trace)
    again = sample_summaries(flat, 4, target="relu", noise=0.1, covariance=oblique(), generator=generator)
    assert again.trace == pytest.approx(batch.trace, rel=1e-12)
    assert_same_mean(statistics(merged, flat), statistics(again, flat))
    runs = batch.answer.view(6, 2000)
    assert_mean(runs[0] * runs[1] - runs[0].mean() * runs[1].mean(), 0.0)


def test_features_are_the_outer_product(generator):
    tasks = TaskPrior(2).sample(3, generator=generator)
    batch = sample_summaries(tasks, 4, target="relu", noise=0.1, generator=generator)
    outer = torch.einsum("ni,nj->nij", batch.query, batch.summary)
    assert torch.equal(batch.features(), outer.reshape(3, 6))
    assert torch.equal(batch.features()[:, 1 * 3 + 2], batch.query[:, 1] * batch.summary[:, 2])


def test_slices_and_conversions_of_summaries(generator):
    tasks = TaskPrior(2).sample(5, generator=generator)
    batch = sample_summaries(tasks, 4, target="relu", noise=0.1, generator=generator)
    part = batch[1:3]
    assert len(part) == 2 and part.trace == batch.trace
    assert torch.equal(part.query, batch.query[1:3]) and torch.equal(part.summary, batch.summary[1:3])
    slim = batch.to(dtype=torch.float32)
    assert slim.query.dtype == torch.float32 and torch.equal(slim.answer, batch.answer.float())
    assert torch.equal(batch.to("cpu").query, batch.query)


@pytest.mark.parametrize("scaling", ["unit", "lu"])
def test_layout_of_the_prompt_matrix(scaling, generator):
    tasks = TaskPrior(DIM).sample(2, generator=generator)
    prompts = sample_prompts(tasks, 4, target="relu", noise=0.1, scaling=scaling, generator=generator)
    z = prompts.matrix()
    assert z.shape == (2, DIM + 1, 5)
    assert torch.equal(z[:, :DIM, :4], prompts.inputs.mT) and torch.equal(z[:, DIM, :4], prompts.labels)
    assert torch.equal(z[:, :DIM, 4], prompts.query) and not z[:, DIM, 4].any()


@pytest.mark.parametrize("scaling", ["unit", "lu"])
def test_the_summary_is_the_label_column_of_the_prompts_gram_matrix(scaling, generator):
    """Linear attention without a mask reads Z Z^T; the empty answer keeps the query out of its label column."""
    tasks = TaskPrior(DIM).sample(6, generator=generator)
    prompts = sample_prompts(
        tasks, 4, target="relu", noise=0.1, covariance=oblique(), scaling=scaling, generator=generator
    )
    z, batch = prompts.matrix(), prompts.summaries()
    column = (z @ z.mT)[:, :, -1] / 4
    column[:, :-1] *= DIM if scaling == "lu" else 1
    torch.testing.assert_close(batch.summary, column)
    gamma = torch.randn(DIM, DIM + 1, generator=generator, dtype=torch.float64)
    attention = torch.einsum("ni,ij,nj->n", z[:, :DIM, -1], gamma, column)
    torch.testing.assert_close(attention, batch.features() @ gamma.flatten())


def test_labels_of_prompts_are_the_target_of_their_inputs(generator):
    """Without noise every label is the stated function of its input, in both scalings and for correlated inputs."""
    tasks, sigma = TaskPrior(DIM).sample(50, generator=generator), oblique()
    for scaling in ("unit", "lu"):
        prompts = sample_prompts(
            tasks, 4, target="tanh", noise=0.0, covariance=sigma, scaling=scaling, generator=generator
        )
        products = torch.einsum("nld,nd->nl", prompts.inputs, tasks)
        last = (prompts.query * tasks).sum(-1)
        if scaling == "unit":
            size = tasks.norm(dim=-1) * torch.linalg.eigvalsh(sigma)[-1].sqrt()
            products, last = products / size[:, None], last / size
        torch.testing.assert_close(prompts.labels, torch.tanh(products))
        torch.testing.assert_close(prompts.answer, torch.tanh(last))


@pytest.mark.parametrize("scaling", ["unit", "lu"])
def test_inputs_have_the_stated_covariance(scaling, generator):
    tasks = TaskPrior(DIM).sample(20_000, generator=generator)
    prompts = sample_prompts(
        tasks, 1, target="relu", noise=0.1, covariance=oblique(), scaling=scaling, generator=generator
    )
    expected = oblique() / DIM if scaling == "lu" else oblique()
    for x in (prompts.inputs[:, 0], prompts.query):
        assert_mean(x[:, :, None] * x[:, None, :], expected)
        assert_mean(x, 0.0)
