"""What is measured: each case runs the library and, beside it, the straightforward way to the same result."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from icl_lib import constructions, hermite, spectral, training, transformers
from icl_lib.asymptotics import linear_attention_errors, optimal_penalty, random_transformer_error
from icl_lib.dynamics import LinearDynamics
from icl_lib.models import LinearTransformer, RandomTransformer, icl_error, population_error
from icl_lib.prompts import Summaries, sample_summaries
from icl_lib.ridge import ridge_path
from icl_lib.sequences import ModularAddition, Repeats
from icl_lib.tasks import TaskPrior
from icl_lib.transformers import Architecture

Run = Callable[[], object]
Pair = tuple[Run, Run | None]
PENALTIES = [1e-2, 1e-1, 1.0, 10.0, 100.0]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        of: the function of the library that does the work.
        plain: the straightforward way or the floor, in words; empty if there is none.
        name: what is done, with its sizes.
        build: gives a run of the library and one of the straightforward way; a run that returns a float has measured
            itself, any other is timed.
        kind: "speed" or "memory" against the straightforward way, "floor" against what no program can beat, or
            "bound" for a time of its own.
        unit: "ms" of processor time, or "MB".
        per: how many pieces of the same work one run of ours and one of the other does.
        least: smallest wanted ratio of the straightforward way, or of the floor, to ours.
        most: largest wanted value of ours.
        repetitions: pairs of neighbouring runs.
    """

    of: str
    plain: str
    name: str
    build: Callable[[], Pair]
    kind: str = "speed"
    unit: str = "ms"
    per: tuple[float, float] = (1, 1)
    least: float = 1.0
    most: float = math.inf
    repetitions: int = 5


def sampler(dim: int, n: int) -> Pair:
    """Summaries of n prompts with as many examples as dimensions: exact projections against all inputs."""
    generator = torch.Generator().manual_seed(0)
    tasks = TaskPrior(dim).sample(n, generator=generator)

    def plain() -> object:
        inputs = torch.randn(n, dim + 1, dim, generator=generator, dtype=torch.float64)
        unit = tasks / tasks.norm(dim=-1, keepdim=True)
        labels = torch.relu((inputs @ unit[..., None])[..., 0])
        labels += 0.1 * torch.randn(n, dim + 1, generator=generator, dtype=torch.float64)
        linear = (inputs[:, :-1].mT @ labels[:, :-1, None])[..., 0] / dim
        return torch.cat([linear, (labels[:, :-1] ** 2).mean(-1, keepdim=True)], dim=-1)

    return lambda: sample_summaries(tasks, dim, target="relu", noise=0.1, generator=generator), plain


def long_prompts(dim: int, n: int, length: int) -> Pair:
    """Summaries of long prompts with linear labels: three random numbers for the sums against all labels."""
    generator = torch.Generator().manual_seed(0)
    tasks = TaskPrior(dim).sample(n, generator=generator)

    def draw(target: str | Callable[[torch.Tensor], torch.Tensor]) -> Run:
        return lambda: sample_summaries(tasks, length, target=target, noise=0.1, generator=generator)

    return draw("linear"), draw(lambda x: x)


def penalty_path(n: int, k: int) -> Pair:
    """Five penalties: one float32 Gram matrix, refined to float64, against a float64 solve for each penalty."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, k, generator=generator, dtype=torch.float32).relu()
    targets = torch.randn(n, generator=generator, dtype=torch.float64)

    def plain() -> object:
        wide = features.double()
        if n < k:
            return [
                wide.mT @ torch.linalg.solve(wide @ wide.mT + penalty * torch.eye(n, dtype=torch.float64), targets)
                for penalty in PENALTIES
            ]
        return [
            torch.linalg.solve(wide.mT @ wide + penalty * torch.eye(k, dtype=torch.float64), wide.mT @ targets)
            for penalty in PENALTIES
        ]

    return lambda: ridge_path(features, targets, PENALTIES), plain


def stacked_ridge(n: int, k: int, runs: int) -> Pair:
    """All runs in one call, with a leading axis, against one call a run."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(runs, n, k, generator=generator, dtype=torch.float64)
    targets = torch.randn(runs, n, generator=generator, dtype=torch.float64)

    def plain() -> object:
        return torch.stack([ridge_path(x, y, PENALTIES) for x, y in zip(features, targets, strict=True)])

    return lambda: ridge_path(features, targets, PENALTIES), plain


