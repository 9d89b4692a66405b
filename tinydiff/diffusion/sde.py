"""The process that turns data into noise.

    dx = f(x, t) dt + g(t) dw,   0 <= t <= t_max      so that  x_t ~ N(m(t) x_0, s(t)^2 I)

Two different things are called sigma(t) in the literature. Here they are always `diffusion(t)`, which is g, the
strength of the noise that is added at time t, and `marginal_std(t)`, which is s, the noise that has gathered since 0.
For a drift f = a(t) x, all that there is here, they and the scale m(t) are tied by

    dm/dt = a m,      d(s^2)/dt = 2 a s^2 + g^2,      m(0) = 1,  s(0) = 0

An SDE is an object with `drift(x, t)`, `diffusion(t)`, `marginal_scale(t)` (m), `marginal_std(t)` (s), `t_max`, and
`prior(shape, rng)`, from which sampling starts; the losses and the samplers ask for nothing else. t is a number, an
array or a Tensor, and what is returned is the same; for a batch it is (N,), one time a sample. A number outside the
process is a ValueError; an array is not looked into, as that would wait for the device.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from .. import ops
from ..backend import Array
from ..rng import Rng, as_rng
from .schedule import SCHEDULES, by_name, exp, expm1, sqrt


class SDE:
    """What all processes share: the times they are defined for, and the prior N(0, prior_std^2 I)."""

    t_max = 1.0

    def drift(self, x: Any, t: Any) -> Any:
        """f(x, t), which broadcasts to the shape of x. x (N, ...) with t (N,) or a number."""
        raise NotImplementedError

    def diffusion(self, t: Any) -> Any:
        """g(t), in the shape of t."""
        raise NotImplementedError

    def marginal_scale(self, t: Any) -> Any:
        """m(t), in the shape of t or a number."""
        raise NotImplementedError

    def marginal_std(self, t: Any) -> Any:
        """s(t), in the shape of t."""
        raise NotImplementedError

    @property
    def prior_std(self) -> float:
        """The standard deviation of the noise that sampling starts from: what has gathered at t_max."""
        return self.marginal_std(self.t_max)

    def prior(self, shape: tuple[int, ...], rng: Rng | int, *, first: int = 0) -> Array:
        """Where sampling starts: prior_std z, z ~ N(0, I), float32. Row i is that of sample `first + i` of the seed."""
        return as_rng(rng).normal(shape, first=first) * self.prior_std

    def prior_log_density(self, x: Any) -> Any:
        """ln N(x; 0, prior_std^2 I), in nats: (N, ...) -> (N,)."""
        d = math.prod(x.shape[1:])
        squares = ops.square(x).reshape((x.shape[0], d)).sum(axis=1)  # (N, ...) -> (N,)
        return squares * (-0.5 / self.prior_std**2) - d * (math.log(self.prior_std) + 0.5 * math.log(2 * math.pi))

    def inside(self, t: Any) -> Any:
        """t itself. Errors: ValueError for a number outside 0 ... t_max."""
        if isinstance(t, Real) and not 0 <= float(t) <= self.t_max * (1 + 2**-23):  # t_max may be rounded to float32
            raise ValueError(f"{self}: t must be from 0 to {self.t_max:g}, not {t!r}")
        return t


class VESDE(SDE):
    """The variance-exploding SDE: the data stays where it is, and noise is added ever faster.

        f = 0,   g(t) = sigma^t,   m = 1,   s(t) = sqrt((sigma^(2 t) - 1) / (2 ln sigma))

    s^2 is the integral of g^2 from 0 to t. The prior is N(0, s(1)^2 I): the data is
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
        self.inside(t)
        return 0.0

    def diffusion(self, t: Any) -> Any:
        return exp(self.inside(t) * self.log_sigma)

    def marginal_scale(self, t: Any) -> float:
        self.inside(t)
        return 1.0

    def marginal_std(self, t: Any) -> Any:
        # expm1, as at t = 1e-5 a float32 power minus 1 has three digits left.
        rate = 2 * self.log_sigma
        return sqrt(expm1(self.inside(t) * rate) / rate)


class Brownian(SDE):
    """Noise of one strength, as in the tutorial's first picture: f = 0,  g = sigma,  m = 1,  s(t) = sigma sqrt(t).

    Errors: ValueError unless sigma and t_max are positive and finite.
    """

    def __init__(self, sigma: float = 1.0, t_max: float = 1.0):
        if not (0 < sigma < math.inf and 0 < t_max < math.inf):
            raise ValueError(f"Brownian: sigma and t_max must be positive and finite, not {sigma!r}, {t_max!r}")
        self.sigma, self.t_max = float(sigma), float(t_max)

    def __repr__(self) -> str:
        return f"Brownian(sigma={self.sigma}, t_max={self.t_max})"

    def drift(self, x: Any, t: Any) -> float:
        self.inside(t)
        return 0.0

    def diffusion(self, t: Any) -> Any:
        return self.inside(t) * 0.0 + self.sigma  # in the shape of t

    def marginal_scale(self, t: Any) -> float:
        self.inside(t)
        return 1.0

    def marginal_std(self, t: Any) -> Any:
        return sqrt(self.inside(t)) * self.sigma


