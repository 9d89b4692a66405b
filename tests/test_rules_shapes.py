"""Any shapes that broadcast, and any axes: the matrix's row for what a list of examples cannot hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, in_use
from hypothesis import given, settings
from hypothesis import strategies as st
from op_examples import Example
from op_oracles import expected
from op_runs import close, run

from tinydiff import backend, gradcheck

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
