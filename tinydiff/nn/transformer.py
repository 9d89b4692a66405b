"""Transformers: sequences of vectors that look at each other. Positions, and the block that is repeated.

Attention itself does not know the order of a sequence: if its tokens change places, so do its outputs, and nothing else
changes. So something that depends on the place is added to each token first, a fixed table or a learned one.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..arguments import integer
from ..backend import Array, xp
from ..engine import Tensor
from ..rng import Rng, as_rng
from .attention import MultiHeadAttention
from .layers import Dropout, Linear
from .module import Layer, Parameter, same_dtype
from .norm import LayerNorm

# ---------------------------------------------------------------- positions


def sinusoids(length: int, features: int) -> Array:
    """A vector for each position, (length, features), float64, by waves of wavelengths from 2 pi to 20000 pi:

        P[l, 2i] = sin(l / 10000^(2i / features)),   P[l, 2i + 1] = cos(l / 10000^(2i / features))

    A step of k positions turns each pair (sin, cos) by a fixed angle, so P[l + k] is a linear map of P[l], the same for
    all l. Source: Vaswani et al. 2017, section 3.5. Errors: ValueError for an odd number of features.
    """
    length, features = integer("sinusoids: length", length), integer("sinusoids: features", features, least=2)
    if features % 2:
        raise ValueError(f"sinusoids: features must be even, not {features}")
    frequencies = xp.exp(xp.arange(0, features, 2, dtype="float64") * (-math.log(10000) / features))  # (F/2,)
    angles = xp.arange(length, dtype="float64")[:, None] * frequencies  # (L, 1) x (F/2,) -> (L, F/2)
    return xp.stack([xp.sin(angles), xp.cos(angles)], axis=2).reshape(length, features)  # (L, F/2, 2) -> (L, F)


class _Positions(Layer):
    table: Tensor  # (length, features)

    def forward(self, x: Any) -> Any:
        length, features = self.table.shape
        if x.ndim != 3 or x.shape[1] > length or x.shape[2] != features:
            raise ValueError(
                f"{type(self).__name__}({length}, {features}) takes x (N, {length} or less, {features}), not {x.shape}"
            )
        same_dtype(self, x, self.table)
        return x + self.table[: x.shape[1]]  # (N, L, F) + (L, F)


class SinusoidalPositions(_Positions):
    """x + P for the fixed table of `sinusoids`: (N, L, features), L <= length.

    Buffer: table (length, features), never trained. Errors: ValueError for an odd number of features, or another shape.
    """

    def __init__(self, length: int, features: int):
        self.table = Tensor(sinusoids(length, features).astype("float32"))


class LearnedPositions(_Positions):
    """x + P for a learned table: (N, L, features), L <= length.

    Parameter: table (length, features), N(0, 0.02^2) as in GPT-2. Errors: ValueError for another shape.
    """

    def __init__(self, length: int, features: int, *, rng: Rng | int | None = None):
        shape = integer("LearnedPositions: length", length), integer("LearnedPositions: features", features)
        self.table = Parameter(as_rng(rng).normal(shape) * 0.02)


# ---------------------------------------------------------------- the block


class TransformerBlock(Layer):
    """Look at the others, look at the context, think; each a change that is added to x (N, L, embed_dim):

        x = x + self_attn(norm1(x))
        x = x + multihead_attn(norm2(x), context)         if there is a context, of kdim features
        x = x + linear2(gelu(linear1(norm3(x))))          norm2 if there is none

    With the norms in front of each part and none on the way of x itself, gradients pass through all blocks unchanged
    beside the parts (pre-norm; Xiong et al. 2020). hidden: the width of the last part, 4 embed_dim unless given.
    dropout: of the weights of attention and of what each part adds.
    The names are PyTorch's, of TransformerEncoderLayer and, with a context, TransformerDecoderLayer, with
    norm_first=True and activation="gelu". Source: Vaswani et al. 2017, section 3.
    Errors: as MultiHeadAttention; ValueError for a context that the block was not made for, or a missing one.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden: int | None = None,
        dropout: float = 0.0,
        *,
        kdim: int | None = None,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.self_attn = MultiHeadAttention(embed_dim, num_heads, dropout, rng=rng)
        self.multihead_attn = None
        if kdim is not None:
            self.multihead_attn = MultiHeadAttention(embed_dim, num_heads, dropout, kdim=kdim, vdim=kdim, rng=rng)
        hidden = 4 * embed_dim if hidden is None else integer("TransformerBlock: hidden", hidden)
        self.linear1, self.linear2 = Linear(embed_dim, hidden, rng=rng), Linear(hidden, embed_dim, rng=rng)
        self.norm1, self.norm2 = LayerNorm(embed_dim), LayerNorm(embed_dim)
        self.norm3 = None if kdim is None else LayerNorm(embed_dim)
        self.dropout = Dropout(dropout, rng=rng)

    def forward(self, x: Any, context: Any = None, *, mask: Any = None, context_mask: Any = None) -> Any:
        """context (N, S, kdim); mask: which tokens see which, as ops.attention, broadcastable to (N, heads, L, L);
        context_mask: the same for the context, (N, heads, L, S)."""
        if (context is None) != (self.multihead_attn is None):
            what = "no context" if self.multihead_attn is None else f"a context (N, S, {self.multihead_attn.kdim})"
            raise ValueError(f"TransformerBlock: this block takes {what}, not {getattr(context, 'shape', None)}")
        x = x + self.dropout(self.self_attn(self.norm1(x), mask=mask))
        if self.multihead_attn is not None:
            x = x + self.dropout(self.multihead_attn(self.norm2(x), context, mask=context_mask))
        h = self.linear1((self.norm3 or self.norm2)(x))  # (N, L, embed_dim) -> (N, L, hidden)
        return x + self.dropout(self.linear2(ops.gelu(h)))
