"""The door to the C files beside this one, through which their functions are called with NumPy's arrays.

    norm = Function("norm", "in x(a,l,c), in shift(a,c)?, ..., out y(a,l,c), ..., real eps, int silu")
    norm(x, shift, ..., y=y, ...)                 -> False if there is no library: then NumPy goes on

It lets nothing through that does not fit the declaration. How the library is made, and kept: build.py.
"""

from __future__ import annotations

import ctypes
import operator
import re
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from ..threads import MORE_PARTS, threads_for
from .build import SOURCES, library

__all__ = ["FUNCTIONS", "SOURCES", "Function", "library"]

ARRAYS = ("in", "out", "inout")
FUNCTIONS: list[Function] = []
MOST_SHAPES = 256  # of a function, that are remembered


class Misfit(TypeError, ValueError):
    """An array of another dtype, shape or layout than declared, or one that overlaps an array which is written."""


class Function:
    """A function of a C file, int name(...), whose arguments are declared in the order of its C signature:

    in x(a,l,c)          an array that is read, of real numbers in C order; its lengths give the numbers a, l, c
    in int64 index(n,3)  an array of another dtype; a length may be fixed
    in shift(a,c)?       an array, or None for NULL
    out y(a,l,c)         an array that is written, which shares no memory with the others
    inout p(n)           the same, and its values are read
    inout list p(k,n)    a list of k arrays of any shape, in C order; n are their sizes, one after the other
    int a, real eps      a number, or double eps; a length among them is taken from the shapes
    sizes n              the sizes of the arrays of a list
    int part, int parts  it does one of so many parts; the call does them all, by the threads of pool.c

    prepares_in_each_part: each part does some work of its own first, so there are no more parts than threads.
    products: about how many times as long as a copy of its arrays it takes; then a small call is worth a thread, too.
    """

    def __init__(self, name: str, declaration: str, prepares_in_each_part: bool = False, products: int = 1):
        self.prepares_in_each_part, self.products = prepares_in_each_part, products
        self.name, self.arguments = name, [_argument(text) for text in re.split(r",\s*(?![^(]*\))", declaration)]
        self.names = [x.name for x in self.arguments]
        self.arrays = [x for x in self.arguments if x.kind in ARRAYS]
        self.fixed: dict[str, Any] = {n: int(n) for x in self.arrays for n in x.lengths if n.isdigit()}
        self.sizes = [x.name for x in self.arguments if x.kind == "sizes"]
        self.in_parts = self.names[-2:] == ["part", "parts"]
        self.in_order = operator.itemgetter(*(self.names[:-2] + ["parts", "threads"] if self.in_parts else self.names))
        self.reals = [x for x in self.arrays if x.dtype == "real"]
        self._lengths: dict[tuple[Any, ...], dict[str, int]] = {}  # by the shapes of the arrays, for those seen before
        self._ready: dict[str, Any] = {}  # what a call needs, by the character of the dtype of real arrays
        FUNCTIONS.append(self)

    def __call__(self, **given: Any) -> bool:
        """Call it, with every argument by name but the lengths. False if there is no library.
        Errors: Misfit, before anything is done."""
        char = self._char(given)
        loaded = library(char)
        if loaded is None:
            return False
        if char not in self._ready:
            self._ready[char] = self._prepared(loaded, char)
        function, arrays = self._ready[char]
        # In here a small call takes longer than in C, so this is written to be quick.
        shapes: list[Any] = []
        spans: list[Any] = []
        lists: dict[str, Any] = {}  # their lengths
        for x, name, dtype, is_list, is_written in arrays:
            a = given[name]
            if is_list:
                given[name] = self._list(x, a, dtype, is_written, lists, spans)
            elif a is None and x.optional:
                shapes.append(None)
            else:
                try:
                    start = _address_of(_byte_of(a)) if type(a) is ndarray and a.dtype is dtype else None
                except NO_BYTE:
                    start = None
                given[name] = start = self._start(x, a, dtype) if start is None else start
                spans.append((start, start + a.nbytes, is_written, name))
                shapes.append(a.shape)
        lengths = self._lengths.get(key := tuple(shapes))
        if lengths is None:
            if len(self._lengths) >= MOST_SHAPES:
                self._lengths.clear()
            lengths = self._lengths[key] = self._lengths_of(shapes)
        for length, n in lists.items():
            if lengths.get(length, n) != n:
                raise Misfit(f"{self.name}: its lists have {length} = {n}, but it is {lengths[length]}")
        spans.sort()
        last = 0
        for start, end, _, _ in spans:
            if start < last:
                self._check_apart(spans)
                break
            last = end
        given.update(lengths)
        given.update(lists)
        for name in self.sizes:
            given[name] = _in_a_row(ctypes.c_int64, lists[name])
        if self.in_parts:
            size = sum([end - start for start, end, _, _ in spans])
            given["threads"] = threads = threads_for(size * self.products)
            given["parts"] = threads * MORE_PARTS if threads > 1 and not self.prepares_in_each_part else threads
        if function(*self.in_order(given)):  # ctypes releases the GIL meanwhile
            raise MemoryError(f"{self.name}: no memory for its sums")
        return True

    def _lengths_of(self, shapes: list[Any]) -> dict[str, int]:
        """The lengths that these shapes give, None for an array that lacks. Errors: Misfit, if they contradict."""
        lengths = self.fixed.copy()
        for x, shape in zip((x for x in self.arrays if not x.is_list), shapes):
            if shape is None:
                continue
            if len(shape) != len(x.lengths):
                raise Misfit(f"{self.name}: {x.name} must be a C array ({', '.join(x.lengths)}), not of shape {shape}")
            for length, n in zip(x.lengths, shape):
                if lengths.setdefault(length, n) != n:
                    raise Misfit(f"{self.name}: {x.name} {shape} has {length} = {n}, but it is {lengths[length]}")
        return lengths

    def _char(self, given: dict[str, Any]) -> str:
        """The dtype of its real arrays; where it has none, float32."""
        for x in self.reals:
            a = given[x.name]
            if x.is_list:
                a = a[0] if a else None
            if a is not None:
                if not isinstance(a, np.ndarray) or a.dtype.char not in "fd":
                    raise Misfit(self._misfit(x, a, np.dtype("f")))
                return a.dtype.char
        return "f"

    def _prepared(self, loaded: ctypes.CDLL, char: str) -> tuple[Any, list[Any]]:
        """The function in C; and for each array what a call wants to know of it."""
        real = ctypes.c_float if char == "f" else ctypes.c_double
        function = getattr(loaded, f"{self.name}_in_parts" if self.in_parts else self.name)
        kinds = {"int": ctypes.c_int64, "real": real, "double": ctypes.c_double}
        function.argtypes = [kinds.get(x.kind, ctypes.c_void_p) for x in self.arguments]
        dtypes = [np.dtype(char if x.dtype == "real" else x.dtype) for x in self.arrays]
        return function, [(x, x.name, dtype, x.is_list, x.kind != "in") for x, dtype in zip(self.arrays, dtypes)]

    def _start(self, x: Argument, a: Any, dtype: np.dtype) -> int:
        """The address of an array of this argument. A call asks only for one that is not of the usual kind: a plain
        array, not empty, that may be written, in C order and of this very dtype. Errors: Misfit."""
        if not isinstance(a, np.ndarray) or a.dtype != dtype or not a.flags.c_contiguous:
            raise Misfit(self._misfit(x, a, dtype))
        if x.kind != "in" and not a.flags.writeable:
            raise Misfit(f"{self.name}: {x.name} cannot be written")
        return a.ctypes.data if a.size else 0  # an empty array is nowhere

    def _list(self, x: Argument, arrays: Any, dtype: np.dtype, is_written: bool, lengths: dict, spans: list) -> Any:
        """The addresses of the arrays of a list, for C; the sizes are added to the lengths, for C too."""
        name = x.name
        try:
            starts = list(map(_address_of, map(_byte_of, arrays)))
            usual = all([type(a) is ndarray and a.dtype is dtype for a in arrays])
        except NO_BYTE:
            usual = False
        if not usual:
            starts = [self._start(x, a, dtype) for a in arrays]
        sizes = [a.size for a in arrays]
        spans += [(start, start + n * dtype.itemsize, is_written, name) for start, n in zip(starts, sizes)]
        of_count, of_sizes = x.lengths
        if lengths.setdefault(of_count, len(sizes)) != len(sizes):
            raise Misfit(f"{self.name}: {x.name} has {len(sizes)} arrays, not {lengths[of_count]}")
        if lengths.setdefault(of_sizes, sizes) != sizes:
            raise Misfit(f"{self.name}: {x.name} has the sizes {sizes}, not {lengths[of_sizes]}")
        return _in_a_row(ctypes.c_void_p, starts)

    def _misfit(self, x: Argument, a: Any, dtype: np.dtype) -> str:
        what = f"{a.dtype} {a.shape} strides {a.strides}" if isinstance(a, np.ndarray) else repr(a)
        wanted = f"{'C arrays' if x.is_list else 'a C array'} ({', '.join(x.lengths)}) of {dtype}"
        return f"{self.name}: {x.name} must be {wanted}, not {what}"

    def _check_apart(self, spans: list[Any]) -> None:
        """Spans in the order of their places, of which some meet: each must begin behind all before it that are
        written, and, if it is written itself, behind all before it. Errors: Misfit."""
        any_end, any_name, written_end, written_name = 0, "", 0, ""
        for start, end, written, name in spans:
            if start < (any_end if written else written_end):
                pair = (name, any_name) if written else (written_name, name)
                raise Misfit(f"{self.name}: {' shares memory with '.join(pair)}")
            if end > any_end:
                any_end, any_name = end, name
            if written and end > written_end:
                written_end, written_name = end, name


