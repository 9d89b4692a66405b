"""tinydiff: Stable Diffusion that can be read down to the last gradient.

A tiny reverse-mode autograd over NumPy or CuPy (`TINYDIFF_BACKEND=cupy`), and on it diffusion models. Read in this
order: backend, tensor, tape, backward, ops; then nn, optim, diffusion, models, training.
"""

import importlib.util
import os

from . import backend, nn, ops, optim
from .backward import grad
from .gradcheck import GradcheckError, gradcheck
from .modes import detect_anomaly, grad_enabled, no_grad
from .profile import profile
from .recompute import checkpoint
from .rng import Rng
from .tensor import Tensor, tensor

__version__ = "0.1.0"
__all__ = [
    "GradcheckError",
    "Rng",
    "Tensor",
    "backend",
    "checkpoint",
    "detect_anomaly",
    "grad",
    "grad_enabled",
    "gradcheck",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "profile",
    "tensor",
]

# The folder fast/ may be deleted: then everything runs as it is written, slower.
if os.environ.get("TINYDIFF_FAST") != "0" and importlib.util.find_spec("tinydiff.fast") is not None:
    from . import fast as fast
