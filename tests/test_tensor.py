"""Tensor: making one, its operators and methods, and the ways out of it."""

from __future__ import annotations

import base64
import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, changes, ops, summary
from tinydiff.operators import OPS

pytestmark = pytest.mark.usefixtures("each_backend")


def equal(x: Any, expected: Any) -> None:
    np.testing.assert_allclose(backend.to_host(x.data if isinstance(x, td.Tensor) else x), expected, rtol=1e-6)


# ---------------------------------------------------------------- making one


def test_python_numbers_become_float32_and_integers_stay() -> None:
    assert td.tensor([1.0, 2.5]).dtype == "float32"
    assert td.tensor(1.5).dtype == "float32" and td.tensor(1.5).shape == ()
    assert td.tensor([[1, 2]]).dtype == "int64"
    assert td.tensor([True]).dtype == "bool"
    assert td.tensor([1, 2], dtype="float32", requires_grad=True).requires_grad
    assert td.tensor([1.0], dtype="float64").dtype == "float64"


def test_arrays_keep_their_dtype_and_are_copied() -> None:
    for dtype in ("float64", "float32", "int32", "uint8", "bool"):
        host = np.ones((2, 3), dtype)
        for given in (host, backend.to_device(host)):
            x = td.tensor(given)
            assert x.dtype == dtype and backend.active().is_array(x.data)
            given[0, 0] = 0
            assert x.numpy()[0, 0] == 1
            given[0, 0] = 1
    assert td.tensor(np.float64(2)).dtype == "float64"


def test_a_tensor_from_a_tensor_leaves_the_history_behind() -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    y = td.tensor(x * 2)
    assert not y.requires_grad and y.node is None
    z = td.tensor(x)
    z += 1
    equal(x, [1, 2])


def test_what_it_says_of_itself() -> None:
    x = td.tensor(np.zeros((2, 3, 4)), requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 3, 4), 3, 24, 2, "float64")
    assert x.grad is None and x.node is None and (x * 2).node.op is ops.multiply
    assert repr(td.tensor([1.0, 2.0])) == "tensor([1. 2.])"
    assert repr(td.tensor([1.0], requires_grad=True)) == "tensor([1.], requires_grad=True)"
    assert repr(td.tensor([1.0], requires_grad=True) * 2) == "tensor([2.], node=multiply)"
    assert repr(td.tensor([1])) == "tensor([1], dtype=int64)"
    assert repr(td.tensor([[1.0], [2.0]])) == "tensor([[1.]\n        [2.]])"
    assert f"{td.tensor(2.0):.3f} {td.tensor([1.0])}" == "2.000 tensor([1.])"


def test_a_large_one_gives_its_figures_in_one_line() -> None:
    x = td.tensor(np.arange(12.0).reshape(3, 4), dtype="float32", requires_grad=True)
    figures = "tensor(shape (3, 4), float32, 0 to 11, mean 5.5, deviation 3.45"
    assert repr(x) == f"{figures}, requires_grad=True)"
    y = ops.tanh(x * 0)
    ops.sum(x * 2).backward()
    assert repr(x) == f"{figures}, |grad| 6.93, requires_grad=True)"  # 2 sqrt 12
    assert repr(y) == "tensor(shape (3, 4), float32, 0 to 0, mean 0, deviation 0, node=tanh)"
    assert str(x.detach()).startswith("tensor([[ 0.  1.  2.  3.]\n        [ 4."), "print shows the values"
    z = x.numpy().copy()
    z[0, :3] = np.nan, np.inf, -np.inf
    assert repr(td.tensor(z)) == "tensor(shape (3, 4), float32, 3 to 11, mean 7, deviation 2.58, NaN 1, Inf 2)"
    assert repr(td.tensor(np.full(11, np.nan))) == "tensor(shape (11,), float64, NaN 11)"
    assert repr(td.tensor(np.zeros((0, 3)))) == "tensor([], dtype=float64)"
    assert "bool, 0 to 1, mean 0.99" in repr(td.tensor(np.arange(100) > 0))
    small = td.tensor([3.0, 4.0], requires_grad=True)
    ops.sum(small * small).backward()
    assert repr(small) == "tensor([3. 4.], |grad|=10, requires_grad=True)"


