"""What this thread is doing: is it recording, and is it looking for the first NaN?

Both are local to the thread. Modes that are entered are left again, also by an error.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import linecache
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import backend
from .tensor import Tensor

_HERE = os.path.dirname(__file__) + os.sep


class State(threading.local):
    grad_enabled = True
    anomaly = False
    flowing_back = False  # inside a rule: what it gives is checked as a whole
    captured: dict[int, Tensor] | None = None  # inside checkpoint: the Tensors that require gradients and were used


state = State()


# ---------------------------------------------------------------- recording


def grad_enabled() -> bool:
    """Are nodes being recorded in this thread?"""
    return state.grad_enabled


@contextlib.contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Inside, nodes are recorded, or are not."""
    before, state.grad_enabled = state.grad_enabled, enabled
    try:
        yield
    finally:
        state.grad_enabled = before


class no_grad:
    """Inside `with no_grad():`, or a function or generator decorated with `@no_grad()`, nothing
    is recorded (in this thread).
    """

    def __init__(self) -> None:
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(state.grad_enabled)
        state.grad_enabled = False

    def __exit__(self, *_error: Any) -> None:
        state.grad_enabled = self.before.pop()

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with recording(False):
                return fn(*args, **kwargs)

        @functools.wraps(fn)
        def steps(*args: Any, **kwargs: Any) -> Any:
            generator, sent = fn(*args, **kwargs), None
            try:
                while True:  # while the generator waits, its caller's mode is the caller's own
                    with recording(False):
                        try:
                            value = generator.send(sent)
                        except StopIteration as end:
                            return end.value
                    sent = yield value
            finally:
                generator.close()

        return steps if inspect.isgeneratorfunction(fn) else call


# ---------------------------------------------------------------- looking for the first NaN


def anomaly_detection() -> bool:
    """Is this thread inside detect_anomaly?"""
    return state.anomaly


@contextlib.contextmanager
def detect_anomaly() -> Iterator[None]:
    """Inside, the first NaN or Inf, forward or backward, is an error that names the op and your line; so is a kept
    array that was written into. Slow: every result is read back to the host."""
    before, state.anomaly = state.anomaly, True
    try:
        yield
    finally:
        state.anomaly = before


def flaw_of(*values: Any) -> str:
    """ "NaN" if there is one in the values, else "Inf" if there is one, else nothing.
    Numbers and floating arrays count.
    """
    found = ""
    for value in values:
        value = value._data if isinstance(value, Tensor) else value
        if isinstance(value, float):
            found = "NaN" if value != value else found or ("Inf" if value in (math.inf, -math.inf) else "")
        elif (
            backend.active().is_array(value)
            and value.dtype.kind in "fc"
            and not backend.scalar(backend.xp.isfinite(value).all())
        ):
            found = "NaN" if backend.scalar(backend.xp.isnan(value).any()) else found or "Inf"
        if found == "NaN":
            break
    return found


def count_of(array: Any) -> str:
    array = array._data if isinstance(array, Tensor) else array
    finite = int(backend.scalar(backend.xp.isfinite(array).sum()))
    return f"{array.size - finite} of {array.size} values, shape {array.shape}"


def check_made(op: str, out: Any, inputs: Sequence[Any]) -> None:
    """An Inf that came in may be meant (the -inf of a mask): only one that appears is an error, and so is every NaN."""
    flaw = flaw_of(out)
    given = flaw_of(*inputs) if flaw else ""
    if flaw and (flaw == "NaN" or not given):
        verb = "passed on" if given == flaw else "made"
        raise FloatingPointError(f"{op} {verb} {flaw} ({count_of(out)}) at {user_line()}")


def user_line() -> str:
    """The innermost line outside tinydiff, "file:line: text"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"
