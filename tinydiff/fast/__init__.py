"""The speed: quicker versions of what stands elsewhere in plain array operations, registered from outside.

Nothing imports this folder but tinydiff/__init__.py, which switches it on; TINYDIFF_FAST=0 switches it off. Without it
everything works, slower.
"""

from . import threads as threads
