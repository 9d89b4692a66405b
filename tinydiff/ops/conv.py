"""Convolution, channels last: images (N, H, W, C), weights (kh, kw, C / groups, O).

Everything here is one trilinear form in an image x, a weight w and an image y,

    F(x, w, y) = sum over n, i, j, u, v, c, o of   x[n, s i + d u - p, s j + d v - p, c] w[u, v, c, o] y[n, i, j, o]

with stride s, dilation d, and padding p at the top and on the left (x is 0 in the padding). The convolution y(x, w) is
the derivative of F by its last argument: F(x, w, ȳ) = sum(ȳ y(x, w)). With ȳ fixed, F is linear in x and in w, so

    dL = sum(ȳ dy) = F(dx, w, ȳ) + F(x, dw, ȳ)

and the adjoints, what dx and dw are multiplied with, are the other two derivatives of F:

    x̄ = dF/dx (w, ȳ) = conv2d_input_grad(ȳ, w)          also the transposed convolution
    w̄ = dF/dw (x, ȳ) = conv2d_weight_grad(x, ȳ)

The rule of each of the three consists of the other two. So all derivatives, of any order, are these three functions.
For one tap (u, v) of the kernel, each is a product of matrices: rows of pixels times w[u, v], (C, O).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..backend import xp
from ..engine import composite, op
from .reduce import sum as sum_of
from .shape import expand_dims, pad, squeeze

Pair = int | tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Where the taps of a convolution lie."""

    size: tuple[int, int]  # of x: H, W
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    @functools.lru_cache(256, typed=True)
    def of(*fields: Any) -> Geometry:
        """The Geometry with these fields: one object for equal calls, so that `out` is computed once for a layer."""
        return Geometry(*fields)

    @functools.cached_property
    def out(self) -> tuple[int, int]:
        """Of y: OH, OW; floor((H + padding - dilation (k - 1) - 1) / stride) + 1."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        oh, ow = ((n + sum(p) - r) // s + 1 for n, p, r, s in zip(self.size, self.padding, reach, self.stride))
        return oh, ow

    def taps(self) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """(u, v, where x is under that tap of all output pixels), of x with its padding."""
        for u, v in itertools.product(*map(range, self.kernel)):
            starts = u * self.dilation[0], v * self.dilation[1]
            rows, columns = (slice(i, i + s * (n - 1) + 1, s) for i, s, n in zip(starts, self.stride, self.out))
            yield u, v, (slice(None), rows, columns)


# ---------------------------------------------------------------- the three derivatives of F


@op
def conv2d_p(x: Any, w: Any, b: Any, *, geometry: Geometry) -> Any:
    """y[n, i, j, o] = sum over u, v, c of x[n, s i + d u - p, s j + d v - p, c] w[u, v, c, o] + b[o]

    x̄ = conv2d_input_grad(ȳ, w),   w̄ = conv2d_weight_grad(x, ȳ),   b̄ = sum ȳ
    """
    padded, groups = pad(x, pad_width=((0, 0), *geometry.padding, (0, 0))), geometry.groups
    y = sum(by_group(padded[at], groups) @ by_group(w[u, v], groups) for u, v, at in geometry.taps())  # (G, M, O/G)
    y = y.transpose(1, 0, 2).reshape(len(x), *geometry.out, w.shape[-1])  # (G, M, O/G) -> (N, OH, OW, O)
    return y if b is None else y + b


@conv2d_p.vjp
def conv2d_p_vjp(g: Any, _y: Any, x: Any, w: Any, _b: Any, *, geometry: Geometry) -> Any:
    return (
        lambda: conv2d_input_grad(g, w, None, geometry=geometry),
        lambda: conv2d_weight_grad(x, g, geometry=geometry),
        lambda: sum_of(g, axis=(0, 1, 2)),
    )


@op
def conv2d_input_grad(y: Any, w: Any, b: Any, *, geometry: Geometry) -> Any:
    """x[n, s i + d u - p, s j + d v - p, c] = sum over i, j, u, v, o that meet there of y[n, i, j, o] w[u, v, c, o]
    + b[c]

    ȳ = conv2d(x̄, w),   w̄ = conv2d_weight_grad(x̄, y),   b̄ = sum x̄
    """
    groups, (height, width) = geometry.groups, geometry.size
    (top, bottom), (left, right) = geometry.padding
    channels = w.shape[2] * groups
    padded = xp.zeros((len(y), top + height + bottom, left + width + right, channels), xp.result_type(y, w))
    rows = by_group(y, groups)  # (G, M, O/G)
    for u, v, at in geometry.taps():
        products = rows @ by_group(w[u, v], groups).swapaxes(1, 2)  # (G, M, O/G) x (G, O/G, C/G) -> (G, M, C/G)
        padded[at] += products.transpose(1, 0, 2).reshape(*y.shape[:3], channels)  # -> (N, OH, OW, C)
    x = padded[:, top : top + height, left : left + width]  # (N, H, W, C)
    return x if b is None else x + b


@conv2d_input_grad.vjp
def conv2d_input_grad_vjp(g: Any, _x: Any, y: Any, w: Any, _b: Any, *, geometry: Geometry) -> Any:
    return (
        lambda: conv2d_p(g, w, None, geometry=geometry),
        lambda: conv2d_weight_grad(g, y, geometry=geometry),
        lambda: sum_of(g, axis=(0, 1, 2)),
    )


@op
def conv2d_weight_grad(x: Any, y: Any, *, geometry: Geometry) -> Any:
    """w[u, v, c, o] = sum over n, i, j of x[n, s i + d u - p, s j + d v - p, c] y[n, i, j, o]

    x̄ = conv2d_input_grad(y, w̄),   ȳ = conv2d(x, w̄)
    """
    groups = geometry.groups
    c, o = x.shape[3] // groups, y.shape[3]
    padded = pad(x, pad_width=((0, 0), *geometry.padding, (0, 0)))
    rows = by_group(y, groups)  # (G, M, O/G)
    w = xp.empty((*geometry.kernel, c, o), xp.result_type(x, y))
    for u, v, at in geometry.taps():
        product = by_group(padded[at], groups).swapaxes(1, 2) @ rows  # (G, C/G, M) x (G, M, O/G) -> (G, C/G, O/G)
        w[u, v] = product.transpose(1, 0, 2).reshape(c, o)  # (G, C/G, O/G) -> (C/G, O)
    return w


@conv2d_weight_grad.vjp
def conv2d_weight_grad_vjp(g: Any, _w: Any, x: Any, y: Any, *, geometry: Geometry) -> Any:
    return lambda: conv2d_input_grad(y, g, None, geometry=geometry), lambda: conv2d_p(x, g, None, geometry=geometry)


def by_group(a: Any, groups: int) -> Any:
    """(..., C) -> (G, M, C/G): rows of channels, a matrix for each group."""
    rows = a.reshape(math.prod(a.shape[:-1]), groups, a.shape[-1] // groups)  # (..., C) -> (M, G, C/G)
    return rows.transpose(1, 0, 2)  # (M, G, C/G) -> (G, M, C/G)


# ---------------------------------------------------------------- the functions of users and layers


@composite
def conv2d(
    x: Any, w: Any, b: Any = None, *, stride: Pair = 1, padding: Pair | str = 0, dilation: Pair = 1, groups: int = 1
) -> Any:
    """Convolution of (N, H, W, C) with (kh, kw, C / groups, O): (N, OH, OW, O), plus a bias (O,).

    y[n, i, j, o] = b[o] + sum over u, v, c of x[n, s i + d u - p, s j + d v - p, c] w[u, v, c, o]

    padding: zeros on each side, one number or (vertical, horizontal); "same" makes OH = ceil(H / stride), "valid" is 0.
    With groups, output channels o of group g see only the input channels of group g.
    Errors: ValueError for shapes that do not fit, or a kernel that is larger than the padded image.
    """
    _check("conv2d", 4, x, w, b, groups)
    geometry = _geometry("conv2d", x, w, x.shape[1:3], w.shape[:2], stride, padding, dilation, groups)
    return conv2d_p(x, w, b, geometry=geometry)


@composite
def conv_transpose2d(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Any:
    """The transpose of conv2d as a linear map: (N, H, W, C) with (kh, kw, O / groups, C) gives (N, OH, OW, O).

    w is the weight of the conv2d (O -> C) whose transpose this is.
    OH = (H - 1) stride - 2 padding + dilation (kh - 1) + 1 + output_padding. With a stride, that conv2d maps several
    sizes to H; output_padding chooses one of them.
    Errors: ValueError for shapes that do not fit, an output_padding that is not below stride or
    dilation, an empty output.
    """
    what = "conv_transpose2d"
    _check(what, 4, x, w, b, groups, transposed=True)
    s, d = _pair(stride, what, "stride", 1), _pair(dilation, what, "dilation", 1)
    p, extra = _pair(padding, what, "padding", 0), _pair(output_padding, what, "output_padding", 0)
    if any(e >= max(si, di) for e, si, di in zip(extra, s, d)):
        raise ValueError(f"{what}: {output_padding=} must be smaller than {stride=} or {dilation=}")
    terms = zip(x.shape[1:3], s, p, d, w.shape, extra)
    oh, ow = ((n - 1) * si - 2 * pi + di * (k - 1) + 1 + e for n, si, pi, di, k, e in terms)
    if min(oh, ow) < 1:
        given = f"x {x.shape} with w {w.shape}, {stride=}, {padding=}, {dilation=}, {output_padding=}"
        raise ValueError(f"{what}: the output of {given} would be empty: {(oh, ow)}")
    geometry = Geometry.of((oh, ow), w.shape[:2], s, ((p[0], p[0]), (p[1], p[1])), d, groups)
    # If output_padding is at least stride, the conv2d has more rows of output than x has; those are zero.
    if geometry.out != x.shape[1:3]:
        x = pad(x, pad_width=((0, 0), *((0, m - n) for n, m in zip(x.shape[1:3], geometry.out)), (0, 0)))
    return conv2d_input_grad(x, w, b, geometry=geometry)


@composite
def conv1d(
    x: Any, w: Any, b: Any = None, *, stride: int = 1, padding: int | str = 0, dilation: int = 1, groups: int = 1
) -> Any:
    """Convolution of sequences (N, L, C) with (k, C / groups, O): (N, OL, O). It is conv2d on an image of height 1."""
    _check("conv1d", 3, x, w, b, groups)
    sides = padding if isinstance(padding, str) else (0, padding)
    geometry = _geometry("conv1d", x, w, (1, x.shape[1]), (1, w.shape[0]), (1, stride), sides, (1, dilation), groups)
    return squeeze(conv2d_p(expand_dims(x, axis=1), expand_dims(w, axis=0), b, geometry=geometry), axis=1)


def _check(what: str, rank: int, x: Any, w: Any, b: Any, groups: int, transposed: bool = False) -> None:
    """Errors: ValueError unless x, w and the bias fit each other."""
    if x.ndim != rank or w.ndim != rank:
        takes = "x (N, L, C) and w (k, .., ..)" if rank == 3 else "x (N, H, W, C) and w (kh, kw, .., ..)"
        raise ValueError(f"{what} takes {takes}, not {x.shape} and {w.shape}")
    channels, last = x.shape[-1], w.shape[-1]
    try:
        operator.index(groups)
    except TypeError:
        raise ValueError(f"{what}: groups must be an int, not {groups!r}") from None
    if groups < 1 or channels % groups or last % groups:
        both = f"{channels} of x {x.shape} and {last} of w {w.shape}"
        raise ValueError(f"{what}: groups={groups} must divide the channels, {both}")
    taken, made = (last, w.shape[-2] * groups) if transposed else (w.shape[-2] * groups, last)
    if channels != taken:
        raise ValueError(f"{what}: x {x.shape} has {channels} channels, but w {w.shape} with {groups=} takes {taken}")
    if b is not None and b.shape != (made,):
        raise ValueError(f"{what}: the bias must have shape {(made,)}, not {b.shape}")


def _geometry(
    what: str, x: Any, w: Any, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry:
    """The Geometry of conv1d and conv2d. Errors: ValueError for arguments out of range, an empty output."""
    s, d = _pair(stride, what, "stride", 1), _pair(dilation, what, "dilation", 1)
    geometry = Geometry.of(size, kernel, s, _padding(padding, what, size, kernel, s, d), d, groups)
    if min(geometry.out) < 1:
        given = f"x {x.shape} with w {w.shape}, {stride=}, {padding=}, {dilation=}"
        raise ValueError(f"{what}: the output of {given} would be empty: {geometry.out}")
    return geometry


def _pair(value: Pair, what: str, name: str, least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    try:
        first, second = value if isinstance(value, (tuple, list)) else (value, value)
        pair = operator.index(first), operator.index(second)
    except (TypeError, ValueError):
        pair = (least - 1, least - 1)
    if min(pair) < least:
        raise ValueError(f"{what}: {name} must be an int of at least {least}, or two, not {value!r}")
    return pair


def _padding(padding: Pair | str, what: str, size: Any, kernel: Any, stride: Any, dilation: Any) -> Any:
    if padding == "same":
        sides = []
        for n, k, s, d in zip(size, kernel, stride, dilation):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            sides.append((total // 2, total - total // 2))
        return tuple(sides)
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise ValueError(f"{what}: padding must be an int, a pair, 'same' or 'valid', not {padding!r}")
    return tuple((p, p) for p in _pair(padding, what, "padding", 0))
