"""Normalisation: group norm, layer norm, batch norm. They differ only in which elements share a mean and a variance.

    xhat = (x - mean) / std,    std = sqrt(var + eps),    y = xhat w + b          mean and var over a set of m elements

var divides by m, not m - 1.

The derivative of xhat. With c = x - mean, r = 1 / std, and h for the adjoint of xhat, h = ȳ w:

    dc = dx - mean(dx)                                      a constant added to the set changes nothing
    dr = -r^3 / 2 dvar = -r^3 mean(c dc) = -r^3 mean(c dx)  as var = mean(c^2), and mean(c) = 0
    dxhat = r dc + c dr = r (dx - mean(dx) - xhat mean(xhat dx))                     as r c = xhat

Nothing here needs mean(xhat^2) = 1, which eps makes a little less. Now collect what multiplies dx in sum(h dxhat):

    sum(h mean(dx)) = m mean(h) mean(dx) = sum(mean(h) dx)
    sum(h xhat mean(xhat dx)) = m mean(xhat h) mean(xhat dx) = sum(xhat mean(xhat h) dx)

    x̄ = r (h - mean(h) - xhat mean(xhat h)),    w̄ = ȳ xhat,    b̄ = ȳ

w̄ and b̄ are then summed over all elements that share a w or b: by the engine, where w and b are broadcast.
"""

from __future__ import annotations

import math
from typing import Any

from ..engine import composite, op
from .activation import silu as silu_of
from .activation import silu_vjp
from .elementwise import sqrt
from .reduce import mean
from .reduce import sum as total
from .shape import reshape


