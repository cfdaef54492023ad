"""Write what the page on speed shows, from the stored benchmarks: tables, and a figure of the cost against d."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Sequence
from importlib import resources
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import pandas as pd  # noqa: E402
from execute import ROOT  # noqa: E402
from harvest import write  # noqa: E402

from icl_lib import plotting  # noqa: E402

BOOK, DATA = ROOT / "book", ROOT / "icl_lib" / "data"
BENCHMARKS, SCALING = (ROOT / "benchmarks" / f"{name}.json" for name in ("results", "scaling"))
PICTURE = BOOK / "speed.png"
LEVEL = 0.1  # the penalty at which simulation and formula are compared
SPACE = "\N{NO-BREAK SPACE}"
UNITS = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((1e9, "GB"), (1e6, "MB"))}
STAGES = ("product F h", "ridge", "linear Transformer", "first layer", "prompts", "lengths", "formula")


def amount(value: float, unit: str) -> str:
    """Seconds or bytes in two digits, in the unit that suits them."""
    size, name = next((pair for pair in UNITS[unit] if value >= pair[0]), UNITS[unit][-1])
    return f"{digits(value / size)}{SPACE}{name}"


def digits(value: float) -> str:
    """A ratio in two digits, thousands apart."""
    return f"{float(f'{value:.2g}'):,.9g}".replace(",", SPACE)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(about: dict[str, Any]) -> str:
    """Where and with what the stored numbers were measured."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    where = f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:.3g} GB, {about['threads']} thread"
    return f"Measured on {about['date']} by `{about['command']}`: {where}; Python {about['python']}, {versions}."


def cells(record: dict[str, Any]) -> list[str]:
    """A record as cells: the function and what it does, against what, the ratio, both amounts, and what is wanted."""
    scale, unit = (1e-3, "s") if record["unit"] == "ms" else (1e6, "B")
    amounts = [amount(scale * found["median"], unit) for found in (record["ours"], record["other"]) if found]
    ratio = (
        f"**{{}}** [{{}}{SPACE}to{SPACE}{{}}]".format(*map(digits, record["ratio"].values())) if record["ratio"] else ""
    )
    wanted = [f"≥{SPACE}{digits(record['least'])}"] if record["ratio"] and record["least"] else []
    wanted += [f"≤{SPACE}{amount(scale * record['most'], unit)}"] if record["most"] else []
    what = f"`{record['of'].split('.', 1)[-1]}`: {record['name']}"
    mark = "" if record["met"] else " ✘"
    return [what, record["plain"], ratio, ", ".join(amounts), ", ".join(wanted) + mark]


def comparisons(records: list[dict[str, Any]], kind: str, head: Sequence[str]) -> str:
    """All records of a kind as a table; columns that are empty throughout are left out."""
    rows = [cells(record) for record in records if record["kind"] == kind]
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return table([head[column] for column in kept], [[row[column] for column in kept] for row in rows])


def growth(scaling: dict[str, Any]) -> str:
    """Seconds of every stage at every size, fitted and expected exponents, memory, and the rate of the product."""
    sizes = scaling["sizes"]
    head = ["", *(f"d = {found['dim']}" for found in sizes), "fitted", "expected"]
    rows = [
        [
            stage,
            *(amount(found["seconds"][stage]["median"], "s") for found in sizes),
            f"{scaling['fitted'][stage]:.1f}",
            str(power),
        ]
        for stage, power in scaling["expected"].items()
    ]
    rows.append(["runs", *(str(found["runs"]) for found in sizes), "", ""])
    rate = [2e-9 * f["n"] ** 2 * f["dim"] * (f["dim"] + 1) / f["seconds"]["product F h"]["median"] for f in sizes]
    rows.append(["rate of the product, GFLOP/s", *map(digits, rate), "", ""])
    for name, key in (("peak memory of the training", "peak_bytes"), ("`training_memory`", "training_memory")):
        rows.append([name, *(amount(f[key], "B") if f[key] >= 1e6 else "–" for f in sizes), "", ""])
    return table(head, rows)


