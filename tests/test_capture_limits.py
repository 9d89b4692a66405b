"""Captured steps: what may change between calls, and what cannot be captured.

TINYDIFF_BACKEND=cupy python -m pytest tests/test_capture_limits.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from captures import Images, batch, equal, host, on_cupy

from tinydiff import Rng, Tensor, backend, nn, no_grad, ops, optim
from tinydiff.diffusion import sample
from tinydiff.fast.capture import MOST_GRAPHS

pytestmark = pytest.mark.usefixtures("each_backend")


# ---------------------------------------------------------------- what changes between calls


def test_new_weights_are_seen() -> None:
    """load_state_dict and EMA.applied give a Tensor another array: a graph that read the old one is made again."""
    task, other = Images(), Images()
    for p in other.net.parameters():
        p.data = p.data + 0.1
    fast = backend.capture(lambda x: task.net(Tensor(x), backend.xp.ones(2, "float32")))
    x = backend.to_device(batch(2, 0)[0])

    def check() -> None:
        for _ in range(3):
            assert host(fast(x)).tobytes() == host(task.net(Tensor(x), backend.xp.ones(2, "float32"))).tobytes()

    check()
    task.net.load_state_dict(other.net.state_dict())
    check()
    task.ema.update()
    with task.ema.applied():
        check()
    check()


def test_training_goes_on_from_a_state_that_was_loaded() -> None:
    def run(wrap: Any) -> list[np.ndarray]:
        task, kept = Images(), Images()
        for i in range(2):
            kept.step(*batch(4, i), Rng(i))
        step = wrap(task.step)
        for i in range(9):
            step(*batch(4, i), Rng(i))
            if i in (3, 4):
                task.optimizer.load_state_dict(kept.optimizer.state_dict())
                task.ema.load_state_dict(kept.ema.state_dict())
            if i == 6:
                task.net.load_state_dict(kept.net.state_dict())
        return [*task.state(), np.array(task.optimizer.counts)]

    equal(run(lambda step: step), run(backend.capture))


def test_every_kind_of_input_has_its_own_graph() -> None:
    """As the last batch of an epoch is shorter; so do constants, dtypes and sources that are one and the same."""
    fast = backend.capture(lambda x, power, a, b: (x + a.normal(x.shape) + 10 * b.normal(x.shape)) ** power)
    one = Rng(0)
    kinds = [
        ((4, 2), 1, Rng(1), Rng(2)),
        ((3, 2), 1, Rng(1), Rng(2)),
        ((4, 2), 2, Rng(1), Rng(2)),
        ((4, 2), 1, one, one),
    ]
    for i in range(4):
        for shape, power, a, b in kinds:
            x = Rng(i).normal(shape)
            a_now, b_now = a.copy(), b.copy()
            if a is b:
                b_now = a_now
            expected = (x + a_now.normal(shape) + 10 * b_now.normal(shape)) ** power
            assert host(fast(x, power, a, b)).tobytes() == host(expected).tobytes()
            assert (a.step, b.step) == (a_now.step, b_now.step)


@on_cupy
def test_too_many_kinds_are_an_error_that_shows_the_input() -> None:
    fast = backend.capture(lambda x, factor: x * factor)
    x = backend.xp.ones(3)
    for i in range(MOST_GRAPHS):
        fast(x, i / 10)
    with pytest.raises(RuntimeError, match=r"came in 8 kinds .* now there is .*\('float', 0\.8\).* as an array"):
        fast(x, 0.8)
    assert host(fast(x, 0.1))[0] == 0.1


@on_cupy
def test_a_replay_leaves_other_arrays_alone() -> None:
    """A replay writes into memory that the step has freed, so no other array may get that memory, not even after a pool
    has freed its unused blocks. An array of sevens stays."""
    import cupy

    def step(x: Any) -> Any:
        for i in range(6):
            x = x * 2.0 + float(i)  # temporaries that are free once the step was recorded
        return x.sum()

    fast, x = backend.capture(step), backend.xp.ones(5000)
    for _ in range(2):
        fast(x)
    cupy.get_default_memory_pool().free_all_blocks()
    sevens = [backend.xp.full(n, 7.0) for n in (5000, 5000, 4999, 5000, 1, 100, 5000, 5000, 5000)]
    for _ in range(3):
        fast(x)
    assert all((host(a) == 7).all() for a in sevens)


@on_cupy
def test_inputs_are_copied_and_outputs_are_overwritten() -> None:
    fast = backend.capture(lambda x: x * 2)
    x = backend.xp.ones(4)
    outs = [fast(x * i) for i in range(4)]
    assert outs[1] is outs[2] is outs[3] and host(outs[3]).tolist() == [6] * 4
    assert host(outs[0]).tolist() == [0] * 4, "the first call is the step itself"
    assert host(fast(np.full(4, 5.0))).tolist() == [10] * 4, "host arrays are brought to the device"


@on_cupy
def test_another_precision_is_another_graph() -> None:
    fast = backend.capture(lambda x: ops.matmul(x, x))
    x = backend.xp.full((8, 8), 1 + 2.0**-12, "float32")
    for _ in range(3):
        assert float(host(fast(x))[0, 0]) > 8
        with backend.precision("tf32"):
            assert float(host(fast(x))[0, 0]) == 8


def test_whether_gradients_are_recorded_is_asked_in_every_call() -> None:
    p = nn.Parameter(np.ones(3))
    fast = backend.capture(lambda x: p * Tensor(x))
    x = backend.xp.ones(3)
    for _ in range(3):
        assert fast(x).requires_grad
        with no_grad():
            assert not fast(x).requires_grad


# ---------------------------------------------------------------- what cannot be captured


@on_cupy
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x * float(x.sum()), r"cannot be captured: .* at .*test_capture_limits.py:\d+: "),
        (lambda x: x * Tensor(x).sum().item(), "to_host waits for the device inside backend.no_sync"),
        (lambda x: x * backend.scalar(x.sum()), "scalar waits for the device"),
        (lambda x: x + backend.to_device(np.ones(3)), "captur"),
        (lambda x: (x[:, None] * x) @ (x[:, None] * x), "cuBLAS API during stream capture"),
        (lambda x: x * Rng(0).state()["step"], "the state of an Rng cannot be read in a captured step"),
        (lambda x: x * int(Rng(0).permutation(3)[0]), "a permutation cannot be read in a captured step"),
    ],
)
def test_what_a_graph_cannot_hold_is_an_error_that_says_what_and_where(step: Any, message: str) -> None:
    fast, x = backend.capture(step), backend.xp.ones(3)
    fast(x)
    with pytest.raises(RuntimeError, match=message) as error:
        fast(x)
    assert "bring host arrays to it: pass those as inputs" in str(error.value)
    working = backend.capture(lambda x: x + 1)  # afterwards everything works as before
    for _ in range(3):
        assert host(working(x)).tolist() == [2, 2, 2]
    assert float(x @ x) == 3


@on_cupy
def test_an_error_of_the_step_itself_stays_what_it_is() -> None:
    calls = []

    def step(x: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("mine")
        return x + 1

    fast, x = backend.capture(step), backend.xp.ones(3)
    fast(x)
    with pytest.raises(KeyError, match="mine"):
        fast(x)
    for _ in range(3):
        assert host(fast(x)).tolist() == [2, 2, 2]
    assert len(calls) == 3


@on_cupy
def test_gradients_that_are_not_those_of_the_graph_are_refused() -> None:
    p = nn.Parameter(np.ones(3))
    optimizer = optim.SGD([p], 0.1)
    fast = backend.capture(lambda: optimizer.step())
    for _ in range(3):
        p.grad = Tensor(backend.xp.ones(3)) if p.grad is None else p.grad
        fast()
    assert np.allclose(host(p), 0.7)
    p.grad = Tensor(backend.xp.full(3, 2.0))
    with pytest.raises(
        RuntimeError, match=r"parameter 0 of shape \(3,\) has another gradient than when the captured step read"
    ):
        fast()
    assert optimizer.counts == [3]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((object(),), "an input is an array, an Rng or a constant, not object"),
        (([1.0, 2.0],), r"not list: \[1.0, 2.0\]"),
        ((Tensor,), "not type"),
    ],
)
def test_inputs_of_another_kind_are_named(inputs: Any, message: str) -> None:
    if backend.active().fast is None:
        pytest.skip("without fast/ a captured step is the step itself, which takes anything")
    with pytest.raises(TypeError, match=message):
        backend.capture(lambda *inputs: None)(*inputs)


def test_tensors_are_no_inputs_and_numbers_are_no_outputs() -> None:
    if backend.active().fast is None:
        pytest.skip("without fast/ a captured step is the step itself, which takes anything")
    x = backend.xp.ones(3)
    with pytest.raises(TypeError, match="not Tensor: pass x.data, and make a Tensor of it inside"):
        backend.capture(lambda x: x)(Tensor(x))
    with pytest.raises(
        TypeError, match="a step returns arrays and Tensors, not 3.5, which would be the same after every"
    ):
        backend.capture(lambda x: {"a": (x, [3.5])})(x)
    with pytest.raises(TypeError, match="capture takes a function, not 3"):
        backend.capture(3)  # type: ignore[arg-type]


def test_a_captured_step_inside_another_is_part_of_it() -> None:
    inner = backend.capture(lambda x: x * 2)
    outer = backend.capture(lambda x: inner(x) + 1)
    for i in range(4):
        assert host(outer(backend.xp.full(2, float(i)))).tolist() == [2 * i + 1] * 2


@on_cupy
def test_a_sampler_that_looks_at_its_error_cannot_be_captured() -> None:
    task, labels = Images(), backend.to_device(np.arange(3))
    fast = backend.capture(
        lambda rng, labels: sample(task.net, (3, 8, 8, 1), task.sde, rng, method="rk45", digit=labels)
    )
    fast(Rng(0), labels)
    with pytest.raises(RuntimeError, match=r"cannot be captured: .*test_capture_limits.py:\d+: "):
        fast(Rng(0), labels)
