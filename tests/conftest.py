"""What all tests share: the backends they run on, and when they are skipped.

A test of arrays asks for `each_backend`: it runs on numpy and on strict (tests/strict), or, with
TINYDIFF_BACKEND=cupy in the environment, on cupy alone. Tests marked `torch` ask for the fixture `torch`, and are
skipped where it is not installed.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # helpers beside the tests: strict, op_examples, op_oracles
sys.path.insert(1, str(Path(__file__).parents[1] / "docs" / "_ext"))  # and those of the book beside its pages
sys.path.insert(2, str(Path(__file__).parents[1] / "docs"))  # where twins.py is, the nets in PyTorch

import strict

from tinydiff import backend, engine
from tinydiff.operators import OPS

# A job in the background, or one that nohup started, ignores Ctrl-C and the end of its terminal. So would the programs
# that the tests start in order to send them these signals.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

BACKENDS = ["cupy"] if os.environ.get("TINYDIFF_BACKEND") == "cupy" else ["numpy", "strict"]

FAST = [name for name in BACKENDS if name != "strict"]
# Mathematics that many numbers prove, on one backend: that the others compute the same is for the tests of the ops.
on_numpy = pytest.mark.parametrize("each_backend", ["numpy"], indirect=True)


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend, which is in use while the test runs."""
    yield from in_use(request.param)


@pytest.fixture(params=FAST)
def each_fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those that have fast versions: on the strict backend the pages run."""
    yield from in_use(request.param)


@pytest.fixture
def numpy_backend() -> Iterator[str]:
    """numpy, whatever the environment says: for what only NumPy has, such as read-only arrays; and as `on_numpy`."""
    yield from in_use("numpy")


def in_use(name: str) -> Iterator[str]:
    before = backend._active
    backend._install(strict.make_backend() if name == "strict" else None)
    if name != "strict":
        backend.use(name)
    try:
        yield name
    finally:
        backend._install(before)


@pytest.fixture
def torch() -> Any:
    """PyTorch, for tests marked `torch`."""
    return pytest.importorskip("torch")


@pytest.fixture
def op() -> Iterator[Any]:
    """Make an op for one test: op(forward, rule). It leaves the registry afterwards."""
    before = dict(OPS)

    def make(forward: Any, rule: Any = None, **options: Any) -> Any:
        made = engine.op(forward, **options)
        if rule is not None:
            made.vjp(rule)
        return made

    yield make
    OPS.clear()
    OPS.update(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever uses the fixture `torch` bears its mark, so that `-m torch` finds all of them. And what runs on numpy
    whatever the environment says has nothing to tell of cupy."""
    for item in items:
        if "torch" in getattr(item, "fixturenames", ()):
            item.add_marker("torch")
    if BACKENDS == ["cupy"]:
        of_numpy = {
            item for item in items if "numpy_backend" in getattr(item, "fixturenames", ()) or _is_on_numpy(item)
        }
        config.hook.pytest_deselected(items=list(of_numpy))
        items[:] = [item for item in items if item not in of_numpy]


def _is_on_numpy(item: pytest.Item) -> bool:
    chosen = item.callspec.params.get("each_backend") if hasattr(item, "callspec") else None
    return chosen == "numpy" or "numpy_backend" in getattr(item, "fixturenames", ())


def pytest_collection_finish() -> None:
    """All modules and all tests are there now, millions of objects, and stay. Without this the garbage collector goes
    through them again and again, which makes tests with many small objects three times as slow."""
    gc.collect()
    gc.freeze()
