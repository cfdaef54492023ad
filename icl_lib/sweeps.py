"""Monte Carlo experiments: every point of a grid with every seed, in parallel, resumed after any interruption.

:func:`run` makes the table, :func:`status` tells how far it is, :func:`summarise` turns it into means and
standard errors, and :func:`largest_deviation` with :func:`deviation_limit` says whether these agree with a formula.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import itertools
import json
import math
import numbers
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from types import CodeType, EllipsisType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas

__all__ = ["deviation_limit", "largest_deviation", "run", "status", "summarise"]

# The part of this package that makes numbers, as it was when it was imported: stored results depend on it.
_SCIENCE = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in ("chapter", "plotting"))
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _SCIENCE)).hexdigest()


def run(
    function: Callable[..., Any],
    grid: Any,
    seeds: Any,
    *,
    store: str | os.PathLike[str] | None = None,
    n_jobs: int | None = None,
    progress: bool | None = None,
) -> pandas.DataFrame:
    """Evaluate ``function(seed=seed, **point)`` for every point of a grid and every seed.

    The table is the same to the last bit for any number of workers and after any interruption. To that end every
    evaluation runs on one torch thread, since sums split over threads round differently. Linear algebra of numpy
    and scipy inside ``function`` has threads of its own: start Python with ``OPENBLAS_NUM_THREADS=1`` then.

    With a store, each result is written by the worker that found it, as soon as it is found, to a small JSON file
    of its own with a checksum. A kill loses only evaluations in progress (and may leave a ``.tmp`` file, which is
    ignored); damaged files are computed again. After Ctrl-C, a kill or an error the same call goes on from there.
    A result is reused only if nothing known to have made it has changed: point and seed; the sources of this package;
    the versions of Python's bytecode, numpy, scipy and torch; the code of ``function``, its defaults, the arguments
    bound by ``functools.partial``, captured variables, and the globals that it reads, with the functions and classes
    among them followed as long as they live in the same top-level package. What it reaches through another module
    counts by name only: take a fresh store when such a helper changes.

    Args:
        function: called with keyword arguments only; returns a number, or a mapping from column name to a number,
            string or bool. It takes all its randomness from ``seed``.
        grid: mapping from name to its values (their cartesian product, the last name running fastest), or an
            iterable of points, each a mapping from the same names to scalars.
        seeds: a number n, for the seeds 0 to n−1, or distinct integers.
        store: directory of finished results, created if missing; several runs may share it.
        n_jobs: number of worker processes, −1 for all cores; ``None`` stays in this process, unless
            ``joblib.parallel_config`` has set another backend (a Dask cluster, say, whose workers then need the
            store under the same path, and the same versions).
        progress: show a bar on the standard error; ``None`` shows it only in an interactive terminal.

    Returns:
        One row per point and seed, in the order of the grid and then of the seeds: the point, ``seed``, and the
        columns of the result (``value`` for a plain number).

    Raises:
        ValueError: if grid, seeds or n_jobs are malformed, a result is not made of scalars or repeats a name of the
            grid, or the store cannot tell what ``function`` depends on.
        RuntimeError: from the error that ``function`` raised, naming point and seed; if a worker process was killed;
            or if a worker has other versions than this process. Stored results stay.
        OSError: if the store cannot be written to.
        KeyboardInterrupt: at Ctrl-C, with the number of stored results. They stay.

    Source: [this book, "How to read and run this book"]
    """
    import joblib
    import pandas as pd
    from tqdm import tqdm

    if n_jobs is not None and (isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs == 0):
        raise ValueError(f"n_jobs is {n_jobs!r}, expected a number of processes, -1 for all cores, or None")
    pairs = list(itertools.product(_points(grid), _seeds(seeds)))
    identity = {} if store is None else _identity(function)
    directory = None if store is None else _open(store)
    headers = [_header(identity, point, seed) for point, seed in pairs]
    results = [None if directory is None else _read(directory, header) for header in headers]
    waiting = [index for index, result in enumerate(results) if result is None]

    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    calls = (joblib.delayed(_evaluate)(function, *pairs[index], directory, headers[index]) for index in waiting)
    shown = sys.stderr.isatty() if progress is None else progress
    threads = torch.get_num_threads()
    try:
        with tqdm(total=len(pairs), initial=len(pairs) - len(waiting), disable=not shown) as bar:
            for index, result in zip(waiting, parallel(calls) if waiting else (), strict=True):
                results[index] = result
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {_kept(directory, headers)}") from None
    except Exception as error:
        if isinstance(error, BrokenProcessPool) or type(error).__name__ == "KilledWorker":  # of joblib, of Dask
            cause = f"a worker process died, killed from outside or out of memory; {_kept(directory, headers)}"
            raise RuntimeError(cause) from error
        raise
    finally:
        torch.set_num_threads(threads)
    rows = [{**point, "seed": seed, **(result or {})} for (point, seed), result in zip(pairs, results, strict=True)]
    return pd.DataFrame(rows)


def status(function: Callable[..., Any], grid: Any, seeds: Any, *, store: str | os.PathLike[str]) -> pandas.DataFrame:
    """What a store holds of a sweep: how many evaluations of each point are done, missing and damaged.

    It counts what :func:`run` with the same arguments would find, changes nothing, and may be called while other
    processes work on the store.

    Args:
        function: as in :func:`run`.
        grid: as in :func:`run`.
        seeds: as in :func:`run`.
        store: directory of finished results; one that does not exist holds none.

    Returns:
        One row per point, in the order of the grid: the point, and the numbers of seeds that are ``done``, ``missing``
        (no result of this function, library and versions) and ``damaged`` (a file that is not what was written, or
        cannot be read). :func:`run` computes the missing and the damaged ones.

    Raises:
        ValueError: as :func:`run`, or if the grid has a name among done, missing and damaged.

    Source: [this book, "Running at scale"]
    """
    import pandas as pd

    points, listed = _points(grid), _seeds(seeds)
    if clash := points[0].keys() & {"done", "missing", "damaged"}:
        raise ValueError(f"grid has the names {sorted(clash)}, expected no name among done, missing and damaged")
    identity, directory, rows = _identity(function), _directory(store), []
    for point in points:
        headers = [_header(identity, point, seed) for seed in listed]
        there = [header for header in headers if _path(directory, header).exists()]
        done = sum(_read(directory, header) is not None for header in there)
        rows.append({**point, "done": done, "missing": len(listed) - len(there), "damaged": len(there) - done})
    return pd.DataFrame(rows)


def summarise(frame: pandas.DataFrame, by: Any, value: str = "value") -> pandas.DataFrame:
    r"""Mean and standard error over the runs of each group of a table.

    .. math:: \bar v = \frac1n \sum_{i=1}^n v_i, \qquad
        \mathrm{se} = \frac{1}{\sqrt n} \sqrt{\frac{1}{n-1} \sum_{i=1}^n (v_i - \bar v)^2}

    Args:
        frame: table with one row per run, as :func:`run` returns it.
        by: name or names of the columns that tell the groups apart.
        value: column to average.

    Returns:
        One row per group in order of appearance, with the columns ``by``, ``mean``, ``se`` and ``runs`` (n).

    Raises:
        ValueError: if a column is missing, a value is not a finite number, or a group has fewer than two runs.

    Source: [this book, "How to read and run this book"]
    """
    names = [by] if isinstance(by, str) else list(by)
    if not names or len({*names, value}) <= len(names) or not {*names, value} <= set(frame.columns):
        raise ValueError(f"by is {by!r} and value {value!r}, expected distinct columns among {list(frame.columns)}")
    if not {"mean", "se", "runs"}.isdisjoint(names):
        raise ValueError(f"by is {by!r}, expected no column named mean, se or runs")
    frame = frame.assign(**{value: _finite(value, frame[value].to_numpy())})
    groups = frame.groupby(names, sort=False, dropna=False, observed=True)[value]
    table = groups.agg(mean="mean", se="sem", runs="size").reset_index()
    if not len(table) or table["runs"].min() < 2:
        raise ValueError(f"expected at least two runs in every group, found\n{table[[*names, 'runs']]}")
    return table


def largest_deviation(mean: Any, se: Any, theory: Any) -> float:
    r"""Largest distance between simulation and theory, in standard errors.

    .. math:: \max_i \, |\bar v_i - v_i| \,/\, \mathrm{se}_i

    Args:
        mean: simulated means :math:`\bar v`, any shape.
        se: their standard errors, same shape, positive.
        theory: predicted values :math:`v`, same shape.

    Returns:
        The largest ratio, to be compared with :func:`deviation_limit`.

    Raises:
        ValueError: if the shapes differ, there is no point, a number is not finite, or a standard error not positive.

    Source: [this book, "How to read and run this book"]
    """
    mean, se, theory = _finite("mean", mean), _finite("se", se), _finite("theory", theory)
    if not mean.shape == se.shape == theory.shape or mean.size == 0:
        shapes = f"{mean.shape}, {se.shape}, {theory.shape}"
        raise ValueError(f"mean, se and theory have shapes {shapes}, expected one shape with at least one point")
    if se.min() <= 0:
        raise ValueError(f"smallest se is {se.min()}, expected positive standard errors")
    return float(np.max(np.abs(mean - theory) / se))


def deviation_limit(points: int, runs: int, level: float = 1e-3) -> float:
    r"""Bound that :func:`largest_deviation` exceeds with probability ``level`` at most if the theory is right.

    The means of normal runs deviate by Student's :math:`t` with :math:`n-1` degrees of freedom; the level is shared
    among the points (Bonferroni), which holds whether or not they are independent:

    .. math:: t_{n-1}^{-1}\!\left(1 - \frac{\mathrm{level}}{2 \cdot \mathrm{points}}\right)

    Args:
        points: number of means compared.
        runs: number n of runs behind each mean.
        level: probability of a false alarm.

    Returns:
        The bound, in standard errors.

    Raises:
        ValueError: if ``points`` is below 1, ``runs`` below 2, or ``level`` not between 0 and 1.

    Source: [this book, "How to read and run this book"]
    """
    plain = all(isinstance(given, numbers.Real) for given in (points, runs, level))
    if not (plain and points >= 1 and runs >= 2 and 0 < level < 1):
        given = f"points {points}, runs {runs}, level {level}"
        raise ValueError(f"got {given}, expected points >= 1, runs >= 2 and a level between 0 and 1")
    from scipy.stats import t

    return float(t.isf(level / (2 * points), runs - 1))


# Grid and results in plain Python: what JSON can carry.


def _scalar(value: Any, name: str) -> Any:
    """The plain bool, int, float, string or None that a Python, numpy or torch scalar stands for."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not (plain is None or type(plain) in (bool, int, float, str)):
        raise ValueError(f"{name} is {value!r}, expected a number, string, bool or None")
    return math.nan if plain != plain else plain  # one NaN only: its sign and payload would not survive the store


