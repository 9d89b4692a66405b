"""What a Tensor says of itself: its values if they are few, else one line of figures; in a notebook a table, a picture.

All of this is on the host, so on a GPU it waits for the device.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

from . import backend

FEW = 10  # so many numbers are shown themselves
PIXELS = 256  # the longest side of a picture; of a larger image every second pixel is shown, or every third
IMAGES = 8  # of a batch
MAGENTA = (214, 0, 214)  # NaN and Inf


def figures(array: Any) -> list[tuple[str, str]]:
    """Range, mean and standard deviation, of the finite elements, and how many are not finite."""
    values = backend.to_host(array)
    if values.dtype.kind not in "fiub" or values.size == 0:
        return []
    finite = values[np.isfinite(values)].astype(np.float64)
    found = []
    if finite.size:
        found += [("range", f"{finite.min():.3g} to {finite.max():.3g}")]
        found += [("mean", f"{finite.mean():.3g}"), ("deviation", f"{finite.std():.3g}")]
    for name, count in (("NaN", np.isnan(values).sum()), ("Inf", np.isinf(values).sum())):
        if count:
            found.append((name, str(count)))
    return found


def norm(gradient: Any) -> str:
    """The root of the sum of squares."""
    return f"{np.linalg.norm(backend.to_host(gradient).astype(np.float64)):.3g}"


def one_line(array: Any, gradient: Any, history: str) -> str:
    """history: "node=multiply", "requires_grad=True", or nothing."""
    parts = [f"shape {array.shape}", str(array.dtype)]
    parts += [text if name == "range" else f"{name} {text}" for name, text in figures(array)]
    parts += [] if gradient is None else [f"|grad| {norm(gradient)}"]
    return f"tensor({', '.join([*parts, history] if history else parts)})"


def node(node: Any) -> str:
    """A node of the graph: "<node multiply(exp (2, 3), leaf x (3,)) -> (2, 3) float32>". What has no gradient is a
    constant; of the others, the op that made it, or its name."""
    inputs = []
    for parent, value in zip(node.parents, node.values or [None] * len(node.parents)):
        who = "constant" if parent is None else parent.op.name if hasattr(parent, "op") else "leaf"
        name = getattr(parent, "name", None)
        shape = getattr(value if parent is None else parent, "shape", "" if value is None else repr(value))
        inputs.append(" ".join(str(part) for part in (who, name, shape) if part not in (None, "")))
    freed = "" if node.values is not None else ", what it had kept is freed (by backward; retain_graph=True keeps it)"
    return f"<node {node.op.name}({', '.join(inputs)}) -> {node.shape} {node.dtype}{freed}>"


def table(array: Any, gradient: Any, history: str) -> str:
    """The same as HTML, with a picture of what looks like images: (H, W), or (N, H, W, C) with 1 or 3 channels."""
    rows = [("shape", str(array.shape)), ("dtype", str(array.dtype)), *figures(array)]
    rows += [] if gradient is None else [("norm of the gradient", norm(gradient))]
    rows += [("history", history)] if history else []
    cells = "".join(f"<tr><th style='text-align:left'>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return f"<table>{cells}</table>{picture(backend.to_host(array))}"


def picture(values: np.ndarray) -> str:
    """The images side by side as an <img>, the smallest value black and the largest white; "" for other shapes."""
    images = values[None, :, :, None] if values.ndim == 2 else values  # (H, W) -> (1, H, W, 1)
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.size == 0 or images.dtype.kind not in "fiub":
        return ""
    step = -(-max(images.shape[1:3]) // PIXELS)
    images = images[:IMAGES, ::step, ::step].astype(np.float64)
    finite = np.isfinite(images)
    low, high = np.min(images, where=finite, initial=np.inf), np.max(images, where=finite, initial=-np.inf)
    shades = (np.where(finite, images, 0) - (low if finite.any() else 0)) / ((high - low) if high > low else 1)
    pixels = np.where(finite.all(axis=3, keepdims=True), np.round(np.clip(shades, 0, 1) * 255), MAGENTA)
    sheet = np.concatenate(list(pixels), axis=1).astype(np.uint8)  # (N, H, W, 3) -> (H, N W, 3)
    data = base64.b64encode(png(sheet)).decode()
    width = sheet.shape[1] * max(1, 96 // sheet.shape[0])
    return f"<img src='data:image/png;base64,{data}' width='{width}' style='image-rendering:pixelated'>"


def png(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) bytes. Source: the PNG specification, W3C 2003: chunks, each with its length and checksum."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: the row as it is
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, of red, green and blue
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
