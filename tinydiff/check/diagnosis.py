"""What is wrong with this gradient? The usual mistakes leave a pattern in the numbers; they are tried one by one.

zero, sign, constant factor                 the two arrays are proportional
transposed, flipped, of another input       the right numbers in the wrong places
missing accumulation                        an input (or an element) with several uses got the gradient of some of them
missing unbroadcast                         an input that was stretched got one repetition's gradient, or their mean
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .. import backend
from ..engine import Tensor
from .numbers import Problem

CLOSE = 1e-5  # of the largest element
MANY = 1024  # experiments are for inputs up to this size


def diagnose(problem: Problem, k: int | None, a: Any, n: Any, wrong: Any) -> str:
    """The mistake in words. a, n: the gradient of input k by the rule and numerically; wrong: where they differ. k is
    None for derivatives along random directions, which show nothing but a common factor."""
    if np.isnan(a).any():
        return f"NaN in {np.isnan(a).sum()} of {a.size} elements"
    if not a.any():
        return "zero: the rule gives no gradient, and there is one"
    if close(a, -n):
        return "sign: it is the negative of the right gradient"
    if k is not None and a.size <= MANY:
        for experiment in (_some_uses, _some_repetitions):
            found = experiment(problem, k, a, n)
            if found:
                return found
    factor = float((a * n).sum() / (n * n).sum()) if n.any() else 0.0
    # If only a small element is wrong, the factor is close to 1, but it does not explain the error.
    if factor and close(a, factor * n) and np.abs(a - factor * n).max() < 0.1 * np.abs(a - n).max():
        return f"constant factor {factor:.6g}{_meaning(factor)}"
    if k is None:
        return "no pattern that random directions could show: check a smaller example"
    found = _misplaced(problem, k, a, n) or _some_outputs(problem, k, a, n, wrong)
    return found or f"no known pattern: {wrong.sum()} of {wrong.size} elements are wrong"


def close(a: Any, b: Any) -> bool:
    """Equal up to CLOSE times the largest element."""
    return a.shape == b.shape and float(np.abs(a - b).max(initial=0.0)) <= CLOSE * float(np.abs(b).max(initial=0.0))


def _meaning(factor: float) -> str:
    simple = Fraction(factor).limit_denominator(64)
    if abs(simple - factor) > CLOSE * abs(factor) or simple.denominator == 1 and simple < 2:
        return ""
    if simple.numerator == 1:
        return (
            f" (1/{simple.denominator}: missing accumulation of {simple.denominator} equal terms, or a mean for a sum?)"
        )
    return f" ({simple})" if simple.denominator > 1 else ""


# ---------------------------------------------------------------- an input that is used several times


class _Watched(Tensor):
    """A Tensor that counts the uses of its array, and gives a different array at one of them."""

    __slots__ = ("plain", "changed", "at", "uses")

    def __init__(self, plain: Any, changed: Any, at: int):
        self.plain, self.changed, self.at, self.uses = plain, changed, at, 0
        super().__init__(plain, True)

    @property
    def _data(self) -> Any:
        self.uses += 1
        return self.changed if self.uses - 1 == self.at else self.plain

    @_data.setter
    def _data(self, array: Any) -> None:
        self.plain = array

    shape = property(lambda self: self.plain.shape)
    ndim = property(lambda self: self.plain.ndim)
    size = property(lambda self: self.plain.size)
    dtype = property(lambda self: self.plain.dtype)


def _some_uses(problem: Problem, k: int, a: Any, n: Any) -> str:
    """Is it the gradient with one or more uses of the input held constant?"""

    def with_use(at: int, array: Any) -> tuple[list[Any], int]:
        watched = _Watched(backend.to_device(problem.arrays[k]), backend.to_device(array), at)
        return problem.outputs([watched if j == k else x for j, x in enumerate(problem.arrays)]), watched.uses

    _, uses = with_use(-1, problem.arrays[k])
    if not 2 <= uses <= 6:
        return ""
    parts = np.zeros((uses, *a.shape))
    for at, index in itertools.product(range(uses), np.ndindex(*a.shape)):
        h = np.zeros(a.shape)
        h[index] = 1e-5 * max(1.0, abs(float(problem.arrays[k][index])))
        sides = [problem.phi(with_use(at, problem.arrays[k] + s * h)[0]) for s in (1, -1)]
        parts[at][index] = (sides[0] - sides[1]) / (2 * h[index])
    if not close(parts.sum(axis=0), n):
        return ""
    used = [at for at in range(uses) if np.abs(parts[at]).max() > CLOSE * np.abs(n).max()]
    for count in range(1, len(used)):
        for some in itertools.combinations(used, count):
            if close(parts[list(some)].sum(axis=0), a):
                lost = ", ".join(str(used.index(at) + 1) for at in used if at not in some)
                return (
                    f"missing accumulation: the input is used {len(used)} times, "
                    f"and the gradient of use {lost} is not added"
                )
    return ""


def _some_outputs(problem: Problem, k: int, a: Any, n: Any, wrong: Any) -> str:
    """Is each wrong element the gradient by one output only, or by all but one? z[index] = g has that effect in place
    of z[index] += g."""
    unit = np.zeros(a.shape)
    for index in np.argwhere(wrong):
        unit[tuple(index)] = 1
        try:
            columns = problem.tangent(k, unit)
        except Exception:  # not made for complex numbers; then there is no such evidence
            return ""
        unit[tuple(index)] = 0
        terms = np.concatenate([(v * c).ravel() for v, c in zip(problem.adjoints, columns)])
        terms = terms[terms != 0]
        here, right = float(a[tuple(index)]), float(n[tuple(index)])
        if (
            len(terms) < 2
            or min(np.abs(terms - here).min(), np.abs(right - terms - here).min()) > CLOSE * np.abs(terms).max()
        ):
            return ""
    return (
        "missing accumulation: each wrong element has the gradient of one of its occurrences only (assigned, not added)"
    )


# ---------------------------------------------------------------- an input that was stretched


def _some_repetitions(problem: Problem, k: int, a: Any, n: Any) -> str:
    """Is it the gradient of some of the repetitions, or their mean? The gradients of the repetitions are those of an
    input that has the output's shape already."""
    out = problem.adjoints[0].shape
    extra = len(out) - a.ndim
    if len(problem.adjoints) > 1 or extra < 0 or np.prod(out) > MANY:
        return ""
    stretched = [ax for ax in range(len(out)) if ax < extra or a.shape[ax - extra] == 1 != out[ax]]
    if not stretched or any(a.shape[ax - extra] != out[ax] for ax in range(len(out)) if ax not in stretched):
        return ""
    each = Problem(problem.fn, problem.inputs, problem.names)
    each.adjoints = problem.adjoints
    each.inputs[each.places[k]] = each.arrays[k] = np.array(np.broadcast_to(problem.arrays[k], out))
    full, unit = np.zeros(out), np.zeros(out)
    try:
        for index in np.ndindex(*out):
            unit[index] = 1
            full[index] = each.by_central_differences(k, unit, 1.0, 0.0, 1e-9).value
            unit[index] = 0
    except Exception:  # the function takes only the small shape
        return ""
    if not close(full.sum(axis=tuple(stretched)).reshape(a.shape), n):
        return ""
    about = f"missing unbroadcast: the input of shape {a.shape} was stretched to {out}, and its gradient is"
    if close(full.mean(axis=tuple(stretched)).reshape(a.shape), a):
        return f"{about} averaged over the repetitions instead of summed"
    for axes in _subsets(len(out)):
        total = full.sum(axis=axes, keepdims=True)
        if axes != tuple(stretched) and total.size == a.size and close(total.reshape(a.shape), a):
            return f"{about} summed over the axes {axes} instead of {tuple(stretched)}"
        if not set(axes) <= set(stretched):
            continue
        rest = tuple(ax for ax in stretched if ax not in axes)
        parts = np.moveaxis(total, rest, range(len(rest))).reshape(-1, *a.shape)  # one part per repetition along rest
        for some in _subsets(len(parts)) if len(parts) <= 8 else ((at,) for at in range(len(parts))):
            if some and close(parts[list(some)].sum(axis=0), a):
                return f"{about} that of {len(some)} of {len(parts)} repetitions"
    return ""


