"""The doctor: what gradcheck found, in plain words. In pictures: report.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import backend
from ..check import GradcheckError, Report
from ..check.diagnosis import close
from ..check.gradcheck import Compared
from ..engine import AdjointShapeError, Op, unbroadcast

Slip = tuple[str, Callable[..., Any]]  # what it forgets, in words, and the wrong rule itself


def examine(
    error: GradcheckError,
    op: Op,
    inputs: Sequence[Any],
    params: dict[str, Any],
    names: list[str],
    slips: Sequence[Slip],
) -> str:
    """What is wrong with each adjoint, one line per input, and the worst element."""
    cause = error.__cause__
    if isinstance(cause, AdjointShapeError):
        at = next((i for i, x in enumerate(inputs) if f"gave input {i} of" in str(cause)), 0)
        kind = error.report.diagnosis.split(":")[0]
        return (
            f"Not yet. The adjoint of {names[at]} has shape {cause.given}, and must have that of {names[at]}, "
            f"{cause.wanted} ({kind})."
        )
    lines = []
    for compared in error.report.compared:
        if not compared.wrong.any():
            continue
        place = compared.problem.places[compared.k]
        finding = known_slip(compared, op, inputs, params, slips)
        if not finding and compared.finding.startswith(("no known pattern", "constant factor")):
            finding = factor(compared, names)
        finding = finding or compared.finding
        lines.append(f"Not yet. The adjoint of {names[place]}: {finding}.")
    if error.report.worst is not None:
        lines.append(f"worst: {error.report.worst}".replace("analytic", "yours").replace("numeric", "right"))
    return with_names("\n".join(lines), names)


def with_names(text: str, names: list[str]) -> str:
    """gradcheck numbers the inputs; an op names them."""
    return re.sub(r"\binput (\d+)", lambda found: names[int(found[1])], text)


def name_inputs(report: Report, names: list[str]) -> None:
    """The same for the pictures."""
    report.compared = [replace(c, name=with_names(c.name, names)) for c in report.compared]


def known_slip(compared: Compared, op: Op, inputs: Sequence[Any], params: dict[str, Any], slips: Sequence[Slip]) -> str:
    """Is it the gradient that one of the usual slips gives?"""
    place = compared.problem.places[compared.k]
    out = compared.problem.outputs(compared.problem.arrays)[0]
    arrays = [backend.to_device(x) if isinstance(x, np.ndarray) else x for x in inputs]
    g = backend.to_device(compared.problem.adjoints[0])
    for words, rule in slips:
        found = rule(g, backend.to_device(out), *arrays, **{**op.defaults, **params})
        adjoint = (found if isinstance(found, tuple) else (found,))[place]
        if adjoint is None:
            continue
        if close(compared.analytic, backend.to_host(unbroadcast(adjoint, arrays[place], op.name, place))):
            return words
    return ""


def factor(compared: Compared, names: list[str]) -> str:
    """Is the right gradient this one, times or divided by something that is at hand?"""
    a, n = compared.analytic, compared.numeric
    for name, q in at_hand(compared, names):
        try:
            q = np.broadcast_to(q, a.shape)
        except ValueError:
            continue
        if close(a * q, n):
            return f"the factor {name} is missing"
        if close(a, n * q):
            return f"there is a factor {name} too many"
    return ""


def at_hand(compared: Compared, names: list[str]) -> Iterator[tuple[str, Any]]:
    """(name, array) of what a rule is given, and of simple functions of it."""
    problem = compared.problem
    given = [("g", problem.adjoints[0]), ("out", problem.outputs(problem.arrays)[0])]
    given += [(names[place], x) for place, x in zip(problem.places, problem.arrays)]
    yield from given
    for name, q in given[1:]:
        yield f"(1 - {name})", 1 - q
        yield f"(1 + {name})", 1 + q
        yield f"{name}^2", q * q
        with np.errstate(all="ignore"):
            if (q > 0).all():
                yield f"log {name}", np.log(q)
            yield f"e^{name}", np.exp(q)
