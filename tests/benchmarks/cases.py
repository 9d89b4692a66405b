"""Every case: what is run, its size, its rivals, and the aim for the ratio."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fresh
import numpy as np
import ours
from measure import Case, Run, Unavailable

from tinydiff import backend, ops


@dataclass(frozen=True)
class Options:
    threads: int
    compiled: bool  # a column for torch.compile

    @property
    def gpu(self) -> bool:
        return backend.name == "cupy"

    @property
    def columns(self) -> list[str]:
        """Of PyTorch, run eagerly."""
        return ["torch", "torch channels_last"]


def cases(options: Options) -> Iterator[Case]:
    yield from training_steps(options)
    yield from sampling(options)
    yield from single_ops(options)
    yield from tiny_ops()
    yield imports()
    if not options.gpu:  # a GPU has no threads to count, and memory of its own
        yield from scaling()
        yield from memory(options)


def torch_side() -> Any:
    """theirs.py; it imports PyTorch, which the suite does not need."""
    if importlib.util.find_spec("torch") is None:
        raise Unavailable("PyTorch is not installed")
    import theirs

    return theirs


# ---------------------------------------------------------------- whole nets


def rivals(
    options: Options, mine: Callable[[bool], Run], their: Callable[[Any, Any, bool], Run]
) -> dict[str, Callable[[], Run]]:
    """tinydiff, PyTorch in both memory formats, and, where they are asked for, compiled or as one CUDA graph.
    mine(captured) -> run; their(theirs.py, memory format, compiled) -> run"""

    def torch_run(column: str, compiled: bool = False) -> Run:
        side = torch_side()
        return their(side, side.FORMATS[column], compiled)

    found: dict[str, Callable[[], Run]] = {"tinydiff": lambda: mine(False)}
    if options.gpu:
        found["tinydiff captured"] = lambda: mine(True)
    for column in options.columns:
        found[column] = lambda column=column: torch_run(column)
        if options.gpu:
            found[f"{column} captured"] = lambda column=column: torch_side().captured(torch_run(column))
    if options.compiled:
        found["torch compiled"] = lambda: torch_run("torch", compiled=True)
    return found


def training_steps(options: Options) -> Iterator[Case]:
    sizes = (256, 2048) if options.gpu else (64, 256, 1024)
    for name in ("concat", "add", "conditional", "quickstart", "autoencoder", "latent"):
        for n in (256,) if name in ("autoencoder", "latent") else sizes:
            yield Case(
                f"step/{name}/{n}",
                rivals(
                    options,
                    lambda captured, name=name, n=n: ours.training_step(name, n, options.threads, captured),
                    lambda side, form, compiled, name=name, n=n: side.training_step(name, n, form, compiled),
                ),
                ours=("tinydiff", "tinydiff captured"),
                goal=step_goal(options, name, n),
            )


def step_goal(options: Options, name: str, n: int) -> float | None:
    if options.gpu:
        return 0.8
    if n != 256:
        return 0.65 if n == 64 else 0.45
    return {"concat": 0.5, "add": 0.55, "conditional": 0.6, "quickstart": 0.65, "autoencoder": 0.7, "latent": 1.0}[name]


def sampling(options: Options) -> Iterator[Case]:
    for name in ("euler_maruyama", "heun"):
        yield Case(
            f"sample/{name}/64",
            rivals(
                options,
                lambda captured, name=name: ours.sampler(name, 64, 20, options.threads, captured),
                lambda side, form, compiled, name=name: side.sampler(name, 64, 20, form, compiled),
            ),
            ours=("tinydiff", "tinydiff captured"),
            goal=0.8 if options.gpu else 0.5 if name == "euler_maruyama" else 0.6,
        )


def scaling() -> Iterator[Case]:
    """Time per sample of the concat net's training step."""
    for threads in (1, 2):
        for n in (1, 4, 16, 64, 256, 1024, 4096):

            def their(column: str, n: int = n, threads: int = threads) -> Run:
                side = torch_side()
                step = side.training_step("concat", n, side.FORMATS[column])

                def run() -> None:
                    side.torch.set_num_threads(threads)
                    step()

                return run

            yield Case(
                f"scaling/{threads} thread{'s' * (threads > 1)}/{n}",
                {"tinydiff": lambda n=n, threads=threads: ours.training_step("concat", n, threads),
                 "torch": lambda f=their: f("torch"), "torch channels_last": lambda f=their: f("torch channels_last")},
                per=n,
                threads=threads,
            )  # fmt: skip


