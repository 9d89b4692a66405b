"""softmax and the weights of attention on NumPy, in place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.shape import axis_of
from ...ops.softmax import softmax
from .. import attention
from ..taken import is_real


@softmax.fast("numpy")
def softmax_numpy(x: Array, *, axis: int = -1) -> Any:
    if not is_real(x) or x.size == 0:
        return NotImplemented
    axis = axis_of(axis, x.ndim, "softmax")
    z = x - x.max(axis=axis, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    s *= scale
    if mask is not None:
        s = np.where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask.astype(s.dtype, copy=False)
    return softmax_numpy(s)


def attention_weights_vjp(g: Array, p: Array, scale: float) -> Array:
    """The adjoint of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    g -= np.einsum("...k,...k->...", g, p)[..., None]  # one pass, and no array of the products
    g *= p
    g *= scale
    return g


attention.register("numpy", np.matmul, attention_weights, attention_weights_vjp)
