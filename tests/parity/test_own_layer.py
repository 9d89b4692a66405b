"""The layer that docs/own_layer.md writes is PyTorch's of that name."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np

from tinydiff import interop, tensor

PAGE = Path(__file__).parents[2] / "docs" / "own_layer.md"


def test_the_layer_of_the_page(torch: Any, numpy_backend: str) -> None:
    space: dict[str, Any] = {"__name__": "page"}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text())[:3]:  # imports, and the first class
        exec(example.source, space)
    ours, theirs = space["RMSNorm"](5).astype("float64"), torch.nn.RMSNorm(5, eps=1e-6, dtype=torch.float64)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(-1, 2, 5))
    interop.from_torch(ours, theirs.state_dict())
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    a, b = tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    y, z = ours(a), theirs(b)
    (y * y * y).sum().backward()
    (z * z * z).sum().backward()
    assert np.allclose(y.numpy(), z.detach().numpy(), rtol=1e-12)
    assert np.allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-10)  # type: ignore[union-attr]
    assert np.allclose(ours.weight.grad.numpy(), theirs.weight.grad.numpy(), rtol=1e-10)
