"""Captioned digits that need no download: drawn with the fonts that matplotlib brings along.

    data = glyphs(20_000)
    data.images[0], data.labels["digit"][0], data.captions[0]   # ... "a small bold serif seven leaning left"

A glyph is determined by a row of random numbers: its caption names its `ATTRIBUTES`, and a little jitter in size,
slant, width and position makes all glyphs different. `_draw` shears and scales the outlines of the digits, and Agg,
matplotlib's rasteriser, fills them: many on one sheet, which is then cut into images.
"""

from __future__ import annotations

import functools
import operator
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..saving import cache_dir
from .limits import keep, read_npz

if TYPE_CHECKING:
    from matplotlib.path import Path as Outline

# labels[name][i] is an index into ATTRIBUTES[name], whatever the variety.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "face": ("sans", "serif", "mono", "book", "roman", "grotesque", "typewriter"),
    "weight": ("regular", "bold", "heavy"),
    "size": ("small", "medium", "large"),
    "slant": ("upright", "leaning left", "leaning right"),
    "place": ("centre", "top left", "top right", "bottom left", "bottom right"),
}
# The values that a caption does not mention.
USUAL = {"regular", "medium", "upright", "centre"}

# The values that a variety draws from; for an attribute that it does not name, all of them.
VARIETIES: dict[str, dict[str, tuple[str, ...]]] = {
    "wide": {},
    "plain": {
        "face": ("sans", "serif"),
        "weight": ("regular", "bold"),
        "size": ("large",),
        "slant": ("upright", "leaning right"),
        "place": ("centre",),
    },
}

# The font files of a face, regular and bold; None: no bold is bundled, so the outline is thickened.
FONTS: dict[str, tuple[str, str | None]] = {
    "sans": ("DejaVuSans", "DejaVuSans-Bold"),
    "serif": ("DejaVuSerif", "DejaVuSerif-Bold"),
    "mono": ("DejaVuSansMono", "DejaVuSansMono-Bold"),
    "book": ("STIXGeneral", "STIXGeneralBol"),
    "roman": ("cmr10", "cmb10"),
    "grotesque": ("cmss10", None),
    "typewriter": ("cmtt10", None),
}

SIDE = 28  # pixels
HEIGHTS = {"small": 13.5, "medium": 16.5, "large": 19.5}  # pixels; MNIST scales its digits to 20
SLANTS = {"upright": 0.0, "leaning left": -0.27, "leaning right": 0.27}  # x shift per y: about 15 degrees
PLACES = {
    "centre": (0, 0),
    "top left": (-1, 1),
    "top right": (1, 1),
    "bottom left": (-1, -1),
    "bottom right": (1, -1),
}
SHIFT = 2.5  # pixels off the centre
EMBOLDEN = 0.07  # stroke width that thickens an outline, in heights
# Half-widths of the uniform jitter: height and width relative, shear, pixels across and up.
JITTER = {"height": 0.04, "width": 0.06, "shear": 0.05, "across": 0.75, "up": 0.75}

DRAWING = 1  # raise it if a change makes a seed give other pictures, so that old caches are not used
COLUMNS, ROWS = 32, 32  # of a sheet


@dataclass(frozen=True)
class Glyphs:
    """Digits with their labels and captions.

    images: uint8 (N, 28, 28), 0 is background and 255 ink, as in MNIST
    labels: for each name in ATTRIBUTES int64 (N,), indices into ATTRIBUTES[name]
    captions: N strings
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)


def glyphs(n: int, seed: int = 0, *, variety: str = "wide", cache: bool = True) -> Glyphs:
    """`n` digits in the faces, weights, sizes, slants and places of `variety`, with captions and labels.

    variety: "wide" has every value of ATTRIBUTES (9,450 combinations); "plain" has 80, digits large and in
    the middle, and is what a small model learns in minutes.
    Glyph i of a seed is the same whatever n is. With `cache` the images are kept in
    `${XDG_CACHE_HOME:-~/.cache}/tinydiff/glyphs`; a damaged file there is drawn again.
    Pictures may differ in a grey level between versions of matplotlib, so the cache is one per version.
    Raises ValueError for an unknown variety, a negative `n` or `seed`; TypeError if those are no integers.
    """
    n, seed = _natural("n", n), _natural("seed", seed)
    if variety not in VARIETIES:
        raise ValueError(f"variety must be one of {list(VARIETIES)}, got {variety!r}")
    labels, jitter = _roll(n, seed, variety)
    captions = [_caption(*row) for row in zip(*labels.values(), strict=True)]
    path = cache_dir("glyphs") / f"{variety}-{n}-seed{seed}-v{DRAWING}-matplotlib{version('matplotlib')}.npz"
    images = _load(path, n) if cache else None
    if images is None:
        images = _draw(labels, jitter)
        if cache:
            # A read-only home is no reason to refuse the images: they take seconds to draw.
            keep(path, lambda file: np.savez_compressed(file, images=images), "glyphs are")
    return Glyphs(images, labels, captions)


def _roll(n: int, seed: int, variety: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw the labels, each int64 (n,), and the jitter, each (n,) in (-half-width, half-width)."""
    # Whole rows of raw words, so that row i does not depend on n; Philox promises the same words in every
    # version of NumPy. 53 bits make a float64 in [0, 1).
    columns = len(ATTRIBUTES) + len(JITTER)
    words = np.random.Philox(seed).random_raw(n * columns).reshape(n, columns)
    u = iter(((words >> np.uint64(11)) * 2.0**-53).T)  # columns of (n,)
    labels = {}
    for name, values in ATTRIBUTES.items():
        choice = np.array([values.index(value) for value in VARIETIES[variety].get(name, values)])
        labels[name] = choice[(next(u) * len(choice)).astype(np.int64)]
    return labels, {name: (2 * next(u) - 1) * half for name, half in JITTER.items()}


