"""Links that nobody types: from names of the library, terms, figures and the sources of docstrings to their places."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

SOURCE = re.compile(r"Source: \[(?P<text>.*)\]")
# What a source names: a page of the book by its title, a paper by author and year or by its short key.
MENTION = re.compile(
    r'this book, "?(?P<title>[^";]+)"?'
    r"|(?P<author>(?:von )?[A-Z]\w+)(?: et al\.| (?:&|and) [A-Z]\w+)? (?P<year>\d{4})\b"
    r"|\b(?P<key>[A-Za-z]{2,3}\d\d[ab]?)\b"
)
# In highlighted code: a name, perhaps with its module before it, that is not a keyword argument; and what is imported.
NAME = re.compile(
    r'(?:<span class="n">(\w+)</span><span class="o">\.</span>)?<span class="n">(\w+)</span>(?!<span class="o">=<)'
)
IMPORT = re.compile(r'<span class="nn">icl_lib\.(\w+)</span> <span class="kn">import</span> (.*)')


@cache
def papers(book: Path) -> dict[str, str]:
    """Entries of the bibliography by the author and the year that their keys begin with, and by short keys."""
    keys = re.findall(r"^@\w+\{(([a-z]+\d{4})\w+),", (book / "references.bib").read_text(encoding="utf-8"), re.M)
    short = re.findall(r"^\| (\w+) \| \{cite:t\}`(\w+)` \|", (book / "citing.md").read_text(encoding="utf-8"), re.M)
    return {start: key for key, start in keys} | dict(short)


@cache
def pages(book: Path) -> dict[str, str]:
    """Pages of the book by their titles, and by their file names in words, all in lower case and without hyphens."""
    found: dict[str, str] = {}
    for path in [*book.glob("*.md"), *book.parent.glob("notebooks/*.md")]:
        heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        names = [path.stem.replace("-", " "), heading[1].lower().replace("-", " ") if heading else ""]
        found |= dict.fromkeys(names, f"/{path.relative_to(book.parent).with_suffix('').as_posix()}")
    return found


def linked(mention: re.Match[str], book: Path) -> str:
    """A mention as a link, in reStructuredText; as it is if there is nothing of that name."""
    if title := mention["title"]:
        page = pages(book).get(title.lower().replace("-", " "))
        return f":doc:`{mention[0]} <{page}>`" if page else mention[0]
    author = unicodedata.normalize("NFKD", mention["author"] or "").encode("ascii", "ignore").decode()
    key = papers(book).get(mention["key"] or author.lower().replace(" ", "") + mention["year"])
    return f":cite:t:`{key}`" if key else mention[0]


def prepare(app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]) -> None:
    """Ready a docstring for napoleon: what is returned has no type before a colon; the source is small, with links."""
    if what == "data":
        lines.clear()  # they describe the type, a tuple say
    for number, line in enumerate(lines):
        if line == "Returns:":
            lines[number + 1] = f"    : {lines[number + 1].strip()}"
        elif match := SOURCE.fullmatch(line):
            text = MENTION.sub(lambda mention: linked(mention, Path(app.srcdir) / "book"), match["text"])
            lines[number:] = [".. rst-class:: icl-source", "", f"   Source: {text}", *lines[number + 1 :]]
            return


def find_name(app: Sphinx, env: object, node: nodes.Element, text: nodes.Element) -> nodes.Element | None:
    """What a docstring means by a name that its own module does not define: the public name of another."""
    objects = app.env.get_domain("py").data["objects"]
    found = [place for name, place in objects.items() if name.split(".")[-1] == node["reftarget"]]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    return make_refnode(app.builder, node["refdoc"], found[0].docname, found[0].node_id, text)


def entry(app: Sphinx, page: str, name: str) -> str:
    """Address of a name's entry in the reference as seen from a page; empty for what is no public name."""
    if found := app.env.get_domain("py").data["objects"].get(f"icl_lib.{name}"):
        return f"{app.builder.get_relative_uri(page, found.docname)}#{found.node_id}"
    return ""


def link_names(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Lead from a name in the text, ``module.name``, to its entry in the reference."""
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext().removeprefix("icl_lib.").split("(")[0]
        address = entry(app, page, name)
        if address and not isinstance(code.parent, nodes.reference):
            code.replace_self(nodes.reference("", "", code.deepcopy(), refuri=address, internal=True))


def link_code(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """The same from the code cells of a chapter."""
    body = context.get("body", "")
    modules = {name: module for module, names in IMPORT.findall(body) for name in re.findall(r">(\w+)<", names)}

    def link(match: re.Match[str]) -> str:
        address = entry(app, page, f"{match[1] or modules.get(match[2])}.{match[2]}")
        return f'<a class="reference internal icl-name" href="{address}">{match[0]}</a>' if address else match[0]

    if page.startswith("notebooks/"):
        context["body"] = NAME.sub(link, body)


def link_terms(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Lead from the first mention of a term in a chapter to the glossary, unless the chapter defines it, in bold."""
    places = app.env.get_domain("std").data.get("terms", {})
    if not places or not page.startswith("notebooks/"):
        return
    done = {places.get(strong.astext().lower()) for strong in doctree.findall(nodes.strong)}
    words = "|".join(re.escape(term) for term in sorted(places, key=len, reverse=True))
    pattern = re.compile(rf"\b({words})s?\b", re.IGNORECASE)
    for text in [text for text in doctree.findall(nodes.Text) if isinstance(text.parent, nodes.paragraph)]:
        parts: list[nodes.Node] = []
        end = 0
        for match in pattern.finditer(text):
            place = places[match[1].lower()]
            if place in done:
                continue
            done.add(place)
            word = nodes.inline("", match[0], classes=["icl-term"])
            parts += [nodes.Text(text[end : match.start()]), make_refnode(app.builder, page, place[0], place[1], word)]
            end = match.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def number_figures(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Let a reference to a figure in words say its number, too."""
    labels = app.env.get_domain("std").data["labels"]
    for link in doctree.findall(nodes.reference):
        name = link.get("refid") or link.get("refuri", "").partition("#")[2]
        if name.startswith("fig-") and name in labels:
            numbers = app.env.toc_fignumbers[labels[name][0]]["figure"][labels[name][1]]
            link += nodes.Text(f" (Fig. {'.'.join(map(str, numbers))})")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the functions above to Sphinx's events."""
    app.connect("autodoc-process-docstring", prepare, priority=100)
    app.connect("missing-reference", find_name)
    app.connect("doctree-resolved", number_figures)
    app.connect("doctree-resolved", link_names)
    app.connect("doctree-resolved", link_terms)
    app.connect("html-page-context", link_code, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
