"""What a network may predict: the score, the noise, the data, or a combination of them. All of them are equivalent.

At time t a sample is x = m x_0 + s z. Every prediction is another combination of the two, y = a x_0 + b z, with its own
a and b, which depend on m and s. So x_0 and z follow from y and x, by solving two linear equations,

    x_0 = (b x - s y) / (m b - s a),      z = (m y - a x) / (m b - s a)

and the same equations hold for the means given x, which are the best that a network can predict.

    predicts     y                          a, b                       source
    "score"      -z / s                     0, -1 / s                  Song et al. 2021
    "noise"      z                          0, 1                       Ho et al. 2020, "DDPM"
    "x0"         x_0                        1, 0
    "v"          m z - s x_0                -s, m                      Salimans and Ho 2022, appendix D
    "flow"       z - x_0                    -1, 1                      Lipman et al. 2023; Liu et al. 2023
    "edm"        F of D = c_skip x + c_out F, for data of standard deviation sigma_data (sd):
                 s / (sd q), -m sd / q  with  q = sqrt(s^2 + m^2 sd^2)         Karras et al. 2022, equation 7

They differ in how hard they are where s is small or large: the noise is easy to predict at t = 1 and hard at 0, the
data the reverse; v, flow and edm change from the one to the other in between. "flow" is the velocity dx/dt under
FlowSDE, and "edm" is -v under VPSDE if sigma_data = 1.

In all of diffusion, a model is a function of x (N, ...) and a second argument (N,), both Tensors, and of conditions by
name. There are two kinds of models, and every function that takes a model takes both:

    score(x, t, **condition)              the gradient of ln p_t at x: any function; also a ScoreModel
    denoiser(x, sigma, **condition)       E[x_0 | x_0 + sigma z = x]: an object whose `is_denoiser` is true; a Denoiser
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from .. import backend, nn, ops
from ..arguments import number
from ..backend import Array, to_device, to_host, xp
from ..describing import rebuildable
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng
from .conditions import conditions
from .process import KarrasSDE, by_name, like, per_sample, plain, sqrt

Score = Callable[..., Any]

TARGETS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {  # a and b of m, s and sigma_data
    "score": lambda m, s, sd: (0.0, -1 / s),
    "noise": lambda m, s, sd: (0.0, 1.0),
    "x0": lambda m, s, sd: (1.0, 0.0),
    "v": lambda m, s, sd: (-s, m),
    "flow": lambda m, s, sd: (-1.0, 1.0),
    "edm": lambda m, s, sd: (s / (sd * _std_of_x(m, s, sd)), -m * sd / _std_of_x(m, s, sd)),
}


def _std_of_x(m: Any, s: Any, sigma_data: Any) -> Any:
    """q = sqrt(s^2 + m^2 sd^2), the standard deviation of x. 1 / q is EDM's c_in."""
    return sqrt(s * s + m * m * sigma_data**2)


class HasSigmaData(nn.Module):
    """A module whose net works for data of one standard deviation only: sigma_data, a float, which may be changed. The
    state has it as "data_std", in float64 whatever the dtype of the weights, and loading a state sets it.
    Errors: ValueError for a sigma_data that is not positive and finite.
    """

    _sigma_data: float | None = None  # of a ScoreModel that needs none

    @property
    def sigma_data(self) -> float | None:
        return self._sigma_data

    @sigma_data.setter
    def sigma_data(self, value: Any) -> None:
        self._sigma_data = number(f"{type(self).__name__}: sigma_data", value, "(0, inf)")
        self.data_std = nn.Setting(self._sigma_data)

    def after_load(self) -> None:
        if self._sigma_data is not None:
            value = float(to_host(self.data_std._data))
            self._sigma_data = number(f"{type(self).__name__}: data_std", value, "(0, inf)")


