"""Changes in place after an array was used are noticed, and the error names the op."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import backend, changes, ops
from tinydiff.observers import Observer, observing

pytestmark = pytest.mark.usefixtures("each_backend")


def change_data_in_place(x: td.Tensor) -> None:
    x.data *= 2


def change_operator(x: td.Tensor) -> None:
    with td.no_grad():
        x *= 2


def change_plus(x: td.Tensor) -> None:
    with td.no_grad():
        x += 1


def change_item(x: td.Tensor) -> None:
    with td.no_grad():
        x[0] = 7.0


def change_through_detach(x: td.Tensor) -> None:
    y = x.detach()
    y -= 1


def change_through_reshape(x: td.Tensor) -> None:
    with td.no_grad():
        y = x.reshape(-1)
        y /= 3


def change_through_slice(x: td.Tensor) -> None:
    with td.no_grad():
        y = x[1:]
        y += 5


def change_through_transposes(x: td.Tensor) -> None:
    with td.no_grad():
        y = ops.expand_dims(x.T, axis=0).swapaxes(0, 1)
        y[0] = 1.0


CHANGES = [value for name, value in list(globals().items()) if name.startswith("change_")]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_an_input_changed_after_it_was_used_is_an_error_that_names_the_op(change: Any) -> None:
    x, w = leaf(2, 3), leaf(2, 3, seed=1)
    y = (x * w).sum()
    change(x)
    with pytest.raises(RuntimeError, match="input 0 of multiply was changed in place after it was used"):
        td.grad(y, w, create_graph=True)
    with pytest.raises(RuntimeError, match="input 0 of multiply"):
        y.backward()


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_an_output_changed_after_it_was_used_is_an_error_that_names_the_op(change: Any) -> None:
    x = leaf(2, 3)
    y = ops.exp(x)
    z = y.sum()
    change(y)
    with pytest.raises(RuntimeError, match="the output of exp was changed in place"):
        z.backward()


def test_a_view_made_in_the_graph_shares_the_counter() -> None:
    x = leaf(2, 3)
    h = x * 1.0
    y = ops.exp(h.reshape(3, 2))  # the output of exp is kept; below, its own view is changed
    flat = y.reshape(-1)
    with td.no_grad():
        flat += 1
    with pytest.raises(RuntimeError, match="the output of exp"):
        y.sum().backward()


def test_picked_rows_are_a_copy_with_a_counter_of_its_own() -> None:
    """The table may be trained on while what was looked up in it is still in use."""
    table, w = leaf(5, 3), leaf(2, 3, seed=1)
    rows = table[backend.to_device(np.array([1, 4]))]
    expected = rows.numpy().copy()
    y = (rows * w).sum()
    change_operator(table)
    y.backward()
    equal(w.grad, expected)


@pytest.mark.parametrize(
    "op", [lambda x, i: x[i], lambda x, i: ops.embedding(i, x), lambda x, i: ops.take(x, i, axis=0)]
)
def test_an_index_changed_after_it_was_used_is_an_error(op: Any) -> None:
    x, index = leaf(3, 2), td.tensor(backend.to_device(np.array([0, 1])))
    y = op(x, index).sum()
    with td.no_grad():
        index[0] = 2
    with pytest.raises(RuntimeError, match="the index of getitem was changed in place"):
        y.backward()
    plain = backend.to_device(np.array([0, 1]))
    with td.detect_anomaly():
        y = op(x, plain).sum()
        plain[0] = 2
        with pytest.raises(RuntimeError, match="an array that getitem had kept was written into"):
            y.backward()


def test_what_a_rule_does_not_read_may_change() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = (x + w).sum()
    change_operator(x)
    y.backward()
    equal(x.grad, np.ones(3))


def test_a_loop_of_updates_works() -> None:
    """Gradient descent in each of the usual ways to write it."""
    for update in ("data", "in place", "setter"):
        w = td.tensor(np.array([3.0, -2.0]), requires_grad=True)
        for _ in range(60):
            w.grad = None
            (w * w).sum().backward()
            if update == "data":
                w.data -= 0.1 * w.grad.data
            elif update == "in place":
                with td.no_grad():
                    w -= 0.1 * w.grad
            else:
                w.data = w.data - 0.1 * w.grad.data
        assert abs(w.numpy()).max() < 1e-4, update


def test_another_array_in_its_place_leaves_the_old_values_to_the_graph() -> None:
    """No kept array has changed, so the gradient is right for the values that were used."""
    x, w = leaf(2, 3), leaf(2, 3, seed=1)
    before = x.numpy().copy()
    y = (x * w).sum()
    x.data = x.data * 2
    y.backward()
    equal(w.grad, before)


def test_with_another_array_in_its_place_a_gradient_has_no_gradient() -> None:
    """The history of the old values would have to be that of the new ones."""
    x = leaf(3)
    y = (x * x * x).sum()
    x.data = x.data * 2
    with pytest.raises(RuntimeError, match=r"a Tensor of shape \(3,\) was given another array"):
        td.grad(y, x, create_graph=True)


def test_a_note_of_a_change_goes_with_its_array() -> None:
    before = len(changes.changes)
    for _ in range(3):
        x = leaf(3)
        change_operator(x)
        assert len(changes.changes) == before + 1
        del x
    assert len(changes.changes) == before


def test_a_window_view_shares_its_memory() -> None:
    """Between a view of NumPy's stride tricks and its array lies an object that is no array."""
    if td.backend.name != "numpy":
        pytest.skip("stride tricks of NumPy")
    c = constant(4)
    windows = td.Tensor(np.lib.stride_tricks.sliding_window_view(c.data, 2))
    w = leaf(3, 2)
    y = (windows * w).sum()
    with td.no_grad():
        c *= 5.0
    with pytest.raises(RuntimeError, match="input 0 of multiply was changed in place"):
        y.backward()


