"""Normalisation: group norm, layer norm, batch norm. They differ only in which elements share a mean and a variance.

    xhat = (x - mean) / sqrt(var + eps),    y = xhat w + b          mean and var over the m elements of a set

The derivative of xhat: a shift of the set by a constant moves the mean with it, a scaling moves the deviation with it,
so of a cotangent h = y' w of xhat what remains is the part orthogonal to both the constants and xhat,

    x' = (h - mean(h) - xhat mean(h xhat)) / sqrt(var + eps),    w' = sum y' xhat,    b' = sum y'

Here x is seen as (A, L, G, D), sets over L and D: group norm (N, H W, groups, C / groups), layer norm (rows, 1, 1, C),
batch norm (1, N H W, C, 1). What stands around a norm in a U-Net, a shift before it and silu after it, can be part of
it: that saves passes over memory, and what the norm keeps, its input and the statistics, is enough for all.
"""

from __future__ import annotations

import math
from typing import Any

from .. import kernels
from ..tape import Saved, composite, primitive
from .activation import silu as silu_of
from .elementwise import sqrt
from .reduce import mean, var
from .shape import reshape


@primitive
def normalize(
    x: Any, shift: Any, weight: Any, bias: Any, *, view: tuple[int, int, int, int], eps: float, silu: bool = False
) -> Any:
    """y = xhat w + b, or silu of that, with x seen in the shape `view` (see above)

    shift (A, C), or None, is added to x first, at every position of a sample. weight and bias are (C,), or (A, C), one
    a sample, or both None.

    x' = (h - mean(h) - xhat mean(h xhat)) rstd,   shift' = sum x',   w' = sum k xhat,   b' = sum k
    where h = k w, and k = y', or y' silu'(xhat w + b)
    """
    y, mean, rstd = kernels.normalize(x.reshape(view), shift, weight, bias, eps, silu)
    return y.reshape(x.shape), Saved(mean=mean, rstd=rstd)


@normalize.reference
def _(x: Any, shift: Any, weight: Any, bias: Any, *, view: Any, eps: float, silu: bool) -> Any:
    each = (-1, 1, *view[2:])  # (C,) or (A, C) -> (1 or A, 1, G, D)
    z = reshape(x, shape=view)
    z = z if shift is None else z + reshape(shift, shape=each)
    centred = z - mean(z, axis=(1, 3), keepdims=True)
    y = centred / sqrt(var(z, axis=(1, 3), keepdims=True) + eps)
    y = y if weight is None else y * reshape(weight, shape=each) + reshape(bias, shape=each)
    return reshape(silu_of(y) if silu else y, shape=x.shape)


@normalize.vjp
def _(
    g: Any, _y: Any, x: Any, shift: Any, weight: Any, bias: Any, *, view: Any, eps: float, silu: bool, saved: Saved
) -> Any:
    dx, dshift, dweight, dbias = kernels.normalize_backward(
        g.reshape(view), x.reshape(view), saved.mean, saved.rstd, shift, weight, bias, silu
    )
    return dx.reshape(x.shape), dshift, dweight, dbias


@composite
def group_norm(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    shift: Any = None,
    *,
    groups: int,
    eps: float = 1e-5,
    silu: bool = False,
) -> Any:
    """Group norm of (N, ..., C): statistics of each sample over all positions and the C / groups channels of a group.

    What stands before and after it in a U-Net can go with it, in fewer passes over memory: silu=True gives
    silu(group_norm(x)), and a shift (N, C), such as the time, is added to x at every position first. weight and
    bias may be (N, C), one a sample (adaptive group norm).
    Source: Wu and He 2018; adaptive: Dhariwal and Nichol 2021. Errors: ValueError if the groups do not divide C, or
    weight, bias or shift have another shape.
    """
    channels = _channels("group_norm", x, weight, bias, 2, each=True)
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups={groups} does not divide the {channels} channels of x {x.shape}")
    if shift is not None and shift.shape != (x.shape[0], channels):
        raise ValueError(f"group_norm: the shift must have shape {(x.shape[0], channels)}, not {shift.shape}")
    n = x.shape[0]
    positions = math.prod(x.shape[1:-1])
    return normalize(x, shift, weight, bias, view=(n, positions, groups, channels // groups), eps=eps, silu=silu)


@composite
def layer_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Layer norm of (..., C): statistics of each position over its channels.

    Source: Ba et al. 2016. Errors: ValueError if weight and bias are not (C,).
    """
    channels = _channels("layer_norm", x, weight, bias, 1)
    return normalize(x, None, weight, bias, view=(math.prod(x.shape[:-1]), 1, 1, channels), eps=eps)


@composite
def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Batch norm of (N, ..., C) with the statistics of this batch: each channel over all samples and positions.

    With fixed statistics, as in evaluation, it is an affine map, and needs no op (see nn.BatchNorm2d).
    Source: Ioffe and Szegedy 2015. Errors: ValueError if weight and bias are not (C,).
    """
    channels = _channels("batch_norm", x, weight, bias, 2)
    return normalize(x, None, weight, bias, view=(1, math.prod(x.shape[:-1]), channels, 1), eps=eps)


def _channels(what: str, x: Any, weight: Any, bias: Any, least: int, each: bool = False) -> int:
    """C, if everything fits; with `each`, weight and bias may be (N, C)."""
    if x.ndim < least:
        raise ValueError(f"{what} takes x of at least {least} dimensions, channels last, not {x.shape}")
    if x.dtype.kind not in "fc":
        raise TypeError(f"{what}: x must be floating, not {x.dtype} of shape {x.shape}")
    shapes = [x.shape[-1:], (x.shape[0], x.shape[-1])] if each else [x.shape[-1:]]
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{what}: the {name} must have shape {wanted} for x {x.shape}, not {p.shape}")
    given = [None if p is None else p.shape for p in (weight, bias)]
    if given[0] != given[1]:
        raise ValueError(f"{what}: give weight and bias of one shape, or neither, not {given[0]} and {given[1]}")
    return x.shape[-1]
