"""softmax and attention in C (softmax.c, attention.c); where there is no compiler, in place on NumPy.

Attention in C goes through the keys in blocks, and keeps two numbers for each query; by matrix products it keeps the
weights, whose number is the square of the length, as long as they are few (fast/attention.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.attention import scaled_dot_product_attention
from ...ops.shape import axis_of
from ...ops.softmax import softmax
from .. import attention
from ..taken import is_real
from .compiled import Function

softmax_in_c = Function("softmax", "in x(R,C), out z(R,C), int R, int C, real scale, int part, int parts")
softmax_vjp_in_c = Function(
    "softmax_vjp", "in g(R,C), in z(R,C), out dx(R,C), int R, int C, real scale, int part, int parts"
)

HEADS = "in q(NQ,L,D), in k(NK,S,D), in v(NV,S,E), in uint8 allowed(NM,R,S)?, in added(NM,R,S)?, in int64 which(B,4), "
LENGTHS = "int B, int L, int S, int D, int E, int R, int d, "
PARTS = "real scale, int part, int parts"
attention_in_c = Function("attention", HEADS + "out y(B,L,E), out top(B,L), out rsum(B,L), " + LENGTHS + PARTS)
attention_vjp_in_c = Function(
    "attention_vjp",
    "in g(B,L,E), in y(B,L,E), in top(B,L), in rsum(B,L), "
    + HEADS
    + "out dq(B,L,D), out dk(B,S,D), out dv(B,S,E), "
    + LENGTHS
    + "int e, "
    + PARTS,
)
width_in_c = Function("attention_width", "out int64 width(one), int one")  # of float32, a multiple of that of float64


# ---------------------------------------------------------------- softmax


@softmax.fast("numpy")
def softmax_numpy(x: Array, *, axis: int = -1) -> Any:
    if not is_real(x) or x.size == 0:
        return NotImplemented
    axis = axis_of(axis, x.ndim, "softmax")
    moved = np.ascontiguousarray(_moved(x, axis, -1))
    z = np.empty_like(moved)
    if not softmax_in_c(x=_rows(moved), z=_rows(z), scale=1):
        return _softmax_without_c(x, axis)
    return np.ascontiguousarray(_moved(z, -1, axis))


@softmax.fast_vjp("numpy")
def softmax_vjp_numpy(g: Array, z: Array, _x: Any, *, axis: int, residuals: Any) -> Any:
    if not is_real(g, z):
        return NotImplemented
    g, z = (np.ascontiguousarray(_moved(a, axis, -1)) for a in (g, z))
    dx = np.empty_like(g)
    if not softmax_vjp_in_c(g=_rows(g), z=_rows(z), dx=_rows(dx), scale=1):
        np.subtract(g, np.einsum("...k,...k->...", g, z)[..., None], out=dx)
        dx *= z
    return np.ascontiguousarray(_moved(dx, -1, axis))


def _moved(a: Array, axis: int, to: int) -> Array:
    """The array itself where nothing moves: the engine would copy the gradient if it were a view."""
    return a if axis % a.ndim == to % a.ndim else np.moveaxis(a, axis, to)


def _rows(a: Array) -> Array:
    """(.., C) -> (R, C), a view."""
    return a.reshape(-1, a.shape[-1])


def _softmax_without_c(x: Array, axis: int) -> Array:
    z = x - x.max(axis=axis, keepdims=True)
    np.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


# ---------------------------------------------------------------- attention


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    if mask is None and scale > 0 and is_real(s):
        s = np.ascontiguousarray(s)
        p = np.empty_like(s)
        if softmax_in_c(x=_rows(s), z=_rows(p), scale=scale):
            return p
    s *= scale
    if mask is not None:
        s = np.where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask.astype(s.dtype, copy=False)
    return softmax_numpy(s)


def attention_weights_vjp(g: Array, p: Array, scale: float) -> Array:
    """The adjoint of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    if p.shape == g.shape and g.flags.c_contiguous and p.flags.c_contiguous:
        s = np.empty_like(g)
        if softmax_vjp_in_c(g=_rows(g), z=_rows(p), dx=_rows(s), scale=scale):
            return s
    g -= np.einsum("...k,...k->...", g, p)[..., None]  # one pass, and no array of the products
    g *= p
    g *= scale
    return g


by_products, by_products_vjp = attention.by_products(np.matmul, attention_weights, attention_weights_vjp)


@scaled_dot_product_attention.fast("numpy")
def attention_numpy(q: Array, k: Array, v: Array, mask: Any, *, scale: float) -> Any:
    if not attention.is_taken(q, k, v, mask):
        return NotImplemented
    found = NotImplemented if _is_for_products(q, k, v) else in_blocks(q, k, v, mask, scale=scale)
    return by_products(q, k, v, mask, scale=scale) if found is NotImplemented else found


