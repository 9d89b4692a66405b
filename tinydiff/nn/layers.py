"""The short layers: a linear map, tables and features of numbers, activations, dropout; and initial weights.

A sum over n inputs of variance 1, with weights of variance 1 / n, has variance 1: the signal keeps its size from layer
to layer. n is the fan-in, the number of products that are summed in one output. The defaults are PyTorch's.
"""

from __future__ import annotations

import math
from typing import Any

from .. import backend, ops
from ..arguments import integer, number
from ..backend import Array
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng, as_rng
from .module import Layer, Parameter, Unfilled, same_dtype

# ---------------------------------------------------------------- initial weights


def uniform(shape: tuple[int, ...], bound: float, rng: Rng) -> Array:
    """U(-bound, bound), float32."""
    u = rng.uniform(shape)
    return u if isinstance(rng, Unfilled) else (2 * u - 1) * bound


def fan_in_uniform(shape: tuple[int, ...], fan_in: int, rng: Rng) -> Array:
    """U(-b, b), b = 1 / sqrt(fan_in), which has a variance of 1 / (3 fan_in): for the weights and biases of
    linear maps and convolutions.

    PyTorch calls it kaiming_uniform with a = sqrt(5) (He et al. 2015, with a gain of sqrt(1/3)).
    """
    return uniform(shape, 1 / math.sqrt(fan_in), rng)


def xavier_uniform(shape: tuple[int, ...], rng: Rng) -> Array:
    """U(-b, b), b = sqrt(6 / (fan_in + fan_out)), for a matrix (in, out).

    Source: Glorot and Bengio 2010, equation 16.
    """
    return uniform(shape, math.sqrt(6 / sum(shape)), rng)


# ---------------------------------------------------------------- linear


class Linear(Layer):
    """y = x w + b on the last axis: (..., in_features) -> (..., out_features).

    Parameters: weight (in, out) and bias (out,), U(-1 / sqrt(in), 1 / sqrt(in)). Errors: ValueError for numbers of
    features that are not positive integers, or if the last axis of x is not in_features long; TypeError if its dtype is
    not that of the weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng: Rng | int | None = None):
        rng = as_rng(rng)
        self.in_features = integer("Linear: in_features", in_features)
        self.out_features = integer("Linear: out_features", out_features)
        shape = self.in_features, self.out_features
        self.weight = Parameter(fan_in_uniform(shape, self.in_features, rng))
        self.bias = Parameter(fan_in_uniform(shape[1:], self.in_features, rng)) if bias else None

    def forward(self, x: Any) -> Any:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear({self.in_features}, {self.out_features}) takes x (..., {self.in_features}), not {x.shape}"
            )
        same_dtype(self, x, self.weight)
        if self.bias is None:
            return ops.matmul(x, self.weight)  # (..., in) -> (..., out)
        return ops.linear(x, self.weight, self.bias)


# ---------------------------------------------------------------- numbers to vectors


class Embedding(Layer):
    """A table of vectors, one for each integer from 0 to num_embeddings - 1: (...) -> (..., embedding_dim).

    Parameter: weight (num_embeddings, embedding_dim), N(0, 1). Errors: ValueError for sizes that are not positive
    integers; TypeError for an index that is not of integers; IndexError for one out of range. With CuPy only an index
    in host memory (a list or a NumPy array) is checked for its range, because reading one back from the device would
    wait for it.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, rng: Rng | int | None = None):
        self.num_embeddings = integer("Embedding: num_embeddings", num_embeddings)
        self.embedding_dim = integer("Embedding: embedding_dim", embedding_dim)
        self.weight = Parameter(as_rng(rng).normal((self.num_embeddings, self.embedding_dim)))

    def forward(self, index: Any) -> Any:
        checked = self._checked(array_of(index))
        return ops.embedding(index if isinstance(index, Tensor) else checked, self.weight)

    def _checked(self, index: Any) -> Any:
        on_host = backend.name == "numpy" or not backend.active().is_array(index)
        if not backend.active().is_array(index):
            index = backend.to_host(index)
        if index.dtype.kind not in "iu":
            raise TypeError(f"Embedding: the index must be of integers, not {index.dtype} of shape {index.shape}")
        if on_host and index.size and not (0 <= index.min() and index.max() < self.num_embeddings):
            raise IndexError(
                f"Embedding: the index of shape {index.shape} runs from {index.min()} to {index.max()}, "
                f"but the table has rows 0 to {self.num_embeddings - 1}"
            )
        return backend.to_device(index)


