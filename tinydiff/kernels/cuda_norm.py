"""Normalisation with few passes over memory: one launch forward, at most three backward.

x is (A, L, G, D): samples of L positions and G groups of D channels. A block takes one sample and some neighbouring
groups, enough of them to fill a line of memory. A thread stays in one run of channels, its column, and goes along L. So
it reads what belongs to a channel (weight, bias, shift) once, and keeps what it adds up over L in registers:

    column   0 1 2 3 0 1 2 3      runs = 4 columns, here two groups of group_runs = 2
    row      0 0 0 0 1 1 1 1      each row of threads takes every rows-th position

Then the rows of threads are folded into the first, and its columns into one a group. Where the samples are so few and
so long that this would leave most of the device idle (batch norm has A = 1), the positions are cut into parts as well:
a first launch leaves the sums of each part in memory, and each block of a second one begins by folding those.

The order of every sum depends on the shapes alone, so the same numbers come out every time and on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import cupy

from ..backend import Array
from .launch import FOLD, Kernel, widest_run
from .numpy import normalize as normalize_in_arrays
from .numpy import normalize_backward as normalize_backward_in_arrays

LINE = 128  # bytes: what a block reads side by side, at least
BUSY = 1024  # blocks that are enough to fill a device
PART = 2**14  # numbers that are worth a block of their own
SIZES = (32, 64, 128, 256, 512, 1024)  # of a block


@dataclass(frozen=True)
class Plan:
    """How an array is spread over threads."""

    lanes: int  # channels in a run
    group_runs: int  # runs in a group
    runs: int  # in a block: a multiple of that
    all_runs: int  # in all channels
    block: int  # threads
    chunks: int  # blocks side by side that cover all channels
    part: int  # positions in a block
    parts: int

    def numbers(self, length: int) -> tuple[int, ...]:
        """The arguments of _PLACE_PARAMETERS."""
        return length, self.part, self.all_runs, self.runs, self.group_runs


def _plan(x: Array, *of_channels: Array | None) -> Plan | None:
    """None for what these kernels do not take: no numbers, complex ones, or a group of more runs than a block has
    threads, which is more than 4,096 channels in float32 (of an odd number more than 1,024), half that in float64."""
    if x.size == 0 or x.dtype.char not in "fd":
        return None
    samples, length, groups, d = x.shape
    lanes = widest_run(d, x, *of_channels)
    together = max(1, min(groups, LINE // (d * x.itemsize)))
    group_runs, all_runs = d // lanes, groups * d // lanes
    runs = group_runs * together
    if runs > SIZES[-1]:
        return None
    block = next(n for n in SIZES if n >= runs and (n >= 512 or 4 * n >= runs * length))
    chunks = -(-groups // together)
    parts = max(1, min(length * runs * lanes // PART, BUSY // (samples * chunks)))
    part = -(-length // parts)
    return Plan(lanes, group_runs, runs, all_runs, block, chunks, part, -(-length // part))


_PLACE_PARAMETERS = "int length, int part, int all_runs, int runs, int group_runs"

_PLACE = """
    const int column = threadIdx.x % runs, row = threadIdx.x / runs, rows = THREADS / runs;
    const int run = blockIdx.y * runs + column;       // of all runs of a position
    const int member = column % group_runs;           // of its group
    const bool busy = row < rows && run < all_runs;   // the others fold as well, but nobody reads what they find
    const bool first = busy && row == 0;
    const int begin = blockIdx.z * part, end = min(length, begin + part);
"""

# ---------------------------------------------------------------- forward

# Mean and squared deviations are found together in one pass (Welford 1962), and joined in pairs (Chan et al. 1979). All
# is relative to the first number of the group, so a mean far from 0 costs no digits.
_MOMENTS = """
struct Moments {
  T count, mean, squares;       // of some numbers: how many, and the sum of their squared deviations from the mean
  __device__ void operator+=(const Moments& other) {
    if (other.count == 0) return;
    T all = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / all);
    squares += other.squares + apart * apart * (count * other.count / all);
    count = all;
  }
};
"""

_ORIGIN = """
    const Index a = blockIdx.x;
    T origin = 0, moved = 0;                          // the first number of the group, and its shift
    Run rest = {};                                    // of the shift of each channel
    if (busy) {
      origin = x[a * length * all_runs + run - member].lane[0];
      if (shift_or_null) {
        moved = shift_or_null[a * all_runs + run - member].lane[0];
        rest = shift_or_null[a * all_runs + run];
        for (int i = 0; i < LANES; ++i) rest.lane[i] -= moved;
      }
    }
    Moments found = {};
"""

_MOMENTS_OF_POSITIONS = """
    if (busy) {
      Moments lane[LANES] = {};
      T count = 0;
      for (int l = begin + row; l < end; l += rows) {
        Run value = x[(a * length + l) * all_runs + run];
        count += 1;
        T share = 1 / count;
        for (int i = 0; i < LANES; ++i) {
          T number = value.lane[i] - origin + rest.lane[i], apart = number - lane[i].mean;
          lane[i].mean += apart * share;
          lane[i].squares += apart * (number - lane[i].mean);
        }
      }
      for (int i = 0; i < LANES; ++i) {
        lane[i].count = count;
        found += lane[i];
      }
    }
"""

_MOMENTS_OF_PARTS = """
    if (busy && member == 0)
      for (int p = row; p < gridDim.z; p += rows)
        found += ((const Moments*)parts)[(a * gridDim.z + p) * (all_runs / group_runs) + run / group_runs];
"""

_FOLD_MOMENTS = """
    __shared__ Moments memory[THREADS];
    fold(found, memory, row, rows, runs);
    fold(found, memory, member, group_runs, 1);
