"""Arrays beside each other along the last axis, in C."""

from __future__ import annotations

import os

import numpy as np
import pytest

compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
from tinydiff import Tensor, grad, ops  # noqa: E402
from tinydiff.fast.cpu import shape  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(
        os.environ.get("TINYDIFF_FAST") == "0" or compiled.library("f") is None, reason="no kernels in C here"
    ),
]
REAL = ["float32", "float64"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of C that are called, from the first row on."""
    called: list[str] = []
    monkeypatch.setattr(shape, "WORTH_A_CALL", 0)
    for name in ("beside_in_c", "apart_in_c"):
        in_c = getattr(shape, name)
        monkeypatch.setattr(shape, name, lambda in_c=in_c, **given: called.append(in_c.name) or in_c(**given))
    return called


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("widths", [(1,), (1, 1), (3, 20), (16, 32), (33, 1, 64), (1000, 8)])
@pytest.mark.parametrize("lead", [(1,), (5, 3), (4, 7, 9)])
def test_as_numpy_and_back(lead, widths, parts, dtype, calls, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "threads_for", lambda _size: parts)
    draw = np.random.default_rng(0)
    xs = [draw.standard_normal((*lead, width)).astype(dtype) for width in widths]
    g = draw.standard_normal((*lead, sum(widths))).astype(dtype)
    leaves = [Tensor(x, requires_grad=True) for x in xs]
    y = ops.concatenate(leaves, axis=-1)
    np.testing.assert_array_equal(y.data, np.concatenate(xs, axis=-1))
    ends = np.cumsum(widths)
    for x, end, found in zip(xs, ends, grad(y, leaves, g)):
        np.testing.assert_array_equal(found.data, g[..., end - x.shape[-1] : end])
        assert found.data.flags.c_contiguous
    assert calls == ["put_beside", "take_apart"]


def test_what_is_for_numpy(calls: list[str]) -> None:
    """Another axis, another order in memory, two dtypes, no numbers: right all the same."""
    x, y = np.ones((6, 4), "float32"), np.zeros((6, 4), "float32")
    for xs, axis in (([x, y], 0), ([x.T, y.T], 1), ([x, y.astype("float64")], 1), ([x, y[:, :0]], 1), ([x[:0]] * 2, 1)):
        found = ops.concatenate([Tensor(a) for a in xs], axis=axis).data
        right = np.concatenate(xs, axis=axis)
        assert found.dtype == right.dtype
        np.testing.assert_array_equal(found, right)
    assert calls == []
    leaf = Tensor(x, requires_grad=True)
    g = np.asfortranarray(np.arange(48.0, dtype="float32").reshape(6, 8))
    np.testing.assert_array_equal(grad(ops.concatenate([leaf, leaf], axis=1), leaf, g)[0].data, g[:, :4] + g[:, 4:])
    assert calls == ["put_beside"]


def test_few_rows_are_for_numpy_and_many_for_c(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(shape, "beside_in_c", lambda **given: called.append(len(given["y"])) or False)
    for rows in (2047, 2048):
        ops.concatenate([Tensor(np.ones((rows, 2), "float32"))] * 2, axis=1)
    assert called == [2048]
