"""sigmoid, silu, erf and gelu in C (activation.c, erf.c); where there is no compiler, in few passes over memory.

With t = e^u and u = -x:   silu = u / (-1 - t),   s = 1 / (1 + t),   silu' = s (1 + x (1 - s)) = s (1 - u (1 - s)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.activation import erf, exact_gelu, normal_cdf, sigmoid, silu
from ..taken import is_real
from .compiled import Function

sigmoid_in_c = Function("sigmoid_of_all", "in x(n), out z(n), int n, int part, int parts")
silu_in_c = Function("silu", "in x(n), out y(n), int n, int part, int parts")
silu_vjp_in_c = Function("silu_vjp", "in g(n), in x(n), out dx(n), int n, int part, int parts")
erf_in_c = Function("erf_of_all", "in x(n), out y(n), int n, int part, int parts")
gelu_in_c = Function("gelu", "in x(n), out y(n), int n, int part, int parts")
gelu_vjp_in_c = Function("gelu_vjp", "in g(n), in x(n), out dx(n), int n, int part, int parts")

BLOCK_BYTES = 2**20  # of each array: larger blocks spend less on starting each pass, smaller ones stay in the cache


def blocks(x: Array) -> Iterator[Any]:
    """The first axis in parts of about BLOCK_BYTES."""
    rows = len(x) if x.ndim else 1
    step = max(1, BLOCK_BYTES * rows // max(x.nbytes, 1))
    return (slice(i, i + step) if x.ndim else ... for i in range(0, rows, step))


@sigmoid.fast("numpy")
def sigmoid_numpy(x: Array) -> Any:
    """1 / (1 + e^-x), with e^-x held below overflow."""
    if not is_real(x):
        return NotImplemented
    e = np.empty_like(x)
    if x.flags.c_contiguous and sigmoid_in_c(x=x.reshape(-1), z=e.reshape(-1)):
        return e
    np.negative(x, out=e)
    np.minimum(e, 88.0 if x.dtype.char == "f" else 709.0, out=e)
    np.exp(e, out=e)
    e += 1
    return np.divide(1, e, out=e)


@silu.fast("numpy")
def silu_numpy(x: Array) -> Any:
    if not is_real(x):
        return NotImplemented
    y = np.empty_like(x)
    if x.flags.c_contiguous and silu_in_c(x=x.reshape(-1), y=y.reshape(-1)):
        return y
    for part in blocks(x):
        silu_of_negative(np.negative(x[part], out=y[part]))
    return y


@silu.fast_vjp("numpy")
def silu_vjp_numpy(g: Array, _z: Any, x: Array, *, residuals: Any) -> Any:
    if not is_real(g, x):
        return NotImplemented
    adjoint = np.empty_like(x)
    if x.flags.c_contiguous and g.flags.c_contiguous and g.shape == x.shape:
        if silu_vjp_in_c(g=g.reshape(-1), x=x.reshape(-1), dx=adjoint.reshape(-1)):
            return adjoint
    for part in blocks(x):
        u = np.negative(x[part], out=adjoint[part])
        silu_derivative_of_negative(u)
        np.multiply(u, g[part], out=u)
    return adjoint


def silu_of_negative(u: Array) -> None:
    """u becomes silu(-u) = u / (-1 - e^u). Where e^u overflows, the result is -0, which is right."""
    with np.errstate(over="ignore"):
        e = np.exp(u, out=np.empty_like(u))
    np.subtract(-1, e, out=e)
    np.divide(u, e, out=u)


def silu_derivative_of_negative(u: Array) -> None:
    """u becomes silu'(x) = s (1 + x (1 - s)), where x = -u and s = 1 / (1 + e^u)."""
    with np.errstate(over="ignore"):
        s = np.exp(u, out=np.empty_like(u))
    np.add(s, 1, out=s)
    np.divide(1, s, out=s)
    rest = np.subtract(1, s, out=np.empty_like(s))
    np.multiply(u, rest, out=u)
    np.subtract(1, u, out=u)
    np.multiply(u, s, out=u)


# ---------------------------------------------------------------- erf and gelu


# As in erf.c, which has the source: the coefficients on |x| <= 0.46875 (in x^2), and beyond (in |x|).
_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
     3.20937758913846947e3),
    (1, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)  # fmt: skip
_FAR = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
     2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
     1.23033935479799725e3),
    (1, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
     3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip


@erf.fast("numpy")
def erf_numpy(x: Array) -> Any:
    if not is_real(x):
        return NotImplemented
    y = np.empty_like(x)
    if x.flags.c_contiguous and erf_in_c(x=x.reshape(-1), y=y.reshape(-1)):
        return y
    for part in blocks(x):
        r = np.minimum(np.abs(x[part]), 6)
        square = r * r
        near, far = r * _ratio(_NEAR, square), 1 - np.exp(-square) * _ratio(_FAR, r)
        y[part] = np.copysign(np.where(r > 0.46875, far, near), x[part])
    return y


def _ratio(coefficients: Any, t: Array) -> Array:
    """Of two polynomials, whose highest power comes first."""
    top, bottom = (functools.reduce(lambda total, c: total * t + c, each[1:], each[0]) for each in coefficients)
    return top / bottom


@exact_gelu.fast("numpy")
def exact_gelu_numpy(x: Array) -> Any:
    """With F for the rule where there is no compiler, as erf takes long there. To C goes a copy of an array in another
    order, such as half of one, which takes less time than erf in NumPy."""
    if not is_real(x):
        return NotImplemented
    y = np.empty(x.shape, x.dtype)
    if gelu_in_c(x=np.ascontiguousarray(x).reshape(-1), y=y.reshape(-1)):
        return y
    F = normal_cdf(x)
    return np.multiply(x, F, out=y), (F,)


@exact_gelu.fast_vjp("numpy")
def exact_gelu_vjp_numpy(g: Array, _z: Any, x: Array, *, residuals: Any) -> Any:
    if not is_real(g, x):
        return NotImplemented
    if not residuals:
        adjoint = np.empty(x.shape, x.dtype)
        g, x = (np.ascontiguousarray(a).reshape(-1) for a in (g, x))
        return adjoint if gelu_vjp_in_c(g=g, x=x, dx=adjoint.reshape(-1)) else NotImplemented
    f = np.exp(-0.5 * x * x)
    f *= 1 / math.sqrt(2 * math.pi)
    return g * (residuals[0] + x * f)
