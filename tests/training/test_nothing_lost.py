"""A run of training loses nothing: not by a NaN, a signal, a full disk, a second run, or a pipe that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_training import N, Task, X, Y, log_of

from tinydiff import Rng, nn, ops, saving, tensor, training_files
from tinydiff.distributed import Ranks
from tinydiff.files import InUse, one_at_a_time
from tinydiff.optim import SGD, Adam
from tinydiff.training import CannotResume, train

ROOT = Path(__file__).parents[2]
EMULATED = importlib.util.find_spec("cupy_on_cpu") is not None
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pipes as POSIX has them")


def checkpoint(out, name="checkpoint.npz"):
    return saving.load(out / name)


def poisoned(task, *calls, spoil=lambda task, value: value * float("nan")):
    """The task with a loss that is spoiled at these calls."""
    loss = task.loss

    def other(x, y, rng, sample_offset):
        call = task.calls
        value = loss(x, y, rng, sample_offset)
        return spoil(task, value) if call in calls else value

    task.loss = other
    return task


def nan_gradient(task, value):
    """The value, and a gradient of NaN: the trap of log(0) behind `where`."""
    zero = tensor(np.zeros((), "float32")) * ops.sum(task.model.weight)
    return value + ops.where(tensor(np.array(False)), ops.log(zero), zero)


# ---------------------------------------------------------------- what is not finite


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_a_finite_loss_with_a_gradient_of_nan_never_touches_the_weights(each_backend, tmp_path):
    good, task = Task(ema=False), Task(tmp_path, ema=False)
    good.train(epochs=1)  # three steps
    poisoned(task, 3, 4, spoil=nan_gradient)  # at the fourth, and when that is looked at again
    with pytest.raises(FloatingPointError) as found:
        task.train(save_every=1)
    said = str(found.value)
    assert "a gradient is not finite at step 3 (epoch 1): log made Inf" in said and "test_nothing_lost.py" in said
    assert "ops.log(zero)" in said and "found by detect_anomaly on the same batch" in said
    assert task.weights().tobytes() == good.weights().tobytes() and task.optimizer.counts == [3, 3]
    assert checkpoint(tmp_path)["run"]["step"] == 3 and not saving.not_finite(checkpoint(tmp_path)["model"])


def test_what_was_learned_before_a_loss_of_nan_is_saved(each_backend, tmp_path):
    task = poisoned(Task(tmp_path), 7, 8)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7 \(epoch 2\): multiply passed on NaN"):
        task.train()
    assert checkpoint(tmp_path)["run"]["step"] == 7
    assert len(log_of(tmp_path)) == 2
    again = Task(tmp_path)
    assert again.train(resume=True).step == 12 and again.calls == 5


def test_a_step_that_is_skipped_leaves_everything_as_it_was_and_counts(each_backend, tmp_path):
    task = poisoned(Task(tmp_path), 4, 5)  # step 4, and the look at it
    run = task.train(nonfinite="skip")
    assert run.finished and run.step == 12 and task.optimizer.counts == [11, 11]
    assert "the loss is nan at step 4 (epoch 1): multiply passed on NaN" in task.stream.getvalue()
    assert "This step is skipped" in task.stream.getvalue()
    assert [record.get("skipped", 0) for record in log_of(tmp_path)] == [0, 4, 0, 0]
    assert [record["images"] for record in log_of(tmp_path)] == [10, 6, 10, 10]

    def hand():
        """The same run without that step."""
        plain = Task()
        steps = []
        loss, plain.loss = plain.loss, lambda *batch, **options: steps.append(0) or loss(*batch, **options)
        step = plain.optimizer.step
        plain.optimizer.step = lambda: step() if len(steps) != 5 else None
        update = plain.ema.update
        plain.ema.update = lambda: update() if len(steps) != 5 else None
        plain.train()
        return plain

    assert task.weights().tobytes() == hand().weights().tobytes()


def test_a_run_that_skips_resumes_as_if_nothing_had_happened(tmp_path):
    """Also from the middle of an epoch in which a step was skipped."""
    whole = poisoned(Task(tmp_path / "whole"), 4, 5)
    whole.train(nonfinite="skip")
    first = poisoned(Task(tmp_path / "parts", lambda calls: calls == 5 and signal.raise_signal(signal.SIGINT)), 4, 5)
    assert first.train(nonfinite="skip").step == 5
    state = checkpoint(tmp_path / "parts")["run"]
    second = Task(tmp_path / "parts")
    assert second.train(resume=True, nonfinite="skip").finished
    assert whole.weights().tobytes() == second.weights().tobytes()
    strip = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
    assert strip(log_of(tmp_path / "parts")) == strip(log_of(tmp_path / "whole"))
    assert (state["step"], state["images"], state["skipped"]) == (5, 4, 4)


def test_after_a_stated_number_of_such_steps_it_gives_up(tmp_path):
    task = poisoned(Task(tmp_path), *range(3, 99))
    with pytest.raises(FloatingPointError, match=r"at step 6 .* This is number 4, and 3 are borne"):
        task.train(nonfinite="skip", most_nonfinite=3)
    assert checkpoint(tmp_path)["run"]["step"] == 6 and task.optimizer.counts == [3, 3]


def test_an_epoch_of_skipped_steps_has_no_record(tmp_path):
    run = poisoned(Task(tmp_path), *range(3, 9)).train(nonfinite="skip", epochs=3)
    assert run.finished and [(r["step"], r["images"], r.get("skipped")) for r in run.records] == [
        (3, 10, None),
        (9, 10, 10),
    ]


def test_a_resumed_run_that_only_skips_ends_all_the_same(tmp_path):
    """Its record has images of the run before, and it has no speed of its own."""
    stopped = Task(tmp_path, lambda calls: calls == 4 and signal.raise_signal(signal.SIGINT))
    assert stopped.train().step == 5
    task = poisoned(Task(tmp_path), 0, 1)  # step 5, and the look at it
    run = task.train(epochs=2, resume=True, nonfinite="skip")
    assert run.finished and [(r["step"], r["images"], r.get("skipped")) for r in run.records] == [
        (3, 10, None),
        (6, 8, 2),
    ]


def test_rolling_back_goes_on_from_the_last_good_weights(each_backend, tmp_path):
    """The weights are spoiled without being NaN: every loss is. Only older weights help."""
    task = Task(tmp_path)

    def spoil(calls):
        if calls == 5:
            task.model.weight.data = task.model.weight.data * 1e38

    task.at = spoil
    with np.errstate(all="ignore"):
        run = task.train(nonfinite="rollback", most_nonfinite=1)
    assert run.finished and task.optimizer.counts == [12 - 3] * 2  # steps 3, 4 and 5 are lost
    assert "Rolled back to the weights of step 3; the batches since then are left out" in task.stream.getvalue()
    assert run.records[-1]["loss"] < 100
    saved = checkpoint(tmp_path)
    assert saved["run"]["step"] == 12 and Task(tmp_path).train(resume=True).finished


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path):
    """A finite gradient, and a learning rate that is too large; after the last step nobody looks at a loss."""
    task = Task(tmp_path, optimizer=SGD, ema=False)
    schedule = lambda step: 1.0 if step < 11 else 1e40  # noqa: E731
    with pytest.raises(FloatingPointError, match="step 12 is not saved, because model/weight has (Inf|NaN)"):
        task.train(schedule=schedule, schedule_by="step")
    assert checkpoint(tmp_path)["run"]["step"] == 9 and not checkpoint(tmp_path)["run"]["finished"]
    for save_every in (None, 5):  # 5: at the last step no checkpoint is due
        task = Task(tmp_path, optimizer=SGD, ema=False)
        options = {"schedule": schedule, "schedule_by": "step", "save_every": save_every}
        run = task.train(**options, nonfinite="rollback")
        assert run.finished and not saving.not_finite(checkpoint(tmp_path))


class Stateful(nn.Module):
    def __init__(self):
        self.layer, self.norm, self.drop = nn.Linear(3, 4, rng=Rng(1)), nn.BatchNorm2d(4), nn.Dropout(0.5, rng=Rng(2))
        self.end = nn.Linear(4, 1, rng=Rng(3))

    def forward(self, x):
        y = self.norm(self.layer(x).reshape(len(x), 1, 1, 4))
        return self.end(self.drop(y.reshape(len(x), 4)))


def test_statistics_and_masks_are_those_before_the_step_that_failed(each_backend, tmp_path):
    data = X.copy()
    data[5] = np.nan  # so the running mean would be NaN for good
    model, seen = Stateful(), []

    def loss(x, y, rng, sample_offset):
        seen.append(model.drop.rng.step)
        return ops.square(model(x) - y).mean()

    optimizer = Adam(model.parameters())
    run = train(model, loss, (data, Y), optimizer, epochs=2, batch_size=2, nonfinite="skip", stream=io.StringIO(),
                out=tmp_path)  # fmt: skip
    assert run.finished and optimizer.counts == [8] * 6 and not saving.not_finite(model.state_dict())
    # Eight steps drew a mask each; the two others, and the looks at them, began where the next step began.
    assert len(seen) == 10 + 2 and max(seen) <= 8 and sum(seen.count(step) - 1 for step in set(seen)) >= 3


def test_looking_late_still_saves_nothing_spoiled(tmp_path):
    task = poisoned(Task(tmp_path), 4)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4 \(epoch 1\).*detect_anomaly"):
        task.train(nonfinite="late")
    assert checkpoint(tmp_path)["run"]["step"] == 3 and not saving.not_finite(checkpoint(tmp_path))


@pytest.mark.parametrize("error", [KeyError("a bug"), asyncio.CancelledError()], ids=repr)
def test_an_error_in_the_loss_or_a_picture_costs_no_step(tmp_path, error):
    def broken(calls):
        if calls == 5:
            raise error

    with pytest.raises(type(error)):
        Task(tmp_path, broken).train()
    assert checkpoint(tmp_path)["run"]["step"] == 5
    whole, second = Task(), Task(tmp_path)
    whole.train()
    second.train(resume=True)
    assert whole.weights().tobytes() == second.weights().tobytes()


def test_stop_iteration_in_a_picture_is_told_what_to_call(tmp_path):
    with pytest.raises(RuntimeError, match=r"state\.stop\('why'\) in it ends the run"):
        Task(tmp_path).train(on_record=lambda run: next(iter([])))


def test_sys_exit_in_a_picture_costs_no_step(tmp_path):
    with pytest.raises(SystemExit):
        Task(tmp_path).train(save_every=100, on_record=lambda run: run.step == 6 and sys.exit(3))
    assert checkpoint(tmp_path)["run"]["step"] == 6


@pytest.mark.parametrize("added, message", [({"seen": {1, 2}}, "which cannot be"), ({"val/loss": 1.0}, "'val/loss'")])
def test_a_record_that_cannot_be_saved_costs_no_step(tmp_path, added, message):
    """What on_record added is left out of it: it would stand in the way of every later checkpoint."""
    with pytest.raises(TypeError, match=message):
        Task(tmp_path).train(on_record=lambda run: run.step == 6 and run.records[-1].update(added))
    assert checkpoint(tmp_path)["run"]["step"] == 6
    assert [record["step"] for record in log_of(tmp_path)] == [3, 6] and not added.keys() & log_of(tmp_path)[1].keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"nonfinite": "ignore"}, "nonfinite must be one of stop, skip, rollback, late, not 'ignore'"),
        ({"nonfinite": "rollback", "out": None}, "nonfinite='rollback' needs `out`"),
        ({"nonfinite": "skip", "capture": True}, "a captured step cannot look at itself"),
        ({"most_nonfinite": -1}, "most_nonfinite must be an integer of 0 or more, not -1"),
        ({"keep": 0}, "keep must be an integer of 1 or more, not 0"),
    ],
)
def test_bad_arguments_are_quoted(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Task(tmp_path).train(**options)


# ---------------------------------------------------------------- several checkpoints


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    losses = iter([5.0, 1.0, 3.0, 4.0])
    task = Task(tmp_path)
    task.loss = lambda x, y, rng, sample_offset: ops.sum(task.model.weight) * 0 + values[0]
    values = [next(losses)]
    run = task.train(keep=3, keep_best=True, batch_size=N, on_record=lambda run: values.insert(0, next(losses, 0.0)))
    assert run.finished
    names = ["best.npz", "checkpoint-2.npz", "checkpoint-3.npz", "checkpoint.npz", "log.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    steps = [checkpoint(tmp_path, name)["run"]["step"] for name in names[:4]]
    assert steps == [2, 2, 3, 4]
    worse = Task(tmp_path)  # resumed, it still knows how good the best one was
    worse.loss = lambda x, y, rng, sample_offset: ops.sum(worse.model.weight) * 0 + 2.0
    worse.train(keep=3, keep_best=True, batch_size=N, epochs=6, resume=True)
    assert checkpoint(tmp_path, "best.npz")["run"]["step"] == 2
    Task(tmp_path).train(epochs=1)  # a new run sets all of them aside
    assert sorted(p.name for p in tmp_path.glob("[bcl]*")) == ["checkpoint.npz", "log.jsonl"]
    assert len(list(tmp_path.glob("previous-1-*"))) == 5


@posix
def test_checkpoints_on_another_disk_behind_a_link_are_kept_too(tmp_path):
    """A second name is one of the file, not of the link, which would lead to the newest checkpoint for ever."""
    Task(tmp_path).train(epochs=1)
    (tmp_path / "large disk").mkdir()
    os.replace(tmp_path / "checkpoint.npz", tmp_path / "large disk/x.npz")
    (tmp_path / "checkpoint.npz").symlink_to(tmp_path / "large disk/x.npz")
    task = Task(tmp_path)
    run = task.train(epochs=4, keep=2, keep_best=True, resume=True)
    assert (tmp_path / "checkpoint.npz").is_symlink() and checkpoint(tmp_path)["run"]["step"] == 12
    assert checkpoint(tmp_path, "checkpoint-9.npz")["run"]["step"] == 9
    best = min(run.records[1:], key=lambda record: record["loss"])
    assert checkpoint(tmp_path, "best.npz")["run"]["step"] == best["step"]


def test_a_run_that_keeps_one_checkpoint_removes_no_other(tmp_path):
    """They are copies of the user's own, or of a run that kept more."""
    Task(tmp_path).train(epochs=2, keep=2)
    Task(tmp_path).train(epochs=4, resume=True)
    assert checkpoint(tmp_path, "checkpoint-3.npz")["run"]["step"] == 3


