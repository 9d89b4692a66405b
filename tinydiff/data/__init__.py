"""The data to learn from. Images, on the host: MNIST from its files, digits and scenes drawn here, your own pictures,
and the order of training; and Gaussian mixtures, whose score is known exactly.

    images, labels = mnist()                  # uint8 (60000, 28, 28), uint8 (60000,)
    data = glyphs(20_000)                     # .images, .labels["digit"], .captions; needs no download
    data = scenes(20_000)                     # in colour, "a red circle above a small blue square"; needs no download
    data = folder("pets", size=64)            # your own: .images uint8 (N, 64, 64, 3), .captions, .labels["class"]
    held = hold_out(data.captions)            # which have a caption that training should not see
    x = to_float(images)                      # float32 (60000, 28, 28, 1) in [0, 1]
    x[Batches(len(x), 128).indices(step)]     # batch number `step`, a pure function of it
    GaussianMixture([0.3, 0.7], [-2, 1], [0.16, 0.09]).sample(1000, rng)       # numbers, or points of the plane

Images are NumPy arrays with every backend; `tinydiff.backend.to_device` brings a batch to the device. The samples of a
mixture are on the device already.
"""

from .batches import Batches
from .folder import Pictures, folder
from .glyphs import ATTRIBUTES, VARIETIES, Glyphs, glyphs
from .held_out import hold_out, validation_mask
from .mixture import GaussianMixture
from .mnist import Digits, DownloadError, mnist, to_float
from .scenes import SCENE, Scenes, scenes

__all__ = [
    "ATTRIBUTES",
    "SCENE",
    "VARIETIES",
    "Batches",
    "Digits",
    "DownloadError",
    "GaussianMixture",
    "Glyphs",
    "Pictures",
    "Scenes",
    "folder",
    "glyphs",
    "hold_out",
    "mnist",
    "scenes",
    "to_float",
    "validation_mask",
]
