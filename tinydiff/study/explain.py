"""explain: a backward pass written out, with the names and shapes of a real graph.

    print(tinydiff.explain(loss, names={"x": x}))

    y1 = softmax(x, axis=-1)    (4, 10)
        x̄ = y1 * (ȳ1 - sum(ȳ1 * y1, axis=-1, keepdims=True))

For every node, in the order of the backward pass: the forward line, and for each input that needs a gradient its
adjoint. The adjoint is what the op's own rule computed when it was run on named Tensors (expressions.py).
"""

from __future__ import annotations

import inspect
import operator
import re
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..backend import xp
from ..engine import Node, Tensor, describe, origin, unbroadcast
from ..nn import Module
from ..observers import observing
from ..operators import OPS, array_of
from ..recompute import recompute
from ..shape_dtype import ShapeDtype
from .examples import example
from .expressions import Expr, Named, Tracer, free, written

WIDTH = 100


@dataclass
class Rule:
    """The adjoint of one input of a node: `target = expression`, or `+=` if it is not the first of several parts."""

    input: int
    target: str
    expression: str
    notes: list[str]
    part: int = 1  # it is this part ...
    parts: int = 1  # ... of so many: one for each use of the input

    def __str__(self) -> str:
        text = f"{self.target} {'=' if self.part == 1 else '+='} {self.expression}"
        return text + (f"    # {'; '.join(self.notes)}" if self.notes else "")


@dataclass
class Step:
    """A node of the graph, as the backward pass meets it: result = forward, and the rules."""

    op: str
    result: str  # its name
    adjoint: str  # the name of its adjoint
    inputs: list[str]  # their names; an input that is a number is that number
    input_shapes: list[tuple[int, ...] | None]
    shape: tuple[int, ...]
    forward: str
    arrives: list[str]  # the parts whose sum is the adjoint
    constants: dict[str, Any] = field(default_factory=dict)  # what the program has no name for: arrays, a geometry
    lets: list[tuple[str, str]] = field(default_factory=list)  # ("t1", text): what the rules use more than once
    rules: list[Rule] = field(default_factory=list)
    time: int = 0  # the number of the node

    def __str__(self) -> str:
        shapes = [str(s) for s in self.input_shapes if s is not None]
        shown = str(self.shape) if set(shapes) <= {str(self.shape)} else f"{', '.join(shapes)} -> {self.shape}"
        lines = [f"{self.result} = {self.forward}    {shown}"]
        lines += [f"    where {name} = {shortly(value)}" for name, value in self.constants.items()]
        if len(self.arrives) > 1:
            lines.append(f"    {self.adjoint} = {' + '.join(self.arrives)}")
        lines += [f"    {name} = {text}" for name, text in self.lets]
        lines += [f"    {rule}" for rule in self.rules]
        return "\n".join(map(_wrapped, lines))


@dataclass
class Explanation:
    """The nodes in the order of the backward pass; print it for the text. seed: the first line, the adjoint of the
    result."""

    seed: str
    nodes: list[Step]

    def __str__(self) -> str:
        return "\n\n".join([self.seed, *map(str, self.nodes)])


