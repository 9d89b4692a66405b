"""The losses by which a network learns the score, or a prediction from which the score follows.

In most of them, noise of a known strength is added to the data, and the network has to predict it.

    score_matching_loss(model, x0, process, rng)       E |s model + z|^2, the tutorial's
    denoising_loss(model, x0, rng)                     the same for any prediction, times and weight
    edm_loss(denoiser, x0, rng)                        the same as Karras et al. choose them
    likelihood_loss(model, x0, rng)                    the same as maximum likelihood

The last part of this chapter has the other ways to learn a score, for comparison: explicit, implicit and sliced score
matching. All draw times t and noise z from `rng`, so that row i is that of sample `sample_offset + i`: the loss of a
sample is the same alone, in a batch, or in a microbatch. A condition that has the name of an argument is given in a
mapping, condition={"eps": labels}. All return a Tensor of shape (), to be minimised.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from .. import ops
from ..arguments import number
from ..backend import Array, to_device, xp
from ..engine import Tensor, grad
from ..operators import array_of
from ..rng import Rng
from .conditions import conditions
from .predict import Denoiser, ScoreModel, as_score
from .process import KarrasSDE, least_time, like, per_sample, plain

Model = Callable[..., Any]
Times = Callable[..., Array]


def score_matching_loss(
    model: Model,
    x0: Array | Tensor,
    process: Any,
    rng: Rng,
    *,
    eps: float = 1e-5,
    sample_offset: int = 0,
    **condition: Any,
) -> Tensor:
    """How far the model is from the score of noised data: denoising score matching, weighted with s(t)^2.

        t ~ U(eps, 1),  z ~ N(0, I),  x = m(t) x_0 + s(t) z,      L = mean over samples of  sum |s(t) model(x, t) + z|^2

    Why the plus: the score of N(m x_0, s^2) at x is -(x - m x_0) / s^2 = -z / s, so a model that knew z would make
    every term 0. The model does not know z; the best prediction on average is the score of the noised data. A model
    that is 0 everywhere has the loss D in expectation, for D values per sample: 784 for 28x28x1.

    x0: (N, ...). model(x, t, **condition): x (N, ...) and t (N,) -> (N, ...). rng: two draws are taken from it.
    Returns a Tensor of shape (), in the dtype of x0. s(t) is computed in float32.
    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng; ValueError for an empty batch, eps
    outside (0, t_max), or a model whose output has another shape than x0.
    Source: Vincent 2011, "A connection between score matching and denoising autoencoders"; the
    weight: Song et al. 2021.
    """
    _, t, z, x = noised(x0, process, rng, uniform(eps), sample_offset)
    score = score_at(as_score(model, process), x, t, conditions(score_matching_loss, condition))
    return ops.square(per_sample(plain(process).marginal_std(t), x) * score + z).sum() / len(x)


def denoising_loss(
    model: ScoreModel,
    x0: Array | Tensor,
    rng: Rng,
    *,
    times: Times | None = None,
    weight: Callable[[Any], Any] | None = None,
    sample_offset: int = 0,
    **condition: Any,
) -> Tensor:
    """How far a network is from its target (see ScoreModel), for any of the predictions.

        t ~ times,  z ~ N(0, I),  x = m(t) x_0 + s(t) z,  y = a x_0 + b z
        L = mean over samples of  sum weight(t) |net(x, t) - y|^2

    The losses of all predictions differ only by a weight: the error of the noise is m / (m b - s a) times that of y.
    With the square of this factor as the weight, this is `score_matching_loss`; for predicts="noise" it is 1.
    times: `uniform()`, as there, unless given; for flow matching `logit_normal()`, for KarrasSDE `log_normal()`.
    weight: of t (N,) -> (N,), 1 unless given. The other arguments, the result and the errors: as score_matching_loss.
    """
    condition = conditions(denoising_loss, condition)
    errors, t = _squared_errors(model, x0, rng, times or uniform(), sample_offset, condition)
    if weight is not None:
        errors = errors * per_sample(weight(t), errors)
    return errors.sum() / len(errors)


def edm_loss(
    denoiser: Denoiser,
    x0: Any,
    rng: Rng,
    /,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    sample_offset: int = 0,
    **condition: Any,
) -> Tensor:
    """E over ln sigma ~ N(mean, std^2), z ~ N(0, I) of

        (sigma^2 + sd^2) / (sigma sd)^2  |D(x0 + sigma z; sigma) - x0|^2

    averaged over values and batch. With this weight it is the squared error of the network F within the denoiser, about
    1 for a net that has learned nothing, and it is computed in that way. `denoising_loss` with these times is this
    times the number of values in a sample. x0 (N, ...).
    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng; ValueError for an empty batch.
    Source: Karras et al. 2022, equations 2 and 8, table 1.
    """
    condition = conditions(edm_loss, condition)
    errors, _ = _squared_errors(denoiser, x0, rng, log_normal(mean, std), sample_offset, condition)
    return errors.mean()


# ---------------------------------------------------------------- times, and what the losses share


def uniform(eps: float = 1e-5) -> Times:
    """t ~ U(eps, t_max). At t = 0 there is no noise, and the score may be infinite.

    Errors: ValueError, when it draws, for eps outside (0, t_max).
    """
    return functools.partial(_uniform, eps)  # and no function within this one, which could not be pickled


def _uniform(eps: float, n: int, t_max: float, rng: Rng, dtype: Any, sample_offset: int) -> Array:
    least = number("eps", eps, f"(0, {t_max!r})")
    return rng.uniform(n, dtype, sample_offset=sample_offset) * (t_max - least) + least


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Times:
    """t = t_max sigmoid(N(mean, std^2)): most often in the middle of the way, where the velocity is hard to predict.

    Source: Esser et al. 2024, "Scaling rectified flow transformers". Errors: ValueError unless std > 0.
    """
    mean, std = number("logit_normal: mean", mean), number("logit_normal: std", std, "(0, inf)")
    return functools.partial(_logit_normal, mean, std)


def _logit_normal(mean: float, std: float, n: int, t_max: float, rng: Rng, dtype: Any, sample_offset: int) -> Array:
    return ops.sigmoid(rng.normal(n, dtype, sample_offset=sample_offset) * std + mean) * t_max


def log_normal(mean: float = -1.2, std: float = 1.2) -> Times:
    """t = exp(N(mean, std^2)), for a process whose time is the noise level (KarrasSDE): the levels at which there is
    most to learn. t is not bounded by t_max; with the defaults one draw in 600,000 is above 80.

    Source: Karras et al. 2022, table 1. Errors: ValueError unless std > 0.
    """
    mean, std = number("log_normal: mean", mean), number("log_normal: std", std, "(0, inf)")
    return functools.partial(_log_normal, mean, std)


def _log_normal(mean: float, std: float, n: int, _t_max: float, rng: Rng, dtype: Any, sample_offset: int) -> Array:
    return xp.exp(rng.normal(n, dtype, sample_offset=sample_offset) * std + mean)


def noised(
    x0: Array | Tensor, process: Any, rng: Rng, times: Times, sample_offset: int
) -> tuple[Array, Array, Array, Array]:
    """The data as an array, times t (N,), noise z and x = m(t) x_0 + s(t) z, in the shape of the data: two draws.

    Errors: TypeError for an x0 that is not of floats, or an rng that is no Rng; ValueError for an empty batch, whose
    mean would be NaN.
    """
    if not isinstance(rng, Rng):
        raise TypeError(f"a loss draws anew at each step, so it takes an Rng: make Rng({rng!r}) once, not {rng!r}")
    x0 = to_device(array_of(x0))
    if x0.dtype.kind != "f":
        raise TypeError(f"x0 must be of floats (see data.to_float), not {x0.dtype} of shape {x0.shape}")
    if x0.ndim == 0 or x0.size == 0:
        raise ValueError(f"x0 must be (N, ...), and the batch not empty, not of shape {x0.shape}")
    process = plain(process)
    t = like(x0, times(x0.shape[0], process.t_max, rng, x0.dtype, sample_offset))  # (N,)
    z = rng.normal(x0.shape, x0.dtype, sample_offset=sample_offset)  # (N, ...)
    m, s = per_sample(process.marginal_scale(t), x0), per_sample(process.marginal_std(t), x0)  # (N,) -> (N, 1, ..., 1)
    return x0, t, z, m * x0 + s * z


def _squared_errors(
    model: ScoreModel, x0: Any, rng: Rng, times: Times, sample_offset: int, condition: dict[str, Any]
) -> tuple[Tensor, Array]:
    """|net(x, t) - y|^2 of each value, (N, ...), and the times (N,). A condition may have any name, even `weight`."""
    x0, t, z, x = noised(x0, model.process, rng, times, sample_offset)
    return ops.square(model.output(Tensor(x), Tensor(t), **condition) - model.target(x0, z, t)), t


def score_at(model: Model, x: Array, t: Array, condition: dict[str, Any]) -> Any:
    """model(x, t). Errors: ValueError if it has another shape than x."""
    score = model(Tensor(x), Tensor(t), **condition)
    if score.shape != x.shape:
        raise ValueError(f"the model returned shape {score.shape} for x of shape {x.shape}")
    return like(x, score)


# ---------------------------------------------------------------- maximum likelihood
#
# At the right noise levels the denoising loss is the information in an image, in nats. Let x = x_0 + sigma z in D
# dimensions have the density p_sigma and the entropy H(sigma) = E[-ln p_sigma(x)]. Noise increases the entropy (de
# Bruijn's identity), and the score is the best guess of the noise, -E[z | x] / sigma, so
#
#     dH / d(sigma^2) = 1/2 E|grad ln p_sigma(x)|^2,      E|grad ln p_sigma(x)|^2 = (D - e(sigma)) / sigma^2
#
# where e(sigma) = E|z - E[z | x]|^2 is the error of that guess. As d(sigma^2) = 2 sigma^2 d(ln sigma), it follows that
# dH / d(ln sigma) = D - e(sigma): the entropy at eps is that at sigma_max, less what the noise between them has added.
# With a prior N(0, sigma_max^2 I) in place of the data's own p at sigma_max, and the error of a network in place of the
# least one,
#
#     D/2 ln(2 pi e eps^2)  +  E|x_0|^2 / (2 sigma_max^2)  +  integral of e(sigma) d(ln sigma),
#
# where D ln(sigma_max) has cancelled, is at least H(eps), and equal to it only if both are right. It is a bound on
# E[-ln q(x)] at sigma = eps, where q is the density of the SDE with the network's score (Song et al. 2021, "Maximum
# likelihood training of score-based diffusion models"; Kingma et al. 2021, "Variational diffusion models"). The ODE
# with the same score has a density of its own, which likelihood.py measures. The two are equal if the score is exact.
# The density of the ODE also depends on the derivative of the score's error: a small but steep error can raise
# E[-ln q] of the ODE by much, where it raises the bound only by its small square.
#
# The integral is over noise levels; EDM draws those that help its images most. The network F of EDM makes the integral
# simple: with r = sigma / sqrt(sigma^2 + sd^2),
#
#     |z - z_F|^2 = (1 - r^2) |F - target|^2      and      d(ln r) = (1 - r^2) d(ln sigma)
#
# so it is the integral over ln r of the squared error of F. For maximum likelihood, ln r is drawn uniformly.


def likelihood_loss(
    model: ScoreModel, x0: Any, rng: Rng, *, eps: float = 1e-3, sample_offset: int = 0, **condition: Any
) -> Tensor:
    """The bound above at x_0 + eps z, in nats per sample, estimated by one noise level per sample.

    model: one that predicts "edm" under a KarrasSDE; x0 (N, ...) of floats; rng, sample_offset, condition: as in
    score_matching_loss.
    Pixels of bytes have no density: add u ~ U(0, 1) to each byte, anew each time. In bits per dimension the loss is
    loss / (D ln 2) + 8 - log2(high - low), for images with noise; likelihood.bits_per_dimension uses the density of the
    ODE, for images without. If a pixel has only one grey, and eps is an eighth of a grey's width, a perfect net has
    0.33 bits here and 0.17 there.
    Errors: TypeError for another model or process, or x0 that is not of floats; ValueError for another prediction, an
    empty batch, or eps outside (0, t_max).
    """
    if not (isinstance(model, ScoreModel) and isinstance(model.process, KarrasSDE)):
        given = repr(model.process) if isinstance(model, ScoreModel) else type(model).__name__
        raise TypeError(
            f"likelihood_loss: the model must be a ScoreModel of a KarrasSDE, whose time is sigma, not {given}"
        )
    if model.predicts != "edm":
        raise ValueError(f"likelihood_loss: the model must predict 'edm', not {model.predicts!r}")
    process, sd = plain(model.process), model.sigma_data
    eps = least_time("likelihood_loss: eps", eps, process)
    assert sd is not None  # ScoreModel has asked for it
    low, high = (-0.5 * math.log1p((sd / s) ** 2) for s in (eps, process.t_max))  # of ln r
    x0 = to_device(array_of(x0))
    condition = conditions(likelihood_loss, condition)
    errors, _ = _squared_errors(model, x0, rng, _uniform_in_log_r(sd, low, high), sample_offset, condition)
    d = math.prod(x0.shape[1:])
    prior = (x0**2).sum() / (2 * process.t_max**2 * len(x0))
    return errors.sum() / len(errors) * (high - low) + prior + d / 2 * math.log(2 * math.pi * math.e * eps**2)


def _uniform_in_log_r(sd: float, low: float, high: float) -> Times:
    """The noise levels sigma for which ln r ~ U(low, high)."""

    def times(n: int, t_max: float, rng: Rng, dtype: Any, sample_offset: int) -> Array:
        # -ln r, which may be 1e-5 or less: a sum of positive terms keeps its digits.
        less = (1 - rng.uniform(n, dtype, sample_offset=sample_offset)) * (high - low) - high
        return sd / xp.sqrt(xp.expm1(2 * less))

    return times


# ---------------------------------------------------------------- four ways to the same score
#
# A model psi should be close to the score of the noised data, at every time, where the data are:
#
#     explicit     E s^2 |psi(x, t) - score(x, t)|^2                            needs the unknown score
#
# Integration by parts takes the unknown score out of the product psi . score, and leaves the trace of a Jacobian:
#
#     implicit     E s^2 (|psi|^2 + 2 tr d psi / dx)                            D backward passes, differentiated again
#     sliced       E s^2 (|psi|^2 + 2 v . d(v . psi) / dx),   E v v^T = I       one, and the noise of v
#     denoising    E |s psi + z|^2                                              none; the noise must be known
#
# (the last one is score_matching_loss). In expectation they differ by numbers that do not depend on psi, so they have
# the same minimum. All take a model(x, t), data x0 (N, ...), a process and an rng, and draw t and z as that loss does.
# A sample must not depend on the others in the batch (no batch norm), because one backward pass of the sum over the
# batch gives the derivatives of all samples.
#
# Sources: Hyvarinen 2005, "Estimation of non-normalized statistical models by score matching" (theorem 1); Vincent
# 2011; Song, Garg, Shi and Ermon 2019, "Sliced score matching" (with variance reduction: |psi|^2 is not projected on
# v); the weight s^2: Song et al. 2021.


def explicit_loss(
    model: Model, x0: Any, process: Any, rng: Rng, *, score: Model, eps: float = 1e-5, sample_offset: int = 0
) -> Tensor:
    """E s^2 |model(x, t) - score(x, t)|^2, the distance itself, for data whose score(x, t) is known.

    Errors: as score_matching_loss.
    """
    _, t, _, x = noised(x0, process, rng, uniform(eps), sample_offset)
    difference = score_at(model, x, t, {}) - score_at(score, x, t, {})
    return ops.square(per_sample(plain(process).marginal_std(t), x) * difference).sum() / len(x)


def implicit_loss(
    model: Model, x0: Any, process: Any, rng: Rng, *, eps: float = 1e-5, sample_offset: int = 0
) -> Tensor:
    """E s^2 (|model|^2 + 2 tr d model / dx): Hyvarinen's. One backward pass for each of the D values of a sample.

    Errors: as score_matching_loss; RuntimeError inside no_grad, where there are no derivatives.
    """
    t, x, psi = _recorded(model, x0, process, rng, eps, sample_offset)
    trace: Any = 0.0
    for j in range(psi.shape[1]):
        (row,) = grad(psi[:, j].sum(), x, create_graph=True)  # d psi_j / dx, (N, D)
        trace = trace + row[:, j]
    return _weighted(psi, trace, process, t)


def sliced_loss(model: Model, x0: Any, process: Any, rng: Rng, *, eps: float = 1e-5, sample_offset: int = 0) -> Tensor:
    """E s^2 (|model|^2 + 2 v . d(v . model) / dx): the trace by one random direction per sample, v of signs +1 and -1.

    Draws once more from the rng than the others. Errors: as implicit_loss.
    """
    t, x, psi = _recorded(model, x0, process, rng, eps, sample_offset)
    v = (rng.integers(2, psi.shape, sample_offset=sample_offset) * 2 - 1).astype(psi.dtype)  # (N, D)
    (along,) = grad((psi * v).sum(), x, create_graph=True)  # d(v . psi) / dx, (N, D)
    return _weighted(psi, (along * v).sum(axis=1), process, t)  # (N, D) -> (N,)


def _recorded(
    model: Model, x0: Any, process: Any, rng: Rng, eps: float, sample_offset: int
) -> tuple[Array, Tensor, Tensor]:
    """Times (N,), noised data (N, D) as a Tensor to differentiate by, and the model at these (N, D)."""
    _, t, _, x = noised(x0, process, rng, uniform(eps), sample_offset)
    flat = Tensor(x.reshape((len(x), math.prod(x.shape[1:]))), requires_grad=True)  # (N, ...) -> (N, D)
    psi = model(flat.reshape(x.shape), Tensor(t))  # (N, D) -> (N, ...)
    if psi.shape != x.shape:
        raise ValueError(f"the model returned shape {psi.shape} for x of shape {x.shape}")
    return t, flat, like(flat, psi).reshape(flat.shape)  # (N, ...) -> (N, D)


def _weighted(psi: Tensor, trace: Any, process: Any, t: Array) -> Tensor:
    """The mean over samples of s^2 (|psi|^2 + 2 trace)."""
    return (plain(process).marginal_std(t) ** 2 * (ops.square(psi).sum(axis=1) + 2 * trace)).sum() / len(psi)
