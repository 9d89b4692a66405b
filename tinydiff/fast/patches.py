"""Convolution by patches: the algorithm that the CPU and the GPU share (fast/cpu, fast/cuda).

The patch under each output pixel is gathered into a row (im2col), (N OH OW, kh kw C), and multiplied once by the
weight, (kh kw C, O). The other two derivatives of the page are the same product with its factors in other roles; for
the gradient by the input, the patches are added back at their places (col2im). A few images are done at a time, as many
as `Tools.patch_bytes` allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..backend import Array, xp
from ..ops import conv as page
from ..ops.conv import Geometry, by_group
from .taken import is_real


@dataclass(frozen=True)
class Tools:
    """The functions of a backend."""

    im2col: Callable[[Array, Geometry], Array]  # (n, H, W, C) -> (n, OH, OW, kh, kw, C)
    col2im: Callable[[Array, Array, Geometry], None]  # its transpose, into an array (n, H, W, C)
    matmul: Callable[..., Array]  # (a, b, out=None)
    patch_bytes: int  # of the patches in memory at a time, at most


def register(name: str, tools: Tools) -> None:
    """Register convolution by a backend's tools in place of the page."""

    @page.conv2d_p.fast(name)
    def conv2d_fast(x: Array, w: Array, b: Any, *, geometry: Geometry) -> Any:
        return conv2d(tools, x, w, b, geometry) if is_real(x, w, b) else NotImplemented

    @page.conv2d_input_grad.fast(name)
    def conv2d_input_grad_fast(y: Array, w: Array, b: Any, *, geometry: Geometry) -> Any:
        return conv2d_input_grad(tools, y, w, b, geometry) if is_real(y, w, b) else NotImplemented

    @page.conv2d_weight_grad.fast(name)
    def conv2d_weight_grad_fast(x: Array, y: Array, *, geometry: Geometry) -> Any:
        return conv2d_weight_grad(tools, x, y, geometry) if is_real(x, y) else NotImplemented


def mirrored(geometry: Geometry) -> Geometry | None:
    """The geometry of the transpose as a convolution with the kernel turned round. It exists for stride 1 and a padding
    that is not wider than the reach of the kernel; else None."""
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel)]
    padding: Any = tuple((r - p, r - q) for r, (p, q) in zip(reach, geometry.padding))
    if geometry.stride != (1, 1) or min(map(min, padding)) < 0:
        return None
    return replace(geometry, size=geometry.out, padding=padding)


def patch_elements(geometry: Geometry, channels: int) -> int:
    """The number of elements in the patches of one image."""
    return math.prod(geometry.out) * math.prod(geometry.kernel) * channels


def chunks(tools: Tools, geometry: Geometry, n: int, channels: int, itemsize: int) -> Iterator[slice]:
    """The batch in parts whose patches have at most patch_bytes."""
    step = max(1, tools.patch_bytes // max(patch_elements(geometry, channels) * itemsize, 1))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def conv2d(tools: Tools, x: Array, w: Array, b: Array | None, geometry: Geometry) -> Array:
    y = xp.empty((len(x), *geometry.out, w.shape[-1]), x.dtype)
    matrices = by_group(w, geometry.groups)  # (G, kh kw C/G, O/G)
    for part in chunks(tools, geometry, len(x), x.shape[-1], x.itemsize):
        patches = _grouped(tools.im2col(x[part], geometry), geometry.groups)  # (G, n OH OW, kh kw C/G)
        _products(tools, patches, matrices, _rows(y[part]))
        if b is not None:
            y[part] += b
    return y


def conv2d_input_grad(tools: Tools, y: Array, w: Array, b: Array | None, geometry: Geometry) -> Array:
    (kh, kw), groups = geometry.kernel, geometry.groups
    channels = w.shape[2] * groups
    turned = mirrored(geometry)
    # Gathering patches is quicker than adding them up, so it is worth while with up to twice as many elements.
    if turned and patch_elements(turned, y.shape[-1]) <= 2 * patch_elements(geometry, channels):
        return conv2d(tools, y, _turned(w, groups), b, turned)
    x = xp.empty((len(y), *geometry.size, channels), y.dtype)
    matrices = by_group(w, groups).swapaxes(1, 2)  # (G, O/G, kh kw C/G)
    for part in chunks(tools, geometry, len(y), channels, y.itemsize):
        rows = _rows(y[part])  # (n OH OW, O)
        patches = xp.empty((len(rows), kh * kw * channels), x.dtype)
        _products(tools, by_group(rows, groups), matrices, patches)
        patches = patches.reshape(len(y[part]), *geometry.out, groups, kh, kw, channels // groups)
        patches = patches.transpose(0, 1, 2, 4, 5, 3, 6).reshape(len(y[part]), *geometry.out, kh, kw, channels)
        tools.col2im(patches, x[part], geometry)
        if b is not None:
            x[part] += b
    return x


def conv2d_weight_grad(tools: Tools, x: Array, y: Array, geometry: Geometry) -> Array:
    (kh, kw), groups, n = geometry.kernel, geometry.groups, len(x)
    channels, out = x.shape[-1] // groups, y.shape[-1] // groups
    w: Any = None if n else xp.zeros((groups, kh * kw * channels, out), x.dtype)
    for part in chunks(tools, geometry, n, x.shape[-1], x.itemsize):
        patches = _grouped(tools.im2col(x[part], geometry), groups)  # (G, n OH OW, kh kw C/G)
        rows = by_group(_rows(y[part]), groups)  # (G, n OH OW, O/G)
        of_part = tools.matmul(patches.swapaxes(1, 2), rows)  # (G, kh kw C/G, O/G)
        w = of_part if w is None else w + of_part
    return w.reshape(groups, kh, kw, channels, out).transpose(1, 2, 3, 0, 4).reshape(kh, kw, channels, groups * out)


def _turned(w: Array, groups: int) -> Array:
    """The kernel turned round, with inputs and outputs exchanged: (kh, kw, C/G, O) -> (kh, kw, O/G, C)"""
    kh, kw, c, out = w.shape
    w = w[::-1, ::-1].reshape(kh, kw, c, groups, out // groups).transpose(0, 1, 4, 3, 2)  # (kh, kw, O/G, G, C/G)
    return w.reshape(kh, kw, out // groups, groups * c)  # -> (kh, kw, O/G, C)


def _products(tools: Tools, x: Array, y: Array, out: Array) -> None:
    """(G, n, k) x (G, k, m) into (n, G m)"""
    if len(x) == 1:
        tools.matmul(x[0], y[0], out=out)
    else:
        out[...] = tools.matmul(x, y).transpose(1, 0, 2).reshape(out.shape)  # (G, n, m) -> (n, G m)


def _rows(x: Array) -> Array:
    """(..., C) -> (M, C)"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _grouped(patches: Array, groups: int) -> Array:
    """(n, OH, OW, kh, kw, C) -> (G, n OH OW, kh kw C/G)"""
    n, oh, ow, kh, kw, c = patches.shape
    if groups == 1:
        return patches.reshape(1, n * oh * ow, kh * kw * c)  # (1, n OH OW, kh kw C)
    patches = patches.reshape(n * oh * ow, kh * kw, groups, c // groups).transpose(2, 0, 1, 3)  # (G, M, kh kw, C/G)
    return patches.reshape(groups, n * oh * ow, kh * kw * (c // groups))  # -> (G, M, kh kw C/G)
