"""Products of matrices, and of anything that Einstein's notation can write."""

from __future__ import annotations

import string
from typing import Any

from .. import kernels
from ..backend import xp
from ..tape import composite, primitive
from .shape import broadcast_to, reshape, swapaxes


@primitive
def matrix_product(x: Any, y: Any) -> Any:
    """Z = X Y for (..., n, k) and (..., k, m), leading axes broadcast

    dZ = dX Y + X dY          X' = Z' Y^T,   Y' = X^T Z'
    """
    if y.ndim == 2 and x.ndim > 2:  # one large product instead of many small ones
        return kernels.matmul(x.reshape(-1, x.shape[-1]), y).reshape(*x.shape[:-1], y.shape[1])
    return kernels.matmul(x, y)


@matrix_product.vjp
def _(g: Any, _z: Any, x: Any, y: Any) -> Any:
    def wrt_y() -> Any:
        if y.ndim == 2 and x.ndim > 2:
            rows, out = reshape(x, shape=(-1, x.shape[-1])), reshape(g, shape=(-1, g.shape[-1]))
            return matrix_product(rows.T, out)
        return matrix_product(swapaxes(x, axis1=-1, axis2=-2), g)

    return lambda: matrix_product(g, swapaxes(y, axis1=-1, axis2=-2)), wrt_y


@composite
def matmul(x: Any, y: Any) -> Any:
    """x @ y as NumPy: (..., n, k) @ (..., k, m) -> (..., n, m); a vector on the left is a row, on the right a column.

    Errors: ValueError if the inner lengths differ, or for a scalar.
    """
    for a in (x, y):
        if not hasattr(a, "ndim"):
            raise TypeError(f"matmul takes Tensors and arrays, not {type(a).__name__}: {a!r}")
    if x.ndim == 0 or y.ndim == 0 or x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
        raise ValueError(
            f"matmul: the shapes {x.shape} and {y.shape} do not fit: the last axis of the first meets the "
            "last but one of the second"
        )
    if any(m != n and 1 not in (m, n) for m, n in zip(x.shape[-3::-1], y.shape[-3::-1])):
        raise ValueError(f"matmul: the leading axes of the shapes {x.shape} and {y.shape} do not fit")
    z = matrix_product(reshape(x, shape=(1, -1)) if x.ndim == 1 else x, reshape(y, shape=(-1, 1)) if y.ndim == 1 else y)
    shape = z.shape if x.ndim > 1 else (*z.shape[:-2], z.shape[-1])
    shape = shape if y.ndim > 1 else shape[:-1]
    return z if shape == z.shape else reshape(z, shape=shape)


@primitive
def contract(*xs: Any, subscripts: str) -> Any:
    """z = sum over the indices that the output lacks of the product of the operands

    The subscripts are explicit: no `...`, an arrow, and no index twice within an operand (see einsum).

    The cotangent of an operand is the same contraction with that operand and the output exchanged; an index
    that only this operand had was summed, and its cotangent is constant along it.
    """
    z = xp.einsum(subscripts, *xs)
    return z.copy() if len(xs) == 1 else z  # of one operand it may be a view


@contract.vjp
def _(g: Any, _z: Any, *xs: Any, subscripts: str) -> Any:
    operands, out = subscripts.split("->")
    terms = operands.split(",")

    def wrt(i: int) -> Any:
        others = [j for j in range(len(xs)) if j != i]
        known = set(out).union(*(terms[j] for j in others))
        reached = "".join(c for c in terms[i] if c in known)
        cotangent = contract(
            g, *(xs[j] for j in others), subscripts=",".join([out, *(terms[j] for j in others)]) + "->" + reached
        )
        length = dict(zip(reached, cotangent.shape))  # that of the others, where this operand was stretched
        kept = tuple(length.get(c, 1) for c in terms[i])
        spread = tuple(n if m == 1 else m for m, n in zip(kept, xs[i].shape))
        return broadcast_to(reshape(cotangent, shape=kept), shape=spread)

    return tuple((lambda i=i: wrt(i)) for i in range(len(xs)))


@composite
def einsum(subscripts: str, *operands: Any) -> Any:
    """Einstein summation as numpy.einsum: einsum("nhid,nhjd->nhij", q, k); `...`, a missing arrow and diagonals
    ("ii->i") are understood.

    Errors: ValueError if the subscripts do not fit the operands.
    """
    terms, out = _explicit(subscripts.replace(" ", ""), [x.shape for x in operands])
    lengths: dict[str, int] = {}
    for c, n in (pair for term, x in zip(terms, operands) for pair in zip(term, x.shape)):
        if n != 1 and lengths.setdefault(c, n) != n:
            shapes = ", ".join(str(x.shape) for x in operands)
            raise ValueError(
                f"einsum: {subscripts!r} with shapes {shapes}: an index of length {lengths[c]} meets one of length {n}"
            )
    fresh = iter(c for c in string.ascii_letters if c not in "".join(terms) + out)
    operands, extra = tuple(operands), []
    for i, term in enumerate(terms):
        seen = ""
        for c, n in zip(term, operands[i].shape):
            if c in seen:  # the diagonal of (c, c) is the sum over a new index d of x[c, d] eye[c, d]
                d = next(fresh)
                seen += d
                extra.append((c + d, xp.eye(n, dtype=operands[i].dtype)))
            else:
                seen += c
        terms[i] = seen
    return contract(
        *operands, *(eye for _, eye in extra), subscripts=",".join([*terms, *(t for t, _ in extra)]) + "->" + out
    )


def _explicit(subscripts: str, shapes: list[tuple[int, ...]]) -> tuple[list[str], str]:
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
