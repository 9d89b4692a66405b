"""Waves of the input, in which a small difference is a large one.

At the noise level of a single grey, 1/256 of the range, what a network has to tell apart differs by a hundredth of its
input; to see that it would have to learn weights of a hundred. Sines and cosines of high frequency are such weights.
The likelihood asks for them, as it wants each pixel to the last grey (docs/results.md has it with and without).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import nn, ops
from ..backend import to_device
from ..tensor import Tensor


class FineInputs(nn.Module):
    """net(y, noise, **condition) with y = x and, for w = 2^n pi of each n, a cos(w x) and a sin(w x), side by side:
    (N, H, W, C) -> (N, H, W, C (1 + 2 len(powers))).

        a = exp(-w^2 r^2 / 2),      r = sigma / sqrt(sigma^2 + sigma_data^2)

    x is what a ScoreModel of "edm" or a Denoiser gives its net: c + r z, the image and the noise scaled to variance 1
    together. On average over z the wave of x is a times that of c, E[cos(w (c + r z))] = a cos(w c), so a is how much
    it tells: where the noise is wider than a wave, nothing, and the wave is taken away.
    noise: ln(sigma) / 4, as they give it. sigma_data: theirs; it is not compared. powers: the n. Of digits in [-1, 1]
    the wave of 1 is a third of the range long, that of 6 two and a half of 256 greys. Without powers y is x alone.
    Errors: ValueError for a sigma_data that is not positive and finite.
    Source: the sinusoids: Kingma et al. 2021, "Variational diffusion models", appendix C; what noise leaves of them:
    Barron et al. 2021, "Mip-NeRF", section 3.1.
    """

    def __init__(self, net: nn.Module, sigma_data: float, powers: Sequence[int] = (1, 2, 3, 4, 5, 6)):
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"FineInputs: sigma_data must be positive and finite, not {sigma_data!r}")
        self.net, self.sigma_data, self.powers = net, sigma_data, tuple(powers)

    def forward(self, x: Any, noise: Any, **condition: Any) -> Any:
        x, noise = (v if isinstance(v, Tensor) else Tensor(to_device(v)) for v in (x, noise))
        ratio = ops.exp(noise * -4) * self.sigma_data  # sd / sigma, (N,)
        r2 = ops.reshape(1 / (1 + ratio * ratio), shape=(-1, *[1] * (x.ndim - 1)))  # (N,) -> (N, 1, 1, 1)
        parts = [x]
        for n in self.powers:
            w = 2.0**n * math.pi
            a = ops.exp(r2 * (-0.5 * w * w))
            parts += [ops.cos(x * w) * a, ops.sin(x * w) * a]
        return self.net(ops.concatenate(parts, axis=x.ndim - 1), noise, **condition)
