"""The batch in shards, the shards over threads.

A shard of some tens of images keeps its activations in the cache, and NumPy lets go of the interpreter's lock while it
computes, so two threads with a shard each are faster than two threads inside every matrix product, which also
get in each other's way as soon as the machine has anything else to do. Results come in the order of the shards, so sums
of them do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy

from . import backend
from .backward import grad
from .modes import anomaly_detection, grad_enabled, recording
from .rng import current_shard, in_shard
from .tensor import Tensor

Result = TypeVar("Result")


def over_shards(fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None) -> Iterator[Result]:
    """fn(rows) for rows 0 to n in shards of `size`, in order.

    fn must not depend on what the other shards do, so it must not change what they share. Where there are several
    shards, a draw from an Rng that was not made inside fn (a Dropout that trains) is an error, and so is a
    BatchNorm2d that trains.

    threads: None is one a core on NumPy; a GPU is fed by one. They record if the caller does.
    Errors: ValueError for size < 1 or threads < 1.
    """
    if size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"shards need size >= 1 and threads >= 1, not size={size!r}, threads={threads!r}")
    shards = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    if backend.active().name != "numpy" or anomaly_detection():  # the latter is a matter of the calling thread
        threads = 1
    threads = min(len(shards), cores() if threads is None else threads)
    enabled = grad_enabled()

    def of_shard(rows: slice) -> Result:
        with recording(enabled), in_shard(rows if len(shards) > 1 else current_shard()):
            return fn(rows)

    if threads <= 1:
        yield from map(of_shard, shards)
        return
    with _one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(of_shard, shards)


def gradients(
    loss: Callable[[slice], Tensor], parameters: Sequence[Tensor], n: int, size: int, threads: int | None = None
) -> tuple[Any, list[Any]]:
    """The sum over shards of loss(rows), and its gradients by the parameters, as arrays."""

    def of_shard(rows: slice) -> tuple[Any, list[Any]]:
        value = loss(rows)
        return value.data, [g.data for g in grad(value, parameters, retain_graph=False)]

    total, sums = None, []
    for value, found in over_shards(of_shard, n, size, threads):
        if total is None:
            total, sums = value, [g.copy() for g in found]
        else:
            total = total + value
            for s, g in zip(sums, found):
                s += g
    return total, sums


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _blas() -> Any:
    """(get, set) number of threads of the OpenBLAS in NumPy's wheel; None if NumPy brings another one, whose threads
    then stay as they are, which costs time but changes nothing else."""
    home = Path(numpy.__file__).parent
    for path in [*home.parent.glob("numpy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            names = [f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set")]
            if all(hasattr(library, name) for name in names):
                return [getattr(library, name) for name in names]
    return None


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    blas = _blas()
    if blas is None:
        yield
        return
    get, set_to = blas
    before = get()
    set_to(1)
    try:
        yield
    finally:
        set_to(before)
