"""Ordinary differential equations to a given tolerance, with a step size for each row of a batch.

The pair of Dormand and Prince 1980 ("A family of embedded Runge-Kutta formulae", RK5(4)7M): six derivatives give a step
of order 5. A seventh, which is also the first of the next step, gives an estimate of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..arguments import integer, number
from ..backend import Array, scalar, xp

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # the step itself, of order 5
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 less order 4


class ToleranceError(RuntimeError):
    """The tolerance cannot be met in so many rounds, or in this dtype."""


def solve(
    derivative: Callable[[Array, Array], Array],
    y: Array,
    begin: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int = 1000,
    apart: int = 0,
) -> Iterator[tuple[Array, Array]]:
    """dy/dt = derivative(y, t) from begin to end, which may be less: yields (t, y) at the start and after each round;
    the last y is the solution.

    y: (N, ...), t: (N,), one time per row. In a round every row tries a step of its own length. The step is taken if
    the root mean square over the row of error / (atol + rtol |y|) is at most 1. The next step is as long as that error
    allows, a fifth to five times this one. So no row depends on the others. The cost is 6 derivatives per round, and
    one at the start.
    apart: this many of the last columns of y (N, D), fewer than D, are not averaged with the others: each of them must
    meet the tolerance by itself.
    Errors: ValueError for tolerances that are not positive, or steps < 1; ToleranceError, which says how far the
    rows are, if some have not arrived after so many rounds, or need a step too small to change t.
    """
    steps, begin, end = integer("steps", steps), number("begin", begin), number("end", end)
    rtol, atol = number("rtol", rtol, "(0, inf)"), number("atol", atol, "(0, inf)")
    rows, wide, inner = len(y), (-1,) + (1,) * (y.ndim - 1), tuple(range(1, y.ndim))
    t = xp.full(rows, begin, y.dtype)  # (N,)
    h = xp.full(rows, (end - begin) / 100, y.dtype)  # (N,)
    k = [derivative(y, t)]
    yield t, y
    for _ in range(steps):
        arrives = abs(h) >= abs(end - t)
        h = xp.where(arrives, end - t, h)  # 0 for the rows that have arrived
        step = h.reshape(wide)  # (N,) -> (N, 1, ..., 1)
        for node, row in zip(NODES, STAGES):
            new = y + step * _combine(row, k)
            k.append(derivative(new, t + node * h))
        error = abs(step * _combine(ERROR, k)) / (atol + rtol * xp.maximum(abs(y), abs(new)))
        error, alone = (error[:, :-apart], error[:, -apart:]) if apart else (error, None)
        error = xp.sqrt((error * error).mean(axis=inner)) if inner else error  # (N, ...) -> (N,)
        error = error if alone is None else xp.maximum(error, alone.max(axis=1))  # NaN if one of them is NaN
        good = error <= 1  # False for NaN
        t = xp.where(good, xp.where(arrives, end, t + h), t)
        y = xp.where(good.reshape(wide), new, y)  # (N,) -> (N, 1, ..., 1)
        k = [xp.where(good.reshape(wide), k[-1], k[0])]
        growth = xp.where(xp.isnan(error), 0.2, 0.9 * xp.maximum(error, 1e-10) ** -0.2)
        h = h * xp.clip(growth, 0.2, 5.0)
        yield t, y
        on_the_way = t != end
        if not scalar(on_the_way.any()):
            return
        if scalar((on_the_way & (t + h == t)).any()):
            break
    far = scalar(on_the_way.sum())
    raise ToleranceError(
        f"rtol={rtol:g}, atol={atol:g} cannot be met from t={begin:g} to {end:g} in {y.dtype} within {steps} rounds: "
        f"{far:.0f} of {rows} rows have not arrived, the last is at t={scalar(t.max() if end < begin else t.min()):g}. "
        "Raise the tolerance or the steps, or check whether the derivative jumps or is NaN"
    )


def _combine(weights: tuple[float, ...], derivatives: list[Array]) -> Any:
    """The weighted sum of as many derivatives as there are weights."""
    return sum(w * k for w, k in zip(weights, derivatives) if w)
