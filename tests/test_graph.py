"""What the graph keeps and frees, and the errors of a wrong rule."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from operator import setitem
from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import ops
from tinydiff.operators import OPS
from tinydiff.shape_dtype import ShapeDtype

pytestmark = pytest.mark.usefixtures("each_backend")


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


def test_what_was_not_passed_is_freed_as_well() -> None:
    """Only x is asked for, so nothing passes through exp(w); its output is freed with the rest of the graph."""
    x, w = leaf(3), leaf(3, seed=1)
    h = ops.exp(w)
    y = (x * h).sum()
    td.grad(y, x, retain_graph=False)
    assert h.node.out is None
    with pytest.raises(RuntimeError, match="backward a second time through"):
        td.grad(y, w)


def test_the_flags_of_many_inputs(op: Any) -> None:
    """*xs stands for all the inputs, and *_xs keeps none of their arrays."""

    def forward(*xs: Any) -> Any:
        return sum(xs)

    def plain(g: Any, _z: Any, *_xs: Any) -> Any:
        return tuple(g for _ in _xs)

    def reading(g: Any, _z: Any, *xs: Any) -> Any:
        return tuple(g * 2 * x for x in xs)

    xs = [leaf(3, seed=i) for i in range(5)]
    node = op(forward, plain)(*xs).node
    assert [hasattr(a, "ndim") and not isinstance(a, np.ndarray) for a in node.values] == [True] * 5
    made = op(lambda *xs: sum(x * x for x in xs), reading)
    made(*xs).sum().backward()
    for x in xs:
        equal(x.grad, 2 * x.numpy())


def test_a_fused_op_frees_what_it_saved() -> None:
    x = leaf(2, 8, 4)
    y = ops.group_norm(x, groups=2)
    node = y.node
    if node.residuals is None:
        pytest.skip("here the page's forward ran, which keeps nothing for its rule")
    kept = weakref.ref(node.residuals[1])
    y.sum().backward()
    assert kept() is None and node.residuals is None


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


def test_none_as_an_adjoint(op: Any) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x * y

    half = op(forward, lambda g, _z, x, y: (g * y, None))
    x, y = leaf(3), leaf(3, seed=1)
    half(x, y).sum().backward()
    equal(x.grad, y.numpy())
    assert y.grad is None
    gx, gy = td.grad(half(x, y).sum(), (x, y))
    equal(gy, np.zeros(3))


def test_an_adjoint_that_is_not_wanted_is_not_computed(op: Any) -> None:
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


def test_adjoints_are_summed_over_what_broadcasting_stretched(op: Any) -> None:
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
        (lambda g, _z, _x, _y: g, ValueError, "the rule of forward gave 1 adjoints for 2 inputs"),
        (lambda g, _z, _x, _y: (g, g, g), ValueError, "the rule of forward gave 3 adjoints for 2 inputs"),
        (
            lambda g, _z, _x, _y: (g[:2], g),
            ValueError,
            r"the rule of forward gave input 0 of shape \(3,\) an adjoint of shape \(2,\)",
        ),
        (
            lambda g, _z, _x, _y: (g, g.sum()),
            ValueError,
            r"the rule of forward gave input 1 of shape \(3,\) an adjoint of shape \(\)",
        ),
        (
            lambda g, _z, _x, _y: (g, 1.0),
            TypeError,
            r"the rule of forward gave input 1 of shape \(3,\) no array as an adjoint but 1.0",
        ),
        (
            lambda g, _z, _x, _y: (lambda: g.sum(), g),
            ValueError,
            r"the rule of forward gave input 0 of shape \(3,\) an adjoint of shape \(\)",
        ),
        (None, NotImplementedError, "forward has no rule"),
    ],
)
def test_a_wrong_rule_is_an_error_that_names_the_op(op: Any, rule: Any, error: Any, message: str) -> None:
    def forward(x: Any, y: Any) -> Any:
        return x + y

    made = op(forward, rule)
    y = made(leaf(3), leaf(3, seed=1)).sum()
    with pytest.raises(error, match=message):
        y.backward()


def test_a_fast_version_keeps_residuals_for_its_own_rule_and_may_decline(op: Any) -> None:
    """On arrays the fast rule runs, where its forward did; on Tensors always the page's."""

    def cube(x: Any) -> Any:
        return x * x * x

    made, calls = op(cube, lambda g, _z, x: 3 * g * x * x), []

    name = td.backend.active().fast or "a backend that is not in use"

    @made.fast(name)
    def cube_fast(x: Any) -> Any:
        return (x * x * x, (x * x,)) if x.size > 1 else NotImplemented

    @made.fast_vjp(name)
    def cube_vjp_fast(g: Any, _z: Any, x: Any, *, residuals: Any) -> Any:
        calls.append(x.shape)
        return 3 * g * residuals[0]

    x, one = leaf(3), leaf(1)
    equal(td.grad(made(x).sum(), x)[0], 3 * x.numpy() ** 2)
    expected = [(3,)] if td.backend.active().fast else []
    assert calls == expected
    equal(td.grad(made(one).sum(), one)[0], 3 * one.numpy() ** 2)
    (g,) = td.grad(made(x).sum(), x, create_graph=True)
    equal(td.grad(g.sum(), x)[0], 6 * x.numpy())
    assert calls == expected


