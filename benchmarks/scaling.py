"""Cost of the main experiment against d, stage by stage, beside that of its formula: python benchmarks/scaling.py.

A run is one random Transformer with relu neurons on prompts of a relu target, n = k = d^2 / 2, at five penalties. Times
are seconds of processor time on one thread, which others on the machine hardly disturb. One process a size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import peak_now
from run import provenance, spread

from icl_lib.asymptotics import random_transformer_error
from icl_lib.models import LinearTransformer, RandomTransformer, icl_error, training_memory
from icl_lib.prompts import Summaries, sample_summaries
from icl_lib.ridge import ridge_path
from icl_lib.tasks import TaskPrior

RESULTS = Path(__file__).with_name("scaling.json")
RUNS = {20: 8, 40: 8, 80: 8, 160: 1}  # dimension: runs
FROM = 40  # smallest dimension of the fits
TEST, NORMS, KEPT = 4000, 20_000, 1000  # prompts of a test; of the lengths that the formula needs; kept of these
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean squared error
LAW: dict[str, Any] = {"target": "relu", "noise": 0.01}
EXPECTED = {  # power of d that rules in the end, n = k = d^2 / 2
    "prompts": 3,  # n (l + d) numbers
    "first layer": 4,  # k d^2 numbers
    "product F h": 6,  # n k d^2
    "ridge": 6,  # n k^2 for the Gram matrix, k^3 for its factors
    "test": 4,  # k d^2 for each of a fixed number of prompts
    "linear Transformer": 6,  # n^2 d for its kernel, n^3 for its factors
    "formula": 0,
    "lengths": 1,  # d for each of a fixed number of prompts
}
PARTS = {"run": ["prompts", "first layer", "product F h", "ridge", "test"], "formula": ["lengths", "formula"]}


class Clock:
    """Processor seconds since the last look, by stage."""

    def __init__(self) -> None:
        self.taken: dict[str, float] = {}
        self.last = time.process_time()

    def stop(self, stage: str) -> None:
        now = time.process_time()
        self.taken[stage] = now - self.last
        self.last = time.process_time()


def draw(dim: int, n: int, generator: torch.Generator) -> Summaries:
    return sample_summaries(TaskPrior(dim).sample(n, generator=generator), dim, **LAW, generator=generator)


def once(dim: int, seed: int) -> dict[str, Any]:
    """One run: seconds of each stage, the errors of simulation and formula, and peak bytes of the training."""
    n, generator, clock = dim**2 // 2, torch.Generator().manual_seed(seed), Clock()
    penalties = [n * value for value in PENALTIES]
    train = draw(dim, n, generator)
    clock.stop("prompts")
    model = RandomTransformer(dim, n, "relu", generator=generator, dtype=torch.float32)
    clock.stop("first layer")
    model.trace = train.trace
    features = model.features(model.preactivations(train))
    clock.stop("product F h")
    model.weights = ridge_path(features, train.answer, penalties)
    clock.stop("ridge")
    peak = peak_now()
    test = draw(dim, TEST, generator)
    errors = icl_error(model.predict(test), test.answer)
    clock.stop("test")
    del model, features
    LinearTransformer().fit(train, penalties)
    clock.stop("linear Transformer")
    sample = draw(dim, NORMS, generator)
    norms = sample.query.square().sum(-1) * sample.summary.square().sum(-1) / sample.trace
    norms = norms.sort().values.view(KEPT, -1).mean(1)
    clock.stop("lengths")
    law: dict[str, Any] = LAW | {"noise": LAW["noise"] * (1 + 1e-9 * seed)}  # nothing is remembered from other runs
    sizes = {"dim": dim, "length": dim, "n_prompts": n, "width": n, "activation": "relu", "norm_samples": norms}
    formula = [random_transformer_error(penalty=penalty, **sizes, **law) for penalty in penalties]
    clock.stop("formula")
    return {"seconds": clock.taken, "errors": errors.tolist(), "formula": formula, "peak": peak}


def size(dim: int) -> dict[str, Any]:
    """All runs of one dimension, in this process; a small one first, to warm up."""
    torch.set_num_threads(1)
    once(8, 0)
    before = peak_now()
    runs = [once(dim, seed) for seed in range(RUNS[dim])]
    n = dim**2 // 2
    return {
        "dim": dim,
        "n": n,
        "runs": len(runs),
        "seconds": {stage: spread([run["seconds"][stage] for run in runs]) for stage in EXPECTED},
        "peak_bytes": runs[0]["peak"] - before,
        "training_memory": training_memory(dim, n, n, penalties=len(PENALTIES)),
        "errors": [[float(f"{error:.6g}") for error in run["errors"]] for run in runs],
        "formula": [float(f"{error:.6g}") for error in runs[0]["formula"]],
    }


def exponent(dims: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(d) for d in dims], [math.log(s) for s in seconds]).slope


def exponents(sizes: list[dict[str, Any]]) -> dict[str, float]:
    """Of every stage, from the larger dimensions."""
    large = [found for found in sizes if found["dim"] >= FROM]
    dims = [found["dim"] for found in large]
    return {
        stage: round(exponent(dims, [found["seconds"][stage]["median"] for found in large]), 2) for stage in EXPECTED
    }


def main() -> None:
    """Measure all sizes, print seconds and exponents, and store them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--store", action="store_true", help=f"keep all sizes, with provenance, in {RESULTS.name}")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # one size, in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(size(options.dim[0])))
        return
    if options.store and options.dim != list(RUNS):
        parser.error("--store keeps one run of all sizes, expected no --dim beside it")
    torch.set_num_threads(1)
    sizes = []
    for dim in options.dim:
        command = [sys.executable, __file__, "--one", "--dim", str(dim)]
        sizes.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        found = sizes[-1]
        taken = ", ".join(f"{stage} {found['seconds'][stage]['median']:.3g} s" for stage in EXPECTED)
        print(f"d = {dim}: {taken}; peak {found['peak_bytes'] / 1e9:.3g} GB", flush=True)
    fitted = exponents(sizes) if sum(found["dim"] >= FROM for found in sizes) > 1 else {}
    for stage, value in fitted.items():
        print(f"{stage}: d^{value:.2f}, expected d^{EXPECTED[stage]}")
    if options.store:
        about = {"provenance": provenance(), "penalties": PENALTIES, "from": FROM, "parts": PARTS, "expected": EXPECTED}
        results = about | {"fitted": fitted, "sizes": sizes}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
