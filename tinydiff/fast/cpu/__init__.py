"""The versions for NumPy: the formulas of the pages in few passes over memory, one block at a time."""

from ... import backend
from .. import linalg, threads
from . import activation, attention, build, conv, norm, optim, product, random, reduce, shape

linalg.register("numpy", product.product, reduce.sum_of_rows, reduce.add_in_place)
backend.reports += [build.report, threads.report]
threads.before_threads.append(build.stop_looking)

__all__ = ["activation", "attention", "conv", "norm", "optim", "product", "random", "reduce", "shape"]
