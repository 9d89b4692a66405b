"""Inpainting, image-to-image, interpolation and denoising, on Gaussians, whose conditional laws are known."""

import math

import numpy as np
import pytest
from mixtures import constant_vp, gaussian_score

from tinydiff import Rng, backend
from tinydiff.diffusion import (
    VESDE,
    VPSDE,
    Counted,
    Denoiser,
    KarrasSDE,
    karras_times,
    sample,
    score_of,
    time_at,
    uniform_times,
)
from tinydiff.diffusion.edit import denoise, image_to_image, inpaint, interpolate, noise_level, spherical
from tinydiff.diffusion.process import per_sample
from tinydiff.engine import array_of

SDE = VESDE(25.0)
PROCESSES = pytest.mark.parametrize("sde", [SDE, constant_vp(6.0)], ids=["VE", "VP"])
MEAN, VARIANCE = 0.5, 0.25

# ---------------------------------------------------------------- inpainting: N(0, C), the second coordinate known

RHO, KNOWN, N = 0.8, 1.0, 20_000
C = np.array([[1.0, RHO], [RHO, 1.0]])


def pair_score(sde):
    """The score of N(0, C) under noise; C has the eigenvectors (1, 1) and (1, -1)."""

    def score(x, t):
        m, s = per_sample(array_of(sde.marginal_scale(t)), x), per_sample(array_of(sde.marginal_std(t)), x)
        along, across = x @ _device([[0.5, 0.5], [0.5, 0.5]], x), x @ _device([[0.5, -0.5], [-0.5, 0.5]], x)
        return (along / (m * m * (1 + RHO) + s * s) + across / (m * m * (1 - RHO) + s * s)) * -1.0

    return score


def _device(a, x):
    return backend.to_device(np.array(a)).astype(x.dtype)


def law_of_inpainting(sde, steps, resample, eps, timesteps):
    """Mean and variance of the unknown coordinate, through the matrices of each step; written apart from the code."""
    times = timesteps(sde, steps, 1.0, eps)
    mu, cov, eye = (
        np.zeros(2),
        np.eye(2) * (1.0 if isinstance(sde, VPSDE) else sde.marginal_std(1.0) ** 2),
        np.eye(2),
    )
    for t, u in zip(times, times[1:]):
        (m, s), (m_u, s_u) = ((sde.marginal_scale(v), sde.marginal_std(v)) for v in (t, u))
        gain = m * C @ np.linalg.inv(m * m * C + s * s * eye)  # E[x_0 | x_t] = gain x_t
        ratio = (m / m_u) ** 2 * s_u**2 / s**2
        step = ratio * m_u / m * eye + (1 - ratio) * m_u * gain
        for again in range(resample):
            if again:
                mu, cov = m / m_u * mu, (m / m_u) ** 2 * cov + (s**2 - (m / m_u * s_u) ** 2) * eye
            mu, cov = step @ mu, step @ cov @ step.T + s_u**2 * (1 - ratio) * eye
            mu, cov = np.array([mu[0], m_u * KNOWN]), np.diag([cov[0, 0], s_u**2])
    m, s = sde.marginal_scale(eps), sde.marginal_std(eps)
    gain = m * C @ np.linalg.inv(m * m * C + s * s * eye)
    return (gain @ mu)[0], (gain @ cov @ gain.T)[0, 0]


@PROCESSES
@pytest.mark.parametrize(
    "steps, resample, timesteps", [(20, 1, karras_times), (10, 4, karras_times), (12, 3, uniform_times)]
)
def test_inpainting_follows_the_law_of_the_algorithm(each_backend, sde, steps, resample, timesteps):
    """Within five standard errors of 20,000 samples; and what is known comes back as it was."""
    known, mask = np.tile(np.float32([9.0, KNOWN]), (N, 1)), np.array([[False, True]])  # 9: must not be used
    x = backend.to_host(
        inpaint(pair_score(sde), known, mask, sde, 0, steps=steps, resample=resample, eps=1e-2, timesteps=timesteps)
    )
    mu, var = law_of_inpainting(sde, steps, resample, 1e-2, timesteps)
    assert (x[:, 1] == KNOWN).all()
    assert x[:, 0].mean() == pytest.approx(mu, abs=5 * math.sqrt(var / N))
    assert x[:, 0].var() == pytest.approx(var, rel=5 * math.sqrt(2 / N))


@pytest.mark.parametrize(
    "steps, resample, mean, variance",
    [(50, 1, 0.48, 0.45), (50, 5, 0.73, 0.34), (50, 10, 0.76, 0.33), (1000, 20, 0.78, 0.36)],
)
def test_the_bias_of_inpainting_is_what_the_docstring_says(steps, resample, mean, variance):
    """The exact answer is 0.8 and 0.36."""
    law = law_of_inpainting(SDE, steps, resample, 1e-3, karras_times)
    assert law == (pytest.approx(mean, abs=0.006), pytest.approx(variance, abs=0.006))


