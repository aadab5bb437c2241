"""Which functions of NumPy and Python a learner's code has replaced."""

from __future__ import annotations

import builtins
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np

WATCHED_MODULES = (
    "numpy", "numpy.linalg", "numpy.random", "numpy.testing", "numpy.ma", "numpy.fft", "math",
    "builtins", "sys", "os", "json", "struct",
)  # fmt: skip
MAY_CHANGE = frozenset(
    ("last_type", "last_value", "last_traceback", "last_exc", "_", "path_importer_cache")
)


def take_snapshot() -> dict[tuple[str, str], Any]:
    """The functions, classes and constants of the watched modules by module and name."""
    loaded = [(name, sys.modules[name]) for name in WATCHED_MODULES if name in sys.modules]
    return {
        (module_name, name): value
        for module_name, module in loaded
        for name, value in vars(module).items()
        if not isinstance(value, ModuleType) and name not in MAY_CHANGE
    }


def find_replaced(snapshot: dict[tuple[str, str], Any]) -> list[str]:
    """The dotted names whose values differ from those of the snapshot."""
    missing = object()
    return [
        f"{module}.{name}"
        for (module, name), value in snapshot.items()
        if vars(sys.modules.get(module, builtins)).get(name, missing) is not value
    ]


def load_watched_modules() -> None:
    """Import the watched modules: some are otherwise imported at their first use."""
    import json
    import struct

    for module in (np.linalg, np.random, np.testing, np.ma, np.fft, math, json, struct):
        assert isinstance(module, ModuleType)
