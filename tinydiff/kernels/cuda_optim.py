"""Steps of optimisers over lists of arrays, in one launch: the formulas of numpy_optim.py, one thread an element.

A kernel is handed a table by value: where each array is, and how long. So parameters, gradients and moments stay where
they are; a buffer that held all of them in one piece would save nothing, and every `p.data = ...` would break it. Such
an argument may have 4 KB, which is room for MOST tensors; a net with more takes another launch for each MOST of them.
What changes from step to step is read from device memory, so that a captured graph does not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy

from ..backend import Array
from .launch import THREADS, elementwise, raw

MOST = 80  # tensors a launch
BLOCK_ELEMENTS = 4 * THREADS  # that a block works on, where a tensor is as long


class TableKernel:
    """A kernel over many tensors, each of which has one array for every name that is declared, all of one shape and
    dtype, float32 or float64.

    In the code T is that dtype, `i` runs over the elements of a tensor, which is number blockIdx.y of the launch, and
    `numbers` are the tensor's own.
    """

    def __init__(
        self,
        name: str,
        arrays: str,
        body: str,
        *,
        scalars: str = "",
        numbers: int = 0,
        before: str = "",
        after: str = "",
        most_blocks: int = 1024,
    ):
        """arrays: "T* p, const T* g". scalars: ", int nesterov". numbers: how many a tensor; 0: all share them.
        body: for each i; before and after: for each thread. most_blocks: on a tensor; then each block does more."""
        self.name, self.arrays, self.scalars, self.numbers = name, arrays.split(", "), scalars, numbers
        self.before, self.body, self.after, self.most_blocks = before, body, after, most_blocks
        self.table = numpy.dtype(
            [("start", numpy.uint64, (len(self.arrays), MOST)), ("size", numpy.int64, MOST), ("row", numpy.int32, MOST)]
        )
        self.kernels = {char: raw(self.source(char), name) for char in "fd"}

    def source(self, char: str) -> str:
        columns = [f"{a} = ({a.rpartition(' ')[0]})table.start[{i}][blockIdx.y];" for i, a in enumerate(self.arrays)]
        return f"""
        typedef {"float" if char == "f" else "double"} T;
        const int THREADS = {THREADS};
        struct Table {{
          unsigned long long start[{len(columns)}][{MOST}];
          long long size[{MOST}];
          int row[{MOST}];
        }};
        extern "C" __global__ void __launch_bounds__({THREADS})
        {self.name}(Table table, const double* all_numbers{self.scalars}) {{
          {" ".join(columns)}
          const double* numbers = all_numbers + table.row[blockIdx.y] * {self.numbers};
          {self.before}
          for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < table.size[blockIdx.y];
               i += gridDim.x * (long long)THREADS) {{
            {self.body}
          }}
          {self.after}
        }}"""

    def __call__(self, columns: Sequence[Sequence[Array]], numbers: Array, *scalars: Any) -> None:
        """columns: for each declared name the arrays of all tensors. What is not const is changed in place.

        Errors: TypeError or ValueError unless the arrays of each tensor are all float32 or all float64, of one shape.
        """
        self._check(columns, numbers)
        work = [[cupy.ascontiguousarray(a) for a in column] for column in columns]
        for char in self.kernels:
            of_type = [row for row, a in enumerate(work[0]) if a.dtype.char == char and a.size]
            for start in range(0, len(of_type), MOST):
                self._launch(char, of_type[start : start + MOST], work, numbers, scalars)
        for declared, column, used in zip(self.arrays, columns, work):
            if not declared.startswith("const"):
                for a, w in zip(column, used):
                    if w is not a:
                        a[...] = w

    def _launch(self, char: str, rows: list[int], work: list[list[Array]], numbers: Array, scalars: Any) -> None:
        table = numpy.zeros((), self.table)
        table["start"][:, : len(rows)] = [[column[row].data.ptr for row in rows] for column in work]
        table["size"][: len(rows)] = [work[0][row].size for row in rows]
        table["row"][: len(rows)] = rows
        blocks = min(-(-int(table["size"].max()) // BLOCK_ELEMENTS), self.most_blocks)
        self.kernels[char]((blocks, len(rows)), (THREADS,), (table, numbers, *scalars))

    def _check(self, columns: Sequence[Sequence[Array]], numbers: Array) -> None:
        for arrays in zip(*columns, strict=True):
            if len({a.shape for a in arrays}) > 1:
                raise ValueError(f"kernel {self.name}: the arrays of a tensor have shapes {[a.shape for a in arrays]}")
            if len({a.dtype for a in arrays}) > 1 or arrays[0].dtype.char not in self.kernels:
                kinds = ", ".join(str(a.dtype) for a in arrays)
                raise TypeError(f"kernel {self.name} takes arrays all of float32 or all of float64, not of {kinds}")
        if numbers.dtype != "float64" or not numbers.flags.c_contiguous:
            raise TypeError(f"kernel {self.name}: the numbers must be contiguous float64, not {numbers.dtype}")


_SGD = TableKernel(
    "tinydiff_sgd",
    "T* p, const T* g",
    "p[i] -= T(numbers[0]) * (g[i] + T(numbers[1]) * p[i]);",
)
_MOMENTUM = TableKernel(
    "tinydiff_momentum",
    "T* p, const T* g, T* v",
    """
    T slope = g[i] + decay * p[i];
    v[i] = momentum * v[i] + slope;
    p[i] -= lr * (nesterov ? slope + momentum * v[i] : v[i]);
    """,
    scalars=", int nesterov",
    before="const T lr = T(numbers[0]), decay = T(numbers[1]), momentum = T(numbers[2]);",
)
_ADAM = TableKernel(
    "tinydiff_adam",
    "T* p, const T* g, T* m, T* v",
    """
    T parameter = p[i] * shrink, slope = g[i] + decay * parameter;
    T mean = m[i] + first_rest * (slope - m[i]), square = v[i] + second_rest * (slope * slope - v[i]);
    p[i] = parameter - rate * mean / (sqrt(square) + epsilon);
    m[i] = mean;
    v[i] = square;
    """,
    numbers=6,
    before="""
    const T rate = T(numbers[0]), epsilon = T(numbers[1]), shrink = T(numbers[2]), decay = T(numbers[3]);
    const T first_rest = T(1 - numbers[4]), second_rest = T(1 - numbers[5]);
    """,
)
_AVERAGE = TableKernel(
    "tinydiff_average", "T* average, const T* p", "average[i] += T(numbers[0]) * (p[i] - average[i]);"
)

# A block adds up its part in shared memory, in an order that is always the same, and leaves it in its own place.
_SQUARES = TableKernel(
    "tinydiff_squares",
    "const T* g",
    "sum += (double)g[i] * g[i];",
    scalars=", double* sums, int places",
    before="double sum = 0;",
    after="""
    __shared__ double part[THREADS];
    part[threadIdx.x] = sum;
    for (int half = THREADS / 2; half; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (!threadIdx.x) sums[table.row[blockIdx.y] * (long long)places + blockIdx.x] = part[0];
    """,
    most_blocks=64,
)
_SCALE = TableKernel("tinydiff_scale", "T* g", "g[i] *= T(numbers[0]);")
_NORM_AND_SCALE = elementwise(
    "float64 squares, float64 limit",
    "T norm, float64 factor",
    "double root = sqrt(squares), ratio = limit / (root + 1e-6); norm = root; factor = ratio > 1 ? 1 : ratio",
    "norm_and_scale",
)


def sgd_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    velocities: Sequence[Array] | None,
    numbers: Array,
    nesterov: bool,
) -> None:
    """v = momentum v + g;   p -= lr v, or lr (g + momentum v) with nesterov;
    without momentum p -= lr g. First g += decay p. numbers: [lr, decay, momentum].
    """
    if velocities is None:
        _SGD([ps, gs], numbers)
    else:
        _MOMENTUM([ps, gs, velocities], numbers, numpy.int32(nesterov))


def adam_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    numbers: Array,
) -> None:
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = shrink p - rate m / (sqrt(v) + eps)

    First g += decay p. numbers: [rate, eps, shrink, decay, b1, b2] for each parameter; the corrections for the number
    of its steps are in the first two.
    """
    _ADAM([ps, gs, ms, vs], numbers)


def average_step(averages: Sequence[Array], ps: Sequence[Array], numbers: Array) -> None:
    """average += rest (p - average). numbers: [rest]."""
    _AVERAGE([averages, ps], numbers)


def clip_norm(gs: Sequence[Array], max_norm: float) -> Array:
    """The norm of all arrays together, which is returned, brought to at most max_norm (and a millionth less)."""
    sums = cupy.zeros((len(gs), _SQUARES.most_blocks))
    _SQUARES([gs], sums, sums, numpy.int32(sums.shape[1]))
    norm, factor = cupy.empty((), numpy.result_type(*gs)), cupy.empty(())
    _NORM_AND_SCALE(sums.sum(), max_norm, norm, factor)
    _SCALE([gs], factor)
    return norm
