"""A judge of pictures: a small convolutional classifier with one head per attribute, and features for distances between
sets of pictures (metrics.py). It is trained by tinydiff itself, see examples/08_classifier.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import backend, nn, ops
from ..arguments import integer
from ..backend import Array, xp
from ..engine import Tensor
from ..rng import Rng, as_rng
from .inputs import each_label, sizes


class Classifier(nn.Module):
    """Images (N, H, W, C) in [-1, 1] -> {attribute: logits (N, values)}.

        x -> [3x3 convolution, norm, silu; 3x3 convolution of stride 2, norm, silu] for each of `channels`
          -> all of it, (N, h w C), -> Linear, silu: the features (N, width) -> a Linear for each attribute

    The place in the image is kept, because an attribute may be a place. heads: the attributes, with the number of
    values of each, {"digit": 10}. size: (H, W). Errors: ValueError for sizes that are not positive integers, images of
    another size, and, on a CPU, numbers beyond [-1, 1] by more than a fifth, which are in another scale.
    """

    def __init__(
        self,
        size: tuple[int, int],
        heads: Mapping[str, int],
        in_channels: int = 1,
        channels: tuple[int, ...] = (24, 48, 96),
        width: int = 128,
        *,
        groups: int = 8,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.size, channels = sizes("Classifier: size", size, 2), sizes("Classifier: channels", channels)
        self.in_channels, self.width = integer("Classifier: in_channels", in_channels), width
        self.layers: list[nn.Module] = []
        (height, across), before = self.size, self.in_channels
        for c in channels:
            self.layers += [nn.Conv2d(before, c, 3, padding=1, rng=rng), nn.GroupNorm(groups, c), nn.SiLU()]
            self.layers += [nn.Conv2d(c, c, 3, stride=2, padding=1, rng=rng), nn.GroupNorm(groups, c), nn.SiLU()]
            height, across, before = -(-height // 2), -(-across // 2), c  # halved, rounded up
        self.last = nn.Linear(height * across * before, width, rng=rng)
        self.heads: dict[str, nn.Linear] = {
            name: nn.Linear(width, integer(f"Classifier: the number of values of {name!r}", n), rng=rng)
            for name, n in heads.items()
        }

    def features(self, x: Any) -> Tensor:
        """What the heads read: (N, H, W, C) -> (N, width)."""
        x = x if isinstance(x, Tensor) else Tensor(x)
        if x.ndim != 4 or x.shape[1:] != (*self.size, self.in_channels):
            raise ValueError(f"Classifier: images must be (N, {(*self.size, self.in_channels)}), not {x.shape}")
        if backend.name == "numpy" and x.size:  # a device would have to wait
            low, high = float(x.data.min()), float(x.data.max())
            if low < -1.2 or high > 1.2:
                raise ValueError(
                    f"Classifier: the numbers of the images must be in [-1, 1], but run from {low:g} to {high:g}"
                )
        for layer in self.layers:
            x = layer(x)
        return ops.silu(self.last(ops.reshape(x, shape=(len(x), -1))))  # (N, h, w, C) -> (N, h w C) -> (N, width)

    def forward(self, x: Any) -> dict[str, Tensor]:
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}


def judge_loss(judge: Classifier, x: Array, labels: Mapping[str, Any]) -> Tensor:
    """The cross-entropies of all attributes, summed; the mean over the images."""
    logits = judge(x)
    losses = [
        ops.cross_entropy(
            logits[name], each_label(f"judge_loss: {name!r}", labels[name], len(x), logits[name].shape[1])
        )
        for name in judge.heads
    ]
    return sum(losses[1:], start=losses[0])


def shifted(x: Array, most: int, rng: Rng, sample_offset: int = 0) -> Array:
    """Each image moved by up to `most` pixels down or up, and across, with the darkest value, -1, where nothing was:
    what is drawn does not change, so a classifier sees more pictures. (N, H, W, C) -> (N, H, W, C)."""
    n, height, width, _ = x.shape
    u = rng.uniform((n, 2), sample_offset=sample_offset)
    by = (u * (2 * most + 1)).astype("int64")  # (N, 2), 0 to 2 most
    wide = xp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), constant_values=-1)
    rows = by[:, :1] + xp.arange(height)  # (N, H)
    columns = by[:, 1:] + xp.arange(width)  # (N, W)
    return wide[xp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
