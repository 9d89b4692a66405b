"""A small task, and what the tests of captured steps ask of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, optim
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.microbatch import gradients
from tinydiff.models.unet import UNet

on_cupy = pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="a graph: TINYDIFF_BACKEND=cupy")


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x).copy()


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside nothing may wait for the device; afterwards, what was launched (where CuPy is emulated)."""
    found: dict[str, int] = {}
    try:
        import cupy_on_cpu
    except ImportError:
        with backend.no_sync():
            yield found
        return
    cupy_on_cpu.reset()
    with cupy_on_cpu.forbid_sync(), backend.no_sync():
        yield found
    found.update(cupy_on_cpu.counters())


class Images:
    """A small U-Net that learns to denoise, with all that a training step has."""

    def __init__(self, make: Callable[..., Any] = optim.AdamW) -> None:
        self.sde = VESDE()
        self.net = UNet(1, (8, 16), embedding=16, groups=4, labels={"digit": 10}, rng=0)
        self.optimizer = make(self.net.parameters(), 1e-3)
        self.ema = optim.EMA(self.net, 0.9)

    def loss(self, x: Any, labels: Any, rng: Rng, sample_offset: int) -> Tensor:
        return score_matching_loss(self.net, x, self.sde, rng, sample_offset=sample_offset, digit=labels)

    def step(self, x: Any, labels: Any, rng: Rng) -> Any:
        value = gradients(self.loss, self.optimizer.parameters, (x, labels), rng)
        norm = optim.clip_grad_norm(self.optimizer.parameters, 50.0)
        self.optimizer.step()
        self.ema.update()
        return {"loss": value, "norm": norm}

    def state(self) -> list[np.ndarray]:
        slots = self.optimizer.state_dict()["state"].values()
        arrays = [*self.net.state_dict().values(), *self.ema.averages.values(), *(a for s in slots for a in s.values())]
        return [host(a) for a in arrays]


def batch(n: int, seed: int) -> tuple[Any, Any]:
    rng = Rng(seed)
    return backend.to_host(rng.uniform((n, 8, 8, 1))), backend.to_host(rng.integers(10, n))


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.tobytes() == y.tobytes()


def both(make: Callable[[], Any], calls: int = 5) -> None:
    """make() -> (step(rng), state()): run plain and captured, they agree in every result and in the state. The third
    that it may return is put around the step that is called."""
    results = []
    for wrap in (lambda step: step, backend.capture):
        step, state, *around = make()
        step, source, found = wrap(step), Rng(3), []
        for outer in around:
            step = outer(step)
        for _ in range(calls):
            found.append(host(step(source)))
        results.append([*found, np.array(source.step), *state()])
    equal(*results)
