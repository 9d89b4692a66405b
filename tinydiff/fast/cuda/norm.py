"""Normalisation and its adjoint (norm.cu): how x is spread over threads, and the launches.

One launch each way, two where the samples are few and long. One more adds up the adjoints of a weight and bias that the
samples share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy

from ...backend import Array
from .. import grouped_norm
from .launch import Source, widest_run

LINE = 128  # contiguous bytes that a block reads, at least
BUSY = 1024  # blocks that are enough to fill a device
PART = 2**14  # elements that are enough for a block of their own
SIZES = (32, 64, 128, 256, 512, 1024)  # of a block, in threads

_NORM = Source("norm.cu", TYPE=("float", "double"), LANES=(1, 2, 4), THREADS=SIZES, INDEX_BITS=(32, 64))
_SUM_ROWS = Source("sum_rows.cu", TYPE=("float", "double"), THREADS=SIZES[-1:], INDEX_BITS=(32, 64))


@dataclass(frozen=True)
class Plan:
    """How an array is spread over threads."""

    lanes: int  # channels in a run
    group_runs: int  # runs in a group
    runs: int  # in a block: a multiple of that
    all_runs: int  # in all channels
    block: int  # threads
    chunks: int  # blocks side by side that cover all channels
    part: int  # positions in a block
    parts: int

    def numbers(self, length: int) -> tuple[int, ...]:
        """The last arguments of each kernel in norm.cu."""
        return length, self.part, self.all_runs, self.runs, self.group_runs


def plan_for(x: Array, *of_channels: Array | None) -> Plan | None:
    """The plan; None for arrays that these kernels do not take: empty or complex ones, or a group of more runs than a
    block can have threads. That is more than 4,096 channels in float32 (1,024 if their number is odd), and 2,048 in
    float64."""
    if x.size == 0 or x.dtype.char not in "fd":
        return None
    samples, length, groups, d = x.shape
    lanes = widest_run(d, x, *of_channels)
    together = max(1, min(groups, LINE // (d * x.itemsize)))
    group_runs, all_runs = d // lanes, groups * d // lanes
    runs = group_runs * together
    if runs > SIZES[-1]:
        return None
    block = next(n for n in SIZES if n >= runs and (n >= 512 or 4 * n >= runs * length))
    chunks = -(-groups // together)
    parts = max(1, min(length * runs * lanes // PART, BUSY // (samples * chunks)))
    part = -(-length // parts)
    return Plan(lanes, group_runs, runs, all_runs, block, chunks, part, -(-length // part))


def normalize(
    x: Array, shift: Array | None, weight: Array | None, bias: Array | None, eps: float, silu: bool
) -> tuple[Array, Array, Array]:
    """y = u, or silu(u), with u = (x + shift - mean) rstd weight + bias; also the mean of x + shift and
    rstd = 1 / sqrt(var + eps), (A, 1, G). x (A, L, G, D) has its statistics over axes 1 and 3; shift (A, G D) or None;
    weight and bias both (G D,), both (A, G D), or both None."""
    x, shift, weight, bias = (_contiguous(a) for a in (x, shift, weight, bias))
    plan = plan_for(x, shift, weight, bias)
    if plan is None:
        return NotImplemented
    samples, length, groups, _ = x.shape
    y = cupy.empty_like(x)
    mean, rstd = (cupy.empty((samples, 1, groups), x.dtype) for _ in range(2))
    grid, numbers = (samples, plan.chunks, plan.parts), plan.numbers(length)
    parts = None
    if plan.parts > 1:
        parts = cupy.empty((samples, plan.parts, groups, 3), x.dtype)
        _NORM["moments"](grid, plan.block, x, shift, parts, *numbers, lanes=plan.lanes)
    of_samples = weight is not None and weight.ndim == 2
    arguments = x, shift, parts, weight, bias, int(of_samples), eps, int(silu), y, mean, rstd, *numbers
    _NORM["normalize"](grid, plan.block, *arguments, lanes=plan.lanes)
    return y, mean, rstd


def normalize_vjp(
    g: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    shift: Array | None,
    weight: Array | None,
    bias: Array | None,
    silu: bool,
) -> tuple[Array, Array | None, Array | None, Array | None]:
    """The adjoints of x, shift, weight and bias (None for an input that is None) from that of y: see norm.cu."""
    g, x, mean, rstd, shift, weight, bias = (_contiguous(a) for a in (g, x, mean, rstd, shift, weight, bias))
    plan = plan_for(x, g, shift, weight, bias)
    if plan is None:
        return NotImplemented
    samples, length, groups, d = x.shape
    of_samples = weight is not None and weight.ndim == 2
    shared = weight is not None and not of_samples
    blocks = min(samples, BUSY) if shared else samples
    x_adjoint = cupy.empty_like(x)
    shift_adjoint = None if shift is None else cupy.empty_like(shift)
    affine_adjoints = None if weight is None else cupy.empty((2, blocks, groups * d), x.dtype)  # of weight, of bias
    inputs = g, x, mean, rstd, shift, weight, bias, int(of_samples), int(silu)
    numbers, parts = plan.numbers(length), None
    if plan.parts > 1:
        parts = cupy.empty((samples, plan.parts, plan.all_runs, 3, plan.lanes), x.dtype)
        grid = samples, plan.chunks, plan.parts
        _NORM["sums"](grid, plan.block, *inputs, parts, *numbers, lanes=plan.lanes)
    outputs = x_adjoint, shift_adjoint, affine_adjoints, samples
    grid = blocks, plan.chunks, plan.parts
    _NORM["normalize_backward"](grid, plan.block, *inputs, parts, *outputs, *numbers, lanes=plan.lanes)
    if affine_adjoints is None:
        return x_adjoint, shift_adjoint, None, None
    if shared:
        affine_adjoints = _sum_rows(affine_adjoints)
    return x_adjoint, shift_adjoint, affine_adjoints[0], affine_adjoints[1]


def _contiguous(a: Any) -> Any:
    return None if a is None else cupy.ascontiguousarray(a)


def _sum_rows(a: Array) -> Array:
    """(n, L, C) -> (n, C)"""
    n, length, columns = a.shape
    if length == 1:
        return a[:, 0]
    sums = cupy.empty((n, columns), a.dtype)
    _SUM_ROWS["sum_rows"]((-(-columns // 32), n), SIZES[-1], a, sums, length, columns)
    return sums


grouped_norm.register("cupy", normalize, normalize_vjp)
