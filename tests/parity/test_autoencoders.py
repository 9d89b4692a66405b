"""The autoencoders of models/autoencoder.py beside twins in plain PyTorch: latents, output, loss and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import backend, nn, tensor
from tinydiff.models import autoencoder, classifier

torch = pytest.importorskip("torch")
from compare import TOLERANCE, channels_first, close, compare_gradients, move  # noqa: E402  after the check that PyTorch is here
from twins import Classifier, SelfAttention, perceptual_distance  # noqa: E402

F = torch.nn.functional
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]
WIDTHS, LATENT, CODES, GROUPS = (8, 16), 3, 7, 4
KINDS: dict[str, dict[str, Any]] = {
    "Autoencoder": {},
    "VariationalAutoencoder": {"kl_weight": 0.1},
    "QuantisedAutoencoder": {"codes": CODES},
}


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.GroupNorm
        self.norm1, self.conv1 = norm(GROUPS, width), conv(width, width, 3, padding=1)
        self.norm2, self.conv2 = norm(GROUPS, width), conv(width, width, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Twin(torch.nn.Module):
    """Two levels, patch 1, attention at the coarser; two outputs per number of the latent if it is variational."""

    def __init__(self, kind: str):
        super().__init__()
        conv, tconv, norm, (a, b) = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.GroupNorm, WIDTHS
        self.kind, outputs = kind, LATENT * (2 if kind == "VariationalAutoencoder" else 1)
        self.encoder = torch.nn.Sequential(
            conv(3, a, 3, padding=1), Block(a), conv(a, b, 2, 2), Block(b), SelfAttention(b, GROUPS), Block(b),
            norm(GROUPS, b), torch.nn.SiLU(), conv(b, outputs, 1),
        )  # fmt: skip
        self.decoder = torch.nn.Sequential(
            conv(LATENT, b, 3, padding=1), SelfAttention(b, GROUPS), Block(b), Block(b), tconv(b, a, 2, 2), Block(a),
            norm(GROUPS, a), torch.nn.SiLU(), conv(a, 3, 3, padding=1),
        )  # fmt: skip
        if kind == "QuantisedAutoencoder":
            self.codebook = torch.nn.Embedding(CODES, LATENT)

    def loss(self, x: Any, noise: Any) -> tuple[Any, Any]:
        z, cost = self.encoder(x), torch.zeros((), dtype=x.dtype)
        if self.kind == "VariationalAutoencoder":
            mean, log_variance = z.chunk(2, dim=1)
            posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
            kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
            cost = 0.1 * kl.flatten(1).sum(1).mean() / x[0].numel()
            z = mean + posterior.scale * noise
        elif self.kind == "QuantisedAutoencoder":
            q = self.codebook(torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), self.codebook.weight).argmin(1))
            q = q.reshape(len(z), *z.shape[2:], LATENT).permute(0, 3, 1, 2)
            cost = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
            z = z + (q - z).detach()
        y = self.decoder(z)
        return y, F.mse_loss(y, x) + cost


class Fixed:
    """In the place of an Rng: this noise."""

    def __init__(self, noise: Any):
        self.noise = noise

    def normal(self, shape: Any, dtype: Any, *, sample_offset: int = 0) -> Any:
        assert self.noise.shape == shape and self.noise.dtype == dtype
        return backend.to_device(self.noise)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("kind", "judged"),
    [(kind, False) for kind in KINDS] + [("Autoencoder", True)],
    ids=[*KINDS, "judged Autoencoder"],
)
def test_it_is_its_twin(kind: str, judged: bool, dtype: str) -> None:
    ours = getattr(autoencoder, kind)(
        3, WIDTHS, LATENT, patch=1, attention=True, groups=GROUPS, rng=0, **KINDS[kind]
    ).astype(dtype)  # fmt: skip
    theirs = Twin(kind).to(getattr(torch, dtype))
    move(theirs, ours)
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(4, 8, 12, 3)).astype(dtype), rng.normal(size=(4, 4, 6, LATENT)).astype(dtype)
    images, features, tolerance = torch.tensor(channels_first(x)), None, TOLERANCE[dtype]
    y, their_loss = theirs.loss(images, torch.tensor(channels_first(noise)))
    if judged:
        judge = classifier.Classifier((8, 12), {"digit": 5}, 3, (8, 16), width=10, groups=GROUPS, rng=1).astype(dtype)
        their_judge = Classifier({"digit": 5}, 3, (8, 16), 2 * 3, 10, GROUPS).to(getattr(torch, dtype))
        move(their_judge, judge)
        features = judge.activations
        layers = their_judge.activations(y), their_judge.activations(images)
        their_loss = their_loss + 0.1 * perceptual_distance(*layers)
    loss = autoencoder.autoencoder_loss(ours, tensor(x), Fixed(noise), features=features)
    loss.backward()
    their_loss.backward()
    close(loss, their_loss, tolerance, "loss")
    z, _ = ours.bottleneck(tensor(x), Fixed(noise))
    close(channels_first(ours.decode(z)), y, tolerance, "output")
    compare_gradients(ours, theirs, tolerance)
    if judged:
        compare_gradients(nn.Sequential(*judge.layers), torch.nn.Sequential(*their_judge.layers), tolerance)
