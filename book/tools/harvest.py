"""Write what prose pages show of the chapters: their claims, the papers behind them, their costs, and one figure."""

from __future__ import annotations

import base64
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import costs
from execute import ROOT, chapters, open_cache, parts, read
from jupyter_cache.base import JupyterCacheAbstract
from ledger import Ledger, counts
from lowering import Book
from map import Map
from nbformat import NotebookNode

from icl_lib.chapter import CLAIM_MIMETYPE

ROWS, COUNT = ROOT / "book" / "ledger-rows.md", ROOT / "book" / "ledger-count-rows.md"
MAP = ROOT / "book" / "map-rows.md"
COSTS = ROOT / "book" / "costs-rows.md"
PICTURE, PICTURE_NAME = ROOT / "book" / "welcome.png", "fig-pe-picture"


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


def write(path: Path, content: bytes) -> None:
    """Write a file, but leave it alone if it has this content, so that its page is not built again."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def main() -> None:
    """Write the rows and the picture, or stop with a message if one is missing or two claims share a name."""
    cache = open_cache()
    notebooks = [executed(cache, chapter) for chapter in chapters()]
    rows = [row for notebook in notebooks for row in claims(notebook)]
    repeated = [name for name, times in Counter(row["id"] for row in rows).items() if times > 1]
    if not rows or repeated:
        sys.exit(f"claims with the same name: {', '.join(repeated)}" if repeated else "no chapter asserts a claim")
    book = Book.load(ROOT)
    write(ROWS, Ledger.read(ROOT, book, [row["test"] for row in rows]).page(rows, parts()).encode())
    write(COUNT, f"{counts(rows)}\n".encode())
    write(MAP, Map(ROOT, book).page().encode())
    print(f"{len(rows)} claims written to {ROWS.relative_to(ROOT)}")
    figures = dict(picture for notebook in notebooks for picture in pictures(notebook))
    if PICTURE_NAME not in figures:
        sys.exit(f"no chapter draws the welcome page's figure, {PICTURE_NAME}")
    write(PICTURE, figures[PICTURE_NAME])
    titles = {chapter.stem: title(notebook) for chapter, notebook in zip(chapters(), notebooks, strict=True)}
    write(COSTS, costs.page(titles).encode())


if __name__ == "__main__":
    main()
