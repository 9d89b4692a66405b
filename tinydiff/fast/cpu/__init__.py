"""The versions for NumPy: the formulas of the pages in few passes over memory, one block at a time."""

import numpy as np

from .. import linalg
from . import activation, attention, conv, norm, optim, random, reduce

linalg.register("numpy", np.matmul, reduce.sum_of_rows)

__all__ = ["activation", "attention", "conv", "norm", "optim", "random", "reduce"]
