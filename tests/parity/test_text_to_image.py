"""Images from words beside twins made of PyTorch's own transformer layers: the U-Net with a context, the text encoder,
and both within the denoiser and its loss; output, the gradient of the input and of every parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, backend, tensor
from tinydiff.diffusion import Denoiser, edm_loss
from tinydiff.models.text import TextEncoder, TextToImage
from tinydiff.models.unet import UNet

torch = pytest.importorskip("torch")
import twins  # noqa: E402  after the check that PyTorch is here
from compare import TOLERANCE, channels_first, close, compare_gradients, move  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]

# ---------------------------------------------------------------- the U-Net

COUNTS = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)  # the first is the null prompt
UNETS: dict[str, dict[str, Any]] = {  # options of both nets; size, and the mask, whose length is that of the context
    "transformers at each level": {
        "widths": (8, 16), "channels": 3, "patch": 1, "context": 10, "attention": (0, 1),
        "labels": {"digit": 5, "colour": 3}, "size": (8, 12), "counts": COUNTS,
    },
    "two blocks, context as wide as the level, nothing pooled": {
        "widths": (8, 16), "channels": 3, "patch": 2, "blocks": 2, "context": 16, "attention": (1,), "pooled": False,
        "size": (8, 12), "counts": COUNTS,
    },
    "no mask, other channels come out": {
        "widths": (8, 16), "channels": 3, "out_channels": 2, "patch": 2, "context": 10, "attention": (1,),
        "labels": {"digit": 5}, "size": (8, 4),
    },
    "one text for all, on three levels": {
        "widths": (8, 16, 24), "channels": 4, "patch": 1, "context": 10, "attention": (2,), "size": (16, 16),
        "counts": COUNTS[1:2],
    },
    "attention without a context": {"widths": (8, 16), "attention": (0, 1), "labels": {"digit": 5}, "size": (8, 8)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str, dtype: str) -> None:
    options = {"channels": 1, "labels": {}, "counts": None, **UNETS[name]}
    widths, size, counts = (options.pop(key) for key in ("widths", "size", "counts"))
    channels, labels, context = options.pop("channels"), options.pop("labels"), options.get("context")
    shared = {"embedding": 24, "groups": 4, "heads": 2, **options}
    ours = UNet(channels, widths, labels=labels, rng=0, **shared).astype(dtype)
    theirs = twins.UNet(widths, labels, channels=channels, **shared).to(getattr(torch, dtype))
    move(theirs, ours)

    rng, n, tolerance = np.random.default_rng(1), 3, TOLERANCE[dtype]
    x, noise = rng.normal(size=(n, *size, channels)).astype(dtype), rng.normal(size=n).astype(dtype)
    values = {label: np.array([1, -1, 2]) for label in labels}
    texts = n if counts is None else len(counts)
    words = None if context is None else rng.normal(size=(texts, 5, context)).astype(dtype)

    a, b = tensor(x, requires_grad=True), torch.tensor(channels_first(x), requires_grad=True)
    c = None if words is None else tensor(words, requires_grad=True)
    d = None if words is None else torch.tensor(words, requires_grad=True)
    y = ours(a, tensor(noise), c, None if counts is None else backend.to_device(counts), **values)
    z = theirs(
        b,
        torch.tensor(noise),
        {label: torch.tensor(v) for label, v in values.items()},
        None if d is None else d.expand(n, -1, -1),
        None if counts is None else torch.tensor(counts).expand(n, -1),
    )
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(channels_first(g)))
    close(channels_first(y), z, tolerance, "output")
    close(channels_first(a.grad), b.grad, tolerance, "gradient of x")
    if c is not None:
        close(c.grad, d.grad, tolerance, "gradient of the context")
    compare_gradients(ours, theirs, tolerance)


# ---------------------------------------------------------------- words

TOKENS = np.array([[0, 0, 0, 0], [3, 1, 0, 0], [5, 2, 4, 6]])  # the null prompt, one that is shorter, a full one


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_text_encoder(dtype: str) -> None:
    ours = TextEncoder(7, 5, 12, blocks=2, heads=3, rng=0)
    theirs = twins.TextEncoder(7, 5, 12, 2, 3)
    close(ours.positions.table, theirs.positions.table, 1e-6, "positions")
    ours, theirs = ours.astype(dtype), theirs.to(getattr(torch, dtype))
    move(theirs, ours)
    y, counts = ours(TOKENS)
    z, their_counts = theirs(torch.tensor(TOKENS))
    g = np.random.default_rng(1).normal(size=z.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(g))
    close(y, z, TOLERANCE[dtype], "output")
    assert np.array_equal(backend.to_host(counts), their_counts.numpy())
    compare_gradients(ours, theirs, TOLERANCE[dtype])


def denoisers(dtype: str) -> tuple[Any, Any]:
    """A small text-to-image net within the denoiser, and its twin."""
    net = UNet(3, (8, 16), labels={"digit": 5}, embedding=24, groups=4, heads=2, context=12, rng=0)
    ours = Denoiser(TextToImage(TextEncoder(7, 5, 12, blocks=1, heads=3, rng=0), net), 0.5).astype(dtype)
    their_net = twins.UNet(
        (8, 16), {"digit": 5}, embedding=24, groups=4, heads=2, context=12, channels=3, attention=(1,)
    )
    theirs = twins.Denoiser(twins.TextToImage(twins.TextEncoder(7, 5, 12, 1, 3), their_net), 0.5)
    theirs = theirs.to(getattr(torch, dtype))
    move(theirs, ours)
    return ours, theirs


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_denoiser_of_text(dtype: str) -> None:
    ours, theirs = denoisers(dtype)
    rng, tolerance = np.random.default_rng(1), TOLERANCE[dtype]
    x, sigma = rng.normal(size=(3, 8, 12, 3)).astype(dtype), np.array([0.01, 0.5, 20.0], dtype)
    digits = np.array([1, -1, 4])
    a, b = tensor(x, requires_grad=True), torch.tensor(channels_first(x), requires_grad=True)
    y = ours(a, backend.to_device(sigma), tokens=TOKENS, digit=digits)
    z = theirs(b, torch.tensor(sigma), {"digit": torch.tensor(digits)}, torch.tensor(TOKENS))
    g = rng.normal(size=y.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(channels_first(g)))
    close(channels_first(y), z, tolerance, "output")
    close(channels_first(a.grad), b.grad, tolerance, "gradient of x")
    compare_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_of_text(dtype: str) -> None:
    """Karras et al. 2022, equations 2 and 8, at the noise levels and with the noise that our loss has drawn."""
    ours, theirs = denoisers(dtype)
    x0, digits = np.random.default_rng(1).normal(size=(3, 8, 12, 3)).astype(dtype), np.array([1, -1, 4])
    loss = edm_loss(ours, x0, Rng(7), tokens=TOKENS, digit=digits)

    rng, images = Rng(7), torch.tensor(channels_first(x0))
    sigma = torch.tensor(backend.to_host(rng.normal(3, dtype))).mul(1.2).sub(1.2).exp()
    noise = torch.tensor(channels_first(rng.normal(x0.shape, dtype)))
    wide = sigma[:, None, None, None]
    denoised = theirs(images + wide * noise, sigma, {"digit": torch.tensor(digits)}, torch.tensor(TOKENS))
    their_loss = ((wide**2 + 0.5**2) / (wide * 0.5) ** 2 * (denoised - images) ** 2).mean()

    close(loss, their_loss, TOLERANCE[dtype], "loss")
    loss.backward()
    their_loss.backward()
    compare_gradients(ours, theirs, TOLERANCE[dtype])
