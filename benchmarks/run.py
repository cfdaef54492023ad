"""Speed and memory of the library against the straightforward way, on one thread: python benchmarks/run.py."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, Run

RESULTS = Path(__file__).with_name("results.json")
TOLD = [field.name for field in fields(Case) if field.name not in ("build", "per")]  # what a record says of its case


def measure(run: Run, per: float) -> float:
    """Milliseconds of processor time for a piece of the work, or the float that a run returns."""
    start = time.process_time()
    result = run()
    taken = 1e3 * (time.process_time() - start) / per
    return result if isinstance(result, float) else taken


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest, in four digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{number:.4g}") for name, number in numbers.items()}


def record(case: Case) -> dict[str, Any]:
    """Measure a case: both ways in neighbouring runs, and the ratio of each such pair."""
    ours, plain = case.build()
    if case.unit == "ms":  # to warm up
        ours(), plain and plain()
    pairs = [
        (measure(ours, case.per[0]), measure(plain, case.per[1]) if plain else math.nan)
        for _ in range(case.repetitions)
    ]
    told = {name: getattr(case, name) for name in TOLD}
    found: dict[str, Any] = told | {"most": case.most if case.most < math.inf else None}
    found["ours"] = spread([a for a, _ in pairs])
    found["other"] = spread([b for _, b in pairs]) if plain else None
    found["ratio"] = spread([b / a for a, b in pairs]) if plain else None
    enough = plain is None or found["ratio"]["median"] >= case.least
    return found | {"met": enough and found["ours"]["median"] <= case.most}


def row(found: dict[str, Any]) -> str:
    """A record as a line of the table that is printed."""
    columns = [
        f"{number['median']:.4g} {found['unit']}" if number else "" for number in (found["ours"], found["other"])
    ]
    ratio = "{median:.3g} [{min:.3g}-{max:.3g}]".format(**found["ratio"]) if found["ratio"] else ""
    wanted = [f"ratio {found['least']:g}"] if found["ratio"] and found["least"] else []
    wanted += [f"{found['most']:g} {found['unit']}"] if found["most"] else []
    missed = "" if found["met"] else "  MISSED"
    return f"{found['name']:<64}{columns[0]:>14}{columns[1]:>14}   {ratio:<24}{', '.join(wanted)}{missed}"


def provenance() -> dict[str, Any]:
    """When, on what, and with which versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("icl-lib", "torch", "numpy")},
    }


def main() -> int:
    """Print the table; 1 if a wanted number is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name holds this regular expression")
    parser.add_argument("--store", action="store_true", help=f"keep all rows, with provenance, in {RESULTS.name}")
    options = parser.parse_args()
    if options.store and options.only:
        parser.error("--store keeps one run of all rows, expected no --only beside it")
    torch.set_num_threads(1)
    print(f"{'':<64}{'ours':>14}{'other':>14}   {'ratio, median [min-max]':<24}wanted")
    records = []
    for case in CASES:
        if re.search(options.only, case.name):
            records.append(record(case))
            print(row(records[-1]), flush=True)
    if options.store:
        RESULTS.write_text(json.dumps({"provenance": provenance(), "records": records}, indent=1) + "\n")
    return 0 if all(found["met"] for found in records) else 1


if __name__ == "__main__":
    sys.exit(main())
