"""Execute the chapters that changed, in parallel, into the cache that the book is then built from.

A chapter is stale if its code cells changed. The cache itself knows nothing else, so it is thrown away as a whole
when the library, a pinned version or the scale changes, and with it the pages that Sphinx made of its outputs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import single_nb_execution
from jupyter_cache.readers import get_reader
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "_build"
CACHE = BUILD / ".jupyter_cache"
STAMP = BUILD / ".jupyter_cache.stamp"
SCALE = os.environ.get("ICL_SCALE", "quick")
TIMEOUT = 600 if SCALE == "quick" else None


def parts() -> dict[str, list[str]]:
    """Names of the chapters of each part, in the order of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = {part["caption"]: [Path(entry["file"]) for entry in part["chapters"]] for part in toc["parts"]}
    found = {part: [file.name for file in group if file.parent.name == "notebooks"] for part, group in files.items()}
    return {part: names for part, names in found.items() if names}


def chapters() -> list[Path]:
    """Sources of all chapters."""
    return [ROOT / "notebooks" / f"{name}.md" for part in parts().values() for name in part]


def read(chapter: Path) -> NotebookNode:
    """A chapter as the notebook that the book build sees."""
    return get_reader({"type": "plugin", "name": "myst_nb_md"})(str(chapter))


def open_cache() -> JupyterCacheAbstract:
    """The cache of the book build; emptied if it was filled under other conditions."""
    digest = hashlib.sha256(SCALE.encode())
    for path in [ROOT / "constraints.txt", *sorted((ROOT / "icl_lib").rglob("*"))]:
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    if not STAMP.exists() or STAMP.read_text() != digest.hexdigest():
        for folder in (CACHE, BUILD / ".doctrees"):
            shutil.rmtree(folder, ignore_errors=True)
        BUILD.mkdir(exist_ok=True)
        STAMP.write_text(digest.hexdigest())
    return get_cache(str(CACHE))


def is_stale(cache: JupyterCacheAbstract, chapter: Path) -> bool:
    """Whether the cache lacks the outputs of a chapter's present code."""
    try:
        cache.match_cache_notebook(read(chapter))
    except KeyError:
        return True
    return False


def run(chapter: Path) -> tuple[NotebookNode, float, str]:
    """Execute one chapter in its own kernel: the notebook, the seconds, and the error, empty if there was none."""
    try:
        result = single_nb_execution(
            read(chapter),
            cwd=str(chapter.parent),
            timeout=TIMEOUT,
            allow_errors=False,
            extra_arguments=["--log-level=ERROR"],  # keep the kernel's own remarks out of the build's output
        )
    except Exception as error:  # a kernel that dies or does not start
        return NotebookNode(), 0.0, f"{type(error).__name__}: {error}"
    return result.nb, result.time, str(result.err or "")


def main() -> int:
    """Execute the stale chapters; returns 1 if one of them failed."""
    cache = open_cache()
    stale = [chapter for chapter in chapters() if is_stale(cache, chapter)]
    workers = max(1, min(len(stale), os.cpu_count() or 1))
    print(f"{len(stale)} of {len(chapters())} chapters to execute at scale {SCALE}, {workers} at a time", flush=True)
    failures = 0
    with ThreadPoolExecutor(workers) as pool:
        for chapter, (notebook, seconds, error) in zip(stale, pool.map(run, stale), strict=True):
            name = chapter.relative_to(ROOT)
            if error:
                failures += 1
                print(f"FAILED {name}\n{error}", file=sys.stderr, flush=True)
            else:
                bundle = CacheBundleIn(notebook, str(chapter), data={"execution_seconds": seconds})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
                print(f"executed {name} in {seconds:.0f} s", flush=True)
    if failures:
        print(f"{failures} of {len(stale)} chapters failed", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # kernels run side by side
        os.environ.setdefault(variable, "1")
    sys.exit(main())
