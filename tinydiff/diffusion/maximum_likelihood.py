"""Denoising as maximum likelihood: at the right noise levels the loss is the information in an image, in nats.

Let x = x_0 + sigma z in D dimensions have the density p_sigma and the entropy H(sigma) = E[-ln p_sigma(x)]. Noise makes
entropy (de Bruijn's identity), and the score is the best guess of the noise, -E[z | x] / sigma, so

    dH / d(sigma^2) = 1/2 E|grad ln p_sigma(x)|^2,      E|grad ln p_sigma(x)|^2 = (D - e(sigma)) / sigma^2

where e(sigma) = E|z - E[z | x]|^2 is the error of that guess. As d(sigma^2) = 2 sigma^2 d(ln sigma), it follows that
dH / d(ln sigma) = D - e(sigma): the entropy at eps is that at sigma_max, less what the noise between them has made.
With a prior N(0, sigma_max^2 I) for the data's own p at sigma_max, and the error of a network for the least one,

    D/2 ln(2 pi e eps^2)  +  E|x_0|^2 / (2 sigma_max^2)  +  integral of e(sigma) d(ln sigma),

where D ln(sigma_max) has cancelled, is at least H(eps), and equal to it only if both are right. It is a bound on
E[-ln q(x)] at sigma = eps for the density q of the model, if that is the one of the SDE with the network's score (Song
et al. 2021, "Maximum likelihood training of score-based diffusion models"; Kingma et al. 2021, "Variational diffusion
models"). The ODE with the same score has a density of its own, which likelihood.py measures. It is the same if the
score is right, but it depends on the slope of an error too: one that is small and steep raises it and not the bound.

The integral is over levels, which EDM draws where it helps pictures. The network F of EDM (edm.py) makes it simple:
with r = sigma / sqrt(sigma^2 + sd^2),

    |z - z_F|^2 = (1 - r^2) |F - target|^2      and      d(ln r) = (1 - r^2) d(ln sigma)

so it is that of the plain error of F over ln r. To draw ln r evenly is all there is to maximum likelihood.
"""

from __future__ import annotations

import math
from typing import Any

from ..backend import Array, to_device, xp
from ..engine import Tensor
from ..operators import array_of
from ..rng import Rng
from .loss import Times, denoising_loss
from .parametrisation import ScoreModel
from .sde import KarrasSDE


def likelihood_loss(
    model: ScoreModel, x0: Any, rng: Rng, *, eps: float = 1e-3, first: int = 0, **condition: Any
) -> Tensor:
    """The bound above at x_0 + eps z, in nats a sample: a Tensor of shape (), an estimate by one noise level a sample.

    model: one that predicts "edm" under a KarrasSDE; x0 (N, ...) of floats; rng, first, condition: as in
    score_matching_loss.
    Pixels of bytes have no density: add u ~ U(0, 1) to each byte, anew each time. In bits a dimension the loss is
    loss / (D ln 2) + 8 - log2(high - low), of an image with noise; likelihood.bits_per_dimension asks the ODE's density
    about images without. For a grey all alone, with eps an eighth of its width, a perfect net has 0.33 bits here and
    0.17 there.
    Errors: TypeError for another model or process, or x0 that is not of floats; ValueError for another prediction, or
    eps outside (0, t_max).
    """
    if not (isinstance(model, ScoreModel) and isinstance(model.sde, KarrasSDE)):
        given = repr(model.sde) if isinstance(model, ScoreModel) else type(model).__name__
        raise TypeError(
            f"likelihood_loss: the model must be a ScoreModel of a KarrasSDE, whose time is sigma, not {given}"
        )
    if model.predicts != "edm":
        raise ValueError(f"likelihood_loss: the model must predict 'edm', not {model.predicts!r}")
    sde, sd = model.sde, model.sigma_data
    if not 0 < eps < sde.t_max:
        raise ValueError(f"likelihood_loss: eps must be between 0 and {sde.t_max:g}, not {eps!r}")
    assert sd is not None  # ScoreModel has asked for it
    low, high = (-0.5 * math.log1p((sd / s) ** 2) for s in (eps, sde.t_max))  # of ln r
    x0 = to_device(array_of(x0))
    error = denoising_loss(model, x0, rng, times=_times(sd, low, high), first=first, **condition)
    d = math.prod(x0.shape[1:])
    prior = (x0**2).sum() / (2 * sde.t_max**2 * len(x0))
    return error * (high - low) + prior + d / 2 * math.log(2 * math.pi * math.e * eps**2)


def _times(sd: float, low: float, high: float) -> Times:
    """sigma, such that ln r ~ U(low, high)."""

    def times(n: int, t_max: float, rng: Rng, dtype: Any, first: int) -> Array:
        # -ln r, which may be 1e-5 or less: as a sum of what is positive it keeps its digits.
        less = (1 - rng.uniform(n, dtype, first=first)) * (high - low) - high
        return sd / xp.sqrt(xp.expm1(2 * less))

    return times
