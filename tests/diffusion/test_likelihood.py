"""The likelihood against closed forms: Gaussian data in several dimensions, where the ODE is linear, and a mixture in
one, where its map is F_1^-1(F_eps(x))."""

import math

import numpy as np
import pytest
from mixtures import SPEC, constant_vp, erf, gaussian_score

from tinydiff import Rng, Tensor, backend, no_grad
from tinydiff.diffusion import VESDE, VPSDE, Counted, Denoiser, KarrasSDE, score_of
from tinydiff.diffusion.likelihood import Average, average, bits_per_dimension, log_likelihood
from tinydiff.diffusion.process import per_sample
from tinydiff.engine import array_of

EPS = 1e-4
SDES = {"VE": VESDE(25.0), "VP": constant_vp(), "EDM": KarrasSDE(20.0)}
processes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)

MEAN = np.array([0.5, -1.0, 2.0, 0.0])
ROOT = np.array([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0], [-0.5, 0.5, 0.4, 0], [0.9, -0.2, 0.3, 0.2]])
COVARIANCE = ROOT @ ROOT.T


def correlated_score(sde):
    """Of N(MEAN, COVARIANCE) under noise, in the eigenvectors of the covariance."""
    variances, vectors = np.linalg.eigh(COVARIANCE)

    def score(x, t):
        q, v, mu = (backend.to_device(a.astype(x.dtype)) for a in (vectors, variances, MEAN))
        m, s = per_sample(array_of(sde.marginal_scale(t)), x), per_sample(array_of(sde.marginal_std(t)), x)
        return ((x - m * mu) @ q) / (m * m * v + s * s) @ q.T * -1.0

    return score


def exact(x, sde, eps):
    """ln p(x), x (N, 4): the ODE maps x to m_1 mu + A (x - m mu), A with the eigenvalues sqrt(V_1 / V_eps)."""
    variances, vectors = np.linalg.eigh(COVARIANCE)
    (m, m1), (s, s1) = ([f(t) for t in (eps, sde.t_max)] for f in (sde.marginal_scale, sde.marginal_std))
    stretch = np.sqrt((m1**2 * variances + s1**2) / (m**2 * variances + s**2))
    y = m1 * MEAN + ((x - m * MEAN) @ vectors * stretch) @ vectors.T
    std = 1.0 if isinstance(sde, VPSDE) else s1
    prior = -0.5 * (y**2).sum(1) / std**2 - len(MEAN) * math.log(std * math.sqrt(2 * math.pi))
    return prior + np.log(stretch).sum()


def some(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 4)) @ ROOT.T + MEAN


# ---------------------------------------------------------------- exact


@processes
def test_a_gaussian_is_exact_to_the_tolerance_of_the_ode(numpy_backend, sde):
    x = some(6)
    for tolerance in (1e-5, 1e-9):  # below the noise at EPS
        found = log_likelihood(
            correlated_score(sde), backend.to_device(x), sde, 0, exact=True, eps=EPS, rtol=tolerance, atol=tolerance
        )
        assert found.shape == (6, 1) and str(found.dtype) == "float64"
        np.testing.assert_allclose(backend.to_host(found)[:, 0], exact(x, sde, EPS), atol=100 * tolerance)


def test_a_far_wider_process_forgets_the_data_and_gives_their_own_density(numpy_backend):
    """The closed form above contains the mismatch of the prior; with s(1) = 80 it is that of N(MEAN, COVARIANCE)."""
    sde, x = KarrasSDE(80.0), some(300)
    off = (x - MEAN) @ np.linalg.inv(ROOT).T
    known = -0.5 * (off**2).sum(1) - np.log(np.diag(ROOT)).sum() - 2 * math.log(2 * math.pi)
    found = log_likelihood(correlated_score(sde), x, sde, 0, exact=True, eps=EPS)
    assert found.mean() == pytest.approx(known.mean(), abs=5e-3)


