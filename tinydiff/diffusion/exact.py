"""Diffusion where every answer is known: random walks of numbers, and the distribution of x_t for simple data.

    t, x = forward_diffusion_1d(x0, process.diffusion, t_max=1.0, steps=1000, rng=rng)
    t, x = reverse_diffusion_1d(x[-1], process.diffusion, exact.score, t_max=1.0, steps=1000, rng=rng)

The tutorial begins here, and every formula can be seen at work. The noise strength of a walk is any function sigma(t)
from numbers to numbers; a process calls it `diffusion`. There is no drift, so the noise that has accumulated at time t
has the variance s(t)^2 = integral of sigma^2 from 0 to t. For a constant strength that is sigma^2 t: the standard
deviation is sigma sqrt(t), not sigma t.

    exact = Exact(GaussianMixture([0.3, 0.7], [-2.0, 1.0], [0.16, 0.09]), VESDE(25.0))
    exact.score(x, t)                       what a perfect network would predict; a model for `sample`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..arguments import integer, number
from ..backend import Array, to_device, xp
from ..data.mixture import GaussianMixture
from ..operators import array_of
from ..rng import Rng, as_rng
from .process import like, plain

NoiseStrength = Callable[[float], float]


# ---------------------------------------------------------------- walks of numbers


def forward_diffusion_1d(
    x0: Any, noise_strength: NoiseStrength, *, t_max: float, steps: int, rng: Rng | int, sample_offset: int = 0
) -> tuple[list[float], Array]:
    """Random walks: x(t + dt) = x(t) + sigma(t) sqrt(dt) r,  r ~ N(0, 1),  dt = t_max / steps.

    The square root makes the result independent of the number of steps: variances add, and each step adds sigma^2 dt.
    x0: (N,), of floats. Returns the steps + 1 times, and where the numbers are at each, (steps + 1, N). Row i of the
    noise is that of sample `sample_offset + i` of the seed.
    Errors: TypeError for an x0 that is not of floats; ValueError for another shape, steps < 1, a t_max that is not
    positive, or a noise strength that is negative or not finite.
    """
    x, t_max, steps = _checked(x0, t_max, steps)
    rng = as_rng(rng)
    dt = t_max / steps
    times, path = [0.0], [x]
    for step in range(steps):
        t = step * dt
        sigma = _strength(noise_strength, t)
        x = x + sigma * math.sqrt(dt) * rng.normal(x.shape, x.dtype, sample_offset=sample_offset)
        times.append(t + dt if step + 1 < steps else t_max)
        path.append(x)
    return times, xp.stack(path)  # (steps + 1, N)


def reverse_diffusion_1d(
    x_end: Any,
    noise_strength: NoiseStrength,
    score: Callable[[Array, float], Any],
    *,
    t_max: float,
    steps: int,
    rng: Rng | int,
    sample_offset: int = 0,
) -> tuple[list[float], Array]:
    """The walk backwards, from noise to data, guided by the score:

        x(t - dt) = x(t) + sigma(t)^2 score(x(t), t) dt + sigma(t) sqrt(dt) r,      t = t_max, ..., dt

    x_end: (N,), of floats, where to start: samples of N(0, s(t_max)^2), if the data are small beside s(t_max), which is
    sigma sqrt(t_max) for a constant strength.
    score(x, t): the gradient of ln p_t at x (N,), at the number t -> (N,).
    Returns the steps + 1 times, which fall from t_max to 0, and where the numbers are at each, (steps + 1, N).
    Errors: as forward_diffusion_1d; ValueError for a score of another shape.
    Source: Anderson 1982, "Reverse-time diffusion equation models"; Song et al. 2021, equation 6.
    """
    x, t_max, steps = _checked(x_end, t_max, steps)
    rng = as_rng(rng)
    dt = t_max / steps
    times, path = [t_max], [x]
    for step in range(steps):
        t = t_max - step * dt
        sigma, score_x = _strength(noise_strength, t), array_of(score(x, t))
        if score_x.shape != x.shape:
            raise ValueError(f"reverse_diffusion_1d: the score returned shape {score_x.shape} for x of shape {x.shape}")
        z = rng.normal(x.shape, x.dtype, sample_offset=sample_offset)
        x = x + sigma**2 * dt * like(x, score_x) + sigma * math.sqrt(dt) * z
        times.append(t - dt if step + 1 < steps else 0.0)
        path.append(x)
    return times, xp.stack(path)  # (steps + 1, N)


def _checked(x: Any, t_max: float, steps: int) -> tuple[Array, float, int]:
    x = to_device(array_of(x))
    if x.ndim != 1:
        raise ValueError(f"diffusion in one dimension takes x (N,), not {x.shape}")
    if x.dtype.kind != "f":
        raise TypeError(f"diffusion takes x of floats, not {x.dtype} of shape {x.shape}")
    return x, number("t_max", t_max, "(0, inf)"), integer("steps", steps)


def _strength(noise_strength: NoiseStrength, t: float) -> float:
    sigma = float(noise_strength(t))
    if not 0 <= sigma < math.inf:
        raise ValueError(f"the noise strength must be 0 or more and finite, but at t = {t:g} it is {sigma}")
    return sigma


# ---------------------------------------------------------------- the distribution of x_t


class Exact:
    """Density, score, distribution function and samples of x_t = m(t) x_0 + s(t) z for x_0 of the mixture.

    x: (N,) or (N, 1) for numbers, (N, D) for vectors; t: a number or (N,).
    """

    def __init__(self, mixture: GaussianMixture, process: Any):
        self.mixture, self.process = mixture, process

    def _at(self, t: Any) -> dict[str, Any]:
        process = plain(self.process)
        return {"scale": process.marginal_scale(t), "std": process.marginal_std(t)}

    def log_density(self, x: Any, t: Any) -> Any:
        """ln p_t(x), in nats, (N,)."""
        return self.mixture.log_density(x, **self._at(t))

    def density(self, x: Any, t: Any) -> Any:
        """p_t(x), (N,)."""
        return self.mixture.density(x, **self._at(t))

    def score(self, x: Any, t: Any) -> Any:
        """The gradient of ln p_t by x, in the shape of x."""
        return self.mixture.score(x, **self._at(t))

    def cdf(self, x: Any, t: Any) -> Any:
        """P(x_t <= x), of numbers, (N,)."""
        return self.mixture.cdf(x, **self._at(t))

    def sample(self, n: int, t: float, rng: Rng | int, *, sample_offset: int = 0) -> Array:
        """n samples of x_t, float32. Row i is sample `sample_offset + i` of the seed."""
        return self.mixture.sample(n, rng, **self._at(t), sample_offset=sample_offset)


def point_mass(x0: float) -> GaussianMixture:
    """Data that are all equal to x0; their score at time t is -(x - m(t) x_0) / s(t)^2."""
    return GaussianMixture([1.0], [x0], [0.0])
