"""The launcher of kernels in CUDA: what it refuses, and when it counts in 64 bits."""

from __future__ import annotations

import os

import numpy as np
import pytest

if os.environ.get("TINYDIFF_BACKEND") != "cupy":
    pytest.skip("kernels in CUDA run on CuPy: TINYDIFF_BACKEND=cupy", allow_module_level=True)

import cupy

from tinydiff import kernels
from tinydiff.kernels import launch
from tinydiff.ops.conv import Geometry


@pytest.fixture
def kernel():
    """y = scale x where it is allowed: a kernel with a parameter of every kind. It leaves the list afterwards."""
    made = launch.Kernel(
        "some",
        "const Run* x, Run* y, const bool* allowed_or_null, const T* rest_or_null, T scale, int runs, Index threads",
        launch.EACH_ELEMENT
        + """
        Run value = x[thread];
        for (int i = 0; i < LANES; ++i) {
          Index at = thread * LANES + i;
          value.lane[i] *= allowed_or_null && !allowed_or_null[at] ? T(0) : scale;
          if (rest_or_null) value.lane[i] += rest_or_null[at % runs];
        }
        y[thread] = value;
        """,
    )
    yield made
    launch.KERNELS.remove(made)


@pytest.fixture
def arguments():
    x = cupy.arange(1000, dtype="float32")
    return x, cupy.empty_like(x), x % 3 == 0, x[:10].copy(), 0.5, 10, 1000


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_arguments_arrive(kernel, arguments, lanes):
    x, y, allowed, rest, *_ = arguments
    kernel.each_element(1000 // lanes, *arguments[:-1], lanes=lanes)
    assert (y == cupy.where(allowed, x * np.float32(0.5), 0) + cupy.tile(rest, 100)).all()
    kernel.each_element(1000 // lanes, x, y, None, None, 2, 10, lanes=lanes)
    assert (y == 2 * x).all()
    wide = x.astype("float64")
    kernel.each_element(1000, wide, wide, None, None, 0.1, 10)
    assert (wide == 0.1 * x.astype("float64")).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: a[:-1], "takes 7 arguments .* not 6"),
        (lambda a: (a[0].get(), *a[1:]), "const Run. x takes a C-contiguous CuPy array.* not numpy float32 of shape"),
        (lambda a: (a[0][::2], *a[1:]), "C-contiguous .* strides"),
        (lambda a: ([1.0], *a[1:]), r"const Run. x takes .* not \[1.0\]"),
        (lambda a: (a[0].astype("int32"), *a[1:]), "not cupy int32"),
        (lambda a: (a[0].astype("float16"), *a[1:]), "not cupy float16"),
        (lambda a: (a[0], a[1].astype("float64"), *a[2:]), "Run. y takes .* not cupy float64"),
        (lambda a: (a[0], None, *a[2:]), "Run. y takes .* not None"),
        (lambda a: (*a[:2], a[0], *a[3:]), "const bool. allowed_or_null takes .* of bool, not cupy float32"),
        (lambda a: (*a[:3], a[2], *a[4:]), "const T. rest_or_null takes .* not cupy bool"),
        (lambda a: (*a[:4], a[0][0], *a[5:]), "T scale takes a Python number"),
        (lambda a: (*a[:5], 10.0, a[6]), "int runs takes an int of 32 bits, not 10.0"),
        (lambda a: (*a[:5], 2**31, a[6]), "int runs .* not 2147483648"),
        (lambda a: (*a[:6], np.int64(1)), "Index threads takes an int"),
    ],
)
def test_arguments_that_were_not_declared_are_refused(kernel, arguments, spoil, message):
    with pytest.raises(TypeError, match=message):
        kernel((4,), 256, *spoil(arguments))


def test_a_size_of_block_that_was_not_declared_is_refused(kernel, arguments):
    with pytest.raises(ValueError, match=r"kernel some runs in blocks of one of \(256,\) threads, not 128"):
        kernel((8,), 128, *arguments)


def test_an_empty_grid_is_no_launch(kernel, arguments):
    x, y, *_ = arguments
    y[...] = 7
    kernel.each_element(0, *arguments[:-1])
    kernel((3, 0), 256, *arguments)
    assert (y == 7).all()
    with pytest.raises(TypeError):
        kernel((0,), 256, *arguments[:-1])


def test_runs_are_as_wide_as_length_and_alignment_allow():
    x = cupy.zeros(64, "float32")
    assert [launch.widest_run(n, x) for n in (8, 12, 6, 7, 1)] == [4, 4, 2, 1, 1]
    assert [launch.widest_run(8, x, x[n:]) for n in range(5)] == [4, 1, 2, 1, 4]
    assert launch.widest_run(8, x, None) == 4
    assert launch.widest_run(8, x.astype("float64")) == 2


def test_more_than_2_to_31_elements_are_counted_in_64_bits(monkeypatch):
    """Such arrays would not fit here, so the kernels for them are run on small ones."""
    rng = np.random.default_rng(0)
    geometry = Geometry((11, 10), (3, 3), (2, 3), ((3, 2), (1, 4)), (3, 2), 1)
    x, g = (cupy.asarray(rng.standard_normal((2, 11, 10, 3))) for _ in range(2))
    shift, weight, bias = (cupy.asarray(rng.standard_normal(n)) for n in ((2, 3), 3, 3))

    def results():
        patches = kernels.im2col(x, geometry)
        image = cupy.empty_like(x)
        kernels.col2im(patches, image, geometry)
        yield from (patches, image)
        view = (2, 110, 3, 1)
        y, mean, rstd = kernels.normalize(x.reshape(view), shift, weight, bias, 1e-5, True)
        yield from (y, mean, rstd)
        yield from kernels.normalize_backward(g.reshape(view), x.reshape(view), mean, rstd, shift, weight, bias, True)

    narrow = list(results())
    launched: list[bool] = []
    source = launch.Kernel.source
    monkeypatch.setattr(launch, "WIDE", 0)
    monkeypatch.setattr(launch.Kernel, "source", lambda self, *key: launched.append(key[2]) or source(self, *key))
    for kernel in launch.KERNELS:
        kernel._built.clear()
    assert all((a == b).all() for a, b in zip(results(), narrow, strict=True))
    assert launched and all(launched)
