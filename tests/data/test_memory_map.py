"""What docs/own_pictures.md says of a file that is larger than the memory: training asks it for one batch at a time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinydiff import nn, ops, optim
from tinydiff.training import train


class Watched:
    """An array that tells which rows are asked for, and can be had in no other way."""

    def __init__(self, array: Any):
        self.array, self.asked = array, []  # type: ignore[var-annotated]
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return self.array[index]

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the whole of it was read")


def learned(data: Any) -> np.ndarray:
    net = nn.Linear(3, 1, rng=0)

    def loss(x: Any, *, rng: Any, sample_offset: int) -> Any:
        return ops.square(net(x.astype("float32") / 255)).mean()

    train(net, loss, data, optim.SGD(net.parameters(), lr=0.1), epochs=2, batch_size=4, stream=io.StringIO())
    return net.weight.numpy()


def test_only_the_rows_of_a_batch_are_read(tmp_path: Path, numpy_backend: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (10, 3)).astype("uint8")
    np.save(tmp_path / "rows.npy", array)
    watched = Watched(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    assert np.array_equal(learned(watched), learned(array))
    assert [len(index) for index in watched.asked] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate(watched.asked[:3])) == list(range(10))


def test_reading_all_of_it_would_be_seen(numpy_backend: str) -> None:
    with pytest.raises(AssertionError, match="the whole"):
        np.asarray(Watched(np.zeros((2, 3))))
