"""Sums and their relatives over axes. `axis` is None (all), an int or a tuple, negative from the end, as in NumPy."""

from __future__ import annotations

import math
from typing import Any

from ..backend import xp
from ..engine import composite, op
from .elementwise import exp, floating, square, where
from .shape import axes_of, broadcast_to, concatenate, flip, reshape, transpose

Axis = Any  # None | int | tuple[int, ...]


def _kept(x: Any, axis: Axis) -> tuple[int, ...]:
    """The shape that keepdims=True gives."""
    axes = axes_of(axis, x.ndim, "reduce")
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape))


def _spread(y: Any, like: Any, axis: Axis) -> Any:
    """A reduced array, repeated along the axes over which it was reduced, in the shape of `like`."""
    return broadcast_to(reshape(y, shape=_kept(like, axis)), shape=like.shape)


@op
def sum(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = sum of x over the axes

    dz = sum dx          x̄ = z̄,   spread over the axes
    """
    return x.sum(axis=axes_of(axis, x.ndim, "sum"), keepdims=keepdims)


@sum.vjp
def sum_vjp(g: Any, _z: Any, _x: Any, *, axis: Axis, keepdims: bool) -> Any:
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


@op
def max(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = the largest of x over the axes

    dz = dx at the largest          x̄ = z̄ where x = z, else 0

    At ties: those that are largest share equally.
    """
    return x.max(axis=axes_of(axis, x.ndim, "max"), keepdims=keepdims)


@op
def min(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = the smallest of x over the axes

    dz = dx at the smallest          x̄ = z̄ where x = z, else 0

    At ties: those that are smallest share equally.
    """
    return x.min(axis=axes_of(axis, x.ndim, "min"), keepdims=keepdims)


@max.vjp
@min.vjp
def extremum_vjp(g: Any, z: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    chosen = (x == _spread(z, x, axis)).astype(x.dtype)
    ties = sum(chosen, axis=axis, keepdims=keepdims)
    return chosen * _spread(g / ties, x, axis)


@composite
def prod(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = product of x over the axes, in pairs, and pairs of pairs, and so on

    It needs no rule of its own, because `multiply` has one. Nothing is divided by x, so derivatives of any order are
    right also where x has zeros.
    """
    axes = axes_of(axis, x.ndim, "prod")
    rest = [a for a in range(x.ndim) if a not in axes]
    shape = tuple(x.shape[a] for a in rest)
    z = reshape(transpose(x, axes=(*rest, *axes)), shape=(*shape, math.prod(x.shape[a] for a in axes)))  # (rest, M)
    while z.shape[-1] > 1:
        half = z.shape[-1] // 2
        left = z[..., 2 * half :]  # the last one, if their number is odd
        z = z[..., :half] * z[..., half : 2 * half]  # (rest, half)
        z = concatenate([z, left], axis=-1) if left.shape[-1] else z
    z = sum(z, axis=-1) if z.shape[-1] else sum(z, axis=-1) + 1.0  # the product of no factors is 1
    return reshape(z, shape=_kept(x, axis)) if keepdims else z


@op
def cumsum(x: Any, *, axis: int | None = None) -> Any:
    """z_i = x_0 + ... + x_i along the axis (None: of the flattened array)

    dz_i = sum of dx_j for j <= i          x̄_j = sum of z̄_i for i >= j: the sum from the other end
    """
    return xp.cumsum(x, axis=axis)


@cumsum.vjp
def cumsum_vjp(g: Any, _z: Any, _x: Any, *, axis: int | None) -> Any:
    a = 0 if axis is None else axis
    return reshape(flip(cumsum(flip(g, axis=a), axis=a), axis=a), shape=_x.shape)


@op
def logsumexp(x: Any, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """z = log sum e^x = m + log sum e^(x - m),   m the largest x along the axes, so that nothing overflows

    dz = sum(softmax(x) dx)          x̄ = z̄ e^(x - z)

    Where every x is -inf, z is -inf and x̄ is 0.
    """
    axes = axes_of(axis, x.ndim, "logsumexp")
    x = floating(x)
    if x.size == 0:  # then there is no largest x; the sum is 0
        z = xp.full(_kept(x, axis), -math.inf, x.dtype)
        return z if keepdims else z.squeeze(axes)
    m = x.max(axis=axes, keepdims=True)
    m = xp.where(xp.isfinite(m), m, 0)
    total = xp.exp(x - m).sum(axis=axes, keepdims=True)
    z = xp.where(total == 0, -math.inf, xp.log(xp.where(total == 0, 1, total)) + m)
    return z if keepdims else z.squeeze(axes)


@logsumexp.vjp
def logsumexp_vjp(g: Any, z: Any, x: Any, *, axis: Axis, keepdims: bool) -> Any:
    z = where(z == -math.inf, 0.0, z)
    return exp(x - _spread(z, x, axis)) * _spread(g, x, axis)
