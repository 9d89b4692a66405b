"""Which arrays were changed in place, and when.

A rule reads arrays that an op kept. If one of them has been changed since, the gradient would be wrong without a word:
so the engine asks here first, and raises an error instead.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

from . import backend
from .backend import Array
from .locks import free_in_child

clock = itertools.count(1)  # numbers nodes, and changes in place, in the order in which they happen


class Changes(dict[int, tuple[int, Any]]):
    """Memory that was changed in place, by its id: the time of the change, and a weak reference to the memory."""

    latest = 0  # the latest of those times


changes = Changes()


_noting = free_in_child()


def memory_of(array: Array) -> Array:
    """The array that owns the memory; views share it. (Between a view of NumPy's stride tricks and its array lies an
    object that is no array.)"""
    memory, base = array, array.base
    while base is not None:
        memory, base = base if backend.active().is_array(base) else memory, getattr(base, "base", None)
    return memory


def note_change(*arrays: Array) -> None:
    """Note that arrays were changed in place."""
    with _noting:  # in the order of the clock: the latest of two threads must not be forgotten for an earlier one
        changes.latest = now = next(clock)
    for array in arrays:
        memory = memory_of(array)
        changes[id(memory)] = now, weakref.ref(memory, functools.partial(_forget, id(memory)))


def _forget(key: int, _: Any) -> None:
    changes.pop(key, None)


def changed_since(array: Array, time: int) -> bool:
    return changes.latest > time and changes.get(id(memory_of(array)), (0,))[0] > time


def check_unchanged(op: str, kept: dict[str, Any], time: int) -> None:
    """Errors: RuntimeError if one of the arrays that an op has kept, by what they are to it, has changed since."""
    for what, a in kept.items():
        if backend.active().is_array(a) and changed_since(a, time):
            raise RuntimeError(
                f"{what} of {op} was changed in place after it was used, and its gradient needs the old values: "
                "make a new array instead"
            )
