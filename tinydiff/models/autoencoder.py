"""Images squeezed to latents and back, in three kinds: plain, variational, and with a codebook.

    net = VariationalAutoencoder(3, (32, 64), latent=4)                   # (N, 64, 64, 3) -> (N, 16, 16, 4) -> back
    loss = autoencoder_loss(net, x0, rng)                                 # to be minimised
    z = net.encode(x0)                                                    # its mean, for a variational one
    x = net.decode(z)

The encoder is a convolution, residual blocks with convolutions of stride 2 between the levels, and a 1x1 convolution to
the latent; the decoder is its mirror image. That images come back is not all that makes a good latent: diffusion must
be able to learn its distribution, and the decoder must bear an error in it.

**Plain.** z = E(x), loss |D(z) - x|^2. Nothing says where latents lie, and between them the decoder was never asked.

**Variational** (Kingma and Welling 2014). The encoder gives a mean and a log-variance, and the decoder gets
z = mu + sigma eps, so it learns to bear an error of size sigma. That alone would let mu grow until sigma does not
matter; the divergence from the standard normal prices it:

    KL(N(mu, sigma^2) || N(0, 1)) = 1/2 (mu^2 + sigma^2 - 1 - ln sigma^2)          in nats, for each number of z

It is 0 or more, because u - 1 - ln u >= 0. For a pixel that is normal around its reconstruction, of deviation s,

    -ln p(x) <= |D(z) - x|^2 / (2 s^2) + KL + D/2 ln(2 pi s^2)                     the evidence bound

so in the mean over the D numbers of an image the loss |D(z) - x|^2 / D + kl_weight KL / D has kl_weight = 2 s^2: the
weight says how exact a picture has to be.

**Codebook** (van den Oord et al. 2017). Each vector of z is replaced by the nearest of K learned ones, q. Rounding has
no gradient, so the decoder's passes straight through: z + (q - z) without a gradient of the bracket. What q and z learn
from it is in two more terms, |sg(z) - q|^2 + 1/4 |z - sg(q)|^2, where sg is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .. import nn, ops
from ..arguments import integer, number
from ..backend import Array, to_host, xp
from ..describing import rebuildable
from ..engine import Tensor
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .inputs import sizes
from .unet import ResidualBlock, SelfAttention, pixel_shuffle, pixel_unshuffle

COMMITMENT = 0.25  # van den Oord et al. 2017, section 3.2


@rebuildable
class Autoencoder(nn.Module):
    """x (N, H, W, in_channels) -> z (N, h, w, latent) -> x, with h = H / reduction, w = W / reduction.

    channels: of each level, from fine to coarse. patch: so many pixels by so many become one before the first level.
    So reduction = patch 2^(levels - 1). attention: at the coarsest level, each pixel to all others.
    Errors: ValueError for sizes that are not positive integers, or groups that do not divide the channels.
    """

    outputs_per_latent = 1  # how many numbers the encoder gives for one of z

    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        latent: int = 4,
        *,
        patch: int = 2,
        attention: bool = False,
        groups: int = 8,
        rng: Rng | int | None = None,
    ):
        rng, what = as_rng(rng), type(self).__name__
        channels = sizes(f"{what}: channels", channels)
        self.in_channels, self.latent = integer(f"{what}: in_channels", in_channels), integer(f"{what}: latent", latent)
        self.patch, groups = integer(f"{what}: patch", patch), integer(f"{what}: groups", groups)
        if any(width % groups for width in channels):
            raise ValueError(f"{what}: groups={groups} must divide each of channels={channels}")
        self.reduction = self.patch * 2 ** (len(channels) - 1)

        def block(width: int) -> ResidualBlock:
            return ResidualBlock(width, width, None, groups, rng)

        def middle() -> list[nn.Module]:
            return [SelfAttention(channels[-1], groups, rng), block(channels[-1])] if attention else []

        down: list[nn.Module] = [nn.Conv2d(self.in_channels * self.patch**2, channels[0], 3, padding=1, rng=rng)]
        for width, coarser in zip(channels, [*channels[1:], None]):
            down.append(block(width))
            if coarser is not None:
                down.append(nn.Conv2d(width, coarser, 2, stride=2, rng=rng))
        down += [*middle(), nn.GroupNorm(groups, channels[-1]), nn.SiLU()]
        self.encoder = nn.Sequential(*down, nn.Conv2d(channels[-1], self.outputs_per_latent * latent, 1, rng=rng))
        up: list[nn.Module] = [nn.Conv2d(latent, channels[-1], 3, padding=1, rng=rng), *middle()]
        for width, finer in reversed(list(zip(channels, [None, *channels[:-1]]))):
            up.append(block(width))
            if finer is not None:
                up.append(nn.ConvTranspose2d(width, finer, 2, stride=2, rng=rng))
        up += [nn.GroupNorm(groups, channels[0]), nn.SiLU()]
        self.decoder = nn.Sequential(*up, nn.Conv2d(channels[0], in_channels * patch**2, 3, padding=1, rng=rng))

    def encode(self, x: Any) -> Tensor:
        """z (N, h, w, latent). Errors: ValueError for images of other channels, or sides that are no multiples of
        reduction."""
        return self.features(x)

    def features(self, x: Any) -> Tensor:
        """What the encoder gives, before it becomes z: (N, h, w, outputs_per_latent latent)."""
        x = x if isinstance(x, Tensor) else Tensor(x)
        if x.ndim != 4 or x.shape[3] != self.in_channels or x.shape[1] % self.reduction or x.shape[2] % self.reduction:
            raise ValueError(
                f"{type(self).__name__}: images must be (N, H, W, {self.in_channels}) with H and W multiples of "
                f"{self.reduction}, not {x.shape}"
            )
        return self.encoder(pixel_unshuffle(x, self.patch))

    def decode(self, z: Any) -> Tensor:
        """x (N, H, W, in_channels). Errors: ValueError for latents of another width."""
        z = z if isinstance(z, Tensor) else Tensor(z)
        if z.ndim != 4 or z.shape[3] != self.latent:
            raise ValueError(f"{type(self).__name__}: latents must be (N, h, w, {self.latent}), not {z.shape}")
        return pixel_shuffle(self.decoder(z), self.patch)

    def forward(self, x: Any) -> Tensor:
        return self.decode(self.encode(x))

    def bottleneck(self, x: Any, rng: Rng, sample_offset: int = 0) -> tuple[Tensor, Any]:
        """What the decoder learns from, z, and what it costs, a term of the loss, a mean over an image's numbers."""
        return self.encode(x), 0.0