def explain(loss: Tensor, module: Module | None = None, *, names: Mapping[str, Any] | None = None) -> Explanation:
    """The backward pass of a result, written out: print it.

    Names: of the module's parameters by their paths, and of Tensors and arrays by `names`, {"x": x}. Other leaves have
    the name that they were given (x.name = "x"), or are x0, x1, ..., results y1, y2, ..., a result of one element L,
    and arrays without a gradient c0, c1, ... An adjoint is the name with a bar, x̄. A part of x̄ that is not the last
    is marked `1 of 2`; the adjoint of x is their sum.

    Nothing is changed: the graph is still there for `backward`. Each rule is run once, on ones, as it stands on its
    page: this takes a few times as long as a backward pass. Hooks do not run. What is inside `checkpoint` is one node.
    Errors: RuntimeError for a Tensor without a graph, or whose graph was freed by `backward` or has changed since.
    """
    if not isinstance(loss, Tensor) or loss.node is None:
        raise RuntimeError(f"explain: {describe(loss)} was not computed from any Tensor that requires a gradient")
    order = graph_of(loss.node)
    tracer, called = _names(order, loss, module, names)
    steps: list[Step] = []
    uses: dict[Any, list[tuple[Step, Rule]]] = {origin(loss): []}
    with observing(tracer), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adjoint is of ones, so the numbers mean nothing
        for node in reversed(order):
            if node in uses:  # else no adjoint arrives, and the backward pass does not run its rule
                arrives = [f"part of {step.result} ({step.op})" for step, _ in uses[node]]
                step = _step(node, called, tracer, arrives)
                step.time = node.time
                steps.append(step)
                for rule in step.rules:
                    uses.setdefault(node.parents[rule.input], []).append((step, rule))
    for parts in uses.values():
        for i, (_, rule) in enumerate(parts):
            rule.part, rule.parts = i + 1, len(parts)
            if len(parts) > 1:
                rule.notes.append(f"{i + 1} of {len(parts)}" + (": complete" if i + 1 == len(parts) else ""))
    bar = steps[0].adjoint
    return Explanation(f"{bar} = 1" if loss.size == 1 else f"{bar} is given    {loss.shape}", steps)


def graph_of(last: Node) -> list[Node]:
    """Every node that the last was computed from, oldest first."""
    seen, stack = {last}, [last]
    while stack:
        node = stack.pop()
        if node.values is None:
            raise RuntimeError(
                f"what {node.op.name} had kept was freed by backward: ask for this before backward, or call "
                "backward(retain_graph=True)"
            )
        node.check_kept()
        new = {parent for parent in node.parents if isinstance(parent, Node)} - seen
        seen |= new
        stack += new
    return sorted(seen, key=operator.attrgetter("time"))


def _names(order: list[Node], loss: Tensor, module: Any, names: Any) -> tuple[Tracer, dict[Any, str]]:
    """A tracer that knows the arrays with names, and the names of nodes and leaves."""
    given = [] if module is None else list(module.named_tensors())
    given += list((names or {}).items())
    tracer = Tracer({name for name, _ in given})
    called: dict[Any, str] = {}
    for name, x in given:
        if isinstance(x, Tensor):
            called.setdefault(origin(x), name)
        tracer.names.setdefault(id(array_of(x)), (array_of(x), name))
    for node in order:
        for parent in node.parents:
            if isinstance(parent, Tensor) and parent not in called:
                own = parent.name if parent.name not in tracer.taken else None  # its name, unless another has it
                called[parent] = own or free("x", tracer.taken, 0)
                tracer.taken.add(called[parent])
        if node not in called:
            called[node] = free("L", tracer.taken, None) if node is loss.node and loss.size == 1 else ""
    for number, node in enumerate(order, 1):
        called[node] = called[node] or free("y", tracer.taken, number)
    return tracer, called


def _step(node: Node, called: Mapping[Any, str], tracer: Tracer, arrives: list[str]) -> Step:
    before, tracer.known = set(tracer.constants), {}
    inputs, values = [], []
    for parent, value in zip(node.parents, node.values):
        name = None if parent is None else Expr("name", (called[parent],), {}, value.shape)
        inputs.append(tracer.term(value) if name is None else tracer.intern(name))
        kept = hasattr(value, "shape") and not isinstance(value, ShapeDtype)
        values.append(Named(value, inputs[-1], tracer) if kept else value)
    forward = tracer.call(node.op.name, tuple(inputs), {} if node.op is recompute else node.params, node.shape)
    step = Step(
        node.op.name,
        called[node],
        barred(called[node]),
        [e.args[0] if isinstance(e, Expr) else repr(e) for e in inputs],
        [getattr(value, "shape", None) for value in node.values],
        node.shape,
        written([forward])[1][0],
        arrives,
    )
    if node.op is recompute:  # its rule runs the function again, on the Tensors that it had
        call, note = f"checkpoint_vjp({step.adjoint})", "the function is run again, recorded this time"
        step.rules = [Rule(i, barred(called[x]), call, [note]) for i, x in enumerate(node.parents)]
    else:
        _run_rule(node, values, step, called, tracer)
    step.constants = {k: v for k, v in tracer.constants.items() if k not in before}
    return step


