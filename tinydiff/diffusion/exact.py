"""The law of x_t where it is known exactly: data that are a Gaussian mixture, or a single point, under a process.

exact = Exact(GaussianMixture([0.3, 0.7], [-2.0, 1.0], [0.16, 0.09]), VESDE(25.0))
exact.score(x, t)                          what a perfect network would say; goes into any sampler as it is
"""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..data.mixture import GaussianMixture
from ..rng import Rng


class Exact:
    """Density, score, distribution function and samples of x_t = m(t) x_0 + s(t) z for x_0 of the mixture.

    x: (N,) or (N, 1) for numbers, (N, D) for vectors; t: a number or (N,).
    """

    def __init__(self, mixture: GaussianMixture, sde: Any):
        self.mixture, self.sde = mixture, sde

    def _at(self, t: Any) -> dict[str, Any]:
        return {"scale": self.sde.marginal_scale(t), "std": self.sde.marginal_std(t)}

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

    def sample(self, n: int, t: float, rng: Rng | int, *, first: int = 0) -> Array:
        """n samples of x_t, float32. Row i is sample `first + i` of the seed."""
        return self.mixture.sample(n, rng, **self._at(t), first=first)


def point_mass(x0: float) -> GaussianMixture:
    """Data that are all x0, whose score at time t is -(x - m(t) x_0) / s(t)^2."""
    return GaussianMixture([1.0], [x0], [0.0])
