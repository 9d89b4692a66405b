"""Our U-Net: small, padded, residual, conditioned on the noise level, on any number of labels, and on a text.

    x (N, H, W, C)
      -> patches (H/p, W/p)  -> [residual blocks -> halve] at each level  -> attention, block
      <- patches             <- [double <- residual blocks, with the skips concatenated] at each level

Differences from the tutorial's net (models/tutorial.py): every convolution is padded, so no border is lost, and any
size that can be halved often enough will do; the noise level enters as the slowly varying ln sigma, not by frequencies
of scale 30 in t; the pixels of a patch first become channels (pixel_unshuffle), which saves most of the work at full
resolution; and the last layer of each block starts at zero, so that each block starts as the identity, and the output
of the net at zero. (So the first step changes only the net's last layer; the second also all that does not come before
the last layer of a block; the third everything.)

A text comes as a sequence of vectors, the context, which models/text.py makes of words. At the levels in `attention`
each residual block is followed by a transformer block whose tokens are the pixels: they look at each other, then at the
words, then pass through a network alone. Why all three, and not the look at the words alone? What a pixel hears is a
mean of the words' vectors. "To the left of" can only be obeyed by pixels that also know of each other, from one side of
the image to the other, where convolutions reach only a few pixels far. For C channels it costs 14 C^2 products per
pixel (4 + 2 + 8 for the three), beside 18 C^2 for the convolutions of a residual block, so it belongs to the coarse
levels, which have few pixels.

The mean of the words' vectors also joins the noise level (`pooled`), so each residual block hears of the text as it
hears of a label, at the fine levels too, and from the first steps: attention must first learn where to look, and what
it says starts at zero. What the mean cannot say is which word belongs where; in one comparison a net with it learned
that later (docs/latent_diffusion.md). (Podell et al. 2023, "SDXL", section 2.1, add a vector of the whole text in the
same place.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import nn, ops
from ..arguments import integer
from ..backend import Array, xp
from ..describing import rebuildable
from ..engine import Tensor
from ..nn.transformer import sinusoids
from ..rng import Rng, as_rng
from .inputs import each_label, sizes

TAKEN = ("self", "x", "noise", "condition", "context", "context_mask")  # no names of labels


@rebuildable
class UNet(nn.Module):
    """F(x, noise, context, context_mask, **labels): (N, H, W, C) -> (N, H, W, C or out_channels)

    channels: of each level, from fine to coarse; level i works at 1 / (patch 2^i) of the resolution.
    blocks: residual blocks per level, on the way down; as many on the way up. groups: of the norms, a divisor of all
    channels.
    labels: the conditions, with the number of values of each, {"digit": 10}. Each label is embedded, and the embeddings
    are summed. The label -1 is the null class, no condition (the last row of a table); a label that is not given is -1.
    To learn the null class, replace labels by -1 at random in training (diffusion.drop_labels).
    context: the features of each vector of the context; None for a net without one. attention: the levels that have
    transformer blocks, 0 the finest; by default the coarsest if there is a context, else none. heads: of their
    attention, a divisor of the channels there. pooled: whether the mean of the context, of its vectors that count,
    enters with the noise level, through a linear layer; without a context it means nothing. positions: add to each
    pixel, after the first convolution, where it is (pixel_positions). Without, a pixel knows that only by the zeros
    beyond the border, as far as the convolutions carry them, and is slow to learn what "above" means.
    Errors: ValueError for sizes that are not positive integers, groups or heads that do not divide the channels, levels
    that the net does not have, a context that no level attends to, and names of labels that could be no keyword
    arguments of this net.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (48, 96),
        *,
        blocks: int = 1,
        patch: int = 2,
        out_channels: int | None = None,
        labels: Mapping[str, int] | None = None,
        embedding: int = 192,
        groups: int = 8,
        context: int | None = None,
        attention: Sequence[int] | None = None,
        heads: int = 4,
        pooled: bool = True,
        positions: bool = False,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        channels = sizes("UNet: channels", channels)
        self.in_channels, self.levels = integer("UNet: in_channels", in_channels), len(channels)
        self.positions = positions
        blocks, self.patch = integer("UNet: blocks", blocks), integer("UNet: patch", patch)
        embedding, groups = integer("UNet: embedding", embedding), integer("UNet: groups", groups)
        out_channels = self.in_channels if out_channels is None else integer("UNet: out_channels", out_channels)
        if any(width % groups for width in channels):
            raise ValueError(f"UNet: groups={groups} must divide each of channels={channels}")
        for name in labels or {}:
            if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
                raise ValueError(
                    f"UNet: a label is a keyword argument of the net, which {name!r} cannot be: take an identifier "
                    f"other than {', '.join(TAKEN[:-1])} and {TAKEN[-1]}"
                )
        self.context = None if context is None else integer("UNet: context", context)
        if attention is None:
            attention = () if context is None else (len(channels) - 1,)
        attending = [integer("UNet: a level of attention", level, 0, len(channels) - 1) for level in attention]
        if context is not None and not attending:
            raise ValueError(f"UNet: no level attends to the context of {context} features: attention={attention!r}")

        def blocks_of(level: int, inside: int) -> list[nn.Module]:
            """The blocks of a level, one way."""
            made: list[nn.Module] = []
            for _ in range(blocks):
                made.append(ResidualBlock(inside, channels[level], embedding, groups, rng))
                if level in attending:
                    made.append(SpatialTransformer(channels[level], self.context, heads, rng))
            return made

        self.frequencies = nn.FourierFeatures(64, scale=1.0, rng=rng)
        self.noise = nn.Sequential(
            nn.Linear(64, embedding, rng=rng), nn.SiLU(), nn.Linear(embedding, embedding, rng=rng)
        )
        self.labels: dict[str, nn.Embedding] = {
            name: nn.Embedding(integer(f"UNet: the number of values of {name!r}", n) + 1, embedding, rng=rng)
            for name, n in (labels or {}).items()
        }
        self.pooled = nn.Linear(context, embedding, rng=rng) if context is not None and pooled else None
        self.first = nn.Conv2d(self.in_channels * self.patch**2, channels[0], 3, padding=1, rng=rng)
        self.down: list[nn.Module] = []
        self.up: list[nn.Module] = []
        for i, width in enumerate(channels):
            self.down += blocks_of(i, width)
            if i + 1 < len(channels):
                self.down.append(nn.Conv2d(width, channels[i + 1], 2, stride=2, rng=rng))
        self.middle = [
            SelfAttention(channels[-1], groups, rng),
            ResidualBlock(channels[-1], channels[-1], embedding, groups, rng),
        ]
        for i, width in reversed(list(enumerate(channels))):
            self.up += blocks_of(i, 2 * width)
            if i:
                self.up.append(nn.ConvTranspose2d(width, channels[i - 1], 2, stride=2, rng=rng))
        self.norm = nn.GroupNorm(groups, channels[0])
        self.last = _zero(nn.Conv2d(channels[0], out_channels * self.patch**2, 3, padding=1, rng=rng))

    def forward(self, x: Tensor, noise: Any, context: Any = None, context_mask: Any = None, **labels: Any) -> Tensor:
        """noise: (N,), a slowly varying function of the noise level such as ln(sigma) / 4, or (1,); labels: (N,)
        integers, or one for all. context: (N, S, features), or (1, S, features) for all; context_mask: of bool, (N, S)
        or (1, S), which of its S vectors count, at least one of each row.

        Errors: ValueError for x that is not (N, H, W, in_channels) or whose size cannot be halved often enough, noise
        of another shape, a label that this net does not have, or a context that does not fit; TypeError for labels that
        are not integers, IndexError for one out of range (on a GPU only of those in host memory).
        """
        unit = self.patch * 2 ** (self.levels - 1)
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % unit or x.shape[2] % unit:
            raise ValueError(
                f"UNet: images must be (N, H, W, {self.in_channels}) with H and W multiples of {unit}, not {x.shape}"
            )
        n, shape = len(x), getattr(noise, "shape", None)
        if shape not in ((n,), (1,)):
            found = repr(noise) if shape is None else f"of shape {shape}"
            raise ValueError(f"UNet: noise must be {(n,)}, one for each of x {x.shape}, not {found}")
        words = self._words(context, context_mask, n)
        e = self._embed(noise, labels, n)
        if self.pooled is not None:
            e = e + self.pooled(mean_of_words(*words))
        e = ops.silu(e)  # (N, embedding)
        h = self.first(pixel_unshuffle(x, self.patch))  # (N, H/p, W/p, channels[0])
        if self.positions:
            h = h + pixel_positions(*h.shape[1:]).astype(h.dtype)
        skips = []
        for layer in self.down:
            if isinstance(layer, ResidualBlock):
                h = layer(h, e)
                skips.append(h)
            elif isinstance(layer, SpatialTransformer):
                h = skips[-1] = layer(h, *words)
            else:
                h = layer(h)
        attention, block = self.middle
        h = block(attention(h), e)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(ops.concatenate([h, skips.pop()], axis=3), e)  # (N, h, w, 2C) -> (N, h, w, C)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, *words)
            else:
                h = layer(h)
        return pixel_shuffle(self.last(self.norm(h, silu=True)), self.patch)  # (N, H, W, out_channels)

    def _embed(self, noise: Any, labels: Mapping[str, Any], n: int) -> Tensor:
        e = self.noise(self.frequencies(noise))
        unknown = [name for name in labels if name not in self.labels]
        if unknown:
            raise ValueError(f"UNet: this net has the labels {list(self.labels)}, not {unknown}")
        for name, table in self.labels.items():
            null = table.num_embeddings - 1  # the null class
            if name not in labels:
                values = xp.full(n, null)
            else:
                values = each_label(f"UNet: label {name!r}", labels[name], n, null, null=True)
                values = xp.where(values < 0, null, values)
            e = e + table(values)  # (N, embedding)
        return e

    def _words(self, context: Any, mask: Any, n: int) -> tuple[Any, Any]:
        """The context (N, S, features) and its mask (N or 1, 1, 1, S), as attention takes them."""
        if (context is None) != (self.context is None) or context is None and mask is not None:
            takes = "no context" if self.context is None else f"a context (N, S, {self.context})"
            given = " and ".join(f"{getattr(a, 'shape', a)}" for a in (context, mask))
            raise ValueError(f"UNet: this net takes {takes}, but the context and its mask are {given}")
        if context is None:
            return None, None
        if context.ndim != 3 or context.shape[0] not in (1, n) or context.shape[2] != self.context:
            raise ValueError(f"UNet: the context must be ({n} or 1, S, {self.context}), not {context.shape}")
        if mask is not None:
            if mask.shape not in ((n, context.shape[1]), (1, context.shape[1])):
                raise ValueError(f"UNet: the mask of a context {context.shape} has the shape {mask.shape}")
            mask = mask[:, None, None]  # (N, S) -> (N, heads, pixels, S), where the new axes have length 1
        return ops.broadcast_to(context, shape=(n, *context.shape[1:])), mask


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) scaled and shifted by the embedding, if there is one));
    a 1x1 convolution if the width changes.
    """

    def __init__(self, inside: int, outside: int, embedding: int | None, groups: int, rng: Rng):
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside), nn.Conv2d(inside, outside, 3, padding=1, rng=rng)
        self.modulate = None if embedding is None else nn.Linear(embedding, 2 * outside, rng=rng)
        self.norm2 = nn.GroupNorm(groups, outside)
        self.conv2 = _zero(nn.Conv2d(outside, outside, 3, padding=1, rng=rng))
        self.shortcut = nn.Conv2d(inside, outside, 1, rng=rng) if inside != outside else None

    def forward(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        weight, bias = self.norm2.weight, self.norm2.bias
        if self.modulate is not None:
            scale, shift = ops.split(self.modulate(e), 2, axis=1)  # (N, outside) each
            # (xhat w + b) (scale + 1) + shift is a norm with a weight and a bias per sample.
            weight, bias = weight * (scale + 1), bias * (scale + 1) + shift
        h = self.conv2(ops.group_norm(h, weight, bias, groups=self.norm2.num_groups, silu=True))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SelfAttention(nn.Module):
    """x + projected attention of each pixel to all others, one head."""

    def __init__(self, channels: int, groups: int, rng: Rng):
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels, rng=rng)
        self.project = _zero(nn.Linear(channels, channels, rng=rng))

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        tokens = self.norm(x).reshape(n, 1, height * width, channels)  # one head: (N, 1, HW, C)
        q, k, v = ops.split(self.qkv(tokens), 3, axis=3)  # (N, 1, HW, 3C) -> 3 of (N, 1, HW, C)
        return x + self.project(ops.attention(q, k, v)).reshape(x.shape)  # (N, 1, HW, C) -> (N, H, W, C)


class SpatialTransformer(nn.Module):
    """A transformer block whose tokens are the pixels: x (N, H, W, C), context (N, S, features) -> (N, H, W, C)."""

    def __init__(self, channels: int, context: int | None, heads: int, rng: Rng):
        self.block = nn.TransformerBlock(channels, heads, kdim=context, rng=rng)
        for last in (self.block.self_attn.out_proj, self.block.linear2):
            _zero(last)
        if self.block.multihead_attn is not None:
            _zero(self.block.multihead_attn.out_proj)

    def forward(self, x: Tensor, context: Any = None, mask: Any = None) -> Tensor:
        n, height, width, channels = x.shape
        tokens = ops.reshape(x, shape=(n, height * width, channels))  # (N, H, W, C) -> (N, HW, C)
        return ops.reshape(self.block(tokens, context, context_mask=mask), shape=x.shape)  # -> (N, H, W, C)


def mean_of_words(context: Tensor, mask: Any = None) -> Tensor:
    """The mean of those vectors (N, S, features) that count: (N, features). mask (N or 1, 1, 1, S) of bool; a row in
    which none counts has the mean 0."""
    if mask is None:
        return ops.mean(context, axis=1)  # (N, S, features) -> (N, features)
    share = xp.asarray(mask[:, 0, 0, :, None], context.dtype)  # (N or 1, S, 1)
    share = share / xp.maximum(share.sum(axis=1, keepdims=True), 1)
    return ops.sum(context * share, axis=1)  # (N, S, features) -> (N, features)


def pixel_positions(height: int, width: int, channels: int) -> Array:
    """Where each pixel is, (H, W, C), float64: the sinusoids of its row in the first half of the channels, those of its
    column in the second (nn.transformer.sinusoids). Errors: ValueError for channels that are no multiple of 4."""
    if channels % 4:
        raise ValueError(f"pixel_positions: channels must be a multiple of 4, not {channels}")
    half, shape = channels // 2, (height, width, channels // 2)
    rows, columns = sinusoids(height, half)[:, None], sinusoids(width, half)[None]  # (H, 1, C/2), (1, W, C/2)
    return xp.concatenate([xp.broadcast_to(rows, shape), xp.broadcast_to(columns, shape)], axis=2)


def pixel_unshuffle(x: Tensor, patch: int) -> Tensor:
    """Each patch of pixels becomes one pixel: (N, H, W, C) -> (N, H/p, W/p, p p C).
    Errors: ValueError for another rank, or sizes that are not multiples of the patch."""
    if x.ndim != 4 or x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(f"pixel_unshuffle takes (N, H, W, C) with H and W multiples of {patch}, not {x.shape}")
    n, height, width, c = x.shape
    h, w = height // patch, width // patch
    x = ops.reshape(x, shape=(n, h, patch, w, patch, c))  # (N, H, W, C) -> (N, H/p, p, W/p, p, C)
    x = ops.transpose(x, axes=(0, 1, 3, 2, 4, 5))  # -> (N, H/p, W/p, p, p, C)
    return ops.reshape(x, shape=(n, h, w, patch * patch * c))  # -> (N, H/p, W/p, p p C)


def pixel_shuffle(x: Tensor, patch: int) -> Tensor:
    """The inverse: (N, H, W, p p C) -> (N, p H, p W, C). Errors: ValueError for another rank or number of channels."""
    if x.ndim != 4 or x.shape[3] % patch**2:
        raise ValueError(f"pixel_shuffle takes (N, H, W, C) with C a multiple of {patch**2}, not {x.shape}")
    n, h, w, channels = x.shape
    c = channels // patch**2
    x = ops.reshape(x, shape=(n, h, w, patch, patch, c))  # (N, H, W, p p C) -> (N, H, W, p, p, C)
    x = ops.transpose(x, axes=(0, 1, 3, 2, 4, 5))  # -> (N, H, p, W, p, C)
    return ops.reshape(x, shape=(n, h * patch, w * patch, c))  # -> (N, p H, p W, C)


def _zero(layer: Any) -> Any:
    """A layer whose output starts at zero."""
    for parameter in layer.parameters():
        parameter.data = xp.zeros_like(parameter.data)
    return layer
