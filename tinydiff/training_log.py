"""What a training run prints: the progress lines, and what is due after each step. What it keeps is in
training_files.py, how it is asked to stop in stopping.py; the loop itself is in training.py.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from . import backend
from .backend import Array, xp
from .data.batches import Batches
from .distributed import ALONE, Ranks
from .patient import Patient
from .stopping import Stop, stop_signals
from .training_files import Files, Record, TrainState
from .validating import Validation
from .watching import Watch


class TrainLog:
    """Follows a run: after each step it counts, prints and saves what is due, and a signal ends the loop."""

    def __init__(
        self,
        state: TrainState,
        files: Files,
        watch: Watch,
        order: Batches,
        epochs: int,
        log_every: int | None,
        save_every: int | None,
        validation: Validation | None,
        on_record: Callable[[TrainState], Any] | None,
        reference: Mapping[int, float] | None,
        stream: TextIO | None,
        ranks: Ranks = ALONE,
    ):
        self.ranks = ranks
        self.state, self.files, self.watch, self.order = state, files, watch, order
        self.steps = epochs * order.steps_per_epoch
        self.log_every, self.save_every, self.validation, self.on_record = log_every, save_every, validation, on_record
        if ranks.rank:  # only rank 0 speaks
            self.on_record = None
        to = None if ranks.rank else sys.stderr if stream is None else stream
        self.progress = Progress(state, order, epochs, reference or {}, to)
        self.unwritten = False  # has it been said that on_record could not write?
        self.files.say = self.progress.say
        self.stop = Stop()

    @property
    def stopped(self) -> bool:
        """Has a signal or on_record asked for the end of the loop? What asks one rank asks all of them."""
        number, self.state.stopped = map(max, zip(*self.ranks.gather((self.stop.signal, self.state.stopped))))
        if number:  # else the signal is left alone: one that has come since it was read would be lost
            self.stop.signal = number
        return number != 0 or self.state.stopped != ""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The loop runs inside. However it ends, what was learned is saved, unless the weights were being changed."""
        with contextlib.closing(self.progress), stop_signals(self.stop, self.progress.say_at_once):
            if self.files.set_aside:
                names = ", ".join(kept.name for _, kept in self.files.set_aside)
                self.progress.say(f"the run that was in {self.files.out} is kept: {names}")
            if self.state.step >= self.steps:
                self.progress.say(f"nothing is left to train: all {self.steps} steps were done before")
            try:
                yield
                self.progress.read()
            except KeyboardInterrupt:
                if self.stop.twice or self.watch.updating or self.ranks.size > 1:  # the others know nothing of it
                    raise
                self.progress.read()
            except BaseException:
                if not self.watch.updating and not self.files.together:
                    with contextlib.suppress(Exception):  # the first error is the one to be seen
                        self.progress.read()
                        self.files.save(self.state)
                raise
            self.state.signal = max(self.ranks.gather(self.stop.signal))
            self.state.finished = self.state.step >= self.steps or self.state.stopped != ""
            try:
                self.files.try_again(self.state, now=True)
                self.files.save(self.state)
            except BaseException:
                self.state.finished = False
                raise
            self.state.unsaved = "; ".join(f"{name}: {why}" for name, why in self.files.troubles.items())
            self.progress.end(self.files.out)

    def stepped(self, loss: Array, images: int, lr: float) -> None:
        """A step is done, or it was skipped. loss: its mean over so many images, still on the device."""
        state, watch = self.state, self.watch
        watch.updating = False
        if watch.flaw:
            where = f"at step {state.step} (epoch {self.order.locate(state.step)[0]})"
            self._bear(f"{watch.flaw} {where}: {watch.made_by}")
        state.step += 1
        self.progress.stepped(None if watch.flaw else loss, images)
        epoch_ends = state.step % self.order.steps_per_epoch == 0
        # Without an image there is no mean; the next record counts these steps too.
        if (state.step == self.steps or _is_due(state.step, self.log_every, epoch_ends)) and self.progress.learned():
            record = self.progress.record(lr, self._validated())
            own = dict(record)
            try:
                if self.on_record is not None:
                    with self.progress.paused():
                        self._call_on_record(state)  # which may add to the record
                # It may have changed the model; besides, on unlike machines the last digits may drift apart.
                self.ranks.broadcast([t._data for _, t in self.files.parts["model"].named_tensors()])
            finally:
                self.files.log(record, own)
        try:
            if state.step == self.steps or _is_due(state.step, self.save_every, epoch_ends):
                with self.progress.paused():
                    self.files.save(state)
            self.files.try_again(state)
        except FloatingPointError as error:  # of the weights: an update made it, from a gradient that was finite
            if watch.policy != "rollback":
                raise
            watch.found += 1
            self._bear(str(error))
        watch.updating = watch.policy == "late"  # an interrupt of a captured step may come anywhere in it

    def _call_on_record(self, state: TrainState) -> None:
        """A picture that cannot be written, as on a full disk, is no reason to lose a training. It is said once."""
        records = list(state.records)
        try:
            self.on_record(state)  # type: ignore[misc]
        except OSError as error:
            if not self.unwritten:
                self.progress.say(f"on_record: {error}; the training goes on")
            self.unwritten = True
        except StopIteration as error:
            raise RuntimeError("on_record raised StopIteration: state.stop('why') in it ends the run there") from error
        if len(records) != len(state.records) or any(a is not b for a, b in zip(records, state.records)):
            state.records[:] = records  # a checkpoint without them could not be resumed
            raise ValueError("on_record has taken away or put in records of the run: it may only add to the last one")

    def _validated(self) -> Record:
        """The validation loss, for a record. Errors: FloatingPointError if it is not finite."""
        if self.validation is None:
            return {}
        with self.progress.paused():
            loss = self.validation.measure()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} after step {self.state.step}: are the validation data finite? The "
                "training loss is"
            )
        return {"validation": loss}

    def _bear(self, found: str) -> None:
        """Something was not finite: skip the step, roll back, or give up. The step has not touched the weights."""
        watch = self.watch
        if watch.policy == "stop" or watch.found > watch.most_nonfinite:
            most = watch.most_nonfinite
            many = "" if watch.policy == "stop" else f" This is number {watch.found}, and {most} are borne."
            raise FloatingPointError(
                f"{found}. The weights are as they were before this step.{many} Lower the learning rate, mend the data "
                "or the loss, or leave such steps out: nonfinite='skip'; to look yourself: tinydiff.detect_anomaly"
            )
        if watch.policy == "rollback":
            back = self.files.roll_back()
            self.progress.say(
                f"{found}. Rolled back to the weights of step {back}; the batches since then are left out"
            )
        else:
            self.progress.say(f"{found}. This step is skipped")


