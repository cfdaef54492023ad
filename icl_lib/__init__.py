"""Closed forms and simulations for the theory of in-context learning.

Each module holds one idea; ``import icl_lib`` loads none of them until it is used.

============================  ==================================================================
:mod:`icl_lib.hermite`        Hermite polynomials, the expansion of an activation, Gaussian means
:mod:`icl_lib.moments`        closed-form moments of labels and context summaries
:mod:`icl_lib.ridge`          ridge regression: primal or dual, a whole penalty path, float32 made exact
:mod:`icl_lib.tasks`          what is to be learned: task priors, finite pools, covariances
:mod:`icl_lib.prompts`        what a model sees: prompts, and the exact sampler of their summaries
:mod:`icl_lib.models`         what predicts: linear and random Transformers and the Hermite twin
:mod:`icl_lib.asymptotics`    closed-form errors: plain numbers in, plain numbers out
:mod:`icl_lib.dynamics`       learning dynamics: closed forms, exact flows, population losses
:mod:`icl_lib.training`       gradient descent of the full linear Transformer, many runs at once
:mod:`icl_lib.constructions`  weights written by hand: attention that is gradient descent, ridge, lasso
:mod:`icl_lib.spectral`       measures of training: effective ranks, subspaces, frequencies, autocorrelation
:mod:`icl_lib.sequences`      what small Transformers are trained on: repeats, modular sums, controls
:mod:`icl_lib.transformers`   small softmax Transformers trained for real, many runs at once, with snapshots
:mod:`icl_lib.sweeps`         Monte Carlo experiments: grid times seeds, progress, resume
:mod:`icl_lib.plotting`       theory line and simulation dots in one style
:mod:`icl_lib.chapter`        what every chapter of the book shares
============================  ==================================================================
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "asymptotics",
    "chapter",
    "constructions",
    "dynamics",
    "hermite",
    "models",
    "moments",
    "plotting",
    "prompts",
    "ridge",
    "sequences",
    "spectral",
    "sweeps",
    "tasks",
    "training",
    "transformers",
]


def _require_torch() -> None:
    """Say at once, and in one sentence, that torch is missing or too old."""
    try:
        found = version("torch")
    except PackageNotFoundError:
        raise ImportError("icl_lib needs torch 2.4 or newer, and there is none: pip install torch") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < (2, 4):
        raise ImportError(f"icl_lib needs torch 2.4 or newer, and finds {found}: pip install --upgrade torch")


_require_torch()


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"icl_lib.{name}")
    raise AttributeError(f"module 'icl_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
