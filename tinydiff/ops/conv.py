"""Convolution, channels last: images (N, H, W, C), weights (kh, kw, in / groups, out).

Everything here is one bilinear form in an image x, a weight w and an image y,

    F(x, w, y) = sum over n, i, j, a, b, c, o of   x[n, s i + d a - p, s j + d b - p, c] w[a, b, c, o] y[n, i, j, o]

with stride s, dilation d, padding p. It is linear in each of the three, so each is the cotangent of
a map of the two others:

    y' = correlate(x, w)             the convolution
    x' = correlate_input(y, w)       the transposed convolution
    w' = correlate_weight(x, y)

and the rule of each is made of the other two: all derivatives, of any order, are these three functions.

correlate gathers the patch under each output pixel into a row (im2col), (N OH OW, kh kw C), and multiplies once by the
weight, (kh kw C, O). The other two are the same product with its factors in other roles. They work on a few images at a
time, so that the patches stay in the cache.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .. import kernels
from ..backend import xp
from ..tape import composite, primitive
from .reduce import sum as sum_of
from .shape import expand_dims, pad, squeeze

Pair = int | tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Where the patches of a convolution lie."""

    size: tuple[int, int]  # of x: H, W
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]  # (top, bottom), (left, right)
    dilation: tuple[int, int]
    groups: int

    @functools.cached_property
    def out(self) -> tuple[int, int]:
        """Of y: OH, OW; floor((H + padding - dilation (k - 1) - 1) / stride) + 1."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        oh, ow = ((n + sum(p) - r) // s + 1 for n, p, r, s in zip(self.size, self.padding, reach, self.stride))
        return oh, ow

    @functools.cached_property
    def mirrored(self) -> Geometry | None:
        """The geometry by which the transpose is a correlation too, with the kernel turned round: there is one for
        stride 1, and padding that is not wider than the kernel reaches."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel)]
        padding: Any = tuple((r - p, r - q) for r, (p, q) in zip(reach, self.padding))
        if self.stride != (1, 1) or min(map(min, padding)) < 0:
            return None
        return replace(self, size=self.out, padding=padding)

    def patch_elements(self, channels: int) -> int:
        """Of the patches of one image."""
        return math.prod(self.out) * math.prod(self.kernel) * channels

    def chunks(self, n: int, channels: int, itemsize: int) -> Iterator[slice]:
        """The batch in parts whose patches fit in the cache."""
        step = max(1, kernels.PATCH_BYTES // max(self.patch_elements(channels) * itemsize, 1))
        return (slice(i, min(i + step, n)) for i in range(0, n, step))


# ---------------------------------------------------------------- the three maps


@primitive
def correlate(x: Any, w: Any, b: Any, *, geometry: Geometry) -> Any:
    """y[n, i, j, o] = sum over a, b, c of x[n, s i + d a - p, s j + d b - p, c] w[a, b, c, o] + bias[o]

    x' = correlate_input(y', w),   w' = correlate_weight(x, y'),   bias' = sum y'
    """
    y = xp.empty((len(x), *geometry.out, w.shape[-1]), _dtype(x, w, b))
    matrices = _matrices(w, geometry.groups)  # (G, kh kw C/G, O/G)
    for part in geometry.chunks(len(x), x.shape[-1], x.itemsize):
        patches = _grouped(kernels.im2col(x[part], geometry), geometry.groups)  # (G, n OH OW, kh kw C/G)
        _products(patches, matrices, _rows(y[part]))
        if b is not None:
            y[part] += b
    return y


@correlate.vjp
def _(g: Any, _y: Any, x: Any, w: Any, _b: Any, *, geometry: Geometry) -> Any:
    return (
        lambda: correlate_input(g, w, None, geometry=geometry),
        lambda: correlate_weight(x, g, geometry=geometry),
        lambda: sum_of(g, axis=(0, 1, 2)),
    )


@primitive
def correlate_input(y: Any, w: Any, b: Any, *, geometry: Geometry) -> Any:
    """x[n, s i + d a - p, s j + d b - p, c] = sum over i, j, a, b, o that meet there of y[n, i, j, o] w[a, b, c, o]
    + bias[c]

    y' = correlate(x', w),   w' = correlate_weight(x', y),   bias' = sum x'
    """
    (kh, kw), groups = geometry.kernel, geometry.groups
    channels = w.shape[2] * groups
    mirrored = geometry.mirrored
    # Gathering patches is quicker than adding them up, so it may be done with more of them.
    if mirrored and mirrored.patch_elements(y.shape[-1]) <= 2 * geometry.patch_elements(channels):
        return correlate.forward(y, _mirrored(w, groups), b, geometry=mirrored)
    x = xp.empty((len(y), *geometry.size, channels), _dtype(y, w, b))
    matrices = _matrices(w, groups).swapaxes(1, 2)  # (G, O/G, kh kw C/G)
    for part in geometry.chunks(len(y), channels, y.itemsize):
        rows = _rows(y[part])  # (n OH OW, O)
        patches = xp.empty((len(rows), kh * kw * channels), x.dtype)
        _products(_split_channels(rows, groups), matrices, patches)
        patches = patches.reshape(len(y[part]), *geometry.out, groups, kh, kw, channels // groups)
        patches = patches.transpose(0, 1, 2, 4, 5, 3, 6).reshape(len(y[part]), *geometry.out, kh, kw, channels)
        kernels.col2im(patches, x[part], geometry)
        if b is not None:
            x[part] += b
    return x


@correlate_input.vjp
def _(g: Any, _x: Any, y: Any, w: Any, _b: Any, *, geometry: Geometry) -> Any:
    return (
        lambda: correlate(g, w, None, geometry=geometry),
        lambda: correlate_weight(g, y, geometry=geometry),
        lambda: sum_of(g, axis=(0, 1, 2)),
    )


@primitive
def correlate_weight(x: Any, y: Any, *, geometry: Geometry) -> Any:
    """w[a, b, c, o] = sum over n, i, j of x[n, s i + d a - p, s j + d b - p, c] y[n, i, j, o]

    x' = correlate_input(y, w'),   y' = correlate(x, w')
    """
    (kh, kw), groups, n = geometry.kernel, geometry.groups, len(x)
    channels, out = x.shape[-1] // groups, y.shape[-1] // groups
    w: Any = None if n else xp.zeros((groups, kh * kw * channels, out), xp.result_type(x, y))
    for part in geometry.chunks(n, x.shape[-1], x.itemsize):
        patches = _grouped(kernels.im2col(x[part], geometry), groups)  # (G, n OH OW, kh kw C/G)
        rows = _split_channels(_rows(y[part]), groups)  # (G, n OH OW, O/G)
        of_part = kernels.matmul(patches.swapaxes(1, 2), rows)  # (G, kh kw C/G, O/G)
        w = of_part if w is None else w + of_part
    return w.reshape(groups, kh, kw, channels, out).transpose(1, 2, 3, 0, 4).reshape(kh, kw, channels, groups * out)


@correlate_weight.vjp
def _(g: Any, _w: Any, x: Any, y: Any, *, geometry: Geometry) -> Any:
    return lambda: correlate_input(y, g, None, geometry=geometry), lambda: correlate(x, g, None, geometry=geometry)


def _dtype(*arrays: Any) -> Any:
    return xp.result_type(*(a for a in arrays if a is not None))


def _mirrored(w: Any, groups: int) -> Any:
    """The kernel turned round, and from out to in: (kh, kw, C/G, O) -> (kh, kw, O/G, C)"""
    kh, kw, c, out = w.shape
    w = w[::-1, ::-1].reshape(kh, kw, c, groups, out // groups).transpose(0, 1, 4, 3, 2)  # (kh, kw, O/G, G, C/G)
    return w.reshape(kh, kw, out // groups, groups * c)


def _products(x: Any, y: Any, out: Any) -> None:
    """(G, n, k) x (G, k, m) into (n, G m)"""
    if len(x) == 1 and out.dtype == xp.result_type(x, y):
        kernels.matmul(x[0], y[0], out=out)
    else:
        out[...] = kernels.matmul(x, y).transpose(1, 0, 2).reshape(out.shape)


def _rows(x: Any) -> Any:
    """(..., C) -> (M, C)"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _matrices(w: Any, groups: int) -> Any:
    """The weight as a matrix a group: (kh, kw, C/G, O) -> (G, kh kw C/G, O/G)."""
    return _rows(w).reshape(math.prod(w.shape[:-1]), groups, w.shape[-1] // groups).transpose(1, 0, 2)


def _grouped(patches: Any, groups: int) -> Any:
    """(n, OH, OW, kh, kw, C) -> (G, n OH OW, kh kw C/G)"""
    n, oh, ow, kh, kw, c = patches.shape
    if groups == 1:
        return patches.reshape(1, n * oh * ow, kh * kw * c)
    patches = patches.reshape(n * oh * ow, kh * kw, groups, c // groups).transpose(2, 0, 1, 3)
    return patches.reshape(groups, n * oh * ow, kh * kw * (c // groups))


def _split_channels(rows: Any, groups: int) -> Any:
    """(M, C) -> (G, M, C/G)"""
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).transpose(1, 0, 2)


# ---------------------------------------------------------------- the layers' functions


@composite
def conv2d(
    x: Any, w: Any, b: Any = None, *, stride: Pair = 1, padding: Pair | str = 0, dilation: Pair = 1, groups: int = 1
) -> Any:
    """Convolution of (N, H, W, C) with (kh, kw, C / groups, O): (N, OH, OW, O), plus a bias (O,).

    y[n, i, j, o] = b[o] + sum over a, b, c of x[n, s i + d a - p, s j + d b - p, c] w[a, b, c, o]

    padding: zeros on each side, one number or (vertical, horizontal); "same" makes OH = ceil(H / stride). With
    groups, output channels o of group g see only the input channels of group g.
    Errors: ValueError for shapes that do not fit, or a kernel that is larger than the padded image.
    """
    _check_ranks("conv2d", 4, x, w)
    geometry = _geometry("conv2d", x, w, b, x.shape[1:3], w.shape[:2], stride, padding, dilation, groups)
    return correlate(x, w, b, geometry=geometry)


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
    OH = (H - 1) stride - 2 padding + dilation (kh - 1) + 1 + output_padding; the last term chooses among the sizes that
    the conv2d would bring to H.
    Errors: ValueError for shapes that do not fit, an output_padding that is not below stride or
    dilation, an empty output.
    """
    _check_ranks("conv_transpose2d", 4, x, w)
    if groups < 1 or x.shape[3] % groups:
        raise ValueError(f"conv_transpose2d: groups={groups} must divide the {x.shape[3]} channels of x {x.shape}")
    if x.shape[3] != w.shape[3]:
        raise ValueError(f"conv_transpose2d: x {x.shape} has {x.shape[3]} channels, but w {w.shape} takes {w.shape[3]}")
    _check_bias("conv_transpose2d", b, w.shape[2] * groups)
    s, d = _pair(stride, "conv_transpose2d", "stride", 1), _pair(dilation, "conv_transpose2d", "dilation", 1)
    p = _pair(padding, "conv_transpose2d", "padding", 0)
    extra = _pair(output_padding, "conv_transpose2d", "output_padding", 0)
    if any(e >= max(si, di) for e, si, di in zip(extra, s, d)):
        raise ValueError(
            f"conv_transpose2d: output_padding={output_padding} must be smaller than stride={stride} "
            f"or dilation={dilation}"
        )
    kernel = w.shape[:2]
    oh, ow = (
        (n - 1) * si - 2 * pi + di * (k - 1) + 1 + e
        for n, si, pi, di, k, e in zip(x.shape[1:3], s, p, d, kernel, extra)
    )
    if min(oh, ow) < 1:
        raise ValueError(
            f"conv_transpose2d: the output of x {x.shape} with w {w.shape}, stride={stride}, padding={padding}, "
            f"dilation={dilation}, output_padding={output_padding} would be empty: {(oh, ow)}"
        )
    geometry = Geometry((oh, ow), kernel, s, ((p[0], p[0]), (p[1], p[1])), d, groups)
    # output_padding is at least stride: the conv2d sees more rows than x has, which are zero
    if geometry.out != x.shape[1:3]:
        x = pad(x, pad_width=((0, 0), *((0, m - n) for n, m in zip(x.shape[1:3], geometry.out)), (0, 0)))
    return correlate_input(x, w, b, geometry=geometry)


@composite
def conv1d(
    x: Any, w: Any, b: Any = None, *, stride: int = 1, padding: int | str = 0, dilation: int = 1, groups: int = 1
) -> Any:
    """Convolution of sequences (N, L, C) with (k, C / groups, O): (N, OL, O). It is conv2d on an image of height 1."""
    _check_ranks("conv1d", 3, x, w)
    sides = padding if isinstance(padding, str) else (0, padding)
    geometry = _geometry("conv1d", x, w, b, (1, x.shape[1]), (1, w.shape[0]), (1, stride), sides, (1, dilation), groups)
    return squeeze(correlate(expand_dims(x, axis=1), expand_dims(w, axis=0), b, geometry=geometry), axis=1)


def _geometry(
    what: str, x: Any, w: Any, b: Any, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Geometry:
    """That of conv1d and conv2d, if everything fits."""
    channels, taken, out = x.shape[-1], w.shape[-2] * groups, w.shape[-1]
    if groups < 1 or channels % groups or out % groups:
        raise ValueError(
            f"{what}: groups={groups} must divide the channels, {channels} of x {x.shape} and {out} of w {w.shape}"
        )
    if channels != taken:
        raise ValueError(
            f"{what}: x {x.shape} has {channels} channels, but w {w.shape} with groups={groups} takes {taken}"
        )
    _check_bias(what, b, out)
    s, d = _pair(stride, what, "stride", 1), _pair(dilation, what, "dilation", 1)
    geometry = Geometry(size, kernel, s, _padding(padding, what, size, kernel, s, d), d, groups)
    if min(geometry.out) < 1:
        raise ValueError(
            f"{what}: the output of x {x.shape} with w {w.shape}, stride={stride}, padding={padding}, "
            f"dilation={dilation} would be empty: {geometry.out}"
        )
    return geometry


def _check_ranks(what: str, rank: int, x: Any, w: Any) -> None:
    if x.ndim != rank or w.ndim != rank:
        takes = "x (N, L, C) and w (k, .., ..)" if rank == 3 else "x (N, H, W, C) and w (kh, kw, .., ..)"
        raise ValueError(f"{what} takes {takes}, not {x.shape} and {w.shape}")


def _check_bias(what: str, b: Any, channels: int) -> None:
    if b is not None and b.shape != (channels,):
        raise ValueError(f"{what}: the bias must have shape {(channels,)}, not {b.shape}")


def _pair(value: Pair, what: str, name: str, least: int) -> tuple[int, int]:
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
    if isinstance(padding, str):
        raise ValueError(f"{what}: padding must be an int, a pair or 'same', not {padding!r}")
    return tuple((p, p) for p in _pair(padding, what, "padding", 0))
