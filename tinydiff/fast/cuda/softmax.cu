/*
softmax along rows (tinydiff/ops/softmax.py), after the scale and mask of attention (ops/attention.py).

    z = e^(s - max s) / sum e^(s - max s),    s = scale x + mask

Its adjoint: dz = z (ds - sum(z ds)) is a symmetric map of ds. So if g is the adjoint of z, the adjoint of x is

    scale z (g - sum(g z))

`across` neighbouring threads, a power of 2, share a row; the rest of the block takes other rows:

    thread   0 1 2 3 4 5 6 7      across = 4
    row      0 0 0 0 1 1 1 1      each thread takes every fourth number of its row

A thread reads its numbers once for the largest of the row, and once more, from the cache, to write their exponentials,
which it then divides by the sum of the row. It reads and writes only its own numbers, so the result may be written over
the argument.

Depends on TYPE, INDEX_BITS.
*/
#include "common.cuh"
#include "fold.cuh"

// Where a thread works.
struct Place {
  int place;   // of this thread among those of its row
  Index line;  // its row
  bool busy;   // the other threads take part in `fold`, but their results are not used
  Index at;    // where the row begins

  __device__ Place(int length, int across, Index lines)
      : place(threadIdx.x % across),
        line(blockIdx.x * (Index)(THREADS / across) + threadIdx.x / across),
        busy(line < lines),
        at(line * length) {}
};

// A NaN is never the largest, but it makes the sum NaN; so does a row of nothing but -inf.
struct Largest {
  T value;
  __device__ void operator+=(const Largest& other) {
    if (other.value > value) value = other.value;
  }
};

// A mask of bool says which numbers are allowed; another mask is added. Its row follows from the row of the scores,
// line = (sample, head, query); along an axis where the mask is broadcast, its stride is 0.
extern "C" __global__ void __launch_bounds__(THREADS) softmax(
    const T* x, T* z, T scale, const bool* allowed_or_null, const T* added_or_null, int heads, int queries,
    Index of_sample, Index of_head, Index of_query, int of_key, int length, int across, Index lines) {
  __shared__ Largest largest[THREADS];
  __shared__ T sums[THREADS];
  const Place my(length, across, lines);
  const Index head = my.line / queries;
  const Index mask = head / heads * of_sample + head % heads * of_head + my.line % queries * of_query;
  const T infinity = T(1) / T(0);
  auto score = [&](int key) {
    T value = x[my.at + key] * scale;
    if (added_or_null) value += added_or_null[mask + key * of_key];
    return allowed_or_null && !allowed_or_null[mask + key * of_key] ? -infinity : value;
  };

  Largest most = {-infinity};
  if (my.busy)
    for (int key = my.place; key < length; key += across) most += Largest{score(key)};
  fold(most, largest, my.place, across, 1);
  most = held_by(threadIdx.x - my.place, most, largest);

  T sum = 0;
  if (my.busy)
    for (int key = my.place; key < length; key += across) sum += z[my.at + key] = exp(score(key) - most.value);
  fold(sum, sums, my.place, across, 1);
  sum = held_by(threadIdx.x - my.place, sum, sums);

  if (my.busy)
    for (int key = my.place; key < length; key += across) z[my.at + key] /= sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) softmax_backward(
    const T* g, const T* z, T* x_adjoint, T scale, int length, int across, Index lines) {
  __shared__ T sums[THREADS];
  const Place my(length, across, lines);

  T sum = 0;
  if (my.busy)
    for (int key = my.place; key < length; key += across) sum += g[my.at + key] * z[my.at + key];
  fold(sum, sums, my.place, across, 1);
  sum = held_by(threadIdx.x - my.place, sum, sums);

  if (my.busy)
    for (int key = my.place; key < length; key += across)
      x_adjoint[my.at + key] = z[my.at + key] * (g[my.at + key] - sum) * scale;
}
