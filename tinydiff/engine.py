"""The engine: reverse-mode automatic differentiation. Read it from top to bottom.

An op computes z = f(x, y) on arrays. When a Tensor that requires a gradient goes in, the call leaves a `Node`: the op,
where its inputs came from, and the arrays that its rule will read. For the final scalar L, the adjoint of x is
x̄ = dL/dx. The rule of an op turns the adjoint of its output into those of its inputs (a vector-Jacobian product):

    @op
    def multiply(x, y):                 # arrays in, array out: it never sees a Tensor
        return x * y

    @multiply.vjp
    def multiply_vjp(g, _z, x, y):      # the adjoint of the output, the output, the inputs
        return lambda: g * y, lambda: g * x

* A name with a leading underscore is handed over as shape and dtype alone, so its array is not kept until then.
* An adjoint may be a function, which is called only if that gradient is wanted; None where there is no gradient.
* An adjoint is summed to the shape of its input, and cast to its dtype, here and nowhere else (`unbroadcast`).
* A rule is called with arrays, or, for `create_graph`, with Tensors, and then is itself recorded: so gradients have
  gradients. It uses only operators and functions of tinydiff.ops, and writes into none of its arguments.

`backward` passes adjoints from the newest node to the oldest. Why in that order? A node used twice gets an adjoint from
each use, and must have their whole sum before it passes anything on. All uses of a node are younger than it is.
"""

from __future__ import annotations

import functools
import inspect
import operator
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, overload

from . import backend, summary
from .arguments import check_floating, check_keywords, check_precision, with_own_keywords
from .backend import Array, HostArray
from .changes import changes, check_unchanged, clock, note_change
from .hooks import Hooks
from .modes import keeps_mode, recording, set_grad_enabled
from .observers import observed, observers, tell
from .operators import OPS, Operators, array_of, register
from .shape_dtype import ShapeDtype

# ---------------------------------------------------------------- 1. Tensor