def test_a_notebook_shows_a_table_and_a_picture() -> None:
    image = np.linspace(0, 1, 12).reshape(2, 3, 2)[..., :1].repeat(3, axis=2)[None]  # (1, 2, 3, 3)
    image[0, 0, 0, 0] = np.nan
    shown = td.tensor(image, requires_grad=True)._repr_html_()
    for text in ("<td>(1, 2, 3, 3)</td>", "<td>float64</td>", "<td>requires_grad=True</td>", "<th", "NaN"):
        assert text in shown
    png = base64.b64decode(shown.split("base64,")[1].split("'")[0])
    pixels = pytest.importorskip("matplotlib.image").imread(io.BytesIO(png), format="png")  # (H, W, 3), in 0 .. 1
    np.testing.assert_allclose(pixels[0, 0] * 255, summary.MAGENTA, atol=0.5)
    wanted = image[0, 1, 1] / image[0, 1, 2]  # the darkest is 0, the brightest the last
    np.testing.assert_allclose(pixels[1, 1], wanted, atol=1 / 255)
    assert "<img" in td.tensor(np.full((300, 5), np.nan))._repr_html_()
    for shape in ((3,), (2, 3, 3), (2, 3, 3, 2), (0, 3), (1, 3, 3, 3, 3)):
        assert "<img" not in td.tensor(np.ones(shape))._repr_html_()


def test_out_as_numbers() -> None:
    x = td.tensor([[1.5, 2.0]])
    assert x.tolist() == [[1.5, 2.0]] and x[0, 0].item() == 1.5 and float(x[0, 1]) == 2.0 and int(x[0, 1]) == 2
    assert bool(x[0, 0]) and not td.tensor(0.0) and td.tensor([[3]]).item() == 3
    with pytest.raises(ValueError, match=r"the truth of a Tensor.* one element, this one has shape \(1, 2\)"):
        bool(x)
    assert isinstance(x.numpy(), np.ndarray)
    assert np.asarray(x).dtype == "float32" and np.array(x, "float64").dtype == "float64"
    np.testing.assert_array_equal(np.asarray(x), x.numpy())


def test_requires_grad_can_be_set_on_a_floating_tensor() -> None:
    x = td.tensor([1.0, 2.0])
    x.requires_grad = True
    (x * x).sum().backward()
    equal(x.grad, [2, 4])
    x.requires_grad = False
    assert not (x * x).requires_grad
    x.zero_grad()
    assert x.grad is None


def test_copies_and_pickles_of_leaves() -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    twins = [copy.deepcopy(x)] if backend.name == "strict" else [copy.deepcopy(x), pickle.loads(pickle.dumps(x))]
    for twin in twins:
        assert twin.requires_grad
        twin.data += 1
        equal(x, [1, 2])
        (twin * twin).sum().backward()
        equal(twin.grad, [4, 6])
    assert x.grad is None


def test_copies_and_pickles_keep_class_and_gradient() -> None:
    w = td.nn.Parameter(backend.to_device(np.ones(2, "float32")))
    (w * 3).sum().backward()
    for twin in [copy.deepcopy(w)] if backend.name == "strict" else [copy.deepcopy(w), pickle.loads(pickle.dumps(w))]:
        assert type(twin) is td.nn.Parameter and twin.requires_grad
        equal(twin.grad, [3, 3])
        twin.zero_grad()
        equal(w.grad, [3, 3])


def test_a_copy_keeps_what_a_subclass_adds_and_the_values_of_a_gradient_with_history() -> None:
    class Tagged(td.nn.Parameter):
        pass

    w = Tagged(backend.to_device(np.ones(2)))
    w.tag = "mine"
    (w**3).sum().backward(create_graph=True)
    twin = copy.deepcopy(w)
    assert type(twin) is Tagged and twin.tag == "mine" and twin.grad.node is None
    equal(twin.grad, [3, 3])


