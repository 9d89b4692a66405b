"""Layers: PyTorch's names, arguments and initial weights; NumPy's arrays, channels last.

Read `module` first, then `layers` and `conv`. Every layer that draws its initial weights takes `rng`: an Rng, a seed,
or None for a new seed.
"""

from .attention import MultiHeadAttention
from .conv import Conv1d, Conv2d, ConvTranspose2d
from .layers import GELU, Dropout, Embedding, Flatten, FourierFeatures, Identity, Linear, ReLU, Sigmoid, SiLU, Tanh
from .module import Module, Parameter, Sequential, Setting, Unfilled
from .norm import BatchNorm2d, GroupNorm, LayerNorm
from .transformer import LearnedPositions, SinusoidalPositions, TransformerBlock

__all__ = [
    "BatchNorm2d", "Conv1d", "Conv2d", "ConvTranspose2d", "Dropout", "Embedding", "Flatten", "FourierFeatures", "GELU",
    "GroupNorm", "Identity", "LayerNorm", "LearnedPositions", "Linear", "Module", "MultiHeadAttention", "Parameter",
    "ReLU", "Sequential", "Setting", "SiLU", "Sigmoid", "SinusoidalPositions", "Tanh", "TransformerBlock",
    "Unfilled",
]  # fmt: skip
