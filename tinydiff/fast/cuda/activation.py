"""The functions between the layers (activation.cuh), which CuPy makes kernels of.

Such a kernel takes any order in memory, broadcasts, and has complex numbers too.
"""

from __future__ import annotations

from typing import Any

import cupy
from cupyx.scipy import special

from ...backend import Array
from .launch import elementwise

_SIGMOID, _SILU, _SILU_BACKWARD = (elementwise("activation.cuh", f) for f in ("sigmoid", "silu", "silu_backward"))


def _floating(x: Any) -> Array:
    x = cupy.asarray(x)
    return x if x.dtype.kind in "fc" else x.astype("float64")


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x)"""
    return _SIGMOID(_floating(x))


def silu(x: Array) -> Array:
    """x sigmoid(x)"""
    return _SILU(_floating(x))


def silu_backward(g: Array, x: Array) -> Array:
    """g s (1 + x (1 - s))"""
    return _SILU_BACKWARD(g, x)


def erf(x: Array) -> Array:
    """2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x, by CuPy's own kernel. CUDA has it for real x alone."""
    x = _floating(x)
    return NotImplemented if x.dtype.kind == "c" else special.erf(x)
