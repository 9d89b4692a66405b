"""Quick versions for CuPy: kernels in CUDA, with few launches, and nothing that waits for the device.

Every launch costs the host some microseconds, however little work it is for the GPU. So where the CPU works in blocks
that fit in its cache, one launch does everything here: one kernel gathers all patches, one changes all parameters and
their moments.

Each CUDA file can be read and compiled by itself: conv.cu, norm.cu, softmax.cu, random.cu, optim.cu, clip.cu and
sum_rows.cu; the .cuh files have what they share. The Python files are the host's side: launch.py checks what CUDA does
not check, table.py hands a list of tensors to one launch, and each of the others prepares the arrays for its kernels.

A function here may decline by returning NotImplemented, before it has changed any argument; then the page runs. All
decline complex numbers and integers; softmax declines an axis other than the last, and norms a group that is too large
for a block.

This folder needs CuPy, so it is imported when that backend is chosen.
"""

from .. import linalg
from . import activation, conv, norm, optim, random, softmax
from .cublas import matmul

linalg.register("cupy", matmul)

__all__ = ["activation", "conv", "norm", "optim", "random", "softmax"]
