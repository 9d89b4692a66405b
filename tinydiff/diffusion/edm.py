"""The design space of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models", EDM).

Noise is added directly, x = x0 + sigma z, and the network F is wrapped so that at every sigma its input, its target
and its error have variance one: the denoiser is

    D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)                                              (their eq. 7)
    c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2)

with sd the standard deviation of the data. The score is (D(x; sigma) - x) / sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import nn, ops
from ..backend import Array, to_device, xp
from ..modes import no_grad
from ..rng import Rng
from ..tensor import Tensor, array_of


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


def sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """steps + 1 noise levels from sigma_max to sigma_min, and 0:
    uniform in sigma^(1/rho), denser where sigma is small (eq. 5).
    """
    if steps < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"a noise schedule needs steps >= 2 and 0 < sigma_min < sigma_max, not steps={steps}, "
            f"{sigma_min}, {sigma_max}"
        )
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]


def heun(
    denoise: Callable[[Array, float], Any],
    shape: tuple[int, ...],
    rng: Rng,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    first: int = 0,
    callback: Callable[[int, float, Array, Array], None] | None = None,
) -> Array:
    """Samples by Heun's method on dx/dsigma = (x - D(x; sigma)) / sigma: their algorithm 1 without churn;
    2 steps - 1 evaluations.

    denoise(x, sigma) -> x0. callback(step, sigma, x, denoised) is called before each step. Sample i of the batch is
    sample first + i of the seed, whatever the size of the batch.
    """
    levels = sigmas(steps, sigma_min, sigma_max, rho)
    with no_grad():
        x = rng.normal(shape, first=first) * levels[0]
        for i, (sigma, following) in enumerate(zip(levels, levels[1:])):
            denoised = array_of(denoise(x, sigma))
            if callback is not None:
                callback(i, sigma, x, denoised)
            slope = (x - denoised) / sigma
            euler = x + (following - sigma) * slope
            if following > 0:
                again = (euler - array_of(denoise(euler, following))) / following
                euler = x + (following - sigma) * (slope + again) / 2
            x = euler
    return x


def guided(denoiser: Denoiser, weight: float, /, **condition: Any) -> Callable[[Array, float], Array]:
    """The denoiser for a condition, pushed away from what it would say without one (Ho and Salimans 2022, eq. 6):

    D_w(x) = (1 + w) D(x | condition) - w D(x)
    """

    def denoise(x: Array, sigma: float) -> Array:
        told = array_of(denoiser(x, sigma, **condition))
        return told if weight == 0 else (1 + weight) * told - weight * array_of(denoiser(x, sigma))

    return denoise
