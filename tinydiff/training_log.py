"""What a training run prints and keeps: its state, the progress lines, the log and the checkpoints; and Ctrl-C. The
loop itself is in training.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from . import backend, saving
from .arguments import integer, number
from .backend import Array, xp
from .data.batches import Batches
from .rng import Rng

Record = dict[str, Any]


@dataclass
class TrainState:
    """The progress of a run: steps done, the lines of its log, and whether it reached the end."""

    step: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0  # of training, before and after it was resumed; pictures and saving do not count
    loss_sum: float = 0.0  # over the images since the last record
    images: int = 0  # the number of these images


class TrainLog:
    """Follows a run: after each step it counts, prints and saves what is due, and Ctrl-C ends the loop."""

    def __init__(
        self,
        state: TrainState,
        files: Files,
        order: Batches,
        epochs: int,
        log_every: int | None,
        save_every: int | None,
        on_record: Callable[[TrainState], Any] | None,
        reference: Mapping[int, float] | None,
        stream: TextIO | None,
        captured: bool,
    ):
        self.state, self.files, self.order = state, files, order
        self.steps = epochs * order.steps_per_epoch
        self.log_every, self.save_every, self.on_record = log_every, save_every, on_record
        self.progress = Progress(state, order, epochs, reference or {}, sys.stderr if stream is None else stream)
        self.interrupt = Interrupt()
        # Are the weights being changed? A captured step cannot be interrupted before it changes them.
        self.captured = self.updating = captured

    @property
    def interrupted(self) -> bool:
        """Has Ctrl-C asked for the end of the loop?"""
        return self.interrupt.wanted

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The loop runs inside. An interrupt ends it, and the state is saved unless the weights were being changed."""
        with ctrl_c(self.interrupt, self.progress.say):
            if self.files.set_aside:
                names = ", ".join(kept.name for _, kept in self.files.set_aside)
                self.progress.say(f"the run that was in {self.files.out} is kept: {names}")
            if self.state.step >= self.steps:
                self.progress.say(f"nothing is left to train: all {self.steps} steps were done before")
            try:
                yield
            except KeyboardInterrupt:
                if self.interrupt.twice or self.updating:
                    raise
            self.progress.read()
            self.state.finished = self.state.step >= self.steps
            self.files.save(self.state)
            self.progress.close(self.files.out)

    def stepped(self, loss: Array, images: int, lr: float) -> None:
        """A step is done. loss: its mean over so many images, still on the device."""
        state = self.state
        state.step += 1
        self.progress.stepped(loss, images)
        self.updating = False
        epoch_ends = state.step % self.order.steps_per_epoch == 0
        if state.step == self.steps or _is_due(state.step, self.log_every, epoch_ends):
            record = self.progress.record(lr)
            try:
                if self.on_record is not None:
                    with self.progress.paused():
                        self.on_record(state)  # which may add to the record
            finally:
                self.files.log(record)
        if _is_due(state.step, self.save_every, epoch_ends):
            with self.progress.paused():
                self.files.save(state)
        self.updating = self.captured


def _is_due(step: int, every: int | None, epoch_ends: bool) -> bool:
    return step % every == 0 if every else epoch_ends


# ---------------------------------------------------------------- what it prints


