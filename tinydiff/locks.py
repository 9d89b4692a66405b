"""Locks that a fork leaves free."""

from __future__ import annotations

import os
import threading
from typing import Any


def free_in_child() -> Any:
    """A lock that a thread may take several times. In the child of a fork it is free, although another thread of the
    parent may have held it: nobody there would ever free it. (So are the locks of Python's own logging.)"""
    lock: Any = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)
    return lock
