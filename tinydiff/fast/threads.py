"""Several microbatches at a time, one per thread, on a CPU.

NumPy releases the interpreter's lock while it computes, so two threads with one microbatch each are faster than two
threads inside every matrix product, which also wait for each other whenever the machine does other work. Results come
in the order of the microbatches, so sums over several do not depend on the number of threads. Where there is a single
microbatch, or none, threads share out each large op instead: of NumPy, only products of matrices, here; of C, in
fast/cpu/pool.c.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
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
def over_microbatches(
    fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None, share: tuple[int, int] = (0, 1)
) -> Iterator[Result]:
    parts = microbatches(n, size, threads)
    several = len(parts) > 1  # also if only one of them is done here: the results are the same
    parts = parts[share[0] :: share[1]]
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
    return _in_turn(fn, parts, n, grad_enabled(), 1 if several else threads)


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
    left = deque(enumerate(parts))  # what nobody has begun
    found: list[SimpleQueue] = [SimpleQueue() for _ in parts]  # (result, error) of each
    ended: SimpleQueue = SimpleQueue()
    unwanted = threading.Event()

    def work() -> None:
        microbatch.of_thread.unwanted = unwanted
        try:
            while left:
                i, rows = left.popleft()
                try:
                    with working_on(rows, n, enabled):
                        found[i].put((fn(rows), None))
                except BaseException as error:
                    found[i].put((None, error))
        except IndexError:  # another thread has taken the last one
            pass
        finally:
            microbatch.of_thread.unwanted = None
            ended.put(None)

    at_work = 0
    for tell in before_threads:
        tell()
    with blas_threads(1):
        try:
            for _ in range(workers):
                _pool(workers).put(work)
                at_work += 1
            for each in found:
                result, error = each.get()
                if error is not None:
                    raise error
                yield result
                del result  # not kept, or memory would grow with the batch
        finally:
            error = None  # it holds this frame, which holds it
            left.clear()
            unwanted.set()
            for _ in range(at_work):
                ended.get()


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool(workers: int) -> SimpleQueue:
    """Where to put work for so many threads. They are kept: a new thread would start with memory of its own, none of it
    in the cache.

    SimpleQueue is written in C, so Ctrl-C finds it done or not begun. A ThreadPoolExecutor it may leave with a lock
    held, and then every later call waits for ever.
    """
    jobs: SimpleQueue = SimpleQueue()
    for i in range(workers):
        threading.Thread(target=_work_off, args=(jobs,), name=f"tinydiff-microbatches_{i}", daemon=True).start()
    return jobs


before_threads: list[Callable[[], None]] = []  # called before these threads begin: other ones then leave the cores
_here = threading.local()


def _work_off(jobs: SimpleQueue) -> None:
    _here.in_pool = True
    while True:
        jobs.get()()  # not in a variable, which would keep it until the next one comes


MORE_PARTS = 4  # than threads, where a part costs nothing of its own
# Bytes of arrays for each thread, of those in C and of those of Python: for fewer, waking it takes as long as the work.
_WORTH_A_THREAD, _WORTH_A_PYTHON_THREAD = 2**18, 2**21


def threads_for(size: int, of_each: int = _WORTH_A_THREAD) -> int:
    """How many threads shall work on arrays of so many bytes together, at least `of_each` for each of them: as many as
    the BLAS would use, or, with one that cannot be asked, as blas_threads allows."""
    if size < 2 * of_each or getattr(_here, "in_pool", False):  # the other threads have a microbatch each
        return 1
    _keep_memory()
    limit = blas[0]() if (blas := _blas()) else min([cores(), *_active(_limits)])
    return max(1, min(limit, cores(), size // of_each))


def at_once(work: Callable[[int], Result], parts: int, threads: int) -> list[Result]:
    """[work(0), ..., work(parts - 1)], by so many threads, of which this is one. Each takes the next part as soon as it
    is done with one, so with more parts than threads they end at about the same time, also if a core has other work.
    Errors come after all have ended."""
    if threads == 1:
        return [work(i) for i in range(parts)]
    results: list[Any] = [None] * parts
    left = deque(range(parts))
    errors: list[BaseException] = []
    ended: SimpleQueue = SimpleQueue()

    def some() -> None:
        while left:
            try:
                i = left.popleft()
            except IndexError:  # another thread has taken the last one
                return
            results[i] = work(i)

    def other() -> None:
        try:
            some()
        except BaseException as error:
            errors.append(error)
            left.clear()  # no part is begun after an error
        finally:
            ended.put(None)

    at_work = 0
    for tell in before_threads:
        tell()
    try:
        for _ in range(1, threads):
            _pool(threads).put(functools.partial(contextvars.copy_context().run, other))  # so with its np.errstate
            at_work += 1
        some()
    finally:
        left.clear()
        for _ in range(at_work):
            ended.get()
    if errors:
        raise errors.pop()
    return results


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
def _openblas() -> Callable[[str], Any] | None:
    """What gives the functions of the OpenBLAS in NumPy's wheel by their names. None with another BLAS."""
    home = Path(numpy.__file__).parent
    for path in [*home.parent.glob("numpy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")]:
        library = ctypes.CDLL(str(path))
        for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
            if hasattr(library, f"{prefix}openblas_get_num_threads{suffix}"):
                return lambda name: getattr(library, f"{prefix}openblas_{name}{suffix}")  # noqa: B023 (returned at once)
    return None


@functools.cache
def _blas() -> Any:
    """Functions that get and set the number of threads of OpenBLAS. None with another BLAS; its threads then stay as
    they are, which costs time and changes nothing else."""
    function = _openblas()
    return function and [function("get_num_threads"), function("set_num_threads")]


