"""The functions: every name that CuPy and NumPy both have, with CuPy's parameters; the rest raises AttributeError."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from ._array import StrictArray, real_only
from ._core import (
    API,
    Wrapped,
    accept,
    accept_index,
    always,
    any_array,
    check_dtype,
    give,
    guarded,
    poison,
    refuse,
    repeats_vary,
    sync,
    wrap,
)

CALL = frozenset(("out", "dtype", "casting"))


class StrictUfunc:
    """A ufunc with the keywords, methods and loops of CuPy's."""

    def __init__(self, name: str):
        frozen = API["ufuncs"][name]
        self.__name__ = name
        self.nin, self.nout = frozen["nin"], frozen["nout"]
        self._ufunc = getattr(np, name)
        self._loops = [loop.split("->")[0] for loop in frozen["types"].split()]
        self._methods, self._at = frozen["methods"].split(), frozen["at"]
        self._known: set[tuple[Any, ...]] = set()

    def __repr__(self) -> str:
        return f"<strict ufunc '{self.__name__}'>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nin = self.nin
        if kwargs and not kwargs.keys() <= CALL:
            raise TypeError(f"Wrong arguments {sorted(kwargs.keys() - CALL)} for the ufunc {self.__name__}")
        if not nin <= len(args) <= nin + self.nout:
            raise TypeError(f"Wrong number of arguments for {self.__name__}: {len(args)}")
        raw = [a._a if type(a) is StrictArray else self._operand(a) for a in args[:nin]]
        if "dtype" not in kwargs:
            self._check_loops(raw)
        if len(args) == nin and not kwargs:
            return give(self._ufunc(*raw))
        outs = args[nin:]
        if not outs and kwargs.get("out") is not None:
            outs = kwargs["out"] if isinstance(kwargs["out"], tuple) else (kwargs["out"],)
        for out in outs:
            if type(out) is not StrictArray and out is not None:
                raise TypeError(f"`out` must be a tuple or `cupy.ndarray`, not {type(out)}")
        kwargs["out"] = tuple([None if out is None else out._a for out in outs]) or None
        result = self._ufunc(*raw, **kwargs)
        return outs[0] if len(outs) == 1 and outs[0] is not None else give(result, kwargs["out"] or ())

    def _operand(self, value: Any) -> Any:
        if value is None:
            raise refuse(value, self.__name__)
        return accept(self.__name__, "x", value)

    def _check_loops(self, raw: list[Any]) -> None:
        key = tuple([getattr(a, "dtype", None) for a in raw])
        if key in self._known:
            return
        if not any(all(d is None or np.can_cast(d, c) for d, c in zip(key, loop)) for loop in self._loops):
            raise TypeError(f"Wrong type ({key}) of arguments for cupy_{self.__name__}: CuPy has no loop for it")
        self._known.add(key)

    def __getattr__(self, name: str) -> Any:
        if name not in API["ufunc_methods"]:
            raise AttributeError(f"the ufunc {self.__name__} has no attribute {name!r}")
        if name not in self._methods:
            raise NotImplementedError(f"`cupy_{self.__name__}.{name}` is not supported yet")
        method: Callable[..., Any] = (
            self._add_at
            if name == "at"
            else guarded(f"{self.__name__}.{name}", getattr(self._ufunc, name), API["ufunc_methods"][name])
        )
        setattr(self, name, method)
        return method

    def _add_at(self, a: Any, indices: Any, b: Any = None) -> None:
        if not isinstance(a, Wrapped):
            raise refuse(a, f"{self.__name__}.at")
        if a._a.dtype.char not in self._at:
            raise TypeError(f"cupy.{self.__name__}.at only supports the dtypes {self._at}, not {a._a.dtype}")
        operands = () if b is None else (accept(f"{self.__name__}.at", "b", b),)
        self._ufunc.at(a._a, accept_index(indices), *operands)


# ---------------------------------------------------------------- functions that need their own words


def _fresh(a: np.ndarray) -> StrictArray:
    check_dtype(a.dtype)
    return wrap(poison(a))