def test_ops_are_copied_and_pickled_by_name() -> None:
    for op in (ops.tanh, ops.gelu, OPS["conv2d_p"]):
        assert copy.deepcopy(op) is op and pickle.loads(pickle.dumps(op)) is op
    net = td.nn.Sequential(td.nn.Linear(2, 3, rng=0), ops.tanh)
    twin = copy.deepcopy(net)
    assert twin[1] is ops.tanh
    equal(twin[0].weight, net[0].weight.numpy())


# ---------------------------------------------------------------- operators and methods


def test_numpys_functions_of_the_same_name_are_ops() -> None:
    x = td.tensor([0.5, 2.0], requires_grad=True)
    for name in ("exp", "sin", "sqrt", "negative", "log1p"):
        y = getattr(np, name)(x)
        equal(y, getattr(np, name)(x.numpy()))
        equal(td.grad(y.sum(), x)[0], td.grad(OPS[name](x).sum(), x)[0].numpy())
    assert np.maximum(x, 1.0).requires_grad and np.abs(x).requires_grad  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="lose the gradient"):
        np.exp(np.ones(2), out=x)  # type: ignore[call-overload]
    equal(np.float64(2) * x, x.numpy() * 2)


def test_an_array_is_changed_by_a_tensor_in_place() -> None:
    """p.data -= lr * p.grad, which is where many first training loops begin."""
    w = td.tensor([1.0, 2.0], requires_grad=True)
    (w * w).sum().backward()
    array = w.data
    if td.backend.name == "numpy":
        w.data -= np.float64(0.5) * w.grad
        assert w.data is array
        equal(w, [0, 0])
        with pytest.raises(TypeError, match=r"subtract of \(2,\), \(2,\).* would lose the gradient"):
            w.data -= w * 2
    w.data = w.data - 0.5 * w.grad.data
    assert w.dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_numpys_arrays_of_a_tensor_keep_its_dtype(dtype: str) -> None:
    x = td.tensor(np.ones(2, dtype))
    assert np.array(x).dtype == np.asarray(x).dtype == np.array(x, copy=True).dtype == dtype
    assert np.asarray(x, "float32").dtype == "float32"
    mine = np.array(x)
    mine[0] = 0
    assert x.numpy()[0] == 1
    if dtype != "float32":
        with pytest.raises(ValueError, match=f"{dtype} as float32 needs a copy"):
            np.asarray(x, "float32", copy=False)


def test_operators_are_numpys() -> None:
    a, b = np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([[2.0, 0.5], [1.0, 3.0]])
    x, y = td.tensor(a), td.tensor(b)
    pairs = [
        (x + y, a + b),
        (x - y, a - b),
        (x * y, a * b),
        (x / y, a / b),
        (x @ y, a @ b),
        (y**x, b**a),
        (-x, -a),
        (+x, a),
        (abs(x), abs(a)),
    ]
    pairs += [
        (2 + x, 2 + a),
        (2 - x, 2 - a),
        (2 * x, 2 * a),
        (2 / x, 2 / a),
        (2**x, 2**a),
        (x**2, a**2),
        (x - 1, a - 1),
        (x / 4, a / 4),
    ]
    pairs += [
        (x[0], a[0]),
        (x[..., 1], a[..., 1]),
        (x[::-1], a[::-1]),
        (x[None], a[None]),
        (x[x.data > 0], a[a > 0]),
        (x.T, a.T),
    ]
    for ours, theirs in pairs:
        assert isinstance(ours, td.Tensor)
        equal(ours, theirs)


def test_comparisons_give_arrays_of_bool() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    x, y = td.tensor(a, requires_grad=True), td.tensor(b)
    for ours, theirs in (
        (x == y, a == b),
        (x != y, a != b),
        (x < y, a < b),
        (x <= y, a <= b),
        (x > y, a > b),
        (x >= y, a >= b),
        (x > 1, a > 1),
    ):
        assert backend.active().is_array(ours) and ours.dtype == "bool"
        np.testing.assert_array_equal(backend.to_host(ours), theirs)


