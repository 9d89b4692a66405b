"""The nets of the released Stable Diffusion beside those of diffusers and transformers: output, the gradient of every
input and of every parameter, in both versions' configurations at a reduced width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import backend, interop, tensor
from tinydiff.models.stable_diffusion import weights

torch = pytest.importorskip("torch")
import released  # noqa: E402  after the check that PyTorch is here
from compare import channels_first, close, compare_gradients  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("numpy_backend")]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
both = pytest.mark.parametrize("version", [1, 2])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def moved(make: Any, theirs: Any, dtype: str) -> tuple[Any, Any]:
    """Our net of their configuration, with their weights, in this dtype."""
    ours = make(theirs.config.to_dict() if hasattr(theirs.config, "to_dict") else dict(theirs.config))
    for p in ours.parameters():
        p.data = backend.xp.zeros(p.shape, "float32")  # they have no memory yet
    theirs = theirs.to(getattr(torch, dtype))
    ours = ours.astype(dtype)
    interop.from_torch(ours, theirs.state_dict())
    return ours, theirs


class Exact(torch.nn.Module):
    """The features of the time, which diffusers computes in float32 whatever the dtype is."""

    def __init__(self, half: int):
        super().__init__()
        self.frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)

    def forward(self, t: Any) -> Any:
        angles = t.double()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@both
@dtypes
def test_unet(version: int, dtype: str) -> None:
    theirs = released.unet(version)
    if dtype == "float64":
        theirs.time_proj = Exact(4)
    ours, theirs = moved(weights.unet_of, theirs, dtype)
    rng = np.random.default_rng(1)
    x, words = (rng.normal(size=s).astype(dtype) for s in ((2, 9, 16, 4), (2, 7, ours.context)))
    steps = np.array([1.0, 801.0])
    a, c = tensor(x, requires_grad=True), tensor(words, requires_grad=True)
    b, d = torch.tensor(channels_first(x), requires_grad=True), torch.tensor(words, requires_grad=True)
    y, z = ours(a, steps, c), theirs(b, torch.tensor(steps), d).sample
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(g)
    z.backward(torch.tensor(channels_first(g)))
    close(channels_first(y), z, TOLERANCE[dtype], "output")
    close(channels_first(a.grad), b.grad, TOLERANCE[dtype], "gradient of x")
    close(c.grad, d.grad, TOLERANCE[dtype], "gradient of the words")
    compare_gradients(ours, theirs, TOLERANCE[dtype])


@both
def test_unet_with_checkpoints_has_the_same_gradients(version: int) -> None:
    ours, _ = moved(weights.unet_of, released.unet(version), "float64")
    rng, found = np.random.default_rng(1), []
    x, words = rng.normal(size=(1, 8, 8, 4)), tensor(rng.normal(size=(1, 5, ours.context)), requires_grad=True)
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        words.grad = None
        (ours(tensor(x), np.array([3.0]), words) ** 2).sum().backward()
        found.append([words.grad.data, *(p.grad.data for p in ours.parameters())])
    for a, b in zip(*found):
        assert abs(a - b).max() <= 1e-12 * abs(b).max()


@dtypes
def test_autoencoder(dtype: str) -> None:
    ours, theirs = moved(weights.autoencoder_of, released.autoencoder(), dtype)
    rng = np.random.default_rng(1)
    x, noise = (rng.normal(size=s).astype(dtype) for s in ((2, 16, 24, 3), (2, 2, 3, 4)))
    a, b = tensor(x, requires_grad=True), torch.tensor(channels_first(x), requires_grad=True)
    law = theirs.encode(b).latent_dist
    z, their_z = ours.encode(a, noise), (law.mean + law.std * torch.tensor(channels_first(noise))) * 0.18215
    y, their_y = ours.decode(z), theirs.decode(their_z / 0.18215).sample
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(g)
    their_y.backward(torch.tensor(channels_first(g)))
    close(channels_first(z), their_z, TOLERANCE[dtype], "latents")
    close(channels_first(ours.encode(tensor(x))), law.mean * 0.18215, TOLERANCE[dtype], "their mean")
    close(channels_first(y), their_y, TOLERANCE[dtype], "output")
    close(channels_first(a.grad), b.grad, TOLERANCE[dtype], "gradient of x")
    # All keys may be shifted together: softmax does not see it.
    compare_gradients(ours, theirs, TOLERANCE[dtype], zero=r".*to_k\.bias")


@both
@dtypes
def test_text_encoder(version: int, dtype: str) -> None:
    theirs = released.text_encoder(version)
    ours, theirs = moved(weights.text_encoder_of, theirs, dtype)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, released.WORDS, (2, 77))
    y, z = ours(tokens), theirs(torch.tensor(tokens)).last_hidden_state
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(g)
    z.backward(torch.tensor(g))
    close(y, z, TOLERANCE[dtype], "output")
    compare_gradients(ours, theirs, TOLERANCE[dtype], zero=r".*k_proj\.bias")  # keys again
