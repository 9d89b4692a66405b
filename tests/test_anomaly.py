"""detect_anomaly: the op and the line of the user where the first NaN or Inf appeared, and writes that went unseen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import anomaly, backend, observers, ops

pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
HERE = str(Path(__file__))


def leaf(*values: float, dtype: str = "float64") -> td.Tensor:
    return td.tensor(np.array(values, dtype), requires_grad=True)


def line_of(mark: str) -> int:
    """The number of the line of this file that ends in a comment with the mark."""
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if line.endswith(f"# {mark}"))


def test_a_nan_in_the_forward_pass() -> None:
    x = leaf(1.0, -1.0, 4.0)
    with td.detect_anomaly(), pytest.raises(FloatingPointError) as error:
        y = x * 2
        y = ops.log(y)  # first
        y.sum()
    text = str(error.value)
    assert text.startswith("log made NaN (1 of 3 values, shape (3,)) at ")
    assert f"{HERE}:{line_of('first')}: y = ops.log(y)" in text


def test_an_inf_in_the_forward_pass() -> None:
    with (
        td.detect_anomaly(),
        pytest.raises(FloatingPointError, match=r"divide made Inf \(2 of 2 values, shape \(2,\)\)"),
    ):
        leaf(1.0, 2.0) / 0.0


def test_an_overflow_in_float32() -> None:
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match="exp made Inf"):
        ops.exp(leaf(1.0, 90.0, dtype="float32"))


def test_a_nan_that_was_in_the_data() -> None:
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match=r"multiply passed on NaN \(1 of 2 values"):
        leaf(1.0, float("nan")) * 2


def test_no_gradient_is_needed_to_be_checked() -> None:
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match="sqrt made NaN"):
        ops.sqrt(td.tensor([-1.0]))
    with td.detect_anomaly(), td.no_grad(), pytest.raises(FloatingPointError, match="sqrt made NaN"):
        ops.sqrt(leaf(-1.0))


def test_a_nan_in_the_backward_pass_names_the_line_of_the_forward_pass() -> None:
    x = leaf(1e-160, 1.0)  # 1 / x is finite, 1 / x^2 is not
    for create_graph in (False, True):
        with td.detect_anomaly():
            y = 1.0 / x  # forward
            loss = (y * 3).sum()
            with pytest.raises(FloatingPointError) as error:
                loss.backward(create_graph=create_graph)
        text = str(error.value)
        assert text.startswith("divide passed back Inf to input 1 (1 of 2 values, shape (2,))"), text
        assert text.endswith(f"; it was computed at {HERE}:{line_of('forward')}: y = 1.0 / x  # forward"), text


def test_the_graph_may_have_been_recorded_outside() -> None:
    x = leaf(1e-160)
    loss = (1.0 / x).sum()
    with (
        td.detect_anomaly(),
        pytest.raises(FloatingPointError, match=r"divide passed back Inf to input 1 \(1 of 1 values, shape \(1,\)\)$"),
    ):
        loss.backward()


def test_an_adjoint_that_is_not_finite() -> None:
    y = leaf(1.0, 2.0) * 2
    with (
        td.detect_anomaly(),
        pytest.raises(FloatingPointError, match=r"the adjoint of the output of multiply has NaN \(1 of 2 values"),
    ):
        y.backward(np.array([1.0, np.nan]))


def test_an_inf_that_is_meant_is_none() -> None:
    """The -inf of a mask, and the padding under which a maximum never wins."""
    q = td.tensor(np.random.default_rng(0).normal(size=(1, 1, 3, 2)), requires_grad=True)
    causal = backend.to_device(np.tril(np.ones((3, 3), bool)))
    added = backend.to_device(np.triu(np.full((3, 3), -np.inf), 1))
    image = td.tensor(np.random.default_rng(1).normal(size=(1, 4, 4, 2)), requires_grad=True)
    with td.detect_anomaly():
        for mask in (causal, added):
            y = ops.attention(q, q, q, mask=mask).sum()
            (g,) = td.grad(y, q, create_graph=True)
            (g * g).sum().backward()
        z = ops.max_pool2d(image, kernel=3, stride=1, padding=1)
        (g,) = td.grad((z * z).sum(), image, create_graph=True)
        (g * g).sum().backward()
        ops.logsumexp(ops.where(causal, q[0, 0, 0, 0], -np.inf), axis=1).sum().backward()


def test_a_nan_from_an_inf_that_was_meant() -> None:
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match="subtract made NaN"):
        x = ops.where(backend.to_device(np.array([True, False])), leaf(1.0, 2.0), -np.inf)
        x - x


def test_inside_checkpoint() -> None:
    x = leaf(1e-160, 4.0)

    def fn(a: Any) -> Any:
        return (1.0 / a).sum()  # inside

    with td.detect_anomaly():
        y = td.checkpoint(fn, x)
        with pytest.raises(FloatingPointError) as error:
            y.backward()
    assert "divide passed back Inf" in str(error.value) and f":{line_of('inside')}: return (1.0 / a).sum()" in str(
        error.value
    )


def test_the_line_is_that_of_the_user_behind_decorators_and_layers() -> None:
    @td.no_grad()
    def sample(x: Any) -> Any:
        return ops.mean(ops.log(x))  # decorated

    with td.detect_anomaly(), pytest.raises(FloatingPointError) as error:
        sample(leaf(-1.0))
    assert f"{HERE}:{line_of('decorated')}:" in str(error.value)


def test_what_it_has_seen_goes_with_its_graph() -> None:
    x = leaf(1.0)
    with td.detect_anomaly():
        for _ in range(5):
            (x * 2.0).sum().backward()
        (anomalies,) = observers.observers
        assert len(anomalies.seen) == 0


def test_code_without_a_file_has_a_line_too() -> None:
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match="at <typed>:1: $"):
        exec(compile("ops.log(x)", "<typed>", "exec"), {"ops": ops, "x": leaf(-1.0)})


def test_a_directory_whose_name_only_begins_like_ours_is_the_users() -> None:
    file = anomaly._HERE.rstrip("/\\") + "_mine.py"
    with td.detect_anomaly(), pytest.raises(FloatingPointError, match=re.escape(f"at {file}:1")):
        exec(compile("ops.log(x)", file, "exec"), {"ops": ops, "x": leaf(-1.0)})


def test_a_write_through_data_into_what_was_kept() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    with td.detect_anomaly():
        y = (x * w).sum()  # kept
        x.data[0] = 7.0
        with pytest.raises(
            RuntimeError, match="an array that multiply had kept was written into before its gradient was computed"
        ) as error:
            y.backward()
    assert f":{line_of('kept')}:" in str(error.value)
    assert x.grad is None
    with td.detect_anomaly():
        y = ops.exp(x)
        y.data[...] = 0.0
        with pytest.raises(RuntimeError, match="an array that exp had kept was written into"):
            y.sum().backward()


def test_what_is_fine_stays_fine_and_the_mode_ends() -> None:
    x = leaf(1.0, 2.0)
    with td.detect_anomaly():
        y = ops.silu(ops.layer_norm(x * x)).sum()
        (g,) = td.grad(y, x, create_graph=True)
        (g * g).sum().backward()
    expected = x.grad.numpy()
    x.grad = None
    (g,) = td.grad(ops.silu(ops.layer_norm(x * x)).sum(), x, create_graph=True)
    (g * g).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    ops.log(leaf(-1.0))
    with pytest.raises(ZeroDivisionError), td.detect_anomaly():
        raise ZeroDivisionError
    assert not observers.observers
