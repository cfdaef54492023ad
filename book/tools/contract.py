"""What a chapter owes its reader (CONTRIBUTING.md, "The anatomy of a chapter"), as functions that list the problems."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from lowering import DISPLAY, TOKEN, Block, Book, Cell, blocks, dumps, masked, notebook, split, toc_pages

from icl_lib.chapter import VERDICTS
from notebooks import setup_source

HEADINGS = [
    "What you will learn",
    "What you need",
    "A picture first",
    "Setting and notation",
    "Derivation",
    "The formula meets the simulation",
    "What can go wrong",
    "Try it yourself",
    "Exercises",
    "Summary",
    "Further reading",
]
MAX_LINES, MAX_CELLS, MAX_CELL_LINES, MAX_MATH_WIDTH, MIN_ALT = 400, 25, 25, 70, 40
SETUP_TAGS = ["hide-input", "setup"]
SOLUTION_TAGS = ["hide-cell", "solution"]

NETWORK = re.compile(r"\b(requests|urllib|wget|curl|pip|https?)\b")
GLOBAL_STATE = re.compile(
    r"\bwarnings\b|filterwarnings|\b(?:np|numpy|torch|torch\.cuda)\.(?:random\.)?(?:manual_seed|seed)\w*\(|\brandom\.seed\("
)
MACRO = re.compile(r"\\(?:newcommand|renewcommand|providecommand|def|let|DeclareMathOperator)\b")
WIDE_ENVIRONMENT = re.compile(r"\\begin\{(?:align|gather|multline|equation|eqnarray)\*?\}")

# Letters of a formula that are not symbols: words, names of environments, and what stands in sub- and superscripts.
GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau"
)
GREEK += " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell"
WORDS = re.compile(r"\\(?:text|mathrm|mathsf|textbf|textit|operatorname\*?|begin|end|tag|label)\s*\{[^{}]*\}")
SCRIPT = re.compile(r"[_^]\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+(?:\{[^{}]*\})?|[^\s\\{}])")
FONT = r"\\(mathbb|mathcal|mathfrak|mathscr)\s*(?:\{\s*([A-Za-z])\s*\}|([A-Za-z]))"
SYMBOL = re.compile(rf"{FONT}|\\({'|'.join(GREEK.split())})(?![A-Za-z])|\\[A-Za-z]+|([A-Za-z])")
CONSTANTS = {"e"}


@dataclass(frozen=True)
class Chapter:
    """A chapter as the checks see it: the book it stands in, its name, and its parsed pieces."""

    book: Book
    page: str

    @property
    def slug(self) -> str:
        return Path(self.page).name

    @property
    def text(self) -> str:
        return self.book.texts[self.page]

    @cached_property
    def cells(self) -> list[Cell]:
        return split(self.text)[0]

    @cached_property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    @cached_property
    def body(self) -> str:
        """The text after the header, with code blanked out."""
        return re.sub(r"\A---\n.*?\n---\n", "", masked(self.text), flags=re.DOTALL)

    @cached_property
    def pieces(self) -> list[tuple[str, Cell | Block]]:
        """Code cells and the blocks of Markdown cells in order, each with the section (``##``) it stands in."""
        section = ""
        result: list[tuple[str, Cell | Block]] = []
        for cell in self.cells:
            if cell.kind == "code":
                result.append((section, cell))
                continue
            for block in blocks(cell.source, cell.line):
                if block.kind == "text" and block.lines[0].startswith("## "):
                    section = block.lines[0][3:].strip()
                result.append((section, block))
        return result

    def section(self, name: str) -> str:
        """The text of one section without code."""
        match = re.search(rf"^## {re.escape(name)}[ \t]*\n(.*?)(?=^## |\Z)", self.body, re.MULTILINE | re.DOTALL)
        return match[1] if match else ""


Problems = Iterator[str]


def headings(chapter: Chapter) -> Problems:
    """One H1 under the label of the chapter, then the sections of the skeleton in order."""
    if not re.match(rf"\s*\({re.escape(chapter.slug)}\)=\n# \S", chapter.body):
        yield f"the page does not begin with ({chapter.slug})= and its title"
    if (count := len(re.findall(r"^# ", chapter.body, re.MULTILINE))) != 1:
        yield f"{count} headings of the first level, expected one"
    found = [heading.strip() for heading in re.findall(r"^## (.*)$", chapter.body, re.MULTILINE)]
    if found != HEADINGS:
        missing = [heading for heading in HEADINGS if heading not in found]
        extra = [heading for heading in found if heading not in HEADINGS]
        yield f"the sections are not those of the skeleton in its order: missing {missing}, unknown {extra}"


def claim_line(chapter: Chapter) -> Problems:
    """The claim of the chapter, quoted under its title."""
    if not re.search(r"^# .*\n\s*> \*\*Claim\.\*\* By the end you will have shown that \S", chapter.body, re.MULTILINE):
        yield "the title is not followed by '> **Claim.** By the end you will have shown that …'"


def needs(chapter: Chapter) -> Problems:
    """The table of what the reader needs."""
    if not re.search(r"^\|.*\|\n\|[ :|-]+\|\n\|.*\|", chapter.section("What you need"), re.MULTILINE):
        yield "'What you need' has no table"


def frame(chapter: Chapter) -> Problems:
    """The cells every chapter shares: set-up, imports, and the closing line."""
    opening = [piece for section, piece in chapter.pieces if isinstance(piece, Cell) and section == "What you need"]
    if opening != chapter.code[:2] or len(opening) != 2:
        yield "'What you need' holds exactly two cells, the set-up and the imports, and no cell comes before"
    if not chapter.code:
        return
    setup, last = chapter.code[0], chapter.code[-1]
    if setup.tags != SETUP_TAGS or setup.source != setup_source(chapter.book.repository):
        yield "the first cell is not the set-up cell that `make notebooks` writes"
    if any(cell.tags == SETUP_TAGS for cell in chapter.code[1:]):
        yield "there is a second set-up cell"
    if len(chapter.code) > 1:
        lines = [line for line in chapter.code[1].source.split("\n") if line.strip()]
        if len(lines) > 8:
            yield f"the imports take {len(lines)} lines, at most 8"
        if not re.fullmatch(rf'run = chapter\.start\("{re.escape(chapter.slug)}", seed=\d+\)', lines[-1]):
            yield f'the imports do not end in run = chapter.start("{chapter.slug}", seed=…)'
    if last.source.strip() != "run.finish()" or last.tags != ["hide-input"] or chapter.cells[-1] is not last:
        yield "the last cell is not run.finish(), tagged hide-input"


def _draws(source: str) -> bool:
    """Whether a cell itself calls a function of pyplot; the bodies of functions it defines do not count."""
    statements = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(
        isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "plt"
        for call in calls
    )


def figures(chapter: Chapter) -> Problems:
    """Four to seven figures, each with a caption, a name and a text for those who cannot see it."""
    drawn = [cell for cell in chapter.code if cell.metadata.get("mystnb", {}).get("figure") or _draws(cell.source)]
    if not 4 <= len(drawn) <= 7:
        yield f"{len(drawn)} figures, expected 4 to 7"
    for cell in drawn:
        options = cell.metadata.get("mystnb", {})
        figure, alt = options.get("figure", {}), str(options.get("image", {}).get("alt", ""))
        if cell.source.count("plt.show()") != 1 or cell.source.strip().split("\n")[-1] != "plt.show()":
            yield f"line {cell.line}: a cell that draws ends in plt.show(), and calls it once"
        if not figure.get("caption"):
            yield f"line {cell.line}: the figure has no caption"
        if not re.fullmatch(r"fig-[a-z0-9-]+", figure.get("name", "")):
            yield f"line {cell.line}: the figure has no name of the form fig-…"
        if len(alt.strip()) < MIN_ALT:
            yield f"line {cell.line}: the alt text has {len(alt.strip())} characters, at least {MIN_ALT}"


def limits(chapter: Chapter) -> Problems:
    """The size of a chapter."""
    written = chapter.text.split("\n---\n", 1)[-1].replace(chapter.code[0].source, "") if chapter.code else ""
    if (lines := sum(bool(line.strip()) for line in written.splitlines())) > MAX_LINES:
        yield f"{lines} lines, at most {MAX_LINES} (not counting blank ones, the header and the set-up cell)"
    if len(chapter.code) > MAX_CELLS:
        yield f"{len(chapter.code)} code cells, at most {MAX_CELLS}"
    for cell in chapter.code:
        if (lines := len(cell.source.splitlines())) > MAX_CELL_LINES:
            yield f"line {cell.line}: a cell of {lines} lines, at most {MAX_CELL_LINES}"


def exercises(chapter: Chapter) -> Problems:
    """Three to five exercises, each followed by a hint, a folded solution and a visible check, in this order."""
    pieces = [piece for section, piece in chapter.pieces if section == "Exercises"]
    rows: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, Cell):
            hidden = any(tag.startswith(("hide-", "remove-")) for tag in piece.tags)
            checks = re.search(r"^\s*assert\b", piece.source, re.MULTILINE) and not hidden
            step = "solution" if piece.tags == SOLUTION_TAGS else "check" if checks else "other cell"
        elif piece.name == "exercise":
            rows.append([])
            if not re.fullmatch(r"★{1,3} [1-9]\d* min: \S.*", piece.title):
                yield f"line {piece.line}: the title of an exercise is '★ 5 min: title', with one to three stars"
            if not piece.options.get("label", "").startswith("ex-"):
                yield f"line {piece.line}: an exercise has a label of the form ex-…"
            continue
        elif piece.name == "admonition" and piece.title.startswith("Hint") and piece.folded:
            step = "hint"
        else:
            continue
        if rows:
            rows[-1].append(step)
        else:
            yield "a hint, a solution or a check comes before the first exercise"
    if not 3 <= len(rows) <= 5:
        yield f"{len(rows)} exercises, expected 3 to 5"
    for number, steps in enumerate(rows, 1):
        if steps != ["hint", "solution", "check"]:
            yield f"exercise {number} is followed by {steps}, expected a hint, a solution and a check with an assert"


