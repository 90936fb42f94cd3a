"""Sparring: train a dense retriever and its re-ranker against each other.

Importing this loads neither torch nor a model library, and configures nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparring.types import InputError

if TYPE_CHECKING:
    from sparring.data import Dataset, check, load
    from sparring.recipes.compare import compare
    from sparring.recipes.comparison import Comparison
    from sparring.recipes.plan import Plan, plan
    from sparring.recipes.train import Trained, train

__version__ = "0.1.0"
__all__ = ["Comparison", "Dataset", "InputError", "Plan", "Trained", "check", "compare", "load", "plan", "train"]

_HOMES = {
    "Dataset": "sparring.data",
    "check": "sparring.data",
    "load": "sparring.data",
    "Comparison": "sparring.recipes.comparison",
    "compare": "sparring.recipes.compare",
    "Plan": "sparring.recipes.plan",
    "plan": "sparring.recipes.plan",
    "Trained": "sparring.recipes.train",
    "train": "sparring.recipes.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparring' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