def draw(dim: int, n: int, seed: int = 0) -> Summaries:
    generator = torch.Generator().manual_seed(seed)
    tasks = TaskPrior(dim).sample(n, generator=generator)
    return sample_summaries(tasks, dim, target="relu", noise=0.1, generator=generator)


def linear_transformer(dim: int, n: int) -> Pair:
    """Products of inner products, or unique products only, against ridge on the features written out."""
    train = draw(dim, n)

    def plain() -> object:
        features = train.features()
        eye = torch.eye(features.shape[1], dtype=torch.float64)
        return torch.linalg.solve(features.mT @ features + eye, features.mT @ train.answer)

    return lambda: LinearTransformer().fit(train, 1.0), plain


def equivalence(dim: int, n: int, width: int) -> Pair:
    """Errors of a random Transformer, two Hermite twins and a linear Transformer, at five penalties.

    One product F h in float32 for all three heads, one Gram matrix a model, and none of the features of the linear
    one, against a script that writes the features out in float64 and solves anew for each model and penalty.
    Penalties: 1e-4 to 1 times n, those of the stored results.
    """
    penalties = [n * 10.0**power for power in range(-4, 1)]
    train, test = draw(dim, n), draw(dim, 1000, seed=1)

    def ours() -> object:
        generator = torch.Generator().manual_seed(0)
        parent = RandomTransformer(dim, width, "relu", generator=generator, dtype=torch.float32)
        seen, unseen = parent.preactivations(train), parent.preactivations(test)
        guesses = [
            model.fit(train, penalties, preactivations=seen).predict(test, preactivations=unseen)
            for model in (parent, parent.hermite_twin(2), parent.hermite_twin(4))
        ]
        guesses.append(LinearTransformer().fit(train, penalties).predict(test))
        return icl_error(torch.stack(guesses), test.answer)

    def plain() -> object:
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(width, dim * (dim + 1), generator=generator, dtype=torch.float64) / train.trace**0.5
        heads = [torch.relu]
        for degree in (2, 4):
            twin = hermite.expand("relu", degree)
            heads.append(lambda a, twin=twin: twin.activate(a, generator=generator))
        errors = []
        for head in heads:
            features, unseen = head(train.features() @ first.mT), head(test.features() @ first.mT)
            errors += [error(features, unseen, penalty) for penalty in penalties]
        return errors + [error(train.features(), test.features(), penalty) for penalty in penalties]

    def error(features: torch.Tensor, unseen: torch.Tensor, penalty: float) -> float:
        n, k = features.shape
        if n < k:
            gram = features @ features.mT + penalty * torch.eye(n, dtype=torch.float64)
            weights = features.mT @ torch.linalg.solve(gram, train.answer)
        else:
            gram = features.mT @ features + penalty * torch.eye(k, dtype=torch.float64)
            weights = torch.linalg.solve(gram, features.mT @ train.answer)
        return ((unseen @ weights - test.answer) ** 2).mean().item()

    return ours, plain


COPY = Repeats(), Architecture(scale=0.05), {"learning_rate": 3e-3, "weight_decay": 0.01}
ADD = (
    ModularAddition(),
    Architecture(layers=1, heads=4, dim=48, width=128),
    {"learning_rate": 1e-2, "weight_decay": 2.0, "warm_up": 10},
)


def trained(setting: tuple[Repeats | ModularAddition, Architecture, dict[str, float]], seeds: int, steps: int) -> Run:
    """Steps of the softmax Transformers of the chapters, all seeds stacked, with their evaluations every 20 steps."""
    task, architecture, how = setting

    def ours() -> object:
        generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        return transformers.train(task, architecture, generators=generators, n_steps=steps, **how)

    return ours


