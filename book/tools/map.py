"""The page that leads from papers to code: results that sources name, equations, functions, claims and their tests.

Nothing in it is typed by hand. It is read from the last lines of docstrings, from the chapters, and from the tests.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from contract import HEADINGS, Chapter, claim_calls
from ledger import SYMBOLS, table, test_link
from lowering import TOKEN, Book, Cell, citation
from sources import Works, public_sources
from uses import most_specific

COLUMNS = ("in the paper", "in the book", "in the library", "claims, and their tests")
SECTIONS = HEADINGS[2:7]  # from the first picture to what can go wrong; what follows repeats and cites


@dataclass(frozen=True)
class Claim:
    """A claim as its call in a chapter states it; an ellipsis stands for numbers that only a run knows."""

    name: str
    statement: str
    source: str
    verdict: str
    test: str
    page: str


@dataclass
class Row:
    """A result of a paper, and where it stands in the library, in the ledger and in the book."""

    what: str
    functions: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)


def written(node: ast.expr) -> str:
    """A string as it is written in a call."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(written, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def claims(chapter: Chapter) -> Iterator[tuple[Cell, Claim]]:
    """The claims of a chapter, each with its cell."""
    for cell, call in claim_calls(chapter):
        words = {"verdict": "confirmed"} | {word.arg: written(word.value) for word in call.keywords if word.arg}
        name, statement = map(written, call.args)
        yield cell, Claim(name, statement, words["source"], words["verdict"], words["test"], chapter.page)


def sentence_ends(topic: str) -> list[int]:
    """Where sentences end; a labelled equation ends one, unless the text goes on in small letters."""
    plain = TOKEN.sub(lambda token: "x" * len(token[0]), topic)
    equations = (token.end() for token in TOKEN.finditer(topic) if token["label"])
    return sorted(
        [end.start() for end in re.finditer(r"[.?!]\s", plain)]
        + [end for end in equations if not re.match(r"\s*[a-z]", topic[end:])]
    )


def read_topic(topic: str, near: str, names: Collection[str], found: dict[str, list[str]]) -> str:
    """Note the equations of the functions that a topic names; returns the last equation that it shows or cites.

    Those shown in the same sentence, or else those cited there, or else the last one before; at first it is ``near``.
    """
    tokens, ends = list(TOKEN.finditer(topic)), sentence_ends(topic)
    shown, cited = defaultdict(list), defaultdict(list)
    for token in tokens:
        if token["label"]:
            shown[bisect(ends, token.start())].append(token["label"])
        elif token["name"] == "eq":
            cited[bisect(ends, token.start())].append(token["target"])
    for token in tokens:
        sentence = bisect(ends, token.start())
        if token["label"] or token["name"] == "eq":
            near = token["label"] or token["target"]
        elif token["code"] and (name := re.sub(r"\(.*\)$", "", token["code"].strip("`"))) in names:
            found[name] += shown[sentence] or cited[sentence] or [near] * bool(near)
    return near


def equations(chapter: Chapter, names: Collection[str]) -> dict[str, list[str]]:
    """The equations beside which a chapter names a function of the library, or asserts a claim.

    They belong to the same topic, which begins with a heading or with a paragraph that begins in bold.
    """
    found: dict[str, list[str]] = defaultdict(list)
    asserted = defaultdict(list)
    for cell, claim in claims(chapter):
        asserted[cell.line].append(claim.name)
    near = ""
    for section, piece in chapter.pieces:
        if section not in SECTIONS:
            continue
        if isinstance(piece, Cell):
            for name in asserted[piece.line]:
                found[name] += [near] * bool(near)
            continue
        for topic in re.split(r"\n\n(?=\*\*)", "\n".join(piece.lines)):
            near = read_topic(topic, "" if topic.startswith(("#", "**")) else near, names, found)
    return found


def same_result(what: str, rows: Iterable[Row]) -> list[Row]:
    """The rows of the result that a claim names, in the same words or in more or fewer of them."""
    rows = [row for row in rows if row.what and what]
    longer = (row for row in rows if re.search(rf"\b{re.escape(what)}\b", row.what))
    shorter = (row for row in rows if re.search(rf"\b{re.escape(row.what)}\b", what))
    return [row for row in rows if row.what == what] or [*longer, *shorter]


