"""Latents in standard units: their mean and deviation, the way there and back, and what does not belong together."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tinydiff import Rng, nn, saving
from tinydiff.backend import to_device, to_host
from tinydiff.data import limits
from tinydiff.latents import LatentSpace, cached_latents
from tinydiff.models import tutorial
from tinydiff.models.autoencoder import Autoencoder, VariationalAutoencoder

pytestmark = pytest.mark.usefixtures("each_backend")


def images(n=40):
    return to_host(Rng(1).uniform((n, 16, 16, 3)))


def space(kind=Autoencoder, seed=0):
    made = LatentSpace(kind(3, (8, 8), latent=2, rng=seed), (16, 16, 3))
    made.measure(images())
    return made


@pytest.mark.parametrize("kind", [Autoencoder, VariationalAutoencoder])
def test_latents_have_mean_0_and_deviation_1_and_come_back(kind):
    made = space(kind)
    z = made.encode(images())
    assert z.shape == (40, 4, 4, 2) == (40, *made.shape) and z.dtype == np.float32
    np.testing.assert_allclose(z.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=(0, 1, 2)), 1, atol=1e-5)
    plain = made.autoencoder(to_device(images()))
    np.testing.assert_allclose(made.decode(z), to_host(plain.data), rtol=1e-3, atol=1e-4)
    assert plain.requires_grad and made.decode(z[:0]).shape == (0, 16, 16, 3)


def test_mean_and_deviation_are_in_the_state():
    made, other = space(), LatentSpace(Autoencoder(3, (8, 8), latent=2, rng=9), (16, 16, 3))
    with pytest.raises(ValueError, match="not known yet: measure"):
        other.encode(images())
    assert made.fingerprint() != other.fingerprint()
    other.load_state_dict(made.state_dict())
    assert made.fingerprint() == other.fingerprint()
    np.testing.assert_array_equal(other.encode(images()), made.encode(images()))


def test_batch_norm_is_in_evaluation_mode_both_ways():
    """The latent of an image does not depend on its neighbours, though its autoencoder was left in training mode."""
    net = tutorial.Autoencoder(rng=0)
    digits = to_host(Rng(2).uniform((6, 28, 28, 1)))
    net(to_device(digits))  # running statistics
    made = LatentSpace(net, (28, 28, 1))
    made.measure(digits)
    made.train()
    z = made.encode(digits)
    assert z.shape == (6, 10, 10, 4)
    np.testing.assert_allclose(made.encode(digits[2:3])[0], z[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(made.decode(z[2:3])[0], made.decode(z)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_bytes_are_brought_to_the_scale_of_the_autoencoder(low):
    made = LatentSpace(Autoencoder(3, (8, 8), latent=2, rng=0), (16, 16, 3), low)
    of_bytes = (255 * images()).round().astype("uint8")
    x = low + (1 - low) * of_bytes / 255
    made.measure(of_bytes)
    z = made.encode(of_bytes)
    np.testing.assert_allclose(z.std(axis=(0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(made.encode(x), z, rtol=1e-4, atol=1e-5)
    assert made.decode(z).dtype == "float32"


def test_what_does_not_fit_is_quoted():
    made = space()
    with pytest.raises(ValueError, match=r"latents must be \(N, 4, 4, 2\), not \(1, 4, 4, 3\)"):
        made.decode(np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"images must be \(N, 16, 16, 3\), not \(1, 8, 8, 3\)"):
        made.encode(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="multiples of 4"):
        LatentSpace(Autoencoder(3, (8, 8), rng=0), (16, 18, 3))
    flat = Autoencoder(3, (8, 8), latent=2, rng=0)
    list(flat.encoder)[-1].weight.data = list(flat.encoder)[-1].weight.data * 0
    with pytest.raises(ValueError, match=r"channels \[0, 1\] of the latents do not vary"):
        LatentSpace(flat, (16, 16, 3)).measure(images())


def test_latents_are_kept_by_data_and_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, calls = space(), []
    encode = LatentSpace.encode
    monkeypatch.setattr(LatentSpace, "encode", lambda self, x: calls.append(len(x)) or encode(self, x))
    first = cached_latents(made, images())
    np.testing.assert_array_equal(cached_latents(made, images()), first)
    assert calls == [40]
    cached_latents(made, images()[:39])
    cached_latents(space(seed=1), images())
    assert calls == [40, 39, 40]
    kept = sorted(tmp_path.rglob("*.npz"))
    assert len(kept) == 3
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(cached_latents(made, images()), first)
    assert calls[3:] == [40]


@pytest.mark.parametrize("damage", ["a number", "float64", "a bomb"])
def test_latents_of_another_kind_in_the_cache_are_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = space()
    first = cached_latents(made, images())
    (path,) = tmp_path.rglob("*.npz")
    if damage == "a bomb":
        np.savez_compressed(path, latents=np.zeros(50 * 2**20, "uint8"))
    else:
        saving.save(path, {"latents": 3 if damage == "a number" else first.astype("float64")})
    (path.parent / "killed.npz.0abcdefg.part").write_text("half")
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(cached_latents(made, images()), first)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_only_costs_the_time(monkeypatch):
    def full(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(limits, "write_atomically", full)
    made = space()
    with pytest.warns(UserWarning, match="the latents are not cached in .*no space left"):
        found = cached_latents(made, images())
    np.testing.assert_array_equal(found, made.encode(images()))


def test_it_is_a_module_whose_weights_are_saved(tmp_path):
    made = space()
    saving.save(tmp_path / "a.npz", made.state_dict())
    assert isinstance(made, nn.Module) and {"mean", "std"} < set(saving.load(tmp_path / "a.npz"))