def mathematics(chapter: Chapter) -> Problems:
    """Equations written out, in lines that fit on a phone."""
    if macro := MACRO.search(chapter.body):
        yield f"the macro {macro[0]}: equations are written out"
    if environment := WIDE_ENVIRONMENT.search(chapter.body):
        yield f"{environment[0]} does not work inside $$: write aligned"
    for equation in DISPLAY.finditer(chapter.body):
        aligned = re.search(r"\\\\|&", equation[1])
        for line in equation[1].split("\n") if aligned else ():
            if len(line.strip()) > MAX_MATH_WIDTH:
                yield f"{len(line.strip())} characters in an aligned line, at most {MAX_MATH_WIDTH}: {line.strip()}"


def hygiene(chapter: Chapter) -> Problems:
    """No network after the set-up cell, no silenced warnings, no global random state."""
    for cell in chapter.code[1:]:
        if found := NETWORK.search(cell.source):
            yield f"line {cell.line}: {found[0]!r} outside the set-up cell: a chapter needs no network"
        if found := GLOBAL_STATE.search(cell.source):
            yield f"line {cell.line}: {found[0]!r}: no warning filters and no global random state"


def markup(chapter: Chapter) -> Problems:
    """Only the markup that has a plain form."""
    try:
        notebook(chapter.book, chapter.page)
    except ValueError as error:
        yield str(error)