@rebuildable
class ScoreModel(HasSigmaData):
    """A network and its kind of prediction, as a score: a model(x, t) for every loss and every method of sampling.

    net(x, t, **condition): x (N, ...) and t (N,) -> y (N, ...), which is what `predicts` names in the table above.
    With "edm" the inputs of the network are preconditioned as in that paper: x / q, of variance 1, and ln(s / m) / 4.
    x (N, ...), an array or a Tensor; t: (N,) or a number.
    Errors: ValueError for another name, a sigma_data that is not positive and finite, "edm" without one, a t that is
    none, the number t = 0 for a score or for "edm", where they are infinite, or a network whose output has another
    shape than x.
    """

    def __init__(
        self, net: Callable[..., Any], process: Any, predicts: str = "score", *, sigma_data: float | None = None
    ):
        by_name("prediction", TARGETS, predicts)
        self.net, self.process, self.predicts = net, process, predicts
        if predicts == "edm" or sigma_data is not None:
            self.sigma_data = sigma_data

    def forward(self, x: Any, t: Any, /, **condition: Any) -> Any:
        return self.score(x, t, **condition)

    def score(self, x: Any, t: Any, /, **condition: Any) -> Any:
        """The gradient of ln p_t at x, in the shape of x: -z / s."""
        t = _number_or_times(f"{type(self).__name__}: t", t, "(0, inf)", len(x))
        z = self.noise(x, t, **condition)
        return -z / per_sample(plain(self.process).marginal_std(t), x)

    def denoised(self, x: Any, t: Any, /, **condition: Any) -> Any:
        """E[x_0 | x], in the shape of x."""
        return self.split(self.output(x, t, **condition), x, t)[0]

    def noise(self, x: Any, t: Any, /, **condition: Any) -> Any:
        """E[z | x], in the shape of x."""
        return self.split(self.output(x, t, **condition), x, t)[1]

    def output(self, x: Any, t: Any, /, **condition: Any) -> Any:
        """The prediction of the network at x and t, y (N, ...)."""
        inputs, process, edm = x, plain(self.process), self.predicts == "edm"
        t = _number_or_times(f"{type(self).__name__}: t", t, "(0, inf)" if edm else "[0, inf)", len(x))
        times = Tensor(xp.full(x.shape[0], t, x.dtype)) if isinstance(t, float) else like(x, t)  # (N,)
        if edm:
            inputs = x / _std_of_x(*self._scale_and_std(t, x), self.sigma_data)
            times = ops.log(process.marginal_std(times) / process.marginal_scale(times)) / 4
        y = self.net(inputs, times, **condition)
        if y.shape != x.shape:
            raise ValueError(f"{type(self).__name__}: the network returned shape {y.shape} for x of shape {x.shape}")
        return y

    def target(self, x0: Any, z: Any, t: Any) -> Any:
        """What the network should predict: y = a x_0 + b z, in the shape of x_0."""
        a, b = TARGETS[self.predicts](*self._scale_and_std(t, x0), self.sigma_data)
        return a * x0 + b * z

    def split(self, y: Any, x: Any, t: Any) -> tuple[Any, Any]:
        """x_0 and z from the prediction y at x: the solution of the two equations."""
        m, s = self._scale_and_std(t, x)
        a, b = TARGETS[self.predicts](m, s, self.sigma_data)
        determinant = m * b - s * a
        return (b * x - s * y) / determinant, (m * y - a * x) / determinant

    def _scale_and_std(self, t: Any, x: Any) -> tuple[Any, Any]:
        """m and s, shaped to multiply x."""
        process = plain(self.process)
        return per_sample(process.marginal_scale(t), x), per_sample(process.marginal_std(t), x)


@rebuildable
class Denoiser(ScoreModel):
    """EDM's denoiser D(x, sigma, **condition), which predicts E[x_0 | x] for x = x_0 + sigma z:

        D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)
        c_skip = sd^2 / q^2,   c_out = sigma sd / q,   c_in = 1 / q,   q = sqrt(sigma^2 + sd^2)

    with sd = sigma_data, the standard deviation of the data. So the input and the target of the network F have
    variance 1 at every sigma. It is the ScoreModel that predicts "edm" under KarrasSDE, as a function of sigma.
    net(x, noise, **condition): x (N, ...) and noise (N,) -> (N, ...). sigma: (N,) or a number.
    Errors: ValueError for a sigma_data or a sigma that is not positive and finite (arrays on a GPU are not checked), or
    a net whose output has another shape than x.
    Source: Karras et al. 2022, equation 7 and table 1.
    """

    is_denoiser = True

    def __init__(self, net: Callable[..., Any], sigma_data: float):
        super().__init__(net, KarrasSDE(), "edm", sigma_data=sigma_data)

    def forward(self, x: Any, sigma: Any, /, **condition: Any) -> Any:
        if not isinstance(sigma, (list, tuple)):
            sigma = array_of(_number_or_times("Denoiser: sigma", sigma, "(0, inf)", len(x)))
        if isinstance(sigma, float):
            sigmas = xp.full((x.shape[0],), sigma, x.dtype)  # no array from the host, so a step may be captured
        else:
            on_device = backend.active().is_array(sigma)
            if backend.name == "numpy" or not on_device:  # it costs nothing beside the net; a device would have to wait
                values = sigma if on_device else to_host(sigma)
                if not (good := (values > 0) & (values < math.inf)).all():
                    raise ValueError(f"Denoiser: sigma must be positive and finite, not {values[~good][0].item()!r}")
            sigmas = xp.broadcast_to(to_device(sigma, x.dtype), x.shape[:1])  # (N,)
        return self.denoised(x, sigmas, **condition)


