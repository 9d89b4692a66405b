"""The speed: quicker versions of what stands elsewhere in plain array operations, registered from outside.

Nothing imports this folder but tinydiff/__init__.py. It may be deleted, and everything still works, slower; and
TINYDIFF_FAST=0 in the environment switches it off.
"""

import importlib

from .. import backend
from . import capture, cpu, threads

# The folder needs CuPy: it comes when that is chosen.
backend.loaders["cupy"] = lambda: importlib.import_module(".cuda", __name__)

__all__ = ["capture", "cpu", "threads"]