# ---------------------------------------------------------------- signals

PROGRAM = """
import os, sys, time, numpy as np
from tinydiff import nn, ops, Tensor
from tinydiff.optim import Adam
from tinydiff.training import train
net, x = nn.Linear(4, 4, rng=0), np.ones((32, 4), 'f4')
def loss(b, *, rng, sample_offset):
    {inside}
    return ops.mean(ops.square(net(Tensor(b))))
run = train(net, loss, (x,), Adam(net.parameters()), epochs=10**5, batch_size=4, out={out!r},
            save_every=10**9, {options})
sys.exit(run.exit_code)
"""


def started(out, inside="pass", options="log_every=10**9", number=signal.SIGINT, **streams):
    """The program, after some steps. Where CuPy is emulated, one that will get a SIGINT runs on NumPy: the emulator
    takes that within a kernel, and raises KeyboardInterrupt in the middle of an update, as no GPU does."""
    code = PROGRAM.format(out=str(out), inside=f"open({str(out / 'going')!r}, 'a').close(); {inside}", options=options)
    environment = {**os.environ, "TINYDIFF_BACKEND": "numpy"} if number == signal.SIGINT and EMULATED else None
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, **streams)
    until = time.monotonic() + 30
    while not (out / "going").exists():
        assert time.monotonic() < until and program.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)
    return program


