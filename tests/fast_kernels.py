"""The fast functions of the backend in use by one name each, for the tests that call them directly."""

from __future__ import annotations

import importlib
from typing import Any

from tinydiff import backend, fast, ops, optim

# name: (where it is for NumPy, and for CuPy), below tinydiff.fast
FUNCTIONS = {
    "im2col": ("cpu.conv:im2col", "cuda.conv:im2col"),
    "col2im": ("cpu.conv:col2im", "cuda.conv:col2im"),
    "normalize": ("cpu.norm:blocked_norm", "cuda.norm:normalize"),
    "normalize_vjp": ("cpu.norm:blocked_norm_vjp", "cuda.norm:normalize_vjp"),
    "attention_weights": ("cpu.attention:attention_weights", "cuda.softmax:attention_weights"),
    "attention_weights_vjp": ("cpu.attention:attention_weights_vjp", "cuda.softmax:attention_weights_vjp"),
}


def silu_vjp(g: Any, x: Any) -> Any:
    return ops.silu.fast_rules[backend.active().fast](g, None, x, residuals=())


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """Into an array that is there, the backend's own product; else the op."""
    if out is None:
        return ops.matmul(a, b)
    product = fast.cuda.cublas.matmul if backend.active().fast == "cupy" else backend.xp.matmul
    return product(a, b, out=out)


OTHERS = {
    "sigmoid": ops.sigmoid,
    "silu": ops.silu,
    "erf": ops.erf,
    "softmax": lambda x, axis: ops.softmax(x, axis=axis),
    "sgd_step": optim.sgd_step,
    "adam_step": optim.adam_step,
    "average_step": optim.average_step,
    "clip_norm": optim.clip_norm,
}


def __getattr__(name: str) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if name not in FUNCTIONS:
        raise AttributeError(name)
    place = FUNCTIONS[name][backend.active().fast == "cupy"]
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(f"tinydiff.fast.{module}"), function)
