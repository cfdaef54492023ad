"""Stored full-size results: complete, with provenance, reproducible, and confirmed by runs with other seeds."""

import importlib.util
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
KEYS = ["n", "head", "variant", "width_ratio", "penalty"]


@pytest.fixture(scope="module")
def full_size():
    spec = importlib.util.spec_from_file_location("full_size", ROOT / "book" / "tools" / "full_size.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    with resources.as_file(resources.files("icl_lib.data") / "equivalence_d80.csv") as path:
        return pd.read_csv(path)


def test_every_setting_has_every_seed_and_the_provenance_says_how(table):
    about = json.loads((resources.files("icl_lib.data") / "equivalence_d80.json").read_text())
    runs = about["runs"]
    assert sum(run["rows"] for run in runs) == len(table) and not table.isna().any(axis=None)
    seeds = table.groupby(KEYS).seed.nunique()
    assert (seeds == table.groupby(KEYS).size()).all() and seeds.min() >= 8
    assert [run["n"] for run in runs] == sorted(table.n.unique())
    for run in runs:
        assert {"command", "seeds", "rows", "seconds", "date", "python", "versions"} <= set(run)
        assert (ROOT / run["command"].split()[1]).is_file()


def test_the_stored_numbers_can_be_reproduced(table, full_size):
    """Seed 0 at the smallest size, away from the peak, where rounding in float32 is not magnified."""
    again = full_size.equivalence(80, 640, 4.0, 0)
    rows = table[(table.n == 640) & (table.seed == 0) & (table.penalty >= 1e-2)]
    assert len(rows) > 100
    names = rows["head"] + "|" + rows.variant + "|" + rows.width_ratio.map("{:g}".format)
    fresh = [again[f"{name}|{penalty:g}"] for name, penalty in zip(names, rows.penalty, strict=True)]
    np.testing.assert_allclose(fresh, rows.error, rtol=1e-3)


def test_other_seeds_agree_with_the_stored_means(table, full_size):
    """Eight new seeds against the stored ones, n = 640, up to as many neurons as prompts, penalties from 0.01 on."""
    fresh = pd.DataFrame([full_size.equivalence(80, 640, 1.0, seed) for seed in range(100, 108)])
    stored = table[(table.n == 640) & (table.width_ratio <= 1) & (table.penalty >= 1e-2)]
    scores = []
    for (_, head, variant, ratio, penalty), rows in stored.groupby(KEYS):
        new = fresh[f"{head}|{variant}|{ratio:g}|{penalty:g}"] / fresh["null"]  # both noisy alike: less spread
        old = rows.error / rows.null
        spread = np.sqrt(new.var(ddof=1) / len(new) + old.var(ddof=1) / len(old))
        scores.append((new.mean() - old.mean()) / spread)
    assert len(scores) > 70 and np.abs(scores).max() < deviation_limit(len(scores), 8)


def test_stored_training_is_complete_and_other_seeds_agree(full_size, monkeypatch):
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


@pytest.fixture(scope="module")
def transformers_tool():
    folder = ROOT / "book" / "tools"
    spec = importlib.util.spec_from_file_location("full_size_transformers", folder / "full_size_transformers.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize("experiment", ["emergence", "grokking"])
def test_stored_measures_are_complete_and_the_provenance_says_how(transformers_tool, experiment):
    folder = resources.files("icl_lib.data")
    with resources.as_file(folder / f"{experiment}.csv") as path:
        table = pd.read_csv(path)
    about = json.loads((folder / f"{experiment}.json").read_text())
    runs = transformers_tool.RUNS[experiment]
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


def test_measures_of_a_run_trained_again_are_the_stored_ones(transformers_tool):
    """One seed of copying for 240 steps, every column but those that refer to the end of training."""
    with resources.as_file(resources.files("icl_lib.data") / "emergence.csv") as path:
        table = pd.read_csv(path)
    task, architecture, how, _ = transformers_tool.RUNS["emergence"]["2 layers"]
    generators = [torch.Generator().manual_seed(4)]
    run = transformers.train(task, architecture, generators=generators, **(how | {"n_steps": 240}))
    fresh = {name: column[:, 0].numpy() for name, column in transformers_tool.measures(run, task, architecture).items()}
    rows = table[(table.run == "2 layers") & (table.seed == 4) & (table.step <= 80)]
    for name in fresh:
        if "distance" not in name:
            seen = fresh[name][: len(rows)]
            np.testing.assert_allclose(seen, rows[name], rtol=1e-3, atol=1e-4, err_msg=name)
    other = table[(table.run == "2 layers") & (table.seed == 5) & (table.step <= 80)]
    assert np.abs(fresh["loss"][:5] - other.loss).max() > 1e-3  # another seed is told apart
