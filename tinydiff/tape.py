"""The tape: how an op is recorded, and how gradients flow back through the record.

An op computes out = f(x, y). While Tensors that require gradients go in, each call leaves a `Node`: the op, where its
inputs came from, and the arrays its rule will read. `backward` walks the nodes from the newest to the oldest. Why in
that order? A node's cotangent (the derivative of the final scalar by the node's output) is a sum over all its uses, and
must be complete before it is passed on; uses are younger than the node, so time is a topological order.

A rule turns the cotangent g of the output into one cotangent an input, `x' = (d out / d x)^T g`:

    @primitive
    def multiply(x, y):                 # arrays in, array out: never sees a Tensor
        return x * y

    @multiply.vjp
    def _(g, _z, x, y):                 # the cotangent, the output, the inputs
        return lambda: g * y, lambda: g * x

* A name with a leading underscore is handed over as shape and dtype alone, so the tape does not keep its array.
* A cotangent may be a function, called only if that gradient is wanted; None where there is no gradient.
* A cotangent is summed to the shape of its input, and cast to its dtype, here and nowhere else (`_fit`).
* A rule is called with arrays, or, for `create_graph`, with Tensors, and then is itself recorded. So it
  uses only operators and functions of tinydiff.ops, and writes into none of its arguments.
* A fused op may return `(out, Saved(name=array))`; its rule gets `saved`. It has an `@op.reference`, the same function
  written in ops, which is its oracle in the tests and its path to higher derivatives.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import linecache
import math
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from . import backend, rng
from .tensor import OPS, Tensor

_time = itertools.count()
_HERE = os.path.dirname(__file__) + os.sep
_NUMPY_1 = backend.numpy.__version__.startswith("1.")


class _State(threading.local):
    grad_enabled = True
    anomaly = False
    flowing_back = False  # inside a rule: what it gives is checked as a whole
    captured: dict[int, Tensor] | None = None  # inside checkpoint: the Tensors that require gradients and were used


_state = _State()


class Saved(SimpleNamespace):
    """What a forward pass keeps for its rule, by name."""


class CotangentShapeError(ValueError):
    """A rule gave a cotangent that no sum over broadcast axes can bring to the shape of its input."""

    def __init__(self, op: str, i: int, wanted: tuple[int, ...], given: tuple[int, ...]):
        super().__init__(f"the rule of {op} gave input {i} of shape {wanted} a cotangent of shape {given}")
        self.wanted, self.given = wanted, given


class Absent:
    """Stands for an array that a rule does not read: shape and dtype are all there is."""

    __slots__ = ("shape", "dtype")

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = shape, dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


# ---------------------------------------------------------------- recording


class Primitive:
    """An op with a rule of its own. Called on arrays it returns an array; with a Tensor among its inputs it returns a
    Tensor, and records a node if a gradient may be asked for."""

    def __init__(self, forward: Callable[..., Any], analytic: bool = True, view: bool = False):
        self.forward, self.name = forward, forward.__name__
        self.analytic = analytic  # complex differentiable, so that the complex step can check it
        self.view = view  # the output may share memory with the input
        self.rule: Callable[..., Any] | None = None
        self.definition: Callable[..., Any] | None = None
        parameters = inspect.signature(forward).parameters.values()
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        self.keeps: list[bool] = []  # for each input: does the rule read its array?
        self.keeps_rest = self.keeps_out = False
        functools.update_wrapper(self, forward)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the rule (g, out, *inputs, **params) -> one cotangent an input."""
        names = list(inspect.signature(rule).parameters.values())
        reads = [not p.name.startswith("_") for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.keeps_out, self.keeps = reads[1], reads[2:]
        self.keeps_rest = any(p.kind is p.VAR_POSITIONAL and not p.name.startswith("_") for p in names)
        self.rule = rule
        return rule

    def reference(self, definition: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the same function of the same arguments, written in other ops."""
        self.definition = definition
        return definition

    def __call__(self, *inputs: Any, **params: Any) -> Any:
        for x in inputs:
            if isinstance(x, Tensor):
                return self._on_tensors(inputs, params)
        out = self.forward(*inputs, **params)
        return out[0] if type(out) is tuple else out

    def _on_tensors(self, inputs: tuple[Any, ...], params: dict[str, Any]) -> Tensor:
        arrays, required = [], False
        for x in inputs:
            if isinstance(x, Tensor):
                arrays.append(x._data)
                required = required or x._requires_grad
            else:
                arrays.append(x if type(x) is float else backend.operand(x))
        for name, value in params.items():
            if isinstance(value, Tensor) and value._requires_grad and _state.grad_enabled:
                raise TypeError(f"{self.name}: the option {name} has no gradient, but is a Tensor of shape {value.shape} that requires one")
        out, saved = self.forward(*arrays, **params), None
        if type(out) is tuple:
            out, saved = out
        out = _keep_dtype(out, arrays, params)
        if _state.anomaly and not _state.flowing_back:
            _check_made(self.name, out, (*arrays, *params.values()))
        version = next(x for x in inputs if isinstance(x, Tensor)).version if self.view else [0]
        if required and _state.grad_enabled and out.dtype.kind in "fc":
            node = Node(self, inputs, arrays, {**self.defaults, **params}, out, saved, version)
            return Tensor(out, True, node, version)
        if required and _state.captured is not None:
            _state.captured.update({id(x.node or x): x for x in inputs if isinstance(x, Tensor) and x._requires_grad})
        return Tensor(out, version=version)


def primitive(forward: Any = None, *, analytic: bool = True, view: bool = False) -> Any:
    """Decorator: make a forward function an op, and enter it in OPS. See the head of this file."""
    if forward is None:
        return functools.partial(primitive, analytic=analytic, view=view)
    return _register(Primitive(forward, analytic, view))


def composite(function: Any) -> Any:
    """Decorator: enter a function that is written in other ops, and so needs no rule, in OPS."""
    return _register(function)


def _register(op: Any) -> Any:
    if op.__name__ in OPS:
        raise ValueError(f"there is an op named {op.__name__!r} already")
    OPS[op.__name__] = op
    return op


def _keep_dtype(out: Any, arrays: list[Any], params: dict[str, Any]) -> Any:
    """An array even where NumPy reduced to a scalar, and, before NumPy 2, in which a scalar times a Python float was
    float64, no wider than its operands."""
    if not backend.active().is_array(out):
        out = backend.to_device(out)
    if _NUMPY_1 and out.ndim == 0 and "dtype" not in params and out.dtype == "float64":
        if {str(a.dtype) for a in arrays if hasattr(a, "dtype")} == {"float32"}:
            out = out.astype("float32")
    return out


class Node:
    """One recorded call: out = op(*inputs, **params)."""

    __slots__ = ("op", "params", "parents", "values", "out", "saved", "versions", "time", "line", "prints", "shape", "dtype")

    def __init__(self, op: Any, inputs: Sequence[Any], arrays: list[Any], params: dict, out: Any, saved: Any, version: list[int]):
        self.op, self.params, self.saved, self.time = op, params, saved, next(_time)
        # An intermediate result is its node; a leaf is its Tensor.
        self.parents = tuple((x.node or x) if isinstance(x, Tensor) and x._requires_grad else None for x in inputs)
        keeps = op.keeps + [op.keeps_rest] * (len(arrays) - len(op.keeps))
        self.values = tuple(a if keep or not hasattr(a, "shape") else Absent(a.shape, a.dtype) for a, keep in zip(arrays, keeps))
        self.shape, self.dtype = out.shape, out.dtype
        self.out = out if op.keeps_out else Absent(out.shape, out.dtype)
        self.versions = [
            (f"input {i}", x.version, x.version[0]) for i, (x, keep) in enumerate(zip(inputs, keeps)) if keep and isinstance(x, Tensor)
        ]
        if op.keeps_out:
            self.versions.append(("the output", version, version[0]))
        self.line = _user_line() if _state.anomaly else None
        self.prints = self._fingerprints() if _state.anomaly else None

    def cotangents(self, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
        """The cotangent of each input that is wanted (None elsewhere), from that of the output."""
        if self.values is None:
            raise RuntimeError(
                f"backward a second time through {self.op.name}: the arrays it had kept were freed by the first. "
                "Pass retain_graph=True the first time, or compute the output again"
            )
        self._check_unchanged()
        # A rule that reads the output in place of an input (softmax) is its own path to higher derivatives.
        if create_graph and self.op.definition is not None and not (self.op.keeps_out and any(isinstance(x, Absent) for x in self.values)):
            return self._cotangents_by_reference(g, wanted)
        out, values, params = self.out, list(self.values), self.params
        if create_graph:
            out = out if isinstance(out, Absent) else Tensor(out, True, self)
            values = [_tensor_at(parent, value) for parent, value in zip(self.parents, values)]
        if self.op.rule is None:
            raise NotImplementedError(f"{self.op.name} has no rule, so nothing flows back through it")
        if self.saved is not None:
            if create_graph:
                raise NotImplementedError(
                    f"{self.op.name} saves arrays for its rule: to differentiate its gradient it needs an @{self.op.name}.reference"
                )
            params = {**params, "saved": self.saved}
        found = self.op.rule(g, out, *values, **params)
        found = found if isinstance(found, tuple) else (found,)
        if len(found) != len(values):
            raise ValueError(f"the rule of {self.op.name} gave {len(found)} cotangents for {len(values)} inputs")
        fitted = []
        for i, (cotangent, value, want) in enumerate(zip(found, values, wanted)):
            cotangent = (cotangent() if callable(cotangent) else cotangent) if want else None
            fitted.append(cotangent if cotangent is None else _fit(cotangent, value, self.op.name, i))
        return fitted

    def _cotangents_by_reference(self, g: Any, wanted: Sequence[bool]) -> list[Any]:
        """The gradient of the op's definition, which can be differentiated again."""
        # A copy of each input, so that an input given twice still has two cotangents. What the rule does not read, directly
        # or through the output, has no influence on the gradient, and may be anything.
        inputs = []
        for parent, value, want in zip(self.parents, self.values, wanted):
            if isinstance(value, Absent):
                inputs.append(Tensor(backend.xp.zeros(value.shape, value.dtype), requires_grad=want))
            else:
                x = _tensor_at(parent, value)
                inputs.append(OPS["copy"](x) if want else x)
        assert self.op.definition is not None
        out = self.op.definition(*inputs, **self.params)
        targets = [x for x, want in zip(inputs, wanted) if want]
        gradients = iter(grad(out, targets, g, create_graph=True))
        return [next(gradients) if want else None for want in wanted]

    def free(self) -> None:
        self.values = self.out = self.saved = None  # type: ignore[assignment]
        self.params = {}

    def _check_unchanged(self) -> None:
        for what, version, then in self.versions:
            if version[0] != then:
                raise RuntimeError(
                    f"{what} of {self.op.name} was changed in place after it was used (version {version[0]}, was {then}), "
                    f"and its gradient needs the old values: make a new array instead{self._made_at()}"
                )
        if self.prints is not None and self.prints != self._fingerprints():
            raise RuntimeError(f"an array that {self.op.name} had kept was written into before its gradient was computed{self._made_at()}")

    def _fingerprints(self) -> list[int]:
        kept = [a for a in (*self.values, self.out) if backend.active().is_array(a)]
        return [zlib.crc32(backend.to_host(a).tobytes()) for a in kept]

    def _made_at(self) -> str:
        return f"; it was computed at {self.line}" if self.line else ""


def _tensor_at(parent: Any, value: Any) -> Any:
    """The input of a node as a Tensor with its history; what had no gradient, or was not kept, as it is."""
    if parent is None or isinstance(value, Absent):
        return value
    return parent if isinstance(parent, Tensor) else Tensor(value, True, parent)


def _fit(cotangent: Any, like: Any, op: str, i: int) -> Any:
    """The transpose of broadcasting is summing: bring a cotangent to the shape and the dtype of its input."""
    if not hasattr(cotangent, "dtype"):
        raise TypeError(f"the rule of {op} gave input {i} of shape {like.shape} no array as a cotangent but {cotangent!r}")
    shape = like.shape
    if cotangent.shape != shape:
        extra = cotangent.ndim - len(shape)
        stretched = [a for a in range(extra, cotangent.ndim) if shape[a - extra] == 1 != cotangent.shape[a]]
        kept = [n for a, n in enumerate(cotangent.shape) if a >= extra and a not in stretched]
        if extra < 0 or kept != [n for a, n in enumerate(shape) if a + extra not in stretched]:
            raise CotangentShapeError(op, i, shape, cotangent.shape)
        cotangent = OPS["sum"](cotangent, axis=(*range(extra), *stretched), keepdims=False)
        cotangent = OPS["reshape"](cotangent, shape=shape)
    if cotangent.dtype != like.dtype:
        cotangent = OPS["astype"](cotangent, dtype=like.dtype)
    return cotangent


# ---------------------------------------------------------------- flowing back


def backward(output: Tensor, cotangent: Any = None, *, create_graph: bool = False, retain_graph: bool | None = None) -> None:
    """Add d(output)/d(leaf), weighted with the cotangent, to `.grad` of every leaf that requires a gradient.

    cotangent: an array or Tensor of the output's shape; 1 if the output has one element.
    create_graph: record the pass itself, so that the gradients can be differentiated again.
    retain_graph: keep what the graph saved, for a second pass; as create_graph unless given.
    Errors: RuntimeError if the output needs no gradient, has several elements and no cotangent, was computed from
    arrays that have changed since, or was used already.
    """
    for leaf, g in _owned(_flow_back(output, cotangent, None, create_graph, retain_graph), cotangent, create_graph):
        leaf.grad = g if leaf.grad is None else leaf.grad + g


def grad(
    output: Tensor, inputs: Tensor | Sequence[Tensor], grad_output: Any = None, create_graph: bool = False, retain_graph: bool = True
) -> tuple[Tensor, ...]:
    """d(output)/d(input), weighted with grad_output, for each of the inputs; touches no `.grad`.

    create_graph, retain_graph: as for `backward`, but the graph is kept unless retain_graph is False.

    The inputs may be leaves or intermediate results. The gradient of one that the output does not depend on is zero.
    Errors: as for `backward`; RuntimeError for an input that does not require a gradient.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for i, x in enumerate(inputs):
        if not (isinstance(x, Tensor) and x.requires_grad):
            raise RuntimeError(f"grad: input {i} ({_describe(x)}) does not require a gradient")
    pairs = _flow_back(output, grad_output, inputs, create_graph, retain_graph)
    found = {id(x.node or x): g for x, g in _owned(pairs, grad_output, create_graph)}
    return tuple(found[id(x.node or x)] if id(x.node or x) in found else Tensor(backend.xp.zeros_like(x._data)) for x in inputs)


def _owned(pairs: list[Any], cotangent: Any, create_graph: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (target, gradient), each gradient in memory of its own: a rule may hand one array to two inputs, or a view, or
    the cotangent that the caller gave, and none of these may change when a gradient is scaled in place."""
    taken = {id(cotangent._data if isinstance(cotangent, Tensor) else cotangent)}
    for x, g in pairs:
        if g._data.base is not None or id(g._data) in taken:
            g = _recorded(OPS["copy"], g) if create_graph else Tensor(g._data.copy())
        taken.add(id(g._data))
        yield x, g


def _recorded(op: Any, x: Tensor) -> Tensor:
    with _mode(True):
        return op(x)


def _flow_back(output: Tensor, cotangent: Any, targets: Any, create_graph: bool, retain_graph: Any, stop: bool = False) -> list[Any]:
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
    order = sorted(nodes, key=lambda node: node.time)

    # 2. Of that, only what leads to a target.
    useful: set[Any] = set(goals or ())
    for node in order:
        if goals is None or any(parent in useful for parent in node.parents if parent is not None):
            useful.add(node)

    # 3. Pass cotangents from the newest node to the oldest.
    flowing: dict[Any, Any] = {output.node or output: g}
    found: dict[Any, Any] = {}
    with _mode(True) if create_graph else contextlib.nullcontext():
        while order:
            node = order.pop()
            g = flowing.pop(node, None)
            if g is None:
                continue
            if goals and node in goals:
                found[node] = g
            wanted = [p is not None and (p in useful or goals is None) for p in node.parents]
            if not any(wanted):
                continue
            cotangents = _checked_cotangents(node, g, wanted, create_graph) if _state.anomaly else node.cotangents(g, wanted, create_graph)
            for parent, cotangent in zip(node.parents, cotangents):
                if cotangent is None:
                    continue
                flowing[parent] = cotangent if parent not in flowing else flowing[parent] + cotangent
            if not (create_graph if retain_graph is None else retain_graph):
                node.free()
    found.update(flowing)  # what is left belongs to leaves
    as_tensor = {key: g if isinstance(g, Tensor) else Tensor(_keep_dtype(g, [], {})) for key, g in found.items()}
    if goals is None:
        return list(as_tensor.items())
    return [(x, as_tensor[key]) for key, x in goals.items() if key in as_tensor]


def _seed(output: Any, cotangent: Any, create_graph: bool) -> Any:
    """The cotangent at the output: what was given, or 1 for a scalar."""
    if not (isinstance(output, Tensor) and output.requires_grad):
        raise RuntimeError(
            f"the output ({_describe(output)}) does not depend on any Tensor that requires a gradient: was requires_grad set, "
            "or was it computed inside no_grad() or detached?"
        )
    if cotangent is None:
        if output.size != 1:
            raise RuntimeError(
                f"the gradient of an output of shape {output.shape} needs a cotangent of that shape: reduce it to a scalar "
                "first (.sum(), .mean()), or pass one"
            )
        cotangent = backend.xp.ones_like(output._data)
    if not isinstance(cotangent, Tensor):
        cotangent = Tensor(backend.to_device(cotangent))
    if cotangent.shape != output.shape:
        raise RuntimeError(f"the cotangent has shape {cotangent.shape}, but the output has shape {output.shape}")
    if cotangent.dtype != output.dtype:
        cotangent = cotangent.astype(output.dtype)
    if _state.anomaly and (flaw := _flaw(cotangent)):
        raise FloatingPointError(f"the cotangent given for the output has {flaw} ({_count(cotangent)})")
    return cotangent if create_graph else cotangent._data


def _describe(x: Any) -> str:
    return f"a Tensor of shape {x.shape}" if isinstance(x, Tensor) else f"{type(x).__name__}"


# ---------------------------------------------------------------- modes


def grad_enabled() -> bool:
    """Are nodes being recorded in this thread?"""
    return _state.grad_enabled


@contextlib.contextmanager
def _mode(enabled: bool) -> Iterator[None]:
    before, _state.grad_enabled = _state.grad_enabled, enabled
    try:
        yield
    finally:
        _state.grad_enabled = before


class no_grad:
    """Inside `with no_grad():`, or a function or generator decorated with `@no_grad()`, nothing is recorded (in this thread)."""

    def __init__(self) -> None:
        self.before: list[bool] = []

    def __enter__(self) -> None:
        self.before.append(_state.grad_enabled)
        _state.grad_enabled = False

    def __exit__(self, *_error: Any) -> None:
        _state.grad_enabled = self.before.pop()

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _mode(False):
                return fn(*args, **kwargs)

        @functools.wraps(fn)
        def steps(*args: Any, **kwargs: Any) -> Any:
            generator, sent = fn(*args, **kwargs), None
            try:
                while True:  # while the generator waits, its caller's mode is the caller's own
                    with _mode(False):
                        try:
                            value = generator.send(sent)
                        except StopIteration as end:
                            return end.value
                    sent = yield value
            finally:
                generator.close()

        return steps if inspect.isgeneratorfunction(fn) else call


def checkpoint(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """fn(*inputs), without keeping what its backward pass reads: that is computed again when it is needed.

    Memory for time (Chen et al. 2016, "Training deep nets with sublinear memory cost"). Gradients also reach Tensors that
    fn uses without being given them, such as the weights of a module; random numbers are drawn again as they were.
    Errors: TypeError if fn returns anything but one Tensor.
    """
    if not _state.grad_enabled:
        return fn(*inputs)
    before, _state.captured = _state.captured, {}
    try:
        with no_grad(), rng.recorded() as draws:
            out = fn(*inputs)
        captured = _state.captured
    finally:
        _state.captured = before
    if not isinstance(out, Tensor):
        raise TypeError(f"checkpoint: the function must return one Tensor, not {type(out).__name__}")
    if not captured or out._requires_grad or out.dtype.kind not in "fc":
        return out  # nothing to compute again: no gradient is wanted, or fn gave back a Tensor that was there before
    return Tensor(out._data, True, _Checkpoint(fn, inputs, list(captured.values()), draws, out), out.version)


class _Checkpoint(Node):
    """A node whose rule computes the function once more, with recording, and flows back through that."""

    __slots__ = ()

    def __init__(self, fn: Callable[..., Tensor], inputs: Sequence[Any], captured: list[Tensor], draws: Any, out: Tensor):
        op = SimpleNamespace(name="checkpoint", keeps=[True] * len(captured), keeps_rest=True, keeps_out=False)
        super().__init__(op, captured, [x._data for x in captured], {"fn": fn, "inputs": inputs}, out._data, draws, [0])
        self.versions += [(f"argument {i}", x.version, x.version[0]) for i, x in enumerate(inputs) if isinstance(x, Tensor)]

    def cotangents(self, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
        if self.values is None:
            raise RuntimeError(
                "backward a second time through checkpoint: what it had kept was freed by the first. "
                "Pass retain_graph=True the first time, or compute the output again"
            )
        self._check_unchanged()
        sources = [_tensor_at(parent, value) for parent, value in zip(self.parents, self.values)]
        with _mode(True), rng.replayed(self.saved), rng.recorded() as draws:
            out = self.params["fn"](*self.params["inputs"])
        if rng.starts(draws) != rng.starts(self.saved):
            raise RuntimeError(
                f"checkpoint: run again, the function drew other random numbers, {rng.starts(draws)} instead of {rng.starts(self.saved)}"
            )
        if not (isinstance(out, Tensor) and out._requires_grad and out.shape == self.shape):
            raise RuntimeError(f"checkpoint: run again, the function gave {_describe(out)}, not one of shape {self.shape} with a gradient")
        found = dict(_by_key(_flow_back(out, g, sources, create_graph, create_graph, stop=True)))
        found = {key: x if create_graph else x._data for key, x in found.items()}
        return [found.get(parent) if want else None for parent, want in zip(self.parents, wanted)]


def _by_key(pairs: list[Any]) -> Iterator[tuple[Any, Any]]:
    return ((x.node or x, g) for x, g in pairs)


def anomaly_detection() -> bool:
    """Is this thread inside detect_anomaly?"""
    return _state.anomaly


@contextlib.contextmanager
def detect_anomaly() -> Iterator[None]:
    """Inside, the first NaN or Inf, forward or backward, is an error that names the op and your line; so is a kept array
    that was written into. Slow: every result is read back to the host."""
    before, _state.anomaly = _state.anomaly, True
    try:
        yield
    finally:
        _state.anomaly = before


def _flaw(*values: Any) -> str:
    """ "NaN" if there is one in the values, else "Inf" if there is one, else nothing. Numbers and floating arrays count."""
    found = ""
    for value in values:
        value = value._data if isinstance(value, Tensor) else value
        if isinstance(value, float):
            found = "NaN" if value != value else found or ("Inf" if value in (math.inf, -math.inf) else "")
        elif backend.active().is_array(value) and value.dtype.kind in "fc" and not backend.scalar(backend.xp.isfinite(value).all()):
            found = "NaN" if backend.scalar(backend.xp.isnan(value).any()) else found or "Inf"
        if found == "NaN":
            break
    return found


def _count(array: Any) -> str:
    array = array._data if isinstance(array, Tensor) else array
    return f"{array.size - int(backend.scalar(backend.xp.isfinite(array).sum()))} of {array.size} values, shape {array.shape}"


def _check_made(op: str, out: Any, inputs: Sequence[Any]) -> None:
    """An Inf that came in may be meant (the -inf of a mask): only one that appears is an error, and so is every NaN."""
    flaw = _flaw(out)
    given = _flaw(*inputs) if flaw else ""
    if flaw and (flaw == "NaN" or not given):
        verb = "passed on" if given == flaw else "made"
        raise FloatingPointError(f"{op} {verb} {flaw} ({_count(out)}) at {_user_line()}")


def _checked_cotangents(node: Node, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
    before, _state.flowing_back = _state.flowing_back, True
    try:
        cotangents = node.cotangents(g, wanted, create_graph)
    finally:
        _state.flowing_back = before
    for i, cotangent in enumerate(cotangents):
        if cotangent is not None and (flaw := _flaw(cotangent)):
            raise FloatingPointError(f"{node.op.name} passed back {flaw} to input {i} ({_count(cotangent)}){node._made_at()}")
    return cotangents


def _user_line() -> str:
    """The innermost line outside tinydiff, "file:line: text"."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}: {linecache.getline(file, line).strip()}"
