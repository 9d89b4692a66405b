"""The losses that learn the score, or what it can be computed from, by removing noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array, to_device, xp
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng
from .parametrisation import ScoreModel
from .sde import per_sample

Times = Callable[..., Array]


def score_matching_loss(
    model: Callable[..., Any],
    x0: Array | Tensor,
    sde: Any,
    rng: Rng,
    *,
    eps: float = 1e-5,
    first: int = 0,
    **condition: Any,
) -> Tensor:
    """How far the model is from the score of noised data: denoising score matching, weighted with s(t)^2.

        t ~ U(eps, 1),  z ~ N(0, I),  x = m(t) x_0 + s(t) z,      L = mean over samples of  sum |s(t) model(x, t) + z|^2

    Why the plus: the score of N(m x_0, s^2) at x is -(x - m x_0) / s^2 = -z / s, so a model that knew z would make
    every term 0. It cannot know it, and the best it can do on average is the score of the noised data. A model that
    always says 0 has the loss D in expectation, for D values a sample: 784 for 28x28x1.

    x0: (N, ...). model(x, t, **condition): x (N, ...) and t (N,) -> (N, ...). rng: two draws are taken from it. Row i
    of them is that of sample `first + i`, so the loss of a sample is the same alone, in a batch, or in a part of one.
    Returns a Tensor of shape (), in the dtype of x0. s(t) is computed in float32.
    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng; ValueError for eps outside
    (0, t_max), or a model whose output has another shape than x0.
    Source: Vincent 2011, "A connection between score matching and denoising autoencoders"; the
    weight: Song et al. 2021.
    """
    _, t, z, x = noised(x0, sde, rng, uniform(eps), first)
    score = score_at(model, x, t, condition)
    return ops.square(per_sample(sde.marginal_std(t), x) * score + z).sum() / len(x)


def denoising_loss(
    model: ScoreModel,
    x0: Array | Tensor,
    rng: Rng,
    *,
    times: Times | None = None,
    weight: Callable[[Any], Any] | None = None,
    first: int = 0,
    **condition: Any,
) -> Tensor:
    """How far a network is from what it should predict (see ScoreModel), whatever that is.

        t ~ times,  z ~ N(0, I),  x = m(t) x_0 + s(t) z,  y = a x_0 + b z
        L = mean over samples of  sum weight(t) |net(x, t) - y|^2

    All predictions have one loss but for the weight: the error of the noise is m / (m b - s a) times that of y, so
    with the square of that for a weight this is `score_matching_loss`; predicts="noise" needs no weight for it.
    times: `uniform()`, as there, unless given; for flow matching `logit_normal()`, for KarrasSDE `log_normal()`.
    weight: of t (N,) -> (N,), 1 unless given. The rest, and what is returned and raised, as in score_matching_loss.
    """
    x0, t, z, x = noised(x0, model.sde, rng, times or uniform(), first)
    error = ops.square(model.output(Tensor(x), Tensor(t), **condition) - model.target(x0, z, t))
    if weight is not None:
        error = error * per_sample(weight(t), x)
    return error.sum() / len(x)


# ---------------------------------------------------------------- what they share


def uniform(eps: float = 1e-5) -> Times:
    """t ~ U(eps, t_max). At t = 0 there is no noise, and the score may be infinite. Errors: see `noised`."""

    def times(n: int, t_max: float, rng: Rng, dtype: Any, first: int) -> Array:
        if not 0 < eps < t_max:
            raise ValueError(f"eps must be between 0 and {t_max:g}, not {eps!r}")
        return rng.uniform(n, dtype, first=first) * (t_max - eps) + eps

    return times


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = t_max sigmoid(N(mean, std^2)): most often in the middle of the way, where the velocity is hard to tell.

    Source: Esser et al. 2024, "Scaling rectified flow transformers". Errors: ValueError unless std > 0.
    """
    if not std > 0:
        raise ValueError(f"logit_normal: std must be positive, not {std!r}")

    def times(n: int, t_max: float, rng: Rng, dtype: Any, first: int) -> Array:
        return ops.sigmoid(rng.normal(n, dtype, first=first) * std + mean) * t_max

    return times


def log_normal(mean: float = -1.2, std: float = 1.2) -> Times:
    """t = exp(N(mean, std^2)), for a process whose time is the noise level (KarrasSDE): the levels at which there is
    something to learn. t_max is not heeded; one draw in 600,000 is above 80.

    Source: Karras et al. 2022, table 1. Errors: ValueError unless std > 0.
    """
    if not std > 0:
        raise ValueError(f"log_normal: std must be positive, not {std!r}")

    def times(n: int, t_max: float, rng: Rng, dtype: Any, first: int) -> Array:
        return xp.exp(rng.normal(n, dtype, first=first) * std + mean)

    return times


def noised(x0: Array | Tensor, sde: Any, rng: Rng, times: Times, first: int) -> tuple[Array, Array, Array, Array]:
    """The data as an array, times t (N,), noise z and x = m(t) x_0 + s(t) z, in the shape of the data: two draws.

    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng.
    """
    if not isinstance(rng, Rng):
        raise TypeError(f"a loss draws anew at each step, so it takes an Rng, as Rng({rng!r}) made once, not {rng!r}")
    x0 = to_device(array_of(x0))
    if x0.dtype.kind != "f":
        raise TypeError(f"x0 must be of floats (see data.to_float), not {x0.dtype} of shape {x0.shape}")
    t = times(x0.shape[0], sde.t_max, rng, x0.dtype, first)  # (N,)
    z = rng.normal(x0.shape, x0.dtype, first=first)  # (N, ...)
    m, s = per_sample(sde.marginal_scale(t), x0), per_sample(sde.marginal_std(t), x0)  # (N, 1, ..., 1)
    return x0, t, z, m * x0 + s * z


def score_at(model: Callable[..., Any], x: Array, t: Array, condition: dict[str, Any]) -> Any:
    """model(x, t). Errors: ValueError if it has another shape than x."""
    score = model(Tensor(x), Tensor(t), **condition)
    if score.shape != x.shape:
        raise ValueError(f"the model returned shape {score.shape} for x of shape {x.shape}")
    return score