def _points(grid: Any) -> list[dict[str, Any]]:
    """The distinct points of a grid, all with the same names."""
    if isinstance(grid, Mapping):
        for name, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
                raise ValueError(f"grid[{name!r}] is {values!r}, expected a list of values")
        choices = itertools.product(*(list(values) for values in grid.values()))
        listed = [dict(zip(grid, choice, strict=True)) for choice in choices]
    else:
        listed = list(grid) if isinstance(grid, Iterable) else []
    if not listed or any(not isinstance(point, Mapping) or set(point) != set(listed[0]) for point in listed):
        raise ValueError(f"grid is {grid!r}, expected at least one point, and the same names in every point")
    points = [{name: _scalar(value, f"grid[{name!r}]") for name, value in point.items()} for point in listed]
    for point in points:
        for name, value in point.items():
            if not isinstance(name, str) or name == "seed" or value != value:
                raise ValueError(
                    f"grid[{name!r}] is {value!r}, expected a string other than 'seed' as name, and no NaN"
                )
    if len({json.dumps(point, sort_keys=True) for point in points}) < len(points):
        raise ValueError(f"grid is {grid!r}, expected distinct points")
    return points


def _seeds(seeds: Any) -> list[int]:
    """The seeds 0 to n-1, or the given ones."""
    seeds = _scalar(seeds, "seeds") if not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0 else seeds
    listed = range(seeds) if type(seeds) is int else seeds
    plain = [_scalar(seed, "seeds") for seed in listed] if isinstance(listed, Iterable) else []
    if not plain or len(set(plain)) < len(plain) or any(type(seed) is not int for seed in plain):
        raise ValueError(f"seeds is {seeds!r}, expected a positive number or distinct integers")
    return plain


