"""Random numbers by counter, in C (random.c)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ... import rng
from ...backend import Array
from .compiled import Function

normal_in_c = Function(
    "random_normal", "in uint64 source(3), out float32 z(rows,columns), int rows, int columns, int first"
)
uniform_in_c = Function(
    "random_uniform", "in uint64 source(3), out float32 z(rows,columns), int rows, int columns, int first"
)
integers_in_c = Function(
    "random_integers", "in uint64 source(3), out int64 z(rows,columns), int rows, int columns, int first, int most"
)
normals_in_c = Function("normals", "in uint32 words(128), out float32 z(128)")


@rng.random_normal.fast("numpy")
def random_normal(source: Array, rows: int, columns: int, sample_offset: int) -> Any:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _drawn(normal_in_c, "float32", source, rows, columns, sample_offset)


@rng.random_uniform.fast("numpy")
def random_uniform(source: Array, rows: int, columns: int, sample_offset: int) -> Any:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _drawn(uniform_in_c, "float32", source, rows, columns, sample_offset)


@rng.random_integers.fast("numpy")
def random_integers(source: Array, rows: int, columns: int, sample_offset: int, n: int) -> Any:
    """0 to n - 1, int64 (rows, columns)."""
    return _drawn(integers_in_c, "int64", source, rows, columns, sample_offset, most=int(n))


def _drawn(
    in_c: Function, dtype: str, source: Array, rows: int, columns: int, sample_offset: int, **others: int
) -> Any:
    """The rows from sample_offset on of the draw at source = (seed, stream, step)."""
    blocks = -(-columns // 8)
    first, z = int(sample_offset * blocks), np.empty((rows, columns), dtype)
    if first + rows * blocks >= 2**63:  # the counter has more bits than C takes
        return NotImplemented
    return z if in_c(source=source, z=z, first=first, **others) else NotImplemented
