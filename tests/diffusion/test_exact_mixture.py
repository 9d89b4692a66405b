"""Gaussian mixtures against NumPy written out, quadrature and differences; the test of Kolmogorov against itself."""

import math

import kolmogorov
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, grad, gradcheck, tensor
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import VESDE, VPSDE, Brownian
from tinydiff.diffusion.exact import Exact, point_mass

ONE = GaussianMixture([0.3, 0.5, 0.2], [-2.0, 0.5, 3.0], [0.16, 0.09, 0.36])
COVARIANCES = np.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.5], [0.5, 1.0]]])
TWO = GaussianMixture([0.4, 0.6], [[0, 1], [2, -1]], COVARIANCES)
# In the plane the matrix of the directions may be symmetric, which hides a transpose.
THREE = GaussianMixture([1.0], [[0.5, 0.0, -1.0]], [[[2.0, 0.7, 0.3], [0.7, 1.0, -0.4], [0.3, -0.4, 1.5]]])


def density(mixture, covariances, x, m=1.0, s=0.0):
    """The formula of the book, by matrices, one point at a time."""
    total = 0.0
    for w, mu, cov in zip(mixture.weights, mixture.means, covariances):
        cov = m * m * cov + s * s * np.eye(len(mu))
        y = x - m * mu
        total += w * math.exp(-y @ np.linalg.solve(cov, y) / 2) / math.sqrt(np.linalg.det(2 * math.pi * cov))
    return total


def points(*shape):
    return np.random.default_rng(0).normal(size=shape) * 2


@pytest.mark.parametrize(("m", "s"), [(1.0, 0.0), (0.3, 0.8), (1.0, 9.8)])
def test_density_of_vectors_and_numbers(each_backend, m, s):
    x = points(7, 2)
    got = backend.to_host(TWO.density(backend.to_device(x), scale=m, std=s))
    np.testing.assert_allclose(got, [density(TWO, COVARIANCES, p, m, s) for p in x], rtol=1e-12)
    got = backend.to_host(ONE.density(backend.to_device(x[:, 0]), scale=m, std=s))
    variances = np.array([0.16, 0.09, 0.36]).reshape(3, 1, 1)
    np.testing.assert_allclose(got, [density(ONE, variances, p, m, s) for p in x[:, :1]], rtol=1e-12)


def test_scale_and_std_may_be_one_a_sample(each_backend):
    x, m, s = points(5, 2), np.linspace(0.2, 1, 5), np.linspace(0.1, 3, 5)
    for f in (TWO.score, TWO.log_density):
        got = backend.to_host(f(*map(backend.to_device, [x]), scale=backend.to_device(m), std=backend.to_device(s)))
        one = [f(backend.to_device(x[i : i + 1]), scale=float(m[i]), std=float(s[i])) for i in range(5)]
        np.testing.assert_allclose(got, np.concatenate([backend.to_host(a) for a in one]), rtol=1e-12)


@pytest.mark.parametrize("mixture", [ONE, TWO, THREE], ids=["numbers", "plane", "space"])
def test_the_score_is_the_gradient_of_the_logarithm_of_the_density(each_backend, mixture):
    x = tensor(points(6, len(mixture.means[0])), "float64", requires_grad=True)
    (gradient,) = grad(mixture.log_density(x, scale=0.7, std=0.4).sum(), x)
    np.testing.assert_allclose(mixture.score(x.detach(), scale=0.7, std=0.4).numpy(), gradient.numpy(), rtol=1e-10)


def test_the_score_itself_can_be_differentiated(each_backend):
    gradcheck(lambda x: TWO.score(x, std=0.5), points(3, 2))


def test_the_distribution_function_is_the_integral_of_the_density(each_backend):
    grid = np.linspace(-12, 4, 40_001)
    p = backend.to_host(ONE.density(backend.to_device(grid), scale=0.5, std=0.6))
    integral = np.concatenate([[0], ((p[1:] + p[:-1]) / 2).cumsum() * (grid[1] - grid[0])])
    got = backend.to_host(ONE.cdf(backend.to_device(grid), scale=0.5, std=0.6))
    np.testing.assert_allclose(got, integral, atol=1e-8)
    assert got[-1] > 0.99


@pytest.mark.parametrize(("scale", "std"), [(1.0, 0.0), (0.4, 0.7)])
def test_samples_follow_the_law(each_backend, scale, std):
    n = 4000
    x = ONE.sample(n, Rng(1), scale=scale, std=std)
    assert x.shape == (n,) and str(x.dtype) == "float32"
    assert kolmogorov.distance(x, lambda x: ONE.cdf(x, scale=scale, std=std)) < kolmogorov.threshold(n)
    assert kolmogorov.distance(x, lambda x: ONE.cdf(x + 0.15, scale=scale, std=std)) > kolmogorov.threshold(n)


