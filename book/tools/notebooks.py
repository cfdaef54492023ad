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
        raise RuntimeError("icl_lib is missing: set ICL_LIB_SOURCE to the repository's folder or git+https address")
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
        block = "This copy has no public address yet (`repository.url` in `_config.yml`); work in its folder.\n"
    return README_BLOCK.sub(lambda match: match[1] + block + match[2], text)


def citation_file(text: str, repository: Repository) -> str:
    """CITATION.cff with this repository's addresses; a line without an address is commented out."""
    for key, value in (("repository-code", repository.url), ("url", repository.address or repository.url)):
        line = f'{key}: "{value}"' if value else f"# {key}: set by repository.url in _config.yml"
        text = re.sub(rf"^(?:# )?{key}:.*$", line, text, flags=re.MULTILINE)
    return text


def wanted(root: Path) -> tuple[dict[Path, str], list[str]]:
    """Every file this command writes, with the text it should have, and what is wrong with the chapters left out."""
    repository = Repository.read(yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")))
    files: dict[Path, str] = {}
    errors: list[str] = []
    for path in sorted(root.glob("notebooks/*.md")):
        try:
            files[path] = stamped(path.read_text(encoding="utf-8"), repository, f"notebooks/{path.name}")
        except ValueError as error:
            errors.append(str(error))
    chapters = {f"notebooks/{path.stem}": text for path, text in files.items()}
    book = Book.load(root, chapters)
    for page in chapters:
        try:
            files[root / f"{page}.ipynb"] = dumps(notebook(book, page))
        except ValueError as error:
            errors.append(str(error))
    for name, update in (("README.md", readme), ("CITATION.cff", citation_file)):
        if (root / name).is_file():
            files[root / name] = update((root / name).read_text(encoding="utf-8"), repository)
    return files, errors


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write what is stale; with ``--check`` only list it. Returns 1 if something is wrong, or stale and not written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is stale")
    check = parser.parse_args(arguments).check
    files, errors = wanted(root)
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{'stale' if check else 'wrote'}: {path.relative_to(root)}")
        if not check:
            path.write_text(files[path], encoding="utf-8")
    for path in sorted(root.glob("notebooks/*.ipynb")):
        if not path.with_suffix(".md").is_file():
            errors.append(f"without a source: {path.relative_to(root)}")
    print(*errors, sep="\n", end="\n" if errors else "", file=sys.stderr)
    return int(bool(errors or (check and stale)))


if __name__ == "__main__":
    sys.exit(main())
