"""Random numbers by counter: a draw is a function of (seed, stream, step, index), not of what was drawn before.

The words are Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose counter
is four 64-bit words, here (block, step, 0, 0), under the key (seed, stream). Eight 32-bit numbers come from a
block. A row of an array starts on a block of its own: so row i of a draw is the same alone or in any
batch, on any backend, and in any thread.

    u = floor(word / 2^8) / 2^24                                     uniform on [0, 1)
    z = sqrt(-2 log((word + 1/2) / 2^32)) (cos, sin)(2 pi word' / 2^32)       a pair of normals (Box and Muller 1958)

The words are made on the host and moved, so the host never waits for the device.
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

_local = threading.local()  # .log: where `recorded` notes the draws of this thread; .shard: which one it is in


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
        self._shard = current_shard()

    def __repr__(self) -> str:
        return f"Rng(seed={self.seed}, stream={self.stream}, step={self.step})"

    def child(self, name: str | int) -> Rng:
        """An independent source, the same for the same name: `rng.child("noise")`, `rng.child(rank)`."""
        name = int(name) if isinstance(name, numpy.integer) else name
        if not isinstance(name, (str, int)):
            raise TypeError(f"child(name): the name must be a str or an int, not {name!r}")
        digest = hashlib.blake2b(f"{self.stream}/{type(name).__name__}/{name}".encode(), digest_size=8).digest()
        return Rng(self.seed, stream=int.from_bytes(digest, "little"))

    def state(self) -> dict[str, int]:
        """The three integers that a checkpoint keeps: Rng(**state) goes on where this one is."""
        return {"seed": self.seed, "stream": self.stream, "step": self.step}

    def normal(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, first: int = 0) -> backend.Array:
        """Standard normals. The first axis counts samples: row i is that of sample `first + i`."""
        words, shape = self._words(shape, first)
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
        return self._cut(z, shape, dtype)

    def uniform(self, shape: int | tuple[int, ...], dtype: Any = "float32", *, first: int = 0) -> backend.Array:
        """Uniform on [0, 1), on a grid of 2^-24. Rows as in `normal`."""
        words, shape = self._words(shape, first)
        u = (words >> 8).astype(numpy.float32)
        u *= numpy.float32(2.0**-24)
        return self._cut(u, shape, dtype)

    def integers(self, n: int, shape: int | tuple[int, ...], *, first: int = 0) -> backend.Array:
        """Integers from 0 to n - 1 (int64, n up to 2^31). Rows as in `normal`.
        Their probabilities differ by less than n / 2^32.
        """
        if not 1 <= n <= 2**31:
            raise ValueError(f"integers(n): n must be from 1 to 2**31, not {n!r}")
        words, shape = self._words(shape, first)
        return self._cut(
            (words.astype(numpy.uint64) * numpy.uint64(n) >> numpy.uint64(32)).astype(numpy.int64), shape, "int64"
        )

    def permutation(self, n: int) -> numpy.ndarray:
        """0 to n - 1 in random order, on the host: it decides which data to load."""
        if n < 0:
            raise ValueError(f"permutation(n): n must not be negative, not {n!r}")
        words, _ = self._words((1, 2 * n), 0)
        return numpy.argsort(words[0, : 2 * n].view(numpy.uint64), kind="stable")

    def _words(self, shape: int | tuple[int, ...], first: int) -> tuple[numpy.ndarray, tuple[int, ...]]:
        """uint32 words, a row of whole blocks a sample: (rows, 8 ceil(elements a row / 8));
        and the shape as a tuple.
        """
        shape = (shape,) if isinstance(shape, (int, numpy.integer)) else tuple(shape)
        if any(n < 0 for n in shape) or first < 0:
            raise ValueError(
                f"a draw needs a shape and a first row that are not negative, not shape {shape}, first {first}"
            )
        if current_shard() is not None and self._shard is not current_shard():
            raise RuntimeError(
                f"{self} is shared by the shards of a batch (micro-batches), and would draw in the order in which "
                "they come: make a source in each, Rng(**rng.state()), and draw with first="
            )
        if getattr(_local, "log", None) is not None:
            _local.log.setdefault(id(self), (self, self.step))
        rows = shape[0] if shape else 1
        blocks = -(-math.prod(shape[1:]) // 8)
        counter = (first * blocks + (self.step << 64) - 1) % 2**256  # NumPy's Philox adds one before its first block
        bits = numpy.random.Philox(counter=counter, key=self.seed + (self.stream << 64))
        self.step += 1
        return bits.random_raw(rows * blocks * 4).view(numpy.uint32).reshape(rows, blocks * 8), shape

    @staticmethod
    def _cut(values: numpy.ndarray, shape: tuple[int, ...], dtype: Any) -> backend.Array:
        """The first numbers of each row, in the shape that was asked for, on the device."""
        per_row = math.prod(shape[1:])
        rows = values.reshape(len(values), math.prod(values.shape[1:]))[:, :per_row].reshape(shape)
        return backend.to_device(rows.astype(dtype, copy=False))


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
            for key, entry in log.items():
                before.setdefault(key, entry)


def starts(log: dict[int, tuple[Rng, int]]) -> list[tuple[int, int, int]]:
    """(seed, stream, step) of each first draw in the log: equal for two runs that drew the same numbers."""
    return sorted((rng.seed, rng.stream, step) for rng, step in log.values())


@contextlib.contextmanager
def replayed(log: dict[int, tuple[Rng, int]]) -> Iterator[None]:
    """Inside, the sources in the log start again where they were, so the same code draws the same numbers."""
    now = [(rng, rng.step) for rng, _ in log.values()]
    for rng, step in log.values():
        rng.step = step
    try:
        yield
    finally:
        for rng, step in now:
            rng.step = step


def current_shard() -> Any:
    """Which of several shards of a batch this thread is working on; None for none. Whatever changes a state that
    all of them share, as a draw does, must not do so there: the result would depend on who comes first."""
    return getattr(_local, "shard", None)


@contextlib.contextmanager
def in_shard(shard: Any) -> Iterator[None]:
    """Inside, `current_shard` is this one."""
    before, _local.shard = current_shard(), shard
    try:
        yield
    finally:
        _local.shard = before


def as_rng(rng: Rng | int | None) -> Rng:
    """An Rng from an Rng, a seed, or None (a new seed from the operating system)."""
    return rng if isinstance(rng, Rng) else Rng(rng)
