"""Random numbers by counter: a draw is a function of (seed, stream, step, index), not of what was drawn before.

The words are Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose counter
is four 64-bit words, here (block, step, 0, 0), under the key (seed, stream). Each block gives eight 32-bit words. Each
row of an array starts on a new block, so row i of a draw is the same alone or in any batch, on any backend, and in any
thread.

    u = floor(word / 2^8) / 2^24                                     uniform on [0, 1)
    z = sqrt(-2 log((word_1 + 1/2) / 2^32)) (cos, sin)(2 pi word_2 / 2^32)    a pair of normals (Box and Muller 1958)

Here the host computes them with NumPy's Philox and, if the backend is CuPy, brings them to the device. A loop in C
(fast/cpu) and a kernel on the device (fast/cuda) give the same words bit for bit, and the same normals to the last
digits of log and cos.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import numpy

from . import backend
from .arguments import integer
from .backend import Array, each_time, overridable

_local = threading.local()  # .log: where `recorded` notes the draws of this thread; .microbatch: which one it is in


class Rng:
    """A source of random numbers. Each draw advances `step` by one; (seed, stream, step) is its whole state."""

    def __init__(self, seed: int | None = None, *, stream: int = 0, step: int = 0):
        """seed: any int from 0 to 2^64 - 1; None takes one from the operating system (read it back in `.seed`)."""
        if seed is None:
            seed = secrets.randbits(63)
        for what, n in (("seed", seed), ("stream", stream), ("step", step)):
            if not isinstance(n, (int, numpy.integer)) or isinstance(n, bool) or not 0 <= n < 2**64:
                raise ValueError(f"{what} must be an int from 0 to 2**64 - 1, not {n!r}")
        self.seed, self.stream, self.step = int(seed), int(stream), int(step)
        self._microbatch = current_microbatch()

    def __repr__(self) -> str:
        return f"Rng(seed={self.seed}, stream={self.stream}, step={self.step})"

    def __reduce__(self) -> Any:
        """For copy.copy, copy.deepcopy and pickle. A copy belongs to the microbatch in which it is made."""
        backend.refuse_capture("a copy of an Rng by copy or pickle", "use rng.copy() or rng.child(name)")
        return type(self), (self.seed,), {name: value for name, value in vars(self).items() if name != "_microbatch"}

    def child(self, name: str | int) -> Rng:
        """An independent source, the same for the same name: `rng.child("noise")`, `rng.child(rank)`."""
        name = int(name) if isinstance(name, numpy.integer) else name
        if not isinstance(name, (str, int)):
            raise TypeError(f"child(name): the name must be a str or an int, not {name!r}")
        other = Rng(0)

        def follow() -> None:
            digest = hashlib.blake2b(f"{self.stream}/{type(name).__name__}/{name}".encode(), digest_size=8).digest()
            other._become(self.seed, int.from_bytes(digest, "little"), 0)

        each_time(follow)
        return other

    def state(self) -> dict[str, int]:
        """The three integers that a checkpoint keeps: Rng(**state) goes on where this one is."""
        backend.refuse_capture("the state of an Rng", "use rng.copy() or rng.child(name)")
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def copy(self) -> Rng:
        """A source of its own that starts where this one is now."""
        other = Rng(0)
        each_time(lambda: other._become(self.seed, self.stream, self.step))
        return other

    def normal(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, sample_offset: int = 0) -> backend.Array:
        """Standard normals. The first axis counts samples: row i is that of sample `sample_offset + i`.

        Errors, of all draws: ValueError for a shape or a sample_offset that is not of integers, or is negative;
        TypeError for a dtype other than float32 and float64.
        """
        shape, sample_offset, dtype = *_place(shape, sample_offset), _floating(dtype)
        z = random_normal(self._draw(), *_rows_and_columns(shape), sample_offset)
        return z.reshape(shape).astype(dtype, copy=False)

    def uniform(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, sample_offset: int = 0) -> backend.Array:
        """Uniform on [0, 1), on a grid of 2^-24. Rows and errors as in `normal`."""
        shape, sample_offset, dtype = *_place(shape, sample_offset), _floating(dtype)
        u = random_uniform(self._draw(), *_rows_and_columns(shape), sample_offset)
        return u.reshape(shape).astype(dtype, copy=False)

    def integers(self, n: int, shape: int | tuple[int, ...], *, sample_offset: int = 0) -> backend.Array:
        """Integers from 0 to n - 1 (int64, n up to 2^31). Rows and errors as in `normal`.
        Their probabilities differ by less than n / 2^32.
        """
        n, (shape, sample_offset) = integer("integers(n): n", n, 1, 2**31), _place(shape, sample_offset)
        return random_integers(self._draw(), *_rows_and_columns(shape), sample_offset, n).reshape(shape)

    def permutation(self, n: int) -> numpy.ndarray:
        """0 to n - 1 in random order, on the host: it decides which data to load."""
        n = integer("permutation(n): n", n, 0)
        backend.refuse_capture("a permutation", "draw it outside, and pass what it selects as an input")
        drawn = words(self._address(), 1, -(-n // 4), 0)
        return numpy.argsort(drawn[0, : 2 * n].view(numpy.uint64), kind="stable")

    def _draw(self) -> Any:
        """(seed, stream, step) of the next draw, for a kernel."""
        if current_microbatch() is not None and self._microbatch is not current_microbatch():
            raise RuntimeError(
                f"{self} is shared by the microbatches of a batch, and would draw in the order in which they come: "
                "make a source in each, rng.copy(), and draw with sample_offset="
            )
        log = getattr(_local, "log", None)
        if log is not None and id(self) not in log:
            each_time(lambda: log.update({id(self): (self, self.step)}))
        return backend.numbers(self._address)

    def _address(self) -> numpy.ndarray:
        self.step += 1
        return numpy.array([self.seed, self.stream, self.step - 1], numpy.uint64)

    def _become(self, seed: int, stream: int, step: int) -> None:
        self.seed, self.stream, self.step = seed, stream, step


def _place(shape: Any, sample_offset: Any) -> tuple[tuple[int, ...], int]:
    """The shape of a draw as a tuple of ints, and the sample_offset as one."""
    sizes = tuple(shape) if isinstance(shape, (tuple, list, numpy.ndarray)) else (shape,)
    # Far beyond 2^40 samples the counter of a draw would reach into the next one.
    return tuple(integer(f"a size in the shape {shape}", n, 0) for n in sizes), integer(
        "sample_offset", sample_offset, 0, 2**40
    )


def _floating(dtype: Any) -> numpy.dtype:
    """The dtype of a draw. Errors: TypeError unless it is float32 or float64."""
    found = None if dtype is None else numpy.dtype(dtype)
    if found is None or found not in ("float32", "float64"):
        raise TypeError(f"random numbers are drawn in float32 or float64, not in {dtype!r}")
    return found


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), math.prod(shape[1:])


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, tuple[Rng, int]]]:
    """Inside, every Rng that this thread draws from is noted, with its step before its first draw (see `replayed`)."""
    before = getattr(_local, "log", None)
    log: dict[int, tuple[Rng, int]] = {}
    _local.log = log
    try:
        yield log
    finally:
        _local.log = before
        if before is not None:
            for key in [key for key in log if key not in before]:
                each_time(lambda key=key: before.update({key: log[key]}))


def starts(log: dict[int, tuple[Rng, int]]) -> list[tuple[int, int, int]]:
    """The (seed, stream, step) of every Rng in the log at its first draw: equal for runs that drew the same numbers."""
    return sorted((rng.seed, rng.stream, step) for rng, step in log.values())


@contextlib.contextmanager
def replayed(log: dict[int, tuple[Rng, int]]) -> Iterator[None]:
    """Inside, every Rng in the log starts again from its noted step, so the same code draws the same numbers."""
    now: dict[int, int] = {}

    def rewind() -> None:
        for key, (rng, step) in log.items():
            now[key], rng.step = rng.step, step

    def go_on() -> None:
        for key, (rng, _) in log.items():
            rng.step = now[key]

    each_time(rewind)
    try:
        yield
    finally:
        each_time(go_on)


def current_microbatch() -> Any:
    """The microbatch that this thread is working on, if there are several in the batch; else None. Code inside must not
    change state that the microbatches share (a draw does): the result would depend on their order in time."""
    return getattr(_local, "microbatch", None)


@contextlib.contextmanager
def in_microbatch(microbatch: Any) -> Iterator[None]:
    """Inside, this is the `current_microbatch`."""
    before, _local.microbatch = current_microbatch(), microbatch
    try:
        yield
    finally:
        _local.microbatch = before


def as_rng(rng: Rng | int | None) -> Rng:
    """An Rng from an Rng, a seed, or None (a new seed from the operating system)."""
    return rng if isinstance(rng, Rng) else Rng(rng)


# ---------------------------------------------------------------- the numbers


def words(source: numpy.ndarray, rows: int, blocks: int, sample_offset: int) -> numpy.ndarray:
    """uint32 (rows, 8 blocks), the rows from sample_offset on of the draw at source = (seed, stream, step)."""
    seed, stream, step = (int(n) for n in source)
    counter = (sample_offset * blocks + (step << 64) - 1) % 2**256  # NumPy's Philox adds one before its first block
    bits = numpy.random.Philox(counter=counter, key=seed + (stream << 64))
    return bits.random_raw(rows * blocks * 4).view(numpy.uint32).reshape(rows, blocks * 8)


@overridable
def random_normal(source: numpy.ndarray, rows: int, columns: int, sample_offset: int) -> Array:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _cut(normals_of(words(source, rows, -(-columns // 8), sample_offset)), columns)


@overridable
def random_uniform(source: numpy.ndarray, rows: int, columns: int, sample_offset: int) -> Array:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _cut(uniforms_of(words(source, rows, -(-columns // 8), sample_offset)), columns)


@overridable
def random_integers(source: numpy.ndarray, rows: int, columns: int, sample_offset: int, n: int) -> Array:
    """0 to n - 1, int64 (rows, columns)."""
    return _cut(integers_of(words(source, rows, -(-columns // 8), sample_offset), n), columns)


def normals_of(words: numpy.ndarray) -> numpy.ndarray:
    """Each pair of words as a pair of normals."""
    pairs = words.reshape(len(words), words.shape[1] // 2, 2)  # (rows, pairs, 2)
    u = pairs[:, :, 0].astype(numpy.float32)
    u += numpy.float32(0.5)
    u *= numpy.float32(2.0**-32)
    radius = numpy.sqrt(numpy.float32(-2) * numpy.log(u))
    angle = pairs[:, :, 1].astype(numpy.float32)
    angle *= numpy.float32(2 * math.pi * 2.0**-32)
    z = numpy.empty(pairs.shape, numpy.float32)
    numpy.multiply(radius, numpy.cos(angle), out=z[:, :, 0])
    numpy.multiply(radius, numpy.sin(angle), out=z[:, :, 1])
    return z.reshape(words.shape)  # (rows, pairs, 2) -> (rows, 2 pairs)


def uniforms_of(words: numpy.ndarray) -> numpy.ndarray:
    u = (words >> 8).astype(numpy.float32)
    u *= numpy.float32(2.0**-24)
    return u


def integers_of(words: numpy.ndarray, n: int) -> numpy.ndarray:
    return (words.astype(numpy.uint64) * numpy.uint64(n) >> numpy.uint64(32)).astype(numpy.int64)


def _cut(values: numpy.ndarray, columns: int) -> Array:
    """The first `columns` numbers of each row, on the device."""
    return backend.to_device(values[:, :columns])
