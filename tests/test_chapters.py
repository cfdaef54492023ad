"""The contract of every chapter, and proof that each of its checks notices what it is there for."""

from __future__ import annotations

import functools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import contract  # noqa: E402
import lowering  # noqa: E402

import notebooks  # noqa: E402

FIXTURE = ROOT / "tests/fixtures/book"
SAMPLE = "notebooks/sample-chapter"
SLUGS = sorted(path.stem for path in ROOT.glob("notebooks/*.md"))
every_chapter = pytest.mark.parametrize("slug", SLUGS)


@functools.cache
def book() -> lowering.Book:
    return lowering.Book.load(ROOT)


@functools.cache
def chapter(slug: str) -> contract.Chapter:
    return contract.Chapter(book(), f"notebooks/{slug}")


# --- the book itself


def test_there_are_chapters() -> None:
    assert len(SLUGS) >= 2


@every_chapter
@pytest.mark.parametrize("check", contract.CHAPTER_CHECKS, ids=lambda check: check.__name__)
def test_chapter(slug: str, check: Callable[[contract.Chapter], contract.Problems]) -> None:
    assert list(check(chapter(slug))) == []


@every_chapter
@pytest.mark.parametrize("check", [contract.pair, contract.claims], ids=lambda check: check.__name__)
def test_chapter_and_its_files(slug: str, check: Callable[[contract.Chapter, Path], contract.Problems]) -> None:
    assert list(check(chapter(slug), ROOT)) == []


def test_labels_and_citations_of_equations() -> None:
    assert list(contract.labels(book())) == []


def test_claims_have_their_own_identifiers() -> None:
    assert list(contract.claim_identifiers([chapter(slug) for slug in SLUGS])) == []


@pytest.mark.parametrize("check", [contract.contents, contract.library], ids=lambda check: check.__name__)
def test_repository(check: Callable[[Path], contract.Problems]) -> None:
    assert list(check(ROOT)) == []


# --- the checks themselves


