"""Random numbers by counter: a draw is a function of (seed, stream, step, index), not of what was drawn before.

The words are Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose counter
is four 64-bit words, here (block, step, 0, 0), under the key (seed, stream). Eight 32-bit numbers come from a
block. A row of an array starts on a block of its own: so row i of a draw is the same alone or in any
batch, on any backend, and in any thread.

    u = floor(word / 2^8) / 2^24                                     uniform on [0, 1)
    z = sqrt(-2 log((word + 1/2) / 2^32)) (cos, sin)(2 pi word' / 2^32)       a pair of normals (Box and Muller 1958)

The words and what is made of them come from kernels/numpy_random.py on the host, and from kernels/cuda_random.py on a
GPU: the words are the same bit for bit, the normals to the last digits of log and cos.
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

from . import backend, kernels, replays
from .kernels.numpy_random import words as philox_words

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

    def child(self, name: str | int) -> Rng:
        """An independent source, the same for the same name: `rng.child("noise")`, `rng.child(rank)`."""
        name = int(name) if isinstance(name, numpy.integer) else name
        if not isinstance(name, (str, int)):
            raise TypeError(f"child(name): the name must be a str or an int, not {name!r}")
        other = Rng(0)

        def follow() -> None:
            digest = hashlib.blake2b(f"{self.stream}/{type(name).__name__}/{name}".encode(), digest_size=8).digest()
            other._become(self.seed, int.from_bytes(digest, "little"), 0)

        replays.each_time(follow)
        return other

    def state(self) -> dict[str, int]:
        """The three integers that a checkpoint keeps: Rng(**state) goes on where this one is."""
        replays.refuse("the state of an Rng", "use rng.copy() or rng.child(name)")
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def copy(self) -> Rng:
        """A source of its own that starts where this one is now."""
        other = Rng(0)
        replays.each_time(lambda: other._become(self.seed, self.stream, self.step))
        return other

    def normal(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, first: int = 0) -> backend.Array:
        """Standard normals. The first axis counts samples: row i is that of sample `first + i`."""
        shape = _shape(shape, first)
        z = kernels.random_normal(self._draw(), *_rows_and_columns(shape), first)
        return z.reshape(shape).astype(dtype, copy=False)

    def uniform(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, first: int = 0) -> backend.Array:
        """Uniform on [0, 1), on a grid of 2^-24. Rows as in `normal`."""
        shape = _shape(shape, first)
        u = kernels.random_uniform(self._draw(), *_rows_and_columns(shape), first)
        return u.reshape(shape).astype(dtype, copy=False)

    def integers(self, n: int, shape: int | tuple[int, ...], *, first: int = 0) -> backend.Array:
        """Integers from 0 to n - 1 (int64, n up to 2^31). Rows as in `normal`.
        Their probabilities differ by less than n / 2^32.
        """
        if not 1 <= n <= 2**31:
            raise ValueError(f"integers(n): n must be from 1 to 2**31, not {n!r}")
        shape = _shape(shape, first)
        return kernels.random_integers(self._draw(), *_rows_and_columns(shape), first, n).reshape(shape)

    def permutation(self, n: int) -> numpy.ndarray:
        """0 to n - 1 in random order, on the host: it decides which data to load."""
        if n < 0:
            raise ValueError(f"permutation(n): n must not be negative, not {n!r}")
        replays.refuse("a permutation", "draw it outside, and pass what it selects as an input")
        words = philox_words(self._address(), 1, -(-n // 4), 0)
        return numpy.argsort(words[0, : 2 * n].view(numpy.uint64), kind="stable")

    def _draw(self) -> Any:
        """(seed, stream, step) of the next draw, for a kernel."""
        if current_microbatch() is not None and self._microbatch is not current_microbatch():
            raise RuntimeError(
                f"{self} is shared by the microbatches of a batch, and would draw in the order in which they come: "
                "make a source in each, rng.copy(), and draw with first="
            )
        log = getattr(_local, "log", None)
        if log is not None and id(self) not in log:
            replays.each_time(lambda: log.update({id(self): (self, self.step)}))
        return replays.numbers(self._address)

    def _address(self) -> numpy.ndarray:
        self.step += 1
        return numpy.array([self.seed, self.stream, self.step - 1], numpy.uint64)

    def _become(self, seed: int, stream: int, step: int) -> None:
        self.seed, self.stream, self.step = seed, stream, step


def _shape(shape: int | tuple[int, ...], first: int) -> tuple[int, ...]:
    """The shape of a draw as a tuple."""
    shape = (shape,) if isinstance(shape, (int, numpy.integer)) else tuple(shape)
    if any(n < 0 for n in shape) or first < 0:
        raise ValueError(
            f"a draw needs a shape and a first row that are not negative, not shape {shape}, first {first}"
        )
    return shape


def _rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0] if shape else 1), math.prod(shape[1:])


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, tuple[Rng, int]]]:
    """Inside, notes every Rng that this thread draws from, and its step before the first draw (see `replayed`)."""
    before = getattr(_local, "log", None)
    log: dict[int, tuple[Rng, int]] = {}
    _local.log = log
    try:
        yield log
    finally:
        _local.log = before
        if before is not None:
            for key in [key for key in log if key not in before]:
                replays.each_time(lambda key=key: before.update({key: log[key]}))  # type: ignore[misc]


def starts(log: dict[int, tuple[Rng, int]]) -> list[tuple[int, int, int]]:
    """(seed, stream, step) of each first draw in the log: equal for two runs that drew the same numbers."""
    return sorted((rng.seed, rng.stream, step) for rng, step in log.values())


@contextlib.contextmanager
def replayed(log: dict[int, tuple[Rng, int]]) -> Iterator[None]:
    """Inside, the sources in the log start again where they were, so the same code draws the same numbers."""
    now: dict[int, int] = {}

    def rewind() -> None:
        for key, (rng, step) in log.items():
            now[key], rng.step = rng.step, step

    def go_on() -> None:
        for key, (rng, _) in log.items():
            rng.step = now[key]

    replays.each_time(rewind)
    try:
        yield
    finally:
        replays.each_time(go_on)


def current_microbatch() -> Any:
    """Which of several microbatches of a batch this thread is working on; None for none. Whatever changes a state
    that all of them share, as a draw does, must not do so there: the result would depend on which comes first."""
    return getattr(_local, "microbatch", None)


@contextlib.contextmanager
def in_microbatch(microbatch: Any) -> Iterator[None]:
    """Inside, `current_microbatch` is this one."""
    before, _local.microbatch = current_microbatch(), microbatch
    try:
        yield
    finally:
        _local.microbatch = before


def as_rng(rng: Rng | int | None) -> Rng:
    """An Rng from an Rng, a seed, or None (a new seed from the operating system)."""
    return rng if isinstance(rng, Rng) else Rng(rng)
