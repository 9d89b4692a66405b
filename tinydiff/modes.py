"""Are nodes recorded? Each thread has a mode of its own; `no_grad` changes it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from typing import Any


class Mode(threading.local):
    """The mode of each thread: are nodes recorded?"""

    def __init__(self) -> None:
        self.recording = True
        self.before: list[bool] = []  # what it was before each no_grad() that the thread is in


mode = Mode()


def grad_enabled() -> bool:
    """Are nodes being recorded in this thread?"""
    return mode.recording


class set_grad_enabled(contextlib.ContextDecorator):
    """Inside a `with`, or a function or generator that it decorates, this thread records nodes, or does not."""

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def __enter__(self) -> None:
        mode.before.append(mode.recording)
        mode.recording = self.enabled

    def __exit__(self, *_error: Any) -> None:
        mode.recording = mode.before.pop()

    def __call__(self, fn: Any) -> Any:
        if not inspect.isgeneratorfunction(fn):
            return super().__call__(fn)

        @functools.wraps(fn)
        def steps(*args: Any, **kwargs: Any) -> Any:
            generator = fn(*args, **kwargs)
            resume = functools.partial(generator.send, None)
            while True:  # while the generator waits, its caller's mode is the caller's own
                try:
                    with self:
                        value = resume()
                except StopIteration as end:
                    return end.value
                try:
                    resume = functools.partial(generator.send, (yield value))
                except BaseException as error:  # which the caller throws in
                    resume = functools.partial(generator.throw, error)

        return steps


class no_grad(set_grad_enabled):
    """Inside `with no_grad():`, or a function or generator decorated with `@no_grad()`, nothing is recorded."""

    def __init__(self) -> None:
        super().__init__(False)
