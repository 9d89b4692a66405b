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
from ..rng import Rng
from ..tensor import Tensor, array_of
from .sde import VESDE


class KarrasSDE(VESDE):
    """The variance-exploding process whose time is the noise level: f = 0,  g(t) = sqrt(2 t),  m = 1,  s(t) = t, for t
    from 0 to sigma_max, where the prior is N(0, sigma_max^2 I). Equal steps in t would spend nearly all of them where
    there is nothing but noise: to samplers that take them give grid=rho_times.

    Source: Karras et al. 2022, table 1, last column. Errors: ValueError for a sigma_max that is not positive.
    """

    def __init__(self, sigma_max: float = 80.0):
        if not (sigma_max > 0 and math.isfinite(sigma_max)):
            raise ValueError(f"KarrasSDE: sigma_max must be positive and finite, not {sigma_max!r}")
        self.t_max = float(sigma_max)

    def __repr__(self) -> str:
        return f"KarrasSDE(sigma_max={self.t_max})"

    def diffusion(self, t: Any) -> Any:
        """g(t) = sqrt(2 t), in the shape of t."""
        return math.sqrt(2 * t) if isinstance(t, (int, float)) else ops.sqrt(t * 2)

    def marginal_std(self, t: Any) -> Any:
        """s(t) = t."""
        return t


class Denoiser(nn.Module):
    """D(x, sigma, **condition): the network's estimate of x0, given x = x0 + sigma z. sigma: (N,) or a number."""

    def __init__(self, net: nn.Module, sigma_data: float):
        if not sigma_data > 0:
            raise ValueError(f"Denoiser: sigma_data must be positive, not {sigma_data!r}")
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
        return x * (sd**2 / total) + f * (s * sd / xp.sqrt(total))


def edm_loss(
    denoiser: Denoiser, x0: Any, rng: Rng, /, *, mean: float = -1.2, std: float = 1.2, first: int = 0, **condition: Any
) -> Tensor:
    """E over ln sigma ~ N(mean, std^2), z ~ N(0, I) of

        (sigma^2 + sd^2) / (sigma sd)^2  |D(x0 + sigma z; sigma) - x0|^2

    averaged over pixels and batch (their eq. 2 and 8, table 1). With this weight it is the plain error of F, about 1
    for a net that knows nothing. Errors: TypeError for an x0 that is not of floats.
    """
    if x0.dtype.kind != "f":
        raise TypeError(f"edm_loss: x0 must be of floats (see data.to_float), not {x0.dtype} of shape {x0.shape}")
    x0, n, sd = array_of(x0), x0.shape[0], denoiser.sigma_data
    sigma = xp.exp(rng.normal((n, 1, 1, 1), first=first) * std + mean)
    x = x0 + sigma * rng.normal(x0.shape, first=first)
    weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
    return ops.mean(weight * ops.square(denoiser(Tensor(x), sigma.reshape(-1), **condition) - x0))


def guided(denoiser: Denoiser, weight: float, /, **condition: Any) -> Callable[[Any, Any], Array]:
    """The denoiser for a condition, pushed away from what it would say without one (Ho and Salimans 2022, eq. 6):

    D_w(x) = (1 + w) D(x | condition) - w D(x)
    """

    def denoise(x: Any, sigma: Any) -> Array:
        told = array_of(denoiser(x, sigma, **condition))
        return told if weight == 0 else (1 + weight) * told - weight * array_of(denoiser(x, sigma))

    return denoise
