"""Turns a chapter from MyST Markdown into a notebook that Colab and GitHub show well without any extension."""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jupytext
import nbformat
import yaml
from pybtex.database import Entry, Person, parse_file  # type: ignore[import-untyped]

THEOREMS = ("theorem", "lemma", "proposition", "corollary", "definition", "remark")
NOTES = ("note", "tip", "warning", "important")
ROLES = ("eq", "prf:ref", "cite:t", "cite:p", "doc", "ref")
# The boxes a chapter may use, each with the options it takes.
BOXES: dict[str, tuple[str, ...]] = {
    **{f"prf:{name}": ("label",) for name in THEOREMS},
    "prf:proof": (),
    **{name: ("class",) for name in NOTES},
    "admonition": ("class",),
    "exercise": ("label",),
}
FORBIDDEN = {
    "html": "raw HTML",
    "footnote": "a footnote",
    "image": "an image that no cell draws",
    "substitution": "a substitution",
    "comment": "a comment",
    "link": "a link to a file or an anchor (write {doc} or {ref})",
}
TOKEN = re.compile(
    r"""
    (?P<escape>\\[^\n])
  | (?P<role>\{(?P<name>[A-Za-z][\w:+-]*)\}(?P<tick>`+)(?P<target>.+?)(?<!`)(?P=tick)(?!`))
  | (?P<code>(?P<ticks>(?<!`)`+(?!`)).+?(?<!`)(?P=ticks)(?!`))
  | (?P<display>\$\$(?P<tex>.+?)\$\$(?:[ \t]*\((?P<label>[^()\s]+)\))?)
  | (?P<math>\$(?:\\.|[^$\\\n]|\n(?![ \t]*\n))+\$)
  | (?P<place>^\([^()\s]+\)=[ \t]*(?:\n|$))
  | (?P<html><(?!https?://|mailto:)[/!]?[A-Za-z-][^<>\n]*>)
  | (?P<footnote>\[\^[^\]\n]+\])
  | (?P<image>!\[)
  | (?P<substitution>\{\{)
  | (?P<comment>^[ \t]*%.*$)
  | (?P<link>\]\((?!https?://)[^)\n]*\))
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*(.*)")
COLONS = re.compile(r"([ \t]*)(:{3,})[ \t]*(?:\{([^}]*)\}[ \t]*(.*))?")
OPTION = re.compile(r":([\w-]+):[ \t]*(.*)")
HEADING = re.compile(r"#{1,6} ")
ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}(?:(?!\\begin\{).)*?\\end\{\1\}", re.DOTALL)
FENCED = re.compile(r"^[ \t]*(`{3,}+|~{3,}+)(?!\{(?!code-cell))[^\n]*\n(?:.*?\n)??[ \t]*\1[`~]*[ \t]*$", re.M | re.S)
DISPLAY = re.compile(r"\$\$(.+?)\$\$(?:[ \t]*\(([^()\s]+)\))?", re.DOTALL)
FIGURE = re.compile(r"^(?:`{3,}|:{3,})\{figure\}.*\n(?::.*\n)*?:name:[ \t]*(\S+)", re.MULTILINE)
NUMBERED = re.compile(r"^(?::{3,}|`{3,})\{(prf:(?!proof)\w+|exercise)\}[ \t]*(.*)\n((?::[\w-]+:.*\n)*)", re.MULTILINE)


class MarkupError(ValueError):
    """Markup that a chapter may not use, and the line it stands in."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Cell:
    """One cell of a chapter and the line of the file in which its source begins."""

    kind: str
    source: str
    metadata: dict[str, Any]
    line: int

    @property
    def tags(self) -> list[str]:
        return self.metadata.get("tags", [])


@dataclass(frozen=True)
class Block:
    """A piece of a Markdown cell: ``text``, ``code``, or a ``box``, which also has a name and a title."""

    kind: str
    lines: list[str]
    line: int
    name: str = ""
    title: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def folded(self) -> bool:
        return self.options.get("class") == "dropdown"


@dataclass(frozen=True)
class Place:
    """What a label points at: its kind, its page, and the number and the title that the built book shows."""

    kind: str
    page: str
    number: int = 0
    title: str = ""


@dataclass(frozen=True)
class Repository:
    """Where the book lives; every field is empty until ``repository.url`` is set."""

    url: str = ""
    branch: str = "main"
    address: str = ""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Repository:
        """From ``_config.yml``: ``html.baseurl`` is the book's address; otherwise it is that of GitHub's pages."""
        settings = config.get("repository") or {}
        url = (settings.get("url") or "").strip().rstrip("/").removesuffix(".git")
        address = ((config.get("html") or {}).get("baseurl") or "").rstrip("/")
        if not address and urlsplit(url).hostname == "github.com":
            owner, name = urlsplit(url).path.strip("/").split("/")
            host = f"{owner.lower()}.github.io"
            address = f"https://{host}" if name.lower() == host else f"https://{host}/{name}"
        return cls(url, settings.get("branch") or "main", address)


@cache
def split(text: str) -> tuple[list[Cell], dict[str, Any]]:
    """The cells of a chapter, and its header."""
    notebook = jupytext.reads(text, fmt="md:myst")
    cells, position = [], 0
    for cell in notebook.cells:
        start = text.find(cell.source, position)
        if start >= 0:
            position = start
        cells.append(Cell(cell.cell_type, cell.source, dict(cell.metadata), text.count("\n", 0, position) + 1))
        position += len(cell.source) if start >= 0 else 0
    return cells, dict(notebook.metadata)


def blocks(text: str, line: int = 1) -> Iterator[Block]:
    """Cut a Markdown cell into text, code fences and boxes; a heading begins a new piece of text."""
    lines = text.split("\n")
    start = i = 0

    def pending() -> Iterator[Block]:
        if start < i:
            yield Block("text", lines[start:i], line + start)

    while i < len(lines):
        fence, colons = FENCE.fullmatch(lines[i]), COLONS.fullmatch(lines[i])
        if fence:
            if fence[2].startswith("{"):
                raise MarkupError(line + i, f"```{fence[2]} is not allowed here: a box is written :::{{name}}")
            yield from pending()
            closing = re.compile(rf"[ \t]*{fence[1][0]}{{{len(fence[1])},}}[ \t]*")
            end = next((j for j in range(i + 1, len(lines)) if closing.fullmatch(lines[j])), None)
            if end is None:
                raise MarkupError(line + i, "this code fence is not closed")
            yield Block("code", lines[i : end + 1], line + i)
            start = i = end + 1
        elif colons:
            yield from pending()
            end = _box_end(lines, i, line, colons)
            body = i + 1
            options = {}
            while body < end and (option := OPTION.fullmatch(lines[body])):
                options[option[1]] = option[2].strip()
                body += 1
            yield Block("box", lines[body:end], line + i, colons[3], colons[4].strip(), options)
            start = i = end + 1
        else:
            if HEADING.match(lines[i]):
                yield from pending()
                start = i
            i += 1
    yield from pending()


def _box_end(lines: list[str], i: int, line: int, opening: re.Match[str]) -> int:
    """Index of the line that closes the box opened in line ``i``."""
    if opening[3] is None:
        raise MarkupError(line + i, f"{opening[2]} closes no box")
    if opening[1]:
        raise MarkupError(line + i, "a box begins at the left margin")
    for j in range(i + 1, len(lines)):
        inner = COLONS.fullmatch(lines[j])
        if inner and inner[3] is not None:
            raise MarkupError(line + j, "boxes are not nested")
        if inner and inner[2] == opening[2]:
            return j
    raise MarkupError(line + i, f"the box {opening[2]}{{{opening[3]}}} is not closed")


def masked(text: str) -> str:
    """The text with all code blanked out and every offset kept, for searches that must not look into code."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    def keep_all_but_code(match: re.Match[str]) -> str:
        return blank(match) if match.lastgroup == "code" else match[0]

    return TOKEN.sub(keep_all_but_code, FENCED.sub(blank, text))


def toc_pages(toc: Any) -> Iterator[str]:
    """Every page of ``_toc.yml`` in the order of the book, without file endings."""
    if isinstance(toc, list):
        for entry in toc:
            yield from toc_pages(entry)
    elif isinstance(toc, dict):
        for key, value in toc.items():
            if key in ("root", "file"):
                yield str(value).removesuffix(".md")
            else:
                yield from toc_pages(value)


@dataclass(frozen=True)
class Book:
    """All pages of the book: their text, their titles, and what every label points at."""

    title: str
    repository: Repository
    texts: dict[str, str]
    titles: dict[str, str]
    labels: list[tuple[str, Place]]
    bibliography: dict[str, Entry]

    @property
    def chapters(self) -> list[str]:
        return [page for page in self.texts if page.startswith("notebooks/")]

    @classmethod
    def load(cls, root: Path, texts: Mapping[str, str] | None = None) -> Book:
        """Read the book in ``root``; ``texts`` replaces the text of some pages.

        Numbers are those of the built book. Sphinx counts through the whole book, in the order of ``_toc.yml``,
        unless its settings say ``math_numfig: false`` (equations) or ``number_by_page: true`` (everything).
        """
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
        toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
        if any(page.get("numbered") for page in [toc, toc.get("options") or {}, *(toc.get("parts") or [])]):
            raise ValueError("_toc.yml: numbered chapters would number equations and theorems unlike the notebooks")
        found = sorted(f"notebooks/{path.stem}" for path in root.glob("notebooks/*.md"))
        pages = [page for page in dict.fromkeys([*toc_pages(toc), *found]) if (root / f"{page}.md").is_file()]
        contents = {page: (root / f"{page}.md").read_text(encoding="utf-8") for page in pages} | dict(texts or {})
        settings = (config.get("sphinx") or {}).get("config") or {}
        by_page = bool(settings.get("number_by_page"))
        counts: Counter[str] = Counter()
        labels: list[tuple[str, Place]] = []
        titles: dict[str, str] = {}
        for page, text in contents.items():
            if by_page:
                counts.clear()
            elif settings.get("math_numfig") is False:
                counts["equation"] = 0
            heading = re.search(r"^# (.+)$", masked(text), re.MULTILINE)
            titles[page] = text[slice(*heading.span(1))].strip() if heading else page
            labels += _labels(page, text, counts)
        references = root / "book/references.bib"
        bibliography = dict(parse_file(str(references)).entries) if references.is_file() else {}
        return cls(config.get("title", ""), Repository.read(config), contents, titles, labels, bibliography)


def _labels(page: str, text: str, counts: Counter[str]) -> Iterator[tuple[str, Place]]:
    """What a page numbers and labels, counting on from the pages before it; a box without a label gets an empty one."""
    prose = masked(text)
    for equation in DISPLAY.finditer(prose):
        if equation[2]:
            counts["equation"] += 1
            yield equation[2], Place("equation", page, counts["equation"])
    for box in NUMBERED.finditer(prose):
        kind = box[1].removeprefix("prf:")
        counts[kind] += 1
        label = re.search(r"^:label:[ \t]*(\S+)", box[3], re.MULTILINE)
        yield label[1] if label else "", Place(kind, page, counts[kind], text[slice(*box.span(2))].strip())
    if page.startswith("notebooks/"):
        for cell in split(text)[0]:
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if figure.get("caption"):
                counts["figure"] += 1
                yield figure.get("name", ""), Place("figure", page, counts["figure"])
    for figure in FIGURE.finditer(text):
        counts["figure"] += 1
        yield figure[1], Place("figure", page, counts["figure"])
    waiting: list[str] = []
    for line, plain in zip(text.split("\n"), prose.split("\n"), strict=True):
        if target := re.fullmatch(r"\(([^()\s]+)\)=[ \t]*", plain):
            waiting.append(target[1])
        elif waiting and plain.strip():
            title = line.lstrip("#").strip() if HEADING.match(plain) else ""
            yield from ((label, Place("section", page, 0, title)) for label in waiting)
            waiting = []


def notebook(book: Book, page: str) -> Any:
    """The notebook of one chapter: same code cells, plain Markdown, no outputs, the same bytes every time."""
    try:
        return _Lowering(book, page).notebook()
    except MarkupError as error:
        raise ValueError(f"{page}.md:{error.line}: {error}") from None


def dumps(node: Any) -> str:
    """A notebook as the text of its file."""
    return nbformat.writes(node, version=4) + "\n"


def citation(entry: Entry) -> tuple[str, str, str]:
    """Authors, year and address of an entry of the bibliography."""

    def last_name(person: Person) -> str:
        return " ".join(str(part) for part in [*person.rich_prelast_names, *person.rich_last_names])

    names = [last_name(person) for person in entry.persons.get("author") or entry.persons.get("editor", [])]
    authors = f"{names[0]} et al." if len(names) > 2 else " and ".join(names) or entry.fields.get("title", entry.key)
    fields = entry.fields
    if "doi" in fields:
        url = f"https://doi.org/{fields['doi']}"
    elif "eprint" in fields and fields.get("archiveprefix", "arXiv").lower() == "arxiv":
        url = f"https://arxiv.org/abs/{fields['eprint']}"
    else:
        url = fields.get("url", "")
    return authors, fields.get("year", "n.d."), url


class _Lowering:
    """One chapter on its way to a notebook."""

    def __init__(self, book: Book, page: str) -> None:
        self.book = book
        self.page = page
        self.places = dict(book.labels)
        here = [place for _, place in book.labels if place.page == page]
        self.boxes = iter([place for place in here if place.kind in (*THEOREMS, "exercise")])
        self.figures = iter([place for place in here if place.kind == "figure"])

    def notebook(self) -> Any:
        cells, header = split(self.book.texts[self.page])
        result = [nbformat.v4.new_markdown_cell(self.top_line())]
        for cell in cells:
            if cell.kind == "code":
                result.append(nbformat.v4.new_code_cell(cell.source, metadata=self.code_metadata(cell)))
                result += map(nbformat.v4.new_markdown_cell, self.caption(cell))
            else:
                result += map(nbformat.v4.new_markdown_cell, self.markdown(cell.source, cell.line))
        seen: Counter[str] = Counter()
        for node in result:
            digest = hashlib.sha256(f"{node.cell_type}\n{node.source}".encode()).hexdigest()[:8]
            node["id"] = f"{digest}-{seen[digest]}" if seen[digest] else digest
            seen[digest] += 1
        metadata = {key: header[key] for key in ("accelerator", "colab", "kernelspec") if key in header}
        return nbformat.v4.new_notebook(cells=result, metadata=metadata | {"language_info": {"name": "python"}})

    def top_line(self) -> str:
        if self.book.repository.address:
            return f"[← This chapter in the book *{self.book.title}*]({self.book.repository.address}/{self.page}.html)"
        return f"This notebook is a chapter of the book *{self.book.title}*."

    @staticmethod
    def code_metadata(cell: Cell) -> dict[str, Any]:
        """The cell's metadata, where hidden code is also hidden in JupyterLab and Colab."""
        metadata = {key: value for key, value in cell.metadata.items() if key != "mystnb"}
        if {"hide-input", "hide-cell"} & set(cell.tags):
            metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
        return metadata

    def caption(self, cell: Cell) -> Iterator[str]:
        """The caption of the figure that a code cell draws, if it has one."""
        caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption")
        if caption:
            yield f"*Figure {next(self.figures).number}.* {self.inline(caption.strip(), cell.line)}"

    def markdown(self, text: str, line: int) -> Iterator[str]:
        """The Markdown cells that one Markdown cell becomes: each heading opens a new one."""
        parts: list[str] = []
        for block in blocks(text, line):
            if HEADING.match(block.lines[0] if block.kind == "text" else "") and parts:
                yield "\n\n".join(parts)
                parts = []
            if part := self.block(block):
                parts.append(part)
        if parts:
            yield "\n\n".join(parts)

    def block(self, block: Block, boxed: bool = False) -> str:
        if block.kind == "box":
            return self.box(block)
        text = "\n".join(block.lines)
        return (self.inline(text, block.line, boxed) if block.kind == "text" else text).strip("\n")

    def box(self, box: Block) -> str:
        """A box as a quotation with a bold title; folded, as ``<details>``; an exercise as plain paragraphs."""
        if box.name not in BOXES:
            allowed = ", ".join(f"{{{name}}}" for name in BOXES)
            raise MarkupError(box.line, f"{{{box.name}}} is not a box that a chapter may use: {allowed}")
        for key, value in box.options.items():
            if key not in BOXES[box.name] or (key == "class" and value != "dropdown"):
                hint = (
                    "; fold a proof as :::{admonition} Proof with :class: dropdown" if box.name == "prf:proof" else ""
                )
                raise MarkupError(box.line, f":{key}: {value} is not allowed in {{{box.name}}}{hint}")
        if (box.name == "admonition") != bool(box.title) and box.name in ("admonition", "prf:proof", *NOTES):
            raise MarkupError(box.line, f"{{{box.name}}} {'needs a' if box.name == 'admonition' else 'has no'} title")
        # Sphinx writes "Proof." in front of the first line, so this line must be text.
        blank = next((i for i, text in enumerate(box.lines) if text.strip()), 0)
        body = "\n".join(box.lines[blank:])
        first = box.line + 1 + len(box.options) + blank
        if body.startswith("---"):
            raise MarkupError(first, "options of a box are written as :name: value")
        runs_on = re.match(r"(?!\s|\$\$|```|~~~|[-+*] |\d+[.)] |[|#>:])", body) is not None
        if box.name == "prf:proof" and not runs_on:
            raise MarkupError(first, "a proof begins with a line of text")
        content = "\n\n".join(filter(None, (self.block(block, boxed=True) for block in blocks(body, first))))
        if not content:
            raise MarkupError(box.line, f"the box {{{box.name}}} is empty")
        name = box.name.removeprefix("prf:").capitalize()
        if box.folded:
            title = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(box.title or name, quote=False))
            return f"<details>\n<summary><b>{title}</b></summary>\n\n{content}\n\n</details>"
        title = self.inline(box.title, box.line)
        if box.name in ("admonition", *NOTES):
            return _quote(f"**{title or name}**\n\n{content}")
        if box.name != "prf:proof":
            name += f" {next(self.boxes).number}" + (f" ({title})" if title else "")
        text = f"**{name}.**" + (" " if runs_on else "\n\n") + content
        return text if box.name == "exercise" else _quote(text)

    def inline(self, text: str, line: int, boxed: bool = False) -> str:
        """Plain Markdown for a piece of text: roles and labels are resolved, code and mathematics stay as they are."""

        def replace(match: re.Match[str]) -> str:
            kind, here = match.lastgroup or "", line + text.count("\n", 0, match.start())
            if kind == "role":
                return self.role(match["name"], match["target"].strip(), here)
            if kind == "display":
                prefix = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
                return self.display(match["tex"], match["label"], here, flat=boxed or bool(prefix))
            if kind == "place":
                return ""
            if kind in FORBIDDEN:
                raise MarkupError(here, f"{FORBIDDEN[kind]} is not allowed in a chapter: {match[0].strip()}")
            return match[0]

        return TOKEN.sub(replace, text)

    def display(self, tex: str, label: str | None, line: int, flat: bool) -> str:
        """A displayed equation with its number; flat, on one line, in quotations, where Jupyter would show the '>'."""
        lines = re.sub(r"^[ \t]*(>[ \t]?)*", "", tex, flags=re.MULTILINE).strip().split("\n")
        if re.search(r"(?<!\\)%", tex) or not all(map(str.strip, lines)):
            raise MarkupError(line, "an equation holds neither TeX comments nor empty lines")
        outside = body = "\n".join(lines)
        while (inner := ENVIRONMENT.sub("", outside)) != outside:
            outside = inner
        if re.search(r"\\\\|(?<!\\)&", outside):
            body = f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"
        if label:
            body += rf" \tag{{{self.place(label, line, 'eq', 'equation').number}}}"
        if flat or "\n" not in body:
            return f"$$ {body.replace(chr(10), ' ')} $$"
        return f"$$\n{body}\n$$"

    def place(self, label: str, line: int, role: str, *kinds: str) -> Place:
        place = self.places.get(label)
        if place is None or place.kind not in kinds:
            raise MarkupError(line, f"{{{role}}} finds no {' or '.join(kinds)} labelled {label}")
        return place

    def role(self, name: str, target: str, line: int) -> str:
        """What a role becomes; the words are those of the built book."""
        if name not in ROLES:
            allowed = ", ".join(f"{{{role}}}" for role in ROLES)
            raise MarkupError(line, f"{{{name}}} is not a role that a chapter may use: {allowed}")
        if name.startswith("cite:"):
            return self.cite(name, target, line)
        explicit = re.fullmatch(r"(.+?)\s*<([^<>]+)>", target, re.DOTALL)
        text, label = (explicit[1], explicit[2]) if explicit and name != "eq" else ("", target)
        if name == "doc":
            path = label if label.startswith("/") else f"/{Path(self.page).parent.as_posix()}/{label}"
            page = re.sub(r"[^/]+/\.\./", "", path).strip("/")
            if page not in self.book.titles:
                raise MarkupError(line, f"{{doc}} finds no page {label}")
            return self.link(text or self.book.titles[page], page, always=True)
        if name == "eq":
            place = self.place(label, line, name, "equation")
        elif name == "prf:ref":
            place = self.place(label, line, name, *THEOREMS)
        else:
            place = self.place(label, line, name, "section", "exercise", "figure")
        if text:
            return self.link(text, place.page) + (f" (Figure {place.number})" if place.kind == "figure" else "")
        if place.kind == "section" and place.title:
            return self.link(place.title, place.page, always=True)
        if place.kind in ("section", "figure"):
            raise MarkupError(line, f"write the words of this reference: {{ref}}`words <{label}>`")
        number = f"({place.number})" if place.kind == "equation" else f"{place.kind.capitalize()} {place.number}"
        if place.page == self.page:
            return number
        return f"{number} of {self.link(self.book.titles[place.page], place.page)}"

    def link(self, text: str, page: str, always: bool = False) -> str:
        """A link to another page: to the notebook of a chapter, or into the online book; ``always`` marks titles."""
        if page == self.page:
            return f"*{text}*" if always else text
        if page.startswith("notebooks/"):
            return f"[{text}]({Path(page).name}.ipynb)"
        address = self.book.repository.address
        return f"[{text}]({address}/{page}.html)" if address else f"*{text}*"

    def cite(self, name: str, target: str, line: int) -> str:
        """Citations as links to the papers: ``Lu et al. (2025)``, or ``(Lu et al., 2025)`` in parentheses."""
        parts = []
        for key in map(str.strip, target.split(",")):
            if key not in self.book.bibliography:
                raise MarkupError(line, f"{{{name}}} finds no {key} in book/references.bib")
            authors, year, url = citation(self.book.bibliography[key])
            words = f"{authors} ({year})" if name == "cite:t" else f"{authors}, {year}"
            parts.append(f"[{words}]({url})" if url else words)
        return ", ".join(parts) if name == "cite:t" else f"({'; '.join(parts)})"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
