"""A small convolutional classifier, which says what is on an image: the measure of samples (metrics.py), because what
was asked for can be compared with what the classifier sees.

    x (N, H, W, C)  ->  patches (H/2, W/2)  ->  two convolutions per level, halved between levels  ->  features (N, F)
                    ->  one linear head per attribute: {"digit": logits (N, 10), ...}

An image is a picture in [-1, 1], black to white, and nothing else: not noise on the way to one. How to train one, and
keep it: classifier_training.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import nn, ops
from ..arguments import integer
from ..backend import Array, active, to_device, to_host, xp
from ..engine import Tensor
from ..microbatch import microbatch_size, over_microbatches
from ..modes import no_grad
from ..operators import array_of
from ..rng import Rng, as_rng
from .inputs import sizes
from .unet import pixel_unshuffle

SLACK = 1e-4  # by which rounding may leave [-1, 1]


class Predictions(NamedTuple):
    """What a classifier says of N images, on the host: for each attribute float32 (N, classes), the probabilities; and
    the features, float32 (N, F)."""

    probabilities: dict[str, Array]
    features: Array


class Classifier(nn.Module):
    """Images (N, H, W, in_channels) in [-1, 1] -> logits of each attribute, {"digit": (N, 10)}.

    heads: the attributes, with the number of classes of each. size: (H, W), even. channels: of each level, from fine
    to coarse; level i works at 1 / 2^(i+1) of the resolution. features: the number of them.
    Errors: ValueError for sizes that are not positive integers, a size that cannot be halved often enough, channels
    that the groups of the norms do not divide, no heads, or a name that is no identifier.
    """

    def __init__(
        self,
        heads: Mapping[str, int],
        size: Sequence[int] = (28, 28),
        in_channels: int = 1,
        *,
        channels: Sequence[int] = (32, 64, 128),
        features: int = 64,
        groups: int = 8,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.size, channels = sizes("Classifier: size", size, 2), sizes("Classifier: channels", channels)
        self.in_channels = integer("Classifier: in_channels", in_channels)
        groups, features = integer("Classifier: groups", groups), integer("Classifier: features", features)
        if any(side % 2 or side < 2 ** len(channels) for side in self.size):
            raise ValueError(
                f"Classifier: size must be even and at least {2 ** len(channels)} for the {len(channels)} levels of "
                f"channels={channels}, not {size!r}"
            )
        if any(width % groups for width in channels):
            raise ValueError(f"Classifier: groups={groups} must divide each of channels={channels}")
        # Identifiers, as the labels of a UNet are: a name with a "/" could not be saved.
        if not isinstance(heads, Mapping) or not heads or not all(str(name).isidentifier() for name in heads):
            raise ValueError(f'Classifier: heads must name attributes by identifiers, {{"digit": 10}}, not {heads!r}')
        self.levels: list[nn.Module] = []
        width, (h, w) = 4 * self.in_channels, (side // 2 for side in self.size)  # of the patches
        for i, wider in enumerate(channels):
            layers = [_Layer(width, wider, 2 if i else 1, groups, rng)]
            if i + 1 < len(channels):  # at the coarsest level the linear map comes next
                layers.append(_Layer(wider, wider, 1, groups, rng))
            self.levels.append(nn.Sequential(*layers))
            width, (h, w) = wider, (-(-h // 2), -(-w // 2)) if i else (h, w)
        self.last = nn.Linear(h * w * width, features, rng=rng)  # from (N, h, w, C) as (N, h w C)
        self.heads: dict[str, nn.Module] = {
            name: nn.Linear(features, integer(f"Classifier: the number of classes of {name!r}", n, 2), rng=rng)
            for name, n in heads.items()
        }

    def forward(self, x: Any) -> dict[str, Tensor]:
        """The logits. Errors: as `features`."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    def features(self, x: Any) -> Tensor:
        """The numbers that all heads share: (N, H, W, C) -> (N, F), for the Frechet distance, precision and recall.

        Errors: ValueError for another shape, and for values that are no images in [-1, 1] (`check_range`). With CuPy
        only `predict` looks at the values, because reading them here would wait for the device.
        """
        if active().name == "numpy" and x.size:
            check_range("Classifier", array_of(x))
        return self._features(x)

    def _features(self, x: Any) -> Tensor:
        h = self.activations(x)[-1]
        return ops.silu(self.last(h.reshape(len(h), math.prod(h.shape[1:]))))  # (N, h, w, C) -> (N, h w C) -> (N, F)

    def activations(self, x: Any) -> list[Tensor]:
        """The output of each level, (N, h, w, channels), from fine to coarse: for losses that compare what is seen on
        two images. The values of x are not checked. Errors: ValueError for another shape."""
        if x.ndim != 4 or tuple(x.shape[1:]) != (*self.size, self.in_channels):
            raise ValueError(f"Classifier: images must be {self._wanted()}, not {x.shape}")
        found = []
        h = pixel_unshuffle(x, 2)  # (N, H, W, C) -> (N, H/2, W/2, 4C)
        for level in self.levels:
            h = level(h)
            found.append(h)
        return found

    def predict(self, images: Any, *, threads: int | None = None) -> Predictions:
        """What it says of N images: floats (N, H, W, C) in [-1, 1], or uint8 in [0, 255], which are scaled here; if
        C = 1 also without the last axis. Works in microbatches, and records no nodes.

        threads: as in microbatch.over_microbatches.
        Errors: ValueError for another shape, for no images, and for values that are no images in [-1, 1]
        (`check_range`); TypeError for what is neither floats nor uint8.
        """
        given = to_host(array_of(images))
        if given.dtype != "uint8" and given.dtype.kind != "f":
            raise TypeError(f"Classifier.predict: images must be floats in [-1, 1] or uint8, not {given.dtype}")
        x = given[..., None] if given.ndim == 3 and self.in_channels == 1 else given
        if x.ndim != 4 or x.shape[1:] != (*self.size, self.in_channels) or not len(x):
            raise ValueError(
                f"Classifier.predict: images must be {self._wanted()}, and not none, not {given.dtype} of shape "
                f"{given.shape}"
            )
        if x.dtype != "uint8":
            check_range("Classifier.predict", x)
        dtype = self.last.weight.dtype

        def some(rows: slice) -> list[Array]:
            part = to_device(x[rows])
            part = to_unit(part, dtype) if part.dtype == "uint8" else part.astype(dtype, copy=False)
            features = self._features(Tensor(part))
            logits = [head(features) for head in self.heads.values()]
            return [features.data, *(ops.softmax(z, axis=-1).data for z in logits)]

        with no_grad():
            size = microbatch_size(len(x), math.prod(x.shape[1:]))
            parts = list(over_microbatches(some, len(x), size, threads))
        features, *probabilities = (to_host(xp.concatenate(column)) for column in zip(*parts))  # (N, ...) each
        return Predictions(dict(zip(self.heads, probabilities)), features)

    def _wanted(self) -> str:
        height, width = self.size
        return f"(N, {height}, {width}, {self.in_channels})"


