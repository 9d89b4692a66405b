"""Less memory for more time: `checkpoint` keeps the inputs of a function, and none of the arrays computed inside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import rng
from .changes import changed_since, clock
from .engine import Node, Op, Tensor, backward_pass, describe, origin, seed
from .modes import grad_enabled, no_grad, set_grad_enabled
from .observers import Observer, observing


def checkpoint(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """fn(*inputs), without keeping the arrays that its backward pass reads: these are computed again when needed.

    Gradients also reach Tensors that fn uses but does not take as inputs, such as the weights of a module. The second
    run draws the same random numbers as the first. State that fn changes is changed twice, such as the running
    statistics of a BatchNorm2d.
    Errors: TypeError if fn returns anything but one Tensor. Source: Chen et al. 2016, "Training deep nets with
    sublinear memory cost".
    """
    if not grad_enabled():
        return fn(*inputs)
    with no_grad(), rng.recorded() as draws, observing(Used()) as used:
        out = fn(*inputs)
    if not isinstance(out, Tensor):
        raise TypeError(f"checkpoint: the function must return one Tensor, not {type(out).__name__}")
    sources = list(used.tensors.values())
    if not sources or out._requires_grad or out.dtype.kind not in "fc":
        return out  # nothing to compute again: no gradient is wanted, or fn gave back a Tensor that was there before
    # Also what needs no gradient, and what fn uses without being given it, as a frozen weight. (What fn made is gone.)
    read = [(x, x._data) for x in (*used.outer(), *inputs) if isinstance(x, Tensor) and x is not out]
    again = SimpleNamespace(fn=fn, inputs=inputs, sources=sources, draws=draws, read=read, time=next(clock))
    parents, arrays = [origin(x) for x in sources], [x._data for x in sources]
    return Tensor(out._data, True, Node(recompute, parents, arrays, {"again": again}, out._data, None))


class Used(Observer):
    """Notes the Tensors that this thread uses: those that require a gradient, and all that live on."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.tensors: dict[int, Tensor] = {}
        self.all: dict[int, weakref.ref[Tensor]] = {}

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        for x in (*inputs, *params.values()):
            if isinstance(x, Tensor):
                self.all[id(x)] = weakref.ref(x)
                if x._requires_grad:
                    self.tensors[id(origin(x))] = x
        return run(op, inputs, params)

    def outer(self) -> list[Any]:
        return [x for ref in self.all.values() if (x := ref()) is not None]


recompute = Op(lambda *sources, again: again.fn(*again.inputs))
recompute.name = "checkpoint"


@recompute.vjp
def recompute_vjp(g: Any, _z: Any, *sources: Any, again: Any) -> Any:
    """Run the function again, recorded this time, and pass the adjoint back through that graph."""
    for x, array in again.read:
        if x._data is not array or changed_since(array, again.time):
            raise RuntimeError(
                f"{describe(x)}, an input of checkpoint, was changed in place after it was used, and its gradient "
                "needs the old values: make a new array instead"
            )
    with set_grad_enabled(True), rng.replayed(again.draws), rng.recorded() as draws:
        out = again.fn(*again.inputs)
    if rng.starts(draws) != rng.starts(again.draws):
        raise RuntimeError(
            "checkpoint: run again, the function drew other random numbers, "
            f"{rng.starts(draws)} instead of {rng.starts(again.draws)}"
        )
    if not (isinstance(out, Tensor) and out._requires_grad and out.shape == g.shape):
        raise RuntimeError(
            f"checkpoint: run again, the function gave {describe(out)}, not one of shape {g.shape} with a gradient"
        )
    create_graph = isinstance(g, Tensor)
    pairs = backward_pass(out, seed(out, g, create_graph), again.sources, create_graph, create_graph, stop=True)
    found = {id(x): h if create_graph else h._data for x, h in pairs}
    return tuple(found.get(id(x)) for x in again.sources)
