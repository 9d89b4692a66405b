"""The kernels as whole-array operations. They write only into arrays that they made themselves, or are told to change.

Nothing here is special to NumPy; what makes them quick there is working in place, in few passes over memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy

from ..backend import Array, xp

PATCH_BYTES = 2**21  # the patches of a convolution that are in work at a time: about the cache of a core

BLOCK_BYTES = 2**20  # what an elementwise kernel works on at a time, so that its temporaries stay in the cache

ROW = 1024  # elements: beside a row of these, what NumPy spends on starting it is little


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


def col2im(patches: Array, x: Array, geometry: Any) -> None:
    """The transpose of im2col: every patch is added where it was taken, (n, OH, OW, kh, kw, C) into x (n, H, W, C),
    whatever was there before."""
    n, oh, ow, kh, kw, c = patches.shape
    (sh, sw), (dh, dw), (height, width) = geometry.stride, geometry.dilation, geometry.size
    (top, bottom), (left, right) = geometry.padding
    whole = x
    if top or bottom or left or right:
        whole = xp.empty((n, height + top + bottom, width + left + right, c), x.dtype)
    if (dh, dw) != (1, 1) or kh < sh or kw < sw:
        whole[...] = 0
        first = 0, 0
    else:  # the taps of the first stride meet every pixel once, but for what the last patch leaves over
        whole[:, sh * oh :] = 0
        whole[:, :, sw * ow :] = 0
        first = sh, sw
    # Along a row the taps of one stride lie side by side, in the image and in the patch: they go together.
    step = sw if dw == 1 else 1
    a, b, r, q = whole.strides
    for i in range(kh):
        for j in range(0, kw, step):
            taps = patches[:, :, :, i, j : j + step]  # (n, OH, OW, step, C)
            at = whole[:, i * dh :, j * dw :]
            pixels = xp.lib.stride_tricks.as_strided(at, taps.shape, (a, b * sh, r * sw, r, q))
            if i < first[0] and j < first[1]:
                pixels[...] = taps
            else:
                pixels += taps
    if whole is not x:
        x[...] = whole[:, top : top + height, left : left + width]


# ---------------------------------------------------------------- normalisation


def normalize(
    x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """y = xhat weight + bias, or silu of that, with xhat = (x + shift - mean) / sqrt(var + eps) over axes 1 and 3 of
    (A, L, G, D); also the mean (of x + shift) and 1 / sqrt(var + eps), (A, 1, G).

    shift: None, or (A, G D), the same at every position of a sample. weight, bias: None, (G D,), or (A, G D).
    """
    a, length, groups, d = x.shape
    rows = _Rows(a, length, groups * d, x.itemsize)
    x3, y = x.reshape(rows.shape), xp.empty(rows.shape, x.dtype)  # (A, R, K)

    sums = rows.sums(x.dtype)
    for block in rows.blocks:
        sums.add(block, x3[block])
    total = sums.total if shift is None else sums.total + length * shift  # (A, C)
    mean = _over_groups(total, groups) / (length * d)  # (A, G)
    centre = _to_channels(mean, d) if shift is None else _to_channels(mean, d) - shift
    centre = rows.repeat(centre)  # (A, 1, K)

    squares = rows.sums(x.dtype)
    for block in rows.blocks:
        z = xp.subtract(x3[block], centre[block[0]], out=y[block])
        squares.add(block, z * z)
    rstd = 1 / xp.sqrt(_over_groups(squares.total, groups) / (length * d) + eps)
    scale = _to_channels(rstd, d) if weight is None else _to_channels(rstd, d) * weight
    scale, offset = rows.repeat(-scale if silu else scale), None if bias is None else rows.repeat(bias)

    for block in rows.blocks:
        z = y[block]
        z *= scale[block[0]]
        if silu:
            if offset is not None:
                z -= offset[block[0]]
            _silu_of_negative(z)
        elif offset is not None:
            z += offset[block[0]]
    return y.reshape(x.shape), mean[:, None], rstd[:, None]


def normalize_backward(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The cotangents of x, shift, weight and bias. With h = g, or g silu'(xhat weight + bias),

        x' = rstd (h weight - mean(h weight) - xhat mean(h weight xhat)),   shift' = sum x',
        weight' = sum h xhat,   bias' = sum h

    That is x' = p h + q z + r with z = x + shift - mean, where p, q and r are the same at every position: so sums over
    the positions come first, and shift' follows from them.
    """
    a, length, groups, d = x.shape
    rows = _Rows(a, length, groups * d, x.itemsize)
    mean, rstd = mean[:, 0], rstd[:, 0]  # (A, G)
    x3, g3, dx = x.reshape(rows.shape), g.reshape(rows.shape), xp.empty(rows.shape, x.dtype)  # (A, R, K)
    h = xp.empty_like(dx) if silu else g3
    centre, scale = _to_channels(mean, d), _to_channels(rstd, d)
    centre, p = centre if shift is None else centre - shift, scale if weight is None else scale * weight
    centre, slope, offset = rows.repeat(centre), rows.repeat(-p), None if bias is None else rows.repeat(bias)

    h_sums, hz_sums, z_sums = (rows.sums(x.dtype) for _ in range(3))
    for block in rows.blocks:
        z = xp.subtract(x3[block], centre[block[0]], out=dx[block])
        if silu:
            u = xp.multiply(z, slope[block[0]], out=h[block])
            if offset is not None:
                u -= offset[block[0]]
            _slope_of_silu_of_negative(u)
            u *= g3[block]
        h_sums.add(block, h[block])
        hz_sums.add(block, h[block] * z)
        if shift is not None:
            z_sums.add(block, z)
    h_sum, hz_sum = h_sums.total, hz_sums.total  # (A, C)
    hw_sum, hwz_sum = (h_sum, hz_sum) if weight is None else (h_sum * weight, hz_sum * weight)
    q = _to_channels(rstd**3 * _over_groups(hwz_sum, groups) / -(length * d), d)
    r = _to_channels(rstd * _over_groups(hw_sum, groups) / -(length * d), d)

    p3, q3, r3 = rows.repeat(p), rows.repeat(q), rows.repeat(r)
    for block in rows.blocks:
        z = dx[block]
        z *= q3[block[0]]
        z += xp.multiply(h[block], p3[block[0]], out=h[block] if silu else None)
        z += r3[block[0]]
    dshift = None if shift is None else p * h_sum + q * z_sums.total + length * r
    dweight, dbias = None if weight is None else scale * hz_sum, None if bias is None else h_sum
    if weight is not None and weight.ndim == 1:
        dweight, dbias = dweight.sum(axis=0), dbias.sum(axis=0)
    return dx.reshape(x.shape), dshift, dweight, dbias


