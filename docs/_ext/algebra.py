"""The formulas of the ops' pages, read by a program: `x̄ = z̄ y x^(y-1)` becomes a tree that can be evaluated.

The notation is that of docs/notation.md, as it is written with a pencil:

    a b         a product, element by element; of two capital letters, X Y, or with @, a product of matrices
    a · b       the sum of the products of all elements: one number
    x^2, X^T    a power; a transpose
    log x       a function of what follows; sum and mean take the whole product that follows
    silu'(u)    an ordinary derivative
    a where x > y, else b           without `else`, 0
    x̄, dx       an adjoint and a differential: names like others

`a = b = c` is a chain: every part must have the value of the first.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

BAR = "\u0304"
TOKEN = re.compile(
    rf"\s*(?:(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?(?![\w]))|(?P<name>[^\W\d]{BAR}?(?:\w{BAR}?)*)"
    r"|(?P<sign><=|>=|[-+*/^(),|·@=<>']))"
)
GREEDY = ("sum", "mean")
WORDS = ("where", "else", "and")


class NotAFormula(ValueError):
    """This text is not in the notation."""


class Tree(NamedTuple):
    kind: str  # number, name, call, derivative, or the sign that joins the parts
    parts: tuple[Any, ...]
    matrix: bool = False

    def names(self) -> set[str]:
        if self.kind == "name":
            return {self.parts[0]}
        return set().union(*(part.names() for part in self.parts if isinstance(part, Tree)))


def normal(text: str) -> str:
    text = unicodedata.normalize("NFD", text).replace("\u1d40", "^T ").replace("²", "^2").replace("³", "^3")
    return text.replace("\u2212", "-")


def plain(name: str) -> tuple[str, bool]:
    """A name without its bar, and whether it had one."""
    return name.replace(BAR, ""), BAR in name


def read(text: str, functions: Collection[str], variables: Collection[str] = ()) -> list[Tree]:
    """The parts of the chain a = b = c. Errors: NotAFormula."""
    return Reader(text, functions, variables).chain()


class Reader:
    """Recursive descent, a method for each level of the grammar, the loosest first."""

    def __init__(self, text: str, functions: Collection[str], variables: Collection[str]):
        self.text, self.functions, self.variables = normal(text).strip(), functions, variables
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(self.text):
            found = TOKEN.match(self.text, at)
            if not found:
                raise NotAFormula(f"cannot read {self.text[at:]!r} in {text!r}")
            self.tokens.append((found.lastgroup or "", found[found.lastgroup or 0]))
            at = found.end()
        self.at, self.bars = 0, 0

    # ---- tokens

    def next(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def take(self, *signs: str) -> str:
        """The next token, if it is one of these; else nothing."""
        if self.next()[1] in signs and self.next()[0] != "end":
            self.at += 1
            return self.tokens[self.at - 1][1]
        return ""

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise NotAFormula(f"{sign!r} should follow {' '.join(t for _, t in self.tokens[: self.at])!r}")

    # ---- the grammar

    def chain(self) -> list[Tree]:
        parts = [self.conditional()]
        while self.take("="):
            parts.append(self.conditional())
        if self.next()[0] != "end":
            raise NotAFormula(f"{self.next()[1]!r} is too much in {self.text!r}")
        return parts

    def conditional(self) -> Tree:
        value = self.additive()
        if not self.take("where"):
            return value
        condition = self.comparison()
        while self.take("and"):
            condition = Tree("and", (condition, self.comparison()))
        comma = self.next()[1] == "," and self.next(1)[1] == "else"
        other = Tree("number", (0.0,))
        if comma or self.next()[1] == "else":
            self.at += 1 + comma
            other = self.additive()
        return Tree("where", (condition, value, other))

    def comparison(self) -> Tree:
        left = self.additive()
        found: Tree | None = None
        while sign := self.take("<", "<=", ">", ">=", "="):
            right = self.additive()
            this = Tree(sign, (left, right))
            found, left = this if found is None else Tree("and", (found, this)), right
        return left if found is None else found

    def additive(self) -> Tree:
        left = self.inner()
        while sign := self.take("+", "-"):
            right = self.inner()
            left = Tree(sign, (left, right), left.matrix or right.matrix)
        return left

    def inner(self) -> Tree:
        left = self.product()
        return Tree("·", (left, self.product())) if self.take("·") else left

    def product(self) -> Tree:
        left = self.unary()
        while True:
            sign = self.take("*", "/", "@")
            if not sign and not self.starts_atom():
                return left
            right = self.unary() if sign else self.power()
            of_matrices = left.matrix and right.matrix and not sign
            kind = "@" if of_matrices else sign or "*"
            left = Tree(kind, (left, right), left.matrix or right.matrix)

    def starts_atom(self) -> bool:
        kind, token = self.next()
        if kind == "name":
            return token not in WORDS
        return kind == "number" or token == "(" or (token == "|" and not self.bars)

    def unary(self) -> Tree:
        if self.take("-"):
            part = self.unary()
            return Tree("negative", (part,), part.matrix)
        return self.power()

    def power(self) -> Tree:
        base = self.atom()
        while self.take("^"):
            if self.take("T"):
                base = Tree("transpose", (base,), base.matrix)
            else:
                base = Tree("^", (base, self.unary()))
        return base

    def atom(self) -> Tree:
        kind, token = self.next()
        self.at += 1
        if kind == "number":
            return Tree("number", (float(token),))
        if token == "(":
            bars, self.bars = self.bars, 0
            inside = self.conditional()
            self.expect(")")
            self.bars = bars
            return inside
        if token == "|" and not self.bars:
            self.bars = 1
            inside = self.additive()
            self.expect("|")
            self.bars = 0
            return Tree("call", ("abs", inside))
        if kind != "name" or token in WORDS:
            raise NotAFormula(f"{token or 'the end'!r} cannot stand there in {self.text!r}")
        return self.named(token)

    def named(self, name: str) -> Tree:
        letter, barred = plain(name)
        name = letter + BAR if barred else letter  # wherever the bar stood: x\u0304 0 is the adjoint of x0
        if name in self.functions and name not in self.variables:
            if self.take("'"):
                self.expect("(")
                inside = self.conditional()
                self.expect(")")
                return Tree("derivative", (name, inside))
            if self.take("("):
                arguments = [self.conditional()]
                while self.take(","):
                    arguments.append(self.conditional())
                self.expect(")")
                return Tree("call", (name, *arguments))
            if self.starts_atom():
                return Tree("call", (name, self.product() if name in GREEDY else self.power()))
        single = letter.removeprefix("d") if len(letter) > 1 else letter
        return Tree("name", (name,), len(single) == 1 and single.isupper())


# ---------------------------------------------------------------- values

STEP = 1e-20


def real(x: Any) -> Any:
    return np.real(x)


def transposed(x: Any) -> Any:
    return np.swapaxes(x, -1, -2)


def erf(x: Any) -> Any:
    """Its series, for complex numbers too."""
    term = total = x
    for n in range(1, 120):
        term = term * (2 * x * x / (2 * n + 1))
        total = total + term
    return 2 / math.sqrt(math.pi) * np.exp(-x * x) * total


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "log": np.log, "exp": np.exp, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "erf": erf,
    "sign": lambda x: np.sign(real(x)),
    "abs": lambda x: x * np.sign(real(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.log(1 + np.exp(x)),
    "max": lambda x, y: np.where(real(x) >= real(y), x, y),
    "min": lambda x, y: np.where(real(x) <= real(y), x, y),
}  # fmt: skip

SIGNS: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "@": lambda a, b: a @ b,
    "·": lambda a, b: np.sum(np.multiply(a, b)),
    "negative": lambda a: -a,
    "transpose": transposed,
    "where": lambda c, a, b: np.where(c, a, b),
    "and": lambda a, b: a & b,
    "<": lambda a, b: real(a) < real(b),
    "<=": lambda a, b: real(a) <= real(b),
    ">": lambda a, b: real(a) > real(b),
    ">=": lambda a, b: real(a) >= real(b),
    "=": lambda a, b: real(a) == real(b),
}


def value(tree: Tree, name: Callable[[str], Any], function: Callable[[str], Callable[..., Any]]) -> Any:
    """The value of a formula: name and function give those of its letters and its functions."""
    if tree.kind == "number":
        return tree.parts[0]
    if tree.kind == "name":
        return name(tree.parts[0])
    if tree.kind == "call":
        return function(tree.parts[0])(*(value(part, name, function) for part in tree.parts[1:]))
    if tree.kind == "derivative":
        return np.imag(function(tree.parts[0])(value(tree.parts[1], name, function) + 1j * STEP)) / STEP
    parts = [value(part, name, function) for part in tree.parts]
    if tree.kind == "^":
        base, exponent = parts
        whole = np.ndim(exponent) == 0 and np.isreal(exponent) and float(np.real(exponent)).is_integer()
        return base ** int(np.real(exponent)) if whole else base**exponent
    return SIGNS[tree.kind](*parts)
