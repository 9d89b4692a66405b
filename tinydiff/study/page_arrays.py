"""The arrays of the viewer's page: figures of the whole, and as many of the first elements as there is room for."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

from .. import backend

# The most elements that are kept of an array. The first number with which the page fits SIZE counts.
LEVELS = (6000, 5000, 4000, 3500, 3000, 2500, 2000, 1500, 1000, 500, 200, 50, 10)
IMAGES, CHANNELS, SIDE = 2, 8, 32  # never more of an array than these: images, channels, rows and columns


class Arrays:
    """The arrays of a page, each once: `self(array)` is its number."""

    def __init__(self) -> None:
        self.kept: list[tuple[np.ndarray, bool, dict[str, Any]]] = []
        self.alive: list[Any] = []  # so that an id stays its own
        self.numbers: dict[int, int] = {}

    def __call__(self, array: Any, kernel: bool = False) -> int | None:
        if array is None or not hasattr(array, "shape") or hasattr(array, "no_values"):
            return None
        if id(array) not in self.numbers:
            self.numbers[id(array)] = len(self.kept)
            self.alive.append(array)
            host = backend.to_host(array)
            host = host.astype(np.float64) if host.dtype.kind != "f" else host
            self.kept.append((host, kernel, figures(host)))
        return self.numbers[id(array)]

    def written(self, most: int) -> list[dict[str, Any]]:
        return [shown(array, kernel, most) | said for array, kernel, said in self.kept]


def figures(array: np.ndarray) -> dict[str, Any]:
    """What is said of all of an array; NaN and Inf are counted, and left out of the rest."""
    finite = array[np.isfinite(array)].astype(np.float64)
    return {
        "norm": plain(np.linalg.norm(finite)),
        "low": plain(finite.min()) if finite.size else None,
        "high": plain(finite.max()) if finite.size else None,
        "bad": int(array.size - finite.size),
    }


def shown(array: np.ndarray, kernel: bool, most: int) -> dict[str, Any]:
    """The first elements of an array, exactly as they are, and how to lay them out."""
    axes, crop = layout(array.shape, kernel, most)
    first = np.ascontiguousarray(array[tuple(slice(n) for n in crop)])
    what = ("output channels", "input channels") if kernel else ("channels", "images")
    words = dict(zip(axes, ("columns", "rows", *(what if len(axes) == 4 else ("blocks",)))))
    cut = [f"{m} of {n} {words.get(a, 'blocks')}" for a, (m, n) in enumerate(zip(crop, array.shape)) if m < n]
    return {
        "shape": array.shape,
        "crop": crop,
        "axes": axes,
        "bytes": array.itemsize,
        "data": base64.b64encode(first.astype(f"<f{array.itemsize}").tobytes()).decode(),
        "said": f"shown: the first {', '.join(cut)}" if cut else "",
    }


def layout(shape: tuple[int, ...], kernel: bool, most: int) -> tuple[list[int], list[int]]:
    """Which axis of an array is what in its picture, [column, row, column of tiles, row of tiles] as far as there are
    so many; and how much of each axis is kept, at most so many elements in all. (N, H, W, C): a row of tiles per image,
    a tile per channel; a kernel (h, w, in, out): a row of tiles per input channel. (N, L, C): a block per N."""
    n = len(shape)
    axes = ([1, 0, 3, 2] if kernel else [2, 1, 3, 0]) if n == 4 else list(range(n))[:-4:-1]
    roles = ("blocks",) if n == 3 else ("channels", "channels" if kernel else "blocks")
    role = dict(zip(axes, ("line" if n == 1 else "side", "side", *roles)))
    limits = {"line": 2 * SIDE, "side": SIDE, "channels": CHANNELS, "blocks": IMAGES, "other": 1}

    def crop() -> list[int]:
        return [min(m, limits[role.get(a, "other")]) for a, m in enumerate(shape)]

    if n > 2 and max(shape[a] for a in axes[:2]) > SIDE:  # no image, and cut anyway
        limits["side"] //= 2
    for shorter in (*["channels"] * 7, "blocks", *("side", "line") * 5):
        if math.prod(crop()) > most:
            limits[shorter] = max(limits[shorter] - 1 if shorter == "channels" else limits[shorter] // 2, 1)
    return axes, crop()


def plain(x: Any) -> Any:
    """A number for JSON, which has no NaN and no Inf: these are strings."""
    return float(x) if math.isfinite(x) else str(float(x))
