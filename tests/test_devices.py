"""Every public name on every device and in both dtypes: results live where the inputs do, and are the same numbers."""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.overrides import TorchFunctionMode

import icl_lib
from icl_lib import (
    asymptotics,
    chapter,
    constructions,
    dynamics,
    hermite,
    models,
    moments,
    plotting,
    prompts,
    ridge,
    sequences,
    spectral,
    sweeps,
    tasks,
    training,
    transformers,
)

SOURCES = sorted((Path(__file__).parents[1] / "icl_lib").glob("*.py"))
F32, F64 = torch.float32, torch.float64
DRAWS = {torch.randn, torch.rand, torch.randint, torch.randperm, torch._standard_gamma}
D, L, N = 3, 4, 8  # dimension, examples, prompts: no sum of a case has more than 64 terms


class Inputs(TorchFunctionMode):
    """What a case is made of, on a device and in a dtype, and one stream of random numbers for all of these.

    Generators of two devices, or draws in two dtypes, give different numbers. While this mode is on, the library draws
    as it always does, and the values are then replaced by those of a float64 generator on the CPU, rounded to float32,
    so that both dtypes hold them exactly. With a jitter each is multiplied by 1 ± jitter.
    """

    def __init__(self, device: str, dtype: torch.dtype, jitter: float = 0.0, seed: int = 0) -> None:
        self.device, self.dtype, self.jitter = torch.device(device), dtype, jitter
        self.signs, self.twins = torch.Generator().manual_seed(seed), {}
        self.source = self.generator()

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function not in DRAWS or result.device.type == "meta":
            return result
        own = kwargs["generator"]
        twin = self.twins.setdefault(own, torch.Generator().manual_seed(own.initial_seed()))
        if function is torch._standard_gamma:
            return result.copy_(self.vary(function(args[0].double().cpu(), generator=twin)))
        kind = F64 if result.is_floating_point() else result.dtype
        drawn = function(*args, **kwargs | {"generator": twin, "device": "cpu", "dtype": kind})
        return result.copy_(self.vary(drawn) if kind == F64 else drawn)

    def vary(self, values: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, values.shape, generator=self.signs, device="cpu").double() - 1
        return values.float().double() * (1 + self.jitter * signs)

    def generator(self, seed: int = 0) -> torch.Generator:
        """On the device; on the CPU for meta, which has none."""
        return torch.Generator("cpu" if self.device.type == "meta" else self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.source, device=self.device, dtype=self.dtype)

    def covariance(self, dim: int = D) -> Tensor:
        """Correlations that fall by half from neighbour to neighbour."""
        place = torch.arange(dim, device="cpu")
        return self.vary(0.5 ** (place[:, None] - place).abs().double()).to(self.device, self.dtype)

    def summaries(self, n: int = N) -> prompts.Summaries:
        return prompts.Summaries(self.normal(n, D), self.normal(n, D + 1), self.normal(n), 2.0)

    def prompts(self) -> prompts.Prompts:
        return prompts.Prompts(self.normal(N, L, D), self.normal(N, L), self.normal(N, D), self.normal(N), "lu", 2.0)

    def examples(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and query of two prompts."""
        return self.normal(2, L, D), self.normal(2, L), self.normal(2, D)

    def network(self) -> models.RandomTransformer:
        return models.RandomTransformer(D, 6, "tanh", generator=self.generator(), dtype=self.dtype)

    def modes(self) -> dynamics.LinearDynamics:
        return dynamics.LinearDynamics(self.normal(D).abs(), L, 2)

    def law(self) -> dict[str, Any]:
        return {"covariance": self.covariance(), "length": L, "noise": 0.5}

    def blocks(self) -> training.Trajectory:
        """Two recorded steps of two runs."""
        return training.Trajectory(
            torch.arange(2, device="cpu"), self.normal(2, 2, D, 2 * D), self.normal(2, 2, 2 * D, D)
        )

    def weights(self, layers: int = 1) -> dict[str, Tensor]:
        """Two runs of a Transformer that reads 4 tokens at 4 places."""
        shapes = transformers.Architecture(layers, 2, 4, width=3).shapes(4, 4, L)
        return {name: self.normal(2, *shape) / 2 for name, shape in shapes.items()}

    def tokens(self) -> Tensor:
        return torch.tensor([[0, 1, 2, 1], [3, 2, 3, 1]], device=self.device).expand(2, 2, L)

    def training(self, task: transformers.Task) -> transformers.Trajectory:
        generators = [self.generator(seed) for seed in (1, 2)]
        options = {"n_steps": 3, "every": 2, "learning_rate": 0.001, "weight_decay": 0.1, "hold": 1}
        return transformers.train(task, SMALL, generators=generators, **options, dtype=self.dtype)


SMALL = transformers.Architecture(1, 2, 4, width=3)
COPIES = sequences.Repeats(5, 6, 2, 3, batch=2, held_out=4)
SUMS = sequences.ModularAddition(5)


def sample(m: Inputs, sampler: Callable = prompts.sample_summaries, **changes: Any) -> Any:
    options = {"length": L, "target": "tanh", "noise": 0.5, "covariance": m.covariance(), "scaling": "lu"}
    return sampler(m.normal(N, D), **options | changes, generator=m.generator())


def sources(m: Inputs) -> list[prompts.Source]:
    spiked = tasks.TaskPrior(D, m.covariance(), n_tasks=4)
    return [
        prompts.Source(spiked, "tanh", 0.5),
        prompts.Source(tasks.TaskPrior(D, sphere=True), "sin", 0.1, m.covariance()),
    ]


def fitted(m: Inputs, intercept: bool, n: int) -> list[Tensor | None]:
    model = models.LinearTransformer(intercept).fit(m.summaries(n), [0.5, 2.0])
    return [model.gamma, model.offset]


def read_out(m: Inputs) -> models.LinearTransformer:
    model = models.LinearTransformer()
    model.gamma, model.offset = m.normal(2, D, D + 1).double(), m.normal(2).double()
    return model


def train(m: Inputs, *shape: int, **changes: Any) -> training.Trajectory:
    options = m.law() | {"learning_rate": 0.01, "n_steps": 2, "batch": 2, "generator": m.generator()}
    return training.train(m.normal(*shape), m.normal(2, D, 2 * D), m.normal(2, 2 * D, D), **options | changes)


def recorded(run: Any) -> tuple[Any, ...]:
    """Steps, which are on the CPU everywhere, and weights."""
    weights = run.weights if isinstance(run, transformers.Trajectory) else (run.value, run.query)
    return run.steps.numpy().tolist(), weights


def lasso() -> constructions.Network:
    return constructions.proximal_descent(D, L, 0.1, 2, ridge=0.1, lasso=0.1, bound=100.0)


def norms(m: Inputs) -> Tensor:
    return m.normal(N).abs()


SETTING = {"dim": D, "length": L, "n_prompts": 10, "penalty": 0.5, "target": "tanh", "noise": 0.1}
Case = Callable[[Inputs], Any]

# Computed and returned in the dtype of the inputs.
OWN: dict[str, Case] = {
    "chapter.Chapter.generator": lambda m: torch.randn(
        3,
        generator=chapter.Chapter("slug", 1, "quick", m.device).generator(device=m.device),
        device=m.device,
        dtype=m.dtype,
    ),
    "hermite.ACTIVATIONS": lambda m: [function(m.normal(5)) for function in hermite.ACTIVATIONS.values()],
    "hermite.Activation.__call__": lambda m: hermite.Activation("cube", lambda x: x**3)(m.normal(5)),
    "hermite.Expansion.activate": lambda m: hermite.expand("tanh", 2).activate(m.normal(5), generator=m.generator()),
    "hermite.Expansion.polynomial": lambda m: hermite.expand("relu", 4).polynomial(m.normal(5, 2)),
    "hermite.activation": lambda m: hermite.activation("linear")(m.normal(5)),
    "hermite.polynomials": lambda m: hermite.polynomials(m.normal(5, 2), 4),
    "tasks.TaskPrior.sample": lambda m: tasks.TaskPrior(D, m.covariance(), n_tasks=4, sphere=True).sample(
        6, generator=m.generator(), dtype=m.dtype
    ),
    "tasks.TaskPrior.fresh": lambda m: (
        tasks.TaskPrior(D, m.covariance(), n_tasks=4).fresh().sample(6, generator=m.generator(), dtype=m.dtype)
    ),
    "prompts.Prompts.matrix": lambda m: m.prompts().matrix(),
    "prompts.Prompts.summaries": lambda m: m.prompts().summaries(),
    "prompts.Summaries.__getitem__": lambda m: m.summaries()[2:5],
    "prompts.Summaries.__len__": lambda m: (m.summaries(), len(m.summaries())),
    "prompts.Summaries.dim": lambda m: (m.summaries(), m.summaries().dim),
    "prompts.Summaries.features": lambda m: m.summaries().features(),
    "prompts.Summaries.to": lambda m: m.summaries().to(m.device, m.dtype),
    "prompts.sample_prompts": lambda m: sample(m, prompts.sample_prompts),
    "prompts.sample_summaries": lambda m: (
        sample(m),
        sample(m, covariance=None, scaling="unit"),
        sample(m, length=2000, target="linear", covariance=None, scaling="unit"),
    ),
    "models.HermiteTwin.features": lambda m: m.network().hermite_twin(2).features(m.normal(N, 6)),
    "models.RandomTransformer.features": lambda m: m.network().features(m.normal(N, 6)),
    "models.RandomTransformer.gradient": lambda m: m.network().gradient(m.summaries(), readout=m.normal(6)),
    "models.RandomTransformer.gradient_step": lambda m: m.network().gradient_step(m.summaries(), 1.0).first,
    "models.RandomTransformer.preactivations": lambda m: m.network().preactivations(m.summaries()),
    "models.dmmse": lambda m: models.dmmse(m.prompts(), m.normal(5, D), noise=1.0),
    "models.icl_error": lambda m: models.icl_error(m.normal(2, N), m.normal(N)),
    "dynamics.population_gradient": lambda m: dynamics.population_gradient(
        m.normal(2, D, D), m.normal(2, D, D), tasks=m.normal(5, D, D), **m.law()
    ),
    "dynamics.population_loss": lambda m: [
        dynamics.population_loss(m.normal(2, D, D), m.normal(2, D, D), tasks=law, **m.law())
        for law in ("gaussian", "symmetric", m.normal(5, D), m.normal(5, D, D))
    ],
    "training.Trajectory.p1": lambda m: m.blocks().p1,
    "training.Trajectory.p2": lambda m: m.blocks().p2,
    "training.Trajectory.q1": lambda m: m.blocks().q1,
    "training.Trajectory.q2": lambda m: m.blocks().q2,
    "training.Trajectory.strengths": lambda m: m.blocks().strengths(m.normal(D, D)),
    "training.attention_output": lambda m: training.attention_output(
        m.normal(2, 2 * D, L + 1), m.normal(2 * D, 2 * D), m.normal(2 * D, 2 * D), L
    ),
    "training.join_blocks": lambda m: training.join_blocks(m.normal(2, D, D), m.normal(2, D, D)),
    "training.sample_covariances": lambda m: training.sample_covariances(
        D, L, (2,), generator=m.generator(), dtype=m.dtype
    ),
    "training.train": lambda m: (
        recorded(train(m, 4, D)),
        recorded(train(m, 4, D, D, frozen=["P1", "Q2"], noise=0.0)),
        recorded(train(m, 2, 4, D, D)),
    ),
    "constructions.Attention.__call__": lambda m: [
        constructions.Attention(m.normal(2, 3, 5), m.normal(2, 3, 5), m.normal(2, 5, 5), activation, mask)(
            m.normal(2, L, 5)
        )
        for activation, mask in zip(constructions.ACTIVATIONS, constructions.MASKS, strict=True)
    ],
    "constructions.FeedForward.__call__": lambda m: constructions.FeedForward(m.normal(4, 5), m.normal(5, 4))(
        m.normal(2, L, 5)
    ),
    "constructions.Network.__call__": lambda m: lasso()(*m.examples()),
    "constructions.Network.states": lambda m: lasso().states(*m.examples()),
    "constructions.Network.tokens": lambda m: lasso().tokens(*m.examples()),
    "constructions.gradient_descent": lambda m: (
        constructions.gradient_descent(D, L, [0.1, m.covariance()], start=m.normal(D))(*m.examples()),
        constructions.gradient_descent(D, L, m.normal(2) / 4, shrink=0.1)(*m.examples()),
    ),
    "constructions.model_selection": lambda m: constructions.model_selection(
        D, 2, 2, [0.0, 1.0], rate=0.1, steps=2, gap=0.01, bound=100.0
    )(*m.examples()),
    "constructions.proximal_descent": lambda m: lasso()(*m.examples()),
    "constructions.softmax_descent": lambda m: constructions.softmax_descent(
        D, L, [0.1, m.covariance()], sharpness=0.5
    )(*m.examples()),
    "sequences.Examples": lambda m: sequences.Examples(m.tokens(), m.tokens()[..., :1], m.tokens()[..., :1] > 0),
    "sequences.ModularAddition.sets": lambda m: [
        sequences.ModularAddition(5, **control).sets(generator=m.generator())
        for control in ({}, {"shuffled": True}, {"ordered": True})
    ],
    "sequences.Repeats.sample": lambda m: [
        dataclasses.replace(COPIES, shuffled=shuffled).sample(3, generator=m.generator()) for shuffled in (False, True)
    ],
    "sequences.Repeats.sets": lambda m: COPIES.sets(generator=m.generator()),
    "transformers.answer_logits": lambda m: transformers.answer_logits(m.weights(), m.tokens()),
    "transformers.attention_factors": lambda m: [
        transformers.attention_factors(m.weights(2), circuit, summed)
        for circuit in ("QK", "OV")
        for summed in (False, True)
    ],
    "transformers.attention_patterns": lambda m: transformers.attention_patterns(m.weights(2), m.tokens()),
    "transformers.emergence_window": lambda m: transformers.emergence_window(
        torch.arange(N, device="cpu"), m.normal(N).cumsum(0)
    ),
    "transformers.head_scores": lambda m: transformers.head_scores(m.normal(2, 1, 2, 2, L, L).abs(), m.tokens()),
    "transformers.initial_weights": lambda m: transformers.initial_weights(
        SUMS, SMALL, generators=[m.generator(1), m.generator(2)], dtype=m.dtype
    ),
    "transformers.logits": lambda m: transformers.logits(m.weights(2), m.tokens()),
    "transformers.train": lambda m: [recorded(m.training(task)) for task in (COPIES, SUMS)],
}

# Computed and returned in float64: float32 inputs are widened at once.
DOUBLE: dict[str, Case] = {
    "asymptotics.linear_attention_optimum": lambda m: asymptotics.linear_attention_optimum(
        m.covariance(), L, 0.1, m.covariance() + m.covariance()
    ),
    "asymptotics.linear_transformer_error": lambda m: asymptotics.linear_transformer_error(
        **SETTING, norm_samples=norms(m)
    ),
    "asymptotics.random_transformer_error": lambda m: asymptotics.random_transformer_error(
        **SETTING, width=12, activation="relu", norm_samples=norms(m)
    ),
    "ridge.ridge": lambda m: ridge.ridge(m.normal(N, D), m.normal(N), 0.5),
    "ridge.ridge_path": lambda m: (
        ridge.ridge_path(m.normal(2, D, N), m.normal(2, D), [0.0, 0.5, 2.0]),
        ridge.ridge_path(m.normal(N, D), m.normal(N), m.normal(13).abs()),
    ),
    "tasks.spiked_covariance": lambda m: tasks.spiked_covariance(D, 2.0, m.normal(D)),
    "prompts.Source.sample": lambda m: sources(m)[0].sample(N, L, generator=m.generator()),
    "prompts.sample_mixture": lambda m: prompts.sample_mixture(sources(m), N, L, generator=m.generator()),
    "models.LinearTransformer.fit": lambda m: (fitted(m, True, N), fitted(m, False, 20), fitted(m, True, 20)),
    "models.LinearTransformer.predict": lambda m: read_out(m).predict(m.summaries()),
    "models.population_error": lambda m: [
        models.population_error(m.normal(2, D, D + 1), law, L, noise=0.1, covariance=covariance)
        for law, covariance in (
            (m.normal(5, D), m.covariance()),
            (tasks.TaskPrior(D, m.covariance()), m.covariance()),
            (tasks.TaskPrior(D, sphere=True), None),
        )
    ],
    "dynamics.LinearDynamics.flow": lambda m: m.modes().flow(m.normal(L).abs().sort().values, m.normal(D), m.normal(D)),
    "dynamics.LinearDynamics.half_time": lambda m: m.modes().half_time(m.normal(D).abs() / 64),
    "dynamics.LinearDynamics.limits": lambda m: m.modes().limits,
    "dynamics.LinearDynamics.logistic": lambda m: (
        m.modes().logistic(m.normal(L).abs(), m.normal(D).abs()),
        m.modes().logistic([0.0, 1.0], 0.1),
    ),
    "dynamics.LinearDynamics.loss": lambda m: m.modes().loss(m.normal(2, D), m.normal(2, D)),
    "dynamics.LinearDynamics.minimum": lambda m: m.modes().minimum(),
    "dynamics.LinearDynamics.modes": lambda m: m.modes().modes(m.normal(L).abs(), m.normal(D), m.normal(D)),
    "dynamics.LinearDynamics.paper_loss": lambda m: m.modes().paper_loss(m.normal(2, D)),
    "dynamics.LinearDynamics.timescales": lambda m: m.modes().timescales,
    "dynamics.SeparateHeads.flow": lambda m: dynamics.SeparateHeads(m.covariance()[0], L).flow(
        [0.0, 0.1, 0.3], m.normal(2), m.normal(2, D), m.normal(2, D)
    ),
    "dynamics.SeparateHeads.loss": lambda m: dynamics.SeparateHeads(m.covariance()[0], L).loss(m.normal(2, D, D)),
    "dynamics.SeparateHeads.plateaus": lambda m: dynamics.SeparateHeads(m.covariance()[0], L).plateaus(),
    "training.antithetic_tasks": lambda m: training.antithetic_tasks(N, D, generator=m.generator()),
    "spectral.curvature": lambda m: spectral.curvature(m.normal(2, N), 5),
    "spectral.effective_rank": lambda m: spectral.effective_rank(m.normal(2, D, L), skip=1),
    "spectral.frequency_count": lambda m: spectral.frequency_count(m.normal(2, 7, D)),
    "spectral.loss_autocorrelation": lambda m: spectral.loss_autocorrelation(m.normal(2, N), [0, 2]),
    "spectral.product_rank": lambda m: (
        spectral.product_rank(m.normal(2, 6, D), m.normal(2, D, 6)),
        spectral.product_rank(m.normal(2, 2, D), m.normal(2, D, 6)),  # a singular Gram matrix
    ),
    "spectral.subspace_distance": lambda m: spectral.subspace_distance(m.normal(4, 2, D), m.normal(2, D)),
    "plotting.theory": lambda m: (
        plotting.theory(m.normal(5), m.normal(5), "curve", ax=Figure().subplots()).get_ydata().tolist()
    ),
    "sweeps.largest_deviation": lambda m: sweeps.largest_deviation(m.normal(5), norms(m)[:5], m.normal(5)),
}

# Computed in the dtype of the inputs, returned in float64.
WIDENED: dict[str, Case] = {
    "models.RandomTransformer.fit": lambda m: m.network().fit(m.summaries(), [0.5, 2.0]).weights,
    "models.RandomTransformer.hermite_twin": lambda m: (
        m.network().hermite_twin(2).fit(m.summaries(), 2.0).predict(m.summaries())
    ),
    "models.RandomTransformer.predict": lambda m: m.network().fit(m.summaries(), [0.5, 2.0]).predict(m.summaries()),
    "transformers.Trajectory": lambda m: [(run.loss, run.accuracy) for run in map(m.training, (COPIES, SUMS))],
}

# Plain numbers in; plain numbers, or float64 tensors on the CPU, out.
NUMBERS: dict[str, Callable[[], Any]] = {
    "asymptotics.AttentionErrors.gap": lambda: asymptotics.AttentionErrors(2.0, 1.0, 0.5, 0.1).gap,
    "asymptotics.bayes_ridge_error": lambda: asymptotics.bayes_ridge_error(1.0, 0.1),
    "asymptotics.dmmse_error": lambda: asymptotics.dmmse_error(dim=8, n_tasks=4, alpha=1.0, rho=0.1),
    "asymptotics.linear_attention_errors": lambda: asymptotics.linear_attention_errors(
        alpha=1.0, kappa=2.0, tau=3.0, rho=0.1, lam=0.1
    ),
    "asymptotics.marchenko_pastur_resolvent": lambda: asymptotics.marchenko_pastur_resolvent(1.0, 2.0),
    "asymptotics.optimal_penalty": lambda: asymptotics.optimal_penalty(lambda x: math.log(x) ** 2, 0.1, 10.0),
    "hermite.Expansion.degree": lambda: hermite.expand("relu", 3).degree,
    "hermite.expand": lambda: [hermite.expand(name, 3) for name in ("relu", "tanh")],
    "hermite.gaussian_mean": lambda: hermite.gaussian_mean(torch.cos),
    "models.training_memory": lambda: models.training_memory(D, N, 5),
    "moments.Moments": lambda: moments.Moments(1.0, 2.0, 3.0),
    "moments.summary_moments": lambda: moments.summary_moments(D, L, target="relu", noise=0.1),
    "prompts.summary_moments": lambda: prompts.summary_moments(D, L, target=torch.cos, noise=0.1),
    "sequences.ModularAddition.sizes": lambda: SUMS.sizes,
    "sequences.Repeats.sizes": lambda: COPIES.sizes,
    "sweeps.deviation_limit": lambda: sweeps.deviation_limit(3, 8),
    "tasks.power_law_covariance": lambda: tasks.power_law_covariance(D, 1.0),
    "transformers.Architecture.shapes": lambda: SMALL.shapes(4, 4, L),
}

# What is left, by the beginning of its name.
ASIDE = {
    "chapter.": "text, seeds and claims of a running notebook",
    "plotting.": "drawing: all arrays go through the helper that plotting.theory reads its own with",
    "sweeps.": "tables of Python scalars; a sweep runs the caller's function wherever that likes",
    "models.HermiteTwin.gradient": "always refused",
}

ROWS = OWN | DOUBLE | WIDENED

# Where an iteration stops, relative, if that is more than rounding.
ACCURACY = {
    "dynamics.LinearDynamics.flow": 1e-12,
    "dynamics.SeparateHeads.flow": 1e-12,
    "models.LinearTransformer.fit": 1e-13,
    "models.RandomTransformer.fit": 1e-13,
    "models.RandomTransformer.hermite_twin": 1e-13,
    "models.RandomTransformer.predict": 1e-13,
    "ridge.ridge": 1e-13,
    "ridge.ridge_path": 1e-13,
}

DRAWN = "lives where its generator lives, and meta has no generator"
PYTHON = "gives Python numbers, or computes with them"
VALUES = "decides by values what to compute, or how long"
CPU = "computes with numpy and scipy, or writes weights on the CPU"
# Names whose shapes are not known without values.
NO_META = {
    "chapter.Chapter.generator": DRAWN,
    "tasks.TaskPrior.sample": DRAWN,
    "tasks.TaskPrior.fresh": DRAWN,
    "prompts.Source.sample": DRAWN,
    "prompts.sample_mixture": DRAWN,
    "prompts.sample_prompts": PYTHON,  # the trace
    "prompts.sample_summaries": PYTHON,
    "models.LinearTransformer.fit": VALUES,
    "models.RandomTransformer.fit": DRAWN,
    "models.RandomTransformer.gradient": DRAWN,
    "models.RandomTransformer.gradient_step": DRAWN,
    "models.RandomTransformer.hermite_twin": DRAWN,
    "models.RandomTransformer.preactivations": DRAWN,
    "models.RandomTransformer.predict": DRAWN,
    "asymptotics.linear_attention_optimum": PYTHON,
    "asymptotics.linear_transformer_error": PYTHON,
    "asymptotics.random_transformer_error": PYTHON,
    "ridge.ridge": VALUES,
    "ridge.ridge_path": VALUES,
    "dynamics.LinearDynamics.flow": CPU,
    "dynamics.LinearDynamics.minimum": PYTHON,
    "dynamics.SeparateHeads.flow": CPU,
    "training.antithetic_tasks": DRAWN,
    "training.sample_covariances": DRAWN,
    "training.train": DRAWN,
    "constructions.gradient_descent": CPU,
    "constructions.softmax_descent": CPU,
    "plotting.theory": CPU,
    "sequences.ModularAddition.sets": DRAWN,
    "sequences.Repeats.sample": DRAWN,
    "sequences.Repeats.sets": DRAWN,
    "sweeps.largest_deviation": CPU,
    "transformers.Trajectory": DRAWN,
    "transformers.emergence_window": PYTHON,
    "transformers.initial_weights": DRAWN,
    "transformers.train": DRAWN,
}

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
EACH = pytest.mark.parametrize("name", ROWS)
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
    *("randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def names() -> list[str]:
    """Public functions and constants, and the public methods and properties of public classes."""
    found = []
    for module in icl_lib.__all__:
        for name in importlib.import_module(f"icl_lib.{module}").__all__:
            value = getattr(importlib.import_module(f"icl_lib.{module}"), name)
            members = vars(value).items() if isinstance(value, type) else ()
            called = [key for key, member in members if inspect.isfunction(member) or isinstance(member, property)]
            public = [key for key in called if key[0] != "_" or key in ("__call__", "__getitem__", "__len__")]
            found += [f"{module}.{name}.{key}" for key in public] or [f"{module}.{name}"]
    return found


def leaves(result: Any) -> list[Any]:
    """The tensors and numbers that a result is made of."""
    if isinstance(result, (Tensor, bool, int, float)):
        return [result]
    if dataclasses.is_dataclass(result):
        result = [getattr(result, field.name) for field in dataclasses.fields(result)]
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, (list, tuple)) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def run(name: str, device: str, dtype: torch.dtype, jitter: float = 0.0, seed: int = 0) -> list[Any]:
    """The leaves of a case; its tensors must be where the inputs are, and real ones in the dtype of its table."""
    with Inputs(device, dtype, jitter, seed) as inputs:
        found = leaves(ROWS[name](inputs))
    for leaf in found:
        if isinstance(leaf, Tensor):
            assert leaf.device.type == device, f"{name} is on {leaf.device}, not on {device}"
            assert not leaf.is_floating_point() or leaf.dtype == (dtype if name in OWN else F64)
    assert found
    return found


def wide(leaf: Any) -> Tensor:
    return torch.as_tensor(leaf, device="cpu", dtype=F64)


@functools.cache
def reference(name: str) -> list[Tensor]:
    return [wide(leaf) for leaf in run(name, "cpu", F64)]


@functools.cache
def tolerances(name: str, dtype: torch.dtype) -> list[float]:
    """How far rounding may carry each leaf: √64 times what rounding every number once, inputs and results, can do.

    What the inputs do is measured by eight random roundings in float64: the condition of the problem. The roundings
    within a sum of n terms add up to √n of them (Higham and Mary 2019), and no sum of a case has more than 64 terms.
    """
    eps, known = max(torch.finfo(dtype).eps, ACCURACY.get(name, 0.0)), reference(name)
    rounded = [run(name, "cpu", F64, eps, seed) for seed in range(8)]
    spread = [max((wide(leaf) - x).abs().max() for leaf in each) for x, *each in zip(known, *rounded, strict=True)]
    return [8 * (by_inputs + eps * x.abs().max()).item() for by_inputs, x in zip(spread, known, strict=True)]


def test_every_public_name_has_a_row() -> None:
    known = names()
    assert ROWS.keys() | NUMBERS.keys() <= set(known) and NO_META.keys() <= ROWS.keys()
    assert len(ROWS | NUMBERS) == sum(map(len, (OWN, DOUBLE, WIDENED, NUMBERS)))
    left = [name for name in known if name not in ROWS and name not in NUMBERS]
    assert [name for name in left if not name.startswith(tuple(ASIDE))] == []
    assert all(any(name.startswith(prefix) for name in left) for prefix in ASIDE)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", F32), pytest.param("cuda", F32, marks=CUDA), pytest.param("cuda", F64, marks=CUDA)],
)
@EACH
def test_results_are_those_of_float64_on_the_cpu(name: str, device: str, dtype: torch.dtype) -> None:
    found = run(name, device, dtype)
    limits = tolerances(name, F64 if name in DOUBLE else dtype)
    for leaf, known, limit in zip(found, reference(name), limits, strict=True):
        assert wide(leaf).shape == known.shape and torch.isfinite(known).all()
        assert (wide(leaf) - known).abs().max() <= limit


@EACH
def test_float64_is_nowhere_rounded_to_float32(name: str) -> None:
    """Results follow their inputs: a change 64 times as small, which float32 does not see, has 64 times less effect."""
    eps, known = torch.finfo(F32).eps, reference(name)
    far, near = ([wide(leaf) for leaf in run(name, "cpu", F64, jitter)] for jitter in (eps, eps / 64))
    for x, y, at, limit in zip(far, near, known, tolerances(name, F64), strict=True):
        large, small = x - at, y - at
        assert (64 * small - large).abs().max() <= large.abs().max() / 2 + 64 * limit


@EACH
def test_shapes_are_known_without_values(name: str) -> None:
    """On meta; and the names for which that is said to be impossible fail there."""

    def check() -> None:
        for leaf, known in zip(run(name, "meta", F32), reference(name), strict=True):
            assert not isinstance(leaf, Tensor) or leaf.shape == known.shape

    if name not in NO_META:
        check()
        return
    with pytest.raises((RuntimeError, AssertionError), match="(?i)meta"):
        check()


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """Tensors made without a device land on meta, and numbers without a dtype become float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(before)


@EACH
def test_results_do_not_depend_on_the_defaults_of_torch(name: str, request: pytest.FixtureRequest) -> None:
    known = reference(name)
    request.getfixturevalue("other_defaults")
    for leaf, expected in zip(run(name, "cpu", F64), known, strict=True):
        assert torch.equal(wide(leaf), expected)


@pytest.mark.parametrize("name", NUMBERS)
def test_plain_numbers_stay_plain(name: str, request: pytest.FixtureRequest) -> None:
    known = leaves(NUMBERS[name]())
    request.getfixturevalue("other_defaults")
    found = leaves(NUMBERS[name]())
    assert found
    for leaf, expected in zip(found, known, strict=True):
        assert type(leaf) in (int, float) or (leaf.device.type, leaf.dtype) == ("cpu", F64)
        assert torch.equal(wide(leaf), wide(expected))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_new_tensor_names_its_device(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in FACTORIES}:
            assert "device" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)


@CUDA
def test_a_model_takes_prompts_from_another_device() -> None:
    with Inputs("cpu", F64) as m:
        batch = m.summaries()
        near, far = (m.network().fit(each, 1.0).weights for each in (batch, batch.to("cuda")))
    assert near is not None and far is not None and torch.equal(near, far)
