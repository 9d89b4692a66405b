"""Picking elements, and the transposed map: adding them back at their places.

Let element k(i) of x be picked as z_i. Then

    sum_i z̄_i dz_i = sum_i z̄_i dx_k(i) = sum_k x̄_k dx_k,    x̄_k = sum of the z̄_i with k(i) = k

so the adjoint of an element is the sum over the times that it was picked.
"""

from __future__ import annotations

from typing import Any

from ..backend import operand, xp
from ..engine import Tensor, composite, op
from ..operators import array_of
from .shape import axis_of, reshape


@op
def getitem(x: Any, *, index: Any) -> Any:
    """z = x[index]; NumPy's indexing: slices, numbers, None, `...`, arrays of integers or of bool

    dz = dx[index]          x̄ = zeros, with z̄ added at the index
    """
    return x[plain(index)]


@getitem.vjp
def getitem_vjp(g: Any, _z: Any, _x: Any, *, index: Any) -> Any:
    return scatter_add(g, index=index, shape=_x.shape)


@op
def scatter_add(x: Any, *, index: Any, shape: tuple[int, ...]) -> Any:
    """z = zeros of the shape, with x added at the index, as often as an element occurs in it

    The transpose of getitem:          x̄ = z̄[index]
    """
    z = xp.zeros(shape, x.dtype)
    if is_basic(index):
        z[index] = x
    else:
        add_at(z, plain(index), x)
    return z


@scatter_add.vjp
def scatter_add_vjp(g: Any, _z: Any, _x: Any, *, index: Any, shape: tuple[int, ...]) -> Any:
    return getitem(g, index=index)  # not g[index]: an array cannot be indexed with a Tensor


@op
def index_add(x: Any, values: Any, *, index: Any) -> Any:
    """z = x, with the values added at x[index], as often as an element occurs in the index

    dz = dx + dvalues at the index          x̄ = z̄,   values̄ = z̄[index]
    """
    z = x.copy()
    try:
        add_at(z, plain(index), values)
    except ValueError:
        picked = x[plain(index)].shape
        raise ValueError(
            f"index_add: x {x.shape} at the index has shape {picked}, which the values {values.shape} do not fit"
        ) from None
    return z


@index_add.vjp
def index_add_vjp(g: Any, _z: Any, _x: Any, _values: Any, *, index: Any) -> Any:
    return g, lambda: getitem(g, index=index)


def plain(index: Any) -> Any:
    """An index with arrays where it has Tensors."""
    return tuple(array_of(i) for i in index) if isinstance(index, tuple) else array_of(index)


def is_basic(index: Any) -> bool:
    """Only slices, numbers, None and `...`: such an index picks no element twice; x[index] shares memory with x."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, (int, slice)) and not isinstance(i, bool) for i in parts)


def add_at(z: Any, index: Any, values: Any) -> None:
    """z[index] += values, counting an element that occurs several times as often as it occurs."""
    if z.dtype.kind == "c":  # CuPy has it for real numbers alone
        add_at(z.real, index, values.real)
        add_at(z.imag, index, values.imag)
    else:
        xp.add.at(z, index, values)


@composite
def take(x: Any, indices: Any, *, axis: int | None = None) -> Any:
    """x at the indices along the axis (None: of the flattened array), as numpy.take: the shape of the indices takes the
    place of the axis. An index out of range is an IndexError on NumPy; on a GPU it is not noticed."""
    if axis is None:
        return getitem(reshape(x, shape=-1), index=indices)  # (...) -> (M,) -> indices.shape
    return getitem(x, index=(slice(None),) * axis_of(axis, x.ndim, "take") + (indices,))


@composite
def take_along_axis(x: Any, indices: Any, *, axis: int) -> Any:
    """z[.., i, ..] = x[.., indices[.., i, ..], ..] along the axis, as numpy.take_along_axis."""
    if indices.ndim != x.ndim:
        raise ValueError(
            f"take_along_axis: indices of shape {indices.shape} for an array of shape {x.shape}: the ranks must agree"
        )
    axis = axis_of(axis, x.ndim, "take_along_axis")
    grid = [xp.arange(n).reshape([-1 if b == a else 1 for b in range(x.ndim)]) for a, n in enumerate(x.shape)]
    return getitem(x, index=tuple(indices if a == axis else grid[a] for a in range(x.ndim)))


@composite
def embedding(index: Any, table: Any) -> Any:
    """Rows of a table, by number: index of any shape (...), table (n, d) -> (..., d).

    Errors: TypeError for an index that is not of integers; ValueError for a table that is not a matrix; on NumPy,
    IndexError for a number out of range.
    """
    index = index if isinstance(index, Tensor) else operand(index)
    if not isinstance(index, int) and index.dtype.kind not in "iu":
        raise TypeError(f"embedding: the index must be of integers, not {index.dtype} of shape {index.shape}")
    if table.ndim != 2:
        raise ValueError(f"embedding: the table must be a matrix (n, d), not an array of shape {table.shape}")
    return getitem(table, index=index)