def symbols(formula: str) -> set[str]:
    """The base symbols of a formula: ``\\hat H_Z^{(k)} + \\alpha`` gives ``H`` and ``\\alpha``.

    Accents, sub- and superscripts, words and functions are dropped; a letter in a calligraphic font is its own symbol.
    """
    formula = WORDS.sub("{}", formula)
    while (inner := SCRIPT.sub(" ", formula)) != formula:
        formula = inner
    found = set()
    for match in SYMBOL.finditer(formula):
        font, braced, bare, greek, letter = match.groups()
        symbol = rf"\{font}{{{braced or bare}}}" if font else rf"\{greek}" if greek else letter
        found |= {symbol} if symbol else set()
    return found - CONSTANTS


def formulas(text: str) -> Iterator[str]:
    """All mathematics of a piece of text."""
    for match in TOKEN.finditer(text):
        if match.lastgroup in ("display", "math"):
            yield match["tex"] or match[0]


def notation(chapter: Chapter) -> Problems:
    """Every base symbol stands in the table of book/notation.md, or in 'Setting and notation' of the chapter."""
    rows = re.findall(r"^\|(.*?)(?<!\\)\|", chapter.book.texts.get("book/notation", ""), re.MULTILINE)
    # In the table and where symbols are introduced, an index is a symbol too: the scripts are read as well.
    introduced = [
        re.sub(r"[_^]", " ", formula)
        for text in (*rows, chapter.section("Setting and notation"))
        for formula in formulas(text)
    ]
    known = set().union(*map(symbols, introduced)) if introduced else set()
    used = set().union(*map(symbols, formulas(chapter.body)))
    if unknown := sorted(used - known):
        yield f"symbols that neither book/notation.md nor 'Setting and notation' explains: {', '.join(unknown)}"


