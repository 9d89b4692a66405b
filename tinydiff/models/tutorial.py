"""The nets of the tutorial "Stable Diffusion from Scratch" and of the notebooks it comes from, exactly.

    ScoreUNet         1,115,297 parameters (skips concatenated) or 1,022,849 (added): the score of noised digits
    ConditionalUNet   2,045,057: the additive one, which gets the digit as its condition by attention
    Autoencoder             709: 28x28 images to 10x10x4 latents, and back
    LatentUNet          285,284: the score of noised latents

Read ScoreUNet first. `marginal_std`, a function of the times (N,), is that of the process (diffusion/process.py). The
networks return the score: their raw output divided by s(t), because the score of x_0 + s(t) z grows like 1 / s(t), and
a network is easier to train if its output has the same size at all times.

All convolutions are 3x3 without padding, so images shrink at every layer, and the sizes on the way up must equal those
on the way down. The output paddings are chosen for one size of image, 28x28 (latents 10x10); others are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import nn, ops
from ..arguments import integer
from ..describing import rebuildable
from ..rng import Rng, as_rng
from .inputs import each_label, sizes

MarginalStd = Callable[[Any], Any]

# Losses that others report for these nets on MNIST, to compare yours with: score_matching_loss averaged over the images
# of an epoch, by epoch counted from 0, as printed in the seminar's notebook of 2022 (see docs/results.md).
PUBLISHED_LOSS: dict[str, dict[int, float]] = {
    "concat": {49: 41.5},
    "add": {0: 1154.0, 1: 300.0, 10: 64.9, 20: 42.4, 40: 30.0, 60: 26.5, 74: 24.75},
    "conditional": {0: 1010.0, 1: 276.0, 10: 56.7, 20: 37.9, 50: 27.1, 80: 23.6, 99: 22.30},
}

# For comparison: the same loss, on the test images, of scores that need no net.
SIMPLE_LOSS: dict[str, float] = {"zero score": 784.0, "a Gaussian per pixel": 56.8, "best affine denoiser": 31.1}


@rebuildable
class ScoreUNet(nn.Module):
    """The score of noised images: x (N, 28, 28, 1) and times t (N,) -> (N, 28, 28, 1).

    On the way down the images become smaller and the channels more, on the way up the reverse. Each layer up also gets
    the output of the layer of its size on the way down, concatenated ("concat") or added ("add"). The time is added in
    each layer. In the last (dense7) it has no effect: the group norm there has one group per channel, so it subtracts
    a number that was added to a whole channel.
    Errors: ValueError for another shape of x or t, or another value of skips; TypeError if the dtype is not that of the
    weights.
    """

    def __init__(
        self,
        marginal_std: MarginalStd,
        channels: tuple[int, int, int, int] = (32, 64, 128, 256),
        embed_dim: int = 256,
        *,
        skips: str = "concat",
        rng: Rng | int | None = None,
    ):
        if skips not in ("concat", "add"):
            raise ValueError(f"{type(self).__name__}: skips must be 'concat' or 'add', not {skips!r}")
        rng = as_rng(rng)
        self.marginal_std, self.skips = marginal_std, skips
        c1, c2, c3, c4 = sizes(f"{type(self).__name__}: channels", channels, 4)
        up = 2 if skips == "concat" else 1

        self.time_embed = nn.Sequential(
            nn.FourierFeatures(embed_dim, rng=rng), nn.Linear(embed_dim, embed_dim, rng=rng), nn.SiLU()
        )
        # Down. No bias: the dense layer of the time has one.
        self.conv1 = nn.Conv2d(1, c1, 3, stride=1, bias=False, rng=rng)
        self.dense1 = nn.Linear(embed_dim, c1, rng=rng)
        self.gnorm1 = nn.GroupNorm(4, c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, bias=False, rng=rng)
        self.dense2 = nn.Linear(embed_dim, c2, rng=rng)
        self.gnorm2 = nn.GroupNorm(32, c2)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride=2, bias=False, rng=rng)
        self.dense3 = nn.Linear(embed_dim, c3, rng=rng)
        self.gnorm3 = nn.GroupNorm(32, c3)
        self.conv4 = nn.Conv2d(c3, c4, 3, stride=2, bias=False, rng=rng)
        self.dense4 = nn.Linear(embed_dim, c4, rng=rng)
        self.gnorm4 = nn.GroupNorm(32, c4)
        # Up.
        self.tconv4 = nn.ConvTranspose2d(c4, c3, 3, stride=2, bias=False, rng=rng)
        self.dense5 = nn.Linear(embed_dim, c3, rng=rng)
        self.tgnorm4 = nn.GroupNorm(32, c3)
        self.tconv3 = nn.ConvTranspose2d(up * c3, c2, 3, stride=2, output_padding=1, bias=False, rng=rng)
        self.dense6 = nn.Linear(embed_dim, c2, rng=rng)
        self.tgnorm3 = nn.GroupNorm(32, c2)
        self.tconv2 = nn.ConvTranspose2d(up * c2, c1, 3, stride=2, output_padding=1, bias=False, rng=rng)
        self.dense7 = nn.Linear(embed_dim, c1, rng=rng)
        self.tgnorm2 = nn.GroupNorm(32, c1)
        self.tconv1 = nn.ConvTranspose2d(up * c1, 1, 3, stride=1, rng=rng)

    def forward(self, x: Any, t: Any) -> Any:
        return self._score(x, t, lambda h: h, lambda h: h)

    def _score(self, x: Any, t: Any, attend3: Callable[[Any], Any], attend4: Callable[[Any], Any]) -> Any:
        """The forward pass; attend3 and attend4 are applied after levels 3 and 4."""
        _check(self, x, t, (28, 28, 1))
        time = self.time_embed(t)  # (N,) -> (N, 256)

        h1 = _hidden(x, self.conv1, self.dense1(time), self.gnorm1)  # (N, 28, 28, 1) -> (N, 26, 26, 32)
        h2 = _hidden(h1, self.conv2, self.dense2(time), self.gnorm2)  # -> (N, 12, 12, 64)
        h3 = _hidden(h2, self.conv3, self.dense3(time), self.gnorm3)  # -> (N, 5, 5, 128)
        h3 = attend3(h3)
        h4 = _hidden(h3, self.conv4, self.dense4(time), self.gnorm4)  # -> (N, 2, 2, 256)
        h4 = attend4(h4)

        h = _hidden(h4, self.tconv4, self.dense5(time), self.tgnorm4)  # -> (N, 5, 5, 128)
        h = _hidden(self._join(h, h3), self.tconv3, self.dense6(time), self.tgnorm3)  # -> (N, 12, 12, 64)
        h = _hidden(self._join(h, h2), self.tconv2, self.dense7(time), self.tgnorm2)  # -> (N, 26, 26, 32)
        h = self.tconv1(self._join(h, h1))  # -> (N, 28, 28, 1)
        return h / _per_image(self.marginal_std(t))

    def _join(self, h: Any, skip: Any) -> Any:
        # (N, H, W, C) -> (N, H, W, 2C or C)
        return ops.concatenate([h, skip], axis=3) if self.skips == "concat" else h + skip


@rebuildable
class ConditionalUNet(ScoreUNet):
    """The score of noised images of a given class: x (N, 28, 28, 1), t (N,), labels (N,) of integers, or one for all
    -> (N, 28, 28, 1).

    The additive ScoreUNet, with a transformer after levels 3 and 4 that attends to the embedding of the label. That is
    a single token, so the softmax over it is always 1: query and key of the cross-attention get no gradient, and the
    cross-attention only adds one vector per class. It is built as it was published.
    Errors: as ScoreUNet; TypeError for labels that are not integers, IndexError for one out of range (on a GPU only of
    those in host memory).
    """

    def __init__(
        self,
        marginal_std: MarginalStd,
        channels: tuple[int, int, int, int] = (32, 64, 128, 256),
        embed_dim: int = 256,
        context_dim: int = 256,
        classes: int = 10,
        *,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        super().__init__(marginal_std, channels, embed_dim, skips="add", rng=rng)
        classes = integer(f"{type(self).__name__}: classes", classes)
        self.cond_embed = nn.Embedding(classes, context_dim, rng=rng)
        self.attn3 = SpatialTransformer(channels[2], context_dim, rng=rng)
        self.attn4 = SpatialTransformer(channels[3], context_dim, rng=rng)

    def forward(self, x: Any, t: Any, labels: Any) -> Any:  # type: ignore[override]  # one input more
        _check(self, x, t, (28, 28, 1))
        context = _context(self, x, labels, self.cond_embed)
        return self._score(x, t, lambda h: self.attn3(h, context), lambda h: self.attn4(h, context))


# ---------------------------------------------------------------- attention


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C)) v with q of x (N, L, C), k and v of the context (N, S, context_dim), or of x itself
    -> (N, L, C).

    One head, no biases, no projection of the output.
    """

    def __init__(self, width: int, context_dim: int, *, rng: Rng | int | None = None):
        rng = as_rng(rng)
        self.query = nn.Linear(width, width, bias=False, rng=rng)
        self.key = nn.Linear(context_dim, width, bias=False, rng=rng)
        self.value = nn.Linear(context_dim, width, bias=False, rng=rng)

    def forward(self, x: Any, context: Any = None) -> Any:
        context = x if context is None else context
        return ops.attention(self.query(x), self.key(context), self.value(context))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a network on each token; each after a layer norm, and each added to
    its input."""

    def __init__(self, width: int, context_dim: int, *, rng: Rng | int | None = None):
        rng = as_rng(rng)
        self.attn_self = Attention(width, width, rng=rng)
        self.attn_cross = Attention(width, context_dim, rng=rng)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 3 * width, rng=rng), nn.GELU(), nn.Linear(3 * width, width, rng=rng))

    def forward(self, x: Any, context: Any) -> Any:
        x = x + self.attn_self(self.norm1(x))
        x = x + self.attn_cross(self.norm2(x), context)
        return x + self.ffn(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block whose tokens are the pixels, added to its input:
    x (N, H, W, C), context (N, S, context_dim) -> (N, H, W, C).
    """

    def __init__(self, width: int, context_dim: int, *, rng: Rng | int | None = None):
        self.transformer = TransformerBlock(width, context_dim, rng=rng)

    def forward(self, x: Any, context: Any) -> Any:
        if x.ndim != 4:
            raise ValueError(f"SpatialTransformer takes x (N, H, W, C), not {x.shape}")
        n, height, width, c = x.shape
        tokens = self.transformer(ops.reshape(x, shape=(n, height * width, c)), context)  # (N, H, W, C) -> (N, HW, C)
        return x + ops.reshape(tokens, shape=x.shape)  # (N, HW, C) -> (N, H, W, C)


