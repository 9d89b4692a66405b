"""softmax, and the weights of attention with their gradient, on every backend, against the formula in NumPy."""

from __future__ import annotations

import os
from typing import Any

import fast_kernels as kernels
import numpy as np
import pytest

from tinydiff import backend, ops, tensor

on_cupy = pytest.mark.skipif(
    os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="CUDA is for CuPy: TINYDIFF_BACKEND=cupy"
)
REAL = ["float32", "float64"]


def draw(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def formula(s: Any, axis: int = -1) -> Any:
    """In float64, or complex numbers for the complex step."""
    s = s.astype(np.result_type(s.dtype, "float64"))
    e = np.exp(s - s.real.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def scores(s: Any, scale: float, mask: Any) -> Any:
    s = s.astype(np.result_type(s.dtype, "float64")) * scale
    if mask is None:
        return s
    return np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask


def weights(s: Any, scale: float, mask: Any = None) -> Any:
    device = [None if a is None else backend.to_device(a.copy()) for a in (s, mask)]
    return kernels.attention_weights(device[0], scale, device[1])


def close(got: Any, right: Any, dtype: str, digits: float = 30) -> None:
    assert got.shape == right.shape and got.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(backend.to_host(got), right, rtol=digits * eps, atol=np.finfo(dtype).tiny)


# ---------------------------------------------------------------- softmax


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 49, 64, 257, 1000, 5000])  # 1 to 256 threads per row
@pytest.mark.parametrize("dtype", REAL)
def test_softmax_of_rows(dtype, length, each_fast_backend):
    for lines in (1, 3, 70):
        x = draw(lines, length, dtype=dtype) * np.asarray(3, dtype)
        close(kernels.softmax(backend.to_device(x), -1), formula(x), dtype)


