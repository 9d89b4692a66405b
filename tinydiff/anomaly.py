"""Where does the first NaN come from? `detect_anomaly` watches every op, and names the op and your line that made it.

It is an observer of the engine (observers.py), and costs nothing outside its `with`.
"""

from __future__ import annotations

import contextlib
import linecache
import math
import os
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import backend
from .engine import Node, Op, Tensor, options_of
from .observers import Observer, observers, observing
from .operators import array_of

_HERE = os.path.dirname(__file__) + os.sep


@contextlib.contextmanager
def detect_anomaly() -> Iterator[None]:
    """Inside, in this thread, the first NaN or Inf, forward or backward, is an error that names the op and your line.
    A kept array that was written into is an error too. Slow: every result is read back to the host.

    Errors: FloatingPointError for a NaN or Inf; RuntimeError for an array that has changed.
    """
    with observing(Anomalies()):
        yield


def anomaly_detection() -> bool:
    """Is this thread inside detect_anomaly?"""
    return any(isinstance(o, Anomalies) and o.thread == threading.get_ident() for o in observers)


class Anomalies(Observer):
    """Remembers for each node the line that made it, and fingerprints of the arrays that it keeps."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.in_rule = False  # what a rule gives is checked as a whole
        self.seen: weakref.WeakKeyDictionary[Node, tuple[str, list[int]]] = weakref.WeakKeyDictionary()

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        out = run(op, inputs, params)
        if not isinstance(out, Tensor):
            return out
        flaw = "" if self.in_rule else flaw_of(out)
        given = flaw_of(*inputs, *params.values()) if flaw else ""
        # An Inf among the inputs may be intended (the -inf of a mask), so only a new Inf is an error. Every NaN is one.
        if flaw and (flaw == "NaN" or not given):
            verb = "passed on" if given == flaw else "made"
            raise FloatingPointError(f"{op.name} {verb} {flaw} ({count_of(out)}) at {user_line()}")
        if out.node is not None and out.node.op is op:
            self.seen[out.node] = user_line(), fingerprints(out.node)
        return out

    def on_rule(self, run: Callable[..., Any], node: Node, g: Any, wanted: Sequence[Any], create_graph: bool) -> Any:
        line, prints = self.seen.get(node, ("", []))
        made_at = f"; it was computed at {line}" if line else ""
        if flaw := flaw_of(g):
            raise FloatingPointError(f"the adjoint of the output of {node.op.name} has {flaw} ({count_of(g)}){made_at}")
        if prints and node.values is not None and prints != fingerprints(node):
            raise RuntimeError(
                f"an array that {node.op.name} had kept was written into before its gradient was computed{made_at}"
            )
        before, self.in_rule = self.in_rule, True
        try:
            adjoints = run(node, g, wanted, create_graph)
        except RuntimeError as error:
            if type(error) is not RuntimeError or not made_at:
                raise
            raise RuntimeError(f"{error}{made_at}") from error
        finally:
            self.in_rule = before
        for i, adjoint in enumerate(adjoints):
            if adjoint is not None and (flaw := flaw_of(adjoint)):
                raise FloatingPointError(
                    f"{node.op.name} passed back {flaw} to input {i} ({count_of(adjoint)}){made_at}"
                )
        return adjoints


def flaw_of(*values: Any) -> str:
    """ "NaN" if there is one in the values, else "Inf" if there is one, else nothing. Numbers and floating arrays
    count."""
    found = ""
    for value in map(array_of, values):
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
    array = array_of(array)
    finite = int(backend.scalar(backend.xp.isfinite(array).sum()))
    return f"{array.size - finite} of {array.size} values, shape {array.shape}"


def fingerprints(node: Node) -> list[int]:
    """Checksums of the arrays that a node keeps for its rule."""
    kept = [*node.values, node.out, *(array_of(a) for _, a in options_of(node.params))]
    return [zlib.crc32(backend.to_host(a).tobytes()) for a in kept if backend.active().is_array(a)]


def user_line() -> str:
    """The innermost line outside tinydiff, "file:line: text"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"
