"""softmax and attention on NumPy: in place, with the weights kept for the rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.attention import scaled_dot_product_attention
from ...ops.shape import axis_of
from ...ops.softmax import softmax
from .activation import is_real


@softmax.fast("numpy")
def softmax_numpy(x: Array, *, axis: int = -1) -> Any:
    if not is_real(x):
        return NotImplemented
    axis = axis_of(axis, x.ndim, "softmax")
    z = x - x.max(axis=axis, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


@scaled_dot_product_attention.fast("numpy")
def attention_numpy(q: Array, k: Array, v: Array, *, mask: Any, scale: float) -> Any:
    if not is_real(q, k, v):
        return NotImplemented
    s = q @ k.swapaxes(-1, -2)  # (.., L, D) x (.., D, S) -> (.., L, S)
    s *= scale
    if mask is not None:
        s = np.where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask.astype(s.dtype, copy=False)
    p = softmax_numpy(s)
    return p @ v, (p,)


@scaled_dot_product_attention.fast_vjp("numpy")
def attention_vjp_numpy(
    g: Array, _y: Any, q: Array, k: Array, v: Array, *, mask: Any, scale: float, residuals: Any
) -> Any:
    (p,) = residuals
    s = g @ v.swapaxes(-1, -2)  # the adjoint of p, and then, in place, of the scores times the scale
    s -= np.einsum("...k,...k->...", s, p)[..., None]  # one pass, and no array of the products
    s *= p
    s *= scale
    return lambda: s @ k, lambda: s.swapaxes(-1, -2) @ q, lambda: p.swapaxes(-1, -2) @ g
