"""checkpoint: the same gradients, with the inside computed again."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import observers, ops
from tinydiff.microbatch import over_microbatches

pytestmark = pytest.mark.usefixtures("each_backend")


class Block:
    """A function with weights in its closure, an intermediate Tensor from outside, and dropout."""

    def __init__(self) -> None:
        self.x, self.w, self.outer = leaf(4, 3), leaf(3, 3, seed=1), leaf(3, seed=2)
        self.rng = td.Rng(5)
        self.runs = 0

    def __call__(self, a: Any) -> Any:
        self.runs += 1
        return ops.dropout(ops.tanh(a @ self.w + self.shift), p=0.4, rng=self.rng) * self.shift

    def loss(self, checkpointed: bool) -> Any:
        self.rng = td.Rng(5)
        self.shift = ops.exp(self.outer)  # captured, and not a leaf
        h = self.x * 2
        h = td.checkpoint(self, h) if checkpointed else self(h)
        h = td.checkpoint(self, h) if checkpointed else self(h)
        return (h * h).sum() + (self.shift * 3).sum()

    @property
    def leaves(self) -> tuple[Any, ...]:
        return self.x, self.w, self.outer


def test_checkpoint_gives_the_same_gradients() -> None:
    block = Block()
    plain, again = block.loss(False), block.loss(True)
    equal(again, plain.numpy())
    for a, b in zip(td.grad(plain, block.leaves), td.grad(again, block.leaves)):
        equal(b, a.numpy())
    again.backward()
    for x, a in zip(block.leaves, td.grad(block.loss(False), block.leaves)):
        equal(x.grad, a.numpy())
    with pytest.raises(RuntimeError, match="second time through"):
        again.backward()


def test_checkpoint_leaves_the_random_numbers_where_they_would_be() -> None:
    block = Block()
    block.loss(False)
    expected = block.rng.step
    loss = block.loss(True)
    assert block.rng.step == expected == 2
    loss.backward()
    assert block.rng.step == expected


def test_checkpoint_can_be_differentiated_twice() -> None:
    block = Block()
    second = []
    for checkpointed in (False, True):
        first = td.grad(block.loss(checkpointed), block.leaves, create_graph=True)
        second.append(td.grad(sum(((g * g).sum() for g in first), td.tensor(0.0, dtype="float64")), block.leaves))
    for a, b in zip(*second):
        equal(b, a.numpy(), rtol=1e-10)


def test_checkpoint_inside_checkpoint() -> None:
    x, w = leaf(3, 3), leaf(3, 3, seed=1)
    source = td.Rng(0)

    def inner(a: Any) -> Any:
        return ops.dropout(ops.tanh(a @ w), p=0.3, rng=source)

    def outer(a: Any) -> Any:
        return td.checkpoint(inner, td.checkpoint(inner, a) * w)

    nested = td.checkpoint(outer, x).sum()
    source.step = 0
    plain = inner(inner(x) * w).sum()
    for a, b in zip(td.grad(plain, (x, w)), td.grad(nested, (x, w))):
        equal(b, a.numpy())
    (g1,) = td.grad(plain, x, create_graph=True)
    (g2,) = td.grad(nested, x, create_graph=True)
    equal(td.grad((g2 * g2).sum(), w)[0], td.grad((g1 * g1).sum(), w)[0].numpy(), rtol=1e-10)


def test_checkpoint_computes_again_only_in_backward() -> None:
    block = Block()
    loss = block.loss(True)
    assert block.runs == 2
    loss.backward()
    assert block.runs == 4


def test_checkpoint_keeps_nothing_from_inside() -> None:
    x = leaf(100)
    inside = []

    def fn(a: Any) -> Any:
        for _ in range(3):
            a = ops.exp(a * 0.1)
            inside.append(weakref.ref(a.data))
        return a * 2.0

    y = td.checkpoint(fn, x)
    assert [ref() for ref in inside] == [None] * 3
    y.sum().backward()
    assert [ref() for ref in inside] == [None] * 6


def test_checkpoint_under_no_grad_and_of_constants() -> None:
    x = leaf(3)
    with td.no_grad():
        assert not td.checkpoint(ops.exp, x).requires_grad
    y = td.checkpoint(ops.exp, constant(3))
    assert not y.requires_grad and y.node is None


def test_checkpoint_of_a_function_that_returns_what_it_was_given() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    logged = []

    def fn(a: Any) -> Any:
        logged.append((w * w).sum())  # uses something, but not what it returns
        return a

    for h in (x, x * 2):
        (gradient,) = td.grad(td.checkpoint(fn, h).sum(), h)
        equal(gradient, np.ones(3))
    (gradient,) = td.grad(td.checkpoint(lambda a: x, w).sum(), x)
    equal(gradient, np.ones(3))


def test_checkpoint_refuses_what_is_not_a_tensor() -> None:
    for wrong, name in (((leaf(2), leaf(2)), "tuple"), (None, "NoneType"), (1.0, "float")):
        with pytest.raises(TypeError, match=f"must return one Tensor, not {name}"):
            td.checkpoint(lambda a, wrong=wrong: wrong, leaf(3))
    assert td.grad_enabled() and not observers.observers


def test_an_error_inside_checkpoint_restores_everything() -> None:
    x, source = leaf(3), td.Rng(0)
    fail = [True]

    def fn(a: Any) -> Any:
        a = ops.dropout(a, p=0.5, rng=source)
        if fail[0]:
            raise ZeroDivisionError
        return a * 2

    with pytest.raises(ZeroDivisionError):
        td.checkpoint(fn, x)
    assert td.grad_enabled() and not observers.observers
    fail[0] = False
    y = td.checkpoint(fn, x).sum()
    fail[0], step = True, source.step
    for create_graph in (False, True):
        with pytest.raises(ZeroDivisionError):
            td.grad(y, x, create_graph=create_graph)
        assert td.grad_enabled() and not observers.observers and source.step == step and x.grad is None
    fail[0] = False
    assert td.grad(y, x)[0].shape == (3,), "nothing is broken for the next one"


def test_checkpoint_notices_a_changed_weight_or_argument() -> None:
    for changed in ("w", "t"):
        named = {"x": leaf(3), "w": leaf(3, seed=1), "t": constant(3)}  # t needs no gradient, and is read all the same
        y = td.checkpoint(lambda a, t, w=named["w"]: ops.tanh(a * w) * t, named["x"], named["t"]).sum()
        with td.no_grad():
            named[changed] += 1
        with pytest.raises(RuntimeError, match="in checkpoint reads, was changed|input.* was changed in place"):
            y.backward()


def test_checkpoint_notices_a_function_that_gives_something_else_the_second_time() -> None:
    x = leaf(4)
    shapes = iter([2, 3])
    y = td.checkpoint(lambda a: (a * 2)[: next(shapes)], x)
    with pytest.raises(
        RuntimeError, match=r"run again, the function gave a Tensor of shape \(3,\), not a Tensor of shape \(2,\)"
    ):
        y.backward(np.ones(2))


def test_checkpoint_notices_other_random_numbers_the_second_time() -> None:
    x = leaf(100)
    y = td.checkpoint(lambda a: ops.dropout(a, p=0.5, rng=td.Rng()), x).sum()
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        y.backward()
    fixed = td.checkpoint(lambda a: ops.dropout(a, p=0.5, rng=td.Rng(3)), x)
    fixed.sum().backward()
    equal(x.grad, np.where(fixed.numpy() != 0, 2.0, 0.0))


def test_a_change_of_a_view_out_of_checkpoint_is_a_change_of_its_input() -> None:
    h = leaf(2, 3) * 2
    z = td.checkpoint(lambda a: a.reshape(-1), h)
    with td.no_grad():
        z += 1
    with pytest.raises(RuntimeError, match="changed"):
        td.grad(z.sum(), h)


def test_checkpoint_sees_what_microbatches_use() -> None:
    """Inside, they come one after the other, in the thread that is observed."""
    a, w, v = leaf(4), leaf(1, seed=1), leaf(1, seed=2)

    def fn(a: Any) -> Any:
        parts = list(over_microbatches(lambda rows: a[rows] * w, 4, 1, 2))
        return ops.concatenate(parts) * v

    expected = [g.numpy() for g in td.grad(fn(a).sum(), (a, w, v))]
    for g, e in zip(td.grad(td.checkpoint(fn, a).sum(), (a, w, v)), expected):
        equal(g, e)


@pytest.mark.parametrize("pick", [lambda a, i: a[i], lambda a, i: a[i, i], lambda a, i: ops.take(a, i, axis=0)])
def test_checkpoint_notices_an_index_that_changes(pick: Any) -> None:
    a, index = leaf(3, 3), td.tensor([0, 2])
    y = td.checkpoint(lambda a: pick(a, index), a).sum()
    index[...] = 1
    with pytest.raises(RuntimeError, match="which the function in checkpoint reads, was changed"):
        y.backward()


def test_what_another_thread_records_inside_is_refused() -> None:
    """The second run could not find it, and its gradient would be lost."""
    x, w, made = leaf(3), leaf(3, seed=1), []

    def fn(a: Any) -> Any:
        thread = threading.Thread(target=lambda: made.append(w * w))
        thread.start()
        thread.join()
        return a * made[-1]

    with pytest.raises(RuntimeError, match="was recorded while the function ran, in another thread"):
        td.checkpoint(fn, x)


def test_what_the_function_makes_and_keeps_is_its_own() -> None:
    """An activation that fn stores is no input: it may change, and the graph does not hold it."""
    x, kept = leaf(3), []

    def fn(a: Any) -> Any:
        h = a * 2.0
        kept.append(h)
        return ops.exp(h)

    y = td.checkpoint(fn, x).sum()
    made = weakref.ref(kept[0])
    with td.no_grad():
        kept[0] *= 3.0
    kept.clear()
    assert made() is None
    y.backward()
    equal(x.grad, 2 * np.exp(2 * x.numpy()))


def test_a_function_whose_result_has_no_gradient() -> None:
    x = leaf(3)
    (td.checkpoint(lambda a: (a * 2.0).detach(), x) + x).sum().backward()
    equal(x.grad, np.ones(3))


def test_checkpoint_in_two_threads() -> None:
    x, w = leaf(4, 3), leaf(3, 3, seed=1)
    expected = td.grad(ops.tanh(x @ w).sum(), w)[0].numpy()
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(10):
            (found[i],) = td.grad(td.checkpoint(lambda a: ops.tanh(a @ w), x).sum(), w)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for g in found:
        equal(g, expected)


@pytest.mark.parametrize("change", ["in place", "other data"])
def test_a_change_of_what_the_function_uses_without_being_given_it_is_noticed(change: str) -> None:
    """A frozen layer needs no gradient, but the function would be another one the second time."""
    frozen, x = constant(3), leaf(3, seed=1)
    y = td.checkpoint(lambda x: x * frozen, x).sum()
    with td.no_grad():
        if change == "in place":
            frozen *= 2.0
        else:
            frozen.data = frozen.data * 2.0
    with pytest.raises(RuntimeError, match=r"which the function in checkpoint reads, was changed"):
        y.backward()


def test_what_is_made_inside_a_checkpoint_is_not_kept() -> None:
    made = []

    def fn(x: Any) -> Any:
        h = x.detach() * 2.0
        made.append(weakref.ref(h.data))
        return x * h

    y = td.checkpoint(fn, leaf(1000)).sum()
    assert made[0]() is None
    y.backward()
