"""A small call of every op, to show its rule on. A test asserts that none is missing.

The values are distinct and between 1/2 and 2, so that logarithms and roots exist, and no two are equal for max.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np

from ..backend import to_device
from ..engine import Tensor
from ..operators import OPS
from ..ops.conv import Geometry
from ..rng import Rng

GEOMETRY = Geometry((3, 3), (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)  # out: (2, 2)
ROWS, PICKED = np.array([2, 0, 2]), np.array([[1], [0]])
AFFINE = ((2, 3), (3,), (3,))

# Tuples are the shapes of inputs that need a gradient; anything else is the input itself.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "attention": (((1, 2, 2), (1, 3, 2), (1, 3, 2)), {}),
    "astype": (((2, 3),), {"dtype": "float64"}),
    "avg_pool2d": (((1, 2, 2, 1),), {"kernel": 2}),
    "batch_norm": (AFFINE, {}),
    "binary_cross_entropy_with_logits": (((2, 3), np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])), {}),
    "broadcast_to": (((3,),), {"shape": (2, 3)}),
    "clip": (((2, 3),), {"low": 0.8, "high": 1.5}),
    "concatenate": (([(2, 1), (2, 2)],), {"axis": 1}),
    "concatenate_p": (((2, 1), (2, 2)), {"axis": 1}),
    "conv1d": (((1, 4, 2), (2, 2, 3), (3,)), {}),
    "conv2d": (((1, 3, 3, 2), (2, 2, 2, 3), (3,)), {}),
    "conv2d_input_grad": (((1, 2, 2, 3), (2, 2, 2, 3), (2,)), {"geometry": GEOMETRY}),
    "conv2d_p": (((1, 3, 3, 2), (2, 2, 2, 3), (3,)), {"geometry": GEOMETRY}),
    "conv2d_weight_grad": (((1, 3, 3, 2), (1, 2, 2, 3)), {"geometry": GEOMETRY}),
    "conv_transpose2d": (((1, 2, 2, 3), (2, 2, 2, 3), (2,)), {}),
    "cross_entropy": (((2, 3), np.array([2, 0])), {}),
    "cumsum": (((2, 3),), {"axis": 1}),
    "dropout": (((2, 3),), {"p": 0.5, "rng": Rng(0)}),
    "einsum": (("ij,jk->ik", (2, 3), (3, 2)), {}),
    "einsum_p": (((2, 3), (3, 2)), {"subscripts": "ij,jk->ik"}),
    "embedding": ((ROWS, (3, 2)), {}),
    "expand_dims": (((2, 3),), {"axis": 0}),
    "getitem": (((3, 2),), {"index": ROWS}),
    "group_norm": (((2, 2, 4), (4,), (4,)), {"groups": 2}),
    "index_add": (((3, 2), (3, 2)), {"index": ROWS}),
    "layer_norm": (AFFINE, {}),
    "linear": (((2, 3), (3, 2), (2,)), {}),
    "log_softmax": (((2, 3),), {"axis": -1}),
    "logsumexp": (((2, 3),), {"axis": 1}),
    "matmul": (((2, 3), (3, 2)), {}),
    "max": (((2, 3),), {"axis": 1}),
    "max_pool2d": (((1, 2, 2, 1),), {"kernel": 2}),
    "mean": (((2, 3),), {"axis": 1}),
    "min": (((2, 3),), {"axis": 1}),
    "mse_loss": (((2, 3), (2, 3)), {}),
    "normalize": (AFFINE, {"axes": (1,), "eps": 1e-5}),
    "pad": (((2, 3),), {"pad_width": ((1, 0), (0, 1))}),
    "prod": (((2, 3),), {"axis": 1}),
    "reshape": (((2, 3),), {"shape": (3, 2)}),
    "roll": (((2, 3),), {"shift": 1, "axis": 1}),
    "scaled_dot_product_attention": (((2, 2), (3, 2), (3, 2), (2, 3)), {"scale": 0.5}),
    "scatter_add": (((3, 2),), {"index": ROWS, "shape": (3, 2)}),
    "shift_normalize_silu": (((2, 3), (2, 3), (3,), (3,)), {"groups": 1, "eps": 1e-5, "silu": True}),
    "softmax": (((2, 3),), {"axis": -1}),
    "split": (((4, 2), 2), {}),
    "squeeze": (((2, 1, 3),), {}),
    "stack": (([(2, 3), (2, 3)],), {}),
    "sum": (((2, 3),), {"axis": 1}),
    "swapaxes": (((2, 3),), {"axis1": 0, "axis2": 1}),
    "take": (((3, 2), ROWS), {"axis": 0}),
    "take_along_axis": (((2, 3), PICKED), {"axis": 1}),
    "tile": (((2, 3),), {"reps": 2}),
    "transpose": (((2, 3, 4),), {"axes": (1, 2, 0)}),
    "upsample_nearest2d": (((1, 2, 2, 1),), {"scale": 2}),
    "var": (((2, 3),), {"axis": 1}),
    "where": ((np.array([[True, False, True]]), (2, 3), (3,)), {}),
    **dict.fromkeys(("add", "subtract", "multiply", "divide", "power", "maximum", "minimum"), (((2, 3), (3,)), {})),
    **dict.fromkeys(("tril", "triu"), (((3, 3),), {})),
    **dict.fromkeys(
        "abs copy cos erf exact_gelu exp expm1 flip gelu log log1p negative "
        "relu sigmoid sign silu sin softplus sqrt square tanh".split(),
        (((2, 3),), {}),
    ),
}


def example(name: str, dtype: str = "float32") -> tuple[Tensor, dict[str, Any]]:
    """The result of the op's small call, with its graph, and the inputs by the names of the op's own parameters."""
    if name not in CALLS:
        raise ValueError(f"the op {name!r} has no example: give it one in CALLS, tinydiff/study/examples.py")
    given, params = CALLS[name]
    places = iter(inspect.signature(OPS[name]).parameters.values())
    draw, place = np.random.default_rng(0), next(places)
    made: dict[str, Any] = {}

    def made_of(value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [made_of(v, f"x{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            numbers = draw.permutation(np.linspace(0.5, 2, math.prod(value)))
            value = Tensor(to_device(numbers.reshape(value).astype(dtype)), True)
        elif isinstance(value, np.ndarray):
            value = to_device(value.astype(dtype) if value.dtype.kind == "f" else value)
        else:
            return value
        made[name] = value
        return value

    inputs = []
    for value in given:
        several = place.kind is place.VAR_POSITIONAL
        inputs.append(made_of(value, f"x{len(made)}" if several else place.name))
        place = place if several else next(places, place)
    device = {k: to_device(v) if isinstance(v, np.ndarray) else v for k, v in params.items()}
    result = OPS[name](*inputs, **device)
    return result[0] if isinstance(result, list) else result, made
