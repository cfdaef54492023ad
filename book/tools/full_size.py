"""Run the experiments at the papers' sizes and store their results in the package, with provenance.

`make paper` calls this first. Every finished evaluation is kept in `.icl_store`, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from icl_lib import hermite, models, prompts, sweeps, tasks
from icl_lib.ridge import ridge_path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "icl_lib" / "data"
WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # k / n
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared error; the library's penalty is n times as large
HEADS = ("relu", "tanh")
DEGREES = (2, 4)
TEST = 4000
SIZES = {0.1: (4.0, 32), 0.25: (4.0, 20), 0.5: (4.0, 8), 1.0: (1.0, 8)}  # n / d^2: largest k / n, runs


def equivalence(dim: int, n: int, largest: float, seed: int) -> dict[str, float]:
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
    penalties = [n * value for value in PENALTIES]
    for name, intercept in (("linear", False), ("linear + intercept", True)):
        guess = models.LinearTransformer(intercept).fit(train, penalties).predict(test)
        for value, error in zip(PENALTIES, models.icl_error(guess, test.answer).tolist(), strict=True):
            errors[f"{name}|T|0|{value:g}"] = error
    widths = {ratio: round(ratio * n) for ratio in WIDTHS if ratio <= largest}
    base = models.RandomTransformer(dim, max(widths.values()), HEADS[0], generator=g, dtype=torch.float32)
    seen, unseen = base.preactivations(train), base.preactivations(test)
    base.first = base.first[:1]  # the products are all that is needed from here on
    for head in HEADS:
        parent = models.RandomTransformer(dim, 1, head, generator=g, dtype=torch.float32)
        variants: dict[str, models.RandomTransformer] = {"T": parent}
        variants |= {f"p={degree}": parent.hermite_twin(degree) for degree in DEGREES}
        for name, model in variants.items():
            inside, outside = model.features(seen), model.features(unseen)
            for ratio, width in widths.items():
                path = ridge_path(inside[:, :width], train.answer, penalties)
                guess = (path.to(outside.dtype) @ outside[:, :width].mT).double()
                for value, error in zip(PENALTIES, models.icl_error(guess, test.answer).tolist(), strict=True):
                    errors[f"{head}|{name}|{ratio:g}|{value:g}"] = error
    return errors


def store(name: str, point: dict[str, Any], seeds: int, jobs: int | None) -> None:
    """Run an experiment at one size and put its rows into the long table, with their provenance beside it."""
    started = time.time()
    frame = sweeps.run(equivalence, [point], seeds, store=ROOT / ".icl_store" / name, n_jobs=jobs, progress=True)
    keys = [*point, "seed"]
    long = frame.melt(id_vars=[*keys, "null"], var_name="model", value_name="error").dropna()
    long[["head", "variant", "width_ratio", "penalty"]] = long.pop("model").str.split("|", expand=True).to_numpy()
    long = long[[*keys, "head", "variant", "width_ratio", "penalty", "null", "error"]]
    table, about = DATA / f"{name}.csv", DATA / f"{name}.json"
    provenance = {
        "function": f"{Path(__file__).name}:{equivalence.__name__}",
        "setting": "target relu, as many examples as dimensions, noise 0.01; penalty of the mean squared error",
        "runs": json.loads(about.read_text())["runs"] if about.exists() else [],
    }
    others = [run for run in provenance["runs"] if run["n"] != point["n"]]
    run = {
        "n": point["n"],
        "command": f"python book/tools/full_size.py --ratios {point['n'] / point['dim'] ** 2:g} --seeds {seeds}",
        "seeds": seeds,
        "rows": len(long),
        "seconds": round(time.time() - started),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("icl-lib", "torch", "numpy")},
    }
    provenance["runs"] = sorted([*others, run], key=lambda run: run["n"])
    if table.exists():
        old = pd.read_csv(table)
        long = pd.concat([old[old.n != point["n"]], long.astype(old.dtypes)]).sort_values("n", kind="stable")
    long.to_csv(table, index=False, float_format="%.6g")
    about.write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=None, help="worker processes; one by default")
    parser.add_argument("--seeds", type=int, default=None, help="runs a size; more at small sizes by default")
    parser.add_argument("--dim", type=int, default=80)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(SIZES), help="values of n / d^2 to run")
    options = parser.parse_args()
    d = options.dim
    for ratio in options.ratios:
        largest, runs = SIZES[ratio]
        size = {"dim": d, "n": round(ratio * d**2), "largest": largest}
        store(f"equivalence_d{d}", size, options.seeds or runs, options.jobs)
