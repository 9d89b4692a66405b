"""Every op that PyTorch has: its value and all its gradients, with a random adjoint, in float64 to
1e-10 and float32 to 1e-4.

Each case is a function on Tensors, the same one on torch tensors, and the arrays that both are given. Layouts
differ (ours is channels last), so PyTorch's side transposes on the way in and out, and its gradients arrive in
our layout by themselves.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, ops

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # the arrays are small
F = torch.nn.functional
pytestmark = pytest.mark.torch
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


@dataclass
class Case:
    ours: Any
    theirs: Any
    arrays: list[np.ndarray]


def normal(name: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Arrays that depend on the name of the case alone."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return [draw.normal(size=shape) for shape in shapes]


def close(ours: Any, theirs: Any, tolerance: float, what: str) -> None:
    a, b = backend.to_host(ours.data), theirs.detach().numpy()
    assert a.shape == b.shape, f"{what}: shape {a.shape}, PyTorch {b.shape}"
    assert a.dtype == b.dtype, f"{what}: {a.dtype}, PyTorch {b.dtype}"
    infinite = np.isinf(b)
    np.testing.assert_array_equal(a[infinite], b[infinite], err_msg=what)
    a, b = a[~infinite], b[~infinite]
    worst = np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), 1.0)
    assert worst <= tolerance, f"{what}: off by {worst:.2e} of its largest value"


def compare(case: Case, dtype: str, name: str) -> None:
    arrays = [a.astype(dtype) for a in case.arrays]
    xs = [td.tensor(a, requires_grad=True) for a in arrays]
    ts = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = case.ours(*xs), case.theirs(*ts)
    close(y, t, TOLERANCE[dtype], f"{name}: value")
    adjoint = np.random.default_rng(1).normal(size=y.shape).astype(dtype)
    ours = td.grad(y, xs, td.tensor(adjoint))
    theirs = torch.autograd.grad(t, ts, torch.tensor(adjoint), allow_unused=True)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        close(a, torch.zeros_like(ts[i]) if b is None else b, TOLERANCE[dtype], f"{name}: gradient {i}")


def first(t: Any) -> Any:
    """Channels last to channels first: (N, .., C) -> (N, C, ..)."""
    return t.movedim(-1, 1)


def last(t: Any) -> Any:
    return t.movedim(1, -1)


CASES: dict[str, Case] = {}


def case(name: str, ours: Any, theirs: Any, *arrays: np.ndarray) -> None:
    assert name not in CASES, name
    CASES[name] = Case(ours, theirs, list(arrays))


# ---------------------------------------------------------------- elementwise

for _name in "abs sign exp expm1 square sin cos tanh erf sigmoid relu negative".split():
    case(_name, getattr(ops, _name), getattr(torch, _name), *normal(_name, (3, 4)))
for _name in "log log1p sqrt".split():
    case(_name, getattr(ops, _name), getattr(torch, _name), np.abs(normal(_name, (3, 4))[0]) + 0.1)
for _name in "add subtract multiply divide maximum minimum".split():
    case(_name, getattr(ops, _name), getattr(torch, _name), *normal(_name, (3, 1, 4), (2, 1)))
case("power", ops.power, torch.pow, np.abs(normal("power", (3, 4))[0]) + 0.1, *normal("power", (4,)))
case("power by 3", lambda x: x**3, lambda t: t**3, *normal("power by 3", (3, 4)))
case("power of 2", lambda x: 2**x, lambda t: 2**t, *normal("power of 2", (3, 4)))
case("power by -1/2", lambda x: x**-0.5, lambda t: t**-0.5, np.abs(normal("power -", (3, 4))[0]) + 0.1)
case("power at 0", lambda x, y: x**y, lambda t, u: t**u, np.array([0.0, 0.0, 2.0]), np.array([2.0, 3.0, 0.0]))
case("1 - x and 1 / x", lambda x: (1 - x) / x + 1 / x, lambda t: (1 - t) / t + 1 / t, *normal("1 - x", (5,)))
case("silu", ops.silu, F.silu, 4 * normal("silu", (3, 4))[0])
case("silu, large", ops.silu, F.silu, np.array([-800.0, -90.0, -20.0, 0.0, 20.0, 90.0, 800.0]))
case("sigmoid, large", ops.sigmoid, torch.sigmoid, np.array([-800.0, -90.0, -20.0, 0.0, 20.0, 90.0, 800.0]))
case("softplus", ops.softplus, F.softplus, *normal("softplus", (3, 4)))
case(
    "softplus, large", ops.softplus, lambda t: F.softplus(t, threshold=1e9), np.array([-800.0, -90.0, 0.0, 30.0, 80.0])
)
case("erf, all of it", ops.erf, torch.erf, np.linspace(-6.5, 6.5, 1001))
for _how in ("none", "tanh"):
    case(
        f"gelu {_how}",
        lambda x, how=_how: ops.gelu(x, approximate=how),
        lambda t, how=_how: F.gelu(t, approximate=how),
        3 * normal("gelu", (3, 4))[0],
    )
for _low, _high in ((-0.5, 0.7), (None, 0.2), (-0.1, None)):
    case(
        f"clip {_low} {_high}",
        lambda x, a=_low, b=_high: ops.clip(x, low=a, high=b),
        lambda t, a=_low, b=_high: t.clamp(a, b),
        *normal("clip", (3, 4)),
    )
_mask = normal("where", (3, 4))[0] > 0
case(
    "where",
    lambda x, y: ops.where(backend.to_device(_mask), x, y),
    lambda t, u: torch.where(torch.tensor(_mask), t, u),
    *normal("where", (3, 1), (4,)),
)

# ---------------------------------------------------------------- reductions

for _axis, _keep in itertools.product((None, 0, -1, (0, 2)), (False, True)):
    _dim = tuple(range(3)) if _axis is None else _axis
    for _name, _other in (
        ("sum", "sum"),
        ("mean", "mean"),
        ("max", "amax"),
        ("min", "amin"),
        ("logsumexp", "logsumexp"),
    ):
        case(
            f"{_name} {_axis} {_keep}",
            lambda x, op=_name, a=_axis, k=_keep: getattr(ops, op)(x, axis=a, keepdims=k),
            lambda t, op=_other, d=_dim, k=_keep: getattr(torch, op)(t, dim=d, keepdim=k),
            *normal("reduce", (3, 2, 4)),
        )
    for _ddof in (0, 1):
        case(
            f"var {_axis} {_keep} {_ddof}",
            lambda x, a=_axis, k=_keep, n=_ddof: ops.var(x, axis=a, keepdims=k, ddof=n),
            lambda t, d=_dim, k=_keep, n=_ddof: torch.var(t, dim=d, keepdim=k, correction=n),
            *normal("reduce", (3, 2, 4)),
        )
case("sum, large", lambda x: x.sum((0, 1)), lambda t: t.sum((0, 1)), *normal("large", (40, 30, 7)))
case("max, ties", lambda x: x.max(1), lambda t: t.amax(1), np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]))
case(
    "logsumexp, -inf and wide",
    lambda x: ops.logsumexp(x, axis=1),
    lambda t: torch.logsumexp(t, 1),
    np.array([[-math.inf, 1.0, 2.0], [1000.0, -1000.0, 999.0], [-1000.0, -1001.0, -999.0]]),
)
_factors = normal("prod", (4, 5))[0]
_zeros = _factors.copy()
_zeros[1, 2] = _zeros[2, 0] = _zeros[2, 4] = 0  # a row with one zero, a row with two
for _name, _array in (("prod", _factors), ("prod, zeros", _zeros)):
    case(f"{_name}, all", lambda x: x.prod(), lambda t: t.prod(), _array)
    for _axis in (0, 1):
        case(f"{_name}, axis {_axis}", lambda x, a=_axis: x.prod(a), lambda t, a=_axis: t.prod(a), _array)
for _axis in (0, 1, -1):
    case(
        f"cumsum {_axis}", lambda x, a=_axis: x.cumsum(a), lambda t, a=_axis: t.cumsum(a), *normal("cumsum", (3, 2, 4))
    )
case("cumsum, flat", lambda x: x.cumsum(), lambda t: t.reshape(-1).cumsum(0), *normal("cumsum", (3, 4)))

# ---------------------------------------------------------------- shape and index

case("reshape", lambda x: x.reshape(2, -1), lambda t: t.reshape(2, -1), *normal("shape", (3, 4)))
case("transpose", lambda x: x.transpose(2, 0, -2), lambda t: t.permute(2, 0, 1), *normal("shape", (3, 4, 5)))
case("T", lambda x: x.T, lambda t: t.T, *normal("shape", (3, 4)))
case("swapaxes", lambda x: x.swapaxes(0, -1), lambda t: t.swapaxes(0, -1), *normal("shape", (3, 4, 5)))
case("expand_dims", lambda x: ops.expand_dims(x, axis=-2), lambda t: t.unsqueeze(-2), *normal("shape", (3, 4)))
case("squeeze", lambda x: x.squeeze(1), lambda t: t.squeeze(1), *normal("shape", (3, 1, 1)))
case(
    "broadcast_to",
    lambda x: ops.broadcast_to(x, shape=(2, 3, 4)),
    lambda t: t.expand(2, 3, 4),
    *normal("shape", (3, 1)),
)
case(
    "concatenate",
    lambda *x: ops.concatenate(x, axis=-1),
    lambda *t: torch.cat(t, -1),
    *normal("cat", (3, 4), (3, 1), (3, 0)),
)
case("stack", lambda *x: ops.stack(x, axis=-1), lambda *t: torch.stack(t, -1), *normal("stack", (3, 4), (3, 4)))
case("split", lambda x: ops.split(x, 3, axis=1)[1], lambda t: t.split(2, 1)[1], *normal("split", (2, 6)))
case(
    "split at",
    lambda x: ops.split(x, [1, 4], axis=1)[1],
    lambda t: t.tensor_split([1, 4], 1)[1],
    *normal("split", (2, 6)),
)
case(
    "pad",
    lambda x: ops.pad(x, pad_width=((0, 0), (1, 2), (0, 3)), value=1.5),
    lambda t: F.pad(t, (0, 3, 1, 2), value=1.5),
    *normal("pad", (2, 3, 4)),
)
case("flip", lambda x: ops.flip(x, axis=(0, -1)), lambda t: t.flip(0, -1), *normal("flip", (3, 4, 2)))
for _shift in (1, -2, 5):
    case(
        f"roll {_shift}",
        lambda x, n=_shift: ops.roll(x, shift=n, axis=1),
        lambda t, n=_shift: t.roll(n, 1),
        *normal("roll", (3, 4)),
    )
case("roll, flat", lambda x: ops.roll(x, shift=3), lambda t: t.roll(3), *normal("roll", (3, 4)))
case("tile", lambda x: ops.tile(x, reps=(2, 1, 3)), lambda t: t.tile((2, 1, 3)), *normal("tile", (3, 2)))
for _k in (-1, 0, 2):
    case(f"tril {_k}", lambda x, k=_k: ops.tril(x, k=k), lambda t, k=_k: t.tril(k), *normal("tri", (2, 3, 4)))
    case(f"triu {_k}", lambda x, k=_k: ops.triu(x, k=k), lambda t, k=_k: t.triu(k), *normal("tri", (2, 3, 4)))
case("getitem", lambda x: x[1:, None, ::2, -1], lambda t: t[1:, None, ::2, -1], *normal("get", (3, 4, 2)))
case("getitem, reversed", lambda x: x[::-1], lambda t: t.flip(0), *normal("get", (3, 4)))
_pick = np.array([[0, 2, 2], [1, 0, 2]])
case(
    "getitem, repeated", lambda x: x[backend.to_device(_pick)], lambda t: t[torch.tensor(_pick)], *normal("get", (3, 4))
)
case("getitem, bool", lambda x: x[backend.to_device(_mask)], lambda t: t[torch.tensor(_mask)], *normal("get", (3, 4)))
case(
    "getitem, mixed",
    lambda x: x[:, backend.to_device(_pick), 1:],
    lambda t: t[:, torch.tensor(_pick), 1:],
    *normal("get", (2, 3, 4)),
)
case(
    "take",
    lambda x: ops.take(x, backend.to_device(_pick[0]), axis=-1),
    lambda t: t[..., torch.tensor(_pick[0])],
    *normal("take", (2, 3)),
)
case(
    "take_along_axis",
    lambda x: ops.take_along_axis(x, backend.to_device(_pick), axis=1),
    lambda t: torch.take_along_dim(t, torch.tensor(_pick), 1),
    *normal("along", (2, 3)),
)
case(
    "embedding",
    lambda w: ops.embedding(backend.to_device(_pick), w),
    lambda u: F.embedding(torch.tensor(_pick), u),
    *normal("e", (3, 5)),
)
case(
    "index_add",
    lambda x, v: ops.index_add(x, v, index=backend.to_device(_pick[0])),
    lambda t, u: t.index_add(0, torch.tensor(_pick[0]), u),
    *normal("index_add", (3, 4), (3, 4)),
)
case(
    "scatter_add",
    lambda v: ops.scatter_add(v, index=backend.to_device(_pick[0]), shape=(4, 2)),
    lambda u: torch.zeros(4, 2, dtype=u.dtype).index_add(0, torch.tensor(_pick[0]), u),
    *normal("scatter_add", (3, 2)),
)
case("astype", lambda x: x.astype("float64"), lambda t: t.double(), *normal("astype", (3,)))
case("copy", lambda x: x.copy() * x, lambda t: t.clone() * t, *normal("copy", (3,)))

# ---------------------------------------------------------------- linear algebra

for _a, _b in (
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((6, 1, 3, 4), (2, 4, 5)),
    ((4,), (4,)),
    ((4,), (4, 5)),
    ((3, 4), (4,)),
    ((2, 3, 4), (4,)),
    ((4,), (2, 4, 5)),
    ((3, 4), (2, 4, 5)),
    ((3, 0), (0, 5)),
):
    case(f"matmul {_a} {_b}", lambda x, y: x @ y, lambda t, u: t @ u, *normal("matmul", _a, _b))
for _a in ((3, 4), (4,), (2, 3, 4), (2, 0, 4)):
    case(f"linear {_a}", ops.linear, lambda t, w, b: F.linear(t, w.T, b), *normal("linear", _a, (4, 5), (5,)))
for _subscripts, _shapes in (
    ("ij,jk->ik", ((3, 4), (4, 5))),
    ("nhid,nhjd->nhij", ((2, 3, 4, 5), (2, 3, 6, 5))),
    ("ij->ji", ((3, 4),)),
    ("ij->", ((3, 4),)),
    ("ii->i", ((3, 3),)),
    ("ii", ((3, 3),)),
    ("iij,j->j", ((3, 3, 4), (4,))),
    ("i,j->ij", ((3,), (4,))),
    ("i,ij,j->", ((3,), (3, 4), (4,))),
    ("...ij,...jk->...ik", ((2, 3, 4), (4, 5))),
    ("bij,jk", ((2, 3, 4), (4, 5))),
    ("ij,jk->ik", ((3, 1), (4, 5))),
    ("ijk,ijk->k", ((1, 3, 2), (4, 3, 2))),
):
    case(
        f"einsum {_subscripts} {_shapes}",
        lambda *x, s=_subscripts: ops.einsum(s, *x),
        lambda *t, s=_subscripts: torch.einsum(s, *t),
        *normal("einsum", *_shapes),
    )

# ---------------------------------------------------------------- softmax, losses

for _axis in (0, 1, -1):
    _x = 5 * normal("softmax", (3, 4, 2))[0]
    case(f"softmax {_axis}", lambda x, a=_axis: ops.softmax(x, axis=a), lambda t, a=_axis: t.softmax(a), _x)
    case(f"log_softmax {_axis}", lambda x, a=_axis: ops.log_softmax(x, axis=a), lambda t, a=_axis: t.log_softmax(a), _x)
_wide = np.array([[1000.0, 999.0, 0.0], [-1000.0, -999.0, -1002.0], [-math.inf, 0.0, 1.0]])
case("softmax, wide rows", lambda x: ops.softmax(x, axis=-1), lambda t: t.softmax(-1), _wide)
case("softmax, long rows", lambda x: ops.softmax(x, axis=-1), lambda t: t.softmax(-1), *normal("long", (3, 129)))
case("log_softmax, wide rows", lambda x: ops.log_softmax(x, axis=-1), lambda t: t.log_softmax(-1), _wide)
_target = normal("target", (3, 4))[0]
_classes = np.array([[0, 2], [4, 1], [1, 1]])
for _reduction in ("mean", "sum", "none"):
    case(
        f"mse_loss {_reduction}",
        lambda x, y, r=_reduction: ops.mse_loss(x, y, reduction=r),
        lambda t, u, r=_reduction: F.mse_loss(t, u, reduction=r),
        *normal("mse", (3, 4), (3, 4)),
    )
    case(
        f"cross_entropy {_reduction}",
        lambda x, r=_reduction: ops.cross_entropy(x, backend.to_device(_classes), reduction=r),
        lambda t, r=_reduction: F.cross_entropy(first(t), torch.tensor(_classes), reduction=r),
        4 * normal("ce", (3, 2, 5))[0],
    )
    case(
        f"binary_cross_entropy_with_logits {_reduction}",
        lambda x, y, r=_reduction: ops.binary_cross_entropy_with_logits(x, y, reduction=r),
        lambda t, u, r=_reduction: F.binary_cross_entropy_with_logits(t, u, reduction=r),
        30 * normal("bce", (3, 4))[0],
        1 / (1 + np.exp(-_target)),
    )

# ---------------------------------------------------------------- convolution

_strides, _paddings, _dilations, _groups = (1, 2, (2, 3)), (0, 2, (1, 0), "same"), (1, 2, (1, 3)), (1, 2)


def same_sides(size: Any, kernel: Any, stride: Any, dilation: Any) -> list[int]:
    """What F.pad takes for OH = ceil(H / stride), written down again (PyTorch's own "same" knows only stride 1)."""
    sides: list[int] = []
    for n, k, s, d in zip(size, kernel, stride, dilation):
        need = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        sides = [need // 2, need - need // 2, *sides]
    return sides


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def torch_conv2d(
    t: Any, w: Any, b: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    t, w = first(t), w.permute(3, 2, 0, 1)
    if padding == "same":
        t, padding = F.pad(t, same_sides(t.shape[2:], w.shape[2:], pair(stride), pair(dilation))), 0
    return last(F.conv2d(t, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups))


for _i, (_s, _p, _d, _g) in enumerate(itertools.product(_strides, _paddings, _dilations, _groups)):
    _kernel = ((3, 3), (1, 2), (2, 3), (3, 1))[_i % 4]
    _options = dict(stride=_s, padding=_p, dilation=_d, groups=_g)
    case(
        f"conv2d {_kernel} {_options}",
        lambda x, w, b, o=_options: ops.conv2d(x, w, b, **o),
        lambda t, w, b, o=_options: torch_conv2d(t, w, b, **o),
        *normal("conv", (2, 9, 7, 4), (*_kernel, 4 // _g, 6), (6,)),
    )
case("conv2d, 1x1", ops.conv2d, torch_conv2d, *normal("conv", (2, 5, 3, 4), (1, 1, 4, 3)))
case("conv2d, one pixel", ops.conv2d, torch_conv2d, *normal("conv", (1, 3, 3, 1), (3, 3, 1, 1)))
case("conv2d, many chunks", ops.conv2d, torch_conv2d, *normal("conv", (9, 60, 60, 8), (3, 3, 8, 2)))
case(
    "conv2d, depthwise",
    lambda x, w: ops.conv2d(x, w, padding=1, groups=6),
    lambda t, w: torch_conv2d(t, w, padding=1, groups=6),
    *normal("conv", (2, 5, 5, 6), (3, 3, 1, 12)),
)

for _i, (_s, _p, _d, _g) in enumerate(itertools.product((1, 2, 3), (0, 1, (2, 1)), (1, 2, (1, 3)), _groups)):
    _kernel = ((3, 3), (2, 3), (4, 2))[_i % 3]
    for _extra in {0, max(_s, max(pair(_d))) - 1}:
        if _extra >= max(_s, min(pair(_d))):
            # an output_padding must stay below the stride or the dilation of its axis
            _extra = (0, _extra)  # noqa: PLW2901
        _options = dict(stride=_s, padding=_p, dilation=_d, groups=_g, output_padding=_extra)
        case(
            f"conv_transpose2d {_kernel} {_options}",
            lambda x, w, b, o=_options: ops.conv_transpose2d(x, w, b, **o),
            lambda t, w, b, o=_options: last(F.conv_transpose2d(first(t), w.permute(3, 2, 0, 1), b, **o)),
            *normal("transpose", (2, 4, 5, 4), (*_kernel, 6 // _g, 4), (6,)),
        )

for _s, _p, _d, _g in itertools.product((1, 2, 3), (0, 2, "same"), (1, 3), _groups):
    _options = dict(stride=_s, padding=_p, dilation=_d, groups=_g)

    def _theirs(t: Any, w: Any, b: Any, o: Any = _options) -> Any:
        t, w, o = first(t), w.permute(2, 1, 0), dict(o)
        if o["padding"] == "same":
            t, o["padding"] = F.pad(t, same_sides(t.shape[2:], w.shape[2:], (o["stride"],), (o["dilation"],))), 0
        return last(F.conv1d(t, w, b, **o))

    case(
        f"conv1d {_options}",
        lambda x, w, b, o=_options: ops.conv1d(x, w, b, **o),
        _theirs,
        *normal("conv1d", (2, 11, 4), (4, 4 // _g, 6), (6,)),
    )

# ---------------------------------------------------------------- pools, norms, attention

for _kernel, _s, _p in ((2, None, 0), (3, 2, 1), ((2, 3), (1, 2), (1, 0)), (3, 1, 1), ((1, 2), 3, 0)):
    _options = dict(kernel=_kernel, stride=_s, padding=_p)
    case(
        f"max_pool2d {_options}",
        lambda x, o=_options: ops.max_pool2d(x, **o),
        lambda t, k=_kernel, s=_s, p=_p: last(F.max_pool2d(first(t), k, s, p)),
        *normal("pool", (2, 7, 8, 3)),
    )
    case(
        f"avg_pool2d {_options}",
        lambda x, o=_options: ops.avg_pool2d(x, **o),
        lambda t, k=_kernel, s=_s, p=_p: last(F.avg_pool2d(first(t), k, s, p)),
        *normal("pool", (2, 7, 8, 3)),
    )
for _scale in (2, (1, 3)):
    case(
        f"upsample_nearest2d {_scale}",
        lambda x, s=_scale: ops.upsample_nearest2d(x, scale=s),
        lambda t, s=_scale: last(F.interpolate(first(t), scale_factor=tuple(map(float, pair(s))), mode="nearest")),
        *normal("up", (2, 3, 4, 2)),
    )
for _shape, _g in (
    ((2, 3, 5, 6), 3),
    ((3, 4, 6), 1),
    ((3, 4, 6), 6),
    ((2, 6), 2),
    ((2, 3, 5, 2, 4), 2),
    ((1, 32, 32, 40), 8),
):
    case(
        f"group_norm {_shape} {_g}",
        lambda x, w, b, g=_g: ops.group_norm(x, w, b, groups=g, eps=1e-3),
        lambda t, w, b, g=_g: last(F.group_norm(first(t), g, w, b, 1e-3)),
        *normal("norm", _shape, _shape[-1:], _shape[-1:]),
    )
case(
    "group_norm, plain",
    lambda x: ops.group_norm(x, groups=2),
    lambda t: last(F.group_norm(first(t), 2)),
    3 + 2 * normal("norm", (2, 5, 4))[0],
)
for _shape in ((2, 3, 5), (4, 6), (7,), (40, 129)):
    case(
        f"layer_norm {_shape}",
        ops.layer_norm,
        lambda t, w, b: F.layer_norm(t, t.shape[-1:], w, b),
        *normal("norm", _shape, _shape[-1:], _shape[-1:]),
    )
case("layer_norm, plain", ops.layer_norm, lambda t: F.layer_norm(t, t.shape[-1:]), *normal("norm", (3, 5)))
for _shape in ((4, 3, 5, 2), (6, 3)):
    case(
        f"batch_norm {_shape}",
        ops.batch_norm,
        lambda t, w, b: last(F.batch_norm(first(t), None, None, w, b, training=True)),
        *normal("norm", _shape, _shape[-1:], _shape[-1:]),
    )

_allowed = normal("mask", (2, 1, 5, 6))[0] > -0.3
_allowed[..., 0] = True
_added = normal("mask", (5, 6))[0]
for _name, _attend in (("no mask", None), ("bool mask", _allowed), ("float mask", _added)):
    for _scale in (None, 0.3):

        def _ours(q: Any, k: Any, v: Any, mask: Any = _attend, scale: Any = _scale) -> Any:
            if mask is not None and mask.dtype == float:
                mask = mask.astype(str(q.dtype))
            return ops.attention(q, k, v, mask=None if mask is None else backend.to_device(mask), scale=scale)

        def _theirs(q: Any, k: Any, v: Any, mask: Any = _attend, scale: Any = _scale) -> Any:
            mask = None if mask is None else torch.tensor(mask)
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

        case(
            f"attention, {_name}, {_scale}",
            _ours,
            _theirs,
            *normal("attention", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)),
        )
case(
    "attention, learned mask",
    lambda q, k, v, m: ops.attention(q, k, v, mask=m),
    lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    *normal("attention", (2, 3, 40, 5), (2, 3, 70, 5), (2, 3, 70, 17), (3, 40, 70)),
)
_allowed_far = normal("mask", (2, 1, 40, 130))[0] > 0
_allowed_far[:, :, 7] = np.arange(130) >= 128  # a query that may attend to the last two keys alone
for _name, _attend in (("", None), (", bool mask", _allowed_far)):
    case(
        f"attention, in blocks{_name}",
        lambda q, k, v, m=_attend: ops.attention(q, k, v, mask=None if m is None else backend.to_device(m)),
        lambda q, k, v, m=_attend: F.scaled_dot_product_attention(
            q, k, v, attn_mask=None if m is None else torch.tensor(m)
        ),
        *normal("attention", (2, 3, 40, 5), (2, 3, 130, 5), (2, 3, 130, 17)),
    )
case(
    "attention, -inf in the mask",
    lambda q: ops.attention(q, q, q, mask=backend.to_device(np.triu(np.full((5, 5), -np.inf, "float32"), 1))),
    lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    *normal("causal", (2, 1, 5, 4)),
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name: str, dtype: str) -> None:
    compare(CASES[name], dtype, name)


def test_dropout_is_a_mask_with_the_mean_kept() -> None:
    """PyTorch draws other masks, so the mask is read off the result; the rest is arithmetic."""
    x = td.tensor(normal("dropout", (50, 40))[0], requires_grad=True)
    y = ops.dropout(x, p=0.3, rng=td.Rng(0))
    kept = y.numpy() != 0
    np.testing.assert_allclose(y.numpy()[kept], x.numpy()[kept] / 0.7, rtol=1e-12)
    (gradient,) = td.grad(y.sum(), x)
    np.testing.assert_allclose(gradient.numpy(), np.where(kept, 1 / 0.7, 0.0), rtol=1e-12)
    assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.21 / kept.size)


def test_every_op_that_pytorch_has_is_compared() -> None:
    """An op added without a case here fails."""
    elsewhere = {"dropout"}  # the test above
    compared = {name.replace(",", " ").split()[0] for name in CASES}
    missing = set(ops.__all__) - compared - elsewhere
    assert not missing, f"no comparison with PyTorch for {sorted(missing)}"


# ---------------------------------------------------------------- twice

SECOND_ORDER = {
    "conv2d": Case(
        lambda x, w, b: ops.conv2d(x, w, b, stride=2, padding=(1, 0), groups=2),
        lambda t, w, b: torch_conv2d(t, w, b, stride=2, padding=(1, 0), groups=2),
        normal("twice", (2, 5, 6, 4), (3, 2, 2, 6), (6,)),
    ),
    "conv_transpose2d": Case(
        lambda x, w: ops.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1),
        lambda t, w: last(F.conv_transpose2d(first(t), w.permute(3, 2, 0, 1), stride=2, padding=1, output_padding=1)),
        normal("twice", (2, 3, 4, 3), (3, 3, 2, 3)),
    ),
    "group_norm": Case(
        lambda x, w, b: ops.group_norm(x, w, b, groups=2),
        lambda t, w, b: last(F.group_norm(first(t), 2, w, b)),
        normal("twice", (2, 3, 2, 4), (4,), (4,)),
    ),
    "layer_norm": Case(
        ops.layer_norm, lambda t, w, b: F.layer_norm(t, (4,), w, b), normal("twice", (3, 4), (4,), (4,))
    ),
    "batch_norm": Case(
        ops.batch_norm,
        lambda t, w, b: last(F.batch_norm(first(t), None, None, w, b, training=True)),
        normal("twice", (3, 2, 4), (4,), (4,)),
    ),
    "attention": Case(
        lambda q, k, v: ops.attention(q, k, v, mask=backend.to_device(_allowed)),
        lambda q, k, v: (
            (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.tensor(_allowed), -math.inf).softmax(-1) @ v
        ),
        normal("twice", (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2)),
    ),
    "softmax": Case(lambda x: ops.softmax(x, axis=-1), lambda t: t.softmax(-1), normal("twice", (3, 4))),
    "log_softmax": Case(lambda x: ops.log_softmax(x, axis=0), lambda t: t.log_softmax(0), normal("twice", (3, 4))),
    "logsumexp": Case(lambda x: ops.logsumexp(x, axis=1), lambda t: torch.logsumexp(t, 1), normal("twice", (3, 4))),
    "silu": Case(ops.silu, F.silu, normal("twice", (3, 4))),
    "gelu": Case(ops.gelu, F.gelu, normal("twice", (3, 4))),
    "gelu tanh": Case(
        lambda x: ops.gelu(x, approximate="tanh"), lambda t: F.gelu(t, approximate="tanh"), normal("twice", (3, 4))
    ),
    "softplus": Case(ops.softplus, F.softplus, normal("twice", (3, 4))),
    "power": Case(ops.power, torch.pow, [np.abs(normal("twice", (3, 4))[0]) + 0.5, normal("twice", (4,))[0]]),
    "divide": Case(ops.divide, torch.divide, normal("twice", (3, 4), (4,))),
    "prod, zeros": Case(lambda x: x.prod(1), lambda t: t.prod(1), [_zeros]),
    "max": Case(lambda x: x.max(0) ** 2, lambda t: t.amax(0) ** 2, normal("twice", (3, 4))),
    "matmul": Case(ops.matmul, torch.matmul, normal("twice", (2, 3, 4), (4, 5))),
    "linear": Case(ops.linear, lambda t, w, b: F.linear(t, w.T, b), normal("twice", (2, 3, 4), (4, 5), (5,))),
    "einsum": Case(
        lambda x, y: ops.einsum("bii,bi->i", x, y),
        lambda t, u: torch.einsum("bii,bi->i", t, u),
        normal("twice", (2, 3, 3), (2, 3)),
    ),
    "cross_entropy": Case(
        lambda x: ops.cross_entropy(x, backend.to_device(_classes)),
        lambda t: F.cross_entropy(first(t), torch.tensor(_classes)),
        normal("twice", (3, 2, 5)),
    ),
    "var": Case(lambda x: x.var(1, ddof=1), lambda t: t.var(1), normal("twice", (3, 4))),
    "getitem": Case(
        lambda x: x[backend.to_device(_pick)] ** 3, lambda t: t[torch.tensor(_pick)] ** 3, normal("twice", (3, 2))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_gradient_of_the_gradient(name: str) -> None:
    """d/dx of <gradient, random>, for every input and for the adjoint."""
    both = SECOND_ORDER[name]
    xs = [td.tensor(a, requires_grad=True) for a in both.arrays]
    ts = [torch.tensor(a, requires_grad=True) for a in both.arrays]
    y, t = both.ours(*xs), both.theirs(*ts)
    g = np.random.default_rng(2).normal(size=y.shape)
    x_g, t_g = td.tensor(g, requires_grad=True), torch.tensor(g, requires_grad=True)
    ours = td.grad(y, xs, x_g, create_graph=True)
    theirs = torch.autograd.grad(t, ts, t_g, create_graph=True)
    weights = [np.random.default_rng(3 + i).normal(size=x.shape) for i, x in enumerate(xs)]
    total = sum(((a * backend.to_device(w)).sum() for a, w in zip(ours, weights)), td.tensor(0.0, dtype="float64"))
    t_total = sum((a * torch.tensor(w)).sum() for a, w in zip(theirs, weights))
    again = td.grad(total, [*xs, x_g])
    t_again = torch.autograd.grad(t_total, [*ts, t_g], allow_unused=True)
    for i, (a, b) in enumerate(zip(again, t_again)):
        close(a, torch.zeros(a.shape, dtype=torch.float64) if b is None else b, 1e-10, f"{name}: second gradient {i}")
