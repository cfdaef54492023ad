"""The claims ledger: its rows and counts, the works that sources name, the functions that tests use, its colours."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import ledger  # noqa: E402
import sources  # noqa: E402
import uses  # noqa: E402
from lowering import Book, Repository  # noqa: E402

from icl_lib.chapter import VERDICTS  # noqa: E402

URL = "https://github.com/Someone/small-book"


def small_book(url: str = "") -> Book:
    """Two chapters without a text, with this book's bibliography and names of works."""
    texts = {"book/citing": (ROOT / "book/citing.md").read_text()}
    titles = {"notebooks/one": "One effect", "notebooks/two": "Two effects"}
    return Book(
        "Small", Repository(url), texts, titles, [], dict(parse_file(str(ROOT / "book/references.bib")).entries)
    )


def row(name: str = "SB1", **changes: Any) -> dict[str, Any]:
    texts = {"statement": "one plus one", "measured": "2", "criterion": "≤ 3", "source": "[this book]"}
    return {"id": name, **texts, "verdict": "confirmed", "chapter": "one", "scale": "quick"} | {"test": ""} | changes


def cells(url: str = "", functions: dict[str, list[str]] | None = None, **changes: Any) -> dict[str, str]:
    book = small_book(url)
    made = ledger.Ledger(book, sources.Works.read(book), functions or {}).cells(row(**changes))
    return dict(zip(ledger.COLUMNS, made, strict=True))


# --- rows and counts


def test_a_row_links_to_its_cell_its_source_and_its_functions() -> None:
    test = "tests/test_sums.py::test_add"
    made = cells(source="[Lu25, as summarised; this book]", test=test, functions={test: ["sums.add", "sums.Sum.total"]})
    assert made["claim"] == "{claim}`SB1`"
    assert made["functions its test uses"] == "`sums.add`<br>`sums.Sum.total`"
    assert made["test"] == f"`{test}`"
    assert made["measured, and required"] == "2<br>≤ 3"
    assert made["source"] == (
        '\\[<a class="reference internal" href="bibliography.html#cite-lu2025asymptotic"'
        ' title="Lu et al. (2025)">Lu25</a>, as summarised; this book\\]'
    )


def test_a_test_links_to_its_file_once_the_repository_has_an_address() -> None:
    made = cells(url=URL, test="tests/test_sums.py::test_add")
    assert made["test"] == f"[`tests/test_sums.py::test_add`]({URL}/blob/main/tests/test_sums.py)"
    assert cells(url=URL)["test"] == ""


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_has_a_symbol_a_word_and_a_place_in_the_legend(verdict: str) -> None:
    badge = cells(verdict=verdict)["verdict"]
    assert (
        badge
        == f'<span class="icl-verdict" data-verdict="{ledger.slug(verdict)}">{ledger.SYMBOLS[verdict]} {verdict}</span>'
    )
    place = f'id="verdict-{ledger.slug(verdict)}" '  # which the count on the landing page links to
    assert badge.replace("data-", f"{place}data-") in (ROOT / "book/ledger.md").read_text()


def test_the_page_shows_every_claim_once_under_its_part_and_chapter() -> None:
    rows = [row("SB1"), row("SB2", verdict="corrected"), row("SB3", chapter="two", verdict="holds only if")]
    book = small_book()
    page = ledger.Ledger(book, sources.Works.read(book), {}).page(rows, {"First part": ["one"], "Second part": ["two"]})
    places = [page.index(text) for text in ("### First part", "#### One effect", "{claim}`SB2`", "### Second part")]
    assert places == sorted(places)
    assert page.index("#### Two effects") < page.index("{claim}`SB3`")
    assert [page.count(f"{{claim}}`SB{i}`") for i in (1, 2, 3)] == [1, 1, 1]
    assert page.startswith("**3 claims:** ✔ 1 confirmed, ✎ 1 corrected, ◐ 1 hold only if …, ✘ 0 not reproduced, all")


def test_the_counts_link_to_the_filtered_ledger() -> None:
    text = ledger.counts([row("SB1"), row("SB2"), row("SB3", verdict="not reproduced")])
    found = dict(re.findall(r'href="ledger\.html#verdict-([\w-]+)">(.+?)</a>', text))
    assert text.startswith("**3 claims:** ")
    assert found == {
        "confirmed": "✔ 2 confirmed",
        "corrected": "✎ 0 corrected",
        "holds-only-if": "◐ 0 hold only if …",
        "not-reproduced": "✘ 1 not reproduced",
    }


# --- works


def test_short_keys_name_works_of_the_bibliography_and_the_notation_page_agrees() -> None:
    book = small_book()
    names = sources.Works.read(book).names
    assert set(names.values()) <= book.bibliography.keys()
    notation = dict(re.findall(r"\[(\w+)\] \{cite:t\}`(\w+)`", (ROOT / "book/notation.md").read_text()))
    assert {"DD25a", "DD25b", "MT25", "Lu25"} <= notation.keys()
    assert notation.items() <= names.items()


def test_two_works_with_the_same_authors_and_year_have_no_common_name() -> None:
    names = sources.Works.read(small_book()).names
    assert "Demir and Dogan 2025" not in names
    assert names["Bai et al. 2023"] == "bai2023statisticians"


def test_every_work_that_a_source_names_is_in_the_bibliography() -> None:
    """What looks like the name of a work, ``MT25`` or a year, is part of a known name."""
    works = sources.Works.read(small_book())
    chapters = "\n".join(path.read_text() for path in ROOT.glob("notebooks/*.md"))
    found = [*sources.public_sources(ROOT).values(), *re.findall(r'source="([^"]*)"', chapters)]
    assert len(found) > 200
    for source in found:
        left = works.pattern.sub("", source)
        assert not re.search(r"\b[A-Z]\w*\d\d[ab]?\b|\b(?:19|20)\d\d\b", left), source


