"""Less memory for more time: `checkpoint` keeps the inputs of a function, and none of the arrays computed inside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import rng
from .changes import changed_since, clock
from .engine import Node, Op, Tensor, backward_pass, describe, options_of, origin, seed
from .modes import grad_enabled, no_grad, set_grad_enabled
from .observers import Observer, observing


def checkpoint(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """fn(*inputs), without keeping the arrays that its backward pass reads: these are computed again when needed.

    Gradients also reach Tensors that fn uses but does not take as inputs, such as the weights of a module. The second
    run draws the same random numbers as the first. State that fn changes is changed twice, such as the running
    statistics of a BatchNorm2d. The first run records nothing, so hooks on results can be set in the second alone, and
    fn cannot ask for gradients itself. Microbatches inside fn come one after the other.

    Until the backward pass, what fn reads must stay as it is. A change of a Tensor that an op in fn has read is
    noticed; one of a plain array, or of a Tensor that fn only compares or whose `.data` it reads, is not.
    Errors: TypeError if fn returns anything but one Tensor; in the backward pass, RuntimeError if a Tensor that fn
    reads has changed, or if the second run draws other numbers or gives another shape or dtype.
    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if not grad_enabled():
        return fn(*inputs)
    start = next(clock)
    with no_grad(), rng.recorded() as draws, observing(Used()) as used:
        out = fn(*inputs)
    if not isinstance(out, Tensor):
        raise TypeError(f"checkpoint: the function must return one Tensor, not {type(out).__name__}")
    sources = list(used.tensors.values())
    if made := [x for x in sources if x.node is not None and x.node.time > start]:
        raise RuntimeError(
            f"checkpoint: {describe(made[0])} was recorded while the function ran, in another thread, which checkpoint "
            "does not follow: compute it before, or in this thread"
        )
    if not sources or out._requires_grad or out.dtype.kind not in "fc":
        return out  # nothing to compute again: no gradient is wanted, or fn gave back a Tensor that was there before
    # Also what needs no gradient, and what fn uses without being given it, as a frozen weight.
    read = [(x, x._data) for x in (*used.outer(), *inputs) if isinstance(x, Tensor) and x is not out]
    first = FirstRun(fn, inputs, sources, draws, read, next(clock))
    parents, arrays = [origin(x) for x in sources], [x._data for x in sources]
    return Tensor(out._data, True, Node(recompute, parents, arrays, {"first": first}, out._data, None))


@dataclass(frozen=True)
class FirstRun:
    """What the second run must know of the first."""

    fn: Callable[..., Any]
    inputs: tuple[Any, ...]
    sources: list[Tensor]  # what requires a gradient
    draws: Any  # the random sources that it drew from, and where they stood
    read: list[tuple[Tensor, Any]]  # the Tensors that it read, and their arrays at that time
    time: int


class Used(Observer):
    """Notes the Tensors that ops of this thread read: those that require a gradient, and all that fn has not made."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.tensors: dict[int, Tensor] = {}
        self.all: dict[int, weakref.ref[Tensor]] = {}
        self.made: dict[int, weakref.ref[Tensor]] = {}

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        for x in (*inputs, *(x for _, x in options_of(params))):
            if isinstance(x, Tensor) and not (id(x) in self.made and self.made[id(x)]() is x):
                self.all[id(x)] = weakref.ref(x)
                if x._requires_grad:
                    self.tensors[id(origin(x))] = x
        out = run(op, inputs, params)
        if isinstance(out, Tensor):
            self.made[id(out)] = weakref.ref(out)
        return out

    def outer(self) -> list[Tensor]:
        return [x for ref in self.all.values() if (x := ref()) is not None]


recompute = Op(lambda *sources, first: first.fn(*first.inputs))
recompute.name = "checkpoint"


@recompute.vjp
def recompute_vjp(g: Any, _z: Any, *sources: Any, first: FirstRun) -> Any:
    """Run the function again, recorded this time, and pass the adjoint back through that graph."""
    for x, array in first.read:
        if x._data is not array or changed_since(array, first.time):
            raise RuntimeError(
                f"{describe(x)}, which the function in checkpoint reads, was changed after its first run, and the "
                "second needs the old values: make a new Tensor instead"
            )
    with set_grad_enabled(True), rng.replayed(first.draws), rng.recorded() as draws:
        out = first.fn(*first.inputs)
    if rng.starts(draws) != rng.starts(first.draws):
        raise RuntimeError(
            "checkpoint: run again, the function drew other random numbers, "
            f"{rng.starts(draws)} instead of {rng.starts(first.draws)}"
        )
    if not (isinstance(out, Tensor) and out.shape == g.shape and out.dtype == g.dtype):
        raise RuntimeError(
            f"checkpoint: run again, the function gave {describe(out)}, not a Tensor of shape {g.shape}, {g.dtype}"
        )
    if not out._requires_grad:  # such as a detached result
        return (None,) * len(sources)
    create_graph = isinstance(g, Tensor)
    pairs = backward_pass(out, seed(out, g, create_graph), first.sources, create_graph, create_graph, stop=True)
    found = {id(x): h if create_graph else h._data for x, h in pairs}
    return tuple(found.get(id(x)) for x in first.sources)
