"""Products of matrices in C, which take the place of a BLAS that does not know the processor."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tinydiff import Tensor, grad, ops

product = pytest.importorskip("tinydiff.fast.cpu.product")
compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
threads = pytest.importorskip("tinydiff.fast.threads")
pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(
        os.environ.get("TINYDIFF_FAST") == "0" or compiled.library("f") is None, reason="no kernels in C here"
    ),
]
DTYPES = ["float32", "float64"]
SIZES = [(1, 7, 5), (3, 2, 1), (13, 40, 33), (50, 64, 64), (200, 3, 70), (33, 300, 4), (64, 2, 9), (700, 128, 96)]


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(dtype)


@pytest.fixture
def in_c_alone(monkeypatch: Any) -> None:
    """Every product is done in C; one that is left to the BLAS is an error."""
    monkeypatch.setattr(product, "vectors_unused", lambda: True)
    monkeypatch.setattr(product, "ENOUGH", 1)
    monkeypatch.setattr(product, "THINNEST", 1)
    monkeypatch.setattr(product, "matmul", None)


def transposed(a: np.ndarray) -> np.ndarray:
    """The same numbers, in the order of the transpose."""
    return np.ascontiguousarray(a.T).T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["x @ w", "g @ w.T", "x.T @ g"])
def test_the_three_products(way: str, size: tuple[int, int, int], dtype: str, in_c_alone: None) -> None:
    n, k, m = size
    x, y = normal(n, k, dtype=dtype), normal(k, m, dtype=dtype)
    left, right = {"x @ w": (x, y), "g @ w.T": (x, transposed(y)), "x.T @ g": (transposed(x), y)}[way]
    z = product.product(left, right)
    exact = x.astype(np.longdouble) @ y.astype(np.longdouble)
    bound = np.abs(x).astype(np.longdouble) @ np.abs(y) * 2 * (k + 1) * np.finfo(dtype).eps
    assert z.dtype == dtype and z.shape == (n, m) and (np.abs(z - exact) <= bound).all()


@pytest.mark.parametrize("size", [(4000, 200, 300), (40, 70, 900), (300, 1100, 1000)])
def test_the_number_of_parts_does_not_change_a_digit(
    size: tuple[int, int, int], in_c_alone: None, monkeypatch: Any
) -> None:
    """Parts of the rows of x, and of the columns of w where those are few or the weights many."""
    n, k, m = size
    x, y, g = normal(n, k), normal(k, m), normal(n, m)
    found = []
    for parts in (1, 2, 5):
        monkeypatch.setattr(compiled, "threads_for", lambda size, parts=parts: parts)
        found.append([product.product(*pair).tobytes() for pair in ((x, y), (g, y.T), (x.T, g))])
    assert found[0] == found[1] == found[2]


def test_the_longest_sums_lose_few_digits(in_c_alone: None) -> None:
    """Of numbers of one sign, whose rounding errors do not cancel; longer ones are for the BLAS."""
    k = product.LONGEST
    for left, right in [(np.full((16, k), 0.1, "float32"), np.ones((k, 16), "float32")),
                        (np.full((k, 16), 0.1, "float32").T, np.ones((k, 16), "float32"))]:  # fmt: skip
        np.testing.assert_allclose(product.product(left, right), k * np.float64(np.float32(0.1)), rtol=1e-4)
    with pytest.raises(TypeError):  # there is none here
        product.product(np.ones((16, k + 1), "float32"), np.ones((k + 1, 16), "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_orders_in_memory_other_dtypes_and_small_products_are_for_the_blas(dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(product, "vectors_unused", lambda: True)
    monkeypatch.setattr(product, "conv_in_c", None)
    monkeypatch.setattr(product, "weight_grad_in_c", None)
    x, y = normal(9, 8, dtype=dtype), normal(8, 7, dtype=dtype)
    np.testing.assert_allclose(product.product(x, y), x @ y, rtol=1e-5)  # small
    monkeypatch.setattr(product, "ENOUGH", 1)
    np.testing.assert_allclose(product.product(x, y), x @ y, rtol=1e-5)  # thin
    monkeypatch.setattr(product, "THINNEST", 1)
    for left, right in [(x[:, ::2], y[::2]), (x[::-1], y), (transposed(x), transposed(y)), (x + 0j, y + 0j)]:
        np.testing.assert_allclose(product.product(left, right), left @ right, rtol=1e-5)
    stacked = np.stack([x, x])
    np.testing.assert_allclose(product.product(stacked, np.stack([y, y])), stacked @ y, rtol=1e-5)


def test_a_linear_layer_and_its_gradients_by_them(in_c_alone: None) -> None:
    x, w, b, g = normal(6, 5), normal(5, 4), normal(4), normal(6, 4)
    leaves = [Tensor(a, requires_grad=True) for a in (x, w, b)]
    y = ops.linear(*leaves)
    found = [y, *grad(y, leaves, g)]
    for a, expected in zip(found, (x @ w + b, g @ w.T, x.T @ g, g.sum(0))):
        np.testing.assert_allclose(a.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_times_a_row(dtype: str) -> None:
    """The gradient of a layer by one sample, and by one in each of two batches."""
    x, g = normal(1, 5, dtype=dtype), normal(1, 7, dtype=dtype)
    with np.errstate(invalid="ignore"):
        x[0, 1], g[0, 2] = np.inf, np.nan
        np.testing.assert_array_equal(product.product(x.T, g), x.T @ g)
        np.testing.assert_array_equal(product.product(np.stack([x.T, -x.T]), g), np.stack([x.T @ g, -x.T @ g]))


def test_a_blas_that_knows_the_processor_keeps_its_products(monkeypatch: Any) -> None:
    monkeypatch.setattr(product, "vectors_unused", lambda: False)
    monkeypatch.setattr(product, "conv_in_c", None)
    x, y = normal(300, 300), normal(300, 300)
    np.testing.assert_allclose(product.product(x, y), x @ y, rtol=1e-4, atol=1e-4)


WIDE: dict[str, Any] = {"SIMD Extensions": {"found": ["X86_V3", "X86_V4"]}}
OLD_WIDE: dict[str, Any] = {"SIMD Extensions": {"found": ["AVX2", "AVX512F", "AVX512_SKX"]}}
NARROW: list[dict[str, Any]] = [{"SIMD Extensions": {"found": ["X86_V3"]}}, {"SIMD Extensions": {}}, {}]


@pytest.mark.parametrize("core, unused", [("Haswell", True), ("Zen", True), ("SkylakeX", False), (None, False)])
def test_which_blas_leaves_vectors_unused(core: str | None, unused: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(threads, "_core", lambda: core)
    for config, expected in [(WIDE, unused), (OLD_WIDE, unused), *((each, False) for each in NARROW)]:
        monkeypatch.setattr(np, "show_config", lambda mode, config=config: config)
        assert threads.vectors_unused.__wrapped__() is expected
