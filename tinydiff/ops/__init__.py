"""Every op: a formula, its derivation, its forward and its rule, side by side.

`elementwise` is the place to start. All of them are functions of arrays or Tensors (positional) and
of options (by keyword).
"""
# ruff: noqa: I001  the names in few lines

from .activation import erf, gelu, relu, sigmoid, silu, softplus
from .attention import attention
from .conv import conv1d, conv2d, conv_transpose2d
from .elementwise import (
    abs, add, astype, clip, copy, cos, divide, exp, expm1, log, log1p, maximum, minimum, multiply, negative, power,
    sign, sin, sqrt, square, subtract, tanh, where,
)  # fmt: skip
from .index import embedding, getitem, index_add, scatter_add, take, take_along_axis
from .linalg import einsum, linear, matmul
from .loss import binary_cross_entropy_with_logits, cross_entropy, dropout, mse_loss
from .norm import batch_norm, group_norm, layer_norm
from .pool import avg_pool2d, max_pool2d, upsample_nearest2d
from .reduce import cumsum, logsumexp, max, mean, min, prod, sum, var
from .shape import (
    broadcast_to, concatenate, expand_dims, flip, pad, reshape, roll, split, squeeze, stack, swapaxes, tile, transpose,
    tril, triu,
)  # fmt: skip
from .softmax import log_softmax, softmax

__all__ = [
    "abs", "add", "astype", "attention", "avg_pool2d", "batch_norm", "binary_cross_entropy_with_logits",
    "broadcast_to", "clip", "concatenate", "conv1d", "conv2d", "conv_transpose2d", "copy", "cos", "cross_entropy",
    "cumsum", "divide", "dropout", "einsum", "embedding", "erf", "exp", "expand_dims", "expm1", "flip", "gelu",
    "getitem", "group_norm", "index_add", "layer_norm", "linear", "log", "log1p", "log_softmax", "logsumexp", "matmul",
    "max", "max_pool2d", "maximum", "mean", "min", "minimum", "mse_loss", "multiply", "negative", "pad", "power",
    "prod", "relu", "reshape", "roll", "scatter_add", "sigmoid", "sign", "silu", "sin", "softmax", "softplus", "split",
    "sqrt", "square", "squeeze", "stack", "subtract", "sum", "swapaxes", "take", "take_along_axis", "tanh", "tile",
    "transpose", "tril", "triu", "upsample_nearest2d", "var", "where",
]  # fmt: skip
