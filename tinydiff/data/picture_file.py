"""One picture file as an array of bytes, whatever its format, its mode and its orientation.

Pillow, which matplotlib brings along, reads the file. What it would do silently and wrongly is done here by hand: it
clips grey of 16 bits at 255, drops transparency, and leaves a photograph lying on its side. It releases the GIL while
it decodes and resizes, so several files are read at a time by as many threads.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .limits import check_size

if TYPE_CHECKING:
    from PIL.Image import Image

# Endings of files that are taken for pictures. The last row is of formats that Pillow needs a plugin for, or cannot
# read: they are here so that such a file is refused aloud and not left out in silence.
ENDINGS = frozenset(
    """.png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .jp2 .ppm .pgm .pbm .pnm .tga .pcx .ico .qoi
    .heic .heif .svg .psd .jxl .cr2 .cr3 .nef .arw .dng""".split()
)

GAP = 4  # pixels that the quick reductions leave for each pixel of the result, so that they do not show in it
ORIENTATION = 0x0112  # the EXIF tag

Size = tuple[int, int]  # (height, width)


class Unreadable(ValueError):
    """Why a picture cannot be read. `lasting`: the bytes are at fault, and it will be no better next time."""

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.lasting = lasting


def read_picture(path: Path, size: Size | None, colour: bool | None, background: tuple[int, int, int]) -> np.ndarray:
    """The first frame of a picture, upright and opaque: uint8 (H, W, 1) if it is grey, else (H, W, 3).

    size: the shorter side is resized to fit, and the longer one cropped on both sides. colour: False makes it grey
    (ITU-R 601 luma). background: shows where the picture is transparent.
    Errors: Unreadable, for a file that cannot be opened, is empty, damaged, no picture, or too large for Pillow.
    """
    from PIL import Image as pillow

    try:
        with _open(path) as image:
            if size is not None:
                _decode_smaller(image, size)
            image.load()  # Pillow has only read the header so far
            turn = 1 if image.format == "TIFF" else _turn(image)  # it has turned a TIFF by itself
            found = _opaque(_in_bytes(image), background)
        if colour is False:
            found = found.convert("L")
        if size is not None:
            sideways = turn in (5, 6, 7, 8)
            found = _fit(found, *(reversed(size) if sideways else size))
        if turn in range(2, 9):
            flip = pillow.Transpose
            found = found.transpose(
                {2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM, 5: flip.TRANSPOSE,
                 6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90}[turn]
            )  # fmt: skip
        pixels = np.asarray(found)
    except Unreadable:
        raise
    except MemoryError:
        raise Unreadable("does not fit into memory", lasting=False) from None
    except Exception as error:  # a damaged file makes Pillow raise what it likes, SyntaxError and struct.error too
        raise _reason(path, error) from error
    pixels = pixels.reshape((*pixels.shape[:2], -1))  # (H, W) -> (H, W, 1)
    return pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels


def stored_size(path: Path) -> Size | None:
    """The (height, width) that the header of a file gives; None if it cannot be read. Much quicker than decoding."""
    try:
        with _open(path) as image:
            width, height = image.size
            sideways = image.format in ("JPEG", "MPO", "WEBP") and _turn(image) in (5, 6, 7, 8)
            return (width, height) if sideways else (height, width)
    except Exception:
        return None


def _open(path: Path) -> Image:
    from PIL import Image as pillow

    limit = pillow.MAX_IMAGE_PIXELS
    try:
        # A picture of that many pixels takes no more than this as it is: four channels of 16 bits.
        check_size(path, 2**62 if limit is None else 8 * limit + 2**20)
    except ValueError as error:
        raise Unreadable(str(error), lasting=False) from None
    data = path.read_bytes()
    if not data:
        raise Unreadable("is empty (0 bytes)")
    pillow.init()
    # Pillow would start Ghostscript on PostScript, which is a program: also on one that calls itself a .png.
    # From bytes, not from the path: Pillow 13 would map an uncompressed TIFF into memory, with rows of the wrong length
    # if its orientation is sideways.
    image = pillow.open(io.BytesIO(data), formats=[name for name in pillow.ID if name != "EPS"])
    if limit is not None and image.width * image.height > limit:  # Pillow itself only warns, up to twice the limit
        image.close()
        raise _too_large(f"{image.width}x{image.height} pixels")
    return image


def _too_large(what: str) -> Unreadable:
    from PIL import Image as pillow

    return Unreadable(
        f"has {what}, more than Pillow's limit of {pillow.MAX_IMAGE_PIXELS} (is it a decompression bomb?); if you "
        "trust it, raise PIL.Image.MAX_IMAGE_PIXELS",
        lasting=False,
    )


def _reason(path: Path, error: Exception) -> Unreadable:
    """What went wrong, in words that follow the name of the file."""
    from PIL import Image as pillow

    if isinstance(error, (pillow.DecompressionBombError, pillow.DecompressionBombWarning)):
        return _too_large("too many pixels")
    if isinstance(error, pillow.UnidentifiedImageError):
        with open(path, "rb") as file:
            start = file.read(12)
        return Unreadable(
            f"is no picture that Pillow can read (it begins with {start!r}); HEIC, SVG and raw photographs must be "
            "converted, to PNG or JPEG"
        )
    if isinstance(error, OSError) and error.errno is not None:  # from the file system, not from Pillow
        return Unreadable(f"cannot be opened: {error.strerror}", lasting=False)
    return Unreadable(f"is damaged: {error or type(error).__name__}")


def _turn(image: Image) -> int:
    """How the camera was held, from 1 to 8, as EXIF counts it. Damage to EXIF is no reason to refuse a picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