def _caption(*row: int) -> str:
    """A label of each attribute in English: "a small bold serif seven leaning left, at the top right"."""
    value = {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
    words = [value[name] for name in ("size", "weight", "face", "digit", "slant") if value[name] not in USUAL]
    return f"a {' '.join(words)}" + ("" if value["place"] in USUAL else f", at the {value['place']}")


def _draw(labels: dict[str, np.ndarray], jitter: dict[str, np.ndarray]) -> np.ndarray:
    """The images of the labels, uint8 (n, 28, 28)."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.transforms import Affine2D

    def table(attribute: str, values: dict) -> np.ndarray:
        return np.array([values[value] for value in ATTRIBUTES[attribute]])[labels[attribute]]

    height = table("size", HEIGHTS) * (1 + jitter["height"])  # (n,)
    aspect = 1 + jitter["width"]  # (n,)
    shear = table("slant", SLANTS) + jitter["shear"]  # (n,)
    off = table("place", PLACES) * SHIFT + np.stack([jitter["across"], jitter["up"]], axis=1)  # (n, 2)
    n, cells = len(height), COLUMNS * ROWS
    images = np.empty((n, SIDE, SIDE), np.uint8)
    for first in range(0, n, cells):
        # The renderer starts out transparent: the alpha it ends with is the share of the pixel that is ink.
        renderer = RendererAgg(COLUMNS * SIDE, ROWS * SIDE, dpi=72)
        pen = renderer.new_gc()
        pen.set_snap(False)
        pen.set_joinstyle("round")
        for i in range(first, min(first + cells, n)):
            file, stroke = _font(*(ATTRIBUTES[name][labels[name][i]] for name in ("face", "weight")))
            outline = _outlines(file)[labels["digit"][i]]
            scale = height[i] / (1 + stroke)
            stroke *= scale
            shape = scale * np.array([[aspect[i], 0], [shear[i], 1]])  # rows: where x and y go
            corner = SIDE * np.array([(i - first) % COLUMNS, ROWS - 1 - (i - first) // COLUMNS])  # y is up
            # Not a matrix product: BLAS libraries round differently, and a seed must give the same images everywhere.
            points = outline.vertices[:, :1] * shape[0] + outline.vertices[:, 1:] * shape[1]  # (vertices, 2)
            shift = corner + _shift(points, off[i], stroke / 2)  # (2,)
            pen.set_linewidth(stroke)
            renderer.draw_path(pen, outline, Affine2D.from_values(*shape.ravel(), *shift), (0, 0, 0))
        sheet = np.asarray(renderer.buffer_rgba())[..., 3]  # (ROWS * 28, COLUMNS * 28)
        tiles = sheet.reshape(ROWS, SIDE, COLUMNS, SIDE).swapaxes(1, 2).reshape(cells, SIDE, SIDE)
        images[first : first + cells] = tiles[: n - first]
    return images


def _shift(points: np.ndarray, off: np.ndarray, stroke: float) -> np.ndarray:
    """The shift (2,) of points (n, 2) that puts their middle at `off` (2,) from that of the frame, or as near to it as
    leaves the outermost pixels of the frame empty; `stroke` is the width of the ink around the points."""
    low, high = points.min(0), points.max(0)  # (2,)
    room = np.maximum(SIDE / 2 - 1 - stroke - (high - low) / 2, 0)  # (2,)
    return SIDE / 2 - (low + high) / 2 + np.clip(off, -room, room)


def _font(face: str, weight: str) -> tuple[str, float]:
    """The font file of a face, and the width of the stroke that thickens its outlines, in digit heights."""
    regular, bold = FONTS[face]
    if weight == "regular":
        return regular, 0.0
    return bold or regular, EMBOLDEN * ((bold is None) + (weight == "heavy"))


@functools.cache
def _outlines(file: str) -> list[Outline]:
    """The ten digits of a font as polygons, each around the origin, the tallest of height 1."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    font = FontProperties(fname=os.path.join(matplotlib.get_data_path(), "fonts", "ttf", file + ".ttf"))
    # Polygons replace curves with an error of up to half a pixel; at 1,000 pixels per em that is small.
    digits = [
        [np.asarray(polygon) for polygon in TextPath((0, 0), digit, size=1000, prop=font).to_polygons()]
        for digit in "0123456789"
    ]
    height = max(np.ptp(np.concatenate(polygons)[:, 1]) for polygons in digits)
    outlines = []
    for polygons in digits:
        points = np.concatenate(polygons)  # (vertices, 2)
        points = (points - (points.min(0) + points.max(0)) / 2) / height
        codes = [[Outline.MOVETO] + [Outline.LINETO] * (len(p) - 2) + [Outline.CLOSEPOLY] for p in polygons]
        outlines.append(Outline(points, np.concatenate(codes)))
    return outlines


def _load(path: Path, n: int) -> np.ndarray | None:
    """The images in the cache, or None if there are none or the file is damaged."""
    try:
        images = read_npz(path, {"images": n * SIDE * SIDE})["images"]
    except Exception:  # files, zip, zlib and NumPy each have errors of their own; after any of them, draw again
        return None
    return images if images.shape == (n, SIDE, SIDE) and images.dtype == np.uint8 else None


def _natural(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must be 0 or more, got {value!r}")
    return number
