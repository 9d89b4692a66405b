"""A report of gradcheck in pictures: where a gradient is wrong, by what factor, and how far numbers can be trusted.

try:
    tinydiff.gradcheck(f, x)
except tinydiff.GradcheckError as error:
    report.plot(error.report, "report.png")
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from ..check import Report
from ..check.gradcheck import Compared
from ..plot import BLUE, FAINT, INK, frame, new_figure, save


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Three pictures per input: where the error is, the ratio analytic / numeric, and the error against the step size.

    The third shows why the complex step is used: the error of central differences is a V, because large steps do not
    see the curvature and small ones drown in rounding; that of the complex step only falls. Where it cannot be taken,
    the picture says why.
    Arrays are shown as matrices, with all axes but the last as rows. Errors: ValueError if nothing was compared
    element by element.
    """
    if not report.compared:
        raise ValueError("plot: the report has no elements to draw: nothing was compared one by one")
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
        heat(figure, places[1], ratio, "analytic / numeric", "PuOr_r", 0, 2, "1 is right")
        steps(places[2], compared)
    figure.set_layout_engine("tight")
    save(figure, path)


def heat(figure: Any, axes: Any, values: Any, title: str, colours: str, low: float, high: float, label: str) -> None:
    """A matrix in colours that colour-blind readers can tell apart; what is no number is magenta."""
    shape = values.shape[-1] if values.ndim else 1
    axes.set_facecolor("magenta")  # what is no number is left transparent
    image = axes.imshow(values.reshape(-1, shape), cmap=colours, vmin=low, vmax=high, aspect="auto")
    figure.colorbar(image, ax=axes, label=label, extend="both" if colours == "PuOr_r" else "neither")
    frame(axes, title, x="last axis", y="the other axes")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)


def step_errors(compared: Compared) -> tuple[Any, dict[str, Any], str]:
    """(step sizes, {method: relative errors}, why there is no complex step) of the largest derivative of this input."""
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
    why = ""
    try:
        by_step = problem.by_complex_step(k, unit)
    except Exception as error:  # whatever it is: the function is not made for complex numbers
        why = f"no complex step: {type(error).__name__} on complex arrays"
    else:
        if abs(by_step - right) <= 1e-6 * abs(right):
            errors["complex step"] = np.array([abs(complex_step(s) - right) for s in h])
        else:
            why = f"no complex step: it gives {by_step:.4g}, differences {right:.4g}"
    return h, {name: e / max(abs(right), 1e-300) for name, e in errors.items()}, why


def steps(axes: Any, compared: Compared) -> None:
    h, errors, why = step_errors(compared)
    looks = {"central differences": (BLUE, "o", "-"), "complex step": (INK, "s", "--")}
    for name, e in errors.items():
        colour, marker, line = looks[name]
        axes.loglog(h, np.maximum(e, 1e-17), line, marker=marker, color=colour, markersize=3.5, label=name)
    if why:
        axes.plot([], [], " ", label=why)  # a line of the legend
    axes.grid(True, color=FAINT, alpha=0.25, linewidth=0.6)
    axes.legend(edgecolor="none", fontsize=8)
    frame(axes, "numeric derivative: error", x="step size", y="relative error")
