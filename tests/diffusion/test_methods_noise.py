"""The methods that add noise: against the exact law of each on Gaussian data, where every step is linear; against the
algorithms as written in their papers, with the same noise; and on a mixture by the Kolmogorov-Smirnov test."""

import math

import numpy as np
import pytest
from kolmogorov import threshold
from mixtures import SPEC, constant_vp, gaussian_score

from tinydiff import Rng, backend
from tinydiff.diffusion import (
    VESDE,
    VPSDE,
    ddim,
    ddpm,
    euler_maruyama,
    heun,
    predictor_corrector,
    sample,
    uniform_times,
)

SDE = VESDE(25.0)
PROCESSES = pytest.mark.parametrize("sde", [SDE, constant_vp(6.0)], ids=["VE", "VP"])
MEAN, VARIANCE, N = 0.5, 0.25, 20_000


def law(method, sde, steps, eps):
    """Mean and variance that the algorithm must give for Gaussian data: a step is x <- a x + b + c z, with a, b, c
    written down from its paper."""
    mu, var = 0.0, 1.0 if isinstance(sde, VPSDE) else sde.marginal_std(1.0) ** 2

    def move(a, b, c2):
        nonlocal mu, var
        mu, var = a * mu + b, a * a * var + c2

    times = uniform_times(sde, steps, 1.0, eps)
    for t, u in zip(times, times[1:]):
        m, s2 = sde.marginal_scale(t), sde.marginal_std(t) ** 2
        total = m * m * VARIANCE + s2  # the score is -(x - m mean) / total
        if method is ddpm:
            # q(x_u | x_t, x_0) has the mean  r s_u^2 / s_t^2 x_t + m_u k x_0  and the variance  s_u^2 k,
            # k = 1 - r^2 s_u^2 / s_t^2,  r = m_t / m_u;  and x_0 is  mean + m variance / total (x_t - m mean)
            m_u, s2_u = sde.marginal_scale(u), sde.marginal_std(u) ** 2
            r, gain = m / m_u, m * VARIANCE / total
            k = 1 - r * r * s2_u / s2
            move(r * s2_u / s2 + m_u * k * gain, m_u * k * MEAN * (1 - gain * m), s2_u * k)
            continue
        if method is predictor_corrector:
            e = 2 * 0.16**2 * s2
            move(1 - e / total, e * m * MEAN / total, 2 * e)
        g2h = sde.diffusion(t) ** 2 * (t - u)
        move(1 - sde.drift(1.0, t) * (t - u) - g2h / total, g2h * m * MEAN / total, g2h)
    m, s2 = sde.marginal_scale(eps), sde.marginal_std(eps) ** 2
    gain = m * VARIANCE / (m * m * VARIANCE + s2)
    move(gain, MEAN * (1 - gain * m), 0)
    return mu, var


@PROCESSES
@pytest.mark.parametrize("steps, eps", [(1, 0.5), (10, 0.1), (60, 1e-3)])
@pytest.mark.parametrize("method", [euler_maruyama, predictor_corrector, ddpm], ids=repr)
def test_gaussian_data_follow_the_law_of_the_algorithm(each_backend, method, sde, steps, eps):
    """Within five standard errors of 20,000 samples, at any number of steps: no error of discretisation is excused."""
    x = sample(gaussian_score(MEAN, VARIANCE, sde), (N, 1), sde, 0, method=method, steps=steps, eps=eps)
    x = backend.to_host(x)
    mu, var = law(method, sde, steps, eps)
    assert x.mean() == pytest.approx(mu, abs=5 * math.sqrt(var / N))
    assert x.var() == pytest.approx(var, rel=5 * math.sqrt(2 / N))


@PROCESSES
@pytest.mark.parametrize("method", [euler_maruyama, ddpm], ids=repr)
def test_the_law_of_the_algorithm_approaches_the_data(method, sde):
    """The error falls with the step, to 3 % of the variance at 4,000 (the smaller of DDPM's variances is too small by
    1/n; at 500 steps of VP that is 11 %)."""
    errors = [abs(law(method, sde, n, 1e-5)[1] - VARIANCE) for n in (1000, 2000, 4000)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)
    assert law(method, sde, 4000, 1e-5) == (pytest.approx(MEAN, abs=2e-3), pytest.approx(VARIANCE, rel=0.03))


@PROCESSES
def test_langevin_adds_little(sde):
    """At most snr^2 = 2.6 % to the variance of x at its time, which does not fall with the step; at the end of VE and
    VP, where there is more data than noise, it is hardly seen."""
    assert law(predictor_corrector, sde, 2000, 1e-5) == (
        pytest.approx(MEAN, abs=1e-3),
        pytest.approx(VARIANCE, rel=0.01),
    )


# ---------------------------------------------------------------- a mixture

CASES = {
    "euler_maruyama": (euler_maruyama, {"steps": 500}),
    "predictor_corrector": (predictor_corrector, {"steps": 300}),
    "ddpm": (ddpm, {"steps": 500}),
    "ddim, eta 0.5": (ddim(eta=0.5), {"steps": 200}),
    "heun, churn 40": (heun(s_churn=40, s_noise=1.0, s_tmin=0.0), {"steps": 100}),
}
SAMPLES = 4000


@pytest.mark.parametrize("case", CASES)
def test_a_mixture_is_recovered(numpy_backend, case):
    """4,000 samples of seed 5; the threshold, 0.031, is passed by chance once in a thousand seeds."""
    method, options = CASES[case]
    x = backend.to_host(sample(SPEC.score(SDE), (SAMPLES, 1), SDE, 5, method=method, **options))
    assert SPEC.distance(x) < threshold(SAMPLES)