def test_a_name_is_registered_once(op: Any) -> None:
    def exp(x: Any) -> Any:
        return x

    with pytest.raises(ValueError, match="an op named 'exp' already"):
        op(exp)


def test_a_rule_may_take_its_options_together(op: Any) -> None:
    made = op(lambda x, *, times, more=0: times * x, lambda g, _z, _x, **options: g * options["times"])
    x = td.tensor([1.0], requires_grad=True)
    assert td.grad(made(x, times=3.0).sum(), x)[0].item() == 3


@pytest.mark.parametrize(
    "rule", [lambda g, _z, _x: g, lambda g, _z: g, lambda g, _z, x, y, z: (g, g, g), lambda g, _z, _x, y, *zs: g]
)
def test_a_rule_takes_the_inputs_of_its_op(op: Any, rule: Any) -> None:
    """With one too few, the gradient of the other would be lost."""

    def forward(x: Any, y: Any) -> Any:
        return x + y

    with pytest.raises(TypeError, match=r"forward: the rule must take \(g, out\) and, as the op, 2 inputs, not [013]"):
        op(forward, rule)


def test_a_name_with_an_underscore_has_no_values(op: Any) -> None:
    def forward(x: Any) -> Any:
        return x * x

    rules = (
        lambda g, _z, _x: g * _x,
        lambda g, _z, x: _z * g,
        lambda g, _z, _x: -_x,
        lambda g, _z, _x: g * (_x == 0),
        lambda g, _z, _x: g if _x > 0 else -g,
        lambda g, _z, _x: g if _x else -g,
        lambda g, _z, _x: g * abs(_x),
        lambda g, _z, _x: g * float(_x),
        lambda g, _z, _x: g * len(_x),
        lambda g, _z, _x: g * (2 // _x),
        lambda g, _z, _x: g * (_x // 2),
        lambda g, _z, _x: g * (2 % _x),
        lambda g, _z, _x: g * (_x % 2),
        lambda g, _z, _x: g * divmod(_x, 2)[0],
        lambda g, _z, _x: g * divmod(2, _x)[0],
        lambda g, _z, _x: g * round(_x),
        lambda g, _z, _x: g * +_x,
        lambda g, _z, _x: g * ~_x,
        lambda g, _z, _x: g * (_x & True),
        lambda g, _z, _x: g * (True | _x),
        lambda g, _z, _x: g * (_x ^ True),
        lambda g, _z, _x: g * _x[0],
        lambda g, _z, _x: setitem(_x, 0, 1),
        lambda g, _z, _x: g[_x],
        lambda g, _z, _x: g[:_x],
        lambda g, _z, _x: g * [1, 2, 3][_x],
        lambda g, _z, _x: g * float(f"{_x:.3f}"),
        lambda g, _z, _x: g * _x.sum(),
        lambda g, _z, _x: g * _x.T,
        lambda g, _z, _x: g * td.backend.xp.sum(_x),
        lambda g, _z, _x: td.backend.xp.where(_x, g, g),
    )
    for rule in rules:
        for x in (leaf(3), leaf(3) * 1.0):
            # CuPy's own functions refuse it by its type, before it can say anything.
            says = "a name with a leading underscore|(Unsupported type|must be int) .*(ShapeDtype|Node|<node)"
            with pytest.raises((TypeError, AttributeError), match=says):
                op(forward, rule)(x).sum().backward()
            OPS.pop("forward")


def test_the_name_with_an_underscore_is_said(op: Any) -> None:
    """Of several, also in an adjoint that is computed later, inside another op, and among any number of inputs."""
    x, y = leaf(3), leaf(3) * 1.0

    def times_two(_array: Any) -> Any:
        return 2 * _array

    for rule, says in (
        (lambda g, _z, _x, _y: (g * _y, g), "the values of _y; a name"),
        (lambda g, _z, _x, _y: (lambda: g * _z, g), "the values of _z; a name"),
        (lambda g, _z, _x, _y: (ops.multiply(_x, 2.0), g), "the values of _x; a name"),
        (lambda g, _z, _x, _y: (g, _y.sum()), "asked _y for sum; a name"),
        (lambda g, _z, *_xs: [g * other for other in _xs], "the values of _xs; a name"),
        (lambda g, _z, _x, _y: (times_two(_y), g), "the values of _y; a name"),
    ):
        with pytest.raises((TypeError, AttributeError), match=says):
            op(lambda x, y: x * y, rule)(x, y).sum().backward()
        OPS.pop("<lambda>")


def test_a_name_with_an_underscore_can_be_printed() -> None:
    assert f"{ShapeDtype(np.zeros(3))}" == "a shape and dtype alone, (3,) float64 (a name with a leading underscore)"


def test_a_name_with_an_underscore_is_no_adjoint(op: Any) -> None:
    with pytest.raises(TypeError, match="no array as an adjoint but a shape and dtype alone, .* leading underscore"):
        op(lambda x: x * x, lambda g, _z, _x: _x)(leaf(3)).sum().backward()


CELL = """
@op
def from_a_cell(x):
    return x * FACTOR

@from_a_cell.vjp
def from_a_cell_vjp(g, _z, _x):
    return g * FACTOR
"""


def test_a_cell_that_defines_an_op_can_be_run_again() -> None:
    names: dict[str, Any] = {"op": td.engine.op, "__name__": "notebook"}
    try:
        for factor in (2, 3):
            exec(CELL.replace("FACTOR", str(factor)), names)
            x = leaf(3)
            equal(td.grad(names["from_a_cell"](x).sum(), x)[0], np.full(3, factor))
        with pytest.raises(ValueError, match="an op named 'from_a_cell' already"):
            exec(CELL.replace("FACTOR", "4"), {**names, "__name__": "another notebook"})
    finally:
        OPS.pop("from_a_cell", None)


def test_a_module_of_ops_can_be_reloaded() -> None:
    """In a process of its own, because the ops of this one must stay."""
    code = """
import importlib, sys, numpy as np, tinydiff as td
page = importlib.reload(sys.modules["tinydiff.ops.softmax"])
x = td.tensor(np.ones(3), requires_grad=True)
y = page.softmax(x)
print(td.grad((y * y).sum(), x)[0].numpy().round(12).tolist())
"""
    env = {**os.environ, "TINYDIFF_BACKEND": "numpy"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "[0.0, 0.0, 0.0]" in done.stdout.replace("-0.0", "0.0"), done.stderr


def test_an_option_that_requires_a_gradient_is_refused() -> None:
    x, low = leaf(3), leaf(3, seed=1)
    with pytest.raises(TypeError, match=r"clip: the option low has no gradient, but is a Tensor of shape \(3,\)"):
        ops.clip(x, low=low)
