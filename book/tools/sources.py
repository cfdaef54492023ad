"""What a bracketed source names, in a docstring or in a claim: ``[MT25, Eq. 14; sampler: this book]``."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from contract import public_names
from lowering import Book, citation

KEY = re.compile(r"^\|\s*(\w+)\s*\|\s*\{cite:t\}`([^`]+)`\s*\|", re.MULTILINE)
# What is left around a name once it has been taken out: `published run of`, `and`, `, as summarised`.
FILLING = re.compile(r"^(?:and\b|[,:\s])+|(?:\b(?:of|as in)\b|[,:\s])+$")


@dataclass(frozen=True)
class Works:
    """The works of the bibliography under the names that sources use for them."""

    names: dict[str, str]

    @classmethod
    def read(cls, book: Book) -> Works:
        """Short keys come from the table in book/citing.md, ``Bai et al. 2023`` from the bibliography and its keys."""
        names = dict(KEY.findall(book.texts.get("book/citing", "")))
        years = {key: re.search(r"\d{4}", key) for key in book.bibliography}
        named = [(f"{citation(book.bibliography[key])[0]} {year[0]}", key) for key, year in years.items() if year]
        counts = Counter(name for name, _ in named)
        return cls(names | {name: key for name, key in named if counts[name] == 1})

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of the names; ``&`` is as good as ``and``."""
        names = (re.escape(name).replace(r"\ and\ ", r"\ (?:and|&)\ ") for name in sorted(self.names, reverse=True))
        return re.compile(rf"\b(?:{'|'.join(names)})\b")

    def key(self, name: str) -> str:
        """The work that a match of :attr:`pattern` names."""
        return self.names[name.replace(" & ", " and ")]

    def results(self, source: str) -> Iterator[tuple[str, str]]:
        """Each work that a source names, and what the source takes from it; nothing, if it does not say what."""
        for part in re.sub(r"[\[\]]", "", source).replace("as summarised", "").split(";"):
            what = FILLING.sub("", re.sub(r"(?<=:)\s*,|,\s*(?=,)", "", self.pattern.sub("", part)))
            yield from ((self.key(match[0]), what) for match in self.pattern.finditer(part))


def public_sources(root: Path) -> dict[str, str]:
    """The source in the docstring of every public function, class and method, ``module.name``, that has one."""
    result = {}
    for path in sorted(root.glob("icl_lib/*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        public = public_names(body)
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name not in public:
                continue
            methods = node.body if isinstance(node, ast.ClassDef) else []
            items = {f"{node.name}.{item.name}": item for item in methods if isinstance(item, ast.FunctionDef)}
            for name, item in {node.name: node, **items}.items():
                source = re.search(r"^Source: \[(.*)\]$", ast.get_docstring(item) or "", re.MULTILINE)
                if source and "._" not in name:
                    result[f"{path.stem}.{name}"] = source[1]
    return result
