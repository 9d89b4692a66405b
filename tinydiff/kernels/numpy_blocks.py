"""Arrays in blocks that stay in the cache of a core, for kernels of several passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..backend import Array

BLOCK_BYTES = 2**20  # an array's share; larger blocks spend less on starting each pass, smaller ones stay nearer


def blocks(x: Array) -> Iterator[Any]:
    """The first axis in parts of about BLOCK_BYTES."""
    rows = len(x) if x.ndim else 1
    step = max(1, BLOCK_BYTES * rows // max(x.nbytes, 1))
    return (slice(i, i + step) if x.ndim else ... for i in range(0, rows, step))
