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

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import kernels
from ..backend import xp
from ..tape import composite, primitive
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

    @property
    def out(self) -> tuple[int, int]:
        """Of y: OH, OW; floor((H + padding - dilation (k - 1) - 1) / stride) + 1."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel)]
        oh, ow = ((n + sum(p) - r) // s + 1 for n, p, r, s in zip(self.size, self.padding, reach, self.stride))
        return oh, ow

    def chunks(self, n: int, channels: int, itemsize: int) -> Iterator[slice]:
        """The batch in parts whose patches fit in the cache."""
        oh, ow = self.out
        image = oh * ow * self.kernel[0] * self.kernel[1] * channels * itemsize
        step = max(1, kernels.PATCH_BYTES // max(image, 1))
        return (slice(i, min(i + step, n)) for i in range(0, n, step))


# ---------------------------------------------------------------- the three maps


@primitive
def correlate(x: Any, w: Any, *, geometry: Geometry) -> Any:
    """y[n, i, j, o] = sum over a, b, c of x[n, s i + d a - p, s j + d b - p, c] w[a, b, c, o]

    x' = correlate_input(y', w),   w' = correlate_weight(x, y')
    """
    shape = (len(x), *geometry.out, w.shape[-1])
    matrices = _matrices(w, geometry.groups)  # (G, kh kw C/G, O/G)

    def of(part: slice) -> Any:
        patches = _grouped(kernels.im2col(x[part], geometry), geometry.groups)  # (G, n OH OW, kh kw C/G)
        return _ungrouped(_products(patches, matrices)).reshape(-1, *shape[1:])

    return _joined(of, geometry.chunks(len(x), x.shape[-1], x.itemsize), shape, xp.result_type(x, w))


@correlate.vjp
def _(g: Any, _y: Any, x: Any, w: Any, *, geometry: Geometry) -> Any:
    return lambda: correlate_input(g, w, geometry=geometry), lambda: correlate_weight(x, g, geometry=geometry)


@primitive
def correlate_input(y: Any, w: Any, *, geometry: Geometry) -> Any:
    """x[n, s i + d a - p, s j + d b - p, c] = sum over i, j, a, b, o that meet there of y[n, i, j, o] w[a, b, c, o]

    y' = correlate(x', w),   w' = correlate_weight(x', y)
    """
    (kh, kw), groups = geometry.kernel, geometry.groups
    channels = w.shape[2] * groups
    shape = (len(y), *geometry.size, channels)
    matrices = xp.ascontiguousarray(_matrices(w, groups).swapaxes(1, 2))  # (G, O/G, kh kw C/G)

    def of(part: slice) -> Any:
        rows = _split_channels(y[part].reshape(-1, y.shape[-1]), groups)  # (G, n OH OW, O/G)
        patches = _products(rows, matrices)  # (G, n OH OW, kh kw C/G)
        patches = patches.reshape(groups, -1, kh * kw, channels // groups).transpose(1, 2, 0, 3)
        return kernels.col2im(patches.reshape(-1, *geometry.out, kh, kw, channels), geometry)

    return _joined(of, geometry.chunks(len(y), channels, y.itemsize), shape, xp.result_type(y, w))


@correlate_input.vjp
def _(g: Any, _x: Any, y: Any, w: Any, *, geometry: Geometry) -> Any:
    return lambda: correlate(g, w, geometry=geometry), lambda: correlate_weight(g, y, geometry=geometry)


@primitive
def correlate_weight(x: Any, y: Any, *, geometry: Geometry) -> Any:
    """w[a, b, c, o] = sum over n, i, j of x[n, s i + d a - p, s j + d b - p, c] y[n, i, j, o]

    x' = correlate_input(y, w'),   y' = correlate(x, w')
    """
    (kh, kw), groups, n = geometry.kernel, geometry.groups, len(x)
    channels, out = x.shape[-1] // groups, y.shape[-1] // groups
    w = xp.zeros((groups, kh * kw * channels, out), xp.result_type(x, y))
    for part in geometry.chunks(n, x.shape[-1], x.itemsize):
        patches = _grouped(kernels.im2col(x[part], geometry), groups)  # (G, n OH OW, kh kw C/G)
        w += _products(patches.swapaxes(1, 2), _split_channels(y[part].reshape(-1, y.shape[-1]), groups))
    return w.reshape(groups, kh, kw, channels, out).transpose(1, 2, 3, 0, 4).reshape(kh, kw, channels, groups * out)


@correlate_weight.vjp
def _(g: Any, _w: Any, x: Any, y: Any, *, geometry: Geometry) -> Any:
    return lambda: correlate_input(y, g, geometry=geometry), lambda: correlate(x, g, geometry=geometry)


def _joined(of: Callable[[slice], Any], parts: Iterable[slice], shape: tuple[int, ...], dtype: Any) -> Any:
    """of(part) of every part of the batch, in one array; where there is one part, that is it."""
    parts = tuple(parts)
    if len(parts) == 1:
        return xp.ascontiguousarray(of(parts[0]))
    whole = xp.empty(shape, dtype)
    for part in parts:
        whole[part] = of(part)
    return whole


def _products(x: Any, y: Any) -> Any:
    """(G, n, k) x (G, k, m) -> (G, n, m)"""
    return kernels.matmul(x, y)


def _matrices(w: Any, groups: int) -> Any:
    """The weight as a matrix a group: (kh, kw, C/G, O) -> (G, kh kw C/G, O/G)."""
    return w.reshape(-1, groups, w.shape[-1] // groups).transpose(1, 0, 2)


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


def _ungrouped(rows: Any) -> Any:
    """(G, M, O/G) -> (M, O)"""
    return rows[0] if len(rows) == 1 else rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)


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
    y = correlate(x, w, geometry=geometry)
    return y if b is None else y + b


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
    y = correlate_input(x, w, geometry=geometry)
    return y if b is None else y + b


@composite
def conv1d(
    x: Any, w: Any, b: Any = None, *, stride: int = 1, padding: int | str = 0, dilation: int = 1, groups: int = 1
) -> Any:
    """Convolution of sequences (N, L, C) with (k, C / groups, O): (N, OL, O). It is conv2d on an image of height 1."""
    _check_ranks("conv1d", 3, x, w)
    sides = padding if isinstance(padding, str) else (0, padding)
    geometry = _geometry("conv1d", x, w, b, (1, x.shape[1]), (1, w.shape[0]), (1, stride), sides, (1, dilation), groups)
    y = squeeze(correlate(expand_dims(x, axis=1), expand_dims(w, axis=0), geometry=geometry), axis=1)
    return y if b is None else y + b


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
