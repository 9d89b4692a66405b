"""Which arrays were changed in place, and when.

A rule reads arrays that an op kept. If one of them has been changed since, the gradient would be wrong without a word:
so the engine asks here first, and raises an error instead.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

from . import backend
from .backend import Array

clock = itertools.count(1)  # numbers nodes, and changes in place, in the order in which they happen


class Changes(dict[int, tuple[int, Any]]):
    """Memory that was changed in place, by its id: the time of the change, and a weak reference to the memory."""

    latest = 0  # the latest of those times


changes = Changes()


def memory_of(array: Array) -> Array:
    """The array that owns the memory; views share it."""
    return array.base if backend.active().is_array(array.base) else array


def note_change(array: Array) -> None:
    """Note that an array was changed in place."""
    memory = memory_of(array)
    key = id(memory)
    changes.latest = now = next(clock)
    changes[key] = now, weakref.ref(memory, lambda _: changes.pop(key, None))


def changed_since(array: Array, time: int) -> bool:
    return changes.latest > time and changes.get(id(memory_of(array)), (0,))[0] > time


def options_of(node: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each option of a node, such as the index of getitem; tuples taken apart."""
    for name, value in node.params.items():
        for part in value if type(value) is tuple else (value,):
            yield name, part


def check_unchanged(node: Any) -> None:
    """Errors: RuntimeError if what a node kept for its rule has been freed, or changed since."""
    if node.values is None:
        raise RuntimeError(
            f"backward a second time through {node.op.name}: the arrays it had kept were freed by the first. "
            "Pass retain_graph=True the first time, or compute the output again"
        )
    inputs = [(f"input {i}", a) for i, a in enumerate(node.values)]
    options = [(f"the {name}", getattr(a, "_data", a)) for name, a in options_of(node)]  # an index may be a Tensor
    for what, a in [*inputs, ("the output", node.out), *options]:
        if backend.active().is_array(a) and changed_since(a, node.time):
            raise RuntimeError(
                f"{what} of {node.op.name} was changed in place after it was used, and its gradient needs the old "
                "values: make a new array instead"
            )
