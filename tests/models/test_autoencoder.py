"""The three autoencoders: shapes, gradients, and the mathematics of each against something known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import on_numpy

from tinydiff import Rng, Tensor, nn, ops, tensor
from tinydiff.backend import to_device, to_host, xp
from tinydiff.check import gradcheck
from tinydiff.models.autoencoder import (
    Autoencoder,
    QuantisedAutoencoder,
    VariationalAutoencoder,
    autoencoder_loss,
    kl_divergence,
    perceptual_distance,
)
from tinydiff.optim import Adam

pytestmark = pytest.mark.usefixtures("each_backend")
KINDS = [Autoencoder, VariationalAutoencoder, QuantisedAutoencoder]


def host(a):
    return to_host(a.data if isinstance(a, Tensor) else a)


def images(n=2, height=16, width=24, channels=3, dtype="float32"):
    return Rng(5).normal((n, height, width, channels), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options, latent",
    [
        ({"channels": (8, 16)}, (4, 6)),
        ({"channels": (8,), "patch": 1}, (16, 24)),
        ({"channels": (8, 8, 8), "attention": True}, (2, 3)),
    ],
)
def test_any_size_that_divides_and_any_channels(kind, options, latent):
    net = kind(3, latent=2, rng=0, **options)
    z = net.encode(images())
    assert z.shape == (2, *latent, 2) and net.decode(z).shape == net(images()).shape == (2, 16, 24, 3)
    autoencoder_loss(net, images(), Rng(1)).backward()
    assert all(p.grad is not None and np.isfinite(host(p.grad)).all() for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_quoted(kind):
    net = kind(3, (8, 8), latent=2, rng=0)
    with pytest.raises(ValueError, match=r"H and W multiples of 4, not \(1, 16, 18, 3\)"):
        net.encode(images(1, 16, 18))
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\).*not \(2, 16, 24, 1\)"):
        net(images(channels=1))
    with pytest.raises(ValueError, match=r"latents must be \(N, h, w, 2\), not \(1, 4, 4, 3\)"):
        net.decode(xp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"groups=8 must divide each of channels=\(12,\)"):
        kind(3, (12,))


def test_the_divergence_is_the_integral():
    """Against the integral of q ln (q / p) on a grid, and never negative."""
    mean, log_variance = np.array([[0.7], [-2.0], [0.0]]), np.array([[-1.0], [0.8], [0.0]])
    found = host(kl_divergence(tensor(mean), tensor(log_variance)))
    z = np.linspace(-30, 30, 200_001)
    for i in range(3):
        m, s = mean[i, 0], math.exp(log_variance[i, 0] / 2)
        log_q, log_p = -0.5 * ((z - m) / s) ** 2 - math.log(s), -0.5 * z * z
        integral = np.sum(np.exp(log_q) * (log_q - log_p)) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
        assert found[i] == pytest.approx(integral, abs=1e-9)
    values = Rng(0).normal((2, 1000, 4), "float64") * 3
    assert (host(kl_divergence(values[0], values[1])) >= 0).all()


class Linear(VariationalAutoencoder):
    """x = w z + b + s e, z and e standard normal, for numbers z and pairs x: the posterior is known, and so is p(x)."""

    def __init__(self, kl_weight):
        self.kl_weight = kl_weight
        self.inward, self.outward = nn.Linear(2, 1, rng=Rng(0)), nn.Linear(1, 2, rng=Rng(1))
        self.log_variance = nn.Parameter(np.zeros(1, "float32"))

    def distribution(self, x):
        mean = self.inward(x)
        return mean, ops.broadcast_to(self.log_variance, shape=mean.shape)

    def decode(self, z):
        return self.outward(z)


def bound(net, x, s, rng):
    """The evidence bound from the loss, in nats per sample: the loss is (|D(z) - x|^2 + 2 s^2 KL) / D."""
    d = x.shape[1]
    loss = float(host(autoencoder_loss(net, x, rng)))
    return -(loss * d / (2 * s * s) + d / 2 * math.log(2 * math.pi * s * s))


def test_the_bound_against_the_closed_form():
    """At the exact posterior the bound is ln p(x); elsewhere it is less."""
    s, w, b = 0.5, np.array([[1.2, -0.7]]), np.array([0.3, 0.1])
    net = Linear(2 * s * s).astype("float64")
    precision = 1 + (w @ w.T).item() / s**2  # of z given x
    net.outward.weight.data, net.outward.bias.data = to_device(w), to_device(b)
    net.inward.weight.data = to_device(w.T / s**2 / precision)
    net.inward.bias.data = to_device(-(b @ w.T) / s**2 / precision)
    net.log_variance.data = to_device(np.array([-math.log(precision)]))
    n = 200_000
    x = host(Rng(1).normal((n, 1), "float64")) @ w + b + s * host(Rng(2).normal((n, 2), "float64"))
    covariance = w.T @ w + s * s * np.eye(2)
    centred = x - b
    log_p = -0.5 * np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
    exact = (log_p - 0.5 * math.log(np.linalg.det(2 * math.pi * covariance))).mean()
    assert bound(net, to_device(x), s, Rng(3)) == pytest.approx(exact, abs=0.01)
    net.inward.bias.data = (
        net.inward.bias.data + 0.3
    )  # a wrong posterior: lower by KL(q || posterior) = d^2 precision / 2
    assert bound(net, to_device(x), s, Rng(3)) == pytest.approx(exact - 0.5 * 0.3**2 * precision, abs=0.01)


def test_a_variational_one_draws_its_latents():
    net = VariationalAutoencoder(3, (8,), latent=2, kl_weight=0.5, rng=0)
    mean, log_variance = net.distribution(images())
    z, cost = net.bottleneck(images(), Rng(4))
    noise = Rng(4).normal(mean.shape)
    np.testing.assert_allclose(host(z), host(mean) + np.exp(host(log_variance) / 2) * host(noise), rtol=1e-5, atol=1e-6)
    kl = host(kl_divergence(mean, log_variance)).mean()
    assert float(host(cost)) == pytest.approx(0.5 * kl / (16 * 24 * 3), rel=1e-5)
    np.testing.assert_array_equal(host(net.encode(images())), host(mean))
    second, _ = net.bottleneck(images()[1:], Rng(4), sample_offset=1)  # in microbatches: the same draw
    np.testing.assert_allclose(host(second), host(z)[1:], rtol=1e-4, atol=1e-6)


def test_a_code_is_the_nearest_and_lets_gradients_pass():
    net = QuantisedAutoencoder(3, (8,), latent=2, codes=5, rng=0).astype("float64")
    z = Rng(2).normal((2, 3, 4, 2), "float64")
    codes = host(net.codebook.weight)
    distance = ((host(z)[..., None, :] - codes) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(host(net.indices(z)), distance.argmin(axis=-1))
    x = images(dtype="float64")
    straight, cost = net.bottleneck(x, Rng(0))
    encoded = net.features(x)
    np.testing.assert_allclose(host(straight), host(net.encode(x)), rtol=1e-12, atol=1e-12)
    error = ((host(encoded) - host(straight)) ** 2).mean()
    assert float(host(cost)) == pytest.approx(1.25 * error, rel=1e-9)
    # Through the straight line, the last bias of the encoder gets the sum of the decoder's adjoint.
    seen = []
    straight.register_hook(lambda g: seen.append(host(g)) or None)
    net.decode(straight).sum().backward()
    bias = list(net.encoder)[-1].bias
    np.testing.assert_allclose(host(bias.grad), seen[0].sum(axis=(0, 1, 2)), rtol=1e-9)
    assert net.codebook.weight.grad is None or not host(net.codebook.weight.grad).any()


def test_a_code_that_nothing_is_near_moves_to_a_vector():
    net = QuantisedAutoencoder(3, (8,), latent=2, codes=5, rng=0)
    vectors = host(net.features(images())).reshape(-1, 2)
    codes = np.full((5, 2), 100, "float32")
    codes[0] = vectors.mean(axis=0)  # the nearest to all
    net.codebook.weight.data = to_device(codes)
    assert net.restart(images(), Rng(0)) == 4
    after = host(net.codebook.weight)
    np.testing.assert_array_equal(after[0], codes[0])
    assert all(np.abs(vectors - code).max(axis=1).min() < 1e-6 for code in after[1:])
    assert len(np.unique(host(net.indices(net.features(images()))))) > 1


def test_perplexity_counts_the_codes_in_use():
    net = QuantisedAutoencoder(1, (8,), codes=4, rng=0)
    assert net.perplexity(to_device(np.array([0, 1, 2, 3]))) == pytest.approx(4)
    assert net.perplexity(to_device(np.array([2, 2, 2]))) == pytest.approx(1)
    assert net.perplexity(to_device(np.array([0, 1, 1, 0]))) == pytest.approx(2)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_gradient_of_the_loss(kind):
    """By complex step or differences, through the whole net. (Rounding to a code has steps: see the test above.)"""
    net = kind(1, (2,), latent=1, groups=1, rng=0).astype("float64")
    for p in net.parameters():
        p.data = p.data + 0.3 * Rng(7).normal(p.shape, "float64")
    gradcheck(lambda x: net.decode(net.bottleneck(x, Rng(1))[0]) + net.bottleneck(x, Rng(1))[1],
              host(images(1, 2, 4, 1, "float64")))  # fmt: skip


def test_perceptual_distance_sees_what_its_features_see():
    features = lambda x: [x, x * x]  # noqa: E731
    x = Tensor(images(dtype="float64"))
    assert float(host(perceptual_distance(features, x, x))) == 0
    assert float(host(perceptual_distance(lambda x: [x], x * 3.0, x))) == pytest.approx(0, abs=1e-12)  # length is gone
    a, b = np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 1, 2))
    a[..., 0], b[..., 1] = 2, 5  # at right angles: |(1, 0) - (0, 1)|^2 = 2
    assert float(host(perceptual_distance(lambda x: [x], tensor(a), tensor(b)))) == pytest.approx(2, rel=1e-6)


@on_numpy
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_to_bring_pictures_back(kind):
    """Stripes of two kinds: a latent of two numbers per 4x4 pixels is enough."""
    x = np.zeros((8, 8, 8, 1), "float32")
    x[::2, ::2], x[1::2, :, ::2] = 1, 1
    options = {"codes": 8} if kind is QuantisedAutoencoder else {}
    net = kind(1, (8, 8), latent=2, groups=4, rng=0, **options)
    optimizer, first = Adam(net.parameters(), lr=1e-2), None
    for step in range(60):
        if kind is QuantisedAutoencoder and step in (0, 10, 20, 30):
            net.restart(to_device(x), Rng(step))
        loss = autoencoder_loss(net, to_device(x), Rng(0).child(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or float(host(loss))
    assert ((host(net(to_device(x))) - x) ** 2).mean() < 0.1 * first
