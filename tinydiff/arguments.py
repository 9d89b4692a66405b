"""Numbers and dtypes that are given as arguments: what is out of range is refused where it is given, and quoted.

`integer` and `number` return a plain Python number. NumPy's scalars are not plain: np.float64(0.5) times an array of
float32 is an array of float64, and no JSON. So what has gone through here is safe to keep.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

# What other libraries call the options of ops, and their names here, of which an op has one at most.
OURS = {
    "dim": ("axis", "axes"), "dims": ("axis", "axes", "reps"), "dim0": ("axis1",), "dim1": ("axis2",),
    "keepdim": ("keepdims",), "correction": ("ddof",), "kernel_size": ("kernel",), "scale_factor": ("scale",),
    "shifts": ("shift",), "diagonal": ("k",), "min": ("low",), "max": ("high",), "attn_mask": ("mask",),
}  # fmt: skip
ARRAYS = ("input", "other", "tensor", "tensors", "weight", "bias")  # what other libraries call their inputs


def integer(what: str, n: Any, least: int = 1, most: int | None = None) -> int:
    """n as an int. Errors: ValueError unless it is an integer from `least` to `most`."""
    n = _only(n)
    if not isinstance(n, Integral) or isinstance(n, bool) or int(n) < least or most is not None and int(n) > most:
        wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} must be an integer {wanted}, not {n!r}")
    return int(n)


def number(what: str, x: Any, interval: str = "(-inf, inf)") -> float:
    """x as a float: number("Adam: eps", eps, "[0, inf)"). Errors: ValueError unless it is a real number inside.
    Square brackets include an end, round ones do not; NaN is in no interval."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    given, x = x, _only(x)
    try:
        value = float(x) if isinstance(x, Real) and not isinstance(x, bool) else math.nan
    except OverflowError:  # an int of hundreds of digits
        value = math.nan
    if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
        raise ValueError(f"{what} must be a number in {interval}, not {given!r}")
    return value


def check_keywords(function: Any, given: Mapping[str, Any], *, by_place: bool = False) -> None:
    """For a call that has failed. by_place: are the names of the inputs no keywords, as of an op?
    Errors: TypeError for a keyword that the function does not have, with the name that it has here."""
    parameters = inspect.signature(function).parameters.values()
    inputs = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or not by_place]
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.name in known and p.default is not p.empty]
    for name in () if any(p.kind is p.VAR_KEYWORD for p in parameters) else given:
        if name not in known:
            ours = [own for own in OURS.get(name, ()) if own in known]
            hint = f"it has {', '.join(options) or 'none'}"
            if ours:
                hint = f"tinydiff calls it {ours[0]}"
            elif name in (*ARRAYS, *inputs):
                hint = f"give its arrays by their place, {function.__name__}({', '.join(inputs)})"
            raise TypeError(f"{function.__name__} has no option {name!r}: {hint}") from None


def with_own_keywords(function: Function) -> Function:
    """Decorator: a keyword that the function does not have is answered as `check_keywords` does."""

    @functools.wraps(function)
    def called(*inputs: Any, **options: Any) -> Any:
        try:
            return function(*inputs, **options)
        except TypeError:
            check_keywords(function, options)
            raise

    return called  # type: ignore[return-value]


def _only(x: Any) -> Any:
    """The element of an array or a Tensor without axes; anything else as it is. Waits for the device."""
    return x.item() if getattr(x, "shape", None) == () and hasattr(x, "item") else x


def check_floating(array: Any) -> None:
    """Errors: TypeError if the array is not of floating numbers, and so cannot have a gradient."""
    if array.dtype.kind not in "fc":
        raise TypeError(
            f"only a floating Tensor can require a gradient, not {array.dtype} of shape {array.shape}: pass "
            "dtype='float32'"
        )


def check_precision(what: str, dtype: Any) -> None:
    """Errors: TypeError for floating numbers of another size: 16 bits lose sums and squares in silence."""
    if dtype.char in "egG":
        raise TypeError(
            f"{what}: {dtype} is not computed in, only float32 and float64: convert with .astype('float32')"
        )
