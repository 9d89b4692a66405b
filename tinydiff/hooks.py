"""Hooks: functions of users that see an adjoint, or the output of a module, when it is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Tensor


class Hooks(list["Handle"]):
    """The hooks of a Tensor, called with its adjoint. kept_by: the Tensor, if it is no leaf and keeps the adjoint in
    `.grad`, as a weak reference."""

    kept_by: Any = None

    def __call__(self, g: Tensor) -> Tensor:
        """The adjoint after the hooks. Copies go in and out: a hook shares no memory with a gradient."""
        x = g.copy()
        for handle in list(self):  # a hook may remove itself
            found = handle.fn(x)
            if found is None:
                continue
            if not isinstance(found, type(x)) or found.shape != x.shape or found.dtype != x.dtype:
                given = f"a Tensor of shape {found.shape}, {found.dtype}" if isinstance(found, type(x)) else repr(found)
                raise TypeError(
                    f"a hook must return None, or a Tensor of shape {x.shape}, {x.dtype} as it was given, not {given}"
                )
            x = found
        keeper = self.kept_by() if self.kept_by else None
        if keeper is not None:
            keeper.accumulate(x.copy())
        return x.copy()


class Handle:
    """A hook in a list of hooks."""

    def __init__(self, hooks: Hooks, fn: Callable[..., Any]):
        self.hooks, self.fn = weakref.ref(hooks), fn  # weak, or each hook would be a reference cycle
        hooks.append(self)

    def remove(self) -> None:
        """Take the hook away. A second time does nothing."""
        hooks = self.hooks()
        if hooks is not None:
            hooks[:] = [handle for handle in hooks if handle is not self]