@pytest.fixture(scope="module")
def finished_book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small book with its notebooks and a little library, in which all checks pass."""
    root = shutil.copytree(FIXTURE, tmp_path_factory.mktemp("small") / "book")
    (root / "tests").mkdir()
    (root / "tests/test_sample.py").write_text("def test_sum():\n    from icl_lib.sums import add, LIMIT\n")
    (root / "icl_lib").mkdir()
    (root / "icl_lib/sums.py").write_text(
        '__all__ = ["LIMIT", "add"]\nLIMIT = 3\n\n\ndef add(a, b):\n    """Add.\n\n    Source: [lu2025, 1]\n    """\n'
    )
    replace(root, "We can count.", "We can count, with `add`.")
    notebooks.main([], root)
    return root


@pytest.fixture
def root(finished_book: Path, tmp_path: Path) -> Path:
    """A copy of the small book, free to be changed."""
    return shutil.copytree(finished_book, tmp_path / "book")


def replace(root: Path, old: str, new: str, page: str = SAMPLE) -> None:
    path = root / f"{page}.md"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def sample(root: Path, page: str = SAMPLE) -> contract.Chapter:
    return contract.Chapter(lowering.Book.load(root), page)


def test_sample_fulfils_the_contract(root: Path) -> None:
    page = sample(root)
    found = {check.__name__: list(check(page)) for check in contract.CHAPTER_CHECKS}
    found |= {check.__name__: list(check(page, root)) for check in (contract.pair, contract.claims)}
    found |= {check.__name__: list(check(root)) for check in (contract.contents, contract.library)}
    found |= {"labels": list(contract.labels(page.book)), "claims": list(contract.claim_identifiers([page]))}
    assert not any(found.values()), found


LONG = "x_{1} + x_{2} + x_{3} + x_{4} + x_{5} + x_{6} + x_{7} + x_{8} + x_{9} + x"
YOURS = """\
```{code-cell}
---
mystnb:
  figure:
    caption: Your line.
    name: fig-yours
  image:
    alt: A line whose slope is the number that the reader has chosen above it.
---
slope = 3
plt.plot([0, 1], [0, slope])
plt.show()
```
"""
BREACHES: dict[str, tuple[str, str, str, str]] = {
    # what is wrong: (check, old text, new text, what the check says)
    "no label": ("headings", "(sample-chapter)=", "(another)=", "does not begin with"),
    "second title": ("headings", "## Summary", "# Extra\n\n## Summary", "2 headings of the first level"),
    "missing section": ("headings", "## Summary\n", "", "missing ['Summary']"),
    "extra section": ("headings", "## Summary", "## Outlook\n\n## Summary", "unknown ['Outlook']"),
    "sections exchanged": ("headings", "## A picture first", "## Summary", "missing ['A picture first']"),
    "no claim": ("claim_line", "> **Claim.**", "> **Aim.**", "not followed by"),
    "no table": ("needs", "|---|---|---|\n", "", "no table"),
    "setup changed": ("frame", '"icl_lib"', '"other_lib"', "first cell is not the set-up cell"),
    "setup tags": ("frame", "[hide-input, setup]", "[hide-input]", "first cell is not the set-up cell"),
    "cell before the setup": (
        "frame",
        "## What you need\n",
        "```{code-cell}\n1\n```\n\n## What you need\n",
        "no cell comes before",
    ),
    "long imports": ("frame", "from icl_lib import", "import re\n" * 6 + "from icl_lib import", "9 lines, at most 8"),
    "wrong slug": ("frame", 'start("sample-chapter"', 'start("sample"', "do not end in run = chapter.start"),
    "no seed": ("frame", ", seed=1)", ")", "do not end in run = chapter.start"),
    "no closing line": ("frame", "run.finish()", "print()", "last cell is not run.finish()"),
    "visible closing line": (
        "frame",
        "```{code-cell}\n:tags: [hide-input]\n\nrun.fi",
        "```{code-cell}\nrun.fi",
        "last cell is not run.finish()",
    ),
    "no alt text": ("figures", "alt: A line that falls", "title: A line that falls", "alt text has 0 characters"),
    "short alt text": ("figures", " from the lower left to the upper right", "", "27 characters, at least 40"),
    "no caption": ("figures", "caption: A wrong line.\n    ", "", "no caption"),
    "no figure name": ("figures", "name: fig-wrong", "name: wrong", "no name of the form fig-"),
    "no show": ("figures", "plt.plot([0, 1], [1, 0])\nplt.show()", "plt.plot([0, 1], [1, 0])", "ends in plt.show()"),
    "show too early": ("figures", "[1, 0])\nplt.show()", "[1, 0])\nplt.show()\nprint()", "ends in plt.show()"),
    "figure without options": ("figures", "assert three == 3", "plt.plot([1])\nplt.show()", "no caption"),
    "three figures": ("figures", YOURS, "", "3 figures, expected 4 to 7"),
    "too many lines": ("limits", "We can count", "a\n\n" * 300 + "We can count", "lines, at most 400"),
    "too many cells": ("limits", "## Summary", "```{code-cell}\n1\n```\n\n" * 20 + "## Summary", "cells, at most 25"),
    "long cell": ("limits", "slope = 3", "slope = 3\n" * 24, "a cell of 27 lines"),
    "no stars": ("exercises", "★★ 15 min: four", "15 min: four", "line 166: the title of an exercise"),
    "no minutes": ("exercises", "★★ 15 min: four", "★★ four", "the title of an exercise"),
    "no exercise label": ("exercises", ":label: ex-five\n", "", "a label of the form ex-"),
    "no hint": ("exercises", "} Hint", "} Aside", "expected a hint"),
    "open hint": ("exercises", "} Hint\n:class: dropdown\n", "} Hint\n", "expected a hint"),
    "no solution": ("exercises", "[hide-cell, solution]", "[hide-cell]", "expected a hint"),
    "no check": ("exercises", "assert four == 4", "print(four == 4)", "exercise 2 is followed by"),
    "hidden check": (
        "exercises",
        "```{code-cell}\nassert four",
        "```{code-cell}\n:tags: [hide-input]\n\nassert four",
        "exercise 2 is followed by",
    ),
    "two exercises": (
        "exercises",
        ":::{exercise} ★★ 15 min: four\n:label: ex-four\n",
        ":::{note}\n",
        "2 exercises, expected 3 to 5",
    ),
    "macro": ("mathematics", "$$ \\hat{x}", "$$ \\newcommand{\\E}{E} \\hat{x}", "\\newcommand"),
    "definition in TeX": ("mathematics", "We write", "We write $\\def\\x{y}$", "\\def"),
    "wide equation": ("mathematics", "$$ \\hat{x}_i", f"$$ x &= {LONG}", "characters in an aligned line, at most 70"),
    "align": ("mathematics", "Adding gives", "$$\n\\begin{align}\nx\n\\end{align}\n$$", "write aligned"),
    "download": ("hygiene", "three = 1", "import urllib.request\nthree = 1", "'urllib' outside the set-up cell"),
    "pip": ("hygiene", "three = 1", "!pip install x\nthree = 1", "'pip' outside the set-up cell"),
    "address": ("hygiene", "three = 1", "page = 'https://example.org'\nthree = 1", "'https' outside"),
    "warnings": ("hygiene", "three = 1", "warnings.filterwarnings('ignore')\nthree = 1", "no warning filters"),
    "numpy seed": ("hygiene", "three = 1", "np.random.seed(0)\nthree = 1", "no global random state"),
    "torch seed": ("hygiene", "three = 1", "torch.manual_seed(0)\nthree = 1", "no global random state"),
    "unknown role": ("markup", "Adding gives", "{numref}`x`", "{numref} is not a role"),
    "raw HTML": ("markup", "Adding gives", "<b>Adding</b>", "raw HTML"),
    "new symbol": ("notation", "Adding gives", "Adding $\\kappa$ gives", "explains: \\kappa"),
    "new calligraphic symbol": ("notation", "Adding gives", "With $\\mathcal{X}$", "explains: \\mathcal{X}"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_breach_is_noticed(root: Path, breach: str) -> None:
    name, old, new, message = BREACHES[breach]
    check = {check.__name__: check for check in contract.CHAPTER_CHECKS}[name]
    replace(root, old, new)
    problems = list(check(sample(root)))
    assert any(message in problem for problem in problems), problems


def test_generators_with_a_seed_of_their_own_are_welcome(root: Path) -> None:
    replace(
        root, "three = 1", "generator = torch.Generator().manual_seed(1)\nrng = np.random.default_rng(1)\nthree = 1"
    )
    assert list(contract.hygiene(sample(root))) == []


def test_a_function_that_draws_for_later_is_no_figure(root: Path) -> None:
    replace(root, "three = 1", "def draw():\n    return plt.subplots()\n\nthree = 1")
    assert list(contract.figures(sample(root))) == []


CLAIM_BREACHES = {
    "unknown verdict": ('source="[lu', 'verdict="perhaps", source="[lu', "the verdict 'perhaps'"),
    "no source": ("[lu2025, 1]", "lu2025", "source of a claim"),
    "missing test": ("::test_sum", "::test_product", "no test 'tests/test_sample.py::test_product'"),
    "missing test file": ("tests/test_sample.py", "tests/test_other.py", "no test"),
    "no test": (', test="tests/test_sample.py::test_sum"', "", "no test None"),
    "computed identifier": ('"SA1"', 'f"SA{1}"', "written out"),
}


@pytest.mark.parametrize("breach", CLAIM_BREACHES)
def test_bad_claim_is_noticed(root: Path, breach: str) -> None:
    old, new, message = CLAIM_BREACHES[breach]
    replace(root, old, new)
    problems = list(contract.claims(sample(root), root))
    assert any(message in problem for problem in problems), problems


def test_repeated_claim_is_noticed(root: Path) -> None:
    replace(root, "three = 1", 'run.claim("SA1", "again", measured=1, at_most=1, source="[x]")\nthree = 1')
    assert list(contract.claim_identifiers([sample(root)])) == ["the claim SA1 is made 2 times"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("and {eq}`eq-sum` holds", "and it holds", ""),
        ("$$ (eq-sum)", "$$ (eq-total)", "the equation label eq-total is never cited"),
        ("{eq}`eq-sum` holds", "{eq}`eq-none` holds", "sample-chapter.md cites the unknown equation eq-none"),
        ("$$ (eq-sum)", "$$ (eq-first)", "the label eq-first is given 2 times"),
        ("ex-four\n", "ex-five\n", "the label ex-five is given 2 times"),
        ("$$ (eq-sum)", "$$ (sum)", "the equation label sum is not of the form"),
    ],
)
def test_bad_labels_are_noticed(root: Path, old: str, new: str, message: str) -> None:
    replace(root, old, new)
    problems = list(contract.labels(lowering.Book.load(root)))
    assert any(message in problem for problem in problems) if message else problems == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("We can count", "We could count", "out of step"),
        ("three = 1 + 1 + 1", "three = 3", "the code of the notebook is not the code"),
    ],
)
def test_stale_notebook_is_noticed(root: Path, old: str, new: str, message: str) -> None:
    replace(root, old, new)
    assert any(message in problem for problem in contract.pair(sample(root), root))


def test_executed_and_missing_notebooks_are_noticed(root: Path) -> None:
    path = root / f"{SAMPLE}.ipynb"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"execution_count": null', '"execution_count": 1', 1), encoding="utf-8")
    assert "the notebook holds outputs or execution counts" in list(contract.pair(sample(root), root))
    path.unlink()
    assert list(contract.pair(sample(root), root)) == ["there is no notebook beside it: run make notebooks"]


def test_bad_table_of_contents_is_noticed(root: Path) -> None:
    toc = root / "_toc.yml"
    text = toc.read_text(encoding="utf-8")
    toc.write_text(re.sub("many-constructs", "left-out", text), encoding="utf-8")
    assert list(contract.contents(root)) == [
        "_toc.yml names notebooks/left-out, which is missing",
        "notebooks/many-constructs.md is not in _toc.yml",
    ]
    toc.write_text(text.replace("many-constructs", "sample-chapter"), encoding="utf-8")
    assert "notebooks/sample-chapter stands in _toc.yml 2 times" in list(contract.contents(root))


def test_neglected_library_names_are_noticed(root: Path) -> None:
    module = root / "icl_lib/sums.py"
    module.write_text('__all__ = ["SIZES", "double"]\nSIZES = (1, 2)\n\n\ndef double(a):\n    """Double."""\n')
    assert list(contract.library(root)) == [
        "sums.SIZES is used in no test",
        "sums.double is used in no test",
        "sums.double has no line 'Source: […' in its docstring",
        "sums.double is mentioned on no page",
    ]


@pytest.mark.parametrize(
    ("formula", "symbols"),
    [
        (r"\hat{H}_Z^{(k)} + \alpha", {"H", r"\alpha"}),
        (r"\mathbf{x}_{i_{j}} \in \mathbb{R}^{n \times d}", {"x", r"\mathbb{R}"}),
        (
            r"\mathcal N(0, \sigma^2) \text{ if } c_p^* \le \operatorname{Tr} A^\top B",
            {r"\mathcal{N}", r"\sigma", "c", "A", "B"},
        ),
        (r"\begin{aligned} x^{\mathrm{T}} y &= \exp(-\tfrac12) \\ \end{aligned}", {"x", "y"}),
        (r"\int f\,\mathrm{d}x = e^{-\lambda t}", {"f", "x"}),
    ],
)
def test_symbols_of_a_formula(formula: str, symbols: set[str]) -> None:
    assert contract.symbols(formula) == symbols
