"""y = x w + b, on the last axis."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..rng import Rng, as_rng
from .init import fan_in_uniform
from .module import Module, Parameter, same_dtype


class Linear(Module):
    """y = x w + b on the last axis: (..., in_features) -> (..., out_features).

    Parameters: weight (in, out) and bias (out,), U(-1 / sqrt(in), 1 / sqrt(in)). Errors: ValueError if the last axis of
    x is not in_features long, TypeError if its dtype is not that of the weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng: Rng | int | None = None):
        rng = as_rng(rng)
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(fan_in_uniform((in_features, out_features), in_features, rng))
        self.bias = Parameter(fan_in_uniform((out_features,), in_features, rng)) if bias else None

    def forward(self, x: Any) -> Any:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Linear({self.in_features}, {self.out_features}) takes x (..., {self.in_features}), not {x.shape}"
            )
        same_dtype(self, x, self.weight)
        y = ops.matmul(x, self.weight)  # (..., in) -> (..., out)
        return y if self.bias is None else y + self.bias
