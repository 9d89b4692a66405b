"""What the U-Net and the autoencoder are made of: the residual block, attention with its own projections, and the two
changes of resolution. Images are (N, H, W, C)."""

from __future__ import annotations

from typing import Any

from ... import nn, ops
from ...arguments import integer
from ...rng import Rng


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(silu(e)))); a 1x1 convolution of x if the width
    changes: (N, H, W, inside) -> (N, H, W, outside)."""

    def __init__(self, inside: int, outside: int, embedding: int | None, groups: int, eps: float, rng: Rng):
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside, eps), nn.Conv2d(inside, outside, 3, padding=1, rng=rng)
        self.time_emb_proj = None if embedding is None else nn.Linear(embedding, outside, rng=rng)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outside, eps), nn.Conv2d(outside, outside, 3, padding=1, rng=rng)
        self.conv_shortcut = nn.Conv2d(inside, outside, 1, rng=rng) if inside != outside else None

    def forward(self, x: Any, e: Any = None) -> Any:
        """e: silu of the embedding of the time, (N, embedding)."""
        h = self.conv1(self.norm1(x, silu=True))
        shift = None if self.time_emb_proj is None else self.time_emb_proj(e)  # (N, outside)
        h = self.conv2(self.norm2(h, shift, silu=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention of x (N, L, width) to the context (N, S, context), or to itself: (N, L, width).

    What nn.MultiHeadAttention computes, with one matrix for each of queries, keys and values, as the files have them.
    bias: of those three. Errors: ValueError if the heads do not divide the width.
    """

    def __init__(self, width: int, context: int, heads: int, rng: Rng, bias: bool = False):
        self.heads = integer("Attention: heads", heads)
        if width % self.heads:
            raise ValueError(f"Attention: {heads} heads must divide the width {width}")
        self.to_q = nn.Linear(width, width, bias, rng=rng)
        self.to_k = nn.Linear(context, width, bias, rng=rng)
        self.to_v = nn.Linear(context, width, bias, rng=rng)
        self.to_out = [nn.Linear(width, width, rng=rng)]

    def forward(self, x: Any, context: Any = None) -> Any:
        context = x if context is None else context
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        y = ops.swapaxes(ops.attention(q, k, v), axis1=1, axis2=2)  # (N, heads, L, D) -> (N, L, heads, D)
        return self.to_out[0](ops.reshape(y, shape=x.shape))  # -> (N, L, width)

    def _split(self, x: Any) -> Any:
        n, length, width = x.shape
        x = ops.reshape(x, shape=(n, length, self.heads, width // self.heads))  # (N, L, heads, D)
        return ops.swapaxes(x, axis1=1, axis2=2)  # (N, heads, L, D)


class Downsample(nn.Module):
    """A convolution of stride 2: (N, H, W, C) -> (N, H/2, W/2, C). before, after: rows and columns of zeros that are
    put in front and behind."""

    def __init__(self, channels: int, before: int, after: int, rng: Rng):
        self.before, self.after = before, after
        padding = before if before == after else 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding, rng=rng)

    def forward(self, x: Any) -> Any:
        if self.before != self.after:
            sides = (self.before, self.after)
            x = ops.pad(x, pad_width=((0, 0), sides, sides, (0, 0)))  # (N, H, W, C) -> (N, H + 1, W + 1, C)
        return self.conv(x)


class Upsample(nn.Module):
    """Each pixel becomes four, then a convolution: (N, H, W, C) -> (N, 2H, 2W, C), or the first `size` of its rows and
    columns."""

    def __init__(self, channels: int, rng: Rng):
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, rng=rng)

    def forward(self, x: Any, size: tuple[int, int] | None = None) -> Any:
        x = ops.upsample_nearest2d(x)
        if size is not None and size != x.shape[1:3]:
            x = x[:, : size[0], : size[1]]
        return self.conv(x)
