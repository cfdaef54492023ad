"""Measure what each chapter costs at each scale, and keep it in book/costs.json: python book/tools/costs.py.

Every measurement is stored at once; a chapter is measured again only if its code, the scale's size or `--again` asks.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import execute
import full_size_transformers
import nbformat
import torch
from nbclient.exceptions import CellExecutionError

from icl_lib import transformers

COSTS = execute.ROOT / "book" / "costs.json"
SCALES = ("quick", "paper")
STEPS = 40  # steps of a softmax Transformer's training that are measured
METER = """
import json, resource, sys, time
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([time.process_time(), unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def digest(chapter: Path) -> str:
    """What a chapter's code is, so that a measurement of older code is told apart."""
    code = [cell.source for cell in execute.read(chapter).cells if cell.cell_type == "code"]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def measure(chapter: Path) -> dict[str, Any]:
    """Processor seconds and peak bytes of one chapter's kernel, start and imports included."""
    notebook = execute.read(chapter)
    notebook.cells.append(nbformat.v4.new_code_cell(METER))
    result = execute.single_nb_execution(notebook, cwd=str(chapter.parent), timeout=None, allow_errors=False)
    if result.err:
        raise result.err
    seconds, peak = json.loads(notebook.cells[-1].outputs[0].text)
    return {
        "code": digest(chapter),
        "seconds": float(f"{seconds:.2g}"),
        "peak_bytes": float(f"{peak:.2g}"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def training(experiment: str) -> float:
    """Processor seconds of all trainings of an experiment, in proportion to their first steps."""
    total = 0.0
    for task, architecture, how, seeds in full_size_transformers.RUNS[experiment].values():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        started = time.process_time()
        transformers.train(task, architecture, generators=generators, **how | {"n_steps": STEPS})
        total += (time.process_time() - started) * how["n_steps"] / STEPS
    return float(f"{total:.2g}")


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as a reader would say it."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s"


def show(cost: dict[str, Any]) -> str:
    """Two cells of a table: time and peak memory."""
    return f"{duration(cost['seconds'])} | {cost['peak_bytes'] / 1e9:.2g} GB"


def chapter_rows(costs: dict[str, Any], titles: dict[str, str]) -> list[str]:
    """What every chapter costs at each scale, and all together."""
    lines = ["| chapter | quick | memory | paper | memory |", "|---|---|---|---|---|"]
    for name, title in titles.items():
        lines.append(
            f"| [{title}](../notebooks/{name}.md) | {' | '.join(show(costs['chapters'][name][s]) for s in SCALES)} |"
        )
    quick, paper = (duration(sum(cost[s]["seconds"] for cost in costs["chapters"].values())) for s in SCALES)
    return [*lines, f"| all | {quick} | | {paper} | |"]


def stored_rows(costs: dict[str, Any]) -> list[str]:
    """What the experiments cost whose results are stored with the library: as their provenance says, or estimated."""
    lines = ["| file | size | runs | time |", "|---|---|---|---|"]
    for path in sorted(full_size_transformers.DATA.glob("*.json")):
        about = json.loads(path.read_text())
        parts = [(f"{part['n']} prompts", part["seeds"], part["seconds"]) for part in about.get("runs", [])]
        if not parts:
            seeds = (part.get("seeds", [1, about["seeds"]]) for part in about["sizes"].values())
            runs = sum(last - first + 1 for first, last in seeds)
            parts = [(f"{len(about['sizes'])} settings", runs, costs["trainings"].get(path.stem) or about["seconds"])]
        lines += [f"| `{path.stem}` | {size} | {runs} | {duration(seconds)} |" for size, runs, seconds in parts]
    return lines


def page(titles: dict[str, str]) -> str:
    """Both tables, for the page on running at scale; the titles of the chapters are by name."""
    costs = json.loads(COSTS.read_text())
    machine = costs["machine"]
    what = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    start = f"One thread of {machine['processor']}, with {what}."
    return "\n".join([start, "", *chapter_rows(costs, titles), "", *stored_rows(costs), ""])


def main() -> int:
    """Measure what is missing, one chapter after the other on one thread; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    costs = json.loads(COSTS.read_text()) if COSTS.exists() else {"chapters": {}}
    costs["machine"] = {
        "processor": processor(),
        "threads": 1,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("icl-lib", "torch", "numpy")},
    }
    torch.set_num_threads(1)
    known = costs.setdefault("trainings", {})
    known |= {name: training(name) for name in full_size_transformers.RUNS if options.again or name not in known}
    failed = []
    for scale in options.scale:
        os.environ["ICL_SCALE"] = scale
        for chapter in execute.chapters():
            known = costs["chapters"].setdefault(chapter.stem, {})
            if not options.again and known.get(scale, {}).get("code") == digest(chapter):
                continue
            try:
                known[scale] = measure(chapter)
            except CellExecutionError as error:
                failed.append(chapter.stem)
                print(f"FAILED {chapter.stem} {scale}\n{error}", file=sys.stderr, flush=True)
                continue
            print(chapter.stem, scale, known[scale], flush=True)
            COSTS.write_text(json.dumps(costs, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
