"""The loss on data that are not learned from: does the model understand, or does it learn by heart?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from . import backend
from .microbatch import arrays_of, microbatch_size, over_microbatches
from .modes import no_grad
from .rng import Rng
from .training_files import Sources


class Validation:
    """Measures the mean loss over held-out data, always with the same noise: only the weights make a difference.

    loss, model, ema: as train has them. The averaged weights are measured if there are any, because those are used in
    the end; and with model.eval(), so that Dropout and BatchNorm2d do what they will do then. The training is the same,
    bit for bit, as without: sources, the random sources of the model, are afterwards where they were.
    data: like the training data, which have `columns` arrays. rng: where each measurement starts. batch_size,
    microbatch, threads: so many samples at a time as in training.
    Errors: of microbatch.arrays_of; ValueError for another number of arrays than the training data have.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        model: Any,
        ema: Any,
        sources: Sources,
        data: Any,
        columns: int,
        rng: Rng,
        batch_size: int,
        microbatch: int | None,
        threads: int | None,
    ):
        self.loss, self.model, self.ema, self.sources = loss, model, ema, sources
        self.rng, self.batch_size, self.microbatch, self.threads = rng, batch_size, microbatch, threads
        self.arrays, self.n = arrays_of("train: the validation data", data)
        if len(self.arrays) != columns:
            raise ValueError(
                f"train: the validation data must be {columns} arrays like the data, not {len(self.arrays)}"
            )

    def measure(self) -> float:
        """The mean loss. Waits for the device."""
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.applied()
        with no_grad(), self._evaluating(), averaged:
            # One by one and in float64, so that the sum does not depend on the number of threads.
            return sum(total for start in range(0, self.n, self.batch_size) for total in self._totals(start)) / self.n

    def _totals(self, start: int) -> Iterator[float]:
        """Of the batch that begins at this sample: the sum of the losses of each microbatch."""
        batch = [a[start : start + self.batch_size] for a in self.arrays]

        def total(rows: slice) -> float:
            part = [backend.to_device(a[rows]) for a in batch]
            loss = self.loss(*part, rng=self.rng.copy(), sample_offset=start + rows.start)
            return len(part[0]) * loss.item()

        size = self.microbatch or microbatch_size(len(batch[0]), math.prod(batch[0].shape[1:]))
        return over_microbatches(total, len(batch[0]), size, self.threads)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, the model and all below it are as after model.eval(); afterwards each is as it was."""
        modes = [(module, module.training) for _, module in self.model.named_modules()]
        places = self.sources.state_dict()
        self.model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            self.sources.load_state_dict(places)
