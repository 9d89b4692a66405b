"""From noise to images: follow the process backwards, from t_max down to eps. Eight ways, all of the same form:

    x = sampler(score, shape, sde, rng, *, steps, eps, first, start, callback, grid, **condition)

| sampler | noise | evaluations | |
|---|---|---|---|
| `euler_maruyama` | yes | steps + 1 | the reverse SDE, as simply as can be |
| `predictor_corrector` | yes | 2 steps + 1 | with Langevin steps in between |
| `ddpm` | yes | steps + 1 | ancestral sampling |
| `probability_flow` | no | steps + 1 or 2 steps + 1 | the ODE in t, by Euler or Heun |
| `rk45` | no | as many as it takes | the same to a given tolerance |
| `ddim` | if eta > 0 | steps + 1 | Euler in the noise level |
| `heun` | if churn > 0 | 2 steps + 1 | EDM: Heun in the noise level |
| `dpm_solver` | no | steps + 1 | DPM-Solver++(2M): two steps at a time for one evaluation |

score(x, t, **condition): x (N, ...) and t (N,), both Tensors, -> (N, ...); a denoiser is made one by `score_of`.
shape: (N, ...). sde: a process (sde.py). rng: an Rng or a seed.
steps: down to eps, where all samplers take one more: they replace the noise that is left by its expectation, 0
(Tweedie's formula), x <- (x + s^2 score) / m. eps: where to stop, as the score cannot be learned at t = 0.
first: row i is sample `first + i` of the seed.
start: (x, t), where to begin instead of the prior at t_max.
callback(step, t, x, denoised): called at each of the steps + 1 stops, the last of which is the result, with x at time t
and what the score takes the image to be.
grid: where the stops are (grids.py): equal steps in t, or in a power of the noise level.

Returns an array on the device, float32 but for a `start` of another dtype. Row i of the noise depends on the seed and i
alone: sample i is the same image alone and among 64, but for the rounding of a matrix product of another size.
Errors: ValueError for steps < 1, eps or start outside the process, a shape that is not one, a score of another shape,
and whatever else each says.
"""

from __future__ import annotations

from collections.abc import Callable

from ..backend import Array
from .evaluation import Counted, score_of
from .grids import rho_times, sigma_at, time_at, uniform_times
from .ode import ddim, dpm_solver, heun, probability_flow, rk45
from .schedule import by_name
from .stochastic import ddpm, euler_maruyama, predictor_corrector

__all__ = [
    "SAMPLERS",
    "Counted",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler_maruyama",
    "heun",
    "predictor_corrector",
    "probability_flow",
    "rho_times",
    "rk45",
    "sampler",
    "score_of",
    "sigma_at",
    "steps_for",
    "time_at",
    "uniform_times",
]


SAMPLERS: dict[str, Callable[..., Array]] = {
    "euler_maruyama": euler_maruyama,
    "predictor_corrector": predictor_corrector,
    "ddpm": ddpm,
    "probability_flow": probability_flow,
    "rk45": rk45,
    "ddim": ddim,
    "heun": heun,
    "dpm_solver": dpm_solver,
}


def sampler(name: str) -> Callable[..., Array]:
    """A sampler by name. Errors: ValueError for another name."""
    return by_name("sampler", SAMPLERS, name)


def steps_for(name: str, nfe: int) -> int:
    """How many steps of a sampler cost nfe evaluations, or the most that cost no more.

    Errors: ValueError for another name, for rk45, which decides for itself, and for an nfe too small for a step.
    """
    chosen = sampler(name)
    if chosen is rk45:
        raise ValueError("rk45 takes as many evaluations as its tolerance asks for")
    a_step = 2 if chosen in (predictor_corrector, probability_flow, heun) else 1
    if nfe <= a_step:
        raise ValueError(f"a step of {name} and the last one cost {a_step + 1} evaluations, but nfe is {nfe!r}")
    return (nfe - 1) // a_step