class _Layer(nn.Module):
    """silu(norm(conv3x3(x))), padded, so that the size is divided by the stride and rounded up."""

    def __init__(self, inside: int, outside: int, stride: int, groups: int, rng: Rng):
        self.conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, rng=rng)
        self.norm = nn.GroupNorm(groups, outside)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x), silu=True)


# ---------------------------------------------------------------- the range of images


def to_unit(images: Array, dtype: Any = "float32") -> Array:
    """uint8 images as the classifier takes them: 0 to 255 becomes -1 to 1."""
    return images.astype(dtype) / 127.5 - 1  # 127.5 is half of 255, exactly: the ends become -1 and 1


def check_range(what: str, x: Array) -> None:
    """Refuse what is not N images in [-1, 1], because a classifier would be wrong about it without a word.

    Errors: ValueError that says how many images have a NaN, and which is the first; or from where to where the values
    run, if they leave [-1, 1]: clip samples first, as a file would. It also refuses images of which no pixel is below
    0, the middle between black and white: they are in [0, 1], or there is nothing dark on them, which is rare.
    """
    if missing := [i for i, image in enumerate(x != x) if image.any()]:
        raise ValueError(f"{what}: {len(missing)} of {len(x)} images have a NaN, the first is number {missing[0]}")
    low, high = float(x.min()), float(x.max())
    if not -1 - SLACK <= low <= high <= 1 + SLACK:
        raise ValueError(f"{what} takes images in [-1, 1], but these run from {low:g} to {high:g}: clip or scale them")
    if low >= 0:
        raise ValueError(
            f"{what} takes images in [-1, 1], but these run from {low:g} to {high:g}, without one pixel below 0: if "
            "they are in [0, 1], give 2 x - 1"
        )
