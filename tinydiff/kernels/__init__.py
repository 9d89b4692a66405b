"""The few hot array kernels: one file a backend, the same names and signatures in each."""

from __future__ import annotations

import importlib
from typing import Any

from .. import backend


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(importlib.import_module(f"{__name__}.{backend.active().kernels}"), name)
