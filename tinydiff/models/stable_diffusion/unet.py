"""The U-Net of Stable Diffusion: (x_t, step, words) -> the noise in x_t, or v.

    x (N, h, w, 4)
      -> conv -> at each level [residual block -> transformer] x 2 -> stride 2      down, 320 to 1280 channels
      -> residual block, transformer, residual block                                middle
      <- at each level [residual block <- transformer] x 3 <- doubled               up, with the skips concatenated

It is models/unet.py, larger: the same residual blocks (the time is added, not multiplied), the same transformer block
whose tokens are the pixels, between two linear maps of its own and with a gated network (GEGLU; Shazeer 2020).
Version 1: 859,520,964 parameters; 8 heads at each level. Version 2: 865,910,724; heads of 64 features, and contexts of
1024.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from ... import nn, ops
from ...arguments import integer
from ...backend import xp
from ...engine import Tensor
from ...operators import array_of
from ...recompute import checkpoint
from ...rng import Rng, as_rng
from ..inputs import sizes
from .blocks import Attention, Downsample, ResidualBlock, Upsample


class UNet(nn.Module):
    """F(x, steps, context): (N, h, w, in_channels), (N,), (N, S, context) -> (N, h, w, out_channels)

    channels: of each level, from fine to coarse. layers: residual blocks per level on the way down, one more on the way
    up. heads: of the attention, one number or one per level. attention: which levels have transformers; by default all
    but the coarsest. linear: are the maps around a transformer linear layers, or 1x1 convolutions, which compute the
    same and are stored otherwise? groups: of the norms.
    `checkpointing`, an attribute: set it to keep only the inputs of each block for the backward pass.
    Errors: ValueError for sizes that are not positive integers or do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        channels: Sequence[int] = (320, 640, 1280, 1280),
        *,
        layers: int = 2,
        context: int = 768,
        heads: int | Sequence[int] = 8,
        attention: Sequence[bool] | None = None,
        linear: bool = False,
        groups: int = 32,
        rng: Rng | int | None = None,
    ):
        rng, channels, levels = as_rng(rng), sizes("UNet: channels", channels), len(channels)
        self.in_channels, self.context = integer("UNet: in_channels", in_channels), integer("UNet: context", context)
        layers, self.checkpointing = integer("UNet: layers", layers), False
        heads = sizes("UNet: heads", [heads] * levels if isinstance(heads, int) else heads, levels)
        attention = [True] * (levels - 1) + [False] if attention is None else list(attention)
        embedding, first = 4 * channels[0], channels[0]

        def resnets(inside: Sequence[int], outside: int) -> list[ResidualBlock]:
            return [ResidualBlock(i, outside, embedding, groups, 1e-5, rng) for i in inside]

        def transformers(level: int, count: int) -> list[SpatialTransformer]:
            inputs = channels[level], context, heads[level], linear, groups, rng
            return [SpatialTransformer(*inputs) for _ in range(count)]

        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1, rng=rng)
        self.time_embedding = {
            "linear_1": nn.Linear(first, embedding, rng=rng), "linear_2": nn.Linear(embedding, embedding, rng=rng)
        }  # fmt: skip
        self.down_blocks: list[Level] = []
        skips = [first]  # the channels of all that is kept for the way up
        for i, width in enumerate(channels):
            last = i == levels - 1
            self.down_blocks.append(
                Level(
                    resnets([skips[-1], *[width] * (layers - 1)], width),
                    transformers(i, layers) if attention[i] else [],
                    downsamplers=[] if last else [Downsample(width, 1, 1, rng)],
                )
            )
            skips += [width] * (layers + (not last))
        self.mid_block = Level(resnets([channels[-1]] * 2, channels[-1]), transformers(levels - 1, 1))
        self.up_blocks: list[Level] = []
        below = channels[-1]
        for i, width in reversed(list(enumerate(channels))):
            inside = [part + skips.pop() for part in [below, *[width] * layers]]
            self.up_blocks.append(
                Level(
                    resnets(inside, width),
                    transformers(i, layers + 1) if attention[i] else [],
                    upsamplers=[Upsample(width, rng)] if i else [],
                )
            )
            below = width
        self.conv_norm_out = nn.GroupNorm(groups, first)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1, rng=rng)

    def forward(self, x: Any, steps: Any, context: Any) -> Tensor:
        """steps: (N,), which of the 1000, counted from 0; fractions are allowed. context: (N, S, context), or
        (1, S, context) for all. Errors: ValueError for shapes that do not fit."""
        n = x.shape[0]
        if x.ndim != 4 or x.shape[3] != self.in_channels:
            raise ValueError(f"UNet: latents must be (N, h, w, {self.in_channels}), not {x.shape}")
        if context.ndim != 3 or context.shape[0] not in (1, n) or context.shape[2] != self.context:
            raise ValueError(f"UNet: the context must be ({n} or 1, S, {self.context}), not {context.shape}")
        if context.shape[0] != n:
            context = ops.broadcast_to(context, shape=(n, *context.shape[1:]))
        run = checkpoint if self.checkpointing else _call
        e = self._embed(steps, x.dtype)
        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for resnet, transformer in level.pairs():
                h = run(resnet, h, e)
                h = run(transformer, h, context) if transformer else h
                skips.append(h)
            for layer in level.downsamplers:
                h = layer(h)  # (N, h, w, C) -> (N, h/2, w/2, C), rounded up
                skips.append(h)
        for resnet, transformer in self.mid_block.pairs():
            h = run(resnet, h, e)
            h = run(transformer, h, context) if transformer else h
        for level in self.up_blocks:
            for resnet, transformer in level.pairs():
                h = run(resnet, ops.concatenate([h, skips.pop()], axis=3), e)  # (N, h, w, C + C') -> (N, h, w, C)
                h = run(transformer, h, context) if transformer else h
            for layer in level.upsamplers:
                h = layer(h, skips[-1].shape[1:3])  # (N, h, w, C) -> (N, 2h, 2w, C), or a row less where h was odd
        return self.conv_out(self.conv_norm_out(h, silu=True))  # (N, h, w, out_channels)

    def _embed(self, steps: Any, dtype: Any) -> Any:
        """silu of the embedding of the steps, (N, 4 channels[0]): every block begins with it."""
        first, second = self.time_embedding.values()
        return ops.silu(second(ops.silu(first(Tensor(time_features(steps, first.in_features, dtype))))))


