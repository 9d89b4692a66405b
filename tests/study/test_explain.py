"""explain: what it prints is run again with NumPy alone, and must give the engine's gradients."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
import pytest
from op_examples import Example
from op_oracles import ORACLES
from op_runs import as_tensors, close, every_example, outputs_of, weights

import tinydiff as td
from tinydiff import Tensor, nn, ops
from tinydiff.__main__ import main
from tinydiff.observers import observers
from tinydiff.operators import OPS
from tinydiff.study.examples import CALLS, example
from tinydiff.study.explain import WIDTH, Explanation, explain, page

NUMPY = {name: getattr(np, name) for name in [*OPS, "s_", "inf", "nan"] if hasattr(np, name)} | ORACLES


def plain(name: str) -> str:
    """As Python reads a name."""
    return unicodedata.normalize("NFKC", name)


def run_again(told: Explanation, values: dict[str, Any], seed: Any) -> dict[str, Any]:
    """Evaluate what was printed: all forwards, then all adjoints. Returns every name with its value."""
    known = {plain(k): v for k, v in {**NUMPY, **values}.items()}
    with np.errstate(all="ignore"):
        for step in reversed(told.nodes):
            known |= {name: v.data if isinstance(v, Tensor) else v for name, v in step.constants.items()}
            known[plain(step.result)] = np.asarray(eval(step.forward, known))
        known[plain(told.nodes[0].adjoint)] = seed
        for step in told.nodes:
            for name, text in step.lets:
                known[name] = eval(text, known)
            for rule in step.rules:
                part, target = np.asarray(eval(rule.expression, known)), plain(rule.target)
                known[target] = part if rule.part == 1 else known[target] + part
    return known


def flat(text: Any) -> str:
    return " ".join(str(text).split())


# ---------------------------------------------------------------- it is right


@every_example
def test_what_it_prints_is_the_gradient(example: Example, numpy_backend: str) -> None:
    """Of every op, on every example of the tests. The loss is a sum of several, weighted, so adjoints also add up."""
    inputs, xs = as_tensors(example, example.on_device())
    for y in outputs_of(example.call(*inputs)):
        if y.node is None:
            continue
        g = weights(y.shape, y.dtype)
        told = explain(y, names={f"x{i}": x for i, x in enumerate(xs)})
        known = run_again(told, {f"x{i}": x.data for i, x in enumerate(xs)}, g)
        close([known[plain(told.nodes[0].result)]], [y.numpy()], 1e-10, 1e-10)
        want = td.grad(y, xs, g)
        close([known.get(plain(f"x\u0304{i}"), np.zeros(x.shape)) for i, x in enumerate(xs)], want, 1e-10, 1e-10)
        text = flat(told)
        assert all(flat(rule) in text for step in told.nodes for rule in step.rules)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_an_example_and_a_page(name: str, numpy_backend: str) -> None:
    result, names = example(name, "float64")
    xs = {k: x for k, x in names.items() if isinstance(x, Tensor)}
    told = explain(result, names=names)
    g = weights(result.shape)
    values = {k: x.data if isinstance(x, Tensor) else x for k, x in names.items()}
    known = run_again(told, values, g)
    bars = [plain(k[0] + "\u0304" + k[1:]) for k in xs]
    close([known[bar] for bar in bars], td.grad(result, list(xs.values()), g), 1e-10, 1e-10)
    text = page(name)
    assert f"def {name}(" in text and "On a small example:" in text and all(f"{k}" in text for k in names)
    assert all(len(line) <= WIDTH for line in str(told).splitlines())


def test_the_table_of_examples_is_complete() -> None:
    assert set(CALLS) == set(OPS)


def test_a_wrong_rule_is_printed_as_what_it_computes(op: Any, numpy_backend: str) -> None:
    def cube(x):
        return x * x * x

    x = td.tensor(np.array([1.0, 2.0]), requires_grad=True)
    y = op(cube, lambda g, _z, x: g * 2 * x * x)(x)  # it should be 3
    told = explain(y, names={"x": x})
    (rule,) = told.nodes[0].rules
    assert rule.expression == "y\u03041 * 2 * x * x"
    values = NUMPY | {"cube": cube}
    known = run_again(told, {**values, "x": x.data}, np.ones(2))
    close([known[plain("x\u0304")]], [np.array([2.0, 8.0])])


def test_a_rule_that_leaves_the_ops_shows_an_array(op: Any, numpy_backend: str) -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)

    def hidden(x):
        return x * 3

    told = explain(op(hidden, lambda g, _z, x: g * np.full(2, 3.0, "float32"))(x), names={"x": x})
    assert told.nodes[0].rules[0].expression == "y\u03041 * c0" and "where c0 = [3. 3.]" in str(told)


def test_a_mean_is_one_only_if_it_divides_by_the_number(numpy_backend: str) -> None:
    x = td.tensor([[1.0, 2.0, 3.0]], requires_grad=True)

    def expression(rule: Any) -> str:
        made = td.engine.Op(lambda x: x)
        made.vjp(rule)
        return explain(made(x), names={"x": x}).nodes[0].rules[0].expression

    assert expression(lambda g, _z, x: g * ops.mean(x)) == "y\u03041 * mean(x)"
    assert expression(lambda g, _z, x: g * (ops.sum(x) / 2)) == "y\u03041 * (sum(x) / 2)"


# ---------------------------------------------------------------- it is readable


def test_the_text(numpy_backend: str) -> None:
    x = td.tensor(np.ones((4, 3)), requires_grad=True)
    w, b = (td.tensor(np.ones(s), requires_grad=True) for s in ((3, 2), (2,)))
    h = x @ w + b
    loss = ops.sum(ops.softmax(h, axis=-1) * h)
    assert (
        str(explain(loss, names={"x": x, "W": w, "b": b, "h": h}))
        == """\
