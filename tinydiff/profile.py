"""Where does the time of a step go, and how far is each op from what the machine can do?

    report = tinydiff.profile(step)          # runs it twice, prints a table with one row per op

    op                calls  forward ms  backward ms  share  moved MB  kept MB  GFLOP  GFLOP/s  GB/s  limit ms
    conv2d_p             16        41.2         78.9    38%       ...

The profiler is an observer of the engine (observers.py): when it is off, it costs nothing at all. The time of an op
includes the ops that it calls (a rule is made of ops). `conv2d` and other composites have no row, but their parts do,
here `conv2d_p`.

limit ms is the roofline (Williams et al. 2009): the longer of the time that the products would take at the rate of a
large matrix product, and the time that inputs and outputs would take at the rate of a large copy, both measured here.
An op far above its limit may be improved. An op can be below its limit, because caches are faster than memory.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from . import backend, ops
from .backend import xp
from .changes import memory_of
from .engine import Node, Op, Tensor
from .microbatch import over_microbatches
from .observers import Observer, observing
from .operators import array_of
from .recompute import recompute

Result = TypeVar("Result")
Shape = tuple[int, ...]
_one_at_a_time = threading.Lock()


@dataclass
class Row:
    """All calls of one op together. Seconds are thread-seconds: those of two threads add up."""

    op: str
    calls: int = 0
    backward_calls: int = 0
    forward: float = 0.0  # seconds
    backward: float = 0.0
    moved: int = 0  # bytes of inputs and outputs, forward and backward; a view moves nothing
    kept: int = 0  # bytes that stay until the backward pass because this op reads them; see profile
    flop: int | None = None  # forward and backward; None where no number is known

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


@dataclass
class Report:
    """The result of `profile`; print it for the table. Rows and times are sums over `repeat` steps."""

    rows: list[Row]  # the longest first
    repeat: int
    wall: float  # seconds on the clock
    busy: float  # of these, seconds in which a thread was in an op
    threads: int  # how many were in ops at once, at most
    flop_rate: float  # FLOP/s of one thread while so many multiply matrices
    byte_rate: float  # bytes/s of one thread while so many copy

    def __repr__(self) -> str:
        """Short, because a notebook shows it below the table that was printed."""
        return f"<Report: {len(self.rows)} ops, {self.wall / self.repeat * 1e3:.1f} ms a step>"

    @property
    def outside(self) -> float:
        """Seconds on the clock in which no thread was in an op."""
        return self.wall - self.busy

    def limit(self, row: Row) -> float:
        """The least thread-seconds that the op could take, if its arrays come from memory."""
        return max((row.flop or 0) / self.flop_rate, row.moved / self.byte_rate)

    def __str__(self) -> str:
        total = sum(row.seconds for row in self.rows)
        table = [_HEAD, *(self._cells(row, total) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in table]
        ms, n = 1e3 / self.repeat, self.threads
        lines += [
            f"A step takes {self.wall * ms:.1f} ms: {self.busy * ms:.1f} in ops, and {self.outside * ms:.1f} outside "
            "(Python, the optimiser, random numbers, sums of gradients).",
            f"The rows add up to {total * ms:.1f} ms{f' of thread time, up to {n} threads at once' if n > 1 else ''}; "
            f"{self.repeat} step{'s' if self.repeat > 1 else ''} measured.",
            f"Limits: {self.flop_rate / 1e9:.1f} GFLOP/s (product of two {_SIDE} x {_SIDE} matrices of float32) and "
            f"{self.byte_rate / 1e9:.1f} GB/s (copy of {_COPY >> 20} MiB){f', a thread of {n}' if n > 1 else ''}.",
        ]
        return "\n".join(lines)

    def _cells(self, row: Row, total: float) -> list[str]:
        def per_step(value: float, unit: float) -> str:
            return f"{value / self.repeat / unit:.4g}"

        seconds = row.seconds or math.inf
        flop = ["", ""] if row.flop is None else [per_step(row.flop, 1e9), f"{row.flop / seconds / 1e9:.3g}"]
        return [
            row.op, f"{(row.calls or row.backward_calls) / self.repeat:g}",
            f"{row.forward / self.repeat * 1e3:.2f}", f"{row.backward / self.repeat * 1e3:.2f}",
            f"{row.seconds / total:.0%}" if total else "", per_step(row.moved, 1e6), per_step(row.kept, 1e6),
            *flop, f"{row.moved / seconds / 1e9:.3g}", f"{self.limit(row) / self.repeat * 1e3:.2f}",
        ]  # fmt: skip


_HEAD = [
    "op", "calls", "forward ms", "backward ms", "share", "moved MB", "kept MB", "GFLOP", "GFLOP/s", "GB/s", "limit ms",
]  # fmt: skip


def profile(step: Callable[[], Any], *, repeat: int = 1, show: bool = True) -> Report:
    """Run step() once to warm up, then `repeat` times, and print what each op took, the longest first.

    All threads count, such as those of microbatches. A kept array counts once, for the first op whose rule reads it;
    leaves (parameters, data) do not count, because they would be in memory anyway, nor do the arrays that `checkpoint`
    keeps. On CuPy the profiler waits for the device after each op: the time of each op is right, but the sum is longer
    than the step, because launches cannot overlap. It cannot be used inside backend.no_sync or with a captured step.

    show: print the table. Returns the Report.
    Errors: ValueError for repeat < 1; RuntimeError if another step is being profiled. An error of the step ends the
    profile.
    """
    if repeat < 1:
        raise ValueError(f"profile: repeat must be 1 or more, not {repeat!r}")
    if not _one_at_a_time.acquire(blocking=False):
        raise RuntimeError("profile: another step is being profiled, in this thread or another, and ops are shared")
    try:
        rehearsal = _Watch()
        with observing(rehearsal):
            step()
        flop_rate, byte_rate = machine_rates(max(1, rehearsal.most))
        watch = _Watch()
        with observing(watch):
            start = time.perf_counter()
            for _ in range(repeat):
                step()
                _wait()
            wall = time.perf_counter() - start
    finally:
        _one_at_a_time.release()
    rows = sorted(watch.rows.values(), key=lambda row: -row.seconds)
    report = Report(rows, repeat, wall, watch.busy, watch.most, flop_rate, byte_rate)
    if show:
        sys.stdout.write(f"{report}\n")
    return report


# ---------------------------------------------------------------- the observer


class _Watch(Observer):
    """Collects the rows, from all threads."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.lock = threading.Lock()
        self.local = threading.local()  # .within: is this thread in an op?
        self.inside = self.most = 0  # threads in an op, now and at most
        self.busy, self.since = 0.0, 0.0
        self.known: dict[int, weakref.ref[Any]] = {}  # memory that was counted already, or does not count

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        if self._within():
            return run(op, inputs, params)
        out, seconds = self._timed(lambda: run(op, inputs, params))
        shapes = [getattr(x, "shape", ()) for x in inputs]
        array = array_of(out)
        moved = 0 if _is_view(array, inputs) else _bytes(*inputs, array)
        with self.lock:
            row = self._row(op.name, _flop(op.name, shapes, array.shape, params, None))
            row.calls += 1
            row.forward += seconds
            row.moved += moved
            for x in inputs:
                if isinstance(x, Tensor) and x.node is None:
                    self._is_new(x._data)
            if isinstance(out, Tensor) and out.node is not None and out.node.op is op:
                row.kept += sum(_owner(a).nbytes for a in _kept_by(out.node) if self._is_new(a))
        return out

    def on_rule(self, run: Callable[..., Any], node: Node, g: Any, wanted: Sequence[bool], create_graph: bool) -> Any:
        if self._within() or node.op is recompute:  # the ops that checkpoint runs again are counted themselves
            return run(node, g, wanted, create_graph)
        shapes = [getattr(x, "shape", ()) for x in node.values]
        moved = _bytes(g, *_kept_by(node))
        flop = _flop(node.op.name, shapes, node.shape, node.params, [p is not None for p in wanted])
        found, seconds = self._timed(lambda: run(node, g, wanted, create_graph))
        with self.lock:
            row = self._row(node.op.name, flop)
            row.backward_calls += 1
            row.backward += seconds
            row.moved += moved + _bytes(*found)
        return found

    def _within(self) -> bool:
        return getattr(self.local, "within", False)

    def _timed(self, fn: Callable[[], Result]) -> tuple[Result, float]:
        self.local.within = True
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            if self.inside == 1:
                self.since = time.perf_counter()
        start = time.perf_counter()
        try:
            result = fn()
            _wait()
            return result, time.perf_counter() - start
        finally:
            self.local.within = False
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.busy += time.perf_counter() - self.since

    def _row(self, op: str, flop: int | None) -> Row:
        row = self.rows.setdefault(op, Row(op))
        if flop is not None:
            row.flop = (row.flop or 0) + flop
        return row

    def _is_new(self, array: Any) -> bool:
        """Is the memory of this array new? From now on it is known."""
        owner = _owner(array)
        known = self.known.get(id(owner))
        if known is not None and known() is owner:
            return False
        self.known[id(owner)] = weakref.ref(owner)
        return True


