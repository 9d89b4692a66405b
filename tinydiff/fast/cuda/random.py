"""Random numbers by counter, on the device (random.cu)."""

from __future__ import annotations

import cupy

from ... import rng
from ...backend import Array
from .launch import Source

_RANDOM = Source("random.cu")


@rng.random_normal.fast("cupy")
def random_normal(source: Array, rows: int, columns: int, sample_offset: int) -> Array:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _drawn("random_normal", "float32", source, rows, columns, sample_offset)


@rng.random_uniform.fast("cupy")
def random_uniform(source: Array, rows: int, columns: int, sample_offset: int) -> Array:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _drawn("random_uniform", "float32", source, rows, columns, sample_offset)


@rng.random_integers.fast("cupy")
def random_integers(source: Array, rows: int, columns: int, sample_offset: int, n: int) -> Array:
    """0 to n - 1, int64 (rows, columns)."""
    return _drawn("random_integers", "int64", source, rows, columns, sample_offset, n)


def _drawn(name: str, dtype: str, source: Array, rows: int, columns: int, sample_offset: int, *others: int) -> Array:
    """The rows from sample_offset on of the draw at source = (seed, stream, step)."""
    target, blocks = cupy.empty((rows, columns), dtype), -(-columns // 8)
    if target.size:
        numbers = [int(n) for n in (sample_offset * blocks, blocks, columns, *others)]  # also from NumPy's integers
        _RANDOM[name].each_element(int(rows * blocks), source, *numbers, target)
    return target
