"""Diffusion: how data turns into noise, the losses that learn the way back, and the sampling that follows it.

    vesde = VESDE(sigma=25.0)                                         # or process("vp", schedule="cosine"), ...
    loss = score_matching_loss(model, x0, vesde, rng)                 # x0 (N, ...), to be minimised
    x = sample(model, (64, 28, 28, 1), vesde, Rng(0))                 # 64 new images
    x = sample(model, (64, 28, 28, 1), vesde, Rng(0), method=heun(s_churn=10.0))
    bits = bits_per_dimension(model, images, vesde, Rng(0))           # images (N, ...) of uint8
    x = inpaint(model, x, mask, vesde, Rng(0))                        # and other uses: edit.py

Times t run from 0 (data) to 1 (noise). A model is a score, a function score(x, t) of x (N, ...) and of t (N,), or a
Denoiser. The chapters, in reading order: process, predict, loss, methods, sample, exact, likelihood, edit;
runge_kutta is the solver that methods and likelihood use.
"""

from .edit import inpaint
from .likelihood import bits_per_dimension, log_likelihood
from .loss import denoising_loss, edm_loss, likelihood_loss, score_matching_loss
from .methods import (
    METHODS,
    Method,
    ddim,
    ddpm,
    dpm_solver,
    euler_maruyama,
    heun,
    karras_times,
    method,
    predictor_corrector,
    probability_flow,
    rk45,
    uniform_times,
)
from .predict import Counted, Denoiser, Guided, ScoreModel, drop_labels, score_of
from .process import (
    VESDE,
    VPSDE,
    Brownian,
    CosineSchedule,
    FlowSDE,
    KarrasSDE,
    LinearSchedule,
    SubVPSDE,
    process,
    sigma_at,
    time_at,
)
from .sample import sample, steps_for

__all__ = [
    "METHODS",
    "Brownian",
    "CosineSchedule",
    "Counted",
    "Denoiser",
    "FlowSDE",
    "Guided",
    "KarrasSDE",
    "LinearSchedule",
    "Method",
    "ScoreModel",
    "SubVPSDE",
    "VESDE",
    "VPSDE",
    "bits_per_dimension",
    "ddim",
    "ddpm",
    "denoising_loss",
    "dpm_solver",
    "drop_labels",
    "edm_loss",
    "euler_maruyama",
    "heun",
    "inpaint",
    "karras_times",
    "likelihood_loss",
    "log_likelihood",
    "method",
    "predictor_corrector",
    "probability_flow",
    "process",
    "rk45",
    "sample",
    "sigma_at",
    "score_matching_loss",
    "score_of",
    "steps_for",
    "time_at",
    "uniform_times",
]
