"""A whole step as one CUDA graph.

    def step(x, rng):
        value = gradients(loss, optimizer.parameters, [x], rng)
        optimizer.step()
        return value

    fast = backend.capture(step)
    for x in batches:
        value = fast(x, rng.child(...))             # of a thousand launches, the host makes one

Python is slower than a GPU at launching small kernels. So the first call runs the step as it is, the second records
what it launches, and from then on the device repeats that by itself: the step's Python is not run any more. What has to
happen on the host all the same, such as counting the steps of an optimiser or the draws of an Rng, does (replays.py).
On NumPy, the step is called as it is.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

from . import backend, kernels, replays
from .modes import anomaly_detection, grad_enabled
from .rng import Rng
from .tensor import Tensor

MOST_GRAPHS = 8  # of one step: each keeps all memory that the step needs
_CONSTANTS = (bool, int, float, str, type(None))
_recording = threading.Lock()  # one step is recorded at a time


class Captured:
    """step(*inputs), recorded at its second call and replayed from the third on. Make one with `backend.capture`.

    inputs: arrays, of the host or the device, which are copied to where the graph reads them; Rngs, which advance as
    ever; and constants (None, bool, int, float, str). Outputs: arrays and Tensors on the device, or None, in tuples,
    lists and dicts. An output is overwritten by the next call: copy what should stay.

    What the graph depends on is looked at in every call. Where a shape, a dtype, a constant, the precision of products
    or the recording of gradients is another one, there is another graph, as the last batch of an epoch is shorter than
    the others; at most MOST_GRAPHS of them. Where a Tensor that the step used has got another array since (x.data = a,
    load_state_dict), the graph is made again. Nothing else is seen: other arrays that the step finds by itself must
    stay what and where they are, modes such as model.eval() and an optimiser's nesterov stay as they were, and Python
    that prints, or appends to a list, does so at the first two calls alone. One thread at a time may call it.

    Errors: TypeError for other inputs or outputs; RuntimeError, which names the line, for a step that cannot be
    captured, because it reads from the device or brings host arrays to it, and for too many graphs.
    """

    def __init__(self, step: Callable[..., Any]):
        if not callable(step):
            raise TypeError(f"capture takes a function, not {step!r}")
        self.step = step
        self.graphs: dict[Any, _Replay] = {}

    def __call__(self, *inputs: Any) -> Any:
        key = (*(_kind(i, inputs) for i in range(len(inputs))), backend.matmul_precision(), grad_enabled())
        if backend.active().kernels != "cuda" or anomaly_detection() or replays.current():
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
        self.step, self.graph = step, kernels.Graph()
        self.static: list[Any] = []  # what the step is given in place of the inputs, always the same
        for i, x in enumerate(inputs):
            if isinstance(x, Rng):
                first = _first(i, inputs)
                self.static.append(Rng(0) if first == i else self.static[first])
            else:
                self.static.append(backend.xp.empty(x.shape, x.dtype) if _is_array(x) else x)
        self.recording: replays.Recording | None = None
        self.leaves: list[Any] = []
        self.out: Any = None

    def first(self, inputs: tuple[Any, ...]) -> Any:
        """The step as it is: kernels are compiled, cuBLAS starts, and what is made once is made."""
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
        """Has a Tensor that the step used another array now?"""
        return any((x := ref()) is not None and x._data is not array for ref, array in self.leaves)

    def _take(self, inputs: tuple[Any, ...]) -> None:
        """Copy the inputs to where the graph reads them."""
        for mine, x in zip(self.static, inputs):
            if isinstance(x, Rng):
                mine._become(x.seed, x.stream, x.step)
            elif _is_array(x):
                mine[...] = backend.to_device(x)

    def _give_back(self, inputs: tuple[Any, ...]) -> None:
        """Let the sources that were given advance as those that the step drew from."""
        for mine, x in zip(self.static, inputs):
            if isinstance(x, Rng):
                x._become(mine.seed, mine.stream, mine.step)

    def _record(self) -> None:
        recording = replays.Recording()

        def step() -> Any:
            out = self.step(*self.static)
            _check_output(out)
            recording.put_back()
            return out

        with _recording:
            replays.recording = recording
            try:
                with backend.no_sync():
                    self.out = self.graph.record(step)
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(
                    f"this step cannot be captured: {error}{_line_of(error)}. A captured step may not read from the "
                    "device (item, float, print, a[mask]), nor bring host arrays to it: pass those as inputs"
                ) from error
            finally:
                replays.recording = None
        self.leaves, self.recording = recording.leaves(), recording


def _kind(i: int, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of an input a graph depends on."""
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
    """The number of the first input that is this very object."""
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
    """Where the step of the user was, " at file:line: text"."""
    here = os.path.dirname(__file__) + os.sep
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if f.line and not f.filename.startswith(here) and f"{os.sep}cupy" not in f.filename]
    return f" at {outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line}" if outside else ""
