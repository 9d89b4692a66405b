"""tinydiff's side of each case, as a user would write it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from measure import Run

from tinydiff import Rng, Tensor, backend, grad, ops, optim, tensor
from tinydiff.backend import to_device, xp
from tinydiff.diffusion import VESDE, Denoiser, KarrasSDE, drop_labels, edm_loss, sample, score_matching_loss
from tinydiff.microbatch import blas_threads, gradients, microbatch_size, over_microbatches
from tinydiff.models import tutorial
from tinydiff.models.unet import UNet

SDE, KARRAS = VESDE(), KarrasSDE()
QUICKSTART_CHANNELS, QUICKSTART_LABELS = (32, 64), {"digit": 10, "face": 2, "weight": 2, "slant": 3}
SIGMA_DATA, LABEL_DROPOUT = 0.5, 0.1  # the spread of the images, and how often the labels are left out


def wait() -> None:
    """Wait until the device has done all its work."""
    if backend.name == "cupy":
        xp.cuda.get_current_stream().synchronize()


# ---------------------------------------------------------------- training steps and sampling


def batch_of(name: str, n: int) -> tuple[np.ndarray, ...]:
    """Host arrays, channels last: images, and labels where the net takes them."""
    rng = np.random.default_rng(0)
    images = rng.random((n, *((10, 10, 4) if name == "latent" else (28, 28, 1))), np.float32)
    classes = {"conditional": [10], "latent": [10], "quickstart": QUICKSTART_LABELS.values()}.get(name, [])
    return (images, *(rng.integers(0, c, n) for c in classes))


def net_of(name: str) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "concat": lambda: tutorial.ScoreUNet(SDE.marginal_std, rng=0),
        "add": lambda: tutorial.ScoreUNet(SDE.marginal_std, skips="add", rng=0),
        "conditional": lambda: tutorial.ConditionalUNet(SDE.marginal_std, rng=0),
        "latent": lambda: tutorial.LatentUNet(SDE.marginal_std, rng=0),
        "autoencoder": lambda: tutorial.Autoencoder(rng=0),
        "quickstart": lambda: Denoiser(UNet(1, QUICKSTART_CHANNELS, labels=QUICKSTART_LABELS, rng=0), SIGMA_DATA),
    }
    return makers[name]()


def loss_of(name: str, net: Any) -> Callable[..., Any]:
    """loss(*batch, rng, sample_offset) -> Tensor of shape ()"""

    def quickstart(x0: Any, *labels: Any, rng: Rng, sample_offset: int) -> Any:
        told = dict(zip(QUICKSTART_LABELS, labels))
        condition = drop_labels(told, LABEL_DROPOUT, rng, sample_offset=sample_offset)
        return edm_loss(net, x0, rng, sample_offset=sample_offset, **condition)

    def autoencoder(x0: Any, rng: Rng, sample_offset: int) -> Any:
        return ops.mse_loss(net(tensor(x0)), x0)

    def score(x0: Any, *labels: Any, rng: Rng, sample_offset: int) -> Any:
        condition = {"labels": labels[0]} if labels else {}
        return score_matching_loss(net, x0, SDE, rng, sample_offset=sample_offset, **condition)

    return {"quickstart": quickstart, "autoencoder": autoencoder}.get(name, score)


def training_step(name: str, n: int, threads: int, captured: bool = False, net: Any = None) -> Run:
    """Loss, gradients and Adam. The autoencoder has batch norm, so its batch is not divided."""
    net = net or net_of(name)
    loss, adam = loss_of(name, net), optim.Adam(net.parameters(), lr=1e-3)
    batch = [to_device(a) for a in batch_of(name, n)]
    size = n if name == "autoencoder" else None

    def step(rng: Rng) -> Any:
        value = gradients(loss, adam.parameters, batch, rng, size, threads)
        adam.step()
        return value

    return _with_new_noise(step, captured)


def sampler(name: str, n: int, steps: int, threads: int, captured: bool = False) -> Run:
    """n images, by Euler-Maruyama with the concat net or by Heun's method with the quickstart's."""
    net = net_of("quickstart" if name == "heun" else "concat")
    labels = {label: to_device(a) for label, a in zip(QUICKSTART_LABELS, batch_of("quickstart", n)[1:])}

    shape, parts = (n, 28, 28, 1), {"microbatch": microbatch_size(n), "threads": threads}

    def images(rng: Rng) -> Any:
        if name == "heun":  # `steps` noise levels above 0, as Karras et al. count
            return sample(net, shape, KARRAS, rng, method="heun", steps=steps - 1, eps=0.002, **labels, **parts)
        return sample(net, shape, SDE, rng, method="euler_maruyama", steps=steps, **parts)

    return _with_new_noise(images, captured)


def _with_new_noise(step: Callable[[Rng], Any], captured: bool) -> Run:
    """Each run of the step gets another source of random numbers; captured: the step is one CUDA graph."""
    noise, number = Rng(0), itertools.count()
    if captured:
        step = backend.capture(step)
    return lambda: step(noise.child(next(number)))


# ---------------------------------------------------------------- single ops


def group_norm_silu(x: Any, w: Any, b: Any, groups: int) -> Any:
    return ops.group_norm(x, w, b, groups=groups, silu=True)


def single_op(
    op: Callable[..., Any], inputs: Sequence[np.ndarray], batched: int, threads: int, size: int | None
) -> Run:
    """Forward and backward, with the gradients of all inputs. The first `batched` of them have the batch as their first
    axis, and go `size` rows at a time in each thread, as in a training step; the gradients of the others are added up.
    size: None is one plain call. It returns the gradients that are added up; a plain call, all of them."""
    n = len(inputs[0])
    arrays = [to_device(a) for a in inputs]
    adjoint = to_device(np.random.default_rng(1).standard_normal(op(*arrays).shape, np.float32))
    if backend.name == "cupy" or size is None:
        tensors = [Tensor(a, requires_grad=True) for a in arrays]

        def plain() -> list[Any]:
            with blas_threads(threads):
                return [found.data for found in grad(op(*tensors), tensors, adjoint, retain_graph=False)]

        return plain
    leaves: dict[int, tuple[list[Tensor], Any]] = {}
    for start in range(0, n, size):
        rows = slice(start, start + size)
        parts = [a[rows] if i < batched else a for i, a in enumerate(arrays)]
        leaves[start] = [Tensor(a, requires_grad=True) for a in parts], adjoint[rows]

    def of_microbatch(rows: slice) -> list[Any]:
        xs, g = leaves[rows.start]
        return [found.data for found in grad(op(*xs), xs, g, retain_graph=False)]

    def run() -> list[Any]:
        sums: list[Any] = []
        for found in over_microbatches(of_microbatch, n, size, threads):
            if not sums:
                sums = found[batched:]
            else:
                for s, g in zip(sums, found[batched:]):
                    s += g
        return sums

    return run


def adam_step(name: str) -> Run:
    net, rng = net_of(name), Rng(1)
    for p in net.parameters():
        p.grad = Tensor(rng.normal(p.shape))
    return optim.Adam(net.parameters(), lr=1e-3).step


def chain(length: int, all_inputs: bool) -> Run:
    """x <- x w + b, `length` times on 4 numbers, and back to x, or to all three."""
    x, w, b = (tensor(np.full(4, v, np.float32), requires_grad=True) for v in (1.0, 0.999, 0.001))
    w.requires_grad = b.requires_grad = all_inputs

    def run() -> None:
        y = x
        for _ in range(length):
            y = y * w + b
        grad(y.sum(), (x, w, b) if all_inputs else (x,), retain_graph=False)

    return run
