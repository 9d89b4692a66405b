"""Images from words beside twins made of PyTorch's own transformer layers: the U-Net with a context, the text encoder,
and both within the denoiser and its loss; output, the gradient of the input and of every parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import backend, interop, tensor
from tinydiff.models.unet import UNet

torch = pytest.importorskip("torch")
import twins  # noqa: E402  after the check that PyTorch is here
from compare import channels_first, close, compare_gradients  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def move(theirs: Any, ours: Any) -> None:
    """The twin's weights, made other than the zeros that many begin with, which would hide what comes before them."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    interop.from_torch(ours, theirs.state_dict())


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
    theirs = twins.ResidualUNet(widths, labels, channels=channels, **shared).to(getattr(torch, dtype))
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
