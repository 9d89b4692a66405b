"""Every net of the lineage beside a twin in plain PyTorch:
output, loss and each parameter's gradient, weights by interop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinydiff import interop, ops, tensor
from tinydiff.diffusion import VESDE
from tinydiff.models import tutorial

torch = pytest.importorskip("torch")
import twins  # noqa: E402
from compare import TOLERANCE, channels_first, close, compare_gradients  # noqa: E402  after the check that PyTorch is here

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]

STD = VESDE(25.0).marginal_std


# ---------------------------------------------------------------- comparing

NETS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, int, int]]] = {
    "concat": (lambda: tutorial.ScoreUNet(STD, rng=0), lambda: twins.ScoreUNet("concat"), (28, 28, 1)),
    "add": (lambda: tutorial.ScoreUNet(STD, skips="add", rng=0), lambda: twins.ScoreUNet("add"), (28, 28, 1)),
    "conditional": (lambda: tutorial.ConditionalUNet(STD, rng=0), twins.ConditionalUNet, (28, 28, 1)),
    "latent": (lambda: tutorial.LatentUNet(STD, rng=0), twins.LatentUNet, (10, 10, 4)),
}


# Gradients that are zero up to rounding.
ONE_TOKEN = r".*transformer\.(attn_cross\.(query|key)|norm2)\..*"  # attention to a single token is always 1
ZERO = {
    # the group norm after it, 32 groups of 32 channels, subtracts what it adds to a channel
    "concat": r"dense7\..*",
    "add": r"dense7\..*",
    "conditional": rf"dense7\..*|{ONE_TOKEN}",
    "latent": rf"{ONE_TOKEN}|attn3\.transformer\.attn_self\.(query|key)\..*",  # level 3 is a single pixel
    "autoencoder": r"(encoder\.[036]|decoder\.[03])\.bias",  # taken out by batch norm, while training
}


def pair(name: str, dtype: str, way: str) -> tuple[Any, Any, Any]:
    """Our net and its twin, with the weights of one of them."""
    torch.manual_seed(0)
    make, make_theirs, shape = NETS[name]
    ours, theirs = make().astype(dtype), make_theirs().to(getattr(torch, dtype))
    assert ours.count() == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    if way == "to torch":
        theirs.load_state_dict({key: torch.tensor(value) for key, value in interop.to_torch(ours).items()})
    else:
        interop.from_torch(ours, theirs.state_dict())
    return ours, theirs, shape


@pytest.mark.parametrize(("dtype", "way"), [("float64", "to torch"), ("float32", "from torch")])
@pytest.mark.parametrize("name", NETS)
def test_score_net(name: str, dtype: str, way: str) -> None:
    ours, theirs, shape = pair(name, dtype, way)
    rng, n, tolerance = np.random.default_rng(1), 2, TOLERANCE[dtype]
    x0 = rng.random((n, *shape)).astype(dtype)
    z = rng.normal(size=(n, *shape)).astype(dtype)
    t = np.array([1e-3, 0.7], dtype)
    labels = np.array([3, 9])
    s = twins.std(torch.tensor(t)).numpy()[:, None, None, None]
    x = x0 + s * z

    given = (labels,) if name in ("conditional", "latent") else ()
    a = tensor(x, requires_grad=True)
    score = ours(a, tensor(t), *given)
    loss = ops.square(tensor(s) * score + tensor(z)).sum() / n

    b = torch.tensor(channels_first(x), requires_grad=True)
    their_score = theirs(b, torch.tensor(t), *(torch.tensor(g) for g in given)).permute(0, 2, 3, 1)
    their_loss = ((torch.tensor(s) * their_score + torch.tensor(z)) ** 2).sum() / n

    for i in range(n):  # 1 / s(t) differs by a factor of 100 between the samples
        close(score[i], their_score[i], tolerance, f"score of sample {i}")
    close(loss, their_loss, tolerance, "loss")
    loss.backward()
    their_loss.backward()
    close(channels_first(a.grad), b.grad, tolerance, "gradient of x")
    compare_gradients(ours, theirs, tolerance, ZERO[name])


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_autoencoder(dtype: str, mode: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (
        tutorial.Autoencoder(rng=0).astype(dtype).train(mode),
        twins.Autoencoder().to(getattr(torch, dtype)).train(mode),
    )
    theirs.load_state_dict({key: torch.tensor(value) for key, value in interop.to_torch(ours).items()})
    tolerance = TOLERANCE[dtype]
    x = np.random.default_rng(1).random((5, 28, 28, 1)).astype(dtype)
    images = torch.tensor(channels_first(x))
    y, z = ours(tensor(x)), theirs(images)
    loss, their_loss = ops.mse_loss(y, tensor(x)), torch.nn.functional.mse_loss(z, images)
    close(y, z.permute(0, 2, 3, 1), tolerance, "output")
    close(loss, their_loss, tolerance, "loss")
    loss.backward()
    their_loss.backward()
    state = interop.to_torch(ours)
    for key, value in theirs.state_dict().items():
        if "running" in key:
            close(state[key], value, tolerance, key)
    close(ours.encode(tensor(x)), theirs.encoder(images).permute(0, 2, 3, 1), tolerance, "latents")
    compare_gradients(ours, theirs, tolerance, ZERO["autoencoder"] if mode else "")
