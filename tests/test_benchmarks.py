"""The benchmarks: both ways do the same work, and what the page on speed shows is stored, complete and not stale."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import icl_lib

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "book" / "tools")]

import cases  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import speed  # noqa: E402

RESULTS, SCALING = (json.loads(path.read_text()) for path in (run.RESULTS, scaling.RESULTS))
SINGLE = torch.float32
SMALL = [  # every way to build a case, at a size that takes no time
    partial(cases.sampler, 3, 20),
    partial(cases.long_prompts, 3, 20, 1001),
    partial(cases.covariances, 2, 8, 5),
    partial(cases.penalty_path, 12, 7),
    partial(cases.penalty_path, 7, 12),
    partial(cases.stacked_ridge, 5, 4, 3),
    partial(cases.linear_transformer, 3, 9),
    partial(cases.linear_transformer, 3, 40),
    partial(cases.equivalence, 4, 20, 10),
    partial(cases.in_float32, partial(cases.random_transformer, 4, 20, 10)),
    partial(cases.descent, 2, SINGLE),
    partial(cases.closed_form, 1),
    partial(cases.ranks, cases.formed, 4, 80),
    partial(cases.ranks, cases.by_cores, 4, 80),
    partial(cases.literal, cases.COPY, 2, 1),
    partial(cases.stacked, cases.ADD, 2, 1),
    partial(cases.learning_curve_point, 4, 40, 8),
    partial(cases.learning_curve, 0.0, 2, 2000),
    partial(cases.curve, 6, 2),
    cases.tuned_point,
    partial(cases.layers, 2),
    partial(cases.product, 4, 20, 10),
    partial(cases.training_floor, 4, 20, 10),
]
SLOW = {cases.memory, cases.imports}  # these start processes


def maker(build):
    return getattr(build, "func", build)


@pytest.mark.parametrize("build", SMALL, ids=lambda build: maker(build).__name__)
def test_every_case_runs(build):
    ours, plain = build()
    assert ours() is not None
    if plain is not None:
        plain()


def test_no_way_to_build_a_case_is_left_out():
    assert {maker(case.build) for case in cases.CASES} == {maker(build) for build in SMALL} | SLOW


@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
def test_both_ways_to_ridge_agree(shape):
    ours, plain = cases.penalty_path(*shape)
    torch.testing.assert_close(ours(), torch.stack(plain()), rtol=1e-6, atol=1e-9)


def test_stacked_runs_of_ridge_are_those_one_by_one():
    ours, plain = cases.stacked_ridge(6, 9, 3)
    torch.testing.assert_close(ours(), plain(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [9, 60])
def test_both_ways_to_the_linear_transformer_agree(n):
    ours, plain = cases.linear_transformer(4, n)
    torch.testing.assert_close(ours().gamma.flatten(), plain(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("way", [cases.formed, cases.by_cores])
def test_all_ways_to_ranks_agree(way):
    ours, plain = cases.ranks(way, 4, 80)
    torch.testing.assert_close(ours(), plain().double(), rtol=1e-3, atol=0)  # formed in float32


def test_a_record_holds_the_ratio_of_neighbouring_runs_per_piece_of_work():
    """Six pieces in 3 of ours against two in 8 of the other: 0.5 and 4 each, hence a ratio of 8."""
    values = iter([3.0, 8.0, 6.0, 8.0, 1.5, 8.0])

    def next_value():
        return next(values) / 6

    def other_value():
        return next(values) / 2

    case = cases.Case("f", "loop", "name", lambda: (next_value, other_value), unit="MB", least=8.5, repetitions=3)
    found = run.record(case)
    assert found["ours"] == {"median": 0.5, "min": 0.25, "max": 1.0}
    assert found["ratio"] == {"median": 8.0, "min": 4.0, "max": 16.0} and not found["met"]
    assert "MISSED" in run.row(found) and "8 [4-16]" in run.row(found)


def test_a_time_is_divided_by_the_pieces_and_a_bound_needs_no_other_way():
    times = iter([1.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.time, "process_time", lambda: next(times))
        assert run.measure(lambda: None, 4) == 500  # two seconds for four pieces
    case = cases.Case("f", "", "name", lambda: (lambda: 2.0, None), kind="bound", most=1.0, repetitions=1)
    found = run.record(case)
    assert found["ratio"] is None and found["other"] is None and not found["met"]
    assert run.record(cases.Case("f", "", "name", lambda: (lambda: 2.0, None), most=2.0, repetitions=1))["met"]


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own_beyond_its_imports():
    ours, plain = cases.memory("(lambda: torch.ones(25_000_000))", 100.0)
    assert plain() == 100.0 and abs(ours() - 100) < 10


def test_the_stored_results_are_those_of_the_cases():
    told = [{name: getattr(case, name) for name in run.TOLD} for case in cases.CASES]
    told = [row | {"most": row["most"] if row["most"] < math.inf else None} for row in told]
    assert [{name: record[name] for name in run.TOLD} for record in RESULTS["records"]] == told
    assert len({(case.name, case.kind, case.plain) for case in cases.CASES}) == len(cases.CASES)


@pytest.mark.parametrize("record", RESULTS["records"], ids=lambda record: f"{record['kind']}, {record['name']}")
def test_stored_numbers_are_what_is_wanted(record):
    for found in (record["ours"], record["other"], record["ratio"]):
        assert found is None or 0 < found["min"] <= found["median"] <= found["max"]
    assert record["met"] and (record["most"] is None or record["ours"]["median"] <= record["most"])
    if record["kind"] == "bound":
        assert record["ratio"] is None and record["most"]
    else:
        assert record["ratio"]["median"] >= record["least"] >= (0 if record["kind"] == "floor" else 1)
    if record["kind"] == "floor":
        assert record["ratio"]["min"] < 1  # what no program can beat was not beaten


@pytest.mark.parametrize("stored", [RESULTS, SCALING], ids=["benchmarks", "scaling"])
def test_the_provenance_is_complete_and_names_no_machine(stored):
    about = stored["provenance"]
    assert {"command", "date", "processor", "cores", "threads", "memory_gb", "python", "versions"} == set(about)
    assert all(about.values()) and set(about["versions"]) == {"icl-lib", "torch", "numpy"}
    assert about["threads"] == 1 and (ROOT / about["command"].split()[1]).is_file()
    assert "--store" in about["command"] and "--only" not in about["command"]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case_names_a_function_of_the_library(case):
    module, _, name = case.of.partition(".")
    assert not name or name in getattr(icl_lib, module).__all__


def test_the_scaling_study_is_complete_and_its_exponents_follow_from_its_times():
    assert [found["dim"] for found in SCALING["sizes"]] == list(scaling.RUNS)
    assert SCALING["expected"] == scaling.EXPECTED and SCALING["parts"] == scaling.PARTS
    assert SCALING["fitted"] == scaling.exponents(SCALING["sizes"])
    for found in SCALING["sizes"]:
        assert found["runs"] == len(found["errors"]) == scaling.RUNS[found["dim"]]
        assert set(found["seconds"]) == set(scaling.EXPECTED) == {*speed.STAGES, "test"}
        assert all(0 < times["min"] <= times["median"] <= times["max"] for times in found["seconds"].values())


def test_exponents_of_power_laws():
    assert scaling.exponent([2, 4, 8], [5 * d**3 for d in (2, 4, 8)]) == pytest.approx(3, rel=1e-12)
    sizes = [{"dim": d, "seconds": {s: {"median": d**p} for s, p in scaling.EXPECTED.items()}} for d in (20, 40, 80)]
    sizes[0]["seconds"] = {stage: {"median": 1.0} for stage in scaling.EXPECTED}  # too small to count
    assert scaling.exponents(sizes) == {stage: float(power) for stage, power in scaling.EXPECTED.items()}


def test_a_small_run_has_every_stage(monkeypatch):
    monkeypatch.setattr(scaling, "TEST", 100)
    found = scaling.once(8, 1)
    assert set(found["seconds"]) == set(scaling.EXPECTED) and min(found["seconds"].values()) >= 0
    assert len(found["errors"]) == len(found["formula"]) == len(scaling.PENALTIES)


def test_the_page_shows_every_stored_number_and_no_other():
    page = (ROOT / "book" / "speed.md").read_text()
    parts = speed.pages()
    assert re.findall(r"\{include\} (\S+)\.md", page) == list(parts)
    assert not re.search(r"\d (ms|s|µs|MB|GB|times)\b", page)  # what is measured is generated
    for record in RESULTS["records"]:
        rows = [line for line in parts[f"{record['kind']}-rows"].splitlines() if f"`: {record['name']} |" in line]
        wanted = record["ratio"]["median"] if record["ratio"] else record["ours"]["median"] / 1e3
        shown = speed.digits(wanted) if record["ratio"] else speed.amount(wanted, "s")
        assert any(shown in row and record["plain"] in row and "✘" not in row for row in rows), record["name"]
    for found in SCALING["sizes"]:
        assert all(speed.amount(t["median"], "s") in parts["scaling-rows"] for t in found["seconds"].values())
    assert parts["takeover-rows"].count("\n|") == len(SCALING["sizes"]) + 2


def test_numbers_are_written_in_two_digits():
    plain = [speed.amount(x, "s") for x in (17.09, 0.0557, 7.5e-6)]
    plain += [speed.amount(x, "B") for x in (8.192e9, 3.617e8, 2e5)]
    plain += [speed.digits(x) for x in (23700, 0.953, 5.58, 1200)]
    expected = ["17 s", "56 ms", "7.5 µs", "8.2 GB", "360 MB", "0.2 MB", "24 000", "0.95", "5.6", "1 200"]
    assert [text.replace(speed.SPACE, " ") for text in plain] == expected


def test_a_record_that_misses_is_marked():
    (good, *_) = RESULTS["records"]
    assert "✘" not in speed.cells(good)[-1] and "✘" in speed.cells(good | {"met": False})[-1]


def test_the_figure_is_a_picture():
    assert speed.draw(SCALING).startswith(b"\x89PNG")
