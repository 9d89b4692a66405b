"""What a trained model is good for besides new images: filling a hole, redoing an image from a sketch, walking from one
image to another, removing noise.

The score is as the samplers take it; a denoiser is made one by `score_of`. What each sampler takes besides, a condition
among it, is passed on. Images are floats of the scale that the model was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from ..backend import Array, scalar, to_device, to_host, xp
from ..engine import Tensor, no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .evaluation import Callback, Run, Score, checked
from .grids import Grid, rho_times, time_at
from .ode import heun, implicit_step
from .schedule import whole
from .sde import denoised, per_sample
from .stochastic import ddpm


@no_grad()
def inpaint(
    score: Score,
    known: Any,
    mask: Any,
    sde: Any,
    rng: Rng | int,
    *,
    steps: int = 50,
    resample: int = 10,
    eps: float = 1e-3,
    first: int = 0,
    callback: Callback | None = None,
    grid: Grid = rho_times,
    **condition: Any,
) -> Array:
    """Images that agree with `known` where `mask` is true, (N, ...) both: resample steps + 1 evaluations.

    Each step is one of `ddpm`, after which the known part is replaced by the known image with the noise of that time.
    The rest has not seen that noise, and so does not quite fit; therefore noise is added back and the step done again,
    `resample` times in all, in which the two come to agree.

    It is not exact. For N(0, [[1, 0.8], [0.8, 1]]) with 1 known for one of the two, the other has mean 0.8 and variance
    0.36; 50 steps give 0.48 and 0.45 without resampling, 0.73 and 0.34 with 5 rounds, 0.76 and 0.33 with 10, and
    1000 steps with 20 rounds 0.78 and 0.36.
    Errors: ValueError for resample < 1, a mask that does not fit or is not of bool; and those of the samplers.
    Source: Lugmayr et al. 2022, "RePaint", algorithm 1, with a jump length of 1; resample = 1 is Song et al. 2021,
    appendix I.2.
    """
    known, mask = _images("inpaint", known), to_device(array_of(mask))
    if mask.dtype != "bool" or mask.ndim != known.ndim or any(m not in (1, n) for m, n in zip(mask.shape, known.shape)):
        raise ValueError(f"inpaint: mask must be of bool and fit {known.shape}, not {mask.dtype} of shape {mask.shape}")
    resample = whole("inpaint: resample", resample)
    run = Run(score, known.shape, sde, rng, steps, eps, first, None, callback, grid, condition)
    x = run.x  # (N, ...)
    for step, (t, after) in enumerate(pairwise(run.times)):
        _, clean = run.look(step, x, t)
        for again in range(resample):
            if again:
                x = _noise_back(run, x, after, t)
                _, clean = run.estimate(x, t)
            x = implicit_step(run, x, t, after, clean, 1.0)
            x = xp.where(mask, sde.marginal_scale(after) * known + sde.marginal_std(after) * run.noise(), x)
    return xp.where(mask, known, run.finish(step + 1, x))


def _noise_back(run: Run, x: Array, t: float, later: float) -> Array:
    """x at time t, brought to a later time by the process itself."""
    scale = run.sde.marginal_scale(later) / run.sde.marginal_scale(t)
    added = run.sde.marginal_std(later) ** 2 - (scale * run.sde.marginal_std(t)) ** 2
    return scale * x + math.sqrt(added) * run.noise()


def image_to_image(
    score: Score,
    images: Any,
    sde: Any,
    rng: Rng | int,
    *,
    t: float,
    sampler: Callable[..., Array] = ddpm,
    first: int = 0,
    **options: Any,
) -> Array:
    """New images (N, ...) that resemble the given: noise of time t is added, and a sampler takes it away again.

    At small t little changes; at t_max only chance decides. In between, what is finer than the noise is made anew.
    rng: first for that noise, then for the sampler; row i is that of sample `first + i`.
    Errors: ValueError for t not between the sampler's eps and t_max, and the sampler's.
    Source: Meng et al. 2022, "SDEdit", algorithm 1.
    """
    images, rng = _images("image_to_image", images), as_rng(rng)
    if not 0 < t <= sde.t_max:
        raise ValueError(f"image_to_image: t must be above 0 and not above {sde.t_max:g}, not {t!r}")
    t = min(float(t), sde.t_max)  # as in Run
    noise = rng.normal(images.shape, images.dtype, first=first)
    x = sde.marginal_scale(t) * images + sde.marginal_std(t) * noise
    return sampler(score, images.shape, sde, rng, start=(x, t), first=first, **options)


def interpolate(
    score: Score, a: Any, b: Any, sde: Any, count: int, *, sampler: Callable[..., Array] = heun, **options: Any
) -> Array:
    """A walk from the image of one noise to that of another: a, b (...) -> (count, ...), both ends included.

    a, b: a sample each of sde.prior, without the batch axis; between them goes `spherical`. sampler: one that follows
    the ODE, so that neighbouring noises give neighbouring images.
    Errors: ValueError for count < 2, shapes that differ, noises that are opposite; and the sampler's.
    Source: Song, Meng and Ermon 2021, "DDIM", section 5.3.
    """
    count = whole("interpolate: count", count, 2)
    x = spherical(a, b, [i / (count - 1) for i in range(count)])
    return sampler(score, x.shape, sde, Rng(0), start=(x, sde.t_max), **options)  # an ODE draws nothing


def spherical(a: Any, b: Any, fractions: list[float]) -> Array:
    """Points on the arc from a to b, (...) -> (len(fractions), ...), where theta is the angle between them:

        a sin((1 - f) theta) / sin(theta) + b sin(f theta) / sin(theta)

    Noise of D dimensions lies near a sphere of radius sqrt(D), through which a straight line would cut: half-way its
    points would be too short by sqrt(2), an amount of noise that no net has seen.
    Errors: ValueError for shapes that differ, or opposite points, between which there is no one arc.
    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    a, b = _images("spherical", a), _images("spherical", b)
    if a.shape != b.shape:
        raise ValueError(f"spherical: a and b must have one shape, not {a.shape} and {b.shape}")
    lengths = math.sqrt(scalar((a * a).sum()) * scalar((b * b).sum()))
    cosine = scalar((a * b).sum()) / lengths if lengths > 0 else 1.0
    theta = math.acos(min(1.0, max(-1.0, cosine)))
    if math.pi - theta < 1e-3:
        raise ValueError("spherical: a and b are opposite, and every way between them is as short as the others")
    if theta < 1e-3:  # there the arc is a straight line
        weights = [(1 - f, f) for f in fractions]
    else:
        weights = [
            (math.sin((1 - f) * theta) / math.sin(theta), math.sin(f * theta) / math.sin(theta)) for f in fractions
        ]
    return xp.stack([u * a + v * b for u, v in weights])


