"""What runs on NumPy in place of the pages: the same formulas in few passes over memory, a block at a time."""

from . import activation, attention, conv, linalg, norm, optim

__all__ = ["activation", "attention", "conv", "linalg", "norm", "optim"]
