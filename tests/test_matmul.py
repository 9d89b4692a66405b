"""The product of fast/ against NumPy's, for every order in memory that a view can have; the precisions of a GPU.

TINYDIFF_BACKEND=cupy python -m pytest tests/test_matmul.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import fast_kernels as kernels
import numpy as np
import pytest

import tinydiff
from tinydiff import backend, ops

on_cupy = pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="cuBLAS: TINYDIFF_BACKEND=cupy")
on_host = pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="the other side of this is on NumPy")


def draw(*shape: int, dtype: str = "float64") -> np.ndarray:
    a = np.random.default_rng([7, *shape]).standard_normal(shape)
    return (a + 1j if dtype.startswith("c") else a).astype(dtype)


# Views of a matrix (..., rows, columns): how a larger array must be made, and how the matrix is cut out of it.
VIEWS: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], Callable[[Any], Any]]] = {
    "in order": (lambda s: s, lambda a: a),
    "transposed": (lambda s: (*s[:-2], s[-1], s[-2]), lambda a: a.swapaxes(-1, -2)),
    "some columns": (lambda s: (*s[:-1], s[-1] + 3), lambda a: a[..., 1:-2]),
    "some rows, transposed": (lambda s: (*s[:-2], s[-1] + 2, s[-2]), lambda a: a[..., 1:-1, :].swapaxes(-1, -2)),
    "every second column": (lambda s: (*s[:-1], 2 * s[-1]), lambda a: a[..., ::2]),
    "every second row": (lambda s: (*s[:-2], 2 * s[-2], s[-1]), lambda a: a[..., ::2, :]),
    "rows backwards": (lambda s: s, lambda a: a[..., ::-1, :]),
    "batch backwards": (lambda s: s, lambda a: a[::-1] if a.ndim > 2 else a),
    "every second of the batch": (
        lambda s: (2 * s[0], *s[1:]) if len(s) > 2 else s,
        lambda a: a[::2] if a.ndim > 2 else a,
    ),
    "batch inside": (  # as the heads of an attention lie
        lambda s: (*s[:-3], s[-2], s[-3], s[-1]) if len(s) > 2 else s,
        lambda a: a.swapaxes(-3, -2) if a.ndim > 2 else a,
    ),
}
BATCHES = [((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((3,), ()), ((), (3,))]
BATCHES += [((2, 1), (1, 3)), ((1,), (4,)), ((0,), (0,))]
SIZES = [(4, 5, 6), (1, 5, 6), (4, 1, 6), (4, 5, 1), (1, 1, 1), (1, 5, 1), (0, 5, 6), (4, 0, 6), (4, 5, 0)]


def check(a: np.ndarray, b: np.ndarray, view_a: Any = None, view_b: Any = None) -> None:
    cut_a, cut_b = view_a or (lambda x: x), view_b or (lambda x: x)
    expected = cut_a(a) @ cut_b(b)
    got = kernels.matmul(cut_a(backend.to_device(a)), cut_b(backend.to_device(b)))
    assert got.dtype == expected.dtype and got.shape == expected.shape
    close = 1e-5 if expected.dtype.char in "fF" else 1e-13
    np.testing.assert_allclose(backend.to_host(got), expected, rtol=close, atol=10 * close)


@pytest.mark.parametrize("left", VIEWS)
@pytest.mark.parametrize("right", VIEWS)
def test_every_view_in_every_batch(each_backend: str, left: str, right: str) -> None:
    (whole_a, cut_a), (whole_b, cut_b) = VIEWS[left], VIEWS[right]
    for batch_a, batch_b in BATCHES:
        a, b = draw(*whole_a((*batch_a, 4, 5))), draw(*whole_b((*batch_b, 5, 6)))
        check(a, b, cut_a, cut_b)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_every_size_and_dtype(each_backend: str, n: int, k: int, m: int, dtype: str) -> None:
    for batch_a, batch_b in (((), ()), ((2,), (2,)), ((2,), ())):
        check(draw(*batch_a, n, k, dtype=dtype), draw(*batch_b, k, m, dtype=dtype))
        turned = draw(*batch_a, k, n, dtype=dtype), draw(*batch_b, m, k, dtype=dtype)
        check(*turned, lambda x: x.swapaxes(-1, -2), lambda x: x.swapaxes(-1, -2))


def test_two_dtypes_meet_in_the_wider(each_backend: str) -> None:
    check(draw(3, 4, dtype="float32"), draw(4, 5))
    check(draw(2, 3, 4), draw(4, 5, dtype="float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_may_be_written_into_an_array_that_is_there(each_fast_backend: str, dtype: str) -> None:
    a, b = draw(2, 3, 4, dtype=dtype), draw(4, 5, dtype=dtype)
    out = backend.xp.zeros((2, 3, 5), dtype)
    assert kernels.matmul(backend.to_device(a), backend.to_device(b), out=out) is out
    np.testing.assert_allclose(backend.to_host(out), a @ b, rtol=1e-5, atol=1e-5)


@on_cupy
@pytest.mark.parametrize("out", [((3, 4), "float32"), ((3, 5), "float64"), ((5, 3), "float32")])
def test_an_array_that_does_not_fit_the_product_is_refused(out: Any) -> None:
    shape, dtype = out
    wrong = backend.xp.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"out must be contiguous, of shape \(3, 5\) and float32, not"):
        kernels.matmul(
            *(backend.xp.ones(s, "float32") for s in ((3, 4), (4, 5))), out=wrong.T if shape == (5, 3) else wrong
        )


def test_stretched_views_are_read_as_they_are(each_backend: str) -> None:
    def stretch(x: Any) -> Any:
        return (np if isinstance(x, np.ndarray) else backend.xp).broadcast_to(x, (4, 5))

    row = draw(5)
    check(row, draw(5, 6), stretch)
    check(row, draw(4, 6), lambda x: stretch(x).swapaxes(-1, -2))


@on_cupy
def test_views_that_cublas_can_read_are_not_copied_and_one_call_makes_a_batch() -> None:
    cupy_on_cpu = pytest.importorskip("cupy_on_cpu")
    views = ["in order", "transposed", "some columns", "some rows, transposed", "every second row", "batch backwards"]
    for left in views:
        (whole_a, cut_a), (whole_b, cut_b) = VIEWS[left], VIEWS["transposed"]
        a, b = cut_a(backend.xp.ones(whole_a((3, 4, 5)))), cut_b(backend.xp.ones(whole_b((3, 5, 6))))
        kernels.matmul(a, b)
        cupy_on_cpu.reset()
        kernels.matmul(a, b)
        counters = cupy_on_cpu.counters()
        assert (counters["gemms"], counters["launches"]) == (1, 0), left


@on_cupy
def test_products_may_be_captured_on_any_stream_and_each_stream_has_its_workspace() -> None:
    import cupy

    from tinydiff.fast.cuda import cublas

    a, b = cupy.asarray(draw(2, 3, 4)), cupy.asarray(draw(2, 5, 4))
    expected = a.get() @ b.get().swapaxes(-1, -2)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        kernels.matmul(a, b.swapaxes(-1, -2))  # the handle and the workspace are made before
        stream.begin_capture()
        z = kernels.matmul(a, b.swapaxes(-1, -2))
        graph = stream.end_capture()
    z.fill(0)
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_allclose(z.get(), expected, rtol=1e-13)
    workspaces = cublas._handle().workspaces
    assert stream in workspaces and cupy.cuda.get_current_stream() in workspaces
    assert len({w.data.ptr for w in workspaces.values()}) == len(workspaces)
    before = len(workspaces)
    del stream, graph
    assert len(workspaces) == before - 1, "a workspace goes with its stream"


@on_cupy
def test_the_workspace_is_set_after_the_stream_which_would_take_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated cuBLAS works without one; a real one would allocate, at every replay of a graph."""
    import cupy

    from tinydiff.fast.cuda import cublas

    calls, real = [], cublas._library()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                calls.append((name, arguments))
                return getattr(real, name)(*arguments)

            return call

    monkeypatch.setattr(cublas, "_library", Spy)
    x, stream = cupy.ones((3, 3)), cupy.cuda.Stream(non_blocking=True)
    with stream:
        kernels.matmul(x, x)
        kernels.matmul(x, x)
    names = ["cublasSetStream_v2", "cublasSetWorkspace_v2", "cublasGemmStridedBatchedEx", "cublasGemmStridedBatchedEx"]
    assert [name for name, _ in calls] == names
    workspace = cublas._handle().workspaces[stream]
    assert calls[0][1][1] == stream.ptr and calls[1][1][1:] == (workspace.data.ptr, workspace.nbytes)
    assert workspace.nbytes >= 8 * 2**20 and workspace.data.ptr % 256 == 0


