"""Euler-Maruyama against exact laws. Thresholds are stated, seeds are fixed, and each test is shown to fail for the
mistakes of the lineage: g in place of s, no denoising at the end."""

import math

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, grad_enabled, ops
from tinydiff.diffusion import VESDE, euler_maruyama
from tinydiff.diffusion.sde import per_sample

SDE = VESDE(25.0)


def gaussian_score(mean, variance, sde=SDE):
    return lambda x, t: -(x - mean) / (per_sample(sde.marginal_std(t), x) ** 2 + variance)


def law_of_euler_maruyama(mean, variance, steps, eps):
    """Mean and variance that the algorithm must give for Gaussian data:
    every step is linear, so both follow by hand.
    """
    h = (1 - eps) / steps
    mu, var = 0.0, SDE.marginal_std(1.0) ** 2
    for k in range(steps):
        t = 1 - k * h
        g2, total = SDE.diffusion(t) ** 2, variance + SDE.marginal_std(t) ** 2
        shrink = 1 - g2 * h / total
        mu, var = mean + (mu - mean) * shrink, var * shrink**2 + g2 * h
    keep = variance / (variance + SDE.marginal_std(eps) ** 2)  # the denoising step
    return mean + (mu - mean) * keep, var * keep**2


@pytest.mark.parametrize("steps, eps", [(1, 0.5), (10, 0.1), (40, 1e-3), (200, 1e-3)])
def test_gaussian_data_follow_the_law_of_the_algorithm(each_backend, steps, eps):
    """Within five standard errors of 20,000 samples, at any number of steps: no error of discretisation is excused."""
    n, mean, variance = 20_000, 0.5, 0.25
    x = backend.to_host(euler_maruyama(gaussian_score(mean, variance), (n, 1), SDE, 0, steps=steps, eps=eps))
    mu, var = law_of_euler_maruyama(mean, variance, steps, eps)
    assert x.dtype == np.float32 and x.shape == (n, 1)
    assert x.mean() == pytest.approx(mu, abs=5 * math.sqrt(var / n))
    assert x.var() == pytest.approx(var, rel=5 * math.sqrt(2 / n))


