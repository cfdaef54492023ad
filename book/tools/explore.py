"""Compute the grids behind the interactive figures of `book/explore.md`, and draw the still pictures that print shows.

Each grid becomes a script that sets one variable: a page that is opened from a folder may load scripts but no data.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from full_size import DEGREES as SIMULATED
from full_size import PENALTIES, RUNS, SIZES, STEP_SIZE
from harvest import write

from icl_lib import asymptotics, hermite, plotting, prompts, sweeps, tasks
from icl_lib.dynamics import LinearDynamics

BOOK = Path(__file__).resolve().parents[1]

# The random Transformer and its twin, at the settings of the stored simulations.
DIM, NOISE, TARGET = 80, 0.01, "relu"
HEADS = ("relu", "tanh")
PROMPTS = tuple(round(ratio * DIM**2) for ratio in SIZES[DIM])
DEGREES = range(5)
BELOW = (0.1, 0.15, 0.2, 0.25, 0.32, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97)
RATIOS = (*BELOW, 1, 1.03, 1.07, 1.15, 1.3, 1.5, 1.75, 2, 2.5, 3.2, 4)
MEAN_ANSWER = hermite.expand(TARGET, 0).residual ** 2 + NOISE**2  # error of predicting the mean answer

# The modes of the linear Transformer, in units of the first time constant and of 1 / s_j.
SPECTRA = {
    "four equal eigenvalues": (4, 1.0),
    "four eigenvalues from 1 to 0.4": (4, 0.4),
    "six eigenvalues from 1 to 0.3": (6, 0.3),
    "four eigenvalues from 1 to 0.1": (4, 0.1),
}
LENGTHS = (1, 2, 8, 32, 256, 2048)
STARTS = (0.01, 0.03, 0.1)
FINE = np.geomspace(0.5, 2000, 361)
DRAWN = slice(None, None, 5)  # every fifth time is drawn
ALIGNED = ("long", "short")  # stored runs with aligned starts and tasks, for which the flow is exact
RECORDS = np.unique(np.geomspace(1, 40, 14).round().astype(int))  # of the 40 that are stored


@cache
def norms(samples: int = 20_000, kept: int = 500) -> np.ndarray:
    """Squared lengths R of prompts in units of their mean, shape (kept,); neighbours in size are averaged."""
    g = torch.Generator().manual_seed(DIM)
    fresh = tasks.TaskPrior(DIM).sample(samples, generator=g)
    drawn = prompts.sample_summaries(fresh, DIM, target=TARGET, noise=NOISE, generator=g)
    squares = drawn.query.square().sum(-1) * drawn.summary.square().sum(-1)
    return (squares / squares.mean()).sort().values.view(kept, -1).mean(1).numpy()


def effective(head: str, degree: int) -> int:
    """The degree without top coefficients that are 0: relu has no third one, tanh no even ones."""
    coefficients = hermite.expand(head, degree).coefficients.abs()
    return int((coefficients > 1e-9).nonzero().max()) if coefficients.max() > 1e-9 else 0


def twin(head: str, degree: int) -> hermite.Activation:
    """The Hermite twin as a formula knows it: the polynomial, with a fast cosine in the place of the noise."""
    cut = hermite.expand(head, degree)

    def function(a: torch.Tensor) -> torch.Tensor:
        return cut.polynomial(a) + cut.residual * math.sqrt(2) * torch.cos(20 * a)

    return hermite.Activation(f"{head}, degree {effective(head, degree)}", function)


@cache
def head_error(activation: Any, n: int, penalty: float, ratio: float) -> float:
    """Error of a layer or twin with `ratio` neurons a prompt; `penalty` belongs to the mean squared error."""
    law: dict[str, Any] = {"dim": DIM, "length": DIM, "n_prompts": n, "penalty": n * penalty, "target": TARGET}
    law |= {"width": round(ratio * n), "activation": activation, "noise": NOISE, "norm_samples": norms()}
    return asymptotics.random_transformer_error(**law)


def linear_error(n: int, penalty: float) -> float:
    """Error of linear attention with intercept."""
    law: dict[str, Any] = {"dim": DIM, "length": DIM, "n_prompts": n, "penalty": n * penalty, "target": TARGET}
    return asymptotics.linear_transformer_error(**law, noise=NOISE, intercept=True, norm_samples=norms())


def stored(name: str) -> pd.DataFrame:
    """A table of stored simulations."""
    with resources.as_file(resources.files("icl_lib.data") / f"{name}.csv") as path:
        return pd.read_csv(path)


def stored_errors() -> pd.DataFrame:
    """The stored runs: `error`, less what a run's test answers happen to vary too much, and `gap`.

    The gap is the error of a twin minus that of the layer on the same prompts, in per cent of the layer's mean error.
    """
    table = stored(f"equivalence_d{DIM}")
    table["error"] -= table["null"] - MEAN_ANSWER
    same = ["head", "n", "penalty", "width_ratio"]
    layer = table.loc[table.variant == "T", [*same, "seed", "error"]]
    table = table.merge(layer, on=[*same, "seed"], suffixes=("", "_layer"))
    mean = table.groupby(same)["error_layer"].transform("mean")
    return table.assign(gap=100 * (table["error"] - table["error_layer"]) / mean)


def dots(runs: pd.DataFrame, value: str) -> dict[Any, list[list[float]]]:
    """Ratio, mean and standard error of a column by head, variant, number of prompts and penalty."""
    keys = ["head", "variant", "n", "penalty"]
    table = sweeps.summarise(runs, [*keys, "width_ratio"], value)
    return {key: rows[["width_ratio", "mean", "se"]].to_numpy().tolist() for key, rows in table.groupby(keys)}


def simulated(head: str, degree: int) -> str | None:
    """The stored variant that is the twin of this degree, if there is one."""
    return next((f"p={p}" for p in SIMULATED if effective(head, p) == effective(head, degree)), None)


@contextmanager
def twins_by_name() -> Iterator[dict[str, list[str]]]:
    """Names of layer and twins by head, known to the library meanwhile: it remembers activations that have a name."""
    twins = {head: [twin(head, p) for p in DEGREES] for head in HEADS}
    with patch.dict(hermite.ACTIVATIONS, {one.name: one for group in twins.values() for one in group}):
        yield {head: [head, *(one.name for one in group)] for head, group in twins.items()}


def twin_data() -> dict[str, Any]:
    """Errors by [head][prompts][penalty][variant][ratio]; variant 0 is the layer, p + 1 the twin of degree p."""
    with twins_by_name() as names:
        values = [
            head_error(name, n, penalty, ratio)
            for head in HEADS
            for n in PROMPTS
            for penalty in PENALTIES
            for name in names[head]
            for ratio in RATIOS
        ]
    error = np.reshape(values, (len(HEADS), len(PROMPTS), len(PENALTIES), -1, len(RATIOS))).tolist()
    runs, models = stored_errors(), {head: ["T", *(simulated(head, p) for p in DEGREES)] for head in HEADS}
    errors, gaps = dots(runs, "error"), dots(runs, "gap")

    def table(found: dict[Any, list[list[float]]]) -> list[Any]:
        return [[[[found.get((h, v, n, p), []) for v in models[h]] for p in PENALTIES] for n in PROMPTS] for h in HEADS]

    linear = "linear + intercept", "T"
    return {
        "dim": DIM,
        "heads": HEADS,
        "prompts": PROMPTS,
        "penalties": PENALTIES,
        "degrees": list(DEGREES),
        "ratios": RATIOS,
        "mean": MEAN_ANSWER,
        "error": error,
        "stored": table(errors),
        "gaps": table(gaps),
        "linear": [[linear_error(n, p) for p in PENALTIES] for n in PROMPTS],
        "storedLinear": [[errors[*linear, n, p][0][1:] for p in PENALTIES] for n in PROMPTS],
    }


def eigenvalues(spectrum: str) -> list[float]:
    """Eigenvalues in geometric steps."""
    dim, smallest = SPECTRA[spectrum]
    return np.geomspace(1, smallest, dim).tolist()


def law_of(spectrum: str, length: int) -> LinearDynamics:
    """The dynamics at a knob position, with the first time constant as the unit of time."""
    return LinearDynamics(eigenvalues(spectrum), length)


def passages(curves: np.ndarray, levels: np.ndarray) -> list[float | None]:
    """When each curve (times, modes) first reaches its level, interpolated in log t; None if it never does."""
    found: list[float | None] = []
    for curve, level in zip(curves.T, levels, strict=True):
        after = int((curve >= level).argmax())
        if level == 0 or after == 0:
            found.append(None)
            continue
        share = (level - curve[after - 1]) / (curve[after] - curve[after - 1])
        found.append(float(FINE[after - 1] * (FINE[after] / FINE[after - 1]) ** share))
    return found


def modes_at(spectrum: str, length: int, start: float) -> dict[str, Any]:
    """Strengths in units of 1 / s_j: exact flow, logistic curve, their limits, and the times at half of a limit."""
    law, shown = law_of(spectrum, length), len(set(eigenvalues(spectrum)))  # equal modes have one course
    s, least = law.eigenvalues.numpy(), law.minimum()[0].numpy()
    p, q = law.flow(FINE, start, start)
    logistic = law.logistic(FINE[DRAWN], start**2).numpy()
    return {
        "flow": (s * (p * q).numpy())[DRAWN].T[:shown].round(3).tolist(),
        "logistic": (s * logistic).T[:shown].round(3).tolist(),
        "limits": (s * least).tolist()[:shown],
        "half": passages((p * q).numpy(), least / 2)[:shown],
        "halfLogistic": law.half_time(start**2).tolist()[:shown],
    }


def stored_modes() -> dict[str, list[list[list[float]]]]:
    """Dots (time, strength, standard error) by mode, for the knob positions at which runs are stored."""
    table, positions = stored("dynamics"), {}
    for setting in ALIGNED:
        size = RUNS[setting]
        names = [name for name, shape in SPECTRA.items() if shape == (size["dim"], size["smallest"])]
        where = (list(SPECTRA).index(names[0]), LENGTHS.index(size["length"]), STARTS.index(size["start"]))
        rows = table[table.setting == setting].sort_values(["mode", "step"])
        s = np.array(eigenvalues(names[0]))[rows["mode"]]
        points = np.stack([STEP_SIZE * rows["step"], s * rows["strength"], s * rows["strength_se"]], -1)
        positions["{} {} {}".format(*where)] = points.reshape(size["dim"], -1, 3)[:, RECORDS].tolist()
    return positions


def modes_data() -> dict[str, Any]:
    """Courses of all modes by [spectrum][length][start]."""
    return {
        "spectra": [{"name": name, "values": eigenvalues(name)} for name in SPECTRA],
        "lengths": LENGTHS,
        "starts": STARTS,
        "times": FINE[DRAWN].tolist(),
        "courses": [[[modes_at(name, length, a) for a in STARTS] for length in LENGTHS] for name in SPECTRA],
        "stored": stored_modes(),
    }


def draw_twin(data: dict[str, Any]) -> None:
    """Still picture, relu and 3200 prompts: the layer at three penalties, and the gaps of three twins at the lowest."""
    error, stored, gaps = (data[name][0][2] for name in ("error", "stored", "gaps"))
    _, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 7.4), height_ratios=(3, 2), sharex=True)
    for series, i in enumerate((0, 2, 4)):
        plotting.theory(RATIOS, error[i][0], f"penalty {PENALTIES[i]:g}", series=series, ax=top)
        ratios, mean, se = np.transpose(stored[i][0])
        plotting.stored(ratios, mean, se, "_", series=series, ax=top)
    for series, degree in enumerate((1, 2, 4), start=3):
        law = 100 * (np.divide(error[0][degree + 1], error[0][0]) - 1)
        plotting.theory(RATIOS, law, f"degree {degree}", series=series, ax=bottom)
        if gaps[0][degree + 1]:
            ratios, mean, se = np.transpose(gaps[0][degree + 1])
            plotting.stored(ratios, mean, se, "_", series=series, ax=bottom)
    plotting.baseline(RATIOS, data["mean"], "mean answer", ax=top)
    plotting.baseline(RATIOS, 0, "layer", ax=bottom)
    plotting.log_axis("x", [0.1, 0.25, 0.5, 1, 2, 4], ax=bottom)
    plotting.log_axis("y", [0.3, 1, 3, 10], ax=top)
    top.set_ylabel("in-context error")
    bottom.set(xlabel="width over prompts $k/n$", ylabel="gap of the twin in %", ylim=(-12, 24))
    top.legend(loc="upper left")
    bottom.legend(loc="upper left")


def draw_modes(data: dict[str, Any]) -> None:
    """Still picture: the two positions for which runs are stored."""
    _, panels = plt.subplots(2, 1, figsize=(6.4, 7.4), sharex=True)
    for ax, (where, runs) in zip(panels, data["stored"].items(), strict=True):
        spectrum, length, start = map(int, where.split())
        course = data["courses"][spectrum][length][start]
        for j, s in enumerate(data["spectra"][spectrum]["values"]):
            plotting.theory(data["times"], course["flow"][j], f"$s$ = {s:.2f}", series=j, ax=ax)
            plotting.theory(data["times"], course["logistic"][j], "_", series=j, ax=ax, linestyle="--", linewidth=1)
            time, mean, se = np.transpose(runs[j])
            plotting.stored(time, mean, se, "_", series=j, ax=ax)
        plotting.log_axis("x", [1, 3, 10, 30, 100], ax=ax)
        ax.set(xlim=(0.5, 200), ylabel=r"learned share $s_j\theta_j$", ylim=(0, 1.05))
        ax.text(0.98, 0.05, f"{LENGTHS[length]} examples", transform=ax.transAxes, ha="right")
        ax.legend(loc="upper left")
    panels[-1].set_xlabel("time $t/T_1$")


def rounded(value: Any) -> Any:
    """Numbers at any depth to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(book: Path) -> None:
    """Write the two scripts into the folder's `_static`, and the two pictures beside the page."""
    with resources.as_file(resources.files("icl_lib.data") / "icl.mplstyle") as style:
        plt.style.use(style)
    for name, data, draw in (("twin", twin_data(), draw_twin), ("modes", modes_data(), draw_modes)):
        text = json.dumps(rounded(data), separators=(",", ":"))
        write(book / "_static" / f"explore-{name}.js", f"window.icl_{name} = {text};\n".encode())
        draw(data)
        picture = io.BytesIO()
        plt.savefig(picture, format="png")
        plt.close()
        write(book / f"explore-{name}.png", picture.getvalue())
        print(f"{len(text) / 1000:.0f} kB of grid and one picture written for book/explore.md, figure {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=BOOK, help="where to write; by default, beside the page"
    )
    main(parser.parse_args().folder)
