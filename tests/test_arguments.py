"""Numbers that are given as arguments."""

from typing import Any

import numpy as np
import pytest

from tinydiff import ops, tensor
from tinydiff.arguments import integer, number, with_own_keywords


@pytest.mark.parametrize("x", [0.5, 0, np.float64(0.25), np.float32(0.5), np.int64(0), np.array(0.5)])
def test_a_number_in_its_interval_becomes_a_float(x: Any) -> None:
    found = number("p", x, "[0, 1)")
    assert type(found) is float and found == x


@pytest.mark.parametrize(
    "x, interval",
    [(1, "[0, 1)"), (0, "(0, 1)"), (-1e-9, "[0, 1)"), (float("nan"), "(-inf, inf)"), (float("inf"), "[0, inf)"),
     ("1", "[0, 2]"), (None, "[0, 2]"), ([1], "[0, 2]"), (1j, "[0, 2]"), (True, "[0, 2]"), (np.zeros(1), "[0, 2]"),
     (10**400, "[0, inf]")],
)  # fmt: skip
def test_other_numbers_are_refused_and_quoted(x: Any, interval: str) -> None:
    with pytest.raises(ValueError) as error:
        number("layer: p", x, interval)
    assert str(error.value) == f"layer: p must be a number in {interval}, not {x!r}"


def test_the_ends_of_an_interval() -> None:
    assert number("x", 1, "[0, 1]") == 1 and number("x", float("inf"), "[0, inf]") == float("inf")


@pytest.mark.parametrize("n", [np.int32(3), 3, np.array(3)])
def test_an_integer_becomes_an_int(n: Any) -> None:
    assert type(integer("n", n)) is int


def test_an_integer_has_a_largest_value() -> None:
    assert integer("seed", 7, 0, 7) == 7
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 7, not 8"):
        integer("seed", 8, 0, 7)


@pytest.mark.parametrize("n", [0, -1, 2.0, 2.5, "2", None, True, float("nan")])
def test_other_integers_are_refused_and_quoted(n: Any) -> None:
    with pytest.raises(ValueError) as error:
        integer("steps", n)
    assert str(error.value) == f"steps must be an integer of 1 or more, not {n!r}"


@with_own_keywords
def leaky(x: Any, axis: Any = None, slope: float = 0.1) -> Any:
    return ops.maximum(x, slope * x)


@pytest.mark.parametrize("make", [lambda: tensor(np.ones((2, 2)), requires_grad=True), lambda: np.ones((2, 2))])
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x: ops.softmax(x, dim=1), "softmax has no option 'dim': tinydiff calls it axis"),
        (lambda x: ops.sum(x, axis=1, keepdim=True), "sum has no option 'keepdim': tinydiff calls it keepdims"),
        (
            lambda x: ops.mean(x, dim=1),
            "mean has no option 'dim': tinydiff calls it axis",
        ),  # which has no rule of its own
        (lambda x: ops.transpose(x, dims=(1, 0)), "transpose has no option 'dims': tinydiff calls it axes"),
        (lambda x: ops.clip(x, min=0), "clip has no option 'min': tinydiff calls it low"),
        (lambda x: ops.exp(input=x), "exp has no option 'input': give its arrays by their place, exp(x)"),
        (lambda x: ops.mean(x, descending=True), "mean has no option 'descending': it has axis, keepdims"),
        (lambda x: ops.exp(x, out=x), "exp has no option 'out': it has none"),
        (lambda x: ops.tile(x, dims=2), "tile has no option 'dims': tinydiff calls it reps"),
        (
            lambda x: ops.embedding([0], weight=x),
            "embedding has no option 'weight': give its arrays by their place, embedding(index, table)",
        ),
        (
            lambda x: ops.conv1d(x, x, bias=x),
            "conv1d has no option 'bias': give its arrays by their place, conv1d(x, w, b)",
        ),
        (lambda x: leaky(x, foo=1), "leaky has no option 'foo': it has axis, slope"),
        (lambda x: leaky(x, dim=1), "leaky has no option 'dim': tinydiff calls it axis"),
    ],
)
def test_a_keyword_of_another_library_is_answered_with_ours(make: Any, call: Any, says: str) -> None:
    with pytest.raises(TypeError) as error:
        call(make())
    assert str(error.value) == says and error.value.__suppress_context__


def test_a_tensor_is_given_to_an_op_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"^add has no option 'y': give its arrays by their place, add\(x, y\)$"):
        ops.add(tensor([1.0], requires_grad=True), y=tensor([1.0], requires_grad=True))


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "prod", "var", "cumsum", "squeeze"])
def test_methods_answer_as_their_ops(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} has no option 'dim': tinydiff calls it axis$"):
        getattr(tensor([[1.0]]), name)(dim=1)


def test_other_methods_answer_too() -> None:
    x = tensor([[1.0, 3.0]])
    for call, says in (
        (lambda: x.argmax(dim=1), "argmax has no option 'dim': tinydiff calls it axis"),
        (lambda: x.clip(min=2), "clip has no option 'min': tinydiff calls it low"),
        (lambda: x.transpose(dims=(1, 0)), "transpose has no option 'dims': tinydiff calls it axes"),
        (lambda: x.swapaxes(dim0=0, dim1=1), "swapaxes has no option 'dim0': tinydiff calls it axis1"),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert str(error.value) == says
    assert x.clip(low=2).tolist() == [[2.0, 3.0]] and x.swapaxes(0, 1).shape == (2, 1)
    assert x.argmax(axis=1).tolist() == [1]


def test_an_error_inside_an_op_is_not_about_keywords() -> None:
    for call in (lambda: ops.mean(None, axis=0), lambda: ops.layer_norm(None, weight=None), lambda: ops.exp(None)):
        with pytest.raises((AttributeError, TypeError)) as error:
            call()
        assert "option" not in str(error.value)