class Progress:
    """Reads the losses back, adds them up, and prints the progress: on a terminal in one line that is overwritten,
    elsewhere in a new line every half minute. Every record is printed in a line of its own."""

    def __init__(
        self,
        state: TrainState,
        order: Batches,
        epochs: int,
        reference: Mapping[int, float],
        stream: TextIO | None,  # sys.stderr is None in a process without a console: then nothing is printed
    ):
        self.state, self.order, self.epochs, self.reference, self.stream = state, order, epochs, reference, stream
        self.live = stream is not None and stream.isatty()
        self.pending: list[tuple[Array, int]] = []  # (loss, images) of the steps that have not been read back
        self.images = 0  # seen by this process
        self.seconds = 0.0  # in which it saw them
        self.since = self.read_at = self.shown_at = time.monotonic()

    def stepped(self, loss: Array, images: int) -> None:
        self.pending.append((loss.copy(), images))  # a copy, because a captured step overwrites the loss
        now = time.monotonic()
        if now - self.read_at > 0.5:
            latest = self.read()
            if now - self.shown_at > (0.5 if self.live else 30):
                self.shown_at = now
                epoch, position = self.order.locate(self.state.step - 1)
                where = f"epoch {epoch}  batch {position + 1}/{self.order.steps_per_epoch}"
                self.say(f"{where}  loss now {latest:.4g}  {self.speed()}", stays=not self.live)

    def read(self) -> float:
        """Add up the losses that are still on the device, and return their mean. Waits for the device."""
        if not self.pending:
            return math.nan
        values = backend.to_host(xp.stack([loss for loss, _ in self.pending])).tolist()
        first = self.state.step - len(self.pending)
        # One by one and in float64, so that the sum does not depend on the times of reading.
        for step, (value, (_, images)) in enumerate(zip(values, self.pending), start=first):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step} (epoch {self.order.locate(step)[0]}): "
                    "lower the learning rate; or go on from the last checkpoint (resume) "
                    "inside `with tinydiff.detect_anomaly():` to see which op made the first NaN"
                )
            self.state.loss_sum += value * images
            self.state.images += images
        self.images += sum(images for _, images in self.pending)
        self.pending = []
        self.read_at = now = time.monotonic()
        self.seconds += now - self.since
        self.state.seconds += now - self.since
        self.since = now
        return sum(values) / len(values)

    def speed(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        epoch, position = self.order.locate(self.state.step)
        left = (self.epochs - epoch) * self.order.n - position * self.order.batch_size
        return f"{rate:.0f} images/s  {clock(left / rate)} left"

    def record(self, lr: float) -> Record:
        """The mean loss since the last record, as a line of the log."""
        self.read()
        state = self.state
        epoch, _ = self.order.locate(state.step - 1)
        loss = state.loss_sum / state.images
        record = {
            "epoch": epoch,
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "images": state.images,
            "seconds": round(state.seconds, 3),
        }
        state.records.append(record)
        state.loss_sum, state.images = 0.0, 0
        published = f" (published {self.reference[epoch]:g})" if epoch in self.reference else ""
        self.say(f"epoch {epoch}  step {state.step}  loss {loss:.4g}{published}  lr {lr:.3g}  {self.speed()}")
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time."""
        self.read()
        yield
        self.since = self.read_at = time.monotonic()

    def close(self, out: Path | None) -> None:
        if self.state.finished:
            return
        epoch, position = self.order.locate(self.state.step)
        kept = (
            f"saved in {out}: go on from there with resume=True (--resume)"
            if out
            else "nothing was saved, because no `out` was given"
        )
        self.say(f"interrupted after step {self.state.step} (epoch {epoch}, {position} batches); {kept}")

    def say(self, text: str, stays: bool = True) -> None:
        """Print a line, which the next one overwrites on a terminal unless it stays."""
        if self.stream is None:
            return
        start, end = ("\r\033[K", "\n" if stays else "") if self.live else ("", "\n")
        self.stream.write(start + text + end)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# ---------------------------------------------------------------- what it keeps


class CannotResume(ValueError):
    """The checkpoint to go on from is damaged, or is not one of this run and this model."""


class Files:
    """log.jsonl and checkpoint.npz in the directory of a run; without a directory, nothing."""

    def __init__(self, out: Any, parts: dict[str, Any], settings: dict[str, int]):
        """parts: objects with a state_dict, by name; None is left out. settings: must be the same to resume."""
        self.out = None if out is None else Path(out)
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.settings = settings
        self.saved_at: int | None = None
        self.set_aside: list[tuple[Path, Path]] = []  # the files of an older run: where they were, where they are

    def start(self) -> TrainState:
        """A new run. Its checkpoint of step 0 and its log are written now: what cannot be saved is an error before the
        first step. The files of an older run get other names; after an error they have their own again."""
        state = TrainState()
        if self.out is None:
            return state
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"train: out must be a directory, but {self.out} is a file")
        first = self.out / "starting-checkpoint.npz"
        try:
            self._write(first, state)
            kept = f"previous-{1 + max((n for n, _ in self._kept()), default=0)}-"
            for path in (self.out / "checkpoint.npz", self.out / "log.jsonl"):
                if path.exists() and not self._is_of_no_step():
                    os.replace(path, path.with_name(kept + path.name))
                    self.set_aside.append((path, path.with_name(kept + path.name)))
            os.replace(first, self.out / "checkpoint.npz")
            (self.out / "log.jsonl").touch()
        except BaseException:
            for path, renamed in self.set_aside:
                os.replace(renamed, path)
            first.unlink(missing_ok=True)
            raise
        self.saved_at = 0
        return state

    def _is_of_no_step(self) -> bool:
        """Has the run that is there ended before its first step? Then nothing is lost if it goes."""
        assert self.out is not None
        log = self.out / "log.jsonl"
        if log.exists() and log.stat().st_size > 0:
            return False
        try:
            return saving.load(self.out / "checkpoint.npz")["run"]["step"] == 0
        except (OSError, LookupError, TypeError, ValueError):
            return False

    def log(self, record: Record) -> None:
        if self.out is not None:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(_line(record))

    def save(self, state: TrainState) -> None:
        if self.out is not None and self.saved_at != state.step:
            self._write(self.out / "checkpoint.npz", state)
            self.saved_at = state.step

    def load(self) -> TrainState:
        """Resume the saved run: load the state of every part, and cut the log to the records of that time. After an
        error every part is as it was."""
        if self.out is None:
            raise ValueError("train: resume needs `out`, the directory of the run")
        path = self.out / "checkpoint.npz"
        if not path.exists():
            kept = ", ".join(name for _, name in sorted(self._kept()))
            instead = f"; rename one of these to go on with an older run: {kept}" if kept else ""
            raise FileNotFoundError(f"nothing to resume: there is no {path}{instead}")
        try:
            saved = saving.load(path)
        except ValueError as error:
            raise CannotResume(str(error)) from error
        state = self._checked(saved, path)
        before = {name: part.state_dict() for name, part in self.parts.items()}
        try:
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(saved[name])
                except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                    why = error if isinstance(error, ValueError) else repr(error)
                    raise CannotResume(f"{path}: its {name} is of another run: {why}") from error
            lines = "".join(map(_line, state.records))
            saving.write_atomically(self.out / "log.jsonl", lambda file: file.write(lines.encode()))
        except BaseException:
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            raise
        self.saved_at = state.step
        return state

    def _write(self, path: Path, state: TrainState) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        saving.save(path, {"settings": self.settings, "run": asdict(state), **parts})

    def _kept(self) -> list[tuple[int, str]]:
        """The number and the name of each checkpoint and log of an older run."""
        if self.out is None or not self.out.is_dir():
            return []
        found = (
            re.fullmatch(r"previous-(?:(\d+)-)?(?:checkpoint\.npz|log\.jsonl)", p.name) for p in self.out.iterdir()
        )
        return [(int(match[1] or 0), match[0]) for match in found if match]

    def _checked(self, saved: dict[str, Any], path: Path) -> TrainState:
        """The progress in a checkpoint. Errors: CannotResume unless it is of a run with these settings and parts."""
        if missing := [name for name in ("settings", "run", *self.parts) if name not in saved]:
            raise CannotResume(f"{path} has no {', '.join(missing)}")
        if extra := [name for name in saved if name not in ("settings", "run", *self.parts)]:
            raise CannotResume(f"{path} has {', '.join(extra)}, which this run has not, and would lose")
        settings = saved["settings"] if isinstance(saved["settings"], dict) else {}
        found = {name: settings.get(name) for name in self.settings}
        if changed := [f"{k} {found[k]!r}, not {v}" for k, v in self.settings.items() if repr(found[k]) != repr(v)]:
            raise CannotResume(f"{path} is of another run: it has {', '.join(changed)}")
        try:
            return _state_of(saved["run"])
        except ValueError as error:
            raise CannotResume(f"{path} is of another version, or it is no run of train: {error}") from error


def _state_of(run: Any) -> TrainState:
    """A TrainState from a checkpoint. Errors: ValueError unless it has each field and no other, of the right kind."""
    names = {field.name for field in fields(TrainState)}
    if not isinstance(run, dict) or set(run) != names:
        raise ValueError(
            f"its progress must have {sorted(names)}, not {sorted(run) if isinstance(run, dict) else run!r}"
        )
    if not isinstance(run["finished"], bool):
        raise ValueError(f"its finished must be True or False, not {run['finished']!r}")
    if not isinstance(run["records"], list) or not all(isinstance(record, dict) for record in run["records"]):
        raise ValueError(f"its records must be a list of dicts, not {run['records']!r}")
    return TrainState(
        step=integer("its step", run["step"], 0),
        records=run["records"],
        finished=run["finished"] is True,
        seconds=number("its seconds", run["seconds"], "[0, inf)"),
        loss_sum=number("its loss_sum", run["loss_sum"]),
        images=integer("its images", run["images"], 0),
    )


def _line(record: Record) -> str:
    """A record as a line of the log; NumPy's numbers and arrays, which on_record may have added, as Python's."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"a record of the log has {value!r}, which cannot be written")

    return json.dumps(record, default=plain) + "\n"


class Sources:
    """The random sources that a model holds, such as those of its Dropouts: where each of them is. A checkpoint keeps
    it apart from Module.state_dict, whose names are PyTorch's. A source under a name with an underscore counts too;
    one in a module under such a name, or in an object that is no module, does not."""

    def __init__(self, model: Any):
        self.named: list[tuple[str, Rng]] = []
        seen: set[int] = set()

        def find(path: str, held: Any) -> None:
            if not isinstance(held, (Rng, list, tuple, dict)) or id(held) in seen:
                return
            seen.add(id(held))
            if isinstance(held, Rng):
                self.named.append((path, held))
            else:
                for name, part in held.items() if isinstance(held, dict) else enumerate(held):
                    find(f"{path}.{name}", part)

        for path, module in model.named_modules():
            for name, held in vars(module).items():
                find(f"{path}.{name}".lstrip("."), held)

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"name": name, **rng.state()} for name, rng in self.named]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Errors: ValueError if it is of a model that holds other sources; then nothing is changed."""
        names = [name for name, _ in self.named]
        if [source["name"] for source in state] != names:
            raise ValueError(f"it has {[source['name'] for source in state]}, not {names}")
        found = [Rng(source["seed"], stream=source["stream"], step=source["step"]) for source in state]
        for (_, rng), there in zip(self.named, found):
            rng.seed, rng.stream, rng.step = there.seed, there.stream, there.step


# ---------------------------------------------------------------- Ctrl-C


@dataclass
class Interrupt:
    """How often Ctrl-C was pressed."""

    wanted: bool = False
    twice: bool = False


@contextlib.contextmanager
def ctrl_c(interrupt: Interrupt, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C only sets `wanted`, so that the step is finished; the second raises."""

    def handler(number: int, frame: Any) -> None:
        if interrupt.wanted:
            interrupt.twice = True
            raise KeyboardInterrupt
        interrupt.wanted = True
        say("\ninterrupt: this step is finished, then saved (Ctrl-C again stops at once)")

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread alone
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
