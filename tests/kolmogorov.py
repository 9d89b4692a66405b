"""The Kolmogorov-Smirnov test: do these samples follow that distribution?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinydiff import backend


def distance(samples: Any, cdf: Any) -> float:
    """The largest difference between the empirical distribution function of the samples and the exact one."""
    x = np.sort(np.asarray(backend.to_host(samples), np.float64).ravel())
    exact = np.asarray(backend.to_host(cdf(backend.to_device(x))))
    steps = np.arange(len(x) + 1) / len(x)
    return float(max((steps[1:] - exact).max(), (exact - steps[:-1]).max()))


def threshold(n: int, probability: float = 0.001) -> float:
    """The distance that n samples of the exact law exceed with this probability: the first term of Kolmogorov's
    series, 2 exp(-2 n d^2) = probability, good for n over 35.
    """
    return math.sqrt(-math.log(probability / 2) / (2 * n))
