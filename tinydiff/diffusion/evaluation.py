"""What all samplers share: the checks, where they begin, what the score says there, and the last step.

The score is a function score(x, t, **condition) of two Tensors, x (N, ...) and t (N,). A denoiser D(x, sigma), as that
of edm.py, becomes one by `score_of`; what a score takes the image to be is `sde.denoised`. Wrapped in `Counted`, either
counts how often it was asked.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from numbers import Integral
from typing import Any

from .. import backend
from ..backend import Array, to_device, xp
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng, as_rng
from .grids import Grid
from .schedule import whole
from .sde import denoised, per_sample

Score = Callable[..., Any]
Callback = Callable[[int, Any, Array, Array], Any]
Start = tuple[Any, float]


class Run:
    """One run of a sampler: `x` at the first of the `times`, which are steps + 1 and fall from t_max to eps.

    start: (x, t), where to begin in place of the prior at t_max.
    Errors: ValueError for steps < 1, times outside the process, a grid that does not fall, a shape that is not one, a
    start of another shape, a score of another shape.
    """

    def __init__(
        self,
        score: Score,
        shape: Any,
        sde: Any,
        rng: Rng | int,
        steps: Any,
        eps: float,
        first: int,
        start: Start | None,
        callback: Callback | None,
        grid: Grid,
        condition: dict[str, Any],
    ):
        self.shape = _shape(shape)
        steps = whole("steps", steps)
        if not 0 < eps < sde.t_max:
            raise ValueError(f"eps must be between 0 and {sde.t_max:g}, not {eps!r}")
        # From here on times are Python floats: float64 scalars of NumPy would lift float32 arrays to their own dtype.
        eps = float(eps)
        self.given = score
        self.sde = sde
        self.rng = as_rng(rng)
        self.first = first
        self.callback = callback
        self.condition = condition
        if start is None:
            self.x, begin = sde.prior(self.shape, self.rng, first=first), float(sde.t_max)
        else:
            self.x, begin = to_device(array_of(start[0])), start[1]
            if self.x.shape != self.shape or self.x.dtype.kind != "f":
                raise ValueError(
                    f"start: x must be of floats and of shape {self.shape}, not {self.x.dtype} of shape {self.x.shape}"
                )
            if not eps < begin <= sde.t_max:
                raise ValueError(f"start: t must be above eps={eps} and not above {sde.t_max:g}, not {begin!r}")
            begin = min(float(begin), sde.t_max)  # t_max rounded to float32 may lie a little above it
        self.times = [float(t) for t in grid(sde, steps, begin, eps)]
        falls = all(a > b for a, b in pairwise(self.times))
        if len(self.times) != steps + 1 or self.times[0] != begin or self.times[-1] != eps or not falls:
            raise ValueError(f"grid must give {steps + 1} times that fall from {begin} to {eps}, not {self.times}")

    def noise(self) -> Array:
        """Fresh standard normals in the shape of x. Row i is that of sample `first + i` of the seed."""
        return self.rng.normal(self.shape, self.x.dtype, first=self.first)

    def score(self, x: Array, t: Any) -> Array:
        """The score at x (N, ...), all of it at the time t or each row at its own, t (N,)."""
        times = xp.full(len(x), t, x.dtype) if isinstance(t, float) else t
        return checked(self.given(Tensor(x), Tensor(times), **self.condition), x)

    def estimate(self, x: Array, t: Any) -> tuple[Array, Array]:
        """(score, denoised): where to go from x, and what the image is on average, given x."""
        score = self.score(x, t)
        return score, denoised(self.sde, x, t, score)

    def look(self, step: int, x: Array, t: Any) -> tuple[Array, Array]:
        """The same, and the callback is told."""
        score, clean = self.estimate(x, t)
        if self.callback is not None:
            self.callback(step, t, x, clean)
        return score, clean

    def finish(self, step: int, x: Array) -> Array:
        """The last step, from eps to 0: the noise that is left is replaced by its expectation, 0 (Tweedie)."""
        return self.look(step, x, self.times[-1])[1]


def checked(score: Any, x: Any) -> Array:
    """The score as an array. Errors: ValueError if it has another shape than x."""
    s = array_of(score)
    if s.shape != x.shape:
        raise ValueError(f"the score returned shape {s.shape} for x of shape {x.shape}")
    return s


def flow(sde: Any, x: Any, t: Any, score: Any) -> Any:
    """dx/dt of the probability-flow ODE, f(x, t) - g(t)^2 score / 2, whose solutions have the law of the SDE's.

    Source: Song et al. 2021, equation 13.
    """
    g = per_sample(sde.diffusion(t), x)
    return sde.drift(x, t) - g * g * score / 2


def score_of(denoise: Callable[..., Any], sde: Any) -> Score:
    """The score that belongs to a denoiser D(x, sigma, **condition) of x_0 + sigma z, such as edm.Denoiser.

        score(x, t) = (m D(x / m; s / m) - x) / s^2

    Source: Karras et al. 2022, equation 3; it is Tweedie's formula turned round.
    """

    def score(x: Any, t: Any, **condition: Any) -> Any:
        s, m = sde.marginal_std(t), sde.marginal_scale(t)
        wide_s, wide_m = per_sample(s, x), per_sample(m, x)  # (N, 1, ..., 1)
        return (wide_m * denoise(x / wide_m, s / m, **condition) - x) / (wide_s * wide_s)

    return score


class Counted:
    """A score that counts how often it was asked: `nfe`, the number of function evaluations, each of a whole batch."""

    def __init__(self, score: Score):
        self.given, self.nfe = score, 0

    def __call__(self, *args: Any, **condition: Any) -> Any:
        backend.each_time(self._count)
        return self.given(*args, **condition)

    def _count(self) -> None:
        self.nfe += 1


def _shape(shape: Any) -> tuple[int, ...]:
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not shape or not all(isinstance(n, Integral) and int(n) >= 0 for n in shape):
        raise ValueError(f"shape must be (samples, ...), integers that are not negative, not {shape}")
    return tuple(int(n) for n in shape)
