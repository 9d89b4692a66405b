"""Scaled dot-product attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

from ..backend import operand
from ..engine import Tensor, composite, op
from .elementwise import astype, floating, where
from .linalg import matmul, transposed
from .reduce import sum
from .softmax import softmax


@op
def scaled_dot_product_attention(q: Any, k: Any, v: Any, mask: Any, *, scale: float) -> Any:
    """y = p @ v,   p = softmax(s),   s = scale q @ k^T + mask: each query gets a mean of the values, weighted by how
    well their keys agree with it

    dy = dp @ v + p @ dv                        p̄ = ȳ @ v^T,   v̄ = p^T @ ȳ
    dp / p = ds - sum(p ds)                     s̄ = p (p̄ - sum(p p̄)),   the sums along the row, as in softmax
    ds = scale (dq @ k^T + q @ dk^T) + dmask    q̄ = scale s̄ @ k,   k̄ = scale s̄^T @ q,   mask̄ = s̄

    A mask of bool has no gradient; where it forbids a key, s = -inf does not depend on q and k, and p = 0 makes s̄ = 0.
    """
    return matmul(attention_weights(q, k, mask, scale), v)  # (.., L, S) x (.., S, E) -> (.., L, E)


@scaled_dot_product_attention.vjp
def scaled_dot_product_attention_vjp(g: Any, _y: Any, q: Any, k: Any, v: Any, mask: Any, *, scale: float) -> Any:
    p = attention_weights(q, k, mask, scale)  # (.., L, S)
    p_adjoint = matmul(g, transposed(v))  # (.., L, E) x (.., E, S) -> (.., L, S)
    s_adjoint = p * (p_adjoint - sum(p * p_adjoint, axis=-1, keepdims=True))
    return (
        lambda: scale * matmul(s_adjoint, k),
        lambda: scale * matmul(transposed(s_adjoint), q),
        lambda: matmul(transposed(p), g),
        s_adjoint,
    )


def attention_weights(q: Any, k: Any, mask: Any, scale: float) -> Any:
    """p = softmax(scale q k^T + mask) along the keys; a mask of bool says which may be attended to."""
    s = scale * matmul(q, transposed(k))  # (.., L, D) x (.., D, S) -> (.., L, S)
    if mask is not None:
        s = where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask
    return softmax(s, axis=-1)


@composite
def attention(q: Any, k: Any, v: Any, *, mask: Any = None, scale: float | None = None) -> Any:
    """softmax(scale q k^T + mask) v over the last two axes: q (N, heads, L, D), k (N, heads, S, D), v (N, heads, S, E)
    -> (N, heads, L, E).

    mask: broadcastable to (N, heads, L, S); bool (True where a key may be attended to), or numbers that are added to
    scale q k^T, which may be learned: a bias for each distance between query and key, say (Shaw et al. 2018). Both at
    once are where(allowed, bias, -inf). A row in which no key may be attended to is NaN. scale: 1 / sqrt(D) unless
    given.
    Source: Vaswani et al. 2017, equation 1. Errors: ValueError for shapes that do not fit, TypeError for a mask of
    another kind.
    """
    if min(q.ndim, k.ndim, v.ndim) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit: q and k share D, "
            "k and v share their length"
        )
    for lengths in itertools.zip_longest(*(a.shape[-3::-1] for a in (q, k, v)), fillvalue=1):
        if len({n for n in lengths if n != 1}) > 1:
            raise ValueError(f"attention: the leading axes of q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    q, k, v = floating(q), floating(k), floating(v)
    mask = checked_mask(mask, q.shape[-2], k.shape[-2])
    if mask is not None and mask.dtype.kind == q.dtype.kind == "f" and mask.dtype != q.dtype:
        mask = astype(mask, dtype=q.dtype)  # it would widen the scores
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)


def checked_mask(mask: Any, length: int, keys: int) -> Any:
    """The mask as an array or a Tensor, or None. Errors: as `attention`."""
    if mask is None:
        return None
    mask = mask if isinstance(mask, Tensor) else operand(mask)
    if getattr(mask, "dtype", None) is None or mask.dtype.kind not in "bfc":  # complex: the step of a gradient check
        what = f"{mask.dtype} of shape {mask.shape}" if hasattr(mask, "dtype") else repr(mask)
        raise TypeError(
            "attention: the mask must be of bool (what may be attended to) "
            f"or floating (added to the scores), not {what}"
        )
    if any(n not in (1, m) for n, m in zip(mask.shape[-2:][::-1], (keys, length))):
        raise ValueError(
            f"attention: a mask of shape {mask.shape} does not fit the scores, whose last axes are {(length, keys)}"
        )
    return mask
