"""Pooling and upsampling of images (N, H, W, C)."""

from __future__ import annotations

import math
from typing import Any

from ..engine import composite
from .conv import Pair, _pair
from .reduce import max, mean
from .shape import broadcast_to, pad, reshape, stack


@composite
def max_pool2d(x: Any, *, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Any:
    """The largest value under each window: (N, H, W, C) -> (N, OH, OW, C),
    OH = floor((H + 2 padding - kernel) / stride) + 1.

    stride: the kernel's size unless given. The padding is -inf, so it is never the largest.
    At ties: those that are largest share equally.
    """
    return max(_windows("max_pool2d", x, kernel, stride, padding, -math.inf), axis=0)


@composite
def avg_pool2d(x: Any, *, kernel: Pair, stride: Pair | None = None, padding: Pair = 0) -> Any:
    """The mean under each window, sizes as in max_pool2d; zeros in the padding count, as in PyTorch's default."""
    return mean(_windows("avg_pool2d", x, kernel, stride, padding, 0.0), axis=0)


@composite
def upsample_nearest2d(x: Any, *, scale: Pair = 2) -> Any:
    """Each pixel becomes a block of scale[0] x scale[1] pixels: (N, H, W, C) -> (N, s H, s W, C)."""
    if x.ndim != 4:
        raise ValueError(f"upsample_nearest2d takes images (N, H, W, C), not {x.shape}")
    (n, h, w, c), (a, b) = x.shape, _pair(scale, "upsample_nearest2d", "scale", 1)
    x = broadcast_to(reshape(x, shape=(n, h, 1, w, 1, c)), shape=(n, h, a, w, b, c))  # -> (N, H, s, W, s, C)
    return reshape(x, shape=(n, h * a, w * b, c))  # -> (N, s H, s W, C)


def _windows(what: str, x: Any, kernel: Pair, stride: Pair | None, padding: Pair, fill: float) -> Any:
    """The elements of each window along a new first axis: (kh kw, N, OH, OW, C)."""
    if x.ndim != 4:
        raise ValueError(f"{what} takes images (N, H, W, C), not {x.shape}")
    kh, kw = _pair(kernel, what, "kernel", 1)
    sh, sw = (kh, kw) if stride is None else _pair(stride, what, "stride", 1)
    ph, pw = _pair(padding, what, "padding", 0)
    if 2 * ph > kh or 2 * pw > kw:
        raise ValueError(f"{what}: padding={padding} must be at most half of kernel={kernel}")
    if ph or pw:
        x = pad(x, pad_width=((0, 0), (ph, ph), (pw, pw), (0, 0)), value=fill)
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    if min(oh, ow) < 1:
        raise ValueError(f"{what}: kernel={kernel} is larger than the padded image {x.shape}")
    return stack([x[:, i : i + sh * oh : sh, j : j + sw * ow : sw] for i in range(kh) for j in range(kw)])