def _is_due(step: int, every: int | None, epoch_ends: bool) -> bool:
    return step % every == 0 if every else epoch_ends


# ---------------------------------------------------------------- what it prints


class Progress:
    """Reads the losses back, adds them up, and prints the progress: on a terminal and in a notebook in one line that is
    overwritten, elsewhere in a new line every half minute. Every record is printed in a line of its own. It never waits
    for who reads it (a pager, a stopped terminal): lines are kept until they can be written, the last thousand of them.
    """

    def __init__(
        self,
        state: TrainState,
        order: Batches,
        epochs: int,
        reference: Mapping[int, float],
        stream: TextIO | None,  # sys.stderr is None in a process without a console: then nothing is printed
    ):
        self.state, self.order, self.epochs, self.reference, self.stream = state, order, epochs, reference, stream
        self.live = stream is not None and (stream.isatty() or _of_notebook(stream))
        self.writer = None if stream is None else Patient(stream)
        self.over = ""  # the line that the next one overwrites
        self.waiting: collections.deque[str] = collections.deque(maxlen=1000)  # lines that could not be written yet
        self.pending: list[tuple[Array, int]] = []  # (loss, images) of the steps that have not been read back
        self.steps: list[int] = []  # which these are
        self.images = 0  # seen by this process
        self.seconds = 0.0  # in which it saw them
        self.since = self.read_at = self.shown_at = time.monotonic()

    def stepped(self, loss: Array | None, images: int) -> None:
        """loss: None if the step was skipped."""
        if loss is None:
            self.state.skipped += images
            return
        self.pending.append((loss.copy(), images))  # a copy, because a captured step overwrites the loss
        self.steps.append(self.state.step - 1)
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
        # One by one and in float64, so that the sum does not depend on the times of reading.
        for step, value, (_, images) in zip(self.steps, values, self.pending):
            if not math.isfinite(value):  # only with nonfinite="late": the weights have been changed since
                raise FloatingPointError(
                    f"the loss is {value} at step {step} (epoch {self.order.locate(step)[0]}): "
                    "lower the learning rate; or go on from the last checkpoint (resume) "
                    "inside `with tinydiff.detect_anomaly():` to see which op made the first NaN"
                )
            self.state.loss_sum += value * images
            self.state.images += images
        self.images += sum(images for _, images in self.pending)
        self.pending, self.steps = [], []
        self.read_at = now = time.monotonic()
        self.seconds += now - self.since
        self.state.seconds += now - self.since
        self.since = now
        return sum(values) / len(values)

    def speed(self) -> str:
        if not self.images:
            return "no image learned since it was resumed"
        rate = self.images / max(self.seconds, 1e-9)
        epoch, position = self.order.locate(self.state.step)
        left = (self.epochs - epoch) * self.order.n - position * self.order.batch_size
        return f"{rate:.0f} images/s  {clock(left / rate)} left"

    def learned(self) -> bool:
        """Was there a step since the last record that was not skipped?"""
        return bool(self.pending) or self.state.images > 0

    def record(self, lr: float, validation: Record) -> Record:
        """The mean loss since the last record, as a line of the log. validation: what belongs beside it."""
        self.read()
        state = self.state
        epoch, _ = self.order.locate(state.step - 1)
        loss = state.loss_sum / state.images
        record = {
            "epoch": epoch,
            "step": state.step,
            "loss": loss,
            **validation,
            "lr": lr,
            "images": state.images,
            "seconds": round(state.seconds, 3),
        }
        if state.skipped:
            record["skipped"] = state.skipped
        state.records.append(record)
        state.loss_sum, state.images, state.skipped = 0.0, 0, 0
        published = f" (published {self.reference[epoch]:g})" if epoch in self.reference else ""
        held_out = "".join(f"  {name} {value:.4g}" for name, value in validation.items())
        self.say(f"epoch {epoch}  step {state.step}  loss {loss:.4g}{published}{held_out}  lr {lr:.3g}  {self.speed()}")
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time."""
        self.read()
        yield
        self.since = self.read_at = time.monotonic()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def end(self, out: Path | None) -> None:
        if self.state.unsaved:
            self.say(f"NOT SAVED, after step {self.state.step}: {self.state.unsaved}")
        if self.state.stopped:
            self.say(f"stopped after step {self.state.step}: {self.state.stopped}")
        if self.state.finished:
            return
        epoch, position = self.order.locate(self.state.step)
        kept = (
            f"saved in {out}: go on from there with resume=True (--resume)"
            if out and "checkpoint.npz" not in self.state.unsaved
            else f"the last good checkpoint in {out} is of an earlier step"
            if out
            else "nothing was saved, because no `out` was given"
        )
        self.say(f"interrupted after step {self.state.step} (epoch {epoch}, {position} batches); {kept}")

    def say(self, text: str, stays: bool = True) -> None:
        """Print a line, which the next one overwrites, unless it stays."""
        if self.live:
            # Blanks, and not the terminal's code that clears a line, which notebooks do not know.
            start, text = "\r" * bool(self.over), text.ljust(len(self.over))
            self.over = "" if stays else text.rstrip()
            self.waiting.append(start + text + "\n" * stays)
        else:
            self.waiting.append(f"{text}\n")
        while self.writer is not None and self.waiting and self.writer.write(self.waiting[0]):
            self.waiting.popleft()

    def say_at_once(self, text: str) -> None:
        """Print in the middle of anything, past the buffer of the stream, which may be in use; or later."""
        if self.writer is not None and self.writer.handle is not None:
            self.writer.put(text)
        else:
            self.waiting.append(text)


def _of_notebook(stream: TextIO) -> bool:
    """Is it the output of a cell? It is no terminal, but a line in it can be overwritten too."""
    return type(stream).__module__.partition(".")[0] == "ipykernel"


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
