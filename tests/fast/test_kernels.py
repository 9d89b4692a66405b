"""fast/cuda against fast/cpu: the same arguments give the same numbers. (The matrix compares both with the pages.)

TINYDIFF_BACKEND=cupy python -m pytest tests/fast/test_kernels.py
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import conftest
import fast_kernels as kernels
import numpy as np
import pytest

from tinydiff import backend
from tinydiff.ops.conv import Geometry

on_cupy = pytest.mark.skipif(
    os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="CUDA is for CuPy: TINYDIFF_BACKEND=cupy"
)
DTYPES = ["float32", "float64", "complex64", "complex128"]
REAL = DTYPES[:2]


def draw(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    a = rng.standard_normal(shape)
    return (a + 1j * rng.standard_normal(shape) if dtype.startswith("c") else a).astype(dtype)


def twins(name: str, *arguments: Any, atol: float | None = None) -> None:
    """Call both kernels of this name: the results, and the arguments that they change, must agree."""
    theirs = [backend.to_device(a.copy()) if isinstance(a, np.ndarray) else a for a in arguments]
    got = getattr(kernels, name)(*theirs)
    with contextlib.contextmanager(conftest.in_use)("numpy"):
        ours = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        expected = getattr(kernels, name)(*ours)
    if not isinstance(expected, tuple):
        got, expected = (got,), (expected,)
    for ours_now, theirs_now in zip((*expected, *ours), (*got, *theirs)):
        if isinstance(ours_now, (np.ndarray, np.generic)):
            assert theirs_now.dtype == ours_now.dtype and theirs_now.shape == ours_now.shape
            digits = np.finfo(ours_now.dtype).eps if ours_now.dtype.kind in "fc" else 0
            near = 30 * digits * np.abs(ours_now).max(initial=1) if atol is None else atol
            np.testing.assert_allclose(backend.to_host(theirs_now), ours_now, rtol=30 * digits, atol=near)
        else:
            assert theirs_now is ours_now or theirs_now == ours_now


# ---------------------------------------------------------------- convolution


GEOMETRIES = {
    "plain": Geometry((5, 7), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "pointwise": Geometry((4, 3), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "pointwise, padded": Geometry((4, 3), (1, 1), (1, 1), ((1, 0), (0, 2)), (1, 1), 1),
    "pointwise, strided": Geometry((5, 6), (1, 1), (2, 3), ((0, 0), (0, 0)), (1, 1), 1),
    "same": Geometry((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    "even kernel, padded on one side": Geometry((5, 6), (2, 4), (1, 1), ((0, 1), (1, 2)), (1, 1), 1),
    "strides that leave rows over": Geometry((8, 9), (3, 2), (2, 3), ((1, 0), (0, 1)), (1, 1), 1),
    "stride beyond the kernel": Geometry((9, 9), (2, 2), (3, 4), ((0, 0), (0, 0)), (1, 1), 1),
    "dilation": Geometry((9, 8), (3, 2), (1, 1), ((2, 1), (0, 3)), (2, 3), 1),
    "stride and dilation": Geometry((11, 10), (3, 3), (2, 3), ((3, 2), (1, 4)), (3, 2), 1),
    "kernel of the size of the image": Geometry((4, 5), (4, 5), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
    "padding beyond the image": Geometry((2, 1), (3, 3), (2, 1), ((4, 4), (5, 3)), (1, 1), 1),
    "one row": Geometry((1, 17), (1, 5), (1, 2), ((0, 0), (2, 2)), (1, 1), 1),
    "nothing": Geometry((2, 2), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1),
}


@on_cupy
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8])  # 4 float32 or 2 float64 are moved at once
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("dtype", REAL)
def test_im2col_and_col2im(geometry, channels, dtype):
    twins("im2col", draw(2, *geometry.size, channels, dtype=dtype), geometry)
    patches = draw(2, *geometry.out, *geometry.kernel, channels, dtype=dtype)
    twins("col2im", patches, draw(2, *geometry.size, channels, dtype=dtype), geometry)


@on_cupy
@pytest.mark.parametrize("shape", [(0, 6, 5, 3), (2, 6, 5, 0), (300, 6, 5, 1)])  # no images, no channels, many blocks
@pytest.mark.parametrize("dtype", DTYPES)
def test_im2col_and_col2im_of_any_batch_and_type(shape, dtype):
    geometry = GEOMETRIES["same"]
    twins("im2col", draw(*shape, dtype=dtype), geometry)
    patches = draw(shape[0], *geometry.out, *geometry.kernel, shape[3], dtype=dtype)
    twins("col2im", patches, draw(*shape, dtype=dtype), geometry)


@on_cupy
def test_im2col_and_col2im_of_arrays_that_are_not_contiguous_or_not_aligned():
    geometry, xp = GEOMETRIES["stride and dilation"], backend.xp
    x = xp.asarray(draw(4, *reversed(geometry.size), 4, dtype="float32"))
    flat = xp.asarray(draw(1 + 2 * 11 * 10 * 4, dtype="float32"))[1:]  # starts at 4 bytes beyond a multiple of 16
    for a in (x.transpose(0, 2, 1, 3), x.transpose(0, 2, 1, 3)[::-2, ..., :3], flat.reshape(2, 11, 10, 4)):
        patches = kernels.im2col(a, geometry)
        assert (patches == kernels.im2col(a.copy(), geometry)).all()
        turned = xp.asfortranarray(patches)
        x, y = xp.empty(a.shape, a.dtype), xp.empty(a.shape, a.dtype)
        kernels.col2im(turned, x, geometry)
        kernels.col2im(patches, y, geometry)
        assert (x == y).all()


# ---------------------------------------------------------------- activations


@on_cupy
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (4, 5), (1000,)])
@pytest.mark.parametrize("dtype", REAL)
def test_activations(shape, dtype):
    x = draw(*shape, dtype=dtype) * 3
    for name in ("sigmoid", "silu", "erf"):
        twins(name, np.asarray(x, dtype))
    twins("silu_vjp", np.asarray(draw(*shape, dtype=dtype, seed=1)), np.asarray(x, dtype))


@on_cupy
@pytest.mark.parametrize("dtype", REAL)
def test_activations_far_out(dtype):
    x = np.array([-1e4, -1000, -200, -80, -20, -0.0, 0, 1e-8, 20, 80, 200, 1000, 1e4, 1e30, np.nan], dtype)
    for name in ("sigmoid", "silu", "erf"):
        twins(name, x, atol=1e-30)
    twins("silu_vjp", np.ones_like(x), x, atol=1e-30)


@on_cupy
def test_activations_of_arrays_in_another_order():
    x = backend.to_device(draw(6, 5, 4)).transpose(2, 0, 1)[::-1, ::2]
    for name in ("sigmoid", "silu", "erf"):
        assert (getattr(kernels, name)(x) == getattr(kernels, name)(x.copy())).all()
    assert (kernels.silu_vjp(x, x[::-1]) == kernels.silu_vjp(x.copy(), x[::-1].copy())).all()


# ---------------------------------------------------------------- what is declined


@on_cupy
def test_a_function_that_declines_has_left_its_arguments_alone():
    from tinydiff.fast.cuda import activation, cublas, norm, softmax

    xp = backend.xp
    x, none, whole = xp.asarray(draw(2, 3, 4, 5, dtype="complex128")), xp.zeros((0, 3, 4, 5)), xp.ones((3, 3), int)
    large = xp.ones((1, 2, 1, 4097), "float32")
    statistics = xp.ones((2, 1, 4), "complex128")
    along_rows = lambda x, axis: softmax.softmax_cupy(x, axis=axis)  # noqa: E731
    calls = {
        "erf": (activation.erf_cupy, x),
        "sigmoid": (activation.sigmoid_cupy, x),
        "silu of integers": (activation.silu_cupy, whole),
        "matmul, complex": (cublas.matmul, x, x.swapaxes(-1, -2)),
        "matmul, integers": (cublas.matmul, whole, whole),
        "softmax along another axis": (along_rows, x.real.copy(), 1),
        "softmax, complex": (along_rows, x, -1),
        "attention_weights": (softmax.attention_weights, x, 0.5, None),
        "attention_weights of nothing": (softmax.attention_weights, none, 0.5, None),
        "attention_weights_backward": (softmax.attention_weights_vjp, x, x, 0.5),
        "normalize": (norm.normalize, x, None, None, None, 1e-5, True),
        "normalize of nothing": (norm.normalize, none, None, None, None, 1e-5, True),
        "normalize of a large group": (norm.normalize, large, None, None, None, 1e-5, True),
        "normalize_backward": (norm.normalize_vjp, x, x, statistics, statistics, None, None, None, True),
    }
    for name, (function, *arguments) in calls.items():
        before = [a.copy() if hasattr(a, "copy") else a for a in arguments]
        assert function(*arguments) is NotImplemented, name
        assert all((a == b).all() if hasattr(a, "all") else a is b for a, b in zip(arguments, before)), name
