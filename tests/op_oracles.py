"""What each op should give, in plain NumPy; the fused ones in loops that are too simple to be wrong.

`expected(example)` takes NumPy's own function where it has one of that name.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from op_examples import Example, apply

from tinydiff import Rng, backend

ORACLES: dict[str, Any] = {}


def expected(example: Example) -> Any:
    """A host array, or a list of them."""
    return apply(example.op, ORACLES.get(example.op) or getattr(np, example.op), example.inputs, dict(example.params))


def oracle(f: Any) -> Any:
    ORACLES[f.__name__] = f
    return f


# ---------------------------------------------------------------- elementwise

ORACLES["sigmoid"] = lambda x: 1 / (1 + np.exp(-x))
ORACLES["relu"] = lambda x: np.where(x > 0, x, 0.0)
ORACLES["silu"] = lambda x: x / (1 + np.exp(-x))
ORACLES["softplus"] = lambda x: np.logaddexp(x, 0)
ORACLES["erf"] = np.vectorize(math.erf, otypes=[float])
ORACLES["copy"] = lambda x: x
ORACLES["astype"] = lambda x, dtype: np.array(x, dtype)
ORACLES["clip"] = lambda x, low=None, high=None: np.clip(x, low, high)


@oracle
def exact_gelu(x: Any) -> Any:
    return gelu(x)


@oracle
def gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * 0.5 * (1 + ORACLES["erf"](x / math.sqrt(2)))


# ---------------------------------------------------------------- reductions, shape, index


@oracle
def logsumexp(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
    for a in sorted((a % x.ndim for a in axes), reverse=True):
        x = np.logaddexp.reduce(x, axis=a, keepdims=keepdims)
    return x


@oracle
def softmax(x: Any, axis: int = -1) -> Any:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


ORACLES["log_softmax"] = lambda x, axis=-1: x - np.logaddexp.reduce(x, axis=axis, keepdims=True)
ORACLES["reshape"] = lambda x, shape: np.reshape(x, shape)
ORACLES["concatenate_p"] = lambda *xs, axis=0: np.concatenate(xs, axis=axis)
ORACLES["split"] = lambda x, sections, axis=0: np.split(x, sections, axis=axis)
ORACLES["pad"] = lambda x, pad_width, value=0.0: np.pad(x, pad_width, constant_values=value) if x.ndim else x
ORACLES["getitem"] = lambda x, index: x[index]
ORACLES["embedding"] = lambda index, table: table[index]


@oracle
def scatter_add(x: Any, index: Any, shape: Any) -> Any:
    z = np.zeros(shape)
    np.add.at(z, index, x)
    return z


@oracle
def index_add(x: Any, values: Any, index: Any) -> Any:
    z = x.copy()
    np.add.at(z, index, values)
    return z


# ---------------------------------------------------------------- linear algebra

ORACLES["matmul"] = np.matmul
ORACLES["linear"] = lambda x, w, b: np.einsum("...i,ij->...j", x, w) + b
ORACLES["einsum_p"] = lambda *xs, subscripts: np.einsum(subscripts, *xs)
ORACLES["einsum"] = np.einsum


# ---------------------------------------------------------------- convolution, pooling


def pair(v: Any) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else tuple(v)


def taps(size: Any, kernel: Any, out: Any, s: Any, d: Any, before: Any) -> Any:
    """Every (i, j, a, b, row, column): the pixel (row, column) under the tap (a, b) of the window (i, j)."""
    for i, j, a, b in itertools.product(*map(range, (*out, *kernel))):
        row, column = s[0] * i + d[0] * a - before[0], s[1] * j + d[1] * b - before[1]
        if 0 <= row < size[0] and 0 <= column < size[1]:
            yield i, j, a, b, row, column


def blocks(w: Any, groups: int) -> Any:
    """The weight (kh, kw, C / groups, O) as (kh, kw, C, O), with zeros between the groups."""
    kh, kw, c, o = w.shape
    full = np.zeros((kh, kw, groups, c, groups, o // groups))
    for g in range(groups):
        full[:, :, g, :, g] = w.reshape(kh, kw, c, groups, o // groups)[:, :, :, g]
    return full.reshape(kh, kw, groups * c, o)


@oracle
def conv2d(x: Any, w: Any, b: Any = 0.0, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Any:
    s, d, kernel, size = pair(stride), pair(dilation), w.shape[:2], x.shape[1:3]
    if padding == "same":
        out = tuple(-(-n // si) for n, si in zip(size, s))
        total = [max((o - 1) * si + di * (k - 1) + 1 - n, 0) for o, si, di, k, n in zip(out, s, d, kernel, size)]
        before = [t // 2 for t in total]
    else:
        before = pair(padding)
        out = tuple((n + 2 * p - di * (k - 1) - 1) // si + 1 for n, p, di, k, si in zip(size, before, d, kernel, s))
    y, w = np.zeros((len(x), *out, w.shape[3])), blocks(w, groups)
    for i, j, a, b_, row, column in taps(size, kernel, out, s, d, before):
        y[:, i, j] += x[:, row, column] @ w[a, b_]
    return y + b


@oracle
def conv_transpose2d(
    x: Any,
    w: Any,
    b: Any = 0.0,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    s, d, p, extra = pair(stride), pair(dilation), pair(padding), pair(output_padding)
    size = tuple(
        (n - 1) * si - 2 * pi + di * (k - 1) + 1 + e
        for n, si, pi, di, k, e in zip(x.shape[1:3], s, p, d, w.shape, extra)
    )
    w = blocks(w, groups)  # (kh, kw, O, C)
    y = np.zeros((len(x), *size, w.shape[2]))
    for i, j, a, b_, row, column in taps(size, w.shape[:2], x.shape[1:3], s, d, p):
        y[:, row, column] += x[:, i, j] @ w[a, b_].T
    return y + b


@oracle
def conv1d(x: Any, w: Any, b: Any = 0.0, stride: int = 1, padding: Any = 0, dilation: int = 1, groups: int = 1) -> Any:
    sides = padding if padding == "same" else (0, padding)
    return conv2d(x[:, None], w[None], b, (1, stride), sides, (1, dilation), groups)[:, 0]


def geometry_taps(geometry: Any) -> Any:
    before = [p[0] for p in geometry.padding]
    return taps(geometry.size, geometry.kernel, geometry.out, geometry.stride, geometry.dilation, before)


@oracle
def conv2d_p(x: Any, w: Any, bias: Any, geometry: Any) -> Any:
    y, w = np.zeros((len(x), *geometry.out, w.shape[3])), blocks(w, geometry.groups)
    for i, j, a, b, row, column in geometry_taps(geometry):
        y[:, i, j] += x[:, row, column] @ w[a, b]
    return y if bias is None else y + bias


@oracle
def conv2d_input_grad(y: Any, w: Any, bias: Any, geometry: Any) -> Any:
    w = blocks(w, geometry.groups)
    x = np.zeros((len(y), *geometry.size, w.shape[2]))
    for i, j, a, b, row, column in geometry_taps(geometry):
        x[:, row, column] += y[:, i, j] @ w[a, b].T
    return x if bias is None else x + bias


@oracle
def conv2d_weight_grad(x: Any, y: Any, geometry: Any) -> Any:
    c, o, groups = x.shape[3], y.shape[3], geometry.groups
    full = np.zeros((*geometry.kernel, c, o))
    for i, j, a, b, row, column in geometry_taps(geometry):
        full[a, b] += x[:, row, column].T @ y[:, i, j]
    full = full.reshape(*geometry.kernel, groups, c // groups, groups, o // groups)
    return np.concatenate([full[:, :, g, :, g] for g in range(groups)], axis=-1)


def pool(x: Any, kernel: Any, stride: Any, padding: Any, fill: float, reduce: Any) -> Any:
    k, p = pair(kernel), pair(padding)
    s = k if stride is None else pair(stride)
    x = np.pad(x, ((0, 0), (p[0], p[0]), (p[1], p[1]), (0, 0)), constant_values=fill)
    out = [(n - ki) // si + 1 for n, ki, si in zip(x.shape[1:3], k, s)]
    y = np.zeros((len(x), *out, x.shape[3]))
    for i, j in itertools.product(*map(range, out)):
        y[:, i, j] = reduce(x[:, s[0] * i : s[0] * i + k[0], s[1] * j : s[1] * j + k[1]], axis=(1, 2))
    return y


ORACLES["max_pool2d"] = lambda x, kernel, stride=None, padding=0: pool(x, kernel, stride, padding, -np.inf, np.max)
ORACLES["avg_pool2d"] = lambda x, kernel, stride=None, padding=0: pool(x, kernel, stride, padding, 0.0, np.mean)
ORACLES["upsample_nearest2d"] = lambda x, scale=2: x.repeat(pair(scale)[0], axis=1).repeat(pair(scale)[1], axis=2)


# ---------------------------------------------------------------- norms, attention, losses


def standardized(x: Any, axes: Any, eps: float) -> Any:
    return (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + eps)


def everywhere(p: Any, x: Any) -> Any:
    """A number, (C,), or one row per sample, (N, C), shaped to broadcast with x (N, ..., C)."""
    return p.reshape(len(p), *[1] * (x.ndim - 2), -1) if np.ndim(p) == 2 else p


def affine(y: Any, weight: Any, bias: Any, silu: bool) -> Any:
    y = y if weight is None else y * everywhere(weight, y) + everywhere(bias, y)
    return y / (1 + np.exp(-y)) if silu else y


@oracle
def normalize(x: Any, weight: Any, bias: Any, axes: Any, eps: float) -> Any:
    y = standardized(x, axes, eps)
    return y if weight is None else y * weight + bias


@oracle
def group_norm(
    x: Any, weight: Any = None, bias: Any = None, shift: Any = 0, *, groups: int, eps: float = 1e-5, silu: bool = False
) -> Any:
    y, size = np.zeros(x.shape), x.shape[-1] // groups
    x = x + everywhere(0 if shift is None else shift, x)
    for n, g in itertools.product(range(len(x)), range(groups)):
        part = (n, ..., slice(g * size, (g + 1) * size))
        y[part] = standardized(x[part], None, eps)
    return affine(y, weight, bias, silu)


ORACLES["shift_normalize_silu"] = lambda x, shift, weight, bias, **options: group_norm(
    x, weight, bias, shift, **options
)


@oracle
def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> Any:
    return affine(standardized(x, tuple(range(x.ndim - 1)), eps), weight, bias, False)


ORACLES["layer_norm"] = lambda x, weight=1.0, bias=0.0, eps=1e-5: standardized(x, -1, eps) * weight + bias


@oracle
def attention(q: Any, k: Any, v: Any, mask: Any = None, scale: Any = None) -> Any:
    s = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        s = np.where(mask, s, -np.inf) if mask.dtype == bool else s + mask
    return softmax(s) @ v


ORACLES["scaled_dot_product_attention"] = attention


def reduced(losses: Any, reduction: str) -> Any:
    return {"none": lambda x: x, "mean": np.mean, "sum": np.sum}[reduction](losses)


@oracle
def cross_entropy(logits: Any, labels: Any, reduction: str = "mean") -> Any:
    p = softmax(logits)
    return reduced(
        np.array([-np.log(p[i][labels[i]]) for i in np.ndindex(*labels.shape)]).reshape(labels.shape), reduction
    )


@oracle
def binary_cross_entropy_with_logits(logits: Any, target: Any, reduction: str = "mean") -> Any:
    p = 1 / (1 + np.exp(-logits))
    return reduced(-target * np.log(p) - (1 - target) * np.log(1 - p), reduction)


ORACLES["mse_loss"] = lambda x, y, reduction="mean": reduced((x - y) ** 2, reduction)


@oracle
def dropout(x: Any, p: float, rng: Rng) -> Any:
    """Of another generator nothing could be expected; what makes a good one is tested in test_rng.py."""
    return np.where(backend.to_host(Rng(rng.seed).uniform(x.shape)) < p, 0, x / (1 - p))
