"""tinydiff: Stable Diffusion that can be read down to the last gradient.

A tiny reverse-mode autograd over NumPy or CuPy (`TINYDIFF_BACKEND=cupy`), and on it diffusion models. Read in this
order: engine, ops; then nn, optim, diffusion, models, training. The folder fast/ makes it quick, and can be left out.
"""

import difflib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

# Does `python -m tinydiff` begin? "-m" is there too while `python -m other` imports a package that imports this one.
if _begins := sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] in (["tinydiff"], ["-mtinydiff"]):
    _before = sys.excepthook  # Ctrl-C while it imports gets no traceback
    sys.excepthook = lambda kind, *rest: sys.exit(130) if kind is KeyboardInterrupt else _before(kind, *rest)

from . import backend, functional, nn, ops, optim
from .anomaly import detect_anomaly
from .check import GradcheckError, gradcheck
from .engine import Tensor, grad, tensor
from .interop import from_dlpack
from .modes import grad_enabled, no_grad
from .profile import profile
from .recompute import checkpoint
from .rng import Rng

if TYPE_CHECKING:
    from . import study
    from .describing import rebuildable
    from .study.exercise import exercise, exercises
    from .study.explain import explain
    from .trained import load

backend.warn_of_unknown_variables()
try:
    _wants_fast = backend.wants_fast()
except ValueError as error:
    if not _begins:
        raise
    sys.stderr.write(f"tinydiff: {error}\n")  # a user's mistake gets no traceback
    sys.exit(2)
if _wants_fast and importlib.util.find_spec(".fast", __name__):
    from . import fast  # noqa: F401  which registers quicker versions of what the others define

__version__ = "0.1.0"
__all__ = [
    "GradcheckError",
    "Rng",
    "Tensor",
    "backend",
    "checkpoint",
    "detect_anomaly",
    "exercise",
    "exercises",
    "explain",
    "from_dlpack",
    "functional",
    "grad",
    "grad_enabled",
    "gradcheck",
    "load",
    "nn",
    "no_grad",
    "ops",
    "optim",
    "profile",
    "rebuildable",
    "study",
    "tensor",
]


# What few programs need is imported when it is first asked for.
LATER = {
    "exercise": ".study.exercise",
    "exercises": ".study.exercise",
    "explain": ".study.explain",
    "load": ".trained",
    "rebuildable": ".describing",
}


def __getattr__(name: str) -> Any:
    if name == "study":
        return importlib.import_module(".study", __name__)
    if name in LATER:
        return getattr(importlib.import_module(LATER[name], __name__), name)
    if name == "backward":
        raise AttributeError("tinydiff has no function backward: y.backward() is a method of the Tensor y")
    near = difflib.get_close_matches(name, [*__all__, *dir(ops)])
    hint = f": did you mean {' or '.join(n if n in __all__ else f'ops.{n}' for n in near)}?" if near else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
