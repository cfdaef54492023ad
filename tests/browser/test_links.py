"""Every link of the built book that stays in the book leads to a file that is there, and to a place in it."""

import functools
import posixpath
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from conftest import HTML


class Reader(HTMLParser):
    """Collects the identifiers and the addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" or (name == "name" and tag == "a"):
                self.places.append(value or "")
            elif name in {"href", "src", "data-src"} and value:
                self.addresses.add(value)


@functools.cache
def read(path: Path) -> Reader:
    """Identifiers and addresses of a page."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def problem(path: Path, address: str) -> str | None:
    """Why an address that stays in the book leads nowhere, or None."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    target = HTML / posixpath.normpath(posixpath.join(path.relative_to(HTML).parent, unquote(parts.path)))
    target = target if parts.path else path
    if not target.is_file():
        return f"{address}: no such file"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).places:
        return f"{address}: no such place"
    return None


def test_links_of_the_page_resolve(page_name: str) -> None:
    path = HTML / f"{page_name}.html"
    addresses = read(path).addresses
    assert len(addresses) > 20
    lost = [found for address in sorted(addresses) if (found := problem(path, address))]
    assert not lost, f"{page_name}.html links to " + "\n".join(lost)


def test_identifiers_of_the_page_are_unique(page_name: str) -> None:
    places = read(HTML / f"{page_name}.html").places
    theirs = {"search-input"}  # of the theme: once on the search page, once in the box that Ctrl+K opens
    repeated = [place for place, times in Counter(places).items() if times > 1 and place not in theirs]
    assert not repeated, f"{page_name}.html repeats {repeated}"


def test_the_front_door_leads_to_the_book() -> None:
    page = (HTML / "index.html").read_text()
    assert "url=book/index.html" in page and (HTML / "book/index.html").is_file()
