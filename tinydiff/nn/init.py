"""How weights begin: PyTorch's defaults.

A sum over n inputs of variance 1, with weights of variance 1 / n, has variance 1: the signal keeps its size from layer
to layer. n is the fan-in, the number of products that are summed in one output.
"""

from __future__ import annotations

import math

from ..backend import Array
from ..rng import Rng


def uniform(shape: tuple[int, ...], bound: float, rng: Rng) -> Array:
    """U(-bound, bound), float32."""
    return (2 * rng.uniform(shape) - 1) * bound


def fan_in_uniform(shape: tuple[int, ...], fan_in: int, rng: Rng) -> Array:
    """U(-b, b), b = 1 / sqrt(fan_in), which has a variance of 1 / (3 fan_in): for the weights and biases of
    linear maps and convolutions.

    PyTorch calls it kaiming_uniform with a = sqrt(5) (He et al. 2015, with a gain of sqrt(1/3)).
    """
    return uniform(shape, 1 / math.sqrt(fan_in) if fan_in > 0 else 0.0, rng)


def xavier_uniform(shape: tuple[int, ...], rng: Rng) -> Array:
    """U(-b, b), b = sqrt(6 / (fan_in + fan_out)), for a matrix (in, out).

    Source: Glorot and Bengio 2010, equation 16.
    """
    return uniform(shape, math.sqrt(6 / sum(shape)), rng)
