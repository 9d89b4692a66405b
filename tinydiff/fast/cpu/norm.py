"""Normalisation, with the shift before it and silu after it: in C (norm.c), or, where there is no compiler, in blocks
that stay in the cache."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...backend import Array
from ...ops.norm import normalize
from .. import grouped_norm
from ..taken import is_real
from .activation import BLOCK_BYTES, blocks, silu_derivative_of_negative, silu_of_negative
from .compiled import Function

SECTIONS = 8  # of the rows of a layer norm: their sums may be made at the same time, but are always the same
ROW = 1024  # elements: for rows of this length, the time that NumPy needs to start a row is small


in_c = Function(
    "norm",
    "in x(A,L,C), in shift(A,C)?, in weight(W,C)?, in bias(W,C)?, out y(A,L,C), out mean(A,G), out rstd(A,G), "
    "int A, int L, int C, int G, int W, real eps, int silu, "
    "int part, int parts",
)
vjp_in_c = Function(
    "norm_vjp",
    "in g(A,L,C), in x(A,L,C), in mean(A,G), in rstd(A,G), in shift(A,C)?, in weight(W,C)?, in bias(W,C)?, "
    "out dx(A,L,C), out dshift(A,C)?, out dweight(A,C)?, out dbias(A,C)?, "
    "int A, int L, int C, int G, int W, int silu, int part, int parts",
)
layer_norm_in_c = Function(
    "layer_norm",
    "in x(A,C), in weight(C)?, in bias(C)?, out y(A,C), out mean(A), out rstd(A), int A, int C, real eps, "
    "int part, int parts",
)
layer_norm_vjp_in_c = Function(
    "layer_norm_vjp",
    "in g(A,C), in x(A,C), in mean(A), in rstd(A), in weight(C)?, out dx(A,C), out float64 sums(S,2,C), "
    "int A, int C, int S, int part, int parts",
)


def norm(x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool) -> Any:
    """As blocked_norm."""
    a, length, groups, d = x.shape
    y, mean, rstd = (np.empty(shape, x.dtype) for shape in (x.shape, (a, groups), (a, groups)))
    done = in_c(
        x=_rows(x), shift=_whole(shift), weight=_per_sample(weight), bias=_per_sample(bias), y=_rows(y), mean=mean,
        rstd=rstd, W=1, eps=eps, silu=silu,
    )  # fmt: skip
    if not done:
        return blocked_norm(x, shift, weight, bias, eps, silu)
    return y, mean[:, None], rstd[:, None]  # (A, G) -> (A, 1, G)


def norm_vjp(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> Any:
    """As blocked_norm_vjp."""
    dx = np.empty(x.shape, x.dtype)
    dshift = None if shift is None else np.empty(shift.shape, x.dtype)
    dweight, dbias = (None if p is None else np.empty((x.shape[0], p.shape[-1]), p.dtype) for p in (weight, bias))
    done = vjp_in_c(
        g=_rows(g), x=_rows(x), mean=_whole(mean[:, 0]), rstd=_whole(rstd[:, 0]), shift=_whole(shift),
        weight=_per_sample(weight), bias=_per_sample(bias), dx=_rows(dx), dshift=dshift, dweight=dweight, dbias=dbias,
        W=1, silu=silu,
    )  # fmt: skip
    if not done:
        return blocked_norm_vjp(g, x, mean, rstd, shift, weight, bias, silu)
    if weight is not None and weight.ndim == 1:  # the same for all samples
        dweight, dbias = (p.sum(axis=0, dtype=np.float64).astype(p.dtype) for p in (dweight, dbias))  # type: ignore
    return dx, dshift, dweight, dbias


def _whole(a: Array | None) -> Array | None:
    return None if a is None else np.ascontiguousarray(a)


def _rows(a: Array) -> Array:
    """(A, L, G, D) -> (A, L, C)"""
    return np.ascontiguousarray(a).reshape(*a.shape[:2], -1)


def _per_sample(p: Array | None) -> Array | None:
    """(C,) -> (1, C); (A, C) stays."""
    return None if p is None else np.ascontiguousarray(p).reshape(-1, p.shape[-1])


def blocked_norm(
    x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """y = xhat weight + bias, or silu of that, with xhat = (x + shift - mean) / sqrt(var + eps) over axes 1 and 3 of
    (A, L, G, D); also the mean (of x + shift) and 1 / sqrt(var + eps), (A, 1, G).

    shift: None, or (A, G D), the same at every position of a sample. weight, bias: None, (G D,), or (A, G D).
    """
    a, length, groups, d = x.shape
    if length == 1:
        return _norm_of_positions(x, shift, weight, bias, eps, silu)
    rows = _Rows(a, length, groups * d, x.itemsize)
    x3, y = x.reshape(rows.shape), np.empty(rows.shape, x.dtype)  # (A, R, K)

    sums = rows.sums(x.dtype)
    for block in rows.blocks:
        sums.add(block, x3[block])
    total = sums.total if shift is None else sums.total + length * shift  # (A, C)
    mean = _over_groups(total, groups) / (length * d)  # (A, G)
    centre = _to_channels(mean, d) if shift is None else _to_channels(mean, d) - shift
    centre = rows.repeat(centre)  # (A, 1, K)

    squares = rows.sums(x.dtype)
    for block in rows.blocks:
        z = np.subtract(x3[block], centre[block[0]], out=y[block])
        squares.add(block, z * z)
    rstd = 1 / np.sqrt(_over_groups(squares.total, groups) / (length * d) + eps)
    scale = _to_channels(rstd, d) if weight is None else _to_channels(rstd, d) * weight
    scale, offset = rows.repeat(-scale if silu else scale), None if bias is None else rows.repeat(bias)

    for block in rows.blocks:
        z = y[block]
        z *= scale[block[0]]
        if silu:
            if offset is not None:
                z -= offset[block[0]]
            silu_of_negative(z)
        elif offset is not None:
            z += offset[block[0]]
    return y.reshape(x.shape), mean[:, None], rstd[:, None]


def blocked_norm_vjp(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The adjoints of x, shift, weight and bias. With h = g, or g silu'(xhat weight + bias),

        x̄ = rstd (h weight - mean(h weight) - xhat mean(h weight xhat)),   shift̄ = sum x̄,
        weight̄ = sum h xhat,   bias̄ = sum h

    That is x̄ = p h + q z + r with z = x + shift - mean, where p, q and r are the same at every position. So the sums
    over the positions are computed first, and shift̄ follows from them.
    """
    a, length, groups, d = x.shape
    if length == 1:
        return _norm_of_positions_vjp(g, x, mean, rstd, shift, weight, bias, silu)
    rows = _Rows(a, length, groups * d, x.itemsize)
    mean, rstd = mean[:, 0], rstd[:, 0]  # (A, G)
    x3, g3, dx = x.reshape(rows.shape), g.reshape(rows.shape), np.empty(rows.shape, x.dtype)  # (A, R, K)
    h = np.empty_like(dx) if silu else g3
    centre, scale = _to_channels(mean, d), _to_channels(rstd, d)
    centre, p = centre if shift is None else centre - shift, scale if weight is None else scale * weight
    centre, minus_p, offset = rows.repeat(centre), rows.repeat(-p), None if bias is None else rows.repeat(bias)

    h_sums, hz_sums, z_sums = (rows.sums(x.dtype) for _ in range(3))
    for block in rows.blocks:
        z = np.subtract(x3[block], centre[block[0]], out=dx[block])
        if silu:
            u = np.multiply(z, minus_p[block[0]], out=h[block])
            if offset is not None:
                u -= offset[block[0]]
            silu_derivative_of_negative(u)
            u *= g3[block]
        h_sums.add(block, h[block])
        hz_sums.add(block, h[block] * z)
        if shift is not None:
            z_sums.add(block, z)
    h_sum, hz_sum = h_sums.total, hz_sums.total  # (A, C)
    hw_sum, hwz_sum = (h_sum, hz_sum) if weight is None else (h_sum * weight, hz_sum * weight)
    # Multiplied from the left, because the third power of rstd by itself may overflow.
    q = _to_channels(_over_groups(hwz_sum, groups) / -(length * d) * rstd * rstd * rstd, d)
    r = _to_channels(rstd * _over_groups(hw_sum, groups) / -(length * d), d)

    p3, q3, r3 = rows.repeat(p), rows.repeat(q), rows.repeat(r)
    for block in rows.blocks:
        z = dx[block]
        z *= q3[block[0]]
        z += np.multiply(h[block], p3[block[0]], out=h[block] if silu else None)
        z += r3[block[0]]
    dshift = None if shift is None else p * h_sum + q * z_sums.total + length * r
    dweight, dbias = None if weight is None else scale * hz_sum, None if bias is None else h_sum
    if dweight is not None and dbias is not None and weight.ndim == 1:  # type: ignore[union-attr]
        dweight, dbias = dweight.sum(axis=0), dbias.sum(axis=0)
    return dx.reshape(x.shape), dshift, dweight, dbias