@rebuildable
class VariationalAutoencoder(Autoencoder):
    """kl_weight: of the divergence, 2 s^2 (above); 1e-3 is a pixel that is right to about 0.02 of a range of 2."""

    outputs_per_latent = 2

    def __init__(self, *sizes: Any, kl_weight: float = 1e-3, **options: Any):
        super().__init__(*sizes, **options)
        self.kl_weight = number("VariationalAutoencoder: kl_weight", kl_weight, "[0, inf)")

    def distribution(self, x: Any) -> tuple[Tensor, Tensor]:
        """mu and ln sigma^2 of z, (N, h, w, latent) each. The logarithm is kept in [-20, 10], as in Stable Diffusion,
        so that no first guess is infinite; its gradient is 0 beyond."""
        mean, log_variance = ops.split(self.features(x), 2, axis=3)
        return mean, ops.clip(log_variance, low=-20.0, high=10.0)

    def encode(self, x: Any) -> Tensor:
        """The mean of z."""
        return self.distribution(x)[0]

    def bottleneck(self, x: Any, rng: Rng, sample_offset: int = 0) -> tuple[Tensor, Any]:
        mean, log_variance = self.distribution(x)
        noise = rng.normal(mean.shape, mean.dtype, sample_offset=sample_offset)
        z = mean + ops.exp(log_variance * 0.5) * noise
        return z, self.kl_weight * kl_divergence(mean, log_variance).mean() / math.prod(x.shape[1:])


