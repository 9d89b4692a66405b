"""The kernels as whole-array operations. They write only into arrays that they made themselves, or are told to change.

Nothing here is special to NumPy; what makes them quick there is working in place, in few passes over memory.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, xp
from .numpy_activation import erf, sigmoid, silu, silu_backward
from .numpy_conv import PATCH_BYTES, col2im, im2col
from .numpy_norm import normalize, normalize_backward

__all__ = [
    "PATCH_BYTES", "adam_step", "average_step", "col2im", "erf", "im2col", "index_add", "normalize",
    "normalize_backward", "sgd_step", "sigmoid", "silu", "silu_backward", "softmax", "sum",
]  # fmt: skip

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
