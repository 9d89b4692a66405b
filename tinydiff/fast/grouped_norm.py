"""The norms of the page (ops/norm.py) as one function of x (A, L, G, D) with statistics over L and D, for the CPU and
the GPU. Group norm has this shape already; layer norm is (rows, 1, 1, C), batch norm (1, N H W, C, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..ops.norm import normalize, shift_normalize_silu
from ..shape_dtype import ShapeDtype
from .taken import is_real

View = tuple[int, ...]


def register(name: str, norm: Callable[..., Any], norm_vjp: Callable[..., Any]) -> tuple[Any, Any]:
    """Register a backend's functions in place of the page, and return the forward and the rule of `normalize`:

    norm(x, shift, weight, bias, eps, silu) -> y, mean, rstd
    norm_vjp(g, x, mean, rstd, shift, weight, bias, silu) -> the adjoints of x, shift, weight, bias

    shift (A, G D) or None; weight and bias (G D,), (A, G D) or None; mean and rstd (A, 1, G). Either function may
    decline.
    """

    @shift_normalize_silu.fast(name)
    def shift_normalize_silu_fast(
        x: Array, shift: Any, weight: Any, bias: Any, *, axes: tuple[int, ...], eps: float, silu: bool
    ) -> Any:
        view = view_of(x, shift, weight, bias, axes)
        if view is None:
            return NotImplemented
        found = norm(x.reshape(view), *(flat(p, view) for p in (shift, weight, bias)), eps, silu)
        if found is NotImplemented:
            return found
        y, mean, rstd = found
        return y.reshape(x.shape), (mean, rstd, view)

    @shift_normalize_silu.fast_vjp(name)
    def shift_normalize_silu_vjp_fast(
        g: Array, _y: Any, x: Array, shift: Any, weight: Any, bias: Any, *, silu: bool, residuals: Any, **_options: Any
    ) -> Any:
        mean, rstd, view = residuals
        bias = weight if isinstance(bias, ShapeDtype) else bias  # a bias that was not kept: only its shape is read
        parameters = [flat(p, view) for p in (shift, weight, bias)]
        found = norm_vjp(g.reshape(view), x.reshape(view), mean, rstd, *parameters, silu)
        if found is NotImplemented:
            return found
        return tuple(a if p is None else a.reshape(p.shape) for a, p in zip(found, (x, shift, weight, bias)))

    @normalize.fast(name)
    def normalize_fast(x: Array, weight: Any, bias: Any, **options: Any) -> Any:
        return shift_normalize_silu_fast(x, None, weight, bias, silu=False, **options)

    @normalize.fast_vjp(name)
    def normalize_vjp_fast(g: Array, y: Any, x: Array, weight: Any, bias: Any, **options: Any) -> Any:
        found = shift_normalize_silu_vjp_fast(g, y, x, None, weight, bias, silu=False, **options)
        return found if found is NotImplemented else (found[0], *found[2:])

    return normalize_fast, normalize_vjp_fast


def view_of(x: Array, shift: Any, weight: Any, bias: Any, axes: tuple[int, ...]) -> View | None:
    """The shape (A, L, G, D) for x; None if there is no such shape."""
    if (
        not is_real(x, shift, weight, bias)
        or x.size == 0
        or getattr(weight, "shape", None) != getattr(bias, "shape", None)
    ):
        return None
    if x.ndim == 4 and axes == (1, 3):  # group norm
        a, _, groups, d = x.shape
        fit = {(1, 1, groups, d), (a, 1, groups, d)}
        if (shift is None or shift.shape == (a, 1, groups, d)) and (weight is None or weight.shape in fit):
            return x.shape
    elif shift is None and (weight is None or weight.shape == x.shape[-1:]):
        if axes == (x.ndim - 1,):  # layer norm
            return math.prod(x.shape[:-1]), 1, 1, x.shape[-1]
        if axes == tuple(range(x.ndim - 1)):  # batch norm
            return 1, math.prod(x.shape[:-1]), x.shape[-1], 1
    return None


def flat(p: Any, view: View) -> Any:
    """A parameter as (C,), the same for all samples, or (A, C), one row per sample."""
    if p is None:
        return None
    channels = view[2] * view[3]
    for_all = p.ndim == 1 or len(p) == 1 != view[0]
    return p.reshape(channels) if for_all else p.reshape(-1, channels)  # (C,) or (A, C)
