"""The kernels for CuPy: the names and signatures of numpy.py. They are those of tinydiff/fast/cuda, and where one of
these declines, what numpy.py does in whole arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..fast.cuda import activation, cublas, norm
from ..fast.cuda import softmax as softmax_file
from ..fast.cuda.activation import sigmoid, silu, silu_backward
from ..fast.cuda.conv import PATCH_BYTES, col2im, im2col
from ..fast.cuda.graph import Graph
from ..fast.cuda.optim import adam_step, average_step, clip_norm, sgd_step
from ..fast.cuda.random import random_integers, random_normal, random_uniform
from . import numpy
from .numpy import index_add, sum

__all__ = [
    "Graph", "PATCH_BYTES", "adam_step", "attention_weights", "attention_weights_backward", "average_step", "clip_norm",
    "col2im", "erf", "im2col", "index_add", "matmul", "normalize", "normalize_backward", "random_integers",
    "random_normal", "random_uniform", "sgd_step", "sigmoid", "silu", "silu_backward", "softmax", "sum",
]  # fmt: skip

# index_add is CuPy's add.at, which adds by atomics: where an index occurs several times, the order of its additions,
# and so the last digits of the sum, may differ from run to run.


def _or_whole_arrays(fast: Callable[..., Any]) -> Callable[..., Any]:
    plain = getattr(numpy, fast.__name__)

    @functools.wraps(fast)
    def either(*arguments: Any, **named: Any) -> Any:
        found = fast(*arguments, **named)
        return plain(*arguments, **named) if found is NotImplemented else found

    return either


erf = _or_whole_arrays(activation.erf)
matmul = _or_whole_arrays(cublas.matmul)
normalize = _or_whole_arrays(norm.normalize)
normalize_backward = _or_whole_arrays(norm.normalize_backward)
softmax = _or_whole_arrays(softmax_file.softmax)
attention_weights = _or_whole_arrays(softmax_file.attention_weights)
attention_weights_backward = _or_whole_arrays(softmax_file.attention_weights_backward)