def _finite(name: str, values: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values as a float64 array without NaN and infinity."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {values!r}, expected numbers") from error
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {array[~np.isfinite(array)].flat[0]}, expected finite numbers")
    return array


def _evaluate(
    function: Callable[..., Any], point: dict[str, Any], seed: int, directory: Path | None, header: dict[str, Any]
) -> dict[str, Any]:
    """One evaluation, in a worker: on one torch thread, stored at once; another run may have stored it meanwhile."""
    if directory is not None:
        if other := [name for name, expected in header["versions"].items() if _versions()[name] != expected]:
            raise RuntimeError(f"a worker has another version of {other} than the process that started the sweep")
        if (found := _read(directory, header)) is not None:
            return found
    place = f"at point {point}, seed {seed}"
    torch.set_num_threads(1)  # `run` restores the number: here it would change under a neighbour in another thread
    try:
        result = function(seed=seed, **point)
    except Exception as error:
        raise RuntimeError(f"{_name(function)} failed {place}: {type(error).__name__}: {error}") from error
    columns = dict(result) if isinstance(result, Mapping) else {"value": result}
    if not columns or result is None or not all(isinstance(name, str) for name in columns):
        raise ValueError(f"the result {place} is {result!r}, expected a number or a mapping from names to scalars")
    if clash := {*point, "seed"} & columns.keys():
        raise ValueError(f"the result {place} has the columns {sorted(clash)}, which are names of the grid")
    columns = {name: _scalar(value, f"the result {name!r} {place}") for name, value in columns.items()}
    if directory is not None:
        _write(_path(directory, header), _encode(header, columns))
    return columns


