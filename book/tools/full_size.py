"""Run the experiments at the papers' sizes and store their results in the package, with provenance.

`make paper` calls this first. Every finished evaluation is kept in `.icl_store`, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from icl_lib import hermite, models, prompts, sweeps, tasks, training
from icl_lib.ridge import ridge_path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "icl_lib" / "data"
WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # k / n
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared error; the library's penalty is n times as large
DEGREES = (2, 4)
TEST = 4000
SIZES = {  # dimension: n / d^2: largest k / n, heads, smallest penalty, runs
    80: {
        0.1: (4.0, "relu tanh", 1e-4, 32),
        0.25: (4.0, "relu tanh", 1e-4, 20),
        0.5: (4.0, "relu tanh", 1e-4, 8),
        1.0: (1.0, "relu tanh", 1e-4, 8),
    },
    160: {0.5: (1.0, "relu", 1e-2, 8)},  # smaller penalties would take a Gram matrix in float64, and twice the time
}

# Learning dynamics: dimension, smallest eigenvalue (the largest is 1, the others between in geometric steps), examples,
# size of the start, steps, and prompts per task; 16 tasks, and a step size 1 / T_1 of 0.02 throughout.
RUNS: dict[str, dict[str, Any]] = {
    "all-blocks": {"dim": 4, "smallest": 0.4, "length": 64, "start": 0.05, "steps": 2500, "batch": 32},
    "long": {"dim": 4, "smallest": 0.4, "length": 2048, "start": 0.1, "steps": 1600, "batch": 64},
    "short": {"dim": 6, "smallest": 0.3, "length": 8, "start": 0.1, "steps": 3000, "batch": 32},
    "generic": {"dim": 4, "smallest": 0.4, "length": 32, "start": 0.1, "steps": 1000, "batch": 32},
}
N_TASKS = 16
STEP_SIZE = 0.02
RECORDS = 40  # recorded steps of a run


def learning(setting: str, seed: int) -> dict[str, float]:
    """Strengths of the modes in one run of gradient descent; columns `path|step|mode`.

    Aligned and balanced starts with empty null blocks, and whitened antithetic diagonal tasks, which stay the same;
    but "all-blocks" starts all four blocks with normal entries, and "generic" draws Gaussian tasks anew at each step.
    """
    size, g = RUNS[setting], torch.Generator().manual_seed(seed)
    d, steps = size["dim"], size["steps"]
    block = size["start"] * torch.eye(d, dtype=torch.float64)[None]
    value, query = training.join_blocks(block, block)
    if setting == "all-blocks":
        value.normal_(generator=g).mul_(size["start"]), query.normal_(generator=g).mul_(size["start"])
    fixed = training.antithetic_tasks(N_TASKS, d, generator=g)

    def fresh(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(N_TASKS, d, d, generator=generator, dtype=torch.float64)

    run = training.train(
        fresh if setting == "generic" else fixed,
        value,
        query,
        covariance=torch.from_numpy(np.diag(np.geomspace(1, size["smallest"], d))),
        length=size["length"],
        learning_rate=STEP_SIZE / N_TASKS,
        n_steps=steps,
        batch=size["batch"],
        generator=g,
        every=steps // RECORDS,
    )
    null = (run.p1.diagonal(dim1=-2, dim2=-1) * run.q2.diagonal(dim1=-2, dim2=-1))[:, 0]
    paths = {"strength": run.strengths()[:, 0], "null": null}
    return {
        f"{path}|{step}|{mode}": values[time, mode].item()
        for path, values in paths.items()
        for time, step in enumerate(run.steps.tolist())
        for mode in range(d)
    }


def equivalence(dim: int, n: int, largest: float, heads: str, least: float, seed: int) -> dict[str, float]:
    """In-context errors of the random Transformer, its twins and the linear Transformer on the same prompts.

    Target relu, as many examples as dimensions, noise 0.01. One column a model: `head|variant|k/n|penalty`.
    """
    g = torch.Generator().manual_seed(seed)
    law: dict[str, Any] = {"target": "relu", "noise": 0.01, "generator": g}
    prior = tasks.TaskPrior(dim)
    train = prompts.sample_summaries(prior.sample(n, generator=g), dim, **law)
    test = prompts.sample_summaries(prior.sample(TEST, generator=g), dim, **law)
    mean = hermite.expand("relu", 0).coefficients.item()
    errors = {"null": ((test.answer - mean) ** 2).mean().item()}
    values = [value for value in PENALTIES if value >= least]
    penalties = [n * value for value in values]
    for name, intercept in (("linear", False), ("linear + intercept", True)):
        guess = models.LinearTransformer(intercept).fit(train, penalties).predict(test)
        for value, error in zip(values, models.icl_error(guess, test.answer).tolist(), strict=True):
            errors[f"{name}|T|0|{value:g}"] = error
    widths = {ratio: round(ratio * n) for ratio in WIDTHS if ratio <= largest}
    base = models.RandomTransformer(dim, max(widths.values()), "relu", generator=g, dtype=torch.float32)
    seen, unseen = base.preactivations(train), base.preactivations(test)
    base.first = base.first[:1].clone()  # the products are all that is needed from here on
    for head in heads.split():
        parent = models.RandomTransformer(dim, 1, head, generator=g, dtype=torch.float32)
        variants: dict[str, models.RandomTransformer] = {"T": parent}
        variants |= {f"p={degree}": parent.hermite_twin(degree) for degree in DEGREES}
        for name, model in variants.items():
            inside, outside = model.features(seen), model.features(unseen)
            for ratio, width in widths.items():
                path = ridge_path(inside[:, :width], train.answer, penalties)
                guess = (path.to(outside.dtype) @ outside[:, :width].mT).double()
                for value, error in zip(values, models.icl_error(guess, test.answer).tolist(), strict=True):
                    errors[f"{head}|{name}|{ratio:g}|{value:g}"] = error
    return errors


def record(command: str, seeds: int, rows: int, started: float) -> dict[str, Any]:
    """How stored rows were made: the command, its seeds and time, and the versions of what ran."""
    return {
        "command": f"python book/tools/{command}",
        "seeds": seeds,
        "rows": rows,
        "seconds": round(time.time() - started),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("icl-lib", "torch", "numpy")},
    }


def memory(dim: int, n: int, largest: float) -> int:
    """Bytes that one run of :func:`equivalence` takes at the worst: a training, and the products beside it."""
    width = round(largest * n)
    return models.training_memory(dim, n, width, penalties=len(PENALTIES)) + 4 * width * (n + 2 * TEST)


def store(name: str, point: dict[str, Any], seeds: int, jobs: int | None) -> None:
    """Run an experiment at one size and put its rows into the long table, with their provenance beside it."""
    started = time.time()
    frame = sweeps.run(equivalence, [point], seeds, store=ROOT / ".icl_store" / name, n_jobs=jobs, progress=True)
    keys = ["dim", "n", "largest", "seed"]
    long = (
        frame.drop(columns=["heads", "least"])
        .melt(id_vars=[*keys, "null"], var_name="model", value_name="error")
        .dropna()
    )
    long[["head", "variant", "width_ratio", "penalty"]] = long.pop("model").str.split("|", expand=True).to_numpy()
    long = long[[*keys, "head", "variant", "width_ratio", "penalty", "null", "error"]]
    table, about = DATA / f"{name}.csv", DATA / f"{name}.json"
    provenance = {
        "function": f"{Path(__file__).name}:{equivalence.__name__}",
        "setting": "target relu, as many examples as dimensions, noise 0.01; penalty of the mean squared error",
        "runs": json.loads(about.read_text())["runs"] if about.exists() else [],
    }
    others = [run for run in provenance["runs"] if run["n"] != point["n"]]
    size = f"--dim {point['dim']} --ratios {point['n'] / point['dim'] ** 2:g}"
    command = f"full_size.py --only equivalence {size} --seeds {seeds}"
    run = {"n": point["n"]} | record(command, seeds, len(long), started)
    provenance["runs"] = sorted([*others, run], key=lambda run: run["n"])
    if table.exists():
        old = pd.read_csv(table)
        long = pd.concat([old[old.n != point["n"]], long.astype(old.dtypes)]).sort_values("n", kind="stable")
    long.to_csv(table, index=False, float_format="%.6g")
    about.write_text(json.dumps(provenance, indent=2) + "\n")


def store_learning(seeds: int, jobs: int | None) -> None:
    """Run gradient descent in every setting, and store means and standard errors over the runs."""
    started, rows = time.time(), []
    for setting in RUNS:
        point = [{"setting": setting}]
        frame = sweeps.run(learning, point, seeds, store=ROOT / ".icl_store" / "learning", n_jobs=jobs, progress=True)
        frame = frame.drop(columns=["setting", "seed"])
        frame.columns = pd.MultiIndex.from_tuples([tuple(name.split("|")) for name in frame.columns])
        for (step, mode), runs in frame.T.groupby(level=[1, 2], sort=False):
            row: dict[str, Any] = {"setting": setting, "step": int(str(step)), "mode": int(str(mode))}
            for path in ("strength", "null"):
                values = runs.loc[path].to_numpy()
                row |= {path: values.mean(), f"{path}_se": values.std(ddof=1) / seeds**0.5}
            rows.append(row | {"runs": seeds})
    table = pd.DataFrame(rows)
    table.to_csv(DATA / "dynamics.csv", index=False, float_format="%.6g")
    about = {
        "function": f"{Path(__file__).name}:{learning.__name__}",
        "setting": f"{N_TASKS} tasks, 1 / T_1 = {STEP_SIZE}; eigenvalues from 1 to the smallest in geometric steps",
        "sizes": RUNS,
    } | record(f"full_size.py --only dynamics --seeds {seeds}", seeds, len(table), started)
    (DATA / "dynamics.json").write_text(json.dumps(about, indent=2) + "\n")


def store_equivalence(dim: int, ratios: list[float] | None, seeds: int | None, jobs: int | None, budget: float) -> None:
    """Run and store all sizes of one dimension; refuse, before anything is drawn, what would not fit in memory."""
    sizes = SIZES.get(dim, SIZES[160])
    for ratio in ratios or sizes:
        if ratio not in sizes:
            raise ValueError(f"ratio is {ratio:g}, expected one of {list(sizes)} in {dim} dimensions")
        largest, heads, least, runs = sizes[ratio]
        n = round(ratio * dim**2)
        need = memory(dim, n, largest)
        if need > budget:
            raise MemoryError(
                f"{dim} dimensions, {n} prompts and {round(largest * n)} neurons need about {need / 1e9:.3g} GB in "
                f"each worker, and there are {budget / 1e9:.3g} GB (--memory)"
            )
        point = {"dim": dim, "n": n, "largest": largest, "heads": heads, "least": least}
        store(f"equivalence_d{dim}", point, seeds or runs, jobs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=None, help="worker processes; one by default")
    parser.add_argument("--memory", type=float, default=None, help="GB a worker may take; all there is by default")
    parser.add_argument("--seeds", type=int, default=None, help="runs a size; more at small sizes by default")
    parser.add_argument("--dim", type=int, nargs="+", default=list(SIZES), help="dimensions of the equivalence")
    parser.add_argument("--ratios", type=float, nargs="+", default=None, help="values of n / d^2 to run")
    parser.add_argument("--only", choices=("equivalence", "dynamics"), help="one of the two experiments")
    options = parser.parse_args()
    budget = (
        1e9 * options.memory
        if options.memory
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (options.jobs or 1)
    )
    if options.only != "dynamics":
        for dim in options.dim:
            store_equivalence(dim, options.ratios, options.seeds, options.jobs, budget)
    if options.only != "equivalence":
        store_learning(options.seeds or 64, options.jobs)