def test_the_law_of_the_algorithm_approaches_the_data():
    """At 500 steps its mean is 0.5 within 0.005, its variance 0.25 within 1 %; the error falls with the step."""
    mu, var = law_of_euler_maruyama(0.5, 0.25, 500, 1e-3)
    assert mu == pytest.approx(0.5, abs=0.005) and var == pytest.approx(0.25, rel=0.01)
    errors = [abs(law_of_euler_maruyama(0.5, 0.25, n, 1e-5)[1] - 0.25) for n in (500, 1000, 2000)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_the_last_step_denoises(each_backend):
    """At eps = 0.1 noise of variance 0.14 is left;
    without the denoising step the variance would be 0.39 and not 0.16.
    """
    n, eps, last = 20_000, 0.1, {}
    score = gaussian_score(0.5, 0.25)
    x = euler_maruyama(
        score, (n, 1), SDE, 1, steps=500, eps=eps, callback=lambda *a: last.update(x=a[2], denoised=a[3])
    )
    s2 = SDE.marginal_std(eps) ** 2
    assert backend.to_host(last["x"]).var() == pytest.approx(0.25 + s2, rel=0.04)
    assert backend.to_host(x).var() == pytest.approx(0.25**2 / (0.25 + s2), rel=0.04)
    np.testing.assert_array_equal(backend.to_host(last["denoised"]), backend.to_host(x))


# ---------------------------------------------------------------- a mixture, by the test of Kolmogorov and Smirnov

WEIGHTS, MEANS, DEVIATIONS = [0.3, 0.7], [-2.0, 1.0], [0.4, 0.3]
N = 4000
THRESHOLD = 1.95 * math.sqrt(2 / N)  # a distance beyond it has probability 0.001 if both samples are of one law


def mixture_score(std):
    """The exact score of the mixture under noise of standard deviation std(t)."""

    def score(x, t):
        w, mu, sd = (backend.to_device(np.array(a, np.float32)) for a in (WEIGHTS, MEANS, DEVIATIONS))
        s = std(t).reshape((-1, 1))
        var = sd * sd + s * s  # (N, 2)
        shift = mu - x  # (N, 1) -> (N, 2)
        which = ops.softmax(ops.log(w) - ops.log(var) / 2 - shift * shift / (2 * var), axis=1)  # (N, 2)
        return (which * shift / var).sum(axis=1, keepdims=True)  # (N, 1)

    return score


def mixture_samples():
    which = np.digitize(np.asarray(backend.to_host(Rng(77).uniform(N))), np.cumsum(WEIGHTS)[:-1])
    return np.array(MEANS)[which] + np.array(DEVIATIONS)[which] * backend.to_host(Rng(78).normal(N))


def distance(a, b):
    """The largest difference of the two empirical distribution functions."""
    a, b = np.sort(a.ravel()), np.sort(b.ravel())
    at = np.concatenate([a, b])
    return abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    assert distance(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert distance(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert distance(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.5, 2.6])) == 0.5


def test_a_mixture_is_recovered(each_backend):
    x = backend.to_host(euler_maruyama(mixture_score(SDE.marginal_std), (N, 1), SDE, 5, steps=500))
    assert distance(x, mixture_samples()) < THRESHOLD


class Confused(VESDE):
    """Takes s(t) for g(t), as the tutorial's text does."""

    def diffusion(self, t):
        return self.marginal_std(t)


@pytest.mark.parametrize(
    "score, sde",
    [
        (mixture_score(SDE.diffusion), SDE),  # g in place of s in the score
        (mixture_score(SDE.marginal_std), Confused(25.0)),  # s in place of g in the sampler
        (lambda x, t: mixture_score(SDE.marginal_std)(x, t) * 0.6, SDE),
        (lambda x, t: mixture_score(SDE.marginal_std)(x, t) * 1.5, SDE),
    ],
    ids=["g for s", "s for g", "score too small", "score too large"],
)
def test_the_test_can_fail(numpy_backend, score, sde):
    x = backend.to_host(euler_maruyama(score, (N, 1), sde, 5, steps=500))
    assert not distance(x, mixture_samples()) < THRESHOLD  # NaN is a failure too


# ---------------------------------------------------------------- the contract


def test_a_sample_is_the_same_alone_and_in_any_batch(each_backend):
    score = gaussian_score(0.2, 0.1)

    def run(n, first=0):
        return backend.to_host(euler_maruyama(score, (n, 4, 4, 1), SDE, 11, steps=7, first=first))

    many = run(6)
    np.testing.assert_array_equal(run(1, first=4), many[4:5])
    np.testing.assert_array_equal(run(3), many[:3])
    assert len({row.tobytes() for row in many}) == 6


def test_an_rng_goes_on_and_a_seed_repeats():
    score, rng = gaussian_score(0.2, 0.1), Rng(3)
    first, second, again = (backend.to_host(euler_maruyama(score, (2, 3), SDE, r, steps=2)) for r in (rng, rng, 3))
    assert (first != second).all()
    np.testing.assert_array_equal(again, first)


def test_the_callback_sees_every_grid_point():
    seen = []
    x = euler_maruyama(gaussian_score(0.2, 0.1), (2, 3), SDE, 0, steps=4, eps=0.2, callback=lambda *a: seen.append(a))
    assert [a[0] for a in seen] == [0, 1, 2, 3, 4]
    assert [a[1] for a in seen] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2]) and seen[-1][1] == 0.2
    assert all(a[2].shape == a[3].shape == (2, 3) for a in seen)
    np.testing.assert_array_equal(backend.to_host(seen[-1][3]), backend.to_host(x))
    np.testing.assert_array_equal(backend.to_host(seen[0][2]), backend.to_host(SDE.prior((2, 3), 0)))


def test_the_score_gets_tensors_a_time_a_sample_and_the_condition():
    calls = []

    def score(x, t, *, label):
        assert isinstance(x, Tensor) and isinstance(t, Tensor) and t.shape == (2,) and str(t.dtype) == "float32"
        assert label == "seven" and not grad_enabled()
        calls.append(t.numpy())
        return x * 0.0

    euler_maruyama(score, (2, 3), SDE, 0, steps=5, label="seven")
    assert len(calls) == 6 and all(t[0] == t[1] for t in calls)
    assert grad_enabled()


def test_integers_of_numpy_are_integers():
    shape, steps = (np.int64(2), np.uint8(3)), np.int32(2)
    assert euler_maruyama(gaussian_score(0, 1), shape, SDE, 0, steps=steps).shape == (2, 3)


def test_no_samples_are_no_error():
    assert euler_maruyama(gaussian_score(0, 1), (0, 3), SDE, 0, steps=2).shape == (0, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps must be an integer of 1 or more, not 0"),
        ({"steps": 2.5}, "steps must be .* not 2.5"),
        ({"eps": 0}, "eps must be between 0 and 1, not 0"),
        ({"eps": 1.0}, "eps must be between 0 and 1, not 1.0"),
        ({"shape": (-1, 3)}, r"shape must be .* not \(-1, 3\)"),
        ({"shape": ()}, r"shape must be .* not \(\)"),
        ({"shape": (2.0, 3)}, r"shape must be .* not \(2.0, 3\)"),
        ({"score": lambda x, t: x.sum()}, r"the score returned shape \(\) for x of shape \(2, 3\)"),
    ],
)
def test_bad_arguments_are_quoted(change, message):
    arguments = {"score": gaussian_score(0, 1), "shape": (2, 3), "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        euler_maruyama(arguments.pop("score"), arguments.pop("shape"), SDE, 0, **arguments)
