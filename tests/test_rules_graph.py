"""Ops put together: uses, diamonds, long chains, a second pass."""

from __future__ import annotations

import numpy as np
import pytest
from op_examples import Example
from op_runs import as_tensors, close, every_example, outputs_of, weights

from tinydiff import grad, gradcheck, ops, tensor
from tinydiff.operators import OPS

BINARY = ["add", "subtract", "multiply", "divide", "power", "maximum", "minimum"]


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


def test_second_derivatives_of_a_fused_op_with_one_tensor_in_several_places(numpy_backend: str) -> None:
    x = np.random.default_rng(3).normal(size=(2, 3, 3))
    for f in (
        lambda x: ops.attention(x, x, x),
        lambda x: ops.attention(x, ops.silu(x), x * x),
        lambda x: ops.layer_norm(x, x[0, 0], x[0, 0]),
        lambda x: ops.group_norm(x, groups=3) * ops.silu(x),
        lambda x: ops.conv1d(x, x),
    ):
        assert gradcheck(f, x, order=2).ok


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
