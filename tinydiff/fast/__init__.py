"""The speed: quicker versions of functions that are written elsewhere in plain array operations, registered from
outside.

Only tinydiff/__init__.py imports this folder. Without it everything still works, but slower; TINYDIFF_FAST=0 in the
environment switches it off.
"""

import importlib

from .. import backend
from . import capture, cpu, threads

# cuda/ needs CuPy, so it is imported when that backend is chosen.
backend.loaders["cupy"] = lambda: importlib.import_module(".cuda", __name__)

__all__ = ["capture", "cpu", "threads"]
