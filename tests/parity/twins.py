"""The nets of the lineage in plain PyTorch, channels first, written from the figures of the tutorial without looking at
tinydiff.models.tutorial. For the parity tests and the benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch

F = torch.nn.functional


def std(t: Any) -> Any:
    return torch.sqrt(torch.expm1(2 * math.log(25.0) * t) / (2 * math.log(25.0)))


class FourierFeatures(torch.nn.Module):
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
        self.time_embed = torch.nn.Sequential(FourierFeatures(), lin(256, 256), torch.nn.SiLU())
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
        self.ffn = torch.nn.Sequential(
            torch.nn.Linear(width, 3 * width), torch.nn.GELU(), torch.nn.Linear(3 * width, width)
        )

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
            tconv(4, 4, 3), norm(4), silu(), tconv(4, 4, 3, 2, output_padding=1), norm(4), silu(),
            tconv(4, 1, 3), torch.nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Any) -> Any:
        return self.decoder(self.encoder(x))


class Latent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv, tconv, lin, norm = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear, torch.nn.GroupNorm
        self.time_embed = torch.nn.Sequential(FourierFeatures(), lin(256, 256), torch.nn.SiLU())
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


# ---------------------------------------------------------------- ours: models/unet.py and diffusion/predict.py


class ResidualBlock(torch.nn.Module):
    def __init__(self, inside: int, outside: int, embedding: int, groups: int):
        super().__init__()
        conv, norm = torch.nn.Conv2d, torch.nn.GroupNorm
        self.norm1, self.conv1 = norm(groups, inside), conv(inside, outside, 3, padding=1)
        self.modulate = torch.nn.Linear(embedding, 2 * outside)
        self.norm2, self.conv2 = norm(groups, outside), zero(conv(outside, outside, 3, padding=1))
        self.shortcut = conv(inside, outside, 1) if inside != outside else torch.nn.Identity()

    def forward(self, x: Any, e: Any) -> Any:
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h) * (scale + 1) + shift)) + self.shortcut(x)


class SelfAttention(torch.nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = torch.nn.GroupNorm(groups, channels)
        self.qkv, self.project = torch.nn.Linear(channels, 3 * channels), zero(torch.nn.Linear(channels, channels))

    def forward(self, x: Any) -> Any:
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # (N, C, H, W) -> (N, 1, HW, C)
        attended = F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, dim=-1))
        return x + self.project(attended)[:, 0].transpose(1, 2).reshape(x.shape)


class ResidualUNet(torch.nn.Module):
    """With two levels, on images of one channel after pixel_unshuffle."""

    def __init__(self, widths: tuple[int, int], labels: dict[str, int], embedding: int = 192, groups: int = 8):
        super().__init__()
        conv, lin, (fine, coarse) = torch.nn.Conv2d, torch.nn.Linear, widths
        self.frequencies = torch.nn.Module()
        self.frequencies.register_buffer("W", torch.randn(32))
        self.noise = torch.nn.Sequential(lin(64, embedding), torch.nn.SiLU(), lin(embedding, embedding))
        self.labels = torch.nn.ModuleDict({name: torch.nn.Embedding(n + 1, embedding) for name, n in labels.items()})
        self.first, self.last = conv(4, fine, 3, padding=1), zero(conv(fine, 4, 3, padding=1))
        self.down = torch.nn.ModuleList(
            [ResidualBlock(fine, fine, embedding, groups), conv(fine, coarse, 2, 2),
             ResidualBlock(coarse, coarse, embedding, groups)]
        )  # fmt: skip
        self.middle = torch.nn.ModuleList(
            [SelfAttention(coarse, groups), ResidualBlock(coarse, coarse, embedding, groups)]
        )
        self.up = torch.nn.ModuleList(
            [ResidualBlock(2 * coarse, coarse, embedding, groups), torch.nn.ConvTranspose2d(coarse, fine, 2, 2),
             ResidualBlock(2 * fine, fine, embedding, groups)]
        )  # fmt: skip
        self.norm = torch.nn.GroupNorm(groups, fine)

    def forward(self, x: Any, noise: Any, labels: dict[str, Any]) -> Any:
        angle = noise[:, None] * self.frequencies.W * (2 * math.pi)
        e = self.noise(torch.cat([angle.sin(), angle.cos()], dim=1))
        for name, table in self.labels.items():
            values = labels[name]
            e = e + table(torch.where(values < 0, table.num_embeddings - 1, values))  # -1: the null class
        e = F.silu(e)
        fine = self.down[0](self.first(F.pixel_unshuffle(x, 2)), e)
        coarse = self.down[2](self.down[1](fine), e)
        h = self.middle[1](self.middle[0](coarse), e)
        h = self.up[1](self.up[0](torch.cat([h, coarse], dim=1), e))
        h = self.up[2](torch.cat([h, fine], dim=1), e)
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)


class Denoiser(torch.nn.Module):
    """The preconditioning of Karras et al. 2022, equation 7."""

    def __init__(self, net: Any, sigma_data: float):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data
        self.register_buffer("data_std", torch.tensor(sigma_data))  # ours has it in its state

    def forward(self, x: Any, sigma: Any, labels: dict[str, Any]) -> Any:
        s, sd = sigma[:, None, None, None], self.sigma_data
        total = s**2 + sd**2
        return x * (sd**2 / total) + self.net(x / total.sqrt(), sigma.log() / 4, labels) * (s * sd / total.sqrt())


def zero(layer: Any) -> Any:
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer
