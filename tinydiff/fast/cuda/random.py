"""Random numbers by counter, on the device (random.cu)."""

from __future__ import annotations

import cupy

from ... import rng
from ...backend import Array
from .launch import Source

_RANDOM = Source("random.cu")


@rng.random_normal.fast("cupy")
def random_normal(source: Array, rows: int, columns: int, first: int) -> Array:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _drawn("random_normal", "float32", source, rows, columns, first)


@rng.random_uniform.fast("cupy")
def random_uniform(source: Array, rows: int, columns: int, first: int) -> Array:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _drawn("random_uniform", "float32", source, rows, columns, first)


@rng.random_integers.fast("cupy")
def random_integers(source: Array, rows: int, columns: int, first: int, n: int) -> Array:
    """0 to n - 1, int64 (rows, columns)."""
    return _drawn("random_integers", "int64", source, rows, columns, first, n)


def _drawn(name: str, dtype: str, source: Array, rows: int, columns: int, first: int, *others: int) -> Array:
    """Rows `first`, first + 1, ... of the draw at source = (seed, stream, step)."""
    target, blocks = cupy.empty((rows, columns), dtype), -(-columns // 8)
    if target.size:
        numbers = [int(n) for n in (first * blocks, blocks, columns, *others)]  # NumPy's will do as well
        _RANDOM[name].each_element(int(rows * blocks), source, *numbers, target)
    return target
