"""The tape: how gradients flow, what is kept and freed, and what is refused instead of being silently wrong."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, modes, ops, tape
from tinydiff.tensor import OPS

pytestmark = pytest.mark.usefixtures("each_backend")


def leaf(*shape: int, seed: int = 0, dtype: str = "float64") -> td.Tensor:
    return td.tensor(np.random.default_rng(seed).normal(size=shape).astype(dtype), requires_grad=True)


def constant(*shape: int, seed: int = 1) -> td.Tensor:
    return td.tensor(np.random.default_rng(seed).normal(size=shape))


def equal(x: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(
        backend.to_host(x.data if isinstance(x, td.Tensor) else x), expected, rtol=rtol, atol=atol
    )


@pytest.fixture
def op() -> Iterator[Any]:
    """Make an op for one test: op(forward, rule). It leaves the registry afterwards."""
    before = dict(OPS)

    def make(forward: Any, rule: Any = None, **options: Any) -> Any:
        made = tape.primitive(forward, **options)
        if rule is not None:
            made.vjp(rule)
        return made

    yield make
    OPS.clear()
    OPS.update(before)


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
    slopes = []
    for i in range(4):
        values = []
        for sign in (1, -1):
            moved = w.numpy()
            moved = moved.copy()
            moved[i] += sign * h
            (d,) = td.grad(ops.group_norm(x, td.tensor(moved), b, groups=2), x, g)
            values.append((d.numpy() ** 2).sum())
        slopes.append((values[0] - values[1]) / (2 * h))
    equal(d2, slopes, rtol=1e-6)


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


def test_cotangent_is_cast_and_must_have_the_shape() -> None:
    x = leaf(3, dtype="float32")
    y = x * 2
    y.backward(np.array([1, 2, 3]), retain_graph=True)
    assert x.grad.dtype == "float32"
    equal(x.grad, [2, 4, 6])
    with pytest.raises(RuntimeError, match=r"cotangent has shape \(2,\), but the output has shape \(3,\)"):
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
    """2^60 paths: only an algorithm that visits a node once comes back."""
    x = leaf(2)
    y = x
    for _ in range(60):
        y = (y + y) * 0.5
    y.sum().backward()
    equal(x.grad, [1, 1])


def test_order_is_by_age_and_not_by_depth() -> None:
    """y is used young and old: its cotangent must be complete before it is passed on."""
    x = leaf(3)
    y = ops.sin(x)
    z = ops.exp(ops.exp(y) * 0.1) + y
    (z * y).sum().backward()
    s = np.sin(x.numpy())
    z = np.exp(np.exp(s) * 0.1) + s
    equal(x.grad, (z + s * (np.exp(np.exp(s) * 0.1) * np.exp(s) * 0.1 + 1)) * np.cos(x.numpy()))


# ---------------------------------------------------------------- modes


def test_no_grad_records_nothing_and_comes_back() -> None:
    x = leaf(3)
    with td.no_grad():
        assert not td.grad_enabled()
        y = x * 2
        with td.no_grad():
            pass
        assert not td.grad_enabled()
    assert td.grad_enabled() and not y.requires_grad and y.node is None
    with pytest.raises(ZeroDivisionError), td.no_grad():
        raise ZeroDivisionError
    assert td.grad_enabled()


def test_no_grad_as_a_decorator() -> None:
    @td.no_grad()
    def double(x: Any) -> Any:
        """Twice."""
        return double(x - 1) if float(x.sum()) > 100 else x * 2

    assert not double(leaf(3)).requires_grad and td.grad_enabled()
    assert not double(td.tensor(np.full(3, 34.0), requires_grad=True)).requires_grad and td.grad_enabled()
    assert double.__name__ == "double" and double.__doc__ == "Twice."


def test_no_grad_around_a_generator_holds_inside_it_only() -> None:
    closed = []

    @td.no_grad()
    def steps(x: Any) -> Any:
        try:
            for _ in range(2):
                x = x * 2
                factor = yield x
                x = x * (factor or 1)
            return "end"
        finally:
            closed.append(td.grad_enabled())

    run = steps(leaf(3))
    assert not next(run).requires_grad
    assert td.grad_enabled(), "the caller's mode is its own between the steps"
    assert (leaf(2) * 2).requires_grad
    y = run.send(3.0)
    assert not y.requires_grad
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == "end" and td.grad_enabled()
    other = steps(leaf(3))
    next(other)
    other.close()
    assert len(closed) == 2 and td.grad_enabled()


def test_grad_mode_belongs_to_the_thread() -> None:
    seen: dict[str, Any] = {}
    x = leaf(3)

    def work() -> None:
        seen["before"] = td.grad_enabled()
        y = (x * 2).sum()
        seen["gradient"] = td.grad(y, x)[0]

    with td.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not td.grad_enabled()
    assert seen["before"] is True
    equal(seen["gradient"], [2, 2, 2])


def test_threads_share_leaves_but_not_tapes() -> None:
    w = leaf(8, 8)
    xs = [constant(4, 8, seed=i) for i in range(4)]
    alone = [td.grad(ops.tanh(x @ w).sum(), w)[0].numpy() for x in xs]
    together: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            (together[i],) = td.grad(ops.tanh(xs[i] @ w).sum(), w)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together):
        np.testing.assert_array_equal(a, b.numpy())


def test_detach_cuts_the_history_and_shares_the_array() -> None:
    x = leaf(3)
    y = x * 2
    cut = y.detach()
    assert not cut.requires_grad and cut.node is None and cut.data is y.data
    (cut * x).sum().backward()
    equal(x.grad, y.numpy())


# ---------------------------------------------------------------- what changed after it was used


def change_data(x: td.Tensor) -> None:
    x.data = x.data * 2


def change_data_in_place(x: td.Tensor) -> None:
    x.data *= 2


def change_operator(x: td.Tensor) -> None:
    with td.no_grad():
        x *= 2


def change_plus(x: td.Tensor) -> None:
    with td.no_grad():
        x += 1


def change_item(x: td.Tensor) -> None:
    with td.no_grad():
        x[0] = 7.0


def change_through_detach(x: td.Tensor) -> None:
    y = x.detach()
    y -= 1


def change_through_reshape(x: td.Tensor) -> None:
    with td.no_grad():
        y = x.reshape(-1)
        y /= 3


def change_through_slice(x: td.Tensor) -> None:
    with td.no_grad():
        y = x[1:]
        y += 5


def change_through_transposes(x: td.Tensor) -> None:
    with td.no_grad():
        y = ops.expand_dims(x.T, axis=0).swapaxes(0, 1)
        y[0] = 1.0


CHANGES = [value for name, value in list(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_an_input_changed_after_it_was_used_is_an_error_that_names_the_op(change: Any) -> None:
    x, w = leaf(2, 3), leaf(2, 3, seed=1)
    y = (x * w).sum()
    change(x)
    with pytest.raises(RuntimeError, match="input 0 of multiply was changed in place after it was used"):
        td.grad(y, w, create_graph=True)
    with pytest.raises(RuntimeError, match="input 0 of multiply"):
        y.backward()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_an_output_changed_after_it_was_used_is_an_error_that_names_the_op(change: Any) -> None:
    x = leaf(2, 3)
    y = ops.exp(x)
    z = y.sum()
    change(y)
    with pytest.raises(RuntimeError, match="the output of exp was changed in place"):
        z.backward()


def test_a_view_made_in_the_graph_shares_the_counter() -> None:
    x = leaf(2, 3)
    h = x * 1.0
    y = ops.exp(h.reshape(3, 2).T)  # the output of exp is kept; below, its own view is changed
    flat = y.reshape(-1)
    with td.no_grad():
        flat += 1
    with pytest.raises(RuntimeError, match="the output of exp"):
        y.sum().backward()


def test_picked_rows_are_a_copy_with_a_counter_of_its_own() -> None:
    """The table may be trained on while what was looked up in it is still in use."""
    table, w = leaf(5, 3), leaf(2, 3, seed=1)
    rows = table[backend.to_device(np.array([1, 4]))]
    expected = rows.numpy().copy()
    y = (rows * w).sum()
    change_operator(table)
    y.backward()
    equal(w.grad, expected)


@pytest.mark.parametrize(
    "op", [lambda x, i: x[i], lambda x, i: ops.embedding(i, x), lambda x, i: ops.take(x, i, axis=0)]
)
def test_an_index_changed_after_it_was_used_is_an_error(op: Any) -> None:
    x, index = leaf(3, 2), td.tensor(backend.to_device(np.array([0, 1])))
    y = op(x, index).sum()
    with td.no_grad():
        index[0] = 2
    with pytest.raises(RuntimeError, match="the index of getitem was changed in place"):
        y.backward()
    plain = backend.to_device(np.array([0, 1]))
    with td.detect_anomaly():
        y = op(x, plain).sum()
        plain[0] = 2
        with pytest.raises(RuntimeError, match="an array that getitem had kept was written into"):
            y.backward()


def test_what_a_rule_does_not_read_may_change() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = (x + w).sum()
    change_operator(x)
    y.backward()
    equal(x.grad, np.ones(3))


def test_a_loop_of_updates_works() -> None:
    """Gradient descent in each of the usual ways to write it."""
    for update in ("data", "in place", "setter"):
        w = td.tensor(np.array([3.0, -2.0]), requires_grad=True)
        for _ in range(60):
            w.grad = None
            (w * w).sum().backward()
            if update == "data":
                w.data -= 0.1 * w.grad.data
            elif update == "in place":
                with td.no_grad():
                    w -= 0.1 * w.grad
            else:
                w.data = w.data - 0.1 * w.grad.data
        assert abs(w.numpy()).max() < 1e-4, update


def test_in_place_without_no_grad_is_refused() -> None:
    x = leaf(3)
    for change in (
        lambda: x.__iadd__(1),
        lambda: x.__setitem__(0, 1.0),
        lambda: x.__imul__(2),
        lambda: x.__itruediv__(2),
    ):
        with pytest.raises(RuntimeError, match=r"x has shape \(3,\) and requires a gradient, would lose that gradient"):
            change()
    assert x.version == [0]


def test_setting_a_tensor_with_history_into_one_without_is_refused() -> None:
    """It would be a gradient that is silently lost."""
    buffer, w = td.tensor(np.zeros(3)), leaf(3)
    with pytest.raises(RuntimeError, match=r"x\[index\] = y, where y has shape \(3,\) and requires a gradient"):
        buffer[:] = w * 2
    with pytest.raises(RuntimeError, match=r"x \+= y, where y"):
        buffer += w
    with td.no_grad():
        buffer += w
        buffer[td.tensor([0])] = 9.0
    equal(buffer, [9.0, *w.numpy()[1:]])


def test_data_must_keep_shape_and_dtype() -> None:
    x = leaf(3)
    x.data = leaf(3, seed=4) * 2  # a Tensor gives its array, on whatever device that is
    equal(x, 2 * leaf(3, seed=4).numpy())
    with pytest.raises(ValueError, match=r"shape \(3,\), float64 cannot become an array of shape \(2,\), float64"):
        x.data = np.ones(2)
    with pytest.raises(ValueError, match="float32"):
        x.data = np.ones(3, "float32")


# ---------------------------------------------------------------- kept and freed


def test_a_second_backward_says_so_and_retain_graph_allows_it() -> None:
    x = leaf(3)
    y = ops.exp(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    equal(x.grad, 2 * np.exp(x.numpy()))
    with pytest.raises(RuntimeError, match="backward a second time through sum.*freed by the first.*retain_graph=True"):
        y.backward()
    equal(x.grad, 2 * np.exp(x.numpy()))
    h = ops.exp(x)
    (h * 2).sum().backward()
    with pytest.raises(RuntimeError, match="second time through exp"):
        (h * 3).sum().backward()


def test_grad_keeps_the_graph() -> None:
    x = leaf(3)
    y = ops.exp(x).sum()
    for _ in range(2):
        equal(td.grad(y, x)[0], np.exp(x.numpy()))


def test_backward_frees_what_was_kept() -> None:
    """A weak reference to each kept array dies with the backward pass, although the output lives on."""
    x = leaf(1000)
    arrays = []
    y = x
    for _ in range(5):
        y = ops.exp(y * 0.1)
        arrays.append(weakref.ref(y.data))
    loss = y.sum()
    del y
    assert all(ref() is not None for ref in arrays)
    gc.disable()
    try:
        loss.backward()
        assert all(ref() is None for ref in arrays)
    finally:
        gc.enable()


def test_a_fused_op_frees_what_it_saved() -> None:
    x = leaf(2, 8, 4)
    y = ops.group_norm(x, groups=2)
    node = y.node
    while node.op.name != "normalize":
        node = node.parents[0]
    saved = weakref.ref(node.saved.rstd)
    y.sum().backward()
    assert saved() is None and node.saved is None


def test_only_what_a_rule_reads_is_kept() -> None:
    """The intermediate results of a chain of additions die as they do in NumPy."""
    x = leaf(1000)
    h = x + 1.0
    ref = weakref.ref(h.data)
    y = h + 2.0
    del h
    assert ref() is None
    y.sum().backward()
    equal(x.grad, np.ones(1000))


def test_a_graph_has_no_reference_cycles() -> None:
    """Dropping the output frees everything at once, without the garbage collector."""
    x, w = leaf(4, 3), leaf(3, 3, seed=1)
    gc.collect()
    gc.disable()
    try:
        for used in (False, True):
            h = ops.silu(x @ w)
            h = ops.layer_norm(h) + td.checkpoint(lambda a: ops.tanh(a @ w), x)
            y = (
                ops.einsum("ij,ij->", h, h[..., ::-1])
                + ops.logsumexp(h).sum()
                + h.prod()
                + ops.attention(h, h, h).max()
            )
            refs = [weakref.ref(y), weakref.ref(h), weakref.ref(h.data), weakref.ref(y.data)]
            if used:
                y.backward()
            del h, y
            assert [r() for r in refs] == [None] * 4, used
    finally:
        gc.enable()


def test_a_rule_that_raises_leaves_no_gradient_behind(op: Any) -> None:
    def forward(x: Any) -> Any:
        return x * 1.0

    def rule(g: Any, _z: Any, _x: Any) -> Any:
        raise ZeroDivisionError("no")

    broken = op(forward, rule)
    x, w = leaf(3), leaf(3, seed=1)
    y = broken(x) * w
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    assert x.grad is None and w.grad is None and td.grad_enabled()
    with pytest.raises(ZeroDivisionError):
        td.grad((broken(x) * w).sum(), x, create_graph=True)
    assert td.grad_enabled()


# ---------------------------------------------------------------- rules


def test_none_as_a_cotangent(op: Any) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x * y

    half = op(forward, lambda g, _z, x, y: (g * y, None))
    x, y = leaf(3), leaf(3, seed=1)
    half(x, y).sum().backward()
    equal(x.grad, y.numpy())
    assert y.grad is None
    gx, gy = td.grad(half(x, y).sum(), (x, y))
    equal(gy, np.zeros(3))


def test_a_cotangent_that_nobody_wants_is_not_computed(op: Any) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x * y

    calls = []

    def rule(g: Any, _z: Any, x: Any, y: Any) -> Any:
        return lambda: calls.append("x") or g * y, lambda: calls.append("y") or g * x

    product = op(forward, rule)
    x, y = leaf(3), constant(3)
    product(x, y).sum().backward()
    assert calls == ["x"]
    a, b = leaf(3), leaf(3, seed=1)
    td.grad(product(a, b).sum(), b)
    assert calls == ["x", "y"]


def test_cotangents_are_summed_over_what_broadcasting_stretched(op: Any) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x + y

    add = op(forward, lambda g, _z, _x, _y: (g, g))
    shapes = [
        ((3, 1), (1, 4)),
        ((), (2, 3)),
        ((1,), (2, 1, 3)),
        ((2, 1, 3), (5, 1)),
        ((1, 1), (1, 1)),
        ((0, 3), (1, 3)),
    ]
    for a, b in shapes:
        x, y = leaf(*a), leaf(*b, seed=1)
        z = add(x, y)
        g = np.random.default_rng(2).normal(size=z.shape)
        z.backward(g)
        for t in (x, y):
            lead = tuple(range(g.ndim - t.ndim))
            ones = tuple(i + len(lead) for i, n in enumerate(t.shape) if n == 1 and g.shape[i + len(lead)] != 1)
            equal(t.grad, g.sum(lead + ones).reshape(t.shape))


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda g, _z, _x, _y: g, ValueError, "the rule of forward gave 1 cotangents for 2 inputs"),
        (lambda g, _z, _x, _y: (g, g, g), ValueError, "the rule of forward gave 3 cotangents for 2 inputs"),
        (
            lambda g, _z, _x, _y: (g[:2], g),
            ValueError,
            r"the rule of forward gave input 0 of shape \(3,\) a cotangent of shape \(2,\)",
        ),
        (
            lambda g, _z, _x, _y: (g, g.sum()),
            ValueError,
            r"the rule of forward gave input 1 of shape \(3,\) a cotangent of shape \(\)",
        ),
        (
            lambda g, _z, _x, _y: (g, 1.0),
            TypeError,
            r"the rule of forward gave input 1 of shape \(3,\) no array as a cotangent but 1.0",
        ),
        (None, NotImplementedError, "forward has no rule"),
    ],
)
def test_a_wrong_rule_is_an_error_that_names_the_op(op: Any, rule: Any, error: Any, message: str) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x + y

    made = op(forward, rule)
    if rule is None:
        made.keeps = [False, False]
    y = made(leaf(3), leaf(3, seed=1)).sum()
    with pytest.raises(error, match=message):
        y.backward()


def test_saved_arrays_without_a_reference_have_no_second_derivative(op: Any) -> None:
    """The rule would take what was saved for a constant, and the second derivative would be silently wrong."""

    def forward(x: Any) -> Any:
        return x * x * x, tape.Saved(square=x * x)

    def rule(g: Any, _z: Any, _x: Any, *, saved: Any) -> Any:
        return 3 * g * saved.square

    cube = op(forward, rule)
    x = leaf(3)
    equal(td.grad(cube(x).sum(), x)[0], 3 * x.numpy() ** 2)
    with pytest.raises(NotImplementedError, match="forward saves arrays.*@forward.reference"):
        td.grad(cube(x).sum(), x, create_graph=True)


def test_a_name_is_registered_once(op: Any) -> None:
    def exp(x: Any) -> Any:
        return x

    with pytest.raises(ValueError, match="an op named 'exp' already"):
        op(exp)


def test_an_option_that_requires_a_gradient_is_refused() -> None:
    x, low = leaf(3), leaf(3, seed=1)
    with pytest.raises(TypeError, match=r"clip: the option low has no gradient, but is a Tensor of shape \(3,\)"):
        ops.clip(x, low=low)


# ---------------------------------------------------------------- checkpoint


class Block:
    """A function with weights in its closure, an intermediate Tensor from outside, and dropout."""

    def __init__(self) -> None:
        self.x, self.w, self.outer = leaf(4, 3), leaf(3, 3, seed=1), leaf(3, seed=2)
        self.rng = td.Rng(5)
        self.runs = 0

    def __call__(self, a: Any) -> Any:
        self.runs += 1
        return ops.dropout(ops.tanh(a @ self.w + self.shift), p=0.4, rng=self.rng) * self.shift

    def loss(self, checkpointed: bool) -> Any:
        self.rng = td.Rng(5)
        self.shift = ops.exp(self.outer)  # captured, and not a leaf
        h = self.x * 2
        h = td.checkpoint(self, h) if checkpointed else self(h)
        h = td.checkpoint(self, h) if checkpointed else self(h)
        return (h * h).sum() + (self.shift * 3).sum()

    @property
    def leaves(self) -> tuple[Any, ...]:
        return self.x, self.w, self.outer


def test_checkpoint_gives_the_same_gradients() -> None:
    block = Block()
    plain, again = block.loss(False), block.loss(True)
    equal(again, plain.numpy())
    for a, b in zip(td.grad(plain, block.leaves), td.grad(again, block.leaves)):
        equal(b, a.numpy())
    again.backward()
    for x, a in zip(block.leaves, td.grad(block.loss(False), block.leaves)):
        equal(x.grad, a.numpy())
    with pytest.raises(RuntimeError, match="second time through"):
        again.backward()


def test_checkpoint_leaves_the_random_numbers_where_they_would_be() -> None:
    block = Block()
    block.loss(False)
    expected = block.rng.step
    loss = block.loss(True)
    assert block.rng.step == expected == 2
    loss.backward()
    assert block.rng.step == expected


def test_checkpoint_can_be_differentiated_twice() -> None:
    block = Block()
    second = []
    for checkpointed in (False, True):
        first = td.grad(block.loss(checkpointed), block.leaves, create_graph=True)
        second.append(td.grad(sum(((g * g).sum() for g in first), td.tensor(0.0, dtype="float64")), block.leaves))
    for a, b in zip(*second):
        equal(b, a.numpy(), rtol=1e-10)


def test_checkpoint_inside_checkpoint() -> None:
    x, w = leaf(3, 3), leaf(3, 3, seed=1)
    source = td.Rng(0)

    def inner(a: Any) -> Any:
        return ops.dropout(ops.tanh(a @ w), p=0.3, rng=source)

    def outer(a: Any) -> Any:
        return td.checkpoint(inner, td.checkpoint(inner, a) * w)

    nested = td.checkpoint(outer, x).sum()
    source.step = 0
    plain = inner(inner(x) * w).sum()
    for a, b in zip(td.grad(plain, (x, w)), td.grad(nested, (x, w))):
        equal(b, a.numpy())
    (g1,) = td.grad(plain, x, create_graph=True)
    (g2,) = td.grad(nested, x, create_graph=True)
    equal(td.grad((g2 * g2).sum(), w)[0], td.grad((g1 * g1).sum(), w)[0].numpy(), rtol=1e-10)


def test_checkpoint_computes_again_only_in_backward() -> None:
    block = Block()
    loss = block.loss(True)
    assert block.runs == 2
    loss.backward()
    assert block.runs == 4


def test_checkpoint_keeps_nothing_from_inside() -> None:
    x = leaf(100)
    inside = []

    def fn(a: Any) -> Any:
        for _ in range(3):
            a = ops.exp(a * 0.1)
            inside.append(weakref.ref(a.data))
        return a * 2.0

    y = td.checkpoint(fn, x)
    assert [ref() for ref in inside] == [None] * 3
    y.sum().backward()
    assert [ref() for ref in inside] == [None] * 6


def test_checkpoint_under_no_grad_and_of_constants() -> None:
    x = leaf(3)
    with td.no_grad():
        assert not td.checkpoint(ops.exp, x).requires_grad
    y = td.checkpoint(ops.exp, constant(3))
    assert not y.requires_grad and y.node is None


def test_checkpoint_of_a_function_that_returns_what_it_was_given() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    logged = []

    def fn(a: Any) -> Any:
        logged.append((w * w).sum())  # uses something, but not what it returns
        return a

    for h in (x, x * 2):
        (gradient,) = td.grad(td.checkpoint(fn, h).sum(), h)
        equal(gradient, np.ones(3))
    (gradient,) = td.grad(td.checkpoint(lambda a: x, w).sum(), x)
    equal(gradient, np.ones(3))


def test_checkpoint_refuses_what_is_not_a_tensor() -> None:
    for wrong, name in (((leaf(2), leaf(2)), "tuple"), (None, "NoneType"), (1.0, "float")):
        with pytest.raises(TypeError, match=f"must return one Tensor, not {name}"):
            td.checkpoint(lambda a, wrong=wrong: wrong, leaf(3))
    assert td.grad_enabled() and modes.state.captured is None


def test_an_error_inside_checkpoint_restores_everything() -> None:
    x, source = leaf(3), td.Rng(0)
    fail = [True]

    def fn(a: Any) -> Any:
        a = ops.dropout(a, p=0.5, rng=source)
        if fail[0]:
            raise ZeroDivisionError
        return a * 2

    with pytest.raises(ZeroDivisionError):
        td.checkpoint(fn, x)
    assert td.grad_enabled() and modes.state.captured is None
    fail[0] = False
    y = td.checkpoint(fn, x).sum()
    fail[0], step = True, source.step
    for create_graph in (False, True):
        with pytest.raises(ZeroDivisionError):
            td.grad(y, x, create_graph=create_graph)
        assert td.grad_enabled() and modes.state.captured is None and source.step == step and x.grad is None
    fail[0] = False
    assert td.grad(y, x)[0].shape == (3,), "nothing is broken for the next one"


def test_checkpoint_notices_a_changed_weight_or_argument() -> None:
    for changed in ("w", "t"):
        named = {"x": leaf(3), "w": leaf(3, seed=1), "t": constant(3)}  # t needs no gradient, and is read all the same
        y = td.checkpoint(lambda a, t, w=named["w"]: ops.tanh(a * w) * t, named["x"], named["t"]).sum()
        change_operator(named[changed])
        with pytest.raises(RuntimeError, match="of checkpoint was changed in place"):
            y.backward()


def test_checkpoint_notices_a_function_that_gives_something_else_the_second_time() -> None:
    x = leaf(4)
    shapes = iter([2, 3])
    y = td.checkpoint(lambda a: (a * 2)[: next(shapes)], x)
    with pytest.raises(
        RuntimeError, match=r"run again, the function gave a Tensor of shape \(3,\), not one of shape \(2,\)"
    ):
        y.backward(np.ones(2))


def test_checkpoint_notices_other_random_numbers_the_second_time() -> None:
    x = leaf(100)
    y = td.checkpoint(lambda a: ops.dropout(a, p=0.5, rng=td.Rng()), x).sum()
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        y.backward()
    fixed = td.checkpoint(lambda a: ops.dropout(a, p=0.5, rng=td.Rng(3)), x)
    fixed.sum().backward()
    equal(x.grad, np.where(fixed.numpy() != 0, 2.0, 0.0))


def test_a_view_out_of_checkpoint_shares_the_counter() -> None:
    x = leaf(2, 3)
    h = x * 2
    y = td.checkpoint(lambda a: (a * a).sum() * 0 + a, h)
    z = td.checkpoint(lambda a: a.reshape(-1), h)
    with td.no_grad():
        z += 1
    del y
    with pytest.raises(RuntimeError, match="changed in place"):
        (h * h).sum()  # recorded after the change: fine
        td.grad(z.sum(), h)


def test_checkpoint_in_two_threads() -> None:
    x, w = leaf(4, 3), leaf(3, 3, seed=1)
    expected = td.grad(ops.tanh(x @ w).sum(), w)[0].numpy()
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(10):
            (found[i],) = td.grad(td.checkpoint(lambda a: ops.tanh(a @ w), x).sum(), w)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for g in found:
        equal(g, expected)


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
