"""The command behind `make student`: notebooks without solutions, to be handed out, in _build/student.

An exercise keeps its text and its folded hint. In place of its solution stands a stub with the names asked for. The
check is folded and has lost its comments, for they may tell the answer; where it fails, it repeats the hint.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contract import SOLUTION_TAGS
from lowering import Book, dumps, notebook

ROOT = Path(__file__).resolve().parents[2]
STUDENT = ROOT / "_build" / "student"
EXERCISE = re.compile(r"^\*\*(Exercise \d+) \((.+)\)\.\*\*", re.MULTILINE)
HINT = re.compile(r"<summary><b>Hint</b></summary>\n\n(.*?)\n\n</details>", re.DOTALL)
README = """\
# {title}: student edition

One notebook a chapter, complete but for the solutions of its exercises.

1. Install the library `icl_lib` from the repository of the book (`pip install -e .`), or let the first cell of a
   notebook do it: it takes the library from the folder or address in the environment variable `ICL_LIB_SOURCE`.
2. Open a notebook in Jupyter or Colab and run all its cells. It takes about a minute. Every check fails so far.
3. Solve an exercise in the cell below its hint: replace each line that raises and each `...`, and keep the names.
4. Run this cell and the folded cell *Check* below it. If that ends without an error, the exercise is solved; otherwise
   it says what is missing. A check needs the cells of the chapter above it.

The stars of an exercise tell the effort, and its title the minutes. Chapters, in the order of the book:

{chapters}
"""


def targets(statement: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """The names that a statement of a solution binds, each with what it is bound to."""
    if isinstance(statement, ast.FunctionDef):
        yield statement.name, statement
    elif isinstance(statement, ast.Assign):
        for target in statement.targets:
            if isinstance(target, ast.Tuple) and isinstance(statement.value, ast.Tuple):
                pairs = zip(target.elts, statement.value.elts, strict=True)
            else:
                pairs = zip([target], [statement.value], strict=True)
            yield from ((ast.unparse(name), value) for name, value in pairs)


def asked(solution: str, check: str) -> dict[str, ast.AST]:
    """The names that a solution binds and its check uses."""
    used = {node.id for node in ast.walk(ast.parse(check)) if isinstance(node, ast.Name)}
    found = (pair for statement in ast.parse(solution).body for pair in targets(statement))
    return {name: value for name, value in found if name in used}


def stub(names: dict[str, ast.AST], exercise: str, title: str) -> str:
    """The cell in which an exercise is to be solved: functions that raise, and values that are dots."""
    lines = [f"# {exercise} ({title}). Replace each line that raises, and each `...`."]
    for name, value in names.items():
        if isinstance(value, ast.FunctionDef | ast.Lambda):
            call = f"{name}({ast.unparse(value.args)})"
            lines += [f"def {call}:", f'    raise NotImplementedError("{exercise}: write {call} here")']
        else:
            lines.append(f"{name} = ...")
    return "\n".join(lines)


class Hinting(ast.NodeTransformer):
    """Gives every assertion the hint as its message."""

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        return ast.Assert(node.test, ast.Name("not_yet"))


def check(source: str, names: dict[str, ast.AST], exercise: str, hint: str) -> str:
    """A check that fails with the hint, also where a value is still missing."""
    lines = [f"# @title Check of {exercise}", f'not_yet = r"""{exercise}: not yet. Hint: {hint}"""']
    lines += [
        f"assert {name} is not ..., not_yet"
        for name, value in names.items()
        if not isinstance(value, ast.FunctionDef | ast.Lambda)
    ]
    return "\n".join([*lines, ast.unparse(Hinting().visit(ast.parse(source)))])


def exercises(node: Any) -> Iterator[tuple[str, str, str, int]]:
    """The exercises of a notebook: name, title, hint, and where the solution stands; the check is the next cell."""
    for i, cell in enumerate(node.cells):
        if cell.cell_type == "code" and cell.metadata.get("tags") == SOLUTION_TAGS:
            text = node.cells[i - 1].source
            name, title = EXERCISE.findall(text)[-1]
            yield name, title, HINT.findall(text)[-1], i


def edition(book: Book, page: str) -> Any:
    """The notebook of one chapter as students get it; "Run all" goes on after a check that fails."""
    node = notebook(book, page)
    for name, title, hint, i in exercises(node):
        solution, test = node.cells[i : i + 2]
        names = asked(solution.source, test.source)
        solution.source, solution.metadata = stub(names, name, title), {"tags": ["exercise"]}
        test.source = check(test.source, names, name, hint)
        folded = {"jupyter": {"source_hidden": True}, "cellView": "form"}
        test.metadata = {"tags": ["hide-input", "raises-exception"]} | folded
    return node


def main() -> None:
    """Write the student edition afresh."""
    book = Book.load(ROOT)
    shutil.rmtree(STUDENT, ignore_errors=True)
    STUDENT.mkdir(parents=True)
    for page in book.chapters:
        (STUDENT / Path(page).with_suffix(".ipynb").name).write_text(dumps(edition(book, page)), encoding="utf-8")
    chapters = "\n".join(f"- `{Path(page).name}.ipynb`: {book.titles[page]}" for page in book.chapters)
    (STUDENT / "README.md").write_text(README.format(title=book.title, chapters=chapters), encoding="utf-8")
    print(f"{len(book.chapters)} notebooks without solutions are in {STUDENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