@posix
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, number, code):
    program = started(tmp_path, number=number, stderr=subprocess.PIPE)
    program.send_signal(number)
    _, said = program.communicate(timeout=30)
    assert program.returncode == code, said
    step = checkpoint(tmp_path)["run"]["step"]
    assert step > 0 and f"interrupted after step {step}" in said and f"{number.name}: this step is finished" in said


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_the_saved_file_is_good(tmp_path, number):
    program = started(tmp_path, inside="time.sleep(20)", number=number, stderr=subprocess.PIPE)
    program.send_signal(number)
    time.sleep(0.3)
    began = time.monotonic()
    program.send_signal(number)
    program.communicate(timeout=15)
    assert time.monotonic() - began < 10
    assert program.returncode in (-number, 128 + number, 1)  # 1: KeyboardInterrupt with its traceback
    assert checkpoint(tmp_path)["run"]["step"] == 0


def test_signals_that_are_ignored_stay_so_and_handlers_come_back(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run = Task(at=lambda calls: signal.raise_signal(signal.SIGTERM)).train(epochs=1)
        assert run.finished and run.exit_code == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    run = Task(at=lambda calls: calls == 2 and signal.raise_signal(signal.SIGTERM)).train()
    assert (run.step, run.signal, run.exit_code) == (3, signal.SIGTERM, 143)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_comes_while_the_loop_asks_for_one_is_not_lost():
    class Late(Ranks):
        asked = 0

        def gather(self, value):
            if isinstance(value, tuple):  # the signal, and what on_record asked for: both are read by now
                self.asked += 1
                if self.asked == 2:
                    signal.raise_signal(signal.SIGTERM)
            return [value]

    run = Task().train(ranks=Late())
    assert (run.step, run.exit_code) == (2, 143)


@posix
def test_a_pipe_that_nobody_reads_holds_up_nothing(tmp_path):
    """As in `train.py 2>&1 | less`: the steps go on, and a signal still saves."""
    read, write = os.pipe()
    options = f"log_every=1, stream=os.fdopen({write}, 'w', buffering=1)"
    program = started(tmp_path, options=options, number=signal.SIGTERM, pass_fds=[write], stderr=subprocess.PIPE)
    os.close(write)
    log, until = tmp_path / "log.jsonl", time.monotonic() + 30
    while log.stat().st_size < 200_000 and time.monotonic() < until:  # lines of which 64 kB fit into the pipe
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    _, said = program.communicate(timeout=30)
    os.close(read)
    assert program.returncode == 143 and not said, said
    assert checkpoint(tmp_path)["run"]["step"] == len(log_of(tmp_path)) > 700


@posix
def test_a_terminal_that_hangs_holds_up_nothing(tmp_path):
    """As an ssh whose network is gone: it says that it takes a byte, and a line then waits."""
    terminal, end = os.openpty()
    options = f"log_every=1, stream=os.fdopen({end}, 'w', buffering=1)"
    program = started(tmp_path, options=options, number=signal.SIGTERM, pass_fds=[end], stderr=subprocess.PIPE)
    os.close(end)
    log, until = tmp_path / "log.jsonl", time.monotonic() + 30
    while log.stat().st_size < 200_000 and time.monotonic() < until:
        time.sleep(0.05)
    program.send_signal(signal.SIGTERM)
    _, said = program.communicate(timeout=30)
    os.close(terminal)
    assert program.returncode == 143 and not said, said
    assert checkpoint(tmp_path)["run"]["step"] == len(log_of(tmp_path)) > 700


def test_pictures_that_cannot_be_written_end_nothing(tmp_path):
    """As on a full disk. It is said once."""

    def draw(state):
        raise OSError(errno.ENOSPC, "No space left on device", "loss.png")

    task = Task(tmp_path)
    assert task.train(on_record=draw).finished
    assert task.stream.getvalue().count("on_record: [Errno 28] No space left on device: 'loss.png'; the training") == 1
    assert len(log_of(tmp_path)) == 4


def test_on_record_adds_to_the_record_and_changes_nothing_else(tmp_path):
    def change(state):
        state.records[-1].update(loss="x", fid=float("nan"), pair=np.array([1.0, np.inf]))

    task = Task(tmp_path)
    assert task.train(on_record=change, epochs=2).finished
    lines = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    record = log_of(tmp_path)[-1]
    assert record["loss"] > 0 and record["fid"] is None and record["pair"] == [1.0, None]
    assert Task(tmp_path).train(resume=True, epochs=3).finished  # what was saved can be gone on with
    with pytest.raises(ValueError, match="on_record has taken away or put in records"):
        Task(tmp_path).train(on_record=lambda state: state.records.clear(), epochs=2)
    assert Task(tmp_path).train(resume=True, epochs=2).finished


def test_a_reader_that_is_gone_ends_nothing(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stream:
        assert Task(tmp_path).train(stream=stream).finished
        with contextlib.suppress(OSError):
            stream.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # so that it can be closed


# ---------------------------------------------------------------- one run per directory


@posix
def test_a_forked_child_neither_gives_back_nor_keeps_the_lock(tmp_path):
    """Neither if it leaves by the way that its parent will leave, nor if it lives longer."""
    program = f"""
import os, sys, time
from tinydiff.files import one_at_a_time
with one_at_a_time({str(tmp_path / "lock")!r}, "the directory"):
    if os.fork() == 0:
        sys.exit()          # by the `finally` of its parent
    os.wait()
    assert os.path.exists({str(tmp_path / "lock")!r})
    if os.fork() == 0:
        os.close(0), os.close(1), os.close(2)
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    with one_at_a_time(tmp_path / "lock", "the directory"):
        pass


def test_two_runs_in_one_directory_are_refused(tmp_path):
    pytest.importorskip("fcntl")
    inside, leave = threading.Event(), threading.Event()
    first = Task(tmp_path, lambda calls: calls == 4 and (inside.set(), leave.wait(20)))
    thread = threading.Thread(target=first.train)
    thread.start()
    assert inside.wait(20)
    for resume in (False, True):
        with pytest.raises(InUse, match=f"the directory .* is in use by process {os.getpid()}"):
            Task(tmp_path).train(resume=resume)
    leave.set()
    thread.join()
    assert [record["step"] for record in log_of(tmp_path)] == [3, 6, 9, 12]
    (tmp_path / "run.lock").write_text("999999999\n")  # as a run leaves it that was killed
    assert Task(tmp_path).train(resume=True).finished and not (tmp_path / "run.lock").exists()


@posix
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_killed_run_left_is_gone_when_the_next_one_has_started(tmp_path, elsewhere):
    """Also if nothing is left to train, so that no checkpoint is written; and beside a checkpoint behind a link."""
    pytest.importorskip("fcntl")
    out = tmp_path / "run"
    Task(out).train()
    beside = tmp_path / "large disk" if elsewhere else out
    if elsewhere:
        beside.mkdir()
        os.replace(out / "checkpoint.npz", beside / "x.npz")
        (out / "checkpoint.npz").symlink_to(beside / "x.npz")
    litter = [beside / f"{'x' if elsewhere else 'checkpoint'}.npz.abcd_123.part", out / "best.npz.linking.part",
              out / "log.jsonl.abcd_123.part", out / "starting-checkpoint.npz.abcd_123.part"]  # fmt: skip
    for path in litter:
        path.write_text("half")
    mine = out / "a film.mp4.abcd_123.part"
    mine.write_text("not of a run")
    assert Task(out).train(resume=True).finished
    assert not [path for path in litter if path.exists()] and mine.exists()


# ---------------------------------------------------------------- full disks


def full(monkeypatch, when):
    """From now on the disk is full while when() is true."""

    def failing(real):
        def write(path, *args, **options):
            if when():
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, *args, **options)

        return write

    monkeypatch.setattr(saving, "save", failing(saving.save))
    monkeypatch.setattr(training_files, "append_line", failing(training_files.append_line))


def test_a_full_disk_is_said_once_and_everything_is_written_later(tmp_path, monkeypatch):
    task = Task(tmp_path)
    full(monkeypatch, lambda: 4 <= task.calls < 10)
    run = task.train(save_every=1, log_every=1)
    said = task.stream.getvalue()
    assert said.count("cannot be written") == 1 and "No space left on device" in said
    assert said.count("everything that could not be written is written now") == 1
    assert run.finished and run.exit_code == 0 and not run.unsaved
    assert [r["step"] for r in log_of(tmp_path)] == list(range(1, 13))
    assert checkpoint(tmp_path)["run"]["step"] == 12


def test_what_is_missing_at_the_end_is_in_the_exit_code(tmp_path, monkeypatch):
    task = Task(tmp_path)
    full(monkeypatch, lambda: task.calls >= 7)
    run = task.train()
    assert run.finished and run.exit_code == 74 and "checkpoint.npz: [Errno 28]" in run.unsaved
    assert "NOT SAVED, after step 12: " in task.stream.getvalue()
    assert checkpoint(tmp_path)["run"]["step"] == 6 and len(log_of(tmp_path)) == 2, "the last good one is there"


def test_a_new_run_on_a_full_disk_removes_nothing_of_the_older_one(tmp_path, monkeypatch):
    Task(tmp_path).train(keep=3)
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full(monkeypatch, lambda: True)
    with pytest.raises(OSError, match="No space left"):
        Task(tmp_path).train(keep=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == there and "checkpoint-6.npz" in there


def test_what_could_not_be_written_is_tried_again_after_a_minute(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_files.time, "monotonic", lambda: now[0])
    task = Task(tmp_path)
    task.at = lambda calls: (now.__setitem__(0, 25.0 * calls), calls == 7 and look())
    seen = []
    look = lambda: seen.append(checkpoint(tmp_path)["run"]["step"])  # noqa: E731
    full(monkeypatch, lambda: 2 <= task.calls < 6)
    task.train(save_every=4)  # at 4 it failed, at 75 seconds; at 8 is the next; between them a minute passes
    assert seen == [7]


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_a_limit_on_the_size_of_files_cuts_no_line(tmp_path):
    options = "log_every=1, on_record=lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    code = PROGRAM.format(out=str(tmp_path), inside="pass", options=options).replace("10**5", "20")
    program = subprocess.run([sys.executable, "-c", "import resource" + code], cwd=ROOT, capture_output=True, text=True)
    assert program.returncode == 74, program.stderr
    assert program.stderr.count("cannot be written: [Errno 27] File too large") == 1
    text = (tmp_path / "log.jsonl").read_text()
    assert text.endswith("\n") and len(text) > 4000 and all(map(json.loads, text.splitlines()))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_says_what_would_fit(tmp_path, threads):
    task = Task(tmp_path)
    loss = task.loss

    def hungry(x, y, rng, sample_offset):
        if len(x) > 2 and task.calls >= 5:
            raise MemoryError("Unable to allocate 9 GiB")
        return loss(x, y, rng, sample_offset)

    task.loss = hungry
    with pytest.raises(MemoryError) as found:
        task.train(microbatch=8, batch_size=10, threads=threads, epochs=9)
    assert "out of memory (Unable to allocate 9 GiB): the step has 10 samples, " in str(found.value)
    assert "in microbatches of 8. microbatch=2 fits: it was tried" in str(found.value)
    assert checkpoint(tmp_path)["run"]["step"] >= 2
    task.model = nn.Sequential(nn.Dropout(0.1), task.model)
    with pytest.raises(MemoryError, match="a layer that needs the whole batch: choose a smaller batch_size"):
        task.train(batch_size=10, epochs=9, out=None)


# ---------------------------------------------------------------- a resume that is refused


def changed(path, value):
    def change(saved):
        *parts, name = path.split("/")
        for part in parts:
            saved = saved[part]
        saved[name] = value(saved[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (changed("run/step", 10**9), "must have seen .* images since its last record"),
        (changed("run/step", 3), "its records are of the steps"),
        (changed("run/images", 4), "must have seen 0 images since its last record, not 4"),
        (changed("run/loss_sum", float("nan")), "its loss_sum must be a number"),
        (changed("run/seconds", float("inf")), "its seconds must be a number"),
        (changed("run/records", lambda records: records[::-1]), "its records are of the steps"),
        (changed("run/records", lambda records: [{**records[0], "loss": None}, records[1]]), "the loss of a record"),
        (changed("run/records", lambda records: [{"loss": 1.0}] * 2), "the step of a record"),
        (changed("model/weight", np.full((3, 1), np.nan)), "model/weight has NaN"),
        (changed("model/weight", np.full((3, 1), np.inf)), "model/weight has Inf"),
        (changed("model/weight", np.full((3, 1), 1e300)), "model/weight has Inf"),  # as a float32
        (changed("model/weight", np.full((3, 1), 1j)), "its model is of another run"),
        (changed("model/weight", np.full((3, 1), "1.5")), "its model is of another run"),
        (changed("model/weight", np.zeros((3, 1), "M8[s]")), "its model is of another run"),
        (changed("ema/averages/weight", np.full((3, 1), np.nan)), "ema/averages/weight has NaN"),
        (changed("ema/averages/weight", np.full((3, 1), 1j)), "its ema is of another run"),
        (changed("ema/averages/weight", np.full((3, 1), "1")), "its ema is of another run"),
        (changed("ema/updates", -3), "its ema is of another run"),
        (changed("optimizer/lr", float("nan")), "its optimizer is of another run"),
        (changed("optimizer/counts", [0, 0]), "has made no step, but its m is not zero"),
        (changed("optimizer/counts", [-7, 3]), "its optimizer is of another run"),
        (changed("optimizer/state/0/v", np.full((3, 1), np.nan)), "optimizer/state/0/v has NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_crafted_states_are_refused_and_change_nothing(tmp_path, change, message):
    Task(tmp_path).train(epochs=2)
    saved = checkpoint(tmp_path)
    change(saved)
    saving.save(tmp_path / "checkpoint.npz", saved)
    other = Task(tmp_path)
    before = other.weights()
    with pytest.raises(CannotResume, match=f"checkpoint.npz.*{message}"):
        other.train(resume=True)
    assert other.weights().tobytes() == before.tobytes() and other.optimizer.counts == [0, 0]


def test_a_checkpoint_of_the_first_version_is_resumed(tmp_path):
    """It has no count of skipped images, and no checksum of the whole."""
    whole, first = Task(), Task(tmp_path)
    whole.train()
    first.train(epochs=2)
    saved = checkpoint(tmp_path)
    del saved["run"]["skipped"]
    saving.save(tmp_path / "checkpoint.npz", saved)
    with np.load(tmp_path / "checkpoint.npz") as arrays:
        np.savez(tmp_path / "old.npz", **arrays)
    os.replace(tmp_path / "old.npz", tmp_path / "checkpoint.npz")
    second = Task(tmp_path)
    second.train(resume=True)
    assert whole.weights().tobytes() == second.weights().tobytes()
