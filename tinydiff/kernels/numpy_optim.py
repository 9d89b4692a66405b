"""Steps of optimisers over lists of arrays, in place: as many passes as the formula has operations, but over parts that
stay in the cache.

`numbers` is what changes from step to step, computed on the host: see the optimisers in optim.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..backend import Array, xp

_RUN_BYTES = 2**20  # of each array at a time, so that a few of them stay in the cache


def _runs(*arrays: Array) -> Iterable[tuple[Array, ...]]:
    """Large arrays of one shape in parts; small ones, and such as lie in different orders, whole."""
    if arrays[0].nbytes <= _RUN_BYTES or not all(a.flags.c_contiguous for a in arrays):
        return (arrays,)
    flat, length = [a.reshape(-1) for a in arrays], _RUN_BYTES // arrays[0].itemsize
    return (tuple(a[i : i + length] for a in flat) for i in range(0, arrays[0].size, length))


def sgd_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    velocities: Sequence[Array] | None,
    numbers: Any,
    nesterov: bool,
) -> None:
    """v = momentum v + g;   p -= lr v, or lr (g + momentum v) with nesterov;
    without momentum p -= lr g. First g += decay p. numbers: [lr, decay, momentum].
    """
    lr, decay, momentum = numbers.tolist()
    for p, g, v in zip(ps, gs, gs if velocities is None else velocities):
        for part, slope, velocity in _runs(p, g, v):
            if decay:
                slope = slope + decay * part
            step = xp.empty_like(part)
            if velocities is None:
                xp.multiply(slope, lr, out=step)
            else:
                velocity *= momentum
                velocity += slope
                xp.multiply(velocity, lr * momentum if nesterov else lr, out=step)
                if nesterov:
                    part -= lr * slope
            part -= step


def adam_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    numbers: Any,
) -> None:
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = shrink p - rate m / (sqrt(v) + eps)

    First g += decay p. numbers: [rate, eps, shrink, decay, b1, b2] for each parameter; the corrections for the number
    of its steps are in the first two.
    """
    for p, g, m, v, (rate, eps, shrink, decay, b1, b2) in zip(ps, gs, ms, vs, numbers.tolist()):
        for part, slope, mean, square in _runs(p, g, m, v):
            t = xp.empty_like(part)
            if shrink != 1:
                part *= shrink
            if decay:
                slope = slope + decay * part
            xp.multiply(slope, 1 - b1, out=t)
            mean *= b1
            mean += t
            xp.multiply(slope, slope, out=t)
            t *= 1 - b2
            square *= b2
            square += t
            xp.sqrt(square, out=t)
            t += eps
            xp.divide(mean, t, out=t)
            t *= rate
            part -= t


def average_step(averages: Sequence[Array], ps: Sequence[Array], numbers: Any) -> None:
    """average += rest (p - average). numbers: [rest]."""
    rest = float(numbers[0])
    for average, p in zip(averages, ps):
        for mean, part in _runs(average, p):
            t = xp.empty_like(part)
            xp.subtract(part, mean, out=t)
            t *= rest
            mean += t


def clip_norm(gs: Sequence[Array], max_norm: float) -> Array:
    """The norm of all arrays together, which is returned, brought to at most max_norm (and a millionth less)."""
    squares = xp.stack([(g * g).sum() for g in gs])  # (arrays,)
    norm = xp.sqrt(squares.sum())
    scale = xp.minimum(max_norm / (norm + 1e-6), 1)
    for g in gs:
        g *= scale
    return norm
