"""Numbers to vectors: a table for integers, waves for a real number."""

from __future__ import annotations

import math
from typing import Any

from .. import backend, ops
from ..rng import Rng, as_rng
from ..tensor import Tensor, array_of
from .module import Module, Parameter, same_dtype


class Embedding(Module):
    """A table of vectors, one for each integer from 0 to num_embeddings - 1: (...) -> (..., embedding_dim).

    Parameter: weight (num_embeddings, embedding_dim), N(0, 1). Errors: TypeError for an index that is not of integers;
    IndexError for one out of range. An index that is on a GPU already is not read back to be checked: give a list or a
    NumPy array to have it checked there too.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng: Rng | int | None = None):
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = Parameter(as_rng(rng).normal((num_embeddings, embedding_dim)))

    def forward(self, index: Any) -> Any:
        checked = self._checked(array_of(index))
        return ops.embedding(index if isinstance(index, Tensor) else checked, self.weight)

    def _checked(self, index: Any) -> Any:
        on_host = backend.name == "numpy" or not backend.active().is_array(index)
        if on_host:
            index = backend.to_host(index) if not backend.active().is_array(index) else index
        if index.dtype.kind not in "iu":
            raise TypeError(f"Embedding: the index must be of integers, not {index.dtype} of shape {index.shape}")
        if on_host and index.size and not (0 <= index.min() and index.max() < self.num_embeddings):
            raise IndexError(
                f"Embedding: the index of shape {index.shape} runs from {index.min()} to {index.max()}, "
                f"but the table has rows 0 to {self.num_embeddings - 1}"
            )
        return backend.to_device(index)


class FourierFeatures(Module):
    """[sin 2 pi x w, cos 2 pi x w] for fixed random frequencies w: (N,) -> (N, features).

    Without it a network sees a number such as the time as one slow direction; the waves tell neighbouring times apart.
    Buffer: W (features / 2,), N(0, scale^2), never trained. Source: Tancik et al. 2020, equation 5.
    Errors: ValueError for an odd number of features, or x that is not (N,).
    """

    def __init__(self, features: int, scale: float = 30.0, *, rng: Rng | int | None = None):
        if features < 2 or features % 2:
            raise ValueError(f"FourierFeatures: features must be even and positive, not {features}")
        self.features, self.scale = features, scale
        self.W = Tensor(as_rng(rng).normal(features // 2) * scale)

    def forward(self, x: Any) -> Any:
        if x.ndim != 1:
            raise ValueError(f"FourierFeatures takes x (N,), not {x.shape}")
        same_dtype(self, x, self.W)
        angle = ops.expand_dims(x, axis=1) * self.W * (2 * math.pi)  # (N, 1) x (F/2,) -> (N, F/2)
        return ops.concatenate([ops.sin(angle), ops.cos(angle)], axis=1)  # (N, F)