def memory(options: Options) -> Iterator[Case]:
    for n in (64, 256, 1024, 4096):
        yield Case(
            f"memory/concat/{n}",
            {
                rival: lambda rival=rival, n=n: fresh.in_fresh_process(
                    "memory", rival, "concat", str(n), str(options.threads)
                )
                for rival in ("tinydiff", *options.columns)
            },
            unit="MiB",
            reports=True,
            rounds=3,
            goal=0.13 if n == 1024 else None,
        )


def imports() -> Case:
    modules = ("tinydiff", "numpy", "torch")
    return Case(
        "import/time",
        {m: lambda m=m: fresh.in_fresh_process("import", m) for m in modules},
        reports=True,
    )


# ---------------------------------------------------------------- single ops


@dataclass(frozen=True)
class Op:
    """One op on one set of shapes."""

    name: str
    mine: Callable[..., Any]
    their: Callable[[Any], Callable[..., Any]]  # torch.nn.functional -> op
    shapes: list[tuple[int, ...]]  # of the inputs, as tinydiff takes them
    batched: int = 1  # how many of them have the batch as their first axis
    images: bool = False  # channels last here, and first in PyTorch
    goal: float | None = 0.7

    @property
    def batch(self) -> int:
        return self.shapes[0][0]

    def inputs(self, n: int) -> list[np.ndarray]:
        return [normal(n, *shape[1:]) if i < self.batched else normal(*shape) for i, shape in enumerate(self.shapes)]

    def their_inputs(self, n: int) -> list[np.ndarray]:
        """Images (N, H, W, C) -> (N, C, H, W), weights (kh, kw, in, out) -> (out, in, kh, kw)."""
        inputs = self.inputs(n)
        if not self.images:
            return inputs
        orders = [(0, 3, 1, 2) if i < self.batched else (3, 2, 0, 1) for i in range(len(inputs))]
        return [a.transpose(order) if a.ndim == 4 else a for a, order in zip(inputs, orders)]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


N = 256  # images: the batch of the training steps
CONV = [  # H = W, channels in, out, kernel, stride, padding, groups
    (28, 1, 32, 3, 1, 0, 1),  # the tutorial's first
    (26, 32, 64, 3, 2, 0, 1),  # and its second
    (12, 64, 128, 3, 2, 0, 1),
    (14, 32, 32, 3, 1, 1, 1),  # the quickstart's residual blocks
    (14, 64, 32, 1, 1, 0, 1),  # its shortcut
    (14, 32, 64, 2, 2, 0, 1),  # its way down
    (8, 256, 256, 3, 1, 1, 1),  # large channels
    (14, 64, 64, 3, 1, 1, 4),  # groups
]
TRANSPOSED = [  # H = W, channels in, out, kernel, stride, output padding
    (5, 256, 64, 3, 2, 1),  # the tutorial's way up, with concatenated skips
    (12, 128, 32, 3, 2, 1),
    (26, 64, 1, 3, 1, 0),
    (7, 64, 32, 2, 2, 0),  # the quickstart's
]
NORM = [(26, 32, 4), (12, 64, 32), (5, 128, 32), (14, 32, 8)]  # H = W, channels, groups
ATTENTION = [(N, 1, 49, 64), (N, 1, 25, 128), (16, 4, 256, 32)]  # images, heads, tokens, width


