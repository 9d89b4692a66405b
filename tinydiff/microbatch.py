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
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from . import backend
from .arguments import integer
from .backend import Array, xp
from .distributed import ALONE, Ranks
from .engine import Tensor, grad
from .modes import grad_enabled, set_grad_enabled
from .overlap import Overlap
from .rng import Rng, current_microbatch, in_microbatch

Result = TypeVar("Result")


def gradients(
    loss: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    batch: Sequence[Any],
    rng: Rng,
    size: int | None = None,
    threads: int | None = None,
    ranks: Ranks = ALONE,
) -> Array:
    """Forward and backward over a batch: leave the gradient of the mean loss in the parameters, in place of the one
    that is there, and return that loss, an array of shape () on the device.

    loss(*arrays, rng=rng, sample_offset=i) -> Tensor of shape (): the mean over the samples i, i + 1, ... of the batch,
    whose arrays are on the device. batch: arrays of one length, or a single one. size: of a microbatch (None:
    microbatch_size). threads: as in over_microbatches. Parameters that do not require a gradient are left out. A hook
    of a parameter sees the gradient of each microbatch in turn, and one of an activation that of its rows.
    ranks: of which each is given the same batch, works on its share of the microbatches, and has the same result.
    Errors: ValueError for an empty batch or arrays of different lengths, and those of over_microbatches; TypeError for
    a batch of anything but arrays.
    """
    parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]  # one that is given twice counts once
    batch, n = arrays_of("gradients: the batch", batch)
    size = size_for_ranks(n, math.prod(batch[0].shape[1:]), ranks) if size is None else size
    threads = ranks.threads if threads is None else threads
    own = microbatches(n, size, threads)[ranks.rank :: ranks.size]
    overlap = Overlap(parameters, ranks) if ranks.overlap and ranks.size > 1 else None
    # Whether they come one after the other: in the last microbatch the sums of those before must be there.
    in_turn = threads == 1 or len(own) == 1 or backend.active().name == "cupy"

    def forward_backward(rows: slice) -> tuple[Array, list[Array]]:
        arrays = [backend.to_device(a[rows]) for a in batch]
        # A copy of the source for each microbatch, so that what a sample draws depends on its row in the batch alone.
        value = loss(*arrays, rng=rng.copy(), sample_offset=rows.start) * (len(arrays[0]) / n)
        sending = overlap.during(value, sums) if overlap and in_turn and rows == own[-1] else contextlib.nullcontext()
        with sending:
            return value.data, [g.data for g in grad(value, parameters, retain_graph=False)]

    total: Array = None
    sums: list[Array] = []
    parts: Iterator[Any] = over_microbatches(forward_backward, n, size, threads, (ranks.rank, ranks.size))
    if ranks.exact and ranks.size > 1:
        dtype = parameters[0].dtype
        mine = ([backend.as_array(value).astype(dtype), *found] for value, found in parts)
        whole = in_order(mine, len(microbatches(n, size)), ranks, lambda _: _zeros(parameters))
        parts = ((value, found) for value, *found in whole)
    for value, found in parts:
        if total is None:
            total, sums = value, found  # each has memory of its own (engine.owned)
        else:
            total = total + value
            for s, g in zip(sums, found):
                s += g
    if ranks.size > 1 and not ranks.exact:
        if total is None:  # fewer microbatches than ranks, in the last batch of an epoch
            total, *sums = _zeros(parameters)
        total = backend.as_array(total).astype(parameters[0].dtype)
        if overlap:
            sums = overlap.finish(sums, total)
        else:
            ranks.sum([total, *sums])
    for p, s in zip(parameters, sums):
        p.grad = Tensor(s)
    return total


def in_order(
    mine: Iterator[list[Array]], count: int, ranks: Ranks, blank: Callable[[int], list[Array]]
) -> Iterator[list[Array]]:
    """What all ranks have made of all `count` microbatches, in their order: each is sent by the rank that has it.
    mine: of this rank; blank(i): arrays to receive number i into."""
    for i in range(count):
        arrays = next(mine) if i % ranks.size == ranks.rank else blank(i)
        ranks.broadcast(arrays, i % ranks.size)
        yield arrays


def _zeros(parameters: Sequence[Any]) -> list[Array]:
    """A loss, and a gradient of each parameter."""
    return [xp.zeros((), parameters[0].dtype), *(xp.zeros_like(p.data) for p in parameters)]


