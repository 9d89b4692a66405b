"""PyTorch's side of each case, written with the same care: each in both memory formats, gradients set to None, its own
fused norm, attention and Adam, noise drawn by PyTorch on its device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ours
import torch
from measure import Run, Unavailable

from tinydiff import backend

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))  # where the twins of the nets are

import twins  # noqa: E402

F = torch.nn.functional
DEVICE = "cuda" if backend.name == "cupy" else "cpu"
FORMATS = {"torch": torch.contiguous_format, "torch channels_last": torch.channels_last}


def settings(threads: int) -> None:
    """As many threads as tinydiff; TF32 on a GPU, as for tinydiff."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- training steps and sampling


def net_of(name: str) -> Any:
    torch.manual_seed(0)
    makers: dict[str, Callable[[], Any]] = {
        "concat": lambda: twins.ScoreUNet("concat"),
        "add": lambda: twins.ScoreUNet("add"),
        "conditional": twins.ConditionalUNet,
        "latent": twins.LatentUNet,
        "autoencoder": twins.Autoencoder,
        "quickstart": lambda: twins.Denoiser(
            twins.UNet(ours.QUICKSTART_CHANNELS, ours.QUICKSTART_LABELS), ours.SIGMA_DATA
        ),
    }
    return makers[name]().to(DEVICE)


def batch_of(name: str, n: int, memory_format: Any) -> tuple[Any, ...]:
    """The images (channels first, in this memory format) and labels that tinydiff gets."""
    images, *labels = ours.batch_of(name, n)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    return x.to(DEVICE), *(torch.from_numpy(values).to(DEVICE) for values in labels)


def draw(name: str, x0: Any) -> tuple[Any, ...]:
    """The random numbers of one loss: what `loss` is given after the batch."""
    n = len(x0)
    if name == "autoencoder":
        return ()
    if name == "quickstart":  # of which one is for all labels, and one for each
        u = torch.rand(n, 1 + len(ours.QUICKSTART_LABELS), device=DEVICE)
        return u, torch.randn(n, device=DEVICE), torch.randn_like(x0)
    return torch.rand(n, device=DEVICE), torch.randn_like(x0)


def loss(name: str, net: Any, batch: tuple[Any, ...], draws: tuple[Any, ...]) -> Any:
    """The loss that tinydiff computes, from the same random numbers: uniform, (normal,) noise."""
    x0, *labels = batch
    if name == "autoencoder":
        return F.mse_loss(net(x0), x0)
    if name == "quickstart":
        u, e, z = draws
        all_out, some_out = u[:, :1] < ours.LABEL_DROPOUT, u[:, :1] < 2 * ours.LABEL_DROPOUT
        out = (all_out | (some_out & (u[:, 1:] < 0.5))).T
        condition = {label: torch.where(o, -1, v) for label, o, v in zip(ours.QUICKSTART_LABELS, out, labels)}
        sigma, sd = torch.exp(1.2 * e - 1.2), ours.SIGMA_DATA
        weight = ((sigma**2 + sd**2) / (sigma * sd) ** 2)[:, None, None, None]
        return (weight * (net(x0 + sigma[:, None, None, None] * z, sigma, condition) - x0).square()).mean()
    u, z = draws
    t = u * (1 - 1e-5) + 1e-5
    s = twins.std(t)[:, None, None, None]
    return (s * net(x0 + s * z, t, *labels) + z).square().sum() / len(x0)


def training_step(name: str, n: int, memory_format: Any, compiled: bool = False, net: Any = None) -> Run:
    """Loss, gradients and Adam."""
    net = (net or net_of(name)).to(memory_format=memory_format)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True, capturable=DEVICE == "cuda")
    batch = batch_of(name, n, memory_format)
    value = compile_or_say_why(loss) if compiled else loss

    def step() -> Any:
        adam.zero_grad(set_to_none=True)
        found = value(name, net, batch, draw(name, batch[0]))
        found.backward()
        adam.step()
        return found

    return step


def sampler(name: str, n: int, steps: int, memory_format: Any, compiled: bool = False) -> Run:
    """The same algorithms as tinydiff.diffusion.euler_maruyama and heun."""
    net = net_of("quickstart" if name == "heun" else "concat").to(memory_format=memory_format)
    x, *labels = batch_of("quickstart", n, memory_format)
    condition = dict(zip(ours.QUICKSTART_LABELS, labels))
    net = compile_or_say_why(net) if compiled else net

    def heun() -> Any:
        top, low = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
        levels = [(top + i / (steps - 1) * (low - top)) ** 7 for i in range(steps)] + [0.0]
        y = torch.randn_like(x) * levels[0]
        for sigma, following in zip(levels, levels[1:]):
            d_cur = (y - net(y, torch.full((n,), sigma, device=DEVICE), condition)) / sigma
            moved = y + (following - sigma) * d_cur
            if following > 0:
                d_prime = (moved - net(moved, torch.full((n,), following, device=DEVICE), condition)) / following
                moved = y + (following - sigma) / 2 * (d_cur + d_prime)
            y = moved
        return y

    def euler_maruyama() -> Any:
        h, std = (1 - 1e-3) / steps, ours.SDE.marginal_std
        y = torch.randn_like(x) * std(1.0)
        for i in range(steps):
            t = 1 - i * h
            g = 25.0**t
            score = net(y, torch.full((n,), t, device=DEVICE))
            y = y + g * g * h * score + g * h**0.5 * torch.randn_like(y)
        return y + std(1e-3) ** 2 * net(y, torch.full((n,), 1e-3, device=DEVICE))

    def run() -> Any:
        with torch.inference_mode():
            return heun() if name == "heun" else euler_maruyama()

    return run


def compile_or_say_why(function: Any) -> Any:
    """torch.compile, which compiles at the first call; if that fails, the case goes on without it."""
    torch.compiler.reset()  # else shapes of earlier cases count as recompilations, whose number is limited
    compiled = torch.compile(function)

    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except Exception as error:  # of many kinds: a missing compiler, an unsupported operation
            raise Unavailable(f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}") from error

    return call


def captured(run: Run) -> Run:
    """The run as one CUDA graph, after PyTorch's own recipe: warmed up on a side stream, then captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ---------------------------------------------------------------- single ops


def single_op(op: Callable[..., Any], inputs: Sequence[np.ndarray], memory_format: Any) -> Run:
    """Forward and backward, with the gradients of all inputs (in PyTorch's layouts already)."""
    xs = []
    for a in inputs:
        x = torch.from_numpy(np.ascontiguousarray(a)).to(DEVICE)
        xs.append((x.contiguous(memory_format=memory_format) if x.ndim == 4 else x).requires_grad_())
    g = torch.randn_like(op(*xs))
    return lambda: torch.autograd.grad(op(*xs), xs, g)


def adam_step(name: str, fused: bool) -> Run:
    net = net_of(name)
    for p in net.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    return torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused).step


def chain(length: int, all_inputs: bool) -> Run:
    x, w, b = (torch.full((4,), v, device=DEVICE) for v in (1.0, 0.999, 0.001))
    x.requires_grad_()
    if all_inputs:
        w.requires_grad_(), b.requires_grad_()

    def run() -> None:
        y = x
        for _ in range(length):
            y = y * w + b
        torch.autograd.grad(y.sum(), (x, w, b) if all_inputs else (x,))

    return run
