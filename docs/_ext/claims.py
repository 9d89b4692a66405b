"""Claims: formulas of the book, each evaluated on random numbers and held against numerical derivatives.

A `Scene` is an op at a point. It knows what is true there without any rule: the inputs, the result, the Jacobian by
complex step (or central differences), and so, for random dx and z̄,

    dz = J dx          x̄ = J^T z̄          dL = z̄ · dz

A claim `a = b` whose left side is known is evaluated; one whose left side is a new name is a definition, and of a
defined name s the scene knows ds as well, by complex step through its definition. So every line of a derivation
can be tried, not only its last.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from algebra import BAR, FUNCTIONS, STEP, NotAFormula, Tree, normal, plain, read, value

from tinydiff import Tensor
from tinydiff.engine import Op, unbroadcast
from tinydiff.operators import OPS
from tinydiff.study.examples import CALLS


class FalseClaim(Exception):
    """A formula of the book is not true."""


# ---------------------------------------------------------------- an op at a point


class Case:
    """A call of an op: its float64 arrays by name, in the order of the arguments, and how to call it with others.

    given: the arguments; an array of floats is an input, and so is each of those in a list.
    """

    def __init__(self, name: str, given: tuple[Any, ...], params: dict[str, Any]):
        self.name, self.given, self.params = name, given, params
        self.inputs: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        places = iter(inspect.signature(OPS[name]).parameters.values())
        place = next(places)
        for argument in given:
            several = place.kind is place.VAR_POSITIONAL
            if isinstance(argument, list):
                self.inputs.update((f"x{i}", v) for i, v in enumerate(argument))
            else:
                label = f"x{len(self.inputs)}" if several else place.name
                (self.inputs if differentiable(argument) else self.constants)[label] = argument
            place = place if several else next(places, place)

    def call(self, arrays: list[Any]) -> Any:
        """The op on these in place of its inputs; of several results, the first."""
        left = iter(arrays)

        def put(v: Any) -> Any:
            return list(map(put, v)) if isinstance(v, list) else next(left) if differentiable(v) else v

        params = copy.deepcopy(self.params)  # a generator of random numbers draws the same each time
        result = OPS[self.name](*map(put, self.given), **params)
        return result[0] if isinstance(result, list) else result

    def result(self, arrays: list[Any]) -> Any:
        """The same on arrays, complex ones too."""
        with np.errstate(all="ignore"):
            return self.call([Tensor(a) for a in arrays]).numpy()

    def recorded(self) -> tuple[Any, list[Tensor]]:
        """The result as a Tensor with its graph, and the inputs as Tensors."""
        tensors = [Tensor(a.copy(), True) for a in self.inputs.values()]
        return self.call(tensors), tensors

    def jacobians(self) -> tuple[list[Any], str]:
        """d(result)/d(input) for each input, as matrices, and how they were found."""
        arrays = list(self.inputs.values())
        z = self.result(arrays)
        by_differences = [jacobian(self.result, arrays, k, z.size, differences) for k in range(len(arrays))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                by_step = [jacobian(self.result, arrays, k, z.size, complex_step) for k in range(len(arrays))]
        except Exception:  # the op takes no complex numbers
            return by_differences, "central differences"
        same = all(np.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(by_step, by_differences))
        return (by_step, "complex step") if same else (by_differences, "central differences")


def differentiable(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def jacobian(f: Callable[..., Any], arrays: list[Any], k: int, rows: int, derivative: Callable[..., Any]) -> Any:
    columns = []
    for index in np.ndindex(*arrays[k].shape):
        unit = np.zeros(arrays[k].shape)
        unit[index] = 1
        columns.append(derivative(f, arrays, k, unit).reshape(-1))
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0))


def complex_step(f: Callable[..., Any], arrays: list[Any], k: int, unit: Any) -> Any:
    moved = [a + 1j * STEP * unit if i == k else a.astype(complex) for i, a in enumerate(arrays)]
    return np.imag(f(moved)) / STEP


def differences(f: Callable[..., Any], arrays: list[Any], k: int, unit: Any, h: float = 1e-3) -> Any:
    """Of the fourth order: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h."""

    def at(step: float) -> Any:
        return f([a + step * unit if i == k else a for i, a in enumerate(arrays)])

    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def random_case(name: str, draw: Callable[..., Any]) -> Case:
    """The call of study/examples.py with other numbers. What reduces keeps its axes, so that shapes fit."""
    given, params = CALLS[name]

    def put(v: Any) -> Any:
        if isinstance(v, list):
            return list(map(put, v))
        if isinstance(v, tuple):
            return draw(v)
        return v.copy() if isinstance(v, np.ndarray) else v

    if "keepdims" in inspect.signature(OPS[name]).parameters:
        params = {**params, "keepdims": True}
    return Case(name, tuple(map(put, given)), params)


def cases(name: str) -> Iterator[Case]:
    """Random calls: positive numbers, and of both signs where the op is defined there."""
    rng = np.random.default_rng(5)
    yield random_case(name, lambda s: rng.uniform(0.5, 2, s))
    both = random_case(name, lambda s: rng.normal(size=s))
    if np.isfinite(both.result(list(both.inputs.values()))).all():
        yield both


# ---------------------------------------------------------------- what is true there


@dataclass
class Checked:
    """A chain that was evaluated: its text, and its largest relative error."""

    text: str
    left: Tree
    error: float


class Scene:
    """A case, random differentials and a random adjoint. names: letters that the page uses for inputs and result."""

    def __init__(self, case: Case, out: str, names: dict[str, str], given: dict[str, Tree] | None = None):
        rng = np.random.default_rng(11)
        self.case, arrays = case, case.inputs
        self.jacobians, self.method = case.jacobians()
        z = case.result(list(arrays.values()))
        g = rng.normal(size=z.shape)
        d = [rng.normal(size=a.shape) for a in arrays.values()]
        dz = sum((J @ da.reshape(-1) for J, da in zip(self.jacobians, d)), np.zeros(z.size)).reshape(z.shape)
        self.values: dict[str, Any] = {**constants(case), **arrays, out: z, "g": g, "dL": np.sum(g * dz)}
        self.values |= {"d" + name: da for name, da in zip(arrays, d)} | {"d" + out: dz}
        self.values |= {
            bar(name): (g.reshape(-1) @ J).reshape(a.shape) for (name, a), J in zip(arrays.items(), self.jacobians)
        }
        self.values[bar(out)] = g
        self.adjoint_shapes = {bar(name): a.shape for name, a in arrays.items()}
        self.moves = {**{name: da for name, da in zip(arrays, d)}, out: dz}
        for letter, name in names.items():
            for variant in (letter, "d" + letter, bar(letter)):
                original = {letter: name, "d" + letter: "d" + name, bar(letter): bar(name)}[variant]
                if original in self.values:
                    self.values[variant] = self.values[original]
            self.moves[letter] = self.moves.get(name, 0)
            if bar(name) in self.adjoint_shapes:
                self.adjoint_shapes[bar(letter)] = self.adjoint_shapes[bar(name)]
        self.definitions: dict[str, Tree] = dict(given or {})
        self.functions = functions(case)
        self.tolerance = 1e-9 if self.method == "complex step" else 1e-6

    def run(self, source: str) -> None:
        """Python that defines functions and arrays for the claims after it. Errors: FalseClaim if it gives a new value
        to what is already known."""
        space = {"np": np, **self.values}
        before = dict(space)
        exec(source, space)
        for name, made in space.items():
            if name in before and made is not before[name]:
                raise FalseClaim(f"{self.case.name}: {name!r} has a meaning already, and Python gives it another")
            if name not in before and not name.startswith("__"):
                if callable(made):
                    self.functions[name] = made
                else:
                    self.values[name] = np.asarray(made)

    def known(self) -> set[str]:
        return {*self.values, *self.definitions}

    def name(self, name: str, moved: bool = False) -> Any:
        letter, _ = plain(name)
        if name in self.definitions:
            return self.value(self.definitions[name], moved)
        if name in self.values:
            step = self.moves.get(name)
            x = self.values[name]
            return x + 1j * STEP * step if moved and step is not None else x
        lower = name.lower()
        if len(letter.removeprefix("d")) == 1 and letter[-1].isupper() and lower in self.values:
            return self.name(lower, moved)
        if name.startswith("d") and name[1:] in self.definitions:  # its differential, by complex step
            return np.imag(self.name(name[1:], True)) / STEP
        if name in ("e", "pi"):
            return {"e": math.e, "pi": math.pi}[name]
        raise NotAFormula(f"{name!r} has no meaning here")

    def function(self, name: str) -> Callable[..., Any]:
        return self.functions[name]

    def value(self, tree: Tree, moved: bool = False) -> Any:
        return value(tree, lambda n: self.name(n, moved), self.function)

    def read(self, text: str) -> list[Tree]:
        return read(text, self.functions.keys(), self.known() - {"sum", "mean"})

    def check(self, text: str) -> Checked | None:
        """Evaluate a chain; None if it only defines a name. Errors: FalseClaim; NotAFormula."""
        chain = self.read(text)
        if len(chain) < 2:
            raise NotAFormula(f"{text!r} claims nothing")
        left = chain[0]
        try:
            wanted = self.value(left)
            rest = chain[1:]
        except NotAFormula:
            if left.kind != "name":
                raise
            letter, barred = plain(left.parts[0])
            base = letter if barred else letter[1:] if letter.startswith("d") else ""
            if base and base not in self.known():
                raise FalseClaim(
                    f"{self.case.name}: {left.parts[0]!r} belongs to {base!r}, which has no meaning"
                ) from None
            wanted = self.value(chain[1])
            self.definitions[left.parts[0]] = chain[1]
            rest = chain[2:]
            if not rest:
                return None
        shape = self.adjoint_shapes.get(left.parts[0]) if left.kind == "name" else None
        error = 0.0
        for part in rest:
            found = np.asarray(self.value(part))
            if shape is not None:
                try:
                    found = summed(found, shape, self.values["g"].shape)
                except ValueError as reason:
                    raise FalseClaim(f"{self.case.name}: {text.strip()!r}: {reason}") from None
            error = max(error, relative(found, np.asarray(wanted)))
            if not error <= self.tolerance:
                raise FalseClaim(
                    f"{self.case.name}: {text.strip()!r} is false: where its left side is "
                    f"{short(wanted)}, its part {list(chain).index(part) + 1} is {short(found)}"
                )
        return Checked(text.strip(), left, error)


def bar(name: str) -> str:
    """x̄; of a longer name the last letter has the bar."""
    return name + BAR


def constants(case: Case) -> dict[str, Any]:
    """What is not differentiated, and the options that are numbers, with their defaults."""
    defaults = {p.name: p.default for p in inspect.signature(OPS[case.name]).parameters.values()}
    given = {**defaults, **case.params, **case.constants}
    numbers = {k: v for k, v in given.items() if isinstance(v, (np.ndarray, float, int))}
    return {k: v for k, v in numbers.items() if not isinstance(v, bool)}


# Along what `sum` goes on the page of an op without an axis; None: over everything.
AXES: dict[str, Any] = {
    "scaled_dot_product_attention": -1,
    "conv2d_p": (0, 1, 2),
    "conv2d_input_grad": (0, 1, 2),
    "layer_norm": -1,
    "batch_norm": 0,
    "shift_normalize_silu": -1,
}


def functions(case: Case) -> dict[str, Callable[..., Any]]:
    """sum and mean go along the axes of the op, and keep them; an op of tinydiff has the options of this call."""
    axis = AXES.get(case.name, case.params.get("axis", case.params.get("axes")))
    made: dict[str, Callable[..., Any]] = dict(FUNCTIONS)

    def of_op(op: Any) -> Callable[..., Any]:
        def call(*arrays: Any) -> Any:
            wanted = inspect.signature(op).parameters
            options = {k: v for k, v in case.params.items() if k in wanted and wanted[k].kind is wanted[k].KEYWORD_ONLY}
            if "axes" in wanted:
                options.setdefault("axes", (axis,))
            missing = op.inputs - len(arrays) if isinstance(op, Op) and op.inputs else 0
            return np.asarray(op(*arrays, *[None] * missing, **options))

        return call

    made |= {name: of_op(op) for name, op in OPS.items() if name not in made and not name.endswith("_p")}
    made["conv2d"] = of_op(OPS["conv2d_p"]) if "geometry" in case.params else made["conv2d"]
    made["sum"] = lambda x: np.sum(x, axis=axis, keepdims=axis is not None)
    made["mean"] = lambda x: np.mean(x, axis=axis, keepdims=axis is not None)
    made["total"] = np.sum
    made["like"] = lambda a, x: np.reshape(a, np.shape(x))
    return made


def summed(found: Any, shape: tuple[int, ...], out: tuple[int, ...]) -> Any:
    """As the engine does: what broadcasting repeated is summed. A number stands for an array of it."""
    if found.ndim == 0:
        found = np.broadcast_to(found, out if len(out) >= len(shape) else shape)
    if found.ndim == len(shape) and all(m in (1, n) for m, n in zip(found.shape, shape)):
        return np.broadcast_to(found, shape)
    return found if found.shape == shape else np.asarray(unbroadcast(found, np.zeros(shape), "a claim", 0))


def relative(found: Any, wanted: Any) -> float:
    """The largest difference, over the largest of the wanted values."""
    if found.shape != wanted.shape:
        found, wanted = np.broadcast_arrays(found, wanted)
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return math.inf
    return float(np.max(np.abs(found - wanted), initial=0.0) / max(np.max(np.abs(wanted), initial=0.0), 1e-3))


def short(x: Any) -> str:
    return " ".join(np.array2string(np.asarray(x), precision=4, threshold=12).split())


# ---------------------------------------------------------------- finding claims in text


def clauses(text: str) -> list[str]:
    """The formulas of a block: lines, and their parts between wide gaps; a line that begins with = continues the one
    before. What stands after a formula is why, and may contain formulas too."""
    found: list[str] = []
    head = ""
    for line in normal(text).splitlines():
        parts = [p.strip(" ,;") for p in re.split(r" {2,}|,  +|, and ", line.strip())]
        if line.strip().startswith("="):
            parts[0] = f"{head} {parts[0]}"
        elif "=" in parts[0]:
            head = parts[0].split("=")[0].strip()
        for part in parts:
            part = re.sub(r": .*", "", part)
            part = re.sub(r"^(as|and|with|so|where|for) ", "", part).removesuffix(" along the axis").strip(" ,.:")
            if "=" in part:
                found.append(part)
    return found