@pytest.mark.parametrize(
    ("source", "results"),
    [
        ("[MT25, Eq. 14, as summarised]", [("mainali2025exact", "Eq. 14")]),
        ("[MT25, as summarised]; rates: [this book]", [("mainali2025exact", "")]),
        ("this book, notation; power-law spectra as in MT25", [("mainali2025exact", "power-law spectra")]),
        ("[this book; errors of Lu25]", [("lu2025asymptotic", "errors")]),
        ("this book; finite n: Defilippis et al. 2024, ridge", [("defilippis2024dimension", "finite n: ridge")]),
        ("Roy & Vetterli 2007, definition", [("roy2007effective", "definition")]),
        ("Olver et al. 2010, Table 18.9.1", [("olver2010nist", "Table 18.9.1")]),
        ("[DD25a, DD25b, as summarised]", [("demir2025random", ""), ("demir2025mixing", "")]),
        (
            "Ahn et al. 2023 and Mahankali et al. 2023, one layer; any C: this book",
            [("ahn2023transformers", "one layer"), ("mahankali2023one", "one layer")],
        ),
        ("[this book]", []),
    ],
)
def test_what_a_source_takes_from_which_work(source: str, results: list[tuple[str, str]]) -> None:
    assert list(sources.Works.read(small_book()).results(source)) == results


# --- the library and the tests


LIBRARY = '''
__all__ = ["LIMIT", "Sum", "add"]
LIMIT = 3


def add(a, b):
    """Add.

    Source: [Lu25, sums]
    """


def hidden(a):
    """Source: [Lu25, nothing]"""


class Sum:
    """A sum.

    Source: [this book]
    """

    def total(self):
        """The total.

        Source: [Lu25, totals]
        """

    def plain(self): ...

    def _own(self):
        """Source: [Lu25, own]"""
'''
TESTS = """
import pytest
from icl_lib import plotting, sums as s
from icl_lib.sums import Sum, LIMIT

SUM = Sum()

def helper():
    return s.add(1, 2)

@pytest.fixture
def fixture():
    return Sum()

def test_direct(): assert s.add(1, 1) == 2
def test_helper(): assert helper()
def test_fixture(fixture): assert fixture.total()
def test_constant(): assert SUM.plain()
def test_attribute_of_something_else(): assert helper().total()
def test_service(): assert plotting.theory(LIMIT)
class TestGroup:
    def test_inside(self):
        import icl_lib
        assert icl_lib.sums.add(1, 1)
"""


@pytest.fixture
def small_root(tmp_path: Path) -> Path:
    for folder, name, text in (("icl_lib", "sums.py", LIBRARY), ("tests", "test_sums.py", TESTS)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return tmp_path


def test_public_sources(small_root: Path) -> None:
    assert sources.public_sources(small_root) == {
        "sums.add": "Lu25, sums",
        "sums.Sum": "this book",
        "sums.Sum.total": "Lu25, totals",
    }


@pytest.mark.parametrize(
    ("test", "functions"),
    [
        ("test_direct", ["sums.add"]),
        ("test_helper", ["sums.add"]),
        ("test_fixture", ["sums.Sum.total"]),
        ("test_constant", ["sums.Sum"]),
        ("test_attribute_of_something_else", ["sums.add"]),
        ("test_service", []),
        ("TestGroup::test_inside", ["sums.add"]),
        ("test_missing", []),
    ],
)
def test_functions_of_a_test(small_root: Path, test: str, functions: list[str]) -> None:
    public = [*sources.public_sources(small_root), "plotting.theory"]
    assert uses.functions(small_root, f"tests/test_sums.py::{test}", public) == functions


def test_a_name_that_a_second_module_offers_counts_for_its_own(small_root: Path) -> None:
    (small_root / "tests/test_more.py").write_text("from icl_lib.more import add\ndef test_it(): add(1, 2)\n")
    assert uses.functions(small_root, "tests/test_more.py::test_it", ["sums.add"]) == ["sums.add"]


def test_formulas_come_first_and_common_helpers_last(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    start = "from icl_lib import asymptotics, models, tasks\n"
    one = "def test_x(): tasks.draw(), models.fit(), asymptotics.error()\ndef test_y(): tasks.draw(), models.fit()\n"
    (tmp_path / "tests/test_one.py").write_text(start + one)
    (tmp_path / "tests/test_two.py").write_text(start + "def test_z(): tasks.draw()\n")
    names = [f"tests/test_{name}" for name in ("one.py::test_x", "one.py::test_y", "two.py::test_z")]
    found = uses.most_specific(tmp_path, names, ["tasks.draw", "models.fit", "asymptotics.error"], most=2)
    assert list(found) == names
    assert list(found.values()) == [["asymptotics.error", "models.fit"], ["models.fit", "tasks.draw"], ["tasks.draw"]]


# --- the page


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("verdict", VERDICTS)
# The lightest and the darkest background of a row of a table, in the theme's two modes.
@pytest.mark.parametrize(
    ("mode", "backgrounds"), [("", ("#ffffff", "#f3f4f5")), ('html[data-theme="dark"] ', ("#121212", "#29313d"))]
)
def test_verdicts_stand_out_from_the_page(verdict: str, mode: str, backgrounds: tuple[str, str]) -> None:
    style = (ROOT / "book/_static/ledger.css").read_text()
    rule = (
        rf'^{re.escape(mode)}\.icl-verdict\[data-verdict="{ledger.slug(verdict)}"\] {{ --icl-verdict: (#\w{{6}}); }}$'
    )
    (colour,) = re.findall(rule, style, re.MULTILINE)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert min(contrast(colour, background) for background in backgrounds) >= 4.5
