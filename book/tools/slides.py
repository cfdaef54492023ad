"""The command behind `make slides`: two lectures, made of the executed chapters, as reveal.js pages in _build."""

from __future__ import annotations

import ast
import base64
import html
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml
from contract import Chapter, claim_calls
from execute import ROOT, chapters, open_cache
from harvest import claims, executed, pictures
from lowering import Book, notebook
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

PLAN = ROOT / "book" / "slides.yml"
PAGE = ROOT / "book" / "tools" / "slides.html"
SLIDES = ROOT / "_build" / "slides"
MAX_WORDS = 40
MARKDOWN = MarkdownIt().use(dollarmath_plugin, renderer=lambda tex, _: f"\\({html.escape(tex)}\\)")
# Each file that a lecture loads: where it has been fetched to, and where it comes from otherwise.
REVEAL = "https://cdn.jsdelivr.net/npm/reveal.js@5.2.1/"
LOADED = {
    ROOT / "_vendor/reveal.js/dist/reset.css": f"{REVEAL}dist/reset.css",
    ROOT / "_vendor/reveal.js/dist/reveal.css": f"{REVEAL}dist/reveal.css",
    ROOT / "_vendor/reveal.js/dist/reveal.js": f"{REVEAL}dist/reveal.js",
    ROOT / "_vendor/reveal.js/plugin/notes/notes.js": f"{REVEAL}plugin/notes/notes.js",
    ROOT / "_vendor/mathjax/es5/tex-svg.js": "https://cdn.jsdelivr.net/npm/mathjax@3.2.2/es5/tex-svg.js",
}


@dataclass(frozen=True)
class Slide:
    """One entry of book/slides.yml, and the page that it quotes: its source, and its text."""

    entry: dict[str, Any]
    chapter: Chapter
    text: str

    @property
    def name(self) -> str:
        """The title of the chapter."""
        return self.chapter.book.titles[self.chapter.page]

    @property
    def title(self) -> str:
        return self.entry.get("title") or self.name

    @property
    def figure(self) -> str:
        return self.entry.get("figure", "")

    @property
    def equations(self) -> list[str]:
        found = self.entry.get("equation", [])
        return [found] if isinstance(found, str) else found

    @property
    def says(self) -> list[str]:
        return self.entry.get("says", [])

    def statement(self) -> str:
        """The words of the claim that the slide shows."""
        calls = [list(map(ast.unparse, call.args)) for _, call in claim_calls(self.chapter)]
        return dict(calls).get(repr(self.entry.get("claim")), "")

    def words(self) -> int:
        """The words of a slide; a formula within a sentence counts as one, a displayed one as none."""
        return len(re.sub(r"\$[^$]*\$", "x", " ".join([self.title, *self.says, self.statement()])).split())

    def mistakes(self) -> Iterator[str]:
        """What the chapter does not have, and what does not fit on a slide."""
        slug, text = self.chapter.slug, " ".join(self.text.split())
        here = {label: place.kind for label, place in self.chapter.book.labels if place.page == self.chapter.page}
        if self.figure and here.get(self.figure) != "figure":
            yield f"{slug} has no figure {self.figure}"
        yield from (f"{slug} has no equation {label}" for label in self.equations if here.get(label) != "equation")
        yield from (f"{slug} does not say: {sentence}" for sentence in self.says if sentence not in text)
        if "claim" in self.entry and not self.statement():
            yield f"{slug} does not claim {self.entry['claim']}"
        if self.figure and self.equations:
            yield f"{slug}: {self.figure} and {self.equations[0]} share a slide, on which neither can be read from afar"
        if self.words() > MAX_WORDS:
            yield f"{self.words()} words on a slide, at most {MAX_WORDS}: {self.title}"

    def number(self, label: str) -> int:
        return next(place.number for name, place in self.chapter.book.labels if name == label)

    def equation(self, label: str) -> str:
        """A displayed equation with its number, as in the notebook."""
        tag = re.escape(rf"\tag{{{self.number(label)}}}")
        found = next(tex for tex in re.findall(r"\$\$(.*?)\$\$", self.text, re.DOTALL) if re.search(tag, tex))
        tex = re.sub(rf"[ ,.]+(?=(\s*\\end{{aligned}})?\s*{tag})", "", found)  # its sentence ends elsewhere
        return f'<div class="equation" data-prevent-swipe>\\[{html.escape(tex)}\\]</div>'

    def notes(self, first: bool) -> list[str]:
        """For the speaker: the claim of a chapter that begins, and the caption of the figure."""
        wanted = [r"^> \*\*Claim\.\*\* (.*)$"] if first else []
        wanted += [rf"^\*Figure {self.number(self.figure)}\.\* (.*)$"] if self.figure else []
        return [note for pattern in wanted for note in re.findall(pattern, self.text, re.MULTILINE)]

    def section(self, outputs: NotebookNode, first: bool) -> str:
        """The slide as HTML, with the figure and the numbers of the executed chapter."""
        words = "".join(f"<p>{inline(sentence)}</p>" for sentence in self.says)
        for row in claims(outputs):
            if row["id"] == self.entry.get("claim"):
                line = f"✔ {row['statement']}: {short(row['measured'])}, required {short(row['criterion'])}"
                words += f'<p class="claim">{inline(line)}</p>'
        body = f'{picture(outputs, self.figure)}<div class="text">{words}</div>'
        if not self.figure:
            body = f'<div class="text alone">{"".join(map(self.equation, self.equations))}{words}</div>'
        link = f"../html/{self.chapter.page}.html" + (f"#{self.figure}" if self.figure else "")
        notes = "".join(f"<p>{inline(note)}</p>" for note in self.notes(first))
        return f"""<section>
<h2>{inline(self.title)}</h2>
<div class="row">{body}</div>
<footer><a href="{link}">{inline(self.name)}</a></footer>
<aside class="notes">{notes}</aside>
</section>"""


