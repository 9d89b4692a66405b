"""Normalisation layers: they bring values to mean 0 and variance 1, then apply a weight and a bias. See ops/norm.py."""

from __future__ import annotations

from typing import Any

from .. import ops
from ..arguments import integer, number
from ..backend import xp
from ..engine import Tensor
from ..modes import no_grad
from ..operators import array_of
from ..rng import current_microbatch
from .module import Layer, Parameter, same_dtype


class _Norm(Layer):
    """eps, and a weight of ones and a bias of zeros, one of each per channel; or neither."""

    weight: Parameter | None
    bias: Parameter | None

    def _affine(self, channels: int, eps: float, wanted: bool) -> None:
        self.eps = number(f"{type(self).__name__}: eps", eps, "[0, inf)")
        self.weight = Parameter(xp.ones(channels, "float32")) if wanted else None
        self.bias = Parameter(xp.zeros(channels, "float32")) if wanted else None

    def _check(self, x: Any, channels: int, least: int) -> None:
        if x.ndim < least or x.shape[-1] != channels:
            raise ValueError(
                f"{type(self).__name__} of {channels} channels takes x of {least} axes or more, "
                f"channels last, not {x.shape}"
            )
        if self.weight is not None:
            same_dtype(self, x, self.weight)


class GroupNorm(_Norm):
    """(N, ..., num_channels), each sample and each group of channels brought to mean 0 and variance 1, then times
    weight, plus bias. A shift (N, num_channels) is added to x first, and silu=True applies silu last (ops.group_norm).

    Errors: ValueError if num_groups does not divide num_channels, for another argument out of range, or if x has
    another number of channels.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True):
        self.num_groups = integer("GroupNorm: num_groups", num_groups)
        self.num_channels = integer("GroupNorm: num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(f"GroupNorm: num_groups={num_groups} must divide num_channels={num_channels}")
        self._affine(self.num_channels, eps, affine)

    def forward(self, x: Any, shift: Any = None, *, silu: bool = False) -> Any:
        self._check(x, self.num_channels, 2)
        return ops.group_norm(x, self.weight, self.bias, shift, groups=self.num_groups, eps=self.eps, silu=silu)


class LayerNorm(_Norm):
    """(..., features), each position brought to mean 0 and variance 1 over its features, then times weight, plus bias.

    Errors: ValueError for arguments out of range, or if the last axis of x is not `features` long.
    """

    def __init__(self, features: int, eps: float = 1e-5, elementwise_affine: bool = True):
        self.features = integer("LayerNorm: features", features)
        self._affine(self.features, eps, elementwise_affine)

    def forward(self, x: Any) -> Any:
        self._check(x, self.features, 1)
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class BatchNorm2d(_Norm):
    """(N, H, W, num_features), each channel brought to mean 0 and variance 1 over the batch, then
    times weight, plus bias.

    In training it uses the statistics of the batch, towards which the buffers running_mean and running_var (the latter
    with n - 1 in its denominator) move by `momentum`. In evaluation it uses the buffers, so each sample is independent
    of the others.
    Errors: ValueError for arguments out of range, another rank or number of channels, or a batch with one value per
    channel while training;
    RuntimeError while training on one of several microbatches of a batch (microbatch.py).
    """

    needs_whole_batch = True

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True):
        self.num_features = integer("BatchNorm2d: num_features", num_features)
        self.momentum = number("BatchNorm2d: momentum", momentum, "[0, 1]")
        self._affine(self.num_features, eps, affine)
        self.running_mean = Tensor(xp.zeros(self.num_features, "float32"))
        self.running_var = Tensor(xp.ones(self.num_features, "float32"))

    def forward(self, x: Any) -> Any:
        self._check(x, self.num_features, 4)
        if not self.training:
            scale = 1 / xp.sqrt(self.running_var.data + self.eps)
            y = (x - self.running_mean.data) * scale
            return y if self.weight is None else y * self.weight + self.bias
        if x.size == self.num_features:
            raise ValueError(
                f"BatchNorm2d: the batch {x.shape} has one value per channel, so no variance: "
                "train on more, or call .eval()"
            )
        if current_microbatch() is not None:
            raise RuntimeError(
                f"BatchNorm2d: x {x.shape} is one of several microbatches of a batch, whose statistics are not those "
                "of the batch: train on the whole batch at once (microbatch=len(batch))"
            )
        self._follow(array_of(x))
        return ops.batch_norm(x, self.weight, self.bias, eps=self.eps)

    @no_grad()
    def _follow(self, x: Any) -> None:
        """Move the running statistics towards those of the batch, in place."""
        n = x.size // self.num_features
        mean = ops.mean(x, axis=(0, 1, 2))  # (N, H, W, C) -> (C,)
        var = ops.mean(ops.square(x - mean), axis=(0, 1, 2)) * (n / (n - 1))
        self.running_mean += (mean - self.running_mean.data) * self.momentum
        self.running_var += (var - self.running_var.data) * self.momentum
