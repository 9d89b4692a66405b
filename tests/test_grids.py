"""Where samplers stop."""

import pytest
from mixtures import constant_vp

from tinydiff.diffusion import VESDE
from tinydiff.diffusion.samplers import rho_times, sigma_at, time_at, uniform_times

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


@pytest.mark.parametrize("grid", [uniform_times, rho_times])
@pytest.mark.parametrize("sde", SDES, ids=["VE", "VP"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_grids_fall_from_the_beginning_to_the_end(grid, sde, steps):
    times = grid(sde, steps, 0.8, 1e-3)
    assert len(times) == steps + 1 and times[0] == 0.8 and times[-1] == 1e-3
    assert all(a > b for a, b in zip(times, times[1:]))


def test_grids_are_uniform_in_what_they_say():
    sde = constant_vp()
    assert uniform_times(sde, 4, 1.0, 0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    roots = [sigma_at(sde, t) ** (1 / 7) for t in rho_times(sde, 4, 1.0, 0.2)]
    assert roots == pytest.approx([roots[0] + i / 4 * (roots[4] - roots[0]) for i in range(5)])


@pytest.mark.parametrize("rho", [0, -7, float("inf")])
def test_a_bad_rho_is_quoted(rho):
    with pytest.raises(ValueError, match=f"rho must be positive and finite, not {rho}"):
        rho_times(VESDE(), 4, 1.0, 0.1, rho=rho)
