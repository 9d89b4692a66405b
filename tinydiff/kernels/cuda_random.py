"""Random numbers by counter, on the device: the words of numpy_random.py bit for bit, and what is made of them.

One thread makes one block of Philox4x64-10, eight words of 32 bits, and writes the numbers of it. Where the counter
stands, (seed, stream, step), is read from device memory: so a captured graph draws other numbers at each replay.
"""

from __future__ import annotations

from typing import Any

import cupy

from ..backend import Array
from .launch import elementwise

# Salmon et al. 2011, section 3.3 and table 2: ten rounds of two wide multiplications, under a key that grows.
PHILOX = """
__device__ void philox4x64(unsigned long long block, const unsigned long long* source, unsigned int* words) {
  unsigned long long key_0 = source[0], key_1 = source[1];
  unsigned long long a = block, b = source[2], c = 0, d = 0;
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
"""

# How eight words become eight numbers: the same operations in the same order as on the host, in float32.
NORMAL = """
__device__ void eight(const unsigned int* words, float* values, unsigned int) {
  for (int i = 0; i < 8; i += 2) {
    float radius = sqrtf(-2.0f * logf(((float)words[i] + 0.5f) * 2.3283064365386963e-10f));
    float angle = (float)words[i + 1] * 1.4629180792671596e-09f;
    values[i] = radius * cosf(angle);
    values[i + 1] = radius * sinf(angle);
  }
}
"""
UNIFORM = """
__device__ void eight(const unsigned int* words, float* values, unsigned int) {
  for (int i = 0; i < 8; ++i) values[i] = (float)(words[i] >> 8) * 5.9604644775390625e-08f;
}
"""
INTEGERS = """
__device__ void eight(const unsigned int* words, long long* values, unsigned int n) {
  for (int i = 0; i < 8; ++i) values[i] = (long long)((unsigned long long)words[i] * n >> 32);
}
"""

_BODY = """
  unsigned int made[8];
  philox4x64(first_block + i, &origin[0], made);
  {type} numbers[8];
  eight(made, numbers, highest);
  long long line = i / blocks_a_row, start = (i % blocks_a_row) * 8;
  for (int lane = 0; lane < 8 && start + lane < columns; ++lane) target[line * columns + start + lane] = numbers[lane];
"""


def _kernel(name: str, kind: str, dtype: str, numbers: str) -> Any:
    return elementwise(
        "raw uint64 origin, uint64 first_block, int64 blocks_a_row, int64 columns, uint32 highest",
        f"raw {dtype} target",
        _BODY.replace("{type}", kind),
        name,
        PHILOX + numbers,
    )


_RANDOM_NORMAL = _kernel("random_normal", "float", "float32", NORMAL)
_RANDOM_UNIFORM = _kernel("random_uniform", "float", "float32", UNIFORM)
_RANDOM_INTEGERS = _kernel("random_integers", "long long", "int64", INTEGERS)


def random_normal(source: Array, rows: int, columns: int, first: int) -> Array:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _drawn(_RANDOM_NORMAL, "float32", source, rows, columns, first, 0)


def random_uniform(source: Array, rows: int, columns: int, first: int) -> Array:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _drawn(_RANDOM_UNIFORM, "float32", source, rows, columns, first, 0)


def random_integers(source: Array, rows: int, columns: int, first: int, n: int) -> Array:
    """0 to n - 1, int64 (rows, columns)."""
    return _drawn(_RANDOM_INTEGERS, "int64", source, rows, columns, first, n)


def _drawn(kernel: Any, dtype: str, source: Array, rows: int, columns: int, first: int, n: int) -> Array:
    target, blocks = cupy.empty((rows, columns), dtype), -(-columns // 8)
    if target.size:
        kernel(source, first * blocks, blocks, columns, n, target, size=rows * blocks)
    return target
