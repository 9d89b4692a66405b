"""Example calls of every op, for the tests that loop over the registry (test_rules.py).

A call is `E(op, *inputs, **params)`. Inputs that are float64 arrays are differentiated; integers, bools, None
and Python numbers are not. Values keep away from kinks, and from the edges of domains, except where a rule
has to be right there too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tinydiff import Rng, backend
from tinydiff.operators import OPS
from tinydiff.ops.conv import Geometry

draw = np.random.default_rng(2021)


class Example(NamedTuple):
    op: str
    inputs: tuple[Any, ...]
    params: dict[str, Any]

    @property
    def places(self) -> list[int]:
        """Which inputs are differentiated."""
        return [i for i, x in enumerate(self.inputs) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]

    def call(self, *inputs: Any, op: Any = None) -> Any:
        """The op on Tensors, or on arrays of the backend in use."""
        return apply(self.op, op or OPS[self.op], inputs, on_device(self.params))

    def on_device(self, dtype: str = "float64") -> list[Any]:
        """The inputs as arrays of the backend in use."""
        return [
            backend.to_device(x.astype(dtype) if x.dtype.kind == "f" else x) if isinstance(x, np.ndarray) else x
            for x in self.inputs
        ]


def apply(name: str, op: Any, inputs: Any, params: dict[str, Any]) -> Any:
    """A few ops take their arrays in a list, or something else first."""
    if name in ("concatenate", "stack"):
        return op(list(inputs), **params)
    if name == "einsum":
        return op(params["subscripts"], *inputs)
    if name == "dropout":
        return op(*inputs, **{**params, "rng": Rng(params["rng"])})
    return op(*inputs, **params)


def on_device(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return backend.to_device(value)
    if isinstance(value, dict):
        return {key: on_device(v) for key, v in value.items()}
    return type(value)(map(on_device, value)) if type(value) in (tuple, list) else value


EXAMPLES: list[Example] = []


def E(op: str, *inputs: Any, **params: Any) -> None:  # noqa: N802
    EXAMPLES.append(Example(op, tuple(np.asarray(x) if isinstance(x, np.generic) else x for x in inputs), params))


def N(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return np.asarray(draw.normal(size=shape))


def P(*shape: int) -> np.ndarray:
    """Positive, between 1/2 and 2."""
    return np.asarray(draw.uniform(0.5, 2, size=shape))


def S(*shape: int) -> np.ndarray:
    """Of either sign, between 1/4 and 2 in size."""
    return np.asarray(draw.uniform(0.25, 2, size=shape) * draw.choice([-1, 1], size=shape))


def D(*shapes: tuple[int, ...]) -> Any:
    """Arrays whose elements all differ, by 0.1 or more."""
    sizes = [int(np.prod(s)) for s in shapes]
    values = (draw.permutation(sum(sizes)) - sum(sizes) / 2 + 0.3) * 0.1
    parts = np.split(values, np.cumsum(sizes)[:-1])
    arrays = [p.reshape(s) for p, s in zip(parts, shapes)]
    return arrays if len(arrays) > 1 else arrays[0]


def I(n: int, *shape: int) -> np.ndarray:  # noqa: E743, E741
    """Integers below n."""
    return np.asarray(draw.integers(n, size=shape))


SHAPES = [(2, 3), (), (1,), (0, 3)]
PAIRS = [
    ((2, 3), (2, 3)),
    ((2, 3), (3,)),
    ((2, 1), (1, 3)),
    ((), (2, 3)),
    ((2, 3), ()),
    ((0, 3), (1, 3)),
    ((1,), (1, 1)),
    ((2, 1, 3), (4, 1)),
]

# ---------------------------------------------------------------- elementwise

for shape in SHAPES:
    for op in "negative exp expm1 sin cos tanh erf sigmoid silu exact_gelu gelu softplus square copy".split():
        E(op, N(*shape))
    for op in ("log", "log1p", "sqrt"):
        E(op, P(*shape))
    for op in ("abs", "sign", "relu"):
        E(op, S(*shape))
    E("gelu", N(*shape), approximate="tanh")
    E("clip", S(*shape) * 2, low=-1.5, high=3.0)
LINE = np.arange(-24, 24) * 0.1 + 0.05  # a threshold that is off shows here
for op in "abs cos erf exact_gelu exp expm1 gelu relu sigmoid sign silu sin softplus square tanh".split():
    E(op, LINE * 2 if op == "erf" else LINE)
for op in ("log", "log1p", "sqrt"):
    E(op, LINE[LINE > 0])
E("clip", LINE, low=-1, high=0.5)
E("maximum", LINE, LINE[::-1] * 0.5)
E("minimum", LINE, LINE[::-1] * 0.5)
for a, b in PAIRS:
    for op in ("add", "subtract", "multiply"):
        E(op, N(*a), N(*b))
    E("divide", N(*a), S(*b))
    E("power", P(*a), N(*b))
    for op in ("maximum", "minimum"):
        E(op, *D(a, b))
    E("where", I(2, *a) == 0, N(*a), N(*b))
for op in ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum"):
    E(op, P(2, 3), 1.3)
    E(op, 1.3, P(2, 3))
    E(op, P(2), 2)
E("erf", np.array([-7.0, -4.5, -3.9, -0.47, -0.46, -1e-3, 0.0, 0.46, 0.47, 2.0, 4.1, 30.0]))
E("log1p", np.array([-0.75, 1e-9, 0.0]))
E("expm1", np.array([1e-9, 0.0, -3.0]))
E("sigmoid", np.array([-40.0, 40.0]))
E("softplus", np.array([-40.0, 40.0, 0.0]))
E("power", np.array([0.0, -1.5, 2.0]), 2)
E("power", np.array([0.0, -1.5, 2.0]), 3.0)
E("power", np.array([0.0, -1.5, 2.0]), 1)
E("power", np.array([0.0, -1.5, 2.0]), 0)
E("power", S(3), -2)
E("power", 0.0, P(3))
E("power", np.array([2.0, 0.5, 1.5]), np.array([0.0, 1.0, 2.0]))  # its mixed derivative at y = 0 is 1 / x
E("clip", S(2, 3), low=None, high=0.1)
E("clip", S(2, 3), low=np.array([-0.1, 0.1, -3.0]), high=None)
E("where", np.array([[True], [False]]), N(3), 0.0)
E("where", np.array(True), 0.5, N(2, 1))
E("astype", N(2, 3), dtype="float64")

# ---------------------------------------------------------------- reductions

for op in ("sum", "mean", "var", "prod", "logsumexp", "max", "min"):
    for axis in (None, 0, -1, (0, 2), (-1, 1)):
        E(op, D((2, 3, 2)), axis=axis)
    E(op, D((2, 3, 2)), axis=(0, -1), keepdims=True)
    E(op, D((2, 3)), keepdims=True)
    E(op, D(()))
    E(op, D((1, 1)), axis=0)
    E(op, D((0, 3)), axis=1)
    if op != "var":
        E(op, D((2, 2)), axis=())
E("sum", N(4, 0), axis=1)
E("sum", N(8, 8, 70))
E("sum", N(64, 70), axis=0)
E("sum", N(8, 8, 70), axis=(0, 1), keepdims=True)
E("prod", N(0, 2), axis=0)
E("prod", np.array([[0.0, 1.5, 2.0], [0.0, -0.5, 0.0], [1.0, 2.0, -3.0]]), axis=1)
E("prod", np.array([[0.0, 1.5], [2.0, 0.5]]))
E("var", D((4, 2)), axis=0, ddof=1)
E("logsumexp", np.array([[700.0, -700.0], [-800.0, -801.0]]), axis=1)
for axis in (None, 0, -1):
    E("cumsum", N(2, 3), axis=axis)
E("cumsum", N(0, 3), axis=0)
E("cumsum", N())

for axis in (-1, 0, 1):
    for op in ("softmax", "log_softmax"):
        E(op, N(2, 3), axis=axis)
for op in ("softmax", "log_softmax"):
    E(op, N(1))
    E(op, N(0, 3))
    E(op, np.array([[1000.0, 999.0, 0.0], [-1000.0, -1001.0, -1000.5]]))

# ---------------------------------------------------------------- shape

E("reshape", N(2, 3), shape=(3, -1))
E("reshape", N(2, 3), shape=6)
E("reshape", N(), shape=(1, 1))
E("reshape", N(0, 3), shape=(3, 0, 2))
E("transpose", N(2, 3))
E("transpose", N(2, 3, 4), axes=(1, 2, 0))
E("transpose", N(2, 3, 4), axes=(-1, 0, -2))
E("transpose", N())
E("swapaxes", N(2, 3, 1), axis1=0, axis2=-1)
for axis in (0, 1, -1):
    E("expand_dims", N(2, 3), axis=axis)
E("expand_dims", N(), axis=0)
E("squeeze", N(1, 3, 1))
E("squeeze", N(1, 3, 1), axis=-1)
E("squeeze", N(1, 0, 1), axis=(0, 2))
E("broadcast_to", N(3, 1), shape=(2, 3, 4))
E("broadcast_to", N(), shape=(2,))
E("broadcast_to", N(1, 2), shape=(0, 2))
E("concatenate_p", N(2, 1), N(2, 3), N(2, 0), axis=1)
E("concatenate_p", N(2, 2), N(1, 2), axis=-2)
E("concatenate_p", N(2, 1024, 1), N(2, 1024, 2), axis=-1)  # so many rows are for C
E("concatenate", N(2, 1), N(2, 3), axis=-1)
E("concatenate", N(3))
E("concatenate", N(0, 2), N(2, 2), axis=0)
E("stack", N(2, 3), N(2, 3), axis=0)
E("stack", N(2, 3), N(2, 3), axis=-1)
E("stack", N(), N())
E("split", N(4, 2), sections=2)
E("split", N(2, 5), sections=[1, 1, 4], axis=-1)
E("pad", N(2, 3), pad_width=((1, 0), (2, 1)))
E("pad", N(0, 2), pad_width=((1, 1), (0, 0)), value=3.5)
E("pad", N(), pad_width=())
E("flip", N(2, 3))
E("flip", N(2, 3), axis=-1)
E("flip", N(2, 3, 2), axis=(0, 2))
E("roll", N(2, 3), shift=4)
E("roll", N(2, 3), shift=-1, axis=-1)
E("roll", N(2, 0), shift=1, axis=1)
E("roll", N(3), shift=3, axis=0)
E("tile", N(2, 3), reps=2)
E("tile", N(3), reps=(2, 2))
E("tile", N(), reps=(3,))
E("tile", N(2, 1), reps=(1, 0))
for op in ("tril", "triu"):
    E(op, N(3, 3))
    E(op, N(2, 2, 4), k=1)
    E(op, N(3, 2), k=-1)

# ---------------------------------------------------------------- index

ROWS = np.array([2, 0, 2, -1])
MASK = np.array([[True, False], [True, True], [False, False]])
for index in (
    1,
    -1,
    slice(0, 2),
    slice(None, None, -2),
    (slice(None), 1),
    (Ellipsis, None, 0),
    Ellipsis,
    None,
    slice(2, 2),
):
    E("getitem", N(3, 2), index=index)
for index in (
    ROWS,
    MASK,
    (ROWS, I(2, 4)),
    (ROWS[:, None], np.array([1, 1])),
    (slice(None), np.array([1, 0, 1])),
    np.zeros((2, 0), int),
):
    E("getitem", N(3, 2), index=index)
E("getitem", N(2, 3, 2), index=(np.array([1, 1]), slice(None), np.array([0, 1])))
E("getitem", N(), index=())
E("scatter_add", N(4, 2), index=ROWS, shape=(3, 2))
E("scatter_add", N(3, 1), index=(slice(None), slice(1, None)), shape=(3, 2))
E("scatter_add", N(2, 3), index=np.array([[0, 1, 1], [1, 1, 4]]), shape=(5,))
E("scatter_add", N(3), index=MASK, shape=(3, 2))
E("index_add", N(3, 2), N(4, 2), index=ROWS)
E("index_add", N(3, 2), N(2), index=ROWS)
E("index_add", N(3, 2), N(), index=(slice(None), 0))
E("index_add", N(3, 2), N(1, 2), index=slice(0, 1))
E("take", N(3, 2), ROWS, axis=0)
E("take", N(3, 2), I(2, 2, 2), axis=-1)
E("take", N(3, 2), I(6, 5))
E("take_along_axis", N(3, 4), I(3, 2, 4), axis=0)
E("take_along_axis", N(3, 4), I(4, 3, 2), axis=-1)
E("embedding", I(5, 2, 3), N(5, 2))
E("embedding", I(5), N(5, 2))
E("embedding", I(5, 0), N(5, 2))

# ---------------------------------------------------------------- linear algebra

E("matmul", N(2, 3), N(3, 4))
E("matmul", N(2, 2, 3), N(3, 2))
E("matmul", N(2, 1, 2, 3), N(4, 3, 1))
E("matmul", N(2, 3), N(2, 3, 1))
E("matmul", N(0, 3), N(3, 2))
E("matmul", N(2, 0), N(0, 3))
E("matmul", N(2, 0, 3), N(3, 2))
E("matmul", N(2, 2, 3), N(3))
E("matmul", N(3), N(3, 2))
E("matmul", N(3), N(3))
E("matmul", N(3), N(2, 3, 2))
E("matmul", N(2, 3), N(3))
E("linear", N(2, 3), N(3, 4), N(4))
E("linear", N(2, 2, 3), N(3, 2), N(2))
E("linear", N(3), N(3, 2), N(2))
E("linear", N(2, 0, 3), N(3, 2), N(2))
E("linear", N(2, 0), N(0, 3), N(3))
E("linear", N(2, 3), N(3, 0), N(0))
for subscripts, shapes in [
    ("nhid,nhjd->nhij", [(2, 1, 2, 3), (2, 1, 2, 3)]),
    ("ij,jk", [(2, 3), (3, 2)]),
    ("ii->i", [(3, 3)]),
    ("ii", [(3, 3)]),
    ("ij->j", [(2, 3)]),
    ("...i,...i->...", [(2, 3), (4, 1, 3)]),
    ("i,j,k->kji", [(2,), (3,), (2,)]),
    ("ij,j->", [(2, 3), (3,)]),
    ("ij,kj->ik", [(2, 0), (3, 0)]),
    (",i->i", [(), (2,)]),
    ("iji,j->ij", [(2, 3, 2), (3,)]),
]:
    E("einsum", *(N(*s) for s in shapes), subscripts=subscripts)
E("einsum_p", N(2, 3), N(3, 2), subscripts="ij,jk->ki")
E("einsum_p", N(2, 3), N(2), N(), subscripts="ij,i,->i")
E("einsum_p", N(2, 3), subscripts="ij->")

# ---------------------------------------------------------------- convolution, pooling

for n, size, kernel, cin, cout, params in [
    (2, (4, 5), (3, 3), 2, 3, {}),
    (1, (4, 4), (3, 3), 2, 2, {"padding": 1}),
    (2, (5, 4), (2, 3), 1, 2, {"padding": (1, 2), "stride": (2, 1)}),
    (1, (5, 6), (3, 2), 2, 2, {"padding": "same"}),
    (1, (5, 4), (3, 3), 1, 1, {"padding": "same", "stride": 2}),
    (1, (6, 5), (2, 2), 2, 2, {"dilation": (3, 2), "padding": 1}),
    (1, (4, 4), (3, 3), 4, 2, {"groups": 2, "padding": 1}),
    (1, (3, 3), (2, 2), 3, 6, {"groups": 3}),
    (2, (3, 3), (1, 1), 2, 3, {}),
    (2, (3, 3), (1, 1), 2, 2, {"stride": 2}),
    (0, (3, 3), (2, 2), 1, 2, {}),
    (1, (7, 3), (2, 2), 1, 1, {"stride": 3}),
]:
    E("conv2d", N(n, *size, cin), N(*kernel, cin // params.get("groups", 1), cout), **params)
E("conv2d", N(1, 3, 3, 2), N(2, 2, 2, 3), N(3))
for n, size, kernel, cin, cout, params in [
    (2, (2, 3), (3, 3), 3, 2, {}),
    (1, (2, 3), (3, 3), 2, 1, {"stride": 2, "output_padding": 1}),
    (1, (3, 2), (3, 2), 2, 2, {"stride": (2, 1), "padding": (1, 0), "output_padding": (1, 0)}),
    (1, (2, 2), (2, 2), 2, 4, {"groups": 2, "dilation": 2}),
    (0, (2, 2), (2, 2), 1, 1, {}),
    (1, (2, 2), (1, 1), 2, 2, {"stride": 3}),
]:
    E("conv_transpose2d", N(n, *size, cin), N(*kernel, cout // params.get("groups", 1), cin), **params)
E("conv_transpose2d", N(1, 2, 2, 2), N(2, 2, 3, 2), N(3))
E("conv1d", N(2, 5, 2), N(3, 2, 2), N(2), padding=1, stride=2)
E("conv1d", N(1, 6, 2), N(3, 1, 2), dilation=2, groups=2, padding="same")
GEOMETRY = Geometry((5, 4), (2, 3), (2, 1), ((1, 0), (1, 1)), (2, 1), 2)  # out: (2, 4)
E("conv2d_p", N(2, 5, 4, 2), N(2, 3, 1, 4), None, geometry=GEOMETRY)
E("conv2d_p", N(2, 5, 4, 2), N(2, 3, 1, 4), N(4), geometry=GEOMETRY)
E("conv2d_input_grad", N(2, *GEOMETRY.out, 4), N(2, 3, 1, 4), None, geometry=GEOMETRY)
E("conv2d_input_grad", N(2, *GEOMETRY.out, 4), N(2, 3, 1, 4), N(2), geometry=GEOMETRY)
MIRRORED = Geometry((5, 4), (2, 3), (1, 1), ((0, 1), (2, 0)), (1, 2), 2)  # out: (5, 2)
E("conv2d_input_grad", N(2, *MIRRORED.out, 2), N(2, 3, 2, 2), N(4), geometry=MIRRORED)
E("conv2d_weight_grad", N(2, 5, 4, 2), N(2, *GEOMETRY.out, 4), geometry=GEOMETRY)
for op in ("max_pool2d", "avg_pool2d"):
    E(op, D((2, 4, 4, 2)), kernel=2)
    E(op, D((1, 5, 4, 1)), kernel=(3, 2), stride=(1, 2), padding=1)
    E(op, D((1, 3, 3, 1)), kernel=3, stride=2, padding=1)
    E(op, D((0, 2, 2, 1)), kernel=2)
E("upsample_nearest2d", N(2, 2, 3, 1))
E("upsample_nearest2d", N(1, 1, 2, 2), scale=(1, 3))

# ---------------------------------------------------------------- norms, attention, losses

E("normalize", N(2, 3, 2, 2), N(2, 2), N(2, 2), axes=(1, 3), eps=1e-5)
E("normalize", N(2, 3, 2, 2), N(1, 1, 2, 2), N(1, 1, 2, 2), axes=(1, 3), eps=1e-5)
E("normalize", N(2, 3, 4), None, None, axes=(0, 1), eps=1e-2)
E("normalize", N(2, 3, 4), N(4), N(4), axes=(2,), eps=1e-3)
E("normalize", N(3, 2, 2), N(2), N(2), axes=(0, 1), eps=1e-3)
E("normalize", N(3, 4, 2), N(4, 1), N(4, 1), axes=(1,), eps=1e-3)  # an axis in the middle, which only the page takes
for shift, weight in [
    (None, (4,)),
    ((2, 4), (4,)),
    ((2, 4), (2, 4)),
    ((2, 4), None),
    (None, None),
]:
    for silu in (True, False):
        E(
            "shift_normalize_silu",
            N(2, 3, 4),
            None if shift is None else N(*shift),
            *((None, None) if weight is None else (N(*weight), N(*weight))),
            groups=2,
            eps=1e-3,
            silu=silu,
        )
E("shift_normalize_silu", N(1, 2, 2, 2), None, N(2), N(2), groups=2, eps=1e-3, silu=True)
E("shift_normalize_silu", N(3, 4), N(3, 4), None, None, groups=2, eps=1e-3, silu=True)
E("shift_normalize_silu", N(2, 5, 3), N(2, 3), N(2, 3), N(2, 3), groups=1, eps=1e-3, silu=True)
E("group_norm", N(2, 2, 2, 4), P(4), N(4), groups=2)
E("group_norm", N(2, 3, 4), groups=4, eps=1e-3)
E("group_norm", N(2, 4), groups=1)
E("group_norm", N(2, 3, 4), N(2, 4), N(2, 4), N(2, 4), groups=2, silu=True)
E("group_norm", N(2, 3, 4), None, None, N(2, 4), groups=2)
E("group_norm", N(0, 2, 4), P(4), N(4), groups=2)
E("layer_norm", N(2, 3), P(3), N(3))
E("layer_norm", N(4))
E("layer_norm", N(2, 1, 3))
E("batch_norm", N(3, 2, 2), P(2), N(2))
E("batch_norm", N(4, 2))

HEADS = (np.arange(12).reshape(3, 4) % 3 != 1, N(2, 1, 3, 4))  # a mask that forbids, and one that is added
for mask in (None, *HEADS):
    E("attention", N(2, 1, 3, 2), N(2, 1, 4, 2), N(2, 1, 4, 3), mask=mask)
E("attention", N(2, 2, 3), N(2, 3), N(2, 2), scale=0.3)
E("attention", N(2, 3), N(2, 4, 3), N(4, 2))
E("attention", N(0, 1, 2, 2), N(0, 1, 2, 2), N(0, 1, 2, 2))
E("scaled_dot_product_attention", N(2, 3, 2), N(2, 4, 2), N(2, 4, 3), None, scale=0.7)
E("scaled_dot_product_attention", N(3, 2), N(4, 2), N(4, 3), HEADS[0], scale=1.0)
for mask in (N(3, 4), N(2, 1, 4), N(5, 1, 3, 1), N(4)):  # learned, and broadcast in one way or another
    E("scaled_dot_product_attention", N(2, 3, 2), N(2, 4, 2), N(2, 4, 3), mask, scale=0.7)
E("scaled_dot_product_attention", N(2, 17, 2), N(2, 3, 2), N(2, 3, 2), N(2, 17, 3), scale=0.7)

for reduction in ("mean", "sum", "none"):
    E("mse_loss", N(2, 3), N(2, 3), reduction=reduction)
    E("cross_entropy", N(2, 3), I(3, 2), reduction=reduction)
    E("binary_cross_entropy_with_logits", N(2, 3), P(2, 3) / 2, reduction=reduction)
E("cross_entropy", N(2, 2, 3), I(3, 2, 2))
E("dropout", N(3, 4), p=0.4, rng=3)
E("dropout", N(3), p=0, rng=0)
E("dropout", N(0, 3), p=0.5, rng=0)

# ---------------------------------------------------------------- for the tests

_count: dict[str, int] = {}
NAMED: dict[str, Example] = {}  # by the test's id
for example in EXAMPLES:
    _count[example.op] = _count.get(example.op, 0) + 1
    NAMED[f"{example.op}-{_count[example.op]}"] = example
