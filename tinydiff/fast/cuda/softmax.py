"""softmax along rows, and the weights of attention (softmax.cu), in one launch each way."""

from __future__ import annotations

from typing import Any

import cupy
import numpy

from ...backend import Array
from ...ops.attention import scaled_dot_product_attention
from ...ops.softmax import softmax
from .. import attention
from .cublas import matmul
from .launch import THREADS, Source

_SOFTMAX = Source("softmax.cu", TYPE=("float", "double"), INDEX_BITS=(32, 64))


@softmax.fast("cupy")
def softmax_cupy(x: Array, *, axis: int = -1) -> Any:
    """z = e^x / sum e^x along the axis; one launch along the last one."""
    if not _is_taken(x) or axis not in (-1, x.ndim - 1):
        return NotImplemented
    x = cupy.ascontiguousarray(x)
    z = cupy.empty_like(x)
    _launch("softmax", x, x, z, 1, None, None, 1, 1, 0, 0, 0, 0)
    return z


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    if not _is_taken(s):
        return NotImplemented
    if mask is None:
        s = cupy.ascontiguousarray(s)
        _launch("softmax", s, s, s, scale, None, None, 1, 1, 0, 0, 0, 0)
        return s
    shape = numpy.broadcast_shapes(s.shape, mask.shape)
    if shape != s.shape:
        s = cupy.broadcast_to(s, shape)
    s = cupy.ascontiguousarray(s)
    if s.ndim > 4:
        flat = -1, *shape[-3:]
        attention_weights(s.reshape(flat), scale, cupy.broadcast_to(mask, shape).reshape(flat))
        return s
    mask = cupy.ascontiguousarray(mask.astype("bool" if mask.dtype == "bool" else s.dtype, copy=False))
    samples, heads, queries, keys = (1,) * (4 - mask.ndim) + mask.shape
    strides = [
        0 if n == 1 else step
        for n, step in zip((samples, heads, queries, keys), (heads * queries * keys, queries * keys, keys, 1))
    ]
    allowed, added = (mask, None) if mask.dtype == "bool" else (None, mask)
    _, heads, queries, _ = (1,) * (4 - s.ndim) + s.shape
    _launch("softmax", s, s, s, scale, allowed, added, heads, queries, *strides)
    return s


def attention_weights_vjp(g: Array, p: Array, scale: float) -> Array:
    """The adjoint of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    if not _is_taken(p):
        return NotImplemented
    if p.shape != g.shape:  # the values have more samples than the weights
        p = cupy.broadcast_to(p, g.shape)
    g, p = cupy.ascontiguousarray(g), cupy.ascontiguousarray(p)
    _launch("softmax_backward", g, g, p, g, scale)
    return g


def _is_taken(x: Array) -> bool:
    """Not complex arrays, which have no order; nor arrays without elements or axes."""
    return x.dtype.char in "fd" and x.ndim > 0 and x.size > 0


def _launch(kernel: str, x: Array, *arguments: Any) -> None:
    """Launch with so many threads per row of x, a power of 2, that each has about four numbers."""
    length = x.shape[-1]
    across = 1
    while across < THREADS and 4 * across < length:
        across *= 2
    lines = x.size // length
    _SOFTMAX[kernel]((-(-lines // (THREADS // across)),), THREADS, *arguments, length, across, lines)


forward, rule = attention.by_products(matmul, attention_weights, attention_weights_vjp)
scaled_dot_product_attention.fast("cupy")(forward)
scaled_dot_product_attention.fast_vjp("cupy")(rule)
