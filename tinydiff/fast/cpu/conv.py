"""Convolution on NumPy: in C without patches (conv.c, conv_weight.c, winograd.c, depthwise.c), or, where there is no
compiler, by patches (fast/patches.py)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...backend import Array
from ...ops import conv as page
from ...ops.conv import Geometry
from .. import patches
from ..taken import is_real
from .compiled import Function

conv_in_c = Function(
    "conv",
    "in x(N,S,I), in w(T,A,B), in b(O)?, out y(N,D,O), in int64 lists(L), int K, int P, int R, "
    "int N, int S, int I, int T, int D, int O, int groups, int transposed, int part, int parts",
    prepares_in_each_part=True,
    products=4,
)
weight_grad_in_c = Function(
    "conv_weight_grad",
    "in x(N,H,W,I), in y(N,OH,OW,O), out w(KH,KW,C,O), int N, int H, int W, int I, int OH, int OW, int O, "
    "int KH, int KW, int C, int sh, int sw, int top, int left, int dh, int dw, int together, int part, int parts",
    prepares_in_each_part=True,
    products=4,
)
winograd_in_c = Function(
    "winograd",
    "in x(N,H,W,C), in w(3,3,A,B), in b(O)?, out y(N,OH,OW,O), int N, int H, int W, int C, int A, int B, "
    "int OH, int OW, int O, int top, int left, int transposed, int part, int parts",
    prepares_in_each_part=True,
    products=4,
)
winograd_weight_grad_in_c = Function(
    "winograd_weight_grad",
    "in x(N,H,W,C), in y(N,OH,OW,O), out w(3,3,C,O), int N, int H, int W, int C, int OH, int OW, int O, "
    "int top, int left, int part, int parts",
    prepares_in_each_part=True,
    products=4,
)
depthwise_in_c = Function(
    "depthwise",
    "in x(N,S,C), in w(T,1,C), in b(C)?, out y(N,D,C), in int64 lists(L), int K, int P, int R, "
    "int N, int S, int T, int D, int C, int part, int parts",
    prepares_in_each_part=True,
)
depthwise_weight_grad_in_c = Function(
    "depthwise_weight_grad",
    "in x(N,S,C), in y(N,D,C), out w(T,1,C), in int64 lists(L), int K, int P, int R, "
    "int N, int S, int T, int D, int C, int part, int parts",
    prepares_in_each_part=True,
)

FEW = 8  # with fewer channels, those of several taps are worked on together


@page.conv2d_p.fast("numpy")
def conv2d_numpy(x: Array, w: Array, b: Any, *, geometry: Geometry) -> Any:
    way = way_of(geometry, "xwb", x.shape, w.shape, None if b is None else b.shape) if is_real(x, w, b) else None
    if way is None:
        return NotImplemented
    y = np.empty((len(x), *geometry.out, w.shape[3]), x.dtype)
    return y if _conv(way, x, w, b, y, geometry, False) else patches.conv2d(TOOLS, x, w, b, geometry)


@page.conv2d_input_grad.fast("numpy")
def conv2d_input_grad_numpy(y: Array, w: Array, b: Any, *, geometry: Geometry) -> Any:
    way = way_of(geometry, "ywc", y.shape, w.shape, None if b is None else b.shape) if is_real(y, w, b) else None
    if way is None:
        return NotImplemented
    x = np.empty((len(y), *geometry.size, w.shape[2] * geometry.groups), y.dtype)
    return x if _conv(way, y, w, b, x, geometry, True) else patches.conv2d_input_grad(TOOLS, y, w, b, geometry)


@page.conv2d_weight_grad.fast("numpy")
def conv2d_weight_grad_numpy(x: Array, y: Array, *, geometry: Geometry) -> Any:
    way = way_of(geometry, "xy", x.shape, y.shape) if is_real(x, y) else None
    if way is None:
        return NotImplemented
    groups = geometry.groups
    channels, out = x.shape[3] // groups, y.shape[3] // groups
    if groups == 1 and out < FEW <= channels and (turned := patches.mirrored(geometry)):
        # The form is symmetric: as the gradient of the convolution of y to x, with the kernel turned round.
        w = conv2d_weight_grad_numpy(y, x, geometry=turned)
        return np.ascontiguousarray(w[::-1, ::-1].swapaxes(2, 3))  # (kh, kw, O, C) -> (kh, kw, C, O)
    w = np.empty((*geometry.kernel, channels, y.shape[3]), x.dtype)
    if way == "depthwise":
        rows, rows_of_y = (_merged(np.ascontiguousarray(a), 1) for a in (x, y))  # (N, H, W, C) -> (N, H W, C)
        done = depthwise_weight_grad_in_c(x=rows, y=rows_of_y, w=_merged(w, 0), **lists(geometry, False))
        return w if done else patches.conv2d_weight_grad(TOOLS, x, y, geometry)
    together = groups == 1 and channels < FEW
    image, padding = (_padded(x, geometry), ((0, 0), (0, 0))) if together else (x, geometry.padding)
    (sh, sw), (dh, dw), ((top, _), (left, _)) = geometry.stride, geometry.dilation, padding
    image, y = np.ascontiguousarray(image), np.ascontiguousarray(y)
    if way == "winograd":
        done = winograd_weight_grad_in_c(x=image, y=y, w=w, top=top, left=left)
    else:
        done = weight_grad_in_c(x=image, y=y, w=w, sh=sh, sw=sw, top=top, left=left, dh=dh, dw=dw, together=together)
    return w if done else patches.conv2d_weight_grad(TOOLS, x, y, geometry)


@functools.lru_cache(256)
def way_of(geometry: Geometry, names: str, *shapes: Any) -> str | None:
    """How to compute one of the three: "taps", "winograd" or "depthwise"; None if the shapes do not fit the geometry or
    there are no channels: then the page runs, which says what is wrong. names, of the arrays: x (N, H, W, C), w (kh,
    kw, C/G, O), y (N, OH, OW, O), and the biases b (O,) and c (C,), which may lack."""
    axes = {"x": "NHWC", "w": "hwcO", "y": "NIJO", "b": "O", "c": "C"}
    lengths = dict(zip("HWIJhw", (*geometry.size, *geometry.out, *geometry.kernel)))
    for name, shape in zip(names, shapes):
        if shape is None:
            continue
        if len(shape) != len(axes[name]) or shape[-1] == 0:
            return None
        if name == "w":
            shape = (*shape[:2], shape[2] * geometry.groups, shape[3])
        if any(lengths.setdefault(length, n) != n for length, n in zip(axes[name].replace("c", "C"), shape)):
            return None
    channels, out = lengths["C"], lengths["O"]
    if not channels or channels % geometry.groups or out % geometry.groups:
        return None
    if geometry.groups == channels == out > 1:
        return "depthwise"
    result = geometry.size if names[0] == "y" else geometry.out  # the image whose tiles are computed
    if names == "xy" and 36 * channels * out > 2**22:
        return "taps"  # the sums of all points of the weights would take too much memory
    return "winograd" if by_winograd(geometry, result, channels, out) else "taps"


def by_winograd(geometry: Geometry, out: tuple[int, int], channels: int, channels_out: int) -> bool:
    """Is that quicker, for some tens of images? It must not depend on their number, which would change the digits."""
    tiles = math.ceil(out[0] / 4) * math.ceil(out[1] / 4)
    return (
        geometry.kernel == (3, 3)
        and geometry.stride == geometry.dilation == (1, 1)
        and geometry.groups == 1
        and max(*geometry.padding[0], *geometry.padding[1]) <= 2
        and min(channels, channels_out) >= 16  # else the sums are too short for what is done before and after them
        and min(out) >= 4  # of 3x3 pixels the other way leaves out the border, nearly half of the products
        and 8 * tiles <= out[0] * out[1]  # 5x5 take four of 3x3, which only many channels and images repay
        and (tiles >= 16 or 36 * channels * channels_out <= 2**22)  # or the weights are most of the work
    )


def _conv(way: str, x: Array, w: Array, b: Any, y: Array, geometry: Geometry, transposed: bool) -> bool:
    x, w, b = (a if a is None else np.ascontiguousarray(a) for a in (x, w, b))
    if way == "winograd":
        (top, _), (left, _) = geometry.padding
        top, left = (2 - top, 2 - left) if transposed else (top, left)  # the taps are turned round
        return winograd_in_c(x=x, w=w, b=b, y=y, top=top, left=left, transposed=transposed)
    given = {
        "x": _merged(x, 1),  # (N, H, W, C) -> (N, H W, C)
        "w": _merged(w, 0),  # (kh, kw, C, O) -> (kh kw, C, O)
        "b": b,
        "y": _merged(y, 1),
        **lists(geometry, transposed),
    }
    if way == "depthwise":
        return depthwise_in_c(**given)
    return conv_in_c(**given, groups=geometry.groups, transposed=transposed)


def _merged(a: Array, axis: int) -> Array:
    """That axis and the next as one."""
    return a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])


# ---------------------------------------------------------------- the lists for conv.c


@functools.lru_cache(64)
def lists(geometry: Geometry, transposed: bool) -> dict[str, Any]:
    """For conv2d, or, transposed, for its gradient by the input, whose output is the image x. Pixels under which the
    same taps meet the input, a class, stand together:

    pixels: where each class begins in the next two, K numbers
    source: of each pixel of the output, the pixel of the input under its first tap, P numbers
    target: that pixel of the output
    runs:   where each class begins in the next three, K numbers
    start:  of each run of taps, how far the pixel under its first one lies from that under the first tap, R numbers
    tap:    the first tap of the run
    length: how many they are
    """
    kw, width = geometry.kernel[1], (geometry.out if transposed else geometry.size)[1]
    out_width = (geometry.size if transposed else geometry.out)[1]
    pixels, runs, source, target, start, tap, length = [0], [0], [], [], [], [], []  # type: ignore[var-annotated]
    for rows, columns in itertools.product(_classes(geometry, transposed, 0), _classes(geometry, transposed, 1)):
        i, j = (np.array([at for at, _ in line]) for line in (rows, columns))
        target.append(np.add.outer(i * out_width, j).ravel())
        # The taps of the first pixel lie as those of the others do.
        first_i, first_j = ([taps[0][1] if taps else 0 for _, taps in line] for line in (rows, columns))
        source.append(np.add.outer(np.array(first_i) * width, np.array(first_j)).ravel())
        pixels.append(pixels[-1] + len(i) * len(j))
        before = None
        for (u, r), (v, q) in itertools.product(rows[0][1], columns[0][1]):
            here = u * kw + v, (r - first_i[0]) * width + q - first_j[0]
            if geometry.groups == 1 and before == (here[0] - 1, here[1] - 1):
                length[-1] += 1
            else:
                start.append(here[1])
                tap.append(here[0])
                length.append(1)
            before = here
        runs.append(len(tap))
    all_lists = np.concatenate([pixels, *source, *target, runs, start, tap, length]).astype(np.int64)
    return {"lists": all_lists, "K": len(pixels), "P": pixels[-1], "R": len(start)}


def _classes(geometry: Geometry, transposed: bool, axis: int) -> Iterator[list[Any]]:
    """The rows (axis 0) or columns (1) of the output, those with the same taps in one list: (i, [(tap, row of the input
    under it), ...])."""
    k, s, d, p = geometry.kernel[axis], geometry.stride[axis], geometry.dilation[axis], geometry.padding[axis][0]
    n, m = geometry.out[axis], geometry.size[axis]
    classes: dict[Any, list[Any]] = {}
    for i in range(m if transposed else n):
        if transposed:  # the rows a of y with s a + d u - p = i
            under = [(u, (i + p - d * u) // s) for u in range(k) if (i + p - d * u) % s == 0]
            under = [(u, a) for u, a in under if 0 <= a < n]
        else:
            under = [(u, s * i + d * u - p) for u in range(k) if 0 <= s * i + d * u - p < m]
        classes.setdefault(tuple(u for u, _ in under), []).append((i, under))
    return iter(classes.values())


def _padded(x: Array, geometry: Geometry) -> Array:
    (top, bottom), (left, right) = geometry.padding
    if not (top or bottom or left or right):
        return x
    n, height, width, c = x.shape
    padded = np.zeros((n, height + top + bottom, width + left + right, c), x.dtype)
    padded[:, top : top + height, left : left + width] = x
    return padded


# ---------------------------------------------------------------- patches


def im2col(x: Array, geometry: Geometry) -> Array:
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C)."""
    n, _, _, c = x.shape
    (kh, kw), (sh, sw), (dh, dw), (oh, ow) = geometry.kernel, geometry.stride, geometry.dilation, geometry.out
    x = np.ascontiguousarray(_padded(x, geometry))
    a, b, r, q = x.strides
    windows = np.lib.stride_tricks.as_strided(x, (n, oh, ow, kh, kw, c), (a, b * sh, r * sw, b * dh, r * dw, q))
    return np.ascontiguousarray(windows)


def col2im(parts: Array, x: Array, geometry: Geometry) -> None:
    """The transpose of im2col: every patch is added at its place in x. (n, OH, OW, kh, kw, C) -> x (n, H, W, C), whose
    old values do not count."""
    n, oh, ow, kh, kw, c = parts.shape
    (sh, sw), (dh, dw), (height, width) = geometry.stride, geometry.dilation, geometry.size
    (top, bottom), (left, right) = geometry.padding
    whole = np.zeros((n, height + top + bottom, width + left + right, c), x.dtype)
    for u, v in itertools.product(range(kh), range(kw)):
        whole[:, u * dh : u * dh + sh * oh : sh, v * dw : v * dw + sw * ow : sw][:, :oh, :ow] += parts[:, :, :, u, v]
    x[...] = whole[:, top : top + height, left : left + width]


# The patches of a part fill about the cache of a core.
TOOLS = patches.Tools(im2col, col2im, np.matmul, patch_bytes=2**21)
