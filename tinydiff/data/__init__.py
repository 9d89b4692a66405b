"""Pictures to learn from, on the host: MNIST from its files, digits drawn here, and the order to see them in.

    images, labels = mnist()                  # uint8 (60000, 28, 28), uint8 (60000,)
    data = glyphs(20_000)                     # .images, .labels["digit"], .captions; needs no download
    x = to_float(images)                      # float32 (60000, 28, 28, 1) in [0, 1]
    x[Batches(len(x), 128).indices(step)]     # batch number `step`, a pure function of it

All of it is NumPy, whatever the backend; `tinydiff.backend.to_device` takes a batch to the device.
"""

from .batches import Batches
from .glyphs import ATTRIBUTES, VARIETIES, Glyphs, glyphs
from .mnist import Digits, DownloadError, mnist, to_float

__all__ = [
    "ATTRIBUTES",
    "VARIETIES",
    "Batches",
    "Digits",
    "DownloadError",
    "Glyphs",
    "glyphs",
    "mnist",
    "to_float",
]
