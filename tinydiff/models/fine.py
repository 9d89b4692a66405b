"""Inputs in which small differences are large.

At the noise level of a single grey, 1/256 of the range, what a network has to tell apart differs by a hundredth of its
input; to see that it would have to learn weights of a hundred. For pictures it does not matter. For the likelihood it
does, since each pixel must be told to the last grey, and sines and cosines of high frequency are those weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import nn, ops
from ..backend import Array, to_device, xp
from ..tensor import Tensor, array_of


class FineInputs(nn.Module):
    """net(y, noise, **condition) with y = x and, for w = 2^n pi of each n, a cos(w x) and a sin(w x), side by side:
    (N, H, W, C) -> (N, H, W, C (1 + 2 len(powers))).

        a = exp(-w^2 r^2 / 2),      r = sigma / sqrt(sigma^2 + sigma_data^2)

    is what noise leaves of them on average, E[cos(w (x + r z))] = a cos(w x): where the noise is wider than a wave, the
    wave tells nothing, and is taken away.
    For a net within a ScoreModel of "edm" or a Denoiser, which give it x / sqrt(sigma^2 + sigma_data^2), with noise of
    the deviation r, and ln(sigma) / 4.
    Errors: ValueError for a sigma_data that is not positive and finite, or no powers.
    Source: the sinusoids: Kingma et al. 2021, "Variational diffusion models", appendix C; what noise leaves of them:
    Barron et al. 2021, "Mip-NeRF", section 3.1.
    """

    def __init__(self, net: nn.Module, sigma_data: float, powers: Sequence[int] = (1, 2, 3, 4, 5, 6)):
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"FineInputs: sigma_data must be positive and finite, not {sigma_data!r}")
        if not powers:
            raise ValueError("FineInputs: powers must not be empty")
        self.net, self.sigma_data, self.powers = net, sigma_data, tuple(powers)

    def forward(self, x: Any, noise: Any, **condition: Any) -> Any:
        x = x if isinstance(x, Tensor) else Tensor(x)
        sigma: Array = xp.exp(4 * to_device(array_of(noise), x.dtype))  # (N,)
        r2 = (1 / (1 + (self.sigma_data / sigma) ** 2)).reshape(-1, *[1] * (x.ndim - 1))  # (N,) -> (N, 1, 1, 1)
        parts = [x]
        for n in self.powers:
            w = 2.0**n * math.pi
            a = xp.exp(-0.5 * w * w * r2)
            parts += [ops.cos(x * w) * a, ops.sin(x * w) * a]
        return self.net(ops.concatenate(parts, axis=x.ndim - 1), noise, **condition)
