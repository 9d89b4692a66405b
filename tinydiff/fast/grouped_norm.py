"""The norms of the page (ops/norm.py) as one function of x (A, L, G, D) with statistics over L and D, for the CPU and
the GPU. Group norm is (N, positions, groups, C / groups), layer norm (rows, 1, 1, C), batch norm (1, N H W, C, 1).
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
        x: Array, shift: Any, weight: Any, bias: Any, *, groups: int, eps: float, silu: bool
    ) -> Any:
        if not is_real(x, shift, weight, bias) or x.size == 0:
            return NotImplemented
        view = (x.shape[0], math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups)
        return normalized(x, view, shift, weight, bias, eps, silu)

    @shift_normalize_silu.fast_vjp(name)
    def shift_normalize_silu_vjp_fast(
        g: Array, _y: Any, x: Array, shift: Any, weight: Any, bias: Any, *, silu: bool, residuals: Any, **_options: Any
    ) -> Any:
        bias = weight if isinstance(bias, ShapeDtype) else bias  # a bias that was not kept: only its shape is read
        return normalized_vjp(g, x, residuals, shift, weight, bias, silu)

    @normalize.fast(name)
    def normalize_fast(x: Array, weight: Any, bias: Any, *, axes: tuple[int, ...], eps: float) -> Any:
        view = view_of(x, weight, bias, axes)
        if view is None:
            return NotImplemented
        return normalized(x, view, None, flat(weight, view), flat(bias, view), eps, False)

    @normalize.fast_vjp(name)
    def normalize_vjp_fast(
        g: Array, _y: Any, x: Array, weight: Any, bias: Any, *, residuals: Any, **_options: Any
    ) -> Any:
        bias = weight if isinstance(bias, ShapeDtype) else bias
        view = residuals[0]
        found = normalized_vjp(g, x, residuals, None, flat(weight, view), flat(bias, view), False)
        if found is NotImplemented:
            return found
        return tuple(a if p is None else a.reshape(p.shape) for a, p in zip((found[0], *found[2:]), (x, weight, bias)))

    def normalized(x: Array, view: View, *parameters: Any) -> Any:
        found = norm(x.reshape(view), *parameters)
        if found is NotImplemented:
            return found
        y, mean, rstd = found
        return y.reshape(x.shape), (view, mean, rstd)

    def normalized_vjp(g: Array, x: Array, residuals: Any, *parameters: Any) -> Any:
        view, mean, rstd = residuals
        found = norm_vjp(g.reshape(view), x.reshape(view), mean, rstd, *parameters)
        return found if found is NotImplemented else (found[0].reshape(x.shape), *found[1:])

    return normalize_fast, normalize_vjp_fast


def view_of(x: Array, weight: Any, bias: Any, axes: tuple[int, ...]) -> View | None:
    """The shape (A, L, G, D) for x; None if there is no such shape."""
    if not is_real(x, weight, bias) or x.size == 0 or getattr(weight, "shape", None) != getattr(bias, "shape", None):
        return None
    if x.ndim == 4 and axes == (1, 3):  # group norm
        a, _, groups, d = x.shape
        if weight is None or weight.shape in {(1, 1, groups, d), (a, 1, groups, d)}:
            return x.shape
    elif weight is None or weight.shape == x.shape[-1:]:
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
