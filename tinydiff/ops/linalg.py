"""Products of matrices, and of anything that Einstein's notation can write."""

from __future__ import annotations

import string
from typing import Any

from ..backend import xp
from ..engine import composite, op
from .shape import broadcast_to, expand_dims, reshape, squeeze, swapaxes


def check_arrays(name: str, *given: Any) -> None:
    for a in given:
        if not hasattr(a, "ndim"):
            raise TypeError(f"{name} takes Tensors and arrays, not {type(a).__name__}: {a!r}")


@op
def matmul(x: Any, y: Any) -> Any:
    """Z = X Y for (..., n, k) and (..., k, m); leading axes broadcast. A vector on the left is a row, on the right a
    column, and Z lacks that axis, as in NumPy

    dZ = dX Y + X dY          X̄ = Z̄ Y^T,   Ȳ = X^T Z̄

    Errors: ValueError if the inner lengths differ, or for a scalar.
    """
    check_arrays("matmul", x, y)
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
        raise ValueError(
            f"matmul: the shapes {x.shape} and {y.shape} do not fit: the last axis of the first meets the "
            "last but one of the second"
        )
    if any(m != n and 1 not in (m, n) for m, n in zip(x.shape[-3::-1], y.shape[-3::-1])):
        raise ValueError(f"matmul: the leading axes of the shapes {x.shape} and {y.shape} do not fit")
    return x @ y


@matmul.vjp
def matmul_vjp(g: Any, _z: Any, x: Any, y: Any) -> Any:
    if x.ndim == 1 or y.ndim == 1:
        return vectors_vjp(g, x, y)
    return lambda: matmul(g, transposed(y)), lambda: matmul(transposed(x), g)


def transposed(x: Any) -> Any:
    """Each matrix of x, transposed."""
    return swapaxes(x, axis1=-1, axis2=-2)


def vectors_vjp(g: Any, x: Any, y: Any) -> Any:
    """The rule where x is a vector, taken as the row X, or y is one, taken as the column Y."""
    row = expand_dims(x, axis=0) if x.ndim == 1 else x  # (k,) -> (1, k)
    column = expand_dims(y, axis=1) if y.ndim == 1 else y  # (k,) -> (k, 1)
    g = expand_dims(g, axis=-1) if y.ndim == 1 else g  # (..., n) -> (..., n, 1)
    g = expand_dims(g, axis=-2) if x.ndim == 1 else g  # (..., n, m)
    x_adjoint, y_adjoint = (adjoint() for adjoint in matmul_vjp(g, None, row, column))
    return x_adjoint, squeeze(y_adjoint, axis=-1) if y.ndim == 1 else y_adjoint


@op
def linear(x: Any, w: Any, b: Any) -> Any:
    """Y = X W + b for (..., n), (n, m), (m,): a linear layer

    dY = dX W + X dW + db          X̄ = Ȳ W^T,   W̄ = X^T Ȳ,   b̄ = Ȳ

    The engine sums b̄ over the rows, and W̄ over the axes in front of them. It is matmul and add in one, so that b can
    be added in place. Errors: ValueError for other shapes.
    """
    check_arrays("linear", x, w, b)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0] or b.shape != w.shape[1:]:
        raise ValueError(f"linear: x {x.shape}, w {w.shape} and b {b.shape} must be (..., n), (n, m), (m,)")
    return matmul(x, w) + b


@linear.vjp
def linear_vjp(g: Any, _y: Any, x: Any, w: Any, _b: Any) -> Any:
    x_adjoint, w_adjoint = matmul_vjp(g, None, x, w)
    return x_adjoint, w_adjoint, g


@op
def einsum_p(*xs: Any, subscripts: str) -> Any:
    """z = sum over the indices that the output lacks of the product of the operands: einsum in its explicit form

    The subscripts have no `...`, an arrow, and no index twice within an operand (see einsum).

    The adjoint of an operand is the same sum with that operand and the output exchanged; an index that only this
    operand had was summed, and its adjoint is constant along it.
    """
    z = xp.einsum(subscripts, *xs)
    return z.copy() if len(xs) == 1 else z  # with one operand, z may share its memory


