"""Comparing with PyTorch: weights that both have, numbers, and the gradient of every parameter."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from tinydiff import Tensor, backend, interop

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
torch.set_num_threads(1)  # the nets and the arrays are small


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def channels_first(x: Any) -> np.ndarray:
    return np.moveaxis(host(x), -1, 1)


def move(theirs: Any, ours: Any) -> None:
    """The twin's weights, made other than the zeros that many begin with, which would hide what comes before them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    interop.from_torch(ours, theirs.state_dict())


def close(ours: Any, theirs: Any, tolerance: float, what: str, least: float = 0.0) -> None:
    """Shape, dtype, and the largest error, relative to the largest value, or to `least`."""
    a, b = host(ours), theirs.detach().numpy()
    assert a.shape == b.shape and a.dtype == b.dtype, what
    error, size = abs(a - b).max(initial=0), max(abs(b).max(initial=0), least)
    assert error <= tolerance * size, f"{what}: {error:.3g} of {size:.3g}"


def compare_gradients(ours: Any, theirs: Any, tolerance: float, zero: str = "") -> None:
    """Every parameter's gradient, brought to PyTorch's layout by interop like a weight; the weights are lost. zero: the
    names, a regular expression, of those that are zero but for rounding, which is measured by the largest of all."""
    for p in ours.parameters():
        p.data = p.grad.data
    found = interop.to_torch(ours)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, _ in ours.named_parameters()} == set(wanted)
    largest = max((float(g.abs().max()) for g in wanted.values()), default=0.0)
    for name, g in wanted.items():
        is_zero, size = re.fullmatch(zero, name) is not None, float(g.abs().max())
        assert is_zero == (size < 1e-5 * largest), f"the gradient of {name} has the size {size}, of {largest}"
        close(found[name], g, tolerance, f"gradient of {name}", least=largest if is_zero else 0.0)
