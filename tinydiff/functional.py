"""Derivatives of functions, by `grad` and, where it is needed, by `grad` of `grad`.

fn takes Tensors and returns one. With y = f(x), and J_ij = dy_i / dx_j for x and y taken as columns of numbers,

    vjp     v^T J                  what one backward pass gives: `grad` itself
    jvp     J u                    the derivative of f along u
    jacobian  J                    all of it, one backward pass per element of y
    hvp     H u = d(v^T u) / dx    with v = df/dx and H its Jacobian, for an f with one element

None of them changes a `.grad`. The results are Tensors without a history, unless create_graph asks for one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import to_device, xp
from .engine import OPS, Tensor, grad
from .modes import set_grad_enabled
from .operators import array_of

Function = Callable[[Tensor], Tensor]


def jvp(fn: Function, x: Any, u: Any) -> tuple[Tensor, Tensor]:
    """(f(x), J u): the derivative of f at x along u, of the shape of x. The second has the shape of f(x).

    Reverse mode gives v^T J for a v. This is linear in v, so its own derivative by v, along u, is

        J u = d(<J^T v, u>) / dv            at any v

    which costs two backward passes, and none of them per element.
    Errors: as `jacobian`; ValueError for a u of another shape than x.
    """
    x, y, u = *_at(fn, x), _like(x, u, "jvp: u")
    with set_grad_enabled(True):
        v = Tensor(xp.zeros_like(y._data), requires_grad=True)
        pulled = grad(y, x, v, create_graph=True)[0]  # J^T v
        if not pulled.requires_grad:  # f does not depend on x
            return y.detach(), Tensor(xp.zeros_like(y._data))
        return y.detach(), grad((pulled * u).sum(), v)[0]


def jacobian(fn: Function, x: Any, create_graph: bool = False) -> Tensor:
    """J, of shape y.shape + x.shape: J[i, j] = dy_i / dx_j for indices i of y and j of x.

    Row i is e_i^T J, a backward pass with the adjoint e_i, which is 1 at i and 0 elsewhere.
    create_graph: with its own history, back to x (which must then be a Tensor that requires a gradient).
    Errors: TypeError for an x that is not of floats, or an fn that returns no Tensor; RuntimeError if f(x) does not
    depend on x.
    """
    x, y = _at(fn, x, keep=create_graph)
    units = xp.eye(y.size, dtype=y.dtype).reshape((y.size, *y.shape))  # (M, ...)
    rows = [grad(y, x, unit, create_graph=create_graph)[0] for unit in units]
    if not rows:
        return Tensor(xp.zeros((*y.shape, *x.shape), x.dtype))
    return OPS["stack"](rows).reshape((*y.shape, *x.shape))  # M of x.shape -> y.shape + x.shape


def hvp(fn: Function, x: Any, u: Any) -> tuple[Tensor, Tensor]:
    """(f(x), H u) for an f with one element, H_ij = d^2 f / dx_i dx_j, and u of the shape of x.

        H u = d(<df/dx, u>) / dx

    H itself, of as many columns as x has elements, is never there.
    Errors: as `jvp`; ValueError for an f with several elements.
    """
    x, y, u = *_at(fn, x), _like(x, u, "hvp: u")
    if y.size != 1:
        raise ValueError(
            f"hvp is for a function with one element, this one has shape {y.shape}: reduce it, as in f.sum()"
        )
    with set_grad_enabled(True):
        gradient = grad(y, x, create_graph=True)[0]
        if not gradient.requires_grad:  # f is linear in x
            return y.detach(), Tensor(xp.zeros_like(x._data))
        return y.detach(), grad((gradient * u).sum(), x)[0]


def _at(fn: Function, x: Any, keep: bool = False) -> tuple[Tensor, Tensor]:
    """x as a leaf of its own, and f(x). keep: x itself."""
    with set_grad_enabled(True):
        if not keep:
            x = Tensor(to_device(array_of(x)))
            x.requires_grad = True
        y = fn(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"the function must return a Tensor, made from its input by ops, not {type(y).__name__}")
    return x, y


def _like(x: Any, u: Any, what: str) -> Tensor:
    u = Tensor(to_device(array_of(u)))
    if u.shape != array_of(x).shape:
        raise ValueError(f"{what} must have the shape of x, {array_of(x).shape}, not {u.shape}")
    return u
