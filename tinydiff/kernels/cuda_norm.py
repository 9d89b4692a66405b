"""Normalisation in one launch, and how its numbers are spread over threads, forward and backward.

x is (A, L, G, D): samples of L positions and G groups of D channels. A block takes one sample and some neighbouring
groups, enough of them to fill a line of memory. A thread stays in one run of channels, its column, and goes along L. So
it reads what belongs to a channel (weight, bias, shift) once, and keeps what it adds up over L in registers:

    column   0 1 2 3 0 1 2 3      runs = 4 columns, here two groups of group_runs = 2
    row      0 0 0 0 1 1 1 1      each row of threads takes every rows-th position

Then the rows of threads are folded into the first, and its columns into one a group. Where the samples are so few and
so long that this would leave most of the device idle (batch norm has A = 1), the positions are cut into parts as well:
a first launch leaves the sums of each part in memory, and each block of a second one begins by folding those.

The order of every sum depends on shape and alignment alone, so the same numbers come out every time.
"""

from __future__ import annotations

from dataclasses import dataclass

import cupy

from ..backend import Array
from .launch import FOLD, Kernel, widest_run
from .numpy import normalize as normalize_in_arrays

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
        """The arguments of PLACE_PARAMETERS."""
        return length, self.part, self.all_runs, self.runs, self.group_runs


def plan_for(x: Array, *of_channels: Array | None) -> Plan | None:
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


PLACE_PARAMETERS = "int length, int part, int all_runs, int runs, int group_runs"

PLACE = """
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
    + PLACE_PARAMETERS
)

_NORMALIZE_WHOLE = Kernel(
    "normalize",
    "const Run* x, const Run* shift_or_null, " + _FORWARD_PARAMETERS,
    PLACE + _ORIGIN + _MOMENTS_OF_POSITIONS + _FOLD_MOMENTS + _NORMALIZE,
    FOLD + _MOMENTS,
    SIZES,
)
_FIND_MOMENTS = Kernel(
    "moments",
    "const Run* x, const Run* shift_or_null, T* parts, " + PLACE_PARAMETERS,
    PLACE
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
    PLACE + _ORIGIN + _MOMENTS_OF_PARTS + _FOLD_MOMENTS + _NORMALIZE,
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
    plan = plan_for(x, shift, weight, bias)
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
