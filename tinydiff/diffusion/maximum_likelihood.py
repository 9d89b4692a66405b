"""Denoising as maximum likelihood: at the right noise levels the loss is the information in an image, in nats.

Let x = x_0 + sigma z in D dimensions have the density p_sigma and the entropy H(sigma) = E[-ln p_sigma(x)]. Noise makes
entropy (de Bruijn's identity), and the score is the best guess of the noise, -E[z | x] / sigma, so

    dH / d(sigma^2) = 1/2 E|grad ln p_sigma(x)|^2,      E|grad ln p_sigma(x)|^2 = (D - e(sigma)) / sigma^2

where e(sigma) = E|z - E[z | x]|^2 is the error of that guess. As d(sigma^2) = 2 sigma^2 d(ln sigma), it follows that
dH / d(ln sigma) = D - e(sigma). At sigma_max nothing but noise is left to describe, at a cost of
E[-ln N(x; 0, sigma_max^2 I)], and from there down to eps

    E[-ln p_eps(x)]  <=  D/2 ln(2 pi e eps^2)  +  E|x_0|^2 / (2 sigma_max^2)  +  integral of e(sigma) d(ln sigma)

with equality if the prior is right; D ln(sigma_max / eps) has cancelled. A network guesses worse than E[z | x], so that
with its own error the right side is larger: a bound, which training lowers. It is that of the SDE that the network
defines (Song et al. 2021, "Maximum likelihood training of score-based diffusion models"; Kingma et al. 2021,
"Variational diffusion models").

The integral is over levels, which so far were drawn where pictures gain by it. Nothing in it asks for the rare large
ones: for the network F of EDM (edm.py), with r = sigma / sqrt(sigma^2 + sd^2),

    |z - z_F|^2 = (1 - r^2) |F - target|^2      and      d(ln r) = (1 - r^2) d(ln sigma)

so it is that of the plain error of F over ln r. To draw ln r evenly is all there is to maximum likelihood.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, to_device, xp
from ..rng import Rng
from ..tensor import Tensor, array_of
from .loss import Times, denoising_loss
from .parametrisation import ScoreModel
from .sde import KarrasSDE


def likelihood_loss(
    model: ScoreModel, x0: Any, rng: Rng, *, eps: float = 1e-3, first: int = 0, **condition: Any
) -> Tensor:
    """The bound above on E[-ln p_eps(x_0 + eps z)], in nats a sample: a Tensor of shape (), an estimate by one noise
    level a sample.

    model: one that predicts "edm" under a KarrasSDE; x0 (N, ...) of floats; rng: two draws, as in score_matching_loss.
    Pixels of bytes have no density: add u ~ U(0, 1) to each byte, anew each time, and take eps well below the width of
    a grey. In bits a dimension this is loss / (D ln 2) + 8 - log2(high - low), as in likelihood.bits_per_dimension.
    Errors: TypeError for another process, or x0 that is not of floats; ValueError for another prediction, or eps
    outside (0, t_max).
    """
    sde = model.sde
    if not isinstance(sde, KarrasSDE):
        raise TypeError(f"likelihood_loss: the model must be one of a KarrasSDE, whose time is sigma, not of {sde!r}")
    if model.predicts != "edm":
        raise ValueError(f"likelihood_loss: the model must predict 'edm', not {model.predicts!r}")
    if not 0 < eps < sde.t_max:
        raise ValueError(f"likelihood_loss: eps must be between 0 and {sde.t_max:g}, not {eps!r}")
    sd = model.sigma_data
    assert sd is not None  # ScoreModel has asked for it
    low, high = (math.log(s / math.hypot(s, sd)) for s in (eps, sde.t_max))  # of ln r
    error = denoising_loss(model, x0, rng, times=_times(sd, low, high), first=first, **condition)
    x0 = to_device(array_of(x0))
    d = math.prod(x0.shape[1:])
    prior = (x0**2).sum() / (2 * sde.t_max**2 * len(x0))
    return error * (high - low) + prior + d / 2 * math.log(2 * math.pi * math.e * eps**2)


def _times(sigma_data: float, low: float, high: float) -> Times:
    """sigma, such that ln r ~ U(low, high)."""

    def times(n: int, t_max: float, rng: Rng, dtype: Any, first: int) -> Array:
        r = xp.exp(rng.uniform(n, dtype, first=first) * (high - low) + low)
        return sigma_data * r / xp.sqrt(1 - r * r)

    return times