@on_cupy
def test_what_cublas_refuses_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinydiff.fast.cuda import cublas

    monkeypatch.setattr(cublas, "_pitch", lambda x: (0, 1))  # rows that overlap
    with pytest.raises(RuntimeError, match=r"cuBLAS refused the product of \(3, 4\) and \(4, 5\): invalid value \(7\)"):
        kernels.matmul(backend.xp.ones((3, 4)), backend.xp.ones((4, 5)))


# ---------------------------------------------------------------- precision


@on_cupy
def test_tf32_and_bf16_round_what_goes_in_and_are_off_unless_asked_for() -> None:
    def product(bits: int, dtype: str = "float32", transposed: bool = False) -> float:
        x = backend.xp.full((2, 8, 8), 1 + 2.0**-bits, dtype)
        return float(kernels.matmul(x, x.swapaxes(-1, -2) if transposed else x)[0, 0, 0])

    exact = {bits: 8 * (1 + 2.0**-bits) ** 2 for bits in (5, 8, 12)}
    assert all(product(bits) == pytest.approx(e, rel=1e-6) for bits, e in exact.items())
    with backend.precision("tf32"):  # ten bits behind the point
        assert product(12) == product(12, transposed=True) == 8 and product(8) == pytest.approx(exact[8], rel=1e-6)
        assert product(12, "float64") == pytest.approx(exact[12], rel=1e-12)
        with backend.precision("bf16"):  # seven
            assert product(8) == 8 and product(5) == pytest.approx(exact[5], rel=1e-6)
        assert product(8) > 8
    assert product(12) == pytest.approx(exact[12], rel=1e-6)


