"""The process that turns data into noise.

    dx = f(x, t) dt + g(t) dw,   0 <= t <= 1          so that  x_t ~ N(m(t) x_0, s(t)^2 I)

Two different things are called sigma(t) in the literature. Here they are always `diffusion(t)`, which is g, the
strength of the noise that is added at time t, and `marginal_std(t)`, which is s, the noise that has gathered since 0.

An SDE is an object with `drift(x, t)`, `diffusion(t)`, `marginal_scale(t)` (m), `marginal_std(t)`,
`prior(shape, rng)`, `prior_log_density(x)` and `t_max`, the time of the prior; nothing else is asked of it. t is a
number, an array or a Tensor, and what is returned is the same; for a batch it is (N,), one time a sample.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..backend import Array
from ..rng import Rng, as_rng


class VESDE:
    """The variance-exploding SDE: the data stays where it is, and noise is added ever faster.

        f = 0,   g(t) = sigma^t,   m = 1,   s(t) = sqrt((sigma^(2 t) - 1) / (2 ln sigma))

    s^2 is the integral of g^2 from 0 to t. The prior, from which sampling starts, is N(0, s(1)^2 I): the data is
    forgotten as far as s(1) (9.8 for sigma = 25) is large beside it.
    Errors: ValueError unless sigma > 1.
    Source: Song et al. 2021, "Score-based generative modeling through stochastic differential
    equations", and its tutorial.
    """

    t_max = 1.0

    def __init__(self, sigma: float = 25.0):
        if not (sigma > 1 and math.isfinite(sigma)):
            raise ValueError(f"VESDE: sigma must be a finite number above 1, not {sigma!r}")
        self.sigma = float(sigma)
        self.log_sigma = math.log(sigma)

    def __repr__(self) -> str:
        return f"VESDE(sigma={self.sigma})"

    def drift(self, x: Any, t: Any) -> float:
        """f(x, t) = 0, which broadcasts to the shape of x."""
        return 0.0

    def diffusion(self, t: Any) -> Any:
        """g(t) = sigma^t, in the shape of t."""
        return math.exp(t * self.log_sigma) if isinstance(t, (int, float)) else ops.exp(t * self.log_sigma)

    def marginal_scale(self, t: Any) -> float:
        """m(t) = 1."""
        return 1.0

    def marginal_std(self, t: Any) -> Any:
        """s(t) = sqrt((sigma^(2 t) - 1) / (2 ln sigma)), in the shape of t."""
        # expm1, as at t = 1e-5 a float32 power minus 1 has three digits left.
        rate = 2 * self.log_sigma
        if isinstance(t, (int, float)):
            return math.sqrt(math.expm1(rate * t) / rate)
        return ops.sqrt(ops.expm1(t * rate) / rate)

    def prior(self, shape: tuple[int, ...], rng: Rng | int, *, first: int = 0) -> Array:
        """Where sampling starts: s(1) z, z ~ N(0, I), float32. Row i is that of sample `first + i` of the seed."""
        return as_rng(rng).normal(shape, first=first) * self.marginal_std(self.t_max)

    def prior_log_density(self, x: Any) -> Any:
        """log N(x; 0, s(1)^2 I) in nats, summed over all but the first axis: (N, ...) -> (N,)."""
        return normal_log_density(x, self.marginal_std(self.t_max))


def normal_log_density(x: Any, std: float) -> Any:
    """log N(x; 0, std^2 I) in nats, summed over all but the first axis: (N, ...) -> (N,)."""
    size = math.prod(x.shape[1:])
    squares = ops.square(x / std).reshape((x.shape[0], size)).sum(axis=1)  # (N, ...) -> (N,)
    return squares * -0.5 - size * math.log(std * math.sqrt(2 * math.pi))


def per_sample(a: Any, x: Any) -> Any:
    """One number a sample, (N,), shaped to multiply x (N, ...): (N, 1, ..., 1). A Python number stays one."""
    return a if isinstance(a, (int, float)) else a.reshape((-1,) + (1,) * (x.ndim - 1))


def denoised(sde: Any, x: Any, t: Any, score: Any) -> Any:
    """E[x_0 | x_t], what the image is on average, from the score: (x + s(t)^2 score) / m(t), in the shape of x.

    Source: Tweedie's formula; Efron 2011, "Tweedie's formula and selection bias".
    """
    s, m = per_sample(sde.marginal_std(t), x), per_sample(sde.marginal_scale(t), x)
    return (x + s * s * score) / m
