"""The slides: they name only what the chapters have, fit on a screen, and come out as a complete page."""

from __future__ import annotations

import base64
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import lowering  # noqa: E402
import slides  # noqa: E402

from icl_lib.chapter import CLAIM_MIMETYPE  # noqa: E402

BOOK = lowering.Book.load(ROOT)
PLAN = yaml.safe_load(slides.PLAN.read_text(encoding="utf-8"))
DECKS = slides.decks(BOOK, PLAN)
LOCAL = [path.name for path in slides.LOADED]


def executed(deck: list[slides.Slide]) -> dict[str, Any]:
    """Chapters as if they had been executed: each figure is one byte, each claim has measured about a half."""
    outputs = {slide.chapter.slug: nbformat.v4.new_notebook() for slide in deck}
    for slide in deck:
        options = [cell.metadata.get("mystnb", {}) for cell in slide.chapter.code]
        found = [one for one in options if slide.figure and one.get("figure", {}).get("name") == slide.figure]
        row = {
            "id": slide.entry.get("claim"),
            "statement": "It holds.",
            "measured": "0.51234 ± 0.0011",
            "criterion": "≤ 1",
        }
        data = {"image/png": base64.b64encode(b"x").decode(), CLAIM_MIMETYPE: [row] if row["id"] else []}
        cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
        cell.metadata.update({"mystnb": found[0]} if found else {})
        outputs[slide.chapter.slug].cells.append(cell)
    return outputs


def test_slides_name_only_what_the_chapters_have_and_say_little() -> None:
    assert [talk["name"] for talk in PLAN] == ["lecture-1", "lecture-2"]
    assert [mistake for deck in DECKS for slide in deck for mistake in slide.mistakes()] == []
    assert all(slide.says for deck in DECKS for slide in deck)
    assert all(deck[-1].title == "What did not hold" and "discussion" in deck[-1].chapter.page for deck in DECKS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"figure": "fig-none"}, "width-and-ridge has no figure fig-none"),
        ({"figure": "fig-ht-gap"}, "width-and-ridge has no figure fig-ht-gap"),
        ({"figure": "", "equation": ["eq-wr-peak", "eq-none"]}, "width-and-ridge has no equation eq-none"),
        ({"says": ["The cure is worse than the peak."]}, "width-and-ridge does not say: The cure is worse"),
        ({"claim": "HT3"}, "width-and-ridge does not claim HT3"),
        ({"equation": "eq-wr-peak"}, "width-and-ridge: fig-wr-picture and eq-wr-peak share a slide"),
        ({"title": "A word " * 20 + "more"}, "words on a slide, at most 40: A word"),
    ],
)
def test_a_wrong_slide_is_noticed(change: dict[str, Any], message: str) -> None:
    slide = next(slide for slide in DECKS[0] if slide.figure == "fig-wr-picture")
    assert list(slide.mistakes()) == []
    found = list(replace(slide, entry=slide.entry | change).mistakes())
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("long", "expected"),
    [
        ("1.89128", "1.89"),
        ("≤ 5.335", "≤ 5.33"),
        ("= 0 ± 0.062", "= 0 ± 0.062"),
        ("1.23456e-05 ± 4e-08", "1.23e-05 ± 4e-08"),
    ],
)
def test_numbers_of_a_claim_are_short(long: str, expected: str) -> None:
    assert slides.short(long) == expected


def test_a_chapter_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="names nowhere, expected chapters and discussions"):
        slides.decks(BOOK, [{"slides": [{"chapter": "nowhere"}]}])


@pytest.mark.parametrize("deck", DECKS, ids=["lecture-1", "lecture-2"])
def test_a_lecture_is_a_complete_page(deck: list[slides.Slide]) -> None:
    page = slides.lecture("Title", deck, executed(deck), LOCAL)
    sections = page.split("<section")[1:]
    assert len(sections) == len(deck) + 1 and "<h1>Title</h1>" in sections[0]
    assert set(LOCAL) <= set(re.findall(r'(?:src|href)="([^"]+)"', page)) and "https://" not in page.split("<script")[1]
    for slide, section in zip(deck, sections[1:], strict=True):
        shown = section.split("<footer>")[0]
        alts = re.findall(r'<img src="data:image/png;base64,eA==" alt="([^"]+)">', shown)
        assert len(alts) == bool(slide.figure) and all(len(alt) >= 40 for alt in alts)
        assert len(re.findall(r"\\tag\{\d+\}", shown)) == len(slide.equations)
        assert shown.count("It holds.: 0.512 ± 0.0011, required ≤ 1") == ("claim" in slide.entry)
        assert "$" not in shown and "{eq}" not in section and "{doc}" not in section
        assert f'href="../html/{slide.chapter.page}.html' in section
    begun = [slide.chapter.slug for slide in deck]
    told = {slide.chapter.slug for slide in deck if slide.chapter.page in BOOK.chapters}
    for slug in told:
        assert "By the end you will have shown" in sections[begun.index(slug) + 1]
    assert page.count("By the end you will have shown") == len(told)


def test_the_command_writes_both_lectures_and_what_they_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.js").write_text("1")
    files = dict.fromkeys([tmp_path / f"{name}.js" for name in ("there", "b", "c", "d", "e")], "https://example.org/x")
    outputs = executed([slide for deck in DECKS for slide in deck])
    for name, value in {"ROOT": tmp_path, "SLIDES": tmp_path / "slides", "LOADED": files}.items():
        monkeypatch.setattr(slides, name, value)
    monkeypatch.setattr(slides, "decks", lambda book, plan: DECKS)
    monkeypatch.setattr(slides.Book, "load", lambda root: BOOK)
    monkeypatch.setattr(slides, "open_cache", lambda: None)
    monkeypatch.setattr(slides, "executed", lambda cache, path: outputs[path.stem])
    slides.main()
    assert {path.name for path in (tmp_path / "slides").iterdir()} == {"lecture-1.html", "lecture-2.html", "there.js"}
    page = (tmp_path / "slides/lecture-2.html").read_text(encoding="utf-8")
    assert 'href="there.js"' in page and page.count("https://example.org/x") == 4
