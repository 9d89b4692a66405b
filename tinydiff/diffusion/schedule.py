"""How fast a variance-preserving process forgets: beta(t), and its integral in closed form.

A schedule is an object with `beta(t)` and `integral(t)`, for 0 <= t <= 1. The mean of the data shrinks as
exp(-integral / 2), so everything else about the process follows from these two functions.

Here also are two checks of arguments, and the functions of a time that may be a number, an array or a Tensor: a number
gives a Python float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from .. import ops


class LinearSchedule:
    """beta(t) = low + t (high - low),   integral = low t + (high - low) t^2 / 2

    At t = 1 the mean is left with exp(-10.05 / 2) = 0.0066 of itself, by the defaults.
    Errors: ValueError unless 0 <= low <= high < infinity and high > 0.
    Source: Ho et al. 2020, as Song et al. 2021 (appendix C) write it for continuous time.
    """

    def __init__(self, low: float = 0.1, high: float = 20.0):
        if not (0 <= low <= high < math.inf and high > 0):
            raise ValueError(f"LinearSchedule: needs 0 <= low <= high, high positive and finite, not {low!r}, {high!r}")
        self.low, self.high = float(low), float(high)

    def __repr__(self) -> str:
        return f"LinearSchedule(low={self.low}, high={self.high})"

    def beta(self, t: Any) -> Any:
        return t * (self.high - self.low) + self.low

    def integral(self, t: Any) -> Any:
        return (t * ((self.high - self.low) / 2) + self.low) * t


class CosineSchedule:
    """The mean shrinks as a cosine: exp(-integral / 2) = cos(u) / cos(u_0), u_0 = u(0), with an angle

        u = (pi / 2) (t + offset) / (1 + 2 offset),      beta(t) = 2 u' tan(u),      integral = -2 ln(cos(u) / cos(u_0))

    The angle starts a little after 0, so that beta(0) is not 0, and ends as much before a right angle, where beta would
    be infinite; Nichol and Dhariwal 2021 (equation 17) let it reach the right angle, and cut beta (at 0.999 of a step).
    Here at t = 1 the mean is left with 0.0124 of itself.
    Errors: ValueError unless 0 < offset < infinity.
    """

    def __init__(self, offset: float = 0.008):
        if not 0 < offset < math.inf:
            raise ValueError(f"CosineSchedule: offset must be positive and finite, not {offset!r}")
        self.offset = float(offset)
        self.speed = math.pi / 2 / (1 + 2 * self.offset)  # u'
        self.start = self.speed * self.offset  # u_0

    def __repr__(self) -> str:
        return f"CosineSchedule(offset={self.offset})"

    def beta(self, t: Any) -> Any:
        u = t * self.speed + self.start
        return 2 * self.speed * sin(u) / cos(u)

    def integral(self, t: Any) -> Any:
        # cos(u) / cos(u_0) = 1 - (2 sin^2(d / 2) + tan(u_0) sin(d)) for d = u - u_0; near t = 0, where it is almost 1,
        # the logarithm of the quotient itself would keep no digits in float32.
        d = t * self.speed
        half = sin(d / 2)
        return -2 * log1p(-(2 * half * half + math.tan(self.start) * sin(d)))


SCHEDULES: dict[str, Callable[..., Any]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


def by_name(what: str, choices: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """The choice of that name. Errors: ValueError, which lists them."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(choices)}")
    return choices[name]


def whole(what: str, n: Any, least: int = 1) -> int:
    """n as an int. Errors: ValueError unless it is an integer, of `least` or more."""
    if not isinstance(n, Integral) or int(n) < least:
        raise ValueError(f"{what} must be an integer of {least} or more, not {n!r}")
    return int(n)


# ---------------------------------------------------------------- functions of a number, an array or a Tensor


def _of_number_or_array(number: Callable[[float], float], array: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda t: number(float(t)) if isinstance(t, Real) else array(t)


exp = _of_number_or_array(math.exp, ops.exp)
expm1 = _of_number_or_array(math.expm1, ops.expm1)
log1p = _of_number_or_array(math.log1p, ops.log1p)
sqrt = _of_number_or_array(math.sqrt, ops.sqrt)
sin = _of_number_or_array(math.sin, ops.sin)
cos = _of_number_or_array(math.cos, ops.cos)
