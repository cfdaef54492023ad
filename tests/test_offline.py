"""The offline edition holds all that is not hidden, in one folder; the same files always give the same bytes."""

import os
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

from offline import pack  # noqa: E402


def test_the_zip_file_holds_the_book_and_can_be_made_again(tmp_path: Path) -> None:
    files = {"index.html": "<p>é</p>", "notebooks/b.html": "b", "_static/a.js": "a" * 10_000}
    for name, text in {**files, ".buildinfo": "hidden"}.items():
        (tmp_path / "html" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "html" / name).write_text(text, encoding="utf-8")
    first, second = tmp_path / "book.zip", tmp_path / "later" / "book.zip"
    second.parent.mkdir()
    pack(tmp_path / "html", first)
    os.utime(tmp_path / "html/index.html", (10**9, 10**9))
    os.chmod(tmp_path / "html/notebooks/b.html", 0o600)
    pack(tmp_path / "html", second)
    assert first.read_bytes() == second.read_bytes()
    with ZipFile(first) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(f"book/{name}" for name in files)
        assert {name: archive.read(f"book/{name}").decode() for name in files} == files
    assert first.stat().st_size < 2000  # compressed
