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
LARGEST = {0.1: 4.0, 0.25: 4.0, 0.5: 4.0, 1.0: 1.0}  # largest k / n for each n / d^2


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


def store(name: str, points: list[dict[str, Any]], seeds: int, jobs: int | None) -> None:
    """Run an experiment over its grid and write it as a long table; rows of other sizes stay, with their provenance."""
    started = time.time()
    frame = sweeps.run(equivalence, points, seeds, store=ROOT / ".icl_store" / name, n_jobs=jobs, progress=True)
    keys = [*points[0], "seed"]
    long = frame.melt(id_vars=[*keys, "null"], var_name="model", value_name="error").dropna()
    long[["head", "variant", "width_ratio", "penalty"]] = long.pop("model").str.split("|", expand=True).to_numpy()
    long = long[[*keys, "head", "variant", "width_ratio", "penalty", "null", "error"]]
    sizes = [point["n"] for point in points]
    run = {
        "n": sizes,
        "command": "python book/tools/full_size.py",
        "seeds": seeds,
        "rows": len(long),
        "seconds": round(time.time() - started),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("icl-lib", "torch", "numpy")},
    }
    table, about = DATA / f"{name}.csv", DATA / f"{name}.json"
    runs = [run]
    if table.exists():
        old = pd.read_csv(table)
        others = old[~old.n.isin(sizes)]
        long = pd.concat([others, long.astype(old.dtypes)])
        runs = [r for r in json.loads(about.read_text())["runs"] if not set(r["n"]) <= set(sizes)] + runs
    long.to_csv(table, index=False, float_format="%.6g")
    provenance = {
        "function": f"{Path(__file__).name}:{equivalence.__name__}",
        "setting": "target relu, as many examples as dimensions, noise 0.01; penalty of the mean squared error",
        "runs": runs,
    }
    about.write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=None, help="worker processes; one by default")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--dim", type=int, default=80)
    parser.add_argument("--ratios", type=float, nargs="+", default=list(LARGEST), help="values of n / d^2 to run")
    options = parser.parse_args()
    d = options.dim
    grid = [{"dim": d, "n": round(ratio * d**2), "largest": LARGEST[ratio]} for ratio in options.ratios]
    store(f"equivalence_d{d}", grid, options.seeds, options.jobs)
