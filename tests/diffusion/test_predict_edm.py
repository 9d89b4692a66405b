"""EDM: its identities on Gaussian data, where the best denoiser and the paths of the sampler are known exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, ops, tensor
from tinydiff.backend import to_device, to_host, xp
from tinydiff.diffusion import (
    Denoiser,
    Guided,
    KarrasSDE,
    ScoreModel,
    denoising_loss,
    edm_loss,
    karras_times,
    sample,
    score_of,
)
from tinydiff.diffusion.loss import log_normal
from tinydiff.diffusion.process import per_sample
from tinydiff.engine import array_of
from tinydiff.models.fourier import FourierInputs

pytestmark = pytest.mark.usefixtures("each_backend")
SD = 0.6


class Zero(nn.Module):
    """F = 0: for data N(0, sd^2) the denoiser D = c_skip x is then the best there is."""

    def forward(self, x, noise, **labels):
        self.seen = x, noise
        return x * 0.0


class Wavy(nn.Module):
    """An F that depends on the values and on the noise level."""

    def forward(self, x, noise):
        return ops.sin(x * 3) * per_sample(noise, x)


class Labelled(nn.Module):
    """An F that depends on its label: 1 where there is one."""

    def forward(self, x, noise, digit=None):
        return x * 0.0 + (0.0 if digit is None else 1.0)


def test_the_network_sees_inputs_of_variance_one_and_the_logarithm_of_sigma():
    net = Zero()
    x0 = Rng(0).normal((400, 8, 8, 1)) * SD
    x = x0 + Rng(1).normal((400, 8, 8, 1)) * 3.0
    Denoiser(net, SD)(Tensor(x), 3.0)
    seen, noise = net.seen
    assert abs(to_host(seen.data).std() - 1) < 0.01
    np.testing.assert_allclose(to_host(array_of(noise)), np.log(3.0) / 4, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.05, 0.6, 7.0])
def test_the_target_of_the_network_has_variance_one(sigma):
    # F is the target where D is x0: (x0 - c_skip x) / c_out.
    x0 = np.random.default_rng(0).normal(size=200_000) * SD
    x = x0 + np.random.default_rng(1).normal(size=200_000) * sigma
    zero = to_host(Denoiser(Zero(), SD)(tensor(x.reshape(-1, 1, 1, 1)), sigma).data).ravel()
    one = to_host(Denoiser(Labelled(), SD)(tensor(x.reshape(-1, 1, 1, 1)), sigma, digit=1).data).ravel()
    c_out = (one - zero).mean()
    assert abs(((x0 - zero) / c_out).std() - 1) < 0.01


def test_a_network_that_knows_nothing_has_loss_one():
    x0 = Rng(0).normal((3000, 4, 4, 1)) * SD
    loss = edm_loss(Denoiser(Zero(), SD), x0, Rng(1))
    assert abs(loss.item() - 1) < 0.02


def test_the_noise_levels_of_training_are_log_normal():
    net = Zero()
    edm_loss(Denoiser(net, SD), Rng(0).normal((20_000, 1, 1, 1)), Rng(1))
    log_sigma = 4 * to_host(array_of(net.seen[1]))
    assert abs(log_sigma.mean() + 1.2) < 0.03 and abs(log_sigma.std() - 1.2) < 0.03


@pytest.mark.parametrize("shape", [(2000,), (2000, 3), (2000, 4, 3), (500, 2, 2, 2, 3)], ids=str)
def test_a_sample_may_have_any_number_of_axes(shape):
    """The same values have the same loss as vectors and as images."""
    x0 = Rng(0).normal(shape) * SD
    as_images = x0.reshape((shape[0], -1, 1, 1))
    losses = [edm_loss(Denoiser(Wavy(), SD), x, Rng(1)).item() for x in (x0, as_images)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_is_the_loss_of_a_score_model_that_predicts_f():
    """The two losses agree, per value, for the same net and the same draws."""
    x0 = Rng(0).normal((50, 4, 4, 1), "float64") * SD
    model = ScoreModel(Wavy(), KarrasSDE(), "edm", sigma_data=SD)
    known = denoising_loss(model, x0, Rng(1), times=log_normal()).item() / 16
    assert edm_loss(Denoiser(Wavy(), SD), x0, Rng(1)).item() == pytest.approx(known, rel=1e-9)


def test_the_loss_of_a_batch_is_the_mean_of_the_losses_of_its_parts():
    denoiser, x0 = Denoiser(Labelled(), SD), Rng(0).normal((6, 4, 4, 1))
    whole = edm_loss(denoiser, x0, Rng(1)).item()
    parts = [edm_loss(denoiser, x0[i : i + 2], Rng(1), sample_offset=i).item() for i in (0, 2, 4)]
    assert whole == pytest.approx(np.mean(parts), rel=1e-6)
    assert len(set(parts)) == 3


def test_a_condition_may_be_called_weight():
    """One of the glyphs' labels has that name."""

    class Net(nn.Module):
        def forward(self, x, noise, weight):
            return x * weight.reshape((-1, 1))

    x0, weight = Rng(0).normal((4, 3)), to_device(np.zeros(4, np.float32))
    loss = edm_loss(Denoiser(Net(), SD), x0, Rng(1), weight=weight)
    assert loss.item() == edm_loss(Denoiser(Zero(), SD), x0, Rng(1)).item()
    model = Guided(Denoiser(Net(), SD), 0.0)
    assert sample(model, (4, 3), KarrasSDE(), 0, steps=2, weight=weight, microbatch=2).shape == (4, 3)


