"""no_grad and the mode of each thread."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from graph_tools import constant, equal, leaf

import tinydiff as td
from tinydiff import modes, ops

pytestmark = pytest.mark.usefixtures("each_backend")


def test_no_grad_records_nothing_and_comes_back() -> None:
    x = leaf(3)
    with td.no_grad():
        assert not td.grad_enabled()
        y = x * 2
        with td.no_grad():
            pass
        assert not td.grad_enabled()
    assert td.grad_enabled() and not y.requires_grad and y.node is None
    with pytest.raises(ZeroDivisionError), td.no_grad():
        raise ZeroDivisionError
    assert td.grad_enabled()


def test_no_grad_as_a_decorator() -> None:
    @td.no_grad()
    def double(x: Any) -> Any:
        """Twice."""
        return double(x - 1) if float(x.sum()) > 100 else x * 2

    assert not double(leaf(3)).requires_grad and td.grad_enabled()
    assert not double(td.tensor(np.full(3, 34.0), requires_grad=True)).requires_grad and td.grad_enabled()
    assert double.__name__ == "double" and double.__doc__ == "Twice."


def test_no_grad_around_a_generator_holds_inside_it_only() -> None:
    closed = []

    @td.no_grad()
    def steps(x: Any) -> Any:
        try:
            for _ in range(2):
                x = x * 2
                factor = yield x
                x = x * (factor or 1)
            return "end"
        finally:
            closed.append(td.grad_enabled())

    run = steps(leaf(3))
    assert not next(run).requires_grad
    assert td.grad_enabled(), "the caller's mode is its own between the steps"
    assert (leaf(2) * 2).requires_grad
    y = run.send(3.0)
    assert not y.requires_grad
    with pytest.raises(StopIteration) as end:
        next(run)
    assert end.value.value == "end" and td.grad_enabled()
    other = steps(leaf(3))
    next(other)
    other.close()
    assert len(closed) == 2 and td.grad_enabled()


def test_an_error_thrown_into_a_generator_reaches_it() -> None:
    @td.no_grad()
    def steps(x: Any) -> Any:
        try:
            yield x
        except ValueError as error:
            yield x * float(len(str(error)))

    run = steps(leaf(3))
    next(run)
    y = run.throw(ValueError("four"))
    equal(y, 4 * leaf(3).numpy())
    assert not y.requires_grad and td.grad_enabled()
    with pytest.raises(KeyError, match="other"):
        run.throw(KeyError("other"))


def test_one_no_grad_may_be_entered_by_two_threads() -> None:
    """Each goes back to its own mode, whichever of them leaves first."""
    shared, inside, left = td.no_grad(), threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with td.no_grad(), shared:
            inside.set()
            left.wait(10)
        seen.append(td.grad_enabled())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with shared:
        pass
    seen.append(td.grad_enabled())
    left.set()
    thread.join()
    assert seen == [True, True]


def test_grad_mode_belongs_to_the_thread() -> None:
    seen: dict[str, Any] = {}
    x = leaf(3)

    def work() -> None:
        seen["before"] = td.grad_enabled()
        y = (x * 2).sum()
        seen["gradient"] = td.grad(y, x)[0]

    with td.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not td.grad_enabled()
    assert seen["before"] is True
    equal(seen["gradient"], [2, 2, 2])


def test_threads_share_leaves_but_not_graphs() -> None:
    w = leaf(8, 8)
    xs = [constant(4, 8, seed=i) for i in range(4)]
    alone = [td.grad(ops.tanh(x @ w).sum(), w)[0].numpy() for x in xs]
    together: list[Any] = [None] * 4

    def work(i: int) -> None:
        for _ in range(20):
            (together[i],) = td.grad(ops.tanh(xs[i] @ w).sum(), w)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, together):
        np.testing.assert_array_equal(a, b.numpy())


def test_no_grad_without_brackets() -> None:
    @td.no_grad
    def double(x: Any) -> Any:
        return x * 2

    assert not double(leaf(3)).requires_grad and td.grad_enabled() and double.__name__ == "double"
    with pytest.raises(TypeError, match="callable"):
        td.no_grad(3)  # type: ignore[call-arg]


def test_an_object_that_can_be_called_is_decorated_as_its_method_is() -> None:
    class Steps:
        def __call__(self) -> Any:
            yield td.grad_enabled()

    class Waits:
        async def __call__(self) -> bool:
            return td.grad_enabled()

    steps, waits = td.no_grad()(Steps()), td.no_grad()(Waits())
    assert list(steps()) == [False] and asyncio.run(waits()) is False
    with pytest.raises(TypeError, match="set_grad_enabled takes True or False, not 'no'"):
        modes.set_grad_enabled("no")  # type: ignore[arg-type]


def test_the_mode_belongs_to_the_asyncio_task() -> None:
    """A coroutine that is decorated, or waits inside `with no_grad()`, leaves the other tasks of the thread alone."""
    seen = []

    @td.no_grad()
    async def decorated() -> bool:
        await asyncio.sleep(0)
        return td.grad_enabled()

    async def waits() -> None:
        with td.no_grad():
            await asyncio.sleep(0.02)
            seen.append(td.grad_enabled())

    async def other() -> None:
        await asyncio.sleep(0.01)  # now `waits` is inside
        seen.append(td.grad_enabled())

    async def main() -> list[Any]:
        return await asyncio.gather(decorated(), waits(), other())

    assert asyncio.run(main())[0] is False
    assert seen == [True, False] and td.grad_enabled()


def test_an_asynchronous_generator_is_refused() -> None:
    async def steps() -> Any:
        yield 1

    with pytest.raises(TypeError, match="cannot decorate steps, an asynchronous generator"):
        td.no_grad()(steps)


def test_detach_cuts_the_history_and_shares_the_array() -> None:
    x = leaf(3)
    y = x * 2
    cut = y.detach()
    assert not cut.requires_grad and cut.node is None and cut.data is y.data
    (cut * x).sum().backward()
    equal(x.grad, y.numpy())


def test_what_an_inner_with_left_behind_ends_with_the_outer_one() -> None:
    """As when Ctrl-C comes on the way into its `__exit__`."""
    with td.no_grad():
        modes.set_grad_enabled(True).__enter__()
        assert td.grad_enabled()
        td.no_grad().__enter__()
    assert td.grad_enabled() and modes.recording.get()[2] is None
    td.no_grad().__exit__(None, None, None)  # of another context: there is nothing to take back here
    with td.no_grad():
        td.no_grad().__exit__(None, None, None)
        assert not td.grad_enabled()


def test_an_interrupt_while_the_mode_is_set_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        get = modes.recording.get
        calls = 0

        def set(self, value: Any) -> None:
            modes_recording.set(value)
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt

    modes_recording = modes.recording
    monkeypatch.setattr(modes, "recording", Interrupted())
    with pytest.raises(KeyboardInterrupt), td.no_grad():
        pass
    assert td.grad_enabled()