class KarrasSDE(SDE):
    """The variance-exploding process whose time is the noise level: f = 0,  g(t) = sqrt(2 t),  m = 1,  s(t) = t, for t
    from 0 to sigma_max, where the prior is N(0, sigma_max^2 I). Equal steps in t would spend nearly all of them where
    there is nothing but noise: to samplers that take them give grid=rho_times.

    Errors: ValueError unless sigma_max is positive and finite.
    Source: Karras et al. 2022, "EDM", table 1, last column.
    """

    def __init__(self, sigma_max: float = 80.0):
        if not 0 < sigma_max < math.inf:
            raise ValueError(f"KarrasSDE: sigma_max must be positive and finite, not {sigma_max!r}")
        self.t_max = float(sigma_max)

    def __repr__(self) -> str:
        return f"KarrasSDE(sigma_max={self.t_max})"

    def drift(self, x: Any, t: Any) -> float:
        self.inside(t)
        return 0.0

    def diffusion(self, t: Any) -> Any:
        return sqrt(2 * self.inside(t))

    def marginal_scale(self, t: Any) -> float:
        self.inside(t)
        return 1.0

    def marginal_std(self, t: Any) -> Any:
        return self.inside(t)


class VPSDE(SDE):
    """The variance-preserving SDE: the data shrinks as the noise comes, so that data of variance 1 keeps it.

        f = -beta(t) x / 2,   g = sqrt(beta),   m = exp(-B / 2),   s = sqrt(1 - exp(-B)),     B = integral of beta

    schedule: "linear" (beta from 0.1 to 20), "cosine", or an object with beta(t) and integral(t). The prior is N(0, I).
    Errors: ValueError for another name, TypeError for an object without them.
    Source: Song et al. 2021, equation 11; its discrete form is DDPM (Ho et al. 2020).
    """

    def __init__(self, schedule: Any = "linear"):
        self.schedule = by_name("schedule", SCHEDULES, schedule)() if isinstance(schedule, str) else schedule
        if not (hasattr(self.schedule, "beta") and hasattr(self.schedule, "integral")):
            raise TypeError(f"{type(self).__name__}: a schedule has beta(t) and integral(t); {schedule!r} has not")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.schedule!r})"

    def drift(self, x: Any, t: Any) -> Any:
        return per_sample(self.schedule.beta(self.inside(t)) * -0.5, x) * x

    def diffusion(self, t: Any) -> Any:
        return sqrt(self.schedule.beta(self.inside(t)))

    def marginal_scale(self, t: Any) -> Any:
        return exp(self.schedule.integral(self.inside(t)) * -0.5)

    def marginal_std(self, t: Any) -> Any:
        # expm1, as in VESDE.
        return sqrt(-expm1(-self.schedule.integral(self.inside(t))))

    @property
    def prior_std(self) -> float:
        return 1.0


class SubVPSDE(VPSDE):
    """The sub-VP SDE: the drift of VP with less noise, its variance never above that of VP.

        f = -beta(t) x / 2,   g = sqrt(beta (1 - exp(-2 B))),   m = exp(-B / 2),   s = 1 - exp(-B)

    Arguments, prior and errors are those of VPSDE. Source: Song et al. 2021, equation 12 and appendix B.
    """

    def diffusion(self, t: Any) -> Any:
        return super().diffusion(t) * sqrt(-expm1(self.schedule.integral(t) * -2))

    def marginal_std(self, t: Any) -> Any:
        return -expm1(-self.schedule.integral(self.inside(t)))


class FlowSDE(SDE):
    """The straight line from data to noise of flow matching, x_t = (1 - t) x_0 + t z, as a process.

        f = -x / (1 - t),   g = sqrt(2 t / (1 - t)),   m = 1 - t,   s = t

    At t = 1, where nothing of the data is left, drift and diffusion are infinite, so it ends a little before, at t_max.
    Source: Lipman et al. 2023, "Flow matching for generative modeling"; Liu et al. 2023, "Flow straight and fast".
    Errors: ValueError unless 0 < t_max < 1.
    """

    def __init__(self, t_max: float = 0.999):
        if not 0 < t_max < 1:
            raise ValueError(f"FlowSDE: t_max must be between 0 and 1, not {t_max!r}")
        self.t_max = float(t_max)

    def __repr__(self) -> str:
        return f"FlowSDE(t_max={self.t_max})"

    def drift(self, x: Any, t: Any) -> Any:
        return x / per_sample(self.inside(t) - 1, x)

    def diffusion(self, t: Any) -> Any:
        return sqrt(2 * self.inside(t) / (1 - t))

    def marginal_scale(self, t: Any) -> Any:
        return 1 - self.inside(t)

    def marginal_std(self, t: Any) -> Any:
        return self.inside(t)


PROCESSES = {"ve": VESDE, "vp": VPSDE, "subvp": SubVPSDE, "flow": FlowSDE, "karras": KarrasSDE, "brownian": Brownian}


def process(name: str, **options: Any) -> SDE:
    """A process by name: "ve", "vp", "subvp", "flow", "karras" or "brownian". Errors: ValueError for another name."""
    return by_name("process", PROCESSES, name)(**options)


def per_sample(a: Any, x: Any) -> Any:
    """One number a sample, (N,), shaped to multiply x (N, ...): (N, 1, ..., 1). A Python number stays one."""
    return a if isinstance(a, (int, float)) else a.reshape((-1,) + (1,) * (x.ndim - 1))


def denoised(sde: Any, x: Any, t: Any, score: Any) -> Any:
    """E[x_0 | x_t], what the image is on average, from the score: (x + s(t)^2 score) / m(t), in the shape of x.

    Source: Tweedie's formula; Efron 2011, "Tweedie's formula and selection bias".
    """
    s, m = per_sample(sde.marginal_std(t), x), per_sample(sde.marginal_scale(t), x)
    return (x + s * s * score) / m
