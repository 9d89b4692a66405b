"""The kernels as whole-array operations. They write only into arrays that they made themselves, or are told to change.

Nothing here is special to NumPy; what makes them quick there is working in place, in few passes over memory.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, xp

PATCH_BYTES = 2**21  # the patches of a convolution that are in work at a time: about the cache of a core

# ---------------------------------------------------------------- sums


def sum(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Sum over sorted axes. Over the leading axes of a large array the product with a row of ones is the fastest."""
    lead = len(axes)
    if 0 < lead < x.ndim and axes == tuple(range(lead)) and x.dtype.kind == "f" and x.flags.c_contiguous and x.size >= 4096:
        rows = x.reshape(math.prod(x.shape[:lead]), -1)
        z = (xp.ones((1, len(rows)), x.dtype) @ rows).reshape(x.shape[lead:])
        return z.reshape((1,) * lead + z.shape) if keepdims else z
    return x.sum(axis=axes, keepdims=keepdims)


# ---------------------------------------------------------------- activations


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
    s = sigmoid(x)
    s *= x
    return s


def silu_backward(g: Array, x: Array) -> Array:
    """g (s + x s (1 - s)) = g s (1 + x - x s)"""
    s = sigmoid(x)
    t = x * s
    xp.subtract(x, t, out=t)
    t += 1
    t *= s
    t *= g
    return t


# Cody 1969, "Rational Chebyshev approximations for the error function": coefficients of the numerator and of the monic
# denominator on |x| <= 0.46875 (in x^2), on 0.46875 < |x| <= 4 (in |x|), and beyond (in x^-2).
_ERF = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3),
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
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1, 1.60837851487422766e-2, 6.58749161529837803e-4),
    (2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
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
    tail = xp.where(far, (1 / math.sqrt(math.pi) - inverse * _ratio(_ERFC_FAR, inverse)) / large, _ratio(_ERFC_MIDDLE, middle))
    outer = 1 - xp.exp(-large * large) * tail
    return xp.where(near, inner, xp.where(x < 0, -outer, outer)).astype(x.dtype, copy=False)


# ---------------------------------------------------------------- softmax


def softmax(x: Array, axis: int) -> Array:
    z = x - x.max(axis=axis, keepdims=True)
    xp.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


# ---------------------------------------------------------------- indexing


def index_add(z: Array, index: Any, values: Array) -> None:
    """z[index] += values, counting an element that occurs several times as often as it occurs."""
    if z.dtype.kind == "c":
        index_add(z.real, index, values.real)
        index_add(z.imag, index, values.imag)
    else:
        xp.add.at(z, index, values)


# ---------------------------------------------------------------- convolution


def im2col(x: Array, geometry: Any) -> Array:
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C), contiguous."""
    n, height, width, c = x.shape
    (kh, kw), (sh, sw), (dh, dw), (oh, ow) = geometry.kernel, geometry.stride, geometry.dilation, geometry.out
    (top, bottom), (left, right) = geometry.padding
    if top or bottom or left or right:
        padded = xp.zeros((n, height + top + bottom, width + left + right, c), x.dtype)
        padded[:, top : top + height, left : left + width] = x
        x = padded
    elif (kh, kw) == (sh, sw) == (1, 1):
        return x.reshape(n, oh, ow, 1, 1, c)
    x = xp.ascontiguousarray(x)
    a, b, r, q = x.strides
    windows = xp.lib.stride_tricks.as_strided(x, (n, oh, ow, kh, kw, c), (a, b * sh, r * sw, b * dh, r * dw, q))
    return xp.ascontiguousarray(windows)


def col2im(patches: Array, geometry: Any) -> Array:
    """The transpose of im2col: every patch is added where it was taken, (n, OH, OW, kh, kw, C) -> (n, H, W, C)."""
    n, oh, ow, kh, kw, c = patches.shape
    (sh, sw), (dh, dw), (height, width) = geometry.stride, geometry.dilation, geometry.size
    (top, bottom), (left, right) = geometry.padding
    x = xp.zeros((n, height + top + bottom, width + left + right, c), patches.dtype)
    for i in range(kh):
        for j in range(kw):
            x[:, i * dh : i * dh + sh * oh : sh, j * dw : j * dw + sw * ow : sw] += patches[:, :, :, i, j]
    return x[:, top : top + height, left : left + width]


# ---------------------------------------------------------------- normalisation


def normalize(x: Array, weight: Array | None, bias: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """y = (x - mean) / sqrt(var + eps) weight + bias over axes 1 and 3 of (A, L, G, D), with weight and bias (G D,);
    also the mean and 1 / sqrt(var + eps), (A, 1, G, 1)."""
    count = x.shape[1] * x.shape[3]
    mean = _sum_sets(x) / count
    y = x - mean
    rstd = 1 / xp.sqrt(_sum_sets(y * y) / count + eps)
    if weight is None or bias is None:
        y *= rstd
        return y, mean, rstd
    y *= rstd * weight.reshape(x.shape[2:])  # (A, 1, G, D)
    y += bias.reshape(x.shape[2:])
    return y, mean, rstd


def normalize_backward(g: Array, x: Array, mean: Array, rstd: Array, weight: Array | None) -> Any:
    """x' = (h - mean(h) - xhat mean(h xhat)) rstd with h = g weight,   weight' = sum g xhat,   bias' = sum g

    The sums over L are taken first, (A, G, D), before the weight comes in: it does not depend on L.
    """
    count = x.shape[1] * x.shape[3]
    xhat = x - mean
    xhat *= rstd
    g_sum, gx_sum = _sum_length(g), _sum_length(g * xhat)  # (A, 1, G, D)
    scale = rstd if weight is None else rstd * weight.reshape(x.shape[2:])
    mean_h, mean_hx = (((s if weight is None else s * weight.reshape(x.shape[2:])).sum(axis=3, keepdims=True) / count) for s in (g_sum, gx_sum))
    xhat *= -mean_hx * rstd
    xhat -= mean_h * rstd
    xhat += g * scale
    if weight is None:
        return xhat, None, None
    return xhat, gx_sum.sum(axis=0).reshape(-1), g_sum.sum(axis=0).reshape(-1)


def _sum_length(x: Array) -> Array:
    """(A, L, G, D) -> (A, 1, G, D), as a product with a row of ones, which is faster than a sum over a middle axis."""
    a, length, groups, d = x.shape
    if length == 1:
        return x
    return (xp.ones((1, length), x.dtype) @ x.reshape(a, length, groups * d)).reshape(a, 1, groups, d)


def _sum_sets(x: Array) -> Array:
    """(A, L, G, D) -> (A, 1, G, 1)"""
    return _sum_length(x).sum(axis=3, keepdims=True)
