"""The bound on the likelihood for Gaussian data, whose exact likelihood is known, and for which the bound is exact."""

import math

import numpy as np
import pytest
from mixtures import erf

from tinydiff import Rng, Tensor, backend, gradcheck, nn, ops
from tinydiff.backend import xp
from tinydiff.diffusion import VESDE, KarrasSDE, ScoreModel, likelihood_loss, log_likelihood
from tinydiff.engine import array_of
from tinydiff.models.fourier import FourierInputs
from tinydiff.models.unet import UNet
from tinydiff.optim import Adam

SD, SIGMA_MAX = 0.7, 2.0  # so small that the data is seen in the prior
VARIANCES = np.array([1.0, 0.3, 0.01, 0.0001])  # of independent pixels


def exact(more=0.0):
    """F of EDM for N(0, VARIANCES) under noise, from D = x variance / (variance + sigma^2), plus an error."""

    def net(y, noise):
        sigma = np.exp(4 * backend.to_host(array_of(noise)).astype(float))[:, None]  # (N, 1)
        q = np.sqrt(sigma**2 + SD**2)
        x = backend.to_host(array_of(y)).astype(float) * q
        best = x * VARIANCES / (VARIANCES + sigma**2)
        return Tensor(backend.to_device((best - x * (SD / q) ** 2) * q / (sigma * SD) + more))

    return ScoreModel(net, KarrasSDE(SIGMA_MAX), "edm", sigma_data=SD)


def cross_entropy(eps):
    """E[-ln p(x_0 + eps z)] by a process that is exact from eps to SIGMA_MAX, and there takes N(0, SIGMA_MAX^2)."""
    entropy = 0.5 * np.log(2 * math.pi * math.e * (VARIANCES + eps**2)).sum()
    ratio = VARIANCES / SIGMA_MAX**2 + 1  # of the variances at SIGMA_MAX to the prior's
    return entropy + 0.5 * (ratio - 1 - np.log(ratio)).sum()


def losses(model, eps, batches=40, n=5000):
    rng, data = Rng(0), np.random.default_rng(1)
    x0 = [backend.to_device(data.normal(size=(n, 4)) * np.sqrt(VARIANCES)) for _ in range(batches)]
    return np.array([likelihood_loss(model, x, rng, eps=eps).item() for x in x0])


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_the_bound_is_met_by_the_exact_net(each_backend, eps):
    found = losses(exact(), eps)
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert error < 0.04
    assert abs(found.mean() - cross_entropy(eps)) < 3 * error


def test_it_is_a_bound_an_error_of_the_net_is_added(numpy_backend):
    """E|F + c - y|^2 = E|F - y|^2 + |c|^2 for the best F, times the range of ln r."""
    c, eps = 0.5, 0.01
    low, high = (math.log(s / math.hypot(s, SD)) for s in (eps, SIGMA_MAX))
    more = losses(exact(c), eps) - losses(exact(), eps)
    assert abs(more.mean() - 4 * c**2 * (high - low)) < 3 * more.std(ddof=1) / math.sqrt(len(more))
    assert more.mean() > 1


def test_it_is_no_bound_for_the_ode(numpy_backend):
    """An error that is small and steep: F = 0.1 sin(20 y) where 0 is right, of N(0, 1). The bound rises by the square,
    0.005 times the range of ln r; what the ODE makes of it, by its divergence, by more than a nat."""
    sde, eps = KarrasSDE(), 0.01

    def model(a):
        return ScoreModel(lambda y, noise: a * ops.sin(20 * y), sde, "edm", sigma_data=1.0)

    x = backend.to_device(np.random.default_rng(0).normal(size=(200, 1)))
    many = backend.to_device(np.random.default_rng(1).normal(size=(50_000, 1)))
    bound = [likelihood_loss(model(a), many, Rng(0), eps=eps).item() for a in (0.0, 0.1)]
    ode = [-log_likelihood(model(a), x, sde, 0, exact=True, eps=eps).mean() for a in (0.0, 0.1)]
    assert bound[1] - bound[0] == pytest.approx(0.1**2 / 2 * 4.6, abs=0.01)  # the range: ln(1 / eps)
    assert ode[0] == pytest.approx(bound[0], abs=0.15) and ode[1] - ode[0] > 1


class Last(Rng):
    """Its uniform numbers are the last before 1."""

    def uniform(self, shape, dtype="float32", *, sample_offset=0):
        return 1 - xp.arange(1, shape + 1).astype(dtype) * 2.0**-24