def test_inpainting_counts_its_evaluations_and_a_sample_is_the_same_alone(each_backend):
    score, known = Counted(gaussian_score(0.2, 0.1, SDE)), backend.to_host(Rng(1).normal((5, 4, 4, 1)))
    mask = np.zeros((1, 4, 4, 1), bool)
    mask[:, :2] = True
    stops = []
    options = {"steps": 4, "resample": 3}
    whole = inpaint(score, known, mask, SDE, 7, callback=lambda *a: stops.append(a[0]), **options)
    assert score.nfe == 3 * 4 + 1 and stops == [0, 1, 2, 3, 4]
    alone = inpaint(score, known[3:4], mask, SDE, 7, sample_offset=3, **options)
    whole, alone = backend.to_host(whole), backend.to_host(alone)
    np.testing.assert_array_equal(whole[3:4], alone)
    parts = inpaint(gaussian_score(0.2, 0.1, SDE), known, mask, SDE, 7, microbatch=2, **options)
    np.testing.assert_array_equal(whole, backend.to_host(parts))
    np.testing.assert_array_equal(whole[:, :2], known[:, :2])
    assert abs(whole[:, 2:] - known[:, 2:]).min() > 0


# ---------------------------------------------------------------- image to image


@PROCESSES
@pytest.mark.parametrize("method, steps", [("ddpm", 600), ("euler_maruyama", 600), ("heun", 40)])
def test_the_images_have_the_law_of_what_the_noise_leaves_open(numpy_backend, sde, method, steps):
    """Of a Gaussian: with k = m^2 V / (m^2 V + s^2) at time t, noise z and the way back give the mean
    mean + k (image - mean). The SDE draws from the posterior, the ODE moves along its map."""
    t, image, n = 0.4, 1.6, 20_000
    x = backend.to_host(
        image_to_image(gaussian_score(MEAN, VARIANCE, sde), np.full((n, 1), image, np.float32), sde, 3, t=t,
                       method=method, steps=steps, timesteps=karras_times, eps=1e-3)
    )  # fmt: skip
    m, s2 = sde.marginal_scale(t), sde.marginal_std(t) ** 2
    total = m * m * VARIANCE + s2
    k = m * m * VARIANCE / total
    if method == "heun":
        mean, var = MEAN + math.sqrt(VARIANCE / total) * m * (image - MEAN), VARIANCE / total * s2
    else:
        mean, var = MEAN + k * (image - MEAN), VARIANCE * (1 - k) + (k / m) ** 2 * s2
    assert x.mean() == pytest.approx(mean, abs=5 * math.sqrt(var / n) + 2e-3)
    assert x.var() == pytest.approx(var, rel=5 * math.sqrt(2 / n) + 0.03)


def test_little_noise_changes_little_and_the_draws_are_per_sample(each_backend):
    images = Rng(0).normal((4, 3)) * 0.5 + 0.5
    score = gaussian_score(MEAN, VARIANCE, SDE)

    def run(part, sample_offset=0, t=0.02):
        return backend.to_host(image_to_image(score, part, SDE, 5, t=t, steps=5, sample_offset=sample_offset))

    images_host = backend.to_host(images)
    assert abs(run(images) - images_host).max() < 0.3 * abs(run(images, t=1.0) - images_host).max()
    np.testing.assert_array_equal(run(images[2:3], sample_offset=2), run(images)[2:3])


# ---------------------------------------------------------------- interpolation


def test_the_arc_keeps_the_length_and_the_angle(each_backend):
    a, b = np.zeros((2, 2)), np.zeros((2, 2))
    a[0, 0], b[1, 1] = 3.0, 3.0
    arc = backend.to_host(spherical(backend.to_device(a), backend.to_device(b), [0, 0.25, 0.5, 1]))
    assert arc.shape == (4, 2, 2)
    np.testing.assert_allclose(arc[:, 0, 0], [3 * math.cos(f * math.pi / 2) for f in (0, 0.25, 0.5, 1)], atol=1e-12)
    np.testing.assert_allclose(arc[:, 1, 1], [3 * math.sin(f * math.pi / 2) for f in (0, 0.25, 0.5, 1)], atol=1e-12)


def test_the_middle_of_two_noises_is_noise(each_backend):
    """Of 100,000 dimensions: its variance is 1 where a straight line's would be 1/2."""
    a, b = Rng(0).normal((100_000,)), Rng(1).normal((100_000,))
    assert backend.to_host(spherical(a, b, [0.3, 0.5])).var(axis=1) == pytest.approx(1, abs=0.02)