def arrays_of(what: str, data: Any) -> tuple[tuple[Array, ...], int]:
    """The arrays of a batch or a data set, of which one may stand alone, and their length. Errors: ValueError if they
    are empty, have different lengths, or there is none; TypeError for what is no array."""
    try:
        given = (data,) if hasattr(data, "shape") else tuple(data)
    except TypeError:
        raise TypeError(f"{what} must be arrays, not {type(data).__name__}: {data!r}") from None
    arrays = tuple(backend.to_host(a) if isinstance(a, (list, tuple)) else a for a in given)
    if wrong := [a for a in arrays if not getattr(a, "shape", ())]:
        kinds = ", ".join(sorted({type(a).__name__ for a in wrong}))
        raise TypeError(f"{what} must be arrays with an axis of samples, not {kinds}: {wrong[0]!r}")
    lengths = [len(a) for a in arrays]
    if len(set(lengths)) != 1:
        raise ValueError(f"{what} must be arrays of one length, not {lengths or 'no arrays at all'}")
    if lengths[0] == 0:
        raise ValueError(f"{what} is empty: its arrays have shapes {[a.shape for a in arrays]}")
    return arrays, lengths[0]


@backend.overridable
def over_microbatches(
    fn: Callable[[slice], Result], n: int, size: int, threads: int | None = None, share: tuple[int, int] = (0, 1)
) -> Iterator[Result]:
    """fn(rows) for the rows 0 to n in microbatches of `size`, in order. Nodes are recorded inside if they are in the
    caller.

    fn must not change anything that the microbatches share. With several microbatches, a draw from an Rng that was not
    made inside fn (a Dropout in training) is an error, and so is a BatchNorm2d in training.
    threads: how many microbatches may be worked on at a time (None: one per processor core). Their number changes no
    bit of the results. Without fast/, and on a GPU, there is one thread.
    share: (r, s) leaves out all but the microbatches r, r + s, r + 2 s, ..., counted from 0; others do those.
    Errors: ValueError for a size or threads that are not integers of 1 or more.
    """
    return _in_turn(fn, microbatches(n, size, threads)[share[0] :: share[1]], n, grad_enabled())


def _in_turn(fn: Callable[[slice], Result], parts: list[slice], n: int, enabled: bool) -> Iterator[Result]:
    for rows in parts:
        with working_on(rows, n, enabled):
            result = fn(rows)
        yield result
        del result  # so that it is not in memory while the next one is computed


def microbatches(n: int, size: int, threads: int | None = None) -> list[slice]:
    """The rows 0 to n in slices of `size`; the last may be smaller. Errors: as over_microbatches."""
    n, size = integer("microbatches: n", n, 0), integer("microbatches: size", size)
    if threads is not None:
        integer("microbatches: threads", threads)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


class Unwanted(BaseException):
    """Raised in a thread that works on a microbatch when nobody waits for it any more."""


of_thread = threading.local()  # .unwanted: an Event that is set when what this thread does is no longer wanted


def check_wanted() -> None:
    """Called now and then by what takes long, as a sampler does in each step, so that Ctrl-C ends it. Errors: Unwanted
    after an error, or Ctrl-C, in the thread that waits for this one."""
    unwanted = getattr(of_thread, "unwanted", None)
    if unwanted is not None and unwanted.is_set():
        raise Unwanted


@contextlib.contextmanager
def working_on(rows: slice, n: int, enabled: bool) -> Iterator[None]:
    """Inside, this thread records nodes if `enabled`, and the microbatch is the current one unless it is the batch."""
    with set_grad_enabled(enabled), in_microbatch(rows if rows.stop - rows.start < n else current_microbatch()):
        yield


def microbatch_size(n: int, numbers: int = 1024) -> int:
    """The default size of a microbatch of n samples of so many numbers: all of them on a GPU, or if there are no more
    than 32. On a CPU, the power of two that has at most 2^16 numbers, whose activations about fit into the cache, from
    32 (beyond 128 samples from 16) to 64; and at most half of the samples, rounded up, so that two cores are busy.
    Small samples, of up to 512 numbers, have ops that are too quick for threads in Python: up to 256 stay together, and
    of more there are up to 256, at most half. The size must not depend on the number of cores, because the last digits
    of the gradient depend on it."""
    least, small = 32 if n <= 128 else 16, numbers <= 512
    fitting = 256 if small else max(least, 2 ** int(math.log2(2**16 / numbers)))
    if backend.active().name == "cupy" or n <= 32 or (small and n <= fitting):
        return max(n, 1)
    return min(fitting, (n + 1) // 2)


def size_for_ranks(n: int, numbers: int, ranks: Ranks) -> int:
    """microbatch_size, or less if there would not be a microbatch for each rank. Not if the sums are to be exact: then
    no size may depend on the number of ranks."""
    size = microbatch_size(n, numbers)
    return size if ranks.exact else min(size, -(-n // ranks.size))


@backend.overridable
def blas_threads(count: int | None) -> contextlib.AbstractContextManager[None]:
    """Inside, matrix products use at most `count` threads (None: as many as before). One is best for nets so small
    that two threads would lose more time waiting for each other than they gain. Without fast/ it changes nothing.
    Errors: ValueError for a count that is not an integer of 1 or more."""
    if count is not None:
        integer("blas_threads: count", count)
    return contextlib.nullcontext()
