"""Exercises: an op is shown without its derivation and its rule, you write the rule, and the doctor says what is wrong.

    >>> ex = tinydiff.exercise("softmax")              # prints the formula and the forward
    >>> ex.check(lambda g, z, x, *, axis: g * z)       # what is wrong, in words
    >>> ex.hint()                                      # the next hint
    >>> ex.solution()                                  # what stands in tinydiff/ops

A rule that is tried belongs to a copy of the op. The op itself, and its entry in OPS, are never touched.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import backend
from ..check import GradcheckError, Report, gradcheck
from ..engine import Op
from .catalogue import CATALOGUE, Sheet
from .doctor import examine, name_inputs, with_names
from .report import plot

HELPERS = {  # which a forward may call, and which are not shown
    "axes_of": "axes_of gives the axes as numbers from 0: all for None, and for a negative one that from the end.",
    "axis_of": "axis_of gives the axis as a number from 0: for a negative one that from the end.",
    "floating": "floating makes floats of integers, and leaves floats as they are.",
}
MACRON = "\u0304"  # what makes x̄ of x


class Unfit(Exception):
    """An answer that gives no gradient to compare. Its text is one sentence."""


@dataclass(frozen=True, repr=False)
class Answer:
    """What the doctor says of a rule. report: gradcheck's, if there was a gradient to check."""

    ok: bool
    text: str
    report: Report | None = None

    def __repr__(self) -> str:
        return self.text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """The report in pictures (report.py). Errors: ValueError if there was no gradient to check."""
        if self.report is None:
            raise ValueError("plot: there is no report, because the rule gave no gradient")
        plot(self.report, path)