def decks(book: Book, plan: list[dict[str, Any]]) -> list[list[Slide]]:
    """The slides of each lecture; ValueError if one is of a page that does not exist."""
    used = {entry["chapter"] for talk in plan for entry in talk["slides"]}
    pages = {Path(page).name: page for page in book.texts}
    if unknown := sorted(used - pages.keys()):
        raise ValueError(f"book/slides.yml names {', '.join(unknown)}, expected chapters and discussions of the book")
    sources = {slug: (Chapter(book, pages[slug]), text(book, pages[slug])) for slug in used}
    return [[Slide(entry, *sources[entry["chapter"]]) for entry in talk["slides"]] for talk in plan]


def text(book: Book, page: str) -> str:
    """The text of a page, without code: a chapter as in its notebook, another page without the links to its claims."""
    if page not in book.chapters:
        return re.sub(r"\s*\(\{claim\}[^)]*\)", "", book.texts[page])
    return "\n\n".join(cell.source for cell in notebook(book, page).cells if cell.cell_type == "markdown")


def short(number: str) -> str:
    """The numbers of a claim with three digits, since nobody reads more on a slide."""
    return re.sub(r"\d+\.\d+(?:e[+-]\d+)?", lambda found: f"{float(found[0]):.3g}", number)


def inline(text: str) -> str:
    """A sentence as HTML, with its formulas as MathJax reads them."""
    return MARKDOWN.renderInline(text)


def picture(outputs: NotebookNode, name: str) -> str:
    """A figure of an executed chapter, within the page; nothing without a name."""
    for cell in outputs.cells if name else []:
        options = cell.metadata.get("mystnb", {})
        if options.get("figure", {}).get("name") == name:
            data = base64.b64encode(dict(pictures(outputs))[name]).decode()
            alt = html.escape(options["image"]["alt"])
            return f'<figure><img src="data:image/png;base64,{data}" alt="{alt}"></figure>'
    return ""


def lecture(title: str, deck: list[Slide], outputs: dict[str, NotebookNode], loaded: list[str]) -> str:
    """The page of one lecture; ``loaded`` are the addresses of the files of :data:`LOADED`."""
    book = deck[0].chapter.book
    sections = [f'<section class="opening"><h1>{title}</h1><p>From the book <em>{book.title}</em></p></section>']
    begun: set[str] = set()
    for slide in deck:
        sections.append(slide.section(outputs.get(slide.chapter.slug, NotebookNode(cells=[])), slide.name not in begun))
        begun.add(slide.name)
    names = dict(zip(("reset", "style", "reveal", "notes", "mathjax"), loaded, strict=True))
    return Template(PAGE.read_text(encoding="utf-8")).substitute(names, title=title, sections="\n".join(sections))


def main() -> None:
    """Write the lectures; stop if one names what its chapters do not have."""
    book = Book.load(ROOT)
    plan = yaml.safe_load(PLAN.read_text(encoding="utf-8"))
    talks = decks(book, plan)
    if found := [mistake for deck in talks for slide in deck for mistake in slide.mistakes()]:
        sys.exit("book/slides.yml: " + "\nbook/slides.yml: ".join(found))
    cache, used = open_cache(), {slide.chapter.slug for deck in talks for slide in deck}
    outputs = {path.stem: executed(cache, path) for path in chapters() if path.stem in used}
    SLIDES.mkdir(parents=True, exist_ok=True)
    for path in filter(Path.is_file, LOADED):
        shutil.copy(path, SLIDES)
    loaded = [path.name if path.is_file() else address for path, address in LOADED.items()]
    for talk, deck in zip(plan, talks, strict=True):
        page = lecture(talk["title"], deck, outputs, loaded)
        (SLIDES / f"{talk['name']}.html").write_text(page, encoding="utf-8")
        print(f"{len(deck) + 1} slides are in {(SLIDES / talk['name']).relative_to(ROOT)}.html")


if __name__ == "__main__":
    main()