@on_cupy
def test_a_precision_that_is_set_stays_and_reaches_every_product() -> None:
    x = backend.xp.full((8, 8), 1 + 2.0**-12, "float32")
    image = tinydiff.Tensor(x.reshape(1, 8, 8, 1))
    before = backend.precision("tf32")
    try:
        assert backend.matmul_precision() == "tf32"
        assert ops.matmul(tinydiff.Tensor(x), x).numpy().max() == 8
        assert ops.conv2d(image, backend.xp.full((1, 1, 1, 1), 1 + 2.0**-12, "float32")).numpy().max() == 1
    finally:
        before.__exit__()
    assert backend.matmul_precision() == "float32"


@on_host
def test_numpy_has_no_such_precisions(each_backend: str) -> None:
    for name in ("tf32", "bf16"):
        with pytest.raises(ValueError, match=f"precision '{name}' needs the tensor .* '{each_backend}' multiplies in"):
            backend.precision(name)
    with backend.precision("float32"):
        assert backend.matmul_precision() == "float32"


def test_an_unknown_precision_names_the_choices(each_backend: str) -> None:
    with pytest.raises(ValueError, match="unknown precision 'fp8': choose one of float32, tf32, bf16"):
        backend.precision("fp8")
    assert backend.matmul_precision() == "float32"
