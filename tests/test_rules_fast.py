"""The matrix's row of fast versions: each equals the page, forward and rule, in both dtypes; and runs at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from op_examples import NAMED, Example
from op_runs import close, run, run_twice

from tinydiff import backend
from tinydiff.engine import Op
from tinydiff.operators import OPS

FAST = backend.active().fast
TOLERANCE = {"float64": (1e-11, 1e-12), "float32": (2e-4, 2e-5)}


def has_fast(op: Any) -> bool:
    return isinstance(op, Op) and (FAST in op.fast_forwards or FAST in op.fast_rules)


@pytest.fixture
def pages() -> Iterator[Any]:
    """Call it to switch the fast versions off for the rest of the test."""
    before = backend.active()
    yield lambda: backend._install(dataclasses.replace(before, fast=None))
    backend._install(before)


@pytest.mark.skipif(FAST is None, reason="there are no fast versions: TINYDIFF_FAST=0")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("example", [pytest.param(e, id=n) for n, e in NAMED.items()])
def test_with_the_fast_versions_as_with_the_pages(example: Example, dtype: str, pages: Any) -> None:
    fast = run(example, example.on_device(dtype)), run_twice(example, example.on_device(dtype))
    pages()
    page = run(example, example.on_device(dtype)), run_twice(example, example.on_device(dtype))
    rtol, atol = TOLERANCE[dtype]
    close(fast[0][0], page[0][0], rtol, atol)
    close(fast[0][1], page[0][1], 10 * rtol, 10 * atol)
    close(fast[1], page[1], 100 * rtol, 100 * atol)


@pytest.mark.skipif(FAST is None, reason="there are no fast versions: TINYDIFF_FAST=0")
@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if has_fast(op)))
def test_a_fast_version_takes_an_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that declined every example would not be tested at all."""
    op: Any = OPS[name]
    taken = {"forward": 0, "rule": 0}

    def counted(what: str, version: Any) -> Any:
        def call(*args: Any, **params: Any) -> Any:
            found = version(*args, **params)
            taken[what] += found is not NotImplemented
            return found

        return call

    for what, versions in (("forward", "fast_forwards"), ("rule", "fast_rules")):
        table = getattr(op, versions)
        monkeypatch.setattr(op, versions, {key: counted(what, version) for key, version in table.items()})
    for example in NAMED.values():
        if example.op == name:
            run(example, example.on_device())
    assert taken["forward"] or FAST not in op.fast_forwards
    assert taken["rule"] or FAST not in op.fast_rules
