"""The convolutions in C: all sizes at which the loops change, against the page in float64; and the same bits for any
number of parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
import tinydiff as td  # noqa: E402
from tinydiff import ops  # noqa: E402
from tinydiff.fast.cpu import activation, attention, conv  # noqa: E402
from tinydiff.ops import conv as page  # noqa: E402
from tinydiff.ops.conv import Geometry  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(compiled.library("f") is None, reason="there is no library of loops in C"),
]
DIGITS = {"float32": 1e-5, "float64": 1e-13}
THREE = [
    (conv.conv2d_numpy, page.conv2d_p, "xw"),
    (conv.conv2d_input_grad_numpy, page.conv2d_input_grad, "yw"),
    (conv.conv2d_weight_grad_numpy, page.conv2d_weight_grad, "xy"),
]


def geometry(size: Any, kernel: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Geometry:
    pair: Callable[[Any], Any] = lambda a: a if isinstance(a, tuple) else (a, a)  # noqa: E731
    sides = tuple(p if isinstance(p, tuple) else (p, p) for p in pair(padding))
    return Geometry(pair(size), pair(kernel), pair(stride), sides, pair(dilation), groups)


def arrays(at: Geometry, n: int, channels: int, out: int, dtype: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = {
        "x": (n, *at.size, channels),
        "w": (*at.kernel, channels // at.groups, out),
        "y": (n, *at.out, out),
    }
    return {name: draw.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def compare(at: Geometry, n: int, channels: int, out: int, dtype: str) -> None:
    given = arrays(at, n, channels, out, dtype)
    for fast, op, names in THREE:
        bias = {} if "w" not in names else {"b": np.arange(out if names == "xw" else channels, dtype=dtype)}
        mine, wide = ([given[name].astype(kind) for name in names] for kind in (dtype, "float64"))
        found = fast(*mine, *bias.values(), geometry=at)
        expected = op.forward(*wide, *(b.astype("float64") for b in bias.values()), geometry=at)
        assert found.dtype == dtype and found.shape == expected.shape
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        assert np.abs(found - expected).max(initial=0) < DIGITS[dtype] * scale * 4, op.name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("out", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 65])
def test_any_number_of_channels(dtype: str, channels: int, out: int) -> None:
    """They fill no vector, one, two or a few; up to four of the output have a loop of their own."""
    compare(geometry((5, 4), 3, padding=1), 3, channels, out, dtype)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 11, 12, 13, 40])
def test_any_number_of_images(n: int) -> None:
    for size in (1, 2, 5, 7):
        compare(geometry(size, 3, padding=1), n, 6, 20, "float64")


GEOMETRIES = [
    geometry((6, 7), 3, 2, 1),
    geometry((9, 8), (3, 2), (2, 3), (1, 0)),
    geometry((9, 9), 3, 1, 2, 2),
    geometry((8, 8), 1, 3),  # a stride beyond the kernel: pixels of x that no tap meets
    geometry((7, 7), 2, 3, 1, 2),
    geometry((4, 4), 3, 1, 4),  # padding beyond the kernel: pixels of y that meet nothing
    geometry((5, 5), 3, 1, ((0, 2), (1, 0))),  # one-sided
    geometry((5, 6), (1, 5), 1, (0, 2)),
    geometry((1, 30), (1, 3), 1, (0, 1), (1, 4)),
    geometry((6, 6), 3, 1, 1, 1, 2),
    geometry((6, 5), 3, 2, 1, 1, 4),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("at", GEOMETRIES, ids=str)
def test_any_geometry(at: Geometry, dtype: str) -> None:
    for channels, out in itertools.product((4, 8, 68), (4, 12, 36)):
        compare(at, 3, channels, out, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [2, 3, 8, 15, 16, 17, 40])
def test_depthwise(channels: int, dtype: str) -> None:
    """One channel in a group. Classes of one pixel and of many, fewer taps than are added together, and more. A pixel
    too many shows only in the last class, because the next one writes over it, and only if the first pixel of the image
    is in another: so there are last classes of any number of pixels, for conv2d and for its gradient by the input."""
    more = [geometry((9, 8), 3, padding=1), geometry((12, 4), (5, 3), padding=2), geometry((5, 17), (5, 3))]
    for pixels, sides in itertools.product(range(8, 16), ((1, 0), (0, 2))):
        more.append(geometry((1, pixels + 2), (1, 3), 1, (0, sides)))
    for at in (*GEOMETRIES, *more):
        at = replace(at, groups=channels)
        given = arrays(at, 3, channels, channels, dtype)
        assert conv.way_of(at, "xy", given["x"].shape, given["y"].shape) == "depthwise"
        compare(at, 3, channels, channels, dtype)


def test_many_channels_in_pieces() -> None:
    """More steps than are added at a time, with sums that are taken up again."""
    compare(geometry(4, 3, padding=1), 2, 300, 10, "float64")
    compare(geometry(4, 1), 2, 700, 40, "float64")


def test_arrays_that_are_not_contiguous() -> None:
    at = geometry((6, 6), 3, padding=1)
    given = arrays(at, 3, 8, 8, "float64")
    turned = {name: np.asfortranarray(a) for name, a in given.items()}
    for fast, _, names in THREE:
        none = [None] * ("w" in names)
        whole, other = (fast(*(arrays[name] for name in names), *none, geometry=at) for arrays in (given, turned))
        assert np.array_equal(whole, other)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_stays_with_the_pixels_that_it_meets(value: float) -> None:
    for groups, out in ((1, 40), (8, 8)):
        at = geometry((7, 7), 3, padding=1, groups=groups)
        none_stays(at, arrays(at, 2, 8, out, "float32"), value)


def none_stays(at: Geometry, given: dict[str, np.ndarray], value: float) -> None:
    given["x"][0, 3, 3, 2] = given["y"][1, 3, 3, 5] = value  # not at the border
    for fast, op, names in THREE:
        none = [None] * ("w" in names)
        with np.errstate(invalid="ignore"):
            found, expected = (f(*(given[name] for name in names), *none, geometry=at) for f in (fast, op.forward))
        assert np.array_equal(np.isnan(found), np.isnan(expected)) and np.isfinite(found).any()
        assert np.array_equal(np.isinf(found), np.isinf(expected))


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("at", [geometry((8, 9), 3, padding=1), geometry((8, 9), 3, 2), geometry(8, 1)], ids=str)
@pytest.mark.parametrize("channels, out", [(1, 32), (5, 32), (16, 1), (16, 48), (40, 48)])
def test_parts_in_threads_change_no_bit(
    at: Geometry, channels: int, out: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_bits(at, arrays(at, 5, channels, out, "float32"), parts, monkeypatch)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("channels, out", [(48, 31), (64, 64)])
def test_parts_of_many_tiles_change_no_bit(
    channels: int, out: int, parts: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are worked on at a time, for all three."""
    at = geometry((8, 9), 3, padding=1)
    same_bits(at, arrays(at, 40, channels, out, dtype), parts, monkeypatch)


