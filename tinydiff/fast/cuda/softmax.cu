/*
softmax along rows (tinydiff/ops/softmax.py), with what attention does to the scores before it (ops/attention.py).

    z = e^(s - max s) / sum e^(s - max s),    s = scale x + mask

Its adjoint: dz = z (ds - sum(z ds)), a symmetric map of ds, so with g the adjoint of z that of x is

    scale z (g - sum(g z))

Some neighbouring threads, `across` of them, a power of 2, share a row; the rest of the block takes other rows:

    thread   0 1 2 3 4 5 6 7      across = 4
    row      0 0 0 0 1 1 1 1      each thread takes every fourth number of its row

A thread reads its numbers once for the largest of the row, and once more, from the cache, to write their exponentials,
which it then divides by the sum of the row. It touches no numbers but its own, so the result may be written over the
argument.

Depends on TYPE, INDEX_BITS.
*/
#include "common.cuh"
#include "fold.cuh"

// Where a thread works.
struct Place {
  int place;   // of this thread among those of its row
  Index line;  // its row
  bool busy;   // the others fold as well, but nobody reads what they find
  Index at;    // where the row begins

  __device__ Place(int length, int across, Index lines)
      : place(threadIdx.x % across),
        line(blockIdx.x * (Index)(THREADS / across) + threadIdx.x / across),
        busy(line < lines),
        at(line * length) {}
};

// A NaN is never the largest, but then it makes the sum one; so does a row of -inf alone.
struct Largest {
  T value;
  __device__ void operator+=(const Largest& other) {
    if (other.value > value) value = other.value;
  }
};

// A mask of bool says which numbers are allowed, another is added. Its row is found from that of the scores,
// line = (sample, head, query): a mask that has one of an axis for all has stride 0 there.
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