# The store: one file per point and seed, named by a hash of everything known to have made the result.


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()


def _header(identity: dict[str, Any], point: dict[str, Any], seed: int) -> dict[str, Any]:
    """The key of one evaluation."""
    return {**identity, "point": dict(sorted(point.items())), "seed": seed}


def _path(directory: Path, header: dict[str, Any]) -> Path:
    return directory / f"{_hash(header)}.json"


def _encode(header: dict[str, Any], result: dict[str, Any]) -> bytes:
    """The only content that a file of the store may have; JSON keeps every bit of a float."""
    body = {**header, "result": result}
    return json.dumps({**body, "checksum": _hash(body)}).encode()


def _read(directory: Path, header: dict[str, Any]) -> dict[str, Any] | None:
    """The stored result, or None if there is none, or the file is not byte for byte what was written."""
    try:
        content = _path(directory, header).read_bytes()
        result = dict(json.loads(content)["result"])
        return result if content == _encode(header, result) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Put a whole file in place, or leave everything as it was."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, f"store {path.parent} cannot be written to: {error.strerror}") from error


def _kept(directory: Path | None, headers: list[dict[str, Any]]) -> str:
    """What an interruption leaves, in words."""
    if directory is None:
        return "nothing is kept without a store"
    done = sum(_read(directory, header) is not None for header in headers)
    return f"{done} of {len(headers)} results are kept in {directory}, and the same call goes on from there"


