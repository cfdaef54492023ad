"""Write what prose pages show of the chapters: the claims they asserted, their costs, and the welcome page's figure."""

from __future__ import annotations

import base64
import html
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import costs
from execute import ROOT, chapters, open_cache, read
from jupyter_cache.base import JupyterCacheAbstract
from nbformat import NotebookNode

from icl_lib.chapter import CLAIM_MIMETYPE, VERDICTS

ROWS = ROOT / "book" / "ledger-rows.md"
COSTS = ROOT / "book" / "costs-rows.md"
PICTURE, PICTURE_NAME = ROOT / "book" / "welcome.png", "fig-pe-picture"
SYMBOLS = dict(zip(VERDICTS, "✔✎◐✘", strict=True))
COLUMNS = ("claim", "statement", "source", "verdict", "measured", "required", "test")


def claims(notebook: NotebookNode) -> Iterator[dict[str, Any]]:
    """Rows that the cells of an executed chapter recorded, in their order; its last cell hands them over."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if CLAIM_MIMETYPE in output.get("data", {}):
                yield from output["data"][CLAIM_MIMETYPE]


def pictures(notebook: NotebookNode) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of every figure of an executed chapter."""
    for cell in notebook.cells:
        name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
        for output in cell.get("outputs", []) if name else []:
            if "image/png" in output.get("data", {}):
                yield name, base64.b64decode(output["data"]["image/png"])


def executed(cache: JupyterCacheAbstract, chapter: Path) -> NotebookNode:
    """A chapter with the outputs from the cache."""
    return cache.merge_match_into_notebook(read(chapter))[1]


def title(notebook: NotebookNode) -> str:
    """The first heading of a chapter."""
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next(line[2:].strip() for line in lines if line.startswith("# "))


def code(text: str) -> str:
    """Text in code style, or nothing at all."""
    return f"`{text}`" if text else ""


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row, in the order of :data:`COLUMNS`."""
    name = html.escape(row["id"])
    link = f'<a class="reference internal" href="../notebooks/{row["chapter"]}.html#claim-{name}">{name}</a>'
    verdict = f"{SYMBOLS[row['verdict']]} {row['verdict']}"
    source = row["source"].replace("[", r"\[").replace("]", r"\]")
    return link, row["statement"], source, verdict, row["measured"], row["criterion"], code(row["test"])


def table(rows: list[tuple[str, ...]]) -> str:
    """A list table; unlike a pipe table it may contain formulas with vertical bars."""
    lines = ["* - " + "\n  - ".join(" ".join(cell.split()) for cell in row) for row in [COLUMNS, *rows]]
    return "\n".join(["```{list-table}", ":header-rows: 1", ":class: icl-ledger", "", *lines, "```"])


def write(path: Path, content: bytes) -> None:
    """Write a file, but leave it alone if it has this content, so that its page is not built again."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def main() -> None:
    """Write the rows and the picture, or stop with a message if one is missing or two claims share a name."""
    cache = open_cache()
    notebooks = [executed(cache, chapter) for chapter in chapters()]
    found = [(title(notebook), list(claims(notebook))) for notebook in notebooks]
    rows = [row for _, group in found for row in group]
    repeated = [name for name, times in Counter(row["id"] for row in rows).items() if times > 1]
    if not rows or repeated:
        sys.exit(f"claims with the same name: {', '.join(repeated)}" if repeated else "no chapter asserts a claim")
    verdicts = Counter(row["verdict"] for row in rows)
    counts = ", ".join(f"{SYMBOLS[verdict]} {verdicts[verdict]} {verdict}" for verdict in VERDICTS)
    scales = " and ".join(sorted({row["scale"] for row in rows}))
    parts = [f"**{len(rows)} claims, checked at scale `{scales}`:** {counts}."]
    parts += [f"### {heading}\n\n{table([cells(row) for row in group])}" for heading, group in found if group]
    write(ROWS, ("\n\n".join(parts) + "\n").encode())
    print(f"{len(rows)} claims written to {ROWS.relative_to(ROOT)}")
    figures = dict(picture for notebook in notebooks for picture in pictures(notebook))
    if PICTURE_NAME not in figures:
        sys.exit(f"no chapter draws the welcome page's figure, {PICTURE_NAME}")
    write(PICTURE, figures[PICTURE_NAME])
    titles = {chapter.stem: title(notebook) for chapter, notebook in zip(chapters(), notebooks, strict=True)}
    write(COSTS, costs.page(titles).encode())


if __name__ == "__main__":
    main()
