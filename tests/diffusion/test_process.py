"""The processes: published values, the differential equations of mean and variance, and accuracy at small t."""

import math

import kolmogorov
import numpy as np
import pytest
from mixtures import constant_vp

from tinydiff import Rng, Tensor, backend, tensor
from tinydiff.data import GaussianMixture
from tinydiff.diffusion import (
    VESDE,
    VPSDE,
    Brownian,
    CosineSchedule,
    FlowSDE,
    KarrasSDE,
    LinearSchedule,
    SubVPSDE,
    process,
    sample,
    sigma_at,
    time_at,
)
from tinydiff.diffusion.exact import Exact
from tinydiff.diffusion.predict import denoised
from tinydiff.diffusion.process import PROCESSES, per_sample

PROCESS = {
    "ve": VESDE(25.0),
    "brownian": Brownian(0.7, t_max=3.0),
    "vp linear": VPSDE(),
    "vp cosine": VPSDE("cosine"),
    "subvp linear": SubVPSDE(LinearSchedule(0.5, 12.0)),
    "subvp cosine": SubVPSDE("cosine"),
    "flow": FlowSDE(),
    "karras": KarrasSDE(50.0),
}
every_process = pytest.mark.parametrize("sde", PROCESS.values(), ids=PROCESS)


# ---------------------------------------------------------------- the equations that tie the four functions together


def moments(sde, end, steps=5000):
    """m and s at `end` from drift and diffusion alone: dm/dt = a m, d(s^2)/dt = 2 a s^2 + g^2, by Runge and Kutta's
    classical method. a(t) is the drift at x = 1."""

    def derivative(t, y):
        a = sde.drift(1.0, t)
        return np.array([a * y[0], 2 * a * y[1] + sde.diffusion(t) ** 2])

    h, y = end / steps, np.array([1.0, 0.0])
    for i in range(steps):
        t, middle = i * h, (i + 0.5) * h
        k1 = derivative(t, y)
        k2 = derivative(middle, y + h / 2 * k1)
        k3 = derivative(middle, y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + derivative(min(t + h, end), y + h * k3))
    return y[0], math.sqrt(y[1])


@every_process
@pytest.mark.parametrize("part", [0.001, 0.4, 1.0])
def test_mean_and_deviation_solve_the_equations_of_the_moments(sde, part):
    end = part * sde.t_max
    m, s = moments(sde, end)
    assert sde.marginal_scale(end) == pytest.approx(m, rel=1e-7)
    assert sde.marginal_std(end) == pytest.approx(s, rel=1e-7)
    assert sde.marginal_std(0) == 0 and sde.marginal_scale(0.0) == 1


@pytest.mark.parametrize("schedule", [LinearSchedule(), LinearSchedule(0, 3), CosineSchedule(), CosineSchedule(0.1)])
def test_the_integral_of_a_schedule_is_that_of_its_beta(schedule):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for end in (1e-4, 0.3, 1.0):
        numeric = sum(w * schedule.beta(end * (1 + x) / 2) for x, w in zip(nodes, weights)) * end / 2
        assert schedule.integral(end) == pytest.approx(numeric, rel=1e-9)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    "t, s", {1e-5: 0.0031623, 1e-3: 0.0316737, 0.1: 0.374657, 0.5: 1.930805, 1.0: 9.845215}.items()
)
def test_ve_has_the_published_deviations(t, s):
    assert VESDE(25.0).marginal_std(t) == pytest.approx(s, rel=1e-5)  # as many digits as are printed


def test_ve_has_the_published_diffusion():
    assert [VESDE(25.0).diffusion(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1, 5, 25])


def test_vp_and_sub_vp_keep_data_of_variance_one_at_one_and_below():
    for t in (0.01, 0.3, 1.0):
        m, s, sub = VPSDE().marginal_scale(t), VPSDE().marginal_std(t), SubVPSDE().marginal_std(t)
        assert m * m + s * s == pytest.approx(1, rel=1e-12)
        assert sub == pytest.approx(s * s, rel=1e-12) and SubVPSDE().marginal_scale(t) == m


def test_what_is_left_of_the_mean_at_the_end():
    assert VPSDE().marginal_scale(1) == pytest.approx(math.exp(-10.05 / 2), rel=1e-12)
    assert VPSDE("cosine").marginal_scale(1.0) == pytest.approx(math.tan(math.pi / 2 * 0.008 / 1.016), rel=1e-9)
    assert FlowSDE().marginal_scale(0.999) == pytest.approx(0.001)


def test_vp_is_the_limit_of_ddpm():
    """DDPM's product of 1 - beta_i, beta from 1e-4 to 0.02 in 1000 steps (Ho et al. 2020), is m^2 of the linear
    schedule up to O(1 / 1000)."""
    betas = np.linspace(1e-4, 0.02, 1000)
    for i in (100, 500, 1000):
        assert math.log(np.prod(1 - betas[:i])) == pytest.approx(
            2 * math.log(VPSDE().marginal_scale(i / 1000)), rel=0.02
        )


# ---------------------------------------------------------------- numbers, arrays, Tensors