def drop_labels(labels: Mapping[str, Any], p: float, rng: Rng, *, sample_offset: int = 0) -> dict[str, Array]:
    """The labels {name: (N,)} as a net should see them in training, some of them left out: -1, the null class.

    With probability p all labels of a sample are left out, which guidance needs. If there are several, with another
    probability p a coin is thrown for each of them, so that the net learns what to make of a part of them.
    On the device, int64; row i draws as sample `sample_offset + i`.
    Errors: ValueError for p outside [0, 1/2], or labels that are not one for each of the same samples; TypeError for
    labels that are not integers.
    Source: Ho and Salimans 2022, for one condition.
    """
    p = number("drop_labels: p", p, "[0, 0.5]")
    arrays = {name: to_device(array_of(values)) for name, values in labels.items()}
    for name, a in arrays.items():
        if a.dtype.kind not in "iu":
            raise TypeError(f"drop_labels: label {name!r} must be integers, not {a.dtype} of shape {a.shape}")
    shapes = {name: a.shape for name, a in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"drop_labels: the labels must have one shape (N,), not {shapes}")
    if not arrays:
        return {}
    (n,) = shapes.popitem()[1]
    u, *coins = rng.uniform((n, 1 + len(arrays)), sample_offset=sample_offset).T
    all_out, by_coin = u < p, u < (2 * p if len(arrays) > 1 else p)
    return {
        name: xp.where(all_out | (by_coin & (coin < 0.5)), -1, a.astype("int64"))  # uint8 has no -1
        for (name, a), coin in zip(arrays.items(), coins)
    }


class Guided:
    """A model for a condition, pushed away from what it predicts without one: classifier-free guidance.

        D_w(x) = (1 + w) D(x | condition) - w D(x)                     for w = weight; 0 is no guidance

    negative: the conditions of D(x), which is then D(x | negative): the samples are pushed away from what they say.
    interval: (low, high), the noise levels sigma between which there is guidance; w = 0 unless low < sigma <= high.
    Above, it costs variety; below, it hardly matters, and the second evaluation may be saved (with NumPy it is; a GPU
    would have to wait to know). The same formulas hold for scores, so it is a model of the same kind as `model`; a
    score's noise level is that of `process`, which a ScoreModel brings along.

    The condition may be given here, or where the model is used; one that is called like an argument goes into a
    mapping, condition={"process": labels}. `sample` splits the conditions given here into microbatches as it does those
    that it is given itself. The result is an array, without a gradient.
    Errors: ValueError for a weight that is no finite number, an interval that is none, or one for a score without a
    process.
    Source: Ho and Salimans 2022, "Classifier-free diffusion guidance", equation 6; the interval: Kynkäänniemi et al.
    2024, "Applying guidance in a limited interval improves sample and distribution quality".
    """

    def __init__(
        self,
        model: Callable[..., Any],
        weight: float,
        /,
        *,
        negative: Mapping[str, Any] | None = None,
        interval: tuple[float, float] | None = None,
        process: Any = None,
        **condition: Any,
    ):
        self.model, self.weight = model, number("Guided: weight", weight)
        self.condition, self.negative = conditions(Guided, condition), dict(negative or {})
        self.is_denoiser = getattr(model, "is_denoiser", False)
        self.process = getattr(model, "process", None) if process is None else process
        self.interval = None if interval is None else _interval(interval)
        if interval is not None and not self.is_denoiser and self.process is None:
            raise ValueError(f"Guided: an interval={interval} of noise levels needs the process of the score, process=")

    def __call__(self, x: Any, t: Any, /, **condition: Any) -> Array:
        conditional = array_of(self.model(x, t, **{**self.condition, **condition}))
        weight = self._weight_at(t, conditional)
        if isinstance(weight, float) and weight == 0:
            return conditional
        return (1 + weight) * conditional - weight * array_of(self.model(x, t, **self.negative))

    def _weight_at(self, t: Any, x: Array) -> Any:
        """The weight as a number, or one for each sample, shaped to multiply x."""
        if self.interval is None or self.weight == 0:
            return self.weight
        t = array_of(t)
        t = float(t) if isinstance(t, Real) else to_device(t)
        if not self.is_denoiser:
            process = plain(self.process)
            t = process.marginal_std(t) / process.marginal_scale(t)
        low, high = self.interval
        if isinstance(t, float):
            return self.weight if low < t <= high else 0.0
        inside = (t > low) & (t <= high)
        if backend.name == "numpy" and not inside.any():  # it costs nothing to know; a device would have to wait
            return 0.0
        return per_sample(xp.where(inside, self.weight, 0.0), x)

    def for_rows(self, rows: slice, n: int) -> Guided:
        """The same for a part of n samples, with their part of the conditions."""
        part = copy.copy(self)
        part.model = for_rows(self.model, rows, n)
        for name in ("condition", "negative"):
            setattr(part, name, {key: rows_of(value, rows, n) for key, value in getattr(self, name).items()})
        return part