def test_levels_near_the_largest_are_not_rounded_away(numpy_backend):
    """-ln r is 1e-7 there for data this small, and in float32 nothing is left of 1 - r^2."""
    sd, seen = 0.01, []

    def net(y, noise):
        seen.append(np.exp(4 * array_of(noise).astype(float)))
        return y * 0

    likelihood_loss(ScoreModel(net, KarrasSDE(80.0), "edm", sigma_data=sd), np.zeros((4096, 1), np.float32), Last(0))
    low, high = (0.5 * math.log1p((sd / s) ** 2) for s in (1e-3, 80.0))  # of -ln r
    exact = sd / np.sqrt(np.expm1(2 * (high + np.arange(1, 4097) * 2.0**-24 * (low - high))))
    assert exact.max() > 18
    np.testing.assert_allclose(seen[0], exact, rtol=1e-4)


def test_what_the_noise_costs_a_grey_that_is_all_alone(numpy_backend):
    """Data U(0, w) and eps = w / 8: 0.33 bits with noise, by the loss of the exact net and numerically, and 0.17
    without noise, as the docs say of black pixels."""
    w, sigma_max = 1.0, 20.0
    cdf, eps = lambda u: (erf(u / math.sqrt(2)) + 1) / 2, w / 8

    def net(y, noise):
        sigma = np.exp(4 * backend.to_host(array_of(noise)).astype(float))[:, None]
        q = np.sqrt(sigma**2 + SD**2)
        x = backend.to_host(array_of(y)).astype(float) * q
        a, b = -x / sigma, (w - x) / sigma  # the data, given x, is N(x, sigma^2) cut at 0 and w
        best = x + sigma * (np.exp(-a * a / 2) - np.exp(-b * b / 2)) / math.sqrt(2 * math.pi) / (cdf(b) - cdf(a))
        return Tensor((best - x * (SD / q) ** 2) * q / (sigma * SD))

    model, rng, data = ScoreModel(net, KarrasSDE(sigma_max), "edm", sigma_data=SD), Rng(0), np.random.default_rng(1)
    losses = [likelihood_loss(model, data.uniform(0, w, (5000, 1)), rng, eps=eps).item() for _ in range(20)]
    found, error = np.mean(losses) / math.log(2), np.std(losses, ddof=1) / math.sqrt(20) / math.log(2)
    x = data.uniform(0, w, 100_000)
    noised, plain = (
        -np.log2(cdf(v / eps) - cdf((v - w) / eps)).mean() for v in (x + eps * data.normal(size=x.shape), x)
    )
    assert noised == pytest.approx(0.326, abs=0.01) and plain == pytest.approx(0.172, abs=0.005)
    assert error < 0.02 and abs(found - noised) < 3 * error + 0.01


def test_a_sample_has_the_same_loss_alone_or_in_a_batch(each_backend):
    x0 = backend.to_device(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    whole = likelihood_loss(exact(), x0, Rng(3)).item()
    parts = [likelihood_loss(exact(), x0[i : i + 2], Rng(3), sample_offset=i).item() for i in (0, 2, 4)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-5)


class OnePixel(nn.Module):
    """A small net for images of one pixel with Fourier features: (N, 1, 1, 13), (N,) -> (N, 1, 1, 1)."""

    def __init__(self):
        rng = Rng(0)
        self.levels = nn.FourierFeatures(16, scale=1.0, rng=rng)
        self.layers = nn.Sequential(
            nn.Linear(29, 64, rng=rng), nn.SiLU(), nn.Linear(64, 64, rng=rng), nn.SiLU(), nn.Linear(64, 1, rng=rng)
        )

    def forward(self, y, noise):
        h = self.layers(ops.concatenate([ops.reshape(y, shape=(-1, 13)), self.levels(noise)], axis=1))
        return ops.reshape(h, shape=(-1, 1, 1, 1))


def test_what_is_trained_by_it_needs_as_many_bits_as_the_loss_says(numpy_backend):
    """One pixel of four equally frequent greys: 2 bits, plus those of the noise if it hides the width of a grey. The
    loss measures it by denoising, bits_per_dimension by the ODE."""
    eps, sde = 0.05, KarrasSDE()
    greys = (np.random.default_rng(0).integers(0, 4, (512, 1, 1, 1)) * 85).astype(np.uint8)
    model = ScoreModel(FourierInputs(OnePixel(), 0.75), sde, "edm", sigma_data=0.75)
    optimiser, rng, bits = Adam(model.parameters(), lr=1e-2), Rng(1), []
    for step in range(600):
        optimiser.lr = 1e-2 * (1 - step / 600)
        optimiser.zero_grad()
        x0 = (greys.astype(np.float32) + rng.uniform(greys.shape)) / 128 - 1
        loss = likelihood_loss(model, x0, rng, eps=eps) / math.log(2) + 7
        loss.backward()
        optimiser.step()
        bits.append(loss.item())
    best = 7 + math.log2(eps * math.sqrt(2 * math.pi * math.e)) + 2
    x = (greys.astype(np.float32) + rng.uniform(greys.shape)) / 128 - 1 + eps * rng.normal(greys.shape)
    found = (log_likelihood(model, x, sde, 0, exact=True, eps=eps) / -math.log(2) + 7).mean()
    assert np.mean(bits[-200:]) == pytest.approx(best, abs=0.1)
    assert found == pytest.approx(best, abs=0.1)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"eps": 0.0}, ValueError, r"eps must be a number in \(0, 2.0\), not 0.0"),
        ({"eps": 2.0}, ValueError, r"eps must be a number in \(0, 2.0\), not 2.0"),
        ({"model": ScoreModel(lambda x, t: x, KarrasSDE(), "noise")}, ValueError, "must predict .edm., not .noise."),
        ({"model": ScoreModel(lambda x, t: x, VESDE(), "edm", sigma_data=1.0)}, TypeError, "a KarrasSDE.* not VESDE"),
        ({"model": nn.SiLU()}, TypeError, "must be a ScoreModel of a KarrasSDE, whose time is sigma, not SiLU"),
        ({"x0": np.zeros((2, 4), np.uint8)}, TypeError, "x0 must be of floats"),
    ],
)
def test_errors(numpy_backend, change, error, text):
    options = {"model": exact(), "x0": np.zeros((2, 4)), "rng": Rng(0), **change}
    with pytest.raises(error, match=text):
        likelihood_loss(options.pop("model"), options.pop("x0"), options.pop("rng"), **options)


