"""Steps of optimisers, averages and clipping over lists of arrays, in place: one call of C (optim.c) for all of them.
What C does not take, such as an array that is not contiguous, is for the formulas in optim.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ... import optim
from ...backend import Array
from .compiled import Function, Misfit

adam_in_c = Function(
    "adam",
    "inout list p(count,n), in list g(count,n), inout list m(count,n), inout list v(count,n), "
    "in float64 numbers(count,6), sizes n, int count, int part, int parts",
)
sgd_in_c = Function(
    "sgd", "inout list p(count,n), in list g(count,n), sizes n, int count, real lr, real decay, int part, int parts"
)
momentum_in_c = Function(
    "sgd_momentum",
    "inout list p(count,n), in list g(count,n), inout list v(count,n), sizes n, int count, "
    "real lr, real decay, real momentum, int nesterov, int part, int parts",
)
average_in_c = Function(
    "average", "inout list averages(count,n), in list p(count,n), sizes n, int count, real rest, int part, int parts"
)
clip_in_c = Function("clip", "inout list g(count,n), out float64 norm(1), sizes n, int count, double most")


@optim.sgd_step.fast("numpy")
def sgd_step_numpy(
    ps: Sequence[Array],
    gs: Sequence[Array],
    velocities: Sequence[Array] | None,
    hyperparameters: Any,
    nesterov: bool,
) -> None:
    lr, decay, momentum = hyperparameters.tolist()

    def in_c(_: Any, **lists: Sequence[Array]) -> bool:
        if velocities is None:
            return sgd_in_c(**lists, lr=lr, decay=decay)
        return momentum_in_c(**lists, lr=lr, decay=decay, momentum=momentum, nesterov=nesterov)

    state = {} if velocities is None else {"v": velocities}
    for k in _left_by(in_c, p=ps, g=gs, **state):
        v = None if velocities is None else [velocities[k]]
        optim.sgd_step.plain([ps[k]], [gs[k]], v, hyperparameters, nesterov)


@optim.adam_step.fast("numpy")
def adam_step_numpy(
    ps: Sequence[Array], gs: Sequence[Array], ms: Sequence[Array], vs: Sequence[Array], hyperparameters: Any
) -> None:
    def in_c(which: Any, **lists: Sequence[Array]) -> bool:
        return adam_in_c(**lists, numbers=hyperparameters[which])

    for k in _left_by(in_c, p=ps, g=gs, m=ms, v=vs):
        optim.adam_step.plain([ps[k]], [gs[k]], [ms[k]], [vs[k]], hyperparameters[k : k + 1])


@optim.average_step.fast("numpy")
def average_step_numpy(averages: Sequence[Array], ps: Sequence[Array], hyperparameters: Any) -> None:
    def in_c(_: Any, **lists: Sequence[Array]) -> bool:
        return average_in_c(**lists, rest=float(hyperparameters[0]))

    for k in _left_by(in_c, averages=averages, p=ps):
        optim.average_step.plain([averages[k]], [ps[k]], hyperparameters)


@optim.clip_norm.fast("numpy")
def clip_norm_numpy(gs: Sequence[Array], max_norm: float) -> Any:
    """Arrays of two dtypes, or not contiguous, are for the page: all of them, because they share one norm."""
    norm = np.empty(1)
    try:
        if clip_in_c(g=gs, norm=norm, most=max_norm):
            return norm.astype(gs[0].dtype)[0]
    except Misfit:
        pass
    return NotImplemented


def _left_by(in_c: Callable[..., bool], **lists: Sequence[Array]) -> Iterable[int]:
    """in_c(which, **lists) for all arrays at once; if they do not fit together, for those of float32 that fit, and for
    those of float64. Returns the indices of the others."""
    count = len(next(iter(lists.values())))
    try:
        return () if in_c(slice(None), **lists) else range(count)
    except Misfit:
        done: list[int] = []
    for char in "fd":
        which = [k for k, arrays in enumerate(zip(*lists.values())) if all(_fits(a, char) for a in arrays)]
        try:
            if which and in_c(which, **{name: [arrays[k] for k in which] for name, arrays in lists.items()}):
                done += which
        except Misfit:  # two of them share memory, as two views of one parameter may
            pass
    return [k for k in range(count) if k not in done]


def _fits(a: Any, char: str) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == char and a.flags.c_contiguous
