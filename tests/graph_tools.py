"""Leaves, constants and a comparison, for the tests of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np

import tinydiff as td
from tinydiff import backend


def leaf(*shape: int, seed: int = 0, dtype: str = "float64") -> td.Tensor:
    return td.tensor(np.random.default_rng(seed).normal(size=shape).astype(dtype), requires_grad=True)


def constant(*shape: int, seed: int = 1) -> td.Tensor:
    return td.tensor(np.random.default_rng(seed).normal(size=shape))


def equal(x: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    np.testing.assert_allclose(
        backend.to_host(x.data if isinstance(x, td.Tensor) else x), expected, rtol=rtol, atol=atol
    )
