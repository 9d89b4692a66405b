"""Pictures drawn with matplotlib, which is imported when the first one is drawn. No window, no pyplot, no global state.

Each function returns the figure, which a notebook shows if it is the last line of a cell. With a path it also writes a
file, whole or not at all; the ending of its name chooses the format (.png, .svg, .pdf).
"""

from __future__ import annotations

import functools
import io
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

# Colours that differ for colour-blind readers too: Okabe and Ito 2008, "Color universal design". RED is vermilion.
INK, FAINT, BLUE, RED = "#222222", "#767676", "#0072b2", "#d55e00"
COLOURS = (BLUE, RED, "#009e73", "#56b4e9", INK)  # for lines beside each other


def image_grid(
    images: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    rows: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
    scale: int = 3,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Images in rows and columns, left to right and top to bottom.

    images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), or one image (H, W), (H, W, 1) or (H, W, 3); an array or a Tensor.
    Three axes of which the last has 1 or 3 entries are one image. low is black and high is white: 0 and 1 for floats
    and bool, 0 and 255 for uint8, unless given; for other integers both must be. Values beyond them are clipped, and
    NaN is drawn in red. rows: chosen to make the picture about square unless given; the last row may be short.
    row_labels: one text per row. column_labels: one per column, broken into lines, or upright if a word is too wide for
    that. scale: pixels of the picture per pixel of an image. Returns the figure.
    Errors: ValueError for other shapes, for no images, for a low or high that is not finite, or is missing, for a high
    that is not above low, for rows or a scale that are no integers of 1 or more, or for labels that are not one per row
    and column; TypeError for what is no array of real numbers.
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
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"image_grid: {len(column_labels)} column labels for {columns} columns")
    gap = 2
    sheet = np.ones((rows * (height + gap) + gap, columns * (width + gap) + gap, 3))
    shades = np.clip((pixels.astype(float) - low) / (high - low), 0, 1)
    shades = np.where(np.isnan(shades).any(axis=3, keepdims=True), to_rgb(RED), shades)  # -> (N, H, W, 3)
    for i, shade in enumerate(shades):
        top, left = gap + (height + gap) * (i // columns), gap + (width + gap) * (i % columns)
        sheet[top : top + height, left : left + width] = shade
    return save(_sheet(sheet, scale, (height + gap, width + gap), row_labels or (), column_labels or (), title), path)


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


def _sheet(
    sheet: Any, scale: int, pitch: tuple[int, int], rows: Sequence[str], columns: Sequence[str], title: str | None
) -> Any:
    """The sheet, (H, W, 3), with a whole number of screen pixels per pixel, and with texts at the left and above.
    pitch: pixels from one image to the next, down and across."""
    dpi = 100
    height, width = (side * scale / dpi for side in sheet.shape[:2])  # inches, as all lengths here
    down, across = (side * scale / dpi for side in pitch)
    size = min([9.0, *(72 * down / 1.4 / len(label.splitlines() or [""]) for label in rows)])  # so that all lines fit
    upright = any(text_width(word, 8) > across - 0.04 for label in columns for word in label.split())
    names = list(columns) if upright else [_broken(label, across - 0.04, 8) for label in columns]
    tall = [text_width(name, 8) if upright else 8 * 1.3 / 72 * len(name.splitlines()) for name in names]
    # Whole pixels, so that none of the images is smeared over two.
    left = math.ceil(dpi * max([text_width(label, size) + 0.2 for label in rows], default=0)) / dpi
    above = math.ceil(dpi * max([length + 0.08 for length in tall], default=0)) / dpi
    top = above + (0.3 if title else 0.0)
    over = text_width(title, 10) + 0.2 - left - width if title else 0.0
    beside = math.ceil(dpi * max(over, 0.0) / 2) / dpi  # for a long title
    figure = new_figure(left + width + 2 * beside, top + height, dpi)
    whole = left + width + 2 * beside, top + height
    axes = figure.add_axes(((left + beside) / whole[0], 0, width / whole[0], height / whole[1]))
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    for row, label in enumerate(rows):
        middle = (0, (row + 0.5) * pitch[0] + 1)
        axes.annotate(
            label, middle, (-6, 0), textcoords="offset points", ha="right", va="center", color=INK, fontsize=size
        )
    for column, name in enumerate(names):
        place = ((column + 0.5) * pitch[1] + 1, 0)
        axes.annotate(
            name, place, (0, 3), textcoords="offset points", ha="center", va="bottom", color=INK, fontsize=8,
            rotation=90 if upright else 0, linespacing=1.1,
        )  # fmt: skip
    if title:
        figure.text(0.5, 1 - 0.15 / whole[1], title, ha="center", va="center", color=INK, fontsize=10)
    return figure


def _broken(label: str, width: float, size: float) -> str:
    """The label in lines of at most this width, which may be broken at blanks."""
    lines = []
    for given in label.splitlines():
        line = ""
        for word in given.split():
            longer = f"{line} {word}".strip()
            if line and text_width(longer, size) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


def loss_curve(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    *,
    reference: Mapping[float, float] | None = None,
    levels: Mapping[str, float] | None = None,
    title: str = "training loss",
    x: str = "epoch",
    y: str = "loss",
    log_x: bool = False,
    label: str = "training",
    validation_label: str = "validation",
    reference_label: str = "published",
) -> Any:
    """The losses of a training log, on a logarithmic scale. At the right is the name of each line, and where it ends.

    records: lines of the log, each with "loss" and the key `x`; where some have "validation", that is a second line.
    reference: {x: loss} of another training, drawn as points for comparison. levels: {name: loss}, horizontal lines for
    scale. y: the name of that axis. log_x: x on a logarithmic scale too, as for x="lr". Returns the figure.
    Errors: ValueError if there are no records, if one lacks "loss" or the key `x`, if a loss or a level is not positive
    and finite, or if an x is not finite (or, with log_x, not positive).
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    if len(records) == 0:
        raise ValueError("loss_curve: no records to draw")
    if lacking := [record for record in records if not {"loss", x} <= set(record)]:
        raise ValueError(f"loss_curve: a record must have {x!r} and 'loss', not only {list(lacking[0])}")
    where = _positive if log_x else _finite
    curve = [(where(x, r[x]), _positive("a loss", r["loss"])) for r in records]
    held_out = [(where(x, r[x]), _positive("a validation loss", r["validation"])) for r in records if "validation" in r]
    points = [(where(x, at), _positive("a loss of the reference", y)) for at, y in (reference or {}).items()]
    levels = {name: _positive(f"the level {name!r}", level) for name, level in (levels or {}).items()}
    dots = "o" if len(records) < 100 else ""
    series = [
        (label, curve, {"color": BLUE, "linewidth": 1.2 if held_out else 1.8, "marker": dots, "markersize": 3}),
        (
            validation_label,
            held_out,
            {"color": RED, "linewidth": 1.8, "linestyle": (0, (4, 1.5)), "marker": dots, "markersize": 3},
        ),
        (reference_label, points, {"color": INK, "linestyle": "", "marker": "D", "markersize": 5, "mfc": "none"}),
    ]
    ends = [(f"{name}, {line[-1][1]:.4g}", line[-1][1], style["color"]) for name, line, style in series if line]
    ends += [(f"{name}, {level:.4g}", level, FAINT) for name, level in levels.items()]

    # Every length is known, in inches, so that names can be kept apart.
    left, wide, high, below, above = 0.8, 5.6, 3.25, 0.55, 0.4
    right = max(text_width(name, 8) for name, _, _ in ends) + 0.35
    figure = new_figure(left + wide + right, below + high + above, 130)
    whole = figure.get_size_inches()
    axes = figure.add_axes((left / whole[0], below / whole[1], wide / whole[0], high / whole[1]))
    axes.set_yscale("log")
    axes.set_xscale("log" if log_x else "linear")
    for level in levels.values():
        axes.axhline(level, color=FAINT, linewidth=0.8, linestyle=":")
    for name, line, style in series:
        if line:
            axes.plot(*zip(*line), label=name, **style)
    frame(axes, title, x="learning rate" if x == "lr" else x, y=y, fontsize=11)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    if not log_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # of a single record only one is whole
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    bottom, top = (math.log(y) for y in axes.get_ylim())
    ends.sort(key=lambda end: end[1])
    heights = [(math.log(end[1]) - bottom) / (top - bottom) for end in ends]  # of the axes
    for (name, _, colour), at, apart in zip(ends, heights, _apart(heights, 8 * 1.25 / 72 / high)):
        axes.annotate(
            name, (1, at), (1 + 0.2 / wide, apart), "axes fraction", va="center", color=colour, fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )  # fmt: skip
    return save(figure, path)


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Places from 0 to 1, in ascending order, moved until none is nearer to the next than `least`."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + least) if moved else height)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - least
    return moved


def matrix(
    values: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
    low: float,
    high: float,
    title: str = "",
) -> Any:
    """A matrix as squares, blue below the middle of low and high, red above it, each with its number.

    labels: one text per row; column_labels: per column, the same unless given. Returns the figure.
    Errors: ValueError for labels that are not one for each, for what is no matrix of numbers, or low not below high.
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
    beside, below = (max(text_width(text, 8) for text in texts) for texts in (labels, column_labels))
    width = beside + max(1.1 + 0.48 * columns, text_width(title, 10) + 0.5)  # the title stands above the squares
    figure = new_figure(width, 0.8 + below + 0.48 * rows)
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
    figure.tight_layout()  # once: a layout engine would move things a little at every drawing
    return save(figure, path)


def _finite(what: str, x: Any, interval: str = "(-inf, inf)") -> float:
    """A number, also in an array or a Tensor of one element."""
    return number(f"loss_curve: {what}", x.item() if hasattr(x, "item") else x, interval)


def _positive(what: str, x: Any) -> float:
    return _finite(f"{what}, on a logarithmic scale,", x, "(0, inf)")


# ---------------------------------------------------------------- for the pictures of other files


def new_figure(width: float, height: float, dpi: int = 130) -> Any:
    """An empty figure, in inches."""
    return _figure_class()((width, height), dpi, facecolor="white")


@functools.cache
def _figure_class() -> Any:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that shows itself in a notebook, where only those of pyplot would."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Picture


def text_width(text: str, size: float) -> float:
    """Of the longest line, in inches."""
    from matplotlib.textpath import TextPath

    lines = [line for line in text.splitlines() if line.strip()]
    return max([TextPath((0, 0), line, size=size).get_extents().width / 72 for line in lines], default=0.0)


def frame(axes: Any, title: str = "", *, x: str = "", y: str = "", fontsize: int = 10) -> None:
    """Title and labels; no frame lines at the top and at the right, where there is no scale."""
    axes.set_title(title, fontsize=fontsize, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure as a file, whole or not at all; without a path, no file. Returns the figure."""
    if path is not None:
        path = Path(path)
        kind = path.suffix.lstrip(".") or "png"
        write_atomically(path, lambda file: figure.savefig(file, format=kind))
    return figure
