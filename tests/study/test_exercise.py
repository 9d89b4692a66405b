"""The exercises: right rules pass, wrong ones are named, and the registered op stays as it is."""

import pytest

import tinydiff
from tinydiff.operators import OPS
from tinydiff.study.doctor import draw

pytestmark = pytest.mark.usefixtures("numpy_backend")
CASES = [
    ("multiply", lambda g, z, x, y: (g, g * x), "the factor y is missing"),
    ("multiply", lambda g, z, x, y: (g * x, g * y), "it is the gradient of y"),
    ("multiply", lambda g, z, x, y: None, "is a `return` missing"),
    ("multiply", lambda g, z, x, y: 1 / 0, "raises ZeroDivisionError"),
    ("softmax", lambda g, z, x, *, axis: g * z, "the term sum(g z) is missing"),
    ("cos", lambda g, z, x: g * tinydiff.ops.sin(x), "sign"),
    ("square", lambda g, z, x: g * x, "constant factor 0.5"),
    ("tanh", lambda g, z, x: 1 - z * z, "the factor g is missing"),
    ("log", lambda g, z, x: g.sum(0), "has shape (3,), and must have that of x"),
    ("exp", lambda g, z, x: g.__imul__(z), "writes into g"),
]


@pytest.mark.parametrize("ex", tinydiff.exercises(), ids=lambda ex: ex.name)
def test_the_rule_of_the_page_is_right(ex):
    assert ex.check(ex.op.rule).ok


@pytest.mark.parametrize("name, rule, words", CASES)
def test_a_wrong_rule_is_named(name, rule, words):
    ex = next(ex for ex in tinydiff.exercises() if ex.name == name)
    before = OPS[ex.op.name], ex.op.rule
    answer = ex.check(rule)
    assert not answer.ok and words in answer.text, answer.text
    assert (OPS[ex.op.name], ex.op.rule) == before


def test_the_report_is_drawn(tmp_path):
    draw(tinydiff.exercises()[9].check(lambda g, z, x, *, axis: g * z).report, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
