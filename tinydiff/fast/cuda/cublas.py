"""Matrix products on the device, by cuBLAS itself.

CuPy's own `@` is refused while a stream captures, copies transposed views, and makes many small products without
tensor cores. So cuBLAS is called here directly, by one function: a batch of products whose matrices lie at equal
distances. cuBLAS expects column-major matrices, and takes a row-major matrix for its transpose. So Z = X Y is computed
as Z^T = Y^T X^T, and transposed views cost nothing.

cuBLAS also needs a handle, one per thread and device, and a workspace, one per stream; both are kept here. Without a
workspace of ours, cuBLAS would allocate one itself, and a captured graph would do so at every replay.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
import weakref
from typing import Any

import cupy
import numpy

from ... import backend
from ...backend import Array

_INT_MAX = 2**31 - 1
_FLOAT32, _FLOAT64 = 0, 1  # cudaDataType
_DEFAULT_ALGORITHM = -1
_COMPUTE = {"float32": 68, "tf32": 77, "bf16": 75}  # cublasComputeType_t: 32F, 32F_FAST_TF32, 32F_FAST_16BF
_COMPUTE_64F = 70
_STATUS = {
    1: "not initialized",
    3: "out of memory",
    7: "invalid value",
    8: "this GPU lacks what was asked for",
    11: "memory could not be mapped",
    13: "the launch failed",
    14: "internal error",
    15: "not supported",
}

_local = threading.local()  # .handles: {device: Handle}


def matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b for (..., n, k) and (..., k, m), leading axes broadcast: (..., n, m), in `out`, a contiguous
    array of that shape and dtype, if it is given.

    float32 is multiplied in the precision of backend.precision. Views whose rows or columns are contiguous, and whose
    leading axes lie at one distance, are read where they are; others are copied first. Complex numbers and integers are
    declined. Errors: OverflowError beyond 2^31 - 1 rows, columns or products.
    """
    dtype = numpy.result_type(a, b)
    if dtype.char not in "fd":
        return NotImplemented
    n, k, m = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = a.shape[:-2]
    if b.shape[:-2] != batch:
        batch = numpy.broadcast_shapes(batch, b.shape[:-2])
    count = math.prod(batch)
    z = cupy.empty((*batch, n, m), dtype) if out is None else out
    if z.shape != (*batch, n, m) or z.dtype != dtype or not z.flags.c_contiguous:
        raise ValueError(
            f"matmul: out must be contiguous, of shape {(*batch, n, m)} and {dtype}, not {z.shape} and {z.dtype}"
        )
    if not z.size:
        return z
    if not k:
        z.fill(0)
        return z
    if max(n, k, m, count) > _INT_MAX:
        raise OverflowError(f"matmul of {a.shape} and {b.shape}: cuBLAS counts to 2**31 - 1")
    a, a_turned, a_pitch, a_distance = _readable(a.astype(dtype, copy=False), batch)
    b, b_turned, b_pitch, b_distance = _readable(b.astype(dtype, copy=False), batch)
    if dtype.char == "f":
        kind, compute, one, zero = _FLOAT32, _COMPUTE[backend.matmul_precision()], _ONE_32, _ZERO_32
    else:
        kind, compute, one, zero = _FLOAT64, _COMPUTE_64F, _ONE_64, _ZERO_64
    handle = _handle()
    _check(
        _library().cublasGemmStridedBatchedEx(
            handle.pointer, b_turned, a_turned, m, n, k,
            one, b.data.ptr, kind, b_pitch, b_distance, a.data.ptr, kind, a_pitch, a_distance,
            zero, z.data.ptr, kind, m, n * m, count, compute, _DEFAULT_ALGORITHM,
        ),
        f"the product of {a.shape} and {b.shape}",
    )  # fmt: skip
    return z


def _readable(x: Array, batch: tuple[int, ...]) -> tuple[Array, int, int, int]:
    """x (..., rows, columns), or a copy, as cuBLAS can read it; is it transposed; the distances, in elements, from one
    row (or column, if transposed) to the next, and from one matrix to the next."""
    pitch, distance = _pitch(x), _distance(x, batch)
    if pitch is None or distance is None:
        x = cupy.ascontiguousarray(x if distance is not None else cupy.broadcast_to(x, (*batch, *x.shape[-2:])))
        pitch, distance = _pitch(x), _distance(x, batch)
    assert pitch is not None and distance is not None
    return x, *pitch, distance