def pair(chapter: Chapter, root: Path) -> Problems:
    """The notebook beside the chapter: generated from it, without outputs."""
    path = root / f"{chapter.page}.ipynb"
    if not path.is_file():
        yield "there is no notebook beside it: run make notebooks"
        return
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    if any(cell["outputs"] or cell["execution_count"] is not None for cell in code):
        yield "the notebook holds outputs or execution counts"
    if ["".join(cell["source"]) for cell in code] != [cell.source for cell in chapter.code]:
        yield "the code of the notebook is not the code of the chapter: run make notebooks"
    try:
        if text != dumps(notebook(chapter.book, chapter.page)):
            yield "the notebook is out of step with the chapter: run make notebooks"
    except ValueError:
        yield "the chapter cannot become a notebook"


def claims(chapter: Chapter, root: Path) -> Problems:
    """Each claim: a literal identifier, a legal verdict, and a test that exists."""
    for cell, call in claim_calls(chapter):
        where = f"line {cell.line + call.lineno - 1}"
        options = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
        if not call.args or not _literal(call.args[0]):
            yield f"{where}: the identifier of a claim is written out as a string"
        if (verdict := options.get("verdict", "confirmed")) not in VERDICTS:
            yield f"{where}: the verdict {verdict!r} is none of {', '.join(VERDICTS)}"
        if not re.fullmatch(r"\[.+\]", options.get("source") or ""):
            yield f"{where}: the source of a claim is written '[key, equation]'"
        if not test_exists(root, options.get("test") or ""):
            yield f"{where}: there is no test {options.get('test')!r}"


def claim_calls(chapter: Chapter) -> Iterator[tuple[Cell, ast.Call]]:
    """Every ``run.claim(…)`` of a chapter."""
    for cell in (cell for cell in chapter.code if "run.claim" in cell.source):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.claim":
                yield cell, node


