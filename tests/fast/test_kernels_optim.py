"""The steps of optimisers over many arrays: fast/cuda/optim.py against fast/cpu/optim.py, and the latter, which works
in parts that may run at the same time, against itself in one piece, and against the formulas in optim.py.

TINYDIFF_BACKEND=cupy python -m pytest tests/fast/test_kernels_optim.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import conftest
import fast_kernels as kernels
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, optim
from tinydiff.fast.cpu import compiled

on_cupy = pytest.mark.skipif(
    os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="CUDA is for CuPy: TINYDIFF_BACKEND=cupy"
)
DTYPES = ["float32", "float64"]
# 0-d, empty, small, more than one part or block
SHAPES = [(), (0,), (1,), (7, 3), (2, 0, 4), (3000,), (33000,), (16500,)]


def draw(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def lists(dtype: str, shapes: Any = SHAPES) -> list[list[np.ndarray]]:
    """Parameters, gradients, first and second moments."""
    p, g, m = ([draw(shape, dtype, seed) for shape in shapes] for seed in range(3))
    return [p, g, m, [a * a for a in m]]


def adam_numbers(count: int, decay: float = 0.0) -> np.ndarray:
    """Other ones for each tensor."""
    rows = [[1e-2 / (i + 1), 1e-8 * (i + 1), 1 - 1e-3 * i, decay * i, 0.9, 0.999] for i in range(count)]
    return np.array(rows).reshape(count, 6)


CALLS: dict[str, Any] = {
    "sgd": lambda p, g, m, v: ("sgd_step", p, g, None, np.array([0.1, 0.0, 0.0]), False),
    "sgd decay": lambda p, g, m, v: ("sgd_step", p, g, None, np.array([0.1, 0.2, 0.0]), False),
    "momentum": lambda p, g, m, v: ("sgd_step", p, g, m, np.array([0.1, 0.0, 0.9]), False),
    "nesterov decay": lambda p, g, m, v: ("sgd_step", p, g, m, np.array([0.1, 0.2, 0.9]), True),
    "adam": lambda p, g, m, v: ("adam_step", p, g, m, v, adam_numbers(len(p))),
    "adam decay": lambda p, g, m, v: ("adam_step", p, g, m, v, adam_numbers(len(p), 0.1)),
    "adamw": lambda p, g, m, v: ("adam_step", p, g, m, v, adam_numbers(len(p)) * [1, 1, 0.9, 1, 1, 1]),
    "average": lambda p, g, m, v: ("average_step", p, g, np.array([0.01])),
    "clip": lambda p, g, m, v: ("clip_norm", p, 3.0),
    "clip nothing": lambda p, g, m, v: ("clip_norm", p, 1e6),
}


def mapped(fn: Any, arguments: Any) -> list[Any]:
    """fn of each array, in lists too."""
    return [
        mapped(fn, a) if isinstance(a, list) else fn(a) if hasattr(a, "dtype") else a for a in arguments
    ]  # fmt: skip


def flat(arguments: Any) -> list[Any]:
    return [x for a in arguments for x in (a if isinstance(a, list) else [a]) if hasattr(x, "dtype")]


def run(call: Any) -> list[np.ndarray]:
    """What the kernel of the backend in use returns, and leaves in its arguments."""
    name, *arguments = call
    arguments = mapped(lambda a: backend.to_device(a.copy()), arguments)
    returned = getattr(kernels, name)(*arguments)
    return [backend.to_host(a) for a in flat([returned, *arguments])]


def close(got: list[np.ndarray], expected: list[np.ndarray], precision: str | None = None) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        digits = 30 * np.finfo(precision or a.dtype).eps
        np.testing.assert_allclose(a, b, rtol=digits, atol=digits * np.abs(b).max(initial=1))


@on_cupy
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_both_backends_make_the_same_step(call: Any, dtype: str) -> None:
    got = run(call(*lists(dtype)))
    with contextlib.contextmanager(conftest.in_use)("numpy"):
        close(got, run(call(*lists(dtype))))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_step_in_parts_is_that_of_the_whole_bit_for_bit(
    numpy_backend: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(call(*lists("float32")))
    for parts in (2, 3, 7):
        monkeypatch.setattr(compiled, "threads_for", lambda _size, parts=parts: parts)
        for a, b in zip(run(call(*lists("float32"))), whole):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("call", [call for name, call in CALLS.items() if "clip" not in name])
def test_a_step_does_not_depend_on_where_its_arrays_lie(numpy_backend: str, call: Any) -> None:
    """To a bit, also when they lie close to each other in memory."""
    for n in (3, 5, 12, 21, 40, 67):
        values, seen = [draw((n,), "float32", seed) ** 2 for seed in range(4)], set()
        for gap in range(20):
            whole = np.zeros(4 * (n + gap), "float32")
            arrays = [whole[k * (n + gap) :][:n] for k in (2, 0, 3, 1)]
            for a, b in zip(arrays, values):
                a[:] = b
            name, *arguments = call(*([a] for a in arrays))
            getattr(optim, name)(*arguments)
            seen.add(b"".join(a.tobytes() for a in arrays))
        assert len(seen) == 1


def plainly(call: Any) -> list[Any]:
    """What the formula in optim.py leaves in the arguments."""
    name, *arguments = call
    getattr(optim, name).plain(*arguments)
    return flat(arguments)


def in_c() -> bool:
    return backend.active().fast is not None and compiled.library("f") is not None


AWKWARD: dict[str, Any] = {
    "two dtypes": lambda a: [x.astype("float64") if i % 2 else x for i, x in enumerate(a)],
    "one of float64": lambda a: [*a[:-1], a[-1].astype("float64")],
    "not contiguous": lambda a: [np.stack([x, x], -1)[..., 0] if i % 3 == 1 else x for i, x in enumerate(a)],
    "turned round": lambda a: [x[::-1] if x.ndim else x for x in a],
    "one": lambda a: a[3:4],
    "none": lambda a: [],
    "views of one": lambda a: [*a, *(x[:2] for x in a[3:])],
}


@pytest.mark.parametrize("awkward", AWKWARD.values(), ids=AWKWARD)
@pytest.mark.parametrize("call", [call for name, call in CALLS.items() if "clip" not in name])
def test_lists_that_do_not_fit_together(numpy_backend: str, call: Any, awkward: Any) -> None:
    """Some in C, others by the formula; two views of one array move one after the other."""
    found, known = (call(*map(awkward, lists("float32"))) for _ in "12")
    name, *arguments = found
    getattr(optim, name)(*arguments)
    close(flat(arguments), plainly(known), "float32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_go_through_a_step(numpy_backend: str, dtype: str, value: float) -> None:
    for call in CALLS.values():
        found, known = (lists(dtype) for _ in "12")
        for which in (found, known):
            for arrays in which[:2]:
                arrays[3][:, 1] = arrays[5][17] = value
        name, *arguments = call(*found)
        with np.errstate(invalid="ignore"):
            getattr(optim, name)(*arguments)
            for a, b in zip(flat(arguments), plainly(call(*known)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_gradients_are_clipped_by_their_true_norm(numpy_backend: str, dtype: str) -> None:
    """In float32 the squares of these would be inf and 0."""
    if not in_c():
        pytest.skip("the norm of the formula is in the dtype of the gradients")
    large = [np.full(1000, 1e25, dtype), np.zeros(3, dtype)]
    norm = optim.clip_norm(large, 2.0)
    assert norm.dtype == dtype and norm == pytest.approx(1e25 * 1000**0.5, rel=1e-6)
    np.testing.assert_allclose(large[0], 2 / 1000**0.5, rtol=1e-6)
    assert optim.clip_norm([np.full(10000, 1e-30, dtype)], 1.0) == pytest.approx(1e-28, rel=1e-6)


def test_the_norm_of_many_numbers_has_all_digits(numpy_backend: str) -> None:
    g = [np.full(3_000_001, 0.1, "float32"), np.full(7, 1.0, "float32")]
    assert optim.clip_norm(g, np.inf) == pytest.approx(
        (3_000_001 * float(np.float32(0.1)) ** 2 + 7) ** 0.5, rel=1e-7 if in_c() else 1e-5
    )
    assert (g[0] == np.float32(0.1)).all()


def test_moments_below_the_smallest_number_become_0(numpy_backend: str) -> None:
    """Computing with such numbers is a hundred times slower. They count where eps is 0."""
    if not in_c():
        pytest.skip("the formula keeps them")
    for eps, kept in ((1e-8, 0), (0.0, 1)):
        p, g, m, v = ([np.full(40, x, "float32")] for x in (1, 0, 1.2e-38, 1.176e-38))
        optim.adam_step(p, g, m, v, np.array([[1e-3, eps, 1, 0, 0.9, 0.999]]))
        assert ((m[0] != 0) == kept).all() and ((v[0] != 0) == kept).all() and (p[0] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_fast_step_is_that_of_the_formula(each_fast_backend: str, call: Any, dtype: str) -> None:
    fast = run(call(*lists(dtype)))
    before = backend.active()
    backend._install(dataclasses.replace(before, fast=None))
    try:
        close(fast, run(call(*lists(dtype))))
    finally:
        backend._install(before)


@on_cupy
def test_two_dtypes_and_more_tensors_than_a_table_holds() -> None:
    from tinydiff.fast.cuda import table

    shapes = [(3,), (2, 5)] * table.TENSORS
    narrow, wide = lists("float32", shapes), lists("float64", shapes)
    mixed = [[pair[i % 2] for i, pair in enumerate(zip(a, b))] for a, b in zip(narrow, wide)]
    for call in CALLS.values():
        got = run(call(*mixed))
        with contextlib.contextmanager(conftest.in_use)("numpy"):
            # The norm is over both, and NumPy adds up the squares of the narrow ones in their dtype.
            close(got, run(call(*mixed)), "float32" if call(*mixed)[0] == "clip_norm" else None)


@on_cupy
def test_arrays_in_another_order_are_changed_where_they_are() -> None:
    p, g, m, v = (draw((4, 5), "float64", seed) for seed in range(4))
    numbers = backend.to_device(adam_numbers(1))
    turned = [backend.to_device(a).T for a in (p, g, m, v * v)]
    straight = [backend.to_device(a.T.copy()) for a in (p, g, m, v * v)]
    for arrays in (turned, straight):
        kernels.adam_step(*([a] for a in arrays), numbers)
    assert all((a == b).all() for a, b in zip(turned, straight))


@on_cupy
def test_a_step_is_one_launch_and_clipping_is_four() -> None:
    cupy_on_cpu = pytest.importorskip("cupy_on_cpu")
    arrays = [[backend.to_device(a) for a in column] for column in lists("float32", [(5,), (3, 4), (2000,)] * 20)]
    numbers = backend.to_device(adam_numbers(60))
    calls = {
        "adam_step": (*arrays, numbers),
        "sgd_step": (*arrays[:3], numbers, True),
        "average_step": (*arrays[:2], numbers),
        "clip_norm": (arrays[0], 1.0),
    }
    for name, arguments in calls.items():
        cupy_on_cpu.reset()
        getattr(kernels, name)(*arguments)
        launches = cupy_on_cpu.counters()["launches"]
        # The sum of the partial sums is CuPy's, which takes one launch or two.
        assert launches == 1 if name != "clip_norm" else launches <= 5, (name, launches)


@on_cupy
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p, g: (p, g.astype("float64")), TypeError, "all of float32 or all of float64, not of float32, float64"),
        (lambda p, g: (p.astype("int32"), g.astype("int32")), TypeError, "not of int32, int32"),
        (lambda p, g: (p, g[:2]), ValueError, r"the arrays of a tensor have shapes \[\(3,\), \(2,\)\]"),
    ],
)
def test_the_launcher_refuses_arrays_that_do_not_fit(spoil: Any, error: Any, message: str) -> None:
    p, g = spoil(backend.xp.ones(3, "float32"), backend.xp.ones(3, "float32"))
    with pytest.raises(error, match=message):
        kernels.sgd_step([p], [g], None, backend.xp.ones(3), False)


def test_a_gradient_of_another_shape_is_an_error(each_fast_backend: str) -> None:
    p = Tensor(Rng(0).normal((3, 4)), requires_grad=True)
    p.grad = Tensor(Rng(0).normal((4, 3)))
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3, 4\) has a gradient of shape \(4, 3\)"):
        optim.Adam([p]).step()