def _interval(given: Any) -> tuple[float, float]:
    try:
        low, high = given
    except (TypeError, ValueError):
        raise ValueError(f"Guided: interval must be (low, high), two noise levels, not {given!r}") from None
    low = number("Guided: the lower end of the interval", low, "[0, inf)")
    return low, number("Guided: the upper end of the interval", high, f"({low!r}, inf]")


class Counted:
    """A model that counts its evaluations: `nfe`, the number of function evaluations, each of a whole batch (or of a
    microbatch). It is of the same kind as `model`."""

    def __init__(self, model: Callable[..., Any]):
        self.model, self.nfe, self._whole = model, 0, self
        self.is_denoiser = getattr(model, "is_denoiser", False)

    def __call__(self, /, *args: Any, **condition: Any) -> Any:
        backend.each_time(self._count)
        return self.model(*args, **condition)

    def _count(self) -> None:
        self._whole.nfe += 1

    def for_rows(self, rows: slice, n: int) -> Counted:
        part = copy.copy(self)  # which counts where the whole does
        part.model = for_rows(self.model, rows, n)
        return part


# ---------------------------------------------------------------- from scores to denoised images, and back


def as_score(model: Callable[..., Any], process: Any) -> Score:
    """The model as a score under a process: a denoiser by `score_of`, everything else as it is."""
    return score_of(model, process) if getattr(model, "is_denoiser", False) else model


def score_of(denoiser: Callable[..., Any], process: Any) -> Score:
    """The score that belongs to any denoiser D(x, sigma, **condition) of x_0 + sigma z.

        score(x, t) = (m D(x / m; s / m) - x) / s^2

    Source: Karras et al. 2022, equation 3; it is Tweedie's formula solved for the score.
    """

    process = plain(process)

    def score(x: Any, t: Any, /, **condition: Any) -> Any:
        t = _number_or_times("score_of: t", t, "(0, inf)", len(x))
        s, m = process.marginal_std(t), process.marginal_scale(t)
        wide_s, wide_m = per_sample(s, x), per_sample(m, x)  # (N,) -> (N, 1, ..., 1)
        return (wide_m * denoiser(x / wide_m, like(x, s / m), **condition) - x) / (wide_s * wide_s)

    return score


def denoised(process: Any, x: Any, t: Any, score: Any) -> Any:
    """E[x_0 | x_t], the denoised image, from the score: (x + s(t)^2 score) / m(t), in the shape of x.

    Source: Tweedie's formula; Efron 2011, "Tweedie's formula and selection bias".
    """
    process = plain(process)
    s, m = per_sample(process.marginal_std(t), x), per_sample(process.marginal_scale(t), x)
    return (x + s * s * score) / m


def flow_velocity(process: Any, x: Any, t: Any, score: Any) -> Any:
    """dx/dt of the probability-flow ODE, f(x, t) - g(t)^2 score / 2, whose solutions have the law of the SDE's.

    Source: Song et al. 2021, equation 13.
    """
    process = plain(process)
    g = per_sample(process.diffusion(t), x)
    return process.drift(x, t) - g * g * score / 2


def checked_score(score: Any, x: Any) -> Array:
    """The score as an array in the dtype of x. Errors: ValueError if it has another shape than x."""
    s = array_of(score)
    if s.shape != x.shape:
        raise ValueError(f"the score returned shape {s.shape} for x of shape {x.shape}")
    return like(x, s)


# ---------------------------------------------------------------- second arguments, and conditions


def _number_or_times(what: str, t: Any, interval: str, n: int) -> Any:
    """A number as a float; an array or a Tensor (n,), whose values are not read, as it is. Errors: ValueError for a
    number outside the interval, another shape, and anything else."""
    if not hasattr(t, "shape") or isinstance(t, Real) or t.shape == ():
        return number(what, t, interval)
    if t.shape not in ((n,), (1,)):
        raise ValueError(f"{what} must be a number, or one for each of {n} samples, not of shape {t.shape}")
    return t


def for_rows(model: Callable[..., Any], rows: slice, n: int) -> Callable[..., Any]:
    """A model for these rows of n samples: with its part of the conditions that it holds itself, if it does."""
    return model.for_rows(rows, n) if hasattr(model, "for_rows") and rows != slice(0, n) else model


def rows_of(value: Any, rows: slice, n: int) -> Any:
    """A condition for these rows of n samples: their part of an array, Tensor or list with one entry per sample;
    anything else as it is."""
    length = len(value) if isinstance(value, list) else next(iter(getattr(value, "shape", ())), None)
    return value[rows] if length == n and rows != slice(0, n) else value
