"""strict: NumPy behind CuPy's fence, a backend for tests that needs neither CuPy nor a GPU.

    import strict
    backend._install(strict.make_backend())        # tinydiff now computes with strict.ndarray
    with strict.scramble(True): ...                # new arrays come in an inconvenient memory order
    strict.syncs                                   # how often something has waited for the device
    with strict.forbid_sync(): ...                 # waiting raises (backend.no_sync uses it)

The module is the array namespace as well: strict.exp, strict.float32, strict.lib.stride_tricks.as_strided. What
CuPy 14 lacks or refuses raises, by a table frozen from its wheel (cupy_api.json, written by freeze.py). In a few
places it is stricter than CuPy, where CuPy copies in silence or where tinydiff means to run on NumPy as well;
test_strict.py says for each why.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._array import StrictArray
from ._core import API, State, Wrapped, check_dtype, forbid_sync, scramble, wrap
from ._namespace import Namespace

__all__ = ["API", "StrictArray", "forbid_sync", "is_array", "make_backend", "scramble", "to_device", "to_host", "xp"]

xp: Any = Namespace()


def to_device(a: Any) -> StrictArray:
    """The way in: from a host array, a number or nested lists of them, by a copy; a StrictArray is there already."""
    if isinstance(a, StrictArray):
        return a
    host = np.array(a, order="C")
    check_dtype(host.dtype)
    return wrap(host)


def to_host(a: StrictArray) -> np.ndarray:
    """The way out: a copy, which backend.to_host counts as a wait."""
    if not isinstance(a, Wrapped):
        raise TypeError(f"to_host takes an array of the device, not {type(a)}")
    return a._a.copy()


def is_array(a: Any) -> bool:
    return isinstance(a, StrictArray)


def make_backend() -> Any:
    """What tinydiff.backend._install wants."""
    from tinydiff.backend import Backend

    return Backend("strict", xp, to_device, to_host, is_array, None, forbid_sync)


def __getattr__(name: str) -> Any:
    return State.syncs if name == "syncs" else getattr(xp, name)
