"""python -m tinydiff view SCRIPT: run a script, and save the page of one of its backward passes.

An observer of the engine (observers.py) waits for the pass. Before the first rule of that pass runs, its graph is
whole, so the page is saved there; then the script is stopped.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import backend
from ..engine import Node, Op, Tensor
from ..observers import Observer, observing
from .viewer import graph_of, save


class Saved(BaseException):
    """The page is saved, and the script need not go on. No Exception, so that no script takes it for an error."""


class Waiting(Observer):
    """Counts the backward passes as they begin, in all threads, and saves that of the given number.

    A pass begins with a rule of a node that is in no graph whose pass has begun; the passes inside of one, such as that
    of `checkpoint`, do not count.
    """

    def __init__(self, number: int, out: Path, options: dict[str, Any]):
        self.number, self.out, self.options = number, out, options
        self.begun = 0
        self.failure: Exception | None = None  # of saving; the script may have taken it for one of its own
        self.lock = threading.Lock()
        self.here = threading.local()
        self.results: weakref.WeakKeyDictionary[Node, weakref.ref[Tensor]] = weakref.WeakKeyDictionary()
        self.seen: weakref.WeakSet[Node] = weakref.WeakSet()

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        out = run(op, inputs, params)
        if isinstance(out, Tensor) and out.node is not None:
            self.results[out.node] = weakref.ref(out)
        return out

    def on_rule(self, run: Callable[..., Any], node: Node, g: Any, wanted: Sequence[Any], create_graph: bool) -> Any:
        if getattr(self.here, "inside", False):
            return run(node, g, wanted, create_graph)
        self.here.inside = True
        try:
            with self.lock:
                self.count(node, g)
            return run(node, g, wanted, create_graph)
        finally:
            self.here.inside = False

    def count(self, node: Node, g: Any) -> None:
        if node in self.seen or self.begun == self.number:
            return
        self.seen.update(graph_of(node))
        self.begun += 1
        if self.begun == self.number:
            result = self.results[node]() if node in self.results else None
            if result is None:  # its owner let it go; only the shape is known
                result = Tensor(backend.xp.full(node.shape, float("nan"), node.dtype), True, node)
            try:
                save(result, self.out, grad=g, **self.options)
            except Exception as error:
                self.failure = error
                raise
            raise Saved


def view(script: Path, arguments: Sequence[str], out: Path, number: int, **options: Any) -> int:
    """Run the script as `python SCRIPT ARGUMENTS` does, but in this process, until its pass of that number (from 1) is
    saved in `out`. How many passes had begun by then, or by the end of the script. options: as for `save`.
    Errors: those of the script, and of `save`, even if the script catches them."""
    waiting = Waiting(number, out, options)
    before = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *arguments], [os.path.abspath(script.parent), *sys.path]
    try:
        with observing(waiting):
            runpy.run_path(str(script), run_name="__main__")
    except Saved:
        pass
    except SystemExit as error:  # the script's own end; what it says of an error has to be seen
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    finally:
        sys.argv, sys.path = before
    if waiting.failure is not None:
        raise waiting.failure
    return waiting.begun
