"""The functions between the layers: sigmoid, relu, silu, gelu, softplus, and the erf that gelu needs."""

from __future__ import annotations

import math
from typing import Any

from ..backend import xp
from ..engine import composite, op
from .elementwise import exp, floating, minimum, tanh, where


@op
def sigmoid(x: Any) -> Any:
    """z = 1 / (1 + e^-x) = e^min(x, 0) / (1 + e^-|x|), so that no power overflows

    dz = z (1 - z) dx          x̄ = z̄ z (1 - z)
    """
    x = floating(x)
    return xp.exp(xp.minimum(x, 0)) / (1 + xp.exp(minimum(x, -x)))


@sigmoid.vjp
def sigmoid_vjp(g: Any, z: Any, _x: Any) -> Any:
    return g * (z * (1 - z))


@op
def relu(x: Any) -> Any:
    """z = max(x, 0)

    x̄ = z̄ where x > 0

    At 0: 0.
    """
    return xp.maximum(x, 0)


@relu.vjp
def relu_vjp(g: Any, _z: Any, x: Any) -> Any:
    return where(x > 0, g, 0.0)


@op
def silu(x: Any) -> Any:
    """z = x s,   s = sigmoid(x)

    ds = s (1 - s) dx          dz = s dx + x ds = s (1 + x (1 - s)) dx          x̄ = z̄ s (1 + x (1 - s))

    Source: Elfwing et al. 2017 (SiL); Ramachandran et al. 2017 (swish).
    """
    x = floating(x)
    return x * sigmoid(x)


@silu.vjp
def silu_vjp(g: Any, _z: Any, x: Any) -> Any:
    s = sigmoid(x)
    return g * (s * (1 + x * (1 - s)))


@op
def erf(x: Any) -> Any:
    """z = 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x

      = 2 / sqrt(pi) e^(-x^2) (x + 2/3 x^3 + 4/15 x^5 + ...),   each term 2 x^2 / (2 n + 1) times the one before

    dz = 2 / sqrt(pi) e^(-x^2) dx          x̄ = z̄ 2 / sqrt(pi) e^(-x^2)

    All terms have one sign, so no digits are lost. Beyond |x| = 6 the result is 1 to the last digit.
    Source: Abramowitz and Stegun 1964, equation 7.1.6.
    """
    x = xp.clip(floating(x), -6, 6)
    square, term = x * x, x
    total = x
    for n in range(1, 140):
        term = term * (square * (2 / (2 * n + 1)))
        total = total + term
    return 2 / math.sqrt(math.pi) * xp.exp(-square) * total


@erf.vjp
def erf_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g * (2 / math.sqrt(math.pi) * exp(-x * x))


@op
def exact_gelu(x: Any) -> Any:
    """z = x F,   F = (1 + erf(x / sqrt 2)) / 2: the standard normal's distribution function, whose density is f

    dF = f dx,   f = e^(-x^2 / 2) / sqrt(2 pi)          dz = F dx + x dF          x̄ = z̄ (F + x f)
    """
    x = floating(x)
    return x * normal_cdf(x)


@exact_gelu.vjp
def exact_gelu_vjp(g: Any, _z: Any, x: Any) -> Any:
    f = exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return g * (normal_cdf(x) + x * f)


def normal_cdf(x: Any) -> Any:
    return 0.5 * (1 + erf(x * math.sqrt(0.5)))


@composite
def gelu(x: Any, *, approximate: str = "none") -> Any:
    """x Phi(x), where Phi is the standard normal's distribution function

    approximate="none":   Phi(x) = (1 + erf(x / sqrt 2)) / 2, see exact_gelu
    approximate="tanh":   Phi(x) ~ (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

    Source: Hendrycks and Gimpel 2016. Errors: ValueError for another approximation.
    """
    x = floating(x)
    if approximate == "none":
        return exact_gelu(x)
    if approximate == "tanh":
        return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
    raise ValueError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")


@op
def softplus(x: Any) -> Any:
    """z = log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)

    dz = sigmoid(x) dx          x̄ = z̄ sigmoid(x)
    """
    x = floating(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(minimum(x, -x)))


@softplus.vjp
def softplus_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g * sigmoid(x)
