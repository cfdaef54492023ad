"""What every chapter shares: scale, device, seeds, figure style, checked claims, the closing line.

A chapter begins with ``run = chapter.start(slug, seed=...)`` and ends with ``run.finish()``. In between,
``run.pick`` chooses sizes by scale, ``run.generator`` hands out random generators, and ``run.claim`` asserts
a claim and records the row that the claims ledger is made of.
"""

from __future__ import annotations

import math
import os
import platform
import time
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from typing import Any, TypeVar

import torch

__all__ = ["SCALES", "VERDICTS", "CLAIM_MIMETYPE", "Chapter", "scale", "start"]

SCALES = ("quick", "paper")
VERDICTS = ("confirmed", "corrected", "holds only if", "not reproduced")
CLAIM_MIMETYPE = "application/vnd.icl.claim+json"
T = TypeVar("T")


def scale() -> str:
    """Name of the scale at which the notebooks run, from the environment variable ``ICL_SCALE``.

    Returns:
        ``"quick"`` (the default: at most a minute on two cores) or ``"paper"`` (the papers' sizes).

    Raises:
        ValueError: if the variable holds anything else.

    Source: [this book, "How to read and run this book"]
    """
    name = os.environ.get("ICL_SCALE", "quick")
    if name not in SCALES:
        raise ValueError(f"ICL_SCALE is {name!r}, expected one of {', '.join(SCALES)}")
    return name


def start(slug: str, *, seed: int) -> Chapter:
    """Open a chapter: fix its seed, scale and device, and load the book's figure style.

    Args:
        slug: file name of the chapter without its ending.
        seed: root of all random numbers of the chapter, a non-negative integer.

    Returns:
        The running :class:`Chapter`.

    Raises:
        ValueError: if the slug is empty or the seed is negative or not an integer.

    Source: [this book, "How to read and run this book"]
    """
    if not isinstance(slug, str) or not slug:
        raise ValueError(f"slug is {slug!r}, expected the chapter's file name without its ending")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}, expected a non-negative integer")
    import matplotlib.pyplot as plt

    with resources.as_file(resources.files("icl_lib.data") / "icl.mplstyle") as style:
        plt.style.use(style)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if scale() == "paper" and device.type == "cpu":
        print("No GPU found: at scale paper this chapter takes longer on the processor, see 'Running at scale'.")
    return Chapter(slug=slug, seed=seed, scale=scale(), device=device)


@dataclass(frozen=True)
class Chapter:
    """A running chapter: its slug, seed, scale and device, and the claims it has checked so far.

    Source: [this book, "How to read and run this book"]
    """

    slug: str
    seed: int
    scale: str
    device: torch.device
    claims: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def pick(self, *, quick: T, paper: T) -> T:
        """The value that belongs to the scale at which the chapter runs."""
        return quick if self.scale == "quick" else paper

    def generator(self, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator; each ``stream`` is a separate sequence. ``device=run.device`` puts large work on a GPU."""
        if stream < 0 or stream >= 1_000_000:
            raise ValueError(f"stream is {stream}, expected an integer from 0 to 999999")
        generator = torch.Generator(device=device)
        return generator.manual_seed(self.seed * 1_000_000 + stream)

    def claim(
        self,
        identifier: str,
        statement: str,
        *,
        measured: float,
        source: str,
        verdict: str = "confirmed",
        expected: float | None = None,
        tolerance: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
        error: float | None = None,
        test: str = "",
    ) -> None:
        """Assert a claim with the number just measured, print it, and keep its row for the claims ledger.

        Exactly one criterion is given: ``expected`` together with ``tolerance``, ``at_most``, or ``at_least``.

        Args:
            identifier: short key of the claim, unique in the book.
            statement: the claim in one sentence.
            measured: the number measured by this cell.
            source: where the claim comes from, ``[key, equation or section]``.
            verdict: one of :data:`VERDICTS`.
            expected: value that ``measured`` must meet within ``tolerance``.
            tolerance: largest allowed distance from ``expected``.
            at_most: bound from above.
            at_least: bound from below.
            error: standard error of ``measured``, where it is random.
            test: the unit test that checks the same claim, ``tests/test_x.py::test_y``.

        Raises:
            AssertionError: if the measurement does not meet the criterion.
            ValueError: for an unknown verdict, or no criterion, or more than one.

        Source: [this book, "Claims ledger"]
        """
        if verdict not in VERDICTS:
            raise ValueError(f"verdict is {verdict!r}, expected one of {', '.join(VERDICTS)}")
        if (expected is None) != (tolerance is None):
            raise ValueError("expected and tolerance are given together, or not at all")
        if sum(bound is not None for bound in (expected, at_most, at_least)) != 1:
            raise ValueError("give exactly one of: expected with tolerance, at_most, at_least")
        measured = float(measured)
        if expected is not None and tolerance is not None:
            holds = abs(measured - float(expected)) <= float(tolerance)
            criterion = f"= {float(expected):.6g} ± {float(tolerance):.2g}"
        elif at_most is not None:
            holds = measured <= float(at_most)
            criterion = f"≤ {float(at_most):.4g}"
        else:
            assert at_least is not None
            holds = measured >= float(at_least)
            criterion = f"≥ {float(at_least):.4g}"
        shown = f"{measured:.6g}" + (f" ± {float(error):.2g}" if error is not None else "")
        assert holds and math.isfinite(measured), f"claim {identifier} fails: measured {shown}, required {criterion}"
        row = {
            "id": identifier,
            "statement": statement,
            "source": source,
            "verdict": verdict,
            "measured": shown,
            "criterion": criterion,
            "chapter": self.slug,
            "test": test,
            "scale": self.scale,
        }
        self.claims.append(row)
        print(f"✔ claim {identifier} ({verdict}): {shown}, required {criterion}")

    def finish(self) -> None:
        """Print versions, seed, device, scale and seconds, and hand the claims over to the ledger."""
        seconds = time.perf_counter() - self.started
        packages = ", ".join(f"{name} {version(name)}" for name in ("icl-lib", "torch", "numpy", "matplotlib"))
        print(f"Python {platform.python_version()}, {packages}")
        print(f"seed {self.seed}, device {self.device.type}, scale {self.scale}, {seconds:.0f} s")
        checked = f"{len(self.claims)} claims checked"
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        if get_ipython() is None:
            print(checked)
        else:
            display({"text/plain": checked, CLAIM_MIMETYPE: self.claims}, raw=True)