class _Rows:
    """(A, L, C) seen as (A, R, K), several positions in a row, and cut into blocks that fit in the cache.

    What is the same at every position is broadcast along R. NumPy starts anew for every row, and a row of one position,
    the channels, is short.
    """

    def __init__(self, a: int, length: int, channels: int, itemsize: int):
        self.channels, self.fold = channels, _fold(length, channels)
        self.shape = a, r, k = a, length // self.fold, self.fold * channels
        step = max(1, BLOCK_BYTES // max(k * itemsize, 1))
        samples = max(1, step // max(r, 1))
        self.blocks = [
            (slice(i, i + samples), slice(j, j + step)) for i in range(0, a, samples) for j in range(0, r, step)
        ]

    def repeat(self, c: Array) -> Array:
        """(C,), (A, C) or, for all channels, (A, 1) -> (A, 1, K)"""
        a, _, k = self.shape
        c = c[None, None] if c.ndim == 1 else c[:, None]
        if c.shape[2] == self.channels:
            c = xp.broadcast_to(c, (len(c), self.fold, self.channels)).reshape(len(c), 1, k)
        return xp.broadcast_to(c, (a, 1, k))

    def sums(self, dtype: Any) -> _Sums:
        return _Sums(self, dtype)


class _Sums:
    """The sum over the positions of each sample, (A, C), block by block, as products with a row of ones: that is faster
    than a sum over a middle axis."""

    def __init__(self, rows: _Rows, dtype: Any):
        self.rows, (a, r, _) = rows, rows.shape
        self.total = xp.zeros((a, rows.channels), dtype)
        self.ones = xp.ones((1, r * rows.fold), dtype)

    def add(self, block: Any, x: Array) -> None:
        n, r, _ = x.shape
        x = x.reshape(n, r * self.rows.fold, self.rows.channels)  # (n, L, C)
        self.total[block[0]] += (x if x.shape[1] == 1 else self.ones[:, : x.shape[1]] @ x)[:, 0]


@functools.cache
def _fold(length: int, channels: int) -> int:
    """The fewest positions that make a row of ROW elements, of those that divide the length; or else all of them."""
    return next((k for k in range(1, length) if length % k == 0 and k * channels >= ROW), max(length, 1))


def _over_groups(x: Array, groups: int) -> Array:
    """(A, C) -> (A, G)"""
    return x if groups == x.shape[1] else x.reshape(len(x), groups, x.shape[1] // groups).sum(axis=2)


def _to_channels(x: Array, d: int) -> Array:
    """(A, G) -> (A, C): each channel has the value of its group; or (A, 1), if that is the same for all channels."""
    return x if d == 1 or x.shape[1] == 1 else xp.repeat(x, d, axis=1)


def _silu_of_negative(u: Array) -> None:
    """u becomes silu(-u) = u / (-1 - e^u). Where e^u overflows, that is -0, as it should be."""
    with numpy.errstate(over="ignore"):
        e = xp.exp(u)
    xp.subtract(-1, e, out=e)
    u /= e


def _slope_of_silu_of_negative(u: Array) -> None:
    """u becomes silu'(y) = s (1 + y - y s), where y = -u and s = 1 / (1 + e^u)."""
    with numpy.errstate(over="ignore"):
        s = xp.exp(u)
    s += 1
    xp.divide(1, s, out=s)
    t = u * s
    u -= 1
    xp.subtract(t, u, out=u)
    u *= s


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
