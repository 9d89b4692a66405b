"""Pictures drawn with matplotlib, which is imported when the first one is drawn. No window, no pyplot, no global state.

Each function writes one file, whole or not at all; the ending of its name chooses the format (.png, .svg, .pdf).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import backend
from .arguments import integer, number
from .operators import array_of
from .saving import write_atomically

INK, FAINT, BLUE, RED = "#222222", "#8a8a8a", "#1f6fb4", "#c8452f"


def image_grid(
    images: Any,
    path: str | os.PathLike[str],
    *,
    rows: int | None = None,
    row_labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int = 3,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Images in rows and columns, left to right and top to bottom.

    images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), or one image (H, W), (H, W, 1) or (H, W, 3); an array or a Tensor.
    Three axes of which the last has 1 or 3 entries are one image. low is black and high is white: 0 and 1 for floats
    and bool, 0 and 255 for uint8, unless given; for other integers both must be. Values beyond them are clipped, and
    NaN is drawn in red. rows: chosen to make the picture about square unless given; the last row may be short.
    row_labels: one text per row. scale: pixels of the picture per pixel of an image.
    Errors: ValueError for other shapes, for no images, for a low or high that is not finite, or is missing, for a high
    that is not above low, for rows or a scale that are no integers of 1 or more, or for row_labels that are not one per
    row; TypeError for what is no array of real numbers.
    """
    from matplotlib.colors import to_rgb

    given = backend.to_host(array_of(images))
    pixels = given
    if pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[-1] in (1, 3):
        pixels = pixels[None]  # one image: (H, W) -> (1, H, W), (H, W, C) -> (1, H, W, C)
    if pixels.ndim == 3:
        pixels = pixels[..., None]  # (N, H, W) -> (N, H, W, 1)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or pixels.size == 0:
        raise ValueError(
            "image_grid: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3), or one of them, and not none, not "
            f"{given.shape}"
        )
    low, high = _black_and_white(pixels.dtype, low, high)
    n, height, width, _ = pixels.shape
    rows = round(n**0.5) or 1 if rows is None else integer("image_grid: rows", rows)
    scale = integer("image_grid: scale", scale)
    if rows > n:
        raise ValueError(f"image_grid: {n} images do not fill {rows} rows")
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"image_grid: {len(row_labels)} row labels for {rows} rows")
    columns = -(-n // rows)
    gap = 2
    sheet = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, 3))
    shades = np.clip((pixels.astype(float) - low) / (high - low), 0, 1)
    shades = np.where(np.isnan(shades).any(axis=3, keepdims=True), to_rgb(RED), shades)  # -> (N, H, W, 3)
    for i, shade in enumerate(shades):
        top, left = gap + (height + gap) * (i // columns), gap + (width + gap) * (i % columns)
        sheet[top : top + height, left : left + width] = shade
    _save_sheet(sheet, path, scale, height + gap, row_labels, title)


def picture_files(images: Any, folder: str | os.PathLike[str], *, low: float, high: float) -> None:
    """A file for each image (N, H, W, C), pixel for pixel: 0000.png, 0001.png, ... in a folder, which is made.
    Values beyond low, black, and high, white, are clipped. Errors: ValueError for other shapes; OSError."""
    from PIL import Image

    pixels = backend.to_host(array_of(images))
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(f"picture_files: images must be (N, H, W, 1) or (N, H, W, 3), not {pixels.shape}")
    low, high = _black_and_white(pixels.dtype, low, high)
    greys = np.round(np.clip((pixels.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, grey in enumerate(greys):
        Image.fromarray(grey[..., 0] if grey.shape[-1] == 1 else grey).save(Path(folder) / f"{i:04}.png")


def _black_and_white(dtype: np.dtype, low: float | None, high: float | None) -> tuple[float, float]:
    """The values that are black and white."""
    if dtype.kind not in "fiub":
        raise TypeError(f"image_grid: images must be of real numbers, not {dtype}")
    if (low is None or high is None) and dtype.kind in "iu" and dtype != "uint8":
        raise ValueError(
            f"image_grid: of {dtype} it is not known which values are black and white: give low and high, not "
            f"{low!r} and {high!r}"
        )
    low = 0.0 if low is None else number("image_grid: low", low)
    high = (255.0 if dtype == "uint8" else 1.0) if high is None else number("image_grid: high", high)
    if not low < high:
        raise ValueError(f"image_grid: low must be less than high, not {low!r} and {high!r}")
    return low, high


def _save_sheet(
    sheet: Any, path: Any, scale: int, pitch: int, row_labels: Sequence[str] | None, title: str | None
) -> None:
    """The sheet, (H, W, 3), with a whole number of screen pixels per pixel, and with texts at the left and above."""
    dpi = 100
    height, width = (side * scale / dpi for side in sheet.shape[:2])  # inches
    left = 0.085 * max(map(len, row_labels)) + 0.1 if row_labels else 0.0
    top = 0.3 if title else 0.0
    figure = new_figure(left + width, top + height, dpi)
    axes = figure.add_axes((left / (left + width), 0, width / (left + width), height / (top + height)))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for row, label in enumerate(row_labels or ()):
        middle = (0, (row + 0.5) * pitch + 1)
        axes.annotate(
            label, middle, (-6, 0), textcoords="offset points", ha="right", va="center", color=INK, fontsize=9
        )
    if title:
        figure.text(0.5, 1 - 0.15 / (top + height), title, ha="center", va="center", color=INK, fontsize=10)
    save(figure, path)


def loss_curve(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    reference: Mapping[float, float] | None = None,
    levels: Mapping[str, float] | None = None,
    title: str = "training loss",
    x: str = "epoch",
    reference_label: str = "published",
) -> None:
    """The loss of a training log, on a logarithmic scale.

    records: lines of the log, each with "loss" and the key `x`. reference: {x: loss} of another training, drawn as
    points for comparison. levels: {name: loss}, horizontal lines for scale.
    Errors: ValueError if there are no records, if one lacks "loss" or the key `x`, if a loss or a level is not positive
    and finite, or if an x is not finite.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    if len(records) == 0:
        raise ValueError("loss_curve: no records to draw")
    if lacking := [record for record in records if not {"loss", x} <= set(record)]:
        raise ValueError(f"loss_curve: a record must have {x!r} and 'loss', not only {list(lacking[0])}")
    where, losses = [_finite(x, r[x]) for r in records], [_positive("a loss", r["loss"]) for r in records]
    levels = {name: _positive(f"the level {name!r}", level) for name, level in (levels or {}).items()}
    reference = {_finite(x, at): _positive("a loss of the reference", y) for at, y in (reference or {}).items()}
    figure = new_figure(7, 4.2, 130)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for name, level in levels.items():
        axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=":")
        text, across = f"{name}, {level:.4g}", axes.get_yaxis_transform()
        far = [abs(math.log(loss / level)) for loss in (losses[0], losses[-1])]  # of the curve, at either end
        end, shift, side = (0, 4, "left") if far[0] > far[1] else (1, -4, "right")
        axes.annotate(text, (end, level), (shift, 3), across, "offset points", ha=side, color=FAINT, fontsize=8)
    axes.plot(
        where, losses, color=BLUE, linewidth=1.8, marker="o", markersize=3 if len(losses) < 100 else 0, label="this run"
    )
    axes.annotate(
        f"{losses[-1]:.4g}", (where[-1], losses[-1]), (5, 5), textcoords="offset points", color=BLUE, fontsize=9
    )
    if reference:
        axes.plot(
            list(reference), list(reference.values()), "D", color=RED, markersize=5, mfc="none", label=reference_label
        )
    if reference or levels:
        axes.legend(edgecolor="none", framealpha=1, loc="upper center")
    frame(axes, title, x=x, y="loss", fontsize=11)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    figure.set_layout_engine("tight")
    save(figure, path)


def matrix(
    values: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
    low: float,
    high: float,
    title: str = "",
) -> None:
    """A matrix as squares, blue below the middle of low and high, red above it, each with its number.

    labels: one text per row; column_labels: per column, the same unless given. Errors: ValueError for labels that are
    not one for each, for what is no matrix of numbers, or for low not below high.
    """
    values = backend.to_host(array_of(values))
    column_labels = labels if column_labels is None else column_labels
    if values.ndim != 2 or values.dtype.kind not in "fiub" or values.size == 0:
        raise ValueError(f"matrix: there must be a matrix of numbers, not {values.dtype} of shape {values.shape}")
    if values.shape != (len(labels), len(column_labels)):
        raise ValueError(f"matrix: {len(labels)} and {len(column_labels)} labels do not fit the shape {values.shape}")
    low, high = number("matrix: low", low), number("matrix: high", high)
    if not low < high:
        raise ValueError(f"matrix: low must be less than high, not {low!r} and {high!r}")
    rows, columns = values.shape
    figure = new_figure(1.6 + 0.48 * columns, 1.3 + 0.48 * rows)
    axes = figure.add_subplot()
    axes.imshow(values, cmap="RdBu_r", vmin=low, vmax=high)
    axes.set_xticks(range(columns), column_labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(rows), labels, fontsize=8)
    middle, half = (low + high) / 2, (high - low) / 2
    for (i, j), value in np.ndenumerate(values):
        strong = abs(value - middle) > 0.6 * half  # on a dark square
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if strong else INK)
    frame(axes, title)
    axes.spines[:].set_visible(False)
    figure.set_layout_engine("tight")
    save(figure, path)


def _finite(what: str, x: Any, interval: str = "(-inf, inf)") -> float:
    """A number, also in an array or a Tensor of one element."""
    return number(f"loss_curve: {what}", x.item() if hasattr(x, "item") else x, interval)


def _positive(what: str, x: Any) -> float:
    return _finite(f"{what}, on a logarithmic scale,", x, "(0, inf)")


# ---------------------------------------------------------------- for the pictures of other files


def new_figure(width: float, height: float, dpi: int = 130) -> Any:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi, facecolor="white")


def frame(axes: Any, title: str = "", *, x: str = "", y: str = "", fontsize: int = 10) -> None:
    """Title and labels; no frame lines at the top and at the right, where there is no scale."""
    axes.set_title(title, fontsize=fontsize, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """The figure as a file, whole or not at all."""
    path = Path(path)
    kind = path.suffix.lstrip(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind))