def test_schedule():
    """Equation 5 of Karras et al., whose 18 levels and a zero are 17 steps and the last one."""
    levels = karras_times(KarrasSDE(), 17, 80.0, 0.002)
    assert len(levels) == 18 and levels[0] == 80 and levels[-1] == 0.002
    assert all(a > b for a, b in zip(levels, levels[1:]))
    assert levels[9] == pytest.approx((80 ** (1 / 7) * 8 / 17 + 0.002 ** (1 / 7) * 9 / 17) ** 7)


def test_time_is_the_noise_level():
    sde, t = KarrasSDE(50.0), to_device(np.array([0.5, 8.0]))
    assert sde.t_max == 50 and sde.marginal_std(3.0) == 3.0 and sde.diffusion(8.0) == 4.0
    np.testing.assert_array_equal(to_host(sde.diffusion(t)), [1, 4])
    np.testing.assert_array_equal(to_host(sde.marginal_std(t)), [0.5, 8])
    assert to_host(sde.prior((20_000,), 0)).std() == pytest.approx(50, rel=0.03)
    assert repr(sde) == "KarrasSDE(sigma_max=50.0)"


def test_heun_is_of_second_order_on_gaussian_data():
    # dx/dsigma = x sigma / (sigma^2 + sd^2), so x(0) = x(s) sd / sqrt(s^2 + sd^2).
    sde = KarrasSDE()
    score = score_of(Denoiser(Zero(), SD), sde)
    start = Rng(3).normal((50, 2, 2, 1), "float64") * 80.0
    exact = to_host(start) * SD / np.sqrt(80.0**2 + SD**2)

    def error(steps):
        x = sample(score, (50, 2, 2, 1), sde, 3, method="heun", steps=steps, eps=1e-5, start=(start, 80.0))
        return np.sqrt(np.mean((to_host(x) - exact) ** 2))

    coarse, fine = error(40), error(80)
    assert fine < 2e-3
    assert 1.8 < np.log2(coarse / fine) < 2.3


def test_guided_samples_move_with_the_label():
    """For N(0, sd^2) and F = 0 or 1 the denoised images differ by c_out, so guidance shifts every sample upwards."""
    sde, denoiser = KarrasSDE(), Denoiser(Labelled(), SD)

    def mean(weight):
        model = Guided(denoiser, weight, digit=1)
        return to_host(sample(model, (20, 4, 4, 1), sde, 0, method="heun", steps=9, eps=0.002)).mean()

    plain, more = mean(0), mean(1.0)
    assert 0.1 < plain < more


def test_guidance_extrapolates_from_without_to_with():
    denoiser, x = Denoiser(Labelled(), SD), Rng(0).normal((2, 4, 4, 1))
    conditional, without = (to_host(array_of(denoiser(x, 2.0, **c))) for c in ({"digit": 1}, {}))
    np.testing.assert_allclose(
        to_host(Guided(denoiser, 0.5, digit=1)(x, 2.0)), 1.5 * conditional - 0.5 * without, rtol=1e-5
    )
    np.testing.assert_array_equal(to_host(Guided(denoiser, 0, digit=1)(x, 2.0)), conditional)
    assert abs(conditional - without).max() > 0.1


