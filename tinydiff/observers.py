"""Observers of the engine: the profiler, anomaly detection, checkpoint and captured steps follow every op.

The engine asks one list, which is empty in the usual case; each observer keeps its own code in its own file.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .locks import free_in_child


class Observer:
    """Wraps each call of an op and each rule. Override the methods you need; each must run what it is given and return
    the result. thread: the thread to observe, by threading.get_ident(); None for all."""

    thread: int | None = None

    def on_call(self, run: Callable[..., Any], op: Any, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        return run(op, inputs, params)

    def on_rule(self, run: Callable[..., Any], node: Any, g: Any, wanted: Sequence[Any], create_graph: bool) -> Any:
        return run(node, g, wanted, create_graph)

    def on_set(self, x: Any, name: str, value: Any) -> None:
        """x.data or x.grad, as the name says, is about to become the value."""


observers: list[Observer] = []  # empty in the usual case


def observed(event: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """run, wrapped in this thread's observers."""
    for observer in list(observers):
        if observer.thread in (None, threading.get_ident()):
            run = functools.partial(getattr(observer, event), run)
    return run


def tell(x: Any, name: str, value: Any) -> None:
    """Tell this thread's observers what x.data or x.grad is about to become."""
    for observer in list(observers):
        if observer.thread in (None, threading.get_ident()):
            observer.on_set(x, name, value)


_changing = free_in_child()


@contextlib.contextmanager
def observing(observer: Any) -> Iterator[Any]:
    """Inside, the observer is one of the observers."""
    try:
        with _changing:  # or threads that begin and end at the same time would take out each other's
            observers.append(observer)
        yield observer
    finally:
        with _changing:
            at = next((i for i, other in enumerate(observers) if other is observer), None)  # not one that is equal
            if at is not None:
                del observers[at]
