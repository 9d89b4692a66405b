"""The gradient of normalisation: one launch, and one that adds up the slopes of weights that the samples share.

cuda_norm.py says how the numbers are spread over threads. Each reads its positions twice, once for the sums over them
and once for the cotangent of x, and computes xhat, and the argument of silu, again from x: memory is what costs time.
"""

from __future__ import annotations

import cupy

from ..backend import Array
from . import cuda_norm
from .cuda_norm import PLACE, PLACE_PARAMETERS, SIZES
from .launch import FOLD, Kernel
from .numpy import normalize_backward as normalize_backward_in_arrays

_SLOPES = """
// Sums over positions, channel by channel: of the cotangent of u, of that times xhat, and of xhat.
struct Sums {
  Run g, gx, x;
  __device__ void operator+=(const Sums& other) {
    for (int i = 0; i < LANES; ++i) {
      g.lane[i] += other.g.lane[i];
      gx.lane[i] += other.gx.lane[i];
      x.lane[i] += other.x.lane[i];
    }
  }
};

// Sums over a group: of h, the cotangent of xhat, and of h xhat.
struct Means {
  T h, hx;
  __device__ void operator+=(const Means& other) { h += other.h; hx += other.hx; }
};

__device__ T silu_slope(T u) {
  T s = 1 / (1 + exp(-u));
  return s * (1 + u * (1 - s));
}
"""

_CHANNELS = """
    T scale = 0;
    Run offset = {}, factor = {}, bias = {};          // xhat = (x + offset) scale, u = xhat factor + bias
    if (busy) {
      const Index group = a * (all_runs / group_runs) + run / group_runs, at = (of_samples ? a * all_runs : 0) + run;
      scale = rstd[group];
      if (shift_or_null) offset = shift_or_null[a * all_runs + run];
      if (weight_or_null) {
        factor = weight_or_null[at];
        bias = bias_or_null[at];
      }
      for (int i = 0; i < LANES; ++i) {
        offset.lane[i] -= mean[group];
        if (!weight_or_null) factor.lane[i] = 1;
      }
    }
    Sums found = {};
"""

# One position and channel: xhat, and the cotangent of u.
_POSITION = """
          T xhat = (value.lane[i] + offset.lane[i]) * scale, slope = cotangent.lane[i];
          if (silu) slope *= silu_slope(xhat * factor.lane[i] + bias.lane[i]);
"""

_SUMS_OF_POSITIONS = (
    """
    if (busy)
      for (int l = begin + row; l < end; l += rows) {
        Run value = x[(a * length + l) * all_runs + run], cotangent = g[(a * length + l) * all_runs + run];
        for (int i = 0; i < LANES; ++i) {
"""
    + _POSITION
    + """
          found.g.lane[i] += slope;
          found.gx.lane[i] += slope * xhat;
          found.x.lane[i] += xhat;
        }
      }
"""
)

_SUMS_OF_PARTS = """
    if (busy)
      for (int p = row; p < gridDim.z; p += rows) found += ((const Sums*)parts)[(a * gridDim.z + p) * all_runs + run];
"""

_SUMS_MEMORY = """
    __shared__ Sums memory[THREADS / 2];
    __shared__ Means memory_of_means[THREADS];
"""

_FOLD_SUMS = """
    fold(found, memory, row, rows, runs);
"""

_NORMALIZE_BACKWARD = (
    """
    Means means = {};
    for (int i = 0; i < LANES; ++i) {
      means.h += factor.lane[i] * found.g.lane[i];
      means.hx += factor.lane[i] * found.gx.lane[i];
    }
    fold(means, memory_of_means, member, group_runs, 1);
    means = held_by(column - member, means, memory_of_means);
    const T count = T(length) * (group_runs * LANES);
    means.h /= count;
    means.hx /= count;
    if (first && blockIdx.z == 0) {
      if (dshift_or_null) {                           // the sum of dx below over the positions
        Run sum;
        for (int i = 0; i < LANES; ++i)
          sum.lane[i] = (factor.lane[i] * found.g.lane[i] - means.h * length - means.hx * found.x.lane[i]) * scale;
        dshift_or_null[a * all_runs + run] = sum;
      }
      for (int i = 0; i < LANES; ++i) {
        dweight.lane[i] = of_samples ? found.gx.lane[i] : dweight.lane[i] + found.gx.lane[i];
        dbias.lane[i] = of_samples ? found.g.lane[i] : dbias.lane[i] + found.g.lane[i];
      }
      if (slopes_or_null && (of_samples || a + gridDim.x >= samples)) {
        const Index kept = of_samples ? samples : gridDim.x, at = of_samples ? a : blockIdx.x;
        slopes_or_null[at * all_runs + run] = dweight;
        slopes_or_null[(kept + at) * all_runs + run] = dbias;
      }
    }
    if (busy)
      for (int l = begin + row; l < end; l += rows) {
        Run value = x[(a * length + l) * all_runs + run], cotangent = g[(a * length + l) * all_runs + run];
        for (int i = 0; i < LANES; ++i) {
"""
    + _POSITION
    + """
          value.lane[i] = (slope * factor.lane[i] - means.h - xhat * means.hx) * scale;
        }
        dx[(a * length + l) * all_runs + run] = value;
      }
"""
)

