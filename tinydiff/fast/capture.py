"""A whole step as one CUDA graph (`backend.capture`), and the work of the host before each replay.

    def step(x, rng):
        value = gradients(loss, optimizer.parameters, [x], rng)
        optimizer.step()
        return value

    captured = backend.capture(step)
    for x in batches:
        value = captured(x, rng.child(...))         # one launch in place of a thousand

For small kernels, Python needs more time to launch them than a GPU to run them. So the first call runs the step as it
is, the second records its launches, and from the third on the device repeats them by itself: the step's Python code is
not run any more. Work that the host must still do, such as counting the steps of an optimiser or the draws of an Rng,
goes through `backend.each_time` and `backend.numbers`; a Recording notes and repeats it. On NumPy, every call runs the
step as it is.
"""

from __future__ import annotations

import os
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import numpy

from .. import backend
from ..anomaly import anomaly_detection
from ..backend import Array
from ..engine import Op, Tensor
from ..modes import grad_enabled
from ..observers import Observer, observing
from ..rng import Rng

MOST_GRAPHS = 8  # of one step: each keeps all memory that the step needs
_CONSTANTS = (bool, int, float, str, type(None))
_BLOCK_BYTES = 4096
_one_at_a_time = threading.Lock()  # one step is recorded at a time
_recording: Recording | None = None  # of the step that is being recorded now


# ---------------------------------------------------------------- the recording of a step


