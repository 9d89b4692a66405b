"""Conditions go through samplers and losses by name, `digit=labels`, beside the arguments of those functions.

A condition that has the name of an argument is given in a mapping, condition={"steps": labels}. A name that is almost
that of an argument is taken for a misspelt one: it is an error, not a condition that a model may ignore.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def conditions(fn: Callable[..., Any], given: dict[str, Any], options: Iterable[str] = ()) -> dict[str, Any]:
    """The conditions that were given to fn(..., **condition), those in a mapping `condition` among them.

    options: other names that a user may have meant, such as those of the method.
    Errors: TypeError for a name that is nearly an argument or an option, for a `condition` that is no mapping of names,
    and for a condition that is given twice.
    """
    if not given:
        return given
    named = {name: value for name, value in given.items() if name != "condition"}
    for name in named:
        near = difflib.get_close_matches(name, _arguments(fn) + tuple(options), n=1, cutoff=0.8)
        if near and near[0] != name:  # an option of a method may be one of the loss's conditions
            raise TypeError(
                f"{fn.__name__} has no argument {name!r}: did you mean {near[0]!r}? If it is a condition of the "
                f"model, pass condition={{{name!r}: ...}}"
            )
    extra = given.get("condition", {})
    if not (isinstance(extra, Mapping) and all(isinstance(name, str) for name in extra)):
        raise TypeError(f"{fn.__name__}: condition must be a mapping of names, {{name: value}}, not {extra!r}")
    if both := sorted(named.keys() & extra.keys()):
        raise TypeError(f"{fn.__name__}: the condition {both[0]!r} is given twice")
    return {**named, **extra}


@functools.cache
def _arguments(fn: Callable[..., Any]) -> tuple[str, ...]:
    parameters = inspect.signature(fn).parameters.values()
    return (*(p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"), "condition")
