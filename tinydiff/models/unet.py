"""Our U-Net: small, padded, residual, conditioned on the noise level, on any number of labels, and on a context.

    x (N, H, W, C)
      -> patches (H/p, W/p)  -> [residual blocks -> halve] at each level  -> attention, block
      <- patches             <- [double <- residual blocks, with the skips concatenated] at each level

Differences from the tutorial's net (models/tutorial.py): every convolution is padded, so no border is lost, and any
size that can be halved often enough will do; the noise level enters as the slowly varying ln sigma, not by frequencies
of scale 30 in t; the pixels of a patch first become channels (pixel_unshuffle), which saves most of the work at full
resolution; and the last layer of each block starts at zero, so that each block starts as the identity, and the output
of the net at zero. (So the first step changes only the net's last layer; the second also all that does not come before
the last layer of a block; the third everything.)

Where a text says what to draw (models/text.py), the pixels of chosen levels attend to its words, the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import nn, ops
from ..arguments import integer
from ..backend import xp
from ..engine import Tensor
from ..rng import Rng, as_rng
from .inputs import each_label, sizes

RESERVED = ("self", "x", "noise", "context", "context_mask")


class UNet(nn.Module):
    """F(x, noise, context=, **labels): (N, H, W, C) -> (N, H, W, C or out_channels)

    channels: of each level, from fine to coarse; level i works at 1 / (patch 2^i) of the resolution.
    blocks: residual blocks per level, on the way down; as many on the way up. groups: of the norms, a divisor of all
    channels.
    labels: the conditions, with the number of values of each, {"digit": 10}. Each label is embedded, and the embeddings
    are summed. The label -1 is the null class, no condition (the last row of a table); a label that is not given is -1.
    To learn the null class, replace labels by -1 at random in training (label dropout; Ho and Salimans 2022).
    context: the width of the context's vectors, if there is one; attention: the levels, 0 the finest, after whose
    residual blocks the pixels attend to it. heads: of that attention.
    Errors: ValueError for sizes that are not positive integers, groups that do not divide the channels, levels that are
    not there, and names of labels that could be no keyword arguments of this net.
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
        attention: Sequence[int] = (),
        heads: int = 4,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        channels = sizes("UNet: channels", channels)
        self.in_channels, self.levels = integer("UNet: in_channels", in_channels), len(channels)
        self.context = None if context is None else integer("UNet: context", context)
        blocks, self.patch = integer("UNet: blocks", blocks), integer("UNet: patch", patch)
        embedding, groups = integer("UNet: embedding", embedding), integer("UNet: groups", groups)
        out_channels = self.in_channels if out_channels is None else integer("UNet: out_channels", out_channels)
        if any(width % groups for width in channels):
            raise ValueError(f"UNet: groups={groups} must divide each of channels={channels}")
        for name in labels or {}:
            if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
                raise ValueError(
                    f"UNet: a label is a keyword argument of the net, which {name!r} cannot be: take an identifier "
                    f"other than {', '.join(RESERVED)}"
                )
        if (context is None) != (not attention) or any(level not in range(len(channels)) for level in attention):
            raise ValueError(
                f"UNet: attention={tuple(attention)} must be levels from 0 to {len(channels) - 1} if there is a "
                f"context, else none, and context={context}"
            )
        self.frequencies = nn.FourierFeatures(64, scale=1.0, rng=rng)
        self.noise = nn.Sequential(
            nn.Linear(64, embedding, rng=rng), nn.SiLU(), nn.Linear(embedding, embedding, rng=rng)
        )
        self.labels: dict[str, nn.Embedding] = {
            name: nn.Embedding(integer(f"UNet: the number of values of {name!r}", n) + 1, embedding, rng=rng)
            for name, n in (labels or {}).items()
        }
        self.first = nn.Conv2d(self.in_channels * self.patch**2, channels[0], 3, padding=1, rng=rng)
        self.down: list[nn.Module] = []
        self.up: list[nn.Module] = []
        for i, width in enumerate(channels):
            for _ in range(blocks):
                self.down.append(ResidualBlock(width, width, embedding, groups, rng))
                if i in attention:
                    self.down.append(CrossAttention(width, context, heads, groups, rng))
            if i + 1 < len(channels):
                self.down.append(nn.Conv2d(width, channels[i + 1], 2, stride=2, rng=rng))
        self.middle = [
            SelfAttention(channels[-1], groups, rng),
            ResidualBlock(channels[-1], channels[-1], embedding, groups, rng),
        ]
        for i, width in reversed(list(enumerate(channels))):
            for _ in range(blocks):
                self.up.append(ResidualBlock(2 * width, width, embedding, groups, rng))
                if i in attention:
                    self.up.append(CrossAttention(width, context, heads, groups, rng))
            if i:
                self.up.append(nn.ConvTranspose2d(width, channels[i - 1], 2, stride=2, rng=rng))
        self.norm = nn.GroupNorm(groups, channels[0])
        self.last = _zero(nn.Conv2d(channels[0], out_channels * self.patch**2, 3, padding=1, rng=rng))

    def forward(self, x: Tensor, noise: Any, *, context: Any = None, context_mask: Any = None, **labels: Any) -> Tensor:
        """noise: (N,), a slowly varying function of the noise level such as ln(sigma) / 4, or (1,); context: (N, S,
        width); context_mask: which of it may be attended to, broadcastable to (N, heads, HW, S); labels: (N,) integers,
        or one for all.

        Errors: ValueError for x that is not (N, H, W, in_channels) or whose size cannot be halved often enough, noise
        of another shape, a context where there is none or none where there is one, or a label that this net does not
        have; TypeError for labels that are not integers, IndexError for one out of range (on a GPU only of those in
        host memory).
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
        if (context is None) != (self.context is None):
            wanted = "none" if self.context is None else f"(N, S, {self.context})"
            found = "there is none" if context is None else f"it is of shape {context.shape}"
            raise ValueError(f"UNet: the context must be {wanted}, but {found}")
        e = ops.silu(self._embed(noise, labels, n))  # (N, embedding)
        h = self.first(pixel_unshuffle(x, self.patch))  # (N, H/p, W/p, channels[0])
        skips = []
        for layer in self.down:
            if isinstance(layer, ResidualBlock):
                h = layer(h, e)
                skips.append(h)
            elif isinstance(layer, CrossAttention):
                h = skips[-1] = layer(h, context, context_mask)
            else:
                h = layer(h)
        attention, block = self.middle
        h = block(attention(h), e)
        for layer in self.up:
            if isinstance(layer, ResidualBlock):
                h = layer(ops.concatenate([h, skips.pop()], axis=3), e)  # (N, h, w, 2C) -> (N, h, w, C)
            elif isinstance(layer, CrossAttention):
                h = layer(h, context, context_mask)
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


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))) scaled and shifted by the embedding));
    a 1x1 convolution if the width changes.
    """

    def __init__(self, inside: int, outside: int, embedding: int, groups: int, rng: Rng):
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside), nn.Conv2d(inside, outside, 3, padding=1, rng=rng)
        self.modulate = nn.Linear(embedding, 2 * outside, rng=rng)
        self.norm2 = nn.GroupNorm(groups, outside)
        self.conv2 = _zero(nn.Conv2d(outside, outside, 3, padding=1, rng=rng))
        self.shortcut = nn.Conv2d(inside, outside, 1, rng=rng) if inside != outside else None

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        scale, shift = ops.split(self.modulate(e), 2, axis=1)  # (N, outside) each
        # (xhat w + b) (scale + 1) + shift is a norm with a weight and a bias per sample.
        weight, bias = self.norm2.weight * (scale + 1), self.norm2.bias * (scale + 1) + shift
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


class CrossAttention(nn.Module):
    """x + projected attention of each pixel to the vectors of a context, (N, S, width)."""

    def __init__(self, channels: int, width: Any, heads: int, groups: int, rng: Rng):
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = nn.MultiHeadAttention(channels, heads, kdim=width, vdim=width, rng=rng)
        _zero(self.attention.out_proj)

    def forward(self, x: Tensor, context: Any, mask: Any) -> Tensor:
        n, height, width, channels = x.shape
        pixels = self.norm(x).reshape(n, height * width, channels)  # (N, H, W, C) -> (N, HW, C)
        return x + self.attention(pixels, context, mask=mask).reshape(x.shape)  # (N, HW, C) -> (N, H, W, C)


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