@dataclass(frozen=True)
class Map:
    """The rows of every work."""

    root: Path
    book: Book

    @cached_property
    def works(self) -> Works:
        return Works.read(self.book)

    @cached_property
    def public(self) -> dict[str, str]:
        return public_sources(self.root)

    @cached_property
    def chapters(self) -> list[Chapter]:
        return [Chapter(self.book, page) for page in self.book.chapters]

    @cached_property
    def claims(self) -> list[Claim]:
        return [claim for chapter in self.chapters for _, claim in claims(chapter)]

    @cached_property
    def beside(self) -> dict[str, list[str]]:
        """The equations of every function and claim."""
        found: dict[str, list[str]] = defaultdict(list)
        for chapter in self.chapters:
            for name, labels in equations(chapter, self.public).items():
                found[name] += labels
        return found

    @cached_property
    def places(self) -> dict[str, str]:
        """The chapter of every label, in the order of the book."""
        return {label: place.page for label, place in self.book.labels}

    @cached_property
    def pages(self) -> dict[str, list[str]]:
        """For every function the chapters of its equations; without an equation, all that call or name it."""
        found = {name: [self.places[label] for label in self.beside.get(name, ())] for name in self.public}
        for name in (name for name, pages in found.items() if not pages):
            module, own, *method = name.split(".")
            words = [rf"\b{module}\.{own}\b", *(rf"\.{word}\b" for word in method)]
            texts = self.book.texts
            found[name] = [page for page in self.book.chapters if all(re.search(word, texts[page]) for word in words)]
        return found

    def rows(self) -> dict[str, list[Row]]:
        """What docstrings take from each work; then each claim that none of these results covers."""
        results: dict[str, dict[str, Row]] = defaultdict(dict)
        for name, source in self.public.items():
            for key, what in self.works.results(source):
                results[key].setdefault(what, Row(what or "as a whole")).functions.append(name)
        found = {key: list(rows.values()) for key, rows in results.items()}
        used = most_specific(self.root, [claim.test for claim in self.claims], self.public, most=len(self.public))
        for claim in self.claims:
            here = [name for name in used[claim.test] if claim.page in self.pages[name]]
            near = {name for name in here if self.beside.get(name) or name in used[claim.test][:3]}
            for key, what in self.works.results(claim.source):
                rows = results[key].values()
                same = same_result(what, rows) or [row for row in rows if near & set(row.functions)]
                if not same:
                    same = [Row(what or "*unnamed*")]
                    found.setdefault(key, []).extend(same)
                for row in same:
                    row.claims.append(claim)
        for row in (row for rows in found.values() for row in rows):
            self.place(row)
        return {key: sorted(rows, key=self.order) for key, rows in found.items()}

    def place(self, row: Row) -> None:
        """Give a row its equations, in the order of the book, or else the chapters that use its functions."""
        names = [*row.functions, *(claim.name for claim in row.claims)]
        labels = {label for name in names for label in self.beside.get(name, ())}
        pages = {page for name in row.functions for page in self.pages[name]} | {claim.page for claim in row.claims}
        row.equations = [label for label in self.places if label in labels]
        row.pages = [] if labels else [page for page in self.book.chapters if page in pages]

    def order(self, row: Row) -> tuple[int, int]:
        """Where in the book a row begins: chapter and equation."""
        pages = [self.places[label] for label in row.equations] or row.pages
        labels = list(self.places)
        return (
            self.book.chapters.index(pages[0]) if pages else len(self.book.chapters),
            labels.index(row.equations[0]) if row.equations else len(labels),
        )

    def in_the_book(self, row: Row) -> str:
        """The equations of a row, chapter by chapter, or the first chapters without one."""

        def chapter(page: str) -> str:
            return f"{{doc}}`{Path(page).name} <../{page}>`"

        labels: dict[str, list[str]] = defaultdict(list)
        for label in row.equations:
            labels[self.places[label]].append(f"{{eq}}`{label}`")
        shown = [f"{', '.join(group)} in {chapter(page)}" for page, group in labels.items()]
        more = f" and {len(row.pages) - 3} more" if len(row.pages) > 3 else ""
        return "<br>".join(shown) or ", ".join(map(chapter, row.pages[:3])) + more

    def cells(self, row: Row) -> tuple[str, ...]:
        """The cells of a row, in the order of :data:`COLUMNS`."""
        checks = (
            f"{SYMBOLS[claim.verdict]} {{claim}}`{claim.name}` {test_link(claim.test, self.book.repository)}"
            for claim in row.claims
        )
        functions = (f"`{name}`" for name in row.functions)
        return row.what, self.in_the_book(row), "<br>".join(functions), "<br>".join(checks)

    def page(self) -> str:
        """A section for each work, first those with a short key, and links to all sections."""
        found = self.rows()
        named = list(self.works.names.values())
        short = {key: name for name, key in reversed(self.works.names.items()) if " " not in name}
        links, sections = [], []
        for key in sorted(found, key=named.index):
            authors, year, _ = citation(self.book.bibliography[key])
            title = re.sub(r"[{}]", "", self.book.bibliography[key].fields["title"])
            heading = f"{authors} ({year})"
            links.append(f"{{ref}}`{heading} <map-{key}>`")
            note = f", in short [{short[key]}]" if key in short else ""
            sections += [f"(map-{key})=\n### {heading}", f"*{title}* {{cite:p}}`{key}`{note}."]
            sections.append(table("icl-map", COLUMNS, map(self.cells, found[key])))
        return "\n\n".join([" · ".join(links), *sections]) + "\n"
