"""Other uses of a trained model: filling a hole (inpainting), making an image from another, interpolation between
images, removing noise.

A model is as in `sample`. Other arguments of `sample`, such as a condition, are passed on. Images are floats on the
scale on which the model was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..arguments import integer, number
from ..backend import Array, scalar, to_device, to_host, xp
from ..engine import Tensor
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .conditions import conditions
from .methods import Method, Timesteps, ddim_step, karras_times
from .predict import as_score, checked_score, denoised, for_rows
from .process import like, per_sample, plain, time_at, time_of
from .sample import Callback, SamplerState, sample

Model = Callable[..., Any]


@no_grad()
def inpaint(
    model: Model,
    known: Any,
    mask: Any,
    process: Any,
    rng: Rng | int,
    *,
    steps: int = 50,
    resample: int = 10,
    eps: float = 1e-3,
    sample_offset: int = 0,
    callback: Callback | None = None,
    timesteps: Timesteps = karras_times,
    **condition: Any,
) -> Array:
    """Images that agree with `known` where `mask` is true, (N, ...) both: resample steps + 1 evaluations.

    Each step is one of `ddpm`, after which the known part is replaced by the known image with the noise of that time.
    The rest was made without regard to that noise and does not quite fit. Therefore noise is added back and the step is
    repeated, `resample` times in all; the two parts come to agree.

    It is not exact. For N(0, [[1, 0.8], [0.8, 1]]) with the first number known to be 1, the second has mean 0.8 and
    variance 0.36. 50 steps give 0.48 and 0.45 without resampling, 0.73 and 0.34 with 5 rounds, 0.76 and 0.33 with 10;
    1000 steps with 20 rounds give 0.78 and 0.36.
    Errors: ValueError for resample < 1, a mask that does not fit or is not of bool; and those of `sample`.
    Source: Lugmayr et al. 2022, "RePaint", algorithm 1, with a jump length of 1; resample = 1 is Song et al. 2021,
    appendix I.2.
    """
    conditions(inpaint, condition)  # for its errors: other arguments of `sample` may be among them
    known, mask = _images("inpaint", known), to_device(array_of(mask))
    if mask.dtype != "bool" or mask.ndim != known.ndim or any(m not in (1, n) for m, n in zip(mask.shape, known.shape)):
        raise ValueError(f"inpaint: mask must be of bool and fit {known.shape}, not {mask.dtype} of shape {mask.shape}")
    resample, mask = integer("inpaint: resample", resample), xp.broadcast_to(mask, known.shape)
    sample_offset = integer("inpaint: sample_offset", sample_offset, 0)

    def repaint(state: SamplerState) -> Array:
        """The method of sampling: one of RePaint's loops for each step."""
        x = state.x  # (N, ...), or a microbatch of it
        first = state.sample_offset - sample_offset
        known_part, mask_part = like(x, known[first : first + len(x)]), mask[first : first + len(x)]
        m, s = state.process.marginal_scale, state.process.marginal_std
        for t, t_next in state.intervals:
            x0 = state.stop(x, t).denoised
            for i in range(resample):
                if i > 0:
                    x = _add_noise_back(state, x, t_next, t)
                    x0 = state.evaluate(x, t).denoised
                x = ddim_step(state, x, t, t_next, x0, eta=1.0)
                known_then = m(t_next) * known_part + s(t_next) * state.noise()
                x = xp.where(mask_part, known_then, x)
        return x

    x = sample(
        model, known.shape, process, rng, method=Method(repaint), steps=steps, eps=eps, timesteps=timesteps,
        sample_offset=sample_offset, callback=callback, **condition,
    )  # fmt: skip
    return xp.where(mask, known, x)


def _add_noise_back(state: SamplerState, x: Array, t: float, t_later: float) -> Array:
    """x at time t, brought to a later time by the process itself."""
    m, s = state.process.marginal_scale, state.process.marginal_std
    scale = m(t_later) / m(t)
    return scale * x + math.sqrt(s(t_later) ** 2 - (scale * s(t)) ** 2) * state.noise()


