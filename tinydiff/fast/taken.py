"""The arrays that fast versions take; for all others the page runs."""

from __future__ import annotations

from typing import Any


def is_real(*arrays: Any) -> bool:
    """Are these arrays all float32, or all float64? None does not count. Anything else, such as the complex arrays of
    the complex step or Python's numbers, is for the page."""
    dtypes = {getattr(a, "dtype", None) for a in arrays if a is not None}
    return len(dtypes) == 1 and (dtype := dtypes.pop()) is not None and dtype.char in "fd" and dtype.isnative
