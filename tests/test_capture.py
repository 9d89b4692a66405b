"""Captured steps: the same numbers as the step itself, by one launch of one graph; and what cannot be captured.

On NumPy a captured step is the step, and these tests hold it to the same contract.
TINYDIFF_BACKEND=cupy python -m pytest tests/test_capture.py
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, checkpoint, nn, no_grad, ops, optim
from tinydiff.capture import MOST_GRAPHS
from tinydiff.diffusion import VESDE, edm, score_matching_loss
from tinydiff.diffusion.samplers import SAMPLERS, Counted, score_of
from tinydiff.models.unet import UNet
from tinydiff.rng import recorded, replayed
from tinydiff.training import gradients, train

pytestmark = pytest.mark.usefixtures("each_backend")
on_cupy = pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") != "cupy", reason="a graph: TINYDIFF_BACKEND=cupy")


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x).copy()


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside nothing may wait for the device; afterwards, what was launched (where CuPy is emulated)."""
    found: dict[str, int] = {}
    try:
        import cupy_on_cpu
    except ImportError:
        with backend.no_sync():
            yield found
        return
    cupy_on_cpu.reset()
    with cupy_on_cpu.forbid_sync(), backend.no_sync():
        yield found
    found.update(cupy_on_cpu.counters())


class Images:
    """A small U-Net that learns to denoise, with all that a training step has."""

    def __init__(self, make: Callable[..., Any] = optim.AdamW) -> None:
        self.sde = VESDE()
        self.net = UNet(1, (8, 16), embedding=16, groups=4, labels={"digit": 10}, rng=0)
        self.optimizer = make(self.net.parameters(), 1e-3)
        self.ema = optim.EMA(self.net, 0.9)

    def loss(self, x: Any, labels: Any, rng: Rng, first: int) -> Tensor:
        return score_matching_loss(self.net, x, self.sde, rng, first=first, digit=labels)

    def step(self, x: Any, labels: Any, rng: Rng) -> Any:
        value = gradients(self.loss, self.optimizer.parameters, (x, labels), rng)
        norm = optim.clip_grad_norm(self.optimizer.parameters, 50.0)
        self.optimizer.step()
        self.ema.update()
        return {"loss": value, "norm": norm}

    def state(self) -> list[np.ndarray]:
        slots = self.optimizer.state_dict()["slots"].values()
        arrays = [*self.net.state_dict().values(), *self.ema.averages.values(), *(a for s in slots for a in s.values())]
        return [host(a) for a in arrays]


def batch(n: int, seed: int) -> tuple[Any, Any]:
    rng = Rng(seed)
    return backend.to_host(rng.uniform((n, 8, 8, 1))), backend.to_host(rng.integers(10, n))


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.tobytes() == y.tobytes()


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("make", [optim.AdamW, lambda ps, lr: optim.SGD(ps, lr, momentum=0.9, nesterov=True)])
def test_a_captured_training_step_is_the_step_bit_for_bit(make: Any) -> None:
    """Seven steps, with another batch, other noise and another learning rate in each."""
    plain, captured = Images(make), Images(make)
    fast, launches = backend.capture(captured.step), []
    for i in range(7):
        expected = {}
        for task, step in ((plain, plain.step), (captured, fast)):
            task.optimizer.lr = 1e-2 / (i + 1)
            x, labels = (backend.to_device(a) for a in batch(4, i))
            rng = Rng(5).child(i)
            with counted() as counters:
                found = step(x, labels, rng)
            assert rng.step == 0, "the source that was given is not drawn from, but a copy of it"
            expected = expected or {name: host(a) for name, a in found.items()}
            equal([host(found[name]) for name in expected], list(expected.values()))
        launches.append(counters)
    equal(plain.state(), captured.state())
    assert plain.optimizer.counts == captured.optimizer.counts == [7] * len(plain.optimizer.counts)
    assert plain.ema.updates == captured.ema.updates == 7
    assert plain.optimizer.state_dict()["lr"] == captured.optimizer.state_dict()["lr"]
    versions = [[p.version[0] for p in task.net.parameters()] for task in (plain, captured)]
    assert versions[0] == versions[1], "the tape must know that the weights have changed"
    if launches[-1]:
        assert launches[0]["graph_launches"] == 0 and launches[0]["launches"] > 100
        for counters in launches[1:]:
            assert (counters["graph_launches"], counters["syncs"], counters["d2h"]) == (1, 0, 0)


