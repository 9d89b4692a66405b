"""The door to the C files beside this one, through which their functions are called with NumPy's arrays.

    norm = Function("norm", "in x(a,l,c), in shift(a,c)?, ..., out y(a,l,c), ..., real eps, int silu")
    norm(x, shift, ..., y=y, ...)                 -> False if there is no library: then NumPy goes on

It lets nothing through that does not fit the declaration. How the library is made, and kept: build.py.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, NamedTuple

import numpy as np

from .build import SOURCES, library

__all__ = ["FUNCTIONS", "SOURCES", "Function", "library"]

ARRAYS = ("in", "out", "inout")
FUNCTIONS: list[Function] = []


class Function:
    """A function of a C file, int name(...), whose arguments are declared in the order of its C signature:

    in x(a,l,c)          an array that is read, of real numbers in C order; its lengths give the numbers a, l, c
    in int64 index(n)    an array of another dtype
    in shift(a,c)?       an array, or None for NULL
    out y(a,l,c)         an array that is written, which shares no memory with the others
    inout p(n)           the same, and its values are read
    int a, real eps      a number; a length among them is taken from the shapes
    """

    def __init__(self, name: str, declaration: str):
        self.name, self.arguments = name, [_argument(text) for text in re.split(r",\s*(?![^(]*\))", declaration)]
        FUNCTIONS.append(self)

    def __call__(self, **given: Any) -> bool:
        """Call it, with every argument by name but the lengths. False if there is no library.
        Errors: TypeError or ValueError for an array of another dtype, shape or layout, or one that shares memory."""
        arrays = {x.name: given[x.name] for x in self.arguments if x.kind in ARRAYS}
        char = next(
            arrays[x.name].dtype.char
            for x in self.arguments
            if x.kind in ARRAYS and x.dtype == "real" and arrays[x.name] is not None
        )
        found = library(char)
        if found is None:
            return False
        numbers = self._checked(arrays, char)
        real = ctypes.c_float if char == "f" else ctypes.c_double
        values: list[Any] = []
        for x in self.arguments:
            if x.kind == "int":
                values.append(ctypes.c_int64(numbers[x.name] if x.name in numbers else given[x.name]))
            elif x.kind == "real":
                values.append(real(given[x.name]))
            else:
                values.append(ctypes.c_void_p(None if given[x.name] is None else given[x.name].ctypes.data))
        if getattr(found, self.name)(*values):  # ctypes releases the GIL meanwhile
            raise MemoryError(f"{self.name}: no memory for its sums")
        return True

    def _checked(self, arrays: dict[str, Any], char: str) -> dict[str, int]:
        """The lengths by name."""
        numbers: dict[str, int] = {}
        for x in self.arguments:
            a = arrays.get(x.name)
            if x.kind not in ARRAYS or (a is None and x.optional):
                continue
            dtype = np.dtype(char if x.dtype == "real" else x.dtype)
            if (
                not isinstance(a, np.ndarray)
                or a.dtype != dtype
                or not a.flags.c_contiguous
                or a.ndim != len(x.lengths)
            ):
                what = f"{a.dtype} {a.shape} strides {a.strides}" if isinstance(a, np.ndarray) else repr(a)
                raise TypeError(
                    f"{self.name}: {x.name} must be a C array ({', '.join(x.lengths)}) of {dtype}, not {what}"
                )
            for length, n in zip(x.lengths, a.shape):
                if numbers.setdefault(length, n) != n:
                    raise ValueError(f"{self.name}: {x.name} {a.shape} has {length} = {n}, but it is {numbers[length]}")
            if x.kind != "in":
                if not a.flags.writeable:
                    raise ValueError(f"{self.name}: {x.name} cannot be written")
                for other, b in arrays.items():
                    if other != x.name and b is not None and np.may_share_memory(a, b):
                        raise ValueError(f"{self.name}: {x.name} shares memory with {other}")
        return numbers


class Argument(NamedTuple):
    kind: str  # in, out, inout, int, real
    name: str
    dtype: str  # of an array: real, or a name of NumPy's
    lengths: tuple[str, ...]
    optional: bool

    @property
    def in_c(self) -> str:
        """As it stands in the signature."""
        if self.kind not in ARRAYS:
            return {"int": "int64_t ", "real": "real "}[self.kind] + self.name
        element = "real" if self.dtype == "real" else f"{self.dtype}_t"
        return f"{'const ' if self.kind == 'in' else ''}{element} *restrict {self.name}"


def _argument(text: str) -> Argument:
    number = re.fullmatch(r"(int|real) (\w+)", text.strip())
    array = re.fullmatch(r"(in|out|inout) (?:(u?int\d+) )?(\w+)\(([\w,]+)\)(\?)?", text.strip())
    if number:
        return Argument(number[1], number[2], "", (), False)
    if array:
        return Argument(array[1], array[3], array[2] or "real", tuple(array[4].split(",")), bool(array[5]))
    raise ValueError(f"no declaration of an argument: {text!r}")
