"""The timesteps of methods."""

import pytest
from mixtures import constant_vp

from tinydiff.diffusion import VESDE, karras_times, sigma_at, uniform_times

SDES = [VESDE(25.0), constant_vp()]


@pytest.mark.parametrize("timesteps", [uniform_times, karras_times])
@pytest.mark.parametrize("sde", SDES, ids=["VE", "VP"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_timesteps_decrease_from_the_beginning_to_the_end(timesteps, sde, steps):
    times = timesteps(sde, steps, 0.8, 1e-3)
    assert len(times) == steps + 1 and times[0] == 0.8 and times[-1] == 1e-3
    assert all(a > b for a, b in zip(times, times[1:]))


def test_timesteps_are_uniform_in_what_they_say():
    sde = constant_vp()
    assert uniform_times(sde, 4, 1.0, 0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    roots = [sigma_at(sde, t) ** (1 / 7) for t in karras_times(sde, 4, 1.0, 0.2)]
    assert roots == pytest.approx([roots[0] + i / 4 * (roots[4] - roots[0]) for i in range(5)])


@pytest.mark.parametrize("rho", [0, -7, float("inf")])
def test_a_bad_rho_is_quoted(rho):
    with pytest.raises(ValueError, match=f"rho must be positive and finite, not {rho}"):
        karras_times(VESDE(), 4, 1.0, 0.1, rho=rho)