# ---------------------------------------------------------------- latent diffusion


@rebuildable
class Autoencoder(nn.Module):
    """Images to latents and back: (N, 28, 28, 1) -> (N, 10, 10, 4) -> (N, 28, 28, 1), whose values lie between 0 and 1.

    `encode`, `decode`, and `forward`, which is both. It has batch norm: call .eval() before encoding
    or decoding single images.
    Errors: ValueError for another shape.
    """

    def __init__(self, channels: tuple[int, int, int] = (4, 4, 4), *, rng: Rng | int | None = None):
        rng = as_rng(rng)
        self.channels = c1, c2, c3 = sizes("Autoencoder: channels", channels, 3)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, c1, 3, stride=1, rng=rng),  # (N, 28, 28, 1) -> (N, 26, 26, 4)
            nn.BatchNorm2d(c1),
            nn.SiLU(),
            nn.Conv2d(c1, c2, 3, stride=2, rng=rng),  # -> (N, 12, 12, 4)
            nn.BatchNorm2d(c2),
            nn.SiLU(),
            nn.Conv2d(c2, c3, 3, stride=1, rng=rng),  # -> (N, 10, 10, 4)
            nn.BatchNorm2d(c3),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(c3, c2, 3, stride=1, rng=rng),  # (N, 10, 10, 4) -> (N, 12, 12, 4)
            nn.BatchNorm2d(c2),
            nn.SiLU(),
            nn.ConvTranspose2d(c2, c1, 3, stride=2, output_padding=1, rng=rng),  # -> (N, 26, 26, 4)
            nn.BatchNorm2d(c1),
            nn.SiLU(),
            nn.ConvTranspose2d(c1, 1, 3, stride=1, rng=rng),  # -> (N, 28, 28, 1)
            nn.Sigmoid(),
        )

    def encode(self, x: Any) -> Any:
        _check_shape(self, x, (28, 28, 1))
        return self.encoder(x)

    def decode(self, z: Any) -> Any:
        _check_shape(self, z, (10, 10, self.channels[2]))
        return self.decoder(z)

    def forward(self, x: Any) -> Any:
        return self.decode(self.encode(x))


