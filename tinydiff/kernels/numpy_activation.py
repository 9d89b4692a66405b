"""sigmoid, silu and erf, in few passes."""

from __future__ import annotations

import math
from typing import Any

import numpy

from ..backend import Array, xp
from .numpy_blocks import blocks


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), with e^-x held below overflow."""
    e = xp.negative(x)
    if not isinstance(e, xp.ndarray):
        e = xp.asarray(e)
    if e.dtype.kind not in "fc":
        e = e.astype("float64")
    xp.minimum(e, 88.0 if e.dtype.char in "fF" else 709.0, out=e)
    xp.exp(e, out=e)
    e += 1
    return xp.divide(1, e, out=e)


def silu(x: Array) -> Array:
    """x sigmoid(x)"""
    y = xp.empty_like(x)
    for part in blocks(x):
        silu_of_negative(xp.negative(x[part], out=y[part]))
    return y


def silu_backward(g: Array, x: Array) -> Array:
    """g (s + x s (1 - s)) = g s (1 + x - x s)"""
    y = xp.empty_like(x)
    for part in blocks(x):
        u = xp.negative(x[part], out=y[part])
        slope_of_silu_of_negative(u)
        xp.multiply(u, g[part], out=u)
    return y


def silu_of_negative(u: Array) -> None:
    """u becomes silu(-u) = u / (-1 - e^u). Where e^u overflows, that is -0, as it should be."""
    with numpy.errstate(over="ignore"):
        e = xp.exp(u, out=xp.empty_like(u))
    xp.subtract(-1, e, out=e)
    xp.divide(u, e, out=u)


def slope_of_silu_of_negative(u: Array) -> None:
    """u becomes silu'(y) = s (1 + y (1 - s)), where y = -u and s = 1 / (1 + e^u)."""
    with numpy.errstate(over="ignore"):
        s = xp.exp(u, out=xp.empty_like(u))
    xp.add(s, 1, out=s)
    xp.divide(1, s, out=s)
    rest = xp.subtract(1, s, out=xp.empty_like(s))
    xp.multiply(u, rest, out=u)
    xp.subtract(1, u, out=u)
    xp.multiply(u, s, out=u)


# Cody 1969, "Rational Chebyshev approximations for the error function": coefficients of the numerator and of the monic
# denominator on |x| <= 0.46875 (in x^2), on 0.46875 < |x| <= 4 (in |x|), and beyond (in x^-2).
_ERF = (
    (
        1.85777706184603153e-1,
        3.16112374387056560e0,
        1.13864154151050156e2,
        3.77485237685302021e2,
        3.20937758913846947e3,
    ),
    (2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
_ERFC_MIDDLE = (
    (
        2.15311535474403846e-8,
        5.64188496988670089e-1,
        8.88314979438837594e0,
        6.61191906371416295e1,
        2.98635138197400131e2,
        8.81952221241769090e2,
        1.71204761263407058e3,
        2.05107837782607147e3,
        1.23033935479799725e3,
    ),
    (
        1.57449261107098347e1,
        1.17693950891312499e2,
        5.37181101862009858e2,
        1.62138957456669019e3,
        3.29079923573345963e3,
        4.36261909014324716e3,
        3.43936767414372164e3,
        1.23033935480374942e3,
    ),
)
_ERFC_FAR = (
    (
        1.63153871373020978e-2,
        3.05326634961232344e-1,
        3.60344899949804439e-1,
        1.25781726111229246e-1,
        1.60837851487422766e-2,
        6.58749161529837803e-4,
    ),
    (
        2.56852019228982242e0,
        1.87295284992346725e0,
        5.27905102951428412e-1,
        6.05183413124413191e-2,
        2.33520497626869185e-3,
    ),
)


def _ratio(coefficients: Any, t: Array) -> Array:
    top, bottom = coefficients
    p, q = top[0] * t, t
    for a, b in zip(top[1:-1], bottom[:-1]):
        p, q = (p + a) * t, (q + b) * t
    return (p + top[-1]) / (q + bottom[-1])


def erf(x: Array) -> Array:
    x = xp.asarray(x)
    if x.dtype.kind not in "fc":
        x = x.astype("float64")
    r = xp.maximum(x, -x)  # |x|; also right for the complex step, where abs would not be analytic
    near, far = r <= 0.46875, r > 4
    small, large = xp.where(near, x, 0), xp.where(near, 1, xp.minimum(r, 30))
    inner = small * _ratio(_ERF, small * small)
    middle = xp.where(far, 1, large)
    inverse = 1 / xp.where(far, large * large, 16)
    tail = xp.where(
        far, (1 / math.sqrt(math.pi) - inverse * _ratio(_ERFC_FAR, inverse)) / large, _ratio(_ERFC_MIDDLE, middle)
    )
    outer = 1 - xp.exp(-large * large) * tail
    return xp.where(near, inner, xp.where(x < 0, -outer, outer)).astype(x.dtype, copy=False)
