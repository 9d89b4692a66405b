"""The loops in C along rows (softmax.c, attention.c, norm.c, erf.c) against the pages in float64, at sizes on either
side of a vector and of a block, and with infinities and NaN. The matrix's examples are too small for most of this."""

from __future__ import annotations

import math
import os
import tracemalloc
from typing import Any

import numpy as np
import pytest

compiled = pytest.importorskip("tinydiff.fast.cpu.compiled")
from tinydiff import Tensor, grad, ops  # noqa: E402
from tinydiff.fast.cpu import attention, norm, reduce  # noqa: E402
from tinydiff.ops.attention import scaled_dot_product_attention  # noqa: E402
from tinydiff.ops.norm import normalize, shift_normalize_silu  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(
        os.environ.get("TINYDIFF_FAST") == "0" or compiled.library("f") is None, reason="no kernels in C here"
    ),
]
REAL = ["float32", "float64"]
SIZES = [1, 2, 3, 15, 16, 17, 127, 129]
INF, NAN = np.inf, np.nan


def draw(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def wide(a: Any) -> Any:
    return a.astype("float64") if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a


def close(got: Any, right: Any, dtype: str, least: float = 1e-30, in_order: bool = True) -> None:
    """Relative to the largest number, as a small one may be what is left of large ones; or to `least`."""
    assert got.shape == right.shape and got.dtype == dtype and (got.flags.c_contiguous or not in_order)
    if right.size:
        finite = np.abs(right[np.isfinite(right)]).max(initial=least)
        np.testing.assert_allclose(got, right, rtol=0, atol={"float32": 1e-5, "float64": 1e-12}[dtype] * finite)


def as_page(op: Any, g: np.ndarray, *inputs: Any, dtype: str, in_order: bool = True, **options: Any) -> None:
    """Forward and rule in C equal those of the page in float64. in_order: and the results are in C order."""
    backend = "numpy"
    found = op.fast_forwards[backend](*inputs, **options)
    out, residuals = found if type(found) is tuple else (found, ())
    right = op.forward(*map(wide, inputs), **{k: wide(v) for k, v in options.items()})
    close(out, right, dtype, in_order=in_order)
    adjoints = op.fast_rules[backend](g, out, *inputs, residuals=residuals, **options)
    rights = op.rule(wide(g), right, *map(wide, inputs), **{k: wide(v) for k, v in options.items()})
    for a, b, x in zip(*(v if type(v) is tuple else (v,) for v in (adjoints, rights)), inputs):
        if x is not None and x.dtype.kind == "f":  # else it has no gradient
            a, b = (v() if callable(v) else v for v in (a, b))
            close(summed(a, x.shape), summed(b, x.shape), dtype, 1, in_order)


def summed(a: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Over what was broadcast, as the engine does it."""
    a = a.sum(axis=tuple(range(a.ndim - len(shape)))) if a.ndim > len(shape) else a
    axes = tuple(i for i, n in enumerate(shape) if n == 1 != a.shape[i])
    return a.sum(axis=axes, keepdims=True) if axes else a


# ---------------------------------------------------------------- softmax, layer norm


@pytest.mark.parametrize("length", [*SIZES, 1023, 1024, 1025, 100_003])
@pytest.mark.parametrize("dtype", REAL)
def test_rows_of_any_length(length: int, dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(norm, "SECTIONS", 1)
    x, g, w, b = (draw(6, length, dtype=dtype, seed=i) for i in range(4))  # four rows together, and two alone
    as_page(ops.softmax, g, 3 * x, axis=-1, dtype=dtype)
    as_page(
        normalize,
        g,
        x + np.asarray(5 if dtype == "float64" else 0.1, dtype),
        w[0],
        b[0],
        axes=(1,),
        eps=1e-3,
        dtype=dtype,
    )
    as_page(normalize, g, x, None, None, axes=(1,), eps=1e-3, dtype=dtype)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("size", [5, 40])
def test_rows_of_large_numbers(size: int, dtype: str, monkeypatch: Any) -> None:
    """Where a vector of C is not filled there are zeros, whose xhat is infinite here; it must not count."""
    monkeypatch.setattr(norm, "SECTIONS", 1)
    x = np.full((6, size), 2.0 ** (120 if dtype == "float32" else 1018), dtype)
    g, w = draw(6, size, dtype=dtype), draw(size, dtype=dtype)
    with np.errstate(over="ignore"):
        y, (mean, rstd) = normalize.fast_forwards["numpy"](x, w, w, axes=(1,), eps=1e-5)
        dx, dw, db = normalize.fast_rules["numpy"](g, y, x, w, w, residuals=(mean, rstd), axes=(1,), eps=1e-5)
    assert np.isfinite(dx).all() and not dw.any() and np.isfinite(db).all()


@pytest.mark.parametrize("lines", [*SIZES, 31, 32, 33, 264, 300])
def test_any_number_of_rows(lines: int) -> None:
    x, g, w = draw(lines, 5), draw(lines, 5, seed=1), draw(5)
    as_page(ops.softmax, g, x, axis=0, dtype="float64")
    as_page(normalize, g, x, w, w, axes=(1,), eps=1e-3, dtype="float64")


@pytest.mark.parametrize("where", [0, 15, 16, 31, 32, 39])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("dtype", REAL)
def test_a_row_with_an_infinity_or_nan(where: int, value: float, dtype: str) -> None:
    """At every place of a vector: only -inf in a softmax leaves the row what it was, with a weight of exactly 0."""
    x = draw(3, 40, dtype=dtype)
    x[1, where] = value
    with np.errstate(invalid="ignore"):
        z, right = ops.softmax(x), ops.softmax.forward(x)
        y = ops.layer_norm(x)
    np.testing.assert_allclose(z, right, rtol=1e-14 if dtype == "float64" else 1e-6)
    assert np.isnan(z[1]).all() if value != -INF else z[1, where] == 0
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("lines", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", REAL)
def test_a_row_has_the_same_bits_alone(lines: int, dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(norm, "SECTIONS", 1)
    x, g, w = draw(lines, 37, dtype=dtype), draw(lines, 37, dtype=dtype, seed=1), draw(37, dtype=dtype)

    def all_of(rows: slice) -> list[np.ndarray]:
        t = Tensor(x[rows], requires_grad=True)
        z, y = ops.softmax(t), ops.layer_norm(t, w, w)
        return [z.data, y.data, *(grad(a, t, g[rows])[0].data for a in (z, y))]

    together = all_of(slice(None))
    for i in range(lines):
        for found, alone in zip(together, all_of(slice(i, i + 1))):
            assert found[i].tobytes() == alone[0].tobytes()


def test_a_long_row_of_equal_numbers_keeps_its_digits() -> None:
    x = np.full((1, 2**22 + 1), 0.1, np.float32)
    np.testing.assert_allclose(ops.softmax(x) * x.size, 1, rtol=1e-6)
    np.testing.assert_allclose(ops.layer_norm(x, eps=1.0), 0, atol=1e-6)


# ---------------------------------------------------------------- attention


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by matrix products."""
    monkeypatch.setattr(attention, "_is_for_products", lambda *_: False)
    monkeypatch.setattr(attention, "by_products", None)


@pytest.mark.parametrize("keys", [*SIZES, 63, 64, 65, 300])
@pytest.mark.parametrize("length", [1, 15, 16, 31, 32, 33, 129])
def test_attention_in_blocks_of_any_length(length: int, keys: int, blocks: None) -> None:
    q, k, v, g = draw(2, length, 5), draw(2, keys, 5, seed=1), draw(2, keys, 7, seed=2), draw(2, length, 7, seed=3)
    as_page(scaled_dot_product_attention, g, q, k, v, None, scale=0.9, dtype="float64")


@pytest.mark.parametrize("width", SIZES)
@pytest.mark.parametrize("values", SIZES)
@pytest.mark.parametrize("dtype", REAL)
def test_attention_in_blocks_of_any_width(width: int, values: int, dtype: str, blocks: None) -> None:
    q, k, v, g = (draw(33, n, dtype=dtype, seed=i) for i, n in enumerate((width, width, values, values)))
    as_page(scaled_dot_product_attention, g, q, k, v, None, scale=width**-0.5, dtype=dtype)


MASKS = [(33, 70), (1, 70), (70,), (33, 1), (1, 1), (3, 33, 70), (2, 1, 33, 70), (2, 3, 1, 70), (5, 1, 1, 33, 1)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", *REAL])
@pytest.mark.parametrize("dtype", REAL)
def test_attention_in_blocks_with_a_mask(shape: tuple[int, ...], kind: str, dtype: str, blocks: None) -> None:
    mask = draw(*shape, seed=4)
    mask = mask > -0.5 if kind == "bool" else mask.astype(kind)
    if kind == "bool":
        mask[..., 0] = True  # something to attend to
    q, k, v = draw(2, 3, 33, 5, dtype=dtype), draw(2, 1, 70, 5, dtype=dtype, seed=1), draw(70, 6, dtype=dtype, seed=2)
    g = draw(*np.broadcast_shapes((2, 3), shape[:-2]), 33, 6, dtype=dtype, seed=3)
    as_page(scaled_dot_product_attention, g, q, k, v, mask, scale=0.5, dtype=dtype)


def test_keys_that_a_query_reaches_only_in_a_later_block(blocks: None) -> None:
    """Until then it has no largest score: the running softmax must not turn that into NaN."""
    mask = np.arange(200) >= np.array([0, 1, 63, 64, 65, 128, 199])[:, None]  # (L, S)
    for m in (mask, np.where(mask, 0.0, -INF), np.where(mask, 0.0, -1e30)):
        as_page(
            scaled_dot_product_attention, draw(7, 4), draw(7, 3), draw(200, 3), draw(200, 4), m, scale=1.0,
            dtype="float64",
        )  # fmt: skip


def test_a_query_that_is_masked_as_a_whole(blocks: None) -> None:
    mask = np.ones((40, 130), bool)
    mask[35] = False
    q, k, v, g = draw(40, 3), draw(130, 3, seed=1), draw(130, 4, seed=2), draw(40, 4, seed=3)
    with np.errstate(invalid="ignore"):
        y, residuals = attention.in_blocks(q, k, v, mask, scale=1.0)
        found = attention.in_blocks_vjp(g, None, q, k, v, mask, scale=1.0, residuals=residuals)
        right = scaled_dot_product_attention.rule(g, None, q, k, v, mask, scale=1.0)
    assert np.isnan(y[35]).all() and np.isfinite(np.delete(y, 35, 0)).all()
    for a, b in zip(found[:3], right):  # a mask of bool has no adjoint
        assert np.array_equal(np.isnan(a), np.isnan(b()))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_attention_with_an_infinity_or_nan(which: int, value: float, blocks: None) -> None:
    arrays = [np.abs(draw(70, 3, seed=i)) for i in range(3)]
    arrays[which][66, 1] = value
    with np.errstate(invalid="ignore"):
        right = scaled_dot_product_attention.forward(*arrays, None, scale=1.0)
        y, _ = attention.in_blocks(*arrays, None, scale=1.0)
    np.testing.assert_allclose(y, right, rtol=1e-12)


def test_scores_of_any_size(blocks: None) -> None:
    """Rows whose scores would overflow, in order and against it, so that the largest score changes with every block."""
    for order in (1, -1):
        k = np.linspace(-800, 800, 300)[::order, None].copy()
        q = np.array([[1.0], [-1.0], [1e-3], [0.0], [5.0]])
        as_page(scaled_dot_product_attention, draw(5, 4), q, k, draw(300, 4, seed=1), None, scale=1.0, dtype="float64")


def test_attention_in_another_order_leaves_its_inputs_alone(blocks: None) -> None:
    q, k, v = (draw(5, 40, 2, 6, seed=i).swapaxes(1, 2)[::-1] for i in range(3))
    before = [a.copy() for a in (q, k, v)]
    as_page(scaled_dot_product_attention, draw(5, 2, 40, 6), q, k, v, None, scale=1.0, dtype="float64")
    assert all((a == b).all() for a, b in zip((q, k, v), before))


@pytest.mark.parametrize("width", [5, 16])
def test_heads_are_read_where_they_lie(width: int, blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a transformer has them: of one product for q, k and v, with the heads side by side in a token. Nothing is
    copied on the way in, and the result and the adjoints lie as their inputs do."""
    qkv = draw(2, 40, 3, 4, width)
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # (N, heads, L, D)
    g = draw(2, 40, 4, width, seed=1).swapaxes(1, 2)
    as_page(scaled_dot_product_attention, g, q, k, v, None, scale=0.5, dtype="float64", in_order=False)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    y, residuals = attention.in_blocks(q, k, v, None, scale=0.5)
    found = attention.in_blocks_vjp(g, y, q, k, v, None, scale=0.5, residuals=residuals)[:3]
    assert all(a.swapaxes(1, 2).flags.c_contiguous for a in (y, *found))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "k", "v", "g"])
def test_attention_of_what_is_broadcast(which: str, axis: int, blocks: None) -> None:
    """Queries for all of a batch, keys for all heads: a view, whose axis has no length in memory."""
    arrays = {name: draw(3, 2, 40, 5, seed=i) for i, name in enumerate("qkvg")}
    one = arrays[which][(slice(None),) * axis + (slice(1),)]
    arrays[which] = np.broadcast_to(one, (3, 2, 40, 5))
    q, k, v, g = arrays.values()
    as_page(scaled_dot_product_attention, g, q, k, v, None, scale=0.5, dtype="float64", in_order=False)
    if axis == 0:  # as a learned row beside another array
        as_page(scaled_dot_product_attention, g, q, k, v[0][None], None, scale=0.5, dtype="float64", in_order=False)


@pytest.mark.parametrize("shapes", [((4, 3), (6, 3), (5, 3)), ((4, 3), (6, 2), (6, 3))], ids=str)
def test_shapes_that_do_not_fit_never_reach_the_loops(shapes: Any) -> None:
    q, k, v = (draw(*shape) for shape in shapes)
    assert scaled_dot_product_attention.fast_forwards["numpy"](q, k, v, None, scale=1.0) is NotImplemented
    with pytest.raises(ValueError):
        scaled_dot_product_attention(q, k, v, None, scale=1.0)


@pytest.mark.parametrize("shape", [(3, 6), (4, 5), (2, 3, 6)])
def test_a_mask_that_does_not_fit_never_reaches_the_loops(shape: tuple[int, ...]) -> None:
    q, k, v, mask = draw(2, 4, 3), draw(2, 6, 3), draw(2, 6, 3), draw(*shape) > 0
    assert scaled_dot_product_attention.fast_forwards["numpy"](q, k, v, mask, scale=1.0) is NotImplemented


def test_an_output_that_was_changed_before_its_rule_read_it_is_an_error(blocks: None) -> None:
    q, k, v = (Tensor(draw(2, 40, 5, seed=i), requires_grad=True) for i in range(3))
    y = ops.attention(q, k, v)
    y.data *= 2
    with pytest.raises(RuntimeError, match="the output or residual 0 of scaled_dot_product_attention was changed"):
        y.sum().backward(retain_graph=True)
    y.sum().backward(create_graph=True)  # by the page's rule, which does not read it


def test_the_memory_of_attention_grows_with_the_length_alone() -> None:
    """The weights of 4096 x 4096 would be 64 MiB."""
    q, k, v = (Tensor(draw(4096, 16, dtype="float32", seed=i), requires_grad=True) for i in range(3))
    g = draw(4096, 16, dtype="float32", seed=3)
    peaks = []
    for length in (1024, 4096):
        leaves = [Tensor(x.data[:length], requires_grad=True) for x in (q, k, v)]
        tracemalloc.start()
        grad(ops.attention(*leaves), leaves, g[:length], retain_graph=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0] and peaks[1] < 20 * g.nbytes


# ---------------------------------------------------------------- erf, gelu, sigmoid


@pytest.mark.parametrize("n", [0, *SIZES])
@pytest.mark.parametrize("dtype", REAL)
def test_functions_of_any_number_of_numbers(n: int, dtype: str) -> None:
    x, g = 2 * draw(n, dtype=dtype), draw(n, dtype=dtype, seed=1)
    as_page(ops.activation.exact_gelu, g, x, dtype=dtype)
    for op in (ops.erf, ops.sigmoid):
        close(op.fast_forwards["numpy"](x), op.forward(wide(x)), dtype)


@pytest.mark.parametrize("dtype", REAL)
def test_erf_has_all_its_digits(dtype: str) -> None:

    small = 10.0 ** np.arange(-300 if dtype == "float64" else -30, 0)
    x = np.concatenate([np.linspace(-7, 7, 100_001), small, [0.0, 40.0, INF, -INF]]).astype(dtype)
    right = np.array([math.erf(t) for t in x.tolist()])
    np.testing.assert_allclose(ops.erf(x), right, rtol=4 * np.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", ["erf", "gelu", "sigmoid"])
def test_infinities_and_nan_stay_what_they_are(name: str) -> None:
    x = np.array([NAN, INF, -INF, 1e300, -1e300, -0.0] * 3)
    with np.errstate(invalid="ignore"):
        found = getattr(ops, name)(x)[:6]
    right = {"erf": [NAN, 1, -1, 1, -1, 0], "gelu": [NAN, INF, NAN, 1e300, 0, 0], "sigmoid": [NAN, 1, 0, 1, 0, 0.5]}
    np.testing.assert_array_equal(found, right[name])
    assert np.signbit(found[5]) == (name != "sigmoid")


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("parts", [2, 3, 20])
def test_parts_in_threads_change_no_bit(parts: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kernel that is called in parts here, and of whose sums over rows each part has its own."""
    x, g = draw(6, 37, 4, 5, dtype=dtype), draw(6, 37, 4, 5, dtype=dtype, seed=1)
    per_channel = [draw(20, dtype=dtype, seed=i) for i in range(2)]
    rows, rows_g = x.reshape(-1, 20), g.reshape(-1, 20)
    q, k, v = (draw(5, 40, 16, dtype=dtype, seed=i) for i in range(3))
    monkeypatch.setattr(reduce, "WORTH_A_CALL", 0)

    def everything() -> list[Any]:
        y, mean, rstd = norm.norm(x, None, *per_channel, 1e-5, True)
        found = [y, *norm.norm_vjp(g, x, mean, rstd, None, *per_channel, True)]
        y, residuals = norm.normalize_numpy(rows, *per_channel, axes=(1,), eps=1e-5)
        found += [y, *norm.normalize_vjp_numpy(rows_g, y, rows, *per_channel, residuals=residuals)]
        y, residuals = attention.in_blocks(q, k, v, None, scale=0.25)
        found += [y, *attention.in_blocks_vjp(v, y, q, k, v, None, scale=0.25, residuals=residuals)[:3]]
        y = reduce.add_in_place(x.copy(), per_channel[0][:5])
        assert np.array_equal(y, x + per_channel[0][:5])
        found.append(y)
        leaf = Tensor(rows, requires_grad=True)
        for op in (ops.silu, ops.sigmoid, ops.erf, ops.gelu, ops.softmax):
            y = op(leaf)
            found += [y.data, grad(y, leaf, rows_g)[0].data]
        return [a for a in found if a is not None]

    made = []
    for count in (1, parts):
        monkeypatch.setattr(compiled, "threads_for", lambda _size, count=count: count)
        made.append(everything())
    assert len(made[0]) > 20 and all(np.array_equal(*pair) for pair in zip(*made))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 15, 16, 24, 33])
def test_norms_of_channels_that_fill_no_vector(channels: int, dtype: str) -> None:
    """Then the rows of some positions are taken together, and some remain."""
    for length, group in ((1, channels), (2, channels), (31, 1), (70, channels)):
        x, g = (draw(3, length, channels, dtype=dtype, seed=i) for i in range(2))
        shift, weight, bias = (draw(3, channels, dtype=dtype, seed=i) for i in range(3))
        if length * group > 1:
            options = {"groups": channels // group, "eps": 0.1, "silu": True}
            as_page(shift_normalize_silu, g, x, shift, weight, bias, dtype=dtype, **options)