def test_equal_noises_are_a_walk_on_the_spot_and_opposite_ones_an_error(numpy_backend):
    a = np.array([1.0, 2.0])
    np.testing.assert_allclose(spherical(a, a, [0, 0.5, 1]), [a, a, a])
    np.testing.assert_allclose(spherical(a * 0, a, [0.5]), [a / 2])
    with pytest.raises(ValueError, match="opposite"):
        spherical(a, -a, [0.5])


@pytest.mark.parametrize("method", ["heun", "probability_flow"])
def test_a_walk_ends_at_the_images_of_the_two_noises(each_backend, method):
    score, noise = gaussian_score(MEAN, VARIANCE, SDE), SDE.prior((2, 4, 4, 1), 3)
    walk = backend.to_host(interpolate(score, noise[0], noise[1], SDE, 5, method=method, steps=6))
    ends = backend.to_host(sample(score, (2, 4, 4, 1), SDE, 3, method=method, steps=6))
    assert walk.shape == (5, 4, 4, 1)
    np.testing.assert_allclose(walk[[0, 4]], ends, rtol=1e-5, atol=1e-5)
    jumps = abs(np.diff(walk, axis=0)).max(axis=(1, 2, 3))
    assert jumps.max() < 2.5 * jumps.min()


# ---------------------------------------------------------------- denoising


@PROCESSES
def test_a_noisy_image_is_denoised_in_closed_form(each_backend, sde):
    """The mean of x_0 given noisy = x_0 + sigma z is MEAN + V / (V + sigma^2) (noisy - MEAN), whatever the process."""
    noisy, score = Rng(0).normal((3, 5, 5, 1)), Counted(gaussian_score(MEAN, VARIANCE, sde))
    p = backend.to_host(noisy)
    for sigma in (0.3, np.array([0.1, 1.0, 5.0]), backend.to_device(np.array([0.1, 1.0, 5.0], np.float32))):
        s = np.reshape(backend.to_host(sigma), (-1, 1, 1, 1))
        known = MEAN + VARIANCE / (VARIANCE + s**2) * (p - MEAN)
        np.testing.assert_allclose(backend.to_host(denoise(score, noisy, sde, sigma=sigma)), known, atol=2e-4)
    assert score.nfe == 3


def test_the_noise_level_of_pure_noise(each_backend):
    """65,025 differences; the standard error of their median is below 1 %, which distinguishes 0.67449 from 0.70."""
    noisy = 0.3 * Rng(0).normal((4, 256, 256, 1))
    assert backend.to_host(noise_level(noisy)) == pytest.approx(0.3, rel=0.02)
    assert backend.to_host(noise_level(noisy)).mean() == pytest.approx(0.3, rel=0.01)


def picture():
    """A disc and a bar, (1, 64, 64, 1): edges, and smooth shading."""
    y, x = np.mgrid[0:64, 0:64] / 63
    image = 0.3 * x + 0.7 * ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.06) + 0.5 * (abs(y - 0.8) < 0.05)
    return image[None, :, :, None].astype(np.float32)


@pytest.mark.parametrize("t", [1, np.float32(0.3), np.float64(0.3)], ids=repr)
def test_the_time_of_image_to_image_may_be_of_any_type(each_backend, t):
    sde, images = KarrasSDE(), Rng(0).normal((2, 3))  # whose s(t) is t itself
    score = gaussian_score(MEAN, VARIANCE, sde)
    got, known = (image_to_image(score, images, sde, 0, t=time, steps=3) for time in (t, float(t)))
    assert str(got.dtype) == "float32"
    np.testing.assert_array_equal(backend.to_host(got), backend.to_host(known))


@pytest.mark.parametrize("sigma", [0.05, 0.2, 0.8])
def test_the_noise_level_is_estimated_within_a_tenth(each_backend, sigma):
    noisy = np.concatenate([picture(), picture() * 0]) + sigma * backend.to_host(Rng(2).normal((2, 64, 64, 1)))
    assert backend.to_host(noise_level(backend.to_device(noisy))) == pytest.approx(sigma, rel=0.1)


def test_a_noisy_image_of_unknown_noise_is_denoised_at_the_level_estimated(each_backend):
    noisy = backend.to_device(picture()) + 0.2 * Rng(2).normal((1, 64, 64, 1))
    score = gaussian_score(MEAN, VARIANCE, SDE)
    by_itself = denoise(score, noisy, SDE)
    by_hand = denoise(score, noisy, SDE, sigma=noise_level(noisy))
    np.testing.assert_array_equal(backend.to_host(by_itself), backend.to_host(by_hand))


