"""StrictArray: a NumPy array that can be reached only in the ways in which a CuPy array can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ._core import (
    API,
    NUMBERS,
    NUMPY1,
    OWNERS,
    State,
    Wrapped,
    accept,
    accept_index,
    always,
    check_dtype,
    give,
    guarded,
    has_mask,
    nep50,
    poison,
    refuse,
    repeats_vary,
    sync,
    wrap,
)

IMPLICIT = (
    "Implicit conversion to a NumPy array is not allowed. "
    "The ways from the device to the host are backend.to_host and backend.scalar"
)


class Flags:
    """`a.flags`, without writeable and the like."""

    def __init__(self, flags: Any):
        self.c_contiguous: bool = flags.c_contiguous
        self.f_contiguous: bool = flags.f_contiguous
        self.owndata: bool = flags.owndata

    def __getitem__(self, name: str) -> bool:
        return getattr(self, name.lower())


class StrictArray(Wrapped):
    """What `strict` computes with. Made by strict.to_device and by strict's own functions."""

    __slots__ = ()
    __array_ufunc__ = None  # np.exp(a) and host + a: NumPy leaves the latter to us, and we raise
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any = float):
        dtype = np.dtype(dtype)
        check_dtype(dtype)
        self._a = poison(np.empty(accept("ndarray", "shape", shape), dtype))
        OWNERS[id(self._a)] = self

    # ---- what NumPy may not do

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(IMPLICIT)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        name = f"{function.__module__}.{function.__name__}"
        raise TypeError(f"{name} was called with an array of the device: call xp.{function.__name__}")

    def __getattr__(self, name: str) -> Any:
        if name in API["methods"] or name in API["attributes"]:
            raise AttributeError(f"CuPy's ndarray has {name!r}, but NumPy's has not: tinydiff runs on both")
        raise AttributeError(f"'ndarray' object has no attribute {name!r} (nor has CuPy's)")

    # ---- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self._a.shape

    @property
    def ndim(self) -> int:
        return self._a.ndim

    @property
    def size(self) -> int:
        return self._a.size

    @property
    def dtype(self) -> np.dtype:
        return self._a.dtype

    @property
    def itemsize(self) -> int:
        return self._a.itemsize

    @property
    def nbytes(self) -> int:
        return self._a.nbytes

    @property
    def strides(self) -> tuple[int, ...]:
        return self._a.strides

    @property
    def flags(self) -> Flags:
        return Flags(self._a.flags)

    @property
    def base(self) -> StrictArray | None:
        """The array that owns the memory: the same object each time, as long as it lives."""
        base = self._a.base
        owner = OWNERS.get(id(base))
        return wrap(base) if owner is None and base is not None else owner

    @property
    def T(self) -> StrictArray:
        return wrap(self._a.T)

    @property
    def mT(self) -> StrictArray:
        return wrap(self._a.swapaxes(-1, -2))

    @property
    def real(self) -> StrictArray:
        return wrap(self._a.real)

    @real.setter
    def real(self, value: Any) -> None:
        self.real[...] = value

    @property
    def imag(self) -> StrictArray:
        return wrap(self._a.imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        self.imag[...] = value

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[StrictArray]:
        if not self._a.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self._a)))

    def __contains__(self, value: Any) -> bool:
        raise ValueError("`in` asks for the truth value of each comparison: use (a == value).any()")

    def __copy__(self) -> StrictArray:
        return wrap(self._a.copy())

    def __deepcopy__(self, memo: Any) -> StrictArray:
        return wrap(self._a.copy())

    def __reduce__(self) -> Any:
        sync("pickling an array")
        return wrap, (self._a,)

    # ---- elements

    def __getitem__(self, key: Any) -> StrictArray:
        index = accept_index(key)
        if has_mask(index):
            sync("a[mask]")
        result = self._a[index]
        if isinstance(result, np.generic):  # CuPy: a view of no dimensions, not a number
            result = self._a[(*index, ...) if type(index) is tuple else (index, ...)]
        if isinstance(index, np.ndarray) and not index.ndim:  # NumPy takes it for a number, CuPy gathers
            result = result.copy()
        return give(result)

    def __setitem__(self, key: Any, value: Any) -> None:
        index = accept_index(key)
        if has_mask(index):
            sync("a[mask] = v (use copyto(a, v, where=mask) or where)")
        if isinstance(value, (np.ndarray, list, tuple)):
            raise ValueError(
                "non-scalar numpy.ndarray cannot be used for fill: bring it to the device with backend.to_device"
            )
        raw = accept("a[...] = v", "v", value)
        if isinstance(raw, np.ndarray) and raw.size > 1:
            self._check_duplicates(index)
        self._a[index] = raw

    def _check_duplicates(self, index: Any) -> None:
        """An element that is written twice has, on a device, the value of whichever thread comes last."""
        parts = index if type(index) is tuple else (index,)
        if not any(isinstance(p, np.ndarray) and p.dtype.kind in "iu" for p in parts):
            return
        last = np.full(self._a.shape, -1)
        writers = np.arange(last[index].size).reshape(last[index].shape)
        last[index] = writers
        if (last[index] != writers).any():
            raise ValueError(
                "a[index] = v or a[index] += v with an index that occurs twice has no defined result: use add.at"
            )

    # ---- to the host: each waits

    def _one(self, kind: Callable[[Any], Any]) -> Any:
        if self._a.ndim:
            raise TypeError(f"only 0-dimensional arrays can be converted to Python scalars, not shape {self._a.shape}")
        sync(f"{kind.__name__}(a)")
        return kind(self._a)

    def __float__(self) -> float:
        return self._one(float)

    def __int__(self) -> int:
        return self._one(int)

    def __complex__(self) -> complex:
        return self._one(complex)

    def __bool__(self) -> bool:
        sync("bool(a)")
        return bool(self._a)

    def item(self) -> Any:
        sync("a.item()")
        return self._a.item()

    def tolist(self) -> Any:
        sync("a.tolist()")
        return self._a.tolist()

    def tobytes(self, order: str = "C") -> bytes:
        sync("a.tobytes()")
        return self._a.tobytes(order)

    def get(self) -> np.ndarray:
        sync("a.get()")
        return self._a.copy()

    def set(self, arr: np.ndarray) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype or arr.shape != self.shape:
            raise ValueError(f"a.set: {arr.dtype} {arr.shape} into {self.dtype} {self.shape}")
        self._a[...] = arr

    def __repr__(self) -> str:
        sync("repr(a)")
        return f"Strict{self._a!r}"

    def __str__(self) -> str:
        sync("str(a)")
        return str(self._a)

    def __format__(self, spec: str) -> str:
        sync("a formatted array")
        return format(self._a if self._a.ndim else self._a[()], spec)

    # ---- new arrays

    def copy(self, order: str = "C") -> StrictArray:
        return wrap(self._a.copy(order))

    def astype(
        self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True
    ) -> StrictArray:
        dtype = np.dtype(accept("astype", "dtype", dtype))
        check_dtype(dtype)
        if not copy and dtype == self._a.dtype and order == "K":
            return self
        return give(self._a.astype(dtype, order=order, casting=casting or "unsafe"), promised=order in "CF")

    def ptp(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> StrictArray:
        return PTP(self, axis, out, keepdims)


PTP = guarded("ptp", np.ptp, "a, axis=, out=, keepdims=")
METHODS = (  # those that NumPy's ndarray has with the same meaning
    "all any argmax argmin argpartition argsort byteswap choose clip compress conj conjugate cumprod cumsum diagonal "
    "dot fill flatten max mean min nonzero partition prod put ravel repeat reshape round searchsorted sort squeeze std "
    "sum swapaxes take trace transpose var view"
)
WAITING = {"choose": always, "compress": always, "nonzero": always, "repeat": repeats_vary}
PROMISED = ("flatten", "ravel", "reshape", "view")


def real_only(raw: Any, named: Any) -> Any:
    if any(isinstance(a, np.ndarray) and a.dtype.kind == "c" for a in (*raw, *named.values())):
        raise TypeError("Wrong type (complex) of arguments for cupy_clip: CuPy clips real numbers only")
    return nep50_some(raw) if NUMPY1 else raw


def nep50_some(raw: list[Any]) -> list[Any]:
    given = [a for a in raw if isinstance(a, (np.ndarray, np.generic, *NUMBERS))]
    kept = iter(nep50(given))
    return [next(kept) if isinstance(a, (np.ndarray, np.generic, *NUMBERS)) else a for a in raw]


for _name in METHODS.split():
    _before = real_only if _name == "clip" else None
    _text = API["methods"][_name]
    setattr(
        StrictArray,
        _name,
        guarded(
            _name,
            getattr(np.ndarray, _name),
            _text,
            skip=True,
            waits=WAITING.get(_name),
            promised=_name in PROMISED,
            before=_before,
        ),
    )


# ---------------------------------------------------------------- operators


def _other(value: Any, in_place: bool) -> Any:
    """The other operand: NumPy's view of it, or NotImplemented for a class that has asked to be left the operation."""
    if isinstance(value, (*NUMBERS, np.generic)):
        return value
    left_to = (
        getattr(value, "__array_ufunc__", False) is None
        or getattr(value, "__array_priority__", 0) > StrictArray.__array_priority__
    )
    if left_to and not in_place and not isinstance(value, np.ndarray):
        return NotImplemented
    raise refuse(value, "an operation with an array of the device")


def _operator(function: Callable[..., Any], reflected: bool = False, in_place: bool = False) -> Callable[..., Any]:
    def operate(self: StrictArray, other: Any) -> Any:
        a = self._a
        if type(other) is StrictArray:
            b = other._a
        else:
            b = _other(other, in_place)
            if b is NotImplemented:
                return b
        if in_place:
            function(a, b, out=a)
            return self
        if NUMPY1:
            a, b = nep50((a, b))
        result = function(b, a) if reflected else function(a, b)
        if type(result) is np.ndarray and not State.scrambled:
            return wrap(result)
        return give(result)

    return operate


BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide, "floordiv": np.floor_divide,
    "mod": np.remainder, "divmod": np.divmod, "pow": np.power, "matmul": np.matmul, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNARY = {"neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}

for _name, _function in {**BINARY, **COMPARISONS}.items():
    setattr(StrictArray, f"__{_name}__", _operator(_function))
    if _name in BINARY:
        setattr(StrictArray, f"__r{_name}__", _operator(_function, reflected=True))
    if f"__i{_name}__" in API["attributes"]:
        setattr(StrictArray, f"__i{_name}__", _operator(_function, in_place=True))
for _name, _function in UNARY.items():
    setattr(StrictArray, f"__{_name}__", lambda self, _f=_function: give(_f(self._a)))