def errors(found: dict[str, Any], column: int) -> list[float]:
    """Errors of runs at the compared penalty: the stored ones of this size, or those of the study itself."""
    path = DATA / f"equivalence_d{found['dim']}.csv"
    if path.exists():
        kind = f"n == {found['n']} and head == 'relu' and variant == 'T' and width_ratio == 1 and penalty == {LEVEL}"
        return pd.read_csv(path).query(kind).error.tolist()
    return [run[column] for run in found["errors"]]


def takeover(scaling: dict[str, Any]) -> str:
    """One run beside the formula: seconds, and how many runs it takes to be as precise."""
    column, rows, cheaper = scaling["penalties"].index(LEVEL), [], []
    for found in scaling["sizes"]:
        parts = scaling["parts"]
        run, formula = (sum(found["seconds"][s]["median"] for s in parts[part]) for part in ("run", "formula"))
        d, found_errors = found["dim"], errors(found, column)
        row = [str(d), amount(run, "s"), amount(formula, "s"), digits(run / formula)]
        cheaper += [d] if run > formula else []
        if len(found_errors) > 1:
            mean, spread = statistics.mean(found_errors), statistics.stdev(found_errors)
            miss, share = mean / found["formula"][column] - 1, spread / mean
            needed = math.ceil((d * share) ** 2)
            row += [f"{100 * miss:+.1f} ± {100 * share / len(found_errors) ** 0.5:.1f} %", f"{100 * share:.1f} %"]
            row += [str(needed), digits(needed * run / formula)]
        rows.append([*row, *["–"] * (8 - len(row))])
    head = ["d", "one run", "formula", "ratio", "run / formula − 1", "spread of a run", "runs for 1/d", "ratio then"]
    start = f"From d = {min(cheaper)} on, a single run takes longer than the formula." if cheaper else ""
    return "\n\n".join([start, table(head, rows)])


def draw(scaling: dict[str, Any]) -> bytes:
    """Cost of the stages against d: markers are measured, lines have the expected exponent."""
    sizes = scaling["sizes"]
    dims = [found["dim"] for found in sizes]
    style = resources.as_file(resources.files("icl_lib.data") / "icl.mplstyle")
    with style as path, plt.style.context(path):
        figure, ax = plt.subplots(figsize=(6.4, 4.8))
        for series, stage in enumerate(STAGES):
            times = [found["seconds"][stage]["median"] for found in sizes]
            power = scaling["expected"][stage]
            level = statistics.geometric_mean(
                [time / d**power for d, time in zip(dims, times, strict=True) if d >= scaling["from"]]
            )
            plotting.theory(dims, [level * d**power for d in dims], f"_{stage}", series=series, ax=ax, linewidth=1)
            plotting.simulation(dims, times, [0.0] * len(dims), f"{stage}: $d^{power}$", series=series, ax=ax)
        plotting.log_axis("x", dims, ax=ax)
        plotting.log_axis("y", [10.0**power for power in range(-4, 4)], ax=ax)
        ax.set_xlabel("dimension $d$"), ax.set_ylabel("seconds of processor time"), ax.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150)
        plt.close(figure)
    return picture.getvalue()


def pages() -> dict[str, str]:
    """The generated parts of the page, by name."""
    results, scaling = (json.loads(path.read_text()) for path in (BENCHMARKS, SCALING))
    records = results["records"]
    way = ["what", "straightforward way", "ratio", "ours, straightforward", "wanted"]
    low = ["what", "floor", "share reached", "ours, floor", "wanted"]
    single = ["what", "", "", "time", "wanted"]
    return {
        "speed-rows": f"{machine(results['provenance'])}\n\n{comparisons(records, 'speed', way)}\n",
        "bound-rows": comparisons(records, "bound", single) + "\n",
        "memory-rows": comparisons(records, "memory", way) + "\n",
        "floor-rows": comparisons(records, "floor", low) + "\n",
        "scaling-rows": f"{machine(scaling['provenance'])}\n\n{growth(scaling)}\n",
        "takeover-rows": takeover(scaling) + "\n",
    }


def main() -> None:
    """Write the tables and the figure, and leave alone what has not changed."""
    for name, text in pages().items():
        write(BOOK / f"{name}.md", text.encode())
    write(PICTURE, draw(json.loads(SCALING.read_text())))
    print(f"tables and figure written from {BENCHMARKS.name} and {SCALING.name}")


if __name__ == "__main__":
    main()
