"""Memory shared with PyTorch, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Tensor

pytestmark = pytest.mark.usefixtures("numpy_backend")


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_there_and_back_is_one_memory(torch: Any, dtype: str) -> None:
    theirs = torch.arange(12).reshape(3, 4).to(getattr(torch, dtype)).t()  # (4, 3), not contiguous
    x = tinydiff.from_dlpack(theirs)
    assert x.dtype == dtype and x.shape == (4, 3) and np.array_equal(x.numpy(), theirs.numpy())
    back = torch.from_dlpack(x)
    assert back.data_ptr() == theirs.data_ptr() == x.data.ctypes.data and back.stride() == theirs.stride()
    theirs.fill_(1)
    assert (x.numpy() == 1).all() and bool((back == 1).all())


def test_neither_loses_a_gradient_of_the_other(torch: Any) -> None:
    with pytest.raises(BufferError, match="requires? grad"):
        tinydiff.from_dlpack(torch.ones(2, requires_grad=True))
    with pytest.raises(BufferError, match="x.detach"):
        torch.from_dlpack(tinydiff.tensor([1.0], requires_grad=True))


def test_a_gradient_of_one_may_go_into_the_other(torch: Any) -> None:
    """y = sum(sin(w)^2) with the sine here and the rest there: the chain rule across the border."""
    w = torch.linspace(0, 1, 5, dtype=torch.float64)
    x = tinydiff.from_dlpack(w)
    x.requires_grad = True
    s = tinydiff.ops.sin(x)
    theirs = torch.from_dlpack(s.detach()).requires_grad_()
    (theirs**2).sum().backward()
    s.backward(tinydiff.from_dlpack(theirs.grad))
    wanted = w.clone().requires_grad_()
    (wanted.sin() ** 2).sum().backward()
    assert x.grad is not None and np.allclose(x.grad.numpy(), wanted.grad.numpy(), rtol=1e-14)


def test_backwards_axes_do_not_end_the_process(torch: Any) -> None:
    x = Tensor(np.arange(6.0).reshape(2, 3)[:, ::-1])
    assert np.array_equal(torch.from_dlpack(x).numpy(), x.numpy())


def test_what_numpy_cannot_hold_is_refused(torch: Any) -> None:
    with pytest.raises(BufferError, match="this Tensor, .*Unsupported dtype"):
        tinydiff.from_dlpack(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(BufferError, match="strided"):
        tinydiff.from_dlpack(torch.zeros(2, 2).to_sparse())
