/*
Sums down columns: (n, L, C) -> (n, C).

A warp reads 32 neighbouring columns of one row, and each of its threads goes down its column. Then the sums of all
warps of the block are added to those of the first.

Depends on TYPE, THREADS, INDEX_BITS.
*/
#include "common.cuh"
#include "fold.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) sum_rows(const T* from, T* to, int length, int columns) {
  __shared__ T memory[THREADS];
  const int column = blockIdx.x * 32 + threadIdx.x % 32, row = threadIdx.x / 32, rows = THREADS / 32;
  T found = 0;
  if (column < columns)
    for (int l = row; l < length; l += rows) found += from[((Index)blockIdx.y * length + l) * columns + column];
  fold(found, memory, row, rows, 32);
  if (row == 0 && column < columns) to[blockIdx.y * columns + column] = found;
}