@no_grad()
def denoise(score: Score, photos: Any, sde: Any, *, sigma: Any = None, **condition: Any) -> Array:
    """The image behind a noisy one, photo = image + sigma z, on average over all that it could be: one evaluation.

    photos: (N, ...). sigma: a number, or one a photo (N,), on the scale of the photos; if not given, `noise_level` of
    each. That average is the best guess by squared error, and blurred where the photo leaves a choice; one possibility,
    as sharp as an image, is what a sampler gives with start=(m(t) photo, t), t = grids.time_at(sde, sigma).
    Errors: ValueError for a sigma that is not positive or beyond what the process reaches, or is not one a photo.
    Source: Tweedie's formula; Robbins 1956, Efron 2011.
    """
    photos = _images("denoise", photos)
    n = photos.shape[0]
    sigmas = to_host(noise_level(photos) if sigma is None else array_of(sigma)).astype(float)
    if sigmas.shape not in ((), (n,)):
        raise ValueError(f"denoise: sigma must be a number or one a photo, {(n,)}, not of shape {sigmas.shape}")
    if not (sigmas > 0).all():
        raise ValueError(f"denoise: sigma must be positive, not {sigmas.min()}")
    times = [time_at(sde, s) for s in sigmas.reshape(-1).tolist()]
    t = to_device(times * (n if sigmas.ndim == 0 else 1)).astype(photos.dtype)  # (N,)
    x = per_sample(sde.marginal_scale(t), photos) * photos
    return denoised(sde, x, t, checked(score(Tensor(x), Tensor(t), **condition), x))


def noise_level(photos: Any) -> Array:
    """How strong the noise of each photo seems to be: (N, H, W, C) -> (N,), a standard deviation.

    The differences (p - q - r + s) / 2 of each square of four pixels have the deviation of the noise, and nothing of
    what is smooth in the image; the median of their sizes does not see the few edges. It is divided by 0.6745, the
    median of |z|. Noise that was cut at black or white seems weaker than it was.
    Errors: ValueError for photos of less than 2x2 pixels or another shape.
    Source: Donoho and Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage", section 4.
    """
    p = _images("noise_level", photos)
    if p.ndim != 4 or min(p.shape[1:3]) < 2:
        raise ValueError(f"noise_level: photos must be (N, H, W, C) of at least 2x2 pixels, not {p.shape}")
    d = (p[:, 1:, 1:] - p[:, 1:, :-1] - p[:, :-1, 1:] + p[:, :-1, :-1]) / 2  # (N, H - 1, W - 1, C)
    return xp.median(abs(d).reshape(d.shape[0], math.prod(d.shape[1:])), axis=1) / 0.67449  # (N,)


def _images(who: str, images: Any) -> Array:
    images = to_device(array_of(images))
    if images.dtype.kind != "f" or images.ndim == 0:
        raise TypeError(
            f"{who}: images must be of floats (see data.to_float), not {images.dtype} of shape {images.shape}"
        )
    return images
