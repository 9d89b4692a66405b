"""Is the rule of one node right? Its op alone, held against numerical derivatives with the adjoint that arrived.

For y = op(x) and the adjoint ȳ that arrives, the rule claims x̄_i = sum_j ȳ_j dy_j/dx_i. Here the right side is computed
term by term: dy/dx_i is the derivative of the whole output along one element of the input (check/numbers.py), by the
complex step, or by central differences where the op does not go with complex numbers. No other node takes part, so a
difference is the fault of this node's rule.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import backend
from ..check.numbers import EPSILON, Problem
from ..engine import Node, unbroadcast
from ..shape_dtype import ShapeDtype

STEP = 1e-5  # of the central differences, for an element of size 1
TERMS = 6  # of a sum, so many are kept; the rest is added up
TINY = 256  # the most elements of a Jacobian that is kept whole
# The largest difference that counts as rounding, over the sum of the |terms|: of the rule's dtype, and of the method.
RTOL = {"float32": 1e-5, "float64": 1e-9, "complex step": 0.0, "central differences": 1e-6}


@dataclass
class Checked:
    """One derivative: the rule's value, the numeric one, and the sum that it is. index None: along a random
    direction, where value and numeric are the sums over all elements.

    terms: (j, ȳ_j, dy_j/dx_i), the largest products first. verdict: "right", "wrong", "kink" (the derivatives of the
    two sides differ, and the value lies between them), or "no numeric value".
    """

    index: tuple[int, ...] | None
    value: float
    numeric: float
    verdict: str
    method: str
    terms: list[tuple[tuple[int, ...], float, float]] = field(default_factory=list)
    rest: tuple[int, float] = (0, 0.0)  # how many other terms are not zero, and their sum


class LocalOp:
    """A node's op as a function of its inputs, in float64, near the values that it had.

    inputs: their arrays and constants; ShapeDtype where nobody knows the values, which are taken as 0: the rule does
    not read them, and says so with it that they do not matter. g: the adjoint that arrived.
    """

    def __init__(self, node: Node, inputs: Sequence[Any], g: Any):
        self.node, self.g = node, backend.to_host(g).astype(np.float64)
        given = [self._wide(x) for x in inputs]
        self.problem = Problem(lambda *xs: [node.op(*xs, **node.params)], given, [])
        self.base = self.problem.outputs(self.problem.arrays)[0]
        self.noise = 16 * EPSILON * float(np.abs(self.g * self.base).sum())  # of <ȳ, y>, by rounding
        self.methods: dict[int, str] = {}
        self.step = STEP

    @staticmethod
    def _wide(x: Any) -> Any:
        if not hasattr(x, "shape") or x.dtype.kind not in "fc":
            return x
        return backend.to_host(x).astype(np.float64) if backend.active().is_array(x) else np.zeros(x.shape)

    def check(self, i: int, adjoint: Any, indices: Sequence[tuple[int, ...]], seed: int) -> list[Checked]:
        """The adjoint of input i that the engine has got, along a random direction and at the indices."""
        host, dtype = backend.to_host(adjoint), str(adjoint.dtype)
        d = np.random.default_rng(seed).standard_normal(host.shape)
        found = [self._compare(i, None, d, float((host.astype(np.float64) * d).sum()), dtype)]
        for index in indices:
            unit = np.zeros(host.shape)
            unit[index] = 1
            found.append(self._compare(i, index, unit, float(host[index]), dtype))
        return found

    @functools.cached_property
    def rounding(self) -> list[float]:
        """How far rounding to float32 moves the adjoint that the page's rule gives to each input, at its worst element.
        It is large where a rule adds up what nearly cancels, as 1 - y y does for tanh near 1."""
        try:
            single, double = self._rule("float32"), self._rule("float64")
        except Exception:  # a wrong rule may fail in any way; then only the terms tell what rounding allows
            return [0.0] * len(self.node.values)
        away = [0.0 if a is None else float(np.abs(a - b).max(initial=0.0)) for a, b in zip(single, double)]
        return [x if math.isfinite(x) else 0.0 for x in away]

    def _rule(self, dtype: str) -> list[Any]:
        """The page's rule in that dtype, summed to the shapes of the inputs, on the host."""
        node = self.node

        def cast(x: Any) -> Any:
            if not hasattr(x, "shape") or x.dtype.kind != "f":
                return x
            if isinstance(x, ShapeDtype):
                return ShapeDtype(np.empty(x.shape, dtype))
            return backend.to_device(backend.to_host(x).astype(dtype))

        g, values = cast(self.g), [cast(x) for x in node.values]
        out = cast(node) if node.out is None else cast(self.base)
        with np.errstate(all="ignore"):
            found = node.op.rule(g, out, *values, **node.params)  # type: ignore[misc]
        found = found if isinstance(found, tuple) else (found,)
        adjoints = []
        for i, (parent, adjoint) in enumerate(zip(node.parents, found)):
            adjoint = adjoint() if callable(adjoint) and parent is not None else adjoint
            empty = parent is None or adjoint is None
            adjoints.append(None if empty else backend.to_host(unbroadcast(adjoint, values[i], node.op.name, i)))
        return adjoints

    def jacobian(self, i: int) -> Any:
        """dy/dx_i, (elements of y, elements of x_i)."""
        columns = []
        for index in np.ndindex(*self._array(i).shape):
            unit = np.zeros(self._array(i).shape)
            unit[index] = 1
            columns.append(self._tangent(i, unit)[0].ravel())
        return np.stack(columns, axis=1)

    def _array(self, i: int) -> Any:
        return self.problem.inputs[i]

    def _compare(self, i: int, index: Any, d: Any, value: float, dtype: str) -> Checked:
        column, left, right = self._tangent(i, d)
        products = self.g * column
        size = float(np.abs(products).sum())
        numeric, method = float(products.sum()), self.methods[i]
        slack = (RTOL[dtype] + RTOL[method]) * size + (self.noise / self.step if method != "complex step" else 0)
        slack += 4 * self.rounding[i] * float(np.finfo(dtype).eps / np.finfo(np.float32).eps) * float(np.abs(d).sum())
        if not math.isfinite(numeric):
            verdict = "no numeric value"
        elif abs(value - numeric) <= slack:
            verdict = "right"
        elif abs(left - right) > 1e-3 * size + slack and min(left, right) - slack <= value <= max(left, right) + slack:
            verdict = "kink"
        else:
            verdict = "wrong"
        checked = Checked(index, value, numeric, verdict, method)
        if index is not None:
            order = np.argsort(-np.abs(products), axis=None, kind="stable")[: np.count_nonzero(products)]
            places = [tuple(map(int, np.unravel_index(j, products.shape))) for j in order[:TERMS]]
            checked.terms = [(j, float(self.g[j]), float(column[j])) for j in places]
            checked.rest = max(len(order) - TERMS, 0), float(products.ravel()[order[TERMS:]].sum())
        return checked

    def _tangent(self, i: int, d: Any) -> tuple[Any, float, float]:
        """The derivative of the output along d, and the derivatives of <ȳ, y> from the left and from the right."""
        k = self.problem.places.index(i)
        if i not in self.methods:
            self.methods[i] = "complex step" if self._holomorphic(k) else "central differences"
        with np.errstate(all="ignore"):
            if self.methods[i] == "complex step":
                column = self.problem.tangent(k, d)[0]
                return column, 0.0, 0.0
            return self._difference(k, d)

    def _difference(self, k: int, d: Any) -> tuple[Any, float, float]:
        moved = np.abs(self.problem.arrays[k])[d != 0]
        h = self.step = STEP * max(1.0, float(moved.max(initial=0.0))) / max(1.0, float(np.abs(d).max(initial=0.0)))
        up = self.problem.outputs(self.problem.moved(k, h * d))[0]
        down = self.problem.outputs(self.problem.moved(k, -h * d))[0]
        left, right = (self.g * (self.base - down)).sum() / h, (self.g * (up - self.base)).sum() / h
        return (up - down) / (2 * h), float(left), float(right)

    def _holomorphic(self, k: int) -> bool:
        """Does the op take complex numbers, and is the complex step right? It is wrong, without an error, where an op
        compares or takes a real part; so it is held against a difference once."""
        if not self.node.op.holomorphic:
            return False
        d = np.random.default_rng(k).standard_normal(self.problem.arrays[k].shape)
        with np.errstate(all="ignore"):
            try:
                by_step = self.problem.tangent(k, d)[0]
            except Exception:  # whatever it is: the op is not made for complex numbers
                return False
            by_difference = self._difference(k, d)[0]
        size = float(np.abs(self.g * by_step).sum()) + float(np.abs(self.g * by_difference).sum())
        away = abs(float((self.g * (by_step - by_difference)).sum()))
        return not away > 1e-4 * size + self.noise / self.step
