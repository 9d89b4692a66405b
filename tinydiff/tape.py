"""The tape: how an op is recorded, and what its rule is given.

An op computes out = f(x, y). While Tensors that require gradients go in, each call leaves a `Node`: the op,
where its inputs came from, and the arrays its rule will read. `backward` (backward.py) walks the nodes from the
newest to the oldest. Why in that order? A node's cotangent (the derivative of the final scalar by the node's
output) is a sum over all its uses, and must be complete before it is passed on; uses are younger than the node,
so time is a topological order.

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

import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from . import backend, replays
from .modes import check_made, state, user_line
from .tensor import OPS, Tensor, array_of

_time = itertools.count()
_SCALARS = (backend.numpy.generic, int, float, complex)
_NUMPY_1 = backend.numpy.__version__.startswith("1.")


class Saved(SimpleNamespace):
    """What a forward pass keeps for its rule, by name."""


class CotangentShapeError(ValueError):
    """A rule gave a cotangent that no sum over broadcast axes can bring to the shape of its input."""

    def __init__(self, op: str, i: int, wanted: tuple[int, ...], given: tuple[int, ...]):
        super().__init__(f"the rule of {op} gave input {i} of shape {wanted} a cotangent of shape {given}")
        self.wanted, self.given = wanted, given


class Absent:
    """Stands for an array that a rule does not read: its shape and dtype."""

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
        # Every tenth of a microsecond here is paid by every op: hence one loop, and no look-up without need.
        arrays, tensors, required = [], 0, False
        for x in inputs:
            if isinstance(x, Tensor):
                tensors += 1
                required = required or x._requires_grad
                arrays.append(x._data)
            else:
                arrays.append(x)
        if not tensors:
            out = self.forward(*inputs, **params)
            out = out[0] if type(out) is tuple else out
            return keep_dtype(out, arrays, params) if _NUMPY_1 else out
        if replays.recording is not None:
            replays.see(*(x for x in (*inputs, *params.values()) if isinstance(x, Tensor) and x.node is None))
        if tensors < len(arrays):
            arrays = [a if type(a) is float else backend.operand(a) for a in arrays]
        if params:
            self._check_options(params)
        out, saved = self.forward(*arrays, **params), None
        if type(out) is tuple:
            out, saved = out
        if _NUMPY_1 or type(out) is not backend.numpy.ndarray:
            out = keep_dtype(out, arrays, params)
        if state.anomaly and not state.flowing_back:
            check_made(self.name, out, (*arrays, *params.values()))
        version = [0]
        if self.view and (out.base is not None or out is arrays[0]):  # not so, for example, if the index was an array
            version = next(x for x in inputs if isinstance(x, Tensor)).version
        if not required:
            return Tensor(out, False, None, version)
        if state.grad_enabled and out.dtype.kind in "fc":
            params = {**self.defaults, **params} if self.defaults else params
            return Tensor(out, True, Node(self, inputs, arrays, params, out, saved, version), version)
        if state.captured is not None:
            state.captured.update({id(x.node or x): x for x in inputs if isinstance(x, Tensor) and x._requires_grad})
        return Tensor(out, False, None, version)

    def _check_options(self, params: dict[str, Any]) -> None:
        for name, value in params.items():
            if isinstance(value, Tensor) and value._requires_grad and state.grad_enabled:
                raise TypeError(
                    f"{self.name}: the option {name} has no gradient, but is a Tensor of shape "
                    f"{value.shape} that requires one"
                )


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
        raise ValueError(
            f"there is an op named {op.__name__!r} already: choose another name, or take it out first, by "
            f"tinydiff.tensor.OPS.pop({op.__name__!r})"
        )
    OPS[op.__name__] = op
    return op


def keep_dtype(out: Any, arrays: list[Any], params: dict[str, Any]) -> Any:
    """An array even where NumPy reduced to a scalar, and, before NumPy 2, in which a scalar times a Python float was
    float64, no wider than its operands."""
    if isinstance(out, _SCALARS):
        out = backend.to_device(out)
    if _NUMPY_1 and out.ndim == 0 and "dtype" not in params and out.dtype == "float64":
        if {str(a.dtype) for a in arrays if hasattr(a, "dtype") and a.dtype != bool} == {"float32"}:
            out = out.astype("float32")
    return out


class Node(Absent):
    """One recorded call: out = op(*inputs, **params).

    A node has the shape and dtype of its output, so it stands for that where its array is not kept.
    """

    __slots__ = ("op", "params", "parents", "values", "out", "saved", "versions", "time", "line", "prints")

    def __init__(
        self, op: Any, inputs: Sequence[Any], arrays: list[Any], params: dict, out: Any, saved: Any, version: list[int]
    ):
        self.op, self.params, self.saved, self.time = op, params, saved, next(_time)
        self.shape, self.dtype = out.shape, out.dtype
        parents: list[Any] = []  # an intermediate result is its node; a leaf is its Tensor
        values: list[Any] = []
        # which input (or what else), its counter, and where that stood
        versions: list[tuple[Any, list[int], int]] = []
        self.parents, self.values, self.versions = parents, values, versions
        keeps, i = op.keeps, 0
        for x, a in zip(inputs, arrays):
            keep = keeps[i] if i < len(keeps) else op.keeps_rest
            if isinstance(x, Tensor):
                node = x.node
                parents.append((node or x) if x._requires_grad else None)
                if keep:
                    versions.append((i, x.version, x.version[0]))
                    values.append(a)
                else:
                    values.append(node if node is not None else Absent(a.shape, a.dtype))
            else:
                parents.append(None)
                values.append(a if keep or not hasattr(a, "shape") else Absent(a.shape, a.dtype))
            i += 1
        if params:
            for name, part in self._options():  # such as the index of getitem
                if isinstance(part, Tensor):
                    versions.append((f"the {name}", part.version, part.version[0]))
        self.out = None
        if op.keeps_out:
            self.out = out
            versions.append(("the output", version, version[0]))
        self.line = self.prints = None
        if state.anomaly:
            self.line, self.prints = user_line(), self._fingerprints()

    def cotangents(self, g: Any, wanted: Sequence[bool], create_graph: bool) -> list[Any]:
        """The cotangent of each input that is wanted (None elsewhere), from that of the output."""
        out, values, params = self if self.out is None else self.out, self.values, self.params
        if create_graph:
            out = out if isinstance(out, Absent) else Tensor(out, True, self)
            values = [tensor_at(parent, value) for parent, value in zip(self.parents, values)]
        rule = self.op.rule
        if rule is None:
            raise NotImplementedError(f"{self.op.name} has no rule, so nothing flows back through it")
        if self.saved is not None:
            if create_graph:
                raise NotImplementedError(
                    f"{self.op.name} saves arrays for its rule: to differentiate its gradient it needs an "
                    f"@{self.op.name}.reference"
                )
            params = {**params, "saved": self.saved}
        found = rule(g, out, *values, **params)
        found = found if isinstance(found, tuple) else (found,)
        if len(found) != len(values):
            raise ValueError(f"the rule of {self.op.name} gave {len(found)} cotangents for {len(values)} inputs")
        fitted: list[Any] = []
        for cotangent, value, want in zip(found, values, wanted):
            if not want or cotangent is None:
                fitted.append(None)
                continue
            if callable(cotangent):
                cotangent = cotangent()
            # The usual case is that it fits.
            if (
                cotangent is None
                or type(cotangent) is backend.numpy.ndarray
                and cotangent.shape == value.shape
                and cotangent.dtype is value.dtype
            ):
                fitted.append(cotangent)
            else:
                fitted.append(_fit(cotangent, value, self.op.name, len(fitted)))
        return fitted

    def _options(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of each option, tuples taken apart."""
        for name, value in self.params.items():
            for part in value if type(value) is tuple else (value,):
                yield name, part

    @property
    def has_reference(self) -> bool:
        """Are higher derivatives those of the op's definition? Not so if its rule reads the output in place of an input
        (softmax): then the rule is its own path."""
        return self.op.definition is not None and not (
            self.op.keeps_out and any(isinstance(x, Absent) for x in self.values)
        )

    def free(self) -> None:
        self.values = self.out = self.saved = None  # type: ignore[assignment]
        self.params = {}

    def check_usable(self) -> None:
        """RuntimeError if what was kept has been freed, or changed since."""
        if self.values is None:
            raise RuntimeError(
                f"backward a second time through {self.op.name}: the arrays it had kept were freed by the first. "
                "Pass retain_graph=True the first time, or compute the output again"
            )
        for what, version, then in self.versions:
            if version[0] != then:
                what = f"input {what}" if isinstance(what, int) else what
                raise RuntimeError(
                    f"{what} of {self.op.name} was changed in place after it was used (version {version[0]}, "
                    f"was {then}), and its gradient needs the old values: make a new array instead{self.made_at()}"
                )
        if self.prints is not None and self.prints != self._fingerprints():
            raise RuntimeError(
                f"an array that {self.op.name} had kept was written into before its gradient was "
                f"computed{self.made_at()}"
            )

    def _fingerprints(self) -> list[int]:
        kept = [array_of(a) for a in (*self.values, *(part for _, part in self._options()), self.out)]
        return [zlib.crc32(backend.to_host(a).tobytes()) for a in kept if backend.active().is_array(a)]

    def made_at(self) -> str:
        return f"; it was computed at {self.line}" if self.line else ""