def _norm_of_positions(x: Array, shift: Any, weight: Any, bias: Any, eps: float, silu: bool) -> Any:
    """blocked_norm for L = 1, as in layer norm, where the elements of one mean are contiguous."""
    a, _, groups, d = x.shape
    x3, y = x.reshape(a, groups, d), np.empty((a, groups, d), x.dtype)  # (A, G, D)
    mean, rstd = np.empty((a, groups, 1), x.dtype), np.empty((a, groups, 1), x.dtype)
    for part in blocks(x3):
        shifted = x3[part] if shift is None else x3[part] + shift[part].reshape(-1, groups, d)
        mean[part] = _over_set(shifted) / d
        z = np.subtract(shifted, mean[part], out=y[part])
        rstd[part] = 1 / np.sqrt(_over_set(z * z) / d + eps)
        z *= rstd[part]
        if weight is not None:
            z *= _of_part(weight, part, groups)
            z += _of_part(bias, part, groups)
        if silu:
            np.negative(z, out=z)
            silu_of_negative(z)
    return y.reshape(x.shape), mean.reshape(a, 1, groups), rstd.reshape(a, 1, groups)


def _norm_of_positions_vjp(
    g: Array, x: Array, mean: Array, rstd: Array, shift: Any, weight: Any, bias: Any, silu: bool
) -> Any:
    a, _, groups, d = x.shape
    x3, g3, dx = x.reshape(a, groups, d), g.reshape(a, groups, d), np.empty((a, groups, d), x.dtype)
    mean, rstd = mean.reshape(a, groups, 1), rstd.reshape(a, groups, 1)  # (A, 1, G) -> (A, G, 1)
    dweight, dbias = (None if p is None else np.zeros(p.shape, x.dtype) for p in (weight, bias))
    for part in blocks(x3):
        xhat = np.subtract(x3[part], mean[part], out=dx[part])
        if shift is not None:
            xhat += shift[part].reshape(-1, groups, d)
        xhat *= rstd[part]
        h, w = g3[part], None if weight is None else _of_part(weight, part, groups)
        if silu:
            u = -xhat if w is None else xhat * -w
            if bias is not None:
                u -= _of_part(bias, part, groups)
            silu_derivative_of_negative(u)
            h = np.multiply(u, h, out=u)
        if dweight is not None and dbias is not None:
            for total, values in ((dweight, h * xhat), (dbias, h)):
                if total.ndim == 2:
                    total[part] = values.reshape(-1, groups * d)
                else:
                    total += np.ones(len(values), x.dtype) @ values.reshape(-1, groups * d)
        hw = h if w is None else h * w
        xhat *= _over_set(hw * xhat) / d
        xhat += _over_set(hw) / d
        np.subtract(hw, xhat, out=xhat)
        xhat *= rstd[part]
    return dx.reshape(x.shape), None if shift is None else dx.reshape(a, groups * d), dweight, dbias


