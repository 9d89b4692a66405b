"""How gradients flow back through the tape: `backward` and `grad`.

Both walk the nodes from the newest to the oldest, and add up what arrives at each. Why in that order
stands at the head of tape.py.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from . import backend
from .modes import count_of, flaw_of, recording, state
from .tape import Absent, Node, keep_dtype, tensor_at
from .tensor import OPS, Tensor


def backward(
    output: Tensor, cotangent: Any = None, *, create_graph: bool = False, retain_graph: bool | None = None
) -> None:
    """Add d(output)/d(leaf), weighted with the cotangent, to `.grad` of every leaf that requires a gradient.

    cotangent: an array or Tensor of the output's shape; 1 if the output has one element.
    create_graph: record the pass itself, so that the gradients can be differentiated again.
    retain_graph: keep what the graph saved, for a second pass; as create_graph unless given.
    Errors: RuntimeError if the output needs no gradient, has several elements and no cotangent, was computed from
    arrays that have changed since, or was used already.
    """
    for leaf, g in _owned(flow_back(output, cotangent, None, create_graph, retain_graph), cotangent, create_graph):
        leaf.grad = g if leaf.grad is None else leaf.grad + g


def grad(
    output: Tensor,
    inputs: Tensor | Sequence[Tensor],
    grad_output: Any = None,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> tuple[Tensor, ...]:
    """d(output)/d(input), weighted with grad_output, for each of the inputs; touches no `.grad`.

    create_graph, retain_graph: as for `backward`, but the graph is kept unless retain_graph is False.

    The inputs may be leaves or intermediate results. The gradient of one that the output does not depend on is zero.
    Errors: as for `backward`; RuntimeError for an input that does not require a gradient.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for i, x in enumerate(inputs):
        if not (isinstance(x, Tensor) and x.requires_grad):
            raise RuntimeError(f"grad: input {i} ({describe(x)}) does not require a gradient")
    pairs = flow_back(output, grad_output, inputs, create_graph, retain_graph)
    found = {id(x.node or x): g for x, g in _owned(pairs, grad_output, create_graph)}
    return tuple(
        found[id(x.node or x)] if id(x.node or x) in found else Tensor(backend.xp.zeros_like(x._data)) for x in inputs
    )


