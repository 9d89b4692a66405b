"""What fast versions take: the page runs for the rest."""

from __future__ import annotations

from typing import Any


def is_real(*arrays: Any) -> bool:
    """Are these arrays all of float32, or all of float64? None does not count. Others, such as the complex numbers of
    the complex step, and Python's numbers, are for the page."""
    return {getattr(getattr(a, "dtype", None), "char", None) for a in arrays if a is not None} in ({"f"}, {"d"})