def _over_set(x: Array) -> Array:
    """(n, G, D) -> (n, G, 1), as a product with a column of ones."""
    n, groups, d = x.shape
    return (x.reshape(n * groups, d) @ np.ones((d, 1), x.dtype)).reshape(n, groups, 1)


def _of_part(p: Array, part: slice, groups: int) -> Array:
    """A parameter (C,), or its rows for n of the samples (A, C): (1 or n, G, D)"""
    p = p[None] if p.ndim == 1 else p[part]
    return p.reshape(len(p), groups, p.shape[1] // groups)


class _Rows:
    """(A, L, C) seen as (A, R, K), with several positions in a row, and cut into blocks that fit in the cache.

    Values that are the same at every position are broadcast along R. NumPy needs some time to start each row, and a row
    of one position, C channels, would be short.
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
            c = np.broadcast_to(c, (len(c), self.fold, self.channels)).reshape(len(c), 1, k)
        return np.broadcast_to(c, (a, 1, k))  # (A, 1, K)

    def sums(self, dtype: Any) -> _Sums:
        return _Sums(self, dtype)


class _Sums:
    """The sum over the positions of each sample, (A, C), block by block, by products with a row of ones, which are
    faster than sums over a middle axis."""

    def __init__(self, rows: _Rows, dtype: Any):
        self.rows, (a, r, _) = rows, rows.shape
        self.total = np.zeros((a, rows.channels), dtype)
        self.ones = np.ones((1, r * rows.fold), dtype)

    def add(self, block: Any, x: Array) -> None:
        n, r, _ = x.shape
        x = x.reshape(n, r * self.rows.fold, self.rows.channels)  # (n, L, C)
        self.total[block[0]] += (self.ones[:, : x.shape[1]] @ x)[:, 0]


@functools.lru_cache(1024)
def _fold(length: int, channels: int) -> int:
    """How many positions make a row: the smallest divisor of the length that gives at least ROW elements, and at most
    about eight times as many; without one, a single position (or all of them, if these are short)."""
    few = -(-ROW // max(channels, 1))
    return next((k for k in range(few, min(8 * few, length) + 1) if length % k == 0), length if length <= few else 1)


def _over_groups(x: Array, groups: int) -> Array:
    """(A, C) -> (A, G)"""
    return x if groups == x.shape[1] else x.reshape(len(x), groups, x.shape[1] // groups).sum(axis=2)


def _to_channels(x: Array, d: int) -> Array:
    """(A, G) -> (A, C): each channel has the value of its group; or (A, 1), if that is the same for all channels."""
    return x if d == 1 or x.shape[1] == 1 else np.repeat(x, d, axis=1)


grouped, grouped_vjp = grouped_norm.register("numpy", norm, norm_vjp)


@normalize.fast("numpy")
def normalize_numpy(x: Array, weight: Any, bias: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    """Layer norm in C; all else as grouped norms."""
    ours = is_real(x, weight, bias) and x.size > 0 and axes == (x.ndim - 1,)
    if ours and all(p is None or p.shape == x.shape[-1:] for p in (weight, bias)):
        y, x = np.empty_like(x, order="C"), np.ascontiguousarray(x)
        mean, rstd = (np.empty(x.size // x.shape[-1], x.dtype) for _ in range(2))
        if layer_norm_in_c(
            x=_lines(x), weight=_whole(weight), bias=_whole(bias), y=_lines(y), mean=mean, rstd=rstd, eps=eps
        ):
            return y, (mean, rstd)
    return grouped(x, weight, bias, axes=axes, eps=eps)


@normalize.fast_vjp("numpy")
def normalize_vjp_numpy(g: Array, y: Any, x: Array, weight: Any, bias: Any, *, residuals: Any, **options: Any) -> Any:
    if len(residuals) != 2:
        return grouped_vjp(g, y, x, weight, bias, residuals=residuals, **options)
    mean, rstd = residuals
    dx, sums = np.empty_like(x, order="C"), np.empty((SECTIONS, 2, x.shape[-1]))
    layer_norm_vjp_in_c(g=_lines(g), x=_lines(x), mean=mean, rstd=rstd, weight=_whole(weight), dx=_lines(dx), sums=sums)
    if weight is None:
        return dx, None, None
    dweight, dbias = sums.sum(axis=0)
    return dx, dweight.astype(x.dtype), dbias.astype(x.dtype)  # of two rows of one array the engine would make copies


def _lines(a: Array) -> Array:
    """(.., C) -> (A, C)"""
    return np.ascontiguousarray(a).reshape(-1, a.shape[-1])
