"""The matrix: what every op must pass, one test a row, over the registry, its examples (op_examples.py) and the backends.

Whoever adds an op adds examples, and, unless NumPy has a function of its name, an oracle (op_oracles.py).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import strict
from conftest import BACKENDS, in_use
from hypothesis import given, settings
from hypothesis import strategies as st
from op_examples import EXAMPLES, NAMED, Example
from op_oracles import expected

from tinydiff import Tensor, backend, grad, gradcheck, ops, tensor
from tinydiff.backend import xp
from tinydiff.tape import Primitive, Saved
from tinydiff.tensor import OPS

every_example = pytest.mark.parametrize("example", [pytest.param(e, id=name) for name, e in NAMED.items()])


def outputs_of(y: Any) -> list[Any]:
    return list(y) if isinstance(y, (list, tuple)) else [y]


def as_tensors(example: Example, inputs: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The inputs with Tensors that require gradients where the example has floats; and those Tensors."""
    inputs = [Tensor(x, True) if i in example.places else x for i, x in enumerate(inputs)]
    return inputs, [inputs[i] for i in example.places]


def weights(shape: tuple[int, ...], dtype: str = "float64", seed: int = 5) -> Any:
    """A random cotangent: ones would hide every error that sums to zero."""
    return backend.to_device(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def pull_back(ys: list[Any], xs: list[Tensor], create_graph: bool = False, seed: int = 5) -> list[Tensor]:
    """The gradient of the sum of <weights, y>."""
    total: list[Any] = [None] * len(xs)
    for y in ys:
        if y.requires_grad:
            found = grad(y, xs, weights(y.shape, y.dtype, seed), create_graph=create_graph)
            total = [g if t is None else t + g for t, g in zip(total, found)]
    return [Tensor(xp.zeros_like(x.data)) if t is None else t for t, x in zip(total, xs)]


def run(example: Example, inputs: list[Any], op: Any = None) -> tuple[list[Any], list[Any]]:
    """Host arrays: the outputs, and the gradients under the random cotangent."""
    inputs, xs = as_tensors(example, inputs)
    ys = outputs_of(example.call(*inputs, op=op))
    return [y.numpy() for y in ys], [g.numpy() for g in pull_back(ys, xs)]


def run_twice(example: Example, inputs: list[Any]) -> list[Any]:
    """Host arrays: the gradients of a random sum of the gradients."""
    inputs, xs = as_tensors(example, inputs)
    gradients = pull_back(outputs_of(example.call(*inputs)), xs, create_graph=True)
    return [g.numpy() for g in pull_back(gradients, xs, seed=6)]


def close(got: Any, want: Any, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- 0. the registry


def test_every_op_has_examples() -> None:
    assert {e.op for e in EXAMPLES} == set(OPS)


def test_every_op_is_public_or_says_whose_part_it_is() -> None:
    parts = {
        "join": "concatenate",
        "matrix_product": "matmul",
        "contract": "einsum",
        "normalize": "group_norm",
        "weighted_values": "attention",
    }
    parts |= dict.fromkeys(("correlate", "correlate_input", "correlate_weight"), "conv2d")
    assert set(OPS) - set(ops.__all__) == set(parts)
    assert set(ops.__all__) <= set(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_docstring_has_the_formula_and_the_adjoint(name: str) -> None:
    op: Any = OPS[name]
    text = inspect.getdoc(op) or ""
    assert len(text) > 15
    if isinstance(op, Primitive):
        assert "'" in text.replace("Einstein's", "") or "cotangent" in text, "no line says what x' is"
        assert "=" in text, "no formula"


@pytest.mark.parametrize("name", ["abs", "clip", "max", "max_pool2d", "maximum", "min", "minimum", "power", "relu", "sign", "sqrt"])
def test_an_op_with_kinks_states_its_convention(name: str) -> None:
    assert "At ties: " in (inspect.getdoc(OPS[name]) or "")


# ---------------------------------------------------------------- 1. forward


@every_example
def test_forward_equals_numpy(example: Example, each_backend: str) -> None:
    want = outputs_of(expected(example))
    arrays = example.on_device()
    got = outputs_of(example.call(*arrays))
    if any(map(backend.active().is_array, arrays)):
        assert all(backend.active().is_array(y) or isinstance(y, np.generic) for y in got), "arrays in, arrays out"
    assert all(y.dtype == "float64" for y in got)
    close([backend.to_host(y) for y in got], want)
    from_tensors = outputs_of(example.call(*as_tensors(example, arrays)[0]))
    assert all(isinstance(y, Tensor) for y in from_tensors)
    close([y.numpy() for y in from_tensors], want)


# ---------------------------------------------------------------- 2. the reference


@pytest.mark.parametrize("example", [pytest.param(e, id=n) for n, e in NAMED.items() if getattr(OPS[e.op], "definition", None)])
def test_a_fused_op_equals_its_reference(example: Example, each_backend: str) -> None:
    op: Any = OPS[example.op]
    ys, gradients = run(example, example.on_device())
    again, theirs = run(example, example.on_device(), op=lambda *xs, **params: op.definition(*xs, **{**op.defaults, **params}))
    close(ys, again)
    close(gradients, theirs)


# ---------------------------------------------------------------- 3. numbers, 4. second derivatives


@every_example
def test_the_gradient_equals_numbers(example: Example, numpy_backend: str) -> None:
    report = gradcheck(lambda *xs: example.call(*xs), *example.inputs)
    assert not report.kinks, "an example has to keep away from kinks"
    assert report.checked == report.elements or report.elements > 4096
    if getattr(OPS[example.op], "analytic", True):
        assert set(report.methods) <= {"complex step"}, "not analytic, and the op has to say so"


@every_example
def test_the_second_derivatives_equal_numbers(example: Example, numpy_backend: str) -> None:
    report = gradcheck(lambda *xs: example.call(*xs), *example.inputs, order=2)
    assert not report.kinks
    assert report.checked == report.elements or report.elements > 4096


def test_the_ops_that_are_not_analytic_are_few() -> None:
    assert {name for name, op in OPS.items() if not getattr(op, "analytic", True)} == {"abs", "astype", "sign"}


# ---------------------------------------------------------------- 5. broadcasting and axes: the examples have them; and any

shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@st.composite
def broadcastable(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast to one."""
    whole = draw(shapes)

    def part() -> tuple[int, ...]:
        cut = whole[draw(st.integers(0, len(whole))) :]
        return tuple(1 if draw(st.booleans()) else n for n in cut)

    return part(), part()


BINARY = ["add", "subtract", "multiply", "divide", "power", "maximum", "minimum"]


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(pair=broadcastable())
def test_binary_ops_broadcast_and_sum_back(name: str, pair: Any) -> None:
    """The gradient of an input is that of the input stretched beforehand, summed over the repetitions."""
    for backend_name in BACKENDS:
        for _ in in_use(backend_name):
            rng = np.random.default_rng(0)
            hosts = [np.asarray(rng.uniform(0.5, 2, size=s)) for s in pair]
            out = np.broadcast_shapes(*pair)
            got = run(Example(name, tuple(hosts), {}), [backend.to_device(x) for x in hosts])
            full = [np.broadcast_to(x, out).copy() for x in hosts]
            want, stretched = run(Example(name, tuple(full), {}), [backend.to_device(x) for x in full])
            close(got[0], want)
            for x, g, f in zip(hosts, got[1], stretched):
                extra = len(out) - x.ndim
                axes = tuple(a for a in range(len(out)) if a < extra or x.shape[a - extra] != out[a])
                close([g], [f.sum(axis=axes).reshape(x.shape)])


@pytest.mark.parametrize("name", ["sum", "mean", "var", "prod", "max", "min", "logsumexp"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 3), max_size=4), data=st.data())
def test_reductions_over_any_axes(name: str, shape: list[int], data: Any) -> None:
    axis: Any = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True) if shape else st.just([]))
    axis = tuple(a - len(shape) if data.draw(st.booleans()) else a for a in axis)
    if len(axis) == 1 and data.draw(st.booleans()):
        axis = axis[0]
    keepdims = data.draw(st.booleans())
    x = np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape) * 0.1 + 0.55
    example = Example(name, (x,), {"axis": axis, "keepdims": keepdims})
    for backend_name in BACKENDS:
        for _ in in_use(backend_name):
            close([backend.to_host(example.call(*example.on_device()))], [expected(example)])
    for _ in in_use("numpy"):
        gradcheck(lambda x: example.call(x), x)


# ---------------------------------------------------------------- 6. memory


def strided(x: Any) -> Any:
    """Every second element of a larger array, along each axis."""
    big = xp.zeros([2 * n for n in x.shape], x.dtype)
    view = big[(..., *(slice(None, None, 2),) * x.ndim)]
    view[...] = x
    return view


def reversed_(x: Any) -> Any:
    """From back to front in memory."""
    back = (..., *(slice(None, None, -1),) * x.ndim)
    return x[back].copy()[back]


def columns(x: Any) -> Any:
    """Column by column in memory."""
    return x.T.copy().T


def overlapping(x: Any) -> Any:
    """Rows that share memory: x[i, j] is element i + j of the flattened x."""
    flat = x.copy().reshape(-1)
    if x.size == 0:
        return x
    return xp.lib.stride_tricks.as_strided(flat, x.shape, [x.itemsize if n > 1 else 0 for n in x.shape])


@every_example
def test_any_memory_order_gives_the_same(example: Example, each_backend: str) -> None:
    plain = example.on_device()
    want = run(example, plain)
    for view in (strided, reversed_, columns, overlapping):
        viewed = [view(x) if i in example.places else x for i, x in enumerate(plain)]
        if view is overlapping:  # other values: a repeated element may be a tie, for the copy as well
            want = run(example, [x.copy() if i in example.places else x for i, x in enumerate(viewed)])
        got = run(example, viewed)
        close(got[0], want[0])
        close(got[1], want[1])


@every_example
def test_a_cotangent_of_any_memory_order_gives_the_same(example: Example, each_backend: str) -> None:
    inputs, xs = as_tensors(example, example.on_device())
    for y in outputs_of(example.call(*inputs)):
        if y.requires_grad:
            g = weights(y.shape)
            want = grad(y, xs, g)
            for view in (strided, reversed_, columns):
                close([x.numpy() for x in grad(y, xs, view(g))], [x.numpy() for x in want])
            if y.size:
                constant = weights((1,) * y.ndim)
                same = grad(y, xs, xp.broadcast_to(constant, y.shape))
                close([x.numpy() for x in same], [x.numpy() for x in grad(y, xs, xp.broadcast_to(constant, y.shape).copy())])


# ---------------------------------------------------------------- 7. purity


def watch_rules(monkeypatch: pytest.MonkeyPatch, before: Any = None, after: Any = None) -> None:
    """Call before(arrays that a rule is given) and after(op, cotangent, input) around every rule that runs."""

    def watched(op: Primitive, rule: Any) -> Any:
        def run_rule(g: Any, out: Any, *inputs: Any, **params: Any) -> Any:
            if before is not None:
                before([g, out, *inputs, *vars(params.get("saved", Saved())).values()])
            found = rule(g, out, *inputs, **params)
            return tuple(looked_at(c, x) for c, x in zip(found if isinstance(found, tuple) else (found,), inputs))

        def looked_at(cotangent: Any, x: Any) -> Any:
            if callable(cotangent):
                return lambda: looked_at(cotangent(), x)
            if after is not None and cotangent is not None:
                after(op, cotangent, x)
            return cotangent

        return run_rule

    for op in OPS.values():
        if isinstance(op, Primitive) and op.rule is not None:
            monkeypatch.setattr(op, "rule", watched(op, op.rule))


@every_example
def test_nothing_is_written_into_what_was_given(example: Example, numpy_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every array that goes into the op, is kept for its rule, or goes into the rule, read-only."""

    def freeze(arrays: list[Any]) -> None:
        for x in arrays:
            if isinstance(x, np.ndarray):
                x.setflags(write=False)

    watch_rules(monkeypatch, before=freeze)
    arrays = [x.copy() if isinstance(x, np.ndarray) else x for x in example.inputs]
    freeze(arrays)
    run(example, arrays)
    for x, y in zip(arrays, example.inputs):
        assert x is y or np.array_equal(x, y)


@every_example
def test_inputs_are_unchanged_afterwards(example: Example, each_backend: str) -> None:
    arrays = example.on_device()
    run(example, arrays)
    run_twice(example, arrays)
    for x, y in zip(arrays, example.inputs):
        assert x is y or np.array_equal(backend.to_host(x), y)


# ---------------------------------------------------------------- 8. dtype


@pytest.mark.parametrize("example", [pytest.param(e, id=n) for n, e in NAMED.items() if e.op != "astype"])
def test_dtype_in_is_dtype_out(example: Example, each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the tape casts: a rule that computes in float64 is slow in silence."""

    def same(op: Primitive, cotangent: Any, x: Any) -> None:
        if hasattr(x, "dtype") and x.dtype.kind == "f":
            assert cotangent.dtype == x.dtype, f"the rule of {op.name} makes {cotangent.dtype} of {x.dtype}"

    watch_rules(monkeypatch, after=same)
    values: dict[str, Any] = {}
    for dtype in ("float64", "float32"):
        arrays = example.on_device(dtype)
        params = {k: v.astype(dtype) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v for k, v in example.params.items()}
        this = example._replace(params=params)
        assert all(y.dtype == dtype for y in outputs_of(this.call(*arrays)))
        ys, gradients = values[dtype] = run(this, arrays)
        assert all(a.dtype == dtype for a in (*ys, *gradients, *run_twice(this, arrays)))
    close(values["float32"][0], values["float64"][0], 2e-4, 1e-5)
    close(values["float32"][1], values["float64"][1], 2e-3, 1e-4)


def test_python_and_numpy_scalars_widen_nothing(each_backend: str) -> None:
    x = tensor([0.5, 2.0], requires_grad=True)
    for number in (1.5, 2, True, np.float64(1.5), np.float32(1.5), np.int64(2)):
        for name in BINARY:
            for y in (OPS[name](x, number), OPS[name](number, x)):
                assert y.dtype == "float32", (name, number)
                assert grad(y.sum(), x)[0].dtype == "float32", (name, number)
    assert x.sum().dtype == "float32" and (x.sum() * 1.5).dtype == "float32" and (x.mean() ** 2.0).dtype == "float32"


# ---------------------------------------------------------------- 9. the graph


def test_an_input_used_twice_gets_both_gradients(each_backend: str) -> None:
    x = tensor([1.0, 2.0], "float64", requires_grad=True)
    (x * x + x).sum().backward()
    assert x.grad.tolist() == [3.0, 5.0]
    y = x.detach()
    y.requires_grad = True
    h = y * 3
    (h * h * y).sum().backward()  # 9 y^3
    assert y.grad.tolist() == [27.0, 108.0]


@pytest.mark.parametrize("name", [n for n in BINARY])
def test_one_tensor_as_both_inputs(name: str, each_backend: str) -> None:
    host = np.array([0.5, 1.5, 2.5])
    x = tensor(host, requires_grad=True)
    a, b = tensor(host, requires_grad=True), tensor(host, requires_grad=True)
    both = grad(OPS[name](a, b), (a, b), weights((3,)))
    close([grad(OPS[name](x, x), x, weights((3,)))[0].numpy()], [(both[0] + both[1]).numpy()])


def test_diamonds(each_backend: str) -> None:
    """60 diamonds have 2^60 paths and 120 nodes."""
    x = y = tensor([1.0], "float64", requires_grad=True)
    for _ in range(60):
        y = (y * 0.5) + (y * 0.5)
    (g,) = grad(y, x)
    assert g.tolist() == [1.0]


def test_a_chain_of_5000(each_backend: str) -> None:
    x = y = tensor([1.0], "float64", requires_grad=True)
    for _ in range(5000):
        y = y * 1.0001
    (g,) = grad(y, x)
    assert g.item() == pytest.approx(1.0001**5000)
    y.backward()
    assert x.grad.item() == g.item()


@every_example
def test_backward_a_second_time(example: Example, each_backend: str) -> None:
    inputs, xs = as_tensors(example, example.on_device())
    ys = [y for y in outputs_of(example.call(*inputs)) if y.requires_grad and y.node is not None]
    for y in ys[:1]:
        y.backward(weights(y.shape), retain_graph=True)
        first = [None if x.grad is None else x.grad.numpy() for x in xs]
        for x in xs:
            x.grad = None
        y.backward(weights(y.shape))
        close([x.grad.numpy() for x in xs if x.grad is not None], [g for g in first if g is not None], rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            y.backward(weights(y.shape))


# ---------------------------------------------------------------- 10. the same everywhere


def on_numpy(function: Any, example: Example) -> Any:
    for _ in in_use("numpy"):
        return function(example, example.on_device())


@every_example
@pytest.mark.parametrize("other", [name for name in BACKENDS if name != "numpy"])
def test_other_backends_give_the_same(example: Example, other: str) -> None:
    for _ in in_use("numpy"):
        want, twice = run(example, example.on_device()), run_twice(example, example.on_device())
    for _ in in_use(other):
        for scrambled in [False, True] if other == "strict" else [False]:
            with strict.scramble(scrambled):
                got, again = run(example, example.on_device()), run_twice(example, example.on_device())
            close(got[0], want[0])
            close(got[1], want[1])
            close(again, twice, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- ties


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
    assert gradient_of(ops.prod, [0.0, 2.0, 3.0]) == [[6.0, 0.0, 0.0]]
    assert gradient_of(ops.prod, [0.0, 0.0, 3.0]) == [[0.0, 0.0, 0.0]]
    assert gradient_of(lambda x: ops.max_pool2d(x, kernel=2), np.ones((1, 2, 2, 1))) == [[[[[0.25], [0.25]], [[0.25], [0.25]]]]]


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


def test_extremes_are_finite(each_backend: str) -> None:
    for dtype in ("float32", "float64"):
        x = tensor([-1000.0, -90.0, 0.0, 90.0, 1000.0], dtype, requires_grad=True)
        for f in (ops.sigmoid, ops.silu, ops.softplus, ops.tanh, ops.gelu, ops.erf, ops.softmax, ops.logsumexp, ops.log_softmax):
            y = f(x)
            assert np.isfinite(y.numpy()).all(), f
            assert np.isfinite(grad(y.sum(), x)[0].numpy()).all(), f
    x = tensor([-math.inf, -math.inf], requires_grad=True)
    y = ops.logsumexp(x)
    assert y.item() == -math.inf and grad(y, x)[0].tolist() == [0.0, 0.0]
