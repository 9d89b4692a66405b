"""Random numbers in C: the words of tinydiff/rng.py bit for bit, and its normals to the last digits of log and cos."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import kolmogorov
import numpy as np
import pytest

from tinydiff import rng

fast = pytest.importorskip("tinydiff.fast.cpu.random")
pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="no fast versions: TINYDIFF_FAST=0"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_CC") == "0", reason="nothing is compiled: TINYDIFF_CC=0"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here"),
]
END = 2**64 - 1
ADDRESSES = [(0, 0, 0), (7, 0, 3), (END, 0, 0), (1, END, 2**40), (2**63 + 5, 11, END)]  # seed, stream, step


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("columns", [*range(1, 18), 1000])
@pytest.mark.parametrize("rows, offset", [(1, 0), (5, 0), (37, 1000), (3, 2**40)])
def test_the_words_are_those_of_the_page(address: Any, columns: int, rows: int, offset: int) -> None:
    place = (np.array(address, np.uint64), rows, columns, offset)
    np.testing.assert_array_equal(fast.random_uniform(*place), rng.random_uniform.plain(*place))
    for n in (1, 10, 2**31):
        np.testing.assert_array_equal(fast.random_integers(*place, n), rng.random_integers.plain(*place, n))
    found, known = fast.random_normal(*place), rng.random_normal.plain(*place)
    assert found.dtype == known.dtype == "float32" and found.shape == known.shape == (rows, columns)
    np.testing.assert_allclose(found, known, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_numbers(shape: Any) -> None:
    source = np.zeros(3, np.uint64)
    assert fast.random_normal(source, *shape, 0).shape == fast.random_integers(source, *shape, 0, 5).shape == shape


def test_a_counter_of_more_bits_is_for_the_page() -> None:
    place = (np.array([3, 4, 5], np.uint64), 2, 17, 2**62)  # three blocks in a row: the counter passes 2^63
    assert fast.random_uniform(*place) is NotImplemented
    assert rng.random_uniform(*place).tobytes() == rng.random_uniform.plain(*place).tobytes()


def normals(words: np.ndarray) -> np.ndarray:
    z = np.empty(128, np.float32)
    assert fast.normals_in_c(words=words, z=z)
    return z


def exact(words: np.ndarray) -> np.ndarray:
    """In float64, of the float32 uniform and angle that rng.py has."""
    pairs = words.reshape(-1, 2)
    u = ((pairs[:, 0].astype(np.float32) + np.float32(0.5)) * np.float32(2**-32)).astype(np.float64)
    angle = (pairs[:, 1].astype(np.float32) * np.float32(2 * math.pi * 2**-32)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()


def test_normals_have_the_digits_of_float32() -> None:
    """Of random words, and of those near the ends and near the right angles, where a number is close to 0."""
    draw = np.random.default_rng(0)
    ends = np.array([0, 1, 2, 127, 128, 2**32 - 1, 2**32 - 128, 2**32 - 129, 2**32 - 1000], np.uint32)
    turns = np.array([2**29 * k + d for k in range(8) for d in (0, 1, 300, 2**28)], np.uint32)
    for i in range(1000):
        words = draw.integers(0, 2**32, 128, dtype=np.uint32)
        words[::2][draw.integers(0, 64, 16)] = draw.choice(ends, 16)
        words[1::2][draw.integers(0, 64, 16)] = draw.choice(turns, 16)
        np.testing.assert_allclose(normals(words), exact(words), rtol=3e-7, atol=5e-7, err_msg=str(i))


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 1])
def test_the_rarest_words(word: int) -> None:
    z = normals(np.full(128, word, np.uint32))
    assert np.isfinite(z).all() and abs(z).max() < 6.8
    largest = math.sqrt(66 * math.log(2))  # sqrt(-2 log 2^-33), the radius of word 0
    assert word or z.max() == pytest.approx(largest, rel=2e-7)


def test_a_number_is_the_same_at_every_place_of_a_group() -> None:
    """Of 16 blocks: so it is the same bits, however the compiler cuts the loop into vectors."""
    words = np.random.default_rng(1).integers(0, 2**32, 128, dtype=np.uint32)
    expected = normals(words)
    for shift in range(2, 128, 2):
        assert np.roll(normals(np.roll(words, shift)), -shift).tobytes() == expected.tobytes()


@pytest.mark.parametrize("seed", [0, 1, END])
def test_normals_are_normal(seed: int) -> None:
    z = fast.random_normal(np.array([seed, 0, 0], np.uint64), 200, 1000, 0).astype(np.float64)
    n = z.size
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # E z^k and the variance of z^k
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(spread / n)
    distance = kolmogorov.distance(z, np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2))))
    assert distance < kolmogorov.threshold(n)
