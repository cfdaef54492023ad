"""The command behind `make notebooks`: writes everything that follows from _config.yml and notebooks/*.md."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import yaml
from lowering import Book, Repository, dumps, notebook

ROOT = Path(__file__).resolve().parents[2]
SETUP = """\
# Install icl_lib where it is missing, for instance on Colab; where it is present, nothing is downloaded.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("icl_lib") is None:
    source = os.environ.get("ICL_LIB_SOURCE") or "{source}"
    if not source:
        raise RuntimeError("icl_lib is missing: set ICL_LIB_SOURCE to the folder or git+https address of the repository")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)
    importlib.invalidate_caches()"""
SETUP_CELL = re.compile(
    r"(^```\{code-cell\}[^\n]*\n:tags: \[hide-input, setup\]\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL
)
README_BLOCK = re.compile(r"(<!-- repository -->\n).*?(<!-- /repository -->)", re.DOTALL)


def setup_source(repository: Repository) -> str:
    """The set-up cell that all chapters share."""
    return SETUP.format(source=f"git+{repository.url}@{repository.branch}" if repository.url else "")


def stamped(text: str, repository: Repository, name: str) -> str:
    """A chapter with the set-up cell of this repository; ValueError unless the chapter has exactly one."""
    cells = SETUP_CELL.findall(text)
    if len(cells) != 1:
        raise ValueError(f"{name}: {len(cells)} cells are tagged `:tags: [hide-input, setup]`, expected exactly one")
    return SETUP_CELL.sub(lambda cell: f"{cell[1]}\n{setup_source(repository)}\n{cell[3]}", text)


def readme(text: str, repository: Repository) -> str:
    """The README with the commands that fetch and install this repository between its two markers."""
    if repository.url:
        folder = repository.url.rsplit("/", 1)[-1]
        block = f"```bash\ngit clone {repository.url}\ncd {folder}\npip install -e .\n```\n\n"
        block += f"The library alone: `pip install git+{repository.url}@{repository.branch}`.\n"
        if repository.address:
            block += f"The book online: <{repository.address}>.\n"
    else:
        block = "The public address of this repository is set in `_config.yml` (`repository.url`).\n"
    return README_BLOCK.sub(lambda match: match[1] + block + match[2], text)


def citation_file(text: str, repository: Repository) -> str:
    """CITATION.cff with this repository's addresses; a line without an address is commented out."""
    for key, value in (("repository-code", repository.url), ("url", repository.address or repository.url)):
        line = f'{key}: "{value}"' if value else f"# {key}: set by repository.url in _config.yml"
        text = re.sub(rf"^(?:# )?{key}:.*$", lambda _, line=line: line, text, flags=re.MULTILINE)  # type: ignore[misc]
    return text


def wanted(root: Path) -> dict[Path, str]:
    """Every file this command writes, with the text it should have."""
    repository = Repository.read(yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")))
    files = {}
    for path in sorted(root.glob("notebooks/*.md")):
        files[path] = stamped(path.read_text(encoding="utf-8"), repository, f"notebooks/{path.name}")
    book = Book.load(root, {f"notebooks/{path.stem}": text for path, text in files.items()})
    files |= {root / f"{page}.ipynb": dumps(notebook(book, page)) for page in book.chapters}
    for name, update in (("README.md", readme), ("CITATION.cff", citation_file)):
        if (root / name).is_file():
            files[root / name] = update((root / name).read_text(encoding="utf-8"), repository)
    return files


def stale(root: Path) -> dict[Path, str]:
    """The files whose text is not what it should be."""
    files = wanted(root)
    return {path: text for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write what is stale; with ``--check`` only list it and return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args(arguments).check
    try:
        files = stale(root)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in files.items():
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(root)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    orphans = [path for path in sorted(root.glob("notebooks/*.ipynb")) if not path.with_suffix(".md").is_file()]
    for path in orphans:
        print(f"without a source: {path.relative_to(root)}")
    return int(bool(orphans or (check and files)))


if __name__ == "__main__":
    sys.exit(main())
