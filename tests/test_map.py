"""The page that leads from papers to code: every step of every way exists, and the rules that find the ways."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

import icl_lib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import contract  # noqa: E402
from lowering import Book  # noqa: E402
from map import Map, Row, read_topic, same_result  # noqa: E402

MODULES = {name: importlib.import_module(f"icl_lib.{name}") for name in icl_lib.__all__}
CHAPTERS = {path.stem: path.read_text() for path in ROOT.glob("notebooks/*.md")}
LABELS = {(slug, label) for slug, text in CHAPTERS.items() for label in re.findall(r"\$\$ \((eq-\S+)\)$", text, re.M)}
CLAIMS = Counter(name for text in CHAPTERS.values() for name in re.findall(r'run\.claim\(\s*"(\w+)"', text))
exists = functools.cache(contract.test_exists)
# A paper's section begins with a label; a row of its table with an asterisk.
SECTION = re.compile(r"^\(map-(\w+)\)=\n(.*?)(?=^\(map-|\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\* - (.*)\n  - (.*)\n  - (.*)\n  - (.*)$", re.MULTILINE)


def documented(path: str) -> str | None:
    """The docstring of ``module.name`` or ``module.Class.method``, if the library offers it to its users."""
    module, name, *method = path.split(".")
    if module not in MODULES or name not in MODULES[module].__all__ or any(part.startswith("_") for part in method):
        return None
    value = getattr(MODULES[module], name)
    for part in method:
        value = inspect.getattr_static(value, part, None)
    return inspect.getdoc(value)


def problems(page: str) -> list[str]:
    """What a walk over the page finds missing: functions, equations, chapters, claims, tests."""
    found = []
    for what, book, library, claims in (
        row for _, section in SECTION.findall(page) for row in ROW.findall(section)[1:]
    ):
        for name in re.findall(r"`([^`]+)`", library):
            if not documented(name):
                found.append(f"{what}: no public function {name}")
        for part in book.split("<br>"):
            chapters = re.findall(r"<\.\./notebooks/([\w-]+)>", part)
            found += [f"{what}: no chapter {slug}" for slug in chapters if slug not in CHAPTERS]
            for label in re.findall(r"\{eq\}`([^`]+)`", part):
                if (chapters[0], label) not in LABELS:
                    found.append(f"{what}: no equation {label} in {chapters[0]}")
        for claim, test in re.findall(r"\{claim\}`([^`]+)` \[?`([^`]+)`", claims):
            if CLAIMS[claim] != 1:
                found.append(f"{what}: no claim {claim}")
            if not exists(ROOT, test):
                found.append(f"{what}: no test {test}")
        if not library + claims:
            found.append(f"{what}: leads nowhere")
    return found


@pytest.fixture(scope="module")
def papers() -> Map:
    return Map(ROOT, Book.load(ROOT))


@pytest.fixture(scope="module")
def page(papers: Map) -> str:
    return papers.page()


# --- the walk


def test_every_step_exists(page: str) -> None:
    sections = dict(SECTION.findall(page))
    assert {"demir2025random", "demir2025mixing", "mainali2025exact", "lu2025asymptotic"} <= sections.keys()
    assert all(len(ROW.findall(section)) > 1 for section in sections.values())
    assert problems(page) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("`dynamics.LinearDynamics.logistic`", "`dynamics.LinearDynamics.logistics`", "no public function"),
        ("`tasks.TaskPrior`", "`tasks.TaskPriors`", "no public function tasks.TaskPriors"),
        ("{eq}`eq-md-logistic`", "{eq}`eq-md-logistics`", "no equation eq-md-logistics in mode-dynamics"),
        ("<../notebooks/learning-curves>", "<../notebooks/learning-curve>", "no chapter learning-curve"),
        ("{claim}`LC2`", "{claim}`LC22`", "no claim LC22"),
        ("::test_logistic`", "::test_logistics`", "no test tests/test_mode_dynamics.py::test_logistics"),
    ],
)
def test_the_walk_notices_what_is_missing(page: str, old: str, new: str, problem: str) -> None:
    assert old in page
    assert any(problem in line for line in problems(page.replace(old, new)))


def test_every_public_name_with_a_paper_as_its_source_is_on_the_page(papers: Map, page: str) -> None:
    missing, names = [], papers.works.pattern
    for module, value in MODULES.items():
        for name in value.__all__:
            item = getattr(value, name)
            if not callable(item) or item.__module__ != f"icl_lib.{module}":
                continue
            methods = [f"{name}.{key}" for key in vars(item)] if inspect.isclass(item) else []
            for path in (f"{module}.{own}" for own in (name, *methods)):
                source = re.search(r"^Source: \[(.*)\]$", documented(path) or "", re.MULTILINE)
                if source and names.search(source[1]) and f"`{path}`" not in page:
                    missing.append(path)
    assert missing == []


def test_every_claim_with_a_paper_as_its_source_is_on_the_page(papers: Map, page: str) -> None:
    named = [claim.name for claim in papers.claims if papers.works.pattern.search(claim.source)]
    assert len(papers.claims) == sum(CLAIMS.values()) and len(named) > 50
    assert [name for name in named if f"{{claim}}`{name}`" not in page] == []


# --- the rules


@pytest.mark.parametrize(
    ("topic", "equations"),
    [
        ("First\n\n$$ a $$ (eq-a)\n\n`sums.add` adds. Then\n\n$$ b $$ (eq-b)", ["eq-a"]),
        ("First\n\n$$ a $$ (eq-a)\n\nNow (`sums.add`) we have\n\n$$ b $$ (eq-b)", ["eq-b"]),
        ("First\n\n$$ a $$ (eq-a)\n\nwhich `sums.add` adds.", ["eq-a"]),
        ("By {eq}`eq-c` we are done. Here `sums.add` computes {eq}`eq-a`, and {eq}`eq-b`.", ["eq-a", "eq-b"]),
        ("By {eq}`eq-a` we are done. Here is `sums.add(1, 2)`.", ["eq-a"]),
        ("Here is `sums.add`. By {eq}`eq-a` we are done.", []),
        ("Here is $`sums.add`$ and `sums.other`, {eq}`eq-a`.", []),
    ],
)
def test_the_equation_beside_which_a_function_is_named(topic: str, equations: list[str]) -> None:
    found: dict[str, list[str]] = {"sums.add": []}
    read_topic(topic, "", ["sums.add"], found)
    assert found == {"sums.add": equations}


def test_a_topic_goes_on_after_code() -> None:
    found: dict[str, list[str]] = {"sums.add": []}
    assert read_topic("Nothing new.", "eq-a", ["sums.add"], found) == "eq-a"
    assert read_topic("This is `sums.add`. Now {eq}`eq-b`.", "eq-a", ["sums.add"], found) == "eq-b"
    assert found == {"sums.add": ["eq-a"]}


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("Hermite model", ["Hermite model"]),
        ("model", ["Hermite model", "equivalent Hermite model"]),
        ("the Hermite model of a layer", ["Hermite model"]),
        ("mode", []),
        ("", []),
    ],
)
def test_the_results_that_a_claim_names(what: str, rows: list[str]) -> None:
    results = [Row(name) for name in ("Hermite model", "equivalent Hermite model", "data")]
    assert [row.what for row in same_result(what, results)] == rows
