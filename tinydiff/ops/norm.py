"""Normalisation: group norm, layer norm, batch norm. They differ only in which elements share a mean and a variance.

    xhat = (x - mean) / sqrt(var + eps),    y = xhat w + b          mean and var over the m elements of a set

The derivative of xhat: a shift of the set by a constant moves the mean with it, a scaling moves the deviation with it,
so of a cotangent h = y' w of xhat what remains is the part orthogonal to both the constants and xhat,

    x' = (h - mean(h) - xhat mean(h xhat)) / sqrt(var + eps),    w' = sum y' xhat,    b' = sum y'

Here x is seen as (A, L, G, D), sets over L and D: group norm (N, H W, groups, C / groups), layer norm (rows, 1, 1, C),
batch norm (1, N H W, C, 1).
"""

from __future__ import annotations

import math
from typing import Any

from .. import kernels
from ..tape import Saved, composite, primitive
from .elementwise import sqrt
from .reduce import mean, var
from .shape import reshape


@primitive
def normalize(x: Any, weight: Any, bias: Any, *, view: tuple[int, int, int, int], eps: float) -> Any:
    """y = xhat w + b, with x seen in the shape `view` (see above); weight and bias (C,), or both None

    x' = (h - mean(h) - xhat mean(h xhat)) rstd,   w' = sum y' xhat,   b' = sum y',   where h = y' w
    """
    y, mean, rstd = kernels.normalize(x.reshape(view), None, weight, bias, eps, False)
    return y.reshape(x.shape), Saved(mean=mean, rstd=rstd)


@normalize.reference
def _(x: Any, weight: Any, bias: Any, *, view: Any, eps: float) -> Any:
    z = reshape(x, shape=view)
    centred = z - mean(z, axis=(1, 3), keepdims=True)
    y = reshape(centred / sqrt(var(z, axis=(1, 3), keepdims=True) + eps), shape=x.shape)
    return y if weight is None else y * weight + bias


@normalize.vjp
def _(g: Any, _y: Any, x: Any, weight: Any, bias: Any, *, view: Any, eps: float, saved: Saved) -> Any:
    dx, _, dw, db = kernels.normalize_backward(
        g.reshape(view), x.reshape(view), saved.mean, saved.rstd, None, weight, bias, False
    )
    return dx.reshape(x.shape), dw, db


@composite
def group_norm(x: Any, weight: Any = None, bias: Any = None, *, groups: int, eps: float = 1e-5) -> Any:
    """Group norm of (N, ..., C): statistics of each sample over all positions and the C / groups channels of a group.

    Source: Wu and He 2018. Errors: ValueError if the groups do not divide C, or weight and bias are not (C,).
    """
    channels = _channels("group_norm", x, weight, bias, 2)
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups={groups} does not divide the {channels} channels of x {x.shape}")
    n = x.shape[0]
    positions = math.prod(x.shape[1:-1])
    return normalize(x, weight, bias, view=(n, positions, groups, channels // groups), eps=eps)


@composite
def layer_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Layer norm of (..., C): statistics of each position over its channels.

    Source: Ba et al. 2016. Errors: ValueError if weight and bias are not (C,).
    """
    channels = _channels("layer_norm", x, weight, bias, 1)
    return normalize(x, weight, bias, view=(math.prod(x.shape[:-1]), 1, 1, channels), eps=eps)


@composite
def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Batch norm of (N, ..., C) with the statistics of this batch: each channel over all samples and positions.

    With fixed statistics, as in evaluation, it is an affine map, and needs no op (see nn.BatchNorm2d).
    Source: Ioffe and Szegedy 2015. Errors: ValueError if weight and bias are not (C,).
    """
    channels = _channels("batch_norm", x, weight, bias, 2)
    return normalize(x, weight, bias, view=(1, math.prod(x.shape[:-1]), channels, 1), eps=eps)


def _channels(what: str, x: Any, weight: Any, bias: Any, least: int) -> int:
    if x.ndim < least:
        raise ValueError(f"{what} takes x of at least {least} dimensions, channels last, not {x.shape}")
    if x.dtype.kind not in "fc":
        raise TypeError(f"{what}: x must be floating, not {x.dtype} of shape {x.shape}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{what}: the {name} must have shape {x.shape[-1:]} for x {x.shape}, not {p.shape}")
    if (weight is None) != (bias is None):
        raise ValueError(f"{what}: give weight and bias, or neither")
    return x.shape[-1]
