"""Quick versions for CuPy: kernels in CUDA, with few launches, and nothing that waits for the device.

A GPU is fast at anything that runs in one launch, and every launch costs the host some microseconds. So what the CPU
does a block at a time, for the sake of its cache, is whole here: one kernel gathers all patches, one changes all
parameters and their moments.

The kernels stand in files of CUDA, each of which can be read, and compiled, by itself: conv.cu, norm.cu, softmax.cu,
random.cu, optim.cu, clip.cu, sum_rows.cu, and what they share in .cuh files. Beside them is the host's side: launch.py
checks what CUDA does not, table.py hands a list of tensors to one launch, and a file for each idea makes the plan and
the arrays for its kernels.

A function here may decline, by returning NotImplemented: then the page runs. It has changed none of its arguments by
then. All decline complex numbers and integers; softmax another axis than the last; norms a group that is too large for
a block.

This folder is imported when the backend is chosen, as it needs CuPy.
"""

from .. import linalg
from . import activation, conv, norm, optim, random, softmax
from .cublas import matmul

linalg.register("cupy", matmul)

__all__ = ["activation", "conv", "norm", "optim", "random", "softmax"]
