"""Images moved a little: turned, scaled, sheared and shifted, each in its own way. A classifier that learns from them
does not take the place or the slant of a digit for its shape.

The image that is returned has at pixel p the value that the given image has at A p + b, where p is counted from the
middle:

    A = [cos a, -sin a]   [s_x, h s_y]            a: an angle, s: two scales, h: a shear
        [sin a,  cos a] x [0,   s_y  ]            b: a shift in pixels

So every pixel is computed once, and there are no holes. Between pixels the value is linear in each direction
(bilinear interpolation of the four around it).
"""

from __future__ import annotations

from ..arguments import number
from ..backend import Array, xp
from ..rng import Rng


def random_affine(
    images: Array,
    rng: Rng,
    *,
    angle: float = 0.2,
    scale: float = 0.12,
    shear: float = 0.2,
    shift: float = 2.0,
    fill: float = 0.0,
    sample_offset: int = 0,
) -> Array:
    """Each image under a random affine map of its own: floats (N, H, W, C) -> (N, H, W, C), on the device.

    angle: in radians; scale, shear: relative; shift: in pixels. All are half-widths of uniform distributions around
    the identity. fill: the value outside of the image. rng: one draw, whose row i is that of sample
    `sample_offset + i`, so an image is moved in the same way in any microbatch.
    Errors: ValueError for another rank, or half-widths that are negative or not finite; a scale must be below 1.
    """
    if images.ndim != 4 or images.dtype.kind != "f":
        raise ValueError(f"random_affine takes floats (N, H, W, C), not {images.dtype} of shape {images.shape}")
    angle, shear, shift = (
        number(f"random_affine: {name}", value, "[0, inf)")
        for name, value in (("angle", angle), ("shear", shear), ("shift", shift))
    )
    scale = number("random_affine: scale", scale, "[0, 1)")
    n, height, width, channels = images.shape
    u = 2 * rng.uniform((n, 6, 1, 1), sample_offset=sample_offset) - 1  # (N, 6, 1, 1) in [-1, 1)
    a, sx, sy, h = angle * u[:, 0], 1 + scale * u[:, 1], 1 + scale * u[:, 2], shear * u[:, 3]  # each (N, 1, 1)
    cos, sin = xp.cos(a), xp.sin(a)
    x = (xp.arange(width, dtype=images.dtype) - (width - 1) / 2).reshape(1, 1, width)
    y = (xp.arange(height, dtype=images.dtype) - (height - 1) / 2).reshape(1, height, 1)
    from_x = cos * sx * x + (h * cos - sin) * sy * y + shift * u[:, 4] + (width - 1) / 2  # (N, H, W)
    from_y = sin * sx * x + (h * sin + cos) * sy * y + shift * u[:, 5] + (height - 1) / 2
    # Beyond one pixel outside everything is fill: with a border of it, no index needs a case of its own.
    from_x, from_y = xp.clip(from_x, -1, width), xp.clip(from_y, -1, height)
    left, top = xp.floor(from_x), xp.floor(from_y)
    across, down = (from_x - left)[..., None], (from_y - top)[..., None]  # (N, H, W, 1) in [0, 1)
    rows, columns = height + 3, width + 3  # a border of one above and at the left, of two below and at the right
    bordered = xp.full((n, rows, columns, channels), fill, images.dtype)
    bordered[:, 1 : height + 1, 1 : width + 1] = images
    pixels = bordered.reshape(n * rows * columns, channels)  # (N, H + 3, W + 3, C) -> (N (H + 3) (W + 3), C)
    start = xp.arange(n).reshape(n, 1, 1) * (rows * columns)
    at = start + (top.astype("int64") + 1) * columns + (left.astype("int64") + 1)  # (N, H, W)
    upper = pixels[at] + across * (pixels[at + 1] - pixels[at])  # (N, H, W, C)
    lower = pixels[at + columns] + across * (pixels[at + columns + 1] - pixels[at + columns])
    return (upper + down * (lower - upper)).astype(images.dtype, copy=False)