def tensor_at(parent: Any, value: Any) -> Any:
    """The input of a node as a Tensor with its history; what had no gradient, or was not kept, as it is."""
    if parent is None or isinstance(value, Absent):
        return value
    return parent if isinstance(parent, Tensor) else Tensor(value, True, parent)


def _fit(cotangent: Any, like: Any, op: str, i: int) -> Any:
    """The transpose of broadcasting is summing: bring a cotangent to the shape and the dtype of its input."""
    if not hasattr(cotangent, "dtype"):
        raise TypeError(
            f"the rule of {op} gave input {i} of shape {like.shape} no array as a cotangent but {cotangent!r}"
        )
    shape = like.shape
    if cotangent.shape != shape:
        extra = cotangent.ndim - len(shape)
        stretched = [a for a in range(extra, cotangent.ndim) if shape[a - extra] == 1 != cotangent.shape[a]]
        kept = [n for a, n in enumerate(cotangent.shape) if a >= extra and a not in stretched]
        if extra < 0 or kept != [n for a, n in enumerate(shape) if a + extra not in stretched]:
            raise CotangentShapeError(op, i, shape, cotangent.shape)
        cotangent = OPS["sum"](cotangent, axis=(*range(extra), *stretched), keepdims=False)
        cotangent = OPS["reshape"](cotangent, shape=shape)
    if cotangent.dtype is not like.dtype and cotangent.dtype != like.dtype:
        cotangent = OPS["astype"](cotangent, dtype=like.dtype)
    return cotangent
