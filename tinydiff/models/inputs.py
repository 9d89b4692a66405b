"""What the nets of this folder are given: sizes when they are made, labels when they are called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..arguments import integer
from ..backend import Array, active, to_device, to_host, xp
from ..operators import array_of


def sizes(what: str, given: Any, count: int | None = None) -> tuple[int, ...]:
    """The sizes as a tuple. Errors: ValueError unless they are positive integers, `count` of them or at least one."""
    found = tuple(given) if isinstance(given, Iterable) else ()
    if not found or count not in (None, len(found)):
        raise ValueError(f"{what} must be {count or 'one or more'} positive integers, not {given!r}")
    return tuple(integer(f"{what}[{i}]", n) for i, n in enumerate(found))


def each_label(what: str, labels: Any, n: int, classes: int, *, null: bool = False) -> Array:
    """One label for each of n samples, int64 (n,) on the device: from n integers (an array of the host or of the
    device, a Tensor, a list), or from one for all.

    classes: the labels are 0 to classes - 1; with null=True also -1.
    Errors, which start with `what`: TypeError for labels that are not integers, ValueError for another shape,
    IndexError for one out of range. With CuPy only labels in host memory are checked for their range, because reading
    them back from the device would wait for it.
    """
    values = array_of(labels)
    readable = active().name == "numpy" or not active().is_array(values)
    if not active().is_array(values):
        values = to_host(values)
    if values.dtype.kind not in "iu" and values.size:  # of an empty list NumPy makes an array of floats
        raise TypeError(f"{what} must be integers, not {values.dtype} of shape {values.shape}")
    if values.shape not in ((), (n,)):
        raise ValueError(f"{what} must be one for each of the {n} samples, or one for all, not of shape {values.shape}")
    if readable and values.size and not (-null <= values.min() and values.max() < classes):
        also = ", or -1 for the null class" if null else ""
        raise IndexError(f"{what} must be 0 to {classes - 1}{also}, but runs from {values.min()} to {values.max()}")
    if readable and values.ndim == 0:
        return xp.full(n, int(values), "int64")
    return xp.broadcast_to(to_device(values).astype("int64"), (n,))  # int8 has no room for the number of a null class
