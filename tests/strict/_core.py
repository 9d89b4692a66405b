"""What the strict array and its functions share: the frozen table, what may come in, what goes out, and waiting.

`accept` lets an argument in as NumPy sees it, or raises as CuPy would; `give` wraps NumPy's answer. Every function
and method is made by `guarded`, from NumPy's function and CuPy's parameters.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

API = json.loads(Path(__file__).with_name("cupy_api.json").read_text())
NUMPY1 = int(np.__version__.split(".")[0]) < 2
NUMBERS = (bool, int, float, complex)
HOST_NUMBERS = (*NUMBERS, np.generic)
DTYPES = frozenset("?bBhHiIlLqQefdFD")
# Parameters that take arrays. A list there is refused by most of CuPy, and copied to the device each time by the rest.
ARRAYS = frozenset(
    "a b x y x1 x2 arr array m v A B dst src condition indices values vals mask weights prototype element "
    "test_elements".split()
)
# Parameters that take Python numbers; an array of the device has no __index__.
METADATA = frozenset(
    "shape newshape new_shape axis axes axis1 axis2 axisa axisb axisc reps k N M n num indices_or_sections source "
    "destination pad_width order dtype ndmin decimals ddof keepdims kth offset dims strides window_shape mode "
    "stat_length constant_values end_values reflect_type start_axis ndim".split()
)


class State:
    """What a test can set or read."""

    syncs = 0  # how often something has waited for the device
    scrambled = False
    local = threading.local()  # .forbidden: waiting raises, in this thread


# ---------------------------------------------------------------- waiting for the device


def sync(what: str) -> None:
    """Note that a device would have to finish now; raise where that is forbidden."""
    if getattr(State.local, "forbidden", False):
        raise RuntimeError(f"{what} waits for the device, where waiting is forbidden")
    State.syncs += 1


@contextlib.contextmanager
def forbid_sync() -> Iterator[None]:
    """Inside, in this thread, everything that waits for the device raises RuntimeError. Backend.forbid_sync."""
    before, State.local.forbidden = getattr(State.local, "forbidden", False), True
    try:
        yield
    finally:
        State.local.forbidden = before


# ---------------------------------------------------------------- memory order


class scramble(contextlib.AbstractContextManager["scramble"]):
    """`scramble(True)`, also as a context: new arrays whose order CuPy does not promise are stored column by column,
    with a poisoned hole after each element. Creation functions, copies and ascontiguousarray keep their promise."""

    def __init__(self, on: bool = True):
        self.before, State.scrambled = State.scrambled, on
        self.on = on

    def __enter__(self) -> scramble:
        State.scrambled = self.on
        return self

    def __exit__(self, *error: Any) -> None:
        State.scrambled = self.before


def _scrambled(a: np.ndarray) -> np.ndarray:
    holes = poison(np.empty((*a.shape[::-1], 2), a.dtype))
    view = holes[..., 0].T
    view[...] = a
    return view


def poison(a: np.ndarray) -> np.ndarray:
    """Fill as fresh memory must be expected to be: NaN, or -1, or True."""
    if a.dtype.kind == "c":
        a.fill(complex(np.nan, np.nan))
    else:
        a.fill({"b": True, "i": -1, "u": np.iinfo(a.dtype).max if a.dtype.kind == "u" else 0}.get(a.dtype.kind, np.nan))
    return a


# ---------------------------------------------------------------- out


class Wrapped:
    """The base of StrictArray (_array.py): a NumPy array out of reach."""

    __slots__ = ("_a", "__weakref__")
    _a: np.ndarray
    final: type  # StrictArray

    def __init_subclass__(cls) -> None:
        Wrapped.final = cls


OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by the id of NumPy's array


def wrap(a: np.ndarray) -> Any:
    strict = object.__new__(Wrapped.final)
    strict._a = a
    if a.base is None:
        OWNERS[id(a)] = strict
    return strict


def check_dtype(dtype: np.dtype) -> None:
    if dtype.char not in DTYPES and dtype.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {dtype}")


def give(result: Any, inputs: Any = (), promised: bool = False) -> Any:
    """NumPy's answer as CuPy would give it: 0-d arrays for scalars. promised: its memory order is documented."""
    if isinstance(result, np.ndarray):
        if result.dtype.char not in DTYPES:
            check_dtype(result.dtype)
        if State.scrambled and not promised and result.base is None and result.size and result.ndim:
            if not any(result is a for a in inputs):
                result = _scrambled(result)
        return wrap(result)
    if isinstance(result, np.generic):
        return wrap(np.asarray(result))
    if isinstance(result, tuple):
        return tuple(give(r, inputs, promised) for r in result)
    if isinstance(result, list):
        return [give(r, inputs, promised) for r in result]
    return result


