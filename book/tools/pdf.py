"""Prints the whole book into one PDF: a title page, contents with page numbers, every page in order, working links."""

from __future__ import annotations

import io
import json
import posixpath
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import chromium
import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Browser, Page, sync_playwright
from pypdf import PdfReader, PdfWriter

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "_build"
TARGET = BUILD / "in-context-learning-in-closed-form.pdf"
PAPER = Path(__file__).with_suffix(".css")
WIDTH = 658  # pixels: the width of the text, 174 mm, that pdf.css leaves

NOTE = """Whatever is folded on the screen, solutions too, is open here. Only the cell that installs the library, the
same in every chapter, is left out."""
ON_SCREEN = ".headerlink, .tag_setup, script, button, summary"
# Formulas too wide for the paper become smaller.
FIT = """() => document.querySelectorAll("mjx-container").forEach((formula) => {
  const room = formula.closest("p, li, td, div, figcaption").clientWidth;
  const width = formula.querySelector("mjx-math").getBoundingClientRect().width;
  if (width > room) formula.style.fontSize = `${(parseFloat(formula.style.fontSize) * room) / width}%`;
})"""
NUMBER = """numbers => document.querySelectorAll("[data-place]").forEach((entry) => {
  entry.textContent = numbers[entry.dataset.place];
})"""

Parts = list[tuple[str, list[str]]]


class Item(NamedTuple):
    """A line of the outline: a part is of level 1, a page of level 2, a section of level 3."""

    level: int
    title: str
    place: str


def contents() -> Parts:
    """The captions of the parts and their pages, in order; the first page is a part of its own, without a caption."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = [(part["caption"], list(files(part["chapters"]))) for part in toc["parts"]]
    return [("", [toc["root"]]), *parts]


def files(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The pages of a table of contents, each followed by those below it."""
    for entry in entries:
        yield entry["file"]
        yield from files(entry.get("sections", []))


def place(page: str, identifier: str = "") -> str:
    """The identifier that a page, or an element of it, has in the whole book."""
    return re.sub(r"[^\w-]", "-", f"{page}--{identifier}")


def address(page: str, link: str, book: set[str]) -> str | None:
    """Where a link of a page leads in the whole book; None if it leads to a file that is not on paper."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return link
    target = beside(page, parts.path).removesuffix(".html") if parts.path else page
    return f"#{place(target, parts.fragment)}" if target in book else None


def beside(page: str, path: str) -> str:
    """A path that a page names, as seen from the folder of the built book."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def read(page: str) -> BeautifulSoup:
    """A page of the built book."""
    return BeautifulSoup((BUILD / "html" / f"{page}.html").read_text(encoding="utf-8"), "html.parser")


def article(page: str, book: set[str]) -> Tag:
    """The text of a page made ready for paper: unfolded, its headings one level lower, its links within the book."""
    text = read(page).select_one("article")
    assert text is not None, f"{page} has no text"
    for element in text.select(ON_SCREEN):
        element.decompose()
    for fold in text.select("details"):
        fold.unwrap()
    for level in (5, 4, 3, 2, 1):
        for heading in text.select(f"h{level}"):
            heading.name = f"h{level + 1}"
    for element in text.select("[id]"):
        element["id"] = place(page, str(element["id"]))
    for image in text.select("img"):
        image["src"] = f"html/{beside(page, str(image['src']))}"
    for link in text.select("a[href]"):
        if target := address(page, str(link["href"]), book):
            link["href"] = target
        else:
            link.unwrap()
    text["id"] = place(page)
    return text


def items(text: Tag) -> list[Item]:
    """The outline of a page that was made ready for paper."""
    (top, *_), sections = text.select("h2"), text.select("section[id] > h3")
    below = [(section, section.parent) for section in sections]
    return [
        Item(2, top.get_text().strip(), str(text["id"])),
        *(Item(3, section.get_text().strip(), str(parent["id"])) for section, parent in below if parent),
    ]


def head(page: str) -> str:
    """The styles of the book, and MathJax, as a page loads them."""
    kept = read(page).select("link[rel=stylesheet], script[src*=mathjax], script:-soup-contains('MathJax =')")
    for element in kept:
        for name in {"href", "src"} & set(element.attrs):
            path = str(element[name]).split("?")[0]
            element[name] = path if urlsplit(path).scheme else f"html/{beside(page, path)}"
    return "".join(map(str, kept))