def test_the_distance_is_that_of_kolmogorov_and_smirnov():
    middle = SPEC.quantile(np.array([0.5]))
    assert SPEC.distance(middle) == pytest.approx(0.5)
    assert SPEC.distance(SPEC.quantile((np.arange(100) + 0.5) / 100)) == pytest.approx(0.005)
    assert SPEC.distance(SPEC.samples(SAMPLES, 7)) < threshold(SAMPLES) < SPEC.distance(SPEC.samples(SAMPLES, 7) * 1.1)


class Confused(VESDE):
    """Takes s(t) for g(t), as the tutorial's text does."""

    def diffusion(self, t):
        return self.marginal_std(t)


@pytest.mark.parametrize(
    "method, score, sde, options",
    [
        (euler_maruyama, SPEC.score(SDE, std=SDE.diffusion), SDE, {}),  # g in place of s in the score
        (euler_maruyama, SPEC.score(SDE), Confused(25.0), {}),  # s in place of g in the method
        (euler_maruyama, lambda x, t: SPEC.score(SDE)(x, t) * 0.6, SDE, {}),
        (euler_maruyama, lambda x, t: SPEC.score(SDE)(x, t) * 1.5, SDE, {}),
        (predictor_corrector(snr=0.9), SPEC.score(SDE), SDE, {}),  # Langevin's steps must be small
        (ddpm, lambda x, t: SPEC.score(SDE)(x, t) * 0.6, SDE, {}),
        (ddpm, SPEC.score(SDE), SDE, {"steps": 5}),
        (heun(s_churn=40, s_noise=1.2), SPEC.score(SDE), SDE, {"steps": 100}),  # more noise than it asks about
    ],
)
def test_the_test_can_fail(numpy_backend, method, score, sde, options):
    x = sample(score, (SAMPLES, 1), sde, 5, method=method, **{"steps": 300, **options})
    assert not SPEC.distance(x) < threshold(SAMPLES)  # NaN is a failure too


# ---------------------------------------------------------------- the letters of the papers, with the same noise


def test_ddpm_is_algorithm_2_of_ho_et_al(numpy_backend):
    """In their letters: a and b of a step, A the product of all a, e = -sqrt(1 - A) score, the variance b~."""
    sde, steps = constant_vp(), 9
    score = gaussian_score(0.7, 0.25, sde)
    x, noise = Rng(3).normal((4, 2), "float64"), Rng(8)
    got = sample(score, (4, 2), sde, Rng(8), method="ddpm", steps=steps, eps=0.01, start=(x, 1.0))
    times = np.linspace(1.0, 0.01, steps + 1)
    A = np.exp(-sde.schedule.low * times)
    for i in range(steps):
        a = A[i] / A[i + 1]
        b = 1 - a
        e = -math.sqrt(1 - A[i]) * score(x, np.full(4, times[i]))
        mean = (x - b / math.sqrt(1 - A[i]) * e) / math.sqrt(a)
        x = mean + math.sqrt((1 - A[i + 1]) / (1 - A[i]) * b) * noise.normal((4, 2), "float64")
    x = (x + (1 - A[-1]) * score(x, np.full(4, times[-1]))) / math.sqrt(A[-1])
    np.testing.assert_allclose(got, x, rtol=1e-10)


def test_heun_is_algorithm_2_of_karras_et_al(numpy_backend):
    """In their letters: N levels t_i and t_N = 0, S_churn, S_tmin, S_tmax, S_noise. Here it runs on VE, where the level
    s(t) is another number than the time t."""
    steps, S_churn, S_tmin, S_tmax, S_noise = 12, 4.0, 0.2, 5.0, 1.05
    score, (mean, variance) = gaussian_score(0.7, 0.25, SDE), (0.7, 0.25)
    noise, eps = Rng(8), 1e-3
    x = Rng(3).normal((4, 2), "float64") * SDE.marginal_std(1.0)
    method = heun(s_churn=S_churn, s_tmin=S_tmin, s_tmax=S_tmax, s_noise=S_noise)
    got = sample(score, (4, 2), SDE, Rng(8), method=method, steps=steps, eps=eps, start=(x, 1.0))

    def D(x, t):
        return (variance * x + t * t * mean) / (variance + t * t)

    N = steps + 1
    top, bottom = SDE.marginal_std(1.0) ** (1 / 7), SDE.marginal_std(eps) ** (1 / 7)
    t = [(top + i / (N - 1) * (bottom - top)) ** 7 for i in range(N)] + [0.0]
    for i in range(N):
        gamma = min(S_churn / N, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0.0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * noise.normal((4, 2), "float64")
        d = (x - D(x, t_hat)) / t_hat
        after = x + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            after = x + (t[i + 1] - t_hat) * (d + (after - D(after, t[i + 1])) / t[i + 1]) / 2
        x = after
    np.testing.assert_allclose(got, x, rtol=1e-9)
    assert noise.step > 3  # some steps had churn, and not all
    assert noise.step < N


def test_churn_never_asks_for_more_noise_than_the_prior_has(each_backend):
    times = []

    def score(x, t):
        times.append(backend.to_host(t.data).max())
        return gaussian_score(0.5, 0.25, SDE)(x, t)

    sample(score, (3, 2), SDE, 0, method=heun(s_churn=100), steps=5)
    assert max(times) == 1.0 and sum(t == 1.0 for t in times) >= 1


@pytest.mark.parametrize("snr", [0, -0.16, float("nan"), float("inf")])
def test_a_bad_snr_is_quoted(snr):
    with pytest.raises(ValueError, match=rf"snr must be a number in \(0, inf\), not {snr}"):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method=predictor_corrector(snr=snr))