# ---------------------------------------------------------------- in


def refuse(value: Any, where: str) -> TypeError:
    kind = type(value)
    hint = ": bring it to the device with backend.to_device" if isinstance(value, (np.ndarray, list, tuple)) else ""
    return TypeError(f"Unsupported type {kind} in {where}{hint}")


def accept(where: str, parameter: str, value: Any) -> Any:
    """An argument as NumPy sees it. Errors: TypeError for what CuPy refuses or would copy from the host in silence."""
    kind = type(value)
    if isinstance(value, Wrapped):
        if parameter in METADATA:
            raise TypeError(f"{where}: 'ndarray' object cannot be interpreted as an integer ({parameter})")
        return value._a
    if kind in NUMBERS or value is None or kind is str or kind is slice or kind is range or value is Ellipsis:
        return value
    if kind is tuple or kind is list:
        if parameter in ARRAYS:
            raise refuse(value, f"{where}({parameter}=)")
        return kind(accept(where, parameter, v) for v in value)
    if isinstance(value, (np.generic, np.dtype, type)):
        return value
    raise refuse(value, f"{where}({parameter}=)")


def accept_index(key: Any) -> Any:
    """An index as NumPy sees it. Host arrays and lists are refused: CuPy copies them to the device at each use."""
    if type(key) is tuple:
        return tuple(accept_index(k) for k in key)
    kind = type(key)
    if kind is int or kind is slice or key is None or key is Ellipsis or isinstance(key, np.integer):
        return key
    if kind is Wrapped.final:
        if key._a.dtype.kind not in "iub":
            raise IndexError(f"arrays used as indices must be of integer or boolean type, not {key._a.dtype}")
        return key._a
    if kind is bool or kind is np.bool_:
        return key
    if kind is float:
        raise IndexError(f"an index must be an integer, not {key!r}")
    raise refuse(key, "an index")


def has_mask(key: Any) -> bool:
    """Does the accepted index hold a boolean, whose count CuPy must wait for?"""
    if type(key) is tuple:
        return any(map(has_mask, key))
    return isinstance(key, (bool, np.bool_)) or isinstance(key, np.ndarray) and key.dtype.kind == "b"


# ---------------------------------------------------------------- dtypes before NumPy 2


def nep50(operands: Any) -> Any:
    """The operands in one dtype, by the rules of NumPy 2 (NEP 50) which CuPy 14 has too: Python numbers are weak,
    0-d arrays and NumPy scalars are not. For NumPy 1, which looks at values."""
    strong = [a.dtype for a in operands if isinstance(a, (np.ndarray, np.generic))]
    weak = [a for a in operands if isinstance(a, NUMBERS) and not isinstance(a, np.generic)]
    if not strong or not weak and all(getattr(a, "ndim", 0) for a in operands):
        return operands
    dtype = functools.reduce(np.promote_types, strong)
    for number in weak:
        kind = dtype.kind
        if isinstance(number, complex):
            dtype = np.promote_types(dtype if kind in "fc" else np.float64, np.complex64)
        elif isinstance(number, float):
            dtype = dtype if kind in "fc" else np.dtype(np.float64)
        elif kind == "b" and not isinstance(number, bool):
            dtype = np.dtype(np.int64)
        elif kind in "iu" and not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
            raise OverflowError(f"Python integer {number} out of bounds for {dtype}")
    return [a if a is None else np.asarray(a, dtype) for a in operands]


