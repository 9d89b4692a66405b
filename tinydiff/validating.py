"""The loss on data that are not learned from: does the model understand, or does it learn by heart?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from . import backend
from .backend import xp
from .distributed import Ranks
from .microbatch import arrays_of, microbatch_size, microbatches, over_microbatches
from .modes import no_grad
from .rng import Rng
from .training_files import Sources


class Validation:
    """Measures the mean loss over held-out data, always with the same noise: only the weights make a difference.

    loss, model, ema: as train has them. The averaged weights are measured if there are any, because those are used in
    the end; and with model.eval(), so that Dropout and BatchNorm2d do what they will do then. The training is the same,
    bit for bit, as without: sources, the random sources of the model, are afterwards where they were.
    data: like the training data, which have `columns` arrays. rng: where each measurement starts. batch_size,
    microbatch, threads: so many samples at a time as in training. ranks: they share the microbatches, all call measure,
    and all get the number that one alone would get, bit for bit.
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
        ranks: Ranks,
    ):
        self.loss, self.model, self.ema, self.sources, self.ranks = loss, model, ema, sources, ranks
        self.rng, self.batch_size, self.microbatch, self.threads = rng, batch_size, microbatch, threads
        self.arrays, self.n = arrays_of("train: the validation data", data)
        if len(self.arrays) != columns:
            raise ValueError(
                f"train: the validation data must be {columns} arrays like the data, not {len(self.arrays)}"
            )

    def measure(self) -> float:
        """The mean loss. Waits for the device."""
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.applied()
        totals: list[float] = []  # the sum of the losses of each microbatch; 0 where another rank works on it
        with no_grad(), self._evaluating(), averaged:
            for start in range(0, self.n, self.batch_size):
                totals += self._totals(start, len(totals))
        if self.ranks.size > 1:
            shared = xp.asarray(totals, "float64")
            self.ranks.sum([shared])
            totals = backend.to_host(shared).tolist()
        # One by one and in float64, so that the sum depends neither on the threads nor on the ranks.
        return sum(totals) / self.n

    def _totals(self, start: int, before: int) -> list[float]:
        """Those of the batch that begins at sample `start`, and has so many microbatches before it."""
        batch = [a[start : start + self.batch_size] for a in self.arrays]
        n = len(batch[0])

        def total(rows: slice) -> float:
            part = [backend.to_device(a[rows]) for a in batch]
            loss = self.loss(*part, rng=self.rng.copy(), sample_offset=start + rows.start)
            return len(part[0]) * loss.item()

        size = self.microbatch or microbatch_size(n, math.prod(batch[0].shape[1:]))
        totals = [0.0] * len(microbatches(n, size))
        first = (self.ranks.rank - before) % self.ranks.size  # in turn, across the batches too
        mine = over_microbatches(total, n, size, self.threads, (first, self.ranks.size))
        totals[first :: self.ranks.size] = list(mine)
        return totals

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