def time_features(steps: Any, features: int, dtype: Any) -> Any:
    """[cos t w, sin t w] for the frequencies w = 10000^(-i / (F/2)), i from 0 to F/2 - 1: (N,) -> (N, F). In float64,
    because a step of 999 times a frequency of 1 leaves only 5 digits after the point in float32."""
    half = features // 2
    frequencies = xp.exp(xp.arange(half, dtype="float64") * (-math.log(10000) / half))  # (F/2,)
    angles = array_of(steps).astype("float64")[:, None] * frequencies  # (N, 1) x (F/2,) -> (N, F/2)
    return xp.concatenate([xp.cos(angles), xp.sin(angles)], axis=1).astype(dtype)  # (N, F)


class Level(nn.Module):
    """The parts of one level, under the names of the files."""

    def __init__(self, resnets: list[Any], attentions: list[Any], downsamplers: Any = (), upsamplers: Any = ()):
        self.resnets, self.attentions = resnets, attentions
        self.downsamplers, self.upsamplers = downsamplers, upsamplers

    def pairs(self) -> Any:
        """(residual block, the transformer after it or None)"""
        return itertools.zip_longest(self.resnets, self.attentions)


class SpatialTransformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)))), where the tokens of the block are the pixels: (N, h, w, C)."""

    def __init__(self, width: int, context: int, heads: int, linear: bool, groups: int, rng: Rng):
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in = nn.Linear(width, width, rng=rng) if linear else nn.Conv2d(width, width, 1, rng=rng)
        self.transformer_blocks = [TransformerBlock(width, context, heads, rng)]
        self.proj_out = nn.Linear(width, width, rng=rng) if linear else nn.Conv2d(width, width, 1, rng=rng)

    def forward(self, x: Any, context: Any) -> Any:
        n, height, width, channels = x.shape
        h = ops.reshape(self.proj_in(self.norm(x)), shape=(n, height * width, channels))  # (N, h, w, C) -> (N, hw, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(ops.reshape(h, shape=x.shape))  # (N, hw, C) -> (N, h, w, C)


class TransformerBlock(nn.Module):
    """Look at the other pixels, look at the words, think; each a change that is added to x (N, L, width)."""

    def __init__(self, width: int, context: int, heads: int, rng: Rng):
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads, rng)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context, heads, rng)
        self.norm3 = nn.LayerNorm(width)
        self.ff = {"net": {"0": GEGLU(width, 4 * width, rng), "2": nn.Linear(4 * width, width, rng=rng)}}

    def forward(self, x: Any, context: Any) -> Any:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        gated, back = self.ff["net"].values()
        return x + back(gated(self.norm3(x)))  # (N, L, width) -> (N, L, 4 width) -> (N, L, width)


class GEGLU(nn.Module):
    """a gelu(b), where a and b are the two halves of a linear map of x: (..., inside) -> (..., outside)."""

    def __init__(self, inside: int, outside: int, rng: Rng):
        self.proj = nn.Linear(inside, 2 * outside, rng=rng)

    def forward(self, x: Any) -> Any:
        a, b = ops.split(self.proj(x), 2, axis=-1)  # (..., 2 outside) -> 2 of (..., outside)
        return a * ops.gelu(b)


def _call(layer: Any, *inputs: Any) -> Any:
    return layer(*inputs)
