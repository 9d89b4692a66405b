"""Attention by matrix products: for the GPU, and for a CPU without a compiler.

Up to MOST weights it keeps them for the rule. Beyond that it goes through the queries in parts of at most PART weights,
one after the other, and the rule computes the weights of a part again: the memory then grows with the length, and not
with its square, for a third more products. (A row of weights is whole, so no running softmax is needed.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from ..backend import Array, xp
from ..ops.attention import scaled_dot_product_attention
from .taken import is_real

MOST, PART = 2**25, 2**22


def is_taken(q: Array, k: Array, v: Array, mask: Any) -> bool:
    """Not arrays without elements, nor complex ones, of which a mask may be one, too; nor shapes that do not fit."""
    if not is_real(q, k, v) or min(q.size, k.size, v.size) == 0 or min(q.ndim, k.ndim, v.ndim) < 2:
        return False
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return False
    if mask is None:
        return True
    scores = (k.shape[-2], q.shape[-2])  # the last axis first
    return mask.dtype.kind in "bf" and all(n in (1, m) for n, m in zip(mask.shape[:-3:-1], scores))


def by_products(
    matmul: Callable[..., Array], weights: Callable[..., Array], weights_vjp: Callable[..., Array]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and rule in place of the page's, from a backend's functions:

    weights(s, scale, mask) -> softmax(scale s + mask)                        may overwrite s
    weights_vjp(g, p, scale) -> the adjoint of s from that of p, g            may overwrite g
    """

    def weights_of(q: Array, k: Array, mask: Any, scale: float) -> Array:
        return weights(matmul(q, k.swapaxes(-1, -2)), scale, mask)  # (.., L, D) x (.., D, S) -> (.., L, S)

    def forward(q: Array, k: Array, v: Array, mask: Any, *, scale: float) -> Any:
        if not is_taken(q, k, v, mask):
            return NotImplemented
        if _number_of_weights(q, k, mask) > MOST:
            parts = [matmul(weights_of(q_part, k, m, scale), v) for _, q_part, m in _parts(q, k, mask)]
            return xp.concatenate(parts, axis=-2), (None,)  # .. x (.., part, E) -> (.., L, E)
        p = weights_of(q, k, mask, scale)
        return matmul(p, v), (p,)

    def rule(g: Array, y: Any, q: Array, k: Array, v: Array, mask: Any, *, scale: float, residuals: Any) -> Any:
        (p,) = residuals
        if p is None:
            return in_parts(g, q, k, v, mask, scale)
        s = weights_vjp(matmul(g, v.swapaxes(-1, -2)), p, scale)
        return (
            lambda: matmul(s, k),
            lambda: matmul(s.swapaxes(-1, -2), q),
            lambda: matmul(p.swapaxes(-1, -2), g),
            lambda: weights_vjp(matmul(g, v.swapaxes(-1, -2)), p, 1.0),
        )

    def in_parts(g: Array, q: Array, k: Array, v: Array, mask: Any, scale: float) -> Any:
        """dq, dk and dv together, because all of them need the weights of every part."""
        dq: list[Array] = []
        dk: Array = 0
        dv: Array = 0
        for rows, q_part, m in _parts(q, k, mask):
            g_part = g[..., rows, :]
            p = weights_of(q_part, k, m, scale)
            s = weights_vjp(matmul(g_part, v.swapaxes(-1, -2)), p, scale)
            dq.append(matmul(s, k))
            dk = dk + matmul(s.swapaxes(-1, -2), q_part)
            dv = dv + matmul(p.swapaxes(-1, -2), g_part)
        return xp.concatenate(dq, axis=-2), dk, dv, lambda: mask_adjoint(g, q, k, v, mask, scale=scale)

    return forward, rule


def mask_adjoint(g: Array, q: Array, k: Array, v: Array, mask: Any, *, scale: float) -> Array:
    """The page's: the adjoint of a mask that is added has as many numbers as there are weights."""
    assert scaled_dot_product_attention.rule is not None
    mask = mask.astype(q.dtype, copy=False)
    return scaled_dot_product_attention.rule(g, None, q, k, v, mask, scale=scale)[3]


def _number_of_weights(q: Array, k: Array, mask: Any) -> int:
    shapes = [a.shape[:-2] for a in (q, k)] + ([] if mask is None else [mask.shape[:-2]])
    return math.prod(numpy.broadcast_shapes(*shapes)) * q.shape[-2] * k.shape[-2]


def _parts(q: Array, k: Array, mask: Any) -> Iterator[tuple[slice, Array, Any]]:
    """(rows, these queries, their mask) for one part after the other."""
    length = q.shape[-2]
    size = max(1, PART * length // _number_of_weights(q, k, mask))
    for start in range(0, length, size):
        rows = slice(start, start + size)
        each = mask is not None and mask.ndim > 1 and mask.shape[-2] != 1  # a row of the mask for each query
        yield rows, q[..., rows, :], mask[..., rows, :] if each else mask