class Tensor(Operators):
    """An array that remembers how it was computed. Make one with `tinydiff.tensor`.

    data: the array. grad: the gradient that `backward` leaves here. node: what computed it; None for a leaf.
    name: for you, x.name = "x"; it is shown.
    Its operators and methods are NumPy's; each only names the op that it means.
    """

    __slots__ = ("_data", "_grad", "node", "_requires_grad", "hooks", "_name", "__weakref__")

    def __init__(self, data: Array, requires_grad: bool = False, node: Node | None = None):
        self._data = data
        self._grad: Tensor | None = None
        self.node = node
        self._requires_grad = requires_grad
        self.hooks: Hooks | None = None

    @property
    def data(self) -> Array:
        """The array. `x.data -= a` is seen as a change in place; `x.data[0] = 1` is not, as in PyTorch."""
        return self._data

    @data.setter
    def data(self, array: Array) -> None:
        array = backend.to_device(array_of(array))
        if array.shape != self._data.shape or array.dtype != self._data.dtype:
            raise ValueError(
                f"the data of a Tensor of shape {self.shape}, {self.dtype} cannot become an array of shape "
                f"{array.shape}, {array.dtype}"
            )
        if array is self._data:  # x.data -= a has changed it in place
            note_change(array)
        tell(self, "data", array)
        self._data = array

    @property
    def grad(self) -> Tensor | None:
        return self._grad

    @grad.setter
    def grad(self, g: Tensor | None) -> None:
        tell(self, "grad", g)
        self._grad = g

    @property
    def requires_grad(self) -> bool:
        """Is a gradient of this Tensor wanted? May be set, on a floating Tensor."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            check_floating(self._data)
        elif self.node is not None:
            raise RuntimeError(
                f"a Tensor of shape {self.shape} that {self.node.op.name} computed cannot stop requiring a gradient: "
                "take x.detach()"
            )
        self._requires_grad = wanted

    def detach(self) -> Tensor:
        """The same array without its history."""
        return Tensor(self._data)

    @keeps_mode
    def backward(self, grad: Any = None, create_graph: bool = False, retain_graph: bool | None = None) -> None:
        """Add d(self)/d(leaf), weighted with grad, to `.grad` of every leaf that requires a gradient.

        grad: the adjoint of this Tensor, an array or Tensor of its shape; 1 if it has one element.
        create_graph: record the pass itself, so that the gradients can be differentiated again.
        retain_graph: keep what the graph saved, for a second pass; as create_graph unless given.
        Errors: RuntimeError if this Tensor needs no gradient, has several elements and no grad, was computed from
        arrays that have changed since, or was used already.
        """
        keep = create_graph if retain_graph is None else retain_graph
        pairs = backward_pass(self, seed(self, grad, create_graph), None, create_graph, keep)
        with set_grad_enabled(create_graph):
            for leaf, gradient in owned(pairs, grad):
                leaf.accumulate(gradient)


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """A Tensor with a copy of the data: an array, a number, a nested list, or a Tensor (whose history is left behind).

    Arrays keep their dtype; Python floats become float32 unless `dtype` is given.
    Errors: TypeError for data that is no array of numbers, or that requires a gradient and is not floating.
    """
    backend.active()  # whose own errors are not about the data
    try:
        array = backend.to_device(array_of(data))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a Tensor holds an array of numbers, not {reprlib.repr(data)}: {error}") from error
    if dtype is None and not hasattr(data, "dtype") and array.dtype.kind == "f":
        dtype = "float32"
    dtype = array.dtype if dtype is None else backend.xp.dtype(dtype)
    if array.dtype.kind not in "fciub" or dtype.kind not in "fciub":
        raise TypeError(f"a Tensor holds an array of numbers, not {reprlib.repr(data)} of dtype {dtype}")
    check_precision(f"a Tensor of shape {array.shape}", dtype)
    array = array.astype(dtype)  # always a copy
    if requires_grad:
        check_floating(array)
    return Tensor(array, requires_grad)


def describe(x: Any) -> str:
    return f"a Tensor of shape {x.shape}" if isinstance(x, Tensor) else type(x).__name__


def origin(x: Tensor) -> Any:
    """Where a Tensor stands in the graph: the node that made it, or, if it is a leaf, itself."""
    return x if x.node is None else x.node


# ---------------------------------------------------------------- 2. op


P = ParamSpec("P")
Function = TypeVar("Function", bound=Callable[..., Any])


class Op(Generic[P]):
    """A function of arrays with a rule. Called on arrays it returns an array; with a Tensor among its inputs it returns
    a Tensor, and leaves a node if a gradient may be asked for."""

    def __init__(self, forward: Callable[P, Any], holomorphic: bool = True):
        self.forward: Callable[..., Any] = forward
        self.name = forward.__name__
        self.holomorphic = holomorphic  # complex differentiable, so that the complex step can check it
        self.rule: Callable[..., Any] | None = None
        self.unread: Sequence[int] | None = None  # the places of the inputs that the rule does not read; None: all
        self.keeps_out = False
        self.fast_forwards: dict[str | None, Callable[..., Any]] = {}  # by backend: see fast/
        self.fast_rules: dict[str | None, Callable[..., Any]] = {}
        parameters = inspect.signature(forward).parameters.values()
        self.inputs = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        functools.update_wrapper(self, forward)  # also its place: __module__ and __qualname__

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __reduce__(self) -> str:
        return self.forward.__qualname__  # copied and pickled by name, as a function is

    def __call__(self, *inputs: P.args, **params: P.kwargs) -> Tensor:  # of arrays alone, as in a rule, an array
        try:
            return observed("on_call", Op.apply)(self, inputs, params) if observers else self.apply(inputs, params)
        except TypeError:
            check_keywords(self.forward, params, by_place=True)
            raise

    def apply(self, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Take the arrays out, compute, record a node."""
        arrays, parents = [], []
        tensors, others, required = False, False, False
        for x in inputs:
            parent = None
            if isinstance(x, Tensor):
                tensors = True
                if x._requires_grad:
                    parent, required = x if x.node is None else x.node, True
                x = x._data
            elif x is not None:
                others = True
            arrays.append(x)
            parents.append(parent)
        if not tensors:
            arrays = backend.weak_beside_arrays(arrays)
        elif others:
            arrays = [a if type(a) is float else backend.operand(a) for a in arrays]
        if params:
            params = {name: backend.weak(value) for name, value in params.items()}
        out, residuals = NotImplemented, None
        if self.fast_forwards and (fast := self.fast_forwards.get(backend.active().fast)):
            out = fast(*arrays, **params)
            if out is not NotImplemented:
                out, residuals = out if type(out) is tuple else (out, ())
        if out is NotImplemented:  # the usual case: what stands on the page
            out = self.forward(*arrays, **params) if params else self.forward(*arrays)
        if not tensors:
            if hasattr(out, "dtype"):  # it is no Python float
                check_precision(self.name, out.dtype)
            return out
        if type(out) is not HostArray:
            out = backend.as_array(out)
        if out.dtype.char not in "fdFD":
            check_precision(self.name, out.dtype)
            required = False  # integers have no gradient
        if not required or not recording.get()[0]:
            return Tensor(out)
        if self.defaults:
            params = {**self.defaults, **params}
        return Tensor(out, True, Node(self, parents, arrays, params, out, residuals))

    def vjp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: the rule (g, out, *inputs, **params) -> one adjoint per input."""
        positional = [p for p in inspect.signature(rule).parameters.values() if p.kind < p.KEYWORD_ONLY]
        _, self.keeps_out, *keeps = [not p.name.startswith("_") for p in positional]  # of g, out, inputs
        self.unread = tuple(i for i, keep in enumerate(keeps) if not keep)
        if positional[-1].kind is inspect.Parameter.VAR_POSITIONAL and len(keeps) == 1:  # *xs, or *_xs
            self.unread = () if keeps[0] else None
        elif len(keeps) != self.inputs:
            raise TypeError(
                f"{self.name}: the rule must take (g, out) and, as the op, {self.inputs} inputs, not {len(keeps)}; or, "
                "for any number of them, *xs alone"
            )
        self.rule = rule
        return rule

    def fast(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the forward for the backend of that name. It may return (out, residuals); its own rule is then
        given the residuals. It may decline by returning NotImplemented; then the page's forward runs."""
        return functools.partial(backend.entered, self.fast_forwards, name)

    def fast_vjp(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: the rule (g, out, *inputs, residuals, **params) on arrays, for calls whose forward was the fast
        one. It may decline as well."""
        return functools.partial(backend.entered, self.fast_rules, name)


@overload
def op(forward: Callable[P, Any], *, holomorphic: bool = ...) -> Op[P]: ...
@overload
def op(forward: None = None, *, holomorphic: bool = ...) -> Callable[[Callable[P, Any]], Op[P]]: ...
def op(forward: Any = None, *, holomorphic: bool = True) -> Any:
    """Decorator: make a function of arrays an op, and enter it in OPS. See the head of this file."""
    return register(Op(forward, holomorphic)) if forward else functools.partial(op, holomorphic=holomorphic)


def composite(function: Function) -> Function:
    """Decorator: enter a function that is written in other ops, and so needs no rule, in OPS."""
    return register(with_own_keywords(function))


# ---------------------------------------------------------------- 3. Node


class Node(ShapeDtype):
    """One recorded call, out = op(*inputs, **params). It has the shape and dtype of its output, so it stands for that.

    parents: for each input that requires a gradient the node that made it, or itself if it is a leaf; else None.
    values: for each input its array, if the rule reads it; else its shape and dtype. time: its number.
    """

    __slots__ = ("op", "params", "parents", "values", "out", "residuals", "time", "hooks", "__weakref__")
    __hash__ = object.__hash__

    def __init__(self, op: Op, parents: list[Any], arrays: list[Any], params: dict, out: Any, residuals: Any):
        self.op = op
        self.params = params
        self.parents = parents
        self.out = out if op.keeps_out else None
        self.residuals = residuals
        self.shape = out.shape
        self.dtype = out.dtype
        self.time = next(clock)
        self.hooks = None
        self.values = arrays
        for i in range(len(arrays)) if op.unread is None else op.unread:
            a, parent = arrays[i], parents[i]
            arrays[i] = parent if type(parent) is Node else ShapeDtype(a) if hasattr(a, "shape") else a
        for name, x in options_of(params) if params else ():
            if isinstance(x, Tensor) and x._requires_grad:
                raise TypeError(f"{op.name}: the option {name} has no gradient, but is {describe(x)} that requires one")

    def __eq__(self, other: Any) -> bool:  # as a key of dicts, and not as the shape and dtype of its output
        return self is other if isinstance(other, Node) else self.no_values()

    def __repr__(self) -> str:
        return summary.node(self)

    def check_kept(self, create_graph: bool = False) -> None:
        """Errors: RuntimeError if what was kept for the rule has been freed, or changed since. For create_graph that is
        the page's rule, which reads no residuals; one of these may be the output itself."""
        if self.values is None:
            raise RuntimeError(
                f"backward a second time through {self.op.name}: the arrays it had kept were freed by the first. "
                "Pass retain_graph=True the first time, or compute the output again"
            )
        kept = {f"input {i}": a for i, a in enumerate(self.values)} | {"the output": self.out}
        if not create_graph:
            kept |= {f"the output or residual {i}": a for i, a in enumerate(self.residuals or ())}
        kept |= {f"the {name}": array_of(a) for name, a in options_of(self.params)}
        check_unchanged(self.op.name, kept, self.time)

    def pull_back(self, g: Any, wanted: Sequence[Any], create_graph: bool) -> list[Any]:
        """The adjoint of each input, from that of the output, by the op's rule; None where `wanted` is None."""
        if self.values is None or changes.latest > self.time:
            self.check_kept(create_graph)
        found = self.apply_rule(g, create_graph)
        if found is None:
            raise TypeError(f"the rule of {self.op.name} gave None: is a return missing? For no gradient, (None,)")
        adjoints = list(found) if type(found) is tuple else [found]
        if len(adjoints) != len(wanted):
            raise ValueError(f"the rule of {self.op.name} gave {len(adjoints)} adjoints for {len(wanted)} inputs")
        for i, parent in enumerate(wanted):
            adjoint = adjoints[i] if parent is not None else None
            if callable(adjoint):
                adjoint = adjoint()
            if adjoint is not None:
                x = self.values[i]
                # Usually it has the shape and dtype of its input already (and is no NumPy scalar, as 0-d results are).
                if type(adjoint) is not HostArray or adjoint.shape != x.shape or adjoint.dtype is not x.dtype:
                    adjoint = unbroadcast(adjoint, x, self.op.name, i)
            adjoints[i] = adjoint
        return adjoints

    def apply_rule(self, g: Any, create_graph: bool) -> Any:
        op, values = self.op, self.values
        out = self if self.out is None else self.out  # self: of the output, the rule reads shape and dtype alone
        if create_graph:  # the page's rule, on Tensors with their history: what it computes is recorded in turn
            out = out if out is self else Tensor(out, True, self)
            values = [tensor_at(parent, value) for parent, value in zip(self.parents, values)]
        elif op.fast_rules and self.residuals is not None and (fast := op.fast_rules.get(backend.active().fast)):
            found = fast(g, out, *values, residuals=self.residuals, **self.params)
            if found is not NotImplemented:
                return found
        if op.rule is None:
            raise NotImplementedError(f"{op.name} has no rule, so no gradient passes through it")
        return op.rule(g, out, *values, **self.params)

    def free(self) -> None:
        self.values = self.out = self.residuals = None  # type: ignore[assignment]
        self.params = {}


def options_of(params: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each option, such as the index of getitem; tuples taken apart."""
    for name, value in params.items():
        for part in value if type(value) is tuple else (value,):
            yield name, part


def tensor_at(parent: Any, value: Any) -> Any:
    """An input of a node as a Tensor with its history; an input without a gradient, or not kept, stays as it is."""
    if parent is None or isinstance(value, ShapeDtype):
        return value
    if isinstance(parent, Node):
        return Tensor(value, True, parent)
    if parent._data is not value:
        raise RuntimeError(
            f"{describe(parent)} was given another array (x.data = a) after it was used, and to differentiate its "
            "gradient its history is needed with the old values: make a new Tensor instead"
        )
    return parent


class AdjointShapeError(ValueError):
    """A rule gave an adjoint that no sum over broadcast axes can bring to the shape of its input."""

    def __init__(self, op: str, i: int, wanted: tuple[int, ...], given: tuple[int, ...]):
        super().__init__(f"the rule of {op} gave input {i} of shape {wanted} an adjoint of shape {given}")
        self.wanted, self.given = wanted, given


def unbroadcast(adjoint: Any, x: Any, op: str, i: int) -> Any:
    """The adjoint in the shape and dtype of its input. Broadcasting uses x several times, once per copy, so its adjoint
    is the sum of the adjoints of the copies."""
    shape, given = x.shape, getattr(adjoint, "shape", None)
    if given is None or isinstance(adjoint, ShapeDtype):
        raise TypeError(f"the rule of {op} gave input {i} of shape {shape} no array as an adjoint but {adjoint!r}")
    if given != shape:
        aligned = (1,) * (len(given) - len(shape)) + shape  # as broadcasting aligns it: at the last axis
        if len(aligned) != len(given) or any(m not in (1, n) for m, n in zip(aligned, given)):
            raise AdjointShapeError(op, i, shape, given)
        stretched = tuple(a for a, (m, n) in enumerate(zip(aligned, given)) if m != n)
        adjoint = (OPS["sum"](adjoint, axis=stretched) if stretched else adjoint).reshape(shape)
    return adjoint if adjoint.dtype == x.dtype else OPS["astype"](adjoint, dtype=x.dtype)


# ---------------------------------------------------------------- 4. the backward pass


def backward_pass(
    output: Tensor, g: Any, targets: Sequence[Tensor] | None, create_graph: bool, keep: bool, stop: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """(target, adjoint) for each target that the output depends on; targets None: every leaf.

    keep: the graph, for a second pass. stop: do not go on beyond a target, nor run its hooks, for checkpoint: the pass
    that it is part of does both.
    """
    goals = None if targets is None else {origin(x): x for x in targets}

    # 1. Every node that the output was computed from, oldest first, and the leaves.
    order: list[Node] = []
    seen: set[Any] = set(goals) if stop and goals else set()
    leaves: set[Any] = set()
    stack = [] if output.node is None else [output.node]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            for parent in node.parents:
                if type(parent) is Node:
                    stack.append(parent)
                elif parent is not None:
                    leaves.add(parent)
    order.sort(key=operator.attrgetter("time"))

    # 2. The parents that lead to a target, whose adjoints are wanted. If every leaf is a target, all of them do.
    leading: set[Any] = set(goals or ())
    wanted: dict[Node, list[Any]] | None = None
    if goals is not None and not leaves <= leading:
        wanted = {}
        for node in order:
            if not leading.isdisjoint(node.parents):
                leading.add(node)
                wanted[node] = [parent if parent in leading else None for parent in node.parents]

    # 3. Adjoints, from the newest node to the oldest; the adjoint of each is the sum over its uses.
    adjoints: dict[Any, Any] = {origin(output): g}
    found: dict[Any, Any] = {}
    pull_back = observed("on_rule", Node.pull_back) if observers else Node.pull_back
    with set_grad_enabled(create_graph):
        while order:
            node = order.pop()
            g = adjoints.pop(node, None)
            parents = node.parents if wanted is None else wanted.get(node)
            if g is not None:
                if node.hooks is not None:
                    g = hooked(node.hooks, g)
                if goals and node in goals:
                    found[node] = g
                if parents:  # some lead to a target
                    for parent, adjoint in zip(parents, pull_back(node, g, parents, create_graph)):
                        if adjoint is not None:
                            adjoints[parent] = adjoints[parent] + adjoint if parent in adjoints else adjoint
            if not keep:
                node.free()
        for x, g in adjoints.items():  # of leaves, or of targets, whose hooks `stop` leaves to others
            found[x] = g if x.hooks is None or stop else hooked(x.hooks, g)
    targets_of = {x: x for x in found} if goals is None else goals
    return [(x, as_tensor(found[key])) for key, x in targets_of.items() if key in found]


def as_tensor(g: Any) -> Tensor:
    return g if isinstance(g, Tensor) else Tensor(backend.as_array(g))


def hooked(hooks: Hooks, g: Any) -> Any:
    """The adjoint after the hooks of its Tensor."""
    if not hooks and hooks.kept_by is None:  # all have been removed
        return g
    x = hooks(as_tensor(g))
    return x if isinstance(g, Tensor) else x._data


def seed(output: Any, g: Any, create_graph: bool) -> Any:
    """The adjoint at the output: what was given, or 1 for a scalar."""
    if not (isinstance(output, Tensor) and output._requires_grad):
        raise RuntimeError(
            f"the output ({describe(output)}) does not depend on any Tensor that requires a gradient: "
            "was requires_grad set, or was it computed inside no_grad() or detached?"
        )
    if g is None and output.size != 1:
        raise RuntimeError(
            f"the gradient of an output of shape {output.shape} needs an adjoint of that shape: "
            "reduce it to a scalar first (.sum(), .mean()), or pass one"
        )
    if not isinstance(g, Tensor):
        g = Tensor(backend.xp.ones_like(output._data) if g is None else backend.to_device(g))
    if g.shape != output.shape:
        raise RuntimeError(f"the adjoint has shape {g.shape}, but the output has shape {output.shape}")
    if not backend.xp.can_cast(g.dtype, output.dtype, "same_kind"):
        raise TypeError(f"the adjoint is {g.dtype}, but the output is {output.dtype}")
    g = g if g.dtype == output.dtype else g.astype(output.dtype)
    return g if create_graph else g._data


def owned(pairs: list[Any], given: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (target, gradient), each gradient in memory of its own: a rule may hand one array to two inputs, or a
    view, or the adjoint that the caller gave, and none of these may change when a gradient is scaled in place."""
    taken = {id(whole(array_of(given)))}
    for x, g in pairs:
        memory = whole(g._data)
        if memory is None or id(memory) in taken:
            g = OPS["copy"](g)
        taken.add(id(memory))
        yield x, g


def whole(a: Any) -> Any:
    """The array whose memory `a` has: itself, or the one that it shows whole in another shape, as a reshape does. None
    for any other view, such as a broadcast one."""
    base = getattr(a, "base", None)
    if base is None:
        return a
    all_of_it = type(base) is type(a) and base.base is None and base.size == a.size and a.flags.c_contiguous
    return base if all_of_it and getattr(a.flags, "writeable", True) else None  # CuPy has no read-only arrays


@keeps_mode
def grad(
    output: Tensor,
    inputs: Tensor | Sequence[Tensor],
    grad_output: Any = None,
    create_graph: bool = False,
    retain_graph: bool = True,
) -> tuple[Tensor, ...]:
    """d(output)/d(input), weighted with grad_output, for each of the inputs; changes no `.grad` of a leaf.

    The inputs may be leaves or intermediate results. The gradient of one that the output does not depend on is zero.
    create_graph, retain_graph: as for `backward`, but the graph is kept unless retain_graph is False.
    Errors: as for `backward`; RuntimeError for an input that does not require a gradient.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for i, x in enumerate(inputs):
        if not (isinstance(x, Tensor) and x._requires_grad):
            raise RuntimeError(f"grad: input {i} ({describe(x)}) does not require a gradient")
    pairs = backward_pass(output, seed(output, grad_output, create_graph), inputs, create_graph, retain_graph)
    with set_grad_enabled(create_graph):
        found = {origin(x): g for x, g in owned(pairs, grad_output)}
    return tuple(found[k] if (k := origin(x)) in found else Tensor(backend.xp.zeros_like(x._data)) for x in inputs)
