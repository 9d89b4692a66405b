"""What the host does in a step that the device repeats by itself.

A captured step (capture.py) runs its Python once; from then on the device repeats the launches that it saw. Some Python
has to run at every repetition all the same: what counts the draws of a random source or the steps of an optimiser,
and the numbers that follow from such counts. So it says so here, and everything else need not know about capturing:

    each_time(count)                        now, and, if this step is being captured, again before every replay
    rates = numbers(lambda: [lr / n, n])    for kernels: in a captured step an array, filled anew before every replay

Outside a capture each costs one look at a global.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy

from . import backend
from .backend import Array

_BLOCK_BYTES = 4096


class Recording:
    """What the host has to do before every replay of one captured step, in its order."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.actions: list[Callable[[], None]] = []
        self.blocks: list[tuple[Array, numpy.ndarray]] = []  # the same bytes on the device and here
        self.free = 0  # of the last block, from where on
        self.seen: dict[int, weakref.ref[Any]] = {}  # Tensors that were used, and
        self.originals: dict[int, tuple[Any, Array]] = {}  # those whose array was replaced, with the first one
        self.given: dict[int, Any] = {}  # those that were given a gradient in the step
        self.carried: dict[int, tuple[Any, Any]] = {}  # those whose gradient of before the step was read, with that

    def numbers(self, values: Callable[[], Any]) -> Array:
        """values(), in a place on the device that `upload` fills."""
        now = numpy.asarray(values())
        if not self.blocks or self.free + now.nbytes > len(self.blocks[-1][1]):
            size = max(_BLOCK_BYTES, now.nbytes)
            self.blocks.append((backend.xp.empty(size, "uint8"), numpy.zeros(size, "uint8")))
            self.free = 0
        place = slice(self.free, self.free + now.nbytes)
        device, host = (block[place].view(now.dtype).reshape(now.shape) for block in self.blocks[-1])
        self.free += -(-now.nbytes // 8) * 8  # numbers of 8 bytes start at multiples of 8
        host[...] = now

        def again() -> None:
            host[...] = values()

        self.actions.append(again)
        return device

    def prepare(self) -> None:
        """Do on the host what the step did there when it was captured."""
        for action in self.actions:
            action()

    def upload(self) -> None:
        """Bring the numbers of now to the device."""
        for device, host in self.blocks:
            device[...] = backend.to_device(host)

    def see(self, x: Any) -> None:
        """Note a Tensor that the step uses: should it have another array one day, the step must be captured again."""
        self.seen[id(x)] = weakref.ref(x)

    def replaced(self, x: Any) -> None:
        """Note that a Tensor is about to have another array (see `put_back`)."""
        self.see(x)
        self.originals.setdefault(id(x), (x, x._data))

    def grad_read(self, x: Any) -> None:
        """Note a gradient that was there before the step: the graph will read it where it is now."""
        if x._grad is None or id(x) in self.given or id(x) in self.carried:
            return
        g = x._grad
        self.carried[id(x)] = (x, g)

        def check() -> None:
            if x._grad is not g:
                raise RuntimeError(
                    f"a Tensor of shape {x.shape} has another gradient than when the captured step read it: compute "
                    "the gradients inside the step, after zero_grad, or leave them in the same Tensors"
                )

        self.actions.append(check)

    def put_back(self) -> None:
        """What replaced the array of a Tensor is copied into that array, so that the next replay starts from it; so is
        a gradient that was added to one of before."""
        for x, g in self.carried.values():
            if x._grad is not None and x._grad is not g:
                g._data[...] = x._grad._data
                x._grad = g
                self.actions.append(lambda x=x, g=g: setattr(x, "_grad", g))  # type: ignore[misc]
        for x, array in self.originals.values():
            if x._data is not array:
                array[...] = x._data
                x._data = array
        self.originals = {}

    def leaves(self) -> list[tuple[weakref.ref[Any], Array]]:
        """The Tensors that were used and are still there, with their arrays."""
        alive = ((ref, ref()) for ref in self.seen.values())
        return [(ref, x._data) for ref, x in alive if x is not None]


recording: Recording | None = None  # the one capture that is going on in this process; see `current`


def current() -> Recording | None:
    """The recording of the step that this thread is capturing, if it is."""
    return recording if recording is not None and recording.thread == threading.get_ident() else None


def each_time(action: Callable[[], None]) -> None:
    """Do it now; while a step is being captured, also before every replay of it, in this order."""
    action()
    if recording is not None and (now := current()):
        now.actions.append(action)


def numbers(values: Callable[[], Any]) -> Array:
    """values(), an array or a list, computed on the host for kernels: where they run on the device, in its memory. In a
    captured step they are computed again before every replay."""
    if backend.active().kernels == "numpy":
        return numpy.asarray(values())
    now = current()
    return now.numbers(values) if now else backend.to_device(numpy.asarray(values()))


def see(*tensors: Any) -> None:
    """Note Tensors that the step uses, if this thread is capturing one."""
    now = current()
    if now:
        for x in tensors:
            now.see(x)


def grad_read(x: Any) -> None:
    """Note that the gradient of a Tensor is read, if this thread is capturing a step."""
    if now := current():
        now.grad_read(x)


def grad_set(x: Any) -> None:
    """Note the gradient that a Tensor has been given, which it is given again before every replay."""
    if now := current():
        g, now.given[id(x)] = x._grad, x
        now.actions.append(lambda: setattr(x, "_grad", g))


def refuse(what: str, instead: str) -> None:
    """Errors: RuntimeError while a step is being captured, as what is read now would be the same in every replay."""
    if current():
        raise RuntimeError(f"{what} cannot be read in a captured step, as every replay would repeat it: {instead}")
