"""Which public functions of the library a unit test uses, read from the source of its file."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache, partial
from pathlib import Path

# Modules of formulas, and modules that every chapter leans on and that compute no result; the others help or sample.
FORMULAS = ("asymptotics", "constructions", "dynamics", "moments", "spectral")
SERVICE = ("chapter", "plotting", "sweeps")


@cache
def _definitions(path: Path) -> dict[str, ast.AST]:
    """What a file defines at its top; a method as ``Class.method``."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            methods = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{item.name}": item for item in methods if isinstance(item, ast.FunctionDef)}
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = (item for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store))
            found |= {name.id: node for name in names}
    return found


@cache
def _imports(path: Path) -> dict[str, str]:
    """What the names that a file imports from the library are called there: ``module``, or ``module.name``."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "icl_lib":
            module = (node.module or "").partition(".")[2]
            found |= {name.asname or name.name: f"{module}.{name.name}".lstrip(".") for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name: "" for name in node.names if name.name == "icl_lib"}
    return found


@cache
def _spelt(path: Path, name: str) -> tuple[list[str], list[str]]:
    """Names in a definition: those of the library and attributes, ``.logistic``; and those that may be its file's."""
    library, local = [], []
    for node in ast.walk(_definitions(path)[name]):
        if isinstance(node, ast.Attribute | ast.Name):
            first, *rest = ast.unparse(node).split(".")
            local.append(first)
            if first in _imports(path):
                library.append(".".join([_imports(path)[first], *rest]).lstrip("."))
        if isinstance(node, ast.Attribute):
            library.append(f".{node.attr}")
        elif isinstance(node, ast.arg):  # a fixture
            local.append(node.arg)
    return library, local


def _mentions(path: Path, name: str, seen: set[str]) -> Iterator[str]:
    """What a definition spells, and all that it uses of its own file."""
    if name not in seen and name in _definitions(path):
        seen.add(name)
        library, local = _spelt(path, name)
        yield from library
        for other in local:
            yield from _mentions(path, other, seen)


def functions(root: Path, test: str, public: Collection[str]) -> list[str]:
    """Public names that ``tests/test_x.py::test_y`` uses, itself or through its helpers; a method for its class."""
    file, _, name = test.partition("::")
    mentions = list(dict.fromkeys(_mentions(root / file, name.replace("::", "."), set())))
    homes = {name.partition(".")[2]: name for name in public}  # of names that a second module offers as well
    homed = (name if name in public or name.startswith(".") else homes.get(name.partition(".")[2]) for name in mentions)
    found = [name for name in dict.fromkeys(homed) if name and name in public and name.partition(".")[0] not in SERVICE]
    for method in public:
        owner, _, last = method.rpartition(".")
        if owner in found and f".{last}" in mentions and method not in found:
            found.append(method)
    owners = {name.rpartition(".")[0] for name in found}
    return [name for name in found if name not in owners]


def most_specific(root: Path, tests: Iterable[str], public: Collection[str], most: int = 3) -> dict[str, list[str]]:
    """For each test the functions it uses: formulas first, then what its file uses often and few other files use."""
    found = {test: functions(root, test, public) for test in dict.fromkeys(tests)}
    often = Counter((test.partition("::")[0], name) for test, names in found.items() for name in names)
    files = Counter(name for _, name in often)

    def order(test: str, name: str) -> tuple[bool, float]:
        return name.partition(".")[0] not in FORMULAS, -often[test.partition("::")[0], name] / files[name]

    return {test: sorted(names, key=partial(order, test))[:most] for test, names in found.items()}
