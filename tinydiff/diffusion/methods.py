"""The methods of sampling. A method is its update rule and nothing else; `sample` (sample.py) does the rest.

| method | noise added | evaluations | |
|---|---|---|---|
| `euler_maruyama` | yes | steps + 1 | the reverse SDE by the simplest method |
| `predictor_corrector` | yes | 2 steps + 1 | with Langevin steps in between |
| `ddpm` | yes | steps + 1 | ancestral sampling |
| `probability_flow` | no | 2 steps + 1, by Euler steps + 1 | the ODE in t, by Heun or Euler |
| `rk45` | no | as many as it takes | the same to a given tolerance |
| `ddim` | if eta > 0 | steps + 1 | Euler in the noise level |
| `heun` | if s_churn > 0 | 2 steps + 1 | EDM: Heun in the noise level |
| `dpm_solver` | no | steps + 1 | DPM-Solver++(2M): second order for one evaluation per step |

A method is a function of a SamplerState (sample.py). It begins with state.x, x at the first of state.times, and returns
x at the last of them. On the way it uses

    state.intervals            the pairs (t, t_next) of neighbouring times, which decrease
    state.stop(x, t)           score and denoised image at x, once at each of the times; calls the callback
    state.evaluate(x, t)       the same at other times; does not call the callback
    state.noise()              fresh standard normals in the shape of x
    state.sigma(t)             the noise level s(t) / m(t)
    state.process              the process, whose answers are plain numbers (see process.py)

Its keyword arguments are its options. For example, Euler's method for the ODE in t is

    @method(steps=50)
    def euler(state, *, stretch=1.0):
        x = state.x
        for t, t_next in state.intervals:
            score, _ = state.stop(x, t)
            x = x + (t_next - t) * stretch * flow_velocity(state.process, x, t, score)
        return x

    x = sample(model, (64, 28, 28, 1), process, rng, method=euler(stretch=0.99))

The ODE is dx/dt = f - g^2 score / 2. In the noise level sigma = s / m, for y = x / m, it is the same for every process,
and nearly straight:

    dy/dsigma = (y - D) / sigma            where D is the denoised image at y
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ..arguments import integer, number
from ..backend import Array
from .predict import flow_velocity
from .process import by_name, sigma_at, time_at
from .runge_kutta import solve

if TYPE_CHECKING:
    from .sample import SamplerState

Timesteps = Callable[[Any, int, float, float], list[float]]


# ---------------------------------------------------------------- the times at which a method stops


def uniform_times(process: Any, steps: int, begin: float, end: float) -> list[float]:
    """steps + 1 times from begin down to end, in equal steps of t."""
    steps, begin, end = integer("steps", steps), number("begin", begin), number("end", end)
    return [begin - (begin - end) * i / steps for i in range(steps)] + [end]


def karras_times(process: Any, steps: int, begin: float, end: float, rho: float = 7.0) -> list[float]:
    """steps + 1 times from begin down to end, in equal steps of sigma^(1/rho): the steps are shorter the less noise is
    left.

    Source: Karras et al. 2022, equation 5, whose N is steps + 1.
    """
    steps, begin, end = integer("steps", steps), number("begin", begin), number("end", end)
    rho = number("karras_times: rho", rho, "(0, inf)")
    high, low = sigma_at(process, begin) ** (1 / rho), sigma_at(process, end) ** (1 / rho)
    return [begin, *(time_at(process, (high + i / steps * (low - high)) ** rho) for i in range(1, steps)), end]


def usual_times(process: Any, steps: int, begin: float, end: float) -> list[float]:
    """`uniform_times`, or `karras_times` for a process whose `equal_steps` is false, such as KarrasSDE."""
    times = uniform_times if getattr(process, "equal_steps", True) else karras_times
    return times(process, steps, begin, end)


# ---------------------------------------------------------------- a method and its options


class Method:
    """An update rule with its defaults and its options: heun(s_churn=10.0) is `heun` with one set.

    rule(state, **options) -> x at the last of state.times. steps, timesteps: the defaults; timesteps=None is for a rule
    that chooses its own times between the first and the last. evaluations: per step; None if unknown.
    Errors: TypeError for an option that the rule does not have.
    """

    def __init__(
        self,
        rule: Callable[..., Array],
        *,
        steps: int = 50,
        timesteps: Timesteps | None = usual_times,
        evaluations: int | None = 1,
        **options: Any,
    ):
        self.rule, self.steps, self.timesteps, self.evaluations = rule, steps, timesteps, evaluations
        self.name, self.__doc__ = getattr(rule, "__name__", repr(rule)), rule.__doc__
        self.defaults = {
            p.name: p.default for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        for name in options:
            if name not in self.defaults:
                known = f"it has {', '.join(self.defaults)}" if self.defaults else "it has none"
                near = difflib.get_close_matches(name, self.defaults, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{self.name} has no option {name!r}: {known}{meant}")
        self.options = {name: _plain_number(value) for name, value in options.items()}

    def __call__(self, **options: Any) -> Method:
        """The same method with other options, or another default of steps or timesteps."""
        return Method(self.rule, **{**self._arguments(), **options})

    def _arguments(self) -> dict[str, Any]:
        kept = {"steps": self.steps, "timesteps": self.timesteps, "evaluations": self.evaluations}
        return {**kept, **self.options}

    def __reduce__(self) -> Any:
        """For pickle and copy: by the place of its rule, as a function is pickled. The decorator has put a Method
        there."""
        place = getattr(self.rule, "__module__", ""), getattr(self.rule, "__qualname__", "")
        by_place = getattr(_at(*place), "rule", None) is self.rule
        return _restored, (place if by_place else self.rule, self._arguments())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


def _at(module: str, name: str) -> Any:
    """What has that name now; None if there is nothing."""
    return functools.reduce(lambda x, part: getattr(x, part, None), name.split("."), sys.modules.get(module))


def _restored(rule: Any, arguments: dict[str, Any]) -> Method:
    if isinstance(rule, tuple):
        importlib.import_module(rule[0])
        rule = _at(*rule).rule
    return Method(rule, **arguments)


def _plain_number(x: Any) -> Any:
    """A number as an int or a float, also where it is a scalar of NumPy; anything else as it is."""
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    return int(x) if isinstance(x, Integral) else float(x)


def method(**defaults: Any) -> Callable[[Callable[..., Array]], Method]:
    """Decorator that makes a Method of a rule: @method(steps=50). defaults: as in Method."""
    return lambda rule: Method(rule, **defaults)


def as_method(given: str | Method | Callable[..., Array]) -> Method:
    """The method of that name; a function becomes a Method. Errors: ValueError for a name that is not in METHODS."""
    if isinstance(given, Method):
        return given
    if callable(given):
        return Method(given)
    return by_name("method", METHODS, given)


# ---------------------------------------------------------------- methods that add noise


@method(steps=500)
def euler_maruyama(state: SamplerState) -> Array:
    """The reverse SDE by the method of Euler and Maruyama.

        x <- x + (g(t)^2 score(x, t) - f(x, t)) h + g(t) sqrt(h) z,      h = t - t_next

    Source: Song et al. 2021, section 4 (the reverse SDE: Anderson 1982) and its tutorial, whose loop takes one step too
    many.
    """
    x = state.x  # (N, ...)
    for t, t_next in state.intervals:
        x = _reverse_step(state, x, t, t_next, state.stop(x, t).score)
    return x


@method(steps=250, evaluations=2)
def predictor_corrector(state: SamplerState, *, snr: float = 0.16) -> Array:
    """A step of Langevin's equation before each Euler-Maruyama step; it brings x closer to its law at that time.

        x <- x + e score(x, t) + sqrt(2 e) z,      e = 2 (snr s(t))^2

    The paper has e = 2 (snr |z| / |score|)^2 with norms averaged over the batch, so an image would depend on the images
    beside it. The norm of a sample's own score is no remedy: a step size that depends on x does not preserve the law
    of x without another drift term, and it is infinite where the score is 0. Here |z| / |score| has the value that it
    has for pure noise, whose score is -z / s: that is s(t), the same for all samples.
    Source: Song et al. 2021, algorithms 2 to 5, with one corrector step, and the order and predictor of its tutorial.
    Errors: ValueError for an snr that is not positive and finite.
    """
    snr = number("predictor_corrector: snr", snr, "(0, inf)")
    x = state.x  # (N, ...)
    for t, t_next in state.intervals:
        e = 2 * (snr * state.process.marginal_std(t)) ** 2
        x = x + e * state.stop(x, t).score + math.sqrt(2 * e) * state.noise()
        x = _reverse_step(state, x, t, t_next, state.score(x, t))
    return x


def _reverse_step(state: SamplerState, x: Array, t: float, t_next: float, score: Array) -> Array:
    """Euler-Maruyama on dx = (f - g^2 score) dt + g dw, backwards in time."""
    h, g = t - t_next, state.process.diffusion(t)
    x = x + (g * g * score - state.process.drift(x, t)) * h
    return x + g * math.sqrt(h) * state.noise()


@method(steps=500)
def ddpm(state: SamplerState) -> Array:
    """Ancestral sampling: a draw from q(x_u | x_t, x_0) with the denoised image D in place of x_0, for every process.

        y <- D + (sigma_u / sigma_t)^2 (y - D) + sigma_u sqrt(1 - (sigma_u / sigma_t)^2) z

    It is `ddim` with eta = 1.
    Source: Ho et al. 2020, algorithm 2, with the smaller of its two variances (equation 7); the variance-exploding form
    is Song et al. 2021, equation 47.
    """
    return ddim.rule(state, eta=1.0)


# ---------------------------------------------------------------- methods that follow the ODE


@method(steps=50, evaluations=2)
def probability_flow(state: SamplerState, *, solver: str = "heun") -> Array:
    """The ODE in t, by Heun's method or, with solver="euler", by Euler's (one evaluation per step).

        Euler    x <- x - h v,                  v = f - g^2 score / 2 at (x, t)
        Heun     x <- x - h (v + v_next) / 2,   v_next the same at the end of Euler's step

    Source: Song et al. 2021, equation 13. Errors: ValueError for another solver.
    """
    by_name("solver of probability_flow", {"euler": 1, "heun": 2}, solver)
    x = state.x  # (N, ...)
    for t, t_next in state.intervals:
        v = flow_velocity(state.process, x, t, state.stop(x, t).score)
        x_euler = x + (t_next - t) * v
        if solver == "euler":
            x = x_euler
        else:
            v_next = flow_velocity(state.process, x_euler, t_next, state.score(x_euler, t_next))
            x = x + (t_next - t) * (v + v_next) / 2
    return x


@method(steps=1000, timesteps=None, evaluations=None)
def rk45(state: SamplerState, *, rtol: float = 1e-5, atol: float = 1e-5) -> Array:
    """The ODE in t by an adaptive Runge-Kutta method of order 5, with an error of about atol + rtol |x|.

    Each sample has its own step, chosen from its own error, so a sample is the same in any batch. The score is
    evaluated for all samples, each at its own time, until the last has arrived. `steps` is the largest number of
    rounds, of 6 evaluations each; there are two more evaluations. A callback costs one more per round, and its t is
    (N,) in all calls but the last.
    Source: Dormand and Prince 1980 (runge_kutta.py); Song et al. 2021, appendix D.4.
    Errors: RuntimeError if the rounds are too few, or a step becomes too small for the dtype (float32 hardly reaches
    1e-6); ValueError for tolerances that are not positive.
    """

    def velocity(x: Array, t: Array) -> Array:
        return flow_velocity(state.process, x, t, state.score(x, t))

    begin, end = state.times
    for t, x in solve(velocity, state.x, begin, end, rtol=rtol, atol=atol, steps=state.steps):
        if state.callback is not None:
            state.stop(x, t)
    return x


@method(steps=50, timesteps=karras_times)
def ddim(state: SamplerState, *, eta: float = 0.0) -> Array:
    """Move towards the denoised image by as much as the noise level falls. With eta = 0 no noise is added, and this is
    Euler's method in sigma.

    Source: Song, Meng and Ermon 2021, "Denoising diffusion implicit models", equations 12 and 16.
    Errors: ValueError for eta outside 0 to 1.
    """
    eta = number("ddim: eta", eta, "[0, 1]")
    x = state.x  # (N, ...)
    for t, t_next in state.intervals:
        x = ddim_step(state, x, t, t_next, state.stop(x, t).denoised, eta)
    return x


def ddim_step(state: SamplerState, x: Array, t: float, t_next: float, denoised: Array, eta: float) -> Array:
    """One step of `ddim` from t to t_next, for the denoised image D at x.

    y <- D + sqrt(sigma_u^2 - c^2) (y - D) / sigma_t + c z,    c = eta sigma_u sqrt(1 - (sigma_u / sigma_t)^2)
    """
    sigma, sigma_next, m = state.sigma(t), state.sigma(t_next), state.process.marginal_scale
    c = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    y = denoised + math.sqrt(sigma_next**2 - c**2) / sigma * (x / m(t) - denoised)
    if c > 0:
        y = y + c * state.noise()
    return y * m(t_next)


@method(steps=17, timesteps=karras_times, evaluations=2)
def heun(
    state: SamplerState, *, s_churn: float = 0.0, s_tmin: float = 0.05, s_tmax: float = 50.0, s_noise: float = 1.003
) -> Array:
    """Heun's method in the noise level; with s_churn > 0, each step begins by adding a little noise.

        gamma = min(s_churn / (steps + 1), sqrt(2) - 1) if s_tmin <= sigma <= s_tmax, or else 0
        sigma_hat = (1 + gamma) sigma,      y_hat = y + s_noise sqrt(sigma_hat^2 - sigma^2) z
        y <- y_hat + (sigma_next - sigma_hat) (d_cur + d_prime) / 2
        d_cur = (y_hat - D) / sigma_hat, and d_prime the same at the end of Euler's step

    The noise is not raised above that of the prior, for which the net was not trained; so the first step has no churn.
    Source: Karras et al. 2022, algorithm 2 (algorithm 1 without churn); their N is steps + 1.
    Errors: ValueError for a negative s_churn, an s_noise that is negative or not finite, or unless
    0 <= s_tmin <= s_tmax.
    """
    s_churn, s_noise = number("heun: s_churn", s_churn, "[0, inf]"), number("heun: s_noise", s_noise, "[0, inf)")
    s_tmax = number("heun: s_tmax", s_tmax, "[0, inf]")
    s_tmin = number("heun: s_tmin", s_tmin, f"[0, {s_tmax!r}]")
    m, sigma_max = state.process.marginal_scale, state.sigma(state.process.t_max)
    y = state.x / m(state.times[0])  # (N, ...)
    for t, t_next in state.intervals:
        sigma = sigma_hat = state.sigma(t)
        sigma_next = state.sigma(t_next)
        gamma = min(s_churn / len(state.times), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if gamma > 0:
            sigma_hat = min(sigma * (1 + gamma), sigma_max)
            y = y + s_noise * math.sqrt(sigma_hat**2 - sigma**2) * state.noise()
            t = time_at(state.process, sigma_hat)
        d_cur = (y - state.stop(y * m(t), t).denoised) / sigma_hat
        y_next = y + (sigma_next - sigma_hat) * d_cur
        d_prime = (y_next - state.evaluate(y_next * m(t_next), t_next).denoised) / sigma_next
        y = y + (sigma_next - sigma_hat) * (d_cur + d_prime) / 2
    return y * m(state.times[-1])


@method(steps=34, timesteps=karras_times)
def dpm_solver(state: SamplerState) -> Array:
    """DPM-Solver++(2M): of second order with one evaluation per step.

    In l = -ln sigma the ODE is dy/dl = D - y. It is solved exactly for a D that is linear in l, through the D of this
    step and of the one before (constant in the first step):

        y <- (sigma_u / sigma_t) y + (1 - e^-h) (D + (D - D_last) h / (2 h_last)),        h = ln(sigma_t / sigma_u)

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    m = state.process.marginal_scale
    y = state.x / m(state.times[0])  # (N, ...)
    denoised_last, h_last = None, math.inf
    for t, t_next in state.intervals:
        sigma, sigma_next = state.sigma(t), state.sigma(t_next)
        h, denoised = math.log(sigma / sigma_next), state.stop(y * m(t), t).denoised
        change = 0.0 if denoised_last is None else (denoised - denoised_last) * (h / (2 * h_last))
        y = y * (sigma_next / sigma) - math.expm1(-h) * (denoised + change)
        denoised_last, h_last = denoised, h
    return y * m(state.times[-1])


METHODS: dict[str, Method] = {
    m.name: m for m in (euler_maruyama, predictor_corrector, ddpm, probability_flow, rk45, ddim, heun, dpm_solver)
}
