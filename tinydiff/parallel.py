"""The batch in shards, the shards over threads.

A shard of some tens of images keeps its activations in the cache, and NumPy lets go of the interpreter's lock while it
computes, so two threads with a shard each are faster than two threads inside every matrix product, which also
get in each other's way as soon as the machine has anything else to do. Results come in the order of the shards, so sums
of several do not depend on the number of threads. (A single shard leaves the threads to the BLAS, which may split
sums.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy

from . import backend
from .backward import grad
from .anomaly import anomaly_detection
from .engine import grad_enabled, set_grad_enabled as recording
from .rng import current_shard, in_shard
from .tensor import Tensor

Result = TypeVar("Result")


def over_shards(fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None) -> Iterator[Result]:
    """fn(rows) for rows 0 to n in shards of `size`, in order.

    fn must not depend on what the other shards do, so it must not change what they share. Where there are several
    shards, a draw from an Rng that was not made inside fn (a Dropout that trains) is an error, and so is a
    BatchNorm2d that trains.

    threads: None is one a core on NumPy; a GPU is fed by one. They record if the caller does. A single shard has them
    inside its matrix products.
    Errors: ValueError for size < 1 or threads < 1.
    """
    if size < 1 or (threads is not None and threads < 1):
        raise ValueError(f"shards need size >= 1 and threads >= 1, not size={size!r}, threads={threads!r}")
    shards = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    workers = cores() if threads is None else threads
    # Looking for a NaN is a matter of the calling thread, and a shard of a shard would wait for its own thread.
    if backend.active().name != "numpy" or anomaly_detection() or current_shard() is not None:
        workers = 1
    workers = min(len(shards), workers)
    enabled = grad_enabled()
    _keep_memory()

    def of_shard(rows: slice) -> Result:
        with recording(enabled), in_shard(rows if len(shards) > 1 else current_shard()):
            return fn(rows)

    return _in_turn(of_shard, shards, threads) if workers <= 1 else _in_threads(of_shard, shards, workers)


def _in_turn(of_shard: Callable[[slice], Result], shards: list[slice], threads: int | None) -> Iterator[Result]:
    with blas_threads(1 if len(shards) > 1 else threads):
        yield from map(of_shard, shards)


def _in_threads(of_shard: Callable[[slice], Result], shards: list[slice], workers: int) -> Iterator[Result]:
    """Nothing runs any more when this ends, also by an error or because nobody wants the rest."""
    with blas_threads(1):
        waiting = deque(_pool(workers).submit(of_shard, rows) for rows in shards)
        try:
            while waiting:
                yield waiting.popleft().result()  # not kept, so that memory does not grow with the batch
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


def shard_size(n: int) -> int:
    """How many of n samples to work on at a time, if nobody says: all of them on a GPU, and on a CPU what the cache
    holds, but not so few that adding up the gradients costs more than it saves. It must not depend on the number of
    cores, as the last digits of a sum depend on it."""
    return max(n, 1) if backend.active().name == "cupy" else 32 if n <= 128 else 64


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
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that stay: a new one would begin with memory of its own, all of it cold."""
    return ThreadPoolExecutor(workers, "tinydiff-shards")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@functools.cache
def _keep_memory() -> None:
    """Ask the C library to keep the memory that is freed, for the next arrays.

    glibc gives a large block back to the system when it is freed, and the next array then begins with a page fault for
    each 4 KiB: a fifth of the time of a training step. Elsewhere, and where it cannot be asked, that stays so. It holds
    for the whole process, up to 1 GiB, and for good; with TINYDIFF_KEEP_MEMORY=0 in the environment nothing is asked.
    """
    if sys.platform != "linux" or backend.active().name != "numpy" or os.environ.get("TINYDIFF_KEEP_MEMORY") == "0":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt(3)
    for option, size in ((mmap_threshold, 2**25), (trim_threshold, 2**30), (top_pad, 2**26)):
        library.mallopt(option, size)


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


_limits: list[int] = []  # of all who are inside blas_threads now; the smallest holds for the process
_limits_lock = threading.Lock()
_unlimited = 0  # threads of the BLAS when nobody is inside


@contextlib.contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """Inside, matrix products use at most so many threads (None: as many as before). One is right for shards, and for
    nets so small that two threads lose more time in waiting for one another than they gain.

    The number belongs to the whole process: of several that are asked for at a time, by other threads or further out,
    the smallest holds.
    """
    blas = None if count is None else _blas()
    if blas is None or count is None:
        yield
        return
    get, set_to = blas

    def change(add: bool) -> None:
        global _unlimited
        with _limits_lock:
            if not _limits:
                _unlimited = get()
            (_limits.append if add else _limits.remove)(count)
            set_to(min([_unlimited, *_limits]))

    change(add=True)
    try:
        yield
    finally:
        change(add=False)