def test_a_denoiser_does_the_same(each_backend):
    class Zero:
        def __call__(self, x, noise):
            return x * 0.0

    denoiser, sde, noisy = Denoiser(Zero(), 0.6), KarrasSDE(), Rng(0).normal((2, 4, 4, 1))
    denoised = backend.to_host(denoise(score_of(denoiser, sde), noisy, sde, sigma=0.5))
    np.testing.assert_allclose(denoised, backend.to_host(noisy) * 0.36 / (0.36 + 0.25), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(backend.to_host(denoise(denoiser, noisy, sde, sigma=0.5)), denoised)
    assert time_at(sde, 0.5) == pytest.approx(0.5)


# ---------------------------------------------------------------- errors

X, SCORE = np.zeros((2, 4, 4, 1), np.float32), gaussian_score(0, 1, SDE)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: inpaint(SCORE, X, np.zeros(X.shape), SDE, 0), ValueError, "mask must be of bool .* not float64"),
        (lambda: inpaint(SCORE, X, np.zeros((2, 4, 5, 1), bool), SDE, 0), ValueError, r"fit \(2, 4, 4, 1\), .*4, 5, 1"),
        (lambda: inpaint(SCORE, X, np.zeros((4, 4, 1), bool), SDE, 0), ValueError, r"not bool of shape \(4, 4, 1\)"),
        (lambda: inpaint(SCORE, X, X == 0, SDE, 0, resample=0), ValueError, "resample must be .* 1 or more, not 0"),
        (lambda: inpaint(SCORE, X, X == 0, SDE, 0, resample=1.5), ValueError, "resample must be an integer .* not 1.5"),
        (lambda: inpaint(SCORE, X, X == 0, SDE, 0, steps=0), ValueError, "steps must be .* not 0"),
        (lambda: inpaint(SCORE, X.astype(np.uint8), X == 0, SDE, 0), TypeError, "inpaint: images must be .* not uint8"),
        (lambda: image_to_image(SCORE, X, SDE, 0, t=0), ValueError, r"t must be a number in \(0.0, 1.0\], not 0"),
        (lambda: image_to_image(SCORE, X, SDE, 0, t=1.5), ValueError, r"t must be a number in \(0.0, 1.0\], not 1.5"),
        (
            lambda: image_to_image(SCORE, X, SDE, 0, t=1e-4),
            ValueError,
            r"t must be a number in \(0.001, 1.0\], not 0.0001",
        ),
        (lambda: interpolate(SCORE, X[0], X[1], SDE, 1), ValueError, "count must be .* 2 or more, not 1"),
        (lambda: interpolate(SCORE, X[0], X[1], SDE, 2.5), ValueError, "count must be an integer .* not 2.5"),
        (lambda: interpolate(SCORE, X[0], X[1, 0], SDE, 3), ValueError, r"one shape, not \(4, 4, 1\) and \(4, 1\)"),
        (lambda: inpaint(SCORE, X, X == 0, SDE, 0, sample_offset=0.5), ValueError, "sample_offset must be .* not 0.5"),
        (lambda: image_to_image(SCORE, X, SDE, 0, t=None), ValueError, "t must be a number .* not None"),
        (lambda: image_to_image(SCORE, X, SDE, 0, t=float("nan")), ValueError, "t must be a number .* not nan"),
        (lambda: spherical(X[0], X[1], [0.5, float("nan")]), ValueError, "a fraction must be a number .* not nan"),
        (lambda: spherical(X[0] + 1, X[1] * float("nan"), [0.5]), ValueError, "a and b must be finite"),
        (lambda: denoise(SCORE, X, SDE, sigma=-0.1), ValueError, "sigma must be positive, not -0.1"),
        (lambda: denoise(SCORE, X, SDE, sigma=float("nan")), ValueError, "sigma must be positive, not nan"),
        (lambda: denoise(SCORE, X, SDE, sigma=99.0), ValueError, "a noise level must be from 0 to 9.84521, not 99.0"),
        (lambda: denoise(SCORE, X, SDE, sigma=np.ones(3)), ValueError, r"one per image, \(2,\), not of shape \(3,\)"),
        (lambda: denoise(SCORE, X, SDE), ValueError, "sigma must be positive, not 0.0"),  # images without noise
        (lambda: noise_level(X[:, :1]), ValueError, r"at least 2x2 pixels, not \(2, 1, 4, 1\)"),
        (lambda: denoise(lambda x, t: x.sum(), X, SDE, sigma=1.0), ValueError, r"returned shape \(\) for x"),
    ],
)
def test_bad_arguments_are_quoted(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_images_are_no_error(numpy_backend):
    none = X[:0]
    for made in (
        inpaint(SCORE, none, none == 0, SDE, 0, steps=2, resample=2),
        image_to_image(SCORE, none, SDE, 0, t=0.5, steps=2),
        denoise(SCORE, none, SDE, sigma=1.0),
        denoise(SCORE, none, SDE),
    ):
        assert made.shape == none.shape
