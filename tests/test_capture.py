"""Captured steps: the same numbers as the step itself, by one launch of one graph.

On NumPy a captured step is the step, and has the same contract in these tests.
TINYDIFF_BACKEND=cupy python -m pytest tests/test_capture.py
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from captures import Images, batch, both, counted, equal, host, on_cupy

from tinydiff import Rng, Tensor, backend, checkpoint, nn, ops, optim
from tinydiff.diffusion import METHODS, Counted, Denoiser, Guided, KarrasSDE, sample
from tinydiff.microbatch import gradients
from tinydiff.rng import recorded, replayed
from tinydiff.training import train

pytestmark = pytest.mark.usefixtures("each_backend")


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
    p = captured.optimizer.parameters[0]
    y = ops.square(p).sum()
    fast(x, labels, rng)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()  # the graph knows that a replay has changed the weights
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


def sampling(method: str, task: Images) -> Callable[..., Any]:
    """f(rng, labels) that samples by a method, from a net whose last layers no longer are zero."""
    for p in task.net.parameters():
        p.data = Rng(1).child(p.size).normal(p.shape) * 0.1
    shape, options = (3, 8, 8, 1), {"steps": 3}
    if method == "guided heun":
        negative = {"digit": backend.to_device(np.arange(3) + 4)}
        guided = Guided(Denoiser(task.net, 0.5), 1.0, negative=negative, interval=(0.1, 10.0))
        karras = KarrasSDE()
        return lambda rng, labels: sample(guided, shape, karras, rng, eps=0.002, digit=labels, **options)
    if method == "ddpm in microbatches":
        method, options["microbatch"] = "ddpm", 2
    return lambda rng, labels: sample(task.net, shape, task.sde, rng, method=method, digit=labels, **options)


@pytest.mark.parametrize("method", sorted({*METHODS, "guided heun", "ddpm in microbatches"} - {"rk45"}))
def test_captured_methods_draw_the_same_images(method: str) -> None:
    plain, labels = sampling(method, Images()), backend.to_device(np.arange(3))
    fast = backend.capture(plain)
    for i in range(4):
        ours, theirs = Rng(i, step=i), Rng(i, step=i)
        with counted() as counters:
            images = fast(ours, labels)
        assert host(images).tobytes() == host(plain(theirs, labels)).tobytes()
        assert ours.state() == theirs.state(), "the source advances as if there were no graph"
        assert not counters or counters["graph_launches"] == (i > 0)


def test_evaluations_are_counted_in_replays_too() -> None:
    task = Images()
    counted_score = Counted(task.net)
    labels = backend.to_device(np.arange(3))
    fast = backend.capture(
        lambda rng: sample(counted_score, (3, 8, 8, 1), task.sde, rng, method="ddim", steps=2, digit=labels)
    )
    for _ in range(4):
        fast(Rng(0))
    assert counted_score.nfe == 4 * 3


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


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("microbatch", [None, 2])
def test_train_captured_is_train(microbatch: int | None) -> None:
    """Ten images in batches of 4, 4 and 2, three epochs, and a rate that changes at every step."""

    def run(capture: bool) -> tuple[list[np.ndarray], list[Any]]:
        task, data = Images(optim.Adam), batch(10, 0)
        run = train(
            task.net, task.loss, data, task.optimizer, epochs=3, batch_size=4, microbatch=microbatch,
            schedule=lambda step: 1 / (1 + step), schedule_by="step", ema=task.ema, capture=capture,
            stream=io.StringIO(),
        )  # fmt: skip
        return task.state(), [(r["step"], r["loss"], r["lr"]) for r in run.records]

    (plain, log), (captured, captured_log) = run(False), run(True)
    equal(plain, captured)
    assert log == captured_log
