"""jvp, jacobian and hvp: against the complex step and closed forms; against PyTorch in parity/."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import backend, functional, ops

X = np.array([[0.3, -0.7, 1.1], [0.2, 0.9, -0.4]])
U = np.array([[1.0, -2.0, 0.5], [0.25, 1.5, -1.0]])
A = np.array([[0.5, -1.0], [2.0, 0.1], [-0.3, 0.7]])


def f(x: Any) -> Any:
    """(2, 3) -> (2, 2)"""
    return ops.exp(ops.sin(x) @ backend.to_device(A)) * ops.tanh(x)[:, :2]


def f_numpy(x: Any) -> Any:
    return np.exp(np.sin(x) @ A) * np.tanh(x)[:, :2]


def total(x: Any) -> Any:
    return (f(x) * f(x)).sum()


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-14)


def step(fn: Any, x: Any, u: Any) -> Any:
    """The derivative along u."""
    return fn(x + 1e-30j * u).imag / 1e-30


def test_jvp_is_the_complex_step(each_backend: str) -> None:
    y, derivative = functional.jvp(f, X, U)
    close(y, f_numpy(X))
    close(derivative, step(f_numpy, X, U))


def test_jacobian_is_the_complex_step_along_each_axis(each_backend: str) -> None:
    j = functional.jacobian(f, X)
    assert j.shape == (2, 2, 2, 3) and not j.requires_grad
    for index in np.ndindex(2, 3):
        unit = np.zeros((2, 3))
        unit[index] = 1
        close(j[(..., *index)], step(f_numpy, X, unit))


def test_hvp_is_the_derivative_of_the_gradient(each_backend: str) -> None:
    def gradient(x: Any) -> Any:
        """By the complex step, so exact: differences of it are exact to 1e-9."""
        units = np.eye(x.size).reshape(x.size, *x.shape)
        return np.reshape([step(lambda x: (f_numpy(x) ** 2).sum(), x, unit) for unit in units], x.shape)

    value, product = functional.hvp(total, X, U)
    close(value, (f_numpy(X) ** 2).sum())
    h = 1e-4
    differences = 8 * (gradient(X + h * U) - gradient(X - h * U)) - gradient(X + 2 * h * U) + gradient(X - 2 * h * U)
    np.testing.assert_allclose(product.numpy(), differences / (12 * h), rtol=1e-8, atol=1e-9)


def test_hvp_of_a_quadratic_form(each_backend: str) -> None:
    q = np.array([[2.0, 1.0], [0.0, 3.0]])
    x, u = np.array([1.0, -1.0]), np.array([0.5, 2.0])
    _, product = functional.hvp(lambda x: (x * (backend.to_device(q) @ x)).sum(), x, u)
    close(product, (q + q.T) @ u)


def test_what_is_constant_or_linear_has_zeros(each_backend: str) -> None:
    x = np.ones(3)
    close(functional.jvp(lambda x: 2 * x, x, x)[1], [2, 2, 2])
    close(functional.hvp(lambda x: (2 * x).sum(), x, x)[1], [0, 0, 0])
    assert functional.jacobian(lambda x: x[:0], x).shape == (0, 3)


def test_a_jacobian_has_a_history_if_it_is_asked_for(each_backend: str) -> None:
    x = tinydiff.tensor(X, requires_grad=True)
    j = functional.jacobian(lambda x: x * x * x, x, create_graph=True)
    j.sum().backward()
    close(x.grad, 6 * X)


def test_they_change_no_gradient_and_work_inside_no_grad(each_backend: str) -> None:
    x = tinydiff.tensor(X, requires_grad=True)
    with tinydiff.no_grad():
        found = functional.hvp(total, x, U)[1]
    assert x.grad is None and found.shape == X.shape and not found.requires_grad


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: functional.jvp(f, X, U[0]), ValueError, r"jvp: u must have the shape of x, \(2, 3\), not \(3,\)"),
        (lambda: functional.jacobian(f, np.arange(3)), TypeError, "int64"),
        (lambda: functional.jacobian(lambda x: 3.0, X), TypeError, "must return a Tensor"),
        (lambda: functional.jacobian(lambda x: x.detach(), X), RuntimeError, "does not depend"),
        (lambda: functional.hvp(f, X, U), ValueError, r"hvp .* one element, this one has shape \(2, 2\)"),
    ],
)
def test_mistakes(call: Any, error: Any, says: str, each_backend: str) -> None:
    with pytest.raises(error, match=says):
        call()
