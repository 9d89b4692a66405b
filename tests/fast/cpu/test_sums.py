"""Sums and added rows in C, and where they are left to NumPy."""

from __future__ import annotations

import os
import shutil
from typing import Any

import numpy as np
import pytest

from tinydiff import ops

reduce = pytest.importorskip("tinydiff.fast.cpu.reduce")
pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="no fast versions: TINYDIFF_FAST=0"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_CC") == "0", reason="nothing is compiled: TINYDIFF_CC=0"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler here"),
]
DTYPES = ["float32", "float64"]


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(dtype)


def digits(dtype: str) -> float:
    return 4 * float(np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 31, 33, 100, 5000])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 127, 128, 129, 300])
def test_sums_of_rows(dtype: str, rows: int, width: int) -> None:
    x = normal(3, rows, width, dtype=dtype)
    z = reduce.sum_of_rows(x)
    expected = x.sum(axis=1, dtype=np.longdouble)
    scale = np.abs(x).sum(axis=1).max()
    assert z.dtype == dtype and z.shape == (3, width)
    np.testing.assert_allclose(z, expected.astype("float64"), rtol=0, atol=digits(dtype) * scale)
    for a in range(3):
        assert reduce.sum_of_rows(x[a : a + 1])[0].tobytes() == z[a].tobytes(), "a sample, whatever its batch"


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (0, 5, 0), (2, 0, 3), (0, 0, 0)])
def test_sums_of_nothing(shape: Any) -> None:
    z = reduce.sum_of_rows(np.zeros(shape, "float32"))
    assert z.shape == (shape[0], shape[2]) and not z.any()


def test_a_long_sum_loses_no_digits() -> None:
    """In float32 one after the other, this would be 3 % too small."""
    x = np.full((1, 2_000_000, 2), 0.1, np.float32)
    np.testing.assert_allclose(reduce.sum_of_rows(x), np.float64(np.float32(0.1)) * 2_000_000, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 200])
def test_nan_and_inf_stay_in_their_column(width: int) -> None:
    x = normal(2, 777, width)
    x[0, 500, 0], x[1, 776, width - 1] = np.nan, np.inf
    z = reduce.sum_of_rows(x)
    expected = np.isnan(z), np.isinf(z)
    assert expected[0].sum() == expected[1].sum() == 1 and np.isnan(z[0, 0]) and z[1, width - 1] == np.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, (0, 1), (1, 2), (0, 1, 2), (0, 2), (2, 3), (-3, -2), ()])
def test_sums_over_any_axes(monkeypatch: pytest.MonkeyPatch, dtype: str, keepdims: bool, axis: Any) -> None:
    called = []
    in_c = reduce.sum_in_c
    monkeypatch.setattr(reduce, "sum_in_c", lambda **given: called.append(given) or in_c(**given))
    x = normal(4, 9, 30, 40, dtype=dtype)
    found, known = (ops.sum(a, axis=axis, keepdims=keepdims) for a in (x, x.astype("float64")))
    assert found.shape == known.shape == x.sum(axis=axis, keepdims=keepdims).shape and found.dtype == dtype
    np.testing.assert_allclose(found, known, rtol=1e-5, atol=1e-3 if dtype == "float32" else 1e-12)
    expected = x.astype("longdouble").sum(axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(known, expected.astype("float64"), rtol=1e-12, atol=1e-10)
    assert len(called) == 2 * (axis in (0, 1, (0, 1), (1, 2), (0, 1, 2), (-3, -2)))


def test_what_is_left_to_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "sum_in_c", lambda **given: pytest.fail("in C"))
    x = normal(70, 90)
    for a in (x[:, ::2], x.T, x.astype("complex64"), x.astype("int64"), x[:2], x[:0]):
        np.testing.assert_allclose(ops.sum(a, axis=0), a.sum(axis=0), rtol=1e-5)
    many = normal(200, 5, 8)  # a sample alone is too small, so it is in a batch too
    assert ops.sum(many, axis=1)[3].tobytes() == ops.sum(many[3:4], axis=1)[0].tobytes()


# ---------------------------------------------------------------- rows added at an index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", "int8"])
@pytest.mark.parametrize("shape", [(6, 1), (6, 33), (6,), (6, 2, 3)])
@pytest.mark.parametrize("places", [(1,), (50,), (4, 9)])
def test_added_rows_are_numpys_bit_for_bit(monkeypatch: Any, dtype: str, kind: str, shape: Any, places: Any) -> None:
    called = []
    in_c = reduce.rows_in_c
    monkeypatch.setattr(reduce, "rows_in_c", lambda **given: called.append(given) or in_c(**given))
    index = np.random.default_rng(0).integers(0 if kind == "uint8" else -6, 6, places).astype(kind)
    x, z = normal(*places, *shape[1:], dtype=dtype), np.zeros(shape, dtype)
    np.add.at(z, index, x)
    found = ops.scatter_add(x, index=index, shape=shape)
    assert found.dtype == dtype and found.tobytes() == z.tobytes() and len(called) == 1


def test_places_that_are_not_there_are_named_and_nothing_is_written() -> None:
    x = normal(3, 5)
    for wrong in (4, -5, 2**40, -(2**63)):
        with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for axis 0 with size 4"):
            ops.scatter_add(x, index=np.array([0, wrong, 1]), shape=(4, 5))
    with pytest.raises(IndexError):
        ops.scatter_add(x, index=np.array([0, 0, 0]), shape=(0, 5))


def test_other_indices_are_for_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "rows_in_c", lambda **given: pytest.fail("in C"))
    x = normal(3, 5)
    cases: list[tuple[Any, Any]] = [
        (x, np.array([True, False, True, True])), (x, (np.array([0, 1, 1]),)), (x, slice(1, None)),
        (x[:, ::-1], np.array([0, 1, 1])), (x[:1], np.array([0, 1, 1])), (x[:0], np.zeros(0, "int64")),
        (x.astype("complex64"), np.array([0, 1, 1])), (x, np.array([0, 1, 1], "uint64")),
    ]  # fmt: skip
    for values, index in cases:
        z = np.zeros((4, 5), values.dtype)
        np.add.at(z, index, values)
        np.testing.assert_array_equal(ops.scatter_add(values, index=index, shape=(4, 5)), z)


def test_the_gradient_of_an_embedding(torch: Any) -> None:
    index, table = np.random.default_rng(1).integers(0, 20, (7, 11)), normal(20, 6)
    from tinydiff import grad, tensor

    weight = tensor(table, requires_grad=True)
    g = grad((ops.embedding(index, weight) ** 2).sum(), weight)[0]
    theirs = torch.tensor(table, requires_grad=True)
    (torch.nn.functional.embedding(torch.tensor(index), theirs) ** 2).sum().backward()
    np.testing.assert_allclose(g.numpy(), theirs.grad.numpy(), rtol=1e-6)
