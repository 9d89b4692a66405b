"""The process that turns data into noise.

    dx = f(x, t) dt + g(t) dw,   0 <= t <= t_max      so that  x_t ~ N(m(t) x_0, s(t)^2 I)

Two different things are called sigma(t) in the literature. Here they are always `diffusion(t)`, which is g, the
strength of the noise that is added at time t, and `marginal_std(t)`, which is s, the standard deviation of the noise
that has accumulated since time 0. All drifts here have the form f = a(t) x. Then g, s and the scale m(t) are related by

    dm/dt = a m,      d(s^2)/dt = 2 a s^2 + g^2,      m(0) = 1,  s(0) = 0

A process is an object with `drift(x, t)`, `diffusion(t)`, `marginal_scale(t)` (m), `marginal_std(t)` (s), `t_max`, and
`prior(shape, rng)`, from which sampling starts; the losses and the methods of sampling use nothing else. t is a
number, an array or a Tensor, and the result is of the same kind; for a batch it is (N,), one time per sample. A number
outside 0 to t_max is a ValueError; the values of an array are not checked, because that would wait for the device.

A process of your own may be written in the functions of NumPy or CuPy: it is always asked through `plain`, which gives
it numbers and arrays, and gives back plain numbers and arrays in the dtype of the data.

The chapter has four parts: the processes; the noise schedules of those that preserve the variance; noise levels and
their times; and the small functions that all chapters of diffusion share.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from .. import ops
from ..arguments import number
from ..backend import Array
from ..describing import rebuildable
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng, as_rng


class SDE:
    """What all processes share: the times they are defined for, and the prior N(0, prior_std^2 I)."""

    t_max = 1.0
    equal_steps = True  # are equal steps in t good for sampling? Not where most of the times have hardly any data left.

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
        """The standard deviation of the noise that sampling starts from: s(t_max)."""
        return self.marginal_std(self.t_max)

    def prior(self, shape: tuple[int, ...], rng: Rng | int, *, sample_offset: int = 0) -> Array:
        """Where sampling starts: prior_std z, z ~ N(0, I), float32. Row i is that of sample `sample_offset + i`."""
        return as_rng(rng).normal(shape, sample_offset=sample_offset) * float(self.prior_std)

    def prior_log_density(self, x: Any) -> Any:
        """ln N(x; 0, prior_std^2 I), in nats: (N, ...) -> (N,)."""
        d, std = math.prod(x.shape[1:]), float(self.prior_std)
        squares = ops.square(x).reshape((x.shape[0], d)).sum(axis=1)  # (N, ...) -> (N, D) -> (N,)
        return squares * (-0.5 / std**2) - d * (math.log(std) + 0.5 * math.log(2 * math.pi))

    def inside(self, t: Any) -> Any:
        """t itself, a number as a float. Errors: ValueError for a number outside 0 ... t_max."""
        if not isinstance(t, Real):
            return t
        if not 0 <= float(t) <= self.t_max * (1 + 2**-23):  # t_max may be rounded to float32
            raise ValueError(f"{self}: t must be from 0 to {self.t_max:g}, not {t!r}")
        return float(t)


@rebuildable
class VESDE(SDE):
    """The variance-exploding SDE: the data keeps its scale, and noise is added ever faster.

        f = 0,   g(t) = sigma^t,   m = 1,   s(t) = sqrt((sigma^(2 t) - 1) / (2 ln sigma))

    s^2 is the integral of g^2 from 0 to t. The prior is N(0, s(1)^2 I), an approximation that is good if s(1), 9.8 for
    sigma = 25, is large beside the data.
    Errors: ValueError unless sigma > 1.
    Source: Song et al. 2021, "Score-based generative modeling through stochastic differential
    equations", and its tutorial.
    """

    t_max = 1.0

    def __init__(self, sigma: float = 25.0):
        self.sigma = number("VESDE: sigma", sigma, "(1, inf)")
        self.log_sigma = math.log(self.sigma)

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
        # expm1, because at t = 1e-5 a float32 power minus 1 has only three digits left.
        rate = 2 * self.log_sigma
        return sqrt(expm1(self.inside(t) * rate) / rate)


@rebuildable
class Brownian(SDE):
    """Noise of constant strength, as in the tutorial's first picture:

        f = 0,   g = sigma,   m = 1,   s(t) = sigma sqrt(t)

    Errors: ValueError unless sigma and t_max are positive and finite.
    """

    equal_steps = False

    def __init__(self, sigma: float = 1.0, t_max: float = 1.0):
        self.sigma = number("Brownian: sigma", sigma, "(0, inf)")
        self.t_max = number("Brownian: t_max", t_max, "(0, inf)")

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


@rebuildable
class KarrasSDE(SDE):
    """The variance-exploding process of EDM, whose time is the noise level itself:

        f = 0,   g(t) = sqrt(2 t),   m = 1,   s(t) = t,      for t from 0 to sigma_max

    The prior is N(0, sigma_max^2 I). With equal steps in t, nearly all steps would lie where there is nothing but
    noise, so every method takes `karras_times` here.
    Errors: ValueError unless sigma_max is positive and finite.
    Source: Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", table 1, last
    column.
    """

    equal_steps = False

    def __init__(self, sigma_max: float = 80.0):
        self.t_max = number("KarrasSDE: sigma_max", sigma_max, "(0, inf)")

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


@rebuildable
class VPSDE(SDE):
    """The variance-preserving SDE: the data shrinks as the noise grows, so data of variance 1 keeps the variance 1.

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