@functools.cache
def _core() -> str | None:
    """The processor that OpenBLAS takes this one for."""
    if (function := _openblas()) is None:
        return None
    name = function("get_corename")
    name.restype = ctypes.c_char_p
    return name().decode()


_NARROW = "Prescott Nehalem Sandybridge Haswell Excavator Zen".split()  # processors without AVX-512, to OpenBLAS


@functools.cache
def vectors_unused() -> bool:
    """Does this processor have AVX-512, and OpenBLAS takes it for one that has not? So it does with a processor that is
    newer than itself."""
    if _core() not in _NARROW:
        return False
    found = numpy.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    return "X86_V4" in found or "AVX512_SKX" in found


def report() -> list[tuple[str, str, str, str]]:
    """For tinydiff.doctor."""
    if _core() is None:
        return [("BLAS", "note", "not the OpenBLAS of NumPy's wheel; its threads stay as they are", "")]
    if not vectors_unused():
        return [("BLAS", "ok", f"OpenBLAS for {_core()}", "")]
    text = f"OpenBLAS takes this processor for a {_core()}, and leaves AVX-512 unused: all is right, but slower"
    remedy = "export OPENBLAS_CORETYPE=SkylakeX, and NumPy's products of large matrices may take half the time"
    return [("BLAS", "note", text, remedy)]


class _Limit:
    """The count of an active blas_threads block, which alone refers to it: so the limit is gone when the block is, also
    if Ctrl-C came between two lines."""

    def __init__(self, count: int):
        self.count = count


_limits: list[weakref.ref[_Limit]] = []  # of all active blocks; the smallest count holds for the process
_limits_lock = threading.RLock()  # a limit may be dropped by the very thread that holds it
_unlimited = 0  # threads of the BLAS when no block is active


@microbatch.blas_threads.fast("numpy")
@contextlib.contextmanager
def blas_threads(count: int | None) -> Iterator[None]:
    """The number belongs to the whole process: if several blocks are active, nested or in other threads, the smallest
    number holds."""
    count = None if count is None else integer("blas_threads: count", count)  # a plain int, as ctypes wants it
    if count is None:
        yield
        return
    limit = _Limit(count)
    active = weakref.ref(limit, _end)
    try:
        _begin(active)
        yield
    finally:
        _end(active)
        del active  # before `limit`: it is not called once more


def _begin(limit: weakref.ref[_Limit]) -> None:
    global _unlimited
    with _limits_lock:
        if not _limits and (blas := _blas()):
            _unlimited = blas[0]()
        _limits.append(limit)
        _set_blas(_limits)


def _end(limit: weakref.ref[_Limit]) -> None:
    with _limits_lock:
        others = [other for other in _limits if other is not limit]
        if len(others) < len(_limits):
            # Before it is forgotten: if Ctrl-C comes between, it is done again when the limit is dropped.
            _set_blas(others)
            _limits[:] = others


def _active(limits: list[weakref.ref[_Limit]]) -> list[int]:
    return [limit.count for ref in list(limits) if (limit := ref()) is not None]


def _set_blas(limits: list[weakref.ref[_Limit]]) -> None:
    if blas := _blas():
        blas[1](min([_unlimited, *_active(limits)]))


def matmul(x: numpy.ndarray, y: numpy.ndarray) -> numpy.ndarray:
    """x @ y, for matrices (.., n, k) and (.., k, m), on the threads that everything else is done on.

    OpenBLAS has threads of its own, which go on spinning for some milliseconds after a product, and take a core from
    what comes next. So a large product is done in parts, each by one thread: some of the matrices of a batch, or some
    rows or columns.
    """
    n, m, blas = x.shape[-2], y.shape[-1], _blas()
    work = max(x.size * m, y.size * n)
    if blas is None or work <= _ALONE_IN_BLAS[min(n, m) == 1] or blas[0]() == 1:
        return numpy.matmul(x, y)
    size = x.nbytes + y.nbytes if min(n, m) == 1 else work // 8  # a byte takes as long as 8 products, or so
    threads = threads_for(size, _WORTH_A_PYTHON_THREAD)
    with blas_threads(1):
        if threads == 1:
            return numpy.matmul(x, y)
        z = numpy.empty((*numpy.broadcast_shapes(x.shape[:-2], y.shape[:-2]), n, m), numpy.result_type(x, y))
        batch = len(x) if x.ndim == y.ndim > 2 and len(x) == len(y) else 1
        length = batch if batch >= threads else max(n, m)
        block = 1 if batch >= threads else _BLOCK
        parts = threads * max(1, min(MORE_PARTS, length // (threads * _SHORTEST * block)))
        ends = [length * i // parts // block * block for i in range(parts)] + [length]

        def of_part(i: int) -> None:
            part = slice(ends[i], ends[i + 1])
            if batch >= threads:
                numpy.matmul(x[part], y[part], out=z[part])
            elif n >= m:
                numpy.matmul(x[..., part, :], y, out=z[..., part, :])
            else:
                numpy.matmul(x, y[..., part], out=z[..., part])

        at_once(of_part, parts, threads)
    return z


_ALONE_IN_BLAS = 2**18, 2**13  # products of matrices, and with a vector: for so few, OpenBLAS wakes no other thread
_BLOCK, _SHORTEST = 16, 24  # rows or columns; and blocks, or matrices, of a part if there are more parts than threads


def _after_fork() -> None:
    """A child has none of its parent's threads: none of the blocks they were in, and nobody who would free the lock."""
    global _limits_lock
    _pool.cache_clear()
    _here.in_pool = False
    _limits_lock = threading.RLock()
    if _limits and (blas := _blas()):
        blas[1](_unlimited)
    _limits.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
