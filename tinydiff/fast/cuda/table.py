"""Kernels over lists of tensors, in one launch for many: the host's side of table.cuh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy

from ...backend import Array
from .launch import THREADS, TYPES, Source

TENSORS = 80  # per launch: their table must fit into the 4 KB that arguments may have
BLOCK_ELEMENTS = 4 * THREADS  # per block, if the tensor has as many

MACROS: dict[str, Any] = {"TYPE": ("float", "double"), "TENSORS": (TENSORS,)}  # of a file with such kernels


class TableKernel:
    """A kernel whose first parameter is Table<Struct> table. Each tensor has one array for every pointer of the struct,
    all of one shape and dtype, float32 or float64."""

    def __init__(self, source: Source, name: str, *, most_blocks: int = 1024):
        """most_blocks: per tensor, at most; with fewer blocks, each block does more."""
        self.kernel, self.name, self.most_blocks = source[name], name, most_blocks
        struct = self.kernel.parameters[0].kind.removeprefix("Table<").removesuffix(">")
        self.table = source.table(struct)
        self.arrays = [m for m in source.members(struct) if m.kind == "T*"]

    def __call__(self, columns: Sequence[Sequence[Array]], *arguments: Any) -> None:
        """columns: for each array of the struct, the arrays of all tensors. Arrays not declared const are changed in
        place.

        Errors: TypeError or ValueError unless the arrays of each tensor are all float32 or all float64, of one shape.
        """
        self._check(columns)
        work = [[cupy.ascontiguousarray(a) for a in column] for column in columns]
        for char in TYPES:
            of_type = [row for row, a in enumerate(work[0]) if a.dtype.char == char and a.size]
            for start in range(0, len(of_type), TENSORS):
                self._launch(numpy.dtype(char), of_type[start : start + TENSORS], work, arguments)
        for declared, column, used in zip(self.arrays, columns, work):
            if not declared.constant:
                for a, w in zip(column, used):
                    if w is not a:
                        a[...] = w

    def _launch(self, dtype: numpy.dtype, rows: list[int], work: list[list[Array]], arguments: Any) -> None:
        table = numpy.zeros((), self.table)
        tensors = table["tensor"][: len(rows)]
        for declared, column in zip(self.arrays, work):
            tensors[declared.name] = [column[row].data.ptr for row in rows]
        tensors["size"] = [work[0][row].size for row in rows]
        tensors["index"] = rows
        blocks = min(-(-int(tensors["size"].max()) // BLOCK_ELEMENTS), self.most_blocks)
        self.kernel((blocks, len(rows)), THREADS, table, *arguments, dtype=dtype)

    def _check(self, columns: Sequence[Sequence[Array]]) -> None:
        if len(columns) != len(self.arrays):
            names = ", ".join(m.name for m in self.arrays)
            raise TypeError(
                f"kernel {self.name} takes {len(self.arrays)} arrays per tensor ({names}), not {len(columns)}"
            )
        for arrays in zip(*columns, strict=True):
            if len({a.shape for a in arrays}) > 1:
                raise ValueError(f"kernel {self.name}: the arrays of a tensor have shapes {[a.shape for a in arrays]}")
            if len({a.dtype for a in arrays}) > 1 or arrays[0].dtype.char not in TYPES:
                kinds = ", ".join(str(a.dtype) for a in arrays)
                raise TypeError(f"kernel {self.name} takes arrays all of float32 or all of float64, not of {kinds}")
