"""The design space of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models", EDM).

Noise is added directly, x = x0 + sigma z, and the network F is wrapped so that at every sigma its input, its target
and its error have variance one: the denoiser is

    D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)                                              (their eq. 7)
    c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2)

with sd the standard deviation of the data. Time is the noise level itself (KarrasSDE), and the samplers take D as the
score (D(x; sigma) - x) / sigma^2:

    sde = KarrasSDE()
    x = heun(score_of(denoiser, sde), (64, 28, 28, 1), sde, Rng(0), steps=17, eps=0.002)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import nn, ops
from ..backend import Array, to_device, xp
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng
from .loss import log_normal, noised
from .sde import KarrasSDE, per_sample

__all__ = ["Denoiser", "KarrasSDE", "edm_loss", "guided"]


class Denoiser(nn.Module):
    """D(x, sigma, **condition): the network's estimate of x0, given x = x0 + sigma z. sigma: (N,) or a number.

    Errors: ValueError for a sigma_data that is not positive and finite, or a net whose output has another shape than x.
    """

    def __init__(self, net: nn.Module, sigma_data: float):
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"Denoiser: sigma_data must be positive and finite, not {sigma_data!r}")
        self.net, self.sigma_data = net, sigma_data

    def forward(self, x: Any, sigma: Any, **condition: Any) -> Tensor:
        # (N, 1, 1, 1)
        if isinstance(sigma, (int, float)):
            s = xp.full((x.shape[0],), sigma, x.dtype)  # nothing comes from the host, so it may be captured
        else:
            s = xp.broadcast_to(to_device(array_of(sigma), x.dtype), x.shape[:1])
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        sd, total = self.sigma_data, s**2 + self.sigma_data**2
        noise = ops.reshape(ops.log(s) / 4, shape=(-1,))
        f = self.net(x / xp.sqrt(total), noise, **condition)
        if f.shape != x.shape:
            raise ValueError(f"Denoiser: the net returned shape {f.shape} for x of shape {x.shape}")
        return x * (sd**2 / total) + f * (s * sd / xp.sqrt(total))


def edm_loss(
    denoiser: Denoiser, x0: Any, rng: Rng, /, *, mean: float = -1.2, std: float = 1.2, first: int = 0, **condition: Any
) -> Tensor:
    """E over ln sigma ~ N(mean, std^2), z ~ N(0, I) of

        (sigma^2 + sd^2) / (sigma sd)^2  |D(x0 + sigma z; sigma) - x0|^2

    averaged over pixels and batch (their eq. 2 and 8, table 1). With this weight it is the plain error of F, about 1
    for a net that knows nothing. x0 (N, ...). Of the same net and draws, `denoising_loss` of a ScoreModel that
    predicts "edm", with times=log_normal(), is this times the number of values in a sample.
    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng.
    """
    x0, sigma, _, x = noised(x0, KarrasSDE(), rng, log_normal(mean, std), first)
    sd = denoiser.sigma_data
    weight = per_sample((sigma**2 + sd**2) / (sigma * sd) ** 2, x)  # (N,) -> (N, 1, ..., 1)
    return ops.mean(weight * ops.square(denoiser(Tensor(x), sigma, **condition) - x0))


def guided(denoiser: Denoiser, weight: float, /, **condition: Any) -> Callable[[Any, Any], Array]:
    """The denoiser for a condition, pushed away from what it would say without one (Ho and Salimans 2022, eq. 6):

    D_w(x) = (1 + w) D(x | condition) - w D(x)
    """

    def denoise(x: Any, sigma: Any) -> Array:
        told = array_of(denoiser(x, sigma, **condition))
        return told if weight == 0 else (1 + weight) * told - weight * array_of(denoiser(x, sigma))

    return denoise
