"""Four ways to the same score. One needs the answer, two need second derivatives, and one is why diffusion works.

The wish is a model psi close to the score of the noised data, wherever these are, at every time:

    explicit     E s^2 |psi(x, t) - score(x, t)|^2                            needs the score that is sought

Integration by parts takes the unknown score out of the product psi . score, and leaves the trace of a Jacobian:

    implicit     E s^2 (|psi|^2 + 2 tr d psi / dx)                            D backward passes, differentiated again
    sliced       E s^2 (|psi|^2 + 2 v . d(v . psi) / dx),   E v v^T = I       one, and the noise of v
    denoising    E |s psi + z|^2                                              none; needs to know how the noise was made

(the last one is loss.score_matching_loss). In expectation they differ by numbers that do not depend on psi, so they
have the same minimum. All take a model(x, t), data x0 (N, ...), a process and an rng, draw t and z as that loss does,
and return a Tensor of shape (). Sample i of a batch may not look at the others (no batch norm), as the derivative of
their sum is taken for all samples at once.

Sources: Hyvarinen 2005, "Estimation of non-normalized statistical models by score matching" (theorem 1); Vincent 2011;
Song, Garg, Shi and Ermon 2019, "Sliced score matching" (with variance reduction: |psi|^2 is not projected on v); the
weight s^2: Song et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import ops
from ..backend import Array
from ..engine import Tensor, grad
from ..rng import Rng
from .loss import noised, score_at, uniform
from .sde import per_sample

Model = Callable[..., Any]


def explicit_loss(
    model: Model, x0: Any, sde: Any, rng: Rng, *, score: Model, eps: float = 1e-5, first: int = 0
) -> Tensor:
    """E s^2 |model(x, t) - score(x, t)|^2, the distance itself, for data whose score(x, t) is known.

    Errors: as score_matching_loss.
    """
    _, t, _, x = noised(x0, sde, rng, uniform(eps), first)
    difference = score_at(model, x, t, {}) - score_at(score, x, t, {})
    return ops.square(per_sample(sde.marginal_std(t), x) * difference).sum() / len(x)


def implicit_loss(model: Model, x0: Any, sde: Any, rng: Rng, *, eps: float = 1e-5, first: int = 0) -> Tensor:
    """E s^2 (|model|^2 + 2 tr d model / dx): Hyvarinen's. One backward pass for each of the D values of a sample.

    Errors: as score_matching_loss; RuntimeError inside no_grad, where there are no derivatives.
    """
    t, x, psi = _recorded(model, x0, sde, rng, eps, first)
    trace: Any = 0.0
    for j in range(psi.shape[1]):
        (row,) = grad(psi[:, j].sum(), x, create_graph=True)  # (N, D): d psi_j / dx
        trace = trace + row[:, j]
    return _weighed(psi, trace, sde, t)


def sliced_loss(model: Model, x0: Any, sde: Any, rng: Rng, *, eps: float = 1e-5, first: int = 0) -> Tensor:
    """E s^2 (|model|^2 + 2 v . d(v . model) / dx): the trace by one random direction a sample, v of signs +1 and -1.

    Draws once more from the rng than the others. Errors: as implicit_loss.
    """
    t, x, psi = _recorded(model, x0, sde, rng, eps, first)
    v = (rng.integers(2, psi.shape, first=first) * 2 - 1).astype(psi.dtype)  # (N, D)
    (along,) = grad((psi * v).sum(), x, create_graph=True)  # (N, D): d(v . psi) / dx
    return _weighed(psi, (along * v).sum(axis=1), sde, t)


def _recorded(model: Model, x0: Any, sde: Any, rng: Rng, eps: float, first: int) -> tuple[Array, Tensor, Tensor]:
    """Times (N,), noised data (N, D) as a Tensor to differentiate by, and what the model says of them (N, D)."""
    _, t, _, x = noised(x0, sde, rng, uniform(eps), first)
    flat = Tensor(x.reshape((len(x), math.prod(x.shape[1:]))), requires_grad=True)  # (N, ...) -> (N, D)
    psi = model(flat.reshape(x.shape), Tensor(t))
    if psi.shape != x.shape:
        raise ValueError(f"the model returned shape {psi.shape} for x of shape {x.shape}")
    return t, flat, psi.reshape(flat.shape)


def _weighed(psi: Tensor, trace: Any, sde: Any, t: Array) -> Tensor:
    """The mean over samples of s^2 (|psi|^2 + 2 trace)."""
    return (sde.marginal_std(t) ** 2 * (ops.square(psi).sum(axis=1) + 2 * trace)).sum() / len(psi)
