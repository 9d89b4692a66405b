"""The matrix: the tests that every op must pass, one test per row, over the registry, its examples
(op_examples.py) and the backends.

Rows 5 and 9 are in test_rules_shapes.py and test_rules_graph.py, ties and extremes in test_rules_edges.py.

Whoever adds an op adds examples, and, unless NumPy has a function of its name, an oracle (op_oracles.py).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest
import strict
from conftest import BACKENDS, in_use
from op_examples import EXAMPLES, NAMED, Example
from op_oracles import expected
from op_runs import as_tensors, close, every_example, outputs_of, run, run_twice, weights

from tinydiff import Tensor, backend, grad, gradcheck, ops
from tinydiff.backend import xp
from tinydiff.engine import Op
from tinydiff.operators import OPS

# ---------------------------------------------------------------- 0. the registry


def test_every_op_has_examples() -> None:
    assert {e.op for e in EXAMPLES} == set(OPS)


def test_every_op_is_public_or_says_whose_part_it_is() -> None:
    parts = {
        "concatenate_p": "concatenate",
        "einsum_p": "einsum",
        "exact_gelu": "gelu",
        "normalize": "group_norm",
        "shift_normalize_silu": "group_norm",
        "scaled_dot_product_attention": "attention",
    }
    parts |= dict.fromkeys(("conv2d_p", "conv2d_input_grad", "conv2d_weight_grad"), "conv2d")
    assert set(OPS) - set(ops.__all__) == set(parts)
    assert set(ops.__all__) <= set(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_docstring_has_the_formula_and_the_adjoint(name: str) -> None:
    op: Any = OPS[name]
    text = inspect.getdoc(op) or ""
    assert len(text) > 15
    if isinstance(op, Op):
        assert "\u0304" in text or "adjoint" in text, "no line says what the adjoint of x is"
        assert "=" in text, "no formula"


@pytest.mark.parametrize(
    "name", ["abs", "clip", "max", "max_pool2d", "maximum", "min", "minimum", "power", "relu", "sign", "sqrt"]
)
def test_an_op_with_kinks_states_its_convention(name: str) -> None:
    assert re.search("At (0|ties): ", inspect.getdoc(OPS[name]) or "")


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


# ---------------------------------------------------------------- 3. numbers, 4. second derivatives


@every_example
def test_the_gradient_equals_numbers(example: Example, numpy_backend: str) -> None:
    report = gradcheck(lambda *xs: example.call(*xs), *example.inputs)
    assert not report.kinks, "an example has to keep away from kinks"
    assert report.checked == report.elements or report.elements > 4096
    if getattr(OPS[example.op], "holomorphic", True):
        assert set(report.methods) <= {"complex step"}, "not holomorphic, and the op has to say so"


@every_example
def test_the_second_derivatives_equal_numbers(example: Example, numpy_backend: str) -> None:
    report = gradcheck(lambda *xs: example.call(*xs), *example.inputs, order=2)
    assert not report.kinks
    assert report.checked == report.elements or report.elements > 4096


def test_the_ops_that_are_not_holomorphic_are_few() -> None:
    assert {name for name, op in OPS.items() if not getattr(op, "holomorphic", True)} == {"abs", "astype", "sign"}


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
def test_an_adjoint_of_any_memory_order_gives_the_same(example: Example, each_backend: str) -> None:
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
                close(
                    [x.numpy() for x in same],
                    [x.numpy() for x in grad(y, xs, xp.broadcast_to(constant, y.shape).copy())],
                )


# ---------------------------------------------------------------- 7. purity


def watch_rules(monkeypatch: pytest.MonkeyPatch, before: Any = None, after: Any = None) -> None:
    """Call before(arrays that a rule is given) and after(op, adjoint, input) around every rule that runs, on the page
    or fast."""

    def watched(op: Op, rule: Any) -> Any:
        def run_rule(g: Any, out: Any, *inputs: Any, **params: Any) -> Any:
            if before is not None:
                before([g, out, *inputs, *(params.get("residuals") or ())])
            found = rule(g, out, *inputs, **params)
            if found is NotImplemented:
                return found
            return tuple(looked_at(c, x) for c, x in zip(found if isinstance(found, tuple) else (found,), inputs))

        def looked_at(adjoint: Any, x: Any) -> Any:
            if callable(adjoint):
                return lambda: looked_at(adjoint(), x)
            if after is not None and adjoint is not None:
                after(op, adjoint, x)
            return adjoint

        return run_rule

    for op in OPS.values():
        if isinstance(op, Op) and op.rule is not None:
            monkeypatch.setattr(op, "rule", watched(op, op.rule))
            monkeypatch.setattr(op, "fast_rules", {name: watched(op, rule) for name, rule in op.fast_rules.items()})


@every_example
def test_nothing_is_written_into_what_was_given(
    example: Example, numpy_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """Also before the engine casts: a rule that computes in float64 would be slow without any error."""

    def same(op: Op, adjoint: Any, x: Any) -> None:
        if hasattr(x, "dtype") and x.dtype.kind == "f":
            assert adjoint.dtype == x.dtype, f"the rule of {op.name} makes {adjoint.dtype} of {x.dtype}"

    watch_rules(monkeypatch, after=same)
    values: dict[str, Any] = {}
    for dtype in ("float64", "float32"):
        arrays = example.on_device(dtype)
        params = {
            k: v.astype(dtype) if isinstance(v, np.ndarray) and v.dtype.kind == "f" else v
            for k, v in example.params.items()
        }
        this = example._replace(params=params)
        assert all(y.dtype == dtype for y in outputs_of(this.call(*arrays)))
        ys, gradients = values[dtype] = run(this, arrays)
        assert all(a.dtype == dtype for a in (*ys, *gradients, *run_twice(this, arrays)))
    close(values["float32"][0], values["float64"][0], 2e-4, 1e-5)
    close(values["float32"][1], values["float64"][1], 2e-3, 1e-4)


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
