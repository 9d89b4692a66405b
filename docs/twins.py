"""The nets of tinydiff in plain PyTorch, channels first: the same names of classes and weights, so that a checkpoint of
one is a checkpoint of the other.

    net = twins.ScoreUNet("concat")
    net.load_state_dict({name: torch.tensor(a) for name, a in interop.to_torch(ours).items()})

Copy this file beside your own program; it needs PyTorch alone. docs/from_pytorch.md says more. The nets of the tutorial
were written from its figures, without looking at tinydiff.models.tutorial, because the tests compare the two: output,
loss and every gradient (tests/parity).
"""

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


class ScoreUNet(torch.nn.Module):
    """models.tutorial.ScoreUNet. skips: "concat" or "add"."""

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


class ConditionalUNet(ScoreUNet):
    """models.tutorial.ConditionalUNet."""

    def __init__(self) -> None:
        super().__init__("add")
        self.cond_embed = torch.nn.Embedding(10, 256)
        self.attn3, self.attn4 = Spatial(128), Spatial(256)

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        c = self.cond_embed(labels)[:, None, :]
        return self.run(x, t, lambda h: self.attn3(h, c), lambda h: self.attn4(h, c))


class Autoencoder(torch.nn.Module):
    """models.tutorial.Autoencoder."""

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


class LatentUNet(torch.nn.Module):
    """models.tutorial.LatentUNet."""

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


class SpatialTransformer(torch.nn.Module):
    """PyTorch's own layer, with the pixels as its sequence; `key_padding_mask` is True where a word does not count."""

    def __init__(self, width: int, context: int | None, heads: int):
        super().__init__()
        kind = torch.nn.TransformerEncoderLayer if context is None else torch.nn.TransformerDecoderLayer
        self.block = kind(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        if context is not None:
            self.block.multihead_attn = torch.nn.MultiheadAttention(
                width, heads, kdim=context, vdim=context, batch_first=True
            )

    def forward(self, x: Any, words: Any, counts: Any) -> Any:
        tokens = x.flatten(2).mT  # (N, C, H, W) -> (N, HW, C)
        seen = () if words is None else (words,)
        masks = {} if counts is None else {"memory_key_padding_mask": ~counts}
        return self.block(tokens, *seen, **masks).mT.reshape(x.shape)


class UNet(torch.nn.Module):
    """models.unet.UNet: ours. Each level, on either way, is a list of pairs: a residual block, and the transformer that
    follows it or None."""

    def __init__(
        self,
        widths: tuple[int, ...],
        labels: dict[str, int],
        embedding: int = 192,
        groups: int = 8,
        *,
        channels: int = 1,
        out_channels: int | None = None,
        patch: int = 2,
        blocks: int = 1,
        context: int | None = None,
        attention: tuple[int, ...] = (),
        heads: int = 4,
        pooled: bool = True,
    ):
        super().__init__()
        conv, tconv, lin = torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear
        self.patch, fine, coarse, count = patch, widths[0], widths[-1], len(widths)
        self.frequencies = torch.nn.Module()
        self.frequencies.register_buffer("W", torch.randn(32))
        self.noise = torch.nn.Sequential(lin(64, embedding), torch.nn.SiLU(), lin(embedding, embedding))
        self.labels = torch.nn.ModuleDict({name: torch.nn.Embedding(n + 1, embedding) for name, n in labels.items()})
        self.pooled = lin(context, embedding) if context is not None and pooled else None
        self.first = conv(channels * patch**2, fine, 3, padding=1)
        self.last = zero(conv(fine, (out_channels or channels) * patch**2, 3, padding=1))
        self.norm = torch.nn.GroupNorm(groups, fine)

        def level(i: int, inside: int) -> list[Any]:
            def pair() -> tuple[Any, Any]:
                block = ResidualBlock(inside, widths[i], embedding, groups)
                return block, SpatialTransformer(widths[i], context, heads) if i in attention else None

            return [pair() for _ in range(blocks)]

        # Plain lists, which PyTorch does not look into; the names are those of the flat lists `down` and `up`.
        self.falling = [level(i, width) for i, width in enumerate(widths)]
        self.halve = [conv(a, b, 2, 2) for a, b in zip(widths, widths[1:])]
        self.rising = [level(i, 2 * width) for i, width in enumerate(widths)]
        self.double = [tconv(b, a, 2, 2) for a, b in zip(widths, widths[1:])]
        self.down, self.up = torch.nn.ModuleList(), torch.nn.ModuleList()
        for i in range(count):
            self.down.extend([m for pair in self.falling[i] for m in pair if m is not None] + self.halve[i : i + 1])
        for i in reversed(range(count)):
            self.up.extend([m for pair in self.rising[i] for m in pair if m is not None])
            self.up.extend([self.double[i - 1]] if i > 0 else [])
        self.middle = torch.nn.ModuleList(
            [SelfAttention(coarse, groups), ResidualBlock(coarse, coarse, embedding, groups)]
        )

    def forward(self, x: Any, noise: Any, labels: dict[str, Any], words: Any = None, counts: Any = None) -> Any:
        """words: (N, S, features); counts: (N, S), which of them count."""
        angle = noise[:, None] * self.frequencies.W * (2 * math.pi)
        e = self.noise(torch.cat([angle.sin(), angle.cos()], dim=1))
        for name, table in self.labels.items():
            values = labels[name]
            e = e + table(torch.where(values < 0, table.num_embeddings - 1, values))  # -1: the null class
        if self.pooled is not None:
            rows = zip(words, [...] * len(words) if counts is None else counts)
            e = e + self.pooled(torch.stack([sentence[kept].mean(0) for sentence, kept in rows]))
        e = F.silu(e)

        def through(pair: tuple[Any, Any], h: Any) -> Any:
            block, transformer = pair
            h = block(h, e)
            return h if transformer is None else transformer(h, words, counts)

        h, skips = self.first(unshuffle(x, self.patch)), []
        for i, level in enumerate(self.falling):
            h = self.halve[i - 1](h) if i > 0 else h
            skips.append([h := through(pair, h) for pair in level])
        h = self.middle[1](self.middle[0](h), e)
        for i in reversed(range(len(self.rising))):
            for pair, skip in zip(self.rising[i], reversed(skips[i])):
                h = through(pair, torch.cat([h, skip], dim=1))
            h = self.double[i - 1](h) if i > 0 else h
        return shuffle(self.last(F.silu(self.norm(h))), self.patch)


def unshuffle(x: Any, patch: int) -> Any:
    """PyTorch's pixel_unshuffle puts the channels before the places in a patch, (N, C p p, h, w); ours behind them."""
    return F.pixel_unshuffle(x, patch).unflatten(1, (x.shape[1], patch**2)).transpose(1, 2).flatten(1, 2)


def shuffle(x: Any, patch: int) -> Any:
    return F.pixel_shuffle(x.unflatten(1, (patch**2, -1)).transpose(1, 2).flatten(1, 2), patch)


class TextEncoder(torch.nn.Module):
    """models.text.TextEncoder: a transformer of PyTorch on words and places; padding, the number 0, counts at the first
    place alone."""

    def __init__(self, size: int, length: int, features: int, blocks: int, heads: int):
        super().__init__()
        self.embedding, self.norm = torch.nn.Embedding(size, features), torch.nn.LayerNorm(features)
        angle = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, features, 2) / features))
        self.positions = torch.nn.Module()
        self.positions.register_buffer("table", torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1))
        self.blocks = torch.nn.ModuleList(SpatialTransformer(features, None, heads).block for _ in range(blocks))

    def forward(self, tokens: Any) -> tuple[Any, Any]:
        counts = tokens > 0
        counts[:, 0] = True
        x = self.embedding(tokens) + self.positions.table[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~counts)
        return self.norm(x), counts