def test_the_gradients_of_the_last_replay_are_in_the_parameters() -> None:
    task = Images()
    fast = backend.capture(lambda x, labels, rng: gradients(task.loss, task.optimizer.parameters, (x, labels), rng))
    for i in range(4):
        fast(*batch(4, i), Rng(i))
        got = [host(p.grad) for p in task.optimizer.parameters]
        gradients(task.loss, task.optimizer.parameters, batch(4, i), Rng(i))
        equal(got, [host(p.grad) for p in task.optimizer.parameters])
        if i % 2:
            task.optimizer.zero_grad()


def test_backward_and_zero_grad_inside() -> None:
    def run(wrap: Any) -> list[np.ndarray]:
        net = nn.Linear(3, 2, rng=0)
        optimizer = optim.SGD(net.parameters(), 0.1)

        def step(x: Any) -> Tensor:
            optimizer.zero_grad()
            loss = ops.square(net(Tensor(x))).mean()
            loss.backward()
            optimizer.step()
            return loss

        step = wrap(step)
        found = [host(step(Rng(i).normal((5, 3)))) for i in range(5)]
        return [*found, *(host(p) for p in net.parameters()), *(host(p.grad) for p in net.parameters())]

    equal(run(lambda step: step), run(backend.capture))


def test_gradients_add_up_over_calls_as_they_do_without_a_graph() -> None:
    def make() -> Any:
        net = nn.Linear(3, 2, rng=0)

        def step(rng: Rng) -> Tensor:
            loss = ops.square(net(Tensor(rng.normal((5, 3))))).mean()
            loss.backward()
            return loss

        return step, lambda: [host(p.grad) for p in net.parameters()]

    both(make)


@on_cupy
def test_gradients_that_a_graph_adds_to_must_stay_there() -> None:
    p = nn.Parameter(np.ones(3))
    fast = backend.capture(lambda: ops.square(p).sum().backward())
    for _ in range(3):
        fast()
    assert host(p.grad).tolist() == [6] * 3
    p.grad = None
    with pytest.raises(RuntimeError, match="another gradient than when the captured step read it: .* after zero_grad"):
        fast()


def test_every_number_of_an_optimiser_may_change() -> None:
    def make() -> Any:
        ps = [nn.Parameter(np.ones(3)) for _ in range(3)]
        sgd, adam = optim.SGD(ps[:1], 0.1, momentum=0.9, nesterov=True), optim.Adam(ps[1:2], 0.1)
        adamw, calls = optim.AdamW(ps[2:], 0.1), iter(range(1, 100))

        def step(rng: Rng) -> Any:
            for p in ps:
                p.grad = Tensor(rng.normal(3, "float64"))
            for optimizer in (sgd, adam, adamw):
                optimizer.step()
            return rng.normal(1)

        def wrapped(step: Any) -> Any:
            def call(rng: Rng) -> Any:
                n = next(calls)
                sgd.momentum, adam.betas = 0.9 / n, (0.9 / n, 0.99 / n)
                for optimizer in (sgd, adam, adamw):
                    optimizer.lr, optimizer.weight_decay = 0.1 / n, 0.01 * n
                adam.eps = 1e-3 * n
                return step(rng)

            return call

        return step, lambda: [host(p) for p in ps], wrapped

    both(make)


def painted(sampler: str, task: Images) -> Callable[..., Any]:
    """sample(rng, labels) by a sampler, from a net whose last layers no longer are zero."""
    for p in task.net.parameters():
        p.data = Rng(1).child(p.size).normal(p.shape) * 0.1
    if sampler == "guided heun":
        sde, denoiser = edm.KarrasSDE(), edm.Denoiser(task.net, 0.5)

        def score(labels: Any) -> Any:
            return score_of(edm.guided(denoiser, 1.0, digit=labels), sde)

        return lambda rng, labels: SAMPLERS["heun"](score(labels), (3, 8, 8, 1), sde, rng, steps=3, eps=0.002)
    return lambda rng, labels: SAMPLERS[sampler](task.net, (3, 8, 8, 1), task.sde, rng, steps=3, digit=labels)


@pytest.mark.parametrize("sampler", sorted({*SAMPLERS, "guided heun"} - {"rk45"}))
def test_captured_samplers_draw_the_same_images(sampler: str) -> None:
    sample, labels = painted(sampler, Images()), backend.to_device(np.arange(3))
    fast = backend.capture(sample)
    for i in range(4):
        ours, theirs = Rng(i, step=i), Rng(i, step=i)
        with counted() as counters:
            images = fast(ours, labels)
        assert host(images).tobytes() == host(sample(theirs, labels)).tobytes()
        assert ours.state() == theirs.state(), "the source advances as if there were no graph"
        assert not counters or counters["graph_launches"] == (i > 0)


def test_evaluations_are_counted_in_replays_too() -> None:
    task = Images()
    counted_score = Counted(task.net)
    labels = backend.to_device(np.arange(3))
    fast = backend.capture(
        lambda rng: SAMPLERS["ddim"](counted_score, (3, 8, 8, 1), task.sde, rng, steps=2, digit=labels)
    )
    for _ in range(4):
        fast(Rng(0))
    assert counted_score.nfe == 4 * 3


@on_cupy
def test_a_sampler_that_looks_at_its_error_cannot_be_captured() -> None:
    task, labels = Images(), backend.to_device(np.arange(3))
    fast = backend.capture(lambda rng, labels: SAMPLERS["rk45"](task.net, (3, 8, 8, 1), task.sde, rng, digit=labels))
    fast(Rng(0), labels)
    with pytest.raises(RuntimeError, match=r"cannot be captured: .*test_capture.py:\d+: "):
        fast(Rng(0), labels)


def both(make: Callable[[], Any], calls: int = 5) -> None:
    """make() -> (step(rng), state()): run plain and captured, they agree in every result and in the state. The third
    that it may return is put around the step that is called."""
    results = []
    for wrap in (lambda step: step, backend.capture):
        step, state, *around = make()
        step, source, found = wrap(step), Rng(3), []
        for outer in around:
            step = outer(step)
        for _ in range(calls):
            found.append(host(step(source)))
        results.append([*found, np.array(source.step), *state()])
    equal(*results)


def test_sources_that_the_step_finds_by_itself_advance_too() -> None:
    def make() -> Any:
        dropout = nn.Dropout(0.5, rng=1)
        return lambda rng: dropout(Tensor(rng.normal((4, 5)))), lambda: [np.array(dropout.rng.step)]

    both(make)


def test_children_and_copies_of_a_source_follow_it() -> None:
    def make() -> Any:
        def step(rng: Rng) -> Any:
            child, copy = rng.child("a"), rng.copy()
            return (
                rng.normal((2, 3)) + 10 * child.normal((2, 3)) + 100 * child.child(1).uniform((2, 3))
                + 1000 * copy.normal((2, 3)) + 1e4 * copy.copy().integers(50, (2, 3))
            )  # fmt: skip

        return step, lambda: []

    both(make)


def test_a_checkpoint_draws_again_what_it_drew() -> None:
    def make() -> Any:
        net, dropout = nn.Linear(5, 5, rng=0), nn.Dropout(0.5, rng=1)
        optimizer = optim.Adam(net.parameters(), 0.1)

        def step(rng: Rng) -> Tensor:
            optimizer.zero_grad()
            inner = lambda x: checkpoint(lambda x: dropout(net(x)), x)  # noqa: E731
            loss = ops.square(checkpoint(lambda x: dropout(inner(net(x))), Tensor(rng.normal((4, 5))))).sum()
            loss.backward()
            optimizer.step()
            return loss

        return step, lambda: [np.array(dropout.rng.step), *(host(p) for p in net.parameters())]

    both(make)


def test_draws_are_replayed_from_where_they_were() -> None:
    def make() -> Any:
        inside = Rng(8)

        def step(rng: Rng) -> Any:
            with recorded() as outer:
                rng.normal(3)
                with recorded() as inner:
                    first = inside.normal((2, 3)) + rng.normal((2, 3))
            with replayed(inner):
                second = inside.normal((2, 3)) + rng.normal((2, 3))
            with replayed(outer):
                third = rng.normal((2, 3)) + 100 * inside.normal((2, 3))
            return first + 10 * second + 1000 * third + 1e4 * inside.normal((2, 3))

        return step, lambda: [np.array(inside.step)]

    both(make)


def test_running_statistics_run_on() -> None:
    def make() -> Any:
        norm = nn.BatchNorm2d(3)
        return lambda rng: norm(Tensor(rng.normal((4, 2, 2, 3)))), lambda: [host(t) for _, t in norm.named_tensors()]

    both(make)


def test_statistics_that_are_loaded_are_seen() -> None:
    norm = nn.BatchNorm2d(2, affine=False).eval()
    x = backend.to_device(np.ones((1, 1, 1, 2), "float32"))
    fast = backend.capture(lambda x: norm(Tensor(x)))
    fast(x), fast(x)
    norm.load_state_dict({"running_mean": np.full(2, 3.0, "float32"), "running_var": np.ones(2, "float32")})
    for _ in range(2):
        np.testing.assert_allclose(host(fast(x)).ravel(), -2, rtol=1e-4)


def test_averages_may_be_applied_inside() -> None:
    def make() -> Any:
        net = nn.Linear(2, 2, rng=0)
        ema = optim.EMA(net, 0.5)
        optimizer = optim.SGD(net.parameters(), 0.1)

        def step(rng: Rng) -> Any:
            x = Tensor(rng.normal((3, 2)))
            optimizer.zero_grad()
            ops.square(net(x)).sum().backward()
            optimizer.step()
            ema.update()
            with ema.applied():
                return net(x).detach()

        return step, lambda: [host(p) for p in net.parameters()]

    both(make)


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
    """What a step has freed is written again by the graph, so no one else may be given it, not even once a pool has
    been told to give back what is free. An array of sevens stays."""
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


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_train_captured_is_train(micro_batch: int | None) -> None:
    """Ten images in batches of 4, 4 and 2, three epochs, and a rate that changes at every step."""

    def run(capture: bool) -> tuple[list[np.ndarray], list[Any]]:
        task, data = Images(optim.Adam), batch(10, 0)
        run = train(
            task.net, task.loss, data, task.optimizer, epochs=3, batch_size=4, micro_batch=micro_batch,
            schedule=lambda step: 1 / (1 + step), schedule_by="step", ema=task.ema, capture=capture,
            stream=io.StringIO(),
        )  # fmt: skip
        return task.state(), [(r["step"], r["loss"], r["lr"]) for r in run.records]

    (plain, log), (captured, captured_log) = run(False), run(True)
    equal(plain, captured)
    assert log == captured_log


# ---------------------------------------------------------------- what cannot be captured


@on_cupy
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x * float(x.sum()), r"cannot be captured: .* at .*test_capture.py:\d+: "),
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
        RuntimeError, match=r"a Tensor of shape \(3,\) has another gradient than when the captured step read"
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
    with pytest.raises(TypeError, match=message):
        backend.capture(lambda *inputs: None)(*inputs)


def test_tensors_are_no_inputs_and_numbers_are_no_outputs() -> None:
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
