"""What a rule gets in place of an array that it does not read.

Many rules need only the shape of an input: the adjoint of a sum is spread over it. To keep the array for that would
hold its memory until the backward pass. So the rule says, by a leading underscore in the name, that it does not read
the values, and the node keeps the shape and dtype alone. A rule that reads them all the same gets an error.
"""

from __future__ import annotations

import sys
from typing import Any


class ShapeDtype:
    """The shape and dtype of an array, without its values."""

    __slots__ = ("shape", "dtype")

    def __init__(self, a: Any):
        self.shape, self.dtype = a.shape, a.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def no_values(self, *_others: Any, **_options: Any) -> Any:
        raise TypeError(
            f"a rule has used the values of {name_of(self)}; a name with a leading underscore is a shape and dtype "
            "alone: take the underscore away"
        )

    def __repr__(self) -> str:
        return f"a shape and dtype alone, {self.shape} {self.dtype} (a name with a leading underscore)"

    def __format__(self, spec: str) -> str:
        return self.no_values() if spec else repr(self)

    def __getattr__(self, name: str) -> Any:  # only what is not found: a method of arrays, such as sum
        raise AttributeError(
            f"a rule has asked {name_of(self)} for {name}; a name with a leading underscore is a shape and dtype "
            "alone: take the underscore away"
        )

    __array__ = __array_ufunc__ = __array_function__ = no_values  # numpy.exp(_x), numpy.where(_x, ...), g * _x
    __array_priority__ = 1e6  # a CuPy array on the left leaves the operation to us
    __hash__ = object.__hash__
    __len__ = __float__ = __int__ = no_values
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = no_values
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __round__ = __index__ = no_values
    __pow__ = __rpow__ = __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = __bool__ = no_values
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = no_values
    __getitem__ = __setitem__ = no_values
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = no_values


def name_of(x: ShapeDtype) -> str:
    """What the rule calls x, which does not know it: of the functions that are running and have x, the rule is the
    outermost, and a function that it calls may have another name for x."""
    frame, found = sys._getframe(2), "an array that is not kept"
    while frame is not None:
        for name, value in frame.f_locals.items():
            if name.startswith("_") and (value is x or type(value) is tuple and any(part is x for part in value)):
                found = name
                break
        frame = frame.f_back  # type: ignore[assignment]
    return found