L̄ = 1

L = sum(y4)    (4, 2) -> ()
    ȳ4 = broadcast_to(reshape(L̄, shape=(1, 1)), shape=(4, 2))

y4 = y3 * h    (4, 2)
    ȳ3 = ȳ4 * h
    h̄ = ȳ4 * y3    # 1 of 2

y3 = softmax(h, axis=-1)    (4, 2)
    h̄ += y3 * (ȳ3 - sum(ȳ3 * y3, axis=-1, keepdims=True))    # 2 of 2: complete

h = y1 + b    (4, 2), (2,) -> (4, 2)
    h̄ = part of y4 (multiply) + part of y3 (softmax)
    ȳ1 = h̄
    b̄ = sum(h̄, axis=0)    # summed over axis 0: the forward had broadcast it

y1 = x @ W    (4, 3), (3, 2) -> (4, 2)
    x̄ = ȳ1 @ W.T
    W̄ = x.T @ ȳ1""".replace("\u0233", "y\u0304")
    )


def test_what_is_used_twice_has_a_line_of_its_own(numpy_backend: str) -> None:
    x = td.tensor([[1.0, 2.0]], requires_grad=True)
    (step,) = explain(ops.silu(x), names={"x": x}).nodes
    assert step.lets == [("t1", "sigmoid(x)")] and step.rules[0].expression.count("t1") == 2
    twice = explain(x * x, names={"x": x}).nodes[0].rules
    assert [(r.part, r.parts) for r in twice] == [(1, 2), (2, 2)] and "1 of 2" in str(twice[0])


def test_names_of_a_module_are_paths(each_backend: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = td.tensor(np.ones((5, 3)), dtype="float32")
    told = explain(ops.mean(net(x)), net, names={"x": x})
    targets = {rule.target for step in told.nodes for rule in step.rules}
    for path, _ in net.named_parameters():
        head, _, last = path.rpartition(".")
        assert f"{head}.{last[0]}\u0304{last[1:]}" in targets
    assert "x" in told.nodes[-1].inputs and told.nodes[-1].input_shapes[0] == (5, 3)


@pytest.mark.parametrize(
    "text",
    [
        *("a - (b - a)", "a - b - a", "-(a + b)", "-a * b", "a / (b * a)", "(a + b) * a", "(a + b)[::-1]"),
        *("(-a) ** 2", "-a ** 2", "a ** (-b)", "(a ** b) ** a", "a ** (b ** a)", "where((a < b) & (b > 1), a, 0.0)"),
    ],
)
def test_brackets_only_where_they_are_needed(text: str, numpy_backend: str) -> None:
    a, b = (td.tensor(np.full(2, v), requires_grad=True) for v in (2.0, 3.0))
    product = td.engine.Op(lambda a, b: a * b)
    product.vjp(lambda _g, _z, a, b: (eval(text, {"where": ops.where}, {"a": a, "b": b}), None))
    assert explain(product(a, b), names={"a": a, "b": b}).nodes[0].rules[0].expression == text
    product.vjp(lambda g, _z, _a, _b: g)
    with pytest.raises(ValueError, match="gave 1 adjoints for 2 inputs"):
        explain(product(a, b))


# ---------------------------------------------------------------- it changes nothing, and says what it cannot do


def test_it_changes_nothing(each_backend: str) -> None:
    x = td.tensor(np.linspace(0.5, 2, 6).reshape(2, 3), requires_grad=True)
    loss = ops.mean(ops.log(ops.softmax(x)))
    (before,) = td.grad(loss, x)
    assert str(td.explain(loss)) == str(td.explain(loss)) and not observers
    loss.backward()
    close([x.grad.numpy()], [before.numpy()], 0, 0)


def test_checkpoint_is_one_node(numpy_backend: str) -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    told = explain(ops.sum(td.checkpoint(ops.exp, x)), names={"x": x})
    assert [step.op for step in told.nodes] == ["sum", "checkpoint"]
    assert "run again" in str(told) and told.nodes[1].rules[0].target == "x\u0304"


def test_errors(numpy_backend: str) -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="not computed from any Tensor that requires a gradient"):
        explain(x)
    loss = ops.sum(x * x)
    loss.backward()
    with pytest.raises(RuntimeError, match="^what sum had kept was freed by backward: ask for this before"):
        explain(loss)


def test_a_leaf_has_its_own_name(numpy_backend: str) -> None:
    x, w = td.tensor([1.0, 2.0], requires_grad=True), td.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    other = td.tensor([3.0], requires_grad=True)
    x.name, w.name, other.name = "x", "W", "x"  # a name that is taken is none
    text = str(explain((x @ w).sum() * other))
    assert "x @ W" in text and "x0" in text


def test_what_is_only_reshaped_is_not_called_a_sum(numpy_backend: str) -> None:
    x, w = td.tensor([1.0, 2.0], requires_grad=True), td.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    text = str(explain((x @ w).sum()))
    assert "had broadcast it" not in text and "axis=()" not in text
    assert "reshaped: axes of length 1 that the input has not" in text


# ---------------------------------------------------------------- the command line


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str], numpy_backend: str) -> None:
    assert main(["explain", "softmax"]) == 0
    out = capsys.readouterr().out
    assert "z = e^x / sum e^x along the axis" in out and "def softmax_vjp(" in out
    assert "x\u0304 = z * (z\u0304 - sum(z\u0304 * z, axis=-1, keepdims=True))" in out


def test_an_unknown_op_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "sofmax"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(r"there is no op named 'sofmax': did you mean softmax, .*\?\n", said.err)
    assert main(["explain", "zzzz"]) == 2 and "choose one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "explain" in capsys.readouterr().out