class TextToImage(torch.nn.Module):
    """models.text.TextToImage."""

    def __init__(self, encoder: Any, net: Any):
        super().__init__()
        self.encoder, self.net = encoder, net

    def forward(self, x: Any, noise: Any, labels: dict[str, Any], tokens: Any) -> Any:
        return self.net(x, noise, labels, *self.encoder(tokens))


class Classifier(torch.nn.Module):
    """models.classifier.Classifier, for images whose last resolution has so many pixels."""

    def __init__(
        self,
        heads: dict[str, int],
        in_channels: int,
        channels: tuple[int, ...],
        pixels: int,
        width: int,
        groups: int,
    ):
        super().__init__()
        conv, norm, silu = torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.SiLU
        self.layers = torch.nn.ModuleList()
        for before, c in zip((in_channels, *channels), channels):
            self.layers.extend([conv(before, c, 3, padding=1), norm(groups, c), silu()])
            self.layers.extend([conv(c, c, 3, 2, 1), norm(groups, c), silu()])
        self.last = torch.nn.Linear(pixels * channels[-1], width)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(width, n) for name, n in heads.items()})

    def activations(self, x: Any) -> list[Any]:
        """What comes out of each resolution."""
        found = []
        for i in range(0, len(self.layers), 6):
            x = torch.nn.Sequential(*self.layers[i : i + 6])(x)
            found.append(x)
        return found

    def forward(self, x: Any) -> dict[str, Any]:
        rows = self.activations(x)[-1].permute(0, 2, 3, 1).flatten(1)  # our order of (h, w, C)
        features = F.silu(self.last(rows))
        return {name: head(features) for name, head in self.heads.items()}


def perceptual_distance(layers: list[Any], others: list[Any]) -> Any:
    """The mean over pictures, places and layers of |a / |a| - b / |b||^2."""
    unit = lambda a: a / torch.linalg.vecdot(a, a, dim=1).add(1e-10).sqrt()[:, None]  # noqa: E731
    return torch.stack([(unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(layers, others)]).mean()


class Denoiser(torch.nn.Module):
    """diffusion.Denoiser: the preconditioning of Karras et al. 2022, equation 7."""

    def __init__(self, net: Any, sigma_data: float):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data
        self.register_buffer("data_std", torch.tensor(sigma_data))  # ours has it in its state

    def forward(self, x: Any, sigma: Any, *condition: Any) -> Any:
        s, sd = sigma[:, None, None, None], self.sigma_data
        total = s**2 + sd**2
        return x * (sd**2 / total) + self.net(x / total.sqrt(), sigma.log() / 4, *condition) * (s * sd / total.sqrt())


def zero(layer: Any) -> Any:
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer
