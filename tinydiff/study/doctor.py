"""The doctor: what gradcheck found, in plain words (`examine`) and in pictures (`draw`).

>>> try:
...     tinydiff.gradcheck(f, x)
... except tinydiff.GradcheckError as error:
...     draw(error.report, "report.png")
"""

from __future__ import annotations

import os
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
from ..plot import BLUE, FAINT, INK, frame, new_figure, save

Slip = tuple[str, Callable[..., Any]]  # what it forgets, in words, and the wrong rule itself

# ---------------------------------------------------------------- in words


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


# ---------------------------------------------------------------- in pictures


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Three pictures per input: where the error is, the ratio analytic / numeric, and the error against the step size.

    The third shows why the complex step is used: the error of central differences is a V, because large steps do not
    see the curvature and small ones drown in rounding; that of the complex step only falls.
    Arrays are shown as matrices, with all axes but the last as rows. Errors: ValueError if nothing was compared
    element by element.
    """
    if not report.compared:
        raise ValueError("draw: the report has no elements to draw: nothing was compared one by one")
    rows = len(report.compared)
    figure = new_figure(11, 0.8 + 3.1 * rows)
    figure.suptitle(f"{'right' if report.ok else 'WRONG'}: order {report.order}", fontsize=11, color=INK)
    for row, compared in enumerate(report.compared):
        places = [figure.add_subplot(rows, 3, 3 * row + column) for column in (1, 2, 3)]
        a, n = compared.analytic, compared.numeric
        size = max(float(np.nanmax(np.abs(n), initial=0.0)), 1e-300)
        with np.errstate(all="ignore"):
            ratio = np.where(np.abs(n) > 1e-12 * size, a / n, np.nan)
        error = np.log10(np.maximum(np.abs(a - n) / size, 1e-17))
        heat(figure, places[0], error, f"{compared.name}: error, of the largest", "cividis", -12, 0, "log10")
        heat(figure, places[1], ratio, "analytic / numeric", "PuOr", 0, 2, "1 is right")
        steps(places[2], compared)
    figure.set_layout_engine("tight")
    save(figure, path)


def heat(figure: Any, axes: Any, values: Any, title: str, colours: str, low: float, high: float, label: str) -> None:
    """A matrix in colours that colour-blind readers can tell apart; what is no number is magenta."""
    shape = values.shape[-1] if values.ndim else 1
    axes.set_facecolor("magenta")  # what is no number is left transparent
    image = axes.imshow(values.reshape(-1, shape), cmap=colours, vmin=low, vmax=high, aspect="auto")
    figure.colorbar(image, ax=axes, label=label, extend="both" if colours == "PuOr" else "neither")
    frame(axes, title, x="last axis", y="the other axes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def step_errors(compared: Compared) -> tuple[Any, dict[str, Any]]:
    """(step sizes, {method: relative errors}) of the largest derivative of this input."""
    problem, k = compared.problem, compared.k
    at = np.unravel_index(int(np.argmax(np.abs(compared.numeric))), compared.numeric.shape)
    unit = np.zeros(compared.numeric.shape)
    unit[at] = 1
    right = float(compared.numeric[at])
    h = 10.0 ** -np.arange(1, 16)

    def differences(step: float) -> float:
        sides = [problem.phi(problem.outputs(problem.moved(k, s * step * unit))) for s in (1, -1)]
        return float(sides[0] - sides[1]) / (2 * step)

    def complex_step(step: float) -> float:
        moved = [x + 1j * step * unit if j == k else x.astype(complex) for j, x in enumerate(problem.arrays)]
        return float(np.imag(problem.phi(problem.outputs(moved)))) / step

    errors = {"central differences": np.array([abs(differences(s) - right) for s in h])}
    try:
        if abs(problem.by_complex_step(k, unit) - right) <= 1e-6 * abs(right):
            errors["complex step"] = np.array([abs(complex_step(s) - right) for s in h])
    except Exception:  # the function is not made for complex numbers
        pass
    return h, {name: e / max(abs(right), 1e-300) for name, e in errors.items()}


def steps(axes: Any, compared: Compared) -> None:
    h, errors = step_errors(compared)
    looks = {"central differences": (BLUE, "o", "-"), "complex step": (INK, "s", "--")}
    for name, e in errors.items():
        colour, marker, line = looks[name]
        axes.loglog(h, np.maximum(e, 1e-17), line, marker=marker, color=colour, markersize=3.5, label=name)
    axes.grid(True, color=FAINT, alpha=0.25, linewidth=0.6)
    axes.legend(edgecolor="none", fontsize=8)
    frame(axes, "numeric derivative: error", x="step size", y="relative error")
