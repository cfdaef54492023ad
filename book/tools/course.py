"""Write the plans of the course page, book/course-rows.md, from book/course.yml and the chapters."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from harvest import write
from lowering import Book, Place

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "book" / "course.yml"
ROWS = ROOT / "book" / "course-rows.md"


@dataclass(frozen=True)
class Course:
    """The plan and the book it is for."""

    book: Book
    plan: dict[str, Any]

    @classmethod
    def load(cls, root: Path = ROOT) -> Course:
        return cls(Book.load(root), yaml.safe_load(PLAN.read_text(encoding="utf-8")))

    def places(self, kind: str) -> dict[str, Place]:
        """What carries a label in the book: exercises, or figures."""
        return {label: place for label, place in self.book.labels if place.kind == kind}

    def exercises(self, part: dict[str, Any]) -> list[Place]:
        return [self.places("exercise")[label] for label in part.get("exercises", ())]

    def minutes(self, part: dict[str, Any]) -> int:
        """The minutes of its exercises: of ``★★ 15 min: half of the error``, 15."""
        return sum(int(place.title.split()[1]) for place in self.exercises(part))

    def problem(self, label: str) -> str:
        """A link to an exercise: ``★★ half of the error (15 min)``."""
        stars, minutes, title = re.fullmatch(r"(★+) (\d+) min: (.*)", self.places("exercise")[label].title).groups()  # type: ignore[union-attr]
        return f"{stars}\xa0{{ref}}`{title} <{label}>` ({minutes}\xa0min)"

    def problems(self, part: dict[str, Any]) -> str:
        return ", ".join(map(self.problem, part.get("exercises", ())))

    def figure(self, label: str) -> str:
        return f"{{ref}}`{self.plan['figures'][label]} <{label}>`"


def mistakes(course: Course) -> Iterator[str]:
    """What does not add up, and what the book does not have."""
    plan, weeks = course.plan, course.plan["weeks"]
    days = [session for day in plan["workshop"] for session in day["sessions"]]
    taught = [part for week in weeks for part in (*week["class"], week["sheet"])]
    known, drawn = course.places("exercise"), course.places("figure")
    labels = [label for part in (*taught, *days) for label in part.get("exercises", ())]
    shown = [label for part in days for label in part.get("figures", ())]
    missing = [label for label in labels if label not in known]
    missing += [label for label in (*plan["figures"], *shown) if label not in drawn]
    missing += [label for week in weeks for label in week["lecture"] if label not in drawn]
    missing += [label for label in shown if label not in plan["figures"]]
    yield from (f"there is no {label}" for label in missing)
    if missing:
        return
    if [f"notebooks/{slug}" for week in weeks for slug in week["chapters"]] != course.book.chapters:
        yield "the weeks do not hold the chapters of the book in their order"
    given = Counter(label for part in taught for label in part.get("exercises", ()))
    yield from (f"{label} is set {given[label]} times" for label in known if given[label] != 1)
    for number, week in enumerate(weeks, 1):
        pages = [f"notebooks/{slug}" for slug in week["chapters"]]
        if [drawn[label].page for label in week["lecture"]] != pages:
            yield f"week {number}: the lecture does not show one figure of each chapter"
        outside = [place for part in (*week["class"], week["sheet"]) for place in course.exercises(part)]
        yield from (f"week {number}: {place.title} is of another week" for place in outside if place.page not in pages)
        total = plan["minutes"]["open"] + sum(part.get("minutes", 0) + course.minutes(part) for part in week["class"])
        if total != plan["minutes"]["class"]:
            yield f"week {number}: the class takes {total} minutes, not {plan['minutes']['class']}"
        if course.minutes(week["sheet"]) != week["sheet"]["minutes"]:
            yield f"sheet {number} takes {course.minutes(week['sheet'])} minutes, not {week['sheet']['minutes']}"
        if week["sheet"]["minutes"] > plan["minutes"]["sheet"]:
            yield f"sheet {number} takes more than {plan['minutes']['sheet']} minutes"
    for number, day in enumerate(plan["workshop"], 1):
        begin, end = (datetime.strptime(day[key], "%H:%M") for key in ("from", "to"))
        if begin + timedelta(minutes=sum(session["minutes"] for session in day["sessions"])) != end:
            yield f"day {number} does not end at {day['to']}"
        for session in day["sessions"]:
            if course.minutes(session) > session["minutes"]:
                yield f"day {number}: the exercises of a session take longer than its {session['minutes']} minutes"


def goals(book: Book, page: str) -> str:
    """The list under "What you will learn" of a chapter, with its links as seen from the folder of the course page."""
    section = re.search(r"^## What you will learn\n+(.*?)\n+## ", book.texts[page], re.MULTILINE | re.DOTALL)
    if not section:
        raise ValueError(f"{page} has no section 'What you will learn'")
    return re.sub(r"(\{doc\}`(?:[^`<]*<)?)(?!\.\./)", r"\1../notebooks/", section[1])


def weeks(course: Course) -> Iterator[str]:
    """Six weeks: the lecture, the class, and the sheet."""
    lecture, lesson = course.plan["minutes"]["lecture"], course.plan["minutes"]["class"]
    for number, week in enumerate(course.plan["weeks"], 1):
        yield f"### Week {number}: {week['title']}\n"
        yield f"**Lecture** ({lecture} minutes), with a figure to explain from each chapter:\n"
        for slug, figure in zip(week["chapters"], week["lecture"], strict=True):
            yield f"- {{doc}}`../notebooks/{slug}`: {course.figure(figure)}"
        yield f"\n**Class** ({lesson} minutes):\n"
        for part in week["class"]:
            words = part.get("do") or f"Exercises: {course.problems(part)}."
            yield f"- {part.get('minutes') or course.minutes(part)} minutes. {words}"
        yield f"- {course.plan['minutes']['open']} minutes. Time to open the notebooks, and to compare answers."
        yield f"\n**Homework**: {{ref}}`sheet {number} <sheet-{number}>` ({week['sheet']['minutes']} minutes).\n"


def days(course: Course) -> Iterator[str]:
    """Two days, as tables with times."""
    yield "A practice is longer than its exercises: time to open a notebook, to turn its knobs, and to ask.\n"
    for number, day in enumerate(course.plan["workshop"], 1):
        yield f"### Day {number}: {day['title']}\n\n| time | what | with |\n|---|---|---|"
        now = datetime.strptime(day["from"], "%H:%M")
        for session in day["sessions"]:
            material = course.problems(session) or ", ".join(map(course.figure, session.get("figures", ())))
            yield f"| {now:%H:%M} | {session['do']} | {material} |"
            now += timedelta(minutes=session["minutes"])
        yield f"| {now:%H:%M} | End | |\n"


def sheets(course: Course) -> Iterator[str]:
    """One problem sheet a week: exercises, and a question without a check."""
    for number, week in enumerate(course.plan["weeks"], 1):
        yield f"(sheet-{number})=\n### Sheet {number}: {week['title']}\n"
        for label in week["sheet"]["exercises"]:
            yield f"1. {course.problem(label)}, in *{course.book.titles[course.places('exercise')[label].page]}*"
        yield f"\nTogether {week['sheet']['minutes']} minutes.\n\n**To discuss.** {week['sheet']['question']}\n"


def rows(course: Course) -> str:
    """The generated part of the course page."""
    parts = {"Six weeks": weeks, "Two days": days, "Problem sheets": sheets}
    lines = [line for name, write in parts.items() for line in (f"## {name}\n", *write(course))]
    lines.append("## Learning goals\n\nIn the words of the chapters.\n")
    lines += [f"**{{doc}}`../{page}`**\n\n{goals(course.book, page)}\n" for page in course.book.chapters]
    return "\n".join(lines)


def main() -> None:
    """Write the rows; stop if the plan is wrong."""
    course = Course.load()
    if found := list(mistakes(course)):
        sys.exit("book/course.yml: " + "\nbook/course.yml: ".join(found))
    write(ROWS, rows(course).encode())
    print(f"The plans of the course are in {ROWS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