def empty(shape: Any, dtype: Any = float, order: str = "C") -> StrictArray:
    return _fresh(np.empty(accept("empty", "shape", shape), accept("empty", "dtype", dtype), order))


def empty_like(
    prototype: Any, dtype: Any = None, order: str = "K", subok: None = None, shape: Any = None
) -> StrictArray:
    if not isinstance(prototype, Wrapped):
        raise refuse(prototype, "empty_like")
    return _fresh(np.empty_like(prototype._a, dtype=dtype, order=order, shape=accept("empty_like", "shape", shape)))


def array(
    obj: Any, dtype: Any = None, copy: bool = True, order: str = "K", subok: bool = False, ndmin: int = 0
) -> StrictArray:
    """From an array of the device, a number or nested lists of numbers. Host arrays come in by backend.to_device."""
    if dtype is not None:
        check_dtype(np.dtype(dtype))
    if isinstance(obj, Wrapped):
        a = (
            np.array(obj._a, dtype=dtype, order=order, ndmin=ndmin)
            if copy
            else np.asarray(obj._a, dtype=dtype, order=order)
        )
        return obj if a is obj._a else wrap(a)
    a = np.array(_numbers(obj), dtype=dtype, order=order, ndmin=ndmin)
    check_dtype(a.dtype)
    return wrap(a)


def _numbers(obj: Any) -> Any:
    if isinstance(obj, (list, tuple)):
        return [_numbers(o) for o in obj]
    if isinstance(obj, Wrapped):
        raise TypeError("a list of arrays: use stack or concatenate")
    return accept("array", "obj", obj)


