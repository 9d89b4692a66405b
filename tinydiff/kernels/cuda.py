"""The kernels for CuPy: the names and signatures of numpy.py, with few launches, and nothing that waits for the device.

A GPU is fast at anything that runs in one launch, and every launch costs the host some microseconds. So what numpy.py
does a block at a time, for the sake of the cache, is whole here: one kernel gathers all patches, one changes a
parameter and its moments. What numpy.py does in whole arrays anyway is taken over by name.

Elementwise and reduction kernels are CuPy's own, which checks their arguments; those that move data are CUDA, behind
`Kernel`, which checks what CUDA does not. CuPy pastes the parameters of a kernel into its own text, so their names are
long words of which no other name is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy

from ..backend import Array
from .cublas import matmul
from .cuda_graph import Graph
from .cuda_optim import adam_step, average_step, clip_norm, sgd_step
from .cuda_random import random_integers, random_normal, random_uniform
from .numpy import index_add, softmax, sum
from .numpy_activation import erf as erf_of_complex

__all__ = [
    "Graph", "PATCH_BYTES", "adam_step", "average_step", "clip_norm", "col2im", "erf", "im2col", "index_add", "matmul",
    "normalize", "normalize_backward", "random_integers", "random_normal", "random_uniform", "sgd_step", "sigmoid",
    "silu", "silu_backward", "softmax", "sum",
]  # fmt: skip

# index_add is CuPy's add.at, which adds by atomics: where an index occurs several times, the order of its additions,
# and so the last digits of the sum, may differ from run to run.

PATCH_BYTES = 2**28  # the patches of a convolution that are in work at a time: a matter of memory here, not of cache

THREADS = 256  # a block


# ---------------------------------------------------------------- the launcher


@dataclass(frozen=True)
class Kernel:
    """A kernel in CUDA of one thread an element, or a run of LANES elements, compiled for each type that it meets.

    CUDA itself takes anything for anything: float64 for a float*, a strided view, a float that reads as 0, one argument
    too few. So the parameters are declared here, and every call is held against them. In the code T is the type
    of the elements, Run is LANES of them, read and written at once, and Index counts the threads.
    """

    name: str
    parameters: str  # "const Run* x, Run* y, int n": pointers are to Run or T, numbers are int
    body: str  # `thread` is the number of this thread, below `threads`
    _built: dict[tuple[str, int, bool], Any] = field(default_factory=dict, compare=False)

    def __call__(self, threads: int, *arguments: Any, lanes: int = 1) -> None:
        """Launch `threads` threads. Errors: TypeError for arguments that are not what was declared."""
        declared = self.parameters.split(", ")
        if len(arguments) != len(declared):
            raise TypeError(
                f"kernel {self.name} takes {len(declared)} arguments ({self.parameters}), not {len(arguments)}"
            )
        dtype = arguments[0].dtype
        passed = [self._checked(declaration, a, dtype) for declaration, a in zip(declared, arguments)]
        if not threads:
            return
        wide = max(threads, *(a.size for a in arguments if isinstance(a, cupy.ndarray))) >= 2**31
        key = (dtype.char, lanes, wide)
        if key not in self._built:
            self._built[key] = self._build(*key)
        count = numpy.int64(threads) if wide else numpy.uint32(threads)
        self._built[key]((-(-threads // THREADS),), (THREADS,), (*passed, count))

    def _checked(self, declaration: str, a: Any, dtype: Any) -> Any:
        if "*" in declaration:
            if (
                not isinstance(a, cupy.ndarray)
                or dtype.char not in "fd"
                or a.dtype != dtype
                or not a.flags.c_contiguous
            ):
                module = type(a).__module__.split(".")[0]
                what = (
                    f"{module} {a.dtype} of shape {a.shape} and strides {a.strides}"
                    if hasattr(a, "strides")
                    else repr(a)
                )
                raise TypeError(
                    f"kernel {self.name}: {declaration} takes a C-contiguous CuPy array, "
                    f"all of float32 or of float64, not {what}"
                )
            return a
        if not isinstance(a, int) or not -(2**31) <= a < 2**31:
            raise TypeError(f"kernel {self.name}: {declaration} takes an int of 32 bits, not {a!r}")
        return numpy.int32(a)

    def _build(self, char: str, lanes: int, wide: bool) -> Any:
        code = f"""
        typedef {"float" if char == "f" else "double"} T;
        typedef {"long long" if wide else "unsigned int"} Index;
        const int LANES = {lanes};
        struct __align__({lanes * numpy.dtype(char).itemsize}) Run {{ T lane[LANES]; }};
        extern "C" __global__ void {self.name}({self.parameters}, Index threads) {{
          Index thread = blockIdx.x * (Index)blockDim.x + threadIdx.x;
          if (thread >= threads) return;
          {self.body}
        }}"""
        return cupy.RawKernel(code, self.name)


# ---------------------------------------------------------------- convolution


_GEOMETRY = "int runs, int height, int width, int out_h, int out_w, int kernel_h, int kernel_w, "
_GEOMETRY += "int stride_h, int stride_w, int top, int left, int dilation_h, int dilation_w"

# One thread a run of channels of one tap of one output pixel: neighbours read and write neighbours.
_IM2COL = Kernel(
    "im2col",
    "const Run* image, Run* patches, " + _GEOMETRY,
    """
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
    """
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
    lanes = 16 // source.itemsize
    if source.shape[-1] % lanes or source.data.ptr % 16:
        lanes = 1
    (top, _), (left, _) = geometry.padding
    numbers = *geometry.size, *geometry.out, *geometry.kernel, *geometry.stride, top, left, *geometry.dilation
    kernel(target.size // lanes, source, target, source.shape[-1] // lanes, *numbers, lanes=lanes)


# ---------------------------------------------------------------- activations


# Beyond the range of exp the quotients are 0 and 1, as they should be, and a NaN stays one.
_SIGMOID = cupy.ElementwiseKernel("T value", "T result", "result = T(1) / (T(1) + exp(-value))", "tinydiff_sigmoid")
_SILU = cupy.ElementwiseKernel("T value", "T result", "result = value / (T(1) + exp(-value))", "tinydiff_silu")
_SILU_BACKWARD = cupy.ElementwiseKernel(
    "T cotangent, T value",
    "T result",
    "T slope = T(1) / (T(1) + exp(-value)); result = cotangent * slope * (T(1) + value * (T(1) - slope))",
    "tinydiff_silu_backward",
)
_ERF = cupy.ElementwiseKernel("T value", "T result", "result = erf(value)", "tinydiff_erf")


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


# ---------------------------------------------------------------- normalisation


# Two and more inputs, as the faster path that CuPy has for one contiguous input does not take
# every kernel of one's own.
_RSTD = cupy.ReductionKernel(
    "T value, T centre, float64 count, float64 epsilon",
    "T result",
    "(value - centre) * (value - centre)",
    "a + b",
    "result = T(1) / sqrt(a / T(count) + T(epsilon))",
    "0",
    "tinydiff_rstd",
)
_SCALE_AND_SHIFT = cupy.ElementwiseKernel(
    "T value, T centre, T scale, T weight, T offset",
    "T result",
    "result = (value - centre) * (scale * weight) + offset",
    "tinydiff_scale_and_shift",
)
_SUM_WITH_XHAT = cupy.ReductionKernel(
    "T cotangent, T value, T centre, T scale",
    "T result",
    "cotangent * ((value - centre) * scale)",
    "a + b",
    "result = a",
    "0",
    "tinydiff_sum_with_xhat",
)
_WEIGHTED_MEAN = cupy.ReductionKernel(
    "T value, T weight, float64 count",
    "T result",
    "value * weight",
    "a + b",
    "result = a / T(count)",
    "0",
    "tinydiff_weighted_mean",
)
_NORMALIZE_BACKWARD = cupy.ElementwiseKernel(
    "T cotangent, T value, T centre, T scale, T weight, T average, T slope",
    "T result",
    "result = (cotangent * weight - average - (value - centre) * scale * slope) * scale",
    "tinydiff_normalize_backward",
)


def normalize(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """y = (x - mean) / sqrt(var + eps) weight + bias over axes 1 and 3 of (A, L, G, D), with weight and bias (G D,);
    also the mean and 1 / sqrt(var + eps), (A, 1, G)."""
    a, length, groups, d = x.shape
    mean = x.mean(axis=(1, 3), keepdims=True)  # (A, 1, G, 1)
    rstd = _RSTD(x, mean, length * d, eps, axis=(1, 3), keepdims=True)
    y = _SCALE_AND_SHIFT(x, mean, rstd, _of_channels(weight, x, 1), _of_channels(bias, x, 0))
    return y, mean.reshape(a, 1, groups), rstd.reshape(a, 1, groups)


def normalize_backward(g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None) -> Any:
    """x' = (h - mean(h) - xhat mean(h xhat)) rstd with h = g weight,   weight' = sum g xhat,   bias' = sum g

    The sums over L are taken first, (A, 1, G, D), before the weight comes in: it does not depend on L.
    """
    _, length, _, d = x.shape
    mean, rstd, w = mean[..., None], rstd[..., None], _of_channels(weight, x, 1)
    # (A, 1, G, D)
    g_sum, gx_sum = g.sum(axis=1, keepdims=True), _SUM_WITH_XHAT(g, x, mean, rstd, axis=1, keepdims=True)
    average = _WEIGHTED_MEAN(g_sum, w, length * d, axis=3, keepdims=True)  # (A, 1, G, 1)
    slope = _WEIGHTED_MEAN(gx_sum, w, length * d, axis=3, keepdims=True)
    dx = _NORMALIZE_BACKWARD(g, x, mean, rstd, w, average, slope)
    return (
        (dx, None, None)
        if weight is None
        else (dx, gx_sum.sum(axis=(0, 1)).reshape(-1), g_sum.sum(axis=(0, 1)).reshape(-1))
    )


def _of_channels(p: Array | None, x: Array, otherwise: float) -> Any:
    """(C,) -> (G, D); a number if there is none."""
    return x.dtype.type(otherwise) if p is None else p.reshape(x.shape[2:])
