"""The course page: its plans add up, use every exercise once, and know only what the book has."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import course  # noqa: E402
import lowering  # noqa: E402

COURSE = course.Course.load()


def changed(path: tuple[Any, ...], value: Any) -> list[str]:
    """The mistakes of the plan with one entry replaced."""
    plan = copy.deepcopy(COURSE.plan)
    entry = plan
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    return list(course.mistakes(course.Course(COURSE.book, plan)))


def test_the_plans_add_up() -> None:
    assert list(course.mistakes(COURSE)) == []
    assert len(COURSE.plan["weeks"]) == 6 and len(COURSE.plan["workshop"]) == 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("weeks", 0, "sheet", "exercises", 0), "ex-none", "there is no ex-none"),
        (("weeks", 0, "lecture", 0), "fig-none", "there is no fig-none"),
        (("workshop", 0, "sessions", 0, "figures"), ["fig-wr-gram"], "there is no fig-wr-gram"),
        (("weeks", 0, "chapters", 0), "grokking", "do not hold the chapters"),
        (("weeks", 1, "sheet", "exercises", 0), "ex-he-relu", "ex-he-relu is set 2 times"),
        (("weeks", 1, "sheet", "exercises", 0), "ex-he-relu", "ex-pe-tail is set 0 times"),
        (("weeks", 1, "sheet", "exercises", 0), "ex-he-relu", "week 2: ★★ 15 min: two relu neurons is of another week"),
        (("weeks", 2, "lecture", 0), "fig-gs-gain", "week 3: the lecture does not show one figure of each chapter"),
        (("weeks", 3, "class", 0, "minutes"), 21, "week 4: the class takes 91 minutes, not 90"),
        (("weeks", 4, "sheet", "minutes"), 160, "sheet 5 takes 140 minutes, not 160"),
        (("minutes", "open"), 10, "week 1: the class takes 85 minutes, not 90"),
        (("minutes", "sheet"), 150, "sheet 6 takes more than 150 minutes"),
        (("workshop", 1, "to"), "17:00", "day 2 does not end at 17:00"),
        (("workshop", 0, "sessions", 2, "minutes"), 15, "exercises of a session take longer than its 15 minutes"),
    ],
)
def test_a_wrong_plan_is_noticed(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert any(message in mistake for mistake in changed(path, value))


def test_the_page_holds_every_chapter_exercise_and_goal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course.Course, "load", lambda: COURSE)
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "ROWS", tmp_path / "rows.md")
    course.main()
    text = (tmp_path / "rows.md").read_text(encoding="utf-8")
    sheets = text[text.index("## Problem sheets") :]
    for label, place in COURSE.places("exercise").items():
        assert f"`{place.title.split(': ', 1)[1]} <{label}>` ({place.title.split()[1]}\xa0min)" in text
    for page in COURSE.book.chapters:
        assert f"**{{doc}}`../{page}`**" in sheets
    for total, listed in zip(re.findall(r"Together (\d+) minutes", sheets), sheets.split("(sheet-")[1:], strict=True):
        assert sum(map(int, re.findall(r"\((\d+)\xa0min\)", listed))) == int(total)
    assert "to **derive** the population loss of the reduced predictor" in sheets


def test_the_written_part_knows_the_exercises_and_the_weeks_of_the_talks() -> None:
    text = " ".join((ROOT / "book/course.md").read_text(encoding="utf-8").split())
    assert set(re.findall(r"\{ref\}`[^`<]+ <([^>]+)>`", text)) <= COURSE.places("exercise").keys()
    week = {slug: number for number, one in enumerate(COURSE.plan["weeks"], 1) for slug in one["chapters"]}
    for talk in yaml.safe_load((ROOT / "book/slides.yml").read_text(encoding="utf-8")):
        weeks = sorted(week[slide["chapter"]] for slide in talk["slides"] if slide["chapter"] in week)
        assert f"*{talk['title']}*, for weeks {weeks[0]} to {weeks[-1]}" in text


def test_a_wrong_plan_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = copy.deepcopy(COURSE.plan)
    plan["workshop"][0]["to"] = "12:00"
    monkeypatch.setattr(course.Course, "load", lambda: course.Course(COURSE.book, plan))
    with pytest.raises(SystemExit, match="day 1 does not end at 12:00"):
        course.main()


def test_links_of_goals_lead_to_the_chapters() -> None:
    texts = {"notebooks/x": "# X\n\n## What you will learn\n\n- {doc}`y`, {doc}`z <y>`, {doc}`../book/n`\n\n## Next\n"}
    book = lowering.Book("", lowering.Repository(), texts, {}, [], {})
    found = course.goals(book, "notebooks/x")
    assert found == "- {doc}`../notebooks/y`, {doc}`z <../notebooks/y>`, {doc}`../book/n`"
    with pytest.raises(ValueError, match="notebooks/x has no section"):
        course.goals(lowering.Book("", book.repository, {"notebooks/x": "# X\n"}, {}, [], {}), "notebooks/x")
