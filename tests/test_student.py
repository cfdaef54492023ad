"""The student edition: solutions are gone and nothing else; stubs and wrong answers fail, solutions pass.

Running 18 chapters for 54 exercises would take ten minutes. A check needs little of its chapter, so a name is computed
when it is first read: by the statement that binds it, which reads its own names in the same way.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import lowering  # noqa: E402
import student  # noqa: E402

# Chapters whose checks need a simulation of the text; together they take a few minutes.
SLOW = {
    *("hermite-expansions", "gaussian-preactivations", "hermite-twin", "when-nonlinearity-helps", "one-gradient-step"),
    *("noise-and-parametrisation", "spectral-measures", "grokking", "one-layer-is-one-step"),
    *("predicting-the-error", "width-and-ridge"),
}
Node = TypeVar("Node", bound=ast.AST)
BOOK = lowering.Book.load(ROOT)
SLUGS = [Path(page).name for page in BOOK.chapters]


class Names(ast.NodeVisitor):
    """The names of the surrounding scope that a statement binds, or whose items or attributes it sets."""

    def __init__(self, statement: ast.stmt) -> None:
        self.found: set[str] = set()
        self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.found.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        pass

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)

    def visit_alias(self, node: ast.alias) -> None:
        self.found.add((node.asname or node.name).split(".")[0])

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.found.add(node.id)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Store):
            self.found |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}


class View(dict[str, Any]):
    """Global names as one statement of a chapter sees them. (CPython asks ``__missing__`` also from functions.)"""

    def __init__(self, chapter: LazyChapter, position: int) -> None:
        super().__init__(__name__="__main__")
        self.chapter, self.position = chapter, position

    def __missing__(self, name: str) -> Any:
        return self.chapter.value(name, self.position)


class LazyChapter:
    """A chapter without its exercises, of which a statement runs when a name that it binds is read."""

    def __init__(self, sources: list[str]) -> None:
        self.statements = [statement for source in sources for statement in ast.parse(source).body]
        self.binds = [Names(statement).found for statement in self.statements]
        self.done: dict[int, View] = {}

    def value(self, name: str, position: int) -> Any:
        """What a name means there: its last binding before, or for a function that is called later, the next one."""
        places = [i for i, names in enumerate(self.binds) if name in names]
        if not places:
            raise KeyError(name)
        place = max((i for i in places if i < position), default=places[0])
        if place not in self.done:
            self.done[place] = View(self, place)
            self.run(ast.Module([self.statements[place]], []), self.done[place])
        return self.done[place][name]

    def run(self, code: ast.Module | str, view: View) -> None:
        with matplotlib.rc_context({"backend": "agg"}):
            exec(compile(code, "<chapter>", "exec"), view)
            plt.close("all")

    def after(self, *cells: str) -> View:
        """The names after the chapter and then some cells of an exercise."""
        view = View(self, len(self.statements))
        for cell in cells:
            self.run(cell, view)
        return view


@functools.cache
def full(slug: str) -> Any:
    return lowering.notebook(BOOK, f"notebooks/{slug}")


@functools.cache
def edition(slug: str) -> Any:
    return student.edition(BOOK, f"notebooks/{slug}")


def cells(slug: str) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Of every exercise its name and hint, solution and check, and what students get for these two."""
    for name, _, hint, i in student.exercises(full(slug)):
        sources = (cell.source for node in (full(slug), edition(slug)) for cell in node.cells[i : i + 2])
        yield name, hint, *sources  # type: ignore[misc]


def wrong(answer: Any) -> Any:
    """An answer of the same kind with other numbers; for an object, nothing."""
    if isinstance(answer, bool):
        return not answer
    if isinstance(answer, int | float | np.number | np.ndarray | torch.Tensor):
        return 2 * answer + 1
    if isinstance(answer, tuple | list):
        return type(answer)(map(wrong, answer))
    if isinstance(answer, dict):
        return {key: wrong(value) for key, value in answer.items()}
    return (lambda *values: wrong(answer(*values))) if isinstance(answer, FunctionType) else None


