"""The space in which latent diffusion works: an autoencoder's latents, shifted and scaled to mean 0 and deviation 1.

    space = LatentSpace(autoencoder, (64, 64, 3))
    space.measure(images)                     # once, on images of the training set, bytes; kept in its state
    z = space.encode(images)                  # float32 (N, h, w, C) on the host, standardised
    x = space.decode(z)                       # images again

A process of diffusion ends in noise of a known deviation and is made for data of deviation about 1. What an encoder
gives may have any: with a mean of 5 the noise at the end does not cover the data, with a deviation of 0.1 most noise
levels are wasted on what is noise already. Stable Diffusion multiplies its latents by 0.18215 for the same reason
(Rombach et al. 2022, appendix G); here each channel has its own mean and deviation.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from . import nn
from .backend import to_device, to_host, xp
from .data import to_float
from .data.limits import keep, read_npz
from .describing import rebuildable
from .engine import Tensor
from .microbatch import over_microbatches
from .models.inputs import sizes
from .modes import no_grad
from .operators import array_of
from .saving import cache_dir

MEASURED = 4096  # images, at most


@rebuildable
class LatentSpace(nn.Module):
    """An autoencoder that is finished (any net with `encode` and `decode`), and the mean and deviation of each channel
    of its latents. It works in evaluation mode, because a batch norm in training would make the latent of an image
    depend on its neighbours, and in microbatches, without recording nodes.

    image: the shape of one image. low, high: what the autoencoder takes black and white to be. Images are given as it
    takes them, or as bytes, of which 0 is black and 255 white.
    Errors: ValueError for an image that the autoencoder does not take.
    """

    def __init__(self, autoencoder: Any, image: tuple[int, int, int], low: float = -1.0, high: float = 1.0):
        self.autoencoder, self.image = autoencoder.eval(), sizes("LatentSpace: image", image, 3)
        self.low, self.high = low, high
        with no_grad():
            self.shape = tuple(autoencoder.encode(xp.zeros((1, *self.image), "float32")).shape[1:])  # (h, w, C)
        self.mean = Tensor(xp.zeros(self.shape[-1], "float32"))
        self.std = Tensor(xp.zeros(self.shape[-1], "float32"))  # 0: not measured yet

    def measure(self, images: Any) -> None:
        """Take mean and deviation from images (N, H, W, C), of which it looks at 4,096.
        Errors: ValueError if a channel is the same everywhere."""
        z = self._raw(images[:: max(1, len(images) // MEASURED)]).astype("float64")
        mean, std = z.mean(axis=(0, 1, 2)), z.std(axis=(0, 1, 2))
        if not (std > 0).all():
            raise ValueError(
                f"LatentSpace: channels {np.flatnonzero(~(std > 0)).tolist()} of the latents do not vary, so they "
                "cannot be scaled: the autoencoder has not been trained, or has more channels than it needs"
            )
        with no_grad():
            self.mean[...], self.std[...] = to_device(mean, "float32"), to_device(std, "float32")

    def encode(self, images: Any) -> np.ndarray:
        """Standardised latents, float32 (N, h, w, C) in host memory. Errors: ValueError for other images, and before
        `measure`."""
        self._check_measured()
        return ((self._raw(images) - to_host(self.mean._data)) / to_host(self.std._data)).astype("float32")

    def decode(self, latents: Any) -> np.ndarray:
        """Images, float32 (N, H, W, C) in host memory. Errors: ValueError for latents of another shape."""
        self._check_measured()
        z = to_host(array_of(latents))
        if z.ndim != 4 or z.shape[1:] != self.shape:
            raise ValueError(f"LatentSpace: latents must be (N, {', '.join(map(str, self.shape))}), not {z.shape}")
        z = (z * to_host(self.std._data) + to_host(self.mean._data)).astype("float32")
        return self._in_parts(self.autoencoder.decode, z, self.image)

    def _raw(self, images: Any) -> np.ndarray:
        x = to_host(array_of(images))
        if x.ndim != 4 or x.shape[1:] != self.image:
            raise ValueError(f"LatentSpace: images must be (N, {', '.join(map(str, self.image))}), not {x.shape}")
        return self._in_parts(self.autoencoder.encode, x, self.shape)

    def _in_parts(self, function: Any, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        self.autoencoder.eval()

        def of(rows: slice) -> np.ndarray:
            part = to_float(x[rows], self.low, self.high) if x.dtype == "uint8" else x[rows]
            return to_host(array_of(function(to_device(part, "float32"))))

        # As many images at a time as a step of 28x28 has pixels in 64.
        at_a_time = max(1, 64 * 28 * 28 // math.prod(self.image[:2]))
        with no_grad():
            parts = list(over_microbatches(of, len(x), at_a_time))
        return np.concatenate(parts) if parts else np.zeros((0, *shape), "float32")

    def _check_measured(self) -> None:
        if not (to_host(self.std._data) > 0).all():
            raise ValueError("LatentSpace: mean and deviation are not known yet: measure(images), or load a state")

    def fingerprint(self) -> str:
        """16 digits that change with any weight: a net that was trained on these latents keeps them, so that it is
        never used with another autoencoder."""
        return digest(*(to_host(value) for value in self.state_dict().values()))


def cached_latents(space: LatentSpace, images: np.ndarray) -> np.ndarray:
    """space.encode(images), from the cache if they were encoded before: a file for each pair of images and weights, in
    `${XDG_CACHE_HOME:-~/.cache}/tinydiff/latents`. A damaged file is made again; a cache that cannot be written
    costs the time, and a warning says so."""
    path = cache_dir("latents") / f"{digest(images)}-{space.fingerprint()}.npz"
    shape = (len(images), *space.shape)
    try:
        kept = read_npz(path, {"latents": 4 * math.prod(shape)})["latents"]
        if kept.shape == shape and kept.dtype == "float32":
            return kept
    except Exception:  # files, zip and NumPy each have errors of their own; after any of them, encode again
        pass
    latents = space.encode(images)
    keep(path, lambda file: np.savez(file, latents=latents), "the latents are")
    return latents


def digest(*arrays: Any) -> str:
    """16 hexadecimal digits of the contents, shapes and dtypes of host arrays."""
    found = hashlib.blake2b(digest_size=8)
    for a in map(np.ascontiguousarray, arrays):
        found.update(f"{a.shape} {a.dtype.str}".encode())
        found.update(a.tobytes())
    return found.hexdigest()
