"""The process: its figures, and that s^2 is the integral of g^2."""

import math

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, tensor
from tinydiff.diffusion import VESDE
from tinydiff.diffusion.sde import denoised, per_sample

FIGURES = {1e-5: 0.0031623, 1e-3: 0.0316737, 0.1: 0.374657, 0.5: 1.930805, 1.0: 9.845215}


@pytest.mark.parametrize("t, expected", FIGURES.items())
def test_marginal_std_has_the_published_figures(t, expected):
    # as many digits as are printed
    assert VESDE(25.0).marginal_std(t) == pytest.approx(expected, rel=1e-5)


def test_diffusion_has_the_published_figures():
    sde = VESDE(25.0)
    assert [sde.diffusion(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1, 5, 25])


def test_float32_arrays_and_tensors_agree_with_floats(each_backend):
    sde = VESDE(25.0)
    times = [1e-5, 1e-4, 1e-3, 0.1, 0.5, 1.0]
    t = backend.to_device(np.array(times, np.float32))
    for function in (sde.marginal_std, sde.diffusion):
        exact = [function(float(np.float32(time))) for time in times]
        for given in (t, Tensor(t)):
            out = function(given)
            assert type(out) is type(given) and str(out.dtype) == "float32" and out.shape == (6,)
            # A float32 power minus 1 would be off by 1e-3 at t = 1e-5.
            np.testing.assert_allclose(
                backend.to_host(getattr(out, "data", out) if isinstance(out, Tensor) else out), exact, rtol=1e-6
            )


def test_the_variance_is_the_integral_of_the_squared_diffusion():
    sde = VESDE(7.0)
    t = np.linspace(0, 0.8, 20_001)
    g2 = np.array([sde.diffusion(float(u)) ** 2 for u in t])
    integral = ((g2[1:] + g2[:-1]) / 2).sum() * (t[1] - t[0])
    assert sde.marginal_std(0.8) ** 2 == pytest.approx(integral, rel=1e-7)
    assert sde.marginal_std(0.0) == 0


def test_the_standard_deviation_can_be_differentiated(each_backend):
    """d(s^2)/dt = g^2."""
    sde = VESDE(25.0)
    t = tensor([0.01, 0.3, 1.0], requires_grad=True)
    (sde.marginal_std(t) ** 2).sum().backward()
    np.testing.assert_allclose(t.grad.numpy(), [sde.diffusion(u) ** 2 for u in (0.01, 0.3, 1.0)], rtol=1e-5)


def test_nothing_drifts_and_nothing_shrinks():
    sde = VESDE()
    assert sde.drift(np.ones((2, 3)), 0.5) == 0 and sde.marginal_scale(0.5) == 1


def test_prior_is_wide_and_each_row_is_its_own(each_backend):
    sde = VESDE(25.0)
    x = backend.to_host(sde.prior((5000, 4), Rng(3)))
    assert x.dtype == np.float32 and abs(x.mean()) < 5 * 9.85 / math.sqrt(x.size)
    assert x.std() == pytest.approx(9.845, rel=5 / math.sqrt(2 * x.size))
    np.testing.assert_array_equal(backend.to_host(sde.prior((2, 4), Rng(3), first=7)), x[7:9])


def test_the_density_of_the_prior_is_that_of_independent_normals(each_backend):
    sde, x = VESDE(25.0), np.array([[[0.5], [-20.0]], [[3.0], [8.0]]])
    std = 9.845215
    one = np.exp(-(x**2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)  # of each coordinate
    for given in (backend.to_device(x), tensor(x)):
        density = sde.prior_log_density(given)
        density = density.numpy() if isinstance(density, Tensor) else backend.to_host(density)
        np.testing.assert_allclose(density, np.log(one).sum((1, 2)), rtol=1e-6)


@pytest.mark.parametrize("sigma", [1, 0.5, 0, -3, float("nan"), float("inf")])
def test_a_sigma_that_does_not_explode_is_refused(sigma):
    with pytest.raises(ValueError, match=f"sigma must be a finite number above 1, not {sigma!r}"):
        VESDE(sigma)


def test_repr():
    assert repr(VESDE(25)) == "VESDE(sigma=25.0)"


def test_per_sample():
    assert per_sample(np.arange(3), np.zeros((3, 28, 28, 1))).shape == (3, 1, 1, 1)
    assert per_sample(np.arange(3), np.zeros(3)).shape == (3,)
    assert per_sample(2.0, np.zeros(3)) == 2.0


def test_the_denoised_image_of_a_point_mass_is_the_point(each_backend):
    sde = VESDE()
    x = Rng(0).normal((4, 3)) * 5
    t = backend.to_device(np.array([0.1, 0.4, 0.7, 1.0], np.float32))
    for time in (t, 0.4):
        s = per_sample(sde.marginal_std(time), x)
        np.testing.assert_allclose(backend.to_host(denoised(sde, x, time, -(x - 0.25) / s**2)), 0.25, atol=1e-5)