class Recording(Observer):
    """The work of the host before every replay of one captured step, in its order. It observes the step's ops."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.actions: list[Callable[[], None]] = []
        self.blocks: list[tuple[Array, numpy.ndarray]] = []  # the same bytes on the device and here
        self.free = 0  # where the free part of the last block begins
        self.seen: dict[int, weakref.ref[Any]] = {}  # Tensors that were used
        self.originals: dict[int, tuple[Any, Array]] = {}  # Tensors whose array was replaced, with the first array
        self.given: dict[int, Any] = {}  # Tensors that were given a gradient in the step
        self.carried: dict[int, tuple[Any, Any]] = {}  # Tensors with a gradient from before the step, which was read

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
        """Repeat on the host what the step did there when it was captured."""
        for action in self.actions:
            action()

    def upload(self) -> None:
        """Bring the present numbers to the device."""
        for device, host in self.blocks:
            device[...] = backend.to_device(host)

    def on_call(self, run: Callable[..., Any], op: Op, inputs: tuple[Any, ...], params: dict[str, Any]) -> Any:
        """Note the leaves that the step uses: if one of them gets another array, the step must be captured again."""
        for x in (*inputs, *params.values()):
            if isinstance(x, Tensor) and x.node is None:
                self.seen[id(x)] = weakref.ref(x)
        return run(op, inputs, params)

    def on_set(self, x: Tensor, name: str, value: Any) -> None:
        if name == "data":  # see put_back
            self.seen[id(x)] = weakref.ref(x)
            self.originals.setdefault(id(x), (x, x._data))
            return
        if id(x) not in self.given and id(x) not in self.carried:
            before = x._grad
            if before is not None and (seen := self.seen.get(id(before))) is not None and seen() is before:
                self.carry(x, before)  # an op has read the gradient from before the step, to add to it
        self.given[id(x)] = x
        self.actions.append(lambda: setattr(x, "_grad", value))

    def carry(self, x: Tensor, g: Any) -> None:
        """Note a gradient from before the step: every replay will read it from its present memory."""
        self.carried[id(x)] = (x, g)

        def check() -> None:
            if x._grad is not g:
                raise RuntimeError(
                    f"a Tensor of shape {x.shape} has another gradient than when the captured step read it: compute "
                    "the gradients inside the step, after zero_grad, or leave them in the same Tensors"
                )

        self.actions.append(check)

    def put_back(self) -> None:
        """If the step replaced the array of a Tensor, copy the new values into the old array, from which the next
        replay starts. Do the same with a gradient that was added to one from before the step."""
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
        """The Tensors that were used and still exist, with their arrays."""
        alive = ((ref, ref()) for ref in self.seen.values())
        return [(ref, x._data) for ref, x in alive if x is not None]


# ---------------------------------------------------------------- a step and its graphs


class Captured:
    """step(*inputs), recorded at its second call and replayed from the third on. Make one with `backend.capture`.

    inputs: arrays of the host or the device, which are copied to the memory from which the graph reads them; Rngs,
    which advance as in an ordinary call; and constants (None, bool, int, float, str). Outputs: arrays and Tensors on
    the device, or None, in tuples, lists and dicts. The next call overwrites an output: copy what you want to keep.

    Every call checks what the graph depends on. For another shape, dtype, constant, precision of products or mode of
    recording gradients there is another graph, at most MOST_GRAPHS in all: the last batch of an epoch, for example, is
    shorter than the others. If a Tensor that the step used has another array than before (x.data = a, load_state_dict),
    the graph is made again. Nothing else is noticed. Other arrays that the step reads must keep their memory; a change
    of mode, such as model.eval() or an optimiser's nesterov, has no effect on the graph; and Python code that prints or
    appends to a list does so in the first two calls only. Only one thread at a time may call it.

    Errors: TypeError for other inputs or outputs; RuntimeError, which names the line, for a step that cannot be
    captured because it reads from the device or brings host arrays to it; RuntimeError for too many graphs.
    """

    def __init__(self, step: Callable[..., Any]):
        if not callable(step):
            raise TypeError(f"capture takes a function, not {step!r}")
        self.step = step
        self.graphs: dict[Any, _Replay] = {}

    def __call__(self, *inputs: Any) -> Any:
        key = (*(_kind(i, inputs) for i in range(len(inputs))), backend.matmul_precision(), grad_enabled())
        if backend.active().name != "cupy" or anomaly_detection() or current():
            out = self.step(*inputs)
            _check_output(out)
            return out
        replay = self.graphs.get(key)
        if replay is not None and replay.is_stale():
            del self.graphs[key]
            replay = None
        if replay is None:
            if len(self.graphs) >= MOST_GRAPHS:
                raise RuntimeError(
                    f"capture: the inputs of this step came in {MOST_GRAPHS} kinds already, each of which has a graph, "
                    f"and now there is {key[: len(inputs)]}: pass what changes at every call as an array"
                )
            replay = _Replay(self.step, inputs)
            out = replay.first(inputs)
            self.graphs[key] = replay
            return out
        return replay(inputs)


class _Replay:
    """The graph of a step for one kind of inputs."""

    def __init__(self, step: Callable[..., Any], inputs: tuple[Any, ...]):
        self.step, self.graph = step, cuda_graph()
        self.static: list[Any] = []  # the same objects in every call, which the step gets in place of the inputs
        for i, x in enumerate(inputs):
            if isinstance(x, Rng):
                first = _first(i, inputs)
                self.static.append(Rng(0) if first == i else self.static[first])
            else:
                self.static.append(backend.xp.empty(x.shape, x.dtype) if _is_array(x) else x)
        self.recording: Recording | None = None
        self.leaves: list[Any] = []
        self.out: Any = None

    def first(self, inputs: tuple[Any, ...]) -> Any:
        """Run the step as it is: kernels are compiled, cuBLAS starts, and objects that are made once are made."""
        self._take(inputs)
        out = self.graph.run(lambda: self.step(*self.static))
        _check_output(out)
        self._give_back(inputs)
        return out

    def __call__(self, inputs: tuple[Any, ...]) -> Any:
        self._take(inputs)
        if self.recording is None:
            self._record()
        else:
            self.recording.prepare()
        assert self.recording is not None
        self.graph.replay(self.recording.upload)
        self._give_back(inputs)
        return self.out

    def is_stale(self) -> bool:
        """Does a Tensor that the step used have another array now?"""
        return any((x := ref()) is not None and x._data is not array for ref, array in self.leaves)

    def _take(self, inputs: tuple[Any, ...]) -> None:
        """Copy the inputs into the static ones, which the graph reads."""
        for mine, x in zip(self.static, inputs):
            if isinstance(x, Rng):
                mine._become(x.seed, x.stream, x.step)
            elif _is_array(x):
                mine[...] = backend.to_device(x)

    def _give_back(self, inputs: tuple[Any, ...]) -> None:
        """Let the given Rngs advance as the static ones did, from which the step drew."""
        for mine, x in zip(self.static, inputs):
            if isinstance(x, Rng):
                x._become(mine.seed, mine.stream, mine.step)

    def _record(self) -> None:
        global _recording
        recording = Recording()

        def step() -> Any:
            out = self.step(*self.static)
            _check_output(out)
            recording.put_back()
            return out

        with _one_at_a_time:
            _recording = recording
            try:
                with backend.no_sync(), observing(recording):
                    self.out = self.graph.record(step)
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(
                    f"this step cannot be captured: {error}{_line_of(error)}. A captured step may not read from the "
                    "device (item, float, print, a[mask]), nor bring host arrays to it: pass those as inputs"
                ) from error
            finally:
                _recording = None
        self.leaves, self.recording = recording.leaves(), recording


def _kind(i: int, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of an input on which a graph depends."""
    x = inputs[i]
    if isinstance(x, Rng):
        return "Rng", _first(i, inputs)
    if _is_array(x):
        return str(x.dtype), tuple(x.shape)
    if isinstance(x, _CONSTANTS):
        return type(x).__name__, x
    raise TypeError(
        f"capture: an input is an array, an Rng or a constant, not {type(x).__name__}"
        + (": pass x.data, and make a Tensor of it inside" if isinstance(x, Tensor) else f": {x!r}")
    )