def _owned(pairs: list[Any], cotangent: Any, create_graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (target, gradient), each gradient in memory of its own: a rule may hand one array to two inputs, or a
    view, or the cotangent that the caller gave, and none of these may change when a gradient is scaled in place."""
    taken = {id(cotangent._data if isinstance(cotangent, Tensor) else cotangent)}
    for x, g in pairs:
        if g._data.base is not None or id(g._data) in taken:
            g = _recorded(OPS["copy"], g) if create_graph else Tensor(g._data.copy())
        taken.add(id(g._data))
        yield x, g


def _recorded(op: Any, x: Tensor) -> Tensor:
    with recording(True):
        return op(x)


def flow_back(
    output: Tensor, cotangent: Any, targets: Any, create_graph: bool, retain_graph: Any, stop: bool = False
) -> list[Any]:
    """(target, cotangent) for each target that is reached; targets None: every leaf. With stop, not beyond a target."""
    g = _seed(output, cotangent, create_graph)
    goals = None if targets is None else {x.node or x: x for x in targets}

    # 1. Everything the output was computed from, oldest first.
    nodes: set[Node] = set()
    stack = [output.node] if output.node else []
    while stack:
        node = stack.pop()
        if node in nodes or (stop and goals and node in goals):
            continue
        nodes.add(node)
        stack.extend(parent for parent in node.parents if isinstance(parent, Node))
    order = sorted(nodes, key=operator.attrgetter("time"))

    # 2. Of that, only what leads to a target.
    useful: set[Any] = set(goals or ())
    if goals is not None:
        for node in order:
            if any(parent in useful for parent in node.parents if parent is not None):
                useful.add(node)

    # 3. Pass cotangents from the newest node to the oldest.
    flowing: dict[Any, Any] = {output.node or output: g}
    found: dict[Any, Any] = {}
    keep = create_graph if retain_graph is None else retain_graph
    of_node = _checked_cotangents if state.anomaly else cotangents_of
    with recording(True) if create_graph else contextlib.nullcontext():
        while order:
            node = order.pop()
            g = flowing.pop(node, None)
            if g is None:
                continue
            if goals and node in goals:
                found[node] = g
            wanted = [p is not None and (goals is None or p in useful) for p in node.parents]
            if True not in wanted:
                continue
            for parent, cotangent in zip(node.parents, of_node(node, g, wanted, create_graph)):
                if cotangent is not None:
                    flowing[parent] = flowing[parent] + cotangent if parent in flowing else cotangent
            if not keep:
                node.free()
    found.update(flowing)  # what is left belongs to leaves
    as_tensor = {key: g if isinstance(g, Tensor) else Tensor(keep_dtype(g, [], {})) for key, g in found.items()}
    if goals is None:
        return list(as_tensor.items())
    return [(x, as_tensor[key]) for key, x in goals.items() if key in as_tensor]


def _seed(output: Any, cotangent: Any, create_graph: bool) -> Any:
    """The cotangent at the output: what was given, or 1 for a scalar."""
    if not (isinstance(output, Tensor) and output.requires_grad):
        raise RuntimeError(
            f"the output ({describe(output)}) does not depend on any Tensor that requires a gradient: "
            "was requires_grad set, or was it computed inside no_grad() or detached?"
        )
    if cotangent is None:
        if output.size != 1:
            raise RuntimeError(
                f"the gradient of an output of shape {output.shape} needs a cotangent of that shape: "
                "reduce it to a scalar first (.sum(), .mean()), or pass one"
            )
        cotangent = backend.xp.ones_like(output._data)
    if not isinstance(cotangent, Tensor):
        cotangent = Tensor(backend.to_device(cotangent))
    if cotangent.shape != output.shape:
        raise RuntimeError(f"the cotangent has shape {cotangent.shape}, but the output has shape {output.shape}")
    if cotangent.dtype != output.dtype:
        cotangent = cotangent.astype(output.dtype)
    if state.anomaly and (flaw := flaw_of(cotangent)):
        raise FloatingPointError(f"the cotangent given for the output has {flaw} ({count_of(cotangent)})")
    return cotangent if create_graph else cotangent._data


def describe(x: Any) -> str:
    return f"a Tensor of shape {x.shape}" if isinstance(x, Tensor) else f"{type(x).__name__}"


def cotangents_of(node: Node, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
    """The cotangent of each input of a node that is wanted (None elsewhere), from that of its output."""
    node.check_usable()
    if create_graph and node.has_reference:
        return _by_reference(node, g, wanted)
    return node.cotangents(g, wanted, create_graph)


def _by_reference(node: Node, g: Any, wanted: Sequence[bool]) -> list[Any]:
    """The gradient of the op's definition, which can be differentiated again."""
    # A copy of each input, so that an input given twice still has two cotangents. What the rule does not read, directly
    # or through the output, has no influence on the gradient, and may be anything.
    inputs = []
    for parent, value, want in zip(node.parents, node.values, wanted):
        if isinstance(value, Absent):
            inputs.append(Tensor(backend.xp.zeros(value.shape, value.dtype), requires_grad=want))
        else:
            x = tensor_at(parent, value)
            inputs.append(OPS["copy"](x) if want else x)
    assert node.op.definition is not None
    out = node.op.definition(*inputs, **node.params)
    targets = [x for x, want in zip(inputs, wanted) if want]
    gradients = iter(grad(out, targets, g, create_graph=True))
    return [next(gradients) if want else None for want in wanted]


def _checked_cotangents(node: Node, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
    before, state.flowing_back = state.flowing_back, True
    try:
        cotangents = cotangents_of(node, g, wanted, create_graph)
    finally:
        state.flowing_back = before
    for i, cotangent in enumerate(cotangents):
        if cotangent is not None and (flaw := flaw_of(cotangent)):
            raise FloatingPointError(
                f"{node.op.name} passed back {flaw} to input {i} ({count_of(cotangent)}){node.made_at()}"
            )
    return cotangents
