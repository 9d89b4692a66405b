"""Is this gradient right? The engine's gradient, held against numerical derivatives, element by element.

    >>> report = tinydiff.gradcheck(ops.softmax, x)        # x in float64
    >>> print(report)
    right: order 1, complex step, 12 of 12 elements; largest relative error 0, input 0 at (0, 0)

A wrong one raises GradcheckError, whose report names the worst element and says what the error looks like
(diagnosis.py). The output is weighted with a random adjoint: ones would hide every error that sums to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import backend
from ..arguments import integer, number
from ..engine import AdjointShapeError, Tensor, grad
from ..rng import Rng
from .diagnosis import diagnose
from .numbers import EPSILON, Derivative, Problem

RTOL = {"complex step": 1e-8, "central differences": 1e-6}
DIRECTIONS = 16
SHOWN = 2  # wrong elements, beside the worst


@dataclass(frozen=True)
class Element:
    """One derivative: its input, its index (None: along a random direction), its value by the rule and numerically."""

    input: str
    index: tuple[int, ...] | None
    analytic: float
    numeric: float
    relative_error: float
    kind: str = "smooth"  # or why there is no derivative: see numbers.Derivative

    @property
    def place(self) -> str:
        return f"{self.input} " + ("along a random direction" if self.index is None else f"at {self.index}")

    def __str__(self) -> str:
        return (
            f"{self.place}: analytic {self.analytic:.10g}, numeric {self.numeric:.10g}, "
            f"relative error {self.relative_error:.2g}"
        )


@dataclass(frozen=True)
class Compared:
    """One input, element by element: its gradient by the rule and numerically, where they differ, and what that looks
    like. problem, k: for more derivatives of the same function by its input k."""

    name: str
    analytic: Any
    numeric: Any
    wrong: Any
    finding: str
    problem: Problem
    k: int


@dataclass
class Report:
    """The result of gradcheck; print it. In pictures: tinydiff.study.report.plot(report, path)."""

    order: int
    methods: list[str] = field(default_factory=list)  # one per input that was differentiated
    elements: int = 0  # how many derivatives there are
    checked: int = 0  # how many of them were compared one by one
    worst: Element | None = None
    wrong: list[Element] = field(default_factory=list)
    # no derivative there: any value between the derivatives of the two sides is accepted
    kinks: list[Element] = field(default_factory=list)
    diagnosis: str = ""
    notes: list[str] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list, repr=False)  # one per input that was compared by element

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.diagnosis

    def keep_worst(self, element: Element) -> None:
        if self.worst is None or not element.relative_error <= self.worst.relative_error:
            self.worst = element

    def blame(self, name: str, finding: str) -> None:
        self.diagnosis += ("; " if self.diagnosis else "") + f"{name}: {finding}"

    def __str__(self) -> str:
        methods = " and ".join(sorted(set(self.methods))) or "nothing compared"
        lines = [
            f"{'right' if self.ok else 'WRONG'}: order {self.order}, {methods}, "
            f"{self.checked} of {self.elements} elements"
        ]
        if self.wrong:
            lines[0] += f", {len(self.wrong)} of them wrong"
        if self.worst is not None and self.ok:
            lines[0] += f"; largest relative error {self.worst.relative_error:.2g}, {self.worst.place}"
        elif self.worst is not None:
            lines.append(f"worst: {self.worst}")
            others = [element for element in self.wrong if element is not self.worst]
            lines += [f"wrong: {element}" for element in others[:SHOWN]]
            if len(others) > SHOWN:
                lines.append(f"and {len(others) - SHOWN} more, which are in error.report.wrong")
        if self.diagnosis:
            lines.append(f"diagnosis: {self.diagnosis}")
        if self.kinks:
            lines.append(
                f"no derivative at {len(self.kinks)} elements, such as {self.kinks[0].place} ({self.kinks[0].kind})"
            )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class GradcheckError(AssertionError):
    """A gradient that is wrong; `report` has the numbers."""

    def __init__(self, report: Report):
        super().__init__(f"the gradient is {report}")
        self.report = report


def gradcheck(
    fn: Callable[..., Any],
    *inputs: Any,
    order: int = 1,
    rtol: float | None = None,
    atol: float = 0.0,
    seed: int = 0,
    elements: int = 4096,
) -> Report:
    """Compare the gradient of fn(*inputs) with numerical derivatives. Raises GradcheckError if it is wrong.

    fn takes Tensors and returns one, or several. Inputs that are float64 (arrays or Tensors) are differentiated;
    integers, None and everything else go to fn as they are. order=2 checks the gradient, and then the gradient of the
    gradient, with respect to the inputs and to the adjoint.

    The numerical derivatives come from the complex step if fn accepts complex arrays and agrees with central
    differences along a random direction; else from central differences. An element that differs from the rule is tried
    again by central differences, which see kinks. At a kink the gradient may lie anywhere between the derivatives of
    the two sides, and the report lists it; at a jump, at the edge of the domain, or where no two differences agree, it
    is listed and not compared.
    Relative error: |analytic - numeric| over the larger of the two, or over a thousandth of the input's largest
    derivative if that is more. It must be at most rtol (1e-8 for the complex step, 1e-6 for differences). What atol and
    rounding allow is subtracted before, so a right gradient often has an error of 0. With more than `elements`
    derivatives, 16 random directions per input are compared instead, and the report says so.

    Errors: TypeError for inputs of another floating dtype (float32 has too few digits for a check) and for an fn that
    returns no Tensors; ValueError if there is nothing to differentiate, if fn gives NaN or Inf, if it gives another
    result each time, or for an order that is not 1 or 2, a tolerance that is negative or not finite, or elements that
    are no integer of 0 or more.
    """
    order, elements = integer("gradcheck: order", order, 1, 2), integer("gradcheck: elements", elements, 0)
    rtol = None if rtol is None else number("gradcheck: rtol", rtol, "[0, inf)")
    atol = number("gradcheck: atol", atol, "[0, inf)")
    given = [_host(i, x) for i, x in enumerate(inputs)]
    names = [f"input {i}" for i in range(len(given))]
    rng = Rng(seed)
    first = Problem(lambda *xs: _outputs(fn(*xs)), given, names)
    report = _check(first, first.fn, 1, rtol, atol, rng, elements)
    if order == 1:
        return report

    adjoints = list(first.adjoints)

    def gradient(create_graph: bool) -> Callable[..., list[Tensor]]:
        def run(*args: Any) -> list[Tensor]:
            n = len(args) - len(adjoints)
            return _pull_back(first.fn(*args[:n]), [args[i] for i in first.places], args[n:], create_graph)

        return run

    names += [f"the adjoint of output {i}" for i in range(len(adjoints))]
    second = Problem(gradient(create_graph=False), [*given, *adjoints], names)
    return _check(second, gradient(create_graph=True), 2, rtol, atol, rng, elements)


def _host(i: int, x: Any) -> Any:
    """An input that is differentiated becomes a host array; a constant becomes what fn takes."""
    array = x._data if isinstance(x, Tensor) else x
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        return x
    if array.dtype.kind not in "fc":
        return x if isinstance(x, Tensor) else backend.to_device(array)
    if array.dtype != "float64":
        raise TypeError(
            f"gradcheck needs float64, and input {i} of shape {array.shape} is {array.dtype}: "
            "a check would drown in rounding"
        )
    return np.array(backend.to_host(array))


def _outputs(y: Any) -> list[Tensor]:
    ys = list(y) if isinstance(y, (tuple, list)) else [y]
    for y in ys:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"gradcheck: the function must return Tensors made from its inputs by ops, not {type(y).__name__}"
            )
    return ys


def _pull_back(
    outputs: Sequence[Tensor], xs: Sequence[Tensor], adjoints: Sequence[Any], create_graph: bool = False
) -> list[Tensor]:
    """Each x's gradient of the sum over outputs of <adjoint, output>."""
    total: list[Any] = [None] * len(xs)
    for y, v in zip(outputs, adjoints):
        if y.requires_grad:
            found = grad(y, xs, v, create_graph=create_graph)
            total = [g if t is None else t + g for t, g in zip(total, found)]
    return [Tensor(backend.xp.zeros_like(x._data)) if t is None else t for t, x in zip(total, xs)]


