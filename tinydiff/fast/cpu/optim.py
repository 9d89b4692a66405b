"""Steps of optimisers over lists of arrays, in place: one pass per operation of the formula, but over parts that stay
in the cache; Adam in C, in a single pass (adam.c), where there is a compiler.

The formulas are those of optim.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ... import optim
from ...backend import Array
from ..taken import is_real
from .compiled import Function

adam_in_c = Function(
    "adam",
    "inout p(n), in g(n), inout m(n), inout v(n), int n, "
    "real rate, real eps, real shrink, real decay, real b1, real b2",
)

_RUN_BYTES = 2**20  # of each array at a time, so that a few of them stay in the cache


def _runs(*arrays: Array) -> Iterable[tuple[Array, ...]]:
    """Large arrays of one shape in parts; small arrays, and arrays that are not contiguous, whole."""
    if arrays[0].nbytes <= _RUN_BYTES or not all(a.flags.c_contiguous for a in arrays):
        return (arrays,)
    flat, length = [a.reshape(-1) for a in arrays], _RUN_BYTES // arrays[0].itemsize
    return (tuple(a[i : i + length] for a in flat) for i in range(0, arrays[0].size, length))


@optim.sgd_step.fast("numpy")
def sgd_step_numpy(
    ps: Sequence[Array],
    gs: Sequence[Array],
    velocities: Sequence[Array] | None,
    hyperparameters: Any,
    nesterov: bool,
) -> None:
    """v = momentum v + g;   p -= lr v, or lr (g + momentum v) with nesterov;
    without momentum p -= lr g. First g += decay p. hyperparameters: [lr, decay, momentum].
    """
    lr, decay, momentum = hyperparameters.tolist()
    for p, g, v in zip(ps, gs, gs if velocities is None else velocities):
        for part, gradient, velocity in _runs(p, g, v):
            if decay:
                gradient = gradient + decay * part
            step = np.empty_like(part)
            if velocities is None:
                np.multiply(gradient, lr, out=step)
            else:
                velocity *= momentum
                velocity += gradient
                np.multiply(velocity, lr * momentum if nesterov else lr, out=step)
                if nesterov:
                    part -= lr * gradient
            part -= step


@optim.adam_step.fast("numpy")
def adam_step_numpy(
    ps: Sequence[Array],
    gs: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    hyperparameters: Any,
) -> None:
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = shrink p - rate m / (sqrt(v) + eps)

    First g += decay p. hyperparameters: [rate, eps, shrink, decay, b1, b2] for each parameter; the corrections for the
    number of its steps are in the first two.
    """
    for p, g, m, v, (rate, eps, shrink, decay, b1, b2) in zip(ps, gs, ms, vs, hyperparameters.tolist()):
        if is_real(p, g, m, v) and all(a.flags.c_contiguous for a in (p, g, m, v)):
            flat = {name: a.reshape(-1) for name, a in zip("pgmv", (p, g, m, v))}
            if adam_in_c(**flat, rate=rate, eps=eps, shrink=shrink, decay=decay, b1=b1, b2=b2):
                continue
        for part, gradient, mean, square in _runs(p, g, m, v):
            t = np.empty_like(part)
            if shrink != 1:
                part *= shrink
            if decay:
                gradient = gradient + decay * part
            np.multiply(gradient, 1 - b1, out=t)
            mean *= b1
            mean += t
            np.multiply(gradient, gradient, out=t)
            t *= 1 - b2
            square *= b2
            square += t
            np.sqrt(square, out=t)
            t += eps
            np.divide(mean, t, out=t)
            t *= rate
            part -= t


@optim.average_step.fast("numpy")
def average_step_numpy(averages: Sequence[Array], ps: Sequence[Array], hyperparameters: Any) -> None:
    """average += rest (p - average). hyperparameters: [rest]."""
    rest = float(hyperparameters[0])
    for average, p in zip(averages, ps):
        for mean, part in _runs(average, p):
            t = np.empty_like(part)
            np.subtract(part, mean, out=t)
            t *= rest
            mean += t