@scaled_dot_product_attention.fast_vjp("numpy")
def attention_vjp_numpy(
    g: Array, y: Any, q: Array, k: Array, v: Array, mask: Any, *, scale: float, residuals: Any
) -> Any:
    rule = by_products_vjp if len(residuals) == 1 else in_blocks_vjp
    return rule(g, y, q, k, v, mask, scale=scale, residuals=residuals)


def _is_for_products(q: Array, k: Array, v: Array) -> bool:
    """Matrix products are faster if there are few weights: fewer than half as many as numbers in q and y, so wide rows;
    or so few queries that in a block, of 32, most would be missing. Few weights take little memory, too."""
    return 4 * k.shape[-2] <= k.shape[-1] + v.shape[-1] or q.shape[-2] < 16


def in_blocks(q: Array, k: Array, v: Array, mask: Any, *, scale: float) -> Any:
    """The output; and y, which is the output with widened rows, the largest score of each query, and 1 / sum."""
    vector = np.empty(1, np.int64)
    if not width_in_c(width=vector):
        return NotImplemented
    arrays, lead = _heads(q, k, v, mask, int(vector[0]))
    b, length, width = math.prod(lead), q.shape[-2], v.shape[-1]
    y = np.empty((*lead, length, arrays["v"].shape[-1]), q.dtype)
    top, rsum = np.empty((b, length), q.dtype), np.empty((b, length), q.dtype)
    attention_in_c(**arrays, y=_matrices(y), top=top, rsum=rsum, R=1, d=q.shape[-1], scale=scale)
    return _narrow(y, width), (y, top, rsum)


def in_blocks_vjp(g: Array, _y: Any, q: Array, k: Array, v: Array, mask: Any, *, scale: float, residuals: Any) -> Any:
    y, top, rsum = residuals
    vector = np.empty(1, np.int64)
    width_in_c(width=vector)
    arrays, lead = _heads(q, k, v, mask, int(vector[0]))
    widths = [arrays[name].shape[-1] for name in "qkv"]
    adjoints = [np.empty((*lead, x.shape[-2], width), y.dtype) for x, width in zip((q, k, v), widths)]
    dq, dk, dv = map(_matrices, adjoints)
    attention_vjp_in_c(
        g=_widened(g, int(vector[0])), y=_matrices(y), top=top, rsum=rsum, **arrays, dq=dq, dk=dk, dv=dv, R=1,
        d=q.shape[-1], e=v.shape[-1], scale=scale,
    )  # fmt: skip
    found = [_narrow(a, x.shape[-1]) for a, x in zip(adjoints, (q, k, v))]
    return *found, lambda: attention.mask_adjoint(g, q, k, v, mask, scale=scale)


def _heads(q: Array, k: Array, v: Array, mask: Any, vector: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The arrays as C takes them, with rows of whole vectors of so many numbers, and the leading axes that they are
    broadcast to."""
    wide = {name: _widened(x, vector) for name, x in zip("qkv", (q, k, v))}
    arrays: dict[str, Any] = {**wide, "allowed": None, "added": None}
    if mask is not None:
        mask = np.atleast_2d(mask)
        mask = np.broadcast_to(mask, (*mask.shape[:-2], *((1, *mask.shape)[-2:-1]), k.shape[-2]))  # (.., L or 1, S)
        flat = _matrices(mask)
        if mask.dtype.kind == "b":
            arrays["allowed"] = flat.view(np.uint8)
        else:
            arrays["added"] = flat.astype(q.dtype, copy=False)
    leads = [() if a is None else a.shape[:-2] for a in (q, k, v, mask)]
    lead = np.broadcast_shapes(*leads)
    which = arrays["which"] = np.empty((math.prod(lead), 4), np.int64)
    for i, own in enumerate(leads):
        which[:, i] = np.broadcast_to(np.arange(math.prod(own)).reshape(own), lead).reshape(-1)
    return arrays, lead


def _matrices(a: Array) -> Array:
    """(.., M, N) -> (A, M, N), a view if a is in C order."""
    return np.ascontiguousarray(a).reshape(-1, *a.shape[-2:])


def _widened(a: Array, vector: int) -> Array:
    """(.., M, N) -> (A, M, N), with zeros up to whole vectors of columns."""
    width = a.shape[-1]
    if width % vector == 0:
        return _matrices(a)
    wide = np.zeros((*a.shape[:-1], width + -width % vector), a.dtype)
    wide[..., :width] = a
    return _matrices(wide)


def _narrow(a: Array, width: int) -> Array:
    """Without the zeros."""
    return a if a.shape[-1] == width else np.ascontiguousarray(a[..., :width])
