"""Several microbatches at a time, one per thread, on a CPU.

NumPy releases the interpreter's lock while it computes, so two threads with one microbatch each are faster than two
threads inside every matrix product, which also wait for each other whenever the machine does other work. Results come
in the order of the microbatches, so sums over several do not depend on the number of threads. (A single microbatch
leaves the threads to the BLAS, which may split sums.)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy

from .. import microbatch
from ..arguments import integer
from ..backend import switch
from ..microbatch import microbatches, working_on
from ..modes import grad_enabled
from ..observers import observers
from ..rng import current_microbatch

Result = TypeVar("Result")


@microbatch.over_microbatches.fast("numpy")
def over_microbatches(fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None) -> Iterator[Result]:
    parts = microbatches(n, size, threads)
    workers = min(len(parts), cores() if threads is None else threads)
    # What observes this thread alone (checkpoint, anomaly detection) would not see the others; and a microbatch within
    # a microbatch would wait for itself.
    if (
        any(observer.thread == threading.get_ident() for observer in list(observers))
        or current_microbatch() is not None
    ):
        workers = 1
    _keep_memory()
    if workers > 1:
        return _in_threads(fn, parts, n, grad_enabled(), workers)
    return _in_turn(fn, parts, n, grad_enabled(), 1 if len(parts) > 1 else threads)


def _in_turn(
    fn: Callable[[slice], Result], parts: list[slice], n: int, enabled: bool, count: int | None
) -> Iterator[Result]:
    """As in microbatch.py, with `count` threads in the matrix products."""
    with blas_threads(count):
        for rows in parts:
            with working_on(rows, n, enabled):
                result = fn(rows)
            yield result
            del result


def _in_threads(
    fn: Callable[[slice], Result], parts: list[slice], n: int, enabled: bool, workers: int
) -> Iterator[Result]:
    """The microbatches in threads. When this ends, also by an error or early, no thread is at work any more."""

    def work(rows: slice) -> Result:
        with working_on(rows, n, enabled):
            return fn(rows)

    with blas_threads(1):
        waiting = deque(_pool(workers).submit(work, rows) for rows in parts)
        try:
            while waiting:
                yield waiting.popleft().result()  # not kept, or memory would grow with the batch
        finally:
            for future in waiting:
                future.cancel()
            wait(waiting)


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that are kept: a new thread would start with memory of its own, none of it in the cache."""
    return ThreadPoolExecutor(workers, "tinydiff-microbatches")


_WORTH_A_THREAD = 2**21  # bytes of arrays: for fewer, waking a thread takes as long as the work


def threads_for(size: int) -> int:
    """How many threads shall work on arrays of so many bytes together: as many as the BLAS would use, which is one
    inside a microbatch."""
    if size < 2 * _WORTH_A_THREAD:
        return 1
    blas = _blas()
    limit = blas[0]() if blas else cores() if current_microbatch() is None else 1
    return max(1, min(limit, cores(), size // _WORTH_A_THREAD))


def at_once(work: Callable[[int], Result], parts: int) -> list[Result]:
    """[work(0), ..., work(parts - 1)], each in a thread, the first in this one. Errors come after all have ended."""
    if parts == 1:
        return [work(0)]
    others = [_pool(parts).submit(work, i) for i in range(1, parts)]
    try:
        first = work(0)
    finally:
        for future in others:
            future.exception()  # waits for it, in half the time that `wait` takes
    return [first, *(future.result() for future in others)]


@functools.cache
def _keep_memory() -> None:
    """Ask the C library to keep freed memory for the next arrays.

    glibc gives a large block back to the system when it is freed, and the next array then causes a page fault for each
    4 KiB: a fifth of the time of a training step. The request holds for the whole process, up to 1 GiB, until it ends.
    It is made on Linux with glibc only, and not if TINYDIFF_KEEP_MEMORY=0 is in the environment.
    """
    if sys.platform != "linux" or not switch("TINYDIFF_KEEP_MEMORY"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt(3)
    for option, size in ((mmap_threshold, 2**25), (trim_threshold, 2**30), (top_pad, 2**26)):
        library.mallopt(option, size)


# ---------------------------------------------------------------- the threads inside a matrix product


@functools.cache
def _blas() -> Any:
    """Functions that get and set the number of threads of the OpenBLAS in NumPy's wheel. None with another BLAS; its
    threads then stay as they are, which costs time and changes nothing else."""
    home = Path(numpy.__file__).parent
    for path in [*home.parent.glob("numpy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            names = [f"{prefix}openblas_{verb}_num_threads{suffix}" for verb in ("get", "set")]
            if all(hasattr(library, name) for name in names):
                return [getattr(library, name) for name in names]
    return None


_limits: list[int] = []  # the counts of all blas_threads blocks that are active; the smallest holds for the process
_limits_lock = threading.Lock()
_unlimited = 0  # threads of the BLAS when no block is active


@microbatch.blas_threads.fast("numpy")
@contextlib.contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """The number belongs to the whole process: if several blocks are active, nested or in other threads, the smallest
    number holds."""
    count = None if count is None else integer("blas_threads: count", count)  # a plain int, as ctypes wants it
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


def _after_fork() -> None:
    """A child has none of its parent's threads: none of the blocks they were in, and nobody who would free the lock."""
    global _limits_lock
    _pool.cache_clear()
    _limits_lock = threading.Lock()
    if _limits and (blas := _blas()):
        blas[1](_unlimited)
    _limits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