def _run_rule(node: Node, values: list[Any], step: Step, called: Mapping[Any, str], tracer: Tracer) -> None:
    """Run the rule as Node.pull_back does, but on Named Tensors, and enter the adjoints that it gives."""
    if node.op.rule is None:
        raise NotImplementedError(f"{node.op.name} has no rule, so no gradient passes through it")
    g = tracer.named(xp.ones(node.shape, node.dtype), step.adjoint)
    out = node if node.out is None else tracer.named(node.out, step.result)
    found = node.op.rule(g, out, *values, **node.params)
    found = found if isinstance(found, tuple) else (found,)
    if len(found) != len(values):
        raise ValueError(f"the rule of {node.op.name} gave {len(found)} adjoints for {len(values)} inputs")
    roots = []
    for i, (parent, adjoint) in enumerate(zip(node.parents, found)):
        adjoint = adjoint() if callable(adjoint) and parent is not None else adjoint
        if parent is not None and adjoint is not None:
            x = node.values[i]
            roots.append(tracer.term(unbroadcast(adjoint, x, node.op.name, i)))
            notes = [] if adjoint.shape == x.shape else [_summed(adjoint.shape, x.shape)]
            step.rules.append(Rule(i, barred(called[parent]), "", notes))
    step.lets, texts = written(roots)
    for rule, text in zip(step.rules, texts):
        rule.expression = text


def _summed(given: tuple[int, ...], shape: tuple[int, ...]) -> str:
    aligned = (1,) * (len(given) - len(shape)) + shape
    axes = [str(a) for a, (m, n) in enumerate(zip(aligned, given)) if m != n]
    if not axes:
        return "reshaped: axes of length 1 that the input has not"
    return f"summed over ax{'i' if len(axes) == 1 else 'e'}s {', '.join(axes)}: the forward had broadcast it"


def barred(name: str) -> str:
    """The adjoint of a name: x̄2 for x2, up.w̄eight for up.weight."""
    path, dot, last = name.rpartition(".")
    return f"{path}{dot}{last[:1]}\u0304{last[1:]}"


def shortly(value: Any) -> str:
    if isinstance(value, ShapeDtype):
        return f"an array {value.shape}, {value.dtype}"
    if not hasattr(value, "shape"):
        return repr(value)
    values = " ".join(str(array_of(value)).split()) if value.size <= 10 else "an array"
    return f"{values}  {value.shape}, {value.dtype}"


def _wrapped(line: str) -> str:
    """The line in lines, broken at spaces, but not inside a shape."""
    line = re.sub(r"\(\d+(, \d+)+\)", lambda shape: shape[0].replace(" ", "\0"), line)
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    text = textwrap.fill(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return text.replace("\0", " ")


# ---------------------------------------------------------------- one op


def page(name: str) -> str:
    """What there is to know of an op: its page in the source, and its rule run on a small example."""
    op = OPS[name]
    rule = getattr(op, "rule", None)
    parts = [inspect.getsource(f) for f in (getattr(op, "forward", op), rule) if f is not None]
    result, names = example(name)
    said = list(inspect.signature(rule).parameters)[1] if rule else "z"  # what the rule calls the result
    names = {**names, said.lstrip("_"): result}
    parts.append(f"On a small example:\n\n{explain(result, names=names)}\n")
    return f"{name}, from {op.__module__}\n\n" + "\n\n".join(map(textwrap.dedent, parts))
