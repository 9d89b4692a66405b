"""Attention in parts (fast/attention.py) equals the page: values, gradients and second derivatives; its memory grows
with the length alone."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tinydiff import Tensor, backend, grad, ops
from tinydiff.fast import attention as parts

if backend.active().fast is None:
    pytest.skip("there are no fast versions: TINYDIFF_FAST=0", allow_module_level=True)


def draw(*shape: int, dtype: str = "float64", seed: int = 0) -> Any:
    return backend.to_device(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype))


@pytest.fixture
def in_parts(each_fast_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products, of at most 40 weights at a time."""
    monkeypatch.setattr(parts, "MOST", 40)
    monkeypatch.setattr(parts, "PART", 40)
    without_blocks(monkeypatch)


def without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a compiler."""
    if backend.active().fast == "numpy":
        from tinydiff.fast.cpu import attention

        monkeypatch.setattr(attention, "_is_for_products", lambda *_: True)


@pytest.fixture
def pages() -> Iterator[Any]:
    """Call it to switch the fast versions off for the rest of the test."""
    before = backend.active()
    yield lambda: backend._install(dataclasses.replace(before, fast=None))
    backend._install(before)


MASKS = {
    "none": None,
    "learned, of each query": (2, 1, 5, 7),
    "learned, of keys": (7,),
    "learned, one row": (1, 7),
    "learned, more samples": (3, 1, 1, 5, 1),
    "bool": (2, 3, 5, 7),
    "bool, of the keys of a sample": (2, 1, 1, 7),
}


@pytest.mark.parametrize("name", MASKS)
def test_in_parts_as_on_the_page(name: str, in_parts: None, pages: Any) -> None:
    shape = MASKS[name]
    arrays = [draw(2, 3, 5, 4), draw(2, 1, 7, 4, seed=1), draw(7, 6, seed=2)]
    mask = None if shape is None else draw(*shape, seed=3)
    if name.startswith("bool"):
        mask = mask > -0.5
        mask[..., 0] = True  # something to attend to
    elif shape:
        arrays.append(mask)

    def all_orders() -> list[np.ndarray]:
        xs = [Tensor(a, requires_grad=True) for a in arrays]
        y = ops.attention(*xs[:3], mask=xs[3] if len(xs) > 3 else mask)
        first = grad(y, xs, draw(*y.shape, seed=4))
        graph = grad(y, xs, draw(*y.shape, seed=4), create_graph=True)
        total = sum(((g * draw(*g.shape, seed=5)).sum() for g in graph[1:]), start=(graph[0] * graph[0]).sum())
        return [t.numpy() for t in (y, *first, *graph, *grad(total, xs))]

    found = all_orders()
    pages()
    for a, b in zip(found, all_orders()):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_that_they_are_in_parts(in_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, forwards = [], parts._parts

    def counted(*args: Any) -> Iterator[Any]:
        for part in forwards(*args):
            sizes.append(part[1].shape[-2])
            yield part

    monkeypatch.setattr(parts, "_parts", counted)
    q = Tensor(draw(2, 9, 4), requires_grad=True)
    grad(ops.attention(q, q, q), [q], draw(2, 9, 4))
    assert sizes == 2 * [2, 2, 2, 2, 1]  # 2 samples x 2 queries x 9 keys are 36 weights


def test_memory_without_a_compiler_grows_with_the_length_alone(
    numpy_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a length of 2048 the weights would take 16 MiB; a part takes 1/4 of that at the first of the lengths."""
    without_blocks(monkeypatch)
    monkeypatch.setattr(parts, "MOST", 2**15)
    monkeypatch.setattr(parts, "PART", 2**15)
    peaks = []
    for length in (512, 1024, 2048):
        leaves = [Tensor(draw(length, 16, dtype="float32", seed=i), requires_grad=True) for i in range(3)]
        g = draw(length, 16, dtype="float32", seed=3)
        tracemalloc.start()
        grad(ops.attention(*leaves), leaves, g, retain_graph=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0] and peaks[2] < 2.2 * peaks[1]
    assert peaks[2] < 4 * 2**20