@pytest.mark.parametrize("dtype", [*REAL, "complex128"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_softmax_along_any_axis(axis, dtype, each_fast_backend):
    x = draw(7, 3, 20) + (1e-3j * draw(7, 3, 20, seed=1) if dtype == "complex128" else 0)
    x = x.astype(dtype)
    close(kernels.softmax(backend.to_device(x), axis), formula(x, axis), dtype)


def test_softmax_leaves_its_argument_alone_and_takes_any_order(each_fast_backend):
    x = backend.to_device(draw(6, 5, 40)).transpose(1, 2, 0)[::-1, ::2]
    before = backend.to_host(x).copy()
    close(kernels.softmax(x, -1), formula(before), "float64")
    assert (backend.to_host(x) == before).all()
    assert kernels.softmax(backend.to_device(draw(0, 3)), -1).shape == (0, 3)


@pytest.mark.parametrize("dtype", REAL)
def test_each_row_has_a_scale_of_its_own(dtype, each_fast_backend):
    """No row overflows, and none underflows as a whole beside one of larger numbers."""
    x = draw(6, 50, dtype=dtype) + np.array([[-1e30], [-1e4], [0], [1e4], [1e30], [700]], dtype)
    close(kernels.softmax(backend.to_device(x), -1), formula(x), dtype)


def test_rows_of_infinities_and_nans(each_fast_backend):
    inf, nan = np.inf, np.nan
    x = np.array([[0, -inf, 1, -inf], [-inf] * 4, [0, inf, 1, 2], [0, nan, 1, 2], [nan, 0, 1, 2], [3, 2, 1, 0]])
    with np.errstate(invalid="ignore"):
        z = backend.to_host(kernels.softmax(backend.to_device(x), -1))
    assert np.isnan(z[1:5]).all()
    np.testing.assert_allclose(z[[0, 5]], formula(x[[0, 5]]), rtol=1e-15)


# ---------------------------------------------------------------- attention

MASKS = {
    "none": ((2, 3, 5, 7), None),
    "for each score": ((2, 3, 5, 7), (2, 3, 5, 7)),
    "for all": ((2, 3, 5, 7), (5, 7)),
    "for all, in 4 axes": ((2, 3, 5, 7), (1, 1, 5, 7)),
    "of samples": ((2, 3, 5, 7), (2, 1, 5, 7)),
    "of heads": ((2, 3, 5, 7), (3, 5, 7)),
    "of the keys of a sample": ((2, 3, 5, 7), (2, 1, 1, 7)),
    "of keys": ((2, 3, 5, 7), (7,)),
    "of queries": ((2, 3, 5, 7), (2, 3, 5, 1)),
    "one number": ((2, 3, 5, 7), (1, 1, 1, 1)),
    "of rows": ((5, 7), (5, 7)),
    "three axes": ((3, 5, 7), (3, 1, 7)),
    "five axes": ((2, 1, 3, 5, 7), (2, 4, 1, 1, 7)),
    "more axes than the scores": ((5, 7), (3, 1, 7)),
    "more heads than the scores": ((2, 1, 5, 7), (3, 5, 7)),
    "long rows": ((1, 2, 3, 700), (3, 700)),
}


@pytest.mark.parametrize("kind", ["bool", *REAL])
@pytest.mark.parametrize(("shape", "mask"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", REAL)
def test_attention_weights(dtype, shape, mask, kind, each_fast_backend):
    s = draw(*shape, dtype=dtype)
    if mask is not None:
        mask = draw(*mask, seed=1)
        mask = mask > -0.5 if kind == "bool" else mask.astype(kind)
        if kind == "bool":
            mask[..., 0] = True  # something to attend to
    close(weights(s, 0.25, mask), formula(scores(s, 0.25, mask)), dtype)


def test_a_mask_in_another_order(each_fast_backend):
    s, mask = draw(2, 3, 5, 7), backend.to_device(draw(7, 10, seed=1)).T[::2]
    found = kernels.attention_weights(backend.to_device(s.copy()), 0.5, mask)
    close(found, formula(scores(s, 0.5, backend.to_host(mask))), "float64")
    turned = backend.to_device(s.transpose(3, 2, 1, 0).copy()).transpose(3, 2, 1, 0)
    close(kernels.attention_weights(turned, 0.5, mask), backend.to_host(found), "float64")


def test_a_query_with_nothing_to_attend_to_is_nan_and_the_others_are_not(each_fast_backend):
    mask = np.ones((4, 6), bool)
    mask[2] = False
    with np.errstate(invalid="ignore"):
        lost = np.isnan(backend.to_host(weights(draw(2, 1, 4, 6), 1.0, mask)))
    assert lost[:, :, 2].all() and lost.sum() == 2 * 6


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (5, 7), (2, 64), (1, 2, 3, 700), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", REAL)
def test_the_gradient_of_the_weights_equals_the_complex_step(dtype, shape, each_fast_backend):
    s, g, along = (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))
    p = weights(s, 0.3)
    found = kernels.attention_weights_vjp(backend.to_device(g.copy()), p, 0.3)
    assert found.shape == shape and found.dtype == dtype
    # The Jacobian is symmetric: the gradient under g is the change along g.
    right = formula(0.3 * (s.astype("float64") + 1e-20j * g)).imag / 1e-20
    digits = 30 * np.finfo(dtype).eps
    np.testing.assert_allclose(backend.to_host(found), right, rtol=digits, atol=digits)
    assert (backend.to_host(p) == backend.to_host(weights(s, 0.3))).all(), "the weights are left alone"


def test_values_with_samples_of_their_own(each_fast_backend):
    """The adjoint has more axes than the weights."""
    s, g = draw(5, 7), draw(2, 3, 5, 7)
    found = kernels.attention_weights_vjp(backend.to_device(g.copy()), weights(s, 1.0), 1.0)
    right = formula(s + 1e-20j * g).imag / 1e-20
    np.testing.assert_allclose(backend.to_host(found), right, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- launches


@on_cupy
def test_launches(each_fast_backend):
    emulator = pytest.importorskip("cupy_on_cpu", reason="counts the launches of the emulated CuPy")
    s, g = (backend.to_device(draw(2, 3, 5, 7, dtype="float32", seed=seed)) for seed in (0, 1))
    masks = [None, *(backend.to_device(draw(2, 1, 5, 7, dtype="float32") > 0).astype(t) for t in ("bool", "float32"))]
    with emulator.forbid_sync():
        for mask in masks:
            emulator.reset()
            p = kernels.attention_weights(s, 0.5, mask)
            assert emulator.kernels() == {"softmax": 1} and p is s
        emulator.reset()
        kernels.attention_weights_vjp(g, p, 0.5)
        kernels.softmax(g, -1)
        assert emulator.kernels() == {"softmax_backward": 1, "softmax": 1}
    counters = emulator.counters()
    assert counters["d2h"] == counters["h2d"] == counters["d2d"] == counters["syncs"] == 0


@on_cupy
def test_attention_is_its_products_and_one_launch_each_way(each_fast_backend):
    emulator = pytest.importorskip("cupy_on_cpu", reason="counts the launches of the emulated CuPy")
    q, k, v = (tensor(draw(2, 3, 8, 4, dtype="float32", seed=seed), requires_grad=True) for seed in range(3))
    emulator.reset()
    y = ops.attention(q, k, v)
    assert emulator.kernels()["softmax"] == 1 and emulator.counters()["gemms"] == 2
    y.sum().backward()
    assert emulator.kernels()["softmax_backward"] == 1 and emulator.counters()["gemms"] == 6
