"""The kernels as whole-array operations. They write only into arrays that they made themselves, or are told to change.

Nothing here is special to NumPy; what makes them quick there is working in place, in few passes over memory.
"""

from __future__ import annotations

import math
from typing import Any

from .. import kernels
from ..backend import Array, xp
from .numpy_activation import erf, sigmoid, silu, silu_backward
from .numpy_conv import PATCH_BYTES, col2im, im2col
from .numpy_norm import normalize, normalize_backward
from .numpy_optim import adam_step, average_step, clip_norm, sgd_step
from .numpy_random import random_integers, random_normal, random_uniform

__all__ = [
    "PATCH_BYTES", "adam_step", "attention_weights", "attention_weights_backward", "average_step", "clip_norm",
    "col2im", "erf", "im2col", "index_add", "matmul", "normalize", "normalize_backward", "random_integers",
    "random_normal", "random_uniform", "sgd_step", "sigmoid", "silu", "silu_backward", "softmax", "sum",
]  # fmt: skip

# ---------------------------------------------------------------- matrix products, sums


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for (..., n, k) and (..., k, m), leading axes broadcast: (..., n, m), in `out` if it is given."""
    return a @ b if out is None else xp.matmul(a, b, out=out)


def sum(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Sum over sorted axes. Over the leading axes of a large array the product with a row of ones is the fastest."""
    lead = len(axes)
    if (
        0 < lead < x.ndim
        and axes == tuple(range(lead))
        and x.dtype.kind == "f"
        and x.flags.c_contiguous
        and x.size >= 4096
    ):
        rows = x.reshape(math.prod(x.shape[:lead]), -1)
        # That of the backend in use, as cuda.py takes this function over.
        z = kernels.matmul(xp.ones((1, len(rows)), x.dtype), rows).reshape(x.shape[lead:])
        return z.reshape((1,) * lead + z.shape) if keepdims else z
    return x.sum(axis=axes, keepdims=keepdims)


# ---------------------------------------------------------------- softmax


def softmax(x: Array, axis: int) -> Array:
    z = x - x.max(axis=axis, keepdims=True)
    xp.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    s *= scale
    if mask is not None:
        s = xp.where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask.astype(s.dtype, copy=False)
    return softmax(s, -1)


def attention_weights_backward(g: Array, p: Array, scale: float) -> Array:
    """The cotangent of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    g -= xp.einsum("...k,...k->...", g, p)[..., None]  # one pass, and no array of the products
    g *= p
    g *= scale
    return g


# ---------------------------------------------------------------- indexing


def index_add(z: Array, index: Any, values: Array) -> None:
    """z[index] += values, counting an element that occurs several times as often as it occurs."""
    if z.dtype.kind == "c":
        index_add(z.real, index, values.real)
        index_add(z.imag, index, values.imag)
    else:
        xp.add.at(z, index, values)