class Known:
    """A score that knows a part of the images: there the denoised image is `known`, elsewhere the model's.

        D <- known where mask, else D                   score <- (m D - x) / s^2

    So every method of sampling fills a hole, at its usual cost: a method that follows the ODE and starts from x = m
    known + s z keeps, where the mask is true, x = m known + s z with the same z at every time, and arrives at `known`.
    The model sees that part with the noise of the time, and can make the rest fit. It is less exact than `inpaint`,
    whose rounds let the two parts come to agree, and `resample` times cheaper.

    model: any model; known (N, ...); mask: of bool, what is known, broadcastable to it. The result is an array.
    Errors: ValueError for a mask that does not fit or is not of bool.
    Source: for DDIM, Song et al. 2021, appendix I.2, with one noise for all times.
    """

    def __init__(self, model: Model, known: Any, mask: Any, process: Any):
        self.model, self.process, self.known = as_score(model, process), plain(process), _images("Known", known)
        mask = to_device(array_of(mask))
        fits = mask.ndim == self.known.ndim and all(m in (1, n) for m, n in zip(mask.shape, self.known.shape))
        if mask.dtype != "bool" or not fits:
            raise ValueError(
                f"Known: mask must be of bool and fit {self.known.shape}, not {mask.dtype} of shape {mask.shape}"
            )
        self.mask = xp.broadcast_to(mask, self.known.shape)

    def __call__(self, x: Any, t: Any, **condition: Any) -> Array:
        score = array_of(self.model(x, t, **condition))
        m, s = (per_sample(f(array_of(t)), score) for f in (self.process.marginal_scale, self.process.marginal_std))
        return xp.where(self.mask, (m * self.known - array_of(x)) / (s * s), score)

    def for_rows(self, rows: slice, n: int) -> Known:
        return Known(for_rows(self.model, rows, n), self.known[rows], self.mask[rows], self.process)


def image_to_image(
    model: Model,
    images: Any,
    process: Any,
    rng: Rng | int,
    *,
    t: float,
    method: Any = "ddpm",
    sample_offset: int = 0,
    **options: Any,
) -> Array:
    """New images (N, ...) that resemble the given ones: the noise of time t is added, and `sample` removes it.

    At small t little changes; at t_max nothing of the image is left. In between, details finer than the noise are made
    anew.
    rng: draws that noise, and then serves `sample`; row i is that of sample `sample_offset + i`. method and options: as
    in `sample`.
    Errors: ValueError for t not between eps and t_max; and those of `sample`.
    Source: Meng et al. 2022, "SDEdit", algorithm 1.
    """
    images, rng = _images("image_to_image", images), as_rng(rng)
    process, t = plain(process), time_of("image_to_image: t", t, process)
    noise = rng.normal(images.shape, images.dtype, sample_offset=sample_offset)
    x = process.marginal_scale(t) * images + process.marginal_std(t) * noise
    return sample(
        model, images.shape, process, rng, method=method, start=(x, t), sample_offset=sample_offset, **options
    )


def interpolate(
    model: Model, a: Any, b: Any, process: Any, count: int, *, method: Any = "heun", **options: Any
) -> Array:
    """A walk from the image of one noise to that of another: a, b (...) -> (count, ...), both ends included.

    a, b: one sample each of process.prior, without the batch axis; `spherical` gives the points between them. method:
    one that follows the ODE, so that similar noises give similar images; method and options are as in `sample`.
    Errors: ValueError for count < 2, shapes that differ, noises that are opposite; and those of `sample`.
    Source: Song, Meng and Ermon 2021, "DDIM", section 5.3.
    """
    count = integer("interpolate: count", count, 2)
    x = spherical(a, b, [i / (count - 1) for i in range(count)])  # (...) -> (count, ...)
    # an ODE draws no random numbers, so any seed will do
    return sample(model, x.shape, process, Rng(0), method=method, start=(x, process.t_max), **options)


