"""gradcheck of every op on the backend in use, for a new machine, GPU or NumPy: `python -m tinydiff check`."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np

from .backend import active, to_device
from .check import GradcheckError, gradcheck
from .operators import OPS
from .study.examples import CALLS


def unknown(names: Sequence[str]) -> str:
    """What is wrong with the names, or ""."""
    for name in names:
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, cutoff=0.5)
            return f"there is no op named {name!r}" + (f": did you mean {', '.join(near)}?" if near else "")
        if name not in CALLS:
            return f"the op {name!r} has no example to be checked on: give it one in CALLS, tinydiff/study/examples.py"
    return ""


def check_ops(names: Sequence[str], out: TextIO, order: int = 1) -> int:
    """Check the ops of those names, or all; one line each, more for a wrong one; the exit code."""
    names, wrong = list(names) or sorted(name for name in CALLS if name in OPS), []
    for name in names:
        fn, inputs = call(name)
        try:
            report: Any = str(gradcheck(fn, *inputs, order=order)).splitlines()[0]
        except (GradcheckError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            wrong.append(name)
            report = f"{type(error).__name__}: {error}"
        out.write(f"{name}: {report}\n")
        out.flush()
    out.write(f"{len(names) - len(wrong)} of {len(names)} ops are right on {active().name}\n")
    if wrong:
        out.write(f"WRONG: {', '.join(wrong)}\n")
    return 1 if wrong else 0


def call(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """The op's small call as a function of its inputs in float64, and those."""
    given, params = CALLS[name]
    draw = np.random.default_rng(0)
    inputs: list[Any] = []

    def place(value: Any) -> Any:
        """The value, with the inputs replaced by their numbers."""
        if isinstance(value, list):
            return [place(v) for v in value]
        if isinstance(value, (tuple, np.ndarray)):
            if isinstance(value, tuple):
                value = draw.permutation(np.linspace(0.5, 2, math.prod(value))).reshape(value)
            inputs.append(value)
            return Input(len(inputs) - 1)
        return value

    places = [place(value) for value in given]

    def fn(*xs: Any) -> Any:
        def filled(p: Any) -> Any:
            return [filled(q) for q in p] if isinstance(p, list) else xs[p.number] if isinstance(p, Input) else p

        # A copy, because a source of random numbers must draw the same ones each time.
        options = {k: to_device(v) if isinstance(v, np.ndarray) else copy.copy(v) for k, v in params.items()}
        return OPS[name](*map(filled, places), **options)

    return fn, inputs


class Input:
    """The place of an input."""

    def __init__(self, number: int):
        self.number = number
