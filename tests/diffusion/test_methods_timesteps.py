"""The timesteps of methods."""

import pytest
from mixtures import SPEC, constant_vp

from tinydiff import Rng
from tinydiff.diffusion import (
    METHODS,
    VESDE,
    VPSDE,
    Brownian,
    FlowSDE,
    KarrasSDE,
    SubVPSDE,
    karras_times,
    sample,
    sigma_at,
    steps_for,
    uniform_times,
)

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


@pytest.mark.parametrize("timesteps", [uniform_times, karras_times])
def test_bad_steps_and_ends_are_quoted(timesteps):
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=f"steps must be an integer of 1 or more, not {steps}"):
            timesteps(VESDE(), steps, 1.0, 0.1)
    with pytest.raises(ValueError, match="begin must be a number .* not nan"):
        timesteps(VESDE(), 4, float("nan"), 0.1)


@pytest.mark.parametrize("rho", [0, -7, float("inf"), float("nan"), None])
def test_a_bad_rho_is_quoted(rho):
    with pytest.raises(ValueError, match=rf"rho must be a number in \(0, inf\), not {rho}"):
        karras_times(VESDE(), 4, 1.0, 0.1, rho=rho)


PROCESSES = {
    "ve": VESDE(25.0), "vp": VPSDE(), "cosine": VPSDE("cosine"), "subvp": SubVPSDE(), "flow": FlowSDE(),
    "karras": KarrasSDE(), "brownian": Brownian(10.0),
}  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "rk45"])
def test_every_method_samples_every_process_with_its_defaults(name, process, numpy_backend):
    """With 35 evaluations. Equal steps of t up to 80 left noise: a distance of 0.16 to 0.37."""
    sde = PROCESSES[process]
    x = sample(SPEC.score(sde), (4000, 1), sde, Rng(0), method=name, steps=steps_for(name, 35), eps=1e-3)
    assert SPEC.distance(x) < 0.1
