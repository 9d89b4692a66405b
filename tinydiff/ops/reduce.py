"""Sums and their relatives over axes. `axis` is None (all), an int or a tuple, negative from the end, as in NumPy."""

from __future__ import annotations

import math
from typing import Any

from .. import kernels
from ..backend import xp
from ..tape import composite, primitive
from .elementwise import exp, square, where
from .shape import axes_of, broadcast_to, flip, reshape, transpose

Axis = Any  # None | int | tuple[int, ...]


def _spread(y: Any, like: Any, axis: Axis) -> Any:
    """A reduced array, put back over the axes it was reduced over."""
    axes = axes_of(axis, like.ndim, "reduce")
    kept = tuple(1 if a in axes else n for a, n in enumerate(like.shape))
    return broadcast_to(reshape(y, shape=kept), shape=like.shape)


@primitive
def sum(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = sum of x over the axes

    dz = sum of dx          x' = z', spread over the axes
    """
    return kernels.sum(x, axes_of(axis, x.ndim, "sum"), keepdims)


@sum.vjp
def _(g: Any, _z: Any, _x: Any, *, axis: Axis, keepdims: bool) -> Any:
    return _spread(g, _x, axis)


@composite
def mean(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """The sum over the axes divided by their length. Errors: ValueError if there is nothing to average."""
    count = _count(x, axis, "mean", 0)
    return sum(x, axis=axis, keepdims=keepdims) / count


@composite
def var(x: Any, *, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """sum((x - mean)^2) / (n - ddof) over the axes. Errors: ValueError if n <= ddof."""
    freedom = _count(x, axis, "var", ddof) - ddof
    centred = x - mean(x, axis=axis, keepdims=True)
    return sum(square(centred), axis=axis, keepdims=keepdims) / freedom


def _count(x: Any, axis: Axis, what: str, ddof: int) -> int:
    count = math.prod(x.shape[a] for a in axes_of(axis, x.ndim, what))
    if count <= ddof:
        raise ValueError(
            f"{what} over axis {axis} of an array of shape {x.shape}: {count} values are too few (ddof {ddof})"
        )
    return count


@primitive
def max(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = the largest of x over the axes

    x' = z' where x = z

    At ties: those that are largest share equally.
    """
    return x.max(axis=axes_of(axis, x.ndim, "max"), keepdims=keepdims)


@primitive
def min(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = the smallest of x over the axes

    x' = z' where x = z

    At ties: those that are smallest share equally.
    """
    return x.min(axis=axes_of(axis, x.ndim, "min"), keepdims=keepdims)


@max.vjp
@min.vjp
def _(g: Any, z: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    chosen = (x == _spread(z, x, axis)).astype(x.dtype)
    ties = sum(chosen, axis=axis, keepdims=keepdims)
    return chosen * _spread(g / ties, x, axis)


@primitive
def prod(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = product of x over the axes

    dz = sum over i of (product of the others) dx_i          x_i' = z' times the product of the others

    The product of the others is z / x_i, unless there are zeros: with one zero it is 0 everywhere but at the zero,
    with more it is 0 everywhere.
    """
    return x.prod(axis=axes_of(axis, x.ndim, "prod"), keepdims=keepdims)


@prod.vjp
def _(g: Any, _z: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    zero = x == 0
    filled = where(zero, 1.0, x)
    zeros = _spread(zero.sum(axis=axes_of(axis, x.ndim, "prod")), x, axis)
    others = where(zeros == zero, _spread(prod(filled, axis=axis), x, axis) / filled, 0.0)
    return others * _spread(g, x, axis)


@prod.reference
def _(x: Any, *, axis: Axis, keepdims: bool) -> Any:
    """One factor after the other: every derivative of it is right at zeros too."""
    axes = axes_of(axis, x.ndim, "prod")
    rest = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in rest)
    factors = reshape(transpose(x, axes=(*rest, *axes)), shape=(*shape, math.prod(x.shape[a] for a in axes)))
    z = sum(factors[..., :0], axis=-1) + 1.0  # ones, which depend on x even if there are no factors
    for i in range(factors.shape[-1]):
        z = z * factors[..., i]
    return reshape(z, shape=tuple(1 if a in axes else n for a, n in enumerate(x.shape))) if keepdims else z


@primitive
def cumsum(x: Any, *, axis: int | None = None) -> Any:
    """z_i = x_0 + ... + x_i along the axis (None: of the flattened array)

    dz_i = sum of dx_j for j <= i          x_j' = sum of z_i' for i >= j: the sum from the other end
    """
    return xp.cumsum(x, axis=axis)


@cumsum.vjp
def _(g: Any, _z: Any, _x: Any, *, axis: int | None) -> Any:
    a = 0 if axis is None else axis
    return reshape(flip(cumsum(flip(g, axis=a), axis=a), axis=a), shape=_x.shape)


@primitive
def logsumexp(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = log sum e^x = m + log sum e^(x - m),   m the largest x along the axes, so that nothing overflows

    dz = sum of softmax(x) dx          x' = z' e^(x - z)

    Where every x is -inf, z is -inf and x' is 0.
    """
    axes = axes_of(axis, x.ndim, "logsumexp")
    m = x.max(axis=axes, keepdims=True)
    m = xp.where(xp.isfinite(m), m, 0)
    total = xp.exp(x - m).sum(axis=axes, keepdims=True)
    z = xp.where(total == 0, -math.inf, xp.log(xp.where(total == 0, 1, total)) + m)
    return z if keepdims else z.reshape(tuple(n for a, n in enumerate(x.shape) if a not in axes))


@logsumexp.vjp
def _(g: Any, z: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    z = where(z == -math.inf, 0.0, z)
    return exp(x - _spread(z, x, axis)) * _spread(g, x, axis)
