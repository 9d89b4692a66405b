"""The exercises, from `multiply` to attention: the op, example inputs, hints, and the usual slips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..engine import Op
from ..operators import OPS
from ..ops import norm

Case = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Sheet:
    """cases: from a drawer of normal and one of positive numbers, the inputs and options to try. slips: (what went
    wrong, the wrong rule). shows: functions that the forward calls and that the page shows too."""

    name: str
    level: int
    cases: Callable[[Any, Any], list[Case]]
    hints: tuple[str, ...]
    op_name: str = ""
    slips: tuple[tuple[str, Callable[..., Any]], ...] = ()
    shows: tuple[Callable[..., Any], ...] = ()

    @property
    def op(self) -> Op:
        found = OPS[self.op_name or self.name]
        assert isinstance(found, Op)
        return found

    def examples(self) -> list[Case]:
        """The same numbers each time."""
        random = np.random.default_rng(7)
        return self.cases(lambda *s: random.normal(size=s), lambda *s: random.uniform(0.5, 2, size=s))


CHAIN = "The adjoint of x is g times the ordinary derivative of z by x."
PRODUCT = "Write the differential dz; what multiplies dx, times g, is the adjoint of x."

CATALOGUE = (
    Sheet("multiply", 1, lambda N, P: [((N(2, 3), N(2, 3)), {})], (PRODUCT, "dz = y dx + x dy.")),
    Sheet("subtract", 1, lambda N, P: [((N(2, 3), N(3)), {})], (PRODUCT, "dz = dx - dy.")),
    Sheet("divide", 1, lambda N, P: [((N(2, 3), P(2, 3)), {})], (PRODUCT, "dz = dx / y - x dy / y^2.")),
    Sheet("square", 1, lambda N, P: [((N(2, 3),), {})], (CHAIN, "x^2 is x x: x is used twice.")),
    Sheet("exp", 1, lambda N, P: [((N(2, 3),), {})], (CHAIN, "The exponential is its own derivative.")),
    Sheet("log", 1, lambda N, P: [((P(2, 3),), {})], (CHAIN, "log' x = 1 / x.")),
    Sheet("sqrt", 1, lambda N, P: [((P(2, 3),), {})], (CHAIN, "From z^2 = x: 2 z dz = dx.")),
    Sheet("cos", 1, lambda N, P: [((N(2, 3),), {})], (CHAIN, "Mind the sign.")),
    Sheet("tanh", 1, lambda N, P: [((N(2, 3),), {})], (CHAIN, "It can be written with z alone.")),
    Sheet(
        "softmax",
        3,
        lambda N, P: [((N(3, 4),), {"axis": -1})],
        ("Take logarithms first: log z = x - log sum e^x.", "dz / z = dx - sum(z dx).", "Sum g z along the axis."),
        slips=(
            ("the term sum(g z) is missing: every output depends on every x", lambda g, z, x, *, axis: g * z),
            ("sum(g) stands where sum(g z) belongs",
             lambda g, z, x, *, axis: z * (g - ops.sum(g, axis=axis, keepdims=True))),
        ),
    ),
    Sheet(
        "group_norm",
        4,
        lambda N, P: [((N(2, 3, 2, 2), N(1, 1, 2, 2), N(1, 1, 2, 2)), {"axes": (1, 3), "eps": 0.1})],
        ("With h = g weight, the adjoint of xhat.", "The mean depends on x, and the variance too.",
         "r (h - mean(h) - xhat mean(xhat h))."),
        op_name="normalize",
        shows=(norm.standardize,),
    ),
)  # fmt: skip
