"""Convolution on NumPy, by patches (fast/patches.py): copies from views, and sums into views."""

from __future__ import annotations

import numpy as np

from ...backend import Array
from ...ops.conv import Geometry
from .. import patches


def im2col(x: Array, geometry: Geometry) -> Array:
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C)."""
    n, height, width, c = x.shape
    (kh, kw), (sh, sw), (dh, dw), (oh, ow) = geometry.kernel, geometry.stride, geometry.dilation, geometry.out
    (top, bottom), (left, right) = geometry.padding
    if top or bottom or left or right:
        padded = np.zeros((n, height + top + bottom, width + left + right, c), x.dtype)
        padded[:, top : top + height, left : left + width] = x
        x = padded
    elif (kh, kw) == (sh, sw) == (1, 1):
        return x.reshape(n, oh, ow, 1, 1, c)  # (n, H, W, C) -> (n, OH, OW, 1, 1, C)
    if c * kw < 8:  # runs too short to copy: one plane per tap instead, which gives the matrix transposed
        planes = np.empty((kh, kw, c, n, oh, ow), x.dtype)
        for i in range(kh):
            for j in range(kw):
                taps = x[:, i * dh : i * dh + sh * oh : sh, j * dw : j * dw + sw * ow : sw]
                planes[i, j] = taps.transpose(3, 0, 1, 2)  # (n, OH, OW, C) -> (C, n, OH, OW)
        return planes.transpose(3, 4, 5, 0, 1, 2)  # -> (n, OH, OW, kh, kw, C)
    x = np.ascontiguousarray(x)
    a, b, r, q = x.strides
    windows = np.lib.stride_tricks.as_strided(x, (n, oh, ow, kh, kw, c), (a, b * sh, r * sw, b * dh, r * dw, q))
    return np.ascontiguousarray(windows)


def col2im(patches: Array, x: Array, geometry: Geometry) -> None:
    """The transpose of im2col: every patch is added at its place in x. (n, OH, OW, kh, kw, C) -> x (n, H, W, C), whose
    old values do not count."""
    n, oh, ow, kh, kw, c = patches.shape
    (sh, sw), (dh, dw), (height, width) = geometry.stride, geometry.dilation, geometry.size
    (top, bottom), (left, right) = geometry.padding
    whole = x
    if top or bottom or left or right:
        whole = np.empty((n, height + top + bottom, width + left + right, c), x.dtype)
    if (dh, dw) != (1, 1) or kh < sh or kw < sw:
        whole[...] = 0
        first = 0, 0
    else:  # the taps of the first stride meet every pixel once, except for those beyond the last patch
        whole[:, sh * oh :] = 0
        whole[:, :, sw * ow :] = 0
        first = sh, sw
    # Along a row the taps of one stride are neighbours, in the image and in the patch, and are added together.
    step = sw if dw == 1 else 1
    a, b, r, q = whole.strides
    for i in range(kh):
        for j in range(0, kw, step):
            taps = patches[:, :, :, i, j : j + step]  # (n, OH, OW, step, C)
            at = whole[:, i * dh :, j * dw :]
            pixels = np.lib.stride_tricks.as_strided(at, taps.shape, (a, b * sh, r * sw, r, q))
            if i < first[0] and j < first[1]:
                pixels[...] = taps
            else:
                pixels += taps
    if whole is not x:
        x[...] = whole[:, top : top + height, left : left + width]


# The patches of a part fill about the cache of a core.
patches.register("numpy", patches.Tools(im2col, col2im, np.matmul, patch_bytes=2**21))
