"""Held-out data, clipping, an early end, and the log read back: right numbers, and the training is none the worse."""

import csv
import json
import signal

import numpy as np
import pytest
from test_nothing_lost import checkpoint, nan_gradient, poisoned
from test_training import DropoutTask, Task, Terminal, X, call_at, log_of, without_time

from tinydiff import Rng, backend, nn, ops, tensor, training_log
from tinydiff.data.batches import Batches
from tinydiff.optim import SGD
from tinydiff.training import TrainState, read_log, train, write_csv
from tinydiff.training_log import Progress

HELD = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
SEEN = HELD @ np.array([[1.0], [-2.0], [0.5]], np.float32)


def arrays(parts):
    return {name: np.array(backend.to_host(a)) for name, a in parts.items()}


# ---------------------------------------------------------------- held-out data


@pytest.mark.parametrize("ema", [True, False])
def test_the_validation_loss_is_that_of_the_averaged_weights_with_the_same_noise(each_backend, tmp_path, ema):
    task, weights = Task(tmp_path, ema=ema), []

    def look(run):
        weights.append(arrays(task.ema.state_dict()["averages"] if ema else task.model.state_dict()))

    run = task.train(validation=(HELD, SEEN), on_record=look, seed=5, microbatch=3)
    noised = HELD + 0.1 * backend.to_host(Rng(5).child("validation").normal(HELD.shape))
    wanted = [np.square(noised @ w["weight"] + w["bias"] - SEEN).mean() for w in weights]
    np.testing.assert_allclose([r["validation"] for r in run.records], wanted, rtol=1e-5)
    assert [r["validation"] for r in log_of(tmp_path)] == [r["validation"] for r in run.records]
    assert wanted[-1] < wanted[0] and f"  validation {wanted[1]:.4g}  lr " in task.stream.getvalue()


def test_training_is_the_same_with_and_without_validation():
    """Of a net, too, that draws from sources of its own in every forward pass."""
    plain = DropoutTask()
    other = DropoutTask(like=plain)
    other.model.drop[0].eval()
    plain.model.drop[0].eval()
    plain.train()
    other.train(validation=(HELD, SEEN), log_every=1)
    assert plain.weights().tobytes() == other.weights().tobytes()
    assert not other.model.drop[0].training and other.model.drop[1]["one"].training and other.model.training


def test_a_loss_can_ask_whether_it_is_training():
    task, modes = Task(), []
    loss = task.loss

    def asks(x, y, rng, sample_offset):
        modes.append((task.model.training, len(x)))
        return loss(x, y, rng, sample_offset)

    task.loss = asks
    task.train(epochs=1, validation=(HELD, SEEN))
    assert modes == [(True, 4), (True, 4), (True, 2), (False, 4), (False, 3)]  # no more than a batch at a time


def test_batch_norm_is_measured_with_its_running_statistics():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1, rng=Rng(0)))
    images = np.random.default_rng(2).normal(5, 1, (6, 2, 2, 1)).astype("float32")

    def loss(x, rng, sample_offset):
        return ops.square(net(tensor(x))).mean()

    run = train(net, loss, images, SGD(net.parameters()), epochs=1, batch_size=3, validation=images, stream=Terminal())
    assert run.records[0]["validation"] == pytest.approx(net.eval() and loss(images, None, 0).item(), rel=1e-6)
    assert run.records[0]["validation"] > 5 * (
        net.train() and loss(images, None, 0).item()
    )  # after two steps the running mean is still far from 5


def test_resumed_with_validation_and_clipping_as_if_nothing_had_happened(each_backend, tmp_path):
    options = {"validation": (HELD, SEEN), "clip_norm": 0.3, "keep_best": True}
    whole = Task(tmp_path / "whole")
    whole.train(**options)
    stop = Task(tmp_path / "parts", call_at(6, lambda: signal.raise_signal(signal.SIGINT)))
    assert not stop.train(**options).finished
    second = Task(tmp_path / "parts")
    assert second.train(resume=True, **options).finished
    assert whole.weights().tobytes() == second.weights().tobytes()
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "parts"))


def test_the_best_is_that_of_the_lowest_validation_loss(tmp_path):
    """Here it rises while the training loss falls, because the held-out data have the opposite sign."""
    task = Task(tmp_path)
    run = task.train(epochs=6, validation=(HELD, -SEEN), keep_best=True)
    best = min(run.records, key=lambda r: r["validation"])
    assert best["step"] != min(run.records, key=lambda r: r["loss"])["step"]
    assert checkpoint(tmp_path, "best.npz")["run"]["step"] == best["step"]
    worse = Task(tmp_path)
    worse.train(epochs=8, validation=(HELD, -SEEN), keep_best=True, resume=True)
    assert checkpoint(tmp_path, "best.npz")["run"]["step"] == best["step"]


