"""Diffusion: how data turns into noise, the loss that learns to turn back, and the samplers that do it.

    sde = VESDE(sigma=25.0)
    loss = score_matching_loss(model, x0, sde, rng)                   # x0 (N, ...), to be minimised
    x = euler_maruyama(model, (64, 28, 28, 1), sde, Rng(0))           # 64 new images; seven other ways: samplers.py
    bits = bits_per_dimension(model, images, sde, Rng(0))             # images (N, ...) of uint8; likelihood.py
    x = inpaint(model, x, mask, sde, Rng(0))                          # and other uses: editing.py

Times t run from 0 (data) to 1 (noise). A model, or any score, is a function score(x, t) of x (N, ...) and of t (N,).
"""

from .editing import inpaint
from .likelihood import bits_per_dimension
from .loss import score_matching_loss
from .samplers import euler_maruyama
from .sde import VESDE

__all__ = ["VESDE", "bits_per_dimension", "euler_maruyama", "inpaint", "score_matching_loss"]