# ---------------------------------------------------------------- modes


def _in_bytes(image: Image) -> Image:
    """A picture whose samples have more than 8 bits as one of 8 bits, with black at 0 and white at 255."""
    from PIL import Image as pillow

    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow opens grey of 16 bits in mode "I;16", or in "I", whose samples have 32 bits.
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise Unreadable(
            f"has samples of 32 bits (mode {image.mode}), which do not say what is white: save it with 8 or 16 bits"
        )
    bits, inverted = 16, False
    if image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        bits, inverted = tags.get(258, (16,))[0], tags.get(262) == 0  # BitsPerSample; PhotometricInterpretation
    values = np.asarray(image).astype(np.float32)  # (H, W)
    grey = np.clip(np.rint(values * (255 / (2**bits - 1))), 0, 255).astype(np.uint8)
    found = pillow.fromarray(255 - grey if inverted else grey)
    if "transparency" in image.info:  # of a PNG: the one value that is transparent
        found.putalpha(pillow.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return found


def _opaque(image: Image, background: tuple[int, int, int]) -> Image:
    """The picture in mode "L" or "RGB", laid on the background where it is transparent."""
    from PIL import Image as pillow

    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", pixels.size, (*background, 255)), pixels).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")  # from a palette, CMYK, YCbCr, LAB, ...


# ---------------------------------------------------------------- sizes
#
# A picture made smaller must be low-pass filtered first, or fine patterns turn into coarse ones that are not there
# (aliasing), and a diffusion model learns these like any others. Lanczos' windowed sinc, stretched by the factor, is
# the usual compromise between blur and aliasing. Its cost grows with the pixels of the source, so a large source is
# first averaged over blocks (in a JPEG for nothing: a block's average is in its cosine transform), down to GAP times
# the result, where this no longer shows: on a photograph it changes a byte by 0.2 on average, and by 3 at most.


def _decode_smaller(image: Image, size: Size) -> None:
    """Let the decoder of a JPEG reduce it by 2, 4 or 8, if it stays GAP times as large as the result."""
    # Whichever way the picture is turned, its shorter side then covers the longer one of the result.
    shrink = min(image.size) / (GAP * max(size))
    if shrink > 1:
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))


def _fit(image: Image, height: int, width: int) -> Image:
    """Resized to cover height x width, the rest cropped equally on both sides: as one step, so that the middle stays
    in the middle to a fraction of a pixel, and a picture a million times as long as wide needs no memory."""
    from PIL import Image as pillow

    if image.size == (width, height):
        return image
    shrink = min(image.width / width, image.height / height)
    across, down = min(width * shrink, image.width), min(height * shrink, image.height)  # the part that is kept
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, min(left + across, image.width), min(top + down, image.height))
    return image.resize((width, height), pillow.Resampling.LANCZOS, box, reducing_gap=GAP)
