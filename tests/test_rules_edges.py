"""Ties, extremes, and numbers among arrays: where a convention or a rounding decides."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from op_runs import close

from tinydiff import Rng, backend, grad, gradcheck, no_grad, ops, tensor
from tinydiff.operators import OPS

BINARY = ["add", "subtract", "multiply", "divide", "power", "maximum", "minimum"]


def gradient_of(f: Any, *values: Any) -> list[Any]:
    xs = [tensor(v, "float64", requires_grad=True) for v in values]
    return [g.tolist() for g in grad(f(*xs).sum(), xs)]


def test_at_ties(each_backend: str) -> None:
    assert gradient_of(ops.abs, [0.0]) == [[0.0]]
    assert gradient_of(ops.sign, [0.0]) == [[0.0]]
    assert gradient_of(ops.relu, [0.0]) == [[0.0]]
    assert gradient_of(ops.sqrt, [0.0, 4.0]) == [[0.0, 0.25]]
    assert gradient_of(lambda x: ops.clip(x, low=-1.0, high=1.0), [-1.0, 1.0, 2.0]) == [[1.0, 1.0, 0.0]]
    assert gradient_of(ops.maximum, [1.0, 2.0], [1.0, 1.0]) == [[0.5, 1.0], [0.5, 0.0]]
    assert gradient_of(ops.minimum, [1.0, 2.0], [1.0, 1.0]) == [[0.5, 0.0], [0.5, 1.0]]
    assert gradient_of(ops.max, [1.0, 4.0, 4.0]) == [[0.0, 0.5, 0.5]]
    assert gradient_of(lambda x: ops.min(x, axis=0), [[1.0, 4.0], [1.0, 5.0]]) == [[[0.5, 1.0], [0.5, 0.0]]]
    assert gradient_of(ops.power, [0.0, 0.0, 2.0], [0.0, 2.0, 0.0]) == [[0.0, 0.0, 0.0], [0.0, 0.0, math.log(2)]]
    assert gradient_of(lambda x: x**0, [0.0, 2.0]) == [[0.0, 0.0]]
    for x in (0.0, backend.xp.zeros(1)):  # a number, an array: x^y is 0 where y > 0, and infinite where y < 0
        power = functools.partial(ops.power, x)
        assert gradient_of(power, [0.0]) == gradient_of(power, [2.0]) == [[0.0]]
        with np.errstate(divide="ignore", invalid="ignore"):
            assert math.isnan(gradient_of(power, [-1.0])[0][0])
    assert gradient_of(ops.prod, [0.0, 2.0, 3.0]) == [[6.0, 0.0, 0.0]]
    assert gradient_of(ops.prod, [0.0, 0.0, 3.0]) == [[0.0, 0.0, 0.0]]
    assert gradient_of(lambda x: ops.sqrt((x * x).sum()), [0.0, 0.0]) == [[0.0, 0.0]]  # the norm of a zero vector
    assert gradient_of(lambda x: ops.max_pool2d(x, kernel=2), np.ones((1, 2, 2, 1))) == [
        [[[[0.25], [0.25]], [[0.25], [0.25]]]]
    ]


def test_the_gradient_at_a_kink_lies_between_its_sides(numpy_backend: str) -> None:
    for f in (
        ops.abs,
        ops.relu,
        lambda x: ops.clip(x, low=0.0),
        lambda x: ops.maximum(x, 0.0),
        lambda x: ops.max(ops.stack([x, -x]), axis=0),
    ):
        report = gradcheck(f, np.array([0.0, 1.0]))
        assert [e.kind for e in report.kinks] == ["kink"] and report.checked == 1


def test_rows_of_different_size_stay_apart(each_backend: str) -> None:
    """The largest of the whole array would underflow a row of small numbers."""
    x = np.array([[1000.0, 999.0], [-1000.0, -1001.0]])
    close([ops.softmax(tensor(x)).numpy()], [np.exp([[0.0, -1.0]] * 2) / (1 + math.exp(-1))])


def test_log_softmax_of_large_numbers_keeps_its_digits(each_backend: str) -> None:
    """log sum e^x is 0.69 here, which a float32 of 10^6 cannot hold."""
    for shift in (0.0, 1e3, 1e6):
        close([ops.log_softmax(tensor([shift, shift], "float32")).numpy()], [np.full(2, -math.log(2), "float32")], 1e-6)


def test_a_power_of_a_negative_number_has_no_derivative_by_its_exponent(numpy_backend: str) -> None:
    for base in (-2.0, tensor([-2.0, -2.0], "float64")):
        with np.errstate(invalid="ignore"):
            y = tensor([2.0, 3.0], "float64", requires_grad=True)
            z = base**y
            assert z.tolist() == [4.0, -8.0]
            assert np.isnan(grad(z.sum(), y)[0].numpy()).all()


def test_an_index_may_be_a_tensor(each_backend: str) -> None:
    """Also in the rule of the rule, where an array of the device cannot be indexed with it."""
    host = np.array([0, 0, 2])
    for f in (
        lambda x, i: x[i],
        lambda x, i: x[(i, i * 0)],
        lambda x, i: ops.embedding(i, x),
        lambda x, i: ops.take(x, i, axis=0),
        lambda x, i: ops.index_add(x, x[1] * 2, index=i),
        lambda x, i: ops.cross_entropy(x, ops.clip(i, low=0, high=1)),
    ):
        found = []
        for index in (backend.to_device(host), tensor(host)):
            x = tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
            (g,) = grad((f(x, index) ** 2).sum(), x, create_graph=True)
            found.append([g.numpy(), grad((g * g).sum(), x)[0].numpy()])
        close(*found, rtol=0, atol=0)


def test_extremes_are_finite(each_backend: str) -> None:
    for dtype in ("float32", "float64"):
        x = tensor([-1000.0, -90.0, 0.0, 90.0, 1000.0], dtype, requires_grad=True)
        for f in (
            ops.sigmoid,
            ops.silu,
            ops.softplus,
            ops.tanh,
            ops.gelu,
            ops.erf,
            ops.softmax,
            ops.logsumexp,
            ops.log_softmax,
        ):
            y = f(x)
            assert np.isfinite(y.numpy()).all(), f
            assert np.isfinite(grad(y.sum(), x)[0].numpy()).all(), f
    x = tensor([-math.inf, -math.inf], requires_grad=True)
    y = ops.logsumexp(x)
    assert y.item() == -math.inf and grad(y, x)[0].tolist() == [0.0, 0.0]


def test_python_and_numpy_scalars_widen_nothing(each_backend: str) -> None:
    x = tensor([0.5, 2.0], requires_grad=True)
    for number in (1.5, 2, True, np.float64(1.5), np.float32(1.5), np.int64(2)):
        for name in BINARY:
            for y in (OPS[name](x, number), OPS[name](number, x)):
                assert y.dtype == "float32", (name, number)
                assert grad(y.sum(), x)[0].dtype == "float32", (name, number)
    assert x.sum().dtype == "float32" and (x.sum() * 1.5).dtype == "float32" and (x.mean() ** 2.0).dtype == "float32"


def test_numpy_scalars_as_options_widen_nothing(each_backend: str) -> None:
    x = tensor(np.ones((2, 3, 4), "float32"), requires_grad=True)
    half = np.float64(0.5)
    found = {
        "group_norm": ops.group_norm(x, groups=2, eps=half),
        "layer_norm": ops.layer_norm(x, eps=half),
        "batch_norm": ops.batch_norm(x, eps=half),
        "clip": ops.clip(x, low=half, high=np.float64(2)),
        "pad": ops.pad(x, pad_width=((1, 0),) * 3, value=half),
        "attention": ops.attention(x, x, x, scale=half),
        "dropout": ops.dropout(x, p=half, rng=Rng(0)),
        "where": ops.where(x.data > 0, x, half),
        "power": x**half,
    }
    for name, y in found.items():
        assert y.dtype == "float32" and grad(y.sum(), x)[0].dtype == "float32", name


def test_numpy_scalars_beside_arrays_widen_nothing(each_backend: str) -> None:
    """Samplers and losses call ops on plain arrays too."""
    x = backend.to_device(np.ones(3, "float32"))
    for scalar in (np.float64(2), np.float32(2), np.int64(2)):
        for name in BINARY:
            assert OPS[name](x, scalar).dtype == OPS[name](scalar, x).dtype == "float32", (name, scalar)
    assert ops.where(x > 0, x, np.float64(2)).dtype == "float32"
    assert ops.multiply(x.astype("float64"), np.float32(2)).dtype == "float64"


def test_a_power_has_the_derivative_of_sqrt_at_zero(each_backend: str) -> None:
    x = tensor([0.0, 4.0], requires_grad=True)
    half = tensor([0.5, 0.5], requires_grad=True)
    for y in (x**0.5, x**half, ops.sqrt(x)):
        assert grad(y.sum(), x)[0].tolist() == [0.0, 0.25]
    assert grad((x**0).sum(), x)[0].tolist() == [0.0, 0.0]
    assert grad((x**1).sum(), x)[0].tolist() == [1.0, 1.0]
    y = tensor([2.0], dtype="complex128", requires_grad=True)
    assert np.isclose(grad((y**2j).sum(), y)[0].item(), 2j * 2.0 ** (2j - 1))
    y = tensor([4.0], requires_grad=True)
    assert grad((y**-1.0).sum(), y)[0].item() == -0.0625


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_functions_of_nothing(each_backend: str, shape: tuple[int, int]) -> None:
    x = tensor(np.zeros(shape), requires_grad=True)
    for axis in (0, 1):
        for op in (ops.softmax, ops.log_softmax):
            y = op(x, axis=axis)
            assert y.shape == shape and grad(y.sum(), x)[0].shape == shape
        y = ops.logsumexp(x, axis=axis)
        assert y.tolist() == [-math.inf] * shape[1 - axis]
        assert grad(y.sum(), x)[0].shape == shape
    assert ops.logsumexp(x, axis=0, keepdims=True).shape == (1, shape[1])


@pytest.mark.parametrize(
    "shapes", [((2, 3, 0), (0, 4)), ((0, 3, 2), (2, 4)), ((2, 3, 4), (4, 0)), ((0, 2, 3), (0, 3, 2))]
)
def test_products_of_nothing(each_backend: str, shapes: Any) -> None:
    x, y = (tensor(np.ones(s), requires_grad=True) for s in shapes)
    z = x @ y
    expected = np.matmul(np.ones(shapes[0]), np.ones(shapes[1]))
    assert z.shape == expected.shape and np.array_equal(z.numpy(), expected)
    assert [g.shape for g in grad(z.sum(), (x, y))] == list(shapes)


@pytest.mark.parametrize(
    "shift, axis", [((1, 2), (0, 1)), (2, (0, 1)), ((1, 2), 0), ((1, 2), None), (-1, 1), ((3,), (1,)), (1, ())]
)
def test_roll_as_numpys(each_backend: str, shift: Any, axis: Any) -> None:
    a = np.arange(12.0).reshape(3, 4)
    x = tensor(a, requires_grad=True)
    y = ops.roll(x, shift=shift, axis=axis)
    assert np.array_equal(y.numpy(), np.roll(a, shift, axis))
    assert np.array_equal(grad((y * y.detach()).sum(), x)[0].numpy(), a)


def test_a_copy_by_an_index_of_integers_is_not_a_view(each_backend: str) -> None:
    """What a copy was made from may change."""
    x = tensor(np.arange(12.0).reshape(4, 3), requires_grad=True)
    for index in ([0, 2], (slice(None), [0, 2]), x.data > 2):
        with no_grad():
            x.data = backend.to_device(np.arange(12.0).reshape(4, 3))
        index = backend.to_device(np.array(index)) if isinstance(index, list) else index
        if isinstance(index, tuple):
            index = (index[0], backend.to_device(np.array(index[1])))
        y = x[index]
        z = (y * y).sum()
        expected = np.zeros((4, 3))
        expected[backend.to_host(index) if not isinstance(index, tuple) else (index[0], [0, 2])] = 1
        expected *= 2 * np.arange(12.0).reshape(4, 3)
        with no_grad():
            x += 1.0
        assert np.array_equal(grad(z, x)[0].numpy(), expected)


def test_the_bias_of_a_convolution_counts_for_its_dtype(each_backend: str) -> None:
    x, w = tensor(np.ones((1, 2, 2, 1)), "float32"), tensor(np.ones((1, 1, 1, 1)), "float32")
    for conv in (ops.conv2d, ops.conv_transpose2d):
        wide = conv(x, w, tensor(np.full(1, 1e-9), "float64"))
        assert wide.dtype == "float64" and (wide.numpy() == 1 + 1e-9).all()
        assert (
            conv(tensor(np.ones((1, 2, 2, 1), int)), tensor(np.ones((1, 1, 1, 1), int)), tensor([0.5])).dtype.kind
            == "f"
        )
        assert gradcheck(lambda b, conv=conv: conv(x.data.astype("float64"), w.data.astype("float64"), b), np.ones(1))


def test_a_convolution_to_no_channels_is_empty(each_backend: str) -> None:
    assert ops.conv2d(tensor(np.ones((2, 3, 3, 4))), tensor(np.ones((3, 3, 4, 0)))).shape == (2, 1, 1, 0)


def test_the_gradient_of_a_norm_of_equal_values_is_finite(each_backend: str) -> None:
    """1 / sqrt(eps) to the third power is beyond float32, and what it is multiplied with is 0."""
    x = tensor(np.full((1, 4, 2), 0.5), "float32", requires_grad=True)
    (g,) = grad(ops.group_norm(x, groups=1, eps=1e-30).sum(), x)
    assert np.isfinite(g.numpy()).all()


def test_a_large_mean_costs_a_norm_no_digits(each_backend: str) -> None:
    x = (np.random.default_rng(0).normal(size=(2, 36, 4)) + 1e4).astype("float32")
    wide = ops.group_norm(tensor(x.astype("float64")), groups=2).numpy()
    np.testing.assert_allclose(ops.group_norm(tensor(x), groups=2).numpy(), wide, atol=2e-3)