@rebuildable
class SubVPSDE(VPSDE):
    """The sub-VP SDE: the drift of VP with less noise, so that its variance is never above that of VP.

        f = -beta(t) x / 2,   g = sqrt(beta (1 - exp(-2 B))),   m = exp(-B / 2),   s = 1 - exp(-B)

    Arguments, prior and errors are those of VPSDE. Source: Song et al. 2021, equation 12 and appendix B.
    """

    def diffusion(self, t: Any) -> Any:
        return super().diffusion(t) * sqrt(-expm1(self.schedule.integral(t) * -2))

    def marginal_std(self, t: Any) -> Any:
        return -expm1(-self.schedule.integral(self.inside(t)))


@rebuildable
class FlowSDE(SDE):
    """The straight line from data to noise of flow matching, x_t = (1 - t) x_0 + t z, as a process.

        f = -x / (1 - t),   g = sqrt(2 t / (1 - t)),   m = 1 - t,   s = t

    At t = 1, where nothing of the data is left, drift and diffusion are infinite. So the process ends a little earlier,
    at t_max.
    Errors: ValueError unless 0 < t_max < 1.
    Source: Lipman et al. 2023, "Flow matching for generative modeling"; Liu et al. 2023, "Flow straight and fast".
    """

    def __init__(self, t_max: float = 0.999):
        self.t_max = number("FlowSDE: t_max", t_max, "(0, 1)")

    def __repr__(self) -> str:
        return f"FlowSDE(t_max={self.t_max})"

    def drift(self, x: Any, t: Any) -> Any:
        return x / per_sample(self.inside(t) - 1, x)

    def diffusion(self, t: Any) -> Any:
        t = self.inside(t)
        return sqrt(2 * t / (1 - t))

    def marginal_scale(self, t: Any) -> Any:
        return 1 - self.inside(t)

    def marginal_std(self, t: Any) -> Any:
        return self.inside(t)


PROCESSES = {"ve": VESDE, "vp": VPSDE, "subvp": SubVPSDE, "flow": FlowSDE, "karras": KarrasSDE, "brownian": Brownian}


def process(name: str, **options: Any) -> SDE:
    """A process by name: "ve", "vp", "subvp", "flow", "karras" or "brownian". Errors: ValueError for another name."""
    return by_name("process", PROCESSES, name)(**options)


# ---------------------------------------------------------------- the schedules of VPSDE and SubVPSDE


