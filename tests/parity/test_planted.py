"""The random programs find what they are there to find: eight faults, of the kinds that engines really had, are planted
one at a time, and one of the first programs must disagree. How many it takes: python tests/parity/test_planted.py"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
import programs  # noqa: E402  which needs PyTorch

from tinydiff import engine  # noqa: E402
from tinydiff.operators import OPS  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("numpy_backend")]
MOST = 400  # programs


def rewritten(function: Any, old: str, new: str) -> Any:
    """The function with another piece of source."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__name__} has changed: plant the fault anew"
    names: dict[str, Any] = {}
    exec(compile(source.replace(old, new), inspect.getfile(function), "exec"), vars(inspect.getmodule(function)), names)
    return names[function.__name__]


def rule(name: str, wrong: Callable[..., Any]) -> Callable[[Any], None]:
    def plant(patch: Any) -> None:
        patch.setattr(OPS[name], "rule", wrong)
        patch.setattr(OPS[name], "fast_rules", {})

    return plant


def engine_with(function: str, old: str, new: str) -> Callable[[Any], None]:
    return lambda patch: patch.setattr(engine, function, rewritten(getattr(engine, function), old, new))


FAULTS: dict[str, Callable[[Any], None]] = {
    "an adjoint is assigned where two must be added": engine_with(
        "backward_pass", "adjoints[parent] + adjoint if parent in adjoints else adjoint", "adjoint"
    ),
    "nodes in the order of the search, not of time": engine_with(
        "backward_pass", 'order.sort(key=operator.attrgetter("time"))', "order.reverse()"
    ),
    "broadcasting undone by the maximum, not the sum": engine_with("unbroadcast", 'OPS["sum"]', 'OPS["max"]'),
    "the derivative of tanh is 1 - z": rule("tanh", lambda g, z, _x: g * (1 - z)),
    "softmax without the sum, which a gradient of ones hides": rule("softmax", lambda g, z, _x, *, axis: z * g),
    "the gradients of a product are exchanged": rule("multiply", lambda g, _z, x, y: (lambda: g * x, lambda: g * y)),
    "a constant where there is a variable: the second derivative alone is wrong": rule(
        "square", lambda g, _z, x: g * (2 * engine.array_of(x))
    ),
    "the gradient of a clipped number passes": rule("clip", lambda g, _z, x, *, low, high: g),
}


def found_by(first: int, count: int) -> int | None:
    """How many programs it takes."""
    with np.errstate(all="ignore"):
        for seed in range(first, first + count):
            try:
                if programs.disagreement(seed):
                    return seed - first + 1
            except (ValueError, TypeError, RuntimeError, KeyError):  # a fault of shapes is noticed so
                return seed - first + 1
    return None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        assert found_by(0, MOST), f"{MOST} programs agree although {fault}"


if __name__ == "__main__":
    for fault, plant in FAULTS.items():
        counts = []
        for first in range(0, 10_000, 1000):
            with pytest.MonkeyPatch.context() as patch:
                plant(patch)
                counts.append(found_by(first, 1000) or 9999)
        print(f"{fault}: after {sorted(counts)[len(counts) // 2]} programs (median of 10), at most {max(counts)}")