def _directory(store: str | os.PathLike[str]) -> Path:
    return Path(store).expanduser().absolute()


def _open(store: str | os.PathLike[str]) -> Path:
    """The store's directory, made if missing, and shown to be writable before anything is computed."""
    directory = _directory(store)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"store {directory} cannot be made: {error.strerror}") from error
    _write(directory / "README.txt", b"Results of icl_lib.sweeps.run, one file per point and seed. Safe to delete.\n")
    return directory


# What a function depends on.


def _name(function: Any) -> str:
    function = function.func if isinstance(function, functools.partial) else function
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"


@functools.cache
def _versions() -> dict[str, str]:
    """What makes numbers besides the function, in this process."""
    return {name: version(name) for name in ("icl-lib", "numpy", "scipy", "torch")} | {"sources": _SOURCES}


def _identity(function: Callable[..., Any]) -> dict[str, Any]:
    """The part of the key that all points share: name and fingerprint of the function, and the versions."""
    fingerprint = _hash(_describe(function, "function", _name(function).partition(".")[0], set()))
    return {"function": _name(function), "fingerprint": fingerprint, "versions": _versions()}


def _describe(value: Any, name: str, package: str, seen: set[int]) -> Any:
    """Nested lists of strings that change when the meaning of a value changes, and are the same in every process."""

    def each(items: Mapping[Any, Any]) -> list[Any]:
        return [[repr(key), _describe(item, f"{name}: {key}", package, seen)] for key, item in items.items()]

    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, EllipsisType, np.generic)):
        return repr(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, each(dict(enumerate(value)))]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_describe(item, name, package, seen)) for item in value)
    if isinstance(value, dict):
        return each(value)
    if isinstance(value, functools.partial):
        return each({"function": value.func, "arguments": value.args, "keywords": value.keywords})
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, CodeType):
        names = [value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars]
        return [value.co_code.hex(), value.co_exceptiontable.hex(), str(names), each(dict(enumerate(value.co_consts)))]
    home = str(value.__globals__["__name__"] if isinstance(value, FunctionType) else getattr(value, "__module__", None))
    foreign = home.partition(".")[0] != package or package == "icl_lib"
    public = getattr(sys.modules.get(home), getattr(value, "__name__", ""), None) is value
    wrapped = {"wrapped": value.__wrapped__} if hasattr(value, "__wrapped__") else {}
    readable = isinstance(value, (FunctionType, type))
    if id(value) in seen or (public and (foreign or not (readable or wrapped))):
        return _name(value)
    seen.add(id(value))
    if wrapped and (foreign or not readable):  # a decorator from elsewhere
        return [_name(value), each(wrapped)]
    if isinstance(value, FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        captured = each({key: cell.cell_contents for key, cell in cells})
        own = each({"code": value.__code__, "defaults": value.__defaults__, "keywords": value.__kwdefaults__})
        read = [] if foreign else sorted(_globals(value.__code__) & value.__globals__.keys())
        return [_name(value), own, captured, each({key: value.__globals__[key] for key in read})]
    if isinstance(value, type):
        members = {key: getattr(item, "__func__", getattr(item, "fget", item)) for key, item in vars(value).items()}
        kept = {key: item for key, item in members.items() if key[:2] != "__" or isinstance(item, FunctionType)}
        return [_name(value), each({"bases": value.__bases__}), each(kept)]
    raise ValueError(
        f"{name} is {value!r:.80}, and the store cannot tell when it changes; expected a function of a module or "
        "notebook that gets numbers and strings from the grid or functools.partial and makes everything else itself"
    )


def _globals(code: CodeType) -> set[str]:
    """Names that code reads from its module, inner functions included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