def line(item: Item) -> str:
    """A line of the contents; sections are hidden, but a PDF knows only of places to which a link leads."""
    text = f'<span>{escape(item.title)}</span><i data-place="{item.place}"></i>'
    return f'<a class="level-{item.level}" href="#{item.place}">{text}</a>'


def compose(parts: Parts) -> tuple[str, list[Item]]:
    """The whole book as one page of HTML, which belongs into the folder above that of the built book; its outline."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    book = {page for _, pages in parts for page in pages}
    outline: list[Item] = []
    styles, texts = [PAPER.read_text()], []
    for caption, pages in parts:
        for page in pages:
            text = article(page, book)
            if caption and page == pages[0]:
                outline.append(Item(1, caption, place(caption)))
                text.insert(0, BeautifulSoup(f'<h1 id="{place(caption)}">{caption}</h1>', "html.parser"))
            outline += items(text)
            texts.append(str(text))
            running = json.dumps(text.select("h2")[0].get_text().strip(), ensure_ascii=False)
            styles.append(f"@page {place(page)} {{ @top-center {{ content: {running}; }} }}")
            styles.append(f"#{place(page)} {{ page: {place(page)}; }}")
    front = [config["title"], config["author"], f"Version {version}", f"{NOTE} {config['html']['extra_footer']}"]
    whole = f"""<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">
<title>{config["title"]}</title>{head(parts[0][1][0])}<style>{"".join(styles)}</style></head>
<body class="bd-content"><div class="icl-title">{"".join(f"<p>{text}</p>" for text in front)}</div>
<nav class="icl-toc"><p>Contents</p>{"".join(map(line, outline))}</nav>{"".join(texts)}</body></html>"""
    return whole, outline


def print_out(page: Page) -> PdfReader:
    """Print what a page shows, on the paper that its style asks for."""
    return PdfReader(io.BytesIO(page.pdf(prefer_css_page_size=True, print_background=True)))


def numbers(reader: PdfReader) -> dict[str, int]:
    """The page number of every place to which a link leads."""
    places = {name.removeprefix("/"): goal for name, goal in reader.named_destinations.items()}
    return {name: (reader.get_destination_page_number(goal) or 0) + 1 for name, goal in places.items()}


def lay_out(browser: Browser, whole: str) -> Page:
    """Show the whole book as it will be on paper, its formulas typeset and made to fit."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".html", dir=BUILD) as file:
        file.write(whole)
        file.flush()
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(0)  # a whole book takes its time
        page.emulate_media(media="print")
        page.goto(Path(file.name).as_uri())
        page.evaluate("async () => { await MathJax.startup.promise; await document.fonts.ready; }")
    page.evaluate(FIT)
    return page


def bind(browser: Browser, parts: Parts, target: Path) -> int:
    """Print the pages of the parts into one PDF, twice: only after the first time are the page numbers known."""
    whole, outline = compose(parts)
    page = lay_out(browser, whole)
    page.evaluate(NUMBER, numbers(print_out(page)))
    reader = print_out(page)
    page.close()
    writer, found = PdfWriter(clone_from=reader), numbers(reader)
    above: dict[int, Any] = {}
    for item in outline:
        parent = above.get(item.level - 1)
        page_number = found[item.place] - 1
        above[item.level] = writer.add_outline_item(
            title=item.title, page_number=page_number, parent=parent, is_open=item.level < 2
        )
    writer.page_mode = "/UseOutlines"
    writer.write(target)
    return len(reader.pages)


def main() -> None:
    """Print the book and say where it is, how long it is and how long that took."""
    start = time.perf_counter()
    try:
        with sync_playwright() as playwright:
            length = bind(chromium.launch(playwright), contents(), TARGET)
    except FileNotFoundError as missing:
        sys.exit(str(missing))
    size, seconds = TARGET.stat().st_size / 1e6, time.perf_counter() - start
    print(f"{TARGET.relative_to(ROOT)}: {length} pages, {size:.1f} MB, printed in {seconds:.0f} s")


if __name__ == "__main__":
    main()