def test_float64_stays_float64():
    x = Rng(0).normal((2, 4, 4, 1), "float64")
    assert Denoiser(Zero(), SD)(Tensor(x), xp.ones(2)).dtype == "float64"
    assert edm_loss(Denoiser(Zero(), SD), x, Rng(0)).dtype == "float64"
    assert edm_loss(Denoiser(Zero(), SD), x.astype("float32"), Rng(0)).dtype == "float32"


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: Denoiser(Zero(), 0.0), "not 0.0"),
        (lambda: Denoiser(Zero(), float("inf")), "not inf"),
        *[
            (lambda sigma=sigma: Denoiser(Zero(), SD)(xp.ones((2, 3)), sigma), rf"sigma must be .* not {sigma!r}")
            for sigma in (None, 0, -1, float("nan"), float("inf"), "1", True)
        ],
        (lambda: Denoiser(Zero(), SD)(xp.ones((2, 3)), [1.0, float("nan")]), "sigma must be positive .* not nan"),
        (lambda: Denoiser(Zero(), SD)(xp.ones((2, 3)), np.array([-2.0, 1.0])), "sigma must be positive .* not -2.0"),
        (lambda: Guided(Denoiser(Zero(), SD), float("nan")), "weight must be a number .* not nan"),
        (lambda: Guided(Denoiser(Zero(), SD), None), "weight must be a number .* not None"),
        (lambda: Denoiser(lambda x, noise: x[:, :1], SD)(xp.ones((2, 3)), 1.0), r"returned shape \(2, 1\) for .*2, 3"),
    ],
)
def test_bad_input_is_quoted(make, quoted):
    with pytest.raises(ValueError, match=quoted):
        make()


def test_pictures_that_were_not_scaled_are_an_error():
    x0 = backend.to_device(np.zeros((2, 4, 4, 1), np.uint8))
    with pytest.raises(TypeError, match=r"must be of floats .* not uint8 of shape \(2, 4, 4, 1\)"):
        edm_loss(Denoiser(Zero(), SD), x0, Rng(0))


def test_sigma_data_is_loaded_with_the_weights():
    """A net that was trained for data of one deviation is another function with that of others."""
    fourier = [FourierInputs(Inner(), sd, (0, 1)) for sd in (SD, 1.0)]
    right, other = (Denoiser(net, sd) for net, sd in zip(fourier, (SD, 1.0)))
    x, sigma = Rng(0).normal((3, 4, 4, 1)), xp.asarray([0.1, 1.0, 5.0], "float32")
    wanted = to_host(right(x, sigma).data)
    assert np.abs(to_host(other(x, sigma).data) - wanted).max() > 0.01
    other.load_state_dict(right.state_dict())
    assert other.sigma_data == other.net.sigma_data == SD  # every digit: the state has it in float64
    np.testing.assert_array_equal(to_host(other(x, sigma).data), wanted)
    assert [name for name, _ in right.named_parameters()] == [] and "data_std" in right.state_dict()
    bad = {**right.state_dict(), "data_std": np.array(-1.0)}
    with pytest.raises(ValueError, match="data_std must be a number in .*-1"):
        other.load_state_dict(bad)
    assert other.sigma_data == SD  # nothing is changed
    np.testing.assert_array_equal(to_host(other(x, sigma).data), wanted)


def test_what_is_refused_by_a_part_changes_nothing_in_the_whole():
    right, other = (Denoiser(FourierInputs(Inner(), sd, (0, 1)), sd) for sd in (SD, 1.0))
    with pytest.raises(ValueError, match="FourierInputs: data_std must be a number in .*-1"):
        other.load_state_dict({**right.state_dict(), "net.data_std": np.array(-1.0)})
    assert other.sigma_data == other.data_std.item() == 1.0 == other.net.sigma_data == other.net.data_std.item()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigma_data_is_one_value_in_the_model_and_in_its_state(dtype):
    """Set by hand it reaches the state, and the dtype of the weights does not round it."""
    model, other = (Denoiser(FourierInputs(Inner(), 1.0), 1.0) for _ in range(2))
    model.sigma_data = model.net.sigma_data = 0.1
    names = list(model.state_dict())
    model.astype(dtype)
    other.astype(dtype).load_state_dict(model.state_dict())
    assert model.sigma_data == other.sigma_data == other.net.sigma_data == 0.1
    assert copy.deepcopy(other).astype(dtype).data_std.item() == 0.1 and list(other.state_dict()) == names
    with pytest.raises(ValueError, match=r"Denoiser: sigma_data must be a number in \(0, inf\), not 0"):
        model.sigma_data = 0
    assert model.sigma_data == model.data_std.item() == 0.1
    assert repr(model).startswith("Denoiser(0.1)")


class Inner(nn.Module):
    def forward(self, x, noise):
        return ops.sum(x * x, axis=-1, keepdims=True)
