"""Are nodes recorded? Each thread, and each asyncio task, has a mode of its own; `no_grad` changes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, overload

Function = TypeVar("Function", bound=Callable[..., Any])

# Are they now; which `with` said so; and the same of what is around it.
recording: ContextVar[tuple[Any, ...]] = ContextVar("recording", default=(True, None, None))


def grad_enabled() -> bool:
    """Are nodes being recorded here?"""
    return recording.get()[0]


def keeps_mode(fn: Function) -> Function:
    """Decorator: afterwards the mode is as before, also if Ctrl-C comes at an unlucky instant inside. (It may come on
    the way into an `__exit__`, before its first line, but not on the way into a `finally`.)"""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        before = recording.get()
        try:
            return fn(*args, **kwargs)
        finally:
            recording.set(before)

    return call  # type: ignore[return-value]


class set_grad_enabled:
    """Inside a `with`, or a function, coroutine or generator that it decorates, nodes are recorded, or are not."""

    def __init__(self, enabled: bool):
        if not isinstance(enabled, bool):
            raise TypeError(f"set_grad_enabled takes True or False, not {enabled!r}")
        self.enabled = enabled

    def __enter__(self) -> None:
        before = recording.get()
        try:
            recording.set((self.enabled, self, before))
        except BaseException:  # Ctrl-C, just when it was set: then there is no __exit__
            recording.set(before)
            raise

    def __exit__(self, *_error: Any) -> None:
        # Its own entry, which is not the last one if an inner `with` was cut short by Ctrl-C. In another context, where
        # a generator may be closed, there is none.
        entry: tuple[Any, ...] | None = recording.get()
        while entry is not None and entry[1] is not self:
            entry = entry[2]
        if entry is not None:
            recording.set(entry[2])

    def __call__(self, fn: Function) -> Function:
        if not callable(fn):
            raise TypeError(f"{type(self).__name__} decorates something callable, not {fn!r}")
        code = fn if inspect.isroutine(fn) else type(fn).__call__  # of an object that can be called
        if inspect.isasyncgenfunction(code):
            raise TypeError(
                f"{type(self).__name__} cannot decorate {fn.__name__}, an asynchronous generator: "
                "write `with no_grad():` inside it, around what does not wait"
            )
        if inspect.iscoroutinefunction(code):
            return self._of_coroutine(fn)
        return self._of_generator(fn) if inspect.isgeneratorfunction(code) else self._of_function(fn)

    def _of_function(self, fn: Any) -> Any:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:  # not contextlib's, whose file would look like the user's
            before = recording.get()
            try:  # and no `with`, as in keeps_mode
                recording.set((self.enabled, self, before))
                return fn(*args, **kwargs)
            finally:
                recording.set(before)

        return call

    def _of_coroutine(self, fn: Any) -> Any:
        @functools.wraps(fn)
        async def call(*args: Any, **kwargs: Any) -> Any:
            with self:  # other tasks, which run while this one waits, have their own mode
                return await fn(*args, **kwargs)

        return call

    def _of_generator(self, fn: Any) -> Any:
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


if TYPE_CHECKING:  # what is decorated keeps its signature, with brackets and without

    @overload
    def no_grad() -> set_grad_enabled: ...
    @overload
    def no_grad(fn: Function) -> Function: ...
    def no_grad(fn: Any = None) -> Any: ...

else:

    class no_grad(set_grad_enabled):
        """Inside `with no_grad():`, or a function, coroutine or generator decorated with `@no_grad()`, nothing is
        recorded. `@no_grad` without brackets means the same."""

        def __new__(cls, fn: Any = None) -> Any:
            return super().__new__(cls) if fn is None else cls()(fn)

        def __init__(self) -> None:
            super().__init__(False)
