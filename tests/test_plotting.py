"""Every kind of evidence is drawn in its own way, series are told apart by colour and marker, bad input is refused."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402

from icl_lib import plotting  # noqa: E402

X = [1.0, 2.0, 4.0]
MEAN = [3.0, 2.0, 1.0]
SE = [0.1, 0.2, 0.3]
LINES = (plotting.theory, plotting.baseline)
DOTS = (plotting.simulation, plotting.stored, plotting.control)


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def bars(container):
    """Lower and upper ends of the error bars."""
    (collection,) = container.lines[2]
    return np.array([segment[:, 1] for segment in collection.get_segments()]).T


def test_theory_is_a_solid_line(ax):
    line = plotting.theory(X, MEAN, "formula", series=2, ax=ax)
    assert line.get_linestyle() == "-" and line.get_marker() == "None"
    assert to_hex(line.get_color()).upper() == plotting.COLOURS[2]
    assert line.axes is ax and line.get_label() == "formula"
    np.testing.assert_array_equal(line.get_xydata(), np.stack([X, MEAN], axis=1))


def test_simulation_is_markers_with_two_standard_errors(ax):
    container = plotting.simulation(X, MEAN, SE, "simulation", series=1, ax=ax)
    markers = container.lines[0]
    assert markers.get_linestyle() == "None" and markers.get_marker() == plotting.MARKERS[1]
    assert container.get_label() == "simulation"
    lower, upper = bars(container)
    np.testing.assert_allclose(lower, np.subtract(MEAN, 2 * np.array(SE)), rtol=1e-12)
    np.testing.assert_allclose(upper, np.add(MEAN, 2 * np.array(SE)), rtol=1e-12)


def test_theory_and_simulation_of_a_series_share_the_colour(ax):
    for series in range(len(plotting.COLOURS)):
        line = plotting.theory(X, MEAN, "formula", series=series, ax=ax)
        markers = plotting.simulation(X, MEAN, SE, "simulation", series=series, ax=ax).lines[0]
        assert to_rgb(line.get_color()) == to_rgb(markers.get_color())


def test_series_differ_in_colour_and_in_marker(ax):
    drawn = [plotting.simulation(X, MEAN, SE, f"series {i}", series=i, ax=ax).lines[0] for i in range(7)]
    for one, other in itertools.combinations(drawn, 2):
        assert to_rgb(one.get_color()) != to_rgb(other.get_color())
        assert one.get_marker() != other.get_marker()


def test_colours_are_those_of_the_style_file():
    from importlib import resources

    with resources.as_file(resources.files("icl_lib.data") / "icl.mplstyle") as path, plt.style.context(path):
        cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [to_rgb(colour) for colour in cycle] == [to_rgb(colour) for colour in plotting.COLOURS]


def test_baseline_is_grey_and_dashed_and_may_be_a_level(ax):
    line = plotting.baseline(X, 0.5, "chance", ax=ax)
    red, green, blue = to_rgb(line.get_color())
    assert line.get_linestyle() == "--" and red == green == blue
    np.testing.assert_array_equal(line.get_ydata(), [0.5, 0.5, 0.5])
    np.testing.assert_array_equal(plotting.baseline(X, MEAN, "ridge", ax=ax).get_ydata(), MEAN)


def test_control_is_a_red_cross(ax):
    for se in (None, SE):
        markers = plotting.control(X, MEAN, se, "shuffled labels", ax=ax).lines[0]
        red, green, blue = to_rgb(markers.get_color())
        assert markers.get_marker() == "x" and markers.get_linestyle() == "None"
        assert red > 0.7 and green < 0.2 and blue < 0.2
        assert "x" not in plotting.MARKERS


def test_stored_results_lie_pale_and_large_behind_the_live_ones(ax):
    live = plotting.simulation(X, MEAN, SE, "live", ax=ax).lines[0]
    line = plotting.theory(X, MEAN, "formula", ax=ax)
    for se in (None, SE):
        full = plotting.stored(X, MEAN, se, "full size", ax=ax).lines[0]
        assert full.get_alpha() < 0.5 and full.get_markersize() > live.get_markersize()
        assert full.get_zorder() < line.get_zorder() < live.get_zorder()
        assert to_rgb(full.get_color()) == to_rgb(live.get_color())


def test_without_axes_the_current_ones_are_used(ax):
    plt.sca(ax)
    plotting.theory(X, MEAN, "formula")
    plotting.simulation(X, MEAN, SE, "simulation")
    assert [text.get_text() for text in ax.legend().get_texts()] == ["formula", "simulation"]


def test_style_overrides_the_defaults(ax):
    line = plotting.theory(X, MEAN, "formula", color="black", linestyle=":", ax=ax)
    assert to_rgb(line.get_color()) == (0, 0, 0) and line.get_linestyle() == ":"
    assert plotting.simulation(X, MEAN, SE, "simulation", marker="h", ax=ax).lines[0].get_marker() == "h"


def test_comparison_draws_both_and_returns_the_largest_deviation(ax):
    dots = pd.DataFrame({"mean": MEAN, "se": SE})
    deviation = plotting.compare(X, dots, lambda x: 4 - x, "simulation", series=2, grid=np.linspace(1, 4, 7), ax=ax)
    assert deviation == pytest.approx(1.0 / 0.3, rel=1e-12)  # 4 - x misses the last mean by one
    line, markers = ax.lines[0], ax.containers[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), 4 - np.linspace(1, 4, 7))
    np.testing.assert_array_equal(markers.get_ydata(), MEAN)
    assert to_rgb(line.get_color()) == to_rgb(markers.get_color())
    assert ax.get_legend_handles_labels()[1] == ["simulation"]
    plotting.compare(X, dots, lambda x: 4 - x, "again", ax=ax)
    np.testing.assert_array_equal(ax.containers[1].lines[0].get_xdata(), X)


@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_axis_writes_its_ticks_out(ax, which):
    plotting.log_axis(which, [1, 20, 500], ax=ax)
    axis = getattr(ax, f"{which}axis")
    assert axis.get_scale() == "log" and len(axis.get_minorticklocs()) == 0
    assert axis.get_majorticklocs().tolist() == [1, 20, 500]
    assert [text.get_text() for text in axis.get_ticklabels()] == ["1", "20", "500"]


def test_bad_logarithmic_axes_are_refused(ax):
    with pytest.raises(ValueError, match="which is 'z'"):
        plotting.log_axis("z", [1.0], ax=ax)
    with pytest.raises(ValueError, match="smallest tick is 0.0"):
        plotting.log_axis("x", [0.0, 1.0], ax=ax)


@pytest.mark.parametrize(
    "kind",
    [
        np.array,
        pd.Series,
        tuple,
        lambda values: torch.tensor(values, requires_grad=True),
        lambda values: torch.tensor(values, dtype=torch.float64),
    ],
)
def test_arrays_of_every_kind(ax, kind):
    line = plotting.theory(kind(X), kind(MEAN), "formula", ax=ax)
    np.testing.assert_array_equal(line.get_ydata(), MEAN)
    container = plotting.simulation(kind(X), kind(MEAN), kind(SE), "simulation", ax=ax)
    np.testing.assert_allclose(bars(container)[1], np.add(MEAN, 2 * np.array(SE)), rtol=1e-6)


@pytest.mark.parametrize("draw", [*LINES, *DOTS])
@pytest.mark.parametrize(
    "x, y, label, message",
    [
        (X, MEAN[:2], "a", r"\(3,\).*\(2,\)"),
        ([X], [MEAN], "a", r"\(1, 3\)"),
        ([], [], "a", "at least one point"),
        (X, [1.0, float("nan"), 2.0], "a", "nan, expected finite"),
        (X, [1.0, float("inf"), 2.0], "a", "inf, expected finite"),
        (X, ["one", "two", "three"], "a", "expected numbers"),
        (X, MEAN, "", "entry of the legend"),
    ],
)
def test_bad_input_is_refused(ax, draw, x, y, label, message):
    arguments = (x, y, label) if draw in LINES else (x, y, np.ones_like(y, dtype=float) if y else [], label)
    with pytest.raises(ValueError, match=message):
        draw(*arguments, ax=ax)
    assert not ax.lines and not ax.containers


def test_negative_errors_and_unknown_series_are_refused(ax):
    with pytest.raises(ValueError, match="smallest se is -0.1"):
        plotting.simulation(X, MEAN, [0.1, -0.1, 0.1], "simulation", ax=ax)
    for series in (-1, 7):
        with pytest.raises(ValueError, match=f"series is {series}, expected an integer from 0 to 6"):
            plotting.theory(X, MEAN, "formula", series=series, ax=ax)
