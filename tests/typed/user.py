"""A script of a user that touches the public surface: `mypy --strict` must have nothing to say of it but what the
comments say it must. It is not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import tinydiff
from tinydiff import Rng, Tensor, functional, nn, no_grad, ops, optim
from tinydiff.backend import xp
from tinydiff.diffusion import KarrasSDE, ScoreModel, edm_loss, heun, sample
from tinydiff.diffusion.predict import Denoiser, Guided
from tinydiff.engine import op
from tinydiff.training import train


@op
def cube(x: Any) -> Any:
    """z = x^3"""
    return xp.power(x, 3)


@cube.vjp
def cube_vjp(g: Any, _z: Any, x: Any) -> Any:
    return 3 * x * x * g


@op(holomorphic=False)
def step(x: Any, *, at: float = 0.0) -> Any:
    return x > at


class Net(nn.Module):
    def __init__(self, width: int, rng: Rng) -> None:
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(4, width, rng=rng), nn.Tanh(), nn.Linear(width, 4, rng=rng))

    def forward(self, x: Any, noise: Any) -> Any:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self) -> None:
        self.a, self.b = nn.Linear(2, 3), nn.Conv2d(3, 3, 1)
        self.norm, self.all = nn.LayerNorm(3), nn.Sequential(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(ops.silu(self.norm(self.a(x))))

    def last(self, x: Tensor) -> Tensor:
        return self.all(x)


def mean_square(x: Tensor) -> Tensor:
    return ops.square(x).mean()


@no_grad
def total(x: Tensor) -> float:
    return x.sum().item()


@no_grad()
def first(xs: Sequence[Tensor]) -> Tensor:
    return xs[0]


def main() -> None:
    x = tinydiff.tensor(np.ones((2, 3)), dtype="float32", requires_grad=True)
    y: Tensor = ops.softmax(cube(x) @ x.T, axis=1) + step(x, at=1.0)
    y.sum().backward()
    (g,) = tinydiff.grad(y.sum(), [x], create_graph=True)
    shape: tuple[int, ...] = g.shape
    value: float = total(g) + first([g, x]).item()
    report = tinydiff.gradcheck(cube, np.ones(3), order=2)
    product: Tensor = functional.hvp(lambda x: (x * x).sum(), x, x)[1]

    denoiser = Denoiser(Net(8, Rng(0)), sigma_data=1.0)
    optimizer = optim.Adam(denoiser.parameters(), lr=1e-3)

    def loss(x0: Any, *, rng: Rng, sample_offset: int) -> Tensor:
        return edm_loss(denoiser, x0, rng, sample_offset=sample_offset)

    state = train(denoiser, loss, np.ones((8, 4)), optimizer, epochs=1, batch_size=4, schedule=optim.cosine(10))
    with no_grad(), tinydiff.detect_anomaly():
        images = sample(Guided(denoiser, 1.0), (2, 4), KarrasSDE(), Rng(1), method=heun(s_churn=1.0), steps=5)
    ScoreModel(Net(8, Rng(0)), KarrasSDE(), "noise")
    print(shape, value, report.ok, product, state.step, images)

    ops.softmax(x, axes=1)  # error: Unexpected keyword argument
    ops.exp(x, x)  # error: Too many arguments
    sample(denoiser, (2, 4), KarrasSDE(), "seed")  # error: Argument 4
    total(3)  # error: Argument 1 to "total"
    optim.Adam(denoiser.parameters(), lr="fast")  # error: "lr"
