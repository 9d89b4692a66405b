"""Walks of numbers against exact laws, by Kolmogorov and Smirnov: seeds fixed, thresholds stated, each shown to fail.

A distance beyond the threshold has probability 0.001 for samples of the very law, 0.0276 for the 5000 of most tests.
"""

import math

import kolmogorov
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, Brownian
from tinydiff.diffusion.exact import Exact, forward_diffusion_1d, point_mass, reverse_diffusion_1d

N = 5000
MIXTURE = GaussianMixture([0.3, 0.7], [-3.0, 2.0], [0.25, 0.49])


def constant(sigma):
    return lambda t: sigma


def zeros(n):
    return backend.to_device(np.zeros(n, np.float32))


def fits(x, exact, t):
    return kolmogorov.distance(x, lambda x: exact.cdf(x, t)) < kolmogorov.threshold(len(x))


# ---------------------------------------------------------------- forward


@pytest.mark.parametrize("steps", [1, 100])
def test_forward_from_a_point(each_backend, steps):
    """The tutorial's demonstration, and with another strength; the law is exact at any number of steps."""
    for sigma in (1.0, 0.3):
        exact = Exact(point_mass(0.0), Brownian(sigma, t_max=10.0))
        times, x = forward_diffusion_1d(zeros(N), constant(sigma), t_max=10.0, steps=steps, rng=1)
        assert x.shape == (steps + 1, N) and str(x.dtype) == "float32"
        assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 10
        assert fits(x[-1], exact, 10.0)
        assert fits(x[(steps + 1) // 2], exact, times[(steps + 1) // 2])
        assert not fits(x[-1] * math.sqrt(10 / steps), exact, 10.0)  # dt in place of its root
        assert not fits(x[-1] * 1.2, exact, 10.0)


def test_forward_from_a_mixture_with_a_growing_strength(each_backend):
    """sigma(t) = 25^t in 500 steps, whose sum of sigma^2 dt is 0.6 % below the integral: a distance of 0.0007."""
    sde = VESDE(25.0)
    exact = Exact(MIXTURE, sde)
    times, x = forward_diffusion_1d(exact.mixture.sample(N, Rng(2)), sde.diffusion, t_max=1.0, steps=500, rng=3)
    for step in (0, 50, 250, 500):
        assert times[step] == pytest.approx(step / 500)
        assert fits(x[step], exact, times[step])
    assert not fits(x[400], exact, 1.0) and not fits(x[500], exact, 0.9)


def test_the_variance_is_the_sum_of_squares_to_the_last_digit(each_backend):
    """With the same noise r at every step, x grows by exactly sigma(t) sqrt(dt) r."""
    _, x = forward_diffusion_1d(zeros(3), lambda t: 1 + t, t_max=0.8, steps=4, rng=7)
    rng, by_hand = Rng(7), np.zeros(3)
    for t in (0.0, 0.2, 0.4, 0.6):
        by_hand = by_hand + (1 + t) * math.sqrt(0.2) * backend.to_host(rng.normal(3))
    np.testing.assert_allclose(backend.to_host(x[-1]), by_hand, rtol=1e-5)


# ---------------------------------------------------------------- reverse


@pytest.mark.parametrize("steps", [1, 100])
def test_reverse_to_a_point(each_backend, steps):
    """The last step is at t = dt, where sigma^2 score dt leads to the point itself, and its noise stays: the law of
    the algorithm is N(x0, sigma^2 dt) at any number of steps.
    """
    for sigma in (1.0, 0.3):
        sde = Brownian(sigma, t_max=10.0)
        exact = Exact(point_mass(0.7), sde)
        start = exact.sample(N, 10.0, Rng(4))
        times, x = reverse_diffusion_1d(start, constant(sigma), exact.score, t_max=10.0, steps=steps, rng=5)
        assert x.shape == (steps + 1, N) and times[0] == 10 and times[-1] == 0
        assert fits(x[-1], exact, 10.0 / steps)
        assert not fits(x[-1] + 0.1 * sigma * math.sqrt(10 / steps), exact, 10.0 / steps)


@pytest.mark.parametrize("sde", [Brownian(1.0, t_max=10.0), VESDE(25.0)], ids=repr)
def test_reverse_to_a_mixture(numpy_backend, sde):
    """From the exact law at the end back to the data, through the laws between; 500 steps."""
    exact, end = Exact(MIXTURE, sde), sde.t_max
    start = exact.sample(N, end, Rng(6))
    times, x = reverse_diffusion_1d(start, sde.diffusion, exact.score, t_max=end, steps=500, rng=7)
    for step in (0, 250, 450, 500):
        assert fits(x[step], exact, times[step])
    assert not fits(x[450], exact, 0.0)


@pytest.mark.parametrize(
    ("strength", "score"),
    [
        (lambda t: 1.2, lambda exact: exact.score),
        (lambda t: 1.0, lambda exact: lambda x, t: exact.score(x, t) * 0.7),
        (lambda t: 1.0, lambda exact: lambda x, t: -exact.score(x, t)),
        (lambda t: 1.0, lambda exact: lambda x, t: exact.score(x, 10.0 - t + 0.01)),  # the clock of the reverse run
    ],
    ids=["too much noise", "score too small", "sign", "clock"],
)
def test_the_test_of_the_reverse_run_can_fail(numpy_backend, strength, score):
    exact = Exact(MIXTURE, Brownian(1.0, t_max=10.5))
    start = exact.sample(N, 10.0, Rng(6))
    _, x = reverse_diffusion_1d(start, strength, score(exact), t_max=10.0, steps=500, rng=7)
    assert not fits(x[-1], exact, 0.0)


# ---------------------------------------------------------------- the contract


def test_a_path_is_the_same_alone_and_in_a_batch(each_backend):
    exact = Exact(MIXTURE, Brownian(1.0, t_max=2.0))
    start = exact.sample(6, 2.0, Rng(0))
    for run in (
        lambda x, offset: forward_diffusion_1d(x, constant(1.0), t_max=2.0, steps=5, rng=1, sample_offset=offset)[1],
        lambda x, offset: reverse_diffusion_1d(
            x, constant(1.0), exact.score, t_max=2.0, steps=5, rng=1, sample_offset=offset
        )[1],
    ):
        np.testing.assert_array_equal(backend.to_host(run(start, 0))[:, 4:5], backend.to_host(run(start[4:5], 4)))


def test_float64_stays_and_tensors_are_taken(each_backend):
    x0 = Tensor(backend.to_device(np.zeros(3)))
    assert str(forward_diffusion_1d(x0, constant(1.0), t_max=1.0, steps=2, rng=0)[1].dtype) == "float64"
    _, x = reverse_diffusion_1d(x0, constant(1.0), lambda x, t: Tensor(x), t_max=1.0, steps=2, rng=0)
    assert str(x.dtype) == "float64"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 1))}, ValueError, r"takes x \(N,\), not \(2, 1\)"),
        ({"x": np.zeros(2, int)}, TypeError, r"of floats, not int64 of shape \(2,\)"),
        ({"steps": 0}, ValueError, "steps must be an integer of 1 or more, not 0"),
        ({"steps": 2.5}, ValueError, "not 2.5"),
        ({"t_max": 0}, ValueError, r"t_max must be a number in \(0, inf\), not 0"),
        ({"t_max": math.inf}, ValueError, "not inf"),
        ({"noise_strength": lambda t: -1.0 if t == 0.5 else 1.0}, ValueError, "at t = 0.5 it is -1.0"),
        ({"noise_strength": lambda t: math.nan}, ValueError, "it is nan"),
        ({"score": lambda x, t: x[:1]}, ValueError, r"the score returned shape \(1,\) for x of shape \(2,\)"),
    ],
)
def test_bad_arguments_are_quoted(change, error, message):
    given = {"x": np.zeros(2), "noise_strength": constant(1.0), "score": lambda x, t: x, "t_max": 1.0, "steps": 2}
    given |= change
    x, strength, score = given.pop("x"), given.pop("noise_strength"), given.pop("score")
    with pytest.raises(error, match=message):
        reverse_diffusion_1d(x, strength, score, rng=0, **given)
    if "score" not in change:
        with pytest.raises(error, match=message):
            forward_diffusion_1d(x, strength, rng=0, **given)
