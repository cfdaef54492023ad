"""Speed and memory of the library against the straightforward way, on one thread: python benchmarks/run.py."""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
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
REPETITIONS = 5
PENALTIES = [1e-2, 1e-1, 1.0, 10.0, 100.0]


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(name: str, ours: Run, plain: Run, least: float = 0.0, repetitions: int = REPETITIONS) -> bool:
    """Print one row: medians of both, and the ratio of neighbouring runs; True if its median reaches ``least``."""
    ours(), plain()
    pairs = [(seconds(ours), seconds(plain)) for _ in range(repetitions)]
    ratios = sorted(b / a for a, b in pairs)
    mine, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    middle = statistics.median(ratios)
    wanted = f"  (wanted: {least:g})" if least else ""
    spread = f"{middle:.1f} [{ratios[0]:.1f}-{ratios[-1]:.1f}]"
    print(f"{name:<46}{mine:>9.1f} ms{theirs:>9.1f} ms   {spread:<18}{wanted}", flush=True)
    return middle >= least


def sampler(dim: int, n: int) -> tuple[Run, Run]:
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


def long_prompts(dim: int, n: int, length: int) -> tuple[Run, Run]:
    """Summaries of long prompts with linear labels: three random numbers for the sums against all labels."""
    generator = torch.Generator().manual_seed(0)
    tasks = TaskPrior(dim).sample(n, generator=generator)

    def draw(target: str | Callable[[torch.Tensor], torch.Tensor]) -> Run:
        return lambda: sample_summaries(tasks, length, target=target, noise=0.1, generator=generator)

    return draw("linear"), draw(lambda x: x)


def penalty_path(n: int, k: int) -> tuple[Run, Run]:
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


def draw(dim: int, n: int, seed: int = 0) -> Summaries:
    generator = torch.Generator().manual_seed(seed)
    tasks = TaskPrior(dim).sample(n, generator=generator)
    return sample_summaries(tasks, dim, target="relu", noise=0.1, generator=generator)


def linear_transformer(dim: int, n: int) -> tuple[Run, Run]:
    """Products of inner products, or unique products only, against ridge on the features written out."""
    train = draw(dim, n)

    def plain() -> object:
        features = train.features()
        eye = torch.eye(features.shape[1], dtype=torch.float64)
        return torch.linalg.solve(features.mT @ features + eye, features.mT @ train.answer)

    return lambda: LinearTransformer().fit(train, 1.0), plain


def equivalence(dim: int, n: int, width: int) -> tuple[Run, Run]:
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


