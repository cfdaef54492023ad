"""Stored full-size results: complete, with provenance, reproducible, and confirmed by runs with other seeds."""

import json
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from icl_lib import transformers
from icl_lib.sweeps import deviation_limit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import costs  # noqa: E402
import execute  # noqa: E402
import full_size  # noqa: E402
import full_size_transformers  # noqa: E402

KEYS = ["n", "head", "variant", "width_ratio", "penalty"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    with resources.as_file(resources.files("icl_lib.data") / "equivalence_d80.csv") as path:
        return pd.read_csv(path)


@pytest.mark.parametrize("dim", full_size.SIZES)
def test_every_setting_has_every_seed_and_the_provenance_says_how(dim):
    table = pd.read_csv(resources.files("icl_lib.data") / f"equivalence_d{dim}.csv")
    about = json.loads((resources.files("icl_lib.data") / f"equivalence_d{dim}.json").read_text())
    runs = about["runs"]
    assert [run["n"] / dim**2 for run in runs] == list(full_size.SIZES[dim])
    assert sum(run["rows"] for run in runs) == len(table) and not table.isna().any(axis=None)
    seeds = table.groupby(KEYS).seed.nunique()
    assert (seeds == table.groupby(KEYS).size()).all() and seeds.min() >= 8
    assert [run["n"] for run in runs] == sorted(table.n.unique())
    for run in runs:
        assert {"command", "seeds", "rows", "seconds", "date", "python", "versions"} <= set(run)
        assert (ROOT / run["command"].split()[1]).is_file()


def test_the_stored_numbers_can_be_reproduced(table):
    """Seed 0 at the smallest size, away from the peak, where rounding in float32 is not magnified."""
    again = full_size.equivalence(80, 640, 4.0, "relu tanh", 1e-4, 0)
    rows = table[(table.n == 640) & (table.seed == 0) & (table.penalty >= 1e-2)]
    assert len(rows) > 100
    names = rows["head"] + "|" + rows.variant + "|" + rows.width_ratio.map("{:g}".format)
    fresh = [again[f"{name}|{penalty:g}"] for name, penalty in zip(names, rows.penalty, strict=True)]
    np.testing.assert_allclose(fresh, rows.error, rtol=1e-3)


def test_other_seeds_agree_with_the_stored_means(table):
    """Eight new seeds against the stored ones, n = 640, up to as many neurons as prompts, penalties from 0.01 on."""
    fresh = pd.DataFrame([full_size.equivalence(80, 640, 1.0, "relu tanh", 1e-2, seed) for seed in range(100, 108)])
    stored = table[(table.n == 640) & (table.width_ratio <= 1) & (table.penalty >= 1e-2)]
    scores = []
    for (_, head, variant, ratio, penalty), rows in stored.groupby(KEYS):
        new = fresh[f"{head}|{variant}|{ratio:g}|{penalty:g}"] / fresh["null"]  # both noisy alike: less spread
        old = rows.error / rows.null
        spread = np.sqrt(new.var(ddof=1) / len(new) + old.var(ddof=1) / len(old))
        scores.append((new.mean() - old.mean()) / spread)
    assert len(scores) > 70 and np.abs(scores).max() < deviation_limit(len(scores), 8)


def test_stored_training_is_complete_and_other_seeds_agree(monkeypatch):
    """Eight new seeds of the first 125 steps on Gaussian tasks, at five records of four modes."""
    folder = resources.files("icl_lib.data")
    with resources.as_file(folder / "dynamics.csv") as path:
        table = pd.read_csv(path)
    about = json.loads((folder / "dynamics.json").read_text())
    assert about["rows"] == len(table) and about["sizes"] == full_size.RUNS and not table.isna().any(axis=None)
    assert (table.runs == about["seeds"]).all() and about["seeds"] >= 16
    for setting, rows in table.groupby("setting"):
        assert len(rows) == rows.step.nunique() * full_size.RUNS[setting]["dim"]
        assert rows.step.max() == full_size.RUNS[setting]["steps"]
    monkeypatch.setattr(full_size, "RECORDS", 5)
    monkeypatch.setitem(full_size.RUNS, "generic", full_size.RUNS["generic"] | {"steps": 125})
    fresh = pd.DataFrame([full_size.learning("generic", seed) for seed in range(100, 108)])
    stored = table[(table.setting == "generic") & (table.step > 0) & (table.step <= 125)]
    new = fresh[[f"strength|{step}|{mode}" for step, mode in zip(stored.step, stored["mode"], strict=True)]]
    spread = np.sqrt(new.var(ddof=1).to_numpy() / len(new) + stored.strength_se.to_numpy() ** 2)
    scores = (new.mean().to_numpy() - stored.strength.to_numpy()) / spread
    assert len(scores) == 20 and np.abs(scores).max() < deviation_limit(len(scores), 8)


@pytest.mark.parametrize("experiment", ["emergence", "grokking"])
def test_stored_measures_are_complete_and_the_provenance_says_how(experiment):
    folder = resources.files("icl_lib.data")
    with resources.as_file(folder / f"{experiment}.csv") as path:
        table = pd.read_csv(path)
    about = json.loads((folder / f"{experiment}.json").read_text())
    runs = full_size_transformers.RUNS[experiment]
    assert list(about["sizes"]) == list(runs) == list(table.run.unique()) and about["rows"] == len(table)
    assert {"command", "seconds_of_last_call", "date", "python", "versions", "device"} <= set(about)
    assert (ROOT / about["command"].split()[1]).is_file()
    always = [name for name in table if not name.startswith("qk1")]  # of a second layer
    for name, (task, architecture, how, seeds) in runs.items():
        rows = table[table.run == name]
        steps = how["n_steps"] // how.get("every", 20) + 1
        assert len(rows) == steps * len(seeds) and set(rows.seed) == set(seeds) and rows.step.max() == how["n_steps"]
        assert not rows[always].isna().any(axis=None)
        assert about["sizes"][name]["architecture"] == asdict(architecture)
        assert about["sizes"][name]["task"] == {"name": type(task).__name__} | asdict(task)
        if architecture.layers == 2:
            assert not rows.isna().any(axis=None)


@pytest.mark.parametrize(
    ("experiment", "name", "seed", "last"), [("emergence", "2 layers", 4, 80), ("grokking", "sums", 6, 0)]
)
def test_measures_of_a_run_trained_again_are_the_stored_ones(experiment, name, seed, last):
    """Every column that does not refer to the end of training, while rounding has not yet been blown up."""
    with resources.as_file(resources.files("icl_lib.data") / f"{experiment}.csv") as path:
        table = pd.read_csv(path)
    task, architecture, how, _ = full_size_transformers.RUNS[experiment][name]
    generators = [torch.Generator().manual_seed(seed)]
    run = transformers.train(task, architecture, generators=generators, **(how | {"n_steps": max(last, 20)}))
    fresh = full_size_transformers.measures(run, task)
    rows, others = (table[(table.run == name) & (table.seed == s) & (table.step <= last)] for s in (seed, seed + 1))
    for column, values in fresh.items():
        if "distance" not in column:
            seen = values[: len(rows), 0].numpy()
            np.testing.assert_allclose(seen, rows[column], rtol=1e-3, atol=1e-4, err_msg=column)
    loss = next(column for column in fresh if column.endswith("loss"))
    assert (
        np.abs(fresh[loss][: len(rows), 0].numpy() - others[loss].to_numpy()).max() > 1e-3
    )  # another seed is told apart


def test_every_chapter_has_a_cost_at_both_scales_and_quick_is_at_most_a_minute():
    stored = json.loads(costs.COSTS.read_text())
    assert set(stored["chapters"]) == {chapter.stem for chapter in execute.chapters()}
    for cost in stored["chapters"].values():
        assert set(cost) == {"quick", "paper"} and cost["quick"]["seconds"] <= 60
        assert all(one["peak_bytes"] > 1e8 and one["seconds"] > 0 for one in cost.values())
    page = costs.page({name: name for name in stored["chapters"]})
    assert page.count("../notebooks/") == len(stored["chapters"]) and "equivalence_d160" in page


def test_what_does_not_fit_is_refused_before_anything_is_drawn():
    with pytest.raises(MemoryError, match=r"320 dimensions, 51200 prompts and 51200 neurons need about 1[0-9]{2} GB"):
        full_size.store_equivalence(320, None, 8, None, budget=24e9)
    with pytest.raises(ValueError, match=r"ratio is 0.3, expected one of \[0.1, 0.25, 0.5, 1.0\] in 80 dimensions"):
        full_size.store_equivalence(80, [0.3], 8, None, budget=24e9)
    assert full_size.memory(160, 12800, 1.0) < 24e9
