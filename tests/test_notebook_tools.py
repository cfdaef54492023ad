"""Tests of book/tools: a chapter becomes a readable notebook, the set-up cell is stamped, stale files are found."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book/tools"))

import lowering  # noqa: E402

import notebooks  # noqa: E402

FIXTURE = ROOT / "tests/fixtures/book"
MANY = "notebooks/many-constructs"
URL = "https://github.com/Someone/small-book"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of the small book, free to be changed."""
    return shutil.copytree(FIXTURE, tmp_path / "book")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def set_url(root: Path, url: str = URL) -> None:
    edit(root / "_config.yml", 'url: ""', f'url: "{url}"')


def lowered(root: Path, page: str = MANY) -> Any:
    return lowering.notebook(lowering.Book.load(root), page)


def markdown(node: Any) -> str:
    return "\n\n".join(cell.source for cell in node.cells if cell.cell_type == "markdown")


def lower_text(root: Path, text: str) -> str:
    """A piece of Markdown as it comes out of the lowering, when it stands at the end of the fixture chapter."""
    path = root / f"{MANY}.md"
    path.write_text(path.read_text(encoding="utf-8") + f"\n## Added\n\n{text}\n", encoding="utf-8")
    return markdown(lowered(root)).split("## Added\n\n")[1]


@pytest.fixture(scope="module")
def text() -> str:
    return markdown(lowered(FIXTURE))


EXPECTED = {
    "equation on one line": "\n\n$$ a = 1 \\tag{4} $$\n\n",
    "equation without a label": "\n\n$$ b = 2 $$\n\n",
    "aligned equation": "$$\n\\begin{aligned}\nc &= 3 \\\\\nd &= \\begin{cases} 4 \\\\ 5 \\end{cases}\n"
    "\\end{aligned} \\tag{5}\n$$",
    "environment of its own": "$$ e = \\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix} $$",
    "equation in a list": "1. In a list\n\n   $$ f = 6 \\tag{6} $$\n\n2. and on: (6).",
    "equation in a quotation": "> A quotation with\n> $$ q = 7 $$",
    "citations of equations": "comes (4), and (3) of [Count to two](sample-chapter.ipynb) and (1) of *How to read*",
    "theorem": "> **Theorem 2 (Parseval $x^2$).** For $x$ as in (7) and (5)\n>\n"
    "> $$ \\begin{aligned} g &= 7 \\\\ &= 7 \\end{aligned} \\tag{7} $$\n>\n> and so on.",
    "lemma": "> **Lemma 1.**\n>\n> - without a label\n>   - nested $y$\n> - and a title",
    "definition": "> **Definition 1 (Named).** Cites Theorem 2, this and "
    "Theorem 1 of [Count to two](sample-chapter.ipynb).",
    "corollary": "> **Corollary 1.** Short.",
    "proposition": "> **Proposition 1.** Short.",
    "remark": "> **Remark 1.** Short.",
    "proof": "> **Proof.** First $a$, then Definition 1.\n>\n> $$ h = 8 $$",
    "note with code": "> **Note**\n>\n> A note with code:\n>\n> ```python\n"
    '> price = "$$ not math $$ (eq-code)"  # {eq}`eq-first`, :::{note}\n> ```',
    "folded tip": "<details>\n<summary><b>Tip</b></summary>\n\nFolded.\n\n</details>",
    "inline code and dollars": "Careful: `{eq}` and ``{eq}`eq-first` `` stay, and `$$` too, at \\$5 or \\$6.",
    "roles in a table": "> | (4) | ([Lu et al., 2025](https://doi.org/10.1073/pnas.1); "
    "[Demir and Doğan, 2024](https://arxiv.org/abs/2506.00001)) |",
    "folded box": "<details>\n<summary><b>Title with $x$ and <code>code &lt; 1</code></b></summary>\n\n"
    "1. one\n   - nested\n2. two\n\n$$ \\begin{aligned} k &= 9 \\\\ &= 9 \\end{aligned} $$\n\n"
    "```python\nx = 1\n```\n\n</details>",
    "box with a title": "> **An open title**\n>\n> Open.",
    "exercise": "**Exercise 4 (★ 5 min: find $x$).** Find it.",
    "textual citations": "[Lu et al. (2025)](https://doi.org/10.1073/pnas.1) and "
    "[Demir and Doğan (2024)](https://arxiv.org/abs/2506.00001), [von Berg (2023)](https://example.org/alone)",
    "citation without an address": "and (Szegő, 1939).",
    "pages": "[Count to two](sample-chapter.ipynb), [words](sample-chapter.ipynb), *How to read*, *Notation*.",
    "places": "[Count to two](sample-chapter.ipynb), *Two scales*, *words*, "
    "Exercise 1 of [Count to two](sample-chapter.ipynb), Exercise 4,\nthe picture (Figure 5), "
    "*A place*, <https://example.org>, [a link](https://example.org/a_b).",
    "code fence": "~~~text\n(not-a-label)=\n{unknown}`role`\n~~~",
    "figure caption": "*Figure 5.* A dot at $x$, see (4).",
}


