"""Samplers that follow the probability-flow ODE, from one noise to one image. All have the form that samplers.py
describes.

In t it is dx/dt = f - g^2 score / 2. In sigma = s / m, for y = x / m, it is the same for every process, and nearly
straight:

    dy/dsigma = (y - D) / sigma            with D what the image is on average, given y
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from ..backend import Array
from ..engine import no_grad
from ..rng import Rng
from .dormand_prince import solve
from .evaluation import Callback, Run, Score, Start, flow
from .grids import Grid, rho_times, sigma_at, time_at, uniform_times

METHODS = ("euler", "heun")


@no_grad()
def probability_flow(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 50,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = uniform_times,
    method: str = "heun",
    **condition: Any,
) -> Array:
    """The ODE in t by Euler's method (steps + 1 evaluations) or Heun's (2 steps + 1).

        Euler    x <- x - h k,                  k = f - g^2 score / 2 at (x, t)
        Heun     x <- x - h (k + k') / 2,       k' the same where Euler's step leads

    Source: Song et al. 2021, equation 13. Errors: ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"probability_flow: unknown method {method!r}: choose one of {', '.join(METHODS)}")
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    x = run.x  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        slope = flow(sde, x, t, run.look(step, x, t)[0])
        euler = x + (after - t) * slope
        if method == "heun":
            again = flow(sde, euler, after, run.score(euler, after))
            x = x + (after - t) * (slope + again) / 2
        else:
            x = euler
    return run.finish(step + 1, x)


@no_grad()
def rk45(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 1000,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **condition: Any,
) -> Array:
    """The ODE in t by an adaptive Runge-Kutta method of order 5, with an error of about atol + rtol |x|.

    Each sample has its own step, chosen from its own error, so that it is the same in any batch; the score is asked for
    all of them, each at its own time, until the last has arrived. `steps` is how many rounds there may be, of 6
    evaluations each, and two more. A callback costs one more a round, and its t is (N,) but for the last.
    Errors: RuntimeError if that is not enough, or a step becomes too small for the dtype (float32 hardly reaches 1e-6).
    Source: Dormand and Prince 1980; Song et al. 2021, appendix D.4.
    """
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, uniform_times, condition)

    def slope(x: Array, t: Array) -> Array:
        return flow(sde, x, t, run.score(x, t))

    for step, (t, x) in enumerate(solve(slope, run.x, run.times[0], run.times[-1], rtol=rtol, atol=atol, steps=steps)):
        if callback is not None:
            run.look(step, x, t)
    return run.finish(step + 1, x)


@no_grad()
def ddim(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 50,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = rho_times,
    eta: float = 0.0,
    **condition: Any,
) -> Array:
    """Towards the denoised image by as much as the noise level falls, steps + 1 evaluations. With eta = 0 no noise is
    added, and it is Euler's method in sigma.

        y <- D + sqrt(sigma_u^2 - c^2) (y - D) / sigma_t + c z,    c = eta sigma_u sqrt(1 - (sigma_u / sigma_t)^2)

    Source: Song, Meng and Ermon 2021, "Denoising diffusion implicit models", equations 12 and 16.
    Errors: ValueError for eta outside 0 to 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta must be from 0 to 1, not {eta!r}")
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    x = run.x  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        _, clean = run.look(step, x, t)
        x = implicit_step(run, x, t, after, clean, eta)
    return run.finish(step + 1, x)


def implicit_step(run: Run, x: Array, t: float, after: float, clean: Array, eta: float) -> Array:
    """One step of `ddim` from t to `after`, given what the image is taken to be."""
    sde = run.sde
    high, low = sigma_at(sde, t), sigma_at(sde, after)
    fresh = eta * low * math.sqrt(1 - (low / high) ** 2)
    y = clean + math.sqrt(low**2 - fresh**2) / high * (x / sde.marginal_scale(t) - clean)
    if fresh > 0:
        y = y + fresh * run.noise()
    return y * sde.marginal_scale(after)


@no_grad()
def heun(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 17,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = rho_times,
    churn: float = 0.0,
    churn_min: float = 0.05,
    churn_max: float = 50.0,
    churn_noise: float = 1.003,
    **condition: Any,
) -> Array:
    """Heun's method in sigma, 2 steps + 1 evaluations, each step after a little fresh noise if churn > 0.

        sigma' = (1 + gamma) sigma,     gamma = min(churn / (steps + 1), sqrt(2) - 1) if churn_min <= sigma <= churn_max
        y <- y + churn_noise sqrt(sigma'^2 - sigma^2) z
        y <- y + (sigma_u - sigma') (k + k') / 2,    k = (y - D) / sigma' and k' the same where Euler's step leads

    Noise is not raised beyond that of the prior, where the net has never been, so the first step has no churn.
    Source: Karras et al. 2022, algorithm 2 (algorithm 1 without churn); their N is steps + 1.
    Errors: ValueError for a negative churn, a churn_noise that is negative or not finite, or unless
    0 <= churn_min <= churn_max.
    """
    if not (churn >= 0 and 0 <= churn_noise < math.inf):
        raise ValueError(f"heun: needs churn >= 0 and a finite churn_noise >= 0, not {churn!r} and {churn_noise!r}")
    if not 0 <= churn_min <= churn_max:
        raise ValueError(f"heun: needs 0 <= churn_min <= churn_max, not {churn_min!r} and {churn_max!r}")
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    gamma, highest = min(churn / len(run.times), math.sqrt(2) - 1), sigma_at(sde, sde.t_max)
    y = run.x / sde.marginal_scale(run.times[0])  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        sigma, low = sigma_at(sde, t), sigma_at(sde, after)
        if gamma > 0 and churn_min <= sigma <= churn_max:
            raised = min(sigma * (1 + gamma), highest)
            y = y + churn_noise * math.sqrt(raised**2 - sigma**2) * run.noise()
            sigma, t = raised, time_at(sde, raised)
        slope = (y - run.look(step, y * sde.marginal_scale(t), t)[1]) / sigma
        euler = y + (low - sigma) * slope
        again = (euler - run.estimate(euler * sde.marginal_scale(after), after)[1]) / low
        y = y + (low - sigma) * (slope + again) / 2
    return run.finish(step + 1, y * sde.marginal_scale(run.times[-1]))


@no_grad()
def dpm_solver(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 34,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = rho_times,
    **condition: Any,
) -> Array:
    """DPM-Solver++(2M): of second order with one evaluation a step, steps + 1 in all.

    In l = -ln sigma the ODE is dy/dl = D - y; it is solved exactly for a D that is linear in l, through this step's
    and the last one's (constant in the first step):

        y <- (sigma_u / sigma_t) y + (1 - e^-h) (D + (D - D_last) h / (2 h_last)),        h = ln(sigma_t / sigma_u)

    Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    y = run.x / sde.marginal_scale(run.times[0])  # (N, ...)
    last, h_last = None, math.inf
    for step, (t, after) in enumerate(pairwise(run.times)):
        high, low = sigma_at(sde, t), sigma_at(sde, after)
        h = math.log(high / low)
        _, clean = run.look(step, y * sde.marginal_scale(t), t)
        ahead = clean if last is None else clean + (clean - last) * (h / (2 * h_last))
        y = y * (low / high) - math.expm1(-h) * ahead
        last, h_last = clean, h
    return run.finish(step + 1, y * sde.marginal_scale(run.times[-1]))
