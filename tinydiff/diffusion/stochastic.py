"""Samplers that add noise as they go. All have the form that samplers.py describes."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from ..backend import Array
from ..engine import no_grad
from ..rng import Rng
from .evaluation import Callback, Run, Score, Start
from .grids import Grid, uniform_times
from .ode import ddim


@no_grad()
def euler_maruyama(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 500,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = uniform_times,
    **condition: Any,
) -> Array:
    """Euler-Maruyama on the reverse SDE: steps + 1 evaluations.

        x <- x + (g(t)^2 score(x, t) - f(x, t)) h + g(t) sqrt(h) z

    Source: Song et al. 2021, section 4 (the reverse SDE: Anderson 1982) and its tutorial, whose loop takes one step too
    many.
    """
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    x = run.x  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        s, _ = run.look(step, x, t)
        x = _reverse_step(run, x, t, after, s)
    return run.finish(step + 1, x)


@no_grad()
def predictor_corrector(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 250,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = uniform_times,
    snr: float = 0.16,
    **condition: Any,
) -> Array:
    """Before each step of Euler-Maruyama one of Langevin, which brings x closer to its law at that time:
    2 steps + 1 evaluations.

        x <- x + e score(x, t) + sqrt(2 e) z,      e = 2 (snr s(t))^2

    The paper has e = 2 (snr |z| / |score|)^2 with norms averaged over the batch, so an image would depend on what it is
    made together with. The norm of a sample's own score is no way out: a step that depends on where x is does not keep
    the law of x without another drift term, and where the score is 0 it is infinite. So |z| / |score| is here what it
    is for pure noise, whose score is -z / s: s(t), the same for all.
    Source: Song et al. 2021, algorithms 2 to 5, with one corrector step, and the order and predictor of its tutorial.
    Errors: ValueError for an snr that is not positive.
    """
    if not 0 < snr < math.inf:
        raise ValueError(f"predictor_corrector: snr must be positive and finite, not {snr!r}")
    run = Run(score, shape, sde, rng, steps, eps, first, start, callback, grid, condition)
    x = run.x  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        s, _ = run.look(step, x, t)
        e = 2 * (snr * sde.marginal_std(t)) ** 2
        x = x + e * s + math.sqrt(2 * e) * run.noise()
        x = _reverse_step(run, x, t, after, run.score(x, t))
    return run.finish(step + 1, x)


def ddpm(
    score: Score,
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 500,
    eps: float = 1e-3,
    first: int = 0,
    start: Start | None = None,
    callback: Callback | None = None,
    grid: Grid = uniform_times,
    **condition: Any,
) -> Array:
    """Ancestral sampling, steps + 1 evaluations: each step draws from q(x_u | x_t, x_0), u < t, with D for x_0.

    In y = x / m and sigma = s / m, where it is the same for every process:

        y <- D + (sigma_u / sigma_t)^2 (y - D) + sigma_u sqrt(1 - (sigma_u / sigma_t)^2) z

    It is `ddim` with eta = 1.
    Source: Ho et al. 2020, algorithm 2, with the smaller of its two variances (equation 7); the variance-exploding form
    is Song et al. 2021, equation 47.
    """
    return ddim(
        score, shape, sde, rng, steps=steps, eps=eps, first=first, start=start, callback=callback, grid=grid, eta=1.0,
        **condition,
    )  # fmt: skip


def _reverse_step(run: Run, x: Array, t: float, after: float, score: Array) -> Array:
    """Euler-Maruyama on dx = (f - g^2 score) dt + g dw, backwards in time."""
    h, g = t - after, run.sde.diffusion(t)
    x = x + (g * g * score - run.sde.drift(x, t)) * h
    return x + g * math.sqrt(h) * run.noise()
