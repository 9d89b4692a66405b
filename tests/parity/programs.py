"""Random programs, in tinydiff and in PyTorch: python tests/parity/programs.py --count 20000

A program starts from a few leaves of random shapes (also without elements), applies random ops to random earlier
results, and weighs all that it has computed into one number. The value, the gradient by every leaf, and the gradient of
the gradient's square must agree, in float64. A program is a function of its seed, so a failure can be run again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tinydiff as td
from tinydiff import ops

Draw = np.random.Generator
Pair = tuple[Any, Any]  # the same value in tinydiff and in PyTorch


class DoesNotFit(Exception):
    """This op cannot take these shapes."""


def need(condition: bool) -> None:
    if not condition:
        raise DoesNotFit


# ---------------------------------------------------------------- the ops, one function of both libraries each


def elementwise(mine: Callable[[Any], Any], theirs: Callable[[Any], Any]) -> Callable[..., Pair]:
    return lambda draw, x: (mine(x[0]), theirs(x[1]))


UNARY: list[Callable[..., Pair]] = [
    elementwise(f, g)
    for f, g in (
        (ops.sin, torch.sin),
        (ops.cos, torch.cos),
        (ops.tanh, torch.tanh),
        (ops.sigmoid, torch.sigmoid),
        (ops.silu, F.silu),
        (ops.gelu, F.gelu),
        (lambda x: ops.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (ops.softplus, F.softplus),
        (ops.relu, F.relu),
        (ops.abs, torch.abs),
        (ops.square, torch.square),
        (ops.erf, torch.erf),
        (lambda x: ops.exp(ops.tanh(x)), lambda x: torch.exp(torch.tanh(x))),
        (lambda x: ops.expm1(ops.sin(x)), lambda x: torch.expm1(torch.sin(x))),
        (lambda x: ops.log(x * x + 0.5), lambda x: torch.log(x * x + 0.5)),
        (lambda x: ops.log1p(x * x), lambda x: torch.log1p(x * x)),
        (lambda x: ops.sqrt(x * x + 0.5), lambda x: torch.sqrt(x * x + 0.5)),
        (lambda x: (x * x + 0.5) ** 1.3, lambda x: (x * x + 0.5) ** 1.3),
        (lambda x: ops.clip(x, low=-0.7, high=0.9), lambda x: torch.clamp(x, -0.7, 0.9)),
        (lambda x: -x * 0.5 + 1, lambda x: -x * 0.5 + 1),
        (lambda x: td.checkpoint(ops.tanh, x), torch.tanh),
    )
]


def binary(mine: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Pair]:
    def apply(draw: Draw, x: Pair, y: Pair) -> Pair:
        try:
            np.broadcast_shapes(x[0].shape, y[0].shape)
        except ValueError:
            raise DoesNotFit from None
        return mine(x[0], y[0]), theirs(x[1], y[1])

    return apply


def matmul(draw: Draw, x: Pair, y: Pair) -> Pair:
    a, b = x[0].shape, y[0].shape
    need(len(a) > 0 and len(b) > 0 and a[-1] == b[-2 if len(b) > 1 else 0])
    need(all(m == n or 1 in (m, n) for m, n in zip(a[-3::-1], b[-3::-1])))
    return x[0] @ y[0], x[1] @ y[1]


def einsum(draw: Draw, x: Pair, y: Pair) -> Pair:
    need(x[0].ndim == 2 and y[0].ndim == 2 and x[0].shape[0] == y[0].shape[0])
    subscripts = str(draw.choice(["ij,ik->jk", "ij,ik->j", "ij,ik->kji", "ij,ik->"]))
    return ops.einsum(subscripts, x[0], y[0]), torch.einsum(subscripts, x[1], y[1])


BINARY: list[Callable[..., Pair]] = [
    *(
        binary(f, g)
        for f, g in (
            (lambda x, y: x + y, lambda x, y: x + y),
            (lambda x, y: x - y, lambda x, y: x - y),
            (lambda x, y: x * y, lambda x, y: x * y),
            (lambda x, y: x / (y * y + 0.5), lambda x, y: x / (y * y + 0.5)),
            (lambda x, y: (x * x + 0.5) ** ops.tanh(y), lambda x, y: (x * x + 0.5) ** torch.tanh(y)),
            (ops.maximum, torch.maximum),
            (ops.minimum, torch.minimum),
            (lambda x, y: ops.where(x.data > y.data, x, y), lambda x, y: torch.where(x > y, x, y)),
        )
    ),
    matmul,
    einsum,
]


def an_axis(draw: Draw, x: Pair) -> int:
    need(x[0].ndim > 0)
    return int(draw.integers(-x[0].ndim, x[0].ndim))


def reduction(draw: Draw, x: Pair) -> Pair:
    axis, keepdims = an_axis(draw, x), bool(draw.integers(2))
    which = str(
        draw.choice(["sum", "mean", "var", "max", "min", "logsumexp", "prod", "cumsum", "softmax", "log_softmax"])
    )
    if which in ("mean", "max", "min", "var", "logsumexp"):  # of nothing they are NaN, infinite, or an error
        need(x[0].shape[axis] > (which == "var"))
    mine = getattr(ops, which)
    if which in ("cumsum", "softmax", "log_softmax"):
        return mine(x[0], axis=axis), getattr(torch, which)(x[1], axis)
    if which == "var":
        return mine(x[0], axis=axis, keepdims=keepdims), torch.var(x[1], axis, correction=0, keepdim=keepdims)
    theirs = getattr(torch, {"max": "amax", "min": "amin"}.get(which, which))
    return mine(x[0], axis=axis, keepdims=keepdims), theirs(x[1], axis, keepdim=keepdims)


def reshape(draw: Draw, x: Pair) -> Pair:
    which = int(draw.integers(7))
    if which == 0:
        shape = (x[0].size,) if x[0].size % 2 else (2, x[0].size // 2)
        return ops.reshape(x[0], shape=shape), x[1].reshape(shape)
    if which == 1:
        axes = tuple(int(a) for a in draw.permutation(x[0].ndim))
        return ops.transpose(x[0], axes=axes), x[1].permute(axes)
    axis = an_axis(draw, x)
    if which == 2:
        return ops.flip(x[0], axis=axis), torch.flip(x[1], (axis,))
    if which == 3:
        return ops.roll(x[0], shift=2, axis=axis), torch.roll(x[1], 2, axis)
    if which == 4:
        return ops.expand_dims(x[0], axis=axis), x[1].unsqueeze(axis if axis >= 0 else axis)
    if which == 5:
        pairs = [tuple(int(n) for n in draw.integers(0, 3, 2)) for _ in range(x[0].ndim)]
        flat = [n for pair in reversed(pairs) for n in pair]
        return ops.pad(x[0], pad_width=pairs, value=0.3), F.pad(x[1], flat, value=0.3)
    n = x[0].shape[axis]
    need(n > 1)
    return ops.concatenate(ops.split(x[0], [1], axis=axis)[::-1], axis=axis), torch.cat(
        list(reversed(torch.split(x[1], [1, n - 1], axis))), axis
    )


def index(draw: Draw, x: Pair) -> Pair:
    need(x[0].ndim > 0 and x[0].shape[0] > 0)
    which = int(draw.integers(4))
    if which == 0:
        return x[0][0], x[1][0]
    if which == 1:
        return x[0][..., 1::2], x[1][..., 1::2]
    picked = draw.integers(0, x[0].shape[0], 3)
    if which == 2:  # a row may be picked twice
        return x[0][td.backend.to_device(picked)], x[1][torch.from_numpy(picked)]
    mask = x[0].numpy() > 0
    return x[0][td.backend.to_device(mask)], x[1][torch.from_numpy(mask)]


def concatenate(draw: Draw, x: Pair, y: Pair) -> Pair:
    axis = an_axis(draw, x)
    rest = [[n for a, n in enumerate(p[0].shape) if a != axis % x[0].ndim] for p in (x, y)]
    need(x[0].ndim == y[0].ndim and rest[0] == rest[1])
    return ops.concatenate([x[0], y[0], x[0]], axis=axis), torch.cat([x[1], y[1], x[1]], axis)


# ---------------------------------------------------------------- layers, with parameters of their own as new leaves


def leaf(draw: Draw, *shape: int) -> Pair:
    a = draw.normal(size=shape)
    return td.tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)


class Contiguous(torch.autograd.Function):
    """x, and its gradients of any order, in contiguous memory, which PyTorch's convolutions insist on."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.contiguous()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return Contiguous.apply(g)


