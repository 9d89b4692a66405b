"""How an object was made, in words that a file can hold: the name of its class, and the arguments of its constructor.

    @rebuildable
    class MyNet(nn.Module):
        def __init__(self, channels, *, rng=None): ...

    describe(MyNet(8))                       # {"class": "MyNet", "arguments": {"channels": 8}}
    rebuild(describe(MyNet(8)))              # another one, of other random weights

Nothing in a description is executed. A class is looked up by its name among those that are rebuildable, and by nothing
else; so a file of a stranger can ask for these classes only, and with arguments that are numbers, strings, lists, or
objects of these classes again. `rng`, which makes the first weights, is no part of a description.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

CLASSES: dict[str, type] = {}  # those that are rebuildable, by the name that they have in a file
METHODS = ("marginal_std",)  # of an object, that may be an argument of another: a net is given that of its process
DEEPEST, LONGEST = 12, 64  # a description: objects in objects; numbers in a list


def rebuildable(cls: Class) -> Class:
    """A class whose objects remember the arguments that they were made with. Its name is that of the class, and in
    tinydiff the module before it. A constructor that hands **options on has those of the class above, too, which must
    be rebuildable then. Errors: TypeError for a constructor with arguments that have no name but a position, or with
    **options for nobody; and for a name that a class of another module has."""
    make = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(make)
    parameters = list(signature.parameters.values())[1:]
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"rng"}
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    nameless = any(p.kind is p.POSITIONAL_ONLY or p.kind is p.VAR_POSITIONAL and not hands_on for p in parameters)
    if nameless:
        raise TypeError(f"rebuildable: the arguments of {cls.__qualname__} must have names")
    if hands_on and not hasattr(cls, "_takes_rng"):
        raise TypeError(f"rebuildable: {cls.__qualname__} hands **options on, but no class above it is rebuildable")
    before = CLASSES.get(name_of(cls))
    if before is not None and before.__module__ != cls.__module__:
        raise TypeError(f"rebuildable: {cls.__qualname__} is also the name of a class of {before.__module__}")

    @functools.wraps(make)
    def made(self: Any, *args: Any, **options: Any) -> None:
        try:
            bound = signature.bind(self, *args, **options)
        except TypeError as error:  # which does not say of what
            unknown = "" if hands_on else _unknown(options, signature)
            raise TypeError(f"{cls.__qualname__}: {unknown or error}") from None
        bound.apply_defaults()
        make(self, *args, **options)
        above = self._arguments if hands_on else {}
        self._arguments = {**above, **{n: _kept(a) for n, a in bound.arguments.items() if n in named}}
        self._stands_for = {n for n, a in self._arguments.items() if _is_kept_as(self, n, a)}

    cls.__init__ = made  # type: ignore[misc]
    cls._takes_rng = any(p.name == "rng" for p in parameters) or hands_on and cls._takes_rng  # type: ignore[attr-defined]
    CLASSES[name_of(cls)] = cls
    return cls


def _unknown(options: Mapping[str, Any], signature: inspect.Signature) -> str:
    """What is wrong with the first of the options that is no argument, and what may be meant; "" if there is none."""
    known = list(signature.parameters)[1:]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            return f"no argument {name!r}: it has {', '.join(known) or 'none'}{meant}"
    return ""


def name_of(cls: type) -> str:
    """What a class is called in a file: "models.unet.UNet"; one that is not of tinydiff without its module, because the
    program that is run and the one that loads call it differently."""
    inside = cls.__module__.startswith("tinydiff.")
    return f"{cls.__module__.removeprefix('tinydiff.')}.{cls.__qualname__}" if inside else cls.__qualname__


def _kept(argument: Any) -> Any:
    """A copy of lists and dicts, which their owner may change."""
    if isinstance(argument, (list, tuple)):
        return tuple(argument)
    return dict(argument) if isinstance(argument, Mapping) else argument


def describe(value: Any) -> Any:
    """A description of an object, for `rebuild` and for `saving.save`. What no file can describe, such as a net whose
    class is not rebuildable, becomes {"own": its name}: whoever rebuilds it has to bring it along."""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()  # a NumPy scalar
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    if isinstance(value, Mapping):
        return {"entries": {key: describe(part) for key, part in value.items()}}
    if inspect.ismethod(value) and value.__name__ in METHODS:
        return {"method": value.__name__, "of": describe(value.__self__)}
    kind = type(value)
    if name_of(kind) not in CLASSES:
        return {"own": getattr(value, "__qualname__", kind.__qualname__)}
    return {"class": name_of(kind), "arguments": {n: describe(_now(value, n, a)) for n, a in value._arguments.items()}}


def _is_kept_as(value: Any, name: str, argument: Any) -> bool:
    """Whether a new object has its argument as the attribute of that name, and not something that was made of it."""
    if not hasattr(value, name):
        return False
    attribute = getattr(value, name)
    if isinstance(argument, (bool, int, float, str)):
        return isinstance(attribute, (bool, int, float, str)) and attribute == argument
    return attribute is argument or inspect.ismethod(argument) and attribute == argument


def _now(value: Any, name: str, argument: Any) -> Any:
    """An argument, or the attribute that stood for it and may have changed since: sigma_data, or another net."""
    return getattr(value, name, argument) if name in value._stands_for else argument


class Unknown(ValueError):
    """A description names something that is not in it, and that nobody has brought along."""


def rebuild(description: Any, *, rng: Any, own: Any = None, largest: int = 2**16) -> Any:
    """The object of a description, with weights from rng. own: what stands in it as {"own": ...}. largest: no integer
    in it may be larger, so that a file of a stranger cannot ask for a net that is larger than the file.
    Errors: Unknown for a class that is not rebuildable here, and for an own part that is not given; ValueError for what
    is no description, and for arguments that the class refuses."""

    def build(part: Any, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError("its objects are nested too deep")
        if isinstance(part, int) and not isinstance(part, bool) and abs(part) > largest:
            raise ValueError(f"it has the number {part}, but nothing in it is larger than {largest}")
        if part is None or isinstance(part, (bool, int, float, str)):
            return part
        if isinstance(part, list):
            if len(part) > LONGEST and not all(isinstance(item, str) for item in part):
                raise ValueError(f"it has a list of {len(part)}, more than {LONGEST}")
            return [build(item, depth + 1) for item in part]
        match part:
            case {"entries": dict(entries), **rest} if not rest:
                return {key: build(item, depth + 1) for key, item in entries.items()}
            case {"method": str(method), "of": inner, **rest} if not rest and method in METHODS:
                return getattr(build(inner, depth + 1), method)
            case {"own": str(name), **rest} if not rest:
                if own is None:
                    raise Unknown(f"it does not describe the {name!r} in it")
                return own
            case {"class": str(name), "arguments": dict(given), **rest} if not rest:
                return make(name, {key: build(item, depth + 1) for key, item in given.items()})
        raise ValueError(f"it has {part!r:.80} where an object or a value belongs")

    def make(name: str, arguments: dict[str, Any]) -> Any:
        if name not in CLASSES:
            raise Unknown(f"it has an object of {name!r:.80}, a class that is not known here")
        cls: Any = CLASSES[name]
        if "rng" in arguments:
            raise ValueError(f"{name} cannot be told its rng")
        if cls._takes_rng:
            arguments = {**arguments, "rng": rng}
        try:
            return cls(**arguments)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"no {name} can be made of it: {error}") from error

    return build(description, 0)
