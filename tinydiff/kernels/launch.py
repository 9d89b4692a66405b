"""Kernels in CUDA behind a launcher that checks what CUDA does not, and a list of all of them.

CUDA itself takes anything for anything: float64 for a float*, a strided view, a float that reads as 0, one argument too
few. So a kernel declares its parameters, and every call is held against them:

    Run* x              a C-contiguous CuPy array of T, float32 or float64, the same for all; LANES elements at once
    T* x, bool* x       the same, one element at a time; an array of bool
    T* x_or_null        the same, or None
    T scale             a number, passed as T
    int n, Index n      a number of 32 bits; of as many as it takes

In the code T is the type of the elements, Run a struct of LANES of them, `lane[LANES]`, THREADS the size of a block,
and Index a type that counts all elements of the arguments: of 32 bits while they suffice, as those are much the faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cupy
import numpy

from ..backend import Array

KERNELS: list[Any] = []  # all there are, each with a name and sources(), and
ELEMENTWISE: list[Any] = []  # all of CuPy's own kind, and
RAW: list[Any] = []  # those that a launcher elsewhere checks: the tests compile every one of them

THREADS = 256  # a block, where the kernel does not care

WIDE = 2**31  # from so many elements on, Index has 64 bits

_BOOL = numpy.dtype("bool")

EACH_ELEMENT = """
    Index thread = blockIdx.x * (Index)THREADS + threadIdx.x;
    if (thread >= threads) return;
