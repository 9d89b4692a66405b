"""To run an example of an op forwards and backwards, for the tests that loop over the registry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from op_examples import NAMED, Example

from tinydiff import Tensor, backend, grad
from tinydiff.backend import xp

every_example = pytest.mark.parametrize("example", [pytest.param(e, id=name) for name, e in NAMED.items()])


def outputs_of(y: Any) -> list[Any]:
    return list(y) if isinstance(y, (list, tuple)) else [y]


def as_tensors(example: Example, inputs: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The inputs with Tensors that require gradients where the example has floats; and those Tensors."""
    inputs = [Tensor(x, True) if i in example.places else x for i, x in enumerate(inputs)]
    return inputs, [inputs[i] for i in example.places]


def weights(shape: tuple[int, ...], dtype: str = "float64", seed: int = 5) -> Any:
    """A random adjoint: ones would hide every error that sums to zero."""
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
    """Host arrays: the outputs, and the gradients under the random adjoint."""
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
