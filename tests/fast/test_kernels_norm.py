"""normalize and its gradient, on every backend, against the formula in NumPy and the complex step."""

from __future__ import annotations

import math
import os
from typing import Any

import fast_kernels as kernels
import numpy as np
import pytest

from tinydiff import backend

EPS = 1e-5
on_cupy = pytest.mark.skipif(
    os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="CUDA is for CuPy: TINYDIFF_BACKEND=cupy"
)
VIEWS = [
    (2, 6, 3, 4),
    (3, 49, 4, 8),  # group norm
    (2, 25, 32, 2),  # many small groups: a few of them in a block
    (2, 5, 7, 1),  # an odd number of groups of one channel
    (3, 7, 33, 2),  # the last block is not full
    (3, 5, 3, 15),
    (2, 40, 1, 6),  # one group
    (5, 1, 1, 7),  # layer norm
    (40, 1, 1, 64),
    (1, 30, 4, 1),  # batch norm
    (1, 500, 40, 1),
    (1, 1, 1, 1),
]
AFFINE = ["none", "shared", "of samples"]


def draw(shape: Any, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, *shape])
    a = rng.standard_normal(shape)
    return (a + 1j * rng.standard_normal(shape) if dtype.startswith("c") else a).astype(dtype)


def inputs(view: Any, shifted: bool, affine: str, dtype: str = "float64") -> list[np.ndarray | None]:
    """x, shift, weight, bias"""
    samples, _, groups, d = view
    channels = (samples, groups * d) if affine == "of samples" else (groups * d,)
    x = draw(view, dtype) * np.asarray(2, dtype) + np.asarray(1, dtype)
    shift = draw((samples, groups * d), dtype, 1) if shifted else None
    return [x, shift, *(None if affine == "none" else draw(channels, dtype, s) for s in (2, 3))]


def formula(x: Any, shift: Any, weight: Any, bias: Any, silu: bool) -> tuple[Any, Any, Any]:
    """y, mean, rstd in whole arrays; complex numbers are taken as those of the complex step."""
    of_channels = (-1, 1, *x.shape[2:])  # (1 or A, 1, G, D)
    z = x if shift is None else x + shift.reshape(of_channels)
    mean = z.mean(axis=(1, 3), keepdims=True)
    rstd = 1 / np.sqrt(((z - mean) ** 2).mean(axis=(1, 3), keepdims=True) + EPS)
    u = (z - mean) * rstd
    if weight is not None:
        u = u * weight.reshape(of_channels) + bias.reshape(of_channels)
    return u / (1 + np.exp(-u)) if silu else u, mean[..., 0], rstd[..., 0]


def exactly(arrays: list[np.ndarray | None]) -> list[Any]:
    return [None if a is None else a.astype("complex128" if a.dtype.kind == "c" else "float64") for a in arrays]


def adjoints(g: np.ndarray, arrays: list[Any], silu: bool) -> list[np.ndarray | None]:
    """What each input's adjoint has to be, from the complex step, one element after the other."""
    found: list[np.ndarray | None] = []
    for i, a in enumerate(arrays):
        if a is None:
            found.append(None)
            continue
        adjoint = np.empty(a.size)
        for j in range(a.size):
            moved = a.astype(complex)
            moved.reshape(-1)[j] += 1e-20j
            adjoint[j] = (
                g * formula(*(moved if k == i else b for k, b in enumerate(arrays)), silu)[0].imag
            ).sum() / 1e-20
        found.append(adjoint.reshape(a.shape))
    return found


def on_device(arrays: Any) -> list[Any]:
    return [None if a is None else backend.to_device(a) for a in arrays]


def close(got: Any, expected: Any, dtype: str, digits: float = 50) -> None:
    """`digits`: how many of the last place of the largest number."""
    for mine, right in zip(got, expected, strict=True):
        if right is None:
            assert mine is None
            continue
        assert mine.shape == right.shape and mine.dtype == dtype
        largest = max(1.0, float(np.abs(right).max(initial=0)))
        np.testing.assert_allclose(
            backend.to_host(mine), right, rtol=0, atol=digits * np.finfo(dtype).eps * largest, equal_nan=False
        )


def forward(arrays: Any, silu: bool) -> Any:
    x, shift, weight, bias = on_device(arrays)
    return kernels.normalize(x, shift, weight, bias, EPS, silu)


