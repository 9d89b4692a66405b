"""Convolutions with their weights, channels last; see ops/conv.py for what they compute.

Weights are (kernel..., in / groups, out), and for the transposed convolution (kernel..., out / groups, in): the
weight of the convolution whose transpose it is. The bound of their initialisation is PyTorch's, 1 / sqrt(fan_in). For
the transposed convolution PyTorch takes out / groups times the kernel as the fan-in, although an output is a sum over
in / groups channels.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from ..arguments import integer
from ..ops.conv import Pair, _pair
from ..rng import Rng, as_rng
from .layers import fan_in_uniform
from .module import Layer, Parameter, same_dtype


class _Conv(Layer):
    """The base of the three layers: their arguments, and the parameters made from them.

    kernel_size, stride, padding, dilation: an int, or one per axis; padding may be "same", or "valid" for none.
    Errors: ValueError for arguments out of range, or groups that do not divide the channels; when called, for shapes
    that do not fit.
    """

    axes = 2  # of the kernel
    transposed = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rng: Rng | int | None = None,
    ):
        name = type(self).__name__
        self.in_channels = integer(f"{name}: in_channels", in_channels)
        self.out_channels = integer(f"{name}: out_channels", out_channels)
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        by_name = isinstance(padding, str) and padding in ("same", "valid") and not self.transposed
        self.padding: Pair | str = padding if by_name else self._sizes("padding", padding, 0)
        self.groups = groups = integer(f"{name}: groups", groups)
        if self.in_channels % groups or self.out_channels % groups:
            raise ValueError(
                f"{name}: groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}"
            )
        rng = as_rng(rng)
        kernel = (self.kernel_size,) * self.axes if isinstance(self.kernel_size, int) else self.kernel_size
        rows, columns = self.in_channels, self.out_channels
        if self.transposed:
            rows, columns = columns, rows
        fan_in = math.prod(kernel) * rows // groups
        self.weight = Parameter(fan_in_uniform((*kernel, rows // groups, columns), fan_in, rng))
        self.bias = Parameter(fan_in_uniform((self.out_channels,), fan_in, rng)) if bias else None

    def _sizes(self, name: str, value: Any, least: int) -> Pair:
        """An int for all axes as an int, or one for each as a pair. Errors: ValueError for anything else."""
        what = type(self).__name__
        if self.axes == 1:
            single = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
            return integer(f"{what}: {name}", single, least)
        pair = _pair(value, what, name, least)
        return pair if isinstance(value, (tuple, list)) else pair[0]

    def _apply(self, op: Any, x: Any, **options: Any) -> Any:
        same_dtype(self, x, self.weight)
        return op(
            x, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, **options,
        )  # fmt: skip


class Conv2d(_Conv):
    """Convolution of images: (N, H, W, in_channels) -> (N, OH, OW, out_channels), ops.conv2d.

    Parameters: weight (kh, kw, in / groups, out), bias (out,), U(-b, b) with b = 1 / sqrt(kh kw in / groups).
    kernel_size, stride, padding, dilation: an int or (vertical, horizontal); padding may be "same", or "valid" for 0.
    Errors: ValueError for arguments out of range, or groups that do not divide the channels; when called, for shapes
    that do not fit.
    """

    def forward(self, x: Any) -> Any:
        return self._apply(ops.conv2d, x)


class Conv1d(_Conv):
    """Convolution of sequences: (N, L, in_channels) -> (N, OL, out_channels), ops.conv1d.

    Parameters: weight (k, in / groups, out), bias (out,), U(-b, b) with b = 1 / sqrt(k in / groups). Errors: as Conv2d.
    """

    axes = 1

    def forward(self, x: Any) -> Any:
        return self._apply(ops.conv1d, x)


class ConvTranspose2d(_Conv):
    """Transposed convolution of images: (N, H, W, in_channels) -> (N, OH, OW, out_channels), ops.conv_transpose2d.

    OH = (H - 1) stride - 2 padding + dilation (kh - 1) + 1 + output_padding. Parameters: weight (kh, kw, out / groups,
    in), bias (out,), U(-b, b) with b = 1 / sqrt(kh kw out / groups). Errors: as Conv2d; ValueError for a padding that
    is no number, or an output_padding that is smaller than neither stride nor dilation.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        output_padding: Pair = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Pair = 1,
        *,
        rng: Rng | int | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, rng=rng)
        self.output_padding = self._sizes("output_padding", output_padding, 0)
        sizes = (self.output_padding, self.stride, self.dilation)
        if any(extra >= max(s, d) for extra, s, d in zip(*(_pair(size, "", "", 0) for size in sizes))):
            raise ValueError(
                f"ConvTranspose2d: output_padding={output_padding} must be smaller than stride={stride} "
                f"or dilation={dilation}"
            )

    def forward(self, x: Any) -> Any:
        return self._apply(ops.conv_transpose2d, x, output_padding=self.output_padding)
