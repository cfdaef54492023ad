"""The interactive figures: grids agree with the library, dots with stored runs, and the page's sentences with both."""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from zscore import assert_mean

from icl_lib import asymptotics, models, prompts, tasks
from icl_lib.dynamics import LinearDynamics

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "book" / "tools"), str(ROOT / "book" / "ext")]

import explore  # noqa: E402
import house  # noqa: E402

PAGE = " ".join((ROOT / "book" / "explore.md").read_text().split())
ROUNDING = 5.01e-4  # of a number written with four significant digits, relative
SPECTRA = list(explore.SPECTRA)


def says(*phrases: str) -> None:
    """The page says what has just been found."""
    for phrase in phrases:
        assert phrase in PAGE, phrase


def stored(name: str) -> pd.DataFrame:
    with resources.as_file(resources.files("icl_lib.data") / f"{name}.csv") as path:
        return pd.read_csv(path)


def grid(folder: Path, name: str) -> dict[str, Any]:
    """What a page reads from a script."""
    text = (folder / f"_static/explore-{name}.js").read_text()
    found = re.fullmatch(rf"window\.icl_{name} = (\{{.*\}});\n", text)
    assert found and len(text.encode()) <= 300_000
    return json.loads(found[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the tool writes, as `make book` calls it."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "_static").mkdir()
    subprocess.run([sys.executable, ROOT / "book/tools/explore.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def twins(written: Path) -> dict[str, Any]:
    return grid(written, "twin")


@pytest.fixture(scope="module")
def modes(written: Path) -> dict[str, Any]:
    return grid(written, "modes")


@functools.cache
def course(spectrum: int, length: int, start: float = 0.1) -> dict[str, np.ndarray]:
    """Courses at one position, straight from the tool."""
    found = explore.modes_at(SPECTRA[spectrum], length, start)
    return {key: np.array(value, dtype=float) for key, value in found.items()}


# The tool.


def test_a_degree_whose_coefficient_is_0_shares_the_runs_of_the_one_below() -> None:
    assert [explore.simulated("relu", p) for p in range(5)] == [None, None, "p=2", "p=2", "p=4"]
    assert [explore.simulated("tanh", p) for p in range(5)] == [None, "p=2", "p=2", "p=4", "p=4"]
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    for head, degree in (("relu", 3), ("tanh", 2), ("tanh", 4)):
        torch.testing.assert_close(explore.twin(head, degree)(x), explore.twin(head, degree - 1)(x))


@pytest.mark.parametrize("head", explore.HEADS)
def test_the_formula_knows_a_twin_that_is_blind(head: str) -> None:
    """Degree 0, the one degree that no chapter tries, in small."""
    dim, n, width, runs, errors = 10, 100, 50, 16, []
    g = torch.Generator().manual_seed(8)
    for _ in range(runs):
        train, test = (
            prompts.sample_summaries(
                tasks.TaskPrior(dim).sample(m, generator=g), dim, target="relu", noise=0.01, generator=g
            )
            for m in (n, 1000)
        )
        model = models.RandomTransformer(dim, width, head, generator=g).hermite_twin(0)
        errors.append(models.icl_error(model.fit(train, 0.01 * n).predict(test), test.answer).item())
    law = {"dim": dim, "length": dim, "n_prompts": n, "width": width, "penalty": 0.01 * n, "target": "relu"}
    formula = asymptotics.random_transformer_error(activation=explore.twin(head, 0), noise=0.01, **law)
    assert_mean(torch.tensor(errors), formula)


def test_averaging_neighbours_keeps_the_error() -> None:
    law = {"dim": 80, "length": 80, "n_prompts": 640, "width": 640, "penalty": 0.064, "target": "relu", "noise": 0.01}
    fine = explore.norms(kept=20_000)
    coarse = fine.reshape(500, -1).mean(1)
    np.testing.assert_allclose(coarse.mean(), 1)
    for head in ("relu", explore.twin("relu", 4)):
        errors = [
            asymptotics.random_transformer_error(activation=head, norm_samples=samples, **law)
            for samples in (fine, coarse)
        ]
        assert errors[1] == pytest.approx(errors[0], rel=ROUNDING)


def test_passages_of_a_logistic_curve() -> None:
    law = explore.law_of(SPECTRA[1], 2048)
    curves = law.logistic(explore.FINE, 0.01).numpy()
    found = explore.passages(curves, law.limits.numpy() / 2)
    np.testing.assert_allclose(found, law.half_time(0.01), rtol=1e-3)
    assert explore.passages(curves, np.array([0.0, 9.0, 9.0, 9.0])) == [None] * 4


def test_dots_are_the_stored_errors() -> None:
    table, runs = stored("equivalence_d80"), explore.stored_errors()
    errors, gaps = explore.dots(runs, "error"), explore.dots(runs, "gap")
    variance = 0.5 - 1 / (2 * math.pi) + 1e-4  # of relu of a normal number, and noise
    seen = 0
    for key in (("relu", "T", 640, 1e-4), ("tanh", "p=4", 6400, 1e-2), ("relu", "p=2", 3200, 1.0)):
        for (ratio, mean, se), (_, gap, gap_se) in zip(errors[key], gaps[key], strict=True):
            rows = table[(table["head"] == key[0]) & (table.n == key[2]) & (table.penalty == key[3])]
            rows = rows[rows.width_ratio == ratio].pivot(index="seed", columns="variant", values=["error", "null"])
            own, layer = (rows["error", name] - rows["null", name] + variance for name in (key[1], "T"))
            paired = 100 * (own - layer) / layer.mean()
            expected = (own.mean(), own.std() / len(own) ** 0.5, paired.mean(), paired.std() / len(own) ** 0.5)
            np.testing.assert_allclose((mean, se, gap, gap_se), expected, rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen == 6 + 4 + 6


def test_dots_are_the_stored_strengths() -> None:
    table, about = stored("dynamics"), json.loads((resources.files("icl_lib.data") / "dynamics.json").read_text())
    positions = explore.stored_modes()
    assert len(positions) == 2
    for where, runs in positions.items():
        spectrum, length, start = map(int, where.split())
        eigenvalues = explore.eigenvalues(SPECTRA[spectrum])
        size = {"dim": len(eigenvalues), "length": explore.LENGTHS[length], "start": explore.STARTS[start]}
        (setting,) = (name for name, sizes in about["sizes"].items() if size.items() <= sizes.items())
        assert eigenvalues[-1] == about["sizes"][setting]["smallest"]
        for j, s in enumerate(eigenvalues):
            rows = table[(table.setting == setting) & (table["mode"] == j)].set_index("step")
            for time, mean, se in runs[j]:
                row = rows.loc[round(time / 0.02)]  # 1 / T_1 is 0.02
                np.testing.assert_allclose((mean, se), (s * row.strength, s * row.strength_se), rtol=1e-9)


# The page.


def test_the_page_holds_the_figures_that_its_script_looks_for() -> None:
    script = (ROOT / "book/_static/explore.js").read_text()
    page = (ROOT / "book/explore.md").read_text()
    for name in ("twin", "modes"):
        assert f":name: fig-ex-{name}" in page and f'interactive("fig-ex-{name}"' in script
        assert f"{{figure}} explore-{name}.png\n" in page
        assert f"icl_{name}" in script
    assert page.count("\n:alt: ") == 2
    scripts = [name for name in house.DRESS["book/explore"] if name.endswith(".js")]
    assert scripts == ["explore-twin.js", "explore-modes.js", "explore.js"], "the grids come before what draws them"


def test_what_the_page_says_of_the_modes() -> None:
    spread, steep = course(1, 2048)["half"], course(3, 2048)["half"]
    says(rf"$2.3\,T_1$, that of 0.4 at ${spread[-1]:.0f}\,T_1$ and that of 0.1 at ${steep[-1]:.0f}\,T_1$")
    assert f"{spread[0]:.1f}" == f"{steep[0]:.1f}" == "2.3"
    short = course(2, 8)
    late, logistic = (short[key][-1] for key in ("half", "halfLogistic"))
    says(rf"half learned at ${late:.0f}\,T_1$; on its logistic curve it would be at ${logistic:.0f}\,T_1$")
    single = course(2, 1)
    assert single["limits"][-1] == 0 and np.isnan(single["half"][-1]) and single["flow"][-1, -1] < 1e-3
    for name in SPECTRA:
        laws = [explore.law_of(name, length) for length in explore.LENGTHS]
        limits = torch.stack([law.eigenvalues * law.minimum()[0] for law in laws]).numpy()
        assert (np.diff(limits, axis=0) >= 0).all() and (limits[0] < limits[-1]).all()


def test_equal_eigenvalues_rise_on_the_logistic_curve() -> None:
    for length in explore.LENGTHS:
        assert len(course(0, length)["flow"]) == 1
        law = explore.law_of(SPECTRA[0], length)
        p, q = law.flow(explore.FINE, 0.1, 0.1)
        assert (p * q - law.logistic(explore.FINE, 0.01)).abs().max() < 1e-4
    spread = course(1, 8)
    assert np.abs(spread["flow"] - spread["logistic"]).max() > 0.1


def test_early_modes_overshoot_and_late_ones_are_held_back() -> None:
    six = course(2, 8)
    over = (six["flow"].max(1) - six["limits"]) / six["limits"]
    assert over[0] > 0.05 > over[-1]
    assert (six["half"] > six["halfLogistic"])[-1] and not (six["half"] > six["halfLogistic"])[0]


def test_a_small_start_waits_longer_in_short_prompts() -> None:
    """Half times in units of each mode's time constant, with six modes and 8 examples."""
    small, large = (course(2, 8, start)["half"] for start in (0.01, 0.1))
    delay = (small - large) / explore.law_of(SPECTRA[2], 8).timescales.numpy()
    assert delay.min() > 1.5
    says(rf"up to ${delay.max():.1f}\,T_j$ with six modes")


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_smaller_start_delays_and_leaves_the_rise(spectrum: str) -> None:
    law, passed = explore.law_of(spectrum, 2048), []
    for start in (0.01, 0.1):
        p, q = law.flow(explore.FINE, start, start)
        levels = [part * law.minimum()[0].numpy() for part in (0.25, 0.5, 0.75)]
        passed.append([explore.passages((p * q).numpy(), level) for level in levels])
    small, large = np.array(passed)  # (levels, modes)
    assert {f"{delay:.1f}" for delay in (small[1] - large[1]) / law.timescales.numpy()} == {"2.3"}
    says(r"$2.3\,T_j$ to each half time")
    np.testing.assert_allclose(small[2] - small[0], large[2] - large[0], rtol=0.01)


def test_how_close_the_stored_modes_are() -> None:
    table, worst = stored("dynamics"), {}
    for setting, length, spectrum in (("long", 2048, 1), ("short", 8, 2)):
        rows = table[table.setting == setting].pivot(index="step", columns="mode", values="strength").iloc[1:]
        law, t = explore.law_of(SPECTRA[spectrum], length), rows.index.to_numpy() * 0.02
        p, q = law.flow(t, 0.1, 0.1)
        least = law.minimum()[0].numpy()
        for name, line in (("flow", p * q), ("logistic", law.logistic(t, 0.01))):
            worst[name, length] = np.abs((rows.to_numpy() - line.numpy()) / least).max()
    assert 0.5 < 100 * max(worst["flow", 2048], worst["flow", 8]) <= 0.6
    says("Within 0.6 % of the final strength", f"off by up to {100 * worst['logistic', 8]:.0f} %")


# The whole grid.


@pytest.mark.slow
def test_the_grid_of_errors_is_the_library(twins: dict[str, Any]) -> None:
    g = np.random.default_rng(3)
    for _ in range(40):
        h, i, j, v, r = (int(g.integers(size)) for size in np.shape(twins["error"]))
        n, head = twins["prompts"][i], twins["heads"][h]
        expected = asymptotics.random_transformer_error(
            dim=80,
            length=80,
            n_prompts=n,
            width=round(n * twins["ratios"][r]),
            penalty=n * twins["penalties"][j],
            activation=explore.twin(head, twins["degrees"][v - 1]) if v else head,
            target="relu",
            noise=0.01,
            norm_samples=explore.norms(),
        )
        assert twins["error"][h][i][j][v][r] == pytest.approx(expected, rel=ROUNDING)
        linear = asymptotics.linear_transformer_error(
            dim=80,
            length=80,
            n_prompts=n,
            penalty=n * twins["penalties"][j],
            target="relu",
            noise=0.01,
            intercept=True,
            norm_samples=explore.norms(),
        )
        assert twins["linear"][i][j] == pytest.approx(linear, rel=ROUNDING)
    assert twins["mean"] == pytest.approx(0.5 - 1 / (2 * math.pi) + 1e-4, rel=ROUNDING)


@pytest.mark.slow
def test_the_grid_of_modes_is_the_library(modes: dict[str, Any]) -> None:
    g = np.random.default_rng(4)
    for _ in range(12):
        i, j, k = (int(g.integers(len(modes[key]))) for key in ("spectra", "lengths", "starts"))
        found, start = modes["courses"][i][j][k], modes["starts"][k]
        values = modes["spectra"][i]["values"]
        s = torch.from_numpy(np.geomspace(values[0], values[-1], len(values)))
        np.testing.assert_allclose(values, s, rtol=ROUNDING)
        law = LinearDynamics(s, modes["lengths"][j], n_tasks=16, learning_rate=0.02 / 16)  # 1 / T_1 is 0.02
        steps = np.array(modes["times"]) / 0.02
        p, q = law.flow(steps, start, start)
        shown, scale = len(found["flow"]), s[:, None].numpy()
        coarse = 2 * ROUNDING  # of the time and of the strength
        for name, exact in (("flow", p * q), ("logistic", law.logistic(steps, start**2))):
            np.testing.assert_allclose(found[name], (scale * exact.numpy().T)[:shown], atol=coarse)
        np.testing.assert_allclose(found["limits"], (s * law.minimum()[0])[:shown], rtol=ROUNDING, atol=1e-12)
        np.testing.assert_allclose(found["halfLogistic"], 0.02 * law.half_time(start**2)[:shown], rtol=ROUNDING)
        for mode, half in enumerate(found["half"]):
            if half is None:
                assert found["limits"][mode] == 0
            else:
                p, q = law.flow([half / 0.02], start, start)
                assert (s * p * q)[0, mode].item() == pytest.approx(found["limits"][mode] / 2, rel=5e-3)


@pytest.mark.slow
def test_dots_of_the_grid(twins: dict[str, Any]) -> None:
    """Every line of layer or twin has its dots, wherever runs are stored."""
    errors, gaps = (explore.dots(explore.stored_errors(), value) for value in ("error", "gap"))
    count = 0
    for h, head in enumerate(twins["heads"]):
        variants = ["T", *(explore.simulated(head, p) for p in twins["degrees"])]
        for i, n in enumerate(twins["prompts"]):
            for j, penalty in enumerate(twins["penalties"]):
                for v, name in enumerate(variants):
                    for key, table in (("stored", errors), ("gaps", gaps)):
                        expected = np.array(table[head, name, n, penalty] if name else [])
                        np.testing.assert_allclose(twins[key][h][i][j][v], expected, rtol=ROUNDING)
                        count += len(expected)
    assert count == 2 * 9 * 5 * 22  # variants with runs, penalties, pairs of a number of prompts and a width


@pytest.mark.slow
def test_what_the_page_says_of_the_twin(twins: dict[str, Any]) -> None:
    error, one = np.array(twins["error"]), twins["ratios"].index(1)
    relu = error[0]
    assert (error[:, :, 4, 0].argmax(-1) == len(twins["ratios"]) - 1).all()  # no peak at penalty 1
    says(f"errs by {relu[2, 0, 0, one]:.1f} where", "more than 24 times")
    assert (relu[:, 0, 0].argmax(-1) == one).all() and 24 < relu[2, 0, 0, one] / twins["mean"] < 25
    gap = 100 * (error / error[:, :, :, :1] - 1)
    assert np.abs(gap[0][:, :, [3, 5]]).max((0, 1, 3)) == pytest.approx([5.5, 1.5], abs=200 * ROUNDING)
    assert gap[0, :, :, 2].max() < 0 < gap[1, :, :, 2].min()
    says(f"A tanh twin of degree 1 does worse, by up to {gap[1, :, :, 2].max():.1f} %")
    says("at most about 5.5 % of the layer's error, one of degree 4 about 1.5 %")
    np.testing.assert_array_equal(error[0, :, :, 3], error[0, :, :, 4])
    np.testing.assert_array_equal(error[1][:, :, [2, 4]], error[1][:, :, [3, 5]])
    assert (error[:, :, 0, 1].argmax(-1) == one).all() and error[:, :, 0, 1, one].min() > 10  # blind, and a peak
    says(f"sinks from {relu[0, 0, 0, one]:.1f} to {relu[3, 0, 0, one]:.1f}")
    says(f"climbs from {twins['linear'][0][0]:.2f} to {twins['linear'][3][0]:.1f}", f"its {80 * 81} features")
    assert (np.diff(relu[:, 0, 0, one]) < 0).all() and (np.diff(np.array(twins["linear"])[:, 0]) > 0).all()
    assert error.min() > twins["mean"]


@pytest.mark.slow
def test_how_close_the_stored_errors_are(twins: dict[str, Any]) -> None:
    rows = []
    for h, i, j, v in np.ndindex(*np.shape(twins["error"])[:4]):
        line, layer = (dict(zip(twins["ratios"], twins["error"][h][i][j][u], strict=True)) for u in (v, 0))
        for (ratio, mean, _), (_, gap, se) in zip(twins["stored"][h][i][j][v], twins["gaps"][h][i][j][v], strict=True):
            miss = gap - 100 * (line[ratio] / layer[ratio] - 1)
            rows.append((h, i, j, v, ratio, 100 * (mean / line[ratio] - 1), miss, se))
    table = pd.DataFrame(rows, columns=["head", "n", "penalty", "variant", "ratio", "error", "gap", "se"])
    layer, twin = table[table.variant == 0], table[table.variant > 0]
    assert 2.2 < layer[layer.penalty > 0].error.abs().max() <= 2.3 < 6.3 < layer.error.abs().max() <= 6.4
    odd = (twin["head"] == 1) & (twin.n == 3) & (twin.ratio == 1) & twin.variant.isin([4, 5])
    assert 6.6 < twin[~odd].error.abs().max() <= 6.7 < 15 < twin[odd].error.max() < 15.5
    says("within 2.3 % from the penalty 0.001 on, and within 6.4 % at 0.0001", "within 6.7 %", "up to 15 % more")
    relu, tanh = (twin[twin["head"] == h] for h in (0, 1))
    sharp, rough = relu[relu.penalty >= 2], relu[relu.penalty < 2]
    assert 1.1 < sharp.gap.abs().max() <= 1.2 and 6.1 < rough.gap.abs().max() <= 6.2
    assert (rough.gap / rough.se).abs().max() <= 3.2
    says("within 1.2 percentage points of their line for relu", "within 6.2 points, at most 3.2 standard errors")
    wide = tanh[(tanh.ratio == 4) & (tanh.penalty == 2)].set_index(["n", "variant"])
    law = 100 * (np.array(twins["error"])[1, 2, 2, :, -1] / twins["error"][1][2][2][0][-1] - 1)
    for degree, phrase in ((2, "4.4 % for degree 2, and the runs find $0.5 \\pm 0.5$"), (4, "-1.6 \\pm 0.2")):
        row = wide.loc[2, degree + 1]
        assert abs(row.gap / row.se) > 8
        says(phrase)
        assert f"{law[degree + 1] + row.gap:.1f} \\pm {row.se:.1f}" in phrase
    assert f"{law[3]:.1f} {law[5]:.1f}" == "4.4 1.0" and tanh[tanh.penalty >= 2].gap.min() == wide.loc[2, 3].gap
    assert wide.loc[[0, 1, 2], :].gap.unstack().loc[:, 3].is_monotonic_decreasing  # with the number of prompts


@pytest.mark.slow
def test_pictures_are_written_and_what_is_up_to_date_is_left(written: Path) -> None:
    for name in ("twin", "modes"):
        assert (written / f"explore-{name}.png").read_bytes().startswith(b"\x89PNG")
    path = written / "explore-twin.png"
    before = path.stat().st_mtime_ns
    explore.write(path, path.read_bytes())
    assert path.stat().st_mtime_ns == before