def formed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Effective ranks of products that are formed, by their singular values."""
    sigma = torch.linalg.svdvals(left @ right)
    share = sigma / sigma.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def by_cores(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The same from the small cores that two QR decompositions leave."""
    cores = (torch.linalg.qr(factor.double(), mode="r").R for factor in (left, right.mT))
    return formed(next(cores), next(cores).mT)


def ranks(plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], heads: int, count: int) -> Pair:
    """Ranks of trained 32 x 32 products of thin factors, taken from the factors' Gram matrices."""
    task, _, how = COPY
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    model = Architecture(heads=heads, scale=0.05)
    run = transformers.train(task, model, generators=generators, n_steps=count // (10 * heads) - 1, every=1, **how)
    left, right = transformers.attention_factors(run.weights, "QK")  # (steps, 5, 2, heads, 32, 32 / heads) and back
    return lambda: spectral.product_rank(left, right), lambda: plain(left, right)


def naive_transformer(setting: tuple[Repeats, Architecture, dict[str, float]], steps: int) -> Run:
    """One seed the literal way: torch.optim.AdamW on parameters, one head after the other, a fresh batch a step."""
    task, architecture, how = setting

    def plain() -> object:
        generator = torch.Generator().manual_seed(0)
        start = transformers.initial_weights(task, architecture, generators=[generator])
        weights = {name: weight[0].clone().requires_grad_() for name, weight in start.items()}
        optimiser = torch.optim.AdamW(
            weights.values(), lr=how["learning_rate"], betas=(0.9, 0.98), weight_decay=how["weight_decay"]
        )
        future = torch.ones(task.length, task.length, dtype=torch.bool).triu(1)
        for _ in range(steps):
            batch = task.sample(task.batch, generator=generator)
            x = weights["embed"][batch.tokens]
            for layer in range(architecture.layers):
                y, moved = x + weights["position"], torch.zeros_like(x)
                for head in range(architecture.heads):
                    q, k = (y @ weights[name][layer, :, head] for name in ("query", "key"))
                    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
                    value = x @ weights["value"][layer, :, head] @ weights["output"][layer, head]
                    moved = moved + scores.softmax(-1) @ value
                x = x + moved
            loss = torch.nn.functional.cross_entropy((x @ weights["unembed"]).flatten(0, 1), batch.targets.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return weights

    return plain


N_TASKS, BATCH, LENGTH, RUNS = 16, 4, 512, 32
SPECTRUM = torch.logspace(0, -0.4, 4, dtype=torch.float64)


def naive_steps(steps: int) -> Run:
    """One run of gradient descent the literal way: for each task draw prompts, run f(Z), call autograd."""
    generator, d = torch.Generator().manual_seed(0), len(SPECTRUM)
    tasks = training.antithetic_tasks(N_TASKS, d, generator=generator)

    def plain() -> object:
        value, query = torch.zeros(2, 2 * d, 2 * d, dtype=torch.float64)
        value[d:, d:] = query[:d, :d] = 0.1 * torch.eye(d)
        for _ in range(steps):
            value.requires_grad_(), query.requires_grad_()
            total = torch.zeros((), dtype=torch.float64)
            for task in tasks:
                x = torch.randn(BATCH, d, LENGTH + 1, generator=generator, dtype=torch.float64)
                x = SPECTRUM.sqrt()[:, None] * x
                y = task[:, None] * x
                prompt = torch.cat([x, torch.cat([y[..., :-1], torch.zeros_like(y[..., -1:])], -1)], 1)
                answer = training.attention_output(prompt, value, query, LENGTH)[:, d:, -1]
                total = total + 0.5 * (answer - y[..., -1]).square().sum() / BATCH
            grads = torch.autograd.grad(total, (value, query))
            value, query = (w.detach() - 0.02 / N_TASKS * g for w, g in zip((value, query), grads, strict=True))
        return value

    return plain


def at_once(batch: int, steps: int, dtype: torch.dtype) -> Run:
    """Steps of 32 runs at once, on drawn covariances."""
    generator, d = torch.Generator().manual_seed(0), len(SPECTRUM)
    tasks = training.antithetic_tasks(N_TASKS, d, generator=generator)
    block = 0.1 * torch.eye(d, dtype=dtype).expand(RUNS, d, d)
    value, query = training.join_blocks(block, block)
    law = {"covariance": SPECTRUM.diag(), "length": LENGTH, "learning_rate": 0.02 / N_TASKS, "batch": batch}
    return lambda: training.train(tasks, value, query, n_steps=steps, every=steps, generator=generator, **law)


def descent(steps: int, dtype: torch.dtype) -> Pair:
    """32 runs at once against as many steps of one naive run."""
    return at_once(BATCH, steps, dtype), naive_steps(steps)


def learning_curve_point(dim: int, n: int, length: int, lam: float = 0.1) -> Pair:
    """Train on a pool of d tasks and measure both errors; the plain side loops over prompts, and over 2 n to test."""
    noise = 0.1

    def ours() -> object:
        generator = torch.Generator().manual_seed(0)
        prior = TaskPrior(dim, n_tasks=dim, sphere=True)
        tasks = prior.sample(n, generator=generator)
        train = sample_summaries(tasks, length, target="linear", noise=noise, scaling="lu", generator=generator)
        gamma = LinearTransformer().fit(train, n * lam / dim).gamma
        return [population_error(gamma, tasks, length, noise=noise) for tasks in (prior.fresh(), prior)]

    def plain() -> object:
        generator = torch.Generator().manual_seed(0)
        prior = TaskPrior(dim, n_tasks=dim, sphere=True)

        def draw(prior: TaskPrior) -> tuple[torch.Tensor, torch.Tensor]:
            features, answers = [], []
            for task in prior.sample(n, generator=generator):
                x = torch.randn(length + 1, dim, generator=generator, dtype=torch.float64) / dim**0.5
                y = x @ task + noise * torch.randn(length + 1, generator=generator, dtype=torch.float64)
                b = torch.cat([dim / length * y[:-1] @ x[:-1], (y[:-1] ** 2).mean()[None]])
                features.append(torch.outer(x[-1], b).flatten())
                answers.append(y[-1])
            return torch.stack(features), torch.stack(answers)

        features, answers = draw(prior)
        eye = torch.eye(features.shape[1], dtype=torch.float64)
        gamma = torch.linalg.solve(features.mT @ features + n * lam / dim * eye, features.mT @ answers)
        tests = [draw(prior.fresh()), draw(prior)]
        return [((answer - test @ gamma) ** 2).mean() for test, answer in tests]

    return ours, plain


def covariances(dim: int, length: int, n: int) -> Pair:
    """Square roots of n sample covariances: their factors drawn, against all inputs drawn."""
    generator = torch.Generator().manual_seed(0)

    def plain() -> object:
        inputs = torch.randn(n, dim, length, generator=generator, dtype=torch.float64)
        return torch.linalg.cholesky(inputs @ inputs.mT / length)

    return lambda: training.sample_covariances(dim, length, (n,), generator=generator), plain


def closed_form(steps: int) -> Pair:
    """Strengths at 40 times of a run of 700 steps, against so many of the naive steps."""
    law = LinearDynamics(SPECTRUM, LENGTH, n_tasks=N_TASKS, learning_rate=0.02 / N_TASKS)
    times = torch.linspace(0, 700, 40)
    return lambda: law.logistic(times, 0.01), naive_steps(steps)


def in_float32(run: Callable[[torch.dtype], Run]) -> Pair:
    """The same in float32 and in float64."""
    return run(torch.float32), run(torch.float64)


def random_transformer(dim: int, n: int, width: int, dtype: torch.dtype) -> Run:
    """A random Transformer drawn and trained."""
    train = draw(dim, n)

    def ours() -> object:
        generator = torch.Generator().manual_seed(0)
        return RandomTransformer(dim, width, "relu", generator=generator, dtype=dtype).fit(train, 0.1 * n)

    return ours


def stacked(setting: tuple[Repeats | ModularAddition, Architecture, dict[str, float]], seeds: int, steps: int) -> Pair:
    """All seeds at once against one."""
    return trained(setting, seeds, steps), trained(setting, 1, steps)


def literal(setting: tuple[Repeats, Architecture, dict[str, float]], seeds: int, steps: int) -> Pair:
    """All seeds at once against one trained the literal way."""
    return trained(setting, seeds, steps), naive_transformer(setting, steps)


def learning_curve(lam: float, points: int, n: int) -> Pair:
    """Points of a learning curve from the formula, against one of them simulated."""
    law = {"alpha": 1.0, "kappa": 1.0, "rho": 0.01, "lam": lam}
    taus = [10 * (i + 0.5) / points for i in range(points)]
    return lambda: [linear_attention_errors(tau=tau, **law) for tau in taus], learning_curve_point(
        32, n, 32, lam or 1e-3
    )[0]


def curve(dim: int, widths: int) -> Pair:
    """The formula for widths up to n = d^2 / 2, against one training at the middle width."""
    n = dim**2 // 2
    law = {"dim": dim, "length": dim, "n_prompts": n, "penalty": 0.1 * n, "target": "relu", "noise": 0.1}

    def ours() -> object:
        return [random_transformer_error(width=n * i // widths, activation="relu", **law) for i in range(1, widths + 1)]

    return ours, random_transformer(dim, n, n // 2, torch.float32)


def tuned_point() -> Pair:
    """A point of a learning curve with its best penalty."""
    law = {"alpha": 1, "kappa": math.inf, "tau": 1, "rho": 0.01}
    return lambda: optimal_penalty(lambda lam: linear_attention_errors(lam=lam, **law).icl, 1e-3, 10), None


def layers(n: int) -> Pair:
    """Ten steps of gradient descent for n prompts, as layers of attention."""
    generator = torch.Generator().manual_seed(0)
    x, y, query = (torch.randn(n, *s, generator=generator, dtype=torch.float64) for s in ((20, 5), (20,), (5,)))
    network = constructions.gradient_descent(5, 20, [0.1] * 10)
    return lambda: network(x, y, query), None


def product(dim: int, n: int, width: int) -> Pair:
    """The product F h, with its features formed on the way, against a bare product of matrices that are there."""
    train = draw(dim, n)
    model = RandomTransformer(dim, width, "relu", generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    features = train.to(dtype=torch.float32).features()
    return lambda: model.preactivations(train), lambda: features @ model.first.mT


def training_floor(dim: int, n: int, width: int) -> Pair:
    """A training at five penalties, against its bare products and Cholesky factors in float32."""
    train, penalties = draw(dim, n), [n * 10.0**power for power in range(-4, 1)]
    model = RandomTransformer(dim, width, "relu", generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    features = train.to(dtype=torch.float32).features()
    eye = torch.eye(min(n, width))

    def plain() -> None:
        seen = features @ model.first.mT
        gram = seen @ seen.mT if n < width else seen.mT @ seen
        for penalty in penalties:
            torch.linalg.cholesky(gram + (dim**2 + penalty) * eye)

    return lambda: model.fit(train, penalties), plain


def printed_by(program: str) -> float:
    """The number that a fresh Python process prints, on one thread, in this folder."""
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1); " + program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return float(done.stdout)


def peak_now() -> int:
    """Peak bytes of this process so far; on Linux without what it inherited from the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(call: str, plain: str | float) -> Pair:
    """Peak megabytes of a call beyond those of the imports, against those of another call, or against a number."""

    def beyond(call: str) -> float:
        after = "print(peak_now() / 1e6)"
        return printed_by(f"from cases import *; {call}(); {after}") - printed_by(f"from cases import *; {after}")

    return lambda: beyond(call), (lambda: plain) if isinstance(plain, float) else (lambda: beyond(plain))


def imports() -> Pair:
    """Milliseconds to import the library where torch has been imported."""
    clock = "import time; start = time.process_time(); import {}; print(1e3 * (time.process_time() - start))"
    return lambda: printed_by(clock.format("icl_lib.models")), None


SAMPLER, TRAINED = "sampler(320, 10_000)[0]", "random_transformer(80, 3200, 3200, torch.{})"
FLOAT32, FLOAT64 = TRAINED.format("float32"), TRAINED.format("float64")
BY_RUN, BY_HEAD = "prompts, attention and autograd, run by run", "torch.optim.AdamW, head by head, seed by seed"
SIMULATED = "one simulated run, d = l = 32, n = 2048"

# Rows that share the function of the library, or what it is compared with.
sums = partial(Case, "prompts.sample_summaries", "all inputs drawn")
ridge = partial(Case, "ridge.ridge_path", "a float64 solve for each penalty")
linear = partial(Case, "models.LinearTransformer", "ridge on written-out features")
models = partial(Case, "models.RandomTransformer", "float64, solved anew for each model and penalty")
slim = partial(Case, plain="the same in float64", least=1.5)
descends = partial(Case, "training.train", BY_RUN, least=50)
rank = partial(Case, "spectral.product_rank")
softmax = partial(Case, "transformers.train", per=(800, 100), most=5)
point = partial(Case, "models.population_error", "a loop over prompts", repetitions=3)
curves = partial(Case, "asymptotics.linear_attention_errors", SIMULATED, per=(500, 1))
bound = partial(Case, plain="", kind="bound")
floor = partial(Case, kind="floor", least=0.0, repetitions=3)
held = partial(Case, kind="memory", unit="MB", repetitions=3)

CASES = [
    sums("sampler, d = l = 32, n = 8000", partial(sampler, 32, 8000)),
    sums("sampler, d = l = 80, n = 1500", partial(sampler, 80, 1500), least=12),
    sums("sampler, d = l = 160, n = 400", partial(sampler, 160, 400)),
    Case(
        "prompts.sample_summaries",
        "all labels drawn",
        "sampler, linear labels, d = 32, l = 3200, n = 2000",
        partial(long_prompts, 32, 2000, 3200),
    ),
    Case(
        "training.sample_covariances",
        "all inputs drawn",
        "1000 covariances, d = 4, l = 512",
        partial(covariances, 4, 512, 1000),
    ),
    ridge("ridge, n = 1600, k = 800, 5 penalties", partial(penalty_path, 1600, 800)),
    ridge("ridge, n = 800, k = 1600, 5 penalties", partial(penalty_path, 800, 1600)),
    Case(
        "ridge.ridge_path",
        "run by run",
        "ridge, 200 runs of n = k = 40, 5 penalties",
        partial(stacked_ridge, 40, 40, 200),
    ),
    linear("linear Transformer, dual, d = 40, n = 400", partial(linear_transformer, 40, 400)),
    linear("linear Transformer, dual, d = 30, n = 900", partial(linear_transformer, 30, 900)),
    linear("linear Transformer, primal, d = 30, n = 3600", partial(linear_transformer, 30, 3600)),
    models("four models, d = 40, n = k = 800, 5 penalties", partial(equivalence, 40, 800, 800)),
    models(
        "four models, d = 80, n = k = 3200, 5 penalties", partial(equivalence, 80, 3200, 3200), least=4, repetitions=3
    ),
    slim(
        of="models.RandomTransformer",
        name="random Transformer in float32, d = 80, n = k = 1600",
        build=partial(in_float32, partial(random_transformer, 80, 1600, 1600)),
    ),
    slim(
        of="training.train",
        name="descent in float32, 10 steps of 32 runs, batch 32",
        build=partial(in_float32, partial(at_once, 32, 10)),
    ),
    descends("descent, float64, a step of one run of 32", partial(descent, 32, torch.float64), per=(32 * RUNS, 32)),
    descends("descent, float32, a step of one run of 32", partial(descent, 32, torch.float32), per=(32 * RUNS, 32)),
    Case(
        "dynamics.LinearDynamics",
        BY_RUN,
        "closed form of a run of 700 steps",
        partial(closed_form, 35),
        per=(1, 35 / 700),
        least=1e4,
    ),
    rank(
        "products formed, singular values",
        "ranks of 4000 products, D = 32, d_h = 8",
        partial(ranks, formed, 4, 4000),
        least=4,
    ),
    rank(
        "products formed, singular values", "ranks of 4000 products, D = 32, d_h = 16", partial(ranks, formed, 2, 4000)
    ),
    rank("cores of QR decompositions", "ranks of 4000 products, D = 32, d_h = 8", partial(ranks, by_cores, 4, 4000)),
    softmax(BY_HEAD, "softmax Transformer, copying, a step of one seed of 8", partial(literal, COPY, 8, 100)),
    softmax(
        "the library, seed by seed", "softmax Transformer, sums, a step of one seed of 8", partial(stacked, ADD, 8, 100)
    ),
    point("learning curve, a run, d = l = 32, n = 2048", partial(learning_curve_point, 32, 2048, 32), least=3),
    point("learning curve, a run, d = 32, l = 320, n = 2048", partial(learning_curve_point, 32, 2048, 320)),
    curves("learning curve, formula, no penalty", partial(learning_curve, 0.0, 500, 2048), most=0.05),
    curves("learning curve, formula, penalty 0.1", partial(learning_curve, 0.1, 500, 2048), most=1),
    Case(
        "asymptotics.random_transformer_error",
        "one training by the library, k = 1600",
        "random Transformer, formula, d = 80, n = 3200, a width",
        partial(curve, 80, 40),
        per=(40, 1),
        most=5,
    ),
    bound(of="asymptotics.optimal_penalty", name="learning curve, best penalty of a point", build=tuned_point, most=50),
    bound(
        of="constructions.gradient_descent",
        name="ten layers of attention, 1000 prompts of 20 examples",
        build=partial(layers, 1000),
        most=1000,
    ),
    bound(of="models", name="import, torch being there", build=imports, most=500),
    floor(
        of="models.RandomTransformer",
        plain="the bare product of matrices in float32",
        name="product F h, d = 80, n = k = 3200",
        build=partial(product, 80, 3200, 3200),
        least=0.8,
    ),
    floor(
        of="models.RandomTransformer",
        plain="bare products and Cholesky factors in float32",
        name="random Transformer, d = 80, n = k = 3200, 5 penalties",
        build=partial(training_floor, 80, 3200, 3200),
    ),
    floor(
        of="models.RandomTransformer",
        plain="first layer, activations and Gram matrix",
        name="random Transformer in float32, d = 80, n = k = 3200",
        build=partial(memory, FLOAT32, 4 * (3200 * 6480 + 2 * 3200**2) / 1e6),
        unit="MB",
    ),
    floor(
        of="prompts.sample_summaries",
        plain="tasks, queries, summaries and answers",
        name="sampler, d = l = 320, n = 10000",
        build=partial(memory, SAMPLER, 8 * 10_000 * (3 * 320 + 2) / 1e6),
        unit="MB",
    ),
    held(
        of="prompts.sample_summaries",
        plain="all inputs, by count",
        name="sampler, d = l = 320, n = 10000",
        build=partial(memory, SAMPLER, 8 * 10_000 * 320**2 / 1e6),
        most=500,
    ),
    held(
        of="models.RandomTransformer",
        plain="the same in float64",
        name="random Transformer in float32, d = 80, n = k = 3200",
        build=partial(memory, FLOAT32, FLOAT64),
    ),
    held(
        of="models.RandomTransformer",
        plain="float64, solved anew for each model and penalty",
        name="four models, d = 80, n = k = 3200, 5 penalties",
        build=partial(memory, "equivalence(80, 3200, 3200)[0]", "equivalence(80, 3200, 3200)[1]"),
        most=900,
        repetitions=1,
    ),
]