def spectra(heads: int) -> tuple[Run, Run]:
    """Ranks of 4000 trained 32 x 32 products of thin factors, against singular values of the products formed."""
    task, _, how = COPY
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    model = Architecture(heads=heads, scale=0.05)
    run = transformers.train(task, model, generators=generators, n_steps=400 // heads - 1, every=1, **how)
    left, right = transformers.attention_factors(run.weights, "QK")  # (steps, 5, 2, heads, 32, 32 / heads) and back

    def plain() -> object:
        sigma = torch.linalg.svdvals(left @ right)
        share = sigma / sigma.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp()

    return lambda: spectral.product_rank(left, right), plain


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


def show_transformers() -> bool:
    """Milliseconds for a step of one seed at the sizes of the chapters, and the ratio to a literal training."""
    good = True
    for name, setting in (("copying", COPY), ("sums", ADD)):
        ours = trained(setting, 8, 100)
        ours()
        taken = sorted(1e3 * seconds(ours) / 800 for _ in range(REPETITIONS))
        row = f"softmax Transformer, {name}, a step of one seed of 8: {statistics.median(taken):.1f} "
        row += f"[{taken[0]:.1f}-{taken[-1]:.1f}] ms  (wanted: 5)"
        if name == "copying":
            plain = naive_transformer(COPY, 100)
            plain()
            ratios = sorted(8 * seconds(plain) / seconds(ours) for _ in range(REPETITIONS))
            row += (
                f"; {statistics.median(ratios):.1f} [{ratios[0]:.1f}-{ratios[-1]:.1f}] times as fast as a literal one"
            )
        print(row, flush=True)
        good = good and statistics.median(taken) <= 5
    return good


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


def descent(dtype: torch.dtype) -> tuple[Run, Run]:
    """32 steps of 32 runs at once, on drawn covariances, against 32 steps of one naive run."""
    generator, d = torch.Generator().manual_seed(0), len(SPECTRUM)
    tasks = training.antithetic_tasks(N_TASKS, d, generator=generator)
    block = 0.1 * torch.eye(d, dtype=dtype).expand(RUNS, d, d)
    value, query = training.join_blocks(block, block)
    law = {"covariance": SPECTRUM.diag(), "length": LENGTH, "learning_rate": 0.02 / N_TASKS, "batch": BATCH}

    def ours() -> object:
        return training.train(tasks, value, query, n_steps=RUNS, every=RUNS, generator=generator, **law)

    return ours, naive_steps(RUNS)


def show_descent(dtype: torch.dtype, least: float) -> bool:
    """Seconds for a step of one run: a batch of 32 runs against a naive one; and 700 steps of the 32 runs."""
    ours, plain = descent(dtype)
    ours(), plain()
    ratios = sorted(seconds(plain) * RUNS / seconds(ours) for _ in range(REPETITIONS))
    middle, taken = statistics.median(ratios), seconds(ours) / RUNS * 700
    name = str(dtype).removeprefix("torch.")
    print(
        f"descent, {name}, a step of one run: {middle:.0f} [{ratios[0]:.0f}-{ratios[-1]:.0f}] times as fast as naive ",
        end="",
    )
    print(f"autograd  (wanted: {least:g}); 700 steps of {RUNS} runs: {taken:.1f} s")
    return middle >= least


def show_closed_form() -> bool:
    """Strengths at 40 times from the closed form, against one naive run of 700 steps (35 timed)."""
    law = LinearDynamics(SPECTRUM, LENGTH, n_tasks=N_TASKS, learning_rate=0.02 / N_TASKS)
    times, plain = torch.linspace(0, 700, 40), naive_steps(35)
    ours: Run = lambda: law.logistic(times, 0.01)  # noqa: E731
    ours(), plain()
    ratios = sorted(20 * seconds(plain) / seconds(ours) for _ in range(REPETITIONS))
    print(f"closed form of a run of 700 steps: {statistics.median(ratios):.0f} times as fast  (wanted: 10000)")
    return statistics.median(ratios) >= 1e4


def learning_curve_point(dim: int, n: int, length: int, lam: float = 0.1) -> tuple[Run, Run]:
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


def show_point(lam: float, wanted: float) -> bool:
    """Microseconds for a point of a learning curve."""
    law = {"alpha": 1.0, "kappa": 0.5, "rho": 0.01, "lam": lam}
    taus = [0.02 * i for i in range(1, 501) if i != 50]
    curve: Run = lambda: [linear_attention_errors(tau=tau, **law) for tau in taus]  # noqa: E731
    curve()
    taken = 1e6 * statistics.median(seconds(curve) for _ in range(REPETITIONS)) / len(taus)
    print(f"closed form, a point at lam = {lam:g}: {taken:.0f} us  (wanted: {wanted:g})")
    return taken < wanted


def show_tuned_point() -> bool:
    """Milliseconds for a point with the best penalty."""

    def point() -> object:
        return optimal_penalty(
            lambda lam: linear_attention_errors(alpha=1, kappa=math.inf, tau=1, rho=0.01, lam=lam).icl, 1e-3, 10
        )

    point()
    taken = 1e3 * statistics.median(seconds(point) for _ in range(REPETITIONS))
    print(f"closed form, a point at its best penalty: {taken:.1f} ms  (wanted: 50)")
    return taken < 50


def show_constructions() -> bool:
    """Ten steps of gradient descent for 1000 prompts, as layers of attention."""
    generator = torch.Generator().manual_seed(0)
    x, y, query = (torch.randn(1000, *s, generator=generator, dtype=torch.float64) for s in ((20, 5), (20,), (5,)))
    network = constructions.gradient_descent(5, 20, [0.1] * 10)
    network(x, y, query)
    taken = statistics.median(seconds(lambda: network(x, y, query)) for _ in range(REPETITIONS))
    print(f"ten layers of attention, 1000 prompts of 20 examples: {taken:.2f} s  (wanted: 1)")
    return taken < 1


def show_product(dim: int, n: int, width: int) -> bool:
    """The product F h, with its features formed on the way, in per cent of the rate of a bare product."""
    train = draw(dim, n)
    model = RandomTransformer(dim, width, "relu", generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    features = train.to(dtype=torch.float32).features()
    bare: Run = lambda: features @ model.first.mT  # noqa: E731
    ours: Run = lambda: model.preactivations(train)  # noqa: E731
    bare(), ours()
    shares = sorted(seconds(bare) / seconds(ours) for _ in range(REPETITIONS))
    rate = 2e-9 * n * width * dim * (dim + 1) / seconds(bare)
    share = statistics.median(shares)
    print(f"product F h, d={dim}, n={n}, k={width}: {share:.0%} of {rate:.0f} GFLOP/s in float32  (wanted: 80 %)")
    return share >= 0.8


def show_curve() -> bool:
    """The formula for 40 widths."""

    def curve() -> object:
        law = {"dim": 80, "length": 80, "n_prompts": 3200, "penalty": 32.0, "target": "relu", "noise": 0.01}
        return [random_transformer_error(width=80 * i, activation="relu", **law) for i in range(1, 41)]

    curve()
    taken = statistics.median(seconds(curve) for _ in range(REPETITIONS))
    print(f"formula for a curve of 40 widths: {taken:.3f} s  (wanted: 0.2)")
    return taken < 0.2


def show_equivalence_memory() -> bool:
    """All models of the comparison at d = 80, in a process of their own."""
    here = str(Path(__file__).parent)
    peak = peak_megabytes(f"import sys; sys.path.insert(0, {here!r}); import run; run.equivalence(80, 3200, 3200)[0]()")
    print(f"peak memory of the four models, d=80, n=k=3200: {peak:.0f} MB with torch itself  (wanted: 1200)")
    return peak < 1200


def peak_megabytes(program: str) -> float:
    """Peak memory of a fresh Python process that runs a program, without what it inherits from this one."""
    before = "import torch; torch.set_num_threads(1); "
    after = "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
    if sys.platform != "linux":
        after = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    done = subprocess.run([sys.executable, "-c", before + program + after], check=True, capture_output=True, text=True)
    return float(done.stdout) / 1e3


def import_seconds(statement: str) -> float:
    program = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return float(done.stdout)


def show_memory(dim: int, n: int) -> bool:
    extra = peak_megabytes(
        "from icl_lib.tasks import TaskPrior; from icl_lib.prompts import sample_summaries; "
        f"g = torch.Generator().manual_seed(0); w = TaskPrior({dim}).sample({n}, generator=g); "
        f"sample_summaries(w, {dim}, target='relu', noise=.1, generator=g)"
    ) - peak_megabytes("pass")
    inputs = n * dim * dim * 8 / 1e6
    print(f"memory of the sampler, d=l={dim}, n={n}: {extra:.0f} MB; all inputs alone: {inputs:.0f} MB  (wanted: 500)")
    return extra < 500


def show_import() -> bool:
    extra = statistics.median(
        import_seconds("import icl_lib.models") - import_seconds("import torch") for _ in range(REPETITIONS)
    )
    print(f"import of icl_lib.models beyond torch: {extra:.2f} s  (wanted: 0.5)")
    return extra < 0.5


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    print(f"{'benchmark':<46}{'ours':>12}{'plain':>12}   ratio, median [min-max]")
    good = [
        compare("sampler, d=l=32, n=8000", *sampler(32, 8000)),
        compare("sampler, d=l=80, n=1500", *sampler(80, 1500), least=12),
        compare("sampler, d=l=160, n=400", *sampler(160, 400)),
        compare("sampler, linear labels, d=32, l=3200, n=2000", *long_prompts(32, 2000, 3200)),
        compare("ridge path, n=1600, k=800, 5 penalties", *penalty_path(1600, 800)),
        compare("ridge path, n=800, k=1600, 5 penalties", *penalty_path(800, 1600)),
        compare("linear Transformer, dual, d=40, n=400", *linear_transformer(40, 400)),
        compare("linear Transformer, dual, d=30, n=900", *linear_transformer(30, 900)),
        compare("linear Transformer, primal, d=30, n=3600", *linear_transformer(30, 3600)),
        compare("four models, d=40, n=k=800, 5 penalties", *equivalence(40, 800, 800)),
        compare("four models, d=80, n=k=3200, 5 penalties", *equivalence(80, 3200, 3200), least=4, repetitions=3),
        show_descent(torch.float64, 50),
        show_descent(torch.float32, 50),
        show_closed_form(),
        compare("ranks of 4000 products, D=32, d_h=8", *spectra(4), least=4),
        compare("ranks of 4000 products, D=32, d_h=16", *spectra(2)),
        show_transformers(),
        compare("learning curve point, d=l=32, n=2048", *learning_curve_point(32, 2048, 32), least=3, repetitions=3),
        compare("learning curve point, d=32, l=320, n=2048", *learning_curve_point(32, 2048, 320), repetitions=3),
        show_point(0.0, 50),
        show_point(0.1, 1000),
        show_tuned_point(),
        show_constructions(),
        show_product(80, 3200, 3200),
        show_curve(),
        show_equivalence_memory(),
        show_memory(320, 10_000),
        show_import(),
    ]
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