def all_ops() -> Iterator[Op]:
    for size, inside, outside, k, stride, padding, groups in CONV:
        yield Op(
            f"conv2d/{inside}-{outside} on {size}x{size}, {k}x{k}"
            + f", stride {stride}" * (stride > 1) + ", padded" * (padding > 0) + f", groups {groups}" * (groups > 1),
            lambda x, w, b, s=stride, p=padding, g=groups: ops.conv2d(x, w, b, stride=s, padding=p, groups=g),
            lambda F, s=stride, p=padding, g=groups: lambda x, w, b: F.conv2d(x, w, b, s, p, groups=g),
            [(N, size, size, inside), (k, k, inside // groups, outside), (outside,)],
            images=True,
            goal=0.8,
        )  # fmt: skip
    for size, inside, outside, k, stride, extra in TRANSPOSED:
        yield Op(
            f"conv_transpose2d/{inside}-{outside} on {size}x{size}, {k}x{k}" + f", stride {stride}" * (stride > 1),
            lambda x, w, b, s=stride, e=extra: ops.conv_transpose2d(x, w, b, stride=s, output_padding=e),
            lambda F, s=stride, e=extra: lambda x, w, b: F.conv_transpose2d(x, w, b, s, output_padding=e),
            [(N, size, size, inside), (k, k, outside, inside), (outside,)],
            images=True,
            goal=0.6,
        )
    for size, channels, groups in NORM:
        yield Op(
            f"group_norm+silu/{channels} on {size}x{size}, groups {groups}",
            lambda x, w, b, g=groups: ours.group_norm_silu(x, w, b, g),
            lambda F, g=groups: lambda x, w, b: F.silu(F.group_norm(x, g, w, b)),
            [(N, size, size, channels), (channels,), (channels,)],
            images=True,
        )
    for shape in ATTENTION:
        n, heads, tokens, width = shape
        yield Op(
            f"attention/{n} x {heads} heads, {tokens} tokens, width {width}",
            ops.attention,
            lambda F: F.scaled_dot_product_attention,
            [shape] * 3,
            batched=3,
            goal=0.6,
        )
    yield Op(
        "softmax/4096 x 256",
        lambda x: ops.softmax(x, axis=-1),
        lambda F: lambda x: F.softmax(x, -1),
        [(4096, 256)],
    )
    yield Op(
        f"layer_norm/{N} x 25 x 128",
        ops.layer_norm,
        lambda F: lambda x, w, b: F.layer_norm(x, (128,), w, b),
        [(N, 25, 128), (128,), (128,)],
    )


def single_ops(options: Options) -> Iterator[Case]:
    for op in all_ops():
        # the batch in as many microbatches as a training step has at 256: four
        size = op.batch // 4

        def mine(size: int | None, op: Op = op) -> Run:
            return ours.single_op(op.mine, op.inputs(op.batch), op.batched, options.threads, size)

        def their(column: str, op: Op = op) -> Run:
            side = torch_side()
            return side.single_op(op.their(side.F), op.their_inputs(op.batch), side.FORMATS[column])

        yield Case(
            op.name,
            {
                "tinydiff": lambda f=mine, size=size: f(size),
                "tinydiff plain call": lambda f=mine: f(None),
                **{c: lambda f=their, c=c: f(c) for c in options.columns[: 1 + op.images]},
            },
            ours=("tinydiff", "tinydiff plain call"),  # the better counts, as of PyTorch's formats
            goal=op.goal,
        )
    yield Case(
        "adam/concat",
        {
            "tinydiff": lambda: ours.adam_step("concat"),
            "torch": lambda: torch_side().adam_step("concat", fused=False),
            "torch fused": lambda: torch_side().adam_step("concat", fused=True),
        },
        goal=0.7,
    )


def tiny_ops() -> Iterator[Case]:
    length = 1000
    for which, all_inputs in (("gradient of x", False), ("gradients of x, w, b", True)):
        yield Case(
            f"tiny/x w + b on 4 numbers, {which}",
            {
                "tinydiff": lambda a=all_inputs: ours.chain(length, a),
                "torch": lambda a=all_inputs: torch_side().chain(length, a),
            },
            unit="us",
            per=2 * length,
            goal=1.0,
        )
