"""Every net of the lineage beside a twin in plain PyTorch: output, loss and each parameter's gradient, weights by interop.

The twins are written from the figures of the tutorial, channels first, without looking at tinydiff.models.tutorial.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinydiff import Tensor, backend, interop, ops, tensor
from tinydiff.diffusion.sde import VESDE
from tinydiff.models import tutorial

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
STD = VESDE(25.0).marginal_std


def std(t: Any) -> Any:
    return torch.sqrt(torch.expm1(2 * math.log(25.0) * t) / (2 * math.log(25.0)))


# ---------------------------------------------------------------- the twins


class Waves(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.randn(128) * 30, requires_grad=False)

    def forward(self, t: Any) -> Any:
        a = t[:, None] * self.W[None, :] * 2 * math.pi
        return torch.cat([torch.sin(a), torch.cos(a)], dim=-1)


class UNet(torch.nn.Module):
    def __init__(self, skips: str):
        super().__init__()
        conv, tconv, lin, norm = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear, torch.nn.GroupNorm
        self.cat, k = skips == "concat", 2 if skips == "concat" else 1
        self.time_embed = torch.nn.Sequential(Waves(), lin(256, 256), torch.nn.SiLU())
        self.conv1, self.dense1, self.gnorm1 = conv(1, 32, 3, bias=False), lin(256, 32), norm(4, 32)
        self.conv2, self.dense2, self.gnorm2 = conv(32, 64, 3, 2, bias=False), lin(256, 64), norm(32, 64)
        self.conv3, self.dense3, self.gnorm3 = conv(64, 128, 3, 2, bias=False), lin(256, 128), norm(32, 128)
        self.conv4, self.dense4, self.gnorm4 = conv(128, 256, 3, 2, bias=False), lin(256, 256), norm(32, 256)
        self.tconv4, self.dense5, self.tgnorm4 = tconv(256, 128, 3, 2, bias=False), lin(256, 128), norm(32, 128)
        self.tconv3 = tconv(128 * k, 64, 3, 2, output_padding=1, bias=False)
        self.dense6, self.tgnorm3 = lin(256, 64), norm(32, 64)
        self.tconv2 = tconv(64 * k, 32, 3, 2, output_padding=1, bias=False)
        self.dense7, self.tgnorm2 = lin(256, 32), norm(32, 32)
        self.tconv1 = tconv(32 * k, 1, 3)

    def forward(self, x: Any, t: Any) -> Any:
        return self.run(x, t, lambda h: h, lambda h: h)

    def run(self, x: Any, t: Any, attn3: Any, attn4: Any) -> Any:
        e = self.time_embed(t)
        join = (lambda a, b: torch.cat([a, b], dim=1)) if self.cat else torch.add
        h1 = F.silu(self.gnorm1(self.conv1(x) + self.dense1(e)[:, :, None, None]))
        h2 = F.silu(self.gnorm2(self.conv2(h1) + self.dense2(e)[:, :, None, None]))
        h3 = attn3(F.silu(self.gnorm3(self.conv3(h2) + self.dense3(e)[:, :, None, None])))
        h4 = attn4(F.silu(self.gnorm4(self.conv4(h3) + self.dense4(e)[:, :, None, None])))
        h = F.silu(self.tgnorm4(self.tconv4(h4) + self.dense5(e)[:, :, None, None]))
        h = F.silu(self.tgnorm3(self.tconv3(join(h, h3)) + self.dense6(e)[:, :, None, None]))
        h = F.silu(self.tgnorm2(self.tconv2(join(h, h2)) + self.dense7(e)[:, :, None, None]))
        return self.tconv1(join(h, h1)) / std(t)[:, None, None, None]


class CrossAttention(torch.nn.Module):
    def __init__(self, width: int, context: int):
        super().__init__()
        self.query = torch.nn.Linear(width, width, bias=False)
        self.key, self.value = torch.nn.Linear(context, width, bias=False), torch.nn.Linear(context, width, bias=False)

    def forward(self, x: Any, c: Any) -> Any:
        s = torch.einsum("nlc,nsc->nls", self.query(x), self.key(c)) / math.sqrt(x.shape[-1])
        return torch.einsum("nls,nsc->nlc", s.softmax(-1), self.value(c))


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn_self, self.attn_cross = CrossAttention(width, width), CrossAttention(width, 256)
        self.norm1, self.norm2, self.norm3 = (torch.nn.LayerNorm(width) for _ in range(3))
        self.ffn = torch.nn.Sequential(torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, width))

    def forward(self, x: Any, c: Any) -> Any:
        y = self.norm1(x)
        x = self.attn_self(y, y) + x
        x = self.attn_cross(self.norm2(x), c) + x
        return self.ffn(self.norm3(x)) + x


class Spatial(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.transformer = Block(width)

    def forward(self, x: Any, c: Any) -> Any:
        tokens = x.flatten(2).transpose(1, 2)
        return self.transformer(tokens, c).transpose(1, 2).reshape(x.shape) + x


class Conditional(UNet):
    def __init__(self) -> None:
        super().__init__("add")
        self.cond_embed = torch.nn.Embedding(10, 256)
        self.attn3, self.attn4 = Spatial(128), Spatial(256)

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        c = self.cond_embed(labels)[:, None, :]
        return self.run(x, t, lambda h: self.attn3(h, c), lambda h: self.attn4(h, c))


class Coder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, tconv, norm, silu = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.BatchNorm2d, torch.nn.SiLU
        self.encoder = torch.nn.Sequential(
            conv(1, 4, 3), norm(4), silu(), conv(4, 4, 3, 2), norm(4), silu(), conv(4, 4, 3), norm(4)
        )  # fmt: skip
        self.decoder = torch.nn.Sequential(
            tconv(4, 4, 3), norm(4), silu(), tconv(4, 4, 3, 2, output_padding=1), norm(4), silu(), tconv(4, 1, 3), torch.nn.Sigmoid()
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.decoder(self.encoder(x))


class Latent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, tconv, lin, norm = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear, torch.nn.GroupNorm
        self.time_embed = torch.nn.Sequential(Waves(), lin(256, 256), torch.nn.SiLU())
        self.cond_embed = torch.nn.Embedding(10, 256)
        self.conv1, self.dense1, self.gnorm1 = conv(4, 16, 3, bias=False), lin(256, 16), norm(4, 16)
        self.conv2, self.dense2, self.gnorm2 = conv(16, 32, 3, 2, bias=False), lin(256, 32), norm(4, 32)
        self.conv3, self.dense3, self.gnorm3 = conv(32, 64, 3, 2, bias=False), lin(256, 64), norm(4, 64)
        self.tconv3, self.dense4, self.tgnorm3 = tconv(64, 32, 3, 2, bias=False), lin(256, 32), norm(4, 32)
        self.tconv2 = tconv(32, 16, 3, 2, output_padding=1, bias=False)
        self.dense5, self.tgnorm2 = lin(256, 16), norm(4, 16)
        self.tconv1 = tconv(16, 4, 3)
        self.attn2, self.attn3, self.attn4 = Spatial(32), Spatial(64), Spatial(32)

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        e, c = self.time_embed(t), self.cond_embed(labels)[:, None, :]
        h1 = F.silu(self.gnorm1(self.conv1(x) + self.dense1(e)[:, :, None, None]))
        h2 = self.attn2(F.silu(self.gnorm2(self.conv2(h1) + self.dense2(e)[:, :, None, None])), c)
        h3 = self.attn3(F.silu(self.gnorm3(self.conv3(h2) + self.dense3(e)[:, :, None, None])), c)
        h = self.attn4(F.silu(self.tgnorm3(self.tconv3(h3) + self.dense4(e)[:, :, None, None])), c)
        h = F.silu(self.tgnorm2(self.tconv2(h + h2) + self.dense5(e)[:, :, None, None]))
        return self.tconv1(h + h1) / std(t)[:, None, None, None]


# ---------------------------------------------------------------- comparing

NETS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, int, int]]] = {
    "concat": (lambda: tutorial.ScoreUNet(STD, rng=0), lambda: UNet("concat"), (28, 28, 1)),
    "add": (lambda: tutorial.ScoreUNet(STD, skips="add", rng=0), lambda: UNet("add"), (28, 28, 1)),
    "conditional": (lambda: tutorial.ConditionalUNet(STD, rng=0), Conditional, (28, 28, 1)),
    "latent": (lambda: tutorial.LatentUNet(STD, rng=0), Latent, (10, 10, 4)),
}


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def close(ours: Any, theirs: Any, tolerance: float, what: str, least: float = 0.0) -> None:
    """The largest error, relative to the largest value, or to `least`."""
    a, b = host(ours), theirs.detach().numpy()
    assert a.shape == b.shape and a.dtype == b.dtype, what
    error, size = abs(a - b).max(), max(abs(b).max(), least)
    assert error <= tolerance * size, f"{what}: {error:.3g} of {size:.3g}"


def compare_gradients(ours: Any, theirs: Any, tolerance: float) -> None:
    for p in ours.parameters():
        p.data = p.grad.data
    found = interop.to_torch(ours)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, _ in ours.named_parameters()} == set(wanted)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, g in wanted.items():
        is_zero = ours.training and re.fullmatch(ZERO[type(ours).__name__], name)
        assert not is_zero or float(g.abs().max()) < 1e-5 * largest, f"the gradient of {name} should be zero but for rounding"
        close(found[name], g, tolerance, f"gradient of {name}", least=largest if is_zero else 0.0)


# Gradients that are zero but for rounding.
ONE_TOKEN = r".*transformer\.(attn_cross\.(query|key)|norm2)\..*"  # attention to a single token is 1, whatever is asked
ZERO = {
    "ScoreUNet": r"dense7\..*",  # the group norm after it, 32 groups of 32 channels, takes out what it adds to a channel
    "ConditionalUNet": rf"dense7\..*|{ONE_TOKEN}",
    "LatentUNet": rf"{ONE_TOKEN}|attn3\.transformer\.attn_self\.(query|key)\..*",  # level 3 is a single pixel
    "Autoencoder": r"(encoder\.[036]|decoder\.[03])\.bias",  # taken out by batch norm, while training
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
    s = std(torch.tensor(t)).numpy()[:, None, None, None]
    x = x0 + s * z

    given = (labels,) if name in ("conditional", "latent") else ()
    a = tensor(x, requires_grad=True)
    score = ours(a, tensor(t), *given)
    loss = ops.square(tensor(s) * score + tensor(z)).sum() / n

    b = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    their_score = theirs(b, torch.tensor(t), *(torch.tensor(g) for g in given)).permute(0, 2, 3, 1)
    their_loss = ((torch.tensor(s) * their_score + torch.tensor(z)) ** 2).sum() / n

    for i in range(n):  # 1 / s(t) differs by a factor of 100 between the samples
        close(score[i], their_score[i], tolerance, f"score of sample {i}")
    close(loss, their_loss, tolerance, "loss")
    loss.backward()
    their_loss.backward()
    close(ops.transpose(a.grad, axes=(0, 3, 1, 2)), b.grad, tolerance, "gradient of x")
    compare_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_autoencoder(dtype: str, mode: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = tutorial.Autoencoder(rng=0).astype(dtype).train(mode), Coder().to(getattr(torch, dtype)).train(mode)
    theirs.load_state_dict({key: torch.tensor(value) for key, value in interop.to_torch(ours).items()})
    tolerance = TOLERANCE[dtype]
    x = np.random.default_rng(1).random((5, 28, 28, 1)).astype(dtype)
    images = torch.tensor(x.transpose(0, 3, 1, 2))
    y, z = ours(tensor(x)), theirs(images)
    loss, their_loss = ops.mse_loss(y, tensor(x)), F.mse_loss(z, images)
    close(y, z.permute(0, 2, 3, 1), tolerance, "output")
    close(loss, their_loss, tolerance, "loss")
    loss.backward()
    their_loss.backward()
    state = interop.to_torch(ours)
    for key, value in theirs.state_dict().items():
        if "running" in key:
            close(state[key], value, tolerance, key)
    close(ours.encode(tensor(x)), theirs.encoder(images).permute(0, 2, 3, 1), tolerance, "latents")
    compare_gradients(ours, theirs, tolerance)
