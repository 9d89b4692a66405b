"""The order in which training sees the data, as a pure function of the step.

    order = Batches(60_000, 128, seed=0)
    for step in range(start, steps):
        x = images[order.indices(step)]

To resume, start at another step: there is no iterator whose state has to be saved.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arguments import integer


def permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in an epoch, int64 (n,): a function of (n, seed, epoch) alone.

    It sorts random 64-bit words. Philox promises the same words for a key in every version of NumPy,
    which `Generator.permutation` does not; two equal words (probability n^2 / 2^65) would only be a tie.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)  # (n,)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


class Batches:
    """Batches of sample indices, each epoch in a new order.

    n: samples; batch_size: of each batch; seed: 0 to 2^64 - 1, different seeds give different orders.
    drop_last: leave out the samples of an epoch that do not fill a batch (other samples in each epoch), so that
    every batch has the same shape; else the last batch of an epoch is smaller. If n < batch_size, an epoch is one
    batch of n, which is never dropped.
    Errors: ValueError for arguments that are not integers, or out of range.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, *, drop_last: bool = True):
        self.n = integer("n", n)
        self.batch_size = integer("batch_size", batch_size)
        self.seed = integer("seed", seed, 0, 2**64 - 1)
        self.drop_last = drop_last
        whole, rest = divmod(self.n, self.batch_size)
        self.steps_per_epoch = max(whole, 1) if drop_last else whole + (rest > 0)
        self._last = (-1, np.empty(0, np.int64))  # (epoch, its permutation), so that it is sorted once

    def indices(self, step: int) -> np.ndarray:
        """The samples of batch number `step` counted from the start of training, int64 (batch_size,)."""
        epoch, position = self.locate(step)
        last, order = self._last  # read in one step: another thread may replace it meanwhile
        if last != epoch:
            order = permutation(self.n, seed=self.seed, epoch=epoch)
            self._last = (epoch, order)
        start = position * self.batch_size
        return order[start : start + self.batch_size].copy()

    def rows(self, array: Any, step: int) -> Rows:
        """The samples of that batch, in an array on the host."""
        return Rows(array, self.indices(step))

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch that `step` is in, and which of its batches it is."""
        return divmod(integer("step", step, 0), self.steps_per_epoch)

    def __repr__(self) -> str:
        return f"Batches({self.n}, {self.batch_size}, seed={self.seed}, drop_last={self.drop_last})"


class Rows:
    """Some rows of an array, of which a slice is read when it is asked for: of a batch that several processes share,
    each needs its own part only."""

    def __init__(self, array: Any, indices: np.ndarray):
        self.array, self.indices = array, indices
        self.shape = (len(indices), *array.shape[1:])
        self.nbytes = math.prod(self.shape) * getattr(array, "itemsize", 1)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> Any:
        return self.array[self.indices[part]]
