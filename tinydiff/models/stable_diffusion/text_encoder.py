"""The text encoder of CLIP: 77 numbers of words -> 77 vectors, each of which knows the words before it.

Version 1 has that of OpenAI (12 blocks of width 768, gelu approximated by x sigmoid(1.702 x)), version 2 that of
OpenCLIP (width 1024, the exact gelu), whose last block is left out: the vectors of the last but one, normed, are
better to paint from. So the released files of version 2 have 23 blocks of the 24.
"""

from __future__ import annotations

from typing import Any

from ... import nn, ops
from ...arguments import integer
from ...backend import xp
from ...engine import Tensor
from ...rng import Rng, as_rng

ACTIVATIONS = {"gelu": ops.gelu, "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x)}


class TextEncoder(nn.Module):
    """(N, L) integers -> (N, L, width), L <= length. Each position sees itself and what comes before it.

    Errors: ValueError for sizes that are not positive integers, heads that do not divide the width, an unknown
    activation, or tokens of another shape.
    """

    def __init__(
        self,
        size: int = 49408,
        length: int = 77,
        width: int = 768,
        *,
        layers: int = 12,
        heads: int = 12,
        hidden: int | None = None,
        activation: str = "quick_gelu",
        eps: float = 1e-5,
        rng: Rng | int | None = None,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"TextEncoder: activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        rng, self.length = as_rng(rng), integer("TextEncoder: length", length)
        self.activation = activation
        self.width, hidden = integer("TextEncoder: width", width), 4 * width if hidden is None else hidden
        self.embeddings = {
            "token_embedding": nn.Embedding(size, width, rng=rng),
            "position_embedding": nn.Embedding(length, width, rng=rng),
        }
        self.encoder = {
            "layers": [
                Block(width, heads, hidden, activation, eps, rng) for _ in range(integer("TextEncoder: layers", layers))
            ]
        }
        self.final_layer_norm = nn.LayerNorm(width, eps)

    def forward(self, tokens: Any) -> Tensor:
        shape: Any = getattr(tokens, "shape", ())
        if len(shape) != 2 or not 1 <= shape[1] <= self.length:
            raise ValueError(f"TextEncoder: tokens must be (N, {self.length} or less), not {shape}")
        words, positions = self.embeddings.values()
        x = words(tokens) + positions.weight[: shape[1]]  # (N, L) -> (N, L, width)
        causal = xp.tril(xp.ones((shape[1], shape[1]), bool))  # (L, L): row i may see columns up to i
        for block in self.encoder["layers"]:
            x = block(x, causal)
        return self.final_layer_norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + fc2(gelu(fc1(norm(x)))): (N, L, width)."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float, rng: Rng):
        self.self_attn = SelfAttention(width, heads, rng)
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.mlp = {"fc1": nn.Linear(width, hidden, rng=rng), "fc2": nn.Linear(hidden, width, rng=rng)}
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.activation = activation

    def forward(self, x: Any, mask: Any) -> Any:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        h = self.mlp["fc1"](self.layer_norm2(x))  # (N, L, width) -> (N, L, hidden)
        return x + self.mlp["fc2"](ACTIVATIONS[self.activation](h))


class SelfAttention(nn.Module):
    """(N, L, width) -> (N, L, width); mask (L, L): what each position may see."""

    def __init__(self, width: int, heads: int, rng: Rng):
        self.heads = integer("TextEncoder: heads", heads)
        if width % self.heads:
            raise ValueError(f"TextEncoder: {heads} heads must divide the width {width}")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width, rng=rng) for _ in range(4))

    def forward(self, x: Any, mask: Any) -> Any:
        n, length, width = x.shape
        split = (n, length, self.heads, width // self.heads)
        q, k, v = (
            ops.swapaxes(ops.reshape(layer(x), shape=split), axis1=1, axis2=2)  # (N, heads, L, D)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = ops.swapaxes(ops.attention(q, k, v, mask=mask), axis1=1, axis2=2)  # (N, L, heads, D)
        return self.out_proj(ops.reshape(y, shape=x.shape))  # -> (N, L, width)
