"""The exercises: right rules pass, wrong ones are named, and the registered op stays as it is."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import ops
from tinydiff.__main__ import main
from tinydiff.backend import xp
from tinydiff.engine import Op
from tinydiff.operators import OPS
from tinydiff.ops import conv, norm
from tinydiff.ops.linalg import transposed as T
from tinydiff.study import report as report_of

pytestmark = pytest.mark.usefixtures("each_backend")
EXERCISES = {ex.name: ex for ex in tinydiff.exercises()}


def adjoints(ex: Any, *arguments: Any, **params: Any) -> tuple[Any, ...]:
    """By the right rule."""
    found = ex.op.rule(*arguments, **params)
    return tuple(f() if callable(f) else f for f in (found if isinstance(found, tuple) else (found,)))


def spoilt(ex: Any, spoil: Any) -> Any:
    """The right rule, with every adjoint spoilt."""

    def rule(g, out, *inputs, **params):
        return tuple(None if a is None else spoil(a) for a in adjoints(ex, g, out, *inputs, **params))

    return rule


def halved_input_grad(g, y, x, w, b, *, geometry):
    return conv.conv2d_input_grad(g, w, None, geometry=geometry) / 2, None, g


def conv_weight(f):
    return lambda g, y, x, w, b, **p: (None, f(conv.conv2d_weight_grad(x, g, **p)), None)


# (exercise, wrong rule, what the doctor must say). `everywhere` and the slips of the catalogue come on top of these.
WRONG = [
    ("multiply", lambda g, z, x, y: (g, g * x), "the factor y is missing"),
    ("multiply", lambda g, z, x, y: (g * x, g * y), "it is the gradient of y"),
    ("multiply", lambda g, z, x, y: (g * z, g * x), "there is a factor x too many"),
    ("multiply", lambda g, z, x, y: (y, x), "the factor g is missing"),
    ("subtract", lambda g, z, x, y: (g, g), "of y: sign"),
    ("subtract", lambda g, z, x, y: (-g, g), "of x: sign"),
    ("subtract", lambda g, z, x, y: (g, -g[0]), "that of 1 of 2 repetitions"),
    ("subtract", lambda g, z, x, y: (g, -g.mean(0)), "averaged over the repetitions"),
    ("subtract", lambda g, z, x, y: (g.sum(0), -g), "has shape (3,), and must have that of x"),
    ("divide", lambda g, z, x, y: (g / y, g * z / y), "of y: sign"),
    ("divide", lambda g, z, x, y: (g, -g * z / y), "there is a factor y too many"),
    ("divide", lambda g, z, x, y: (g / y, -g * z), "there is a factor y too many"),
    ("square", lambda g, z, x: g * x, "constant factor 0.5"),
    ("square", lambda g, z, x: 2 * x, "the factor g is missing"),
    ("square", lambda g, z, x: 2 * g * z, "there is a factor x too many"),
    ("exp", lambda g, z, x: g, "the factor out is missing"),
    ("exp", lambda g, z, x: z, "the factor g is missing"),
    ("exp", lambda g, z, x: g * x * z, "there is a factor x too many"),
    ("log", lambda g, z, x: g, "there is a factor x too many"),
    ("log", lambda g, z, x: g / x**2, "the factor x is missing"),
    ("log", lambda g, z, x: -g / x, "sign"),
    ("log", lambda g, z, x: g.sum(0), "has shape (3,), and must have that of x"),
    ("sqrt", lambda g, z, x: g / z, "constant factor 2"),
    ("sqrt", lambda g, z, x: g / (2 * x), "the factor out is missing"),
    ("sqrt", lambda g, z, x: g / 2, "there is a factor out too many"),
    ("cos", lambda g, z, x: g * ops.sin(x), "sign"),
    ("cos", lambda g, z, x: -ops.sin(x), "the factor g is missing"),
    ("tanh", lambda g, z, x: 1 - z * z, "the factor g is missing"),
    ("tanh", lambda g, z, x: g * (z * z - 1), "sign"),
    ("sigmoid", lambda g, z, x: g * z, "the factor (1 - out) is missing"),
    ("sigmoid", lambda g, z, x: g * (1 - z), "the factor out is missing"),
    ("relu", lambda g, z, x: g * z, "there is a factor out too many"),
    ("softplus", lambda g, z, x: ops.sigmoid(x), "the factor g is missing"),
    ("silu", lambda g, z, x: g * x * (ops.sigmoid(x) * (1 + x * (1 - ops.sigmoid(x)))), "there is a factor x too many"),
    ("power", lambda g, z, x, y: (g * x ** (y - 1), g * z * ops.log(x)), "the factor y is missing"),
    ("power", lambda g, z, x, y: (g * y * z, g * z * ops.log(x)), "there is a factor x too many"),
    ("power", lambda g, z, x, y: (g * y * x ** (y - 1), g * z), "the factor log x is missing"),
    ("power", lambda g, z, x, y: (g * y * x ** (y - 1), g * ops.log(x)), "the factor out is missing"),
    ("maximum", lambda g, z, x, y: (g * (x < y), g * (x > y)), "it is the gradient of y"),
    ("maximum", lambda g, z, x, y: (g * z * (x > y), g * (x < y)), "a factor out too many"),
    ("sum", lambda g, z, x, *, axis, keepdims: g, "has shape (2,), and must have that of x"),
    ("sum", lambda g, z, x, **_: ops.broadcast_to(g[:, None], shape=x.shape) / 3, "constant factor 0.333333"),
    ("sum", lambda g, z, x, **_: g[:, None] * x, "there is a factor x too many"),
    ("transpose", lambda g, z, x, *, axes: g, "transposed: its axes are in the order"),
    ("transpose", lambda g, z, x, *, axes: ops.transpose(g, axes=axes), "transposed: its axes are in the order"),
    ("transpose", lambda g, z, x, *, axes: ops.transpose(g), "transposed: its axes are in the order"),
    ("pad", lambda g, z, x, **_: g, "has shape (3, 6), and must have that of x"),
    ("pad", lambda g, z, x, **_: g[1:, 2:5][::-1], "flipped along the axes (0,)"),
    ("cumsum", lambda g, z, x, *, axis: ops.cumsum(ops.flip(g, axis=1), axis=1), "flipped along the axes (1,)"),
    ("cumsum", lambda g, z, x, *, axis: g.sum(1), "has shape (2,), and must have that of x"),
    ("max", lambda g, z, x, **_: g, "has shape (2,), and must have that of x"),
    ("max", lambda g, z, x, **_: g * (x == z), "The rule raises"),
    ("getitem", lambda g, z, x, *, index: g, "has shape (3, 2), and must have that of x"),
    ("getitem", lambda g, z, x, *, index: assigned(g, x, index), "assigned, not added"),
    ("getitem", lambda g, z, x, *, index: 0 * x, "zero"),
    ("matmul", lambda g, z, x, y: (y @ T(g), T(g) @ x), "transposed"),
    ("matmul", lambda g, z, x, y: (T(x) @ g, g @ T(y)), "it is the gradient of y"),
    ("logsumexp", lambda g, z, x, **_: ops.softmax(x, axis=1), "no known pattern"),
    ("logsumexp", lambda g, z, x, **_: g * ops.softmax(x, axis=1).sum(1), "has shape (3,), and must have that of x"),
    ("softmax", lambda g, z, x, *, axis: g - ops.sum(g * z, axis=axis, keepdims=True), "the factor out is missing"),
    ("log_softmax", lambda g, z, x, *, axis: g - ops.exp(z) * ops.mean(g, axis=1, keepdims=True), "no known pattern"),
    ("mse_loss", lambda g, z, x, y, **_: (2 / 6 * (x - y), 2 / 6 * (y - x)), "the factor g is missing"),
    ("mse_loss", lambda g, z, x, y, **_: (g / 6 * (x - y), g / 6 * (y - x)), "constant factor 0.5"),
    ("mse_loss", lambda g, z, x, y, **_: (g / 3 * (x - y), g / 3 * (x - y)), "of target: sign"),
    ("cross_entropy", lambda g, z, x, y, **_: ((xp.eye(4)[y] - ops.softmax(x)) * g / 3, None), "sign"),
    ("cross_entropy", lambda g, z, x, y, **_: ((ops.softmax(x) - xp.eye(4)[y]) / 3, None), "the factor g is missing"),
    ("conv2d", halved_input_grad, "constant factor 0.5"),
    ("conv2d", conv_weight(lambda w: w[::-1, ::-1]), "flipped along the axes (0, 1)"),
    ("conv2d", conv_weight(T), "transposed: its axes are in the order (0, 1, 3, 2)"),
    ("conv2d", lambda g, y, x, w, b, **_: (None, None, g.mean((0, 1, 2))), "averaged over the repetitions"),
    ("conv_transpose2d", lambda g, x, y, w, b, *, geometry: (g, None, g), "no known pattern"),
    ("conv_transpose2d", lambda g, x, y, w, b, **_: (None, None, g[0, 0, 0]), "that of 1 of 32 repetitions"),
    ("attention", lambda g, y, q, k, v, m, **_: (None, None, None, g), "has shape (3, 2), and must have that of mask"),
]


def assigned(g: Any, x: Any, index: Any) -> Any:
    """z[index] = g for the index 0, 2, 2: the last one stays."""
    z = xp.zeros(x.shape)
    z[0], z[2] = g[0], g[2]
    return z


# What can be done to every right rule.
EVERYWHERE = [(lambda a: -a, "sign"), (lambda a: 2 * a, "constant factor 2"), (lambda a: 0 * a, "zero")]
SLIPS = [(ex.name, rule, words) for ex in EXERCISES.values() for words, rule in ex.sheet.slips]
SPOILT = [(ex.name, spoilt(ex, spoil), words) for ex in EXERCISES.values() for spoil, words in EVERYWHERE]


def test_there_are_enough() -> None:
    assert len(EXERCISES) >= 24
    for name, ex in EXERCISES.items():
        assert sum(name == case[0] for case in WRONG + SLIPS) >= 3, name
        assert 2 <= len(ex.sheet.hints) <= 4, name
    levels = [ex.level for ex in EXERCISES.values()]
    assert levels == sorted(levels) and set(levels) == {1, 2, 3, 4}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_rule_passes(name: str) -> None:
    answer = EXERCISES[name].check(EXERCISES[name].op.rule)
    assert answer.ok and str(answer).startswith(f"Right. {name}"), answer.text
    assert re.search(rf"relative error \S+, ({'|'.join(EXERCISES[name].names)}) at \(", answer.text), answer.text


# On CuPy the right rules run; the words for wrong ones come from arithmetic on the host, the same with every backend.
@pytest.mark.skipif(tinydiff.backend.name == "cupy", reason="hundreds of small cases, slow on an emulated device")
@pytest.mark.parametrize("name, rule, words", WRONG + SLIPS + SPOILT)
def test_a_wrong_rule_is_named(name: str, rule: Any, words: str) -> None:
    answer = EXERCISES[name].check(rule)
    assert not answer.ok and words in answer.text and not re.search(r"input \d", answer.text), answer.text


MISFITS = [
    (lambda g, z, x, y: None, "The rule returns None: is a `return` missing?"),
    (lambda g, z, x, y: 1 / 0, "The rule raises ZeroDivisionError: division by zero."),
    (lambda g, z, x, y: g, "The rule returns 1 adjoints for the 2 inputs x, y."),
    (lambda g, z, x, y: (g * y, 3.0), "The adjoint of y is 3.0, and must be an array of the shape of y."),
    (lambda g, z, x, y: (g.__imul__(y), x), "The rule writes into g, which others still read: compute a new array."),
    (lambda g, z, x, y: (x.__imul__(g), x), "The rule writes into x, which others still read: compute a new array."),
    (lambda g, x: g, "This is no rule of multiply: "),
    (3, "This is no rule of multiply: it is 3, and must be a function."),
]


@pytest.mark.parametrize("rule, words", MISFITS)
def test_what_is_no_rule_gets_one_sentence(rule: Any, words: str) -> None:
    answer = EXERCISES["multiply"].check(rule)
    assert not answer.ok and answer.text.startswith(words) and "\n" not in answer.text, answer.text


@pytest.mark.parametrize("name", EXERCISES)
def test_the_op_is_never_touched(name: str) -> None:
    """After a wrong rule, a right one, and an exception."""
    found = OPS[EXERCISES[name].sheet.op_name or name]
    before = dict(vars(found)), list(OPS.items())

    def interrupted(adjoint: Any) -> Any:
        raise KeyboardInterrupt

    EXERCISES[name].check(spoilt(EXERCISES[name], lambda a: -a))
    with pytest.raises(KeyboardInterrupt):
        EXERCISES[name].check(spoilt(EXERCISES[name], interrupted))
    assert (dict(vars(found)), list(OPS.items())) == before


@pytest.mark.parametrize("name", EXERCISES)
def test_the_page_hides_the_derivation_and_the_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ex = tinydiff.exercise(name)
    page = re.sub(r" +At (0|ties): .*(\n {4}\S.*)*", "", capsys.readouterr().out)  # what holds at kinks may be told
    assert ex.op.forward.__name__ in page and "Write its rule: (g, out, " in page
    assert "\u0304" not in page and "vjp" not in page and "d" + ex.names[0] not in page.replace("padded", "")
    if isinstance(OPS[ex.sheet.op_name or name], Op):
        derivation = inspect.getdoc(ex.op.forward).split("\n\n")[1]
        assert derivation.startswith("At ") or derivation.splitlines()[0] not in page
    for helper in ("axes_of", "axis_of", "floating"):
        assert (f"{helper}(" in str(ex)) == (f"\n{helper} " in str(ex))
    ex.solution()
    assert inspect.getsource(ex.op.rule).rstrip() in capsys.readouterr().out


def test_hints_come_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    ex = tinydiff.exercises()[0]
    for _ in range(3):
        ex.hint()
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("Hint 1 of 2: Write the differential") and second == "Hint 2 of 2: dz = y dx + x dy."
    assert "no more hints" in last and "solution" in last


def test_the_solution_has_the_derivation_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    EXERCISES["softmax"].solution()
    EXERCISES["group_norm"].solution()
    text = capsys.readouterr().out
    assert "From tinydiff/ops/softmax.py" in text and "dz / z = dx - sum(z dx)" in text
    assert "var divides by m, not m - 1" in text  # the head of the file


def test_a_decorator_tries_the_rule_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    @EXERCISES["exp"].answer
    def rule(g, z, x):
        return g * z

    assert rule(2, 3, None) == 6 and capsys.readouterr().out.startswith("Right. exp")


def test_exercises_are_found_by_name_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert tinydiff.exercise(1).name == tinydiff.exercise("multiply").name == "multiply"
    assert "multiply" in repr(tinydiff.exercises()).splitlines()[0]
    for which in (0, True, "xyz"):
        with pytest.raises(ValueError, match="there is no exercise .*multiply, subtract"):
            tinydiff.exercise(which)
    with pytest.raises(ValueError, match="there is no exercise 'multiplication': did you mean multiply"):
        tinydiff.exercise("multiplication")


def test_a_docstring_of_one_line_closes_on_it() -> None:
    assert '"""z = x y"""\n' in str(EXERCISES["multiply"])
    assert '    At 0: 0.\n    """' in str(EXERCISES["relu"])


