"""The methods that follow the ODE, against its exact solution: in one dimension, F_eps^-1(F_1(x))."""

import math

import numpy as np
import pytest
from mixtures import SPEC, constant_vp, gaussian_score

from tinydiff import Rng, backend
from tinydiff.diffusion import (
    VESDE,
    Counted,
    ddim,
    dpm_solver,
    heun,
    karras_times,
    probability_flow,
    rk45,
    sample,
    uniform_times,
)
from tinydiff.engine import array_of

SDE, EPS = VESDE(25.0), 1e-3
STEPS = (8, 16, 32, 64, 128, 256)
CENTRES = (np.arange(200) + 0.5) / 200
BEGIN = SPEC.quantile(CENTRES, s=SDE.marginal_std(1.0))[:, None]  # (200, 1)
EXACT = SPEC.quantile(CENTRES, s=SDE.marginal_std(EPS))[:, None]

# What a separate program of a few lines gave; docs/samplers.md shows it.
TABLE = {
    "Euler, uniform t": (probability_flow(solver="euler"), 1, (0.881, 0.454, 0.244, 0.134, 0.0747, 0.0364)),
    "Heun, uniform t": (probability_flow(solver="heun"), 2, (7.2e-2, 1.35e-2, 3.17e-3, 7.72e-4, 1.90e-4, 4.72e-5)),
    "Euler = DDIM, rho 7": (ddim, 1, (0.279, 0.152, 0.0835, 0.0441, 0.0195, 9.5e-3)),
    "Heun, rho 7": (heun, 2, (9.2e-2, 1.90e-2, 4.54e-3, 1.11e-3, 2.75e-4, 6.8e-5)),
    "DPM-Solver++(2M), rho 7": (dpm_solver, 2, (9.6e-2, 2.33e-2, 5.39e-3, 1.33e-3, 3.31e-4, 8.2e-5)),
}


def before_the_last_step(method, score, sde, x, begin=1.0, **options):
    """x at t = eps, where the last step would denoise it."""
    seen = {}
    sample(score, x.shape, sde, 0, method=method, start=(backend.to_device(x), begin),
           callback=lambda *a: seen.update(x=a[2]), **options)  # fmt: skip
    return backend.to_host(seen["x"])


def rmse(method, **options):
    x = before_the_last_step(method, SPEC.score(SDE), SDE, BEGIN, eps=EPS, **options)
    assert x.dtype == np.float64
    return math.sqrt(np.mean((x - EXACT) ** 2))


@pytest.mark.parametrize("row", TABLE)
def test_the_error_is_the_published_one_and_falls_with_the_order(numpy_backend, row):
    """Every entry within 1 % of the printed digits; the order, fitted to the last four steps, within 0.2."""
    method, order, published = TABLE[row]
    errors = [rmse(method, steps=n) for n in STEPS]
    print(row, *(f"{error:.3g}" for error in errors), sep=" | ")  # for docs/samplers.md: pytest -rP
    assert errors == pytest.approx(published, rel=0.01)
    fitted = -np.polyfit(np.log2(STEPS[2:]), np.log2(errors[2:]), 1)[0]
    assert fitted == pytest.approx(order, abs=0.2)


# Tolerance: error, and evaluations of all 200 until the last one has arrived; docs/samplers.md shows it.
ADAPTIVE = {
    1e-3: (2.5e-2, 62), 1e-4: (1.3e-3, 68), 1e-5: (3.6e-5, 104), 1e-6: (2.1e-6, 140), 1e-8: (3.7e-8, 296),
    1e-10: (1.2e-10, 602),
}  # fmt: skip


@pytest.mark.parametrize("tolerance", ADAPTIVE)
def test_rk45_is_as_exact_as_its_table_says(numpy_backend, tolerance):
    """The tolerance holds for each step, and the ODE amplifies errors."""
    error, nfe = ADAPTIVE[tolerance]
    score = Counted(SPEC.score(SDE))
    method = rk45(rtol=tolerance, atol=tolerance)
    sample(score, BEGIN.shape, SDE, 0, method=method, start=(backend.to_device(BEGIN), 1.0), eps=EPS)
    found = rmse(method)
    print(f"rk45 to {tolerance:g}: error {found:.2g}, {score.nfe} evaluations")  # for docs/samplers.md: pytest -rP
    assert found == pytest.approx(error, rel=0.05)
    assert score.nfe == pytest.approx(nfe, abs=6)  # a round


def test_rk45_evaluates_six_times_a_round_and_twice():
    score = Counted(gaussian_score(0.5, 0.25, SDE))
    sample(score, (3, 2), SDE, 0, method="rk45")
    assert (score.nfe - 2) % 6 == 0 and score.nfe < 100


@pytest.mark.parametrize("method", [probability_flow, ddim, heun, dpm_solver, rk45], ids=repr)
@pytest.mark.parametrize("sde", [VESDE(25.0), constant_vp()], ids=["VE", "VP"])
def test_any_process_ends_where_the_exact_map_does(each_backend, method, sde):
    """Gaussian data, for which the map is linear, with the scale m(t) that VE does not have. The tolerances are four
    times what the methods reach."""
    mean, variance, x = 0.7, 0.25, backend.to_host(sde.prior((50, 3), 4)).astype(float)

    def moments(t):
        m = sde.marginal_scale(t)
        return m * mean, math.sqrt(m * m * variance + sde.marginal_std(t) ** 2)

    (mu, std), (mu_eps, std_eps) = moments(1.0), moments(EPS)
    exact = mu_eps + (x - mu) * std_eps / std
    steps, tolerance = {ddim: (800, 1e-2), rk45: (1000, 1e-4)}.get(method, (200, 1e-3))
    got = before_the_last_step(method, gaussian_score(mean, variance, sde), sde, x, eps=EPS, steps=steps)
    np.testing.assert_allclose(got, exact, atol=tolerance)