class Exercise:
    """One op whose rule is to be written. `print(ex)` shows its page again."""

    def __init__(self, number: int, sheet: Sheet):
        self.number, self.name, self.level, self.op = number, sheet.name, sheet.level, sheet.op
        self.sheet, self._hints = sheet, iter(enumerate(sheet.hints, 1))
        parameters = inspect.signature(self.op.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        self.options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def __repr__(self) -> str:
        return f"<exercise {self.number}: {self.name}, level {self.level}>"

    def __str__(self) -> str:
        signature = ", ".join(["g", "out", *self.names, *(["*", *self.options] if self.options else [])])
        page = forward_page(self.op)
        helpers = "\n".join(text for name, text in HELPERS.items() if f"{name}(" in page)
        parts = [
            f"Exercise {self.number}: {self.name} (level {self.level} of 4)",
            *(without_docstring(f) for f in self.sheet.shows),
            page,
            *([helpers] if helpers else []),
            f"Write its rule: ({signature}) -> {'one adjoint' if len(self.names) == 1 else 'an adjoint per input'}.",
        ]
        inputs, params = self.sheet.example()
        tried = [f"{name} {x.shape}" for name, x in zip(self.names, inputs)]
        tried += [f"{name}={value!r}" for name, value in params.items()]
        return (
            "\n\n".join(parts) + "\ng is the adjoint of the output; broadcasting is undone for you.\n"
            f"It is tried on {', '.join(tried)}."
        )

    def check(self, rule: Callable[..., Any]) -> Answer:
        """Try a rule on the example."""
        inputs, params = self.sheet.example()
        try:
            trial = Op(self.op.forward, self.op.holomorphic)
            trial.vjp(self._guarded(rule))
        except Exception as error:  # whatever was given
            return Answer(False, f"This is no rule of {self.name}: {error}.")
        params = {name: on_device(value) for name, value in params.items()}
        try:
            report = gradcheck(functools.partial(trial, **params), *inputs)
        except Unfit as error:
            return Answer(False, str(error))
        except GradcheckError as error:
            text = examine(error, self.op, inputs, params, self.names, self.sheet.slips)
            name_inputs(error.report, self.names)
            return Answer(False, text, error.report)
        except (TypeError, ValueError) as error:  # the engine's, about what the rule handed back
            return Answer(False, f"The rule cannot be used: {error}.")
        name_inputs(report, self.names)
        return Answer(True, with_names(f"Right. {self.name}: {report}", self.names), report)

    def answer(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: try the rule below it, and print what the doctor says."""
        print(self.check(rule))
        return rule

    def hint(self) -> None:
        """Print the next hint."""
        count = len(self.sheet.hints)
        number, text = next(self._hints, (0, "There are no more hints: ex.solution() shows the rule."))
        print(f"Hint {number} of {count}: {text}" if number else text)

    def solution(self) -> None:
        """Print the derivation and the rule that stand in tinydiff/ops."""
        rule = self.op.rule or self.op.forward
        module = inspect.getmodule(rule)
        story = inspect.getdoc(module) or ""
        derivation = [p for p in paragraphs(self.op) if p not in shown(self.op)]
        parts = [f"From {(module and module.__name__ or '').replace('.', '/')}.py:"]
        if re.search(rf"x{MACRON}\S* =", story):
            parts.append(textwrap.indent(story, "    "))
        parts += [textwrap.indent(p, "    ") for p in derivation] + [inspect.getsource(rule)]
        print("\n\n".join(parts).rstrip())

    def _guarded(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """The rule, watched: it must raise nothing, hand back something, and write into none of its arguments."""
        if not callable(rule):
            raise TypeError(f"it is {rule!r}, and must be a function")

        @functools.wraps(rule)
        def guarded(*arguments: Any, **params: Any) -> Any:
            before = [
                backend.to_host(a).copy() if hasattr(a, "dtype") and hasattr(a, "copy") else None for a in arguments
            ]
            try:
                found = rule(*arguments, **params)
                found = tuple(f() if callable(f) else f for f in (found if isinstance(found, tuple) else (found,)))
            except Exception as error:
                raise Unfit(f"The rule raises {type(error).__name__}: {error}.") from error
            for name, a, was in zip(["g", "out", *self.names], arguments, before):
                if was is not None and not np.array_equal(backend.to_host(a), was, equal_nan=True):
                    raise Unfit(f"The rule writes into {name}, which others still read: compute a new array.")
            if len(found) == 1 and found[0] is None:
                raise Unfit("The rule returns None: is a `return` missing?")
            if len(found) != len(self.names):
                raise Unfit(
                    f"The rule returns {len(found)} adjoints for the {len(self.names)} inputs {', '.join(self.names)}."
                )
            for name, f in zip(self.names, found):
                if f is not None and not hasattr(f, "shape"):
                    raise Unfit(f"The adjoint of {name} is {f!r}, and must be an array of the shape of {name}.")
            return found

        return guarded


class Listing(tuple):
    """A tuple of exercises, shown as a table."""

    def __repr__(self) -> str:
        return "\n".join(f"{ex.number:>2}  {ex.name:<17} level {ex.level}" for ex in self)


def exercises() -> Listing:
    """All exercises, in order."""
    return Listing(Exercise(number, sheet) for number, sheet in enumerate(CATALOGUE, 1))


def exercise(which: str | int) -> Exercise:
    """The exercise of that name or number; its page is printed. Errors: ValueError if there is none."""
    for ex in exercises():
        if which in (ex.name, ex.number) and not isinstance(which, bool):
            print(ex)
            return ex
    names = [sheet.name for sheet in CATALOGUE]
    near = difflib.get_close_matches(str(which), names, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are 1 to {len(CATALOGUE)}, {', '.join(names)}"
    raise ValueError(f"there is no exercise {which!r}: {hint}")


def on_device(value: Any) -> Any:
    return backend.to_device(value) if isinstance(value, np.ndarray) else value


# ---------------------------------------------------------------- the page, and what is hidden of it


def paragraphs(op: Op) -> list[str]:
    return (inspect.getdoc(op.forward) or "").split("\n\n")


def shown(op: Op) -> list[str]:
    """The formula, and the conventions at kinks and ties."""
    first, *rest = paragraphs(op)
    return [first, *(p for p in rest if p.startswith("At "))]


def forward_page(op: Op) -> str:
    """The source of the forward, with those paragraphs of its docstring."""
    text = "\n\n".join(shown(op))
    text = f'"""{text}' + ("\n" if "\n" in text else "") + '"""'
    return without_docstring(op.forward, textwrap.indent(text, "    "))


def without_docstring(function: Callable[..., Any], instead: str = "") -> str:
    """The source without decorators, with another docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, tree = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    has_docstring = ast.get_docstring(tree) is not None
    head_end = tree.body[0].lineno - 1
    body = (tree.body[0].end_lineno or 0) if has_docstring else head_end
    return "\n".join([*lines[tree.lineno - 1 : head_end], *([instead] if instead else []), *lines[body:]])
