"""Sums over leading axes, and products of many small matrices with one, as large matrix products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.linalg import matmul
from ...ops.reduce import sum as sum_op
from ...ops.shape import axes_of
from .activation import is_real


@sum_op.fast("numpy")
def sum_numpy(x: Array, *, axis: Any = None, keepdims: bool = False) -> Any:
    """Over the leading axes of a large array the product with a row of ones is the fastest."""
    if not (is_real(x) and x.size >= 4096 and x.flags.c_contiguous):
        return NotImplemented
    axes = axes_of(axis, x.ndim, "sum")
    lead = len(axes)
    if not (0 < lead < x.ndim and axes == tuple(range(lead))):
        return NotImplemented
    rows = x.reshape(math.prod(x.shape[:lead]), -1)
    z = (np.ones((1, len(rows)), x.dtype) @ rows).reshape(x.shape[lead:])
    return z.reshape((1,) * lead + z.shape) if keepdims else z


@matmul.fast("numpy")
def matmul_numpy(x: Array, y: Array) -> Any:
    """Many matrices times one: (..., n, k) x (k, m) as (... n, k) x (k, m)."""
    if not (is_real(x, y) and y.ndim == 2 < x.ndim and x.shape[-1] == y.shape[0]):
        return NotImplemented
    return (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) @ y).reshape(*x.shape[:-1], y.shape[1])


@matmul.fast_vjp("numpy")
def matmul_vjp_numpy(g: Array, _z: Any, x: Array, y: Array, *, residuals: Any) -> Any:
    def y_adjoint() -> Array:
        return x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])

    return lambda: matmul(g, y.T), y_adjoint
