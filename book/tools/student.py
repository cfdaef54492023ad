"""The command behind `make student`: notebooks without solutions, to be handed out, in _build/student.

An exercise keeps its text and its folded hint. In place of its solution stands a stub with the names asked for. The
check is folded; where it fails, it repeats the hint. It tells no answer: comments, printed lines and the words of
claims are gone, and where an answer is compared with a number, only a digest of the number is left.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from collections.abc import Iterable, Iterator
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


def read(node: ast.AST) -> set[str]:
    """The names in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


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
    used = read(ast.parse(check))
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


def sealed(x):  # type: ignore[no-untyped-def]
    """Digest of a number to nine digits, or of several; a check compares digests, so that it tells no answer."""
    import hashlib

    if isinstance(x, tuple | list):
        x = str([sealed(y) for y in x])
    text = f"{float(x) + 0.0:.9g}" if hasattr(x, "__float__") else str(x)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests(expression: str, number: Any) -> ast.expr:
    """The equation of an expression with a number, as one of digests."""
    return ast.parse(f"sealed({expression}) == {sealed(number)!r}", mode="eval").body


class Sealing(ast.NodeTransformer):
    """Takes from a check what tells an answer; gives every assertion the hint as its message."""

    def __init__(self, names: Iterable[str], exercise: str) -> None:
        self.names, self.exercise = set(names), exercise

    def seal(self, node: ast.expr, answer: ast.expr, number: ast.expr) -> ast.expr:
        """The equation of an answer with a number, as one of digests; any other one as it is."""
        if not read(answer) & self.names or read(number):
            return node
        return digests(ast.unparse(answer), eval(ast.unparse(number)))

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Seals ``answer == number``, and an order of three answers or more."""
        sides, kinds = [node.left, *node.comparators], {type(op) for op in node.ops}
        if kinds == {ast.Eq} and len(sides) == 2:
            return self.seal(node, *sides)
        if kinds == {ast.Lt} and sum(bool(read(side) & self.names) for side in sides) > 2:
            ranking = list(map(ast.unparse, sides))
            mixed = sorted(ranking)
            order = f"sorted(range({len(mixed)}), key=[{', '.join(mixed)}].__getitem__)"
            return digests(order, list(map(mixed.index, ranking)))
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Seals ``math.isclose(answer, number)``, and takes the words from a claim."""
        called = ast.unparse(node.func)
        if called == "math.isclose" and len(node.args) == 2 and not node.keywords:
            return self.seal(node, *node.args)
        if called == "run.claim":
            node.args[1] = ast.Constant(self.exercise)
        self.generic_visit(node)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        self.generic_visit(node)
        return None if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "print" else node

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        return ast.Assert(self.visit(node.test), ast.Name("not_yet"))


def check(source: str, names: dict[str, ast.AST], exercise: str, hint: str) -> str:
    """A check that fails with the hint, also where a value is still missing."""
    body = ast.unparse(Sealing(names, exercise).visit(ast.parse(source)))
    lines = [f"# @title Check of {exercise}", f'not_yet = r"""{exercise}: not yet. Hint: {hint}"""']
    lines += [
        f"assert {name} is not ..., not_yet"
        for name, bound in names.items()
        if not isinstance(bound, ast.FunctionDef | ast.Lambda)
    ]
    if "sealed(" in body:
        lines.append(ast.unparse(ast.parse(inspect.getsource(sealed))))
    return "\n".join([*lines, body])


def exercises(node: Any) -> Iterator[tuple[str, str, str, int]]:
    """The exercises of a notebook: name, title, hint, and where the solution stands; the check is the next cell."""
    for i, cell in enumerate(node.cells):
        if cell.cell_type == "code" and cell.metadata.get("tags") == SOLUTION_TAGS:
            text = node.cells[i - 1].source
            name, title = EXERCISE.findall(text)[-1]
            yield name, title, HINT.findall(text)[-1], i


def edition(book: Book, page: str) -> Any:
    """The notebook of one chapter as students get it; "Run all" goes on after an answer or a check that fails."""
    node = notebook(book, page)
    for name, title, hint, i in exercises(node):
        solution, test = node.cells[i : i + 2]
        names = asked(solution.source, test.source)
        solution.source, solution.metadata = stub(names, name, title), {"tags": ["exercise", "raises-exception"]}
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
