"""The activation functions (activation.cuh), of which CuPy makes kernels.

Such a kernel takes any order in memory, broadcasts, and takes complex numbers too.
"""

from __future__ import annotations

from typing import Any

from cupyx.scipy import special

from ...backend import Array
from ...ops.activation import erf, sigmoid, silu
from ..taken import is_real
from .launch import elementwise

_SIGMOID, _SILU, _SILU_BACKWARD = (elementwise("activation.cuh", f) for f in ("sigmoid", "silu", "silu_backward"))


@sigmoid.fast("cupy")
def sigmoid_cupy(x: Array) -> Any:
    return _SIGMOID(x) if is_real(x) else NotImplemented


@silu.fast("cupy")
def silu_cupy(x: Array) -> Any:
    return _SILU(x) if is_real(x) else NotImplemented


@silu.fast_vjp("cupy")
def silu_vjp_cupy(g: Array, _z: Any, x: Array, *, residuals: Any) -> Any:
    return _SILU_BACKWARD(g, x)


@erf.fast("cupy")
def erf_cupy(x: Array) -> Any:
    """By CuPy's own kernel."""
    return special.erf(x) if is_real(x) else NotImplemented