# A block takes every gridDim.x-th sample, and adds up the slopes of weight and bias over them.
_EACH_SAMPLE = """
    Run dweight = {}, dbias = {};
    for (Index a = blockIdx.x; a < samples; a += gridDim.x) {
"""

_BACKWARD_INPUTS = (
    "const Run* g, const Run* x, const T* mean, const T* rstd, const Run* shift_or_null, const Run* weight_or_null, "
    "const Run* bias_or_null, int of_samples, int silu, " + PLACE_PARAMETERS
)
_BACKWARD_OUTPUTS = ", Run* dx, Run* dshift_or_null, Run* slopes_or_null, Index samples"

_BACKWARD_WHOLE = Kernel(
    "normalize_backward",
    _BACKWARD_INPUTS + _BACKWARD_OUTPUTS,
    PLACE + _SUMS_MEMORY + _EACH_SAMPLE + _CHANNELS + _SUMS_OF_POSITIONS + _FOLD_SUMS + _NORMALIZE_BACKWARD + "}",
    FOLD + _SLOPES,
    SIZES,
)
_FIND_SUMS = Kernel(
    "slopes",
    _BACKWARD_INPUTS + ", Run* parts",
    PLACE
    + _SUMS_MEMORY
    + "const Index a = blockIdx.x;"
    + _CHANNELS
    + _SUMS_OF_POSITIONS
    + _FOLD_SUMS
    + "if (first) ((Sums*)parts)[(a * gridDim.z + blockIdx.z) * all_runs + run] = found;",
    FOLD + _SLOPES,
    SIZES,
)
_BACKWARD_PARTS = Kernel(
    "normalize_backward_parts",
    _BACKWARD_INPUTS + _BACKWARD_OUTPUTS + ", const Run* parts",
    PLACE + _SUMS_MEMORY + _EACH_SAMPLE + _CHANNELS + _SUMS_OF_PARTS + _FOLD_SUMS + _NORMALIZE_BACKWARD + "}",
    FOLD + _SLOPES,
    SIZES,
)

# A warp reads 32 neighbouring columns of one row, and each of its threads goes down its column.
_SUM_ROWS = Kernel(
    "sum_rows",
    "const T* from, T* to, int length, int columns",
    """
    const int column = blockIdx.x * 32 + threadIdx.x % 32, row = threadIdx.x / 32, rows = THREADS / 32;
    T found = 0;
    if (column < columns)
      for (int l = row; l < length; l += rows) found += from[((Index)blockIdx.y * length + l) * columns + column];
    __shared__ T memory[THREADS];
    fold(found, memory, row, rows, 32);
    if (row == 0 && column < columns) to[blockIdx.y * columns + column] = found;
    """,
    FOLD,
    SIZES[-1:],
)


def normalize_backward(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The cotangents of x, shift, weight and bias, None for what is None, from that of y. With silu g <- g silu'(u);

    x' = (h - mean(h) - xhat mean(h xhat)) rstd with h = g weight,   shift' = sum x',   weight' = sum g xhat,
    bias' = sum g
    """
    g, x, mean, rstd, shift, weight, bias = (
        None if p is None else cupy.ascontiguousarray(p) for p in (g, x, mean, rstd, shift, weight, bias)
    )
    plan = cuda_norm.plan_for(x, g, shift, weight, bias)
    if plan is None:
        return normalize_backward_in_arrays(g, x, mean, rstd, shift, weight, bias, silu)
    samples, length, groups, d = x.shape
    of_samples = weight is not None and weight.ndim == 2
    shared = weight is not None and not of_samples
    blocks = min(samples, cuda_norm.BUSY) if shared else samples
    dx = cupy.empty_like(x)
    dshift = None if shift is None else cupy.empty_like(shift)
    slopes = None if weight is None else cupy.empty((2, blocks, groups * d), x.dtype)  # of weight, of bias
    inputs = g, x, mean, rstd, shift, weight, bias, int(of_samples), int(silu), *plan.numbers(length)
    outputs = dx, dshift, slopes, samples
    if plan.parts == 1:
        _BACKWARD_WHOLE((blocks, plan.chunks, 1), plan.block, *inputs, *outputs, lanes=plan.lanes)
    else:
        parts = cupy.empty((samples, plan.parts, plan.all_runs, 3, plan.lanes), x.dtype)
        _FIND_SUMS((samples, plan.chunks, plan.parts), plan.block, *inputs, parts, lanes=plan.lanes)
        _BACKWARD_PARTS((blocks, plan.chunks, plan.parts), plan.block, *inputs, *outputs, parts, lanes=plan.lanes)
    if slopes is None:
        return dx, dshift, None, None
    if shared:
        slopes = _sum_rows(slopes)
    return dx, dshift, slopes[0], slopes[1]


def _sum_rows(a: Array) -> Array:
    """(n, L, C) -> (n, C)"""
    n, length, columns = a.shape
    if length == 1:
        return a[:, 0]
    sums = cupy.empty((n, columns), a.dtype)
    _SUM_ROWS((-(-columns // 32), n), SIZES[-1], a, sums, length, columns)
    return sums
