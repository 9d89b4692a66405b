"""The few hot array kernels, with the same names and signatures for each backend: numpy.py and the files whose names
begin with numpy_, cuda.py and the files whose names begin with cu."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .. import backend


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_file(backend.active().kernels), name)


@functools.cache
def _file(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