def test_ddim_is_equation_12_of_its_paper(numpy_backend):
    """In the letters of Song, Meng and Ermon: a = m^2, e = -s score; with and without fresh noise."""
    sde, score, steps, eta = constant_vp(), gaussian_score(0.7, 0.25, constant_vp()), 7, 0.6
    x, noise = Rng(3).normal((4, 2), "float64"), Rng(8)
    got = sample(score, (4, 2), sde, Rng(8), method=ddim(eta=eta), steps=steps, eps=0.01, start=(x, 0.9),
                 timesteps=uniform_times)  # fmt: skip
    times = np.linspace(0.9, 0.01, steps + 1)
    for t, after in zip(times, times[1:]):
        a, a_after = (sde.marginal_scale(float(u)) ** 2 for u in (t, after))
        e = -sde.marginal_std(float(t)) * score(x, np.full(4, t))
        c = eta * math.sqrt((1 - a_after) / (1 - a) * (1 - a / a_after))
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        x = math.sqrt(a_after) * x0 + math.sqrt(1 - a_after - c * c) * e + c * noise.normal((4, 2), "float64")
    t = float(times[-1])
    x = (x + sde.marginal_std(t) ** 2 * score(x, np.full(4, t))) / sde.marginal_scale(t)
    np.testing.assert_allclose(got, x, rtol=1e-10)


def test_heun_takes_both_timesteps():
    by_sigma, by_t = (rmse(heun, steps=32, timesteps=g) for g in (karras_times, uniform_times))
    assert by_sigma == pytest.approx(4.54e-3, rel=0.01) and by_t == pytest.approx(4.98e-3, rel=0.01)


# ---------------------------------------------------------------- rk45 says when it cannot


def test_rk45_says_when_its_tolerance_is_out_of_reach_of_float32(numpy_backend):
    with pytest.raises(RuntimeError, match="rtol=1e-12, atol=1e-12 cannot be met from t=1 to 0.001 in float32"):
        sample(SPEC.score(SDE), (5, 1), SDE, 0, method=rk45(rtol=1e-12, atol=1e-12))


def test_rk45_says_when_its_rounds_are_spent():
    score = Counted(SPEC.score(SDE))
    with pytest.raises(RuntimeError, match=r"within 5 rounds: 4 of 4 rows have not arrived, the last is at t=0\.\d+"):
        sample(score, (4, 1), SDE, 0, method="rk45", steps=5)
    assert score.nfe == 31


@pytest.mark.parametrize("stiff, least, most", [(float("nan"), 20, 300), (1e6, 6001, 6001)], ids=["NaN", "stiff"])
def test_rk45_does_not_loop_on_a_hopeless_score(stiff, least, most):
    """A NaN shortens the step until it no longer changes t; if steps must be tiny, all rounds are used up."""
    score = Counted(lambda x, t: x * -stiff)
    with pytest.raises(RuntimeError, match="have not arrived"):
        sample(score, (2, 1), SDE, 0, method="rk45", start=(backend.to_device(np.ones((2, 1))), 1.0))
    assert least <= score.nfe <= most


def test_a_row_of_rk45_has_its_own_pace(each_backend):
    """A score that is hard for one row only does not change the others, and the rows do not arrive together."""

    def score(x, t):
        return -x / (0.25 + SDE.marginal_std(t).reshape((-1, 1)) ** 2)

    def harder(x, t):
        wiggle = backend.to_device(np.array([[0.0], [1.0], [0.0]], np.float32))
        return score(x, t) + wiggle * array_of(x).clip(-1, 1) * backend.xp.sin(60 * array_of(t).reshape((-1, 1)))

    times = []
    easy = sample(score, (3, 1), SDE, 2, method="rk45")
    mixed = sample(harder, (3, 1), SDE, 2, method="rk45", callback=lambda i, t, x, d: times.append(t))
    easy, mixed = backend.to_host(easy), backend.to_host(mixed)
    np.testing.assert_array_equal(easy[[0, 2]], mixed[[0, 2]])
    assert easy[1] != mixed[1]
    assert any(len(set(backend.to_host(t).tolist())) > 1 for t in times[:-1])


@pytest.mark.parametrize(
    "method, options, message",
    [
        (probability_flow, {"solver": "midpoint"}, "unknown solver .* 'midpoint': choose one of euler, heun"),
        (ddim, {"eta": 1.5}, r"eta must be a number in \[0, 1\], not 1.5"),
        (heun, {"s_churn": -1}, r"s_churn must be a number in \[0, inf\], not -1"),
        (heun, {"s_noise": float("inf")}, r"s_noise must be a number in \[0, inf\), not inf"),
        (heun, {"s_tmin": float("nan")}, r"s_tmin must be a number in \[0, 50.0\], not nan"),
        (heun, {"s_tmax": float("nan")}, "s_tmax .* not nan"),
        (heun, {"s_tmin": -1.0}, r"s_tmin must be a number in \[0, 50.0\], not -1.0"),
        (heun, {"s_churn": float("nan")}, "s_churn .* not nan"),
        (rk45, {"rtol": 0}, r"rtol must be a number in \(0, inf\), not 0"),
        (rk45, {"atol": -1e-5}, r"atol must be a number in \(0, inf\), not -1e-05"),
    ],
)
def test_bad_options_are_quoted(method, options, message):
    with pytest.raises(ValueError, match=message):
        sample(gaussian_score(0, 1, SDE), (2, 3), SDE, 0, method=method(**options))
