"""Packs the built book, with MathJax inside, into a zip file that is read without a network and without a server."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build/html"
TARGET = ROOT / "_build/in-context-learning-in-closed-form.zip"


def pack(folder: Path, target: Path) -> None:
    """Zip the files of a folder, without hidden ones; the same files always give the same bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    with ZipFile(target, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for path in files:
            name = Path(target.stem, path.relative_to(folder)).as_posix()
            entry = ZipInfo(name)  # dated 1980, whenever it is written
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, path.read_bytes(), ZIP_DEFLATED)


def main() -> None:
    """Pack the book and say where it is and what it weighs."""
    if not (HTML / "_static/mathjax").is_dir():
        sys.exit("The book was built without MathJax, which npm fetches, so its formulas would need a network.")
    pack(HTML, TARGET)
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