@einsum_p.vjp
def einsum_p_vjp(g: Any, _z: Any, *xs: Any, subscripts: str) -> Any:
    operands, out = subscripts.split("->")
    terms = operands.split(",")

    def adjoint_of(i: int) -> Any:
        others = [j for j in range(len(xs)) if j != i]
        known = set(out).union(*(terms[j] for j in others))
        reached = "".join(c for c in terms[i] if c in known)
        exchanged = ",".join([out, *(terms[j] for j in others)]) + "->" + reached
        adjoint = einsum_p(g, *(xs[j] for j in others), subscripts=exchanged)
        length = dict(zip(reached, adjoint.shape))  # longer than this operand's where broadcasting stretched it
        kept = tuple(length.get(c, 1) for c in terms[i])
        spread = tuple(n if m == 1 else m for m, n in zip(kept, xs[i].shape))
        return broadcast_to(reshape(adjoint, shape=kept), shape=spread)

    return tuple((lambda i=i: adjoint_of(i)) for i in range(len(xs)))


@composite
def einsum(subscripts: str, *operands: Any) -> Any:
    """Einstein summation as numpy.einsum: einsum("nhid,nhjd->nhij", q, k); `...`, a missing arrow and diagonals
    ("ii->i") are understood.

    Errors: ValueError if the subscripts do not fit the operands.
    """
    terms, out = explicit(subscripts.replace(" ", ""), [x.shape for x in operands])
    lengths: dict[str, int] = {}
    for c, n in (pair for term, x in zip(terms, operands) for pair in zip(term, x.shape)):
        if n != 1 and lengths.setdefault(c, n) != n:
            shapes = ", ".join(str(x.shape) for x in operands)
            raise ValueError(
                f"einsum: {subscripts!r} with shapes {shapes}: an index of length {lengths[c]} meets one of length {n}"
            )
    fresh = iter(c for c in string.ascii_letters if c not in "".join(terms) + out)
    operands, eyes = tuple(operands), []
    for i, term in enumerate(terms):
        seen = ""
        for c, n in zip(term, operands[i].shape):
            if c in seen:  # the diagonal of (c, c) is the sum over a new index d of x[c, d] eye[c, d]
                d = next(fresh)
                seen += d
                eyes.append((c + d, xp.eye(n, dtype=operands[i].dtype)))
            else:
                seen += c
        terms[i] = seen
    joined = ",".join([*terms, *(t for t, _ in eyes)]) + "->" + out
    return einsum_p(*operands, *(eye for _, eye in eyes), subscripts=joined)


def explicit(subscripts: str, shapes: list[tuple[int, ...]]) -> tuple[list[str], str]:
    """The terms and the output with letters for `...`, and an output where none was written."""
    left, arrow, out = subscripts.partition("->")
    terms = left.split(",")
    named = [t.replace("...", "") for t in terms]
    if len(terms) != len(shapes):
        raise ValueError(f"einsum: {subscripts!r} has {len(terms)} operands, but {len(shapes)} were given")
    for term, name, shape in zip(terms, named, shapes):
        if len(name) > len(shape) or "..." not in term and len(name) != len(shape) or not name.isalpha() and name:
            raise ValueError(f"einsum: {term!r} of {subscripts!r} does not fit an array of shape {shape}")
    unused = [c for c in string.ascii_letters if c not in subscripts]
    most = max((len(s) - len(n) for t, n, s in zip(terms, named, shapes) if "..." in t), default=0)
    dots = "".join(unused[:most])
    terms = [t.replace("...", dots[most - (len(s) - len(n)) :]) for t, n, s in zip(terms, named, shapes)]
    if arrow:
        out = out.replace("...", dots)
    else:
        letters = "".join(named)
        out = dots + "".join(c for c in sorted(set(letters)) if letters.count(c) == 1)
    if any(c not in "".join(terms) for c in out) or len(set(out)) != len(out):
        raise ValueError(f"einsum: the output {out!r} of {subscripts!r} must name indices of the operands, each once")
    return terms, out
