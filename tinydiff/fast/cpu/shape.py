"""Arrays beside each other along the last axis, and apart again, in C (concatenate.c)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.shape import concatenate_p
from ..taken import is_real
from .compiled import Function

beside_in_c = Function(
    "put_beside", "in list x(count,n), out y(A,C), sizes n, int count, int A, int C, int part, int parts"
)
apart_in_c = Function(
    "take_apart", "in y(A,C), out list x(count,n), sizes n, int count, int A, int C, int part, int parts"
)

WORTH_A_CALL = 2**12  # pieces, the rows of all arrays: NumPy copies fewer in less time than a call of C takes


@concatenate_p.fast("numpy")
def concatenate_numpy(*xs: Array, axis: int = 0) -> Any:
    if not is_real(*xs) or axis not in (-1, xs[0].ndim - 1):
        return NotImplemented
    rest = xs[0].shape[:-1]
    if math.prod(rest) * len(xs) < WORTH_A_CALL or any(x.shape[:-1] != rest for x in xs):
        return NotImplemented
    if not all(x.flags.c_contiguous and x.size for x in xs):
        return NotImplemented
    y = np.empty((*rest, sum(x.shape[-1] for x in xs)), xs[0].dtype)
    return (y, ()) if beside_in_c(x=xs, y=_rows(y)) else NotImplemented


@concatenate_p.fast_vjp("numpy")
def concatenate_vjp_numpy(g: Array, _z: Any, *xs: Any, residuals: Any, axis: int) -> Any:
    if not (is_real(g) and g.flags.c_contiguous):
        return NotImplemented
    parts = [np.empty(x.shape, g.dtype) for x in xs]
    return tuple(parts) if apart_in_c(y=_rows(g), x=parts) else NotImplemented


def _rows(y: Array) -> Array:
    """(..., C) -> (A, C)"""
    return y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