# ---------------------------------------------------------------- fine inputs


class Seen(nn.Module):
    """The input of the inner net."""

    def forward(self, y, noise, **condition):
        self.condition = condition
        return y


def test_fourier_inputs_are_what_noise_leaves_of_the_features(each_backend):
    """The mean of cos(w (x + r z)) and sin over many z is that of x, times a."""
    sigma, sd = 0.05, 0.5
    r = sigma / math.hypot(sigma, sd)
    net = FourierInputs(Seen(), sd, (0, 2, 3))
    x = xp.asarray([[[[0.3]]], [[[-0.9]]]])
    noise = xp.full(2, math.log(sigma) / 4)
    y = backend.to_host(net(x, noise, digit=3).data)
    assert y.shape == (2, 1, 1, 7) and net.net.condition == {"digit": 3}
    assert FourierInputs(Seen(), sd, ())(x, noise).shape == (2, 1, 1, 1)
    np.testing.assert_allclose(y[..., :1], backend.to_host(x))
    z = np.random.default_rng(0).normal(size=200_000)
    for i, value in enumerate((0.3, -0.9)):
        for j, n in enumerate((0, 2, 3)):
            w = 2**n * math.pi
            for k, fn in enumerate((np.cos, np.sin)):
                assert y[i, 0, 0, 1 + 2 * j + k] == pytest.approx(fn(w * (value + r * z)).mean(), abs=0.01)


def test_fourier_inputs_have_a_gradient_and_gone_where_noise_is_wide(each_backend):
    noise = xp.asarray([math.log(0.01) / 4, math.log(50.0) / 4])
    x = np.random.default_rng(0).normal(size=(2, 2, 2, 1))
    net = FourierInputs(Seen(), 0.5, (1, 4))
    assert gradcheck(net, x, np.array([math.log(0.01) / 4, math.log(0.5) / 4])).ok  # by x, and by the noise
    x = backend.to_device(x)
    assert abs(net(x, noise).data[1, ..., 1:]).max() < 1e-6 < abs(net(x, noise).data[0, ..., 1:]).max()


def test_errors_of_fourier_inputs():
    for sd in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"sigma_data must be a number in \(0, inf\), not"):
            FourierInputs(Seen(), sd)


def test_errors_of_the_channels():
    with pytest.raises(ValueError, match="out_channels must be an integer of 1 or more, not 0"):
        UNet(1, (8, 16), out_channels=0)


def test_a_unet_with_more_inputs_than_outputs(each_backend):
    net = UNet(3, (8, 16), out_channels=2, rng=Rng(0))
    assert net(Tensor(xp.ones((2, 8, 8, 3), "float32")), xp.zeros(2, "float32")).shape == (2, 8, 8, 2)
