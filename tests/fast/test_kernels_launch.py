"""The launcher of kernels in CUDA: what it refuses, and when it counts in 64 bits."""

from __future__ import annotations

import os

import numpy as np
import pytest

if os.environ.get("TINYDIFF_BACKEND") != "cupy":
    pytest.skip("kernels in CUDA run on CuPy: TINYDIFF_BACKEND=cupy", allow_module_level=True)

import cupy
import fast_kernels as kernels

from tinydiff.fast.cuda import launch
from tinydiff.ops.conv import Geometry

SOME = """
#include "common.cuh"

// y = scale x where it is allowed: a kernel (no other) with parameters of most kinds.
/* extern "C" __global__ void __launch_bounds__(THREADS) not_a_kernel(int n) */
extern "C" __global__ void __launch_bounds__(THREADS) some(
    const Run* x, Run* y, const bool* allowed_or_null, const T* rest_or_null, T scale, int runs, Index threads) {
  const Index thread = blockIdx.x * (Index)THREADS + threadIdx.x;
  if (thread >= threads) return;
  Run value = x[thread];
  for (int i = 0; i < LANES; ++i) {
    Index at = thread * LANES + i;
    value.lane[i] *= allowed_or_null && !allowed_or_null[at] ? T(0) : scale;
    if (rest_or_null) value.lane[i] += rest_or_null[at % runs];
  }
  y[thread] = value;
}

// Of the other kinds.
extern "C" __global__ void __launch_bounds__(THREADS) other(
    const double* wide, unsigned long long* large_or_null, double limit, unsigned int bits,
    long long count) {
}
"""


@pytest.fixture
def source(tmp_path):
    """A file with two kernels. It leaves the list afterwards."""
    (tmp_path / "some.cu").write_text(SOME)
    (tmp_path / "common.cuh").write_text((launch.FOLDER / "common.cuh").read_text())
    made = launch.Source(tmp_path / "some.cu", TYPE=("float", "double"), LANES=(1, 2, 4), INDEX_BITS=(32, 64))
    yield made
    launch.SOURCES.remove(made)


@pytest.fixture
def kernel(source):
    return source["some"]


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
        (lambda a: (*a[:5], 10.0, a[6]), "int runs takes an int from -2147483648 to 2147483647, not 10.0"),
        (lambda a: (*a[:5], 2**31, a[6]), "int runs .* not 2147483648"),
        (lambda a: (*a[:6], np.int64(1)), "Index threads takes an int"),
        (lambda a: (*a[:6], -1), "Index threads takes an int"),
    ],
)
def test_arguments_that_were_not_declared_are_refused(kernel, arguments, spoil, message):
    with pytest.raises(TypeError, match=message):
        kernel((4,), 256, *spoil(arguments))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: (a[0].astype("float32"), *a[1:]), "const double. wide takes .* of float64, not cupy float32"),
        (lambda a: (a[0][::2], *a[1:]), "const double. wide takes a C-contiguous CuPy array"),
        (lambda a: (None, *a[1:]), "const double. wide takes .* not None"),
        (lambda a: (a[0], a[0], *a[2:]), "unsigned long long. large_or_null takes .* of uint64, not cupy float64"),
        (lambda a: (*a[:2], np.float32(1), *a[3:]), "double limit takes a Python number"),
        (lambda a: (*a[:3], -1, a[4]), "unsigned int bits takes an int from 0 to 4294967295, not -1"),
        (lambda a: (*a[:4], 2**63), "long long count takes an int from -9223372036854775808 to"),
    ],
)
def test_so_are_arguments_of_the_other_kinds(source, spoil, message):
    arguments = cupy.ones(3), cupy.ones(2, "uint64"), 0.5, 2**32 - 1, 2**40
    source["other"]((1,), 256, *arguments)
    source["other"]((1,), 256, arguments[0], None, *arguments[2:])
    with pytest.raises(TypeError, match=message):
        source["other"]((1,), 256, *spoil(arguments))


def test_the_kernels_of_a_file_are_those_outside_of_comments(source):
    assert list(source.kernels) == ["some", "other"]
    assert [p.name for p in source["other"].parameters] == ["wide", "large_or_null", "limit", "bits", "count"]
    assert [p.constant for p in source["some"].parameters] == [True, False, True, True, False, False, False]


def test_what_the_file_was_not_declared_for_is_refused(kernel, arguments):
    with pytest.raises(ValueError, match=r"some.cu is compiled for THREADS in \(256,\), not 128"):
        kernel((8,), 128, *arguments)
    with pytest.raises(ValueError, match=r"some.cu is compiled for LANES in \(1, 2, 4\), not 8"):
        kernel((1,), 256, *arguments, lanes=8)


def test_a_change_of_a_header_is_a_change_of_the_text(source, tmp_path):
    """CuPy keeps compiled kernels on disk, by their text."""
    (tmp_path / "common.cuh").write_text("// changed\n")
    assert "// changed" in launch.text_of(source.path) and "// changed" not in source.text


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
        yield from kernels.normalize_vjp(g.reshape(view), x.reshape(view), mean, rstd, shift, weight, bias, True)

    narrow = list(results())
    launched: list[bool] = []
    build = launch.Kernel.build
    monkeypatch.setattr(launch, "WIDE", 0)
    monkeypatch.setattr(launch.Kernel, "build", lambda self, *key: launched.append(key[2]) or build(self, *key))
    for source in launch.SOURCES:
        for kernel in source.kernels.values():
            kernel._built.clear()
    assert all((a == b).all() for a, b in zip(results(), narrow, strict=True))
    assert launched and all(launched)