def _check(
    problem: Problem, fn: Callable[..., list[Tensor]], order: int, rtol: float | None, atol: float, rng: Rng, limit: int
) -> Report:
    if not problem.arrays:
        raise ValueError("gradcheck: none of the inputs is a float64 array, so there is nothing to differentiate")
    once, again = problem.outputs(problem.arrays), problem.outputs(problem.arrays)
    for y, same in zip(once, again):
        if not np.isfinite(y).all():
            raise ValueError(
                f"gradcheck: the function gives {y[~np.isfinite(y)][0]} in an output of shape "
                f"{y.shape}: no gradient to check"
            )
        if not np.allclose(y, same, rtol=1e-12, atol=1e-14):
            raise ValueError("gradcheck: the function gives another result each time: make its Rng anew inside it")
    problem.adjoints = [_normal(rng, y.shape) for y in once]

    report = Report(order, elements=sum(x.size for x in problem.arrays))
    try:
        analytic = _analytic(problem, fn)
    except AdjointShapeError as error:
        kind = "transposed" if sorted(error.given) == sorted(error.wanted) else "missing unbroadcast"
        if math.prod(error.given) < math.prod(error.wanted):
            kind = "too few elements (a sum over too many axes, or a slice?)"
        report.diagnosis = f"{kind}: {error}"
        raise GradcheckError(report) from error
    noise = problem.noise()
    by_element = report.elements <= limit
    if not by_element:
        report.notes.append(
            f"{report.elements} elements are more than {limit}: {DIRECTIONS} random directions per input were tried, "
            "which finds an error, but not its place"
        )
    for k, a in enumerate(analytic):
        if a.size == 0:
            continue
        method, why = _method(problem, k, a, noise, rng)
        report.methods.append(method)
        if why:
            report.notes.append(f"{problem.names[problem.places[k]]}: {why}")
        tolerance = RTOL[method] if rtol is None else rtol
        if by_element:
            _compare_elements(problem, k, a, method, tolerance, atol, noise, report)
        else:
            _compare_directions(problem, k, a, method, tolerance, atol, noise, report, rng)
    if report.wrong:
        raise GradcheckError(report)
    return report


