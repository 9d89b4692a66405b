"""The autoencoder of Stable Diffusion: images (N, H, W, 3) in [-1, 1] <-> latents (N, H/8, W/8, 4).

It is models/autoencoder.py's variational one, larger: two residual blocks per level, attention over all pixels at the
coarsest, and 83,653,863 parameters. The U-Net has learned latents of deviation 1, so the mean of the encoder is
multiplied by 0.18215, one over the deviation that its latents have (Rombach et al. 2022, appendix G).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ... import nn, ops
from ...arguments import integer, number
from ...backend import Array
from ...engine import Tensor
from ...rng import Rng, as_rng
from ..inputs import sizes
from .blocks import Attention, Downsample, ResidualBlock, Upsample
from .unet import Level

EPS = 1e-6  # of all its norms


class Autoencoder(nn.Module):
    """encode: x (N, H, W, in_channels) -> z (N, h, w, latent); decode: z -> x.

    channels: of each level, from fine to coarse; so h = H / reduction with reduction = 2^(levels - 1). layers: residual
    blocks per level of the encoder, one more in the decoder. scaling: latents are multiplied by it.
    Errors: ValueError for sizes that are not positive integers or do not fit each other.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: Sequence[int] = (128, 256, 512, 512),
        *,
        latent: int = 4,
        layers: int = 2,
        groups: int = 32,
        scaling: float = 0.18215,
        rng: Rng | int | None = None,
    ):
        rng, channels = as_rng(rng), sizes("Autoencoder: channels", channels)
        self.in_channels = integer("Autoencoder: in_channels", in_channels)
        self.latent, layers = integer("Autoencoder: latent", latent), integer("Autoencoder: layers", layers)
        self.reduction, self.scaling = 2 ** (len(channels) - 1), number("Autoencoder: scaling", scaling, "(0, inf)")
        self.encoder = Encoder(in_channels, channels, 2 * latent, layers, groups, rng)
        self.decoder = Decoder(latent, channels, out_channels, layers + 1, groups, rng)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1, rng=rng)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1, rng=rng)

    def distribution(self, x: Any) -> tuple[Tensor, Tensor]:
        """mu and ln sigma^2 of the latents before scaling, (N, h, w, latent) each; the logarithm in [-30, 20]."""
        x = x if isinstance(x, Tensor) else Tensor(x)
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % self.reduction or x.shape[2] % self.reduction:
            raise ValueError(
                f"Autoencoder: images must be (N, H, W, {self.in_channels}) with H and W multiples of "
                f"{self.reduction}, not {x.shape}"
            )
        mean, log_variance = ops.split(self.quant_conv(self.encoder(x)), 2, axis=3)
        return mean, ops.clip(log_variance, low=-30.0, high=20.0)

    def encode(self, x: Any, noise: Array | None = None) -> Tensor:
        """scaling times the mean of the latents, or with standard normals as `noise` (N, h, w, latent) a sample."""
        mean, log_variance = self.distribution(x)
        return self.scaling * (mean if noise is None else mean + ops.exp(0.5 * log_variance) * noise)

    def decode(self, z: Any) -> Tensor:
        """Images, in about [-1, 1]. Errors: ValueError for latents of another width."""
        z = z if isinstance(z, Tensor) else Tensor(z)
        if z.ndim != 4 or z.shape[3] != self.latent:
            raise ValueError(f"Autoencoder: latents must be (N, h, w, {self.latent}), not {z.shape}")
        return self.decoder(self.post_quant_conv(z * (1 / self.scaling)))

    def forward(self, x: Any) -> Tensor:
        return self.decode(self.encode(x))


class Encoder(nn.Module):
    """(N, H, W, inside) -> (N, h, w, outside)"""

    def __init__(self, inside: int, channels: Sequence[int], outside: int, layers: int, groups: int, rng: Rng):
        self.conv_in = nn.Conv2d(inside, channels[0], 3, padding=1, rng=rng)
        self.down_blocks = []
        for i, width in enumerate(channels):
            first = channels[max(i - 1, 0)]
            self.down_blocks.append(
                Level(
                    [ResidualBlock(n, width, None, groups, EPS, rng) for n in [first, *[width] * (layers - 1)]],
                    [],
                    downsamplers=[Downsample(width, 0, 1, rng)] if i + 1 < len(channels) else [],
                )
            )
        self.mid_block = middle(channels[-1], groups, rng)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], outside, 3, padding=1, rng=rng)

    def forward(self, x: Any) -> Any:
        x = self.conv_in(x)
        for level in [*self.down_blocks, self.mid_block]:
            x = through(level, x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nn.Module):
    """(N, h, w, inside) -> (N, H, W, outside)"""

    def __init__(self, inside: int, channels: Sequence[int], outside: int, layers: int, groups: int, rng: Rng):
        self.conv_in = nn.Conv2d(inside, channels[-1], 3, padding=1, rng=rng)
        self.mid_block = middle(channels[-1], groups, rng)
        self.up_blocks = []
        for i, width in reversed(list(enumerate(channels))):
            first = channels[min(i + 1, len(channels) - 1)]
            self.up_blocks.append(
                Level(
                    [ResidualBlock(n, width, None, groups, EPS, rng) for n in [first, *[width] * (layers - 1)]],
                    [],
                    upsamplers=[Upsample(width, rng)] if i else [],
                )
            )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], EPS)
        self.conv_out = nn.Conv2d(channels[0], outside, 3, padding=1, rng=rng)

    def forward(self, x: Any) -> Any:
        x = self.conv_in(x)
        for level in [self.mid_block, *self.up_blocks]:
            x = through(level, x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


def middle(width: int, groups: int, rng: Rng) -> Level:
    return Level(
        [ResidualBlock(width, width, None, groups, EPS, rng) for _ in range(2)], [PixelAttention(width, groups, rng)]
    )


def through(level: Level, x: Any) -> Any:
    for resnet, attention in level.pairs():
        x = resnet(x)
        x = attention(x) if attention else x
    for layer in (*level.downsamplers, *level.upsamplers):
        x = layer(x)
    return x


class PixelAttention(Attention):
    """x + attention of each pixel to all others, one head: (N, h, w, C)."""

    def __init__(self, width: int, groups: int, rng: Rng):
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        super().__init__(width, width, 1, rng, bias=True)

    def forward(self, x: Any) -> Any:  # type: ignore[override]
        n, height, width, channels = x.shape
        tokens = ops.reshape(self.group_norm(x), shape=(n, height * width, channels))  # (N, h, w, C) -> (N, hw, C)
        return x + ops.reshape(super().forward(tokens), shape=x.shape)  # -> (N, h, w, C)
