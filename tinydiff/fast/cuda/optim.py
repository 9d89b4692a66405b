"""Steps of optimisers and averages over lists of arrays (optim.cu), and the norm of gradients (clip.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import cupy
import numpy

from ... import optim
from ...backend import Array
from .launch import THREADS, Source
from .table import MACROS, TableKernel

_OPTIM, _CLIP = Source("optim.cu", **MACROS), Source("clip.cu", **MACROS)
_SGD, _MOMENTUM, _ADAM, _AVERAGE = (TableKernel(_OPTIM, name) for name in ("sgd", "momentum", "adam", "average"))
_SQUARES, _SCALE = TableKernel(_CLIP, "squares", most_blocks=64), TableKernel(_CLIP, "scale")


@optim.sgd_step.fast("cupy")
def sgd_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    velocities: Sequence[Array] | None,
    hyperparameters: Array,
    nesterov: bool,
) -> None:
    """v = momentum v + g;   p -= lr v, or lr (g + momentum v) with nesterov;
    without momentum p -= lr g. First g += decay p. hyperparameters: [lr, decay, momentum].
    """
    if velocities is None:
        _SGD([ps, gs], hyperparameters)
    else:
        _MOMENTUM([ps, gs, velocities], hyperparameters, int(nesterov))


@optim.adam_step.fast("cupy")
def adam_step(
    ps: Sequence[Array],
    gs: Sequence[Array],
    ms: Sequence[Array],
    vs: Sequence[Array],
    hyperparameters: Array,
) -> None:
    """m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   p = shrink p - rate m / (sqrt(v) + eps)

    First g += decay p. hyperparameters: [rate, eps, shrink, decay, b1, b2] for each parameter; the corrections for the
    number of its steps are in the first two.
    """
    _ADAM([ps, gs, ms, vs], hyperparameters)


@optim.average_step.fast("cupy")
def average_step(averages: Sequence[Array], ps: Sequence[Array], hyperparameters: Array) -> None:
    """average += rest (p - average). hyperparameters: [rest]."""
    _AVERAGE([averages, ps], hyperparameters)


@optim.clip_norm.fast("cupy")
def clip_norm(gs: Sequence[Array], max_norm: float) -> Array:
    """The norm of all arrays together, which is returned, brought to at most max_norm (and a millionth less)."""
    sums = cupy.zeros((len(gs), _SQUARES.most_blocks))
    _SQUARES([gs], sums, sums.shape[1])
    norm, factor = cupy.empty((), numpy.result_type(*gs)), cupy.empty(())
    _CLIP["clip_factor"]((1,), THREADS, sums.sum(), float(max_norm), norm, factor)
    _SCALE([gs], factor)
    return norm
