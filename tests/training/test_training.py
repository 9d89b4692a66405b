"""The loop: resuming changes nothing, Ctrl-C saves, and what it prints and keeps is right."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading

import numpy as np
import pytest

from tinydiff import Rng, backend, detect_anomaly, nn, ops, saving, tensor, training_files, training_log
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.microbatch import gradients
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.optim import EMA, SGD, Adam
from tinydiff.training import CannotResume, train

N, BATCH = 10, 4  # three steps per epoch, of 4, 4 and 2 samples
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
Y = X @ np.array([[1.0], [-2.0], [0.5]], np.float32)


class Task:
    """A line fitted to noised points. `at` runs before each loss, given how many were computed."""

    def __init__(self, out=None, at=lambda calls: None, optimizer=Adam, ema=True):
        self.model = nn.Linear(3, 1, rng=Rng(1))
        self.optimizer = optimizer(self.model.parameters(), lr=0.05)
        self.ema = EMA(self.model, 0.9) if ema else None
        self.out, self.at, self.calls, self.stream = out, at, 0, io.StringIO()

    def loss(self, x, y, rng, sample_offset):
        self.at(self.calls)
        self.calls += 1
        noised = x + 0.1 * rng.normal(x.shape, sample_offset=sample_offset)
        return ops.square(self.model(noised) - y).mean()

    def train(self, epochs=4, batch_size=BATCH, data=(X, Y), **options):
        options = {"ema": self.ema, "out": self.out, "stream": self.stream} | options
        return train(self.model, self.loss, data, self.optimizer, epochs=epochs, batch_size=batch_size, **options)

    def weights(self):
        arrays = {**self.model.state_dict(), **(self.ema.state_dict()["averages"] if self.ema else {})}
        return np.concatenate([backend.to_host(a).ravel() for a in arrays.values()])


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_time(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def call_at(n, action):
    """An action before loss number n, once."""
    return lambda calls: action() if calls == n else None


def raise_(error):
    raise error


def interrupt():
    raise_(KeyboardInterrupt)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("after", [1, 3, 4, 6, 10])
@pytest.mark.parametrize(
    "how", [interrupt, lambda: signal.raise_signal(signal.SIGINT)], ids=["KeyboardInterrupt", "SIGINT"]
)
def test_interrupted_and_resumed_is_as_if_nothing_had_happened(each_backend, tmp_path, after, how):
    options = {"schedule": lambda epoch: 0.9**epoch}
    whole = Task(tmp_path / "whole")
    assert whole.train(**options).finished

    first = Task(tmp_path / "parts", call_at(after, how))
    run = first.train(**options)
    assert not run.finished and run.step in (after, after + 1)  # raised: this step is not done; SIGINT: it is finished
    assert f"interrupted after step {run.step}" in first.stream.getvalue() and "--resume" in first.stream.getvalue()

    second = Task(tmp_path / "parts")
    run = second.train(resume=True, **options)
    assert run.finished and run.step == 12 and second.calls < 12
    assert whole.weights().tobytes() == second.weights().tobytes()
    assert (
        without_time(log_of(tmp_path / "whole"))
        == without_time(log_of(tmp_path / "parts"))
        == without_time(run.records)
    )
    assert len(run.records) == 4


def test_resuming_with_more_epochs_goes_on(tmp_path):
    Task(tmp_path).train(epochs=2)
    more, whole = Task(tmp_path), Task()
    assert more.train(epochs=5, resume=True).finished
    whole.train(epochs=5)
    assert more.weights().tobytes() == whole.weights().tobytes()


def test_resuming_a_finished_run_does_nothing(tmp_path):
    done, again = Task(tmp_path), Task(tmp_path)
    done.train()
    assert again.train(resume=True).finished
    assert again.calls == 0 and again.weights().tobytes() == done.weights().tobytes()


def test_a_log_that_ran_ahead_of_the_checkpoint_is_cut(tmp_path):
    """As after a crash between the two: without that, records would be there twice."""
    Task(tmp_path, call_at(7, interrupt)).train()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 99}\n')
    Task(tmp_path).train(resume=True)
    assert [r["epoch"] for r in log_of(tmp_path)] == [0, 1, 2, 3]


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_last_checkpoint(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    task, before = Task(tmp_path, call_at(5, twice)), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        task.train()
    assert saving.load(tmp_path / "checkpoint.npz")["run"]["step"] == 3
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError, SystemExit, asyncio.CancelledError])
def test_an_update_that_was_cut_in_the_middle_is_not_saved(tmp_path, error):
    task = Task(tmp_path)
    update = task.ema.update
    # At the second step, since the first one is not that of the checkpoint: the weights have moved, their average not.
    task.ema.update = lambda: update() if task.calls == 1 else raise_(error)
    with pytest.raises(error):
        task.train()
    assert saving.load(tmp_path / "checkpoint.npz")["run"]["step"] == 0


def test_an_interrupt_during_the_pictures_saves(tmp_path):
    run = Task(tmp_path).train(on_record=lambda run: interrupt())
    assert not run.finished and run.step == 3
    assert saving.load(tmp_path / "checkpoint.npz")["run"]["step"] == 3 and len(log_of(tmp_path)) == 1


def test_an_interrupt_with_nowhere_to_save_says_so():
    task = Task(at=call_at(4, interrupt))
    task.train()
    assert "interrupted after step 4 (epoch 1, 1 batches); nothing was saved" in task.stream.getvalue()


def test_it_trains_outside_the_main_thread(tmp_path):
    task = Task(tmp_path)
    thread = threading.Thread(target=task.train)
    thread.start()
    thread.join()
    assert task.calls == 12 and len(log_of(tmp_path)) == 4


def test_new_runs_keep_what_older_ones_left(tmp_path):
    (tmp_path / "previous-checkpoint.npz").write_text("as such files were called once")
    (tmp_path / "previous-7-log.jsonl").write_text("whose checkpoint was deleted")
    for epochs in (1, 2, 3):
        task = Task(tmp_path)
        task.train(epochs=epochs)
    assert "is kept: previous-9-checkpoint.npz, previous-9-log.jsonl\n" in task.stream.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.npz", "log.jsonl", "previous-8-checkpoint.npz", "previous-8-log.jsonl", "previous-9-checkpoint.npz",
        "previous-9-log.jsonl", "previous-7-log.jsonl", "previous-checkpoint.npz",
    }  # fmt: skip
    for name, steps in (("previous-8-", 3), ("previous-9-", 6), ("", 9)):
        assert saving.load(tmp_path / f"{name}checkpoint.npz")["run"]["step"] == steps
        assert len((tmp_path / f"{name}log.jsonl").read_text().splitlines()) == steps // 3
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(FileNotFoundError, match="rename one of .*: previous-checkpoint.npz, .*previous-9-checkpoint"):
        task.train(resume=True)


def test_a_checkpoint_and_a_log_are_there_before_the_first_step(tmp_path):
    def look():
        assert saving.load(tmp_path / "checkpoint.npz")["run"]["step"] == 0 and log_of(tmp_path) == []

    whole, first, second = Task(), Task(tmp_path, call_at(0, look)), Task(tmp_path, call_at(0, look))
    first.loss = lambda *batch, **options: (look(), interrupt())  # before the first step is done
    whole.train()
    assert first.train().step == 0 and second.train(resume=True).finished
    assert whole.weights().tobytes() == second.weights().tobytes()


def test_what_cannot_be_saved_is_found_before_the_first_step_and_the_older_run_stays(tmp_path, monkeypatch):
    Task(tmp_path).train(epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(error, **options):
        task = Task(tmp_path, at=lambda calls: pytest.fail("a step was done"))
        task.model.extra = options.pop("extra", None)
        with pytest.raises(error) as found:
            task.train(**options)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return str(found.value)

    assert "not 'extra.a/b.weight' in model" in refused(TypeError, extra={"a/b": nn.Linear(1, 1, rng=0)}, ema=None)
    assert "out must be a directory" in refused(NotADirectoryError, out=tmp_path / "log.jsonl")

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", denied)
        refused(PermissionError)
    replace = os.replace
    for nth in range(1, 5):  # of the checkpoint, the two that make room, and the new one
        calls = []

        def fail(source, target, nth=nth, calls=calls):
            calls.append(source)
            replace(source, target) if len(calls) != nth else denied()

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            refused(PermissionError)
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "touch", denied)
        refused(PermissionError)
    assert Task(tmp_path).train(epochs=1, resume=True).finished


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numbers_of_numpy_can_be_logged_and_saved(tmp_path, kind):
    plain, task = Task(tmp_path / "plain"), Task(tmp_path / "numpy")
    plain.optimizer.lr, task.optimizer.lr = 1, kind(1)
    plain.train(epochs=2, schedule=lambda epoch: 1 / 2**epoch)
    run = task.train(epochs=np.int64(2), schedule=lambda epoch: np.float32(1 / 2**epoch), seed=np.int64(0),
                     batch_size=np.int32(BATCH), log_every=np.int64(3), save_every=np.int64(3))  # fmt: skip
    assert [record["lr"] for record in log_of(tmp_path / "numpy")] == [1, 0.5] == [r["lr"] for r in run.records]
    assert all(type(record["lr"]) is float for record in run.records)
    assert plain.weights().tobytes() == task.weights().tobytes()
    assert Task(tmp_path / "numpy").train(epochs=2, resume=True).finished


def test_what_on_record_adds_to_a_record_may_be_of_numpy(tmp_path):
    def add(run):
        run.records[-1] |= {"accuracy": np.float32(0.5), "counts": np.arange(2)}

    Task(tmp_path).train(epochs=1, on_record=add)
    run = Task(tmp_path).train(epochs=2, resume=True)
    assert run.finished and log_of(tmp_path)[0] | {"accuracy": 0.5, "counts": [0, 1]} == log_of(tmp_path)[0]


class Dropouts(nn.Module):
    """Sources as attributes, in a list, in a dict and under a private name; one is of its own, not of a layer."""

    def __init__(self):
        self.layer = nn.Linear(3, 8, rng=Rng(1))
        self.drop = [nn.Dropout(0.5), {"one": nn.Dropout(0.5)}]
        self.end = nn.Linear(8, 1, rng=Rng(2))
        self.rngs = {"a/b": [Rng()]}
        self._noise = self.rngs["a/b"][0].child("noise")

    def forward(self, x):
        y = self.drop[0](self.drop[1]["one"](self.layer(x)))
        for rng in (self.rngs["a/b"][0], self._noise):
            y = y + tensor(rng.normal(y.shape))
        return self.end(y)


class DropoutTask(Task):
    def __init__(self, out=None, at=lambda calls: None, like=None):
        super().__init__(out, at)
        self.model = Dropouts()
        if like:  # the sources of a run that has not begun
            saved = training_files.Sources(like.model).state_dict()
            training_files.Sources(self.model).load_state_dict(saved)
        self.optimizer = Adam(self.model.parameters(), lr=0.05)
        self.ema = EMA(self.model, 0.9)


@pytest.mark.parametrize("after", [3, 4, 6])
def test_a_net_with_random_sources_of_its_own_resumes_with_the_same_masks(each_backend, tmp_path, after):
    whole = DropoutTask()
    first = DropoutTask(tmp_path, call_at(after, lambda: signal.raise_signal(signal.SIGINT)), like=whole)
    whole.train(epochs=3)
    assert not first.train(epochs=3).finished
    second = DropoutTask(tmp_path)  # its own sources have other seeds
    assert second.train(epochs=3, resume=True).finished
    assert whole.weights().tobytes() == second.weights().tobytes()
    assert training_files.Sources(whole.model).state_dict() == training_files.Sources(second.model).state_dict()
    assert not any("rng" in name or "drop" in name for name in second.model.state_dict())


def test_sources_are_found_once_each_in_a_fixed_order():
    net = Dropouts()
    net._circle = [net.rngs["a/b"]]
    net._circle.append(net._circle)
    names = ["rngs.a/b.0", "_noise", "drop.0.rng", "drop.1.one.rng"]
    assert [name for name, _ in training_files.Sources(net).named] == names


def test_sources_of_another_model_are_refused(tmp_path):
    DropoutTask(tmp_path).train(epochs=1)
    other = DropoutTask(tmp_path)
    other.model.more = Rng(0)
    with pytest.raises(CannotResume, match=r"checkpoint.npz: its sources is of another run: .*'more'"):
        other.train(resume=True)


# ---------------------------------------------------------------- a step


def test_parts_of_a_batch_add_up_to_the_batch(each_backend):
    """Microbatches of 3, 3 and 2 give the gradient and the loss of 8, with the same noise;
    threads change no bit of it.
    """
    results = []
    for microbatch, threads in [(8, 1), (3, 1), (3, 3), (1, 2), (None, None)]:
        task = Task()
        value = gradients(task.loss, task.optimizer.parameters, (X[:8], Y[:8]), Rng(5), microbatch, threads)
        results.append(np.array([float(value), *task.model.weight.grad.numpy().ravel(), task.model.bias.grad.item()]))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=2e-6)
    assert results[1].tobytes() == results[2].tobytes()


def test_an_empty_batch_is_an_error():
    task = Task()
    with pytest.raises(ValueError, match=r"the batch is empty: its arrays have shapes \[\(0, 3\), \(0, 1\)\]"):
        gradients(task.loss, task.optimizer.parameters, (X[:0], Y[:0]), Rng(0))


def test_a_net_with_batch_norm_or_dropout_takes_the_batch_whole():
    layers = [nn.Linear(3, 4, rng=0), nn.Dropout(0.5, rng=1), nn.Linear(4, 1, rng=2)]
    images = [nn.Conv2d(1, 2, 3, rng=0), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 2, rng=2)]
    for net, shape in ((nn.Sequential(*layers), (200, 3)), (nn.Sequential(*images), (200, 4, 4, 1))):
        x = np.random.default_rng(0).random(shape, np.float32)
        seen: list[int] = []

        def loss(x, rng, sample_offset, net=net, seen=seen):
            seen.append(len(x))
            return ops.mean(ops.square(net(tensor(x))))

        train(net, loss, [x], Adam(net.parameters()), epochs=1, batch_size=200, stream=io.StringIO())
        assert seen == [200]


def test_a_step_never_waits_for_the_device(each_backend):
    sde = VESDE()
    model = ScoreUNet(sde.marginal_std, (32, 32, 32, 32), 16, skips="add", rng=0)
    optimizer, ema = Adam(model.parameters(), lr=1e-3), EMA(model)
    x0 = Rng(0).uniform((3, 28, 28, 1))
    batch = [backend.to_host(x0)]

    def loss(x, rng, sample_offset):
        return score_matching_loss(model, x, sde, rng, sample_offset=sample_offset)

    with backend.no_sync():
        value = gradients(loss, optimizer.parameters, batch, Rng(1), 2)
        optimizer.step()
        ema.update()
    assert value.shape == () and 0 < backend.scalar(value) < 1e5
    assert all(p.grad is not None for p in model.parameters())


def test_the_host_reads_losses_back_only_when_the_line_is_due(numpy_backend, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])

    def count(tick, **options):
        before, task = backend.syncs, Task(at=lambda calls: now.__setitem__(0, now[0] + tick))
        task.train(epochs=10, batch_size=2, **options)  # 50 steps
        return backend.syncs - before

    assert count(0.001, nonfinite="late") == 10  # at the end of each epoch
    assert count(0.3, nonfinite="late") == 10 + 20  # and after every second step of the five
    assert count(0.001) == 50 + 10  # and one number per step: is everything finite?


@pytest.mark.parametrize("microbatch", [None, 2])
def test_few_frames_lie_between_the_loop_and_the_loss(each_backend, microbatch):
    """A reader who steps into `train` with a debugger comes to the loss through at most four functions."""
    between = []

    def count():
        frame, names = sys._getframe(2), []  # of the loss
        while (frame := frame.f_back).f_code is not train.__code__:
            names.append(frame.f_code.co_name)
        between.append(names)

    Task(at=lambda calls: count()).train(epochs=1, microbatch=microbatch, threads=1)
    assert between and all(len(names) <= 4 for names in between), between


def test_the_gradients_of_the_last_step_are_freed_before_the_next_ones_are_computed():
    task = Task()
    task.at = lambda calls: seen.append([p.grad for p in task.optimizer.parameters])
    seen = []
    task.train(epochs=1)
    assert seen == [[None, None]] * 3


def test_parameters_that_are_frozen_stay():
    task = Task()
    task.model.bias.requires_grad = False
    before = task.model.bias.numpy().copy()
    task.train(epochs=1)
    assert task.model.bias.numpy() == before and task.model.bias.grad is None


def test_the_loss_becomes_small():
    task = Task()
    records = task.train(epochs=60).records
    assert records[-1]["loss"] < 0.2 < 1 < records[0]["loss"]


# ---------------------------------------------------------------- what is printed and kept


def test_a_record_is_the_mean_over_images_not_over_steps(each_backend, tmp_path):
    """As the lineage reports it. Without learning the mean over an epoch is the loss of all the images."""
    model = nn.Linear(3, 1, rng=Rng(1))
    optimizer = SGD(model.parameters(), lr=0.0)
    loss = lambda x, y, rng, sample_offset: ops.square(model(x) - y).mean()  # noqa: E731
    run = train(model, loss, (X, Y), optimizer, epochs=2, batch_size=BATCH, out=tmp_path, stream=io.StringIO())
    weight, bias = model.weight.numpy(), model.bias.numpy()
    expected = float(((X @ weight + bias - Y) ** 2).mean())
    for epoch, record in enumerate(log_of(tmp_path)):
        assert record["loss"] == pytest.approx(expected, rel=1e-6)
        assert (record["epoch"], record["step"], record["images"], record["lr"]) == (epoch, 3 * (epoch + 1), N, 0.0)
    assert run.records == log_of(tmp_path) and record["seconds"] >= 0


def test_log_every_and_save_every_count_steps(tmp_path):
    seen = []

    def look(run):
        kept = tmp_path / "checkpoint.npz"
        seen.append((run.step, saving.load(kept)["run"]["step"] if kept.exists() else None))

    run = Task(tmp_path).train(log_every=2, save_every=5, on_record=look)
    assert [r["step"] for r in run.records] == [2, 4, 6, 8, 10, 12] and [r["images"] for r in run.records] == [
        8,
        6,
        6,
        8,
        6,
        6,
    ]
    assert [r["epoch"] for r in run.records] == [0, 1, 1, 2, 3, 3]
    assert seen == [(2, 0), (4, 0), (6, 5), (8, 5), (10, 5), (12, 10)]
    assert saving.load(tmp_path / "checkpoint.npz")["run"]["step"] == 12


def test_the_last_record_is_at_the_end_whatever_log_every_is(tmp_path):
    run = Task(tmp_path).train(log_every=5)
    assert [(r["step"], r["images"]) for r in run.records] == [(5, 18), (10, 16), (12, 6)]
    assert sum(r["images"] for r in run.records) == 4 * N


def test_the_schedule_is_of_the_epoch_or_the_step_and_does_not_pile_up():
    task = Task()
    run = task.train(epochs=3, schedule=lambda epoch: 0.5**epoch)
    assert [r["lr"] for r in run.records] == pytest.approx([0.05, 0.025, 0.0125])
    assert task.optimizer.lr == 0.05
    run = task.train(epochs=2, schedule=lambda step: 1 / (1 + step), schedule_by="step")
    assert [r["lr"] for r in run.records] == pytest.approx([0.05 / 3, 0.05 / 6])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [True, False])
def test_progress(numpy_backend, monkeypatch, live):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    task = Task(at=lambda calls: now.__setitem__(0, now[0] + 2.0))  # each step takes 2 s
    task.stream = Terminal() if live else io.StringIO()
    task.train(epochs=20, reference={1: 300.0})
    text = task.stream.getvalue()
    lines = [line.rstrip() for line in text.replace("\r", "\n").split("\n")]
    records = [line for line in lines if " lr " in line]
    steps = [line for line in lines if "images/s" in line and " lr " not in line]
    assert (
        len(records) == 20
        and records[0].startswith("epoch 0  step 3  loss ")
        and records[0].endswith("lr 0.05  2 images/s  1:54 left")
    )
    assert "(published 300)" in records[1] and "published" not in records[0] + records[2]
    assert len(steps) == (60 if live else 3)  # 120 s: all, or one in half a minute
    assert steps[0].startswith("epoch 0  batch 1/3  loss now " if live else "epoch 5  batch 1/3  loss now ")
    assert ("\r" in text) == live and text.endswith("\n")


def test_pictures_and_saving_are_not_training_time(numpy_backend, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    tick = lambda seconds: now.__setitem__(0, now[0] + seconds)  # noqa: E731
    run = Task(at=lambda calls: tick(2.0)).train(on_record=lambda run: tick(1000.0))
    assert run.seconds == pytest.approx(24)


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert training_log.clock(seconds) == text


# ---------------------------------------------------------------- errors


def test_a_loss_that_is_not_finite_names_the_step(each_backend, tmp_path):
    task = Task(tmp_path)

    def poison():
        task.model.weight.data = task.model.weight.data * float("nan")

    task.at = call_at(7, poison)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7 \(epoch 2\).*detect_anomaly"):
        task.train()
    state = saving.load(tmp_path / "checkpoint.npz")
    assert state["run"]["step"] == 6 and np.isfinite(state["model"]["weight"]).all()


def end_of_an_iterator(*args, **options):
    return next(iter(()))


class Stuck:
    """An average whose update is interrupted."""

    def update(self):
        raise KeyboardInterrupt

    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    "error, options",
    [
        (FloatingPointError, {"loss": lambda x, y, rng, sample_offset: tensor(float("nan"), requires_grad=True) * 1}),
        (KeyError, {"on_record": lambda run: {}["x"]}),
        (KeyboardInterrupt, {"ema": Stuck()}),
        (RuntimeError, {"on_record": end_of_an_iterator}),  # which says what to call
        (StopIteration, {"schedule": end_of_an_iterator}),
        (RuntimeError, {"loss": end_of_an_iterator}),
        (ValueError, {"schedule": lambda epoch: 0.5 if epoch == 0 else None}),
        (ZeroDivisionError, {"schedule": lambda epoch: 0.5 if epoch == 0 else 1 / 0}),
        (None, {"on_record": lambda run: interrupt()}),  # ends the run, and saves
        (None, {}),
    ],
)
def test_after_any_way_out_the_learning_rate_is_as_it_was(tmp_path, error, options):
    """And no end of an iterator ends the loop in silence."""
    task, options = Task(tmp_path), {"schedule": lambda epoch: 0.5} | options
    task.loss = options.pop("loss", task.loss)
    task.optimizer.lr = np.float64(0.05)
    with pytest.raises(error) if error else contextlib.nullcontext():
        task.train(**options)
    assert type(task.optimizer.lr) is float and task.optimizer.lr == 0.05


def test_after_a_resume_that_was_refused_the_learning_rate_is_as_it_was(tmp_path):
    Task(tmp_path).train(epochs=1, schedule=lambda epoch: 0.5)
    task = Task(tmp_path)
    task.ema = EMA(nn.Linear(2, 1, rng=0))  # its state does not fit; that of the optimiser does
    with pytest.raises(CannotResume, match="its ema is of another run"):
        task.train(resume=True)
    assert task.optimizer.lr == 0.05 and task.optimizer.counts == [0, 0]


def test_a_run_that_ended_before_its_first_step_is_not_kept(tmp_path):
    Task(tmp_path).train(epochs=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            Task(tmp_path).train(schedule=lambda epoch: 1 / 0)
    assert sorted(p.name for p in tmp_path.glob("previous*")) == ["previous-1-checkpoint.npz", "previous-1-log.jsonl"]


def test_what_a_resumed_run_would_lose_is_an_error(tmp_path):
    Task(tmp_path).train(epochs=1)
    task = Task(tmp_path)
    task.ema = None
    with pytest.raises(CannotResume, match="has ema, which this run has not, and would lose"):
        task.train(resume=True)


@pytest.mark.parametrize("factor", [None, "1", float("nan"), np.ones(2)])
def test_a_schedule_that_gives_no_number_is_quoted(factor):
    with pytest.raises(ValueError, match=re.escape(f"schedule(0) must be a number in (-inf, inf), not {factor!r}")):
        Task().train(schedule=lambda epoch: factor)


def test_the_advice_of_that_error_works():
    task = Task()
    task.model.weight.data = task.model.weight.data * float("nan")
    with detect_anomaly(), pytest.raises(FloatingPointError, match="linear .* NaN"):
        task.train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": (X, Y[:9])}, r"the data must be arrays of one length, not \[10, 9\]"),
        ({"data": ()}, "the data must be arrays of one length, not no arrays at all"),
        ({"data": (X[:0], Y[:0])}, r"the data is empty: its arrays have shapes \[\(0, 3\), \(0, 1\)\]"),
        ({"epochs": 0}, "epochs must be an integer of 1 or more, not 0"),
        ({"epochs": 2.5}, "epochs .* not 2.5"),
        ({"epochs": float("nan")}, "epochs .* not nan"),
        ({"microbatch": 0}, "microbatch must be an integer of 1 or more, not 0"),
        ({"microbatch": 1.5}, "microbatch .* not 1.5"),
        ({"threads": -1}, "threads must be an integer of 1 or more, not -1"),
        ({"threads": 1.5}, "threads .* not 1.5"),
        ({"log_every": 1.5}, "log_every must be an integer of 1 or more, not 1.5"),
        ({"save_every": 1.5}, "save_every must be an integer of 1 or more, not 1.5"),
        ({"seed": 1.5}, "seed must be an integer .* not 1.5"),
        ({"reference": {0: "1"}}, r"reference\[0\] must be a number .* not '1'"),
        ({"schedule_by": "day"}, "schedule_by must be 'epoch' or 'step', not 'day'"),
        ({"batch_size": 0}, "batch_size must be an integer of 1 or more, not 0"),
        ({"batch_size": 2.5}, "batch_size .* not 2.5"),
        ({"resume": True}, "resume needs `out`"),
    ],
)
def test_bad_arguments_are_quoted(options, message):
    with pytest.raises(ValueError, match=message):
        Task().train(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": None}, "the data must be arrays, not NoneType: None"),
        ({"data": (X, 5)}, "the data must be arrays with an axis of samples, not int: 5"),
        ({"data": {"x": X}}, "the data must be arrays with an axis of samples, not str: 'x'"),
        ({"on_record": 5}, "on_record must be a function of the TrainState, not 5"),
    ],
)
def test_arguments_of_the_wrong_kind_are_quoted(tmp_path, options, message):
    with pytest.raises(TypeError, match=message):
        Task(tmp_path).train(**options)
    assert list(tmp_path.iterdir()) == []


def test_data_may_be_one_array_or_come_from_an_iterator():
    results = []
    for data in ((X,), X, iter([X]), [X.tolist()]):
        task = Task()
        task.loss = lambda x, rng, sample_offset, task=task: ops.square(task.model(x.astype("float32"))).mean()
        task.train(data=data)
        results.append(task.weights().tobytes())
    assert len(set(results)) == 1


def test_without_stderr_nothing_is_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    for at in (lambda calls: None, call_at(4, lambda: signal.raise_signal(signal.SIGINT))):
        run = Task(tmp_path, at).train(stream=None)
    assert not run.finished and run.step == 5


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume: there is no .*checkpoint.npz$"):
        Task(tmp_path).train(resume=True)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Task(tmp_path, ema=False).train(epochs=1)
    with pytest.raises(CannotResume, match="is of another run: it has batch_size 4, not 5, seed 0, not 3"):
        Task(tmp_path, ema=False).train(batch_size=5, seed=3, resume=True)
    with pytest.raises(CannotResume, match="has no ema"):
        Task(tmp_path, ema=True).train(resume=True)
    other = Task(tmp_path, ema=False)
    other.model = nn.Linear(2, 1, rng=0)
    with pytest.raises(
        CannotResume, match="checkpoint.npz: its model is of another run: this state does not fit Linear"
    ):
        other.train(resume=True)
    (tmp_path / "checkpoint.npz").write_bytes(b"PK")
    with pytest.raises(CannotResume, match="is no checkpoint of tinydiff"):
        Task(tmp_path, ema=False).train(resume=True)


def damaged(**changes):
    """A change of a checkpoint: some of its entries are others, or (None) gone."""

    def change(saved):
        for path, value in changes.items():
            *parts, name = path.split("__")
            inside = saved
            for part in parts:
                inside = inside[part]
            if value is None:
                del inside[name]
            else:
                inside[name] = value

    return change


CHANGES = [
    (damaged(settings=None), "has no settings"),
    (damaged(run=None), "has no run"),
    (damaged(settings=None, run=None, ema=None, optimizer=None), "has no settings, run, optimizer, ema"),
    (damaged(settings=[1]), "is of another run: it has images None, not 10"),
    (damaged(settings__seed=0.0), "is of another run: it has seed 0.0, not 0"),
    (damaged(settings__seed=np.zeros(3)), "is of another run: it has seed array"),
    (damaged(run=5), "of another version, .* not 5"),
    (damaged(run__images=None), "of another version, or it is no run of train: its progress must have"),
    (damaged(run__other=1), "of another version, or it is no run of train: its progress must have .*'other'"),
    (damaged(run__step="3"), "its step must be an integer of 0 or more, not '3'"),
    (damaged(run__step=-1), "its step .* not -1"),
    (damaged(run__seconds="x"), "its seconds must be a number .* not 'x'"),
    (damaged(run__records={"a": 1}), "its records must be a list of dicts, not {'a': 1}"),
    (damaged(run__records=[1]), r"its records must be a list of dicts, not \[1\]"),
    (damaged(model=5), "its model is of another run: "),
    (damaged(model__weight=None), "its model is of another run: .*missing"),
    (damaged(model__weight={"a": 1}), "its model is of another run: "),
    (damaged(model__bias=np.array(["x"])), "its model is of another run: "),
    (damaged(optimizer=[1]), "its optimizer is of another run: "),
    (damaged(optimizer__lr="fast"), "its optimizer is of another run: "),
    (damaged(optimizer__counts=[1, None]), "its optimizer is of another run: "),
    (damaged(optimizer__state__1=None), "its optimizer is of another run: "),
    (damaged(ema=[]), "its ema is of another run: "),
    (damaged(ema__averages=None), "its ema is of another run: .* it has no averages"),
    (damaged(ema__updates="x"), "its ema is of another run: "),
    (damaged(ema__averages__weight=np.zeros(2)), "its ema is of another run: "),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[message for _, message in CHANGES])
def test_a_checkpoint_of_another_kind_is_refused_and_nothing_is_changed(each_backend, tmp_path, change, message):
    Task(tmp_path).train(epochs=2, schedule=lambda epoch: 0.5)
    saved = saving.load(tmp_path / "checkpoint.npz")
    change(saved)
    saving.save(tmp_path / "checkpoint.npz", saved)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Task(tmp_path)
    other.train(epochs=1, out=None, seed=5)  # a state of its own
    before = state_of(other)
    with pytest.raises(CannotResume, match=f"checkpoint.npz.*{message}"):
        other.train(resume=True)
    assert state_of(other) == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def state_of(task):
    parts = (part.state_dict() for part in (task.model, task.optimizer, task.ema))
    return json.dumps(list(parts), default=lambda a: backend.to_host(a).tolist())


def test_a_state_of_another_optimiser_is_refused(tmp_path):
    Task(tmp_path).train(epochs=1)
    other = Task(tmp_path, optimizer=SGD)
    before = other.weights()
    with pytest.raises(
        CannotResume, match="checkpoint.npz: its optimizer is of another run: this state does not fit SGD"
    ):
        other.train(resume=True)
    assert before.tobytes() == other.weights().tobytes()


def test_a_log_that_cannot_be_written_is_an_error_before_anything_is_changed(tmp_path, monkeypatch):
    Task(tmp_path).train(epochs=1)
    other = Task(tmp_path)
    before = other.weights()

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(saving, "write_atomically", denied)
    with pytest.raises(PermissionError):
        other.train(resume=True)
    assert before.tobytes() == other.weights().tobytes()
