"""Bad input: every public function refuses it with a ValueError that says what was given and what was expected."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

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

pytestmark = pytest.mark.usefixtures("untyped")

D = torch.float64
X, Y = torch.ones(4, 3, dtype=D), torch.ones(4, dtype=D)
B, INPUTS, LABELS = X.new_ones(4, 4), X.new_ones(4, 2, 3), X.new_ones(4, 2)
NAN, INF = X.clone(), X.clone()
NAN[0, 0], INF[1, 1] = math.nan, math.inf
HALF, INTEGERS, EMPTY = X.half(), X.long(), torch.ones(0, 3, dtype=D)
ARRAY, EYE = np.ones((4, 3)), torch.eye(3, dtype=D)
VALUE, QUERY = X.new_ones(2, 3, 6), X.new_ones(2, 6, 3)
ASYMMETRIC, INDEFINITE = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.diag(torch.tensor([1.0, -1.0]))
GAMMA, POOL = X.new_ones(3, 4), tasks.TaskPrior(3, n_tasks=2)
LAW = {"alpha": 1.0, "kappa": 2.0, "tau": 3.0, "rho": 0.1, "lam": 0.1}
STEPS, TOKENS = torch.arange(4), torch.tensor([[[0, 1, 2]]])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def summaries(n: int = 6, dim: int = 3) -> prompts.Summaries:
    return sample(torch.ones(n, dim, dtype=D))


def sample(rows=X, length=2, sampler=prompts.sample_summaries, **changes):
    return sampler(rows, length, **({"target": "relu", "noise": 0.1, "generator": generator()} | changes))


def linear(**changes):
    return models.LinearTransformer(**changes)


def network(dim=3, width=5, activation="relu", **changes):
    return models.RandomTransformer(dim, width, activation, **({"generator": generator()} | changes))


def step(batch, rate=1.0, readout=None, **changes):
    return network(**changes).gradient_step(batch, rate, readout=readout)


def make_source(prior=None, target="relu", noise=0.1, **changes):
    return prompts.Source(tasks.TaskPrior(3) if prior is None else prior, target, noise, **changes)


def mix(sources, n=4, length=2, **changes):
    return prompts.sample_mixture(sources, n, length, **({"generator": generator()} | changes))


def make_summaries(query=X, summary=B, answer=Y, trace=1.0):
    return prompts.Summaries(query, summary, answer, trace)


def make_prompts(inputs=INPUTS, labels=LABELS, query=X, answer=Y, scaling="unit", trace=1.0):
    return prompts.Prompts(inputs, labels, query, answer, scaling, trace)


def claim(**changes):
    run = chapter.Chapter("slug", 0, "quick", torch.device("cpu"))
    run.claim("X1", "one is one", **({"measured": 1.0, "source": "[x]"} | changes))


def value(seed, **point):
    return 1.0


def table(**columns):
    return pd.DataFrame({"a": [0, 0, 1, 1], "value": [1.0, 2.0, 3.0, 4.0]} | columns)


def modes(eigenvalues=(1.0, 0.5), length=4, **changes):
    return dynamics.LinearDynamics(eigenvalues, length, **changes)


def heads(t=(0.0, 1.0), v0=Y[:2], k0=X[:2], q0=X[:2]):
    return dynamics.SeparateHeads([1.0, 0.5, 0.2], 4).flow(t, v0, k0, q0)


def loss(p=EYE, q=EYE, function=dynamics.population_loss, **changes):
    return function(p, q, **({"covariance": EYE, "length": 4, "tasks": "gaussian"} | changes))


def train(rows=EYE, value=VALUE, query=QUERY, **changes):
    settings = {"covariance": EYE, "length": 4, "learning_rate": 1e-3, "n_steps": 2, "batch": 1}
    return training.train(rows, value, query, **(settings | {"generator": generator()} | changes))


def sequences_of(n=2, **changes):
    return sequences.Repeats(**({"n_tokens": 3, "length": 3, "shortest": 2, "longest": 2} | changes)).sample(
        n, generator=generator()
    )


def weights(layers=1, scale=None, **changes):
    task, model = sequences.ModularAddition(3), transformers.Architecture(layers, 1, 2, scale=scale)
    return transformers.initial_weights(task, model, generators=[generator()]) | changes


def without(name):
    return {key: weight for key, weight in weights().items() if key != name}


def train_small(task=None, model=None, seeds: Sequence[int] = (0,), **changes):
    settings = {"n_steps": 2, "learning_rate": 0.1, "generators": [torch.Generator().manual_seed(s) for s in seeds]}
    task, model = task or sequences.ModularAddition(3), model or transformers.Architecture(1, 1, 2)
    return transformers.train(task, model, **(settings | changes))


def curve(**changes):
    return asymptotics.linear_attention_errors(**(LAW | changes))


def pooled(**changes):
    return asymptotics.dmmse_error(**({"dim": 8, "n_tasks": 4, "alpha": 1.0, "rho": 0.1} | changes))


def optimum(covariance=EYE, length=4, noise_variance=0.1, **changes):
    return asymptotics.linear_attention_optimum(covariance, length, noise_variance, **changes)


def weigh(gamma=GAMMA, rows=X, length=4, noise=0.1, **changes):
    return models.population_error(gamma, rows, length, noise=noise, **changes)


def posterior(batch=None, pool=X, noise=0.1):
    if batch is None:
        batch = sample(sampler=prompts.sample_prompts, target="linear", scaling="lu")
    return models.dmmse(batch, pool, noise=noise)


def ratios(name, call):
    """What a ratio refuses that may be infinite, but not 0."""
    wrong = [math.nan, -math.inf, "2", None, True]
    return [(partial(call, v), f"{name} is {v!r}, expected a finite number") for v in wrong] + [
        (partial(call, v), f"{name} is {v!r}, expected a number above 0") for v in (0, -1.0)
    ]


def attention(query=EYE[None], key=EYE[None], value=EYE[None], **changes):
    return constructions.Attention(query, key, value, **changes)


def descent(dim=3, length=2, rates=(0.1,), **changes):
    return constructions.gradient_descent(dim, length, rates, **changes)


def soft(dim=3, length=2, rates=(0.1,), sharpness=0.01):
    return constructions.softmax_descent(dim, length, rates, sharpness=sharpness)


def proximal(dim=3, length=2, rate=0.1, steps=1, **changes):
    return constructions.proximal_descent(dim, length, rate, steps, **changes)


def selection(dim=3, n_train=2, n_valid=2, penalties=(0.1, 1.0), **changes):
    settings = {"rate": 0.1, "steps": 1, "gap": 0.1} | changes
    return constructions.model_selection(dim, n_train, n_valid, penalties, **settings)


def network_by_hand(layers=(), template=EYE, readout=EYE[0], start=EYE[0, :2], slots=("x", "y")):
    places = dict(zip(slots, (slice(0, 2), slice(2, 3)), strict=True))
    return constructions.Network(layers, template, readout, start, places)


def answer(inputs=X[:2], labels=Y[:2], query=X[0]):
    return descent()(inputs, labels, query)


Calls = list[tuple[Callable[[], object], str]]


def tensors(name: str, call: Callable[[object], object], dtypes: bool = True) -> Calls:
    """What every argument that must be a real tensor refuses."""
    return [
        (partial(call, NAN), f"{name} holds 1 values that are not finite"),
        (partial(call, INF), f"{name} holds 1 values that are not finite"),
        (partial(call, HALF), f"{name} has dtype torch.float16, expected float32 or float64"),
        (partial(call, INTEGERS), f"{name} has dtype torch.int64, expected float32 or float64"),
        (partial(call, X.to(torch.complex128)), f"{name} has dtype torch.complex128"),
        (partial(call, EMPTY), f"{name} has shape (0, 3), expected"),
        (partial(call, ARRAY), f"{name} is of type ndarray, expected a torch tensor"),
        (partial(call, [[1.0]]), f"{name} is of type list, expected a torch tensor"),
        (partial(call, None), f"{name} is of type NoneType, expected a torch tensor"),
    ]


def integers(name: str, call: Callable[[object], object], least: int = 1) -> Calls:
    """What every size refuses."""
    wrong = [least - 1, -7, 2.5, 2.0, True, "3", None, math.nan, torch.tensor(3.0)]
    return [(partial(call, v), f"{name} is {v!r}, expected an integer of at least {least}") for v in wrong]


def numbers(name: str, call: Callable[[object], object], low: float | None = None) -> Calls:
    """What every real parameter refuses."""
    wrong = [math.nan, math.inf, "0.1", None, True, 1j]
    below = [] if low is None else [(partial(call, low), f"{name} is {low!r}, expected a number")]
    return [(partial(call, v), f"{name} is {v!r}, expected a finite number") for v in wrong] + below


def generators(call: Callable[[object], object]) -> Calls:
    """Randomness comes from a generator and from nowhere else."""
    return [(partial(call, v), f"generator is of type {type(v).__name__}, expected") for v in (None, 3, "cpu")]


NO_BUDGETS = (math.nan, math.inf, "1", True, 0.0, -1)

HERMITE: Calls = [
    *tensors("x", lambda v: hermite.polynomials(v, 3)),
    *integers("degree", lambda v: hermite.polynomials(X, v), least=0),
    *integers("degree", lambda v: hermite.expand("relu", v), least=0),
    (lambda: hermite.expand("relu", 151), "degree is 151, expected at most 150"),
    (lambda: hermite.expand("rellu", 2), "activation is 'rellu', expected one of relu, tanh"),
    (lambda: hermite.expand(3.0, 2), "activation is 3.0, expected a name or a callable"),
    (lambda: hermite.expand(None, 2), "activation is None, expected a name or a callable"),
    (lambda: hermite.expand(torch.relu, 2, 0.5), "kinks is 0.5, expected a sequence of numbers"),
    (lambda: hermite.expand(torch.relu, 2, None), "kinks is None, expected a sequence of numbers"),
    (lambda: hermite.expand(torch.relu, 2, (math.nan,)), "kink is nan, expected a finite number"),
    (lambda: hermite.expand(torch.relu, 2, ("a",)), "kink is 'a', expected a finite number"),
    (lambda: hermite.expand(lambda x: (x > 0.2).double(), 2), "declare where the function jumps as kinks"),
    (lambda: hermite.expand(lambda x: torch.exp(x**2), 2), "grows too fast"),
    (lambda: hermite.expand(torch.log, 2), "not finite at standard normal points"),
    (lambda: hermite.expand(lambda x: x.sum(), 2), "function returned () at"),
    (lambda: hermite.expand(lambda x: x[:3], 2), "function returned (3,) at"),
    (lambda: hermite.gaussian_mean("relu"), "function is 'relu', expected a callable"),
    (lambda: hermite.gaussian_mean(lambda x: 3.0), "function returned float at"),
    (lambda: hermite.gaussian_mean(torch.relu, "ab"), "kinks is 'ab', expected a sequence of numbers"),
    (lambda: hermite.activation("rellu"), "activation is 'rellu', expected one of"),
    (lambda: hermite.activation(torch.relu, (math.inf,)), "kink is inf, expected a finite number"),
    *tensors("x", lambda v: hermite.expand("relu", 2).polynomial(v)),
    *tensors("x", lambda v: hermite.expand("relu", 2).activate(v, generator=generator())),
    *generators(lambda v: hermite.expand("relu", 2).activate(X, generator=v)),
]

MIXTURES: Calls = [
    (lambda: make_source(prior="sphere"), "prior is of type str, expected TaskPrior"),
    *numbers("share", lambda v: make_source(share=v), low=-0.1),
    *numbers("noise", lambda v: mix([make_source(noise=v)]), low=-0.1),
    (lambda: mix([make_source(target="rellu")]), "is 'rellu', expected one of"),
    (lambda: mix([make_source(covariance=ASYMMETRIC)]), "covariance has shape (2, 2), expected (3, 3)"),
    (lambda: mix([]), "sources have the dimensions [], expected one dimension for all"),
    (lambda: mix([make_source(), make_source(tasks.TaskPrior(2))]), "sources have the dimensions [2, 3], expected one"),
    (lambda: mix([make_source(), "relu"]), "source is of type str, expected Source"),
    (lambda: mix([make_source(share=0.0)]), "shares are all 0, expected one above 0"),
    *integers("n", lambda v: mix([make_source()], n=v)),
    *integers("length", lambda v: mix([make_source()], length=v)),
    (lambda: mix([make_source()], scaling="si"), "scaling is 'si', expected one of unit, lu"),
    *generators(lambda v: mix([make_source()], generator=v)),
]

RIDGE: Calls = [
    *tensors("features", lambda v: ridge.ridge(v, Y, 1.0)),
    *tensors("features", lambda v: ridge.ridge_path(v, Y, [1.0])),
    (lambda: ridge.ridge(Y, Y, 1.0), "features has shape (4,), expected (..., n, k)"),
    (lambda: ridge.ridge(X, Y[:3], 1.0), "targets has shape (3,), expected (..., 4)"),
    (lambda: ridge.ridge(X, Y.expand(2, 4), 1.0), "targets has shape (2, 4), expected (4,)"),
    (lambda: ridge.ridge(X, Y.half(), 1.0), "targets has dtype torch.float16"),
    (lambda: ridge.ridge(X, Y / 0, 1.0), "targets holds 4 values that are not finite"),
    (lambda: ridge.ridge(X, Y.numpy(), 1.0), "targets is of type ndarray"),
    *numbers("penalty", lambda v: ridge.ridge(X, Y, v), low=-1.0),
    *numbers("penalty", lambda v: ridge.ridge_path(X, Y, [1.0, v]), low=-1e-9),
    *[(lambda v=v: ridge.ridge_path(X, Y, [1.0], memory=v), f"memory is {v!r}, expected a") for v in NO_BUDGETS],
    (lambda: ridge.ridge(X, Y, 1e-30), "penalty is 1e-30, too small for a system of trace 12"),
    (lambda: ridge.ridge(1e200 * X, Y, 1.0), "features are so large that their products are not finite"),
    (lambda: ridge.ridge_path(1e200 * X, Y, [1.0] * 20), "features are so large that their products are not finite"),
    (lambda: ridge.ridge_path(X, Y, []), "penalties is empty, expected at least one number"),
    (lambda: ridge.ridge_path(X, Y, 1.0), "penalties is 1.0, expected a sequence of numbers"),
    (lambda: ridge.ridge_path(X, Y, "1"), "penalties is '1', expected a sequence of numbers"),
    (lambda: ridge.ridge_path(X, Y, torch.ones(2, 2)), "expected a sequence of numbers"),
    (lambda: ridge.ridge_path(X, Y, torch.tensor(1.0)), "expected a sequence of numbers"),
]

TASKS: Calls = [
    *integers("dim", tasks.TaskPrior),
    *integers("n_tasks", lambda v: tasks.TaskPrior(3, n_tasks=v))[:6],
    *tensors("covariance", lambda v: tasks.TaskPrior(3, v))[2:-1],
    (lambda: tasks.TaskPrior(2, X), "covariance has shape (4, 3), expected (2, 2)"),
    (lambda: tasks.TaskPrior(2, ASYMMETRIC), "covariance is not symmetric, expected a covariance matrix"),
    (lambda: tasks.TaskPrior(2, INDEFINITE), "covariance has the eigenvalue -1, expected none below 0"),
    (lambda: tasks.TaskPrior(2, 0 * INDEFINITE), "covariance has the eigenvalue 0, expected none below 0 and not all"),
    (lambda: tasks.TaskPrior(2, INDEFINITE * math.nan), "covariance holds 4 values that are not finite"),
    *integers("n", lambda v: tasks.TaskPrior(3).sample(v, generator=generator())),
    *generators(lambda v: tasks.TaskPrior(3).sample(2, generator=v)),
    (lambda: tasks.TaskPrior(3).sample(2, generator=generator(), dtype=torch.float16), "dtype is torch.float16"),
    (lambda: tasks.TaskPrior(3).sample(2, generator=generator(), dtype="float32"), "dtype is float32, expected"),
    *integers("dim", lambda v: tasks.spiked_covariance(v, 1.0)),
    *numbers("strength", lambda v: tasks.spiked_covariance(3, v), low=-1.0),
    *tensors("direction", lambda v: tasks.spiked_covariance(3, 1.0, v))[2:-1],
    (lambda: tasks.spiked_covariance(3, 1.0, torch.ones(2)), "direction has shape (2,), expected (3)"),
    (lambda: tasks.spiked_covariance(3, 1.0, torch.zeros(3)), "direction is the zero vector"),
    *integers("dim", lambda v: tasks.power_law_covariance(v, 1.0)),
    *numbers("exponent", lambda v: tasks.power_law_covariance(3, v), low=-0.5),
]

SAMPLERS: Calls = [
    case
    for sampler in (prompts.sample_summaries, prompts.sample_prompts)
    for call in [partial(sample, sampler=sampler)]
    for case in [
        *tensors("tasks", call),
        (partial(call, Y), "tasks has shape (4,), expected ("),
        (partial(call, 0 * X), "tasks holds 4 tasks whose labels do not depend on the inputs"),
        (partial(call, 1e200 * X), "tasks holds 1e+200, expected entries whose squares are finite"),
        *integers("length", lambda v, call=call: call(X, v)),
        *numbers("noise", lambda v, call=call: call(noise=v), low=-0.1),
        *generators(lambda v, call=call: call(generator=v)),
        (partial(call, target="rellu"), "activation is 'rellu', expected one of"),
        (partial(call, target=None), "activation is None, expected a name or a callable"),
        (partial(call, target=lambda x: x[:1]), "target returned (1, 2), expected a tensor of shape (4, 2)"),
        (partial(call, target=lambda x: 1.0), "target returned float, expected a tensor of shape (4, 2)"),
        (partial(call, target=torch.log), "target returned labels that are not finite"),
        (partial(call, target=lambda x: (x > 0.2).double()), "declare where the function jumps as kinks"),
        (partial(call, scaling="Lu"), "scaling is 'Lu', expected one of unit, lu"),
        (partial(call, scaling=None), "scaling is None, expected one of unit, lu"),
        (partial(call, covariance=X), "covariance has shape (4, 3), expected (3, 3)"),
        (partial(call, torch.ones(2, 2), covariance=ASYMMETRIC), "covariance is not symmetric"),
        (partial(call, torch.ones(2, 2), covariance=INDEFINITE), "covariance has the eigenvalue -1"),
        (partial(call, covariance=np.eye(3)), "covariance is of type ndarray"),
        (
            partial(call, torch.eye(2), covariance=torch.diag(torch.tensor([1.0, 0.0]))),
            "tasks holds 1 tasks whose labels do not depend on the inputs",
        ),
    ]
]

PROMPTS: Calls = [
    (lambda: sample(X[None], sampler=prompts.sample_prompts), "tasks has shape (1, 4, 3), expected (n, d)"),
    *integers("dim", lambda v: prompts.summary_moments(v, 2, target="relu", noise=0.1)),
    *integers("length", lambda v: prompts.summary_moments(3, v, target="relu", noise=0.1)),
    *numbers("noise", lambda v: prompts.summary_moments(3, 2, target="relu", noise=v), low=-0.1),
    (lambda: prompts.summary_moments(3, 2, target="rellu", noise=0.1), "activation is 'rellu'"),
    (lambda: moments.summary_moments(3, 2, target=3, noise=0.1), "activation is 3, expected a name"),
    *tensors("query", make_summaries),
    *tensors("summary", lambda v: make_summaries(summary=v)),
    *tensors("answer", lambda v: make_summaries(answer=v))[2:5],
    *numbers("trace", lambda v: make_summaries(trace=v), low=0.0),
    (lambda: make_summaries(summary=X), "summary has shape (4, 3), expected (4, 4)"),
    (lambda: make_summaries(answer=Y[:3]), "answer has shape (3,), expected (4,)"),
    (lambda: make_summaries(answer=Y * math.nan), "answer holds 4 values that are not finite"),
    (lambda: make_summaries()[4:], "query has shape (0, 3), expected no empty axis"),
    *tensors("inputs", make_prompts)[2:],
    (lambda: make_prompts(labels=X), "labels has shape (4, 3), expected (4, 2)"),
    (lambda: make_prompts(query=Y), "query has shape (4,), expected (4, 3)"),
    (lambda: make_prompts(answer=X), "answer has shape (4, 3), expected (4)"),
    (lambda: make_prompts(scaling="LU"), "scaling is 'LU', expected one of unit, lu"),
    *numbers("trace", lambda v: make_prompts(trace=v), low=-1.0),
]

MODELS: Calls = [
    *tensors("predictions", lambda v: models.icl_error(v, torch.ones(3))),
    *tensors("answers", lambda v: models.icl_error(X, v)),
    (lambda: models.icl_error(X, Y), "answers has shape (4,), expected (3)"),
    (lambda: models.icl_error(X, X[:2]), "answers has shape (2, 3), expected (4, 3)"),
    (lambda: models.training_memory(0, 4, 4), "dim is 0, expected an integer of at least 1"),
    (lambda: models.training_memory(4, 4, 4, dtype=torch.float16), "dtype is torch.float16, expected"),
    *[(lambda v=v: network(memory=v), f"memory is {v!r}, expected a") for v in NO_BUDGETS],
    *[(lambda v=v: linear(memory=v).fit(summaries(), 1.0), f"memory is {v!r}, expected a") for v in NO_BUDGETS],
    *numbers("penalty", lambda v: linear().fit(summaries(), v), low=-1.0)[:2],
    *numbers("penalty", lambda v: linear().fit(summaries(), [1.0, v]), low=-1.0),
    (lambda: linear().fit(summaries(), 0.0), "penalty is 0, expected a number above 0"),
    (lambda: linear().fit(summaries(), [1.0, 0.0]), "penalty is 0, expected a number above 0"),
    (lambda: linear().fit(summaries(), []), "penalties is empty"),
    (lambda: linear().fit(summaries(), "0.1"), "expected a sequence of numbers"),
    (lambda: linear().fit(X, 1.0), "summaries is of type Tensor, expected Summaries"),
    (lambda: linear().fit(make_prompts(), 1.0), "summaries is of type Prompts, expected Summaries"),
    (lambda: linear().fit(sample(X[None]), 1.0), "query has shape (1, 4, 3), expected (n, d)"),
    (lambda: linear().predict(summaries()), "not trained, expected a call of fit before predict"),
    (lambda: linear().fit(summaries(), 1.0).predict(summaries(dim=2)), "summaries have dim 2, expected 3"),
    (lambda: linear().fit(summaries(), 1.0).predict(X), "summaries is of type Tensor, expected Summaries"),
    *integers("dim", lambda v: network(dim=v)),
    *integers("width", lambda v: network(width=v)),
    *generators(lambda v: network(generator=v)),
    (lambda: network(activation="rellu"), "activation is 'rellu', expected one of"),
    (lambda: network(activation=0), "activation is 0, expected a name or a callable"),
    (lambda: network(dtype=torch.float16), "dtype is torch.float16, expected torch.float32 or torch.float64"),
    *numbers("penalty", lambda v: network().fit(summaries(), v), low=-1.0)[:2],
    *numbers("penalty", lambda v: network().fit(summaries(), [v]), low=-1.0),
    (lambda: network().fit(summaries(), []), "penalties is empty"),
    (lambda: network().fit(summaries(), "0.1"), "expected a sequence of numbers"),
    (lambda: network().fit(X, 1.0), "summaries is of type Tensor, expected Summaries"),
    (lambda: network().fit(summaries(dim=2), 1.0), "query has shape (6, 2), expected (n, 3)"),
    (lambda: network().fit(sample(X[None]), 1.0), "query has shape (1, 4, 3), expected (n, 3)"),
    (lambda: network(activation=torch.log).fit(summaries(), 1.0), "features holds"),
    (lambda: network().preactivations(X), "summaries is of type Tensor, expected Summaries"),
    (lambda: network().predict(summaries()), "not trained, expected a call of fit before predict"),
    (lambda: network().fit(summaries(), 1.0, preactivations=X), "preactivations has shape (4, 3), expected (6, 5)"),
    (lambda: network().fit(summaries(), 1.0, preactivations=X.new_ones(6, 5)), "expected the same prompts and trace"),
    *integers("degree", lambda v: network().hermite_twin(v), least=0),
    (lambda: step(X), "summaries is of type Tensor, expected Summaries"),
    (lambda: step(summaries(dim=2)), "query has shape (6, 2), expected (n, 3)"),
    (lambda: step(summaries(), activation=torch.log), "gradient is not finite"),
    *numbers("rate", lambda v: step(summaries(), v), low=-0.1),
    (lambda: step(summaries(), readout=Y), "readout has shape (4,), expected (5)"),
    (lambda: step(summaries(), readout=[1.0] * 5), "readout is of type list, expected a torch tensor"),
    (lambda: step(summaries(), readout=Y.new_full((5,), math.nan)), "readout holds 5 values that are not finite"),
    (lambda: network().hermite_twin(2).gradient_step(summaries(), 1.0), "is a Hermite twin, expected its parent"),
    (lambda: network().hermite_twin(151), "degree is 151, expected at most 150"),
    (lambda: models.HermiteTwin(linear(), 2), "parent is of type LinearTransformer, expected RandomTransformer"),
    (lambda: network().hermite_twin(2).predict(summaries()), "not trained, expected a call of fit"),
]

DYNAMICS: Calls = [
    *[
        (lambda v=v: modes(v), message)
        for v, message in (
            ([1.0, 0.0], "eigenvalues hold 0, expected numbers above 0"),
            ([-1.0], "eigenvalues hold -1, expected numbers above 0"),
            ([1.0, math.nan], "eigenvalues is [1.0, nan], expected finite numbers"),
            ([], "eigenvalues is [], expected finite numbers"),
            ("ab", "eigenvalues is 'ab', expected numbers"),
            (None, "eigenvalues is None, expected finite numbers"),
            (1.0, "eigenvalues has shape (), expected (d,)"),
            (X, "eigenvalues has shape (4, 3), expected (d,)"),
        )
    ],
    *[
        (lambda v=v: modes(length=v), f"length is {v!r}, expected an integer of at least 1")
        for v in (0, 2.5, "3", None)
    ],
    *integers("n_tasks", lambda v: modes(n_tasks=v)),
    *numbers("learning_rate", lambda v: modes(learning_rate=v), low=0.0),
    *[(lambda v=v: modes().half_time(v), "expected numbers between 0 and the limits") for v in (0.0, -0.1, 5.0)],
    (lambda: modes().logistic(-1.0, 0.1), "t holds -1, expected times of at least 0"),
    (lambda: modes().logistic(math.nan, 0.1), "t is nan, expected finite numbers"),
    (lambda: modes().logistic(1.0, -0.1), "a0 is [-0.1, -0.1], expected numbers of at least 0"),
    (lambda: modes().logistic(1.0, [0.1, 0.2, 0.3]), "a0 has shape (3,), expected () or (2,)"),
    (lambda: modes().modes(1.0, math.inf, 0.1), "p0 is inf, expected finite numbers"),
    (lambda: modes().modes(1.0, 0.1, Y), "q0 has shape (4,), expected () or (2,)"),
    *[
        (lambda v=v: modes().flow(v, 0.1, 0.1), "expected increasing times of at least 0, shape (times,)")
        for v in ([1.0, 1.0], [2.0, 1.0], [-1.0, 1.0], [[1.0]], 1.0)
    ],
    (lambda: modes().flow([1.0], math.nan, 0.1), "p0 is nan, expected finite numbers"),
    (lambda: modes().loss(Y, Y), "p has shape (4,), expected (..., 2)"),
    (lambda: modes().loss(1.0, 1.0), "p has shape (), expected (..., 2)"),
    (lambda: modes().paper_loss([0.1]), "a has shape (1,), expected (..., 2)"),
    *tensors("p", loss),
    *tensors("q", lambda v: loss(q=v))[2:],
    *tensors("p", lambda v: loss(v, function=dynamics.population_gradient)),
    (lambda: loss(X), "p has shape (4, 3), expected (..., 3, 3)"),
    (lambda: loss(covariance=X), "covariance has shape (4, 3), expected (3, 3)"),
    (lambda: loss(query_covariance=X), "query_covariance has shape (4, 3), expected (3, 3)"),
    (lambda: loss(tasks="goe"), "tasks is 'goe', expected one of gaussian, symmetric or a tensor"),
    (lambda: loss(tasks=X[:, :2]), "tasks has shape (4, 2), expected (K, 3, 3)"),
    *integers("n_tasks", lambda v: loss(n_tasks=v)),
    *integers("length", lambda v: loss(length=v)),
    *numbers("noise", lambda v: loss(noise=v), low=-0.1),
    *tensors("matrix", lambda v: dynamics.SeparateHeads([1.0, 0.5], 4).loss(v))[2:],
    (lambda: heads(v0=X), "v0 has shape (4, 3), expected (heads)"),
    (lambda: heads(k0=X), "k0 has shape (4, 3), expected (2, 3)"),
    (lambda: heads(q0=X), "q0 has shape (4, 3), expected (2, 3)"),
    (lambda: heads(t=[1.0, 0.0]), "expected increasing times of at least 0"),
]

TRAINING: Calls = [
    *tensors("tasks", train)[:3],
    *tensors("value", lambda v: train(value=v))[2:],
    *tensors("query", lambda v: train(query=v))[2:],
    (lambda: train(value=EYE.new_ones(2, 3, 5)), "value has shape (2, 3, 5), expected (2, 3, 6)"),
    (lambda: train(query=EYE.new_ones(1, 6, 3)), "query has shape (1, 6, 3), expected (2, 6, 3)"),
    (lambda: train(covariance=X), "covariance has shape (4, 3), expected (3, 3)"),
    (lambda: train(lambda g: EYE[:, :2]), "tasks has shape (3, 2), expected (K, 3, 3)"),
    (lambda: train(EYE.expand(4, 5, 3, 3)), "tasks has shape (4, 5, 3, 3), expected (2, K, 3, 3)"),
    *integers("length", lambda v: train(length=v)),
    *integers("batch", lambda v: train(batch=v)),
    *integers("n_steps", lambda v: train(n_steps=v)),
    *integers("every", lambda v: train(every=v)),
    *numbers("learning_rate", lambda v: train(learning_rate=v), low=0.0),
    *numbers("noise", lambda v: train(noise=v), low=-0.1),
    *generators(lambda v: train(generator=v)),
    (lambda: train(frozen=["p1"]), "frozen holds ['p1'], expected names among P1, P2, Q1, Q2"),
    (lambda: train(learning_rate=1e3, n_steps=40), "expected a smaller one: weights diverge by step"),
    (lambda: train().strengths(X), "basis has shape (4, 3), expected (3, 3)"),
    *tensors("p2", lambda v: training.join_blocks(v, EYE[None]))[2:],
    (lambda: training.join_blocks(EYE[None], EYE), "q1 has shape (3, 3), expected (1, 3, 3)"),
    (lambda: training.join_blocks(X[None], X[None]), "p2 has shape (1, 4, 3), expected (1, 4, 4)"),
    (lambda: training.join_blocks(EYE[None], EYE[None], p1=X[None]), "p1 has shape (1, 4, 3), expected (1, 3, 3)"),
    (lambda: training.join_blocks(EYE[None], EYE[None], q2=X[None]), "q2 has shape (1, 4, 3), expected (1, 3, 3)"),
    *tensors("prompt", lambda v: training.attention_output(v, EYE, EYE, 2)),
    (lambda: training.attention_output(EYE, X, EYE, 2), "value has shape (4, 3), expected (3, 3)"),
    (lambda: training.attention_output(EYE, EYE, X, 2), "query has shape (4, 3), expected (3, 3)"),
    *integers("length", lambda v: training.attention_output(EYE, EYE, EYE, v)),
    *integers("dim", lambda v: training.sample_covariances(v, 2, generator=generator())),
    *integers("length", lambda v: training.sample_covariances(2, v, generator=generator())),
    *generators(lambda v: training.sample_covariances(2, 2, generator=v)),
    (lambda: training.sample_covariances(2, 2, generator=generator(), dtype=torch.float16), "dtype is torch.float16"),
    *integers("n_tasks", lambda v: training.antithetic_tasks(v, 2, generator=generator())),
    *integers("dim", lambda v: training.antithetic_tasks(4, v, generator=generator())),
    *generators(lambda v: training.antithetic_tasks(4, 2, generator=v)),
    (
        lambda: training.antithetic_tasks(5, 2, generator=generator()),
        "n_tasks is 5, expected an even number of",
    ),
    (
        lambda: training.antithetic_tasks(2, 2, generator=generator()),
        "n_tasks is 2, expected an even number of",
    ),
]

ATTENTION: Calls = [
    *ratios("kappa", lambda v: asymptotics.marchenko_pastur_resolvent(1.0, v)),
    *numbers("x", lambda v: asymptotics.marchenko_pastur_resolvent(v, 2.0), low=-0.1),
    (lambda: asymptotics.marchenko_pastur_resolvent(0, 1), "x is 0 at kappa 1, expected a number above 0"),
    *ratios("kappa", lambda v: curve(kappa=v)),
    *ratios("tau", lambda v: curve(tau=v)),
    *numbers("alpha", lambda v: curve(alpha=v), low=0.0),
    *numbers("rho", lambda v: curve(rho=v), low=-0.1),
    *numbers("lam", lambda v: curve(lam=v), low=-0.1),
    (lambda: curve(tau=1, lam=0), "tau is 1 at lam 0, expected another number: the error is infinite"),
    *numbers("alpha", lambda v: asymptotics.bayes_ridge_error(v, 0.1), low=0.0),
    *numbers("rho", lambda v: asymptotics.bayes_ridge_error(1.0, v), low=-0.1),
    *integers("dim", lambda v: pooled(dim=v)),
    *integers("n_tasks", lambda v: pooled(n_tasks=v)),
    *numbers("alpha", lambda v: pooled(alpha=v), low=0.0),
    *numbers("rho", lambda v: pooled(rho=v), low=0.0),
    *tensors("covariance", optimum)[2:],
    (lambda: optimum(X), "covariance has shape (4, 3), expected (3, 3)"),
    (lambda: optimum(ASYMMETRIC), "covariance is not symmetric, expected a covariance matrix"),
    (lambda: optimum(INDEFINITE), "covariance has the eigenvalue -1, expected none below 0"),
    (lambda: optimum(EYE * math.nan), "covariance holds 9 values that are not finite"),
    (lambda: optimum(task_covariance=EYE[:2, :2]), "task_covariance has shape (2, 2), expected (3, 3)"),
    (lambda: optimum(task_covariance=-EYE), "task_covariance has the eigenvalue -1, expected none below 0"),
    *integers("length", lambda v: optimum(length=v)),
    *numbers("noise_variance", lambda v: optimum(noise_variance=v), low=-0.1),
    *tensors("gamma", weigh)[2:],
    *tensors("tasks", lambda v: weigh(rows=v)),
    (lambda: weigh(X), "gamma has shape (4, 3), expected (..., 4, 5)"),
    (lambda: weigh(GAMMA / 0), "gamma holds 12 values that are not finite"),
    (lambda: weigh(rows=X[:, :2]), "tasks has shape (4, 2), expected (K, 3)"),
    (lambda: weigh(rows=tasks.TaskPrior(2)), "tasks has dim 2, expected 3"),
    (lambda: weigh(rows=POOL), "tasks is a pool that is not drawn, expected a call of sample before"),
    (lambda: weigh(rows=tasks.TaskPrior(3, EYE, sphere=True)), "expected one of the two, or a pool"),
    (lambda: weigh(covariance=X), "covariance has shape (4, 3), expected (3, 3)"),
    (lambda: weigh(covariance=-EYE), "covariance has the eigenvalue -1, expected none below 0"),
    *integers("length", lambda v: weigh(length=v)),
    *numbers("noise", lambda v: weigh(noise=v), low=-0.1),
    (lambda: posterior(X), "prompts is of type Tensor, expected Prompts"),
    (lambda: posterior(make_prompts()), "prompts have the scaling 'unit', expected 'lu'"),
    *tensors("pool", lambda v: posterior(pool=v)),
    (lambda: posterior(pool=X[:, :2]), "pool has shape (4, 2), expected (K, 3)"),
    *numbers("noise", lambda v: posterior(noise=v), low=0.0),
]

CONSTRUCTIONS: Calls = [
    *tensors("query", attention)[2:],
    (lambda: attention(EYE), "query has shape (3, 3), expected (heads, rank, width)"),
    (lambda: attention(key=EYE[None, :2]), "key has shape (1, 2, 3), expected (1, 3, 3)"),
    (lambda: attention(value=EYE[None, :2]), "value has shape (1, 2, 3), expected (1, 3, 3)"),
    (lambda: attention(activation="gelu"), "activation is 'gelu', expected one of linear, relu, softmax"),
    (lambda: attention(mask="none"), "mask is 'none', expected one of all, context, causal"),
    (lambda: attention()(X[:, :2]), "tokens has shape (4, 2), expected (..., tokens, 3)"),
    (lambda: constructions.FeedForward(X, X), "second has shape (4, 3), expected (3, 4)"),
    (lambda: constructions.FeedForward(Y, X), "first has shape (4,), expected (hidden, width)"),
    (lambda: constructions.FeedForward(X, X.T.clone())(Y[:3]), "tokens has shape (3,), expected (..., tokens, 3)"),
    (lambda: network_by_hand([attention()], X[:, :2], Y[:2]), "a layer has width 3, expected 2"),
    (lambda: network_by_hand(readout=Y), "readout has shape (4,), expected (3)"),
    (lambda: network_by_hand(start=Y), "start has shape (4,), expected (2)"),
    (lambda: network_by_hand(slots=("x", "z")), "slots are ['x', 'z'], expected x and y among them"),
    *tensors("inputs", answer)[2:],
    (lambda: answer(X), "inputs has shape (4, 3), expected (..., 2, 3)"),
    (lambda: answer(labels=Y), "labels has shape (4,), expected (2)"),
    (lambda: answer(query=Y), "query has shape (4,), expected (3)"),
    *[
        case
        for make in (descent, soft)
        for case in [
            *integers("dim", lambda v, make=make: make(dim=v)),
            *integers("length", lambda v, make=make: make(length=v)),
            *numbers("rate", lambda v, make=make: make(rates=[0.1, v])),
            (partial(make, rates=()), "rates is empty, expected at least one learning rate"),
            (partial(make, rates=0.1), "rates is 0.1, expected a sequence of numbers"),
            (partial(make, rates=[X]), "rate has shape (4, 3), expected (3, 3)"),
            (partial(make, rates=[EYE * math.nan]), "rate holds 9 values that are not finite"),
        ]
    ],
    *numbers("shrink", lambda v: descent(shrink=v), low=-0.1),
    (lambda: descent(start=Y), "start has shape (4,), expected (3)"),
    (lambda: descent(start=Y[:3], shrink=0.1), "start is [1.0, 1.0, 1.0] with shrink 0.1, expected one of the two"),
    *numbers("sharpness", lambda v: soft(sharpness=v), low=0.0),
    *integers("dim", lambda v: proximal(dim=v)),
    *integers("length", lambda v: proximal(length=v)),
    *integers("steps", lambda v: proximal(steps=v)),
    *numbers("rate", lambda v: proximal(rate=v), low=0.0),
    *numbers("ridge", lambda v: proximal(ridge=v), low=-0.1),
    *numbers("lasso", lambda v: proximal(lasso=v), low=-0.1),
    *numbers("bound", lambda v: proximal(bound=v), low=0.0),
    *integers("dim", lambda v: selection(dim=v)),
    *integers("n_train", lambda v: selection(n_train=v)),
    *integers("n_valid", lambda v: selection(n_valid=v)),
    *integers("steps", lambda v: selection(steps=v)),
    *numbers("penalty", lambda v: selection(penalties=[0.1, v]), low=-0.1),
    (lambda: selection(penalties=[0.1]), "penalties is [0.1], expected at least two numbers"),
    (lambda: selection(penalties="ab"), "penalties is 'ab', expected a sequence of numbers"),
    *numbers("rate", lambda v: selection(rate=v), low=0.0),
    *numbers("gap", lambda v: selection(gap=v), low=0.0),
    *numbers("bound", lambda v: selection(bound=v), low=0.0),
]

SPECTRAL: Calls = [
    *tensors("matrix", spectral.effective_rank),
    *tensors("left", lambda v: spectral.product_rank(v, X.mT)),
    *tensors("right", lambda v: spectral.product_rank(X, v))[2:5],
    *tensors("matrix", lambda v: spectral.subspace_distance(v, X)),
    *tensors("reference", lambda v: spectral.subspace_distance(X, v)),
    *tensors("table", spectral.frequency_count),
    *tensors("losses", lambda v: spectral.loss_autocorrelation(v, [0])),
    *tensors("losses", lambda v: spectral.curvature(v, 3)),
    *integers("skip", lambda v: spectral.effective_rank(X, v), least=0),
    *integers("skip", lambda v: spectral.product_rank(X, X.mT, v), least=0),
    *integers("lag", lambda v: spectral.loss_autocorrelation(Y, [v]), least=0),
    *integers("window", lambda v: spectral.curvature(Y, v), least=3),
    (lambda: spectral.effective_rank(Y), "matrix has shape (4,), expected (..., rows, columns)"),
    (lambda: spectral.effective_rank(0 * X), "matrix has no nonzero singular value beyond the first 0, expected"),
    (lambda: spectral.effective_rank(X, 1), "matrix has no nonzero singular value beyond the first 1, expected"),
    (lambda: spectral.effective_rank(X, 3), "matrix has no nonzero singular value beyond the first 3, expected"),
    (lambda: spectral.product_rank(X, X), "right has shape (4, 3), expected (..., 3, columns)"),
    (lambda: spectral.product_rank(X, X.mT[None]), "right has shape (1, 3, 4), expected (inner, columns)"),
    (lambda: spectral.product_rank(0 * X, X.mT), "left is the zero matrix, expected one with a nonzero entry"),
    (lambda: spectral.product_rank(X, X.mT, 1), "product has no nonzero singular value beyond the first 1, expected"),
    (lambda: spectral.subspace_distance(X, X[:, :2]), "reference has shape (4, 2), expected (..., rows, 3)"),
    (lambda: spectral.subspace_distance(X, 0 * X), "reference is the zero matrix, expected one with a nonzero entry"),
    (
        lambda: spectral.subspace_distance(X.expand(2, 4, 3), X.expand(3, 4, 3)),
        "reference has shape (3, 4, 3), expected leading axes that broadcast against (2,)",
    ),
    (lambda: spectral.frequency_count(X), "table is the same for all residues, expected rows that differ"),
    (lambda: spectral.frequency_count(X[:1]), "table is the same for all residues, expected rows that differ"),
    (lambda: spectral.loss_autocorrelation(Y, 2), "lags is 2, expected a sequence of numbers"),
    (lambda: spectral.loss_autocorrelation(Y, []), "lags is [], expected at least one, each below 4"),
    (lambda: spectral.loss_autocorrelation(Y, [0, 4]), "lags is [0, 4], expected at least one, each below 4"),
    (lambda: spectral.curvature(Y, 5), "window is 5, expected at most 4, the number of times"),
]

SEQUENCES: Calls = [
    *[
        case
        for name in ("n_tokens", "length", "shortest", "longest", "batch", "held_out")
        for case in integers(name, lambda v, name=name: sequences.Repeats(**{name: v}))
    ],
    (lambda: sequences.Repeats(longest=4), "longest is 4, expected an integer from 5 to 16"),
    (lambda: sequences.Repeats(longest=17), "longest is 17, expected an integer from 5 to 16"),
    (lambda: sequences.Repeats(length=10), "longest is 10, expected an integer from 5 to 9"),
    *integers("n", sequences_of),
    *generators(lambda v: sequences.Repeats().sample(2, generator=v)),
    *generators(lambda v: sequences.Repeats().sets(generator=v)),
    *integers("modulus", sequences.ModularAddition, least=3),
    *numbers("share", lambda v: sequences.ModularAddition(share=v)),
    *[
        (partial(sequences.ModularAddition, share=v), f"share is {v}, expected a number above 0 and below 1")
        for v in (0.0, 1.0, -0.1, 1e-4)
    ],
    *generators(lambda v: sequences.ModularAddition().sets(generator=v)),
]

TRANSFORMERS: Calls = [
    *integers("layers", transformers.Architecture),
    *integers("heads", lambda v: transformers.Architecture(heads=v)),
    *integers("dim", lambda v: transformers.Architecture(dim=v)),
    *integers("width", lambda v: transformers.Architecture(width=v), least=0),
    *[
        case
        for case in numbers("scale", lambda v: transformers.Architecture(scale=v), low=0.0)
        if "None" not in case[1]
    ],
    (lambda: transformers.Architecture(heads=3), "heads is 3, expected a divisor of 32, the dimension"),
    (lambda: train_small(task="sums"), "task is of type str, expected Repeats or ModularAddition"),
    (lambda: train_small(model="small"), "architecture is of type str, expected Architecture"),
    (lambda: train_small(generators=[]), "generators is [], expected a sequence of torch.Generator, one a run"),
    (lambda: train_small(generators=3), "generators is 3, expected a sequence of torch.Generator, one a run"),
    (lambda: train_small(generators=[generator()] * 2), "generators holds one twice, expected"),
    *generators(lambda v: train_small(generators=[v])),
    (lambda: train_small(dtype=torch.float16), "dtype is torch.float16, expected torch.float32 or torch.float64"),
    *integers("n_steps", lambda v: train_small(n_steps=v)),
    *integers("every", lambda v: train_small(every=v)),
    *integers("warm_up", lambda v: train_small(warm_up=v), least=0),
    *[case for case in integers("hold", lambda v: train_small(hold=v), least=0) if "None" not in case[1]],
    *numbers("learning_rate", lambda v: train_small(learning_rate=v), low=0.0),
    *numbers("weight_decay", lambda v: train_small(weight_decay=v), low=-0.1),
    (lambda: train_small(learning_rate=1e30, n_steps=9, every=1), "expected a smaller one: weights diverge by step"),
    (
        lambda: transformers.logits(without("key"), TOKENS),
        "weights['key'] is of type NoneType, expected a torch tensor",
    ),
    (lambda: transformers.logits(without("embed"), TOKENS), "weights['embed'] is of type NoneType"),
    (lambda: transformers.logits(weights(key=X), TOKENS), "weights['key'] has shape (4, 3), expected (1, 1, 2, 1, 2)"),
    (lambda: transformers.logits(weights(value=NAN), TOKENS), "weights['value'] has shape (4, 3), expected (1, 1, 2"),
    (lambda: transformers.logits(weights(unembed=NAN[None]), TOKENS), "weights['unembed'] holds 1 values that are not"),
    (lambda: transformers.logits(weights(), TOKENS[0]), "tokens has shape (1, 3), expected (1, n, at most 3)"),
    (
        lambda: transformers.logits(weights(), TOKENS.expand(2, 1, 3)),
        "tokens has shape (2, 1, 3), expected (1, n, at m",
    ),
    (
        lambda: transformers.logits(weights(), TOKENS.repeat(1, 1, 2)),
        "tokens has shape (1, 1, 6), expected (1, n, at m",
    ),
    (
        lambda: transformers.logits(weights(), TOKENS + 2),
        "tokens are torch.int64 from 2 to 4, expected int64 from 0 to 3",
    ),
    (
        lambda: transformers.logits(weights(), TOKENS - 1),
        "tokens are torch.int64 from -1 to 1, expected int64 from 0 to",
    ),
    (
        lambda: transformers.logits(weights(), TOKENS.float()),
        "tokens are torch.float32 from 0.0 to 2.0, expected int64",
    ),
    (lambda: transformers.answer_logits(weights(2), TOKENS), "weights have 2 layers, expected 1"),
    (
        lambda: transformers.answer_logits(weights(), torch.tensor([[[0, 1, 2], [0, 1, 3]]])),
        "tokens end in [2, 3], expected the same last token everywhere",
    ),
    (
        lambda: transformers.answer_logits(weights(scale=1e12), TOKENS),
        "scores that lie too far apart, expected smaller",
    ),
    (
        lambda: transformers.attention_patterns(weights(), TOKENS + 2),
        "tokens are torch.int64 from 2 to 4, expected int64 from 0 to 3",
    ),
    (
        lambda: transformers.head_scores(X.new_ones(1, 1, 1, 1, 3, 3), TOKENS),
        "tokens has a run in which no token occurs twice, expected sequences that repeat some",
    ),
    *tensors("patterns", lambda v: transformers.head_scores(v, TOKENS))[2:],
    (
        lambda: transformers.head_scores(X.new_ones(2, 1, 1, 1, 3, 3), TOKENS),
        "patterns has shape (2, 1, 1, 1, 3, 3), expected (1, layers, heads, 1, 3, 3)",
    ),
    (lambda: transformers.attention_factors(weights(), "KQ"), "circuit is 'KQ', expected one of QK, OV"),
    (lambda: transformers.attention_factors({}, "QK"), "weights['query'] is of type NoneType, expected a torch tensor"),
    (lambda: transformers.attention_factors({"value": X}, "OV"), "weights['value'] has shape (4, 3), expected (..., "),
    *tensors("accuracy", lambda v: transformers.emergence_window(STEPS, v))[2:],
    (lambda: transformers.emergence_window(STEPS, Y * torch.nan), "accuracy holds 4 values that are not finite"),
    (lambda: transformers.emergence_window(STEPS, Y[:3]), "steps has shape (4,), accuracy (3,), expected the same"),
    (lambda: transformers.emergence_window(STEPS[:1], Y[:1]), "steps has shape (1,), accuracy (1,), expected the same"),
    *numbers("threshold", lambda v: transformers.emergence_window(STEPS, Y, v)),
]

CHAPTER: Calls = [
    (lambda: chapter.start("", seed=0), "slug is '', expected"),
    (lambda: chapter.start(3, seed=0), "slug is 3, expected"),
    (lambda: chapter.start("x", seed=-1), "seed is -1, expected a non-negative integer"),
    (lambda: chapter.start("x", seed=1.0), "seed is 1.0, expected a non-negative integer"),
    (lambda: chapter.start("x", seed=True), "seed is True, expected a non-negative integer"),
    (lambda: chapter.Chapter("x", 0, "quick", torch.device("cpu")).generator(-1), "stream is -1, expected"),
    (lambda: chapter.Chapter("x", 0, "quick", torch.device("cpu")).generator(10**6), "stream is 1000000, expected"),
    (lambda: claim(expected=1.0), "expected and tolerance are given together"),
    (lambda: claim(), "give exactly one of"),
    (lambda: claim(at_most=1.0, at_least=1.0), "give exactly one of"),
    (lambda: claim(at_most=1.0, verdict="yes"), "verdict is 'yes', expected one of confirmed"),
]

SWEEPS: Calls = [
    *[(lambda v=v: sweeps.run(value, {"a": v}, 2), "grid['a'] is") for v in ("abc", 3, None)],
    *[(lambda v=v: sweeps.run(value, v, 2), "grid is") for v in (3, None, [], {"a": []}, [{"a": 1}, {"b": 1}])],
    (lambda: sweeps.run(value, {"a": [1, 1]}, 2), "expected distinct points"),
    (lambda: sweeps.run(value, {"a": [math.nan]}, 2), "no NaN"),
    (lambda: sweeps.run(value, {"seed": [1]}, 2), "expected a string other than 'seed'"),
    (lambda: sweeps.run(value, {"a": [X]}, 2), "expected a number, string, bool or None"),
    *[(lambda v=v: sweeps.run(value, {"a": [1]}, v), "seeds") for v in (0, -1, [], [1, 1], [0.5], "ab", None, True)],
    *[(lambda v=v: sweeps.run(value, {"a": [1]}, 2, n_jobs=v), f"n_jobs is {v!r}") for v in (0, 1.5, "2", True)],
    (lambda: sweeps.run(lambda seed, a: X, {"a": [1]}, 2), "expected a number, string, bool or None"),
    (lambda: sweeps.run(lambda seed, a: None, {"a": [1]}, 2), "expected a number or a mapping"),
    (lambda: sweeps.run(lambda seed, a: {"a": 1.0}, {"a": [1]}, 2), "names of the grid"),
    (lambda: sweeps.status(value, {"a": "abc"}, 2, store="none"), "grid['a'] is"),
    (lambda: sweeps.status(value, {"a": [1]}, 0, store="none"), "seeds is 0"),
    (lambda: sweeps.status(value, {"done": [1]}, 2, store="none"), "grid has the names ['done']"),
    (lambda: sweeps.summarise(table(), "b"), "by is 'b'"),
    (lambda: sweeps.summarise(table(), []), "by is []"),
    (lambda: sweeps.summarise(table(), "a", "error"), "value 'error'"),
    (lambda: sweeps.summarise(table(value=[1.0, 2.0, math.nan, 1.0]), "a"), "value holds nan"),
    (lambda: sweeps.summarise(table(value=["x"] * 4), "a"), "expected numbers"),
    (lambda: sweeps.summarise(table(a=[0, 0, 0, 1]), "a"), "at least two runs"),
    (lambda: sweeps.largest_deviation([1.0], [0.0], [1.0]), "smallest se is 0.0, expected positive"),
    (lambda: sweeps.largest_deviation([1.0], [-1.0], [1.0]), "smallest se is -1.0, expected positive"),
    (lambda: sweeps.largest_deviation([1.0], [1.0], [1.0, 2.0]), "expected one shape"),
    (lambda: sweeps.largest_deviation([], [], []), "at least one point"),
    (lambda: sweeps.largest_deviation([math.inf], [1.0], [1.0]), "mean holds inf, expected finite numbers"),
    (lambda: sweeps.largest_deviation([1.0], [1.0], ["a"]), "theory is ['a'], expected numbers"),
    (lambda: sweeps.deviation_limit(0, 8), "points 0"),
    (lambda: sweeps.deviation_limit(1, 1), "runs 1"),
    (lambda: sweeps.deviation_limit(1, 8, 0.0), "level 0.0"),
    (lambda: sweeps.deviation_limit(1, 8, math.nan), "level nan"),
    (lambda: sweeps.deviation_limit(math.nan, 8), "points nan"),
    (lambda: sweeps.deviation_limit("3", 8), "points 3"),
]

PLOTTING: Calls = [
    case
    for draw, columns in (
        (plotting.theory, 1),
        (plotting.baseline, 1),
        (plotting.simulation, 2),
        (plotting.stored, 2),
        (plotting.control, 2),
    )
    for case in [
        (partial(draw, [1, 2], *[[1.0, math.nan]] * columns, "label"), "holds nan, expected finite numbers"),
        (partial(draw, [1, 2], *[[1.0]] * columns, "label"), "expected (points,)"),
        (partial(draw, [[1]], *[[[1.0]]] * columns, "label"), "expected (points,)"),
        (partial(draw, [], *[[]] * columns, "label"), "at least one point"),
        (partial(draw, ["a"], *[[1.0]] * columns, "label"), "x is ['a'], expected numbers"),
        (partial(draw, [1], *[[1.0]] * columns, ""), "label is '', expected the entry of the legend"),
    ]
] + [
    case
    for draw, columns in ((plotting.theory, 1), (plotting.simulation, 2), (plotting.stored, 2))
    for case in [
        (partial(draw, [1], *[[1.0]] * columns, "label", series=7), "series is 7, expected an integer from 0 to 6"),
        (partial(draw, [1], *[[1.0]] * columns, "label", series=-1), "series is -1, expected an integer"),
        (partial(draw, [1], *[[1.0]] * columns, "label", series="a"), "series is 'a', expected an integer"),
    ]
]
PLOTTING += [
    (partial(draw, [1], [1.0], [-1.0], "label"), "smallest se is -1.0")
    for draw in (plotting.simulation, plotting.stored, plotting.control)
]

TABLES = {
    "hermite": HERMITE,
    "ridge": RIDGE,
    "tasks": TASKS,
    "samplers": SAMPLERS,
    "prompts": PROMPTS,
    "models": MODELS,
    "mixtures": MIXTURES,
    "dynamics": DYNAMICS,
    "training": TRAINING,
    "linear attention": ATTENTION,
    "constructions": CONSTRUCTIONS,
    "spectral": SPECTRAL,
    "sequences": SEQUENCES,
    "transformers": TRANSFORMERS,
    "chapter": CHAPTER,
    "sweeps": SWEEPS,
    "plotting": PLOTTING,
}


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        pytest.param(call, fragment, id=f"{name}-{i}")
        for name, cases in TABLES.items()
        for i, (call, fragment) in enumerate(cases)
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], fragment: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert type(caught.value) is ValueError
    assert fragment in str(caught.value)


def test_the_scale_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICL_SCALE", "fast")
    with pytest.raises(ValueError, match="ICL_SCALE is 'fast', expected one of quick, paper"):
        chapter.scale()


def test_good_input_of_the_table_is_accepted() -> None:
    """The calls fail for what each case changes, not for what the cases share."""
    assert len(sample()) == len(sample(sampler=prompts.sample_prompts).summaries()) == 4
    make_summaries(), make_prompts(), claim(at_most=1.0)
    modes().flow([0.0, 1.0], 0.1, 0.1), heads(), loss(), loss(function=dynamics.population_gradient), train()
    linear().fit(summaries(), 1.0).predict(summaries())
    network().fit(summaries(), 1.0).predict(summaries())
    ridge.ridge(X, Y, 1.0)
    assert list(sweeps.run(value, {"a": [1]}, 2)["value"]) == [1.0, 1.0]
    assert len(sweeps.summarise(table(), "a")) == 2
    assert len(sequences_of().tokens) == 2 and len(train_small().steps) == 2
    spectral.product_rank(X, X.mT), spectral.subspace_distance(X, X), spectral.loss_autocorrelation(Y, [0])
    transformers.logits(weights(), TOKENS), transformers.answer_logits(weights(), TOKENS)
    transformers.head_scores(transformers.attention_patterns(weights(), 0 * TOKENS), 0 * TOKENS)
    assert transformers.emergence_window(STEPS, Y)
    curve(), curve(kappa=math.inf, tau=math.inf), pooled(), optimum(), weigh(), posterior()
    attention()(X), network_by_hand(), descent(), soft(), proximal(lasso=1.0), selection(), answer()
    drawn = tasks.TaskPrior(3, n_tasks=2)
    drawn.sample(1, generator=generator())
    weigh(rows=drawn)