def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: bool | None = None) -> StrictArray:
    return array(a, dtype, bool(copy), order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> StrictArray:
    a = array(a, dtype, False)
    return a if a.flags.c_contiguous and a.ndim else wrap(np.ascontiguousarray(a._a))


def asfortranarray(a: Any, dtype: Any = None) -> StrictArray:
    a = array(a, dtype, False)
    return a if a.flags.f_contiguous and a.ndim else wrap(np.asfortranarray(a._a))


def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    raw = [a._a if isinstance(a, Wrapped) else a for a in arrays_and_dtypes]
    if any(isinstance(a, np.ndarray) for a in arrays_and_dtypes):
        raise refuse(arrays_and_dtypes, "result_type")
    return np.result_type(*raw)


def can_cast(from_: Any, to: Any, casting: Any = "safe") -> bool:
    return np.can_cast(from_.dtype if isinstance(from_, Wrapped) else from_, to, casting)


def where(condition: Any, x: Any = None, y: Any = None) -> Any:
    if not isinstance(condition, Wrapped):
        raise refuse(condition, "where(condition=)")
    if x is None and y is None:
        sync("where(condition)")
        return give(np.where(condition._a))
    return give(np.where(condition._a, accept("where", "x", x), accept("where", "y", y)))


OWN = {
    f.__name__: f
    for f in (empty, empty_like, array, asarray, ascontiguousarray, asfortranarray, result_type, can_cast, where)
}
OWN["asanyarray"] = asarray

# ---------------------------------------------------------------- the table


def _array_argument(position: int, name: str) -> Callable[[Any, Any], bool]:
    return lambda args, kwargs: isinstance(kwargs.get(name, args[position] if len(args) > position else None), Wrapped)


WAITING: dict[str, Callable[[Any, Any], bool]] = dict.fromkeys(
    "nonzero flatnonzero argwhere unique unique_all unique_counts unique_inverse unique_values bincount putmask place "
    "extract compress delete nanmax nanmin histogram histogram2d histogramdd union1d intersect1d setdiff1d setxor1d "
    "argpartition trim_zeros unravel_index sliding_window_view choose asarray_chkfinite polymul roots".split(),
    always,
) | {
    "arange": any_array,
    "linspace": any_array,
    "logspace": any_array,
    "repeat": repeats_vary,
    "average": _array_argument(2, "weights"),
    "percentile": _array_argument(1, "q"),
    "quantile": _array_argument(1, "q"),
    "gradient": _array_argument(1, "varargs"),
}
PROMISED = frozenset(
    "zeros ones full zeros_like ones_like full_like eye identity tri arange linspace logspace "
    "copy ravel reshape indices".split()
)
# NumPy answers these with Python's own types
AS_ARRAY = frozenset("allclose array_equal array_equiv count_nonzero".split())
NUMBER_FIRST = frozenset(
    "ndim shape size isscalar isclose allclose nan_to_num round around real imag min_scalar_type".split()
)
KEYWORDS = {"einsum": ("dtype", "optimize"), "meshgrid": ("indexing", "sparse", "copy")}
KEYWORDS["pad"] = ("mode", "stat_length", "constant_values", "end_values", "reflect_type")
# These work on the host, call back into Python, or make something that strict does not imitate.
LEFT_OUT = frozenset(
    "apply_along_axis apply_over_axes array2string array_repr array_str asnumpy base_repr binary_repr byte_bounds "
    "clear_memo disp find_common_type frombuffer fromfile fromfunction fromiter fromstring from_dlpack fuse genfromtxt "
    "get_array_module load loadtxt piecewise printoptions random safe_eval save savetxt savez "
    "savez_compressed set_printoptions who".split()
)
CLASSES = {"ndarray": StrictArray, "ufunc": StrictUfunc}


class Namespace(types.ModuleType):
    """A module whose functions are made when they are first asked for."""

    def __init__(self, path: str = ""):
        super().__init__("strict" + ("." + path if path else ""), __doc__)
        self.__dict__["_path"] = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _find(self._path, name)
        self.__dict__[name] = value
        return value


def _find(path: str, name: str) -> Any:
    full = f"{path}.{name}" if path else name
    if any(p == full or p.startswith(full + ".") for p in API["submodules"]):
        return Namespace(full)
    frozen = (API["submodules"].get(path, {}) if path else API["functions"]).get(name)
    if not path:
        if name in CLASSES:
            return CLASSES[name]
        known = (
            name in API["ufuncs"] or name in API["classes"] or name in API["constants"] or name in ("s_", "index_exp")
        )
        if name in API["objects"] and not known:
            raise AttributeError(
                f"cupy.{name} is not offered by strict: tinydiff's code has no use for it outside fast/cuda"
            )
        if frozen is None and not known:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}, in CuPy {API['cupy']}")
    elif frozen is None:
        raise AttributeError(f"module 'cupy.{path}' has no attribute {name!r}, in CuPy {API['cupy']}")
    if name in LEFT_OUT:
        raise AttributeError(f"strict has no {name!r}: it works on the host, or calls back into Python")
    if frozen is not None and name in OWN:
        return OWN[name]
    home = np
    for part in filter(None, path.split(".")):
        home = getattr(home, part)
    if not hasattr(home, name):
        raise AttributeError(f"CuPy has {full!r}, but NumPy {np.__version__} has not: tinydiff runs on both")
    value = getattr(home, name)
    if frozen is not None:
        return _function(name, full, value, frozen)
    if name in API["ufuncs"]:
        return StrictUfunc(name)
    if isinstance(value, type) and value.__module__ == "numpy" and name not in ("dtype", "finfo", "iinfo", "ndindex"):
        if not issubclass(value, np.generic):
            raise AttributeError(f"strict has no {name!r}")
    return value


def _read_only(raw: list[Any], named: dict[str, Any]) -> list[Any]:
    if named.get("writeable"):
        raise NotImplementedError("Writeable views are not supported.")
    return raw


def _function(name: str, full: str, value: Any, frozen: str) -> Callable[..., Any]:
    return guarded(
        full,
        value,
        frozen,
        keywords=KEYWORDS.get(name, ()),
        waits=WAITING.get(name),
        promised=name in PROMISED,
        number=name in NUMBER_FIRST,
        array=name in AS_ARRAY,
        before={"clip": real_only, "sliding_window_view": _read_only}.get(name),
    )
