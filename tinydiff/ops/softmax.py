"""softmax and its logarithm, along one axis, safe for any size of input."""

from __future__ import annotations

from typing import Any

from ..backend import xp
from ..engine import op
from .elementwise import exp, floating
from .reduce import logsumexp, sum
from .shape import axis_of


@op
def softmax(x: Any, *, axis: int = -1) -> Any:
    """z = e^x / sum e^x along the axis

    log z = x - log sum e^x, so

    dz / z = dx - sum(z dx)          x̄ = z (z̄ - sum(z z̄))

    The largest x of each row is subtracted first, so a row never overflows, and never underflows as a whole.
    """
    axis = axis_of(axis, x.ndim, "softmax")
    x = floating(x)
    if x.size == 0:
        return x
    e = xp.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


@softmax.vjp
def softmax_vjp(g: Any, z: Any, _x: Any, *, axis: int) -> Any:
    return z * (g - sum(g * z, axis=axis, keepdims=True))


@op
def log_softmax(x: Any, *, axis: int = -1) -> Any:
    """z = x - log sum e^x along the axis

    dz = dx - sum(softmax(x) dx)          x̄ = z̄ - e^z sum z̄

    The largest x of each row is subtracted first, because log sum e^x would lose its last digits beside a large x.
    """
    axis = axis_of(axis, x.ndim, "log_softmax")
    x = floating(x)
    if x.size == 0:
        return x
    x = x - x.max(axis=axis, keepdims=True)
    return x - logsumexp(x, axis=axis, keepdims=True)


@log_softmax.vjp
def log_softmax_vjp(g: Any, z: Any, _x: Any, *, axis: int) -> Any:
    return g - exp(z) * sum(g, axis=axis, keepdims=True)