def _is_array(x: Any) -> bool:
    return backend.active().is_array(x) or isinstance(x, backend.numpy.ndarray)


def _first(i: int, inputs: tuple[Any, ...]) -> int:
    """The index of the first input that is the same object as input i."""
    return next(j for j, x in enumerate(inputs) if x is inputs[i])


def _check_output(out: Any) -> None:
    if isinstance(out, (tuple, list)):
        for part in out:
            _check_output(part)
    elif isinstance(out, dict):
        _check_output(list(out.values()))
    elif not (out is None or isinstance(out, Tensor) or hasattr(out, "dtype")):
        raise TypeError(
            f"capture: a step returns arrays and Tensors, not {out!r}, which would be the same after every replay"
        )


def _line_of(error: BaseException) -> str:
    """The line of the user's step, " at file:line: text"."""
    here = os.path.dirname(os.path.dirname(__file__)) + os.sep  # tinydiff/
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if f.line and not f.filename.startswith(here) and f"{os.sep}cupy" not in f.filename]
    return f" at {outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line}" if outside else ""


def cuda_graph() -> Any:
    from .cuda.graph import Graph  # needs CuPy, which is there when this is called

    return Graph()


# ---------------------------------------------------------------- the doors of backend.py


def current() -> Recording | None:
    """The recording of the step that this thread is capturing; None if it is not."""
    return _recording if _recording is not None and _recording.thread == threading.get_ident() else None


@backend.capture.fast("numpy")
@backend.capture.fast("cupy")
def captured(step: Callable[..., Any]) -> Captured:
    return Captured(step)


@backend.each_time.fast("cupy")
def each_time_cupy(action: Callable[[], None]) -> None:
    action()
    if now := current():
        now.actions.append(action)


@backend.numbers.fast("cupy")
def numbers_cupy(values: Callable[[], Any]) -> Array:
    now = current()
    return now.numbers(values) if now else backend.to_device(numpy.asarray(values()))


@backend.refuse_capture.fast("cupy")
def refuse_capture_cupy(what: str, instead: str) -> None:
    if current():
        raise RuntimeError(f"{what} cannot be read in a captured step, as every replay would repeat it: {instead}")