@pytest.mark.parametrize("construct", EXPECTED)
def test_construct_is_lowered(text: str, construct: str) -> None:
    assert EXPECTED[construct] in text


def test_figures_of_prose_pages_are_counted_too(root: Path) -> None:
    page = root / "book/index.md"
    figure = "```{figure} dot.png\n:alt: A dot.\n:name: fig-first\n\nA caption.\n```"
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{figure}\n", encoding="utf-8")
    assert "*Figure 6.* A dot at" in markdown(lowered(root))


def test_nothing_of_myst_is_left(text: str) -> None:
    prose = lowering.masked(text)
    assert not re.search(r"\{[\w:-]+\}`|^\s*(> )?:::|^\([\w-]+\)=|\$\$[ \t]*\(eq", prose, re.MULTILINE)
    assert "eq-first" not in prose


def test_quoted_equations_take_one_line(text: str) -> None:
    for line in text.split("\n"):
        if line.startswith(">"):
            assert lowering.masked(line).count("$$") % 2 == 0, line


def test_code_cells_are_those_of_the_chapter() -> None:
    cells, _ = lowering.split((FIXTURE / f"{MANY}.md").read_text(encoding="utf-8"))
    code = [cell for cell in lowered(FIXTURE).cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [cell.source for cell in cells if cell.kind == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None and "mystnb" not in cell.metadata for cell in code)
    assert [cell.metadata.get("cellView") for cell in code] == ["form", None, "form"]
    assert code[2].metadata == {
        "tags": ["hide-cell", "solution"],
        "jupyter": {"source_hidden": True},
        "cellView": "form",
    }


def test_notebook_is_valid_and_deterministic() -> None:
    first = lowered(FIXTURE)
    nbformat.validate(first)
    ids = [cell.id for cell in first.cells]
    assert len(set(ids)) == len(ids)
    assert lowering.dumps(first) == lowering.dumps(lowered(FIXTURE))
    assert set(first.metadata) == {"accelerator", "colab", "kernelspec", "language_info"}
    assert set(lowered(FIXTURE, "notebooks/sample-chapter").metadata) == {"kernelspec", "language_info"}


def test_cell_ids_survive_an_insertion(root: Path) -> None:
    before = [cell.id for cell in lowered(root).cells]
    edit(root / f"{MANY}.md", "### A place", "### Another place\n\nNew.\n\n### A place")
    after = [cell.id for cell in lowered(root).cells]
    # The label that stood before the old heading now belongs to the new one, so only the citing cell changes with it.
    assert len(set(after) - set(before)) == 2


def test_each_heading_opens_a_cell(text: str) -> None:
    for cell in lowered(FIXTURE).cells:
        if cell.cell_type == "markdown":
            assert not re.search(r"(?<!\A)^#{1,6} ", lowering.masked(cell.source), re.MULTILINE)


FORBIDDEN = {
    "unknown directive": (":::{figure} x.png\n:::", r"{figure} is not a box .*{prf:theorem}"),
    "directive in backticks": ("```{note}\nx\n```", "a box is written :::"),
    "unknown role": ("see {numref}`fig-dot`", r"{numref} is not a role .*{eq}, {prf:ref}"),
    "unknown option": (":::{note}\n:name: x\n\ny\n:::", ":name: x is not allowed in {note}"),
    "unknown class": (":::{note}\n:class: margin\n\ny\n:::", ":class: margin is not allowed"),
    "folded proof": (":::{prf:proof}\n:class: dropdown\n\ny\n:::", "fold a proof as :::{admonition} Proof"),
    "proof that begins with an equation": (":::{prf:proof}\n$$ x $$\n:::", "a proof begins with a line of text"),
    "nested box": ("::::{note}\n:::{tip}\nx\n:::\n::::", "boxes are not nested"),
    "box in a list": ("- a\n\n  :::{tip}\n  x\n  :::", "left margin"),
    "open box": (":::{note}\nx", "is not closed"),
    "stray end of a box": ("x\n\n:::\n", "closes no box"),
    "open fence": ("```python\nx", "not closed"),
    "empty box": (":::{note}\n:::", "is empty"),
    "note with a title": (":::{note} Title\nx\n:::", "{note} has no title"),
    "box without a title": (":::{admonition}\nx\n:::", "{admonition} needs a title"),
    "options as YAML": (":::{note}\n---\nclass: dropdown\n---\nx\n:::", "options of a box"),
    "unknown key": ("{cite:t}`lu2025, nobody1900`", "{cite:t} finds no nobody1900"),
    "unknown equation": ("{eq}`eq-nowhere`", "{eq} finds no equation labelled eq-nowhere"),
    "unknown theorem": ("{prf:ref}`thm-nowhere`", "labelled thm-nowhere"),
    "theorem as an exercise": ("{prf:ref}`ex-find`", "labelled ex-find"),
    "unknown page": ("{doc}`nowhere`", "{doc} finds no page nowhere"),
    "unknown label": ("{ref}`nowhere`", "labelled nowhere"),
    "figure without words": ("{ref}`fig-dot`", "write the words"),
    "raw HTML": ("a <b>bold</b> word", "raw HTML is not allowed"),
    "HTML comment": ("<!-- x -->", "raw HTML is not allowed"),
    "footnote": ("word[^1]", "a footnote is not allowed"),
    "image": ("![x](x.png)", "an image that no cell draws"),
    "substitution": ("{{ x }}", "a substitution"),
    "comment": ("% hidden", "a comment is not allowed"),
    "link to a file": ("[x](sample-chapter.md)", "write {doc} or {ref}"),
    "comment in an equation": ("$$\na % b\n+ c\n$$", "TeX comments"),
    "empty line in an equation": ("$$\na\n\nb\n$$", "empty lines"),
}


@pytest.mark.parametrize("construct", FORBIDDEN)
def test_other_markup_is_refused_with_its_place(root: Path, construct: str) -> None:
    source, message = FORBIDDEN[construct]
    lines = (root / f"{MANY}.md").read_text(encoding="utf-8").count("\n")
    with pytest.raises(ValueError, match=message) as error:
        lower_text(root, source)
    place = re.match(rf"{MANY}\.md:(\d+): ", str(error.value))
    assert place and lines + 4 <= int(place[1]) <= lines + 4 + source.count("\n")


HARMLESS = {
    "comparison": "for $a < b$ and 3 < 4, as 5 > 4",
    "braces in mathematics": r"the set $\{x\}$ and $\{{}y\}$",
    "code in double backticks": "``{note}`x` `` and `<b>` and `% x`",
    "dollar in code": "`a $ b` and `c $ d`",
    "percent": r"5 % of $x$ and $5\%$",
    "code fence": "```python\n:::{note}\n$$ x $$ (eq-no)\n<b> {eq}`no`\n```",
    "text fence": "````text\n```{code-cell}\n```\n````",
}


@pytest.mark.parametrize("construct", HARMLESS)
def test_harmless_text_stays_as_it_is(root: Path, construct: str) -> None:
    assert lower_text(root, HARMLESS[construct]) == HARMLESS[construct]


def test_labels_in_code_are_no_labels() -> None:
    labels = [label for label, _ in lowering.Book.load(FIXTURE).labels]
    assert {"eq-code", "not-a-label"}.isdisjoint(labels)


@pytest.mark.parametrize("settings", ["", "math_numfig: false"])
def test_numbers_are_those_of_the_built_book(root: Path, settings: str) -> None:
    if settings:
        config = root / "_config.yml"
        config.write_text(config.read_text(encoding="utf-8") + f"  config:\n    {settings}\n", encoding="utf-8")
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(root), "-q"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in lowering.Book.load(root).chapters:
        html = (root / f"_build/html/{page}.html").read_text(encoding="utf-8")
        text = markdown(lowered(root, page))
        assert re.findall(r"\\tag\{(\d+)\}", text) == re.findall(r'class="eqno">\((\d+)\)', html)
        boxes = re.findall(r"^(?:> )?\*\*(\w+ \d+)(?: \(|\.\*\*)", text, re.MULTILINE)
        assert boxes == re.findall(r'class="caption-number">(\w+ \d+) </span>', html)
        assert re.findall(
            r"(?<![\w*])(?:Theorem|Definition|Exercise) \d+(?=[ ,.])", re.sub(r"\*\*.*?\*\*", "", text)
        ) == (re.findall(r'href="[^"]*"[^>]*>(?:<span[^>]*>)?((?:Theorem|Definition|Exercise) \d+)<', html))


def test_numbers_by_page(root: Path) -> None:
    config = root / "_config.yml"
    config.write_text(config.read_text(encoding="utf-8") + "  config:\n    number_by_page: true\n", encoding="utf-8")
    text = markdown(lowered(root))
    assert "a = 1 \\tag{1}" in text and "**Theorem 1 (Parseval" in text and "*Figure 1.*" in text
    assert "(1) of [Count to two]" in text


def test_numbered_table_of_contents_is_refused(root: Path) -> None:
    edit(root / "_toc.yml", "  - caption: Foundations\n", "  - caption: Foundations\n    numbered: true\n")
    with pytest.raises(ValueError, match="numbered chapters"):
        lowering.Book.load(root)


@pytest.mark.parametrize(
    ("url", "baseurl", "address"),
    [
        ("", "", ""),
        (URL + ".git/", "", "https://someone.github.io/small-book"),
        ("https://github.com/Someone/someone.github.io", "", "https://someone.github.io"),
        ("https://gitlab.com/someone/small-book", "", ""),
        (URL, "https://book.example.org/", "https://book.example.org"),
    ],
)
def test_address_of_the_book(url: str, baseurl: str, address: str) -> None:
    config = {"repository": {"url": url, "branch": "main"}, "html": {"baseurl": baseurl}}
    assert lowering.Repository.read(config).address == address


def test_top_line(root: Path) -> None:
    assert lowered(root).cells[0].source == "This notebook is a chapter of the book *A Small Book*."
    set_url(root)
    node = lowered(root)
    page = "https://someone.github.io/small-book/notebooks/many-constructs.html"
    assert node.cells[0].source == f"[← This chapter in the book *A Small Book*]({page})"
    assert "[How to read](https://someone.github.io/small-book/book/reading.html)" in markdown(node)


def test_writing_and_checking(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["README.md", "many-constructs.ipynb", "many-constructs.md", "sample-chapter.ipynb", "sample-chapter.md"]
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert notebooks.main(["--check"], root) == 1
    listed = capsys.readouterr().out.split("\n")
    assert sorted(line.removeprefix("stale: ").split("/")[-1] for line in listed if line) == names
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert notebooks.main([], root) == 0
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert notebooks.main(["--check"], root) == 0
    assert notebooks.main([], root) == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == times


def test_check_finds_each_kind_of_staleness(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebooks.main([], root)
    edit(root / f"{MANY}.md", "Open.", "Wide open.")
    (root / "notebooks/left-over.ipynb").write_text("{}", encoding="utf-8")
    capsys.readouterr()
    assert notebooks.main(["--check"], root) == 1
    printed = capsys.readouterr()
    assert printed.out == "stale: notebooks/many-constructs.ipynb\n"
    assert printed.err == "without a source: notebooks/left-over.ipynb\n"


def test_a_broken_chapter_does_not_hold_up_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root / f"{MANY}.md", "Open.", "{unknown}`role`.")
    assert notebooks.main([], root) == 1
    assert "many-constructs.md:136: {unknown} is not a role" in capsys.readouterr().err
    assert (root / "notebooks/sample-chapter.ipynb").is_file()
    assert not (root / f"{MANY}.ipynb").exists()


def test_an_address_reaches_every_file(root: Path) -> None:
    notebooks.main([], root)
    assert "no public address yet" in (root / "README.md").read_text(encoding="utf-8")
    original = (root / "CITATION.cff").read_text(encoding="utf-8")
    set_url(root)
    notebooks.main([], root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"git clone {URL}\ncd small-book\npip install" in readme and f"pip install git+{URL}@main" in readme
    assert readme.startswith("# A small book\n") and readme.endswith("<!-- /repository -->\n\nThe end.\n")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f'\nrepository-code: "{URL}"\nurl: "https://someone.github.io/small-book"\n' in citation
    for slug in ("many-constructs", "sample-chapter"):
        code = json.loads((root / f"notebooks/{slug}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert any(f'"git+{URL}@main"' in "".join(cell["source"]) for cell in code)
    edit(root / "_config.yml", URL, "")
    notebooks.main([], root)
    assert (root / "CITATION.cff").read_text(encoding="utf-8") == original
    assert URL not in (root / "README.md").read_text(encoding="utf-8")


def test_files_without_a_marked_place_are_left_alone(root: Path) -> None:
    (root / "README.md").write_text("# Plain\n", encoding="utf-8")
    (root / "CITATION.cff").unlink()
    set_url(root)
    notebooks.main([], root)
    assert (root / "README.md").read_text(encoding="utf-8") == "# Plain\n"
    assert not (root / "CITATION.cff").exists()


@pytest.mark.parametrize("count", [0, 2])
def test_a_chapter_has_exactly_one_setup_cell(root: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    cell = "```{code-cell}\n:tags: [hide-input, setup]\n\npass\n```\n"
    edit(root / f"{MANY}.md", cell, cell * count)
    assert notebooks.main([], root) == 1
    assert f"many-constructs.md: {count} cells are tagged" in capsys.readouterr().err
    assert not (root / f"{MANY}.ipynb").exists()


def run_setup(source: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up cell where icl_lib cannot be imported and pip only reports what it was asked for."""
    program = (
        "import subprocess, sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'icl_lib' else find(name)\n"
        "subprocess.run = lambda command, check: print(*command[1:])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program + source], capture_output=True, text=True, cwd=path, env=environment
    )


def test_setup_cell(tmp_path: Path) -> None:
    empty = notebooks.setup_source(lowering.Repository())
    public = notebooks.setup_source(lowering.Repository(URL, "dev"))
    assert len(empty.splitlines()) <= 14
    refused = run_setup(empty, tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.strip().split("\n")[-1].startswith("RuntimeError: icl_lib is missing: set ICL_LIB_SOURCE")
    assert run_setup(public, tmp_path).stdout == f"-m pip install -q git+{URL}@dev\n"
    for source in ("/some/folder", "git+file:///some/folder"):
        assert run_setup(empty, tmp_path, ICL_LIB_SOURCE=source).stdout == f"-m pip install -q {source}\n"
        assert run_setup(public, tmp_path, ICL_LIB_SOURCE=source).stdout == f"-m pip install -q {source}\n"


def test_setup_cell_downloads_nothing_where_the_library_is(tmp_path: Path) -> None:
    cell = notebooks.setup_source(lowering.Repository(URL))
    ast.parse(cell)
    present = cell.replace('"icl_lib"', '"json"')
    assert run_setup(present, tmp_path).stdout == ""