def test_the_report_is_drawn(tmp_path: Any) -> None:
    wrong = EXERCISES["multiply"].check(lambda g, z, x, y: (g * y * (1 + 1e-5 * (x > 0)), g))
    wrong.plot(tmp_path / "wrong.png")
    EXERCISES["exp"].check(EXERCISES["exp"].op.rule).plot(tmp_path / "right.png")
    for name in ("wrong", "right"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert [compared.name for compared in wrong.report.compared] == ["x", "y"]
    with pytest.raises(ValueError, match="no elements to draw"):
        report_of.plot(EXERCISES["log"].check(lambda g, z, x: g.sum(0)).report, tmp_path / "none.png")
    with pytest.raises(ValueError, match="there is no report"):
        EXERCISES["log"].check(3).plot(tmp_path / "none.png")


def test_the_picture_says_why_a_curve_is_missing() -> None:
    """A function that complex numbers break, one whose complex step is wrong, and one where nothing is missing."""

    def compared(f: Any) -> Any:
        return tinydiff.gradcheck(f, np.array([0.5, -1.5])).compared[0]

    def refuses(x: Any) -> Any:
        if x.dtype.kind == "c":
            raise TypeError("real numbers only")
        return x * x

    _, errors, why = report_of.step_errors(compared(refuses))
    assert list(errors) == ["central differences"] and why == "no complex step: TypeError on complex arrays"
    _, errors, why = report_of.step_errors(compared(ops.abs))
    assert list(errors) == ["central differences"] and why.startswith("no complex step: it gives ")
    _, errors, why = report_of.step_errors(compared(ops.exp))
    assert list(errors) == ["central differences", "complex step"] and why == ""


def test_the_names_of_norm_inputs_are_the_ops() -> None:
    """gradcheck says input 1; the doctor says weight."""
    ex = EXERCISES["layer_norm"]
    text = ex.check(lambda g, y, x, w, b, **p: (norm.normalize_vjp(g, y, x, w, b, **p)[0](), 2 * g, g)).text
    assert "The adjoint of weight" in text and "worst: weight at" in text


def test_the_command_line_shows_an_exercise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exercise"]) == 0 and "multiply" in capsys.readouterr().out.splitlines()[0]
    assert main(["exercise", "softmax", "--hints"]) == 0
    shown = capsys.readouterr().out
    assert "Write its rule" in shown and "Hint 1 of" in shown and "vjp" not in shown
    assert "tinydiff.exercise('softmax')" in shown
    assert main(["exercise", "1", "--solution"]) == 0 and "multiply_vjp" in capsys.readouterr().out
    assert main(["exercise", "multiplication"]) == 2 and "there is no exercise" in capsys.readouterr().err
