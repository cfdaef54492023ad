"""Theory line and simulation dots in one style: one call for each kind of evidence in a figure.

A figure shows the formula as a line and the simulation as markers with error bars; what belongs together shares
the number of its series, which picks colour and marker. Full-size results lie pale behind, a baseline is grey and
dashed, a control is a red cross.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from icl_lib.sweeps import largest_deviation

__all__ = ["COLOURS", "MARKERS", "baseline", "compare", "control", "log_axis", "simulation", "stored", "theory"]

# The colours of Okabe and Ito that read well on white, in the order of the book's style file.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "*")


def theory(x: Any, y: Any, label: str, *, series: int = 0, ax: Axes | None = None, **style: Any) -> Line2D:
    """Draw a formula: a solid line.

    Args:
        x: abscissae, shape (points,).
        y: values of the formula, shape (points,).
        label: entry of the legend.
        series: number of the series, which picks the colour; the simulation of the same series shares it.
        ax: axes to draw on, by default the current ones.
        style: further properties of the line, such as ``color`` or ``linestyle``.

    Returns:
        The line.

    Raises:
        ValueError: if the shapes differ, a number is not finite, the label is empty, or ``series`` is not one of
            the seven colours.

    Source: [this book, "How to read and run this book"]
    """
    return _line(x, y, label, ax, {"color": COLOURS[_series(series)], "linestyle": "-", "zorder": 2} | style)


def simulation(
    x: Any, mean: Any, se: Any, label: str, *, series: int = 0, ax: Axes | None = None, **style: Any
) -> ErrorbarContainer:
    r"""Draw simulated means: markers, with error bars of two standard errors to either side.

    .. math:: \bar v \pm 2 \, \mathrm{se}

    Args:
        x: abscissae, shape (points,).
        mean: means over the runs, shape (points,).
        se: standard errors of the means, shape (points,).
        label: entry of the legend.
        series: number of the series, which picks colour and marker.
        ax: axes to draw on, by default the current ones.
        style: further properties of :meth:`matplotlib.axes.Axes.errorbar`.

    Returns:
        Markers, caps and bars.

    Raises:
        ValueError: if the shapes differ, a number is not finite, a standard error is negative, the label is empty,
            or ``series`` is not one of the seven markers.

    Source: [this book, "How to read and run this book"]
    """
    look = {"color": COLOURS[_series(series)], "marker": MARKERS[series], "capsize": 2, "zorder": 3}
    return _dots(x, mean, se, label, ax, look | style)


def stored(
    x: Any, mean: Any, se: Any, label: str, *, series: int = 0, ax: Axes | None = None, **style: Any
) -> ErrorbarContainer:
    r"""Draw stored full-size results: large pale markers behind everything else.

    .. math:: \bar v \pm 2 \, \mathrm{se}

    Args:
        x: abscissae, shape (points,).
        mean: means over the runs, shape (points,).
        se: standard errors of the means, shape (points,), or ``None`` for no error bars.
        label: entry of the legend.
        series: number of the series, which picks colour and marker.
        ax: axes to draw on, by default the current ones.
        style: further properties of :meth:`matplotlib.axes.Axes.errorbar`.

    Returns:
        Markers, caps and bars.

    Raises:
        ValueError: as for :func:`simulation`.

    Source: [this book, "How to read and run this book"]
    """
    look = {"color": COLOURS[_series(series)], "marker": MARKERS[series], "markersize": 10, "alpha": 0.3, "zorder": 1}
    return _dots(x, mean, se, label, ax, look | {"markeredgewidth": 0} | style)


def baseline(x: Any, y: Any, label: str, *, ax: Axes | None = None, **style: Any) -> Line2D:
    """Draw what a naive method reaches: a grey dashed line.

    Args:
        x: abscissae, shape (points,).
        y: values, shape (points,), or one level for all.
        label: entry of the legend.
        ax: axes to draw on, by default the current ones.
        style: further properties of the line.

    Returns:
        The line.

    Raises:
        ValueError: if the shapes differ, a number is not finite, or the label is empty.

    Source: [this book, "How to read and run this book"]
    """
    level = np.full(np.shape(x), float(y)) if np.ndim(y) == 0 else y
    return _line(x, level, label, ax, {"color": "0.5", "linestyle": "--", "zorder": 1.5} | style)


def control(x: Any, mean: Any, se: Any, label: str, *, ax: Axes | None = None, **style: Any) -> ErrorbarContainer:
    r"""Draw a negative control, which must miss the formula: red crosses.

    .. math:: \bar v \pm 2 \, \mathrm{se}

    Args:
        x: abscissae, shape (points,).
        mean: means over the runs, shape (points,).
        se: standard errors of the means, shape (points,), or ``None`` for no error bars.
        label: entry of the legend.
        ax: axes to draw on, by default the current ones.
        style: further properties of :meth:`matplotlib.axes.Axes.errorbar`.

    Returns:
        Markers, caps and bars.

    Raises:
        ValueError: as for :func:`simulation`.

    Source: [this book, "How to read and run this book"]
    """
    look = {"color": "#CC0000", "marker": "x", "markersize": 7, "markeredgewidth": 1.8, "zorder": 3}
    return _dots(x, mean, se, label, ax, look | style)


def compare(
    x: Any,
    dots: Any,
    formula: Callable[[Any], float],
    label: str,
    *,
    series: int = 0,
    grid: Any = None,
    ax: Axes | None = None,
) -> float:
    r"""Draw a formula through simulated means, and return by how much it misses them.

    .. math:: \max_j \frac{|\bar v_j - f(x_j)|}{\mathrm{se}_j}

    Args:
        x: abscissae of the simulation, shape (points,).
        dots: table with the columns ``mean`` and ``se``, one row a point, as :func:`icl_lib.sweeps.summarise` gives.
        formula: maps one abscissa to a number.
        label: entry of the legend for the markers; the line of the same colour is the formula.
        series: number of the series, which picks colour and marker.
        grid: abscissae at which the line is drawn, by default those of the simulation.
        ax: axes to draw on, by default the current ones.

    Returns:
        The largest deviation in standard errors.

    Raises:
        ValueError: as for :func:`theory` and :func:`simulation`.

    Source: [this book, "How to read and run this book"]
    """
    points = list(x if grid is None else grid)
    theory(points, [formula(point) for point in points], "_formula", series=series, ax=ax)
    simulation(x, dots["mean"], dots["se"], label, series=series, ax=ax)
    return largest_deviation(dots["mean"], dots["se"], [formula(point) for point in x])


def log_axis(which: str, ticks: Any, *, ax: Axes | None = None) -> None:
    """Make an axis logarithmic, with its ticks at the given numbers, written out.

    Args:
        which: ``"x"`` or ``"y"``.
        ticks: positive numbers.
        ax: the axes, by default the current ones.

    Raises:
        ValueError: for another axis, or a tick that is not positive.

    Source: [this book, "How to read and run this book"]
    """
    if which not in ("x", "y"):
        raise ValueError(f"which is {which!r}, expected 'x' or 'y'")
    values = _numbers("ticks", x=ticks)[0]
    if values.min() <= 0:
        raise ValueError(f"smallest tick is {values.min()}, expected positive numbers")
    chosen = ax or plt.gca()
    axis = chosen.xaxis if which == "x" else chosen.yaxis
    (chosen.set_xscale if which == "x" else chosen.set_yscale)("log")
    axis.set_major_locator(FixedLocator(values.tolist()))
    axis.set_major_formatter(FixedFormatter([f"{value:g}" for value in values]))
    axis.set_minor_locator(NullLocator())


def _line(x: Any, y: Any, label: str, ax: Axes | None, look: dict[str, Any]) -> Line2D:
    x, y = _numbers(label, x=x, y=y)
    (line,) = (ax or plt.gca()).plot(x, y, label=label, **look)
    return line


def _dots(x: Any, mean: Any, se: Any, label: str, ax: Axes | None, look: dict[str, Any]) -> ErrorbarContainer:
    given = {"x": x, "mean": mean} if se is None else {"x": x, "mean": mean, "se": se}
    x, mean, *errors = _numbers(label, **given)
    if errors and errors[0].min() < 0:
        raise ValueError(f"smallest se is {errors[0].min()}, expected standard errors of zero or more")
    bars = 2 * errors[0] if errors else None
    return (ax or plt.gca()).errorbar(x, mean, bars, label=label, **({"linestyle": "none"} | look))


def _numbers(label: str, **given: Any) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """The arrays to draw: one shape (points,), all finite; and a label that names them."""
    if not isinstance(label, str) or not label:
        raise ValueError(f"label is {label!r}, expected the entry of the legend")
    arrays = {}
    for name, values in given.items():
        try:
            array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {values!r}, expected numbers") from error
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds {array[~np.isfinite(array)].flat[0]}, expected finite numbers")
        arrays[name] = array
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["x"].ndim != 1 or not arrays["x"].size:
        raise ValueError(f"shapes are {shapes}, expected (points,) for all, with at least one point")
    return list(arrays.values())


def _series(series: int) -> int:
    if series not in range(len(COLOURS)):
        raise ValueError(f"series is {series!r}, expected an integer from 0 to {len(COLOURS) - 1}")
    return series
