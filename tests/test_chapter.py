"""The chapter's frame: scale, seeds, claims that hold and claims that do not, and the closing line."""

import math
from importlib.metadata import version
from pathlib import Path

import matplotlib
import pytest
import torch

from icl_lib import chapter

matplotlib.use("agg")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> chapter.Chapter:
    monkeypatch.delenv("ICL_SCALE", raising=False)
    with matplotlib.rc_context():
        return chapter.start("a-chapter", seed=7)


def claim(run: chapter.Chapter, measured: float = 1.0, **criterion: float) -> None:
    run.claim("T1", "One is one.", measured=measured, source="[this test]", **criterion)


def test_quick_is_the_default_scale(run: chapter.Chapter) -> None:
    assert run.scale == chapter.scale() == "quick"
    assert run.pick(quick=1, paper=2) == 1


@pytest.mark.parametrize("gpu", [False, True])
def test_paper_scale_picks_the_papers_sizes_and_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: bool
) -> None:
    monkeypatch.setenv("ICL_SCALE", "paper")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with matplotlib.rc_context():
        run = chapter.start("a-chapter", seed=7)
    assert run.pick(quick=1, paper=2) == 2 and run.device.type == ("cuda" if gpu else "cpu")
    assert ("No GPU found" in capsys.readouterr().out) != gpu


def test_misspelt_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICL_SCALE", "papre")
    with pytest.raises(ValueError, match="'papre', expected one of quick, paper"):
        chapter.scale()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("slug", "seed"), [("", 1), (3, 1), ("a", -1), ("a", 0.5), ("a", True)])
def test_a_chapter_needs_a_name_and_a_seed(slug: str, seed: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        chapter.start(slug, seed=seed)


def test_generators_repeat_and_streams_differ(run: chapter.Chapter) -> None:
    first, again, other = (torch.randn(3, generator=run.generator(stream, device="cpu")) for stream in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for stream in (-1, 1_000_000):
        with pytest.raises(ValueError, match="stream"):
            run.generator(stream)


@pytest.mark.parametrize("criterion", [{"expected": 1.1, "tolerance": 0.2}, {"at_most": 1.0}, {"at_least": 1.0}])
def test_a_claim_that_holds_becomes_a_row(run: chapter.Chapter, criterion: dict[str, float]) -> None:
    claim(run, error=0.05, **criterion)
    (row,) = run.claims
    assert (row["id"], row["chapter"], row["verdict"], row["scale"]) == ("T1", "a-chapter", "confirmed", "quick")
    assert row["measured"] == "1 ± 0.05"


@pytest.mark.parametrize("criterion", [{"expected": 1.1, "tolerance": 0.05}, {"at_most": 0.9}, {"at_least": 1.1}])
def test_a_claim_that_fails_stops_the_chapter(run: chapter.Chapter, criterion: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match="claim T1 fails: measured 1, required"):
        claim(run, **criterion)
    assert not run.claims


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_a_measurement_must_be_finite(run: chapter.Chapter, measured: float) -> None:
    for criterion in ({"at_most": math.inf}, {"at_least": -math.inf}):
        with pytest.raises(AssertionError, match="claim T1 fails"):
            claim(run, measured, **criterion)


@pytest.mark.parametrize("criterion", [{}, {"expected": 1.0}, {"tolerance": 1.0}, {"at_most": 2.0, "at_least": 0.0}])
def test_a_claim_has_exactly_one_criterion(run: chapter.Chapter, criterion: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected and tolerance|exactly one"):
        claim(run, **criterion)


def test_a_verdict_must_be_known(run: chapter.Chapter) -> None:
    with pytest.raises(ValueError, match="'refuted', expected one of confirmed"):
        run.claim("T1", "One is one.", measured=1.0, at_most=2.0, source="[this test]", verdict="refuted")


def test_in_a_notebook_the_last_cell_hands_over_all_rows(run: chapter.Chapter, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, object]] = []
    monkeypatch.setattr("IPython.core.getipython.get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    claim(run, at_most=2.0)
    run.finish()
    assert shown[0][chapter.CLAIM_MIMETYPE] == run.claims
    assert shown[0]["text/plain"] == "1 claims checked"


def test_the_last_line_says_how_the_chapter_ran(run: chapter.Chapter, capsys: pytest.CaptureFixture[str]) -> None:
    claim(run, at_most=2.0)
    run.finish()
    printed = capsys.readouterr().out
    assert f"torch {version('torch')}" in printed
    assert "seed 7" in printed and "scale quick" in printed and "1 claims checked" in printed


def test_scales_and_verdicts_are_those_of_the_book() -> None:
    for name, words in (("reading", chapter.SCALES), ("ledger", chapter.VERDICTS)):
        page = (Path(__file__).parents[1] / "book" / f"{name}.md").read_text()
        assert all(word in page for word in words), (name, words)