def test_methods_are_numpys() -> None:
    a = np.random.default_rng(0).normal(size=(2, 3, 4))
    x = td.tensor(a)
    pairs = [
        (x.sum(), a.sum()),
        (x.sum(1), a.sum(1)),
        (x.sum((0, 2), keepdims=True), a.sum((0, 2), keepdims=True)),
        (x.mean(-1), a.mean(-1)),
        (x.var(0, ddof=1), a.var(0, ddof=1)),
        (x.max((0, 1)), a.max((0, 1))),
        (x.min(), a.min()),
        (x.prod(1), a.prod(1)),
        (x.cumsum(1), a.cumsum(1)),
        (x.cumsum(), a.cumsum()),
        (x.reshape(6, 4), a.reshape(6, 4)),
        (x.reshape((4, -1)), a.reshape(4, -1)),
        (x.transpose(), a.transpose()),
        (x.transpose(1, 0, 2), a.transpose(1, 0, 2)),
        (x.transpose((2, 0, 1)), a.transpose(2, 0, 1)),
        (x.swapaxes(0, -1), a.swapaxes(0, -1)),
        (x[:1].squeeze(0), a[0]),
        (x[:1].squeeze(), a[0]),
        (x.flatten(), a.flatten()),
        (x.ravel(), a.ravel()),
        (x.clip(-0.5, None), a.clip(-0.5, None)),
        (x.copy(), a),
        (x.astype("float32"), a.astype("float32")),
    ]
    for ours, theirs in pairs:
        assert isinstance(ours, td.Tensor) and ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int64", "bool"])
def test_functions_with_real_values_never_wrap(dtype: str) -> None:
    """Of bytes and short integers NumPy's arithmetic wraps, and its exp is of float16."""
    n = np.array([[0, 88, 3], [1, 7, 0]]).astype(dtype)
    exact = n.astype("float64")
    functions = (ops.exp, ops.expm1, ops.log1p, ops.sqrt, ops.sin, ops.cos, ops.tanh, ops.sigmoid, ops.silu, ops.erf,
                 ops.gelu, ops.softplus, ops.softmax, ops.log_softmax, ops.logsumexp, ops.mean, ops.var)  # fmt: skip
    for op in functions:
        expected = op(td.tensor(exact)).numpy()
        for y in (op(td.tensor(n)).numpy(), backend.to_host(op(backend.to_device(n)))):
            assert y.dtype == "float64" or y.dtype == "float32" and dtype != "int64", op
            assert np.allclose(y, expected, rtol=1e-5, atol=1e-6), op
    a, b = td.tensor(np.array([0, 100]).astype(dtype)), td.tensor(np.array([1, 0]).astype(dtype))
    assert ops.mse_loss(a, b).item() == (1.0 if dtype == "bool" else 5000.5)
    logits = td.tensor(np.array([0.5, -2.0]))
    same = ops.binary_cross_entropy_with_logits(logits, td.tensor(np.array([1.0, 0.0])))
    assert np.isclose(ops.binary_cross_entropy_with_logits(logits, b).item(), same.item())
    x, labels = td.tensor(n), backend.to_device(np.array([2, 1]))
    assert np.isclose(ops.cross_entropy(x, labels).item(), ops.cross_entropy(td.tensor(exact), labels).item())
    q = td.tensor(n.reshape(1, 1, 2, 3))
    expected = ops.attention(*[td.tensor(exact.reshape(1, 1, 2, 3))] * 3).numpy()
    assert np.allclose(ops.attention(q, q, q).numpy(), expected, rtol=1e-5)


def test_integers_become_floating_where_functions_need_it() -> None:
    n = np.array([[1, 2, 3], [4, 5, 6]])
    x = td.tensor(n)
    for op in (
        ops.exp,
        ops.sqrt,
        ops.sigmoid,
        ops.silu,
        ops.softplus,
        ops.gelu,
        ops.softmax,
        ops.log_softmax,
        ops.logsumexp,
        ops.mean,
        ops.var,
    ):
        assert op(x).dtype == "float64"
        equal(op(x), op(td.tensor(n.astype("float64"))).numpy())
    assert ops.relu(x).dtype == ops.tril(x).dtype == (x * 2).dtype == "int64"