def _wait() -> None:
    if backend.name == "cupy":
        xp.cuda.get_current_stream().synchronize()


def _kept_by(node: Node) -> list[Any]:
    """The arrays that a node keeps for its rule."""
    kept = (*node.values, node.out, *(node.residuals or ()))
    return [a for a in kept if backend.active().is_array(a)]


def _owner(array: Any) -> Any:
    """The array that owns the memory; the memory of a file or of bytes has no such array."""
    return array.base if backend.active().is_array(array.base) else array


def _is_view(array: Any, inputs: Sequence[Any]) -> bool:
    given = [a for a in map(array_of, inputs) if backend.active().is_array(a)]
    return any(memory_of(array) is memory_of(a) for a in given)


def _bytes(*values: Any) -> int:
    return sum(a.nbytes for a in map(array_of, values) if backend.active().is_array(a))


# ---------------------------------------------------------------- what the machine can do


_SIDE, _COPY = 1024, 1 << 26


def machine_rates(threads: int) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s (read and written) of a large copy, per thread, with so many threads
    at once: the best of three, averaged over the threads. A single thread may use all threads for a product."""

    def rates(_rows: slice) -> tuple[float, float]:
        x = xp.ones((_SIDE, _SIDE), "float32")
        source, target = xp.ones(_COPY // 4, "float32"), xp.zeros(_COPY // 4, "float32")
        product = _fastest(lambda: ops.matmul(x, x))
        return 2 * _SIDE**3 / product, 2 * _COPY / _fastest(lambda: xp.copyto(target, source))

    found = list(over_microbatches(rates, threads, 1, threads if threads > 1 else None))
    return sum(f for f, _ in found) / threads, sum(b for _, b in found) / threads


def _fastest(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(4):  # the first is a warm-up
        start = time.perf_counter()
        run()
        _wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _flop(op: str, shapes: Sequence[Shape], out: Shape, params: Any, wanted: Sequence[bool] | None) -> int | None:
    """Multiplications and additions of a call or, if `wanted` (which adjoints are wanted) is given, of its rule."""
    if op == "scaled_dot_product_attention":  # q (.., L, D), k (.., S, D), v (.., S, E) -> (.., L, E)
        width, pairs = shapes[0][-1], 2 * math.prod(out[:-1]) * shapes[1][-2]
        if wanted is None:
            return pairs * (width + out[-1])
        return pairs * (out[-1] * (1 + wanted[2]) + width * (wanted[0] + wanted[1]))
    if op in ("matmul", "linear"):
        forward = 2 * math.prod(out) * shapes[0][-1]
    elif op == "conv2d_p":  # a kernel's worth of products for each element of y
        forward = 2 * math.prod(out) * math.prod(shapes[1][:3])
    elif op == "conv2d_input_grad":
        forward = 2 * math.prod(shapes[0]) * math.prod(shapes[1][:3])
    elif op == "conv2d_weight_grad":
        forward = 2 * math.prod(shapes[1]) * math.prod(out[:3])
    elif op == "einsum_p":
        terms = params["subscripts"].split("->")[0].split(",")
        lengths = {c: n for term, shape in zip(terms, shapes) for c, n in zip(term, shape) if n != 1}
        forward = len(terms) * math.prod(lengths.values())
    else:
        return None
    if wanted is None:
        return forward
    # The op is linear in each factor, so each adjoint costs as much as the forward. A bias is no factor.
    return forward * sum(wanted if op == "einsum_p" else wanted[:2])
