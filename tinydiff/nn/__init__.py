"""Layers: PyTorch's names, arguments and initial weights; NumPy's arrays, channels last.

Read `module` first, then `linear` and `conv`. Every layer that draws its initial weights takes `rng`: an Rng, a seed,
or None for a new seed.
"""

from . import init
from .activation import GELU, Dropout, ReLU, Sigmoid, SiLU
from .attention import MultiHeadAttention
from .conv import Conv1d, Conv2d, ConvTranspose2d
from .embedding import Embedding, FourierFeatures
from .linear import Linear
from .module import Module, Parameter, Sequential
from .norm import BatchNorm2d, GroupNorm, LayerNorm

__all__ = [
    "BatchNorm2d", "Conv1d", "Conv2d", "ConvTranspose2d", "Dropout", "Embedding", "FourierFeatures", "GELU",
    "GroupNorm", "LayerNorm", "Linear", "Module", "MultiHeadAttention", "Parameter", "ReLU", "Sequential", "SiLU",
    "Sigmoid", "init",
]  # fmt: skip
