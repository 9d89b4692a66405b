"""Tensor: an array that remembers how it was computed.

A Tensor holds an array (`data`), the gradient that `backward` leaves there (`grad`), and the node of the
tape that made it (`node`; None for a leaf). Its operators and methods only name the op they mean: the ops
enter themselves in `OPS` as they are defined (tape.py), and everything about an op, its gradient included,
stands in one place in tinydiff/ops.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from typing import Any

from . import backend, replays
from .backend import Array

OPS: dict[str, Callable[..., Any]] = {}  # every op by name


class Tensor:
    """An array and its place in the computation. Make one with `tinydiff.tensor`."""

    __slots__ = ("_data", "_grad", "node", "_requires_grad", "version", "__weakref__")
    __array_ufunc__ = None  # an array on the left leaves the operation to us
    __array_priority__ = 1000.0
    __hash__ = object.__hash__

    def __init__(self, data: Array, requires_grad: bool = False, node: Any = None, version: list[int] | None = None):
        self._data = data
        self._grad: Tensor | None = None
        self.node = node
        self._requires_grad = requires_grad
        self.version = [0] if version is None else version  # a list, because views share it

    # ---- what it is

    @property
    def data(self) -> Array:
        """The array. Writing into it by `x.data[...] =` goes unseen, except under detect_anomaly; `x.data = a` and
        `x.data -= a` are seen."""
        if replays.recording is not None:
            replays.see(self)
        return self._data

    @data.setter
    def data(self, array: Array) -> None:
        array = backend.to_device(array_of(array))
        if array.shape != self._data.shape or array.dtype != self._data.dtype:
            raise ValueError(
                f"the data of a Tensor of shape {self.shape}, {self.dtype} cannot become an array of shape "
                f"{array.shape}, {array.dtype}"
            )
        if recording := replays.current():
            recording.replaced(self)
        self._data = array
        self.version[0] += 1

    @property
    def grad(self) -> Tensor | None:
        """The gradient that `backward` has left here."""
        if replays.recording is not None:
            replays.grad_read(self)
        return self._grad

    @grad.setter
    def grad(self, g: Tensor | None) -> None:
        self._grad = g
        if replays.recording is not None:
            replays.grad_set(self)

    @property
    def requires_grad(self) -> bool:
        """Does a gradient flow to this Tensor? May be set, on a floating Tensor."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if wanted:
            check_floating(self._data)
        elif self.node is not None:
            raise RuntimeError(
                f"a Tensor of shape {self.shape} that {self.node.op.name} computed cannot stop requiring a gradient: "
                "take x.detach()"
            )
        self._requires_grad = wanted

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def size(self) -> int:
        return self._data.size

    @property
    def dtype(self) -> Any:
        return self._data.dtype

    @property
    def T(self) -> Tensor:
        return OPS["transpose"](self)

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a Tensor of shape () has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        about = f", dtype={self.dtype}" if str(self.dtype) != "float32" else ""
        about += f", node={self.node.op.name}" if self.node else ", requires_grad=True" if self.requires_grad else ""
        return f"tensor({str(backend.to_host(self._data))}{about})".replace("\n", "\n" + " " * 7)

    # ---- out of the graph, and out of the device

    def detach(self) -> Tensor:
        """The same array without its history."""
        return Tensor(self._data, version=self.version)

    def numpy(self) -> Any:
        """A NumPy array of the values, without history. Waits for the device."""
        return backend.to_host(self._data)

    def item(self) -> float:
        """The only element, as a Python number. Waits for the device."""
        if self.size != 1:
            raise ValueError(f"item() is for a Tensor of one element, this one has shape {self.shape}")
        return backend.to_host(self._data).item()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        """For numpy.asarray(x) and what uses it; a NumPy function would lose the gradient,
        so not where there is one.
        """
        if self.requires_grad:
            raise TypeError(
                f"NumPy would lose the gradient of a Tensor of shape {self.shape}: use tinydiff.ops, "
                "or x.numpy() for the values alone"
            )
        array = self.numpy()
        return array.astype(dtype) if copy or dtype not in (None, array.dtype) else array

    def tolist(self) -> Any:
        return backend.to_host(self._data).tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    # ---- gradients

    def backward(self, grad: Any = None, create_graph: bool = False, retain_graph: bool | None = None) -> None:
        """Add the gradient of this Tensor with respect to every leaf that requires one to the leaf's
        `.grad`; see backward.backward.
        """
        from .backward import backward  # which is written in terms of Tensor

        backward(self, grad, create_graph=create_graph, retain_graph=retain_graph)

    def zero_grad(self) -> None:
        self.grad = None

    # ---- operators

    def __neg__(self) -> Tensor:
        return OPS["negative"](self)

    def __pos__(self) -> Tensor:
        return self

    def __abs__(self) -> Tensor:
        return OPS["abs"](self)

    def __add__(self, other: Any) -> Tensor:
        return OPS["add"](self, other)

    def __radd__(self, other: Any) -> Tensor:
        return OPS["add"](other, self)

    def __sub__(self, other: Any) -> Tensor:
        return OPS["subtract"](self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return OPS["subtract"](other, self)

    def __mul__(self, other: Any) -> Tensor:
        return OPS["multiply"](self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return OPS["multiply"](other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return OPS["divide"](self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return OPS["divide"](other, self)

    def __pow__(self, other: Any) -> Tensor:
        return OPS["power"](self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return OPS["power"](other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return OPS["matmul"](self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return OPS["matmul"](other, self)

    def __getitem__(self, index: Any) -> Tensor:
        return OPS["getitem"](self, index=index)

    def __setitem__(self, index: Any, value: Any) -> None:
        index = tuple(array_of(i) for i in index) if isinstance(index, tuple) else array_of(index)
        self._data[index] = self._change_in_place("x[index] = y", value)

    # In place, as in NumPy; the array is the same one afterwards.

    def __iadd__(self, other: Any) -> Tensor:
        self._data += self._change_in_place("x += y", other)
        return self

    def __isub__(self, other: Any) -> Tensor:
        self._data -= self._change_in_place("x -= y", other)
        return self

    def __imul__(self, other: Any) -> Tensor:
        self._data *= self._change_in_place("x *= y", other)
        return self

    def __itruediv__(self, other: Any) -> Tensor:
        self._data /= self._change_in_place("x /= y", other)
        return self

    def _change_in_place(self, what: str, other: Any) -> Any:
        """Note the change, and give the array of the other operand."""
        from .modes import grad_enabled

        if grad_enabled():
            for name, x in (("x", self), ("y", other)):
                if isinstance(x, Tensor) and x.requires_grad:
                    raise RuntimeError(
                        f"{what}, where {name} has shape {x.shape} and requires a gradient, would lose that gradient: "
                        "write a new Tensor (x = x + y, ops.where, ops.index_add), or do it inside tinydiff.no_grad()"
                    )
        self.version[0] += 1
        return backend.operand(array_of(other))

    # Comparisons have no gradient: they give plain arrays of bool.

    def __eq__(self, other: Any) -> Any:
        return self._data == array_of(other)

    def __ne__(self, other: Any) -> Any:
        return self._data != array_of(other)

    def __lt__(self, other: Any) -> Any:
        return self._data < array_of(other)

    def __le__(self, other: Any) -> Any:
        return self._data <= array_of(other)

    def __gt__(self, other: Any) -> Any:
        return self._data > array_of(other)

    def __ge__(self, other: Any) -> Any:
        return self._data >= array_of(other)

    # ---- NumPy's methods

    def astype(self, dtype: Any) -> Tensor:
        return OPS["astype"](self, dtype=dtype)

    def copy(self) -> Tensor:
        return OPS["copy"](self)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPS["sum"](self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPS["mean"](self, axis=axis, keepdims=keepdims)

    def var(self, axis: Any = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        return OPS["var"](self, axis=axis, ddof=ddof, keepdims=keepdims)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPS["max"](self, axis=axis, keepdims=keepdims)

    def min(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPS["min"](self, axis=axis, keepdims=keepdims)

    def prod(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return OPS["prod"](self, axis=axis, keepdims=keepdims)

    def cumsum(self, axis: Any = None) -> Tensor:
        return OPS["cumsum"](self, axis=axis)

    def argmax(self, axis: Any = None) -> Any:
        """Where the largest value is: a plain array of integers, which has no gradient."""
        return self._data.argmax(axis=axis)

    def reshape(self, *shape: Any) -> Tensor:
        return OPS["reshape"](self, shape=shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tensor:
        return OPS["transpose"](self, axes=(axes[0] if len(axes) == 1 else axes) or None)

    def swapaxes(self, axis1: int, axis2: int) -> Tensor:
        return OPS["swapaxes"](self, axis1=axis1, axis2=axis2)

    def squeeze(self, axis: Any = None) -> Tensor:
        return OPS["squeeze"](self, axis=axis)

    def flatten(self) -> Tensor:
        return self.reshape(-1)

    def ravel(self) -> Tensor:
        return self.reshape(-1)

    def clip(self, low: Any, high: Any) -> Tensor:
        return OPS["clip"](self, low=low, high=high)


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False) -> Tensor:
    """A Tensor with a copy of the data: an array, a number, a nested list, or a Tensor (whose history is left behind).

    Arrays keep their dtype; Python floats become float32, as everything does that was not told otherwise.
    Errors: TypeError for data that is no array of numbers, or that requires a gradient and is not floating.
    """
    is_typed = hasattr(data, "dtype")
    try:
        array = backend.to_device(array_of(data))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a Tensor holds an array of numbers, not {reprlib.repr(data)}: {error}") from error
    if array.dtype.kind not in "fciub":
        raise TypeError(f"a Tensor holds an array of numbers, not {reprlib.repr(data)}")
    if dtype is None and not is_typed and array.dtype.kind == "f":
        dtype = "float32"
    array = array.astype(array.dtype if dtype is None else dtype)  # always a copy
    if requires_grad:
        check_floating(array)
    return Tensor(array, requires_grad)


def check_floating(array: Array) -> None:
    """Errors: TypeError if the array is not of floating numbers, and so cannot have a gradient."""
    if array.dtype.kind not in "fc":
        raise TypeError(
            f"only a floating Tensor can require a gradient, not {array.dtype} of shape "
            f"{array.shape}: pass dtype='float32'"
        )


def array_of(x: Any) -> Any:
    """The array of a Tensor; anything else as it is."""
    return x.data if isinstance(x, Tensor) else x