"""


def elementwise(inputs: str, outputs: str, body: str, name: str, helpers: str = "") -> Any:
    """A cupy.ElementwiseKernel, which checks its arguments itself, entered in ELEMENTWISE. helpers: device functions.

    CuPy pastes the names of the parameters into its own text: long words, of which no other name is made, are safe.
    """
    kernel = cupy.ElementwiseKernel(inputs, outputs, body, f"tinydiff_{name}", preamble=helpers)
    ELEMENTWISE.append(kernel)
    return kernel


def raw(source: str, name: str) -> Any:
    """A cupy.RawKernel, of whose arguments nothing is checked here, entered in RAW."""
    kernel = cupy.RawKernel(source, name)
    RAW.append(kernel)
    return kernel


def widest_run(length: int, *arrays: Array | None) -> int:
    """How many neighbours of rows of this length can be moved at once: at most 16 bytes of them."""
    present = [a for a in arrays if a is not None]
    lanes = 16 // present[0].itemsize
    while length % lanes or any(a.data.ptr % (lanes * a.itemsize) for a in present):
        lanes //= 2
    return lanes


class Parameter(NamedTuple):
    """What a kernel declares about one argument."""

    declaration: str
    kind: str  # Run*, T*, bool*, T, int or Index
    nullable: bool


def _parameters(declared: str) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(text, text.removeprefix("const ").split()[0], text.endswith("_or_null"))
        for text in declared.split(", ")
    )


@dataclass(eq=False)
class Kernel:
    """A kernel in CUDA, compiled for each type, width of Run and Index, and size of block that it meets."""

    name: str
    declared: str  # its parameters, separated by ", "
    body: str
    helpers: str = ""  # device functions and structs
    blocks: tuple[int, ...] = (THREADS,)  # the sizes of block that it can be launched with
    parameters: tuple[Parameter, ...] = field(init=False)
    _built: dict[tuple[str, int, bool, int], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.parameters = _parameters(self.declared)
        KERNELS.append(self)

    def __call__(self, grid: tuple[int, ...], block: int, *arguments: Any, lanes: int = 1) -> None:
        """Launch a grid of blocks of `block` threads. An empty grid is no launch.

        Errors: TypeError for arguments that are not what was declared; ValueError for another size of block.
        """
        if len(arguments) != len(self.parameters):
            raise TypeError(
                f"kernel {self.name} takes {len(self.parameters)} arguments ({self.declared}), not {len(arguments)}"
            )
        if block not in self.blocks:
            raise ValueError(f"kernel {self.name} runs in blocks of one of {self.blocks} threads, not {block}")
        dtype: Any = getattr(arguments[0], "dtype", None)
        wide = any(a.size >= WIDE if isinstance(a, cupy.ndarray) else type(a) is int and a >= WIDE for a in arguments)
        passed = tuple([self._passed(p, a, dtype, wide) for p, a in zip(self.parameters, arguments)])
        if math.prod(grid):
            key = (dtype.char, lanes, wide, block)
            if key not in self._built:
                self._built[key] = cupy.RawKernel(self.source(*key), self.name)
            self._built[key](grid, (block,), passed)

    def each_element(self, threads: int, *arguments: Any, lanes: int = 1) -> None:
        """Launch as many threads, a number that becomes the last argument. The body has to begin with EACH_ELEMENT."""
        self((-(-threads // THREADS),), THREADS, *arguments, threads, lanes=lanes)

    def source(self, char: str, lanes: int, wide: bool, block: int) -> str:
        return f"""
        typedef {"float" if char == "f" else "double"} T;
        typedef {"long long" if wide else "unsigned int"} Index;
        const int LANES = {lanes}, THREADS = {block};
        struct __align__({lanes * numpy.dtype(char).itemsize}) Run {{ T lane[LANES]; }};
        {self.helpers}
        extern "C" __global__ void __launch_bounds__({block}) {self.name}({self.declared}) {{
          {self.body}
        }}"""

    def sources(self) -> Iterator[str]:
        """The code at the ends of what a call may ask for: the least of everything, and the most."""
        for char, most in (("f", 4), ("d", 2)):
            yield self.source(char, 1, True, min(self.blocks))
            yield self.source(char, most, False, max(self.blocks))

    def _passed(self, parameter: Parameter, a: Any, dtype: Any, wide: bool) -> Any:
        """The argument as it goes to the device, if it is what was declared."""
        declaration, kind, nullable = parameter
        if kind == "int":
            if type(a) is int and -(2**31) <= a < 2**31:
                return numpy.int32(a)
            wanted = "an int of 32 bits"
        elif kind == "Index":
            if type(a) is int:
                return numpy.int64(a) if wide else numpy.uint32(a)
            wanted = "an int"
        elif kind == "T":
            if type(a) in (int, float):
                return dtype.type(a)
            wanted = "a Python number"
        else:
            if nullable and a is None:
                return a
            right = _BOOL if kind == "bool*" else dtype
            if isinstance(a, cupy.ndarray) and a.dtype == right and dtype.char in "fd" and a.flags.c_contiguous:
                return a
            wanted = "a C-contiguous CuPy array, " + ("of bool" if kind == "bool*" else "all of float32 or of float64")
        raise TypeError(f"kernel {self.name}: {declaration} takes {wanted}, not {_described(a)}")


def _described(a: Any) -> str:
    module = type(a).__module__.split(".")[0]
    return f"{module} {a.dtype} of shape {a.shape} and strides {a.strides}" if hasattr(a, "strides") else repr(a)


# ---------------------------------------------------------------- what the threads of a block find together


FOLD = """
// Add up, by +=, what `count` threads hold that are `apart` from one another; `place` is this thread's place among
// them, at least `count` if it has none. The one at place 0 has the sum. The order is always the same. All threads of
// the block must call it, and `memory` has room for one value a thread.
template <class Value> __device__ void fold(Value& mine, Value* memory, int place, int count, int apart) {
  while (count > 1) {
    int half = (count + 1) / 2;
    __syncthreads();  // whoever read the memory before has done so
    if (place >= half && place < count) memory[threadIdx.x - half * apart] = mine;
    __syncthreads();
    if (place + half < count) mine += memory[threadIdx.x];
    count = half;
  }
}

// What thread number `first` holds, for all that name it. All threads of the block must call it.
template <class Value> __device__ Value held_by(int first, const Value& mine, Value* memory) {
  __syncthreads();
  if (threadIdx.x == first) memory[first] = mine;
  __syncthreads();
  return memory[first];
}
"""
