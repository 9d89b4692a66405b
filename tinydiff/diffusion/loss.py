"""The loss that learns the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array, to_device
from ..rng import Rng
from ..tensor import Tensor, array_of
from .sde import per_sample


def score_matching_loss(
    model: Callable[..., Any],
    x0: Array | Tensor,
    sde: Any,
    rng: Rng,
    *,
    eps: float = 1e-5,
    first: int = 0,
    **condition: Any,
) -> Tensor:
    """How far the model is from the score of noised data: denoising score matching, weighted with s(t)^2.

        t ~ U(eps, 1),  z ~ N(0, I),  x = m(t) x_0 + s(t) z,      L = mean over samples of  sum |s(t) model(x, t) + z|^2

    Why the plus: the score of N(m x_0, s^2) at x is -(x - m x_0) / s^2 = -z / s, so a model that knew z would make
    every term 0. It cannot know it, and the best it can do on average is the score of the noised data. A model that
    always says 0 has the loss D in expectation, for D values a sample: 784 for 28x28x1.

    x0: (N, ...). model(x, t, **condition): x (N, ...) and t (N,) -> (N, ...). rng: two draws are taken from it. Row i
    of them is that of sample `first + i`, so the loss of a sample is the same alone, in a batch, or in a part of one.
    Returns a Tensor of shape (), in the dtype of x0. s(t) is computed in float32.
    Errors: TypeError for an x0 that is not of floats; ValueError for eps outside (0, 1), or a model whose output has
    another shape than x0.
    Source: Vincent 2011, "A connection between score matching and denoising autoencoders"; the
    weight: Song et al. 2021.
    """
    if not 0 < eps < 1:
        raise ValueError(f"score_matching_loss: eps must be between 0 and 1, not {eps!r}")
    x0 = to_device(array_of(x0))
    if x0.dtype.kind != "f":
        raise TypeError(
            f"score_matching_loss: x0 must be of floats (see data.to_float), not {x0.dtype} of shape {x0.shape}"
        )
    n = x0.shape[0]
    t = rng.uniform(n, x0.dtype, first=first) * (1 - eps) + eps  # (N,)
    z = rng.normal(x0.shape, x0.dtype, first=first)  # (N, ...)
    s, m = per_sample(sde.marginal_std(t), x0), per_sample(sde.marginal_scale(t), x0)  # (N, 1, ..., 1)
    score = model(Tensor(m * x0 + s * z), Tensor(t), **condition)
    if score.shape != x0.shape:
        raise ValueError(f"score_matching_loss: the model returned shape {score.shape} for x of shape {x0.shape}")
    return ops.square(s * score + z).sum() / n