def _literal(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_exists(root: Path, test: str) -> bool:
    """Whether ``tests/test_x.py::test_y`` (or ``…::TestZ::test_y``) names a test."""
    file, *names = test.split("::")
    if not file or not names or not (root / file).is_file():
        return False
    body: list[ast.stmt] = ast.parse((root / file).read_text(encoding="utf-8")).body
    for name in names:
        named = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
        if not named:
            return False
        body = named[0].body
    return True


CHAPTER_CHECKS: list[Callable[[Chapter], Problems]] = [
    *(headings, claim_line, needs, frame, figures, limits, exercises, mathematics, hygiene, markup, notation)
]


def labels(book: Book) -> Problems:
    """Labels are unique in the book, and every equation label is cited and every citation finds its equation."""
    counts = Counter(label for label, _ in book.labels if label)
    yield from (f"the label {label} is given {count} times" for label, count in counts.items() if count > 1)
    equations = {label for label, place in book.labels if place.kind == "equation"}
    cited: set[str] = set()
    for page, text in book.texts.items():
        here = {target.strip() for target in re.findall(r"\{eq\}`([^`]+)`", masked(text))}
        yield from (f"{page}.md cites the unknown equation {label}" for label in sorted(here - equations))
        cited |= here
    yield from (f"the equation label {label} is never cited" for label in sorted(equations - cited))
    for label in sorted(equations):
        if not re.fullmatch(r"eq-[a-z0-9-]+", label):
            yield f"the equation label {label} is not of the form eq-…"


def claim_identifiers(chapters: list[Chapter]) -> Problems:
    """No two claims of the book share an identifier."""
    calls = [(chapter, call) for chapter in chapters for _, call in claim_calls(chapter)]
    counts = Counter(_literal(call.args[0]) for _, call in calls if call.args)
    yield from (f"the claim {name} is made {count} times" for name, count in counts.items() if name and count > 1)


def contents(root: Path) -> Problems:
    """Every chapter stands in the table of contents once, and every entry of it exists."""
    entries = Counter(toc_pages(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))
    yield from (f"{page} stands in _toc.yml {count} times" for page, count in entries.items() if count > 1)
    yield from (f"_toc.yml names {page}, which is missing" for page in entries if not (root / f"{page}.md").is_file())
    for path in sorted(root.glob("notebooks/*.md")):
        if f"notebooks/{path.stem}" not in entries:
            yield f"notebooks/{path.name} is not in _toc.yml"


def library(root: Path) -> Problems:
    """Every public function and class names its source, has a test and stands on a page; a constant has a test."""
    tests = "\n".join(path.read_text(encoding="utf-8") for path in root.glob("tests/**/*.py"))
    pages = [*root.glob("notebooks/*.md"), *root.glob("book/*.md")]
    chapters = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    for path in sorted(root.glob("icl_lib/*.py")):
        if path.name == "__init__.py":
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        definitions = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for name in public_names(body):
            mention = re.compile(rf"\b{re.escape(name)}\b")
            if not mention.search(tests):
                yield f"{path.stem}.{name} is used in no test"
            if name not in definitions:
                continue
            if not re.search(r"^Source: \[", ast.get_docstring(definitions[name]) or "", re.MULTILINE):
                yield f"{path.stem}.{name} has no line 'Source: […' in its docstring"
            if not mention.search(chapters):
                yield f"{path.stem}.{name} is mentioned on no page"


def public_names(body: list[ast.stmt]) -> list[str]:
    """The names in ``__all__`` of a module."""
    for node in body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def main() -> int:
    """Print what is wrong with the chapters of this book; `make book` stops there."""
    root = Path(__file__).resolve().parents[2]
    book = Book.load(root)
    chapters = [Chapter(book, f"notebooks/{path.stem}") for path in sorted(root.glob("notebooks/*.md"))]
    found = [
        f"{chapter.page}.md: {problem}"
        for chapter in chapters
        for check in CHAPTER_CHECKS
        for problem in check(chapter)
    ]
    found += labels(book)
    print("\n".join(found) if found else f"{len(chapters)} chapters keep to the contract")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
