"""Memory shared with other libraries by DLPack: here with the array module of the backend; with PyTorch in parity/."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Tensor, backend
from tinydiff.backend import xp

pytestmark = pytest.mark.usefixtures("each_fast_backend")


class Exporter:
    """An array of an unknown library, which knows the protocol and nothing else."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None):
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        if self.device is not None:
            raise BufferError("the memory is elsewhere")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.device or self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "int64", "uint8"])
def test_from_dlpack_shares_the_memory(dtype: str) -> None:
    theirs = backend.to_device(np.arange(12).reshape(3, 4).astype(dtype))
    x = tinydiff.from_dlpack(Exporter(theirs[:, 1:]))  # a view, which is not contiguous
    assert type(x) is Tensor and not x.requires_grad and x.node is None
    assert x.dtype == dtype and x.shape == (3, 3) and np.array_equal(x.numpy(), backend.to_host(theirs)[:, 1:])
    theirs[1, 1] = 99
    assert x.numpy()[1, 0] == 99
    x.data[2, 2] = 77
    assert backend.to_host(theirs)[2, 3] == 77


def test_a_copy_is_one() -> None:
    theirs = xp.zeros(3)
    x, y = tinydiff.from_dlpack(Exporter(theirs), copy=True), tinydiff.from_dlpack(Exporter(theirs), copy=False)
    theirs[0] = 1
    assert x.numpy()[0] == 0 and y.numpy()[0] == 1


def test_the_memory_outlives_its_owner() -> None:
    theirs = xp.full(1000, 3.0)
    x = tinydiff.from_dlpack(Exporter(theirs))
    del theirs
    assert (tinydiff.from_dlpack(x).numpy() == 3).all()


def test_a_tensor_hands_its_memory_over() -> None:
    x = tinydiff.tensor(np.arange(6.0).reshape(2, 3))
    theirs = xp.from_dlpack(x)
    theirs[0, 0] = 5
    assert x.numpy()[0, 0] == 5
    assert tuple(x.__dlpack_device__()) == tuple(x.data.__dlpack_device__())
    with pytest.raises(TypeError):
        x.__dlpack__(streams=3)  # options go on to the array, which knows what they are


def test_a_gradient_is_not_lost_in_silence() -> None:
    x = tinydiff.tensor([1.0, 2.0], requires_grad=True)
    for lost in (x, x * 2):
        with pytest.raises(BufferError, match=r"shape \(2,\): hand over x.detach\(\)"):
            xp.from_dlpack(lost)
    assert np.array_equal(backend.to_host(xp.from_dlpack(x.detach())), [1, 2])


def test_a_gradient_flows_from_where_the_memory_came_in() -> None:
    x = tinydiff.from_dlpack(Exporter(xp.full(3, 2.0)))
    x.requires_grad = True
    (x * x).sum().backward()
    assert x.grad is not None and np.array_equal(x.grad.numpy(), [4, 4, 4])


def test_an_axis_that_runs_backwards_is_copied() -> None:
    x = Tensor(xp.arange(4.0)[::-1])
    theirs = xp.from_dlpack(x)
    assert np.array_equal(backend.to_host(theirs), [3, 2, 1, 0]) and theirs.strides[0] > 0
    with pytest.raises(BufferError, match=r"strides \(-8,\) runs backwards"):
        x.__dlpack__(copy=False)


def test_read_only_memory_stays_so(numpy_backend: str) -> None:
    theirs = np.arange(3.0)
    theirs.flags.writeable = False
    x = tinydiff.from_dlpack(theirs)
    assert not np.from_dlpack(x).flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        x += 1
    with pytest.raises(BufferError, match="readonly"):
        x.__dlpack__()  # a reader of the old protocol, which cannot be told


def test_errors_name_what_was_given() -> None:
    with pytest.raises(TypeError, match=r"from_dlpack: a list has no __dlpack__; tinydiff.tensor makes .* \[1, 2\]"):
        tinydiff.from_dlpack([1, 2])
    with pytest.raises(TypeError, match="from_dlpack: float16 is not computed in"):
        tinydiff.from_dlpack(Exporter(xp.zeros(2, "float16")))
    with pytest.raises(BufferError, match=rf"'{backend.name}' cannot share .* this Exporter, .* \(10, 1;"):
        tinydiff.from_dlpack(Exporter(xp.zeros(2), device=(10, 1)))