def test_argmax_has_no_gradient() -> None:
    a = np.random.default_rng(0).normal(size=(4, 5))
    x = td.tensor(a, requires_grad=True)
    np.testing.assert_array_equal(backend.to_host(x.argmax(1)), a.argmax(1))
    assert int(backend.to_host(x.argmax())) == a.argmax()


def test_clip_takes_bounds_that_are_tensors() -> None:
    x = td.tensor(np.array([-1.0, 0.5, 2.0]), requires_grad=True)
    y = x.clip(td.tensor([0.0, 0.0, 0.0]), td.tensor([1.0, 1.0, 1.0]))
    equal(y, [0, 0.5, 1])
    y.sum().backward()
    equal(x.grad, [0, 1, 0])


def test_iteration_gives_differentiable_rows() -> None:
    x = td.tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    a, b, c = x
    (a * 1 + b * 2 + c * 3).sum().backward()
    equal(x.grad, [[1, 1], [2, 2], [3, 3]])


def test_in_place_keeps_the_array() -> None:
    x = td.tensor([1.0, 2.0, 4.0])
    before, array = x, x.data
    x += 1
    x -= td.tensor([1.0, 1.0, 1.0])
    x *= backend.to_device(np.full(3, 2.0, "float32"))
    x /= np.float64(4)
    x[1:] = 7.0
    assert x is before and x.data is array and x.dtype == "float32"
    assert changes.changes[id(array)][0] == next(changes.clock) - 1, "the last change has been noted"
    equal(x, [0.5, 7, 7])


def test_a_tensor_as_an_index() -> None:
    x = td.tensor(np.arange(12.0).reshape(3, 4), requires_grad=True)
    rows, columns = td.tensor([0, 2, 2]), td.tensor([1, 1, 3])
    (x[rows].sum() + x[rows, columns].sum() * 10).backward()
    expected = np.zeros((3, 4))
    np.add.at(expected, [0, 2, 2], 1)
    np.add.at(expected, ([0, 2, 2], [1, 1, 3]), 10)
    equal(x.grad, expected)


def test_a_tensor_is_a_key() -> None:
    x, y = td.tensor([1.0]), td.tensor([1.0])
    assert {x: 1, y: 2}[x] == 1 and len({x, y, x}) == 2


# ---------------------------------------------------------------- ops on arrays


def test_ops_on_arrays_give_arrays_and_record_nothing() -> None:
    a = backend.to_device(np.arange(1.0, 7.0).reshape(2, 3))
    results = [
        ops.exp(a),
        ops.matmul(a, a.T),
        ops.softmax(a),
        ops.layer_norm(a),
        ops.concatenate([a, a]),
        ops.gelu(a),
        ops.mean(a, axis=0),
    ]
    for y in results:
        assert backend.active().is_array(y)


def test_every_op_is_public_and_says_what_it_is() -> None:
    for name, op in OPS.items():
        assert op.__doc__ and op.__name__ == name
    for name in ops.__all__:
        assert OPS.get(name) is getattr(ops, name)


def test_an_op_leaves_its_inputs_alone() -> None:
    a = np.random.default_rng(0).normal(size=(2, 4, 4, 4))
    x = td.tensor(a, requires_grad=True)
    w = td.tensor(np.random.default_rng(1).normal(size=(3, 3, 4, 4)), requires_grad=True)
    g = backend.to_device(np.random.default_rng(2).normal(size=(2, 4, 4, 4)))
    before = backend.to_host(g).copy()
    y = ops.group_norm(ops.silu(ops.conv2d(x, w, padding=1)), groups=2)
    y = ops.attention(y, y, y) + ops.max_pool2d(y, kernel=3, stride=1, padding=1)
    kept = y.numpy().copy()
    y.backward(g)
    equal(x, a)
    equal(y, kept)
    np.testing.assert_array_equal(backend.to_host(g), before)


def test_a_result_cannot_stop_requiring_a_gradient(each_backend: str) -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    with pytest.raises(RuntimeError, match=r"shape \(2,\) that multiply computed.*detach"):
        y.requires_grad = False
    x.requires_grad = False  # a leaf may
    assert not (x * x).requires_grad