def backward(g: Any, arrays: Any, silu: bool) -> Any:
    x, shift, weight, bias = on_device(arrays)
    _, mean, rstd = kernels.normalize(x, shift, weight, bias, EPS, silu)
    return kernels.normalize_vjp(backend.to_device(g), x, mean, rstd, shift, weight, bias, silu)


# ---------------------------------------------------------------- values


every_form = [
    pytest.mark.parametrize("silu", [False, True], ids=["", "silu"]),
    pytest.mark.parametrize("shifted", [False, True], ids=["", "shift"]),
    pytest.mark.parametrize("affine", AFFINE),
]


def in_every_form(test: Any) -> Any:
    for mark in every_form:
        test = mark(test)
    return test


@in_every_form
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forward(dtype, view, affine, shifted, silu, each_fast_backend):
    arrays = inputs(view, shifted, affine, dtype)
    close(forward(arrays, silu), formula(*exactly(arrays), silu), dtype)


@in_every_form
@pytest.mark.parametrize("view", [v for v in VIEWS if math.prod(v) <= 700], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_equal_the_complex_step(dtype, view, affine, shifted, silu, each_fast_backend):
    arrays, g = inputs(view, shifted, affine, dtype), draw(view, dtype, 4)
    close(backward(g, arrays, silu), adjoints(g.astype("float64"), exactly(arrays), silu), dtype, 300)


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("view", [v for v in VIEWS if math.prod(v) > 700], ids=str)
def test_gradients_of_many_numbers_equal_the_complex_step_along_one_direction(view, affine, each_fast_backend):
    arrays, g = inputs(view, True, affine), draw(view, "float64", 4)
    found = backward(g, arrays, True)
    for i, a in enumerate(arrays):
        if a is not None:
            along = draw(a.shape, "float64", 5)
            moved = [b if k != i else a + 1e-20j * along for k, b in enumerate(arrays)]
            expected = (g * formula(*moved, True)[0].imag).sum() / 1e-20
            assert (backend.to_host(found[i]) * along).sum() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_silu_far_out(each_fast_backend):
    """Where e^-u overflows, silu(u) and its derivative are 0."""
    x, weight = draw((1, 20, 2, 4), "float32"), np.full(8, 1000, "float32")
    y, _, _ = forward([x, None, weight, weight - 1000], True)
    dx, _, dweight, dbias = backward(x, [x, None, weight, weight - 1000], True)
    for a in (y, dx, dweight, dbias):
        assert np.isfinite(backend.to_host(a)).all()
    close([y], [np.maximum(1000 * formula(x.astype("float64"), None, None, None, False)[0], 0)], "float32", 1e3)


# ---------------------------------------------------------------- large numbers, and numbers that are none


@pytest.mark.parametrize("view", [(2, 49, 4, 8), (1, 700, 5, 1), (7, 1, 1, 33)], ids=str)
def test_a_large_mean_costs_few_digits_and_none_on_a_gpu(view, each_fast_backend):
    """float32 has 7 digits, of which a mean of 10,000 leaves 3 to the differences in x. The exact y of this rounded x
    is well defined, and the CUDA kernel finds it, because it subtracts an element of x before anything else."""
    x = (1e4 + draw(view)).astype("float32")
    exact = formula(x.astype("float64"), None, None, None, False)
    close(forward([x, None, None, None], False)[:1], exact[:1], "float32", 50 if each_fast_backend == "cupy" else 3e4)
    shift = np.full((view[0], view[2] * view[3]), 1e4, "float32")
    exact = formula(draw(view), shift.astype("float64"), None, None, False)
    y, mean, _ = forward([draw(view, "float32"), shift, None, None], False)
    close([y], exact[:1], "float32", 50 if each_fast_backend == "cupy" else 3e4)
    if each_fast_backend == "cupy":
        close([mean], exact[1:2], "float32", 2)


@pytest.mark.parametrize("stranger", [np.nan, np.inf])
def test_a_group_with_a_nan_is_nan_and_the_others_are_not(stranger, each_fast_backend):
    x = draw((2, 10, 4, 3), "float32")
    x[1, 4, 2, 1] = stranger
    arrays = [x, None, None, None]
    with np.errstate(all="ignore"):
        for y in (forward(arrays, True)[0], backward(draw(x.shape, "float32", 1), arrays, True)[0]):
            lost = np.isnan(backend.to_host(y)).any(axis=(1, 3))
            assert lost[1, 2] and lost.sum() == 1


# ---------------------------------------------------------------- how x is spread over threads


@pytest.fixture
def plans(monkeypatch):
    """What the kernels are launched with, and a way to ask for blocks of less than a large array would get."""
    from tinydiff.fast.cuda import norm

    made, plan = [], norm.plan_for

    def remember(*arrays: Any) -> Any:
        made.append(plan(*arrays))
        return made[-1]

    def limits(part: int, busy: int) -> None:
        monkeypatch.setattr(norm, "PART", part)
        monkeypatch.setattr(norm, "BUSY", busy)

    monkeypatch.setattr(norm, "plan_for", remember)
    return limits, made


@on_cupy
@in_every_form
@pytest.mark.parametrize("view", [(1, 500, 40, 1), (2, 49, 3, 4), (3, 25, 32, 2), (1, 11, 1, 6)], ids=str)
def test_positions_in_parts(view, affine, shifted, silu, plans, each_fast_backend):
    limits, made = plans
    arrays, g = inputs(view, shifted, affine), draw(view, "float64", 4)
    arrays[0] += 1e5
    limits(2**14, 1024)
    whole = forward(arrays, silu), backward(g, arrays, silu)
    limits(16, 64)
    parts = forward(arrays, silu), backward(g, arrays, silu)
    assert {p.parts for p in made[:3]} == {1} and all(p.parts > 1 for p in made[3:])
    for mine, theirs in zip(parts, whole):
        close(mine, [None if a is None else backend.to_host(a) for a in theirs], "float64", 1e4)  # of x at 1e5


@on_cupy
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("busy", [1, 2, 3])
def test_blocks_that_take_several_samples(busy, affine, plans, each_fast_backend):
    limits, _ = plans
    arrays, g = inputs((7, 6, 3, 4), True, affine), draw((7, 6, 3, 4), "float64", 4)
    limits(2**14, busy)
    close(backward(g, arrays, True), adjoints(g, arrays, True), "float64", 300)


@on_cupy
def test_a_plan_fills_blocks_and_covers_all_of_x(each_fast_backend):
    from tinydiff.fast.cuda import norm

    for view, dtype in [(v, t) for v in VIEWS if math.prod(v) for t in ("float32", "float64")] + [
        ((256, 784, 4, 8), "float32"),
        ((1, 200_000, 64, 1), "float32"),
        ((1, 16_384, 32, 16), "float32"),
        ((50_000, 1, 1, 256), "float32"),
    ]:
        x = backend.xp.broadcast_to(backend.xp.zeros(1, dtype), view)
        plan = norm.plan_for(x)
        samples, length, groups, d = view
        if plan is None:
            assert d // math.gcd(d, 16 // x.itemsize) > 1024
            continue
        assert plan.all_runs * plan.lanes == groups * d and plan.group_runs * plan.lanes == d
        assert plan.runs % plan.group_runs == 0 and plan.runs <= plan.block <= 1024
        assert plan.chunks * plan.runs >= plan.all_runs > (plan.chunks - 1) * plan.runs
        assert plan.parts * plan.part >= length > (plan.parts - 1) * plan.part
        assert plan.runs * plan.lanes * x.itemsize >= 64 or plan.chunks == 1, "lines of memory are read in part"
        if math.prod(view) > 2**22:
            assert samples * plan.chunks * plan.parts * plan.block >= 2**17, "most of the device is idle"


@on_cupy
def test_arrays_that_are_not_contiguous_or_not_aligned(each_fast_backend):
    xp = backend.xp
    x, g = (
        xp.asarray(draw((4, 3, 6, 8), "float32", s)).transpose(1, 2, 0, 3)[::-1, ::2] for s in (0, 1)
    )  # (3, 3, 4, 8)
    shift = xp.asarray(draw((32, 3), "float32", 2)).T
    weight, bias = (xp.asarray(draw((64,), "float32", s))[::2] for s in (3, 4))
    flat = xp.asarray(draw((1 + x.size,), "float32", 5))[1:].reshape(x.shape)  # starts 4 bytes beyond a multiple of 16
    for a in (x, flat):
        y, mean, rstd = kernels.normalize(a, shift, weight, bias, EPS, True)
        again = kernels.normalize(a.copy(), shift.copy(), weight.copy(), bias.copy(), EPS, True)
        for mine, theirs in zip((y, mean, rstd), again):
            xp.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        found = kernels.normalize_vjp(g, a, mean, rstd, shift, weight, bias, True)
        copies = (p.copy() for p in (g, a, mean, rstd, shift, weight, bias))
        for mine, theirs in zip(found, kernels.normalize_vjp(*copies, True)):
            xp.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


@on_cupy
def test_inputs_are_left_alone_and_the_same_numbers_come_out_every_time(plans, each_fast_backend):
    limits, _ = plans
    for part, busy in ((2**14, 1024), (16, 64), (2**14, 2)):
        limits(part, busy)
        arrays = inputs((5, 30, 4, 8), True, "shared", "float32")
        device, g = on_device(arrays), backend.to_device(draw((5, 30, 4, 8), "float32", 4))
        runs = []
        for _ in range(2):
            y, mean, rstd = kernels.normalize(*device, EPS, True)
            runs.append((y, mean, rstd, *kernels.normalize_vjp(g, device[0], mean, rstd, *device[1:], True)))
        assert all((a == b).all() for a, b in zip(*runs))
        assert all((backend.to_host(a) == b).all() for a, b in zip(device, arrays))


@on_cupy
def test_types_do_not_mix(each_fast_backend):
    x, shift, weight, bias = on_device(inputs((2, 6, 3, 4), True, "shared", "float32"))
    with pytest.raises(TypeError, match="weight_or_null takes a C-contiguous CuPy array, all of float32"):
        kernels.normalize(x, shift, weight.astype("float64"), bias, EPS, False)
    with pytest.raises(TypeError, match="all of float32 or of float64"):
        kernels.normalize(x, shift.astype("int32"), weight, bias, EPS, False)


# ---------------------------------------------------------------- launches


@on_cupy
@pytest.mark.parametrize(
    ("view", "affine", "forward_launches", "backward_launches"),
    [
        ((8, 49, 4, 8), "none", ["normalize"], ["normalize_backward"]),
        ((8, 49, 4, 8), "shared", ["normalize"], ["normalize_backward", "sum_rows"]),
        ((8, 49, 4, 8), "of samples", ["normalize"], ["normalize_backward"]),
        ((100, 1, 1, 64), "shared", ["normalize"], ["normalize_backward", "sum_rows"]),
        ((1, 2**15, 4, 1), "shared", ["moments", "normalize"], ["sums", "normalize_backward"]),
    ],
    ids=str,
)
def test_launches(view, affine, forward_launches, backward_launches, each_fast_backend):
    emulator = pytest.importorskip("cupy_on_cpu", reason="counts the launches of the emulated CuPy")
    x, shift, weight, bias = on_device(inputs(view, True, affine, "float32"))
    g = backend.to_device(draw(view, "float32", 4))
    with emulator.forbid_sync():
        emulator.reset()
        _, mean, rstd = kernels.normalize(x, shift, weight, bias, EPS, True)
        assert emulator.kernels() == dict.fromkeys(forward_launches, 1)
        emulator.reset()
        kernels.normalize_vjp(g, x, mean, rstd, shift, weight, bias, True)
        assert emulator.kernels() == dict.fromkeys(backward_launches, 1)
    counters = emulator.counters()
    assert counters["d2h"] == counters["h2d"] == counters["d2d"] == counters["syncs"] == 0


@on_cupy
@pytest.mark.parametrize("channels", [1027, 4100])
def test_a_group_that_is_too_large_for_a_block_goes_through_the_page(channels):
    from tinydiff import Tensor, grad, ops

    x, g = draw((2, 3, channels)), draw((2, 3, channels), seed=1)
    t = Tensor(backend.to_device(x), True)
    y = ops.group_norm(t, groups=1, silu=True)
    (dx,) = grad(y, t, g)
    view = x.reshape(2, 3, 1, channels)
    np.testing.assert_allclose(y.numpy(), formula(view, None, None, None, True)[0].reshape(x.shape), rtol=1e-10)
    d = draw((2, 3, channels), seed=2)
    along = formula(view + 1e-20j * d.reshape(view.shape), None, None, None, True)[0].imag.reshape(x.shape) / 1e-20
    np.testing.assert_allclose((dx.numpy() * d).sum(), (g * along).sum(), rtol=1e-8)