def test_a_mixture_is_exact_in_one_dimension(each_backend):
    """p(x) = prior(y) dy/dx = prior(y) p_eps(x) / p_1(y)."""
    sde, x = VESDE(25.0), np.array([-2.6, -2.0, -1.1, 0.5, 1.6, 3.9])

    def density(x, s):
        var = np.array(SPEC.deviations) ** 2 + s * s
        return (SPEC.weights * np.exp(-((x[:, None] - SPEC.means) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)).sum(1)

    s, s1 = sde.marginal_std(EPS), sde.marginal_std(1.0)
    y = SPEC.quantile(SPEC.below(x, s=s), s=s1)
    known = -0.5 * (y / s1) ** 2 - math.log(s1 * math.sqrt(2 * math.pi)) + np.log(density(x, s) / density(y, s1))
    for options in ({"exact": True}, {"probes": 1}):  # in one dimension a sign squared is 1: no estimate at all
        found = log_likelihood(
            SPEC.score(sde), backend.to_device(x[:, None]), sde, 0, eps=EPS, rtol=1e-8, atol=1e-8, **options
        )
        np.testing.assert_allclose(backend.to_host(found)[:, 0], known, atol=1e-5)


def test_the_integral_is_as_exact_as_the_image(each_backend):
    """400 pixels of deviations from 0.003 to 1. Averaged over 401 numbers, an error of the integral would be divided by
    20, and errors of 0.01 to 0.03 bits per pixel would be accepted."""
    sde, eps, d = KarrasSDE(20.0), 1e-3, 400
    random = np.random.default_rng(0)
    sd = np.exp(random.uniform(math.log(0.003), math.log(1), d))
    x, variance = random.normal(size=(4, d)) * sd, backend.to_device(sd**2)

    def score(x, t):
        return x * -1.0 / (variance + per_sample(t, x) ** 2)

    stretch = np.sqrt((sd**2 + 20**2) / (sd**2 + eps**2))
    known = -0.5 * ((x * stretch / 20) ** 2).sum(1) - d * math.log(20 * math.sqrt(2 * math.pi)) + np.log(stretch).sum()
    found = log_likelihood(score, backend.to_device(x), sde, 0, eps=eps, rtol=1e-4, atol=1e-4)  # diagonal: exact
    assert (abs(backend.to_host(found)[:, 0] - known) / (d * math.log(2)) < 1e-3).all()
    for rtol, atol in ((1e-5, 1e-3), (1e-3, 1e-5)):  # either way 0.15 bits per pixel would be lost at the first step
        with pytest.raises(ValueError, match=r"must be below the noise at eps=0.001, 0.001, not 0.00\d+ \(atol="):
            log_likelihood(score, backend.to_device(x), sde, 0, eps=eps, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- Hutchinson's estimator


@processes
def test_the_estimate_is_right_within_three_standard_errors(each_backend, sde):
    """On these points, where only the probes cause an error; and on all data, whose mean is known."""
    x, n, probes = some(400), 400, 4
    found = log_likelihood(correlated_score(sde), backend.to_device(x), sde, 3, probes=probes, eps=EPS)
    mean, error, probe_error = average(found)
    known = exact(x, sde, EPS)
    assert found.shape == (n, probes)
    assert abs(mean - known.mean()) < 3 * probe_error
    assert abs(mean - exact(some(200_000, 9), sde, EPS).mean()) < 3 * error
    # and the errors are not excuses: the probes scatter as the off-diagonal entries say, 1 to 4 nats here
    assert 1 < probe_error * math.sqrt(n * probes) < 4 and probe_error < error < 0.2
    wrong = backend.to_host(found).mean(axis=1) - known
    assert np.sqrt((wrong**2).mean()) == pytest.approx(probe_error * math.sqrt(n), rel=0.2)


def test_average_is_the_mean_and_its_errors():
    a = np.random.default_rng(0).normal(size=(3000, 4)) * 0.5 + np.random.default_rng(1).normal(size=(3000, 1)) + 7
    mean, error, probe_error = average(a)
    assert mean == pytest.approx(7, abs=3 * error)
    assert error == pytest.approx(math.sqrt((1 + 0.25 / 4) / 3000), rel=0.05)
    assert probe_error == pytest.approx(math.sqrt(0.25 / 12000), rel=0.05)
    assert average(a[:1]).mean == pytest.approx(a[0].mean()) and math.isnan(average(a[:1]).standard_error)
    assert math.isnan(average(a[:, :1]).probe_error)
    assert str(Average(1.5, 0.02, 0.001)) == "1.5000 +- 0.0200 (of which probes 0.0010)"
    assert str(Average(1.5, 0.02, math.nan)) == "1.5000 +- 0.0200" and str(Average(1.5, math.nan, math.nan)) == "1.5000"
    for bad in (np.zeros((0, 1)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"estimates must be \(N, probes\)"):
            average(bad)


def test_a_row_is_the_same_alone_and_each_probe_is_its_own(each_backend):
    sde, x = VESDE(25.0), backend.to_device(some(5).astype(np.float32))
    options = {"probes": 2, "eps": EPS}
    whole = backend.to_host(log_likelihood(correlated_score(sde), x, sde, 7, **options))
    alone = backend.to_host(log_likelihood(correlated_score(sde), x[3:4], sde, 7, sample_offset=3, **options))
    np.testing.assert_allclose(alone, whole[3:4], rtol=1e-4)
    other = backend.to_host(log_likelihood(correlated_score(sde), x[3:4], sde, 7, sample_offset=2, **options))
    assert (abs(other - alone) > 1e-3).any() and abs(whole[:, 0] - whole[:, 1]).max() > 1e-3


# ---------------------------------------------------------------- bits per dimension


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
def test_the_probabilities_of_all_bytes_sum_to_one(each_backend, low, high):
    """For images of one pixel: 2^-bits, averaged over u and summed over the 256 bytes, is what the model puts between
    low and high. An offset that is wrong by a bit would make it a half or two."""
    sde, mean, sd, times = VESDE(25.0), low + 0.4 * (high - low), 0.3 * (high - low), 12
    images = np.repeat(np.arange(256, dtype=np.uint8), times)[:, None]
    bits = bits_per_dimension(gaussian_score(mean, sd**2, sde), images, sde, 0, low=low, high=high, eps=1e-3,
                              microbatch=1000)  # fmt: skip
    assert bits.shape == (256 * times, 1) and isinstance(bits, np.ndarray)
    shrink = math.sqrt((sd**2 + sde.marginal_std(1e-3) ** 2) / (sd**2 + sde.marginal_std(1.0) ** 2))
    center, width = mean * (1 - shrink), sde.marginal_std(1.0) * shrink  # where the ODE takes the prior
    inside = (erf((high - center) / width / math.sqrt(2)) - erf((low - center) / width / math.sqrt(2))) / 2
    assert (2.0**-bits).sum() / times == pytest.approx(inside, abs=0.003)


def test_bits_are_the_likelihood_of_the_dequantised_image_and_do_not_depend_on_the_batch(numpy_backend):
    sde, images = VESDE(25.0), np.random.default_rng(0).integers(0, 256, (7, 2, 2), np.uint8)
    score, progress, rng = gaussian_score(0.5, 0.1, sde), [], Rng(5)
    bits = bits_per_dimension(score, images, sde, rng, probes=2, microbatch=3, progress=lambda *a: progress.append(a))
    source = Rng(5)
    x = (images + source.uniform(images.shape)) / 256
    nats = log_likelihood(score, x.astype(np.float32), sde, source, probes=2)
    np.testing.assert_allclose(bits, -nats / (4 * math.log(2)) + 8, atol=1e-4)
    assert rng.step == source.step  # a second call goes on
    assert [a[:2] for a in progress] == [(3, 7), (6, 7), (7, 7)] and progress[-1][2] == average(bits)
    for options in ({"microbatch": 7}, {"microbatch": 1, "threads": 1}):
        again = bits_per_dimension(score, images, sde, Rng(5), probes=2, **options)
        np.testing.assert_allclose(again, bits, atol=1e-5)


@pytest.mark.parametrize("change", [{"eps": 0.05}, {"rtol": 0.02}, {"atol": 0.03}], ids=str)
def test_bits_are_by_the_eps_and_the_tolerances_asked_for(numpy_backend, change):
    sde, images = VESDE(25.0), np.random.default_rng(0).integers(0, 256, (3, 2, 2), np.uint8)
    score, options = gaussian_score(0.5, 0.1, sde), {"eps": 1e-3, "rtol": 1e-3, "atol": 1e-3}
    bits, other = (bits_per_dimension(score, images, sde, 5, **o) for o in (options | change, options))
    source = Rng(5)
    x = (images + source.uniform(images.shape)) / 256
    nats = log_likelihood(score, x.astype(np.float32), sde, source, **options | change)
    np.testing.assert_allclose(bits, -nats / (4 * math.log(2)) + 8, atol=1e-5)
    assert abs(bits - other).max() > 1e-4


def test_a_condition_goes_with_its_image(numpy_backend):
    sde, images = VESDE(25.0), np.full((4, 2), 128, np.uint8)

    def score(x, t, *, shift):
        return gaussian_score(array_of(shift).reshape((-1, 1)), 0.1, sde)(x, t)

    shift = np.array([0.5, 0.5, 2.0, 0.5], np.float32)
    bits = bits_per_dimension(score, images, sde, 0, microbatch=2, shift=shift)[:, 0]
    assert bits[2] > 5 + bits[[0, 1, 3]].max()


def test_a_denoiser_has_a_likelihood(numpy_backend):
    """F = 0: the denoiser of N(0, sd^2), for which the closed form is that of independent normals."""

    class Zero:
        def __call__(self, x, noise):
            return x * 0.0

    sde, sd = KarrasSDE(80.0), 0.6
    denoiser = Denoiser(Zero(), sd)
    x = Rng(0).normal((6, 4, 4, 1)) * sd
    found = log_likelihood(score_of(denoiser, sde), x, sde, 1, eps=0.002)
    known = -0.5 * (x**2).sum((1, 2, 3)) / sd**2 - 16 * math.log(sd * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(found[:, 0], known, atol=0.02)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": np.zeros((2, 3), np.uint8)}, TypeError, r"x must be \(N, ...\) of floats, not uint8 of shape \(2, 3\)"),
        ({"probes": 0}, ValueError, "probes must be an integer of 1 or more, not 0"),
        ({"probes": 1.5}, ValueError, "probes must be an integer of 1 or more, not 1.5"),
        ({"eps": 0}, ValueError, r"eps must be a number in \(0, 1.0\), not 0"),
        ({"rtol": float("nan")}, ValueError, "rtol must be a number .* not nan"),
        ({"atol": -1e-5}, ValueError, "atol must be a number .* not -1e-05"),
        ({"sample_offset": 1.5}, ValueError, "sample_offset must be an integer from 0 to 1099511627776, not 1.5"),
        ({"eps": 2.0}, ValueError, r"eps must be a number in \(0, 1.0\), not 2.0"),
        ({"score": lambda x, t: x.sum()}, ValueError, r"the score returned shape \(\) for x of shape \(2, 3\)"),
        ({"score": lambda x, t: array_of(x)}, TypeError, "the score has no gradient"),
        ({"score": no_grad()(lambda x, t: x * 1.0)}, TypeError, "the score has no gradient"),
        ({"score": lambda x, t: x * float("nan")}, RuntimeError, "cannot be met"),
        ({"steps": 2}, RuntimeError, "within 2 rounds: 2 of 2 rows have not arrived"),
    ],
)
def test_bad_arguments_are_quoted(change, error, message):
    arguments = {"score": gaussian_score(0.5, 0.1, VESDE()), "x": np.zeros((2, 3), np.float32)} | change
    with pytest.raises(error, match=message):
        log_likelihood(arguments.pop("score"), arguments.pop("x"), VESDE(), 0, **arguments)


@pytest.mark.parametrize(
    "images, options, error, message",
    [
        (np.zeros((2, 3), np.float32), {}, TypeError, "images must be of bytes, uint8, not float32"),
        (np.zeros((0, 3), np.uint8), {}, ValueError, r"and not none, not \(0, 3\)"),
        (np.zeros(3, np.uint8), {}, ValueError, r"images must be \(N, ...\), .* not \(3,\)"),
        (np.zeros((2, 3), np.uint8), {"low": float("nan")}, ValueError, "low must be a number .* not nan"),
        (np.zeros((2, 3), np.uint8), {"high": None}, ValueError, "high must be a number .* not None"),
        (np.zeros((2, 3), np.uint8), {"probes": 1.5}, ValueError, "probes must be an integer .* not 1.5"),
        (np.zeros((2, 3), np.uint8), {"microbatch": 1.5}, ValueError, "microbatch must be an integer .* not 1.5"),
        (np.zeros((2, 3), np.uint8), {"low": 1.0}, ValueError, "low must be less than high, not 1.0 and 1.0"),
        (
            np.zeros((2, 3), np.uint8),
            {"microbatch": 0},
            ValueError,
            "microbatch must be an integer of 1 or more, not 0",
        ),
    ],
)
def test_bad_images_are_quoted(images, options, error, message):
    with pytest.raises(error, match=message):
        bits_per_dimension(gaussian_score(0.5, 0.1, VESDE()), images, VESDE(), 0, **options)


def test_it_works_under_no_grad_and_touches_no_gradient(numpy_backend):
    weight = Tensor(np.float32([[1.0]]), requires_grad=True)
    score = Counted(lambda x, t: x * weight * -0.1)
    with no_grad():
        log_likelihood(score, np.ones((2, 1), np.float32), VESDE(), 0)
    assert weight.grad is None and score.nfe > 6


def test_no_images_have_no_likelihood_and_are_no_error(each_backend):
    x = backend.to_device(np.zeros((0, 3), np.float32))
    for options, columns in (({"probes": 2}, 2), ({"exact": True}, 1)):
        assert log_likelihood(gaussian_score(0.5, 0.1, VESDE()), x, VESDE(), 0, **options).shape == (0, columns)


def test_conditions_are_cut_as_in_sampling(numpy_backend):
    seen = []

    def score(x, t, *, digit, scale):
        seen.append((len(x), list(digit), scale))
        return x * -0.1

    images = np.zeros((3, 2), np.uint8)
    options = {"rtol": 1e-3, "atol": 1e-3, "eps": 0.01, "microbatch": 2, "threads": 1}
    bits_per_dimension(score, images, VESDE(), 0, digit=[4, 5, 6], scale=2, **options)
    assert {(n, tuple(digits), scale) for n, digits, scale in seen} == {(2, (4, 5), 2), (1, (6,), 2)}
