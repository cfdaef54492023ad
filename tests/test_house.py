"""The repository itself: commands, pins, environment, settings, and a README that does what it says."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = "help book test test-slow check-pages notebooks student slides lint bench paper offline pdf lab serve clean"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())


def tracked() -> list[Path]:
    """Text files that are, or are about to be, part of the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def toc_pages() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


def test_every_command_is_documented_and_runs_whatever_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert commands == set(COMMANDS.split())
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony and commands <= set(phony[1].split())
    for command in sorted(commands):
        subprocess.run(["make", "--dry-run", command], cwd=ROOT, check=True, capture_output=True)


def test_the_readme_lists_the_chapters_in_order() -> None:
    listed = re.findall(r"^\d\. \[(.+)\]\((notebooks/.+)\.ipynb\)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    chapters = [page for page in toc_pages() if page.startswith("notebooks/")]
    titles = [re.findall(r"^# (.+)$", (ROOT / f"{page}.md").read_text(), re.MULTILINE)[0] for page in chapters]
    assert listed == list(zip(titles, chapters, strict=True))


def test_every_page_of_the_table_of_contents_has_sections() -> None:
    for page in toc_pages():
        text = (ROOT / f"{page}.md").read_text()
        for name in re.findall(r"\{include\} (\S+\.md)", text):
            included = ROOT / "book" / name
            text += included.read_text() if included.exists() else ""
        assert re.search(r"^# ", text, re.MULTILINE) and re.search(r"^## ", text, re.MULTILINE), page


def test_the_pins_satisfy_every_lower_bound() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {re.sub(r"[-_.]+", "-", pin.name).lower(): pin for pin in map(Requirement, filter(_is_pin, lines))}
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(text) for group in (PROJECT["dependencies"], *extras.values()) for text in group]
    for requirement in wanted:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name == PROJECT["name"]:
            assert requirement.extras <= set(extras)
            continue
        assert name in pins, f"{requirement} has no pin"
        (pin,) = pins[name].specifier
        assert pin.operator == "==" and requirement.specifier.contains(pin.version), f"{requirement}, pinned to {pin}"


def _is_pin(line: str) -> bool:
    return bool(line.strip()) and not line.startswith("#")


def test_the_conda_environment_installs_this_project() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    assert environment["channels"] == ["conda-forge"]
    *packages, last = environment["dependencies"]
    assert {"pip", "git"} <= set(packages)
    assert f"python{PROJECT['requires-python']}" in packages
    project = next(line.removeprefix("-e ") for line in last["pip"] if line.startswith("-e "))
    folder, extra = re.fullmatch(r"(.+)\[(.+)\]", project).groups()  # type: ignore[union-attr]
    assert (ROOT / folder / "pyproject.toml").is_file() and extra in PROJECT["optional-dependencies"]


def test_the_address_of_the_repository_is_set_in_one_place() -> None:
    sys.path.insert(0, str(ROOT / "book" / "ext"))
    try:
        from house import set_buttons
    finally:
        sys.path.pop(0)
    for url in ("", "https://github.com/owner/name"):
        options = {"repository_url": url, "launch_buttons": CONFIG["launch_buttons"]}
        set_buttons(None, SimpleNamespace(html_theme_options=options))  # type: ignore[arg-type]
        assert bool(options.get("use_repository_button")) == ("launch_buttons" in options) == bool(url)
    url = CONFIG["repository"]["url"]
    generated = {ROOT / "_config.yml", ROOT / "README.md", *(ROOT / "notebooks").iterdir()}
    for path in set(tracked()) - generated:
        assert not url or url not in read(path), f"{path.relative_to(ROOT)} repeats repository.url"


def test_no_file_holds_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.)}])/(?:home|root|work|tmp|Users)/\w")
    for path in tracked():
        found = pattern.search(read(path))
        assert not found, f"{path.relative_to(ROOT)} holds {found}"


def test_importing_the_library_is_light() -> None:
    heavy = ("pandas", "matplotlib", "joblib", "scipy.stats", "IPython", "tqdm")
    program = f"import sys, icl_lib; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


def test_the_examples_of_the_readme_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_key_of_the_literature_leads_somewhere() -> None:
    entries = re.split(r"^@", (ROOT / "book" / "references.bib").read_text(), flags=re.MULTILINE)[1:]
    keys = [entry.split("{", 1)[1].split(",", 1)[0] for entry in entries]
    assert len(keys) == len(set(keys)) >= 20
    for key, entry in zip(keys, entries, strict=True):
        assert re.search(r"^\s+(doi|url)\s+= \{", entry, re.MULTILINE), f"{key} has no link"


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"Version {version}" in (ROOT / "book" / "citing.md").read_text()


def test_the_example_of_the_readme_runs_and_agrees_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    source = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert source is not None
    exec(compile(source[1], "README.md", "exec"), {})
    simulated, formula = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert abs(simulated / formula - 1) < 5 * (2 / 4000) ** 0.5  # the relative s.e. of a mean of 4000 squares
    assert f"It prints {simulated:.3f} and {formula:.3f}:" in (ROOT / "README.md").read_text()


def test_the_recipes_of_a_forge_run_scripts_that_exist() -> None:
    recipes = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")]
    steps = [step for recipe in recipes for job in recipe["jobs"].values() for step in job["steps"]]
    commands = [step["run"].split()[0] for step in steps if "run" in step]
    assert set(commands) == {".ci/run", ".ci/versions", "make"}
    assert all(os.access(ROOT / command, os.X_OK) for command in set(commands) - {"make"})


def test_other_versions_than_the_known_ones_are_refused() -> None:
    done = subprocess.run([ROOT / ".ci/versions", "odd"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "the argument is 'odd', expected oldest, newest or present\n"
