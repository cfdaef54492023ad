"""The reference: an entry for every public name, sources that exist, terms that the chapters use, figures of cost."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml
from PIL import Image

import icl_lib

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK / "ext"))

import crosslinks  # noqa: E402
import house  # noqa: E402

SOURCES = [
    (path.stem, text)
    for path in sorted((ROOT / "icl_lib").glob("*.py"))
    for text in re.findall(r"^ +Source: \[(.*)\]$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
UNNAMED = {"Random Transformers"}  # the part of the book, which has no page of its own
GLOSSARY = (BOOK / "glossary.md").read_text(encoding="utf-8").partition(":sorted:\n")[2]
TERMS = re.findall(r"^(\S.*)\n((?:  .+\n)+)", GLOSSARY, re.MULTILINE)


def test_every_module_has_a_page_in_the_order_of_the_package() -> None:
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    entries = [entry for part in parts for entry in part["chapters"] if entry["file"] == "book/api/index"]
    listed = [Path(section["file"]).name for section in entries[0]["sections"]]
    assert listed == re.findall(r"^:mod:`icl_lib\.(\w+)`", icl_lib.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted(icl_lib.__all__)


@pytest.mark.parametrize("module", icl_lib.__all__)
def test_every_public_name_has_an_entry(module: str) -> None:
    page = (BOOK / "api" / f"{module}.md").read_text(encoding="utf-8")
    assert re.search(rf"^\.\. automodule:: icl_lib\.{module}$", page, re.MULTILINE)
    value = importlib.import_module(f"icl_lib.{module}")
    # Sphinx lists what has a docstring; a constant has none, and is listed by hand.
    constants = {name for name in value.__all__ if not callable(getattr(value, name))}
    assert set(re.findall(r"^\.\. autodata:: (\w+)$", page, re.MULTILINE)) == constants
    assert all(getattr(value, name).__doc__ for name in set(value.__all__) - constants)


def test_every_source_leads_somewhere() -> None:
    assert len(SOURCES) > 100
    for module, source in SOURCES:
        mentions = list(crosslinks.MENTION.finditer(source))
        assert mentions, f"{module}: {source!r} names neither a paper nor a page of the book"
        for mention in mentions:
            assert mention["title"] in UNNAMED or crosslinks.linked(mention, BOOK) != mention[0], (
                f"{module}: {mention[0]}"
            )


def test_links_of_sources() -> None:
    text = (
        'von Oswald et al. 2023, Eq. 3; Raventós et al. 2023; Roy & Vetterli 2007; MT25; any C: this book, "Grokking"'
    )
    links = [crosslinks.linked(mention, BOOK) for mention in crosslinks.MENTION.finditer(text)]
    keys = "vonoswald2023transformers raventos2023pretraining roy2007effective mainali2025exact"
    assert links[:4] == [f":cite:t:`{key}`" for key in keys.split()]
    assert links[4] == ':doc:`this book, "Grokking" </notebooks/grokking>`'
    (unknown,) = crosslinks.MENTION.finditer("Nobody 1900")
    assert crosslinks.linked(unknown, BOOK) == "Nobody 1900"


def test_every_term_is_used_where_the_glossary_points() -> None:
    assert len(TERMS) >= 40 and len({term.lower() for term, _ in TERMS}) == len(TERMS)
    for term, definition in TERMS:
        page = re.search(r"\{doc\}`([^`]+)`\.\n$", definition)
        assert page, f"{term} points at no page"
        text = (BOOK / f"{page[1]}.md").read_text(encoding="utf-8").lower()
        assert all(word in text for word in re.findall(r"\w+", term.lower())), f"{term} does not stand in {page[1]}"


def test_fewer_shades_are_not_seen(tmp_path: Path) -> None:
    (tmp_path / "_images").mkdir()
    path = tmp_path / "_images/dots.png"
    figure, ax = plt.subplots()
    for series, colour in enumerate(["C0", "C1", "C2", "C3"]):
        ax.scatter(np.arange(60), np.sin(np.arange(60) + series), s=60, color=colour, alpha=0.4)
    figure.savefig(path)
    plt.close(figure)
    with Image.open(path) as picture:
        before = np.asarray(picture.convert("RGB"), int)
    weight = path.stat().st_size
    house.shrink_pictures(SimpleNamespace(outdir=tmp_path), None)  # type: ignore[arg-type]
    with Image.open(path) as picture:
        assert picture.mode == "P" and path.stat().st_size < weight / 2
        assert np.abs(np.asarray(picture.convert("RGB"), int) - before).max() <= 16  # of 255


def test_a_chapter_says_what_it_costs(tmp_path: Path) -> None:
    app = SimpleNamespace(srcdir=tmp_path)
    assert house.cost(app, "notebooks/grokking") == ""  # type: ignore[arg-type]
    costs = {"quick": {"seconds": 27.0, "peak_bytes": 6.1e8}, "paper": {"seconds": 5400.0, "peak_bytes": 4e9}}
    (tmp_path / "book").mkdir()
    (tmp_path / "book/costs.json").write_text(json.dumps({"chapters": {"grokking": costs}}), encoding="utf-8")
    expected = "27 s and 0.6 GB at scale quick, 90 min and 4.0 GB at scale paper."
    assert house.cost(app, "notebooks/grokking").endswith(expected)  # type: ignore[arg-type]
    assert house.cost(app, "notebooks/emergence") == house.cost(app, "book/grokking") == ""  # type: ignore[arg-type]