@rebuildable
class LatentUNet(nn.Module):
    """The score of noised latents of a given class:
    x (N, 10, 10, 4), t (N,), labels (N,) of integers, or one for all -> (N, 10, 10, 4).

    A conditional U-Net of three levels, skips added, a transformer after levels 2 and 3 and after the first layer up.
    Errors: as ConditionalUNet.
    """

    def __init__(
        self,
        marginal_std: MarginalStd,
        channels: tuple[int, int, int, int] = (4, 16, 32, 64),
        embed_dim: int = 256,
        context_dim: int = 256,
        classes: int = 10,
        *,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.marginal_std = marginal_std
        self.channels = c0, c1, c2, c3 = sizes("LatentUNet: channels", channels, 4)

        self.time_embed = nn.Sequential(
            nn.FourierFeatures(embed_dim, rng=rng), nn.Linear(embed_dim, embed_dim, rng=rng), nn.SiLU()
        )
        classes = integer(f"{type(self).__name__}: classes", classes)
        self.cond_embed = nn.Embedding(classes, context_dim, rng=rng)
        # Down.
        self.conv1 = nn.Conv2d(c0, c1, 3, stride=1, bias=False, rng=rng)
        self.dense1 = nn.Linear(embed_dim, c1, rng=rng)
        self.gnorm1 = nn.GroupNorm(4, c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, stride=2, bias=False, rng=rng)
        self.dense2 = nn.Linear(embed_dim, c2, rng=rng)
        self.gnorm2 = nn.GroupNorm(4, c2)
        self.attn2 = SpatialTransformer(c2, context_dim, rng=rng)
        self.conv3 = nn.Conv2d(c2, c3, 3, stride=2, bias=False, rng=rng)
        self.dense3 = nn.Linear(embed_dim, c3, rng=rng)
        self.gnorm3 = nn.GroupNorm(4, c3)
        self.attn3 = SpatialTransformer(c3, context_dim, rng=rng)
        # Up.
        self.tconv3 = nn.ConvTranspose2d(c3, c2, 3, stride=2, bias=False, rng=rng)
        self.dense4 = nn.Linear(embed_dim, c2, rng=rng)
        self.tgnorm3 = nn.GroupNorm(4, c2)
        self.attn4 = SpatialTransformer(c2, context_dim, rng=rng)
        self.tconv2 = nn.ConvTranspose2d(c2, c1, 3, stride=2, output_padding=1, bias=False, rng=rng)
        self.dense5 = nn.Linear(embed_dim, c1, rng=rng)
        self.tgnorm2 = nn.GroupNorm(4, c1)
        self.tconv1 = nn.ConvTranspose2d(c1, c0, 3, stride=1, rng=rng)

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        _check(self, x, t, (10, 10, self.channels[0]))
        context = _context(self, x, labels, self.cond_embed)
        time = self.time_embed(t)  # (N,) -> (N, 256)

        h1 = _hidden(x, self.conv1, self.dense1(time), self.gnorm1)  # (N, 10, 10, 4) -> (N, 8, 8, 16)
        h2 = _hidden(h1, self.conv2, self.dense2(time), self.gnorm2)  # -> (N, 3, 3, 32)
        h2 = self.attn2(h2, context)
        h3 = _hidden(h2, self.conv3, self.dense3(time), self.gnorm3)  # -> (N, 1, 1, 64)
        h3 = self.attn3(h3, context)

        h = _hidden(h3, self.tconv3, self.dense4(time), self.tgnorm3)  # -> (N, 3, 3, 32)
        h = self.attn4(h, context)
        h = _hidden(h + h2, self.tconv2, self.dense5(time), self.tgnorm2)  # -> (N, 8, 8, 16)
        h = self.tconv1(h + h1)  # -> (N, 10, 10, 4)
        return h / _per_image(self.marginal_std(t))


# ---------------------------------------------------------------- what they share


def _hidden(x: Any, conv: nn.Module, time: Any, norm: nn.Module) -> Any:
    """A hidden layer: convolution, plus the time (N, C) at every pixel, normalised, SiLU."""
    return norm(conv(x), time, silu=True)


def _per_image(a: Any) -> Any:
    """One number or vector per image, as an image of one pixel: (N,) or (N, C) -> (N, 1, 1, 1 or C)."""
    return a.reshape((a.shape[0], 1, 1, -1))  # (N,) or (N, C) -> (N, 1, 1, 1 or C)


def _context(net: nn.Module, x: Any, labels: Any, table: nn.Embedding) -> Any:
    labels = each_label(f"{type(net).__name__}: a label", labels, len(x), table.num_embeddings)
    context = table(labels)  # (N,) -> (N, D)
    return ops.expand_dims(context, axis=1)  # (N, D) -> (N, 1, D), a sequence of one token


def _check_shape(net: nn.Module, x: Any, image: tuple[int, int, int]) -> None:
    if x.ndim != 4 or x.shape[1:] != image:
        raise ValueError(
            f"{type(net).__name__} takes (N, {', '.join(map(str, image))}), channels last, not {x.shape}: "
            "its convolutions have no padding, and its output paddings are those of the tutorial, "
            "which fit this size only"
        )


def _check(net: nn.Module, x: Any, t: Any, image: tuple[int, int, int]) -> None:
    _check_shape(net, x, image)
    shape = getattr(t, "shape", None)
    if shape != x.shape[:1]:
        raise ValueError(
            f"{type(net).__name__} takes a time for each of the {len(x)} samples of x {x.shape}, "
            f"not t {t if shape is None else shape}"
        )