def same_bits(at: Geometry, given: dict[str, np.ndarray], parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, _, names in THREE:
        none, found = [None] * ("w" in names), []
        for count in (1, parts):
            monkeypatch.setattr(compiled, "threads_for", lambda _size, count=count: count)
            found.append(fast(*(given[name] for name in names), *none, geometry=at))
        assert np.array_equal(*found)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("channels, out, groups", [(70, 101, 1), (202, 202, 2)])
def test_parts_of_few_images_are_channels(
    channels: int, out: int, groups: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = geometry((5, 6), 3, 2, padding=1, groups=groups)
    compare(at, 1, channels, out, "float32")
    same_bits(at, arrays(at, 1, channels, out, "float32"), parts, monkeypatch)


def test_so_many_weights_that_each_part_packs_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    at = geometry(4, 3, 2, padding=1)
    compare(at, 3, 390, 310, "float32")
    same_bits(at, arrays(at, 3, 390, 310, "float32"), 2, monkeypatch)
    alone, all_three = (
        {n: a if n == "w" else a[:k] for n, a in arrays(at, 3, 390, 310, "float32").items()} for k in (1, 3)
    )
    one, three = (conv.conv2d_numpy(given["x"], given["w"], None, geometry=at) for given in (alone, all_three))
    assert np.array_equal(one[0], three[0])


@pytest.mark.parametrize("n, channels, out", [(1, 700, 800), (3, 700, 64), (2, 64, 700)])
def test_some_pixels_and_some_channels_at_a_time(
    n: int, channels: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of both than stay in the second cache."""
    at = geometry((20, 21), 1)
    compare(at, n, channels, out, "float32")
    same_bits(at, arrays(at, n, channels, out, "float32"), 2, monkeypatch)


@pytest.mark.parametrize("channels", [7, 40, 64])
def test_parts_of_a_depthwise_convolution_change_no_bit(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at = geometry((8, 9), 3, padding=1, groups=channels)
    same_bits(at, arrays(at, 5, channels, channels, "float32"), 3, monkeypatch)


@pytest.mark.parametrize("channels, out", [(0, 4), (4, 0), (0, 0)])
def test_no_channels(channels: int, out: int) -> None:
    for n in (0, 2):
        x = td.tensor(np.ones((n, 5, 5, channels), "float32"), requires_grad=True)
        w = td.tensor(np.ones((3, 3, channels, out), "float32"), requires_grad=True)
        y = ops.conv2d(x, w)
        gradients = td.grad(y.sum(), (x, w))
        assert y.shape == (n, 3, 3, out) and [g.shape for g in gradients] == [x.shape, w.shape]
        assert not any(a.data.any() for a in (y, *gradients))


@pytest.mark.parametrize("name", ["x", "w"])
def test_arrays_that_do_not_fit_are_for_the_page(name: str) -> None:
    """In C they would be read beyond their ends."""
    at = geometry((6, 6), 3, padding=1)
    for shape in ((2, 6, 6), (2, 5, 6, 8), (3, 6, 6, 7), (3, 2, 8, 8)):
        given = arrays(at, 2, 8, 8, "float32") | {name: np.ones(shape, "float32")}
        assert conv.conv2d_numpy(given["x"], given["w"], None, geometry=at) is NotImplemented
        if name == "x":
            assert conv.conv2d_weight_grad_numpy(given["x"], given["y"], geometry=at) is NotImplemented
        else:
            assert conv.conv2d_input_grad_numpy(given["y"], given["w"], None, geometry=at) is NotImplemented


@pytest.mark.parametrize("op", [ops.softmax, ops.silu, ops.erf, ops.sigmoid, ops.sum, ops.layer_norm, ops.gelu])
def test_numbers_in_another_order_of_bytes_are_for_the_page(op: Any) -> None:
    x = np.random.default_rng(0).normal(size=(3, 20)).astype("float32")
    np.testing.assert_allclose(op(x.astype(">f4")), op(x), rtol=1e-5, atol=1e-6)


def test_what_is_no_array_of_reals_is_refused() -> None:
    for wrong in (np.ones(3, int), np.ones(3, "complex64"), np.ones(3, "float16")):
        with pytest.raises(compiled.Misfit, match="silu: x must be a C array"):
            activation.silu_in_c(x=wrong, y=np.ones(3, "float32"))


@pytest.mark.parametrize("size", [1e3, 1e12, 1e30])
def test_a_scale_and_large_scores(size: float) -> None:
    scores = (np.random.default_rng(0).normal(size=(9, 33)) * size).astype("float32")
    p = attention.attention_weights(scores.copy(), 1 / math.sqrt(7), None)
    assert np.isfinite(p).all() and np.allclose(p.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("mask", [np.array(True), np.array(0.5)])
def test_a_mask_without_axes(mask: Any) -> None:
    q = np.random.default_rng(0).normal(size=(40, 4))
    np.testing.assert_allclose(ops.attention(q, q, q, mask=mask), ops.attention(q, q, q), rtol=1e-10)


# ---------------------------------------------------------------- Winograd's method


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("padding", [0, 1, 2, ((0, 1), (2, 0))], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (4, 7), (7, 4), (9, 6), (13, 12)], ids=str)
def test_winograd_of_any_size(size: Any, padding: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the image and the result fill whole, or in part, with channels that fill a vector or do not."""
    monkeypatch.setattr(conv, "way_of", lambda *given: "winograd")
    for n, (channels, out) in itertools.product((0, 1, 5), ((1, 2), (16, 16), (20, 70), (48, 31))):
        compare(geometry(size, 3, 1, padding), n, channels, out, dtype)


@pytest.mark.parametrize(
    "at, channels, out",
    [
        (geometry(8, 3, 2, 1), 16, 16),
        (geometry(8, 3, 1, 2, 2), 16, 16),
        (geometry(8, 3, 1, 1, 1, 2), 32, 32),
        (geometry(8, (1, 3), 1, 1), 16, 16),
        (geometry(8, 3, 1, 3), 16, 16),  # pixels that meet nothing but padding
        (geometry(5, 3, 1, 1), 16, 16),  # 25 pixels in 4 tiles, which few images do not repay
        (geometry(3, 3, 1, 1), 64, 64),
        (geometry(8, 3, 1, 1), 15, 64),
        (geometry(8, 3, 1, 1), 512, 512),  # to make the points of the weights takes longer than the rest
    ],
    ids=str,
)
def test_winograd_leaves_the_rest_to_others(at: Geometry, channels: int, out: int) -> None:
    assert conv.by_winograd(geometry(8, 3, padding=1), (8, 8), 16, 16)
    assert not conv.by_winograd(at, at.out, channels, out)


@pytest.mark.parametrize("n, size, channels, out", [(2, (16, 16), 1500, 70), (4, (32, 32), 140, 272)], ids=str)
def test_winograd_of_fewer_tiles_than_channels(
    n: int, size: Any, channels: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some channels, and some tiles, at a time; in any number of parts, of which each has its own channels."""
    at = geometry(size, 3, padding=1)
    compare(at, n, channels, out, "float32")
    given, found = arrays(at, n, channels, out, "float32"), []
    for parts in (1, 2, 3):
        monkeypatch.setattr(compiled, "threads_for", lambda size, parts=parts: parts)
        found.append([fast(*(given[name] for name in names), None, geometry=at) for fast, _, names in THREE[:2]])
    assert all(np.array_equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_the_gradient_by_large_weights_is_not_by_winograd() -> None:
    at = geometry(32, 3, padding=1)
    x, w, y = (4, 32, 32, 512), (3, 3, 512, 512), (4, 32, 32, 512)
    assert conv.way_of(at, "xw", x, w) == conv.way_of(at, "yw", y, w) == "winograd"
    assert conv.way_of(at, "xy", x, y) == "taps"


def test_winograd_gives_an_image_the_same_digits_in_any_batch() -> None:
    at = geometry((14, 10), 3, padding=1)
    given = arrays(at, 40, 32, 48, "float32")
    for fast, _, names in THREE[:2]:
        whole = fast(*(given[name] for name in names), None, geometry=at)
        alone = fast(*(a[7:9] if len(a) == 40 else a for a in (given[name] for name in names)), None, geometry=at)
        assert np.array_equal(whole[7:9], alone)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (14, 10)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_winograd_lets_no_number_that_is_none_disappear_or_reach_another_image(value: float, size: Any) -> None:
    at = geometry(size, 3, padding=1)
    given = arrays(at, 3, 16, 16, "float32")
    given["x"][1, 3, 3, 2] = given["y"][1, 3, 3, 5] = value
    with np.errstate(invalid="ignore"):
        for fast, _, names in THREE[:2]:
            found = fast(*(given[name] for name in names), None, geometry=at)
            assert not np.isfinite(found[1, 2:5, 2:5]).any()  # under the taps
            assert np.isfinite(found[[0, 2]]).all()
        assert not np.isfinite(conv.conv2d_weight_grad_numpy(given["x"], given["y"], geometry=at)).all()
