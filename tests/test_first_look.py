"""What a newcomer tries in the first hour shows what it is, works, or says what to write instead."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import nn, ops


def leaf(*shape: int) -> tinydiff.Tensor:
    return tinydiff.tensor(np.ones(shape, "float32"), requires_grad=True)


def test_a_node_says_what_it_is_and_where_it_came_from(each_backend: str) -> None:
    x, w = leaf(2, 3), leaf(3, 4)
    x.name = "x"
    y = ops.exp(x @ w) * 2.0
    assert repr(y.node) == "<node multiply(exp (2, 4), constant 2.0) -> (2, 4) float32>"
    assert repr(y.node.parents[0].parents[0]) == "<node matmul(leaf x (2, 3), leaf (3, 4)) -> (2, 4) float32>"


def test_a_node_says_that_its_values_are_freed(each_backend: str) -> None:
    y = ops.exp(leaf(2)).sum()
    y.backward(retain_graph=True)
    assert "freed" not in repr(y.node)
    y.backward()
    assert repr(y.node).startswith("<node sum(exp (2,)) -> () float32, what it had kept is freed")


def test_a_name_is_shown_and_copied(each_backend: str) -> None:
    w = leaf(2)
    assert w.name is None and "name" not in repr(w)
    w.name = "W"
    assert repr(w) == "tensor([1. 1.], name='W', requires_grad=True)"
    assert copy.deepcopy(w).name == pickle.loads(pickle.dumps(w)).name == "W"


def test_numpys_functions_are_the_ops_of_that_name(numpy_backend: str) -> None:
    x = leaf(2, 3)
    found = {
        np.mean(x): ops.mean(x),
        np.sum(x, axis=0): ops.sum(x, axis=0),
        np.concatenate([x, x], axis=1): ops.concatenate([x, x], axis=1),
        np.transpose(x, (1, 0)): x.T,
        np.reshape(x, (3, 2)): x.reshape(3, 2),
        np.sin(x): ops.sin(x),
    }
    for y, wanted in found.items():
        assert isinstance(y, tinydiff.Tensor) and y.requires_grad
        np.testing.assert_array_equal(y.numpy(), wanted.numpy())
    assert np.shape(x) == (2, 3) and np.ndim(x) == 2 and np.size(x) == 6


def test_numpys_other_functions_take_the_values_or_refuse(numpy_backend: str) -> None:
    x = tinydiff.tensor([1.0, 2.0])
    assert np.median(x) == 1.5 and np.allclose([x], x.numpy())
    with pytest.raises(TypeError, match="use tinydiff.ops"):
        np.median(leaf(2))
    with pytest.raises(TypeError, match=r"NumPy's mean, called so, .*use ops.mean"):
        np.mean(leaf(2), where=np.ones(2, bool))


def test_a_step_written_by_hand(numpy_backend: str) -> None:
    w = leaf(3)
    (w * w).sum().backward()
    w.data -= 0.25 * w.grad
    assert w.tolist() == [0.5, 0.5, 0.5]


def test_short_layers(each_backend: str) -> None:
    x = leaf(2, 3, 4)
    assert nn.Flatten()(x).shape == (2, 12) and nn.Flatten()(x[:0]).shape == (0, 12)
    assert nn.Identity()(x) is x
    np.testing.assert_allclose(nn.Tanh()(x).numpy(), np.tanh(1), rtol=1e-6)


def double(x: Any) -> Any:
    return 2 * x


def test_functions_in_a_sequential_are_shown_in_their_places(each_backend: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3, rng=0), double, ops.tanh, nn.ReLU())
    assert [line.split() for line in repr(net).splitlines()] == [
        ["Sequential", "9"],
        ["0:", "Linear(2,", "3)", "9"],
        ["1:", "double", "0"],
        ["2:", "tanh", "0"],
        ["3:", "ReLU", "0"],
    ]


@pytest.mark.parametrize(
    "name, says",
    [("backward", r"y\.backward\(\)"), ("tensr", "did you mean tensor"), ("sofmax", r"did you mean ops\.softmax")],
)
def test_a_name_that_is_not_there(name: str, says: str) -> None:
    with pytest.raises(AttributeError, match=says):
        getattr(tinydiff, name)


def test_gradcheck_shows_several_wrong_elements(op: Any, each_backend: str) -> None:
    triple = op(lambda x: 3.0 * x, lambda g, _z, _x: 2.0 * g)
    with pytest.raises(tinydiff.GradcheckError) as caught:
        tinydiff.gradcheck(triple, np.arange(7.0))
    shown = [line for line in str(caught.value).splitlines() if line.startswith(("worst:", "wrong:"))]
    assert len(shown) == len(set(shown)) == 3 and "and 4 more, which are in error.report.wrong" in str(caught.value)
