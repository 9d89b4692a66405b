"""What to learn from. Pictures, on the host: MNIST from its files, digits drawn here, and the order to see
them in; and Gaussian mixtures, of which everything is known.

    images, labels = mnist()                  # uint8 (60000, 28, 28), uint8 (60000,)
    data = glyphs(20_000)                     # .images, .labels["digit"], .captions; needs no download
    x = to_float(images)                      # float32 (60000, 28, 28, 1) in [0, 1]
    x[Batches(len(x), 128).indices(step)]     # batch number `step`, a pure function of it
    GaussianMixture([0.3, 0.7], [-2, 1], [0.16, 0.09]).sample(1000, rng)       # numbers, or points of the plane

Pictures are NumPy, whatever the backend; `tinydiff.backend.to_device` takes a batch to the device. What a mixture
gives is there already.
"""

from .batches import Batches
from .glyphs import ATTRIBUTES, VARIETIES, Glyphs, glyphs
from .mixture import GaussianMixture
from .mnist import Digits, DownloadError, mnist, to_float

__all__ = [
    "ATTRIBUTES",
    "VARIETIES",
    "Batches",
    "Digits",
    "DownloadError",
    "GaussianMixture",
    "Glyphs",
    "glyphs",
    "mnist",
    "to_float",
]
