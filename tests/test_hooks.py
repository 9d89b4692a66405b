"""Hooks on Tensors, and observers of every op."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import observers as observers_module
from tinydiff import ops
from tinydiff.observers import Observer, observers, observing

pytestmark = pytest.mark.usefixtures("each_backend")


# ---------------------------------------------------------------- hooks


def test_a_hook_sees_the_whole_adjoint_once() -> None:
    """h is used three times; the hook is called with the sum of what the uses pass on."""
    x, seen = leaf(3), []
    h = x * 2.0
    h.register_hook(seen.append)
    (h * h + h).sum().backward()
    (g,) = seen
    assert isinstance(g, td.Tensor)
    equal(g, 2 * h.numpy() + 1)
    equal(x.grad, 2 * (2 * h.numpy() + 1))


def test_what_a_hook_returns_takes_the_place_of_the_adjoint() -> None:
    x = leaf(3)
    h = ops.exp(x)
    h.register_hook(lambda g: g * 0.5)
    x.register_hook(lambda g: g + 1.0)
    h.sum().backward()
    equal(x.grad, 0.5 * np.exp(x.numpy()) + 1)
    (dh,) = td.grad((ops.exp(x) * 1.0).sum(), x)
    equal(dh, np.exp(x.numpy()) + 1, rtol=1e-12)


def test_hooks_run_in_their_order_until_they_are_removed() -> None:
    x, order = leaf(3), []
    handles = [x.register_hook(lambda g, i=i: order.append(i)) for i in range(3)]
    x.sum().backward()
    handles[1].remove()
    handles[1].remove()
    x.sum().backward()
    for handle in handles:
        handle.remove()
    x.sum().backward()
    assert order == [0, 1, 2, 0, 2]


def test_a_hook_is_part_of_the_graph_that_is_made() -> None:
    x = leaf(3)
    h = x * 3.0
    handle = h.register_hook(lambda g: g * h)
    (g,) = td.grad(h.sum(), x, create_graph=True)
    equal(g, 9 * x.numpy())
    handle.remove()  # else it would be called in the next pass as well
    equal(td.grad(g.sum(), x)[0], np.full(3, 9.0))


def test_a_gradient_may_be_kept_where_it_passes_through() -> None:
    x = leaf(3)
    h, other = x * 2.0, x * 3.0
    h.retain_grad()
    h.retain_grad()  # once more changes nothing
    x.retain_grad()  # leaves keep theirs anyway
    (h * other).sum().backward()
    equal(h.grad, other.numpy())
    assert other.grad is None
    again = leaf(3, seed=1) * 1.0
    again.retain_grad()
    for _ in range(2):
        again.sum().backward(retain_graph=True)
    equal(again.grad, np.full(3, 2.0))


def test_retain_grad_keeps_no_result_alive() -> None:
    x = leaf(3)
    gc.collect()
    gc.disable()
    try:
        h = x * 2.0
        h.retain_grad()
        ref, y = weakref.ref(h), (h * h).sum()
        del h
        assert ref() is None
        y.backward()
    finally:
        gc.enable()
    equal(x.grad, 8 * x.numpy())


def test_a_tensor_that_gets_no_gradient_has_no_hooks() -> None:
    with pytest.raises(RuntimeError, match=r"register_hook: a Tensor of shape \(3,\) requires no gradient"):
        constant(3).register_hook(print)
    with pytest.raises(RuntimeError, match=r"retain_grad: a Tensor of shape \(3,\) requires no gradient"):
        constant(3).retain_grad()


def test_a_gradient_is_kept_after_the_hooks_whichever_came_first() -> None:
    for retain_first in (True, False):
        h = leaf(3) * 1.0
        steps = [h.retain_grad, lambda h=h: h.register_hook(lambda g: g * 2.0)]
        for step in steps if retain_first else reversed(steps):
            step()
        h.sum().backward()
        equal(h.grad, np.full(3, 2.0))


def test_one_function_may_be_registered_twice() -> None:
    x = leaf(3)

    def double(g: td.Tensor) -> td.Tensor:
        return g * 2.0

    first, _second = x.register_hook(double), x.register_hook(double)
    first.remove()
    first.remove()
    x.sum().backward()
    equal(x.grad, np.full(3, 2.0))


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_share_no_memory_with_gradients(create_graph: bool) -> None:
    x, y, seen = leaf(3), leaf(3, seed=1), []
    h = x + y
    h.retain_grad()
    h.register_hook(seen.append)
    buffer = td.tensor(np.ones(3))
    y.register_hook(lambda g: buffer)
    h.backward(np.ones(3), create_graph=create_graph)
    with td.no_grad():
        x.grad *= 5.0
        y.grad *= 7.0
    for g in (h.grad, seen[0], buffer):
        equal(g, np.ones(3))


# ---------------------------------------------------------------- observers


class Names(Observer):
    def __init__(self, thread: int | None = None) -> None:
        self.thread = thread
        self.calls: list[str] = []
        self.rules: list[str] = []
        self.sets: list[tuple[str, Any]] = []

    def on_call(self, run: Any, op: Any, inputs: Any, params: Any) -> Any:
        self.calls.append(op.name)
        return run(op, inputs, params)

    def on_rule(self, run: Any, node: Any, g: Any, wanted: Any, create_graph: bool) -> Any:
        self.rules.append(node.op.name)
        return run(node, g, wanted, create_graph)

    def on_set(self, x: Any, name: str, value: Any) -> None:
        self.sets.append((name, x))


def test_an_observer_wraps_every_call_and_every_rule() -> None:
    x = leaf(3)
    with observing(Names()) as names:
        y = ops.exp(x * 2.0).sum()
        assert names.calls == ["multiply", "exp", "sum"]
        y.backward()
        assert names.rules == ["sum", "exp", "multiply"]
        x.data = x.data * 1.0
        assert names.sets == [("grad", x), ("data", x)]
    ops.exp(x)
    assert names.calls.count("exp") == 1 and not observers


def test_an_observer_may_change_what_comes_out_and_the_innermost_is_the_first() -> None:
    class Times(Observer):
        def __init__(self, factor: float, plus: float):
            self.factor, self.plus = factor, plus

        def on_call(self, run: Any, op: Any, inputs: Any, params: Any) -> Any:
            out = run(op, inputs, params)
            return out if op.name != "exp" else td.Tensor(out.data * self.factor + self.plus)

    x = constant(3)
    with observing(Times(2.0, 0.0)), observing(Times(1.0, 5.0)):
        equal(ops.exp(x), 2 * np.exp(x.numpy()) + 5)


def test_an_observer_of_one_thread_does_not_see_the_others() -> None:
    x = leaf(3)
    with observing(Names(threading.get_ident())) as mine, observing(Names()) as all_threads:
        other = threading.Thread(target=lambda: ops.exp(x).sum().backward())
        other.start()
        other.join()
        ops.sin(x)
    assert mine.calls == ["sin"]
    assert [name for name in all_threads.calls if name in ("exp", "sin")] == ["exp", "sin"]


def test_the_observer_that_goes_is_the_one_that_came() -> None:
    """Also if another one is equal to it, or if they go in another order."""

    @dataclass
    class Equal(Observer):
        thread: int | None = None

    first, second = Equal(), Equal()
    with observing(first):
        with observing(second):
            pass
        assert len(observers) == 1 and observers[0] is first
        other = observing(second)
        other.__enter__()
    assert len(observers) == 1 and observers[0] is second
    other.__exit__(None, None, None)


def test_an_error_inside_takes_the_observer_away() -> None:
    with pytest.raises(ZeroDivisionError), observing(Names()):
        raise ZeroDivisionError
    assert not observers


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_of_what_goes_into_a_checkpoint_run_once(create_graph: bool) -> None:
    """w = 3, y = w^2, dy/dw = 6; the hook doubles it once, though two passes meet at w."""
    w = td.tensor([3.0], requires_grad=True)
    w.register_hook(lambda g: g * 2.0)
    td.checkpoint(lambda w: w * w, w).sum().backward(create_graph=create_graph)
    assert w.grad.tolist() == [12.0]
    h = td.tensor([3.0], requires_grad=True) * 1.0
    h.retain_grad()
    td.checkpoint(lambda h: h * h, h).sum().backward(create_graph=create_graph)
    assert h.grad.tolist() == [6.0]


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_hook_may_change_in_place_what_it_is_given(create_graph: bool) -> None:
    """add hands one array to both of its inputs; and the adjoint of a 0-d result is an array, too."""
    x, y = leaf(3), leaf(3, seed=1)

    def double(g: td.Tensor) -> None:
        g *= 2.0

    x.register_hook(double)
    (x + y).backward(np.ones(3), create_graph=create_graph)
    equal(x.grad, np.full(3, 2.0))
    equal(y.grad, np.ones(3))
    z = td.tensor(3.0, requires_grad=True)
    h = z * z
    h.register_hook(double)
    (h * 1.0).backward()
    assert float(z.grad) == 12.0


def test_a_hook_under_no_grad_keeps_the_history() -> None:
    """The pass decides whether nodes are recorded, not its caller."""
    x = leaf(3)
    x.register_hook(lambda g: g * 1.0)
    y = (x**3).sum()
    with td.no_grad():
        (g,) = td.grad(y, x, create_graph=True)
    equal(td.grad(g.sum(), x)[0], 6 * x.numpy())


def test_two_gradients_with_history_add_up_to_one_with_history() -> None:
    x = leaf(3)
    for _ in range(2):
        y = (x**3).sum()
        with td.no_grad():
            y.backward(create_graph=True)
    equal(td.grad(x.grad.sum(), x)[0], 12 * x.numpy())


def test_a_plain_pass_records_nothing_in_hooks() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    h = x * 2.0
    h.retain_grad()
    h.register_hook(lambda g: g * w)
    h.sum().backward()
    assert not h.grad.requires_grad and h.grad.node is None

    def update(g: td.Tensor) -> None:
        w[...] = w - g  # a step inside the pass

    before = w.numpy().copy()
    x.register_hook(update)
    (x * 3.0).sum().backward()
    equal(w, before - 3)


def test_a_hook_may_take_itself_away() -> None:
    x, order = leaf(3), []
    first = x.register_hook(lambda g: (order.append(1), first.remove())[0])
    x.register_hook(lambda g: order.append(2))
    x.sum().backward()
    x.sum().backward()
    assert order == [1, 2, 2]
    net, calls = td.nn.SiLU(), []
    once = net.register_forward_hook(lambda *_: (calls.append(1), once.remove())[0])
    net.register_forward_hook(lambda *_: calls.append(2))
    net(x), net(x)
    assert calls == [1, 2, 2]


def test_hooks_make_no_reference_cycle() -> None:
    """What a hook has captured goes with its Tensor, without the garbage collector."""

    class Captured:
        pass

    captured = Captured()
    seen = weakref.ref(captured)
    x, net = leaf(3), td.nn.SiLU()
    x.register_hook(lambda g, c=captured: None)
    net.register_forward_hook(lambda *_, c=captured: None)
    gc.disable()
    try:
        del x, net, captured
        assert seen() is None
    finally:
        gc.enable()


def test_hooks_that_have_been_removed_cost_nothing() -> None:
    x = leaf(3)
    x.register_hook(lambda g: None).remove()
    x.retain_grad()  # of a leaf, which keeps its gradient anyway
    g = td.backend.to_device(np.ones(3))
    with observing(Names()) as names:
        (x * 1.0).backward(g)
    assert "copy" not in names.calls


def test_a_hook_is_a_function() -> None:
    with pytest.raises(TypeError, match="register_hook takes a function of the adjoint, not 'nonsense'"):
        td.tensor([1.0], requires_grad=True).register_hook("nonsense")


@pytest.mark.parametrize(
    ("found", "quoted"),
    [(lambda g: g.sum(), r"\(3,\).* not a Tensor of shape \(\)"), (lambda g: 2.0, "2.0"), (lambda g: g.numpy(), "arr")],
)
def test_what_a_hook_returns_is_checked(found: Any, quoted: str) -> None:
    x = leaf(3)
    x.register_hook(found)
    with pytest.raises(TypeError, match="a hook must return None, or a Tensor of shape .*" + quoted):
        x.sum().backward()


def test_threads_that_stop_observing_at_the_same_time_take_out_their_own(monkeypatch: Any) -> None:
    """The other thread ends just when this one has found the place of its observer."""
    first, second = Observer(), Observer()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with observing(first):
            inside.set()
            leave.wait(10)

    class Slow(list):
        def __delitem__(self, at: Any) -> None:
            if not leave.is_set():
                leave.set()
                thread.join(0.3)
            super().__delitem__(at)

    monkeypatch.setattr(observers_module, "observers", Slow())
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with observing(second):
        pass
    thread.join()
    assert not observers_module.observers
