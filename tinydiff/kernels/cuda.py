"""The kernels for CuPy: the names and signatures of numpy.py, with few launches, and nothing that waits for the device.

A GPU is fast at anything that runs in one launch, and every launch costs the host some microseconds. So what numpy.py
does a block at a time, for the sake of the cache, is whole here: one kernel gathers all patches, one changes a
parameter and its moments. What numpy.py does in whole arrays anyway is taken over by name.

Elementwise kernels are CuPy's own, which checks their arguments. Those that move data or reduce it are CUDA, behind
`Kernel` (launch.py), which checks what CUDA does not. What they have in common with one another stands in a file of its
own: cuda_norm.py, cuda_norm_backward.py, cuda_softmax.py.
"""

from __future__ import annotations

from typing import Any

import cupy

from ..backend import Array
from .cublas import matmul
from .cuda_graph import Graph
from .cuda_norm import normalize
from .cuda_norm_backward import normalize_backward
from .cuda_optim import adam_step, average_step, clip_norm, sgd_step
from .cuda_random import random_integers, random_normal, random_uniform
from .cuda_softmax import attention_weights, attention_weights_backward, softmax
from .launch import EACH_ELEMENT, Kernel, elementwise, widest_run
from .numpy import index_add, sum
from .numpy_activation import erf as erf_of_complex

__all__ = [
    "Graph", "PATCH_BYTES", "adam_step", "attention_weights", "attention_weights_backward", "average_step", "clip_norm",
    "col2im", "erf", "im2col", "index_add", "matmul", "normalize", "normalize_backward", "random_integers",
    "random_normal", "random_uniform", "sgd_step", "sigmoid", "silu", "silu_backward", "softmax", "sum",
]  # fmt: skip

# index_add is CuPy's add.at, which adds by atomics: where an index occurs several times, the order of its additions,
# and so the last digits of the sum, may differ from run to run.

PATCH_BYTES = 2**28  # the patches of a convolution that are in work at a time: a matter of memory here, not of cache


# ---------------------------------------------------------------- convolution


_GEOMETRY = "int runs, int height, int width, int out_h, int out_w, int kernel_h, int kernel_w, "
_GEOMETRY += "int stride_h, int stride_w, int top, int left, int dilation_h, int dilation_w, Index threads"

# One thread a run of channels of one tap of one output pixel: neighbours read and write neighbours.
_IM2COL = Kernel(
    "im2col",
    "const Run* image, Run* patches, " + _GEOMETRY,
    EACH_ELEMENT
    + """
    Index rest = thread;
    int run = rest % runs; rest /= runs;
    int tap_x = rest % kernel_w; rest /= kernel_w;
    int tap_y = rest % kernel_h; rest /= kernel_h;
    int out_x = rest % out_w; rest /= out_w;
    int out_y = rest % out_h; rest /= out_h;
    int x = out_x * stride_w + tap_x * dilation_w - left;
    int y = out_y * stride_h + tap_y * dilation_h - top;
    Run value = {};
    if (x >= 0 && x < width && y >= 0 && y < height) value = image[((rest * height + y) * width + x) * runs + run];
    patches[thread] = value;
    """,
)

# One thread a run of channels of one input pixel: it gathers the taps that read this pixel. No two threads write to one
# place, so there are no atomics, and the sum is the same every time.
_COL2IM = Kernel(
    "col2im",
    "const Run* patches, Run* image, " + _GEOMETRY,
    EACH_ELEMENT
    + """
    Index rest = thread;
    int run = rest % runs; rest /= runs;
    int x = rest % width; rest /= width;
    int y = rest % height; rest /= height;
    Run sum = {};
    for (int tap_y = 0; tap_y < kernel_h; ++tap_y) {
      int from_y = y + top - tap_y * dilation_h;
      if (from_y < 0 || from_y % stride_h || from_y / stride_h >= out_h) continue;
      Index row = rest * out_h + from_y / stride_h;
      for (int tap_x = 0; tap_x < kernel_w; ++tap_x) {
        int from_x = x + left - tap_x * dilation_w;
        if (from_x < 0 || from_x % stride_w || from_x / stride_w >= out_w) continue;
        Index pixel = row * out_w + from_x / stride_w;
        Run part = patches[((pixel * kernel_h + tap_y) * kernel_w + tap_x) * runs + run];
        for (int i = 0; i < LANES; ++i) sum.lane[i] += part.lane[i];
      }
    }
    image[thread] = sum;
    """,
)


def im2col(x: Array, geometry: Any) -> Array:
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C)."""
    n, (oh, ow), kernel = len(x), geometry.out, geometry.kernel
    if kernel == geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        return x.reshape(n, oh, ow, 1, 1, x.shape[3])
    patches = cupy.empty((n, oh, ow, *kernel, x.shape[3]), x.dtype)
    _gather(_IM2COL, x, patches, geometry)
    return patches


def col2im(patches: Array, x: Array, geometry: Any) -> None:
    """The transpose of im2col: every patch is added where it was taken, (n, OH, OW, kh, kw, C) into x (n, H, W, C),
    whatever was there before."""
    _gather(_COL2IM, patches, x, geometry)


def _gather(kernel: Kernel, source: Array, target: Array, geometry: Any) -> None:
    """Run im2col or col2im. Complex channels are twice as many real ones, as both treat all channels alike."""
    source = cupy.ascontiguousarray(source)
    if source.dtype.kind == "c":
        real = source.real.dtype
        source, target = source.view(real), target.view(real)
    lanes = widest_run(source.shape[-1], source)
    (top, _), (left, _) = geometry.padding
    numbers = *geometry.size, *geometry.out, *geometry.kernel, *geometry.stride, top, left, *geometry.dilation
    kernel.each_element(target.size // lanes, source, target, source.shape[-1] // lanes, *numbers, lanes=lanes)


# ---------------------------------------------------------------- activations


# Beyond the range of exp the quotients are 0 and 1, as they should be, and a NaN stays one.
_SIGMOID = elementwise("T value", "T result", "result = T(1) / (T(1) + exp(-value))", "sigmoid")
_SILU = elementwise("T value", "T result", "result = value / (T(1) + exp(-value))", "silu")
_SILU_BACKWARD = elementwise(
    "T cotangent, T value",
    "T result",
    "T slope = T(1) / (T(1) + exp(-value)); result = cotangent * slope * (T(1) + value * (T(1) - slope))",
    "silu_backward",
)
_ERF = elementwise("T value", "T result", "result = erf(value)", "erf")


def _floating(x: Any) -> Array:
    x = cupy.asarray(x)
    return x if x.dtype.kind in "fc" else x.astype("float64")


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)"""
    return _SIGMOID(_floating(x))


def silu(x: Array) -> Array:
    """x sigmoid(x)"""
    return _SILU(_floating(x))


def silu_backward(g: Array, x: Array) -> Array:
    """g s (1 + x (1 - s))"""
    return _SILU_BACKWARD(g, x)


def erf(x: Array) -> Array:
    x = _floating(x)
    return erf_of_complex(x) if x.dtype.kind == "c" else _ERF(x)  # CUDA has it for real numbers alone
