"""A batch in microbatches: the same mathematics in less memory.

The mean over n samples is a weighted sum of means over parts of m samples each,

    loss(batch) = sum over microbatches of (m / n) loss(microbatch),

and so is its gradient. Only one microbatch has its activations in memory at a time (elsewhere this is called gradient
accumulation), and those of some tens of images fit into the cache of a processor.

Here the microbatches come one after the other. With several processor cores, fast/threads.py works on several of them
at a time and gives the same results in the same order, so no sum depends on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from . import backend
from .arguments import integer
from .backend import Array
from .engine import Tensor, grad
from .modes import grad_enabled, set_grad_enabled
from .rng import Rng, current_microbatch, in_microbatch

Result = TypeVar("Result")


def gradients(
    loss: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    batch: Sequence[Any],
    rng: Rng,
    size: int | None = None,
    threads: int | None = None,
) -> Array:
    """Forward and backward over a batch: leave the gradient of the mean loss in the parameters, in place of the one
    that is there, and return that loss, an array of shape () on the device.

    loss(*arrays, rng=rng, sample_offset=i) -> Tensor of shape (): the mean over the samples i, i + 1, ... of the batch,
    whose arrays are on the device. batch: arrays of one length. size: of a microbatch (None: microbatch_size).
    threads: as in over_microbatches. Parameters that do not require a gradient are left out. A hook of a parameter sees
    the gradient of each microbatch in turn, and one of an activation that of its rows.
    Errors: ValueError for an empty batch, and those of over_microbatches.
    """
    parameters = [p for p in parameters if p.requires_grad]
    n = len(batch[0])
    if n == 0:
        raise ValueError(f"gradients: the batch is empty: its arrays have shapes {[a.shape for a in batch]}")

    def forward_backward(rows: slice) -> tuple[Array, list[Array]]:
        arrays = [backend.to_device(a[rows]) for a in batch]
        # A copy of the source for each microbatch, so that what a sample draws depends on its row in the batch alone.
        value = loss(*arrays, rng=rng.copy(), sample_offset=rows.start) * (len(arrays[0]) / n)
        return value.data, [g.data for g in grad(value, parameters, retain_graph=False)]

    total: Array = None
    sums: list[Array] = []
    for value, found in over_microbatches(forward_backward, n, microbatch_size(n) if size is None else size, threads):
        if total is None:
            total, sums = value, [g.copy() for g in found]
        else:
            total = total + value
            for s, g in zip(sums, found):
                s += g
    for p, s in zip(parameters, sums):
        p.grad = Tensor(s)
    return total


@backend.overridable
def over_microbatches(fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None) -> Iterator[Result]:
    """fn(rows) for the rows 0 to n in microbatches of `size`, in order. Nodes are recorded inside if they are in the
    caller.

    fn must not change anything that the microbatches share. With several microbatches, a draw from an Rng that was not
    made inside fn (a Dropout in training) is an error, and so is a BatchNorm2d in training.
    threads: how many microbatches may be worked on at a time (None: one per processor core). Their number changes no
    bit of the results. Without fast/, and on a GPU, there is one thread.
    Errors: ValueError for a size or threads that are no integers of 1 or more.
    """
    return _in_turn(fn, microbatches(n, size, threads), n, grad_enabled())


def _in_turn(fn: Callable[[slice], Result], parts: list[slice], n: int, enabled: bool) -> Iterator[Result]:
    for rows in parts:
        with working_on(rows, n, enabled):
            result = fn(rows)
        yield result
        del result  # so that it is not in memory while the next one is computed


def microbatches(n: int, size: int, threads: int | None = None) -> list[slice]:
    """The rows 0 to n in slices of `size`; the last may be smaller. Errors: as over_microbatches."""
    size = integer("the size of a microbatch", size)
    if threads is not None:
        integer("microbatches: threads", threads)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


@contextlib.contextmanager
def working_on(rows: slice, n: int, enabled: bool) -> Iterator[None]:
    """Inside, this thread records nodes if `enabled`, and the microbatch is the current one unless it is the batch."""
    with set_grad_enabled(enabled), in_microbatch(rows if rows.stop - rows.start < n else current_microbatch()):
        yield


def microbatch_size(n: int) -> int:
    """The default size of a microbatch of n samples: all of them on a GPU; on a CPU as many as fit into the cache, but
    not so few that adding up the gradients costs more than it saves. The size must not depend on the number of cores,
    because the last digits of the gradient depend on the size."""
    return max(n, 1) if backend.active().name == "cupy" else 32 if n <= 128 else 64


@backend.overridable
def blas_threads(count: int | None) -> contextlib.AbstractContextManager[None]:
    """Inside, matrix products use at most `count` threads (None: as many as before). One is best for nets so small
    that two threads would lose more time waiting for each other than they gain. Without fast/ it changes nothing."""
    return contextlib.nullcontext()