# The quickest way to an address. It is an error if the array is not in C order, is empty, or cannot be written.
_byte_of: Any = ctypes.c_char.from_buffer
_address_of = ctypes.addressof
NO_BYTE = (TypeError, ValueError, BufferError)


def _in_a_row(kind: Any, values: list[int]) -> Any:
    return (kind * len(values))(*values)


class Argument(NamedTuple):
    kind: str  # in, out, inout, int, real, double, sizes
    name: str
    dtype: str  # of an array: real, or a name of NumPy's
    lengths: tuple[str, ...]
    optional: bool
    is_list: bool

    @property
    def in_c(self) -> str:
        """As it stands in the signature."""
        if self.kind not in ARRAYS:
            return {"int": "int64_t ", "sizes": "const int64_t *restrict "}.get(self.kind, self.kind + " ") + self.name
        element = {"real": "real", "float32": "float", "float64": "double"}.get(self.dtype, f"{self.dtype}_t")
        pointer = "*const *restrict" if self.is_list else "*restrict"
        return f"{'const ' if self.kind == 'in' else ''}{element} {pointer} {self.name}"


def _argument(text: str) -> Argument:
    number = re.fullmatch(r"(int|real|double|sizes) (\w+)", text.strip())
    array = re.fullmatch(r"(in|out|inout) (list )?(?:(float32|float64|u?int\d+) )?(\w+)\(([\w,]+)\)(\?)?", text.strip())
    if number:
        return Argument(number[1], number[2], "", (), False, False)
    if array:
        kind, is_list, dtype, name, lengths, optional = array.groups()
        return Argument(kind, name, dtype or "real", tuple(lengths.split(",")), bool(optional), bool(is_list))
    raise ValueError(f"no declaration of an argument: {text!r}")
