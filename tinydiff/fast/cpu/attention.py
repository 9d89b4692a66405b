"""softmax and attention in C (softmax.c, attention.c); where there is no compiler, in place on NumPy.

Attention in C goes through the keys in blocks, and keeps two numbers for each query; by matrix products it keeps the
weights, whose number is the square of the length, as long as they are few (fast/attention.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.attention import scaled_dot_product_attention
from ...ops.shape import axis_of
from ...ops.softmax import softmax
from .. import attention
from ..taken import is_real
from ..threads import matmul
from .compiled import Function

softmax_in_c = Function("softmax", "in x(R,C), out z(R,C), int R, int C, real scale, int part, int parts")
softmax_vjp_in_c = Function(
    "softmax_vjp", "in g(R,C), in z(R,C), out dx(R,C), int R, int C, real scale, int part, int parts"
)

HEADS = "in q(nq), in k(nk), in v(nv), in uint8 allowed(nm)?, in added(nm)?, in int64 at(B,{n}), in int64 row({n}), "
NUMBERS = "int B, int L, int S, int D, int E, real scale, int part, int parts"
attention_in_c = Function(
    "attention",
    HEADS.format(n=5) + "out y(ny), out top(B,L), out rsum(B,L), int nq, int nk, int nv, int nm, int ny, " + NUMBERS,
)
attention_vjp_in_c = Function(
    "attention_vjp",
    HEADS.format(n=9)
    + "in y(ny), in top(B,L), in rsum(B,L), in g(ng), out dq(ndq), out dk(ndk), out dv(ndv), "
    + "int nq, int nk, int nv, int nm, int ny, int ng, int ndq, int ndk, int ndv, "
    + NUMBERS,
)


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


by_products, by_products_vjp = attention.by_products(matmul, attention_weights, attention_weights_vjp)


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
    """Matrix products are faster if there are few weights, at most an eighth as many as numbers in q and y, so wide
    rows; or so few queries that in a block, of 32, most would be missing. Few weights take little memory, too."""
    return 8 * k.shape[-2] <= k.shape[-1] + v.shape[-1] or q.shape[-2] < 16


def in_blocks(q: Array, k: Array, v: Array, mask: Any, *, scale: float) -> Any:
    """The output; and for the rule again, the largest score of each query, and 1 / sum."""
    q, k, v = (_with_whole_rows(a) for a in (q, k, v))
    mask = _mask_of_scores(mask, q, k)
    lead = np.broadcast_shapes(*(() if a is None else a.shape[:-2] for a in (q, k, v, mask)))
    b, length, keys, width = math.prod(lead), q.shape[-2], k.shape[-2], v.shape[-1]
    y = _like(q, (*lead, length, width))
    top, rsum = np.empty((b, length), q.dtype), np.empty((b, length), q.dtype)
    done = attention_in_c(
        **_heads((q, k, v, mask, y), lead), y=_numbers(y), top=top, rsum=rsum, S=keys, D=q.shape[-1], E=width,
        scale=scale,
    )  # fmt: skip
    return (y, (y, top, rsum)) if done else NotImplemented


def in_blocks_vjp(g: Array, _y: Any, q: Array, k: Array, v: Array, mask: Any, *, scale: float, residuals: Any) -> Any:
    y, top, rsum = residuals
    g, *inputs = (_with_whole_rows(a) for a in (g, q, k, v))
    lead = y.shape[:-2]
    dq, dk, dv = adjoints = [_like(x, (*lead, *x.shape[-2:])) for x in inputs]
    attention_vjp_in_c(
        **_heads((*inputs, _mask_of_scores(mask, q, k), y, g, *adjoints), lead), y=_numbers(y), top=top, rsum=rsum,
        g=_numbers(g), dq=_numbers(dq), dk=_numbers(dk), dv=_numbers(dv), S=k.shape[-2], D=k.shape[-1], E=v.shape[-1],
        scale=scale,
    )  # fmt: skip
    return *adjoints, lambda: attention.mask_adjoint(g, q, k, v, mask, scale=scale)


def _heads(matrices: tuple[Any, ...], lead: tuple[int, ...]) -> dict[str, Any]:
    """q, k, v and the mask as C takes them, and where each head has these and the other matrices (.., M, N): at what
    number of its array each begins, and how far apart its rows are. All are broadcast to the leading axes `lead`."""
    q, k, v, mask, *_ = matrices
    kind = None if mask is None else mask.dtype.kind
    layouts = tuple(((), ()) if a is None else (a.shape[:-2], _steps(a)[:-2]) for a in matrices)
    rows = [0 if a is None or a.shape[-2] == 1 else _steps(a)[-2] for a in matrices]
    return {
        **{name: _numbers(a) for name, a in zip("qkv", (q, k, v))},
        "allowed": _numbers(mask).view(np.uint8) if kind == "b" else None,
        "added": _numbers(mask) if kind == "f" else None,
        "nm": 0,  # if there is no mask
        "at": _places(layouts, lead),
        "row": np.array(rows, np.int64),
    }


@functools.lru_cache(maxsize=64)
def _places(layouts: tuple[Any, ...], lead: tuple[int, ...]) -> Array:
    """(B, arrays): where each head begins, from the lengths of the leading axes of each array and the steps along
    them."""
    at = np.zeros((*lead, len(layouts)), np.int64)
    for i, (lengths, steps) in enumerate(layouts):
        for axis, (n, step) in enumerate(zip(lengths, steps), -len(lengths)):
            at[..., i] += (np.arange(n) * step).reshape(n, *(1,) * (-axis - 1))
    return at.reshape(-1, len(layouts))


def _steps(a: Array) -> tuple[int, ...]:
    """How far apart neighbours along each axis are, in numbers."""
    return tuple(s // a.itemsize for s in a.strides)


def _with_whole_rows(a: Array) -> Array:
    """The array itself, if each row (the last axis) is in one piece, and nothing runs backwards."""
    in_place = a.strides[-1] == a.itemsize and all(s >= 0 and s % a.itemsize == 0 for s in a.strides)
    return a if in_place else np.ascontiguousarray(a)


def _numbers(a: Array) -> Array:
    """(n,): all numbers from the first to the last element, and what lies between, without a copy."""
    if a.flags.c_contiguous:
        return a.reshape(-1)
    n = 1 + sum((length - 1) * step for length, step in zip(a.shape, _steps(a)))
    return np.lib.stride_tricks.as_strided(a, (n,), (a.itemsize,))


def _like(x: Array, shape: tuple[int, ...]) -> Array:
    """An empty array of that shape, whose axes are in the order of x in memory: so if the heads of x lie side by side
    in a token, no copy brings those of the result there."""
    a = np.empty_like(x, shape=shape)
    return a if a.strides[-1] == a.itemsize else np.empty(shape, x.dtype)  # an axis that was broadcast comes last


def _mask_of_scores(mask: Any, q: Array, k: Array) -> Any:
    """The mask (.., L or 1, S) in C order, of bool or of the dtype of q; or None."""
    if mask is None:
        return None
    mask = np.atleast_2d(mask)
    mask = np.broadcast_to(mask, (*mask.shape[:-1], k.shape[-2]))
    return np.ascontiguousarray(mask, None if mask.dtype.kind == "b" else q.dtype)
