"""Sums over neighbouring axes, and of rows that are added at the places of an index, in C (sum.c)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.index import plain, scatter_add
from ..taken import is_real
from .compiled import Function

sum_in_c = Function("sum_over", "in x(A,M,R), out z(A,R), int A, int M, int R")
rows_in_c = Function("add_rows", "in int64 index(N), in x(N,D), inout z(n,D), int N, int n, int D")
bias_in_c = Function("add_to_rows", "inout y(R,C), in b(C), int R, int C, int part, int parts")

WORTH_A_CALL = 2**15  # numbers: NumPy adds fewer in less time than a call of C takes


def sum_of_rows(x: Array) -> Any:
    """(A, M, R) -> (A, R). Each number is the same for any A: that of a sample does not depend on its batch."""
    z = np.empty((x.shape[0], x.shape[2]), x.dtype)
    return z if sum_in_c(x=x, z=z) else NotImplemented


def add_in_place(y: Array, b: Array) -> Array:
    """y, with b (m,) added to each row of y (..., m)."""
    large = y.size >= WORTH_A_CALL and y.flags.c_contiguous
    if not (large and bias_in_c(y=y.reshape(math.prod(y.shape[:-1]), len(b)), b=np.ascontiguousarray(b))):
        y += b
    return y


@scatter_add.fast("numpy")
def scatter_add_numpy(x: Array, *, index: Any, shape: tuple[int, ...]) -> Any:
    """By one array of integers on the first axis, as the gradient of an embedding. Numbers out of range are for the
    page, which names them."""
    index = plain(index)
    if not (isinstance(index, np.ndarray) and index.dtype.kind in "iu" and np.can_cast(index.dtype, np.int64)):
        return NotImplemented
    if not (is_real(x) and x.size and x.flags.c_contiguous and x.shape == (*index.shape, *shape[1:])):
        return NotImplemented
    if index.min() < -shape[0] or index.max() >= shape[0]:
        return NotImplemented
    z, places = np.zeros(shape, x.dtype), np.ascontiguousarray(index.reshape(-1), np.int64)
    done = rows_in_c(index=places, x=x.reshape(len(places), -1), z=z.reshape(len(z), -1))
    return z if done else NotImplemented
