"""Captioned scenes in colour that need no download: two shapes, side by side or one above the other.

    data = scenes(20_000)
    data.images[0], data.captions[0]     # uint8 (64, 64, 3), "a small red circle above a blue square"

A shape is a function of the plane, its distance d from the edge: negative inside, positive outside, in pixels. A pixel
whose centre is at d is covered by 1/2 - d of the shape, if that is between 0 and 1, so edges are smooth without drawing
at a higher resolution. Everything is NumPy on whole arrays of pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import integer

SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 70),
    "green": (60, 170, 80),
    "blue": (60, 100, 220),
    "purple": (150, 70, 190),
    "white": (240, 240, 240),
}
SIZES = {"small": 6.0, "medium": 9.0, "large": 12.0}  # half the height, in pixels of a picture of 64
USUAL = "medium"  # a caption does not mention it
LAYOUTS = ("beside", "above")
# The two ways to say a layout; the second names the right or lower shape first.
RELATIONS = {"beside": ("to the left of", "to the right of"), "above": ("above", "below")}

# labels[name][i] is an index into SCENE[name]. "first" is on the left, or above.
SCENE: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "first_shape": SHAPES,
    "first_colour": tuple(COLOURS),
    "first_size": tuple(SIZES),
    "second_shape": SHAPES,
    "second_colour": tuple(COLOURS),
    "second_size": tuple(SIZES),
}

SIDE = 64
MARGIN = 2.0  # pixels between a shape and the edge of the picture
GAP = 2.0, 8.0  # least and most between the two
# Half-widths of the uniform jitter: of both shapes across their line, and of each; of a radius, relative; of the turn,
# in radians; of each channel of a colour. The background is a grey up to BACKGROUND.
TOGETHER, APART, RADIUS, TURN, TINT, BACKGROUND = 9.0, 2.5, 0.08, 0.2, 14.0, 50.0
DRAWN = 8 + 5 + 2 * 5 + 1  # random numbers per scene: labels and wording, places, each shape, background
CHUNK = 256  # pictures at a time


@dataclass(frozen=True)
class Scenes:
    """Pictures with labels and captions.

    images: uint8 (N, H, H, 3)
    labels: for each name in SCENE int64 (N,), indices into SCENE[name]
    captions: N strings, such as "a red circle above a large blue square"
    combinations: N strings without the sizes and with one wording, "red circle above blue square", so that
        hold_out(combinations) holds out what is seen, and not a way to say it
    """

    images: np.ndarray
    labels: dict[str, np.ndarray]
    captions: list[str]
    combinations: list[str]

    def __len__(self) -> int:
        return len(self.images)


def scenes(n: int, seed: int = 0, *, side: int = SIDE) -> Scenes:
    """`n` scenes of two shapes. Shapes, colours, sizes, layout and wording are drawn alike often and independently.

    Scene i of a seed is the same whatever n is. side: of a picture, in pixels; everything is scaled with it.
    Errors: ValueError for n, seed or side that are no integers, or less than 0, 0 and 16.
    """
    n, seed, side = integer("scenes: n", n, 0), integer("scenes: seed", seed, 0), integer("scenes: side", side, 16)
    # Whole rows of raw words, so that row i does not depend on n. 53 bits make a float64 in [0, 1).
    words = np.random.Philox(seed).random_raw(n * DRAWN).reshape(n, DRAWN)
    u = iter(((words >> np.uint64(11)) * 2.0**-53).T)  # columns of (n,)
    labels = {name: (next(u) * len(values)).astype(np.int64) for name, values in SCENE.items()}
    reverse = next(u) < 0.5
    shapes = _placed(labels, u)
    background = BACKGROUND * next(u)
    images = np.empty((n, side, side, 3), np.uint8)
    for first in range(0, n, CHUNK):
        rows = slice(first, first + CHUNK)
        images[rows] = _paint(background[rows], [{name: a[rows] for name, a in s.items()} for s in shapes], side)
    rows_of_labels = list(zip(*(values.tolist() for values in labels.values())))
    captions = [_caption(row, bool(r)) for row, r in zip(rows_of_labels, reverse)]
    combinations = [_combination(row) for row in rows_of_labels]
    return Scenes(images, labels, captions, combinations)


def _placed(labels: dict[str, np.ndarray], u: Any) -> list[dict[str, np.ndarray]]:
    """Where the two shapes are, how large and in which colour: {"shape", "x", "y", "radius", "turn", "colour"}, in
    pixels of a picture of 64."""
    signed = lambda half: (2 * next(u) - 1) * half  # noqa: E731
    radii = [
        np.array(list(SIZES.values()))[labels[f"{which}_size"]] * (1 + signed(RADIUS)) for which in ("first", "second")
    ]
    gap = GAP[0] + (GAP[1] - GAP[0]) * next(u)
    length = 2 * radii[0] + gap + 2 * radii[1]
    start = MARGIN + (SIDE - 2 * MARGIN - length) * next(u)
    along = [start + radii[0], start + length - radii[1]]
    together = signed(TOGETHER)
    found = []
    for which, radius, at in zip(("first", "second"), radii, along):
        across = SIDE / 2 + together + signed(APART)
        beside = labels["layout"] == LAYOUTS.index("beside")
        colour = np.array(list(COLOURS.values()), float)[labels[f"{which}_colour"]]  # (n, 3)
        found.append(
            {
                "shape": labels[f"{which}_shape"],
                "x": np.where(beside, at, across),
                "y": np.where(beside, across, at),
                "radius": radius,
                "turn": signed(TURN),
                "colour": np.clip(colour + np.stack([signed(TINT) for _ in range(3)], axis=1), 0, 255),
            }
        )
    return found


def _paint(background: np.ndarray, shapes: list[dict[str, np.ndarray]], side: int) -> np.ndarray:
    """uint8 (m, side, side, 3): the background, and over it one shape after the other."""
    scale = side / SIDE
    centres = ((np.arange(side) + 0.5) / scale).astype("float32")  # of the pixels
    image = np.broadcast_to(background[:, None, None, None], (len(background), side, side, 3)).astype("float32")
    for s in shapes:
        x, y = centres[None, None, :] - s["x"][:, None, None], centres[None, :, None] - s["y"][:, None, None]
        c, si = (f(s["turn"]).astype("float32")[:, None, None] for f in (np.cos, np.sin))
        x, y = (c * x + si * y).astype("float32"), (c * y - si * x).astype("float32")  # in the shape's own axes
        radius = s["radius"].astype("float32")[:, None, None]
        distance = np.empty_like(x)
        for i, name in enumerate(SHAPES):
            rows = s["shape"] == i
            distance[rows] = DISTANCES[name](x[rows], y[rows], radius[rows])
        covered = np.clip(0.5 - scale * distance, 0, 1)[..., None]  # (m, side, side, 1)
        image += covered * (s["colour"].astype("float32")[:, None, None, :] - image)
    return np.rint(image).astype(np.uint8)


# ---------------------------------------------------------------- the distance of a point from the edge of a shape
#
# The shape has its middle at 0 and reaches from -r to r. y points down. Beyond a corner these are a little less than
# the distance, which no pixel shows.


def _circle(x: Any, y: Any, r: Any) -> Any:
    return np.sqrt(x * x + y * y) - r


def _square(x: Any, y: Any, r: Any) -> Any:
    return np.maximum(np.abs(x), np.abs(y)) - r * 0.9


def _triangle(x: Any, y: Any, r: Any) -> Any:
    """With its point up; the two slopes have the normal (2, -1) / sqrt 5."""
    slopes = (2 * np.abs(x) - y - r) * np.float32(5**-0.5)
    return np.maximum(slopes, y - r)


def _ring(x: Any, y: Any, r: Any) -> Any:
    return np.abs(_circle(x, y, r * 0.75)) - r * 0.25


def _cross(x: Any, y: Any, r: Any) -> Any:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - r, y - r * 0.35), np.maximum(y - r, x - r * 0.35))


DISTANCES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring, "cross": _cross
}  # fmt: skip


# ---------------------------------------------------------------- words


def _caption(row: tuple[int, ...], reverse: bool) -> str:
    """In English. reverse: the second shape is named first."""
    value = {name: values[i] for (name, values), i in zip(SCENE.items(), row)}

    def phrase(which: str) -> str:
        size, colour, shape = (value[f"{which}_{name}"] for name in ("size", "colour", "shape"))
        words = f"{colour} {shape}" if size == USUAL else f"{size} {colour} {shape}"
        return f"{'an' if words.startswith('orange') else 'a'} {words}"

    order = ("second", "first") if reverse else ("first", "second")
    return f" {RELATIONS[value['layout']][reverse]} ".join(map(phrase, order))


def _combination(row: tuple[int, ...]) -> str:
    value = {name: values[i] for (name, values), i in zip(SCENE.items(), row)}
    first, second = (f"{value[f'{w}_colour']} {value[f'{w}_shape']}" for w in ("first", "second"))
    return f"{first} {value['layout']} {second}"
