"""Numbers that are given as arguments: what is out of range is refused where it is given, with the value quoted.

Each function returns a plain Python number. NumPy's scalars are not plain: np.float64(0.5) times an array of float32 is
an array of float64, and no JSON. So what has gone through here is safe to keep.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def integer(what: str, n: Any, least: int = 1, most: int | None = None) -> int:
    """n as an int. Errors: ValueError unless it is an integer from `least` to `most`."""
    if not isinstance(n, Integral) or isinstance(n, bool) or int(n) < least or most is not None and int(n) > most:
        wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} must be an integer {wanted}, not {n!r}")
    return int(n)


def number(what: str, x: Any, interval: str = "(-inf, inf)") -> float:
    """x as a float: number("Adam: eps", eps, "[0, inf)"). Errors: ValueError unless it is a real number inside.
    Square brackets include an end, round ones do not; NaN is in no interval."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = isinstance(x, Real) and not isinstance(x, bool) and not math.isnan(x)
    if not inside or not (low < x < high or x == low and interval[0] == "[" or x == high and interval[-1] == "]"):
        raise ValueError(f"{what} must be a number in {interval}, not {x!r}")
    return float(x)
