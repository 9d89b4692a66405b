/*
Random numbers by counter (tinydiff/rng.py): the same words on every device, and the numbers made from them.

A counter-based generator has no state that changes: it scrambles a counter under a key. The key is (seed, stream), the
counter (block, step), and each block gives eight words of 32 bits. (seed, stream, step) is read from device memory, so
a captured graph draws other numbers at each replay.

One thread makes one block and writes its eight numbers. Each row begins with a new block, so the numbers of a sample do
not depend on how many samples are drawn; the numbers of the last block that a row does not need are dropped.

Depends on none of the macros.
*/
#include "common.cuh"

// Philox4x64-10, Salmon et al. 2011, section 3.3 and table 2: ten rounds of two wide multiplications, under a key that
// grows. origin: seed, stream, step.
__device__ void philox4x64(unsigned long long block, const unsigned long long* origin, unsigned int* words) {
  unsigned long long key_0 = origin[0], key_1 = origin[1];
  unsigned long long a = block, b = origin[2], c = 0, d = 0;
  for (int round = 0; round < 10; ++round) {
    unsigned long long a_high = __umul64hi(0xD2E7470EE14C6C93ull, a), a_low = 0xD2E7470EE14C6C93ull * a;
    unsigned long long c_high = __umul64hi(0xCA5A826395121157ull, c), c_low = 0xCA5A826395121157ull * c;
    a = c_high ^ b ^ key_0; b = c_low; c = a_high ^ d ^ key_1; d = a_low;
    key_0 += 0x9E3779B97F4A7C15ull; key_1 += 0xBB67AE8584CAA73Bull;
  }
  words[0] = (unsigned int)a; words[1] = (unsigned int)(a >> 32);
  words[2] = (unsigned int)b; words[3] = (unsigned int)(b >> 32);
  words[4] = (unsigned int)c; words[5] = (unsigned int)(c >> 32);
  words[6] = (unsigned int)d; words[7] = (unsigned int)(d >> 32);
}

// ---- eight words give eight numbers: the same operations in the same order as on the host, in float32

// Box and Muller 1958: for uniform u and v, sqrt(-2 log u) (cos 2 pi v, sin 2 pi v) are two normals.
__device__ void normals(const unsigned int* words, float* values) {
  for (int i = 0; i < 8; i += 2) {
    float radius = sqrtf(-2.0f * logf(((float)words[i] + 0.5f) * 2.3283064365386963e-10f));  // 2^-32
    float angle = (float)words[i + 1] * 1.4629180792671596e-09f;                             // 2 pi 2^-32
    values[i] = radius * cosf(angle);
    values[i + 1] = radius * sinf(angle);
  }
}

// The upper 24 bits of a word, as many as a float32 holds: on [0, 1), in steps of 2^-24.
__device__ void uniforms(const unsigned int* words, float* values) {
  for (int i = 0; i < 8; ++i) values[i] = (float)(words[i] >> 8) * 5.9604644775390625e-08f;
}

// 0 to n - 1: the whole part of n word / 2^32.
__device__ void integers(const unsigned int* words, unsigned int n, long long* values) {
  for (int i = 0; i < 8; ++i) values[i] = (long long)((unsigned long long)words[i] * n >> 32);
}

// Write block number `block` of the launch at its place in its row.
template <class Value>
__device__ void write(
    const Value* values, Value* target, long long block, long long blocks_per_row, long long columns) {
  const long long row = block / blocks_per_row, start = block % blocks_per_row * 8;
  for (int i = 0; i < 8 && start + i < columns; ++i) target[row * columns + start + i] = values[i];
}

extern "C" __global__ void __launch_bounds__(THREADS) random_normal(
    const unsigned long long* origin, unsigned long long first_block, long long blocks_per_row, long long columns,
    float* target, long long threads) {
  const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (thread >= threads) return;
  unsigned int words[8];
  float values[8];
  philox4x64(first_block + thread, origin, words);
  normals(words, values);
  write(values, target, thread, blocks_per_row, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS) random_uniform(
    const unsigned long long* origin, unsigned long long first_block, long long blocks_per_row, long long columns,
    float* target, long long threads) {
  const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (thread >= threads) return;
  unsigned int words[8];
  float values[8];
  philox4x64(first_block + thread, origin, words);
  uniforms(words, values);
  write(values, target, thread, blocks_per_row, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS) random_integers(
    const unsigned long long* origin, unsigned long long first_block, long long blocks_per_row, long long columns,
    unsigned int n, long long* target, long long threads) {
  const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x;
  if (thread >= threads) return;
  unsigned int words[8];
  long long values[8];
  philox4x64(first_block + thread, origin, words);
  integers(words, n, values);
  write(values, target, thread, blocks_per_row, columns);
}