"""

_NORMALIZE = """
    found = held_by(column - member, found, memory);
    if (!busy) return;
    const T scale = 1 / sqrt(found.squares / found.count + T(eps));
    if (row == 0 && member == 0 && blockIdx.z == 0) {
      mean[a * (all_runs / group_runs) + run / group_runs] = origin + moved + found.mean;
      rstd[a * (all_runs / group_runs) + run / group_runs] = scale;
    }
    Run factor, offset = {};
    for (int i = 0; i < LANES; ++i) factor.lane[i] = scale;
    if (weight_or_null) {
      const Index at = (of_samples ? a * all_runs : 0) + run;
      offset = bias_or_null[at];
      for (int i = 0; i < LANES; ++i) factor.lane[i] *= weight_or_null[at].lane[i];
    }
    for (int l = begin + row; l < end; l += rows) {
      Run value = x[(a * length + l) * all_runs + run];
      for (int i = 0; i < LANES; ++i) {
        T u = (value.lane[i] - origin + rest.lane[i] - found.mean) * factor.lane[i] + offset.lane[i];
        value.lane[i] = silu ? u / (1 + exp(-u)) : u;
      }
      y[(a * length + l) * all_runs + run] = value;
    }
"""

_FORWARD_PARAMETERS = (
    "const Run* weight_or_null, const Run* bias_or_null, int of_samples, T eps, int silu, Run* y, T* mean, T* rstd, "
    + _PLACE_PARAMETERS
)

_NORMALIZE_WHOLE = Kernel(
    "normalize",
    "const Run* x, const Run* shift_or_null, " + _FORWARD_PARAMETERS,
    _PLACE + _ORIGIN + _MOMENTS_OF_POSITIONS + _FOLD_MOMENTS + _NORMALIZE,
    FOLD + _MOMENTS,
    SIZES,
)
_FIND_MOMENTS = Kernel(
    "moments",
    "const Run* x, const Run* shift_or_null, T* parts, " + _PLACE_PARAMETERS,
    _PLACE
    + _ORIGIN
    + _MOMENTS_OF_POSITIONS
    + _FOLD_MOMENTS
    + """
    const Index at = (a * gridDim.z + blockIdx.z) * (all_runs / group_runs) + run / group_runs;
    if (first && member == 0) ((Moments*)parts)[at] = found;
    """,
    FOLD + _MOMENTS,
    SIZES,
)
_NORMALIZE_PARTS = Kernel(
    "normalize_parts",
    "const Run* x, const Run* shift_or_null, const T* parts, " + _FORWARD_PARAMETERS,
    _PLACE + _ORIGIN + _MOMENTS_OF_PARTS + _FOLD_MOMENTS + _NORMALIZE,
    FOLD + _MOMENTS,
    SIZES,
)


def normalize(
    x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """y = u, or silu(u), with u = (x + shift - mean) rstd weight + bias; also the mean of x + shift and
    rstd = 1 / sqrt(var + eps), (A, 1, G). x (A, L, G, D) has its statistics over axes 1 and 3; shift (A, G D) or None;
    weight and bias both (G D,), both (A, G D), or both None."""
    x, shift, weight, bias = (None if p is None else cupy.ascontiguousarray(p) for p in (x, shift, weight, bias))
    plan = _plan(x, shift, weight, bias)
    if plan is None:
        return normalize_in_arrays(x, shift, weight, bias, eps, silu)
    samples, length, groups, _ = x.shape
    y = cupy.empty_like(x)
    mean, rstd = (cupy.empty((samples, 1, groups), x.dtype) for _ in range(2))
    grid, numbers = (samples, plan.chunks, plan.parts), plan.numbers(length)
    rest = weight, bias, int(weight is not None and weight.ndim == 2), eps, int(silu), y, mean, rstd, *numbers
    if plan.parts == 1:
        _NORMALIZE_WHOLE(grid, plan.block, x, shift, *rest, lanes=plan.lanes)
    else:
        parts = cupy.empty((samples, plan.parts, groups, 3), x.dtype)
        _FIND_MOMENTS(grid, plan.block, x, shift, parts, *numbers, lanes=plan.lanes)
        _NORMALIZE_PARTS(grid, plan.block, x, shift, parts, *rest, lanes=plan.lanes)
    return y, mean, rstd


# ---------------------------------------------------------------- backward

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
    "const Run* bias_or_null, int of_samples, int silu, " + _PLACE_PARAMETERS
)
_BACKWARD_OUTPUTS = ", Run* dx, Run* dshift_or_null, Run* slopes_or_null, Index samples"

_BACKWARD_WHOLE = Kernel(
    "normalize_backward",
    _BACKWARD_INPUTS + _BACKWARD_OUTPUTS,
    _PLACE + _SUMS_MEMORY + _EACH_SAMPLE + _CHANNELS + _SUMS_OF_POSITIONS + _FOLD_SUMS + _NORMALIZE_BACKWARD + "}",
    FOLD + _SLOPES,
    SIZES,
)
_FIND_SUMS = Kernel(
    "slopes",
    _BACKWARD_INPUTS + ", Run* parts",
    _PLACE
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
    _PLACE + _SUMS_MEMORY + _EACH_SAMPLE + _CHANNELS + _SUMS_OF_PARTS + _FOLD_SUMS + _NORMALIZE_BACKWARD + "}",
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
    plan = _plan(x, g, shift, weight, bias)
    if plan is None:
        return normalize_backward_in_arrays(g, x, mean, rstd, shift, weight, bias, silu)
    samples, length, groups, d = x.shape
    of_samples = weight is not None and weight.ndim == 2
    shared = weight is not None and not of_samples
    blocks = min(samples, BUSY) if shared else samples
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