@op
def normalize(x: Any, weight: Any, bias: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    """y = xhat w + b, with mean and var over the axes; weight and bias broadcast to x, or both are None

    x̄ = r (h - mean(h) - xhat mean(xhat h)),   h = ȳ w,   w̄ = ȳ xhat,   b̄ = ȳ
    """
    xhat, _ = standardize(x, axes, eps)
    return xhat if weight is None else xhat * weight + bias


@normalize.vjp
def normalize_vjp(g: Any, _y: Any, x: Any, weight: Any, _bias: Any, *, axes: tuple[int, ...], eps: float) -> Any:
    xhat, r = standardize(x, axes, eps)

    def x_adjoint() -> Any:
        h = g if weight is None else g * weight
        return r * (h - mean(h, axis=axes, keepdims=True) - xhat * mean(xhat * h, axis=axes, keepdims=True))

    return x_adjoint, lambda: g * xhat, g


def standardize(x: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any]:
    """xhat and r = 1 / std."""
    c = x - mean(x, axis=axes, keepdims=True)
    r = 1 / sqrt(mean(c * c, axis=axes, keepdims=True) + eps)
    return c * r, r


@op
def shift_normalize_silu(x: Any, shift: Any, weight: Any, bias: Any, *, groups: int, eps: float, silu: bool) -> Any:
    """y = silu(u),   u = normalize(x + shift, w, b): group norm, with the shift before it and silu after, as one op

    ū = ȳ silu'(u);   then as in normalize. The adjoint of the shift is x̄, summed over the positions

    x (N, ..., C); shift (N, C), the same at every position, or None; weight and bias both (C,), (N, C) or None. With
    silu=False, y = u.
    """
    z, *parameters = in_groups(x, shift, weight, bias, groups)
    u = normalize(z, *parameters, axes=(1, 3), eps=eps)
    return reshape(silu_of(u) if silu else u, shape=x.shape)


@shift_normalize_silu.vjp
def shift_normalize_silu_vjp(
    g: Any, _y: Any, x: Any, shift: Any, weight: Any, bias: Any, *, groups: int, eps: float, silu: bool
) -> Any:
    z, *parameters = in_groups(x, shift, weight, bias, groups)
    g = reshape(g, shape=z.shape)
    if silu:
        g = silu_vjp(g, None, normalize(z, *parameters, axes=(1, 3), eps=eps))
    z_adjoint, weight_adjoint, bias_adjoint = normalize_vjp(g, None, z, *parameters, axes=(1, 3), eps=eps)
    z_adjoint = z_adjoint()  # once, for both inputs

    def of_samples(p: Any) -> Any:  # (N, L, G, D) -> (N, C); the engine sums over the samples, if they share a weight
        return reshape(total(p, axis=1), shape=(x.shape[0], x.shape[-1]))

    return (
        reshape(z_adjoint, shape=x.shape),
        lambda: of_samples(z_adjoint),
        lambda: of_samples(weight_adjoint()),
        lambda: of_samples(bias_adjoint),
    )


def in_groups(x: Any, shift: Any, weight: Any, bias: Any, groups: int) -> Any:
    """x + shift as (N, L, G, D), of L positions and G groups of D channels; weight and bias as (1 or N, 1, G, D)."""
    n, channels = x.shape[0], x.shape[-1]

    def grouped(p: Any) -> Any:
        return None if p is None else reshape(p, shape=(1 if p.ndim == 1 else n, 1, groups, channels // groups))

    z = reshape(x, shape=(n, math.prod(x.shape[1:-1]), groups, channels // groups))
    return z if shift is None else z + grouped(shift), grouped(weight), grouped(bias)


# ---------------------------------------------------------------- the norms


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

    The steps before and after a norm in a U-Net can be included, which needs fewer passes over memory: a shift (N, C),
    such as the embedded time, is added to x at every position before the norm, and silu=True gives
    silu(group_norm(x)). weight and bias may be (N, C), one per sample (adaptive group norm). With eps = 0 a group of
    equal elements gives NaN, 0 / 0.
    Source: Wu and He 2018; adaptive: Dhariwal and Nichol 2021. Errors: ValueError if the groups do not divide C, or
    weight, bias or shift have another shape.
    """
    channels = check_channels("group_norm", x, weight, bias, 2, per_sample=True)
    if groups < 1 or channels % groups:
        raise ValueError(f"group_norm: groups={groups} does not divide the {channels} channels of x {x.shape}")
    if shift is not None and shift.shape != (x.shape[0], channels):
        raise ValueError(f"group_norm: the shift must have shape {(x.shape[0], channels)}, not {shift.shape}")
    return shift_normalize_silu(x, shift, weight, bias, groups=groups, eps=eps, silu=silu)


@composite
def layer_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Layer norm of (..., C): statistics of each position over its channels.

    Source: Ba et al. 2016. Errors: ValueError if weight and bias are not (C,).
    """
    check_channels("layer_norm", x, weight, bias, 1)
    return normalize(x, weight, bias, axes=(x.ndim - 1,), eps=eps)


@composite
def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    """Batch norm of (N, ..., C) with the statistics of this batch: each channel over all samples and positions.

    With fixed statistics, as in evaluation, it is an affine map, and needs no op (see nn.BatchNorm2d).
    Source: Ioffe and Szegedy 2015. Errors: ValueError if weight and bias are not (C,).
    """
    check_channels("batch_norm", x, weight, bias, 2)
    return normalize(x, weight, bias, axes=tuple(range(x.ndim - 1)), eps=eps)


def check_channels(what: str, x: Any, weight: Any, bias: Any, least: int, per_sample: bool = False) -> int:
    """The number of channels C. per_sample: weight and bias may be (N, C). Errors: ValueError for other shapes."""
    shape = x.shape
    if len(shape) < least:
        raise ValueError(f"{what} takes x of at least {least} dimensions, channels last, not {shape}")
    if x.dtype.kind not in "fc":
        raise TypeError(f"{what}: x must be floating, not {x.dtype} of shape {shape}")
    of_weight, of_bias = (None if p is None else p.shape for p in (weight, bias))
    shapes = [shape[-1:], (shape[0], shape[-1])] if per_sample else [shape[-1:]]
    for name, given in (("weight", of_weight), ("bias", of_bias)):
        if given is not None and given not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{what}: the {name} must have shape {wanted} for x {shape}, not {given}")
    if of_weight != of_bias:
        raise ValueError(f"{what}: give weight and bias of one shape, or neither, not {of_weight} and {of_bias}")
    return shape[-1]