def spherical(a: Any, b: Any, fractions: list[float]) -> Array:
    """Points on the arc from a to b, (...) -> (len(fractions), ...), where theta is the angle between them:

        a sin((1 - f) theta) / sin(theta) + b sin(f theta) / sin(theta)

    Noise of D dimensions lies near a sphere of radius sqrt(D). A straight line would cut through the sphere: its middle
    would be shorter by a factor sqrt(2), an amount of noise that no net has seen.
    Errors: ValueError for shapes that differ, points or fractions that are not finite, or opposite points, for which
    the arc is not unique.
    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    a, b = _images("spherical", a), _images("spherical", b)
    fractions = [number("spherical: a fraction", f) for f in fractions]
    if a.shape != b.shape:
        raise ValueError(f"spherical: a and b must have one shape, not {a.shape} and {b.shape}")
    lengths = math.sqrt(scalar((a * a).sum()) * scalar((b * b).sum()))
    if not math.isfinite(lengths):
        raise ValueError(f"spherical: a and b must be finite, but the product of their lengths is {lengths}")
    cosine = scalar((a * b).sum()) / lengths if lengths > 0 else 1.0
    theta = math.acos(min(1.0, max(-1.0, cosine)))
    if math.pi - theta < 1e-3:
        raise ValueError("spherical: a and b are opposite, so the shortest arc between them is not unique")
    if theta < 1e-3:  # there the arc is a straight line
        weights = [(1 - f, f) for f in fractions]
    else:
        weights = [
            (math.sin((1 - f) * theta) / math.sin(theta), math.sin(f * theta) / math.sin(theta)) for f in fractions
        ]
    return xp.stack([u * a + v * b for u, v in weights])  # (...) -> (len(fractions), ...)


@no_grad()
def denoise(model: Model, noisy: Any, process: Any, *, sigma: Any = None, **condition: Any) -> Array:
    """The denoised image E[image | noisy] for noisy = image + sigma z, by one evaluation of the model.

    noisy: (N, ...). sigma: a number, or one per image (N,), on the scale of the images; if not given, `noise_level` of
    each. The mean over all possible images is the best guess by squared error, and blurred where they differ. For one
    possible image, as sharp as the data, use `sample` with start=(m(t) noisy, t), t = time_at(process, sigma).
    Errors: ValueError for a sigma that is not positive or beyond what the process reaches, or is not one per image.
    Source: Tweedie's formula; Robbins 1956, Efron 2011.
    """
    noisy = _images("denoise", noisy)
    n = noisy.shape[0]
    sigmas = to_host(noise_level(noisy) if sigma is None else array_of(sigma)).astype(float)
    if sigmas.shape not in ((), (n,)):
        raise ValueError(f"denoise: sigma must be a number or one per image, {(n,)}, not of shape {sigmas.shape}")
    if not (sigmas > 0).all():
        raise ValueError(f"denoise: sigma must be positive, not {sigmas.min()}")
    times = [time_at(process, s) for s in sigmas.reshape(-1).tolist()]
    t = to_device(times * (n if sigmas.ndim == 0 else 1)).astype(noisy.dtype)  # (N,)
    x = per_sample(plain(process).marginal_scale(t), noisy) * noisy
    score = as_score(model, process)(Tensor(x), Tensor(t), **conditions(denoise, condition))
    return denoised(process, x, t, checked_score(score, x))


def noise_level(noisy: Any) -> Array:
    """An estimate of the noise of each image: (N, H, W, C) -> (N,), a standard deviation.

    The differences (p - q - r + s) / 2 of each square of four pixels have the deviation of the noise, and the smooth
    parts of the image cancel in them; the median of their sizes hardly depends on the few edges. It is divided by
    0.6745, the median of |z|. If the noise was clipped at black or white, the estimate is too small.
    Errors: ValueError for images of less than 2x2 pixels or another shape.
    Source: Donoho and Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage", section 4.
    """
    p = _images("noise_level", noisy)
    if p.ndim != 4 or min(p.shape[1:3]) < 2:
        raise ValueError(f"noise_level: images must be (N, H, W, C) of at least 2x2 pixels, not {p.shape}")
    d = (p[:, 1:, 1:] - p[:, 1:, :-1] - p[:, :-1, 1:] + p[:, :-1, :-1]) / 2  # (N, H - 1, W - 1, C)
    sizes = abs(d).reshape(d.shape[0], math.prod(d.shape[1:]))  # (N, H - 1, W - 1, C) -> (N, (H - 1) (W - 1) C)
    return xp.median(sizes, axis=1) / 0.67449  # (N,)


def _images(who: str, images: Any) -> Array:
    images = to_device(array_of(images))
    if images.dtype.kind != "f" or images.ndim == 0:
        raise TypeError(
            f"{who}: images must be of floats (see data.to_float), not {images.dtype} of shape {images.shape}"
        )
    return images
