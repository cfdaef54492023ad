"""Checks of what a caller passes in; each returns the accepted value or raises a ValueError that names it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Number = float | int  # what a real argument may be: beartype does not take an int for a float
FLOATS = (torch.float32, torch.float64)


def integer(name: str, value: Any, *, least: int = 1) -> int:
    """An integer that is at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return int(value)


def number(name: str, value: Any, *, least: float = -math.inf, above: float | None = None) -> float:
    """A finite real number, at least ``least`` and, if given, strictly above ``above``."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    if value < least or (above is not None and value <= above):
        bound = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ValueError(f"{name} is {value!r}, expected a number {bound}")
    return float(value)


def array(name: str, value: Any, *, shape: tuple[int | str, ...] = ("...",)) -> Tensor:
    """A finite, non-empty float32 or float64 tensor of the given shape.

    Integers in ``shape`` are exact sizes, names stand for any positive size, a leading ``"..."`` for any axes.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected a torch tensor")
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype}, expected float32 or float64")
    free = shape[:1] == ("...",)
    sizes = shape[1:] if free else shape
    actual = tuple(value.shape)
    tail = actual[len(actual) - len(sizes) :] if free else actual
    fits = len(tail) == len(sizes) and all(isinstance(s, str) or s == t for s, t in zip(sizes, tail, strict=True))
    if not fits:
        raise ValueError(f"{name} has shape {actual}, expected ({', '.join(map(str, shape))})")
    if value.numel() == 0:
        raise ValueError(f"{name} has shape {actual}, expected no empty axis")
    if not all_finite(value):
        raise ValueError(f"{name} holds {int((~torch.isfinite(value)).sum())} values that are not finite")
    return value


def covariance(name: str, value: Any, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """A positive semi-definite matrix of shape (dim, dim) that is not 0, its eigenvalues and vectors, in float64."""
    matrix = array(name, value, shape=(dim, dim)).double()
    size = matrix.abs().max()
    if not every((matrix - matrix.mT).abs() <= 1e-6 * size):
        raise ValueError(f"{name} is not symmetric, expected a covariance matrix")
    matrix = (matrix + matrix.mT) / 2
    values, vectors = torch.linalg.eigh(matrix)
    if not every((values >= -1e-6 * size) & (size > 0)):
        raise ValueError(f"{name} has the eigenvalue {values[0].item():.3g}, expected none below 0 and not all 0")
    return matrix, values, vectors


def among(name: str, value: Any, known: Iterable[str]) -> Any:
    """One of the known names."""
    if value not in (known := list(known)):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    return value


def dtype(value: torch.dtype) -> torch.dtype:
    """One of the two dtypes of the library."""
    if value not in FLOATS:
        raise ValueError(f"dtype is {value}, expected torch.float32 or torch.float64")
    return value


def all_finite(value: Tensor) -> bool:
    """Whether every entry is finite: a finite sum shows it in one pass, only another sum needs a second look."""
    return every(torch.isfinite(value.sum())) or every(torch.isfinite(value))


def every(condition: Tensor) -> bool:
    """Whether a condition holds for every entry; on meta, where there are no values, it does."""
    return condition.device.type == "meta" or bool(condition.all())


def memory(budget: Any, need: Number, what: str) -> None:
    """Refuse work that would take more bytes than a budget allows; no budget allows everything."""
    if budget is not None and need > number("memory", budget, above=0.0):
        raise MemoryError(f"{what} needs about {need / 1e9:.3g} GB, and memory allows {budget / 1e9:.3g} GB")


def instance(name: str, value: Any, kind: type) -> Any:
    """An object of the given class."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected {kind.__name__}")
    return value


def numbers_of(name: str, values: Any) -> list[Any]:
    """The entries of a sequence or of a tensor with one axis, not yet checked one by one."""
    if isinstance(values, Tensor) and values.ndim == 1:
        return values.tolist()
    if isinstance(values, (str, Tensor)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}, expected a sequence of numbers")
    return list(values)


def random(name: str, value: Any) -> torch.Generator:
    """A torch generator; the library has no global random state."""
    if not isinstance(value, torch.Generator):
        raise ValueError(f"{name} is of type {type(value).__name__}, expected a torch.Generator")
    return value