@every_process
def test_float32_arrays_and_tensors_agree_with_floats(each_backend, sde):
    times = [sde.t_max * part for part in (1e-5, 1e-4, 1e-3, 0.1, 0.5, 1.0)]
    t = backend.to_device(np.array(times, np.float32))
    x = backend.to_device(np.linspace(-1, 2, 12, dtype=np.float32).reshape(6, 2))
    last = times if not isinstance(sde, FlowSDE) else times[:-1]  # 1 - t has four digits there
    for function in (sde.marginal_std, sde.marginal_scale, sde.diffusion, lambda t: sde.drift(x, t)):
        for given in (t, Tensor(t)):
            out = function(given)
            if isinstance(out, float):  # the same at every time
                assert out == function(0.5)
                continue
            assert type(out) is type(given) and str(out.dtype) == "float32" and len(out) == 6
            out = np.asarray(backend.to_host(out.data if isinstance(out, Tensor) else out))
            for i in range(len(last)):
                exact = function(float(np.float32(times[i])))
                exact = exact if isinstance(exact, float) else backend.to_host(exact)[i]
                # A float32 power minus 1, or 1 minus an exponential, would be off by 1e-3 at t = 1e-5.
                np.testing.assert_allclose(out[i], exact, rtol=1e-5)


@pytest.mark.parametrize("sde", [VESDE(25.0), Brownian(2.0), KarrasSDE()], ids=repr)
def test_the_deviation_can_be_differentiated(each_backend, sde):
    """d(s^2)/dt = g^2 without a drift."""
    t = tensor([0.01, 0.3, 1.0], requires_grad=True)
    (sde.marginal_std(t) ** 2).sum().backward()
    np.testing.assert_allclose(t.grad.numpy(), [sde.diffusion(u) ** 2 for u in (0.01, 0.3, 1.0)], rtol=1e-5)


@every_process
def test_a_number_outside_the_process_is_an_error(sde):
    for t in (-1e-9, sde.t_max * 1.01, float("nan"), np.float32(-1)):
        for function in (sde.marginal_std, sde.marginal_scale, sde.diffusion, lambda t: sde.drift(1.0, t)):
            with pytest.raises(ValueError, match=rf"t must be from 0 to {sde.t_max:g}, not"):
                function(t)


@every_process
def test_the_end_may_be_rounded_to_float32(sde):
    end = np.float32(sde.t_max)  # 0.999 becomes 0.99900001
    assert sde.marginal_std(end) == pytest.approx(sde.marginal_std(sde.t_max), rel=1e-6)


# ---------------------------------------------------------------- the way back

MIXTURE = GaussianMixture([0.3, 0.7], [-1.5, 0.8], [0.09, 0.16])


@pytest.mark.parametrize("name", ["vp linear", "vp cosine", "subvp cosine"])
def test_the_reverse_process_leads_from_the_prior_to_the_data(numpy_backend, name):
    """Euler-Maruyama with the exact score, 300 steps, 4000 samples: within the threshold of Kolmogorov and Smirnov that
    samples of the very law exceed in one of a thousand cases; with a drift that is forgotten, far beyond it."""
    sde = PROCESS[name]
    euler_maruyama = {"method": "euler_maruyama", "steps": 300}
    x = sample(Exact(MIXTURE, sde).score, (4000, 1), sde, 1, **euler_maruyama)
    assert kolmogorov.distance(x, MIXTURE.cdf) < kolmogorov.threshold(4000)

    class Still(type(sde)):
        def drift(self, x, t):
            return 0.0

    x = sample(Exact(MIXTURE, sde).score, (4000, 1), Still(sde.schedule), 1, **euler_maruyama)
    assert not kolmogorov.distance(x, MIXTURE.cdf) < 3 * kolmogorov.threshold(4000)


# ---------------------------------------------------------------- the prior


@every_process
def test_the_prior_is_what_has_gathered_and_each_row_is_its_own(each_backend, sde):
    x = backend.to_host(sde.prior((5000, 4), Rng(3)))
    std = sde.prior_std
    assert std == pytest.approx(1 if isinstance(sde, VPSDE) else sde.marginal_std(sde.t_max))
    assert x.dtype == np.float32 and abs(x.mean()) < 5 * std / math.sqrt(x.size)
    assert x.std() == pytest.approx(std, rel=5 / math.sqrt(2 * x.size))
    np.testing.assert_array_equal(backend.to_host(sde.prior((2, 4), Rng(3), sample_offset=7)), x[7:9])


@every_process
def test_the_log_density_of_the_prior(each_backend, sde):
    x = Rng(1).normal((3, 2, 2, 1)) * 2
    expected = [
        sum(-((v / sde.prior_std) ** 2) / 2 - math.log(sde.prior_std * math.sqrt(2 * math.pi)) for v in row.ravel())
        for row in backend.to_host(x).astype(float)
    ]
    for given in (x, Tensor(x)):
        out = sde.prior_log_density(given)
        assert type(out) is type(given) and out.shape == (3,)
        np.testing.assert_allclose(backend.to_host(out.data if isinstance(out, Tensor) else out), expected, rtol=1e-5)


