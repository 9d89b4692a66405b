"""A backward pass that is written down as it goes: in the right order, and in the order of a classical mistake.

Both run the engine's own `Node.pull_back` at every node; hooks do not run. A pass is a list of visits: at each, what
had arrived, and what the rule passed on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..engine import Node


@dataclass
class Visit:
    """g: the adjoint as it stood when the node's rule ran. to: what the rule gave to each input, or None.
    got: of how many parts g was the sum."""

    node: Node
    g: Any
    got: int
    to: list[Any]


@dataclass
class Pass:
    """sums: for each node and leaf the adjoint after each part, so the last is the whole. parts: for each the visits
    that the parts came from, and the inputs of their nodes, in the order of their arrival."""

    visits: list[Visit] = field(default_factory=list)
    sums: dict[Any, list[Any]] = field(default_factory=dict)
    parts: dict[Any, list[tuple[int, int]]] = field(default_factory=dict)

    def visit(self, node: Node) -> Visit:
        g = self.sums[node][-1]
        visit = Visit(node, g, len(self.sums[node]), node.pull_back(g, node.parents, False))
        self.visits.append(visit)
        return visit

    def add(self, x: Any, part: Any, at: tuple[int, int]) -> None:
        sums = self.sums.setdefault(x, [])
        sums.append(sums[-1] + part if sums else part)
        self.parts.setdefault(x, []).append(at)


def topological(last: Node, g: Any, order: list[Node]) -> Pass:
    """The engine's order: from the newest node to the oldest, so that all parts of an adjoint have arrived.
    order: the nodes, oldest first."""
    done = Pass(sums={last: [g]})
    for node in sorted(order, key=operator.attrgetter("time"), reverse=True):
        if node in done.sums:
            visit = done.visit(node)
            for i, part in enumerate(visit.to):
                if part is not None:
                    done.add(node.parents[i], part, (len(done.visits) - 1, i))
    return done


def recursion(last: Node, g: Any) -> Pass:
    """The mistake: each node is visited when its first part arrives, and passes on what it has then.

        def visit(node):
            for parent, part in zip(node.parents, rule(node)):
                parent.adjoint += part
                if parent is new: visit(parent)

    What arrives later is added, but no longer passed on. With a stack instead of calls, for deep graphs.
    """
    done, seen = Pass(sums={last: [g]}), {last}

    def passed_on(node: Node) -> Iterator[Any]:
        number, visit = len(done.visits), done.visit(node)
        for i, (parent, part) in enumerate(zip(node.parents, visit.to)):
            if part is not None:
                done.add(parent, part, (number, i))
                yield parent

    stack: list[Iterator[Any]] = [passed_on(last)]
    while stack:
        for parent in stack[-1]:
            if isinstance(parent, Node) and parent not in seen:
                seen.add(parent)
                stack.append(passed_on(parent))
                break
        else:
            stack.pop()
    return done


def before_unbroadcast(node: Node, g: Any) -> list[Any]:
    """What the rule on the op's page gives to each input, before the engine sums it to the input's shape; None if there
    is nothing. (A fast rule may have summed already.)"""
    if node.op.rule is None:
        return [None] * len(node.parents)
    found = node.op.rule(g, node if node.out is None else node.out, *node.values, **node.params)
    given = zip(node.parents, found if isinstance(found, tuple) else (found,))
    return [None if parent is None else part() if callable(part) else part for parent, part in given]


def forward_values(order: list[Node]) -> dict[Node, tuple[Any, str]]:
    """The output of each node, and where it is from: the graph keeps only what rules read. What it has not kept is
    computed again from the inputs, if they are known. order: the nodes, oldest first."""
    values: dict[Node, tuple[Any, str]] = {}
    for node in order:
        if node.out is not None:
            values[node] = node.out, "kept for the rule"
        for parent, value in zip(node.parents, node.values):
            if isinstance(parent, Node) and not isinstance(value, Node) and parent not in values:
                values[parent] = value, f"kept for {node.op.name}"
    for node in order:
        if node not in values and node.op.name != "checkpoint":  # which would run the user's function
            inputs = inputs_of(node, values)
            if all(not hasattr(x, "no_values") for x in inputs):
                values[node] = node.op(*inputs, **node.params), "computed again for this page"
    return values


def inputs_of(node: Node, values: dict[Node, tuple[Any, str]]) -> list[Any]:
    """The inputs of a node, arrays and constants; a ShapeDtype where the values are not known."""
    inputs = []
    for parent, value in zip(node.parents, node.values):
        if hasattr(value, "no_values"):  # not kept
            if isinstance(parent, Node):
                value = values[parent][0] if parent in values else value
            elif parent is not None:
                value = parent._data
        inputs.append(value)
    return inputs
