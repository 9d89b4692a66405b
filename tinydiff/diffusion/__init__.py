"""Diffusion: how data turns into noise, the loss that learns to turn back, and the samplers that do it.

    sde = VESDE(sigma=25.0)                                           # or process("vp", schedule="cosine"), ...
    loss = score_matching_loss(model, x0, sde, rng)                   # x0 (N, ...), to be minimised
    x = euler_maruyama(model, (64, 28, 28, 1), sde, Rng(0))           # 64 new images; others: samplers.py
    bits = bits_per_dimension(model, images, sde, Rng(0))             # images (N, ...) of uint8; likelihood.py
    x = inpaint(model, x, mask, sde, Rng(0))                          # and other uses: editing.py

Times t run from 0 (data) to 1 (noise). A model, or any score, is a function score(x, t) of x (N, ...) and of t (N,).
"""

from .editing import inpaint
from .edm import Denoiser, edm_loss
from .likelihood import bits_per_dimension, log_likelihood
from .loss import denoising_loss, score_matching_loss
from .maximum_likelihood import likelihood_loss
from .parametrisation import ScoreModel
from .samplers import (
    SAMPLERS,
    Counted,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    predictor_corrector,
    probability_flow,
    rk45,
    sampler,
    score_of,
    steps_for,
)
from .schedule import CosineSchedule, LinearSchedule
from .sde import VESDE, VPSDE, Brownian, FlowSDE, KarrasSDE, SubVPSDE, process

__all__ = [
    "Brownian",
    "CosineSchedule",
    "Counted",
    "Denoiser",
    "FlowSDE",
    "KarrasSDE",
    "LinearSchedule",
    "SAMPLERS",
    "ScoreModel",
    "SubVPSDE",
    "VESDE",
    "VPSDE",
    "bits_per_dimension",
    "ddim",
    "ddpm",
    "denoising_loss",
    "dpm_solver",
    "edm_loss",
    "euler_maruyama",
    "heun",
    "inpaint",
    "likelihood_loss",
    "log_likelihood",
    "predictor_corrector",
    "probability_flow",
    "process",
    "rk45",
    "sampler",
    "score_matching_loss",
    "score_of",
    "steps_for",
]