# ---------------------------------------------------------------- guarding a function


def parse(text: str) -> tuple[list[str], str | None, frozenset[str], bool]:
    """A frozen signature: positional names, the *args name, keywords, and whether other keywords pass."""
    positional, variadic, keywords, free, only = [], None, [], False, False
    for word in filter(None, text.split(", ")):
        name = word.rstrip("=")
        if word.startswith("**"):
            free = True
        elif word == "*":
            only = True
        elif word == "/":
            keywords.clear()
        elif word.startswith("*"):
            variadic, only = name[1:], True
        else:
            keywords.append(name)
            if not only:
                positional.append(name)
    return positional, variadic, frozenset(keywords), free


def _agreed(function: Callable[..., Any], positional: list[str]) -> int:
    """How many positional arguments mean the same to NumPy and CuPy (a parameter may have two names)."""
    try:
        theirs = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return len(positional)
    for i, (ours, other) in enumerate(zip(positional, theirs)):
        if ours != other and (ours in theirs or other in positional):
            return i
    return len(positional)


def guarded(name: str, function: Callable[..., Any], text: str, **options: Any) -> Callable[..., Any]:
    """NumPy's function with CuPy's parameters. options: keywords (instead of **kwargs), waits(args, kwargs), promised
    (its memory order is documented), number (a Python number may stand first), array (Python results are 0-d arrays),
    skip (the first argument is the array whose method this is), before (looks at NumPy's arguments)."""
    positional, variadic, keywords, free = parse(text)
    if free:
        keywords |= frozenset(options.get("keywords", ()))
    if options.get("skip"):
        positional = ["self", *positional]
    waits, promised, before, as_array = (options.get(k) for k in ("waits", "promised", "before", "array"))
    agreed = _agreed(function, positional)
    names = [*positional, *[variadic] * 64] if variadic else positional
    array_first = bool(positional) and positional[0] in ARRAYS and not options.get("number")
    out_at = positional.index("out") if "out" in positional else 64
    strict = Wrapped.final

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > agreed and not (variadic and agreed == len(positional)):
            raise _too_many(name, len(args), positional, agreed)
        if kwargs and not kwargs.keys() <= keywords:
            raise TypeError(f"{name}() got an unexpected keyword argument {sorted(kwargs.keys() - keywords)}")
        if array_first and args and type(args[0]) is not strict and isinstance(args[0], HOST_NUMBERS):
            raise TypeError(f"{name}() takes an array, not the number {args[0]!r}")
        if waits is not None and waits(args, kwargs):
            sync(f"{name}()")
        raw = [a if type(a) is int else accept(name, p, a) for p, a in zip(names, args)]
        named = {k: accept(name, k, v) for k, v in kwargs.items()} if kwargs else kwargs
        if before is not None:
            raw = before(raw, named)
        result = function(*raw, **named)
        if len(args) > out_at or "out" in kwargs:  # it comes back as the object that was given
            out = args[out_at] if len(args) > out_at else kwargs["out"]
            if out is not None:
                return out
        if as_array and not isinstance(result, np.ndarray):
            return wrap(np.asarray(result))
        return give(result, (*raw, *named.values()) if State.scrambled else (), promised)

    call.__name__ = call.__qualname__ = name.rpartition(".")[2]
    return call


def _too_many(name: str, count: int, positional: list[str], agreed: int) -> TypeError:
    if agreed < len(positional):
        return TypeError(
            f"{name}(): argument {agreed + 1} is {positional[agreed]!r} in CuPy and another in NumPy: name it"
        )
    return TypeError(f"{name}() takes {agreed} positional arguments but {count} were given")


def any_array(args: Any, kwargs: Any) -> bool:
    return any(isinstance(a, Wrapped) for a in (*args, *kwargs.values()))


def always(args: Any, kwargs: Any) -> bool:
    return True


def repeats_vary(args: Any, kwargs: Any) -> bool:
    repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    return not isinstance(repeats, (int, np.integer))