def _analytic(problem: Problem, fn: Callable[..., list[Tensor]]) -> list[Any]:
    """The gradients by the engine."""
    given = list(problem.inputs)
    xs = [Tensor(backend.to_device(x.copy()), True) for x in problem.arrays]
    for place, x in zip(problem.places, xs):
        given[place] = x
    vs = [backend.to_device(v) for v in problem.adjoints]
    return [backend.to_host(g._data) for g in _pull_back(fn(*given), xs, vs)]


def _normal(rng: Rng, shape: tuple[int, ...]) -> Any:
    return backend.to_host(rng.normal(shape, "float64"))


def _method(problem: Problem, k: int, a: Any, noise: float, rng: Rng) -> tuple[str, str]:
    """Can the complex step be trusted for input k? It is wrong, without an error, for abs, real parts, and comparisons
    of magnitude."""
    d = _normal(rng, a.shape)
    try:
        by_step = problem.by_complex_step(k, d)
    except Exception as error:  # whatever it is: the function is not made for complex numbers
        return (
            "central differences",
            f"no complex step, because the function raises {type(error).__name__} on complex arrays: {error}",
        )
    derivative = problem.by_central_differences(
        k, d, 1 / max(float(np.abs(d).max()), 1.0), noise, 1e-8 * float(np.abs(a * d).sum())
    )
    size = max(abs(by_step), abs(derivative.value), float(np.abs(a * d).sum()))
    if derivative.kind == "smooth" and abs(by_step - derivative.value) <= 1e-6 * size + 10 * derivative.error:
        return "complex step", ""
    why = (
        f"no complex step: along a random direction it gives {by_step:.6g}, "
        f"differences {derivative.value:.6g} ({derivative.kind})"
    )
    return "central differences", why


def _rounding(method: str, noise: float, largest: float) -> float:
    """The error that rounding alone may cause in a derivative. The complex step takes no difference, so a large output,
    such as that of 10^10 + x, costs it no digits."""
    of_output = 1e-12 / (4 * EPSILON) * noise
    return min(of_output, max(1e-6 * largest, 1e-12)) if method == "complex step" else of_output


def _relative_error(a: Any, n: Any, slack: Any) -> Any:
    """|a - n| beyond the slack, over the larger of the two, or over a thousandth of the largest n."""
    away = np.maximum(np.abs(a - n) - slack, 0.0)  # NaN stays NaN
    floor = 1e-3 * np.nanmax(np.abs(n), initial=0.0)
    return away / np.maximum(np.maximum(np.abs(a), np.abs(n)), max(floor, 1e-300))


