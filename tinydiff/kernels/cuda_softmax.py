"""softmax along rows, with what attention does to the scores before it, in one launch each way.

Some neighbouring threads, `across` of them, share a row, as many as give each about four numbers; the rest of the block
takes other rows. A thread reads its numbers once for the largest of the row, and once more, from the cache, to write
their exponentials, which it then divides by the sum of the row. It touches no numbers but its own, so the result may be
written over the argument.
"""

from __future__ import annotations

from typing import Any

import cupy
import numpy

from ..backend import Array
from .launch import FOLD, THREADS, Kernel
from .numpy import attention_weights as attention_weights_in_arrays
from .numpy import attention_weights_backward as attention_weights_backward_in_arrays
from .numpy import softmax as softmax_in_arrays

_PLACE = """
    const int place = threadIdx.x % across;
    const Index line = blockIdx.x * (Index)(THREADS / across) + threadIdx.x / across;
    const bool busy = line < lines;
    const Index at = line * length;                   // the first number of the row
"""

_LARGEST = """
struct Largest {
  T value;
  __device__ void operator+=(const Largest& other) { if (other.value > value) value = other.value; }
};
"""

# A row of the mask is found from that of the scores, (line) = (sample, head, query); a mask that has one of an axis for
# all has stride 0 there. A NaN is never the largest, but then it makes the sum one; so does a row of -inf alone.
_SOFTMAX = Kernel(
    "softmax",
    "const T* x, T* z, T scale, const bool* allowed_or_null, const T* added_or_null, int heads, int queries, "
    "Index of_sample, Index of_head, Index of_query, int of_key, int length, int across, Index lines",
    _PLACE
    + """
    __shared__ Largest largest[THREADS];
    __shared__ T sums[THREADS];
    const Index head = line / queries;
    const Index mask = head / heads * of_sample + head % heads * of_head + line % queries * of_query;
    const T infinity = T(1) / T(0);
    auto score = [&](int key) {
      T value = x[at + key] * scale;
      if (added_or_null) value += added_or_null[mask + key * of_key];
      return allowed_or_null && !allowed_or_null[mask + key * of_key] ? -infinity : value;
    };

    Largest most = {-infinity};
    if (busy)
      for (int key = place; key < length; key += across) most += Largest{score(key)};
    fold(most, largest, place, across, 1);
    most = held_by(threadIdx.x - place, most, largest);

    T sum = 0;
    if (busy)
      for (int key = place; key < length; key += across) sum += z[at + key] = exp(score(key) - most.value);
    fold(sum, sums, place, across, 1);
    sum = held_by(threadIdx.x - place, sum, sums);

    if (busy)
      for (int key = place; key < length; key += across) z[at + key] /= sum;
    """,
    FOLD + _LARGEST,
)

_SOFTMAX_BACKWARD = Kernel(
    "softmax_backward",
    "const T* g, const T* z, T* dx, T scale, int length, int across, Index lines",
    _PLACE
    + """
    __shared__ T sums[THREADS];
    T sum = 0;
    if (busy)
      for (int key = place; key < length; key += across) sum += g[at + key] * z[at + key];
    fold(sum, sums, place, across, 1);
    sum = held_by(threadIdx.x - place, sum, sums);
    if (busy)
      for (int key = place; key < length; key += across) dx[at + key] = z[at + key] * (g[at + key] - sum) * scale;
    """,
    FOLD,
)


def softmax(x: Array, axis: int) -> Array:
    """z = e^x / sum e^x along the axis; one launch along the last one."""
    if axis % x.ndim != x.ndim - 1 or not _is_taken(x):
        return softmax_in_arrays(x, axis)
    x = cupy.ascontiguousarray(x)
    z = cupy.empty_like(x)
    _launch(_SOFTMAX, x, x, z, 1, None, None, 1, 1, 0, 0, 0, 0)
    return z


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    if not _is_taken(s):
        return attention_weights_in_arrays(s, scale, mask)
    if mask is None:
        s = cupy.ascontiguousarray(s)
        _launch(_SOFTMAX, s, s, s, scale, None, None, 1, 1, 0, 0, 0, 0)
        return s
    shape = numpy.broadcast_shapes(s.shape, mask.shape)
    if shape != s.shape:
        s = cupy.broadcast_to(s, shape)
    s = cupy.ascontiguousarray(s)
    if s.ndim > 4:
        flat = -1, *shape[-3:]
        attention_weights(s.reshape(flat), scale, cupy.broadcast_to(mask, shape).reshape(flat))
        return s
    mask = cupy.ascontiguousarray(mask.astype("bool" if mask.dtype == "bool" else s.dtype, copy=False))
    samples, heads, queries, keys = (1,) * (4 - mask.ndim) + mask.shape
    strides = [
        0 if n == 1 else step
        for n, step in zip((samples, heads, queries, keys), (heads * queries * keys, queries * keys, keys, 1))
    ]
    allowed, added = (mask, None) if mask.dtype == "bool" else (None, mask)
    _, heads, queries, _ = (1,) * (4 - s.ndim) + s.shape
    _launch(_SOFTMAX, s, s, s, scale, allowed, added, heads, queries, *strides)
    return s


def attention_weights_backward(g: Array, p: Array, scale: float) -> Array:
    """The cotangent of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    if not _is_taken(p):
        return attention_weights_backward_in_arrays(g, p, scale)
    if p.shape != g.shape:  # values that have samples of their own for the same weights
        p = cupy.broadcast_to(p, g.shape)
    g, p = cupy.ascontiguousarray(g), cupy.ascontiguousarray(p)
    _launch(_SOFTMAX_BACKWARD, g, g, p, g, scale)
    return g


def _is_taken(x: Array) -> bool:
    """Complex numbers go in whole arrays, as CUDA's have no order; so do what has no rows."""
    return x.dtype.char in "fd" and x.ndim > 0 and x.size > 0


def _launch(kernel: Kernel, x: Array, *arguments: Any) -> None:
    """Give each row of x as many threads, a power of 2, as leave four numbers to each."""
    length = x.shape[-1]
    across = 1
    while across < THREADS and 4 * across < length:
        across *= 2
    lines = x.size // length
    kernel((-(-lines // (THREADS // across)),), THREADS, *arguments, length, across, lines)