def _subsets(n: int) -> Iterator[tuple[int, ...]]:
    """All subsets of 0, ..., n - 1, the smaller ones first."""
    return itertools.chain.from_iterable(itertools.combinations(range(n), count) for count in range(n + 1))


# ---------------------------------------------------------------- the right numbers in the wrong places


def _misplaced(problem: Problem, k: int, a: Any, n: Any) -> str:
    if n.ndim <= 5:
        for order in itertools.permutations(range(n.ndim)):
            if order != tuple(range(n.ndim)) and close(a, n.transpose(order).reshape(n.shape)):
                return "transposed" + (f": its axes are in the order {order}" if n.ndim > 2 else "")
        for axes in _subsets(n.ndim):
            if axes and close(a, np.flip(n, axes)):
                return f"flipped along the axes {axes}"
    for other, x in enumerate(problem.arrays):
        if other == k or x.shape != a.shape:
            continue
        theirs = np.zeros(a.shape)
        for index in np.ndindex(*a.shape):
            unit = np.zeros(a.shape)
            unit[index] = 1
            theirs[index] = problem.by_central_differences(other, unit, 1.0, 0.0, 1e-9).value
        if close(a, theirs):
            return f"exchanged: it is the gradient of {problem.names[problem.places[other]]}"
    return ""
