"""Where a sampler stops on its way from noise to image.

A process with scale m(t) and std s(t) is x = m (x_0 + sigma z), sigma = s / m: up to the scale, all that matters of a
time is its noise level sigma. Samplers that work in sigma and a net that is told t meet here.

A grid is a function grid(sde, steps, begin, end) of steps + 1 times that fall from begin to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Grid = Callable[[Any, int, float, float], list[float]]


def sigma_at(sde: Any, t: float) -> float:
    """The noise level at time t, s(t) / m(t): how much noise there is beside an image of size 1."""
    return sde.marginal_std(t) / sde.marginal_scale(t)


def time_at(sde: Any, sigma: float) -> float:
    """The time at which the noise level is sigma, to 1e-15 of t: bisection, as sigma rises with t in every process.

    Errors: ValueError for a sigma that the process does not reach, or that is negative.
    """
    high = sigma_at(sde, sde.t_max)
    # rounding may lift the highest level of a grid a little above it
    if not 0 <= sigma <= high * (1 + 1e-12):
        raise ValueError(f"{sde}: a noise level must be from 0 to {high:.6g}, not {sigma!r}")
    below, above = 0.0, float(sde.t_max)
    for _ in range(100):
        middle = (below + above) / 2
        if sigma_at(sde, middle) < sigma:
            below = middle
        else:
            above = middle
        if above - below <= 1e-15 * above:
            break
    return above


def uniform_times(sde: Any, steps: int, begin: float, end: float) -> list[float]:
    """Equal steps in t."""
    return [begin - (begin - end) * i / steps for i in range(steps)] + [end]


def rho_times(sde: Any, steps: int, begin: float, end: float, rho: float = 7.0) -> list[float]:
    """Equal steps in sigma^(1/rho), so that they are the shorter the less noise is left.

    Source: Karras et al. 2022, equation 5, whose N is steps + 1.
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho_times: rho must be positive and finite, not {rho!r}")
    high, low = sigma_at(sde, begin) ** (1 / rho), sigma_at(sde, end) ** (1 / rho)
    return [begin, *(time_at(sde, (high + i / steps * (low - high)) ** rho) for i in range(1, steps)), end]
