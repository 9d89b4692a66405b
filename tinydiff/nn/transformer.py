"""The transformer's block, and the positions that its words need."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..arguments import integer
from ..backend import xp
from ..engine import Tensor
from ..rng import Rng, as_rng
from .attention import MultiHeadAttention
from .layers import GELU, Linear
from .module import Module, Parameter, Sequential, same_dtype
from .norm import LayerNorm


class TransformerBlock(Module):
    """Attention and a network of two layers, each added to what it was given: (N, L, E) -> (N, L, E).

        x = x + self_attention(norm1(x))
        x = x + cross_attention(norm2(x), context)       if there is a context (N, S, context_dim)
        x = x + mlp(norm3(x)),                           mlp = Linear(E, hidden), GELU, Linear(hidden, E)

    The norms come before (pre-norm), so that the way from the output back to the input is a sum without them, and the
    first steps need no warm-up. hidden: 4 E unless given. mask, context_mask: as ops.attention, broadcastable to
    (N, heads, L, L) and (N, heads, L, S).
    Source: Vaswani et al. 2017; pre-norm: Xiong et al. 2020. Errors: as MultiHeadAttention; ValueError for a context
    where there is none, or none where there is one.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        hidden: int | None = None,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        hidden = 4 * embed_dim if hidden is None else integer("TransformerBlock: hidden", hidden)
        self.norm1 = LayerNorm(embed_dim)
        self.self_attention = MultiHeadAttention(embed_dim, num_heads, rng=rng)
        self.norm2 = self.cross_attention = None
        if context_dim is not None:
            self.norm2 = LayerNorm(embed_dim)
            self.cross_attention = MultiHeadAttention(embed_dim, num_heads, kdim=context_dim, vdim=context_dim, rng=rng)
        self.norm3 = LayerNorm(embed_dim)
        self.mlp = Sequential(Linear(embed_dim, hidden, rng=rng), GELU(), Linear(hidden, embed_dim, rng=rng))

    def forward(self, x: Any, context: Any = None, *, mask: Any = None, context_mask: Any = None) -> Any:
        if (context is None) != (self.cross_attention is None):
            given = "none" if context is None else f"one of shape {context.shape}"
            wanted = "none" if self.cross_attention is None else f"(N, S, {self.cross_attention.kdim})"
            raise ValueError(f"TransformerBlock: the context must be {wanted}, but there is {given}")
        x = x + self.self_attention(self.norm1(x), mask=mask)
        if self.cross_attention is not None and self.norm2 is not None:
            x = x + self.cross_attention(self.norm2(x), context, mask=context_mask)
        return x + self.mlp(self.norm3(x))


class LearnedPositions(Module):
    """x plus a vector for each position: (N, L, E) -> (N, L, E), L at most `length`.

    Parameter: weight (length, E), N(0, 0.02^2). Errors: ValueError for x of another shape, or longer.
    """

    def __init__(self, length: int, embed_dim: int, *, rng: Rng | int | None = None):
        shape = integer("LearnedPositions: length", length), integer("LearnedPositions: embed_dim", embed_dim)
        self.weight = Parameter(as_rng(rng).normal(shape) * 0.02)

    def forward(self, x: Any) -> Any:
        return x + _first(self, x, self.weight)


class SinusoidalPositions(Module):
    """x plus sines and cosines of its positions, of wavelengths from 2 pi to 10000 times that: (N, L, E) -> (N, L, E).

        p[l, 2i] = sin(l / 10000^(2i/E)),   p[l, 2i + 1] = cos(l / 10000^(2i/E))

    The p of a position further on is a rotation of this one, by an angle that depends on the distance alone. Buffer:
    table (length, E). Source: Vaswani et al. 2017, section 3.5. Errors: as LearnedPositions; ValueError for an odd E.
    """

    def __init__(self, length: int, embed_dim: int):
        length = integer("SinusoidalPositions: length", length)
        if integer("SinusoidalPositions: embed_dim", embed_dim) % 2:
            raise ValueError(f"SinusoidalPositions: embed_dim must be even, not {embed_dim}")
        wavelengths = 10000 ** (xp.arange(0, embed_dim, 2) / embed_dim)  # over 2 pi: (E/2,), float64
        angle = xp.arange(length)[:, None] / wavelengths  # (length, E/2)
        table = xp.stack([xp.sin(angle), xp.cos(angle)], axis=2).reshape(length, embed_dim)  # (length, E/2, 2) -> ...
        self.table = Tensor(table.astype("float32"))

    def forward(self, x: Any) -> Any:
        return x + _first(self, x, self.table)


def _first(module: Module, x: Any, table: Any) -> Any:
    """The rows of the table (length, E) for x (N, L, E): (L, E)."""
    if x.ndim != 3 or x.shape[2] != table.shape[1] or x.shape[1] > table.shape[0]:
        raise ValueError(
            f"{type(module).__name__} takes (N, L, {table.shape[1]}) with L at most {table.shape[0]}, not {x.shape}"
        )
    same_dtype(module, x, table)
    return ops.getitem(table, index=slice(0, x.shape[1]))