def test_a_validation_loss_that_is_not_finite_ends_the_run_and_what_was_learned_is_saved(tmp_path):
    bad = SEEN.copy()
    bad[3] = np.nan
    task = Task(tmp_path)
    with pytest.raises(
        FloatingPointError, match="the validation loss is nan after step 3: are the validation data fin"
    ):
        task.train(validation=(HELD, bad), nonfinite="skip")
    assert checkpoint(tmp_path)["run"]["step"] == 3 and Task(tmp_path).train(resume=True).finished


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation": HELD}, "validation data must be 2 arrays like the data, not 1"),
        ({"validation": (HELD, SEEN[:3])}, r"the validation data must be arrays of one length, not \[7, 3\]"),
        ({"validation": (HELD[:0], SEEN[:0])}, "the validation data is empty"),
        ({"clip_norm": 0}, r"clip_norm must be a number in \(0, inf\), not 0"),
        ({"clip_norm": float("nan")}, "clip_norm .* not nan"),
        ({"clip_norm": "1"}, "clip_norm .* not '1'"),
    ],
)
def test_bad_arguments_are_quoted(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Task(tmp_path).train(**options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("capture", [False, True])
def test_a_step_is_no_longer_than_the_norm_allows(each_backend, capture):
    """With SGD a step is the learning rate times the gradient, so its length tells the norm."""
    moved = {}
    for clip in (None, 0.1, 1e6):
        task = Task(optimizer=SGD, ema=False)
        before = task.weights()
        task.train(epochs=1, batch_size=len(X), clip_norm=clip, capture=capture)
        moved[clip] = task.weights() - before
    assert np.linalg.norm(moved[None]) > 0.01 and moved[1e6].tobytes() == moved[None].tobytes()
    np.testing.assert_allclose(moved[0.1], moved[None] * (0.05 * 0.1 / np.linalg.norm(moved[None])), rtol=1e-4)


def test_a_gradient_that_is_not_finite_is_seen_before_it_is_clipped(each_backend, tmp_path):
    good, task = Task(ema=False), poisoned(Task(tmp_path, ema=False), 3, 4, spoil=nan_gradient)
    good.train(epochs=1, clip_norm=0.1)
    with pytest.raises(FloatingPointError, match="a gradient is not finite at step 3"), np.errstate(all="ignore"):
        task.train(save_every=1, clip_norm=0.1)
    assert task.weights().tobytes() == good.weights().tobytes()


# ---------------------------------------------------------------- an early end


def test_on_record_can_end_the_run_and_it_can_go_on_later(each_backend, tmp_path):
    whole, first = Task(tmp_path / "whole"), Task(tmp_path / "parts")
    whole.train(log_every=2)
    run = first.train(log_every=2, on_record=lambda run: run.step == 4 and run.stop("it is good enough"))
    assert run.finished and run.exit_code == 0 and run.step == 4 and run.stopped == "it is good enough"
    assert "stopped after step 4: it is good enough" in first.stream.getvalue()
    assert "interrupted" not in first.stream.getvalue()
    assert checkpoint(tmp_path / "parts")["run"]["step"] == 4 and checkpoint(tmp_path / "parts")["run"]["finished"]
    second = Task(tmp_path / "parts")
    again = second.train(log_every=2, resume=True)
    assert again.finished and again.stopped == "" and again.step == 12
    assert whole.weights().tobytes() == second.weights().tobytes()
    assert without_time(log_of(tmp_path / "whole")) == without_time(log_of(tmp_path / "parts"))


def test_without_a_reason_it_ends_too():
    assert Task().train(on_record=lambda run: run.stop()).step == 3
    assert Task().train(on_record=lambda run: run.stop("")).stopped == "on_record asked for it"


# ---------------------------------------------------------------- what is printed


class Cell(Terminal):
    """The output of a notebook, as far as a training sees it."""

    __module__ = "ipykernel.iostream"

    def isatty(self):
        return False


@pytest.mark.parametrize("stream", [Cell, Terminal])
def test_one_line_renews_itself(monkeypatch, stream):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    task = Task(at=lambda calls: now.__setitem__(0, now[0] + 2.0))
    task.stream = stream()
    task.train(epochs=2, validation=(HELD, SEEN))
    screen = seen(task.stream.getvalue())
    assert len(screen) == 3 and screen[2] == "" and "\033" not in task.stream.getvalue()
    for epoch, (line, record) in enumerate(zip(screen, task_records(task))):
        assert line.startswith(f"epoch {epoch}  step {3 * epoch + 3}  loss {record} ") and line.endswith(" left")


def seen(printed):
    """The lines on the screen: what comes later stands over what was there, and clears no more than itself."""
    screen = []
    for line in printed.split("\n"):
        shown = ""
        for text in line.split("\r"):
            shown = text + shown[len(text) :]
        screen.append(shown.rstrip())
    return screen


def test_a_shorter_line_clears_a_longer_one():
    stream = Cell()
    progress = Progress(TrainState(), Batches(10, 4, seed=0), 1, {}, stream)
    for text, stays in (
        ("a long line", False),
        ("short", False),
        ("a longer one", False),
        ("stays", True),
        ("x", True),
    ):
        progress.say(text, stays)
    assert seen(stream.getvalue()) == ["stays", "x", ""]


def task_records(task):
    return [line.split("loss ")[1].split()[0] for line in task.stream.getvalue().split("\r") if " lr " in line]


# ---------------------------------------------------------------- the log, read back


def test_the_log_is_read_back_and_becomes_a_table(tmp_path):
    def add(run):
        if run.step > 3:
            run.records[-1] |= {"note": 'good, "very"', "many": [1, 2]}

    run = Task(tmp_path).train(epochs=2, validation=(HELD, SEEN), on_record=add)
    assert read_log(tmp_path) == read_log(tmp_path / "log.jsonl") == run.records
    write_csv(run.records, tmp_path / "log.csv")
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "step", "loss", "validation", "lr", "images", "seconds", "note", "many"]
    assert [float(row["validation"]) for row in rows] == [r["validation"] for r in run.records]
    assert [row["note"] for row in rows] == ["", 'good, "very"'] and json.loads(rows[1]["many"]) == [1, 2]


@pytest.mark.parametrize("line", ['{"epoch": 0', "[1]", ""])
def test_a_line_that_is_no_record_is_quoted(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"epoch": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: .*"):
        read_log(tmp_path)


def test_there_may_be_no_log(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_log(tmp_path)
