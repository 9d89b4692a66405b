"""A rule of an op as text: run on Tensors that carry names, it leaves the expressions that it computes.

A rule takes arrays or Tensors, and uses only operators and functions of tinydiff.ops. So here it is given `Named`
Tensors, a `Tracer` observes every op that it calls, and each result carries the expression that made it:

    ȳ, y (Named)  ->  softmax's own rule  ->  Named(y * (ȳ - sum(ȳ * y, axis=-1, keepdims=True)))

What is printed is what ran; there is no second table of formulas. Four things are written more shortly than they ran:
sum(x) / n as mean(x), a transpose as x.T or x.mT, and a reshape or broadcast_to to the same shape as nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .. import backend
from ..engine import Op, Tensor
from ..observers import Observer
from ..operators import OPS, array_of
from ..shape_dtype import ShapeDtype

INFIX = {  # sign, and how tightly it binds in Python
    "less": ("<", 1), "less_equal": ("<=", 1), "greater": (">", 1), "greater_equal": (">=", 1), "equal": ("==", 1),
    "not_equal": ("!=", 1), "or": ("|", 2), "and": ("&", 3), "add": ("+", 4), "subtract": ("-", 4),
    "multiply": ("*", 5), "divide": ("/", 5), "matmul": ("@", 5), "negative": ("-", 6), "invert": ("~", 6),
    "power": ("**", 7),
}  # fmt: skip
ATOM = 9


class Expr:
    """An op applied to expressions and literals; or, with op "name", a name."""

    def __init__(self, op: str, args: tuple[Any, ...], params: dict[str, str], shape: tuple[int, ...] = ()):
        self.op, self.args, self.params, self.shape = op, args, params, shape

    def parts(self) -> list[Expr]:
        return [a for a in self.args if isinstance(a, Expr)]


class Named(Tensor):
    """A Tensor that knows the expression that computed it. Comparisons, which are no ops, are expressions too."""

    __hash__ = Tensor.__hash__

    def __init__(self, data: Any, expr: Expr, tracer: Tracer):
        super().__init__(data)
        self.expr, self.tracer = expr, tracer

    def _compare(self, name: str, compare: Callable[..., Any], *others: Any) -> Any:
        array = compare(self._data, *map(array_of, others))
        return Named(array, self.tracer.make(name, (self, *others), {}, array.shape), self.tracer)

    # fmt: off
    def __eq__(self, y: Any) -> Any: return self._compare("equal", lambda a, b: a == b, y)
    def __ne__(self, y: Any) -> Any: return self._compare("not_equal", lambda a, b: a != b, y)
    def __lt__(self, y: Any) -> Any: return self._compare("less", lambda a, b: a < b, y)
    def __le__(self, y: Any) -> Any: return self._compare("less_equal", lambda a, b: a <= b, y)
    def __gt__(self, y: Any) -> Any: return self._compare("greater", lambda a, b: a > b, y)
    def __ge__(self, y: Any) -> Any: return self._compare("greater_equal", lambda a, b: a >= b, y)
    def __and__(self, y: Any) -> Any: return self._compare("and", lambda a, b: a & b, y)
    def __or__(self, y: Any) -> Any: return self._compare("or", lambda a, b: a | b, y)
    def __invert__(self) -> Any: return self._compare("invert", lambda a: ~a)
    # fmt: on


class Tracer(Observer):
    """Gives every result of an op in this thread the expression that made it, and names to what no op has made.

    constants: what had no name and got one here, an array or an option such as the geometry of a convolution.
    """

    def __init__(self, taken: set[str]):
        self.thread = threading.get_ident()
        self.taken = taken
        self.names: dict[int, tuple[Any, str]] = {}  # by id of an object, which is kept, so that the id stays its own
        self.constants: dict[str, Any] = {}
        self.known: dict[Any, Expr] = {}  # so that equal expressions are one

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        out = run(op, inputs, params)
        if not isinstance(out, Tensor):
            return out
        return Named(out._data, self.make(op.name, inputs, params, out.shape), self)

    def named(self, array: Any, name: str) -> Named:
        return Named(array, self.intern(Expr("name", (name,), {}, array.shape)), self)

    def make(self, op: str, inputs: tuple[Any, ...], params: dict[str, Any], shape: tuple[int, ...]) -> Expr:
        """The result of a call, in its short form."""
        e = self.call(op, inputs, params, shape)
        first = e.args[0] if e.args else None
        if isinstance(first, Expr):
            if op in ("reshape", "broadcast_to") and first.shape == shape:
                return first
            if op == "divide" and first.op == "sum" and type(n := e.args[1]) is int:
                if n * math.prod(shape) == math.prod(first.args[0].shape):  # as ops.mean computes it
                    return self.intern(Expr("mean", first.args, first.params, shape))
        return e

    def call(self, op: str, inputs: tuple[Any, ...], params: dict[str, Any], shape: tuple[int, ...]) -> Expr:
        """The call as it was made, without the options that were not given and mean nothing."""
        args = tuple(map(self.term, inputs))
        if op == "reshape":
            params = {"shape": shape}  # where -1 stood for a length
        defaults = getattr(OPS.get(op), "defaults", {})
        unsaid = {name for name, value in defaults.items() if value is None or value is False}
        given = {k: v for k, v in params.items() if not (k in unsaid and v is defaults[k])}
        if op == "getitem":
            texts = {"index": self.index(given["index"])}
        else:
            texts = {k: self.literal(v, k) for k, v in given.items()}
        return self.intern(Expr(op, args, texts, shape))

    def intern(self, e: Expr) -> Expr:
        key = (e.op, *(id(a) if isinstance(a, Expr) else repr(a) for a in e.args), *e.params.items(), e.shape)
        return self.known.setdefault(key, e)

    def term(self, x: Any) -> Any:
        """An input of an op as an expression; numbers and None stay as they are."""
        if isinstance(x, (Named, Expr)):
            return x.expr if isinstance(x, Named) else x
        array = array_of(x)
        if not hasattr(array, "shape"):
            return x
        return self.intern(Expr("name", (self.name(array, "c"),), {}, array.shape))

    def name(self, value: Any, kind: str) -> str:
        """The name of a constant; a new one, if it has none."""
        if id(value) not in self.names:
            name = free(kind, self.taken, 0 if kind == "c" else None)
            self.names[id(value)] = value, name
            self.constants[name] = value
        return self.names[id(value)][1]

    def literal(self, value: Any, name: str) -> str:
        """The value of an option as Python writes it; the name of one that Python has no short form for."""
        if isinstance(value, float) or value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, (Tensor, ShapeDtype)) or backend.active().is_array(value):
            return self.name(array_of(value), "c")
        if isinstance(value, (tuple, list)):
            if name in ("axis", "axes") and len(value) == 1:
                return repr(value[0])
            if any(isinstance(v, slice) or v is Ellipsis for v in value):
                return f"s_[{self.index(value)}]"
            return f"({', '.join(self.literal(v, name) for v in value)}{',' if len(value) == 1 else ''})"
        if isinstance(value, slice) or value is Ellipsis:
            return f"s_[{self.index(value)}]"
        return repr(str(backend.xp.dtype(value))) if name == "dtype" else self.name(value, name)

    def index(self, value: Any) -> str:
        """What stands between the brackets of x[...]."""

        def part(v: Any) -> str:
            if not isinstance(v, slice):
                return "..." if v is Ellipsis else self.literal(v, "index")
            ends = ["" if end is None else str(end) for end in (v.start, v.stop)]
            return ":".join(ends if v.step is None else [*ends, str(v.step)])

        if isinstance(value, tuple):
            return ", ".join(map(part, value)) or "()"
        return part(value)


def free(kind: str, taken: set[str], number: int | None) -> str:
    """A name that is not taken: x0, x1, ...; without a number to begin with, x, x2, x3, ..."""
    name = kind if number is None else f"{kind}{number}"
    while name in taken:
        number = (1 if number is None else number) + 1
        name = f"{kind}{number}"
    taken.add(name)
    return name


# ---------------------------------------------------------------- expressions as text


def written(roots: list[Expr]) -> tuple[list[tuple[str, str]], list[str]]:
    """The expressions as Python, after [(t1, text), ...] for what they use more than once."""
    uses: dict[int, int] = {}
    order: list[Expr] = []
    for e in roots:
        for part in _inside(e, uses):
            order.append(part)
    lets: dict[int, str] = {}
    lines = []
    for e in order:
        if e.op != "name" and uses[id(e)] > 1:
            text = _text(e, lets)[0]
            lets[id(e)] = f"t{len(lets) + 1}"
            lines.append((lets[id(e)], text))
    return lines, [_text(e, lets)[0] for e in roots]


def _inside(e: Expr, uses: dict[int, int]) -> Iterator[Expr]:
    """e after all its parts, each once; counts how often each is used."""
    uses[id(e)] = uses.get(id(e), 0) + 1
    if uses[id(e)] == 1:
        for part in e.parts():
            yield from _inside(part, uses)
        yield e


def _text(e: Any, lets: dict[int, str]) -> tuple[str, int]:
    """The text, and how tightly it binds."""
    if not isinstance(e, Expr):
        text = repr(e)
        return text, INFIX["negative"][1] if text.startswith("-") else ATOM
    if e.op == "name" or id(e) in lets:
        return lets.get(id(e)) or e.args[0], ATOM
    if e.op in INFIX:
        sign, tightness = INFIX[e.op]
        texts = []
        for place, argument in enumerate(e.args):
            text, inner = _text(argument, lets)
            # On the left of a sign of its own kind it needs no brackets; but a < b < c and a ** b ** c do.
            loose = inner < tightness + (place > 0 or tightness in (1, 7))
            texts.append(f"({text})" if loose else text)
        return (sign + texts[0] if len(texts) == 1 else f" {sign} ".join(texts)), tightness
    texts = [_text(argument, lets)[0] for argument in e.args]
    if e.op in ("getitem", "transpose"):
        text, inner = _text(e.args[0], lets)
        left = text if inner == ATOM else f"({text})"
        if e.op == "getitem":
            return f"{left}[{e.params['index']}]", ATOM
        ndim, axes = len(e.shape), e.params.get("axes")
        if axes in (None, repr(tuple(reversed(range(ndim))))):
            return f"{left}.T", ATOM
        if axes == repr((*range(ndim - 2), ndim - 1, ndim - 2)):
            return f"{left}.mT", ATOM
    return f"{e.op}({', '.join([*texts, *(f'{k}={v}' for k, v in e.params.items())])})", ATOM
