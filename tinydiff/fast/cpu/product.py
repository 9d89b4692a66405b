"""Products of matrices: by the BLAS, or by the loops of convolution in C, as for images of one pixel,

    x @ w      y[n, o] = sum over c of x[n, c] w[c, o]      a convolution with one tap
    g @ w.T    dx[n, c] = sum over o of g[n, o] w[c, o]     its gradient by the input
    x.T @ g    dw[c, o] = sum over n of x[n, c] g[n, o]     and by the weight

where the BLAS leaves half of each vector of this processor unused, because it does not know it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...backend import Array
from ..taken import is_real
from ..threads import matmul, vectors_unused
from .conv import conv_in_c, weight_grad_in_c

ENOUGH, THINNEST = 3 * 2**19, 16  # multiply-adds, and the shortest side: else to call, and to arrange w, takes too long
LONGEST = 2**13  # of the sums over c and o, which are one chain in C; those of the BLAS are in blocks
# One pixel under one tap: conv.lists of it.
ONE_PIXEL: dict[str, Any] = dict(lists=np.array([0, 1, 0, 0, 0, 1, 0, 0, 1], np.int64), K=2, P=1, R=1, groups=1)
NO_PADDING: dict[str, Any] = dict(sh=1, sw=1, top=0, left=0, dh=1, dw=1, together=False)


def product(x: Array, y: Array) -> Array:
    """x @ y. A column times a row, as in the gradient of a layer by one sample, NumPy does not give to the BLAS, and
    its own loop takes more than twice as long as a multiplication."""
    if x.shape[-1] == 1:
        return x * y
    if x.ndim == y.ndim == 2 and x.size * y.shape[1] >= ENOUGH and vectors_unused() and is_real(x, y):
        z = np.empty((len(x), y.shape[1]), x.dtype)
        if in_c(x, y, z):
            return z
    return matmul(x, y)


def in_c(x: Array, y: Array, z: Array) -> bool:
    """z = x @ y in C. False if there is no library, if x and y lie in none of the three ways above, and for what the
    BLAS does better."""
    if min(*x.shape, *y.shape) < THINNEST or x.shape[1] != y.shape[0]:
        return False
    if x.flags.c_contiguous and x.shape[1] <= LONGEST:
        if y.flags.c_contiguous:
            return conv_in_c(x=x[:, None], w=y[None], b=None, y=z[:, None], transposed=False, **ONE_PIXEL)
        if y.flags.f_contiguous:
            return conv_in_c(x=x[:, None], w=y.T[None], b=None, y=z[:, None], transposed=True, **ONE_PIXEL)
    if x.flags.f_contiguous and y.flags.c_contiguous:
        images = {"x": x.T[:, None, None], "y": y[:, None, None], "w": z[None, None]}
        return weight_grad_in_c(**images, **NO_PADDING)
    return False
