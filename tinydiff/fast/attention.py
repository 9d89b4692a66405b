"""Attention by matrix products, which keeps its weights for the rule: for the GPU, and for a CPU without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from .taken import is_real


def by_products(
    matmul: Callable[..., Array], weights: Callable[..., Array], weights_vjp: Callable[..., Array]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and rule in place of the page's, from a backend's functions:

    weights(s, scale, mask) -> softmax(scale s + mask)                        may overwrite s
    weights_vjp(g, p, scale) -> the adjoint of s from that of p, g            may overwrite g
    """

    def forward(q: Array, k: Array, v: Array, *, mask: Any, scale: float) -> Any:
        if not is_real(q, k, v) or not min(q.size, k.size, v.size):
            return NotImplemented
        p = weights(matmul(q, k.swapaxes(-1, -2)), scale, mask)  # (.., L, D) x (.., D, S) -> (.., L, S)
        return matmul(p, v), (p,)

    def rule(g: Array, _y: Any, q: Array, k: Array, v: Array, *, mask: Any, scale: float, residuals: Any) -> Any:
        (p,) = residuals
        s = weights_vjp(matmul(g, v.swapaxes(-1, -2)), p, scale)
        return (
            lambda: matmul(s, k),
            lambda: matmul(s.swapaxes(-1, -2), q),
            lambda: matmul(p.swapaxes(-1, -2), g),
        )

    return forward, rule
