"""Attention that keeps its weights for the rule: the part that the CPU and the GPU share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..ops.attention import scaled_dot_product_attention
from .taken import is_real


def register(
    name: str, matmul: Callable[..., Array], weights: Callable[..., Array], weights_vjp: Callable[..., Array]
) -> None:
    """Register a backend's functions in place of the page:

    weights(s, scale, mask) -> softmax(scale s + mask)                        may overwrite s
    weights_vjp(g, p, scale) -> the adjoint of s from that of p, g            may overwrite g
    """

    @scaled_dot_product_attention.fast(name)
    def attention_fast(q: Array, k: Array, v: Array, *, mask: Any, scale: float) -> Any:
        if not is_real(q, k, v) or not min(q.size, k.size, v.size):
            return NotImplemented
        p = weights(matmul(q, k.swapaxes(-1, -2)), scale, mask)  # (.., L, D) x (.., D, S) -> (.., L, S)
        return matmul(p, v), (p,)

    @scaled_dot_product_attention.fast_vjp(name)
    def attention_vjp_fast(
        g: Array, _y: Any, q: Array, k: Array, v: Array, *, mask: Any, scale: float, residuals: Any
    ) -> Any:
        (p,) = residuals
        s = weights_vjp(matmul(g, v.swapaxes(-1, -2)), p, scale)
        return (
            lambda: matmul(s, k),
            lambda: matmul(s.swapaxes(-1, -2), q),
            lambda: matmul(p.swapaxes(-1, -2), g),
        )