def test_an_observer_that_raises_hides_no_change() -> None:
    class Raises(Observer):
        def on_set(self, x: Any, name: str, value: Any) -> None:
            raise ZeroDivisionError

    c, x = constant(3), leaf(3)
    y = (c * x).sum()
    with pytest.raises(ZeroDivisionError), observing(Raises()):
        c.data *= 5.0
    with pytest.raises(RuntimeError, match="of multiply was changed in place"):
        y.backward()


def test_in_place_without_no_grad_is_refused() -> None:
    x = leaf(3)
    before = x.numpy().copy()
    for change in (
        lambda: x.__iadd__(1),
        lambda: x.__setitem__(0, 1.0),
        lambda: x.__imul__(2),
        lambda: x.__itruediv__(2),
    ):
        with pytest.raises(RuntimeError, match=r"x has shape \(3,\) and requires a gradient, would lose that gradient"):
            change()
    equal(x, before)


def test_setting_a_tensor_with_history_into_one_without_is_refused() -> None:
    """It would be a gradient that is silently lost."""
    buffer, w = td.tensor(np.zeros(3)), leaf(3)
    with pytest.raises(RuntimeError, match=r"x\[index\] = y, where y has shape \(3,\) and requires a gradient"):
        buffer[:] = w * 2
    with pytest.raises(RuntimeError, match=r"x \+= y, where y"):
        buffer += w
    with td.no_grad():
        buffer += w
        buffer[td.tensor([0])] = 9.0
    equal(buffer, [9.0, *w.numpy()[1:]])


def test_data_must_keep_shape_and_dtype() -> None:
    x = leaf(3)
    x.data = leaf(3, seed=4) * 2  # a Tensor gives its array, on whatever device that is
    equal(x, 2 * leaf(3, seed=4).numpy())
    with pytest.raises(ValueError, match=r"shape \(3,\), float64 cannot become an array of shape \(2,\), float64"):
        x.data = np.ones(2)
    with pytest.raises(ValueError, match="float32"):
        x.data = np.ones(3, "float32")