def layer(draw: Draw, x: Pair) -> tuple[Any, ...]:
    """(tinydiff, PyTorch, new leaves)"""
    which = str(
        draw.choice(["linear", "layer_norm", "group_norm", "conv2d", "conv_transpose2d", "attention", "batch_norm"])
    )
    mine, theirs = x
    need(mine.ndim > 0 and 0 < mine.size < 4000)
    c = mine.shape[-1]
    if which == "linear":
        w, b = leaf(draw, c, 3), leaf(draw, 3)
        return ops.matmul(mine, w[0]) + b[0], theirs @ w[1] + b[1], [w, b]
    w, b = leaf(draw, c), leaf(draw, c)
    if which == "layer_norm":
        return ops.layer_norm(mine, w[0], b[0], eps=0.1), F.layer_norm(theirs, (c,), w[1], b[1], 0.1), [w, b]
    if which == "batch_norm":
        need(mine.ndim >= 2)
        need(math.prod(mine.shape[:-1]) > 1)
        # In plain operations: F.batch_norm of PyTorch 2.13 gives a wrong gradient for some strides of its input.
        axes = tuple(range(mine.ndim - 1))
        centred = theirs - theirs.mean(axes)
        y = centred / torch.sqrt((centred * centred).mean(axes) + 0.1) * w[1] + b[1]
        return ops.batch_norm(mine, w[0], b[0], eps=0.1), y, [w, b]
    if which == "group_norm":
        need(mine.ndim >= 2 and math.prod(mine.shape[1:]) > 1)
        groups, silu = (2 if c % 2 == 0 else 1), bool(draw.integers(2))
        need(math.prod(mine.shape[1:]) // groups > 1)
        y = F.group_norm(theirs.movedim(-1, 1), groups, w[1], b[1], 0.1).movedim(1, -1)
        return ops.group_norm(mine, w[0], b[0], groups=groups, eps=0.1, silu=silu), F.silu(y) if silu else y, [w, b]
    if which == "attention":
        need(mine.ndim >= 2)
        k, mask = leaf(draw, *mine.shape[:-2], 4, c), draw.normal(size=(mine.shape[-2], 4)) > -0.5
        mask[:, 0] = True  # a row without keys is NaN in both
        with sdpa_kernel(SDPBackend.MATH):  # the one that PyTorch can differentiate twice
            y = F.scaled_dot_product_attention(theirs, k[1], k[1], attn_mask=torch.from_numpy(mask))
        return ops.attention(mine, k[0], k[0], mask=td.backend.to_device(mask)), y, [k]
    need(mine.ndim == 4)
    stride, padding, dilation = (int(n) for n in (draw.integers(1, 3), draw.integers(0, 3), draw.integers(1, 3)))
    groups = 2 if c % 2 == 0 and draw.integers(2) else 1
    images = Contiguous.apply(theirs.permute(0, 3, 1, 2))
    if which == "conv2d":
        kernel = leaf(draw, 2, 3, c // groups, 2)
        size = [n + 2 * padding - dilation * (k - 1) for n, k in zip(mine.shape[1:3], (2, 3))]
        need(min(size) >= 1)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        y = F.conv2d(images, Contiguous.apply(kernel[1].permute(3, 2, 0, 1)), None, **options)
        return ops.conv2d(mine, kernel[0], **options), y.permute(0, 2, 3, 1), [kernel]
    kernel = leaf(draw, 3, 2, 2, c)  # (kh, kw, out / groups, in)
    size = [(n - 1) * stride - 2 * padding + dilation * (k - 1) + 1 for n, k in zip(mine.shape[1:3], (3, 2))]
    need(min(size) >= 1)
    w = Contiguous.apply(kernel[1].permute(3, 2, 0, 1))
    y = F.conv_transpose2d(images, w, None, stride, padding, 0, groups, dilation)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return ops.conv_transpose2d(mine, kernel[0], **options), y.permute(0, 2, 3, 1), [kernel]


# ---------------------------------------------------------------- programs

STEPS: list[tuple[list[Callable[..., Any]], int, float]] = [  # (ops, operands, probability)
    (UNARY, 1, 0.3),
    ([*BINARY, concatenate], 2, 0.3),
    ([reduction], 1, 0.1),
    ([reshape, index], 1, 0.15),
    ([layer], 1, 0.15),
]


def shape_of(draw: Draw) -> tuple[int, ...]:
    rank = int(draw.choice([0, 1, 2, 3, 4], p=[0.1, 0.2, 0.3, 0.15, 0.25]))
    return tuple(int(n) for n in draw.choice([0, 1, 2, 3, 4, 5], rank, p=[0.03, 0.17, 0.2, 0.3, 0.2, 0.1]))


def program(seed: int, length: int = 8) -> tuple[list[Pair], list[Pair]]:
    """(the leaves, all results) of a program."""
    draw = np.random.default_rng(seed)
    leaves = [leaf(draw, *shape_of(draw)) for _ in range(3)]
    values, made = list(leaves), []
    while len(made) < length:
        choices, operands, _ = STEPS[draw.choice(len(STEPS), p=[p for *_, p in STEPS])]
        step = choices[draw.integers(len(choices))]
        picked = [values[draw.integers(len(values))] for _ in range(operands)]
        try:
            mine, theirs, *rest = step(draw, *picked)
        except DoesNotFit:
            leaves.append(leaf(draw, *shape_of(draw)))
            values.append(leaves[-1])
            if len(leaves) > 40:
                break
            continue
        if theirs.numel() > 5000:
            continue
        if theirs.numel() and float(theirs.detach().abs().max()) > 20:  # or the numbers would grow without end
            mine, theirs = mine * 0.01, theirs * 0.01
        leaves += rest[0] if rest else []
        values.append((mine, theirs))
        made.append((mine, theirs))
    return leaves, made


def disagreement(seed: int) -> str | None:
    """What differs, or None."""
    leaves, made = program(seed)
    draw = np.random.default_rng((seed, 1))
    mine, theirs = td.tensor(0.0, dtype="float64"), torch.zeros((), dtype=torch.float64)
    for x, y in made:
        if x.shape != tuple(y.shape):
            return f"shape {x.shape}, not {tuple(y.shape)}"
        w = draw.normal(size=x.shape)
        mine, theirs = mine + (x * td.backend.to_device(w)).sum(), theirs + (y * torch.from_numpy(np.asarray(w))).sum()
    if message := differs("value", mine, theirs):
        return message
    if not mine.requires_grad:
        return None if not theirs.requires_grad else "no gradient"
    xs, ys = zip(*leaves)
    fast, ours = td.grad(mine, xs), td.grad(mine, xs, create_graph=True)  # with create_graph the rules of the pages run
    others = gradients(theirs, ys)
    for i, (f, g, h) in enumerate(zip(fast, ours, others)):
        if message := differs(f"gradient {i} of {len(xs)}", f, h) or differs(
            f"recorded gradient {i} of {len(xs)}", g, h
        ):
            return message
    # The gradient of the gradient's square.
    mine, theirs = sum((g * g).sum() for g in ours), sum((h * h).sum() for h in others)
    if not (isinstance(mine, td.Tensor) and mine.requires_grad and theirs.requires_grad):
        return None
    for i, (g, h) in enumerate(zip(td.grad(mine * 0.1, xs), gradients(theirs * 0.1, ys))):
        if message := differs(f"second gradient {i} of {len(xs)}", g, h):
            return message
    return None


def gradients(y: Any, xs: Any) -> list[Any]:
    found = torch.autograd.grad(y, xs, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, found)]


def differs(what: str, x: Any, y: Any) -> str | None:
    a, b = x.numpy(), y.numpy(force=True)
    if a.shape != b.shape:
        return f"{what}: shape {a.shape}, not {b.shape}"
    scale = max(1.0, float(np.abs(b).max(initial=0.0)))
    if not np.allclose(a, b, rtol=1e-8, atol=1e-9 * scale, equal_nan=True):
        return f"{what}: {np.abs(a - b).max():.3g} apart, of {scale:.3g}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/parity/programs.py", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="programs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    start, wrong = time.monotonic(), 0
    for seed in range(args.seed, args.seed + args.count):
        try:
            message = disagreement(seed)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        if message:
            wrong += 1
            print(f"program {seed}: {message}", flush=True)
        if (done := seed + 1 - args.seed) % 500 == 0:
            print(f"{done} programs, {wrong} disagree, {time.monotonic() - start:.0f} s", flush=True)
    fast = td.backend.active().fast or "none"
    print(f"{args.count} programs, fast versions: {fast}, {wrong} disagree, {time.monotonic() - start:.0f} s")
    return wrong > 0


if __name__ == "__main__":
    raise SystemExit(main())