# ---------------------------------------------------------------- by name, and bad input


def test_by_name():
    assert {name: type(process(name)) for name in PROCESSES} == PROCESSES
    assert process("ve", sigma=7).sigma == 7 and isinstance(process("vp", schedule="cosine").schedule, CosineSchedule)
    assert process("subvp", schedule=LinearSchedule(1, 2)).schedule.high == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: process("VE"), "unknown process 'VE': choose one of ve, vp, subvp, flow, karras, brownian"),
        (lambda: VPSDE("sine"), "unknown schedule 'sine': choose one of linear, cosine"),
        (lambda: LinearSchedule(3, 2), r"low must be a number in \[0, 2.0\], not 3"),
        (lambda: LinearSchedule(0, 0), r"high must be a number in \(0, inf\), not 0"),
        (lambda: LinearSchedule(-1, 2), "low .* not -1"),
        (lambda: LinearSchedule(0, float("inf")), "high .* not inf"),
        (lambda: CosineSchedule(0), r"offset must be a number in \(0, inf\), not 0"),
        (lambda: Brownian(0), r"Brownian: sigma must be a number in \(0, inf\), not 0"),
        (lambda: Brownian(1, t_max=float("nan")), "Brownian: t_max .* not nan"),
        (lambda: KarrasSDE(-1.0), r"sigma_max must be a number in \(0, inf\), not -1.0"),
        (lambda: KarrasSDE(float("inf")), "not inf"),
        (lambda: FlowSDE(1.0), r"t_max must be a number in \(0, 1\), not 1.0"),
        *[
            (lambda sigma=sigma: VESDE(sigma), rf"sigma must be a number in \(1, inf\), not {sigma!r}")
            for sigma in (1, 0.5, 0, -3, float("nan"), float("inf"))
        ],
    ],
)
def test_bad_arguments_are_quoted(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_argument_that_a_process_does_not_have_is_quoted_with_the_nearest():
    with pytest.raises(TypeError, match=r"^VESDE: no argument 'sigm': it has sigma; did you mean 'sigma'\?$"):
        process("ve", sigm=3)
    with pytest.raises(TypeError, match="^KarrasSDE: no argument 'x': it has [a-z_, ]*$"):
        KarrasSDE(x=3)
    with pytest.raises(TypeError, match="^Brownian: too many positional arguments$"):
        Brownian(1, 2, 3)


def test_what_is_no_schedule_is_an_error():
    with pytest.raises(TypeError, match=r"SubVPSDE: a schedule has beta\(t\) and integral\(t\); 3 has not"):
        SubVPSDE(3)


@every_process
def test_repr_names_process_and_numbers(sde):
    assert repr(eval(repr(sde))) == repr(sde) and type(sde).__name__ in repr(sde)


def test_per_sample():
    assert per_sample(np.arange(3), np.zeros((3, 28, 28, 1))).shape == (3, 1, 1, 1)
    assert per_sample(np.arange(3), np.zeros(3)).shape == (3,)
    assert per_sample(2.0, np.zeros(3)) == 2.0


@every_process
def test_the_denoised_image_of_a_point_mass_is_the_point(each_backend, sde):
    x = Rng(0).normal((4, 3)) * 2
    t = backend.to_device(np.array([0.1, 0.3, 0.5, 0.7], np.float32) * np.float32(sde.t_max))
    for time in (t, 0.4):
        s, m = per_sample(sde.marginal_std(time), x), per_sample(sde.marginal_scale(time), x)
        np.testing.assert_allclose(backend.to_host(denoised(sde, x, time, -(x - m * 0.25) / s**2)), 0.25, atol=3e-5)


# ---------------------------------------------------------------- noise levels and their times

SDES = [VESDE(25.0), constant_vp()]


@pytest.mark.parametrize("sde", SDES, ids=["VE", "VP"])
@pytest.mark.parametrize("t", [1e-5, 1e-3, 0.1, 0.77, 1.0])
def test_the_time_of_a_noise_level_is_found(sde, t):
    assert time_at(sde, sigma_at(sde, t)) == pytest.approx(t, rel=1e-10)


def test_no_noise_is_at_time_zero():
    assert time_at(VESDE(), 0.0) == pytest.approx(0, abs=1e-29)


def test_the_noise_level_of_ve_is_its_std_and_of_vp_is_relative_to_its_scale():
    ve, vp = SDES
    assert sigma_at(ve, 0.5) == ve.marginal_std(0.5)
    assert sigma_at(vp, 0.5) == pytest.approx(vp.marginal_std(0.5) / vp.marginal_scale(0.5)) != vp.marginal_std(0.5)


@pytest.mark.parametrize("sigma", [-0.1, 9.9, float("nan"), float("inf")])
def test_a_noise_level_that_the_process_does_not_have_is_quoted(sigma):
    with pytest.raises(ValueError, match=rf"VESDE\(sigma=25.0\): a noise level must be from 0 to 9.84521, not {sigma}"):
        time_at(VESDE(25.0), sigma)
