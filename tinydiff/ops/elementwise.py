"""Arithmetic and elementary functions, element by element, with NumPy's broadcasting.

In each rule g is the adjoint of z, z̄ in the formulas. The engine sums the adjoint of an input that broadcasting
has stretched to the shape of that input, so no rule here deals with shapes.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, xp
from ..engine import op
from ..operators import array_of


def floating(x: Any) -> Any:
    """x as a function with real values takes it: integers, which would wrap, in float32, or in float64 if they are
    longer than 16 bits."""
    if not hasattr(x, "dtype") or x.dtype.kind not in "iub":
        return x
    return x.astype(xp.promote_types(x.dtype, "float32"))


@op
def add(x: Any, y: Any) -> Any:
    """z = x + y

    dz = dx + dy          x̄ = z̄,   ȳ = z̄
    """
    return x + y


@add.vjp
def add_vjp(g: Any, _z: Any, _x: Any, _y: Any) -> Any:
    return g, g


@op
def subtract(x: Any, y: Any) -> Any:
    """z = x - y

    dz = dx - dy          x̄ = z̄,   ȳ = -z̄
    """
    return x - y


@subtract.vjp
def subtract_vjp(g: Any, _z: Any, _x: Any, _y: Any) -> Any:
    return g, lambda: -g


@op
def multiply(x: Any, y: Any) -> Any:
    """z = x y

    dz = y dx + x dy          x̄ = z̄ y,   ȳ = z̄ x
    """
    return x * y


@multiply.vjp
def multiply_vjp(g: Any, _z: Any, x: Any, y: Any) -> Any:
    return lambda: g * y, lambda: g * x


@op
def divide(x: Any, y: Any) -> Any:
    """z = x / y

    dz = dx / y - x dy / y^2          x̄ = z̄ / y,   ȳ = -z̄ z / y
    """
    return x / y


@divide.vjp
def divide_vjp(g: Any, z: Any, _x: Any, y: Any) -> Any:
    return lambda: g / y, lambda: -g * z / y


@op
def negative(x: Any) -> Any:
    """z = -x

    dz = -dx          x̄ = -z̄
    """
    return -x


@negative.vjp
def negative_vjp(g: Any, _z: Any, _x: Any) -> Any:
    return -g


@op
def power(x: Any, y: Any) -> Any:
    """z = x^y

    dz = y x^(y-1) dx + z log(x) dy          x̄ = z̄ y x^(y-1),   ȳ = z̄ z log x

    At 0: x^0 is constant, also at x = 0, so x̄ = 0 there; and x̄ = 0 for 0 < y < 1, where the derivative is infinite, as
    for sqrt. ȳ = 0 at x = 0, if y >= 0. There is no ȳ for x < 0, nor for x = 0 with y < 0: it is NaN.
    """
    return x**y


@power.vjp
def power_vjp(g: Any, z: Any, x: Any, y: Any) -> Any:
    def wrt_base() -> Any:
        if isinstance(y, complex) or isinstance(y, (int, float)) and not 0 <= y < 1:
            return g * (y * x ** (y - 1))
        if isinstance(y, (int, float)):  # x^(y-1) = z / x, and 0 in place of an infinite derivative
            return g * where(x == 0, 0.0, y * z / where(x == 0, 1.0, x))
        flat = (x == 0) & (0 <= y) & (y < 1)
        return where(flat, 0.0, g * y * where(flat, 1.0, x) ** (y - 1))

    def wrt_exponent() -> Any:
        if isinstance(x, (int, float)):
            return g * z * (math.log(x) if x > 0 else 0.0 if x == 0 else math.nan)
        return g * z * log(where(x == 0, 1.0, x))

    return wrt_base, wrt_exponent


@op(holomorphic=False)
def abs(x: Any) -> Any:
    """z = |x|

    dz = sign(x) dx          x̄ = z̄ sign x

    At 0: 0, the middle of the subgradients.
    """
    return xp.abs(x)


@abs.vjp
def abs_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g * sign(x)


@op(holomorphic=False)
def sign(x: Any) -> Any:
    """z = -1, 0 or 1 as x < 0, x = 0, x > 0

    dz = 0          x̄ = 0

    At 0: 0, at the jump as everywhere else.
    """
    return xp.sign(x)


@sign.vjp
def sign_vjp(g: Any, _z: Any, _x: Any) -> Any:
    return g * 0.0


@op
def exp(x: Any) -> Any:
    """z = e^x

    dz = z dx          x̄ = z̄ z
    """
    return xp.exp(floating(x))


@exp.vjp
def exp_vjp(g: Any, z: Any, _x: Any) -> Any:
    return g * z


@op
def expm1(x: Any) -> Any:
    """z = e^x - 1, accurate near x = 0

    dz = (z + 1) dx          x̄ = z̄ (z + 1)
    """
    return xp.expm1(floating(x))


@expm1.vjp
def expm1_vjp(g: Any, z: Any, _x: Any) -> Any:
    return g * (z + 1)


@op
def log(x: Any) -> Any:
    """z = log x

    dz = dx / x          x̄ = z̄ / x
    """
    return xp.log(floating(x))


@log.vjp
def log_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g / x


@op
def log1p(x: Any) -> Any:
    """z = log(1 + x), accurate near x = 0

    dz = dx / (1 + x)          x̄ = z̄ / (1 + x)
    """
    return xp.log1p(floating(x))


@log1p.vjp
def log1p_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g / (x + 1)


@op
def sqrt(x: Any) -> Any:
    """z = sqrt x

    dz = dx / (2 z)          x̄ = z̄ / (2 z)

    At 0: 0, where the derivative is infinite, so that the norm of a zero vector has the gradient 0 and no NaN.
    """
    return xp.sqrt(floating(x))


@sqrt.vjp
def sqrt_vjp(g: Any, z: Any, _x: Any) -> Any:
    return where(z == 0, 0.0, g / (2 * where(z == 0, 1.0, z)))


@op
def square(x: Any) -> Any:
    """z = x^2

    dz = 2 x dx          x̄ = 2 z̄ x
    """
    return x * x


@square.vjp
def square_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g * (2 * x)


@op
def sin(x: Any) -> Any:
    """z = sin x

    dz = cos(x) dx          x̄ = z̄ cos x
    """
    return xp.sin(floating(x))


@sin.vjp
def sin_vjp(g: Any, _z: Any, x: Any) -> Any:
    return g * cos(x)


@op
def cos(x: Any) -> Any:
    """z = cos x

    dz = -sin(x) dx          x̄ = -z̄ sin x
    """
    return xp.cos(floating(x))


@cos.vjp
def cos_vjp(g: Any, _z: Any, x: Any) -> Any:
    return -g * sin(x)


@op
def tanh(x: Any) -> Any:
    """z = tanh x

    dz = (1 - z^2) dx          x̄ = z̄ (1 - z^2)
    """
    return xp.tanh(floating(x))


@tanh.vjp
def tanh_vjp(g: Any, z: Any, _x: Any) -> Any:
    return g * (1 - z * z)


@op
def clip(x: Any, *, low: float | Array | None = None, high: float | Array | None = None) -> Any:
    """z = min(max(x, low), high); a bound that is None does not bind

    dz = dx where low <= x <= high, else 0          x̄ = z̄ where low <= x <= high, else 0

    At ties: 1 on the bounds, so a value that was clipped onto a bound can still leave it.
    """
    return xp.clip(x, array_of(low), array_of(high))


@clip.vjp
def clip_vjp(g: Any, _z: Any, x: Any, *, low: Any, high: Any) -> Any:
    inside = x == x
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return where(inside, g, 0.0)


@op
def where(condition: Any, x: Any, y: Any) -> Any:
    """z = x where the condition holds, y elsewhere

    dz = dx where condition, else dy          x̄ = z̄ where condition, else 0,   ȳ = 0 where condition, else z̄
    """
    return xp.where(condition, x, y)


@where.vjp
def where_vjp(g: Any, _z: Any, condition: Any, _x: Any, _y: Any) -> Any:
    return None, lambda: where(condition, g, 0.0), lambda: where(condition, 0.0, g)


@op
def maximum(x: Any, y: Any) -> Any:
    """z = the larger of x and y

    x̄ = z̄ where x > y,   ȳ = z̄ where y > x

    At ties: half each.
    """
    return xp.maximum(x, y)


@maximum.vjp
def maximum_vjp(g: Any, _z: Any, x: Any, y: Any) -> Any:
    half = where(x == y, 0.5 * g, 0.0)
    return lambda: where(x > y, g, half), lambda: where(x < y, g, half)


@op
def minimum(x: Any, y: Any) -> Any:
    """z = the smaller of x and y

    x̄ = z̄ where x < y,   ȳ = z̄ where y < x

    At ties: half each.
    """
    return xp.minimum(x, y)


@minimum.vjp
def minimum_vjp(g: Any, _z: Any, x: Any, y: Any) -> Any:
    half = where(x == y, 0.5 * g, 0.0)
    return lambda: where(x < y, g, half), lambda: where(x > y, g, half)


@op(holomorphic=False)
def astype(x: Any, *, dtype: Any) -> Any:
    """z = x in another dtype

    x̄ = z̄,   which the engine casts to the dtype of x
    """
    return x.astype(dtype)


@astype.vjp
def astype_vjp(g: Any, _z: Any, _x: Any, *, dtype: Any) -> Any:
    return g


@op
def copy(x: Any) -> Any:
    """z = x, in memory of its own

    x̄ = z̄
    """
    return x.copy()


@copy.vjp
def copy_vjp(g: Any, _z: Any, _x: Any) -> Any:
    return g
