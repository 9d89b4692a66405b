"""How gradients flow: of any order, through deep and wide graphs, beside arrays and numbers."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import backend, changes, ops

pytestmark = pytest.mark.usefixtures("each_backend")


# ---------------------------------------------------------------- gradients


def test_grad_and_backward_agree() -> None:
    x, w = leaf(3, 4), leaf(4, 2, seed=1)
    loss = (ops.tanh(x @ w) ** 2).sum()
    gx, gw = td.grad(loss, (x, w))
    assert x.grad is None and w.grad is None, "grad leaves .grad alone"
    loss.backward()
    equal(x.grad, gx.numpy())
    equal(w.grad, gw.numpy())
    y = np.tanh(x.numpy() @ w.numpy())
    equal(gx, (2 * y * (1 - y**2)) @ w.numpy().T)


def test_one_tensor_instead_of_a_tuple() -> None:
    x = leaf(3)
    (gradient,) = td.grad((x * x).sum(), x)
    equal(gradient, 2 * x.numpy())


def test_third_derivative() -> None:
    x = leaf(5)
    y = (x**4 + ops.sin(x)).sum()
    (d1,) = td.grad(y, x, create_graph=True)
    (d2,) = td.grad(d1.sum(), x, create_graph=True)
    (d3,) = td.grad(d2.sum(), x)
    a = x.numpy()
    equal(d1, 4 * a**3 + np.cos(a))
    equal(d2, 12 * a**2 - np.sin(a))
    equal(d3, 24 * a - np.cos(a))
    assert d2.requires_grad and not d3.requires_grad


def test_create_graph_through_a_fused_op() -> None:
    x, w, b = leaf(2, 3, 4), leaf(4, seed=1), leaf(4, seed=2)
    g = constant(2, 3, 4)
    (d1,) = td.grad(ops.group_norm(x, w, b, groups=2), x, g, create_graph=True)
    (d2,) = td.grad((d1 * d1).sum(), w)
    h = 1e-6
    differences = []
    for i in range(4):
        values = []
        for sign in (1, -1):
            moved = w.numpy()
            moved = moved.copy()
            moved[i] += sign * h
            (d,) = td.grad(ops.group_norm(x, td.tensor(moved), b, groups=2), x, g)
            values.append((d.numpy() ** 2).sum())
        differences.append((values[0] - values[1]) / (2 * h))
    equal(d2, differences, rtol=1e-6)


def test_backward_with_create_graph_leaves_differentiable_gradients() -> None:
    x = leaf(4)
    (x**3).sum().backward(create_graph=True)
    (second,) = td.grad(x.grad.sum(), x)
    equal(second, 6 * x.numpy())


def test_gradients_accumulate_over_backwards_and_over_uses() -> None:
    x = leaf(3)
    (x * 2).sum().backward()
    (x * 3 + x).sum().backward()
    equal(x.grad, np.full(3, 6.0))


def test_one_tensor_twice_in_one_op() -> None:
    x = leaf(3)
    (x * x).sum().backward()
    equal(x.grad, 2 * x.numpy())
    m = leaf(3, 3)
    (gradient,) = td.grad((m @ m).sum(), m)
    ones, a = np.ones((3, 3)), m.numpy()
    equal(gradient, ones @ a.T + a.T @ ones)
    y = ops.concatenate([x, x * 2, x])
    (gradient,) = td.grad(y, x, td.tensor(np.arange(9.0)))
    equal(gradient, np.arange(3) + 2 * np.arange(3, 6) + np.arange(6, 9))


def test_one_tensor_twice_in_a_fused_op_with_create_graph() -> None:
    x = leaf(1, 1, 3, 2)
    weights = constant(1, 1, 3, 2)

    def total(q: Any, k: Any, v: Any) -> Any:
        return (ops.attention(q, k, v) * weights).sum()

    (plain,) = td.grad(total(x, x, x), x)
    (recorded,) = td.grad(total(x, x, x), x, create_graph=True)
    equal(recorded, plain.numpy())
    parts = [td.tensor(x.data, requires_grad=True) for _ in range(3)]
    equal(plain, sum(g.numpy() for g in td.grad(total(*parts), parts)))


def test_gradient_of_an_intermediate_result_and_of_what_lies_before_it() -> None:
    x = leaf(3)
    y = ops.exp(x)
    z = (y * y).sum()
    gy, gx = td.grad(z, (y, x))
    equal(gy, 2 * y.numpy())
    equal(gx, 2 * y.numpy() ** 2)
    (itself,) = td.grad(z, z)
    equal(itself, 1.0)


def test_gradient_of_an_input_that_is_not_reached_is_zero() -> None:
    x, other = leaf(3), leaf(2, 2, dtype="float32")
    gx, go = td.grad(x.sum(), (x, other))
    equal(gx, np.ones(3))
    equal(go, np.zeros((2, 2)))
    assert go.dtype == "float32"
    x.sum().backward()
    assert other.grad is None, "backward leaves it alone"


def test_backward_of_a_leaf() -> None:
    x = leaf(3)
    x.backward(np.array([1.0, 2.0, 3.0]))
    equal(x.grad, [1, 2, 3])


def test_adjoint_is_cast_and_must_have_the_shape() -> None:
    x = leaf(3, dtype="float32")
    y = x * 2
    y.backward(np.array([1, 2, 3]), retain_graph=True)
    assert x.grad.dtype == "float32"
    equal(x.grad, [2, 4, 6])
    with pytest.raises(RuntimeError, match=r"adjoint has shape \(2,\), but the output has shape \(3,\)"):
        y.backward(np.ones(2))
    (y.sum()).backward(0.5)
    equal(x.grad, [3, 5, 7])


def test_integer_tensors_take_part_but_get_no_gradient() -> None:
    x, n = leaf(3), td.tensor([1, 2, 3])
    (x * n).sum().backward()
    equal(x.grad, [1, 2, 3])
    assert n.grad is None
    assert not x.astype("int64").requires_grad


def test_a_gradient_keeps_the_dtype_of_its_input() -> None:
    x, w = leaf(3, dtype="float32"), leaf(3, seed=1)
    (x * w).sum().backward()
    assert (x.grad.dtype, w.grad.dtype) == ("float32", "float64")


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_have_memory_of_their_own(create_graph: bool) -> None:
    """add's rule hands one array to both inputs, sum's a read-only view;
    scaling one gradient must not change another.
    """
    x, y = leaf(3), leaf(3, seed=1)
    given = backend.to_device(np.ones(3))
    (x + y).backward(given, create_graph=create_graph)
    gx, gy = td.grad((x + y).sum(), (x, y), create_graph=create_graph)
    with td.no_grad():
        x.grad *= 2
        gx *= 5
    equal(y.grad, np.ones(3))
    equal(gy, np.ones(3))
    equal(given, np.ones(3))
    equal(x.grad, 2 * np.ones(3))
    equal(gx, 5 * np.ones(3))


@pytest.mark.parametrize("create_graph", [False, True])
def test_reshaped_gradients_have_memory_of_their_own(create_graph: bool) -> None:
    """reshape's rule hands on the adjoint as a view: here of one array for x and y, and of the caller's for z."""
    x, y, z = leaf(4), leaf(4, seed=1), leaf(4, seed=2)
    given = backend.to_device(np.ones((2, 2)))
    (x.reshape(2, 2) + y.reshape(2, 2)).backward(given.copy(), create_graph=create_graph)
    z.reshape(2, 2).backward(given, create_graph=create_graph)
    with td.no_grad():
        x.grad *= 2
        z.grad *= 3
    equal(x.grad, 2 * np.ones(4))
    equal(y.grad, np.ones(4))
    equal(given, np.ones((2, 2)))


# ---------------------------------------------------------------- deep and wide graphs


def test_a_chain_of_5000() -> None:
    x = leaf(2)
    y = x
    for _ in range(5000):
        y = y * 1.0
    y.sum().backward()
    equal(x.grad, [1, 1])
    del y  # 5000 nested destructors


def test_60_diamonds() -> None:
    """2^60 paths: only an algorithm that visits each node once will end."""
    x = leaf(2)
    y = x
    for _ in range(60):
        y = (y + y) * 0.5
    y.sum().backward()
    equal(x.grad, [1, 1])


def test_order_is_by_age_and_not_by_depth() -> None:
    """y is used young and old: its adjoint must be complete before it is passed on."""
    x = leaf(3)
    y = ops.sin(x)
    z = ops.exp(ops.exp(y) * 0.1) + y
    (z * y).sum().backward()
    s = np.sin(x.numpy())
    z = np.exp(np.exp(s) * 0.1) + s
    equal(x.grad, (z + s * (np.exp(np.exp(s) * 0.1) * np.exp(s) * 0.1 + 1)) * np.cos(x.numpy()))


# ---------------------------------------------------------------- arrays and numbers beside Tensors


def test_an_array_on_the_left_of_a_tensor() -> None:
    a, b = np.arange(1.0, 4.0, dtype="float32"), np.ones((2, 3), "float32")
    x = td.tensor(np.array([2.0, 4.0, 8.0], "float32"), requires_grad=True)
    left, matrix = backend.to_device(a), backend.to_device(b)
    for y, expected in (
        (left + x, a + x.numpy()),
        (left - x, a - x.numpy()),
        (left * x, a * x.numpy()),
        (left / x, a / x.numpy()),
        (left**x, a ** x.numpy()),
        (matrix @ x, b @ x.numpy()),
    ):
        assert isinstance(y, td.Tensor) and y.requires_grad and y.dtype == "float32"
        equal(y, expected, rtol=1e-6)
    (gradient,) = td.grad((matrix @ x).sum(), x)
    equal(gradient, [2, 2, 2])
    assert isinstance((left < x)[:1], type(left)), "a comparison gives a plain array"


@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2), np.int64(2), np.float16(2)])
def test_a_number_never_widens(number: Any) -> None:
    for shape in ((3,), ()):
        x = leaf(*shape, dtype="float32")
        for y in (
            number * x,
            x * number,
            number + x,
            x - number,
            number / (x + 10),
            (x * x + 1) ** number,
            number**x,
            -x,
            abs(x),
        ):
            assert isinstance(y, td.Tensor) and y.dtype == "float32", (number, shape)
            assert td.grad(y.sum(), x)[0].dtype == "float32"
        y = ops.sqrt(x * x + 1) / ops.exp(x)
        assert y.dtype == "float32"
        assert ops.where(backend.to_device(np.ones(shape, bool)), x, 0.0).dtype == "float32"


def test_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match=r"an op takes Tensors, arrays and numbers, not list: \[1, 2, 3\]"):
        leaf(3) + [1, 2, 3]


def test_threads_lose_no_gradient_of_a_shared_leaf() -> None:
    if backend.name != "numpy":
        pytest.skip("threads of the host: one backend is enough")
    p, count = td.tensor(np.zeros(4, "float32"), requires_grad=True), 2000

    def add() -> None:
        for _ in range(count):
            (p * 1.0).sum().backward()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert p.grad.numpy().tolist() == [4 * count] * 4


def test_a_change_in_one_thread_is_not_forgotten_for_an_earlier_one_in_another(monkeypatch: Any) -> None:
    """The other thread makes a node and changes its input while this one is about to note a change of its own."""
    x = td.tensor([2.0, 3.0], requires_grad=True)
    found: list[Any] = []
    threads: list[threading.Thread] = []

    def other() -> None:
        found.append((x * x).sum())
        with td.no_grad():
            x[...] = 1.0

    class Clock:
        def __next__(self) -> int:
            now = next(clock)
            if not threads:
                threads.append(threading.Thread(target=other))
                threads[0].start()
                threads[0].join(0.3)
            return now

    clock = changes.clock
    monkeypatch.setattr(changes, "clock", Clock())
    constant = td.tensor([1.0])
    constant += 1.0
    threads[0].join()
    with pytest.raises(RuntimeError, match="changed in place"):
        found[0].backward()


def test_a_rule_that_forgets_to_return_is_an_error(op: Any) -> None:
    def rule(g: Any, _z: Any, x: Any) -> Any:
        g * 2

    forgetful = op(lambda x: 2 * x, rule)
    with pytest.raises(TypeError, match="gave None: is a return missing"):
        forgetful(td.tensor([1.0], requires_grad=True)).sum().backward()