def kl_divergence(mean: Any, log_variance: Any) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, summed over all axes but the first: (N,)."""
    each = (mean * mean + ops.exp(log_variance) - 1 - log_variance) * 0.5
    return ops.sum(ops.reshape(each, shape=(len(each), -1)), axis=1)


@rebuildable
class QuantisedAutoencoder(Autoencoder):
    """codes: K, how many vectors the codebook has. encode gives the nearest ones; `indices` their numbers."""

    def __init__(self, *sizes: Any, codes: int = 256, rng: Rng | int | None = None, **options: Any):
        rng = as_rng(rng)
        super().__init__(*sizes, rng=rng, **options)
        self.codebook = nn.Embedding(integer("QuantisedAutoencoder: codes", codes, 2), self.latent, rng=rng)

    def indices(self, z: Any) -> Array:
        """The number of the nearest vector of the codebook for each vector of z: (N, h, w, latent) -> (N, h, w)."""
        values, codes = array_of(z), self.codebook.weight._data
        flat = values.reshape(-1, self.latent)
        # |z - q|^2 = |z|^2 - 2 z q + |q|^2, of which |z|^2 is the same for all q
        return ((codes * codes).sum(axis=1) - 2 * (flat @ codes.T)).argmin(axis=1).reshape(values.shape[:-1])

    def encode(self, x: Any) -> Tensor:
        return self.codebook(self.indices(self.features(x)))

    def bottleneck(self, x: Any, rng: Rng, sample_offset: int = 0) -> tuple[Tensor, Any]:
        z = self.features(x)
        q = self.codebook(self.indices(z))
        straight = z + (q - z).detach()
        return straight, ops.mse_loss(q, z.detach()) + COMMITMENT * ops.mse_loss(z, q.detach())

    @no_grad()
    def restart(self, x: Any, rng: Rng) -> int:
        """Put each code that is nearest to no vector of these images in the place of a random one of the vectors, and
        say how many there were. A code that nothing is near gets no gradient, so by itself it stays where it is: call
        this now and then in the first part of a training (Dhariwal et al. 2020, "Jukebox", section 3)."""
        z = self.features(x)
        vectors = z._data.reshape(-1, self.latent)
        used = xp.bincount(self.indices(z).reshape(-1), minlength=self.codebook.num_embeddings) > 0
        chosen = vectors[rng.integers(len(vectors), self.codebook.num_embeddings)]
        codes = self.codebook.weight
        codes[...] = xp.where(used[:, None], codes._data, chosen)
        return int(to_host((~used).sum()))

    def perplexity(self, indices: Any) -> float:
        """exp of the entropy of the codes in use: K if all are used alike often, 1 if only one is used."""
        share = xp.bincount(array_of(indices).reshape(-1), minlength=self.codebook.num_embeddings)
        share = to_host(share) / max(int(to_host(share).sum()), 1)
        return float(math.exp(-sum(p * math.log(p) for p in share if p > 0)))


def autoencoder_loss(
    net: Autoencoder,
    x0: Any,
    rng: Rng,
    *,
    features: Callable[[Tensor], Sequence[Tensor]] | None = None,
    weight: float = 0.1,
    sample_offset: int = 0,
) -> Tensor:
    """The mean squared error of the reconstruction, and what the latent costs (`bottleneck`), a mean over images.

    features: activations of a judge (models.classifier), which add `weight` times the perceptual distance: people, and
    judges, do not see a shift by a pixel as the squared error does.
    """
    x0 = x0 if isinstance(x0, Tensor) else Tensor(x0)
    z, cost = net.bottleneck(x0, rng, sample_offset)
    x = net.decode(z)
    loss = ops.mse_loss(x, x0) + cost
    return loss if features is None else loss + weight * perceptual_distance(features, x, x0)


def perceptual_distance(features: Callable[[Tensor], Sequence[Tensor]], x: Tensor, y: Tensor) -> Tensor:
    """The mean over layers of the squared difference of their activations (N, h, w, C), each pixel's scaled to length 1
    over the channels: how different two pictures look to a net.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", without learned
    weights.
    """
    layers = list(zip(features(x), features(y)))
    each = [ops.mse_loss(_unit(a), _unit(b)) * a.shape[-1] for a, b in layers]
    return sum(each[1:], start=each[0]) / len(each)


def _unit(a: Tensor) -> Tensor:
    return a / ops.sqrt(ops.sum(a * a, axis=-1, keepdims=True) + 1e-10)