@rebuildable
class LinearSchedule:
    """beta(t) = low + t (high - low),   integral = low t + (high - low) t^2 / 2

    With the defaults, the mean at t = 1 is exp(-10.05 / 2) = 0.0066 of the mean at 0.
    Errors: ValueError unless 0 <= low <= high < infinity and high > 0.
    Source: Ho et al. 2020, as Song et al. 2021 (appendix C) write it for continuous time.
    """

    def __init__(self, low: float = 0.1, high: float = 20.0):
        self.high = number("LinearSchedule: high", high, "(0, inf)")
        self.low = number("LinearSchedule: low", low, f"[0, {self.high!r}]")

    def __repr__(self) -> str:
        return f"LinearSchedule(low={self.low}, high={self.high})"

    def beta(self, t: Any) -> Any:
        return t * (self.high - self.low) + self.low

    def integral(self, t: Any) -> Any:
        return (t * ((self.high - self.low) / 2) + self.low) * t


@rebuildable
class CosineSchedule:
    """The mean shrinks as a cosine: exp(-integral / 2) = cos(u) / cos(u_0), u_0 = u(0), with an angle

        u = (pi / 2) (t + offset) / (1 + 2 offset),      beta(t) = 2 u' tan(u),      integral = -2 ln(cos(u) / cos(u_0))

    The angle starts a little above 0, so that beta(0) is not 0, and ends as far below a right angle, where beta would
    be infinite. Nichol and Dhariwal 2021 (equation 17) let it reach the right angle, and clip beta (at 0.999 per step).
    Here the mean at t = 1 is 0.0124 of the mean at 0.
    Errors: ValueError unless 0 < offset < infinity.
    """

    def __init__(self, offset: float = 0.008):
        self.offset = number("CosineSchedule: offset", offset, "(0, inf)")
        self.speed = math.pi / 2 / (1 + 2 * self.offset)  # u'
        self.start = self.speed * self.offset  # u_0

    def __repr__(self) -> str:
        return f"CosineSchedule(offset={self.offset})"

    def beta(self, t: Any) -> Any:
        u = t * self.speed + self.start
        return 2 * self.speed * sin(u) / cos(u)

    def integral(self, t: Any) -> Any:
        # cos(u) / cos(u_0) = 1 - (2 sin^2(d / 2) + tan(u_0) sin(d)) for d = u - u_0. Near t = 0 the quotient is almost
        # 1, and its logarithm, taken directly, would have no correct digits in float32.
        d = t * self.speed
        half = sin(d / 2)
        return -2 * log1p(-(2 * half * half + math.tan(self.start) * sin(d)))


SCHEDULES: dict[str, Callable[..., Any]] = {"linear": LinearSchedule, "cosine": CosineSchedule}


# ---------------------------------------------------------------- noise levels, and the times at which they occur


def sigma_at(process: Any, t: float) -> float:
    """The noise level sigma = s(t) / m(t). As x_t = m (x_0 + sigma z), a time matters only by sigma and the scale m."""
    process = plain(process)
    return process.marginal_std(t) / process.marginal_scale(t)


def time_at(process: Any, sigma: float) -> float:
    """The time at which the noise level is sigma, to 1e-15 of t: bisection, as sigma increases with t in every process.

    Errors: ValueError for a sigma that is negative, or that the process does not reach.
    """
    process = plain(process)
    high = sigma_at(process, process.t_max)
    # rounding may put a noise level that was computed elsewhere a little above the highest one
    if not isinstance(sigma, Real) or not 0 <= float(sigma) <= high * (1 + 1e-12):
        raise ValueError(f"{process}: a noise level must be from 0 to {high:.6g}, not {sigma!r}")
    sigma, below, above = float(sigma), 0.0, process.t_max
    for _ in range(100):
        middle = (below + above) / 2
        if sigma_at(process, middle) < sigma:
            below = middle
        else:
            above = middle
        if above - below <= 1e-15 * above:
            break
    return above


# ---------------------------------------------------------------- what all chapters of diffusion share


