"""Numerical derivatives: what gradcheck holds a gradient against.

A function f of several arrays and an adjoint v give a number, phi(x) = <v, f(x)>. Its derivative along a direction d:

    complex step          Im phi(x + i h d) / h,  h = 1e-20          exact to rounding: no difference is taken
    central differences   (phi(x + h d) - phi(x - h d)) / 2h         with two steps, so that the error is known

The first needs a holomorphic f that accepts complex arrays (Squire and Trapp 1998). The second works for every f. It
compares both sides, so it also finds the kinks, where there is no derivative.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backend
from ..engine import Tensor

STEP = 1e-20
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Derivative:
    """A derivative by central differences. kind: "smooth", or why there is none: "kink" (the derivatives of the two
    sides differ), "jump", "edge" (one side is outside the domain), "rough" (no two steps agree)."""

    value: float
    error: float  # an estimate, of truncation and of rounding
    left: float
    right: float
    kind: str


class Problem:
    """phi, for the inputs of a function that are float64 arrays; the others are constants.

    fn takes Tensors and returns a list of Tensors.
    """

    def __init__(self, fn: Callable[..., list[Tensor]], inputs: Sequence[Any], names: Sequence[str]):
        self.fn, self.inputs, self.names = fn, list(inputs), list(names)
        self.places = [i for i, x in enumerate(inputs) if isinstance(x, np.ndarray) and x.dtype == np.float64]
        self.arrays = [self.inputs[i] for i in self.places]
        self.adjoints: list[Any] = []

    def outputs(self, arrays: Sequence[Any]) -> list[Any]:
        """f on the host arrays, as host arrays."""
        given = list(self.inputs)
        for place, array in zip(self.places, arrays):
            # fn may ask for gradients
            given[place] = array if isinstance(array, Tensor) else Tensor(backend.to_device(array), True)
        with np.errstate(all="ignore"):
            return [backend.to_host(y._data) for y in self.fn(*given)]

    def phi(self, outputs: Sequence[Any]) -> Any:
        return sum(((v * y).sum() for v, y in zip(self.adjoints, outputs)), start=0.0)

    def noise(self) -> float:
        """The rounding error of phi."""
        return 4 * EPSILON * sum(float(np.abs(v * y).sum()) for v, y in zip(self.adjoints, self.outputs(self.arrays)))

    # ---- along a direction d, one array, of the input k

    def by_complex_step(self, k: int, d: Any) -> float:
        """Raises whatever f raises on complex arrays."""
        return float(self.phi(self.tangent(k, d)))

    def tangent(self, k: int, d: Any) -> list[Any]:
        """The derivative of every output along d."""
        moved = [x + 1j * STEP * d if j == k else x.astype(np.complex128) for j, x in enumerate(self.arrays)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)  # an imaginary part was thrown away
            return [y.imag / STEP for y in self.outputs(moved)]

    def by_central_differences(self, k: int, d: Any, scale: float, noise: float, goal: float) -> Derivative:
        """The steps are tried from large to small until the error is at most `goal`."""
        return central(lambda t: float(self.phi(self.outputs(self.moved(k, t * d)))), scale, noise, goal)

    def moved(self, k: int, by: Any) -> list[Any]:
        return [x + by if j == k else x for j, x in enumerate(self.arrays)]


def central(phi: Callable[[float], float], scale: float, noise: float, goal: float) -> Derivative:
    """The derivative of phi at 0 by central differences with steps h and h / 2, h from scale / 10^3 to scale / 10^8.

    d(h) = phi' + c h^2 + ..., so (4 d(h/2) - d(h)) / 3 has no term in h^2 (Richardson), and the difference
    d(h/2) - d(h) gives the size of that term.
    """
    here = phi(0.0)
    goal = max(goal, 4e3 * noise / scale)  # what rounding allows at the largest step
    best: Derivative | None = None
    for exponent in range(3, 9):
        h = scale * 10.0**-exponent
        right1, left1, right2, left2 = phi(h), phi(-h), phi(h / 2), phi(-h / 2)
        if not all(map(math.isfinite, (right1, left1, right2, left2))):
            continue
        d1, d2 = (right1 - left1) / (2 * h), (right2 - left2) / h
        left, right = (here - left2) / (h / 2), (right2 - here) / (h / 2)
        error = abs(d2 - d1) / 3 + noise / h
        if best is not None and error >= best.error:
            continue
        # Where phi is smooth, the derivatives of the two sides differ by h phi'': half the step, half the difference.
        gap1, gap2 = (right1 - 2 * here + left1) / h, right - left
        value, kind = d2 + (d2 - d1) / 3, "smooth"
        if abs(gap2) > 0.75 * abs(gap1) and abs(gap2) > max(1e-5 * max(abs(left), abs(right)), 100 * noise / h):
            kind = "kink"
        if abs(d2 - 2 * d1) <= 0.2 * abs(d2) and error > max(goal, 1e-3 * abs(d2)):
            kind = "jump"
        elif kind == "smooth" and error > max(goal, 1e-3 * abs(value)):
            kind = "rough"
        best = Derivative(value, error, left, right, kind)
        if error <= goal:
            break
    return best or Derivative(math.nan, math.inf, math.nan, math.nan, "edge")
