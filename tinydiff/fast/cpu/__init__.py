"""What runs on NumPy in place of the pages: the same formulas in few passes over memory, a block at a time."""

import numpy as np

from .. import linalg
from . import activation, attention, conv, norm, optim

linalg.register("numpy", np.matmul)

__all__ = ["activation", "attention", "conv", "norm", "optim"]