class FourierFeatures(Layer):
    """[sin 2 pi x w, cos 2 pi x w] for fixed random frequencies w: (N,) -> (N, features).

    A network can hardly tell neighbouring times apart from the number t alone; by these features it can.
    Buffer: W (features / 2,), N(0, scale^2), never trained. Source: Tancik et al. 2020, equation 5.
    Errors: ValueError for an odd number of features, a scale that is not positive, or x that is not (N,).
    """

    def __init__(self, features: int, scale: float = 30.0, *, rng: Rng | int | None = None):
        self.features = integer("FourierFeatures: features", features, least=2)
        if self.features % 2:
            raise ValueError(f"FourierFeatures: features must be even, not {features!r}")
        self.scale = number("FourierFeatures: scale", scale, "(0, inf)")
        self.W = Tensor(as_rng(rng).normal(self.features // 2) * self.scale)

    def forward(self, x: Any) -> Any:
        if x.ndim != 1:
            raise ValueError(f"FourierFeatures takes x (N,), not {x.shape}")
        same_dtype(self, x, self.W)
        angle = ops.expand_dims(x, axis=1) * self.W * (2 * math.pi)  # (N, 1) x (F/2,) -> (N, F/2)
        return ops.concatenate([ops.sin(angle), ops.cos(angle)], axis=1)  # (N, F)


# ---------------------------------------------------------------- activations, dropout


class SiLU(Layer):
    """x sigmoid(x)"""

    def forward(self, x: Any) -> Any:
        return ops.silu(x)


class GELU(Layer):
    """x Phi(x); approximate="tanh" for the older formula. Errors: ValueError for another approximation."""

    def __init__(self, approximate: str = "none"):
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate must be 'none' or 'tanh', not {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Any) -> Any:
        return ops.gelu(x, approximate=self.approximate)


class ReLU(Layer):
    """max(x, 0)"""

    def forward(self, x: Any) -> Any:
        return ops.relu(x)


class Sigmoid(Layer):
    """1 / (1 + e^-x)"""

    def forward(self, x: Any) -> Any:
        return ops.sigmoid(x)


class Tanh(Layer):
    """(e^x - e^-x) / (e^x + e^-x)"""

    def forward(self, x: Any) -> Any:
        return ops.tanh(x)


class Identity(Layer):
    """x itself, where a layer is expected."""

    def forward(self, x: Any) -> Any:
        return x


class Flatten(Layer):
    """Each sample as one row: (N, H, W, C) -> (N, H W C)."""

    def forward(self, x: Any) -> Any:
        return x.reshape((len(x), math.prod(x.shape[1:])))  # (N, ...) -> (N, D)


class Dropout(Layer):
    """In training, each element is set to 0 with probability p, and the others are divided by 1 - p; in evaluation
    nothing is done.

    The random source is `.rng`, a stream of its own; its step is not in the state_dict.
    Errors: ValueError for p outside [0, 1).
    """

    def __init__(self, p: float = 0.5, *, rng: Rng | int | None = None):
        source = as_rng(rng)
        self.p, self.rng = number("Dropout: p", p, "[0, 1)"), source.child(f"dropout {source.step}")
        source.step += 1  # so that the next layer made from this source has another stream

    @property
    def needs_whole_batch(self) -> bool:  # type: ignore[override]  # what draws nothing can be in microbatches
        return self.p > 0

    def forward(self, x: Any) -> Any:
        return ops.dropout(x, p=self.p, rng=self.rng) if self.training else x
