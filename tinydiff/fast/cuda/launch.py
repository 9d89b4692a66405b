"""CUDA kernels from files, behind a launcher that checks what CUDA does not check.

CUDA itself checks no argument: it takes float64 for a float*, a strided view, a float for an int, one argument too few.
So the parameters that a kernel declares are read from its file, and every call is compared with them:

    Run* x              a C-contiguous CuPy array of T, float32 or float64, the same for all; LANES elements at once
    T* x                the same, one element at a time
    bool* x, double* x  a C-contiguous CuPy array of that type
    T* x_or_null        an array, or None
    T scale, double s   a number, passed in that type
    int n, long long n  an int of 32 bits, of 64 bits
    Index n             an int of 32 bits, or of 64 if an argument of the call needs them
    Table<Some> table   a NumPy array of such structs: table.py makes it

A kernel is compiled when it is first launched with a type, width of Run and of Index, and size of block: common.cuh
says what these are.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy

from ...backend import Array

FOLDER = Path(__file__).parent

SOURCES: list[Source] = []  # all files with kernels
ELEMENTWISE: list[Any] = []  # all kernels that CuPy makes of a function in a file; the tests compile all of both

THREADS = 256  # per block, for kernels that work with any number

WIDE = 2**31  # for so many elements or more, Index has 64 bits

# The types of C: T by the character of its dtype; arrays; ints, with the least and the largest value.
TYPES = {"f": "float", "d": "double"}
ARRAYS = {
    "bool*": numpy.dtype("bool"),
    "float*": numpy.dtype("float32"),
    "double*": numpy.dtype("float64"),
    "long long*": numpy.dtype("int64"),
    "unsigned long long*": numpy.dtype("uint64"),
}
INTEGERS: dict[str, tuple[Any, int, int]] = {
    "int": (numpy.int32, -(2**31), 2**31 - 1),
    "unsigned int": (numpy.uint32, 0, 2**32 - 1),
    "long long": (numpy.int64, -(2**63), 2**63 - 1),
    "unsigned long long": (numpy.uint64, 0, 2**64 - 1),
}
DEFAULTS: dict[str, Any] = {"TYPE": "float", "LANES": 1, "THREADS": THREADS, "INDEX_BITS": 32}  # as in common.cuh


# ---------------------------------------------------------------- files


class Source:
    """A .cu file, and its kernels by name: `source["im2col"]`."""

    def __init__(self, name: str | Path, **macros: Sequence[Any]):
        """name: of a file in this folder. macros: the values that it may be compiled for, such as LANES=(1, 2, 4)."""
        self.path = FOLDER / name
        self.macros = {**{macro: (value,) for macro, value in DEFAULTS.items()}, **macros}
        self.text = text_of(self.path)
        self.code = re.sub(r"//[^\n]*|/\*.*?\*/", "", self.text, flags=re.S)  # without comments
        found = re.findall(r'extern "C" __global__ void __launch_bounds__\(THREADS\) (\w+)\((.*?)\)', self.code, re.S)
        self.kernels = {name: Kernel(self, name, declared) for name, declared in found}
        SOURCES.append(self)

    def __getitem__(self, name: str) -> Kernel:
        return self.kernels[name]

    def options(self, **asked: Any) -> tuple[str, ...]:
        """The compiler's options, for values of the macros; the first of those declared for any that is not given.

        Errors: ValueError for a value that was not declared.
        """
        for macro, values in self.macros.items():
            if asked.setdefault(macro, values[0]) not in values:
                raise ValueError(f"{self.path.name} is compiled for {macro} in {values}, not {asked[macro]}")
        return tuple([f"-D{macro}={asked[macro]}" for macro in self.macros])

    def combinations(self) -> Iterator[tuple[str, ...]]:
        """The options of every combination that a call may ask for."""
        for values in itertools.product(*self.macros.values()):
            asked = dict(zip(self.macros, values))
            if (asked["TYPE"], asked["LANES"]) != ("double", 4):  # more than 16 bytes
                yield self.options(**asked)

    def members(self, struct: str) -> list[Parameter]:
        (declared,) = re.findall(rf"struct {struct} \{{(.*?)\}};", self.code, re.S)
        return _parameters(declared, ";")

    def table(self, struct: str) -> numpy.dtype:
        """A Table<struct>, as C lays it out: .tensor is an array of the structs, and a pointer is a uint64."""
        members = [
            (m.name, numpy.uint64 if m.kind.endswith("*") else INTEGERS[m.kind][0]) for m in self.members(struct)
        ]
        return numpy.dtype([("tensor", numpy.dtype(members, align=True), self.macros["TENSORS"])])


def text_of(path: Path) -> str:
    """A CUDA file with its headers pasted in. CuPy caches compiled kernels by their text, so it would not notice a
    change in a header that the compiler includes."""
    return re.sub(r'^#include "(.+)"$', lambda m: text_of(path.parent / m[1]), path.read_text("utf-8"), flags=re.M)


def elementwise(name: str, function: str) -> Any:
    """A cupy.ElementwiseKernel of a device function of numbers, which checks its arguments itself.

    Such a kernel takes complex numbers, other orders in memory and broadcasting as well. name: of a file in this
    folder.
    """
    text = text_of(FOLDER / name)
    (declared,) = re.findall(rf"__device__ Number {function}\((.*?)\)", text)
    names = [p.name for p in _parameters(declared, ",")]
    kernel = cupy.ElementwiseKernel(
        ", ".join(f"T {n}" for n in names),
        "T result",
        f"result = {function}({', '.join(names)})",
        f"tinydiff_{function}",
        preamble=text,
    )
    ELEMENTWISE.append(kernel)
    return kernel


# ---------------------------------------------------------------- kernels


class Parameter(NamedTuple):
    """The declaration of one argument of a kernel, or of one member of a struct."""

    declaration: str
    kind: str  # Run*, T*, bool*, T, int or Index ...
    name: str
    constant: bool
    nullable: bool


def _parameters(declared: str, separator: str) -> list[Parameter]:
    found = []
    for text in declared.split(separator):
        declaration = " ".join(text.split())
        if declaration:
            kind, _, name = declaration.rpartition(" ")
            plain = kind.removeprefix("const ")
            found.append(Parameter(declaration, plain, name, plain != kind, name.endswith("_or_null")))
    return found


class Kernel:
    """A kernel of a file, compiled for each combination of macros when it is first needed."""

    def __init__(self, source: Source, name: str, declared: str):
        self.source, self.name = source, name
        self.parameters = _parameters(declared, ",")
        of_type = [i for i, p in enumerate(self.parameters) if p.kind in ("Run*", "T*")]
        self._of_type = of_type[0] if of_type else None  # the argument whose dtype is T
        self._counts_wide = 64 in source.macros["INDEX_BITS"]
        self._tables = {k: source.table(k[6:-1]) for k in {p.kind for p in self.parameters} if k.startswith("Table<")}
        self._built: dict[tuple[str | None, int, bool, int], Any] = {}

    def __call__(
        self, grid: tuple[int, ...], block: int, *arguments: Any, lanes: int = 1, dtype: numpy.dtype | None = None
    ) -> None:
        """Launch a grid of blocks of `block` threads. For an empty grid nothing is launched. dtype: T, for a kernel
        whose arrays of T are in a table.

        Errors: TypeError for arguments that are not as declared; ValueError for another size of block.
        """
        if len(arguments) != len(self.parameters):
            declared = ", ".join(p.declaration for p in self.parameters)
            raise TypeError(
                f"kernel {self.name} takes {len(self.parameters)} arguments ({declared}), not {len(arguments)}"
            )
        if self._of_type is not None:
            dtype = getattr(arguments[self._of_type], "dtype", None)
        elif self._tables and (dtype is None or dtype.char not in TYPES):
            raise TypeError(f"kernel {self.name} needs dtype, the type T, to be float32 or float64, not {dtype}")
        wide = self._counts_wide and any(
            a.size >= WIDE if isinstance(a, cupy.ndarray) else type(a) is int and a >= WIDE for a in arguments
        )
        passed = tuple([self._passed(p, a, dtype, wide) for p, a in zip(self.parameters, arguments)])
        key = (None if dtype is None else dtype.char, lanes, wide, block)
        if key not in self._built:
            self._built[key] = self.build(*key)
        if math.prod(grid):
            self._built[key](grid, (block,), passed)

    def each_element(self, threads: int, *arguments: Any, lanes: int = 1) -> None:
        """Launch at least so many threads. The number is also the last argument; the kernel skips threads beyond it."""
        self((-(-threads // THREADS),), THREADS, *arguments, threads, lanes=lanes)

    def build(self, char: str | None, lanes: int, wide: bool, block: int) -> Any:
        """The compiled kernel. Errors: ValueError for a value of a macro that the Source does not have."""
        asked = {"TYPE": TYPES[char]} if char else {}
        options = self.source.options(**asked, LANES=lanes, THREADS=block, INDEX_BITS=64 if wide else 32)
        return cupy.RawKernel(self.source.text, self.name, options)

    def _passed(self, parameter: Parameter, a: Any, dtype: Any, wide: bool) -> Any:
        """The argument as it goes to the device. Errors: TypeError if it is not as declared."""
        declaration, kind, _, _, nullable = parameter
        if kind in ("T*", "Run*"):
            if nullable and a is None:
                return a
            if isinstance(a, cupy.ndarray) and a.dtype == dtype and dtype.char in "fd" and a.flags.c_contiguous:
                return a
            wanted = "a C-contiguous CuPy array, all of float32 or of float64"
        elif kind in ARRAYS:
            if nullable and a is None:
                return a
            if isinstance(a, cupy.ndarray) and a.dtype == ARRAYS[kind] and a.flags.c_contiguous:
                return a
            wanted = f"a C-contiguous CuPy array of {ARRAYS[kind]}"
        elif kind in INTEGERS:
            convert, least, most = INTEGERS[kind]
            if type(a) is int and least <= a <= most:
                return convert(a)
            wanted = f"an int from {least} to {most}"
        elif kind == "Index":
            if type(a) is int and 0 <= a < 2**63:
                return numpy.int64(a) if wide else numpy.uint32(a)
            wanted = "an int"
        elif kind in ("T", "double"):
            if type(a) in (int, float):
                return dtype.type(a) if kind == "T" else numpy.float64(a)
            wanted = "a Python number"
        else:
            if isinstance(a, numpy.ndarray) and a.ndim == 0 and a.dtype == self._tables[kind]:
                return a
            wanted = f"a NumPy array of {self._tables[kind]}"
        raise TypeError(f"kernel {self.name}: {declaration} takes {wanted}, not {_described(a)}")


def widest_run(length: int, *arrays: Array | None) -> int:
    """How many neighbouring elements can be moved at once in rows of this length: at most 16 bytes."""
    present = [a for a in arrays if a is not None]
    lanes = 16 // present[0].itemsize
    while length % lanes or any(a.data.ptr % (lanes * a.itemsize) for a in present):
        lanes //= 2
    return lanes


def _described(a: Any) -> str:
    module = type(a).__module__.split(".")[0]
    return f"{module} {a.dtype} of shape {a.shape} and strides {a.strides}" if hasattr(a, "strides") else repr(a)
