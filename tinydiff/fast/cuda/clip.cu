/*
All gradients, scaled so that their norm together is at most max_norm (clip_norm in tinydiff/optim.py).

    norm = sqrt(sum over all elements of g^2),    g <- g factor,    factor = min(1, max_norm / (norm + 1e-6))

Three launches: squares, clip_factor, scale; after the first, CuPy adds up the sums. Everything is added up in float64,
in an order that is always the same.

Depends on TYPE, TENSORS.
*/
#include "common.cuh"
#include "table.cuh"

struct SquaresTensor {
  const T* g;
  long long size;
  int index;
};

// Each block adds up its part of a tensor in shared memory, and writes the sum to its own place in sums (list, places).
extern "C" __global__ void __launch_bounds__(THREADS) squares(
    Table<SquaresTensor> table, double* sums, int places) {
  __shared__ double part[THREADS];
  const SquaresTensor& my = table.tensor[blockIdx.y];
  double sum = 0;
  FOR_EACH_ELEMENT(i, my.size) sum += (double)my.g[i] * my.g[i];
  part[threadIdx.x] = sum;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[my.index * (long long)places + blockIdx.x] = part[0];
}

// One thread computes norm and factor, from the sum of all squares.
extern "C" __global__ void __launch_bounds__(THREADS) clip_factor(
    const double* squares, double max_norm, T* norm, double* factor) {
  if (threadIdx.x > 0) return;
  const double root = sqrt(*squares), ratio = max_norm / (root + 1e-6);
  *norm = root;
  *factor = ratio > 1 ? 1 : ratio;
}

struct ScaleTensor {
  T* g;
  long long size;
  int index;
};
extern "C" __global__ void __launch_bounds__(THREADS) scale(Table<ScaleTensor> table, const double* factor) {
  const ScaleTensor& my = table.tensor[blockIdx.y];
  const T by = T(*factor);
  FOR_EACH_ELEMENT(i, my.size) my.g[i] *= by;
}
