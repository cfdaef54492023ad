"""The two other editions: the zip file, opened without a server, and the PDF."""

from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import offline
import pdf
import pytest
from conftest import HTML, LOOK, open_page
from playwright.sync_api import Browser, Page, expect
from pypdf import PdfReader

PAGES = ["book/index", "notebooks/hermite-twin", "book/ledger"]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of the offline edition on the reader's disk."""
    folder = tmp_path_factory.mktemp("offline")
    offline.pack(HTML, folder / "book.zip")
    with ZipFile(folder / "book.zip") as archive:
        archive.extractall(folder)
    return (folder / "book").as_uri()


@pytest.mark.parametrize("name", PAGES)
def test_the_offline_edition_opens_without_a_server(name: str, unpacked: str, reader: Callable[..., Page]) -> None:
    page = reader()
    noise: list[str] = []
    page.on("console", lambda message: noise.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: noise.append(request.url) if not request.url.startswith(unpacked) else None)
    open_page(page, f"{unpacked}/{name}.html")
    assert page.evaluate(LOOK) == noise == []


def test_the_offline_edition_can_be_searched(unpacked: str, reader: Callable[..., Page]) -> None:
    page = reader()
    open_page(page, f"{unpacked}/search.html?q=twin")
    expect(page.locator("#search-results li a[href*='hermite-twin.html']").first).to_be_visible()
    page.locator("#search-results li a[href*='hermite-twin.html']").first.click()
    expect(page.locator("h1").first).to_contain_text("twin")


@pytest.fixture(scope="module")
def parts() -> pdf.Parts:
    """A book of two pages."""
    return [("", ["book/index"]), ("A part", ["notebooks/hermite-twin"])]


def test_nothing_is_cut_off_on_paper(parts: pdf.Parts, browser: Browser) -> None:
    page = pdf.lay_out(browser, pdf.compose(parts)[0])
    assert page.evaluate(LOOK) == []
    assert page.locator(".tag_solution pre").first.is_visible()
    assert page.locator("button, .headerlink, summary").count() == 0
    page.close()


def test_the_pdf_has_contents_an_outline_and_links(parts: pdf.Parts, browser: Browser, tmp_path: Path) -> None:
    length = pdf.bind(browser, parts, tmp_path / "book.pdf")
    reader = PdfReader(tmp_path / "book.pdf")
    texts = [" ".join(page.extract_text().split()) for page in reader.pages]
    chapter = "A random Transformer and its Hermite twin make the same errors"
    assert len(texts) == length > 8
    assert "In-Context Learning in Closed Form" in texts[0]
    start = next(number for number, text in enumerate(texts[2:], 3) if chapter in text and "Claim." in text)
    assert f"{chapter} {start}" in texts[1]
    welcome, part = reader.outline[0], reader.outline[-2]
    assert (welcome["/Title"], part["/Title"]) == ("In-Context Learning in Closed Form", "A part")
    assert reader.get_destination_page_number(part) == start - 1
    inner = [note for page in reader.pages[2:] for note in notes(page) if "/Dest" in note]
    outer = [str(note["/A"]["/URI"]) for page in reader.pages for note in notes(page) if "/URI" in note.get("/A", {})]
    assert len(inner) > 10 and {note["/Dest"] for note in inner} <= set(reader.named_destinations)
    assert not [address for address in outer if not address.startswith(("https://", "http://"))]
    assert "In-Context" in str(reader.metadata and reader.metadata.title)


def notes(page: object) -> list[dict[str, object]]:
    """The links of a page of a PDF."""
    return [note.get_object() for note in page.get("/Annots", [])]  # type: ignore[attr-defined]