def test_samples_of_vectors_have_mean_and_covariance(each_backend):
    n = 40_000
    x = backend.to_host(TWO.sample(n, Rng(2), scale=0.5, std=0.3)).astype(float)
    mean = 0.5 * TWO.weights @ TWO.means
    second = sum(
        w * (0.25 * (cov + np.outer(mu, mu)) + 0.09 * np.eye(2))
        for w, mu, cov in zip(TWO.weights, TWO.means, COVARIANCES)
    )
    cov = second - np.outer(mean, mean)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * math.sqrt(cov.max() / n))
    np.testing.assert_allclose(np.cov(x.T), cov, atol=5 * 2 * cov.max() / math.sqrt(n))


def test_a_sample_is_the_same_alone_and_in_a_batch(each_backend):
    many, alone = (backend.to_host(TWO.sample(n, Rng(5), std=0.2, sample_offset=f)) for n, f in ((6, 0), (1, 4)))
    np.testing.assert_array_equal(many[4:5], alone)


@pytest.mark.parametrize("sde", [VESDE(25.0), VPSDE(), Brownian(0.5, 2.0)], ids=repr)
def test_exact_is_the_mixture_under_a_process(each_backend, sde):
    exact, t = Exact(ONE, sde), 0.3
    m, s = sde.marginal_scale(t), sde.marginal_std(t)
    x = backend.to_device(points(9))
    for name in ("density", "log_density", "score", "cdf"):
        expected = backend.to_host(getattr(ONE, name)(x, scale=m, std=s))
        np.testing.assert_allclose(backend.to_host(getattr(exact, name)(x, t)), expected)
        times = backend.to_device(np.full(9, t))
        np.testing.assert_allclose(backend.to_host(getattr(exact, name)(x, times)), expected, rtol=1e-6)
        out = getattr(exact, name)(Tensor(x), Tensor(times))
        assert isinstance(out, Tensor)
    np.testing.assert_array_equal(
        backend.to_host(exact.sample(4, t, 3)), backend.to_host(ONE.sample(4, 3, scale=m, std=s))
    )


def test_the_score_of_a_point_mass(each_backend):
    sde = Brownian(2.0, t_max=10.0)
    x = backend.to_device(points(5).astype(np.float32))
    expected = -(backend.to_host(x) - 0.7) / (4 * 2.5)
    np.testing.assert_allclose(backend.to_host(Exact(point_mass(0.7), sde).score(x, 2.5)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="a point mass has no density without noise"):
        point_mass(0.7).density(x)


def test_the_threshold_is_exceeded_as_often_as_it_says():
    """2000 samples of 400 uniforms: the distance exceeds the threshold of 10 % in 10 %, within 5 standard errors."""
    draws = np.random.default_rng(3).uniform(size=(2000, 400))
    often = np.mean([kolmogorov.distance(u, lambda x: x) > kolmogorov.threshold(400, 0.1) for u in draws])
    assert often == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 2000))
    assert kolmogorov.distance([0.5], lambda x: x) == 0.5 and kolmogorov.distance([0.6, 1.0], lambda x: x) == 0.6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture([0.5, 0.6], [0, 1], [1, 1]), r"weights must be .* not \[0.5, 0.6\]"),
        (lambda: GaussianMixture([1.5, -0.5], [0, 1], [1, 1]), r"weights must be .* not \[1.5, -0.5\]"),
        (lambda: GaussianMixture([0.5, 0.5], [0, 1, 2], [1, 1]), r"means must be .* K = 2, not \(3,\)"),
        (lambda: GaussianMixture([1], [[0, 1]], [[1, 2]]), r"covariances must be .* not \(1, 2\)"),
        (lambda: GaussianMixture([1], [[0, 1]], [[[1, 2], [0, 1]]]), "symmetric"),
        (lambda: GaussianMixture([1], [0], [-0.1]), "a variance is negative"),
        (lambda: GaussianMixture([1], [float("nan")], [1]), r"must be finite, not \[.*nan.*\] and \[1.0\]"),
        (lambda: GaussianMixture([1], [0], [float("inf")]), r"must be finite, not \[0.0\] and \[inf\]"),
        (lambda: TWO.density(np.zeros((3, 1))), r"x must be \(N, 2\), not \(3, 1\)"),
        (lambda: ONE.density(np.zeros((3, 2))), r"x must be \(N, 1\) or \(N,\), not \(3, 2\)"),
        (lambda: TWO.cdf(np.zeros((3, 2))), "not for vectors of 2"),
    ],
)
def test_bad_arguments_are_quoted(make, message):
    with pytest.raises(ValueError, match=message):
        make()