def _pitch(x: Array) -> tuple[int, int] | None:
    """(0, elements from row to row), or (1, elements from column to column); None if neither rows nor columns are
    contiguous, or if they overlap. The distance of a single row or column is never used, but cuBLAS checks it."""
    rows, columns = x.shape[-2:]
    by_row, by_column = x.strides[-2] // x.itemsize, x.strides[-1] // x.itemsize
    if (by_column == 1 or columns == 1) and (by_row >= columns or rows == 1):
        pitch = columns if rows == 1 else by_row
        return (0, pitch) if pitch <= _INT_MAX else None
    if (by_row == 1 or rows == 1) and (by_column >= rows or columns == 1):
        pitch = rows if columns == 1 else by_column
        return (1, pitch) if pitch <= _INT_MAX else None
    return None


def _distance(x: Array, batch: tuple[int, ...]) -> int | None:
    """Elements from one matrix to the next in the broadcast batch; None if they do not lie at one distance."""
    lead = len(batch) - (x.ndim - 2)
    strides = (0,) * lead + tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides[:-2]))
    distance, reach = 0, 1
    for length, stride in zip(reversed(batch), reversed(strides)):
        if length == 1:
            continue
        if reach == 1:
            distance = stride
        elif stride != distance * reach:
            return None
        reach *= length
    return distance // x.itemsize


# ---------------------------------------------------------------- the library


class _Handle:
    """A cuBLAS handle, and the stream that it is set to."""

    def __init__(self) -> None:
        self.pointer = ctypes.c_void_p()
        _check(_library().cublasCreate_v2(ctypes.byref(self.pointer)), "a handle")
        self.stream: int | None = None
        # A workspace lives as long as its stream: two streams that shared one would write over each other.
        self.workspaces: weakref.WeakKeyDictionary[Any, Array] = weakref.WeakKeyDictionary()
        major = int(cupy.cuda.Device().compute_capability) // 10
        self.workspace_bytes = 32 * 2**20 if major >= 9 else 8 * 2**20  # what NVIDIA gives its own, by generation
        # Destroyed with its thread, but not at the end of the process, when CUDA may be gone already.
        weakref.finalize(self, _library().cublasDestroy_v2, self.pointer).atexit = False

    def on(self, stream: Any) -> _Handle:
        if stream.ptr != self.stream or stream not in self.workspaces:
            if stream not in self.workspaces:
                self.workspaces[stream] = cupy.empty(self.workspace_bytes, "uint8")
            workspace = self.workspaces[stream]
            _check(_library().cublasSetStream_v2(self.pointer, stream.ptr), "a stream")
            # In this order, because setting the stream resets the workspace.
            _check(_library().cublasSetWorkspace_v2(self.pointer, workspace.data.ptr, workspace.nbytes), "a workspace")
            self.stream = stream.ptr
        return self


def _handle() -> _Handle:
    """The handle of this thread and device, on the current stream."""
    handles = vars(_local).setdefault("handles", {})
    device = cupy.cuda.runtime.getDevice()
    if device not in handles:
        handles[device] = _Handle()
    return handles[device].on(cupy.cuda.get_current_stream())


def prepare() -> None:
    """Make the handle and workspace for the current stream, which must not be capturing yet."""
    _handle()


@functools.cache
def _library() -> Any:
    """The cuBLAS that CuPy has loaded."""
    cupy.cuda.device.get_cublas_handle()  # makes CuPy load it
    name = f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(
            f"matrix products on CuPy need {name}, which comes with the CUDA toolkit or CuPy's [ctk] extra: {error}"
        ) from error
    number: Any = ctypes.c_int
    pointer, distance = ctypes.c_void_p, ctypes.c_longlong
    library.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
    library.cublasDestroy_v2.argtypes = [pointer]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    matrix = [pointer, number, number, distance]  # where, type, pitch, distance to the next
    library.cublasGemmStridedBatchedEx.argtypes = [
        pointer, *[number] * 5, pointer, *matrix, *matrix, pointer, *matrix, number, number, number,
    ]  # fmt: skip
    return library


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"cuBLAS refused {what}: {_STATUS.get(status, 'status')} ({status})")


# cuBLAS reads these on the host, when it is called.
_ONE_32, _ZERO_32 = (ctypes.byref(ctypes.c_float(value)) for value in (1.0, 0.0))
_ONE_64, _ZERO_64 = (ctypes.byref(ctypes.c_double(value)) for value in (1.0, 0.0))