class PlainProcess:
    """A process whose answers are plain, whoever wrote it: for a number t floats; for t (N,) floats, or what is of the
    kind and dtype of t. The drift has the dtype of x. Everything else is the process's own.

    np.sqrt(0.5) is a NumPy scalar, and the product of a NumPy scalar of float64 and an array of float32 is of float64.
    """

    def __init__(self, process: Any):
        self._process = process

    def __getattr__(self, name: str) -> Any:
        if name == "_process":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self._process, name)

    def __reduce__(self) -> Any:
        return PlainProcess, (self._process,)

    def __eq__(self, other: Any) -> Any:
        return self._process == getattr(other, "_process", other)

    def __hash__(self) -> int:
        return hash(self._process)

    def __repr__(self) -> str:
        return repr(self._process)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance sees the process itself
        return type(self._process)

    @property
    def t_max(self) -> float:
        return float(self._process.t_max)

    def drift(self, x: Any, t: Any) -> Any:
        return like(x, self._process.drift(x, _as_given(t)))

    def diffusion(self, t: Any) -> Any:
        return self._at(t, self._process.diffusion)

    def marginal_scale(self, t: Any) -> Any:
        return self._at(t, self._process.marginal_scale)

    def marginal_std(self, t: Any) -> Any:
        return self._at(t, self._process.marginal_std)

    def _at(self, t: Any, function: Callable[[Any], Any]) -> Any:
        if type(t) is float:  # the usual case, and the quickest
            return float(function(t))
        found = function(_as_given(t))
        if isinstance(t, Real):
            return float(found)
        found = like(t, found)
        return Tensor(found) if isinstance(t, Tensor) and not isinstance(found, (float, Tensor)) else found


def plain(process: Any) -> Any:
    """The process as a PlainProcess."""
    return process if type(process) is PlainProcess else PlainProcess(process)


def _as_given(t: Any) -> Any:
    """t for a process: a float, or an array. It is a Tensor only where a gradient by t is wanted."""
    if isinstance(t, Real):
        return float(t)
    return t if isinstance(t, Tensor) and t.requires_grad else array_of(t)


def like(x: Any, a: Any) -> Any:
    """Real numbers a in the dtype of x, if that is of floats; one number as a float, which has no dtype."""
    if type(a) is float or isinstance(a, Real):
        return float(a)
    different = x.dtype.kind == "f" and a.dtype != x.dtype and a.dtype.kind in "fiub"
    return ops.astype(a, dtype=x.dtype) if different else a


def per_sample(a: Any, x: Any) -> Any:
    """One number per sample, (N,), shaped to multiply x (N, ...), and in its dtype: (N, 1, ..., 1). A number is a
    float."""
    a = like(x, a)
    return a if isinstance(a, float) else a.reshape((-1,) + (1,) * (x.ndim - 1))  # (N,) -> (N, 1, ..., 1)


def time_of(what: str, t: Any, process: Any, after: float = 0.0) -> float:
    """A time above `after` as a float; t_max rounded to float32, which may lie a little above it, is t_max.

    Errors: ValueError for another time, or none.
    """
    end = float(process.t_max)
    if isinstance(t, Real) and end < float(t) <= end * (1 + 2**-23):
        return end
    return number(what, t, f"({after!r}, {end!r}]")


def least_time(what: str, eps: Any, process: Any) -> float:
    """eps as a float. Errors: ValueError unless it is inside (0, t_max)."""
    return number(what, eps, f"(0, {float(process.t_max)!r})")


def by_name(what: str, choices: Mapping[str, Any], name: str) -> Any:
    """The choice of that name. Errors: ValueError, which lists them, and names the nearest."""
    if name not in choices:
        near = difflib.get_close_matches(str(name), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(choices)}{hint}")
    return choices[name]


def _of_number_or_array(number: Callable[[float], float], array: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that maps a number to a Python float, and an array or a Tensor to one of the same kind."""
    return lambda t: number(float(t)) if isinstance(t, Real) else array(t)


exp = _of_number_or_array(math.exp, ops.exp)
expm1 = _of_number_or_array(math.expm1, ops.expm1)
log1p = _of_number_or_array(math.log1p, ops.log1p)
sqrt = _of_number_or_array(math.sqrt, ops.sqrt)
sin = _of_number_or_array(math.sin, ops.sin)
cos = _of_number_or_array(math.cos, ops.cos)
