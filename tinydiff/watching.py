"""What stands beside a training step: is its gradient finite, which op made the NaN, and did the memory suffice?

A loss or gradient that is NaN or Inf would spoil every weight that it reaches, for good. So the step looks before it
updates: `if watch.finite(loss)`. The look costs one pass over the gradients and, on a GPU, one wait for the device.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import backend
from .anomaly import anomaly_detection, detect_anomaly
from .backend import Array, xp
from .microbatch import gradients, microbatch_size
from .modes import no_grad
from .rng import Rng

POLICIES = ("stop", "skip", "rollback", "late")


class Watch:
    """Looks at every step of a run, and does what `policy` says about one that is not finite.

    loss, parameters, microbatch, threads: as for microbatch.gradients. sources: the random sources of the model.
    most_nonfinite: so many steps that are not finite are borne, the next one ends the run.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        model: Any,
        parameters: Sequence[Any],
        sources: Any,
        policy: str,
        most_nonfinite: int,
        microbatch: int | None,
        threads: int | None,
    ):
        self.loss, self.parameters, self.sources = loss, parameters, sources
        self.policy, self.most_nonfinite, self.microbatch, self.threads = policy, most_nonfinite, microbatch, threads
        whole = [layer for _, layer in model.named_modules() if layer.needs_whole_batch]
        self.whole = bool(whole)
        trained = {id(p) for p in model.parameters()}
        # What a forward pass changes: running statistics, and where random sources are.
        self.buffers = [t for layer in whole for _, t in layer.tensors() if id(t) not in trained]
        self.found = 0  # steps that were not finite
        self.flaw, self.made_by = "", ""  # of this step: what is not finite, and where that comes from
        self.updating = False  # are the weights being changed?

    def finite(self, loss: Array) -> bool:
        """Are the loss, and the gradients in the parameters? Then the update begins. Waits for the device."""
        if self.policy != "late":
            arrays = [loss, *(p.grad._data for p in self.parameters if p.grad is not None)]
            if not backend.scalar(xp.stack([xp.isfinite(a).all() for a in arrays]).all()):
                value = backend.scalar(loss)
                self.flaw = "a gradient is not finite" if math.isfinite(value) else f"the loss is {value}"
                return False
        self.updating = True
        return True

    @contextlib.contextmanager
    def step(self, rng: Rng, batch: Sequence[Any]) -> Iterator[None]:
        """Inside, a step is done. If it fails before the update, the model is as it was before it.
        Errors: MemoryError, which says what would fit; what the step raises."""
        self.flaw, self.updating = "", self.policy == "late"
        before = self._changed()
        try:
            yield
        except MemoryError as error:
            if self.updating:
                raise
            self._put_back(before)
            message = self._out_of_memory(rng, batch, error)
            self._put_back(before)
            raise MemoryError(message) from error
        except BaseException:
            if not self.updating:
                self._put_back(before)
            raise
        if self.flaw:
            self._put_back(before)
            self.made_by = self._again(rng, batch)
            self._put_back(before)
            self.found += 1

    def _changed(self) -> tuple[list[Array], Any]:
        if self.policy == "late":  # a captured step keeps its arrays
            return [], None
        return [t._data.copy() for t in self.buffers], self.sources.state_dict() if self.sources.named else None

    def _put_back(self, before: tuple[list[Array], Any]) -> None:
        arrays, sources = before
        with no_grad():
            for tensor, array in zip(self.buffers, arrays):
                tensor[...] = array
        if sources is not None:
            self.sources.load_state_dict(sources)
        for p in self.parameters:
            p.grad = None

    def _again(self, rng: Rng, batch: Sequence[Any]) -> str:
        """Which op made it? That very batch again, looked at op by op."""
        try:
            with contextlib.nullcontext() if anomaly_detection() else detect_anomaly():
                gradients(self.loss, self.parameters, batch, rng, self.microbatch, self.threads)
        except FloatingPointError as error:
            return f"{error} (found by detect_anomaly on the same batch)"
        except Exception as error:
            return f"under detect_anomaly the same batch gave {error!r}"
        return "no op made it when detect_anomaly looked at the same batch, so a sum over microbatches did"

    def _out_of_memory(self, rng: Rng, batch: Sequence[Any], error: MemoryError) -> str:
        """How large the step was, and the largest microbatch that fits: it is tried."""
        n, mb = len(batch[0]), sum(a.nbytes for a in batch) / 1e6
        asked = f" ({error})" if str(error) else ""
        size = min(self.microbatch or microbatch_size(n, math.prod(batch[0].shape[1:])), n)
        said = f"out of memory{asked}: the step has {n} samples, {mb:.3g} MB of input, in microbatches of {size}"
        if self.whole:
            return f"{said}, and a layer that needs the whole batch: choose a smaller batch_size"
        traceback.clear_frames(error.__traceback__)  # the frames hold the arrays of the step that failed
        for threads in dict.fromkeys((self.threads, 1)):
            part = size
            while part > 1:
                part //= 2
                try:
                    gradients(self.loss, self.parameters, batch, rng, part, threads)
                except MemoryError as again:
                    traceback.clear_frames(again.__traceback__)
                else:
                    also = "" if threads == self.threads else ", threads=1"
                    return f"{said}. microbatch={part}{also} fits: it was tried"
        return f"{said}. Not even microbatch=1 fits: choose a smaller model"
