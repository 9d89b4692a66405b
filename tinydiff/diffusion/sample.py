"""From noise to images: follow the process backwards, from t_max down to eps.

    x = sample(model, (64, 28, 28, 1), process, rng)                                    Heun's method, 17 steps
    x = sample(model, (64, 28, 28, 1), process, rng, method="euler_maruyama", steps=500)
    x = sample(model, (64, 28, 28, 1), process, rng, method=heun(s_churn=10.0), digit=labels)

`sample` does what all methods share: the start, the timesteps, the conditions, the callback, the microbatches, the
checks, and the last step. The update rules, in which the methods differ, are in methods.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple

from .. import backend
from ..arguments import integer
from ..backend import Array, to_device, xp
from ..distributed import ALONE, Ranks
from ..engine import Tensor
from ..microbatch import check_wanted, in_order, microbatches, over_microbatches
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .conditions import conditions
from .methods import METHODS, Method, Timesteps, as_method
from .predict import Counted, Guided, Score, ScoreModel, as_score, checked_score, denoised, for_rows, rows_of
from .process import least_time, like, plain, sigma_at, time_of

Callback = Callable[[int, Any, Array, Array], Any]
Start = tuple[Any, float]


@no_grad()
def sample(
    model: Callable[..., Any],
    shape: tuple[int, ...],
    process: Any,
    rng: Rng | int,
    *,
    method: str | Method | Callable[..., Array] = "heun",
    steps: int | None = None,
    eps: float = 1e-3,
    start: Start | None = None,
    callback: Callback | None = None,
    timesteps: Timesteps | None = None,
    sample_offset: int = 0,
    microbatch: int | None = None,
    threads: int | None = None,
    ranks: Ranks = ALONE,
    **condition: Any,
) -> Array:
    """New samples, on the device, in float32 or in the dtype of `start`.

    model: score(x, t, **condition), of two Tensors x (N, ...) and t (N,) -> (N, ...), or a Denoiser (see predict.py).
    shape: (N, ...). process: see process.py. rng: an Rng, which advances, or a seed.
    method: a name in METHODS, a Method such as heun(s_churn=10.0), or an update rule of your own (see methods.py).
    steps: from the start to eps; by default the number that the method has. Then all methods take one more step, which
    replaces the remaining noise by its expectation, 0 (Tweedie's formula): x <- (x + s^2 score) / m.
    eps: the time at which the steps end, because the score cannot be learned at t = 0.
    start: (x, t), where to begin instead of the prior at t_max.
    callback(step, t, x, denoised): called at each of the steps + 1 times, with x at time t and the denoised image,
    E[x_0 | x] by the model; the last denoised image is the result.
    timesteps: a function that chooses the times, karras_times or uniform_times; by default that of the method.
    sample_offset: row i is that of sample `sample_offset + i` of the seed.
    microbatch: make the samples in parts of this size (None: all at once), `threads` parts at the same time (None: one
    per core). An array, Tensor or list in `condition` with N entries along its first axis is split in the same way; any
    other condition goes to every part as it is.
    ranks: processes that share the parts, by default one part each; all of them get all samples.

    Conditions that have the name of an argument here, or of an option of a method, go into a mapping:
    condition={"steps": labels}.

    Row i of the noise depends on the seed and i alone. So a sample is the same alone, among 64 and in any microbatch,
    except for the rounding of matrix products of another size.
    Errors: ValueError for an unknown method, steps or microbatch < 1, eps or start outside the process, a shape that is
    not one, timesteps that do not decrease from the start to eps, a callback together with several parts, a score of
    another shape, and bad values of options; TypeError for an option of a method among the conditions, and for a
    condition whose name is nearly that of an argument. RuntimeWarning for what cannot be a score,
    such as a denoiser that is a plain function (not on a GPU, which would have to wait).
    """
    chosen, shape, source = as_method(method), _checked_shape(shape), as_rng(rng)
    for name in condition:
        if name in chosen.defaults:
            raise TypeError(f"{name} is an option of the method: method={chosen.name}({name}={condition[name]!r})")
        if owner := next((m for m in METHODS.values() if name in m.defaults), None):
            raise TypeError(
                f"{name} is an option of {owner.name}, as in method={owner.name}({name}={condition[name]!r}); "
                f"{chosen.name} has {', '.join(chosen.defaults) or 'none'}. If it is a condition of the model, pass "
                f"condition={{{name!r}: ...}}"
            )
    condition = conditions(sample, condition, chosen.defaults)
    count = integer("steps", chosen.steps if steps is None else steps)
    eps, sample_offset = least_time("eps", eps, process), integer("sample_offset", sample_offset, 0)
    x, begin = _checked_start(start, shape, process, eps)
    times = _times(chosen, timesteps, process, count, begin, eps)
    n = shape[0]

    def samples(rows: slice, rng: Rng) -> Array:
        offset, of_rows = sample_offset + rows.start, (rows.stop - rows.start, *shape[1:])
        x_start = x[rows] if x is not None else process.prior(of_rows, rng, sample_offset=offset).astype("float32")
        given = {name: rows_of(value, rows, n) for name, value in condition.items()}
        score = as_score(for_rows(model, rows, n), process)
        state = SamplerState(score, process, x_start, times, count, rng, offset, callback, given)
        state.unchecked = x is None and is_plain_score(model)
        return state.last_step(chosen.rule(state, **chosen.options), chosen)

    if microbatch is None and ranks.size > 1:
        microbatch = -(-n // ranks.size)
    if microbatch is None or n <= integer("microbatch", microbatch):
        return samples(slice(0, n), source)
    if callback is not None:
        raise ValueError(f"a callback sees all {n} samples, so it cannot be given with microbatch={microbatch}")
    copies: list[Rng] = []  # one per part; all draw the same number of times

    def part(rows: slice) -> Array:
        copy = source.copy()
        copies.append(copy)
        return samples(rows, copy)

    threads = ranks.threads if threads is None else threads
    mine = over_microbatches(part, n, int(microbatch), threads, (ranks.rank, ranks.size))
    rows = microbatches(n, int(microbatch))

    def blank(i: int) -> list[Array]:
        return [xp.empty((rows[i].stop - rows[i].start, *shape[1:]), "float32" if x is None else x.dtype)]

    parts = [made for [made] in in_order(([made] for made in mine), len(rows), ranks, blank)]
    if ranks.size > 1:  # a rank that had no part has drawn nothing
        source.step = max(ranks.gather(max([source.step, *(copy.step for copy in copies)])))
    else:
        backend.each_time(lambda: setattr(source, "step", copies[0].step))  # as if it had drawn for all of them
    return xp.concatenate(parts)  # (microbatch, ...), (microbatch, ...), ... -> (N, ...)


def steps_for(method: str | Method, nfe: int) -> int:
    """The largest number of steps of a method that cost at most nfe evaluations of the model.

    Errors: ValueError for another name, for rk45, which chooses its own steps, and for an nfe that is no integer or too
    small for a step.
    """
    chosen, nfe = as_method(method), integer("steps_for: nfe", nfe)
    if chosen.evaluations is None:
        raise ValueError(f"{chosen.name} takes as many evaluations as its tolerance asks for")
    if nfe <= chosen.evaluations:
        raise ValueError(
            f"a step of {chosen.name} and the last one cost {chosen.evaluations + 1} evaluations, but nfe is {nfe!r}"
        )
    return (nfe - 1) // chosen.evaluations


# ---------------------------------------------------------------- what a method sees


class Evaluation(NamedTuple):
    """The model at x and a time: the score, and the denoised image E[x_0 | x], both in the shape of x."""

    score: Array
    denoised: Array


class SamplerState:
    """What a method works with: `x` (N, ...) at the first of the `times`, and the model as `stop` and `evaluate`.

    times: steps + 1 of them, decreasing; only the first and the last for a method that chooses its own.
    """

    unchecked = False  # is the size of the first score still to be checked? See check_size.

    def __init__(
        self,
        score: Score,
        process: Any,
        x: Array,
        times: list[float],
        steps: int,
        rng: Rng,
        sample_offset: int,
        callback: Callback | None,
        condition: dict[str, Any],
    ):
        self.process, self.x, self.times, self.steps, self.callback = plain(process), x, times, steps, callback
        self._score, self._condition, self._rng, self.sample_offset = score, condition, rng, sample_offset
        self._stops = 0

    @property
    def intervals(self) -> pairwise:
        """(t, t_next) of neighbouring times."""
        return pairwise(self.times)

    def sigma(self, t: float) -> float:
        """The noise level at time t, s(t) / m(t)."""
        return sigma_at(self.process, t)

    def noise(self) -> Array:
        """Fresh standard normals in the shape of x. Row i is that of sample `sample_offset + i` of the seed."""
        return self._rng.normal(self.x.shape, self.x.dtype, sample_offset=self.sample_offset)

    def score(self, x: Array, t: Any) -> Array:
        """The score at x (N, ...). t: one time, or (N,), one time per sample.

        The model gets x and t in the dtype of the start, whatever a method has made of x.
        """
        check_wanted()
        x = like(self.x, x)
        times = xp.full(len(x), float(t), x.dtype) if isinstance(t, Real) else like(x, array_of(t))  # (N,)
        score = checked_score(self._score(Tensor(x), Tensor(times), **self._condition), x)
        if self.unchecked:
            self.unchecked = False
            if backend.name == "numpy":  # it costs nothing beside the model; a device would have to wait
                check_size(score, x, self.process, self.times[0])
        return score

    def evaluate(self, x: Array, t: Any) -> Evaluation:
        """Score and denoised image at x, between two of the times; the callback is not called."""
        score = self.score(x, t)
        return Evaluation(score, denoised(self.process, like(self.x, x), t, score))

    def stop(self, x: Array, t: Any) -> Evaluation:
        """Score and denoised image at x, at the next of the times; calls the callback."""
        found = self.evaluate(x, t)
        if self.callback is not None:
            self.callback(self._stops, t, like(self.x, x), found.denoised)
        self._stops += 1
        return found

    def last_step(self, x: Any, method: Method) -> Array:
        """From eps to 0: the remaining noise is replaced by its expectation, 0. x: what the method returned."""
        if getattr(x, "shape", None) != self.x.shape:
            raise ValueError(f"{method.name} must return x of shape {self.x.shape}, not {type(x).__name__}: {x!r:.80}")
        return self.stop(x, self.times[-1]).denoised


# ---------------------------------------------------------------- checks


def is_plain_score(model: Any) -> bool:
    """Is it a score by the caller's word alone, and neither a ScoreModel nor a denoiser? Guided and Counted are what
    their model is."""
    while isinstance(model, (Guided, Counted)):
        model = model.model
    return not (isinstance(model, ScoreModel) or getattr(model, "is_denoiser", False))


def check_size(score: Array, x: Array, process: Any, t: float) -> None:
    """A RuntimeWarning for what cannot be a score at x of the prior, because it is too large and does not point back.

    s score is -E[z | x], a mean of standard normals, so that E|s score|^2 is at most 1 per number; and where there is
    hardly anything but noise, it is about -x / s.
    """
    if score.size == 0:
        return
    a, b = score.astype("float64").ravel(), x.astype("float64").ravel()
    length = math.sqrt(float(a @ a))
    size, back = float(process.marginal_std(t)) * length / math.sqrt(a.size), -float(a @ b)
    # No score of few numbers is that large by chance.
    if size > 3 + 12 / math.sqrt(a.size) and not back > 0.5 * length * math.sqrt(float(b @ b)):
        warnings.warn(
            f"at t = {t:g}, in pure noise, s(t) score(x, t) has the size {size:.3g}, and should be about 1 or less. "
            "If the model is a denoiser, D(x, sigma), wrap it by score_of(model, process); if it predicts the noise, "
            "x_0 or a velocity, by ScoreModel",
            RuntimeWarning,
            stacklevel=2,
        )


def _checked_shape(shape: Any) -> tuple[int, ...]:
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not shape or not all(isinstance(n, Integral) and int(n) >= 0 for n in shape):
        raise ValueError(f"shape must be (samples, ...), integers that are not negative, not {shape}")
    return tuple(int(n) for n in shape)


def _checked_start(start: Start | None, shape: tuple[int, ...], process: Any, eps: float) -> tuple[Array | None, float]:
    """x, None for a draw of the prior, and its time."""
    if start is None:
        return None, float(process.t_max)
    x, begin = to_device(array_of(start[0])), start[1]
    if x.shape != shape or x.dtype.kind != "f":
        raise ValueError(f"start: x must be of floats and of shape {shape}, not {x.dtype} of shape {x.shape}")
    return x, time_of("start: t", begin, process, after=eps)


def _times(
    method: Method, timesteps: Timesteps | None, process: Any, steps: int, begin: float, eps: float
) -> list[float]:
    """The times at which a method stops."""
    if method.timesteps is None:
        if timesteps is not None:
            raise ValueError(f"{method.name} chooses its own timesteps, so it takes none, not {timesteps!r}")
        return [begin, eps]
    times = [float(t) for t in (timesteps or method.timesteps)(process, steps, begin, eps)]
    decreasing = all(a > b for a, b in pairwise(times))
    if len(times) != steps + 1 or times[0] != begin or times[-1] != eps or not decreasing:
        raise ValueError(f"timesteps must give {steps + 1} times that decrease from {begin} to {eps}, not {times}")
    return times