def _compare_elements(
    problem: Problem, k: int, a: Any, method: str, rtol: float, atol: float, noise: float, report: Report
) -> None:
    name, x = problem.names[problem.places[k]], problem.arrays[k]
    size = float(np.abs(a[np.isfinite(a)]).max(initial=0.0))
    numeric, rough = np.zeros(a.shape), {}

    def unit(index: tuple[int, ...]) -> Any:
        one = np.zeros(a.shape)
        one[index] = 1
        return one

    def differences(index: tuple[int, ...]) -> Derivative:
        goal = 0.01 * RTOL["central differences"] * max(abs(float(a[index])), size)
        return problem.by_central_differences(k, unit(index), max(1.0, abs(float(x[index]))), noise, goal)

    if method == "complex step":
        for index in np.ndindex(*a.shape):
            numeric[index] = problem.by_complex_step(k, unit(index))
    allowed = np.full(a.shape, atol + _rounding(method, noise, float(np.abs(numeric).max(initial=0.0))))
    if method == "complex step":
        doubtful = [tuple(index) for index in np.argwhere(~(_relative_error(a, numeric, allowed) <= rtol))]
    else:
        doubtful = list(np.ndindex(*a.shape))
    for index in doubtful:
        derivative, step = differences(index), float(numeric[index])
        if derivative.kind != "smooth":
            rough[index] = derivative
            numeric[index] = derivative.value
        elif method != "complex step" or not abs(step - derivative.value) <= 10 * derivative.error + 1e-6 * abs(step):
            numeric[index] = derivative.value
            allowed[index] += 2 * derivative.error + max(RTOL["central differences"] - rtol, 0.0) * abs(
                derivative.value
            )

    relative = _relative_error(a, numeric, allowed)
    wrong = ~(relative <= rtol)
    for index, derivative in rough.items():
        low, high = min(derivative.left, derivative.right), max(derivative.left, derivative.right)
        slack = 1e-3 * max(abs(low), abs(high))
        between = derivative.kind != "kink" or low - slack <= a[index] <= high + slack
        wrong[index] = not (between and np.isfinite(a[index]))
    kinds = {index: derivative.kind for index, derivative in rough.items()}
    elements = {
        index: Element(
            name, index, float(a[index]), float(numeric[index]), float(relative[index]), kinds.get(index, "smooth")
        )
        for index in np.ndindex(*a.shape)
    }
    report.checked += a.size - len(rough)
    report.kinks += [elements[index] for index in rough]
    report.wrong += [element for index, element in elements.items() if wrong[index]]
    for index, element in elements.items():
        if wrong[index] or index not in rough:
            report.keep_worst(element)
    finding = diagnose(problem, k, a, numeric, wrong) if wrong.any() else ""
    report.compared.append(Compared(name, a, numeric, wrong, finding, problem, k))
    if finding:
        report.blame(name, finding)


def _compare_directions(
    problem: Problem, k: int, a: Any, method: str, rtol: float, atol: float, noise: float, report: Report, rng: Rng
) -> None:
    name, pairs = problem.names[problem.places[k]], []
    for _ in range(DIRECTIONS):
        d = _normal(rng, a.shape)
        value, size = float((a * d).sum()), float(np.sqrt(((a * d) ** 2).sum()))
        if method == "complex step":
            numeric, error = problem.by_complex_step(k, d), 0.0
        else:
            derivative = problem.by_central_differences(k, d, 1 / max(float(np.abs(d).max()), 1.0), noise, 1e-8 * size)
            numeric, error = derivative.value, derivative.error
        away = max(abs(value - numeric) - atol - _rounding(method, noise, size) - 2 * error, 0.0)
        element = Element(name, None, value, numeric, away / max(abs(value), abs(numeric), size) if away else 0.0)
        pairs.append((value, numeric))
        if not element.relative_error <= rtol:
            report.wrong.append(element)
        report.keep_worst(element)
    if any(e.input == name for e in report.wrong):
        analytic, numbers = np.array(pairs).T
        report.blame(name, diagnose(problem, None, analytic, numbers, np.ones(len(pairs), bool)))
