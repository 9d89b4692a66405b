"""A small score network for numbers and points of the plane, of the tutorial's kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import nn, ops
from ..rng import Rng, as_rng


class ScoreMLP(nn.Module):
    """The score of noised vectors: x (N, D), t (N,) -> (N, D).

    Ten Fourier features of the time (scale 1) beside x, two hidden layers of 50 with tanh, and, as the score grows as
    1 / s(t), a division by it: (D + 10) - 50 - 50 - D.
    marginal_std: s(t) of the process. Errors: ValueError for x that is not (N, D).
    """

    def __init__(
        self,
        marginal_std: Callable[[Any], Any],
        dim: int,
        hidden: int = 50,
        features: int = 10,
        *,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.marginal_std, self.dim = marginal_std, dim
        self.time = nn.FourierFeatures(features, scale=1.0, rng=rng)
        self.layer1 = nn.Linear(dim + features, hidden, rng=rng)
        self.layer2 = nn.Linear(hidden, hidden, rng=rng)
        self.layer3 = nn.Linear(hidden, dim, rng=rng)

    def forward(self, x: Any, t: Any) -> Any:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"ScoreMLP takes x (N, {self.dim}), not {x.shape}")
        h = ops.concatenate([x, self.time(t)], axis=1)  # (N, D), (N, 10) -> (N, D + 10)
        h = ops.tanh(self.layer1(h))  # -> (N, 50)
        h = ops.tanh(self.layer2(h))
        return self.layer3(h) / self.marginal_std(t).reshape((-1, 1))  # -> (N, D)
