"""The functions between the layers: sigmoid, relu, silu, gelu, softplus, and the erf that gelu needs."""

from __future__ import annotations

import math
from typing import Any

from .. import kernels
from ..backend import xp
from ..tape import composite, primitive
from .elementwise import exp, minimum, tanh, where

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


@primitive
def sigmoid(x: Any) -> Any:
    """z = 1 / (1 + e^-x)

    dz = z (1 - z) dx          x' = z' z (1 - z)
    """
    return kernels.sigmoid(x)


@sigmoid.vjp
def _(g: Any, z: Any, _x: Any) -> Any:
    return g * (z * (1 - z))


@primitive
def relu(x: Any) -> Any:
    """z = max(x, 0)

    x' = z' where x > 0

    At ties: 0 at x = 0.
    """
    return xp.maximum(x, 0)


@relu.vjp
def _(g: Any, _z: Any, x: Any) -> Any:
    return where(x > 0, g, 0.0)


@primitive
def silu(x: Any) -> Any:
    """z = x s,   s = sigmoid(x)

    dz = (s + x s (1 - s)) dx = (s + z (1 - s)) dx          x' = z' (s + z (1 - s))

    Source: Elfwing et al. 2017 (SiL); Ramachandran et al. 2017 (swish).
    """
    return kernels.silu(x if x.dtype.kind in "fc" else x.astype("float64"))


@silu.reference
def _(x: Any) -> Any:
    return x * sigmoid(x)


@silu.vjp
def _(g: Any, _z: Any, x: Any) -> Any:
    return kernels.silu_backward(g, x)


@primitive
def erf(x: Any) -> Any:
    """z = 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x

    dz = 2 / sqrt(pi) e^(-x^2) dx          x' = z' 2 / sqrt(pi) e^(-x^2)
    """
    return kernels.erf(x)


@erf.vjp
def _(g: Any, _z: Any, x: Any) -> Any:
    return g * (2 / math.sqrt(math.pi) * exp(-x * x))


@composite
def gelu(x: Any, *, approximate: str = "none") -> Any:
    """x Phi(x), where Phi is the standard normal's distribution function

    approximate="none":   Phi(x) = (1 + erf(x / sqrt 2)) / 2
    approximate="tanh":   Phi(x) ~ (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

    Source: Hendrycks and Gimpel 2016. Errors: ValueError for another approximation.
    """
    if approximate == "none":
        return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))
    if approximate == "tanh":
        return 0.5 * x * (1 + tanh(SQRT_2_OVER_PI * (x + 0.044715 * (x * x * x))))
    raise ValueError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


@primitive
def softplus(x: Any) -> Any:
    """z = log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)

    dz = sigmoid(x) dx          x' = z' sigmoid x
    """
    return xp.maximum(x, 0) + xp.log1p(xp.exp(minimum(x, -x)))


@softplus.vjp
def _(g: Any, _z: Any, x: Any) -> Any:
    return g * sigmoid(x)
