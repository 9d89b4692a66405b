"""A judge of pictures: a small convolutional classifier with one head per attribute, and features for distances between
sets of pictures (metrics.py). It is trained by tinydiff itself, see examples/08_classifier.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import backend, nn, ops
from ..arguments import integer
from ..backend import Array, to_device, to_host, xp
from ..engine import Tensor
from ..microbatch import over_microbatches
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .inputs import each_label, sizes


class Classifier(nn.Module):
    """Images (N, H, W, C) in [-1, 1] -> {attribute: logits (N, values)}.

        x -> [3x3 convolution, norm, silu; 3x3 convolution of stride 2, norm, silu] for each of `channels`
          -> all of it, (N, h w C), -> Linear, silu: the features (N, width) -> a Linear for each attribute

    The place in the image is kept, because an attribute may be a place. heads: the attributes, with the number of
    values of each, {"digit": 10}. size: (H, W). Errors: ValueError for sizes that are not positive integers, heads that
    are not named by identifiers, images of another size, and images in another scale (check_scale), which only
    `predict` looks for on a GPU.
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
        if not heads or not all(isinstance(name, str) and name.isidentifier() for name in heads):
            raise ValueError(f'Classifier: heads must name attributes by identifiers, {{"digit": 10}}, not {heads!r}')
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
        self._check_shape(x)
        if backend.name == "numpy":  # a device would have to wait
            check_scale(x.data)
        return self._features(x)

    def activations(self, x: Any) -> list[Tensor]:
        """What each resolution makes of images (N, H, W, C), from fine to coarse, each (N, h, w, channels): the
        `features` of models.autoencoder.autoencoder_loss. The scale is not checked: a decoder in training overshoots.
        """
        x = x if isinstance(x, Tensor) else Tensor(x)
        self._check_shape(x)
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return found[5::6]  # after the second silu of each

    def _features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return ops.silu(self.last(ops.reshape(x, shape=(len(x), -1))))  # (N, h, w, C) -> (N, h w C) -> (N, width)

    def forward(self, x: Any) -> dict[str, Tensor]:
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    def predict(self, images: Any) -> tuple[dict[str, Array], Array]:
        """What it finds in images (N, H, W, C), {attribute: (N,)}, and their features, (N, width); all on the host.

        In microbatches, and no nodes are recorded. Here the scale is checked with every backend.
        """
        images = to_host(array_of(images))
        self._check_shape(images)
        check_scale(images)

        def look(rows: slice) -> list[Array]:
            features = self._features(Tensor(to_device(images[rows])))
            return [features.data, *(head(features).data.argmax(axis=1) for head in self.heads.values())]

        with no_grad():
            columns = zip(*over_microbatches(look, len(images), 128))
        features, *found = (to_host(xp.concatenate(column)) for column in columns)
        return dict(zip(self.heads, found)), features

    def _check_shape(self, x: Any) -> None:
        """Errors: ValueError for images of another shape, and for none."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (*self.size, self.in_channels) or not len(x):
            raise ValueError(f"Classifier: images must be (N, {(*self.size, self.in_channels)}), not {x.shape}")


def check_scale(x: Array) -> None:
    """Refuse images (N, H, W, C) that are not in [-1, 1], because a classifier would be wrong about them in silence.

    A fifth more is allowed, because samples overshoot. If no pixel of any image is below -0.2, they are in [0, 1], or
    have nothing dark, which is rare. Errors: ValueError, which says from where to where the numbers run, or how many
    images have a NaN.
    """
    low, high = float(x.min()), float(x.max())
    if -1.2 <= low < -0.2 and high <= 1.2:
        return
    if low != low:
        bad = [i for i, image in enumerate(x) if (image != image).any()]
        raise ValueError(f"Classifier: {len(bad)} of {len(x)} images have a NaN, the first is number {bad[0]}")
    hint = ": if they are in [0, 1], give 2 x - 1" if -0.2 <= low and high <= 1.2 else ""
    raise ValueError(
        f"Classifier: the numbers of the images must be in [-1, 1], but run from {low:g} to {high:g}{hint}"
    )


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