def nodes(code: str, kind: type[Node]) -> list[Node]:
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, kind)]


every_chapter = pytest.mark.parametrize("slug", SLUGS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # as in a chapter, a warning is no error
@pytest.mark.parametrize("slug", [pytest.param(s, marks=pytest.mark.slow) if s in SLOW else s for s in SLUGS])
def test_stubs_fail_with_a_word_of_help_and_solutions_pass(slug: str) -> None:
    code = [(i, cell.source) for i, cell in enumerate(full(slug).cells) if cell.cell_type == "code"]
    theirs = {j for *_, i in student.exercises(full(slug)) for j in (i, i + 1)}
    chapter = LazyChapter([source for i, source in code[1:] if i not in theirs])
    for name, _, solution, original, stub, check in cells(slug):
        with pytest.raises((NotImplementedError, AssertionError)) as failure:
            chapter.after(stub, check)
        message = str(failure.value)
        assert message.startswith(
            f"{name}: write " if failure.type is NotImplementedError else f"{name}: not yet. Hint"
        )
        chapter.after(solution, check)
        for asked in student.asked(solution, original):
            view = chapter.after(solution)
            view[asked] = wrong(view[asked])
            with pytest.raises(Exception):  # noqa: B017 - None fails in many ways
                chapter.run(check, view)


@every_chapter
def test_nothing_but_exercises_changes(slug: str) -> None:
    nbformat.validate(edition(slug))
    theirs = {j for *_, i in student.exercises(full(slug)) for j in (i, i + 1)}
    assert len(theirs) >= 6 and len(full(slug).cells) == len(edition(slug).cells)
    for i, (before, after) in enumerate(zip(full(slug).cells, edition(slug).cells, strict=True)):
        assert (before == after) == (i not in theirs)
        assert "solution" not in after.metadata.get("tags", [])
        assert (i in theirs) == ("raises-exception" in after.metadata.get("tags", []))
    for _, hint, *_ in cells(slug):
        assert any(hint in cell.source for cell in edition(slug).cells if cell.cell_type == "markdown")


@every_chapter
def test_no_line_of_a_solution_is_left(slug: str) -> None:
    chapter = "\n".join(cell.source for cell in full(slug).cells if "solution" not in cell.metadata.get("tags", []))
    left = "\n".join(cell.source for cell in edition(slug).cells)
    lines = [line.strip() for _, _, solution, *_ in cells(slug) for line in solution.split("\n")]
    told = [line for line in lines if line not in chapter and not line.startswith("def ")]
    assert told and not [line for line in told if line in left]


@every_chapter
def test_a_check_tells_no_answer(slug: str) -> None:
    for name, _, solution, original, _, check in cells(slug):
        asked = student.asked(solution, original).keys()
        for node in nodes(check, ast.Compare):
            sides = [student.read(side) for side in (node.left, *node.comparators)]
            told = len(sides) == 2 and isinstance(node.ops[0], ast.Eq) and bool(sides[0] & asked) and not sides[1]
            assert told == ast.unparse(node).startswith("sealed(")
        calls = {ast.unparse(call.func): call for call in nodes(check, ast.Call)}
        assert "print" not in calls and ("run.claim" in calls) == ("run.claim" in original)
        assert "run.claim" not in calls or ast.unparse(calls["run.claim"].args[1]) == repr(name)


@pytest.mark.parametrize(
    ("check", "left", "passes", "fails"),
    [
        ("assert f(2) == 4", r"sealed\(f\(2\)\) == '\w{16}'", "2 * x", "x"),
        ("assert (f(2), f(4)) == (1, 1 + 1)", r"sealed\(\(f\(2\), f\(4\)\)\) == '\w{16}'", "x / 2", "x"),
        ("assert math.isclose(f(2), 1 / 66)", r"sealed\(f\(2\)\) == '\w{16}'", "1 / 33 / x", "1 / 67"),
        ("assert 0 < f(3) < f(1) < f(2)", r"\[0, f\(1\), f\(2\), f\(3\)\]", "(x + 1) % 4 + 4 * (x < 3)", "x"),
        ("assert f(2) == g(2)", r"assert f\(2\) == g\(2\)", "2 * x", "x"),
        ("assert g(2) == 4 and f(2) == g(2)", r"assert g\(2\) == 4 and f\(2\) == g\(2\)", "2 * x", "x"),
        ("assert math.isclose(f(2), 4, rel_tol=0.1)", r"isclose\(f\(2\), 4, rel_tol=0.1\)", "2.1 * x", "x"),
        ("assert 3 < f(2) < 5", r"assert 3 < f\(2\) < 5", "2 * x", "x"),
    ],
)
def test_only_answers_are_sealed_and_right_ones_still_pass(check: str, left: str, passes: str, fails: str) -> None:
    sealed = student.check(check, {"f": ast.parse("lambda x: 0", mode="eval").body}, "Exercise 1", "Think.")
    assert len(re.findall(left, sealed)) == 1
    names = {"math": math, "g": lambda x: 2 * x}
    exec(sealed, names | {"f": eval(f"lambda x: {passes}")})
    with pytest.raises(AssertionError, match="Exercise 1: not yet"):
        exec(sealed, names | {"f": eval(f"lambda x: {fails}")})


@pytest.mark.parametrize("other", [4.0, np.float64(4), torch.tensor(4), 4 + 1e-14])
def test_numbers_have_one_digest_whatever_their_kind(other: Any) -> None:
    assert student.sealed(other) == student.sealed(4) != student.sealed(4.000001)
    assert student.sealed([other, -0.0]) == student.sealed((4, 0)) != student.sealed((0, 4))
    assert student.sealed(None) != student.sealed(0)  # so that a forgotten return fails with the hint


@every_chapter
def test_a_stub_names_what_its_check_needs_and_no_assertion_is_lost(slug: str) -> None:
    code = [cell.source for cell in full(slug).cells if cell.cell_type == "code"]
    for name, hint, solution, original, stub, check in cells(slug):
        names = {target for statement in ast.parse(solution).body for target, _ in student.targets(statement)}
        later = nodes("\n".join(code[code.index(solution) + 1 :]), ast.Name)
        asked: dict[str, Any] = {}
        exec(stub, asked)
        del asked["__builtins__"]
        assert asked.keys() == names & {node.id for node in later} and stub.startswith(f"# {name} (★")
        before, after = nodes(original, ast.Assert), nodes(check, ast.Assert)
        assert len(after) == len(before) + sum(value is ... for value in asked.values())
        assert all(node.msg and ast.unparse(node.msg) == "not_yet" for node in after) and hint in check
        for function in filter(callable, asked.values()):
            with pytest.raises(NotImplementedError, match=f"^{name}: write {function.__name__}"):
                function(*[0] * function.__code__.co_argcount)


def test_the_command_writes_every_chapter_and_a_word_to_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(student, "ROOT", tmp_path)
    monkeypatch.setattr(student, "STUDENT", tmp_path / "student")
    monkeypatch.setattr(lowering.Book, "load", lambda root: BOOK)
    monkeypatch.setattr(student, "edition", lambda book, page: edition(Path(page).name))
    (tmp_path / "student").mkdir()
    (tmp_path / "student/old.ipynb").touch()
    student.main()
    assert {path.stem for path in tmp_path.glob("student/*.ipynb")} == set(SLUGS)
    readme = (tmp_path / "student/README.md").read_text(encoding="utf-8")
    assert all(f"`{slug}.ipynb`: {BOOK.titles[f'notebooks/{slug}']}" in readme for slug in SLUGS)
    assert f"{len(SLUGS)} notebooks" in capsys.readouterr().out
