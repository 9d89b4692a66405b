"""From noise to images: follow the reverse process from t = 1 down to eps.

Every sampler is a function of the same form, sampler(score, shape, sde, rng, *, steps, ...), and states the algorithm
that it is. Row i of the noise depends on the seed and i alone: sample i is the same image alone and among 64, but for
the rounding of a matrix product of another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

from ..backend import Array, xp
from ..modes import no_grad
from ..rng import Rng, as_rng
from ..tensor import Tensor, array_of
from .sde import denoised

Callback = Callable[[int, float, Array, Array], Any]


@no_grad()
def euler_maruyama(
    score: Callable[..., Any],
    shape: tuple[int, ...],
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 500,
    eps: float = 1e-3,
    first: int = 0,
    callback: Callback | None = None,
    **condition: Any,
) -> Array:
    """Samples by Euler-Maruyama on the reverse SDE, finished by one denoising step.

        from x ~ prior, at t = 1, ..., eps in `steps` equal steps h:
                       x <- x + (g(t)^2 score(x, t) - f(x, t)) h + g(t) sqrt(h) z
        at t = eps:    x <- (x + s(t)^2 score(x, t)) / m(t)

    The last line (Tweedie's formula) replaces the noise that is left at t = eps by its expectation, 0. Evaluates the
    score steps + 1 times.

    score(x, t, **condition): x (N, ...) and t (N,), both Tensors, -> (N, ...). shape: (N, ...). rng: an Rng or a seed;
    row i is sample `first + i` of it. callback(step, t, x, denoised) is called at each of the steps + 1 grid points,
    with x at time t and what the score takes the image to be; at the last one that is the result.
    Returns a float32 array of that shape, on the device.
    Errors: ValueError for steps < 1, eps outside (0, 1), a shape that is not one, a score of another shape.
    Source: Song et al. 2021, section 4 (the reverse SDE: Anderson 1982) and its tutorial, whose loop
    takes one step too many.
    """
    shape = _check(shape, steps, eps)
    rng = as_rng(rng)
    h = (1 - eps) / steps
    x = sde.prior(shape, rng, first=first)  # (N, ...)
    for step in range(steps + 1):
        t = 1 - step * h if step < steps else eps
        s = _score_at(score, x, t, condition)
        if callback is not None or step == steps:
            clean = denoised(sde, x, t, s)
        if callback is not None:
            callback(step, t, x, clean)
        if step < steps:
            g = sde.diffusion(t)
            x = x + (g * g * s - sde.drift(x, t)) * h
            x = x + g * math.sqrt(h) * rng.normal(shape, first=first)
    return clean


def _score_at(score: Callable[..., Any], x: Any, t: float, condition: dict[str, Any]) -> Any:
    """The score of every row of x at the same time t, as an array."""
    s = array_of(score(Tensor(x), Tensor(xp.full(x.shape[0], t, x.dtype)), **condition))
    if s.shape != x.shape:
        raise ValueError(f"the score returned shape {s.shape} for x of shape {x.shape}")
    return s


def _check(shape: Any, steps: int, eps: float) -> tuple[int, ...]:
    """The shape as a tuple of ints. Errors: ValueError, as the samplers promise."""
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not shape or not all(isinstance(n, Integral) and int(n) >= 0 for n in shape):
        raise ValueError(f"shape must be (samples, ...), integers that are not negative, not {shape}")
    if not isinstance(steps, Integral) or int(steps) < 1:
        raise ValueError(f"steps must be an integer of 1 or more, not {steps!r}")
    if not 0 < eps < 1:
        raise ValueError(f"eps must be between 0 and 1, not {eps!r}")
    return tuple(int(n) for n in shape)
