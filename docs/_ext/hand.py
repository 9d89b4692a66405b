"""For each op a call with numbers that a pencil can follow. What is not an array of floats is not differentiated."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from claims import Case

from tinydiff.ops.conv import Geometry
from tinydiff.rng import Rng

Call = tuple[tuple[Any, ...], dict[str, Any]]


def A(*rows: Any) -> Any:  # noqa: N802
    """An array of floats."""
    return np.array(rows if len(rows) > 1 or isinstance(rows[0], (list, tuple)) else rows, float)


def image(rows: list[list[float]]) -> Any:
    """One image with one channel."""
    return np.array(rows, float)[None, :, :, None]


def kernel(rows: list[list[float]]) -> Any:
    """One input channel, one output channel."""
    return np.array(rows, float)[:, :, None, None]


X = A(1, 2, 4)
ROWS = A([1, 2, 4], [3, 0, 5])
TABLE = A([1, 2], [3, 4], [5, 6])
PICK = np.array([2, 0, 2])
NINE = image([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
FOUR = image([[1, 2], [3, 4]])
SMALL = image([[1, 0], [2, 1]])
KERNEL = kernel([[1, 2], [0, -1]])
GEOMETRY = Geometry((3, 3), (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)

HAND: dict[str, Call] = {
    **dict.fromkeys(("add", "subtract", "multiply", "divide"), ((X, A(2, 4, 8)), {})),
    **dict.fromkeys(("maximum", "minimum"), ((X, A(2, 1, 8)), {})),
    **dict.fromkeys(("negative", "square", "copy", "abs", "sign"), ((A(-1, 2, -3),), {})),
    **dict.fromkeys(("exp", "expm1", "sin", "cos", "tanh", "sigmoid", "silu", "erf", "exact_gelu", "gelu", "softplus"),
                    ((A(-1, 0, 2),), {})),
    **dict.fromkeys(("sum", "mean", "max", "min"), ((ROWS,), {"axis": 1})),
    **dict.fromkeys(("tril", "triu"), ((A([1, 2, 3], [4, 5, 6], [7, 8, 9]),), {})),
    **dict.fromkeys(("max_pool2d", "avg_pool2d"), ((image([[1, 2, 5, 3], [4, 0, 6, 7]]),), {"kernel": 2})),
    "power": ((A(1, 2, 3), A(2, 3, 2)), {}),
    "relu": ((A(-1, 2, 3),), {}),
    "log": ((X,), {}),
    "log1p": ((A(0, 1, 3),), {}),
    "sqrt": ((A(1, 4, 9),), {}),
    "clip": ((A(-1, 2, 5),), {"low": 0.0, "high": 3.0}),
    "where": ((np.array([True, False, True]), X, A(10, 20, 30)), {}),
    "astype": ((X,), {"dtype": "float64"}),
    "reshape": ((A([1, 2, 3], [4, 5, 6]),), {"shape": (3, 2)}),
    "transpose": ((A([1, 2, 3], [4, 5, 6]),), {}),
    "swapaxes": ((A([1, 2, 3], [4, 5, 6]),), {"axis1": 0, "axis2": 1}),
    "expand_dims": ((X,), {"axis": 0}),
    "squeeze": ((A([1], [2], [4]),), {}),
    "broadcast_to": ((X,), {"shape": (2, 3)}),
    "concatenate": (([A(1, 2), A(3, 4, 5)],), {}),
    "concatenate_p": ((A(1, 2), A(3, 4, 5)), {}),
    "stack": (([A(1, 2), A(3, 4)],), {}),
    "split": ((A(1, 2, 3, 4), 2), {}),
    "pad": ((A([1, 2], [3, 4]),), {"pad_width": ((1, 0), (0, 1))}),
    "flip": ((X,), {}),
    "roll": ((X,), {"shift": 1}),
    "tile": ((A(1, 2),), {"reps": 2}),
    "matmul": ((A([1, 2], [3, 4]), A([5, 6], [7, 8])), {}),
    "linear": ((A([1, 2], [3, 4]), A([5, 6], [7, 8]), A(1, -1)), {}),
    "einsum": (("ij,jk->ik", A([1, 2], [3, 4]), A([5, 6], [7, 8])), {}),
    "einsum_p": ((A([1, 2], [3, 4]), A([5, 6], [7, 8])), {"subscripts": "ij,jk->ik"}),
    "var": ((ROWS,), {"axis": 1}),
    "prod": ((A([1, 2, 4], [3, 2, 5]),), {"axis": 1}),
    "cumsum": ((X,), {}),
    "logsumexp": ((A(0, math.log(2), math.log(5)),), {}),
    "softmax": ((A(0, math.log(2), math.log(5)),), {}),
    "log_softmax": ((A(0, math.log(2), math.log(5)),), {}),
    "attention": ((A([[1, 0], [0, 1]]), A([[1, 0], [0, 2]]), A([[1, 2], [3, 5]])), {}),
    "scaled_dot_product_attention": (
        (A([1, 0], [0, 1]), A([1, 0], [0, 2]), A([1, 2], [3, 5]), None), {"scale": 1.0}),
    "conv2d": ((NINE, KERNEL, A(10)), {}),
    "conv2d_p": ((NINE, KERNEL, A(10)), {"geometry": GEOMETRY}),
    "conv2d_input_grad": ((FOUR, KERNEL, None), {"geometry": GEOMETRY}),
    "conv2d_weight_grad": ((NINE, SMALL), {"geometry": GEOMETRY}),
    "conv_transpose2d": ((FOUR, KERNEL), {"stride": 2}),
    "conv1d": ((A(1, 2, 4, 8).reshape(1, 4, 1), A(1, -1).reshape(2, 1, 1)), {}),
    "getitem": ((TABLE,), {"index": PICK}),
    "scatter_add": ((TABLE,), {"index": PICK, "shape": (3, 2)}),
    "index_add": ((A([0, 0], [10, 10], [20, 20]), TABLE), {"index": PICK}),
    "take": ((TABLE, PICK), {"axis": 0}),
    "take_along_axis": ((A([1, 2, 3], [4, 5, 6]), np.array([[1], [0]])), {"axis": 1}),
    "embedding": ((PICK, TABLE), {}),
    "normalize": ((A([1, 2, 6]), A(1, 2, 1), A(0, 0, 1)), {"axes": (1,), "eps": 0.0}),
    "shift_normalize_silu": ((A([0, 2, 4]), A([1, 0, 2]), A(1, 2, 1), A(0, 0, 1)),
                             {"groups": 1, "eps": 0.0, "silu": True}),
    "group_norm": (
        (A([[1, 2, 6, 0, 3, 9]]), A(1, 1, 1, 1, 2, 1), A(0, 0, 0, 0, 0, 1)), {"groups": 2, "eps": 0.0}),
    "layer_norm": ((A([1, 2, 6]), A(1, 2, 1), A(0, 0, 1)), {"eps": 0.0}),
    "batch_norm": ((A([1, 5], [2, 5.5], [6, 9]), A(1, 2), A(0, 1)), {"eps": 0.0}),
    "upsample_nearest2d": ((FOUR,), {"scale": 2}),
    "mse_loss": ((X, A(0, 2, 1)), {}),
    "cross_entropy": ((A([0, math.log(2), math.log(5)]), np.array([1])), {}),
    "binary_cross_entropy_with_logits": ((A(0, 2, -1), np.array([1, 1, 0])), {}),
    "dropout": ((A(1, 2, 4, 8),), {"p": 0.5, "rng": Rng(3)}),
}  # fmt: skip

# Kinks and ties: (the call, at one of them).
KINKS: dict[str, Call] = {
    "abs": ((A(0),), {}),
    "sign": ((A(0),), {}),
    "relu": ((A(0),), {}),
    "sqrt": ((A(0),), {}),
    "clip": ((A(3),), {"low": 0.0, "high": 3.0}),
    "maximum": ((A(2), A(2)), {}),
    "minimum": ((A(2), A(2)), {}),
    "max": ((A(2, 2, 1),), {}),
    "min": ((A(2, 2, 5),), {}),
    "max_pool2d": ((image([[2, 2], [1, 1]]),), {"kernel": 2}),
    "power": ((A(0), 0.5), {}),
}

# z̄ where 1, 10, 100, ... would hide what is to be seen.
ADJOINTS = {"softmax": A(1, 0, 0), "log_softmax": A(1, 0, 0), "normalize": A([1, 0, 0]), "layer_norm": A([1, 0, 0])}


def hand_case(name: str) -> Case:
    given, params = HAND[name]
    if name == "dropout":
        params = {**params, "rng": Rng(3)}
    return Case(name, given, params)


def hand_adjoint(name: str, shape: tuple[int, ...]) -> Any:
    """Powers of ten, so that a sum shows its parts; 1, 2, 3, ... where there are too many."""
    if name in ADJOINTS:
        return ADJOINTS[name]
    n = math.prod(shape)
    return (10.0 ** np.arange(n) if n <= 4 else np.arange(1.0, n + 1)).reshape(shape)
