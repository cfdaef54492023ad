"""The claims ledger in Markdown: a table a chapter, and for the landing page a line that counts the claims."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowering import Book, Repository, citation
from sources import Works, public_sources
from uses import most_specific

from icl_lib.chapter import VERDICTS

SYMBOLS = dict(zip(VERDICTS, "✔✎◐✘", strict=True))
COLUMNS = ("claim", "verdict", "statement", "measured, and required", "source", "functions its test uses", "test")
Row = Mapping[str, Any]


def slug(verdict: str) -> str:
    """A verdict as the filters of the ledger spell it in an address."""
    return verdict.replace(" ", "-")


def link(address: str, text: str, title: str = "") -> str:
    """A link inside the book; unlike a Markdown link it may point at places that Sphinx does not know."""
    hover = f' title="{html.escape(title)}"' if title else ""
    return f'<a class="reference internal" href="{html.escape(address)}"{hover}>{text}</a>'


def verdict_badge(verdict: str) -> str:
    """A verdict as symbol, word and colour."""
    return f'<span class="icl-verdict" data-verdict="{slug(verdict)}">{SYMBOLS[verdict]} {verdict}</span>'


def test_link(test: str, repository: Repository) -> str:
    """The name of a test, linked to its file if the repository has an address."""
    if not test or not repository.url:
        return f"`{test}`" if test else ""
    return f"[`{test}`]({repository.url}/blob/{repository.branch}/{test.partition('::')[0]})"


@dataclass(frozen=True)
class Ledger:
    """What the cells of the ledger link to, besides the claims' own chapters."""

    book: Book
    works: Works
    functions: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, root: Path, book: Book, tests: Iterable[str]) -> Ledger:
        """For the book in ``root``, whose claims name the ``tests``."""
        return cls(book, Works.read(book), most_specific(root, tests, public_sources(root)))

    def source(self, source: str) -> str:
        """A source in brackets, each work in it linked to its entry in the bibliography."""

        def entry(name: str) -> str:
            key = self.works.key(name)
            authors, year, _ = citation(self.book.bibliography[key])
            return link(f"bibliography.html#cite-{key}", name, f"{authors} ({year})")

        text = source.replace("[", r"\[").replace("]", r"\]")
        return self.works.pattern.sub(lambda match: entry(match[0]), text)

    def cells(self, row: Row) -> tuple[str, ...]:
        """The cells of a row, in the order of :data:`COLUMNS`."""
        return (
            f"{{claim}}`{row['id']}`",
            verdict_badge(row["verdict"]),
            row["statement"],
            f"{row['measured']}<br>{row['criterion']}",
            self.source(row["source"]),
            "<br>".join(f"`{name}`" for name in self.functions.get(row["test"], ())),
            test_link(row["test"], self.book.repository),
        )

    def page(self, rows: Sequence[Row], parts: Mapping[str, Sequence[str]]) -> str:
        """All rows, under the names of the parts and the titles of their chapters."""
        scales = " and ".join(sorted({row["scale"] for row in rows}))
        text = [f"{counts(rows, linked=False)[:-1]}, all checked at scale `{scales}`."]
        for part, chapters in parts.items():
            text.append(f"### {part}")
            for chapter in chapters:
                group = [self.cells(row) for row in rows if row["chapter"] == chapter]
                text += [f"#### {self.book.titles[f'notebooks/{chapter}']}", table("icl-ledger", COLUMNS, group)]
        return "\n\n".join(text) + "\n"


def table(name: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A list table of the class ``name``; unlike a pipe table it may contain formulas with vertical bars."""
    lines = ["* - " + "\n  - ".join(" ".join(cell.split()) for cell in row) for row in [columns, *rows]]
    return "\n".join(["```{list-table}", ":header-rows: 1", f":class: {name}", "", *lines, "```"])


def counts(rows: Sequence[Row], linked: bool = True) -> str:
    """How many claims there are, and how many of each verdict, linked to the ledger that shows only these."""
    found = Counter(row["verdict"] for row in rows)
    words = {verdict: verdict.replace("holds only if", "hold only if …") for verdict in VERDICTS}
    names = {verdict: f"{SYMBOLS[verdict]} {found[verdict]} {words[verdict]}" for verdict in VERDICTS}
    # The address has the form of an identifier, since the theme's scripts look for a place of that name.
    links = [link(f"ledger.html#verdict-{slug(verdict)}", name) for verdict, name in names.items()]
    return f"**{len(rows)} claims:** {', '.join(links if linked else names.values())}."
