"""How much noise there is at each of the 1000 steps that the released nets were trained on, as one of our processes.

With beta from 0.00085 to 0.012, in equal steps of its square root, step i has

    abar_i = product over j <= i of (1 - beta_j),     m = sqrt(abar),   s = sqrt(1 - abar),   sigma = s / m

which is a process that preserves the variance (VPSDE), known at 1000 times. Here the time is t = i + 1, so that t = 0
is the data without noise, and sigma is a straight line between two steps. So everything that samples works: sigma is
0.029 at t = 1 and 14.6 at t_max = 1000. Source: Ho et al. 2020; the numbers: Rombach et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ...arguments import number
from ...backend import to_device, xp
from ...diffusion.methods import uniform_times
from ...diffusion.process import VPSDE
from ...operators import array_of


class ScaledLinearSDE(VPSDE):
    """The process of Stable Diffusion. Errors: ValueError unless 0 < start <= end < 1."""

    t_max = 1000.0

    def __init__(self, start: float = 0.00085, end: float = 0.012):
        self.start = number("ScaledLinearSDE: start", start, "(0, 1)")
        self.end = number("ScaledLinearSDE: end", end, f"[{self.start!r}, 1)")
        super().__init__(_Tabulated(sigmas(self.start, self.end)))

    def __repr__(self) -> str:
        return f"ScaledLinearSDE(start={self.start}, end={self.end})"


def sigmas(start: float, end: float, steps: int = 1000) -> list[float]:
    """sigma at t = 0, 1, ..., steps."""
    low, high, found, abar = math.sqrt(start), math.sqrt(end), [0.0], 1.0
    for i in range(steps):
        abar *= 1 - (low + (high - low) * i / (steps - 1)) ** 2
        found.append(math.sqrt((1 - abar) / abar))
    return found


class _Tabulated:
    """A noise schedule for VPSDE, from sigma at t = 0, 1, ...: integral = ln(1 + sigma^2), beta its derivative."""

    def __init__(self, sigmas: list[float]):
        self.sigmas = sigmas
        self._table: Any = None

    def integral(self, t: Any) -> Any:
        if isinstance(t, Real):
            return math.log1p(self._sigma(float(t))[0] ** 2)
        return xp.log1p(self._sigma(array_of(t))[0] ** 2).astype(t.dtype)

    def beta(self, t: Any) -> Any:
        sigma, rise = self._sigma(float(t) if isinstance(t, Real) else array_of(t))
        found = 2 * sigma * rise / (1 + sigma * sigma)
        return found if isinstance(t, Real) else found.astype(t.dtype)

    def _sigma(self, t: Any) -> tuple[Any, Any]:
        """sigma and d sigma / dt, between the two steps around t."""
        last = len(self.sigmas) - 2
        if isinstance(t, float):
            i, table = min(int(t), last), self.sigmas
        else:
            if self._table is None or not isinstance(self._table, type(t)):
                self._table = to_device(self.sigmas, "float64")
            i, table = xp.clip(xp.floor(t), 0, last).astype("int64"), self._table
        low, high = table[i], table[i + 1]
        return low + (high - low) * (t - i), high - low


def whole_steps(process: Any, steps: int, begin: float, end: float) -> list[float]:
    """steps + 1 times from begin down to end, in equal steps rounded to whole ones: for others no net was trained."""
    return [begin, *(float(round(t)) for t in uniform_times(process, steps, begin, end)[1:-1]), end]


def schedule_of(config: Mapping[str, Any]) -> tuple[ScaledLinearSDE, str]:
    """The process, and what the net predicts, "noise" or "v", from the folder's scheduler_config.json.
    Errors: ValueError for another schedule."""
    predictions = {"epsilon": "noise", "v_prediction": "v"}
    kind, predicts = config.get("beta_schedule", "scaled_linear"), config.get("prediction_type", "epsilon")
    if kind != "scaled_linear" or config.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(
            f"the schedule must be scaled_linear with 1000 steps, not {kind!r} with {config.get('num_train_timesteps')}"
        )
    if not isinstance(predicts, str) or predicts not in predictions:
        raise ValueError(f"the net must predict {' or '.join(predictions)}, not {predicts!r}")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("a schedule with rescale_betas_zero_snr ends in pure noise, which is not supported here")
    return ScaledLinearSDE(config.get("beta_start", 0.00085), config.get("beta_end", 0.012)), predictions[predicts]
