"""Fourier features, by which a network sees small differences: of the time, in a small score network, and of the greys
of an image, as additional input channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .. import nn, ops
from ..arguments import integer, number
from ..backend import to_device
from ..describing import rebuildable
from ..diffusion.predict import HasSigmaData
from ..engine import Tensor
from ..rng import Rng, as_rng


@rebuildable
class ScoreMLP(nn.Module):
    """The score of noised vectors: x (N, D), t (N,) -> (N, D).

    The input is x and ten Fourier features of the time (scale 1); then two hidden layers of 50 with tanh, and a
    division by s(t), because the score grows as 1 / s(t): (D + 10) - 50 - 50 - D.
    marginal_std: s(t) of the process. Errors: ValueError for x that is not (N, D).
    """

    def __init__(
        self,
        marginal_std: Callable[[Any], Any],
        dim: int,
        hidden: int = 50,
        features: int = 10,
        *,
        rng: Rng | int | None = None,
    ):
        rng = as_rng(rng)
        self.marginal_std, self.dim = marginal_std, integer("ScoreMLP: dim", dim)
        self.time = nn.FourierFeatures(features, scale=1.0, rng=rng)
        self.layer1 = nn.Linear(self.dim + self.time.features, hidden, rng=rng)
        self.layer2 = nn.Linear(hidden, hidden, rng=rng)
        self.layer3 = nn.Linear(hidden, self.dim, rng=rng)

    def forward(self, x: Any, t: Any) -> Any:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"ScoreMLP takes x (N, {self.dim}), not {x.shape}")
        h = ops.concatenate([x, self.time(t)], axis=1)  # (N, D), (N, 10) -> (N, D + 10)
        h = ops.tanh(self.layer1(h))  # -> (N, 50)
        h = ops.tanh(self.layer2(h))
        return self.layer3(h) / self.marginal_std(t).reshape((-1, 1))  # -> (N, D)


@rebuildable
class FourierInputs(HasSigmaData):
    """Fourier-feature inputs: net(y, noise, **condition) with y = x and, for w = 2^n pi of each n, a cos(w x) and
    a sin(w x), side by side: (N, H, W, C) -> (N, H, W, C (1 + 2 len(powers))).

        a = exp(-w^2 r^2 / 2),      r = sigma / sqrt(sigma^2 + sigma_data^2)

    At the noise level of a single grey, 1/256 of the range, a network must distinguish inputs that differ by about a
    hundredth, for which it would have to learn weights of about a hundred. Sinusoids of high frequency replace such
    weights. Maximum likelihood needs them, because it depends on every grey (docs/results.md: with and without).

    x is the input that a ScoreModel of "edm" or a Denoiser gives its net: c + r z, image and noise, of variance 1
    together. On average over z, the feature of x is a times that of c: E[cos(w (c + r z))] = a cos(w c). So the factor
    a removes a feature, a = 0, where the noise is wider than its period.
    noise: ln(sigma) / 4, as the net gets it. sigma_data: that of the model; it is not compared. powers: the n. For
    digits in [-1, 1] the period is a third of the range at n = 1, and two and a half of 256 greys at n = 6. Without
    powers, y = x.
    Errors: ValueError for a sigma_data that is not positive and finite.
    Source: the sinusoids: Kingma et al. 2021, "Variational diffusion models", appendix C; the factor a: Barron et al.
    2021, "Mip-NeRF", section 3.1.
    """

    def __init__(self, net: nn.Module, sigma_data: float, powers: Sequence[int] = (1, 2, 3, 4, 5, 6)):
        self.net, self.sigma_data = net, sigma_data
        self.powers = tuple(number(f"FourierInputs: powers[{i}]", n) for i, n in enumerate(powers))

    def forward(self, x: Any, noise: Any, **condition: Any) -> Any:
        x, noise = (v if isinstance(v, Tensor) else Tensor(to_device(v)) for v in (x, noise))
        ratio = ops.exp(noise * -4) * self.sigma_data  # sigma_data / sigma, (N,)
        r2 = ops.reshape(1 / (1 + ratio * ratio), shape=(-1, *[1] * (x.ndim - 1)))  # (N,) -> (N, 1, 1, 1)
        parts = [x]
        for n in self.powers:
            w = 2.0**n * math.pi
            a = ops.exp(r2 * (-0.5 * w * w))  # (N, 1, 1, 1)
            parts += [ops.cos(x * w) * a, ops.sin(x * w) * a]
        return self.net(ops.concatenate(parts, axis=x.ndim - 1), noise, **condition)  # (N, H, W, C (1 + 2 n))
