"""The functions between the layers, as layers; and dropout."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..rng import Rng, as_rng
from .module import Module


class SiLU(Module):
    """x sigmoid(x)"""

    def forward(self, x: Any) -> Any:
        return ops.silu(x)


class GELU(Module):
    """x Phi(x); approximate="tanh" for the older formula."""

    def __init__(self, approximate: str = "none"):
        self.approximate = approximate

    def forward(self, x: Any) -> Any:
        return ops.gelu(x, approximate=self.approximate)


class ReLU(Module):
    """max(x, 0)"""

    def forward(self, x: Any) -> Any:
        return ops.relu(x)


class Sigmoid(Module):
    """1 / (1 + e^-x)"""

    def forward(self, x: Any) -> Any:
        return ops.sigmoid(x)


class Dropout(Module):
    """While training, each element is set to 0 with probability p, and the others divided by 1 - p;
    else nothing is done.

    The random source is `.rng`, a stream of its own; its step is not in the state_dict.
    Errors: ValueError for p outside [0, 1).
    """

    needs_whole_batch = True

    def __init__(self, p: float = 0.5, *, rng: Rng | int | None = None):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be in [0, 1), not {p!r}")
        source = as_rng(rng)
        self.p, self.rng = p, source.child(f"dropout {source.step}")
        source.step += 1  # so that the next layer made from this source has another stream

    def forward(self, x: Any) -> Any:
        return ops.dropout(x, p=self.p, rng=self.rng) if self.training else x
