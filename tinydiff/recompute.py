"""Memory for time: `checkpoint` keeps the inputs of a function and nothing of what happens inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from . import rng
from .backward import describe, flow_back
from .modes import no_grad, recording, state
from .tape import Node, tensor_at
from .tensor import Tensor


def checkpoint(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """fn(*inputs), without keeping what its backward pass reads: that is computed again when it is needed.

    Memory for time (Chen et al. 2016, "Training deep nets with sublinear memory cost"). Gradients also reach Tensors
    that fn uses without being given them, such as the weights of a module; random numbers are drawn again as they were.
    What fn changes itself changes twice, such as the running statistics of a BatchNorm2d.
    Errors: TypeError if fn returns anything but one Tensor.
    """
    if not state.grad_enabled:
        return fn(*inputs)
    before, state.captured = state.captured, {}
    try:
        with no_grad(), rng.recorded() as draws:
            out = fn(*inputs)
        captured = state.captured
    finally:
        state.captured = before
    if not isinstance(out, Tensor):
        raise TypeError(f"checkpoint: the function must return one Tensor, not {type(out).__name__}")
    if not captured or out._requires_grad or out.dtype.kind not in "fc":
        return out  # nothing to compute again: no gradient is wanted, or fn gave back a Tensor that was there before
    return Tensor(out._data, True, Recomputation(fn, inputs, list(captured.values()), draws, out), out.version)


class Recomputation(Node):
    """A node whose rule computes the function once more, with recording, and flows back through that."""

    __slots__ = ()

    def __init__(
        self, fn: Callable[..., Tensor], inputs: Sequence[Any], captured: list[Tensor], draws: Any, out: Tensor
    ):
        op = SimpleNamespace(
            name="checkpoint", keeps=[True] * len(captured), keeps_rest=True, keeps_out=False, definition=None
        )
        super().__init__(op, captured, [x._data for x in captured], {"fn": fn, "inputs": inputs}, out._data, draws, [0])

    def cotangents(self, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
        sources = [tensor_at(parent, value) for parent, value in zip(self.parents, self.values)]
        with recording(True), rng.replayed(self.saved), rng.recorded() as draws:
            out = self.params["fn"](*self.params["inputs"])
        if rng.starts(draws) != rng.starts(self.saved):
            raise RuntimeError(
                "checkpoint: run again, the function drew other random numbers, "
                f"{rng.starts(draws)} instead of {rng.starts(self.saved)}"
            )
        if not (isinstance(out, Tensor) and out._requires_grad and out.shape == self.shape):
            raise RuntimeError(
                f"checkpoint: run again, the function gave {describe(out)}, not one of shape "
                f"{self.shape} with a gradient"
            )
        pairs = flow_back(out, g, sources, create_graph, create_graph, stop=True)
        found = {x.node or x: cotangent if create_graph else cotangent._data for x, cotangent in pairs}
        return [found.get(parent) if want else None for parent, want in zip(self.parents, wanted)]
