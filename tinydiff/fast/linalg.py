"""Sums over neighbouring axes, and products of many small matrices with one, as large matrix products, for the CPU and
the GPU."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from ..backend import Array, xp
from ..ops.linalg import linear, matmul
from ..ops.reduce import sum as sum_over
from ..ops.shape import axes_of
from .taken import is_real


def register(
    name: str,
    product: Callable[[Array, Array], Array],
    sum_of_rows: Callable[[Array], Any] = lambda x: NotImplemented,
    add_in_place: Callable[[Array, Array], Array] = operator.iadd,
) -> None:
    """Register a backend's product of matrices, (..., n, k) x (..., k, m), in place of the page; its sum of the rows of
    matrices, (A, M, R) -> (A, R), if it has one, which may decline; and how it adds (m,) to (..., m) in place."""

    @matmul.fast(name)
    def matmul_fast(x: Array, y: Array) -> Any:
        if not is_real(x, y) or min(x.ndim, y.ndim) < 2 or x.shape[-1] != y.shape[-2]:
            return NotImplemented
        if any(m != n and 1 not in (m, n) for m, n in zip(x.shape[-3::-1], y.shape[-3::-1])):
            return NotImplemented
        if y.ndim > 2 or x.ndim == 2:
            return product(x, y)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # many matrices times one: (..., n, k) -> (... n, k)
        return product(rows, y).reshape(*x.shape[:-1], y.shape[1])  # (... n, m) -> (..., n, m)

    @matmul.fast_vjp(name)
    def matmul_vjp_fast(g: Array, _z: Any, x: Array, y: Array, *, residuals: Any) -> Any:
        if y.ndim > 2 or x.ndim == 2:
            return lambda: product(g, y.swapaxes(-1, -2)), lambda: product(x.swapaxes(-1, -2), g)

        def y_adjoint() -> Array:
            m = math.prod(x.shape[:-1])
            return product(x.reshape(m, x.shape[-1]).T, g.reshape(m, g.shape[-1]))

        return lambda: matmul_fast(g, y.T), y_adjoint

    @linear.fast(name)
    def linear_fast(x: Array, w: Array, b: Array) -> Any:
        fits = is_real(x, w, b) and w.ndim == 2 <= x.ndim and x.shape[-1] == w.shape[0] and b.shape == w.shape[1:]
        return add_in_place(matmul_fast(x, w), b) if fits else NotImplemented

    @linear.fast_vjp(name)
    def linear_vjp_fast(g: Array, _y: Any, x: Array, w: Array, _b: Any, *, residuals: Any) -> Any:
        return (*matmul_vjp_fast(g, None, x, w, residuals=residuals), g)

    @sum_over.fast(name)
    def sum_fast(x: Array, *, axis: Any = None, keepdims: bool = False) -> Any:
        """Of a large array, over neighbouring axes with others behind them."""
        if not (is_real(x) and x.size >= 4096 and x.flags.c_contiguous):
            return NotImplemented
        axes = axes_of(axis, x.ndim, "sum")
        if not axes or axes != tuple(range(axes[0], axes[-1] + 1)) or axes[-1] == x.ndim - 1:
            return NotImplemented
        first, last = axes[0], axes[-1] + 1
        lengths = [math.prod(part) for part in (x.shape[:first], x.shape[first:last], x.shape[last:])]
        if lengths[1] * lengths[2] < 4096:  # by what one sample has, whose sum must not depend on its batch
            return NotImplemented
        z = sum_of_rows(x.reshape(lengths))  # (A, M, R) -> (A, R)
        if z is NotImplemented and first == 0:  # a product with a row of ones is quick too
            z = product(xp.ones((1, lengths[1]), x.dtype), x.reshape(lengths[1:]))  # (1, M) x (M, R) -> (1, R)
        if z is NotImplemented:
            return NotImplemented
        return z.reshape(*x.shape[:first], *(1,) * (len(axes) if keepdims else 0), *x.shape[last:])
