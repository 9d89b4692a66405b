"""Random numbers by counter, on the host: Philox4x64-10 (Salmon et al. 2011) as NumPy has it. See rng.py.

The arithmetic is NumPy's own whatever the backend; what comes out is brought to the device.
"""

from __future__ import annotations

import math

import numpy

from .. import backend
from ..backend import Array


def words(source: numpy.ndarray, rows: int, blocks: int, first: int) -> numpy.ndarray:
    """uint32 (rows, 8 blocks), of rows `first`, first + 1, ... of the draw at source = (seed, stream, step)."""
    seed, stream, step = (int(n) for n in source)
    counter = (first * blocks + (step << 64) - 1) % 2**256  # NumPy's Philox adds one before its first block
    bits = numpy.random.Philox(counter=counter, key=seed + (stream << 64))
    return bits.random_raw(rows * blocks * 4).view(numpy.uint32).reshape(rows, blocks * 8)


def random_normal(source: numpy.ndarray, rows: int, columns: int, first: int) -> Array:
    """Standard normals by Box and Muller, float32 (rows, columns)."""
    return _cut(normals_of(words(source, rows, -(-columns // 8), first)), columns)


def random_uniform(source: numpy.ndarray, rows: int, columns: int, first: int) -> Array:
    """Uniform on [0, 1), float32 (rows, columns)."""
    return _cut(uniforms_of(words(source, rows, -(-columns // 8), first)), columns)


def random_integers(source: numpy.ndarray, rows: int, columns: int, first: int, n: int) -> Array:
    """0 to n - 1, int64 (rows, columns)."""
    return _cut(integers_of(words(source, rows, -(-columns // 8), first), n), columns)


def normals_of(words: numpy.ndarray) -> numpy.ndarray:
    """Each pair of words as a pair of normals."""
    pairs = words.reshape(len(words), words.shape[1] // 2, 2)  # (rows, pairs, 2)
    u = pairs[:, :, 0].astype(numpy.float32)
    u += numpy.float32(0.5)
    u *= numpy.float32(2.0**-32)
    radius = numpy.sqrt(numpy.float32(-2) * numpy.log(u))
    angle = pairs[:, :, 1].astype(numpy.float32)
    angle *= numpy.float32(2 * math.pi * 2.0**-32)
    z = numpy.empty(pairs.shape, numpy.float32)
    numpy.multiply(radius, numpy.cos(angle), out=z[:, :, 0])
    numpy.multiply(radius, numpy.sin(angle), out=z[:, :, 1])
    return z.reshape(words.shape)


def uniforms_of(words: numpy.ndarray) -> numpy.ndarray:
    u = (words >> 8).astype(numpy.float32)
    u *= numpy.float32(2.0**-24)
    return u


def integers_of(words: numpy.ndarray, n: int) -> numpy.ndarray:
    return (words.astype(numpy.uint64) * numpy.uint64(n) >> numpy.uint64(32)).astype(numpy.int64)


def _cut(values: numpy.ndarray, columns: int) -> Array:
    """The first numbers of each row, on the device."""
    return backend.to_device(values[:, :columns])
