"""Other arrangements of the same elements. Each of these maps is linear, and its rule is the transposed map."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from ..backend import xp
from ..engine import composite, op
from .elementwise import where

Slices = tuple[slice, ...]


def axis_of(axis: int, ndim: int, what: str) -> int:
    """The axis as a number from 0. Errors: ValueError for an axis that is not there."""
    a = operator.index(axis)
    if not -ndim <= a < ndim:
        raise ValueError(f"{what}: axis {axis} does not fit an array of {ndim} dimensions")
    return a % ndim


def axes_of(axis: Any, ndim: int, what: str) -> tuple[int, ...]:
    """The axes (None: all; one, or a tuple) as sorted numbers from 0.
    Errors: ValueError for one that is not there, or there twice.
    """
    given = range(ndim) if axis is None else axis if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(sorted(axis_of(a, ndim, what) for a in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"{what}: axis {axis} names an axis twice")
    return axes


@op
def reshape(x: Any, *, shape: int | tuple[int, ...]) -> Any:
    """z = the elements of x, in order, in another shape; one length may be -1

    x̄ = z̄ in the shape of x
    """
    try:
        return x.reshape(shape)
    except ValueError:
        raise ValueError(
            f"reshape: the {x.size} elements of an array of shape {x.shape} do not fill the shape {shape}"
        ) from None


@reshape.vjp
def reshape_vjp(g: Any, _z: Any, _x: Any, *, shape: Any) -> Any:
    return g.reshape(_x.shape)


@op
def transpose(x: Any, *, axes: tuple[int, ...] | None = None) -> Any:
    """z = x with its axes in another order (None: reversed): z[i_a0, i_a1, ...] = x[i_0, i_1, ...]

    x̄ = z̄ with the inverse order
    """
    if axes is not None and len(axes_of(tuple(axes), x.ndim, "transpose")) != x.ndim:
        raise ValueError(f"transpose: axes {axes} must name every axis of an array of shape {x.shape} once")
    return x.transpose(axes)


@transpose.vjp
def transpose_vjp(g: Any, _z: Any, _x: Any, *, axes: tuple[int, ...] | None) -> Any:
    if axes is None:
        return transpose(g)
    order = [a % _x.ndim for a in axes]
    return transpose(g, axes=tuple(order.index(a) for a in range(_x.ndim)))


@composite
def swapaxes(x: Any, *, axis1: int, axis2: int) -> Any:
    """x with two axes exchanged."""
    axes = list(range(x.ndim))
    a, b = axis_of(axis1, x.ndim, "swapaxes"), axis_of(axis2, x.ndim, "swapaxes")
    axes[a], axes[b] = b, a
    return transpose(x, axes=tuple(axes))


@composite
def expand_dims(x: Any, *, axis: int) -> Any:
    """x with a new axis of length 1, at `axis` of the result."""
    if not -x.ndim - 1 <= axis <= x.ndim:
        raise ValueError(f"expand_dims: axis {axis} does not fit an array of shape {x.shape}")
    at = axis % (x.ndim + 1)
    return reshape(x, shape=(*x.shape[:at], 1, *x.shape[at:]))


@composite
def squeeze(x: Any, *, axis: int | tuple[int, ...] | None = None) -> Any:
    """x without its axes of length 1, or without those given. Errors: ValueError if a given axis is longer."""
    axes = [a for a, n in enumerate(x.shape) if n == 1] if axis is None else axes_of(axis, x.ndim, "squeeze")
    if any(x.shape[a] != 1 for a in axes):
        raise ValueError(f"squeeze: an axis of {axis} is longer than 1 in an array of shape {x.shape}")
    return reshape(x, shape=tuple(n for a, n in enumerate(x.shape) if a not in axes))


@op
def broadcast_to(x: Any, *, shape: tuple[int, ...]) -> Any:
    """z = x, repeated along new axes and axes of length 1

    x̄ = z̄,   summed over the repetitions (which the engine does for every op)
    """
    return xp.broadcast_to(x, shape)


@broadcast_to.vjp
def broadcast_to_vjp(g: Any, _z: Any, _x: Any, *, shape: Any) -> Any:
    return g


@op
def concatenate_p(*xs: Any, axis: int = 0) -> Any:
    """z = the arrays one after the other along the axis

    each x̄ = its part of z̄
    """
    return xp.concatenate(xs, axis=axis)


@concatenate_p.vjp
def concatenate_p_vjp(g: Any, _z: Any, *_xs: Any, axis: int) -> Any:
    parts, start = [], 0
    for x in _xs:
        parts.append(g[_along(axis % g.ndim, slice(start, start + x.shape[axis]))])
        start += x.shape[axis]
    return tuple(parts)


@composite
def concatenate(xs: Sequence[Any], *, axis: int = 0) -> Any:
    """The arrays one after the other along the axis. Errors: ValueError if their other axes differ."""
    xs = tuple(xs)
    if not xs:
        raise ValueError("concatenate: there are no arrays to concatenate")
    shapes = [x.shape for x in xs]
    rests = {(*s[: axis % len(s)], *s[axis % len(s) + 1 :]) if s else None for s in shapes}
    if len(rests) > 1 or None in rests or not -len(shapes[0]) <= axis < len(shapes[0]):
        raise ValueError(f"concatenate along axis {axis}: the shapes {', '.join(map(str, shapes))} do not fit together")
    return concatenate_p(*xs, axis=axis)


@composite
def stack(xs: Sequence[Any], *, axis: int = 0) -> Any:
    """Arrays of one shape along a new axis. Errors: ValueError if their shapes differ."""
    xs = tuple(xs)
    if len({x.shape for x in xs}) > 1:
        raise ValueError(f"stack: the shapes {', '.join(str(x.shape) for x in xs)} differ")
    return concatenate([expand_dims(x, axis=axis) for x in xs], axis=axis)


@composite
def split(x: Any, sections: int | Sequence[int], *, axis: int = 0) -> list[Any]:
    """x cut along the axis, into equal parts (an int) or before the given indices, as numpy.split.

    Errors: ValueError if an int does not divide the length.
    """
    axis = axis_of(axis, x.ndim, "split")
    n = x.shape[axis]
    if not isinstance(sections, Iterable):
        sections = operator.index(sections)
        if sections < 1 or n % sections:
            raise ValueError(
                f"split: {sections} equal parts of axis {axis} of an array of shape {x.shape}: {n} is not a multiple"
            )
        sections = range(n // sections, n, n // sections)
    bounds = [0, *sections, n]
    return [x[_along(axis, slice(a, b))] for a, b in zip(bounds, bounds[1:])]


@op
def pad(x: Any, *, pad_width: Sequence[tuple[int, int]], value: float = 0.0) -> Any:
    """z = x with (before, after) extra places along each axis, filled with a value

    x̄ = z̄ without the extra places
    """
    pairs = pad_width if isinstance(pad_width, (tuple, list)) else ()
    if len(pairs) != x.ndim or any(not isinstance(p, (tuple, list)) or len(p) != 2 or min(p) < 0 for p in pairs):
        raise ValueError(
            f"pad: an array of shape {x.shape} takes {x.ndim} pairs (before, after) of at least 0, not {pad_width!r}"
        )
    z = xp.full([n + before + after for n, (before, after) in zip(x.shape, pad_width)], value, x.dtype)
    z[_inner(pad_width, x.shape)] = x
    return z


@pad.vjp
def pad_vjp(g: Any, _z: Any, _x: Any, *, pad_width: Any, value: float) -> Any:
    return g[_inner(pad_width, _x.shape)]


def _inner(pad_width: Any, shape: tuple[int, ...]) -> Slices:
    return tuple(slice(before, before + n) for (before, _), n in zip(pad_width, shape))


def _along(axis: int, part: slice) -> Slices:
    return (slice(None),) * axis + (part,)


@composite
def flip(x: Any, *, axis: int | tuple[int, ...] | None = None) -> Any:
    """x in the opposite order along the axes (None: all)."""
    axes = axes_of(axis, x.ndim, "flip")
    return x[tuple(slice(None, None, -1 if a in axes else 1) for a in range(x.ndim))]


@composite
def roll(x: Any, *, shift: int | tuple[int, ...], axis: int | tuple[int, ...] | None = None) -> Any:
    """x moved by `shift` places along the axis, what leaves at one end entering at the other (None: flattened). Tuples,
    as in numpy.roll, move along several axes. Errors: ValueError for tuples of different lengths."""
    if axis is None:
        return reshape(roll(reshape(x, shape=-1), shift=shift, axis=0), shape=x.shape)
    if not (isinstance(shift, int) and isinstance(axis, int)):
        shifts, axes = (tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (shift, axis))
        if len(shifts) != len(axes) and 1 not in (len(shifts), len(axes)):
            raise ValueError(f"roll: the shifts {shift} and the axes {axis} differ in number")
        count = max(len(shifts), len(axes))
        for s, a in zip(shifts * (count // max(len(shifts), 1)), axes * (count // max(len(axes), 1))):
            x = roll(x, shift=s, axis=a)
        return x
    axis = axis_of(axis, x.ndim, "roll")
    n = x.shape[axis]
    if n == 0 or shift % n == 0:
        return x[...]
    head, tail = split(x, [n - shift % n], axis=axis)
    return concatenate([tail, head], axis=axis)


@composite
def tile(x: Any, *, reps: int | tuple[int, ...]) -> Any:
    """x repeated `reps` times along each axis, as numpy.tile."""
    given = (reps,) if isinstance(reps, int) else tuple(reps)
    ndim = max(x.ndim, len(given))
    times = (1,) * (ndim - len(given)) + given
    shape = (1,) * (ndim - x.ndim) + x.shape
    x = reshape(x, shape=tuple(m for n in shape for m in (1, n)))  # (1, n0, 1, n1, ...)
    x = broadcast_to(x, shape=tuple(m for r, n in zip(times, shape) for m in (r, n)))  # (r0, n0, r1, n1, ...)
    return reshape(x, shape=tuple(r * n for r, n in zip(times, shape)))


@composite
def tril(x: Any, *, k: int = 0) -> Any:
    """x with zeros above its k-th diagonal (last two axes)."""
    return where(_column_minus_row(x, "tril") <= k, x, 0)


@composite
def triu(x: Any, *, k: int = 0) -> Any:
    """x with zeros below its k-th diagonal (last two axes)."""
    return where(_column_minus_row(x, "triu") >= k, x, 0)


def _column_minus_row(x: Any, what: str) -> Any:
    if x.ndim < 2:
        raise ValueError(f"{what} is for matrices, not for an array of shape {x.shape}")
    return xp.arange(x.shape[-1]) - xp.arange(x.shape[-2])[:, None]
