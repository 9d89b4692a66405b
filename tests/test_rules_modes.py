"""The matrix once more, in the modes that make a step fast: each op gives the same in microbatches over threads, and as
a captured step. (test_rules.py compares fused ops with their definitions.)"""

from __future__ import annotations

import contextlib
import functools
import gc
from typing import Any

import numpy as np
import op_runs
import pytest
from conftest import BACKENDS
from op_examples import NAMED, Example, apply, on_device
from op_runs import as_tensors, every_example, outputs_of, pull_back, run

from tinydiff import Tensor, backend
from tinydiff.microbatch import over_microbatches
from tinydiff.operators import OPS


def bits(arrays: list[Any]) -> list[bytes]:
    return [np.ascontiguousarray(a).tobytes() for a in arrays]


@every_example
def test_in_microbatches_over_threads(example: Example, numpy_backend: str) -> None:
    """Four microbatches at a time, which are all the same: a kernel that shared a buffer would mix them up."""
    alone = [*map(bits, run(example, example.on_device()))]
    parts = over_microbatches(lambda rows: run(example, example.on_device()), 4, 1, threads=2)
    assert [[*map(bits, found)] for found in parts] == [alone] * 4


# What a graph cannot hold, and says so: CuPy's einsum of several arrays calls its own cuBLAS; an index of bool is
# counted on the host; a pool whose windows go over the edge takes its indices from there.
REFUSED = {f"einsum-{i}" for i in (1, 2, 3, 4, 6, 7, 8, 10, 11)}
REFUSED |= {"einsum_p-1", "einsum_p-2", "getitem-11", "scatter-4", "avg_pool2d-3", "max_pool2d-3"}
# One example per op: every graph has 32 MiB of workspace for cuBLAS.
ONCE = sorted({example.op: name for name, example in reversed(NAMED.items()) if name not in REFUSED}.values())
ONCE = sorted(
    {*(n for n in ONCE if NAMED[n].op != "dropout"), "einsum-1", "getitem-11", "max_pool2d-3"}
)  # draws: test_capture.py


@pytest.mark.skipif(BACKENDS != ["cupy"], reason="a graph: TINYDIFF_BACKEND=cupy")
@pytest.mark.parametrize("name", ONCE)
def test_captured(name: str, each_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call records the graph, the third replays it, with other numbers."""
    monkeypatch.setattr(op_runs, "weights", functools.cache(op_runs.weights))  # they come from the host, once
    example = NAMED[name]
    arrays, params, places = example.on_device(), on_device(example.params), example.places

    def step(*given: Any) -> list[Any]:
        inputs = list(arrays)
        for i, a in zip(places, given):
            inputs[i] = a
        inputs, xs = as_tensors(example, inputs)
        ys = outputs_of(apply(example.op, OPS[example.op], inputs, params))
        return [y if isinstance(y, Tensor) else Tensor(y) for y in (*ys, *pull_back(ys, xs))]

    gc.collect()
    fast = backend.capture(step)
    with pytest.raises(RuntimeError, match="cannot be captured") if name in REFUSED else contextlib.nullcontext():
        for scale in (1.0, 0.5, 0.9):
            given = [arrays[i] * scale for i in places]
            got, expected = ([y.numpy() for y in f(*given)] for f in (fast, step))
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
