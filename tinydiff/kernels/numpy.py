"""The kernels as whole-array operations. They write only into arrays that they made themselves, or are told to change.

Nothing here is special to NumPy; what makes them quick there is working in place, in few passes over memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..backend import Array, xp

PATCH_BYTES = 2**21  # the patches of a convolution that are in work at a time: about the cache of a core

BLOCK_BYTES = 2**20  # what an elementwise kernel works on at a time, so that its temporaries stay in the cache


def blocks(x: Array) -> Iterator[Any]:
    """The first axis in parts of about BLOCK_BYTES."""
    rows = len(x) if x.ndim else 1
    step = max(1, BLOCK_BYTES * rows // max(x.nbytes, 1))
    return (slice(i, i + step) if x.ndim else ... for i in range(0, rows, step))


# ---------------------------------------------------------------- sums


def sum(x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    """Sum over sorted axes. Over the leading axes of a large array the product with a row of ones is the fastest."""
    lead = len(axes)
    if (
        0 < lead < x.ndim
        and axes == tuple(range(lead))
        and x.dtype.kind == "f"
        and x.flags.c_contiguous
        and x.size >= 4096
    ):
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
    """x sigmoid(x)"""
    y = xp.empty_like(x)
    for part in blocks(x):
        s = sigmoid(x[part])
        xp.multiply(s, x[part], out=y[part])
    return y


def silu_backward(g: Array, x: Array) -> Array:
    """g (s + x s (1 - s)) = g s (1 + x - x s)"""
    y = xp.empty_like(x)
    for part in blocks(x):
        s = sigmoid(x[part])
        t = xp.asarray(x[part] * s)  # NumPy makes a scalar of 0-d operands
        xp.subtract(x[part], t, out=t)
        t += 1
        t *= s
        xp.multiply(t, g[part], out=y[part])
    return y


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


# ---------------------------------------------------------------- softmax


def softmax(x: Array, axis: int) -> Array:
    z = x - x.max(axis=axis, keepdims=True)
    xp.exp(z, out=z)
    z /= z.sum(axis=axis, keepdims=True)
    return z


def attention_weights(s: Array, scale: float, mask: Array | None) -> Array:
    """softmax(scale s + mask) along the last axis; s may be changed. A mask of bool says which s count."""
    s *= scale
    if mask is not None:
        s = xp.where(mask, s, -math.inf) if mask.dtype.kind == "b" else s + mask.astype(s.dtype, copy=False)
    return softmax(s, -1)


def attention_weights_backward(g: Array, p: Array, scale: float) -> Array:
    """The cotangent of s from that of p, which is broadcast to it: scale p (g - sum(g p)) along the last axis; g may be
    changed."""
    g -= xp.einsum("...k,...k->...", g, p)[..., None]  # one pass, and no array of the products
    g *= p
    g *= scale
    return g


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
    """The patch under each output pixel: (n, H, W, C) -> (n, OH, OW, kh, kw, C)."""
    n, height, width, c = x.shape
    (kh, kw), (sh, sw), (dh, dw), (oh, ow) = geometry.kernel, geometry.stride, geometry.dilation, geometry.out
    (top, bottom), (left, right) = geometry.padding
    if top or bottom or left or right:
        padded = xp.zeros((n, height + top + bottom, width + left + right, c), x.dtype)
        padded[:, top : top + height, left : left + width] = x
        x = padded
    elif (kh, kw) == (sh, sw) == (1, 1):
        return x.reshape(n, oh, ow, 1, 1, c)
    if c * kw < 8:  # runs too short to copy: a plane for each tap instead, which is as good a matrix, transposed
        planes = xp.empty((kh, kw, c, n, oh, ow), x.dtype)
        for i in range(kh):
            for j in range(kw):
                taps = x[:, i * dh : i * dh + sh * oh : sh, j * dw : j * dw + sw * ow : sw]
                planes[i, j] = taps.transpose(3, 0, 1, 2)
        return planes.transpose(3, 4, 5, 0, 1, 2)
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


def normalize(
    x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """y = u, or silu(u), with u = (x + shift - mean) rstd weight + bias; also the mean of x + shift and
    rstd = 1 / sqrt(var + eps), (A, 1, G). x (A, L, G, D) has its statistics over axes 1 and 3; shift (A, G D) or None;
    weight and bias both (G D,), both (A, G D), or both None."""
    z = x if shift is None else x + _of_positions(shift, x)
    mean = z.mean(axis=(1, 3), keepdims=True)  # (A, 1, G, 1)
    z = z - mean
    rstd = 1 / xp.sqrt((z * z).mean(axis=(1, 3), keepdims=True) + eps)
    u = z * rstd
    if weight is not None:
        u = u * _of_positions(weight, x) + _of_positions(bias, x)
    return u * sigmoid(u) if silu else u, mean[..., 0], rstd[..., 0]


def normalize_backward(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> Any:
    """The cotangents of x, shift, weight and bias, None for what is None, from that of y. With silu g <- g silu'(u);

    x' = (h - mean(h) - xhat mean(h xhat)) rstd with h = g weight,   shift' = sum x',   weight' = sum g xhat,
    bias' = sum g
    """
    z = x if shift is None else x + _of_positions(shift, x)
    w, b = (1, 0) if weight is None else (_of_positions(weight, x), _of_positions(bias, x))
    rstd = rstd[..., None]
    xhat = (z - mean[..., None]) * rstd
    if silu:
        g = silu_backward(g, xhat * w + b)
    h = g * w
    dx = (h - h.mean(axis=(1, 3), keepdims=True) - xhat * (h * xhat).mean(axis=(1, 3), keepdims=True)) * rstd
    dshift = None if shift is None else dx.sum(axis=1).reshape(shift.shape)
    if weight is None:
        return dx, dshift, None, None
    axes = (0, 1) if weight.ndim == 1 else 1
    return dx, dshift, (g * xhat).sum(axis=axes).reshape(weight.shape), g.sum(axis=axes).reshape(weight.shape)


def _of_positions(p: Any, x: Array) -> Array:
    """(C,) or (A, C) -> (1 or A, 1, G, D)"""
    return p.reshape(-1, 1, *x.shape[2:])


# ---------------------------------------------------------------- optimisers: these change p, and their state, in place


def sgd_step(
    p: Array, g: Array, velocity: Array | None, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> None:
    """v = momentum v + g;   p -= lr v, or lr (g + momentum v) with nesterov;
    without momentum p -= lr g. First g += weight_decay p.
    """
    if weight_decay:
        g = g + weight_decay * p
    step = xp.empty_like(p)
    if velocity is None:
        xp.multiply(g, lr, out=step)
    else:
        velocity *= momentum
        velocity += g
        xp.multiply(velocity, lr * momentum if nesterov else lr, out=step)
        if nesterov:
            p -= lr * g
    p -= step


def adam_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decoupled: bool,
    step: int,
) -> None:
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p -= lr (m / c1) / (sqrt(v / c2) + eps)   with c = 1 - b^step

    decay: of the weights, added to g, or, if decoupled, p *= 1 - lr decay before the step.
    """
    (b1, b2), t = betas, xp.empty_like(p)
    c1, root = 1 - b1**step, math.sqrt(1 - b2**step)
    if decay and decoupled:
        p *= 1 - lr * decay
    elif decay:
        g = g + decay * p
    xp.multiply(g, 1 - b1, out=t)
    m *= b1
    m += t
    xp.multiply(g, g, out=t)
    t *= 1 - b2
    v *= b2
    v += t
    xp.sqrt(v, out=t)
    t += eps * root
    xp.divide(m, t, out=t)
    t *= lr * root / c1
    p -= t


def average_step(average: Array, p: Array, decay: float) -> None:
    """average = decay average + (1 - decay) p"""
    t = xp.empty_like(p)
    xp.subtract(p, average, out=t)
    t *= 1 - decay
    average += t
