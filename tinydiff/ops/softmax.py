"""softmax and its logarithm, along one axis, safe for any size of input."""

from __future__ import annotations

from typing import Any

from .. import kernels
from ..tape import primitive
from .elementwise import exp
from .reduce import logsumexp, sum
from .shape import axis_of


@primitive
def softmax(x: Any, *, axis: int = -1) -> Any:
    """z = e^x / sum e^x along the axis

    dz = z (dx - sum(z dx))          x' = z (z' - sum(z z'))

    The largest x of each row is subtracted first, so a row never overflows, and never underflows as a whole.
    """
    axis = axis_of(axis, x.ndim, "softmax")
    return kernels.softmax(x if x.dtype.kind in "fc" else x.astype("float64"), axis)


@softmax.reference
def _(x: Any, *, axis: int) -> Any:
    return exp(x - logsumexp(x, axis=axis, keepdims=True))


@softmax.vjp
def _(g: Any, z: Any, _x: Any, *, axis: int) -> Any:
    return z * (g - sum(g * z, axis=axis, keepdims=True))


@primitive
def log_softmax(x: Any, *, axis: int = -1) -> Any:
    """z = x - log sum e^x along the axis

    dz = dx - sum(softmax(x) dx)          x' = z' - e^z sum z'

    The largest x of each row is subtracted first: beside a large x, log sum e^x would lose its last digits.
    """
    x = x - x.max(axis=axis_of(axis, x.ndim, "log_softmax"), keepdims=True)
    return x - logsumexp(x, axis=axis, keepdims=True)


@log_softmax.vjp
def _(g: Any, z: Any, _x: Any, *, axis: int) -> Any:
    return g - exp(z) * sum(g, axis=axis, keepdims=True)
