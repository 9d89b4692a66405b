"""The speed: quicker versions of what stands elsewhere in plain array operations, registered from outside.

Nothing imports this folder but tinydiff/__init__.py. It may be deleted, and everything still works, slower; and
TINYDIFF_FAST=0 in the environment switches it off.
"""

from . import cpu

__all__ = ["cpu"]
