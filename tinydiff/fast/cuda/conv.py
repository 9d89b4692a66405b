"""The patches of a convolution (conv.cu)."""

from __future__ import annotations

from typing import Any

import cupy

from ...backend import Array
from .. import patches as by_patches
from .cublas import matmul
from .launch import Kernel, Source, widest_run

_CONV = Source("conv.cu", TYPE=("float", "double"), LANES=(1, 2, 4), INDEX_BITS=(32, 64))


def im2col(x: Array, geometry: Any) -> Array:
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C)."""
    n, (oh, ow), kernel = len(x), geometry.out, geometry.kernel
    if kernel == geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return x.reshape(n, oh, ow, 1, 1, x.shape[3])  # (n, H, W, C) -> (n, OH, OW, 1, 1, C)
    patches = cupy.empty((n, oh, ow, *kernel, x.shape[3]), x.dtype)
    _gather(_CONV["im2col"], x, patches, geometry)
    return patches


def col2im(patches: Array, x: Array, geometry: Any) -> None:
    """The transpose of im2col: every patch is added at its place in x. (n, OH, OW, kh, kw, C) -> x (n, H, W, C), whose
    old values do not count."""
    _gather(_CONV["col2im"], patches, x, geometry)


def _gather(kernel: Kernel, source: Array, target: Array, geometry: Any) -> None:
    """Run im2col or col2im. Complex channels count as twice as many real ones; both treat all channels alike."""
    source = cupy.ascontiguousarray(source)
    if source.dtype.kind == "c":
        real = source.real.dtype
        source, target = source.view(real), target.view(real)
    lanes = widest_run(source.shape[-1], source)
    (top, _), (left, _) = geometry.padding
    numbers = *geometry.size, *geometry.out, *geometry.kernel, *geometry.stride, top, left, *geometry.dilation
    kernel.each_element(target.size // lanes, source, target, source.shape[-1] // lanes, *numbers, lanes=lanes)


# Here memory, not a cache, limits the number of patches in a part.
by_patches.register("cupy", by_patches.Tools(im2col, col2im, matmul, patch_bytes=2**28))
