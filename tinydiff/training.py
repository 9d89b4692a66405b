"""The training loop: `train` is the loop, `gradients` one turn of it, and the rest is what it tells you and keeps.

Everything random is a function of the seed and the step: which images are in batch `step` (data.Batches), and which
noise they get (rng.child(step)). So a run that was stopped and resumed ends with the very weights of one that was not.

The loop never waits for the device on its own account: the losses stay there until the progress line is due.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from . import backend, saving
from .backend import Array, xp
from .data.batches import Batches
from .data.cache import write_atomically
from .microbatch import gradients
from .rng import Rng

Record = dict[str, Any]


@dataclass
class Run:
    """Where a run is: steps done, the lines of its log, and whether it went to the end or was interrupted."""

    step: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0  # of training, pictures and saving not counted, over all the times it was resumed
    loss_sum: float = 0.0  # over the images since the last record, and
    images: int = 0  # how many these are


def train(
    model: Any,
    loss: Callable[..., Any],
    data: Sequence[Any],
    optimizer: Any,
    *,
    epochs: int,
    batch_size: int,
    microbatch: int | None = None,
    threads: int | None = None,
    capture: bool = False,
    seed: int = 0,
    schedule: Callable[[int], float] | None = None,
    schedule_by: str = "epoch",
    ema: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log_every: int | None = None,
    save_every: int | None = None,
    on_record: Callable[[Run], Any] | None = None,
    reference: Mapping[int, float] | None = None,
    stream: TextIO | None = None,
) -> Run:
    """Minimise the loss over the data; an epoch is all of it once, in a new order.

    data: host arrays of one length, (images, labels, ...).
    loss(*batch, rng=rng, sample_offset=i) -> Tensor of shape (): the mean over a batch, or the part of it from sample i
    on, whose arrays are on the device; `rng` is another at each step.
    microbatch: go through a batch in parts of this size and add up the gradients: the same mathematics in less memory.
    None: microbatch_size, or the whole batch if a layer of the model needs it (BatchNorm2d, Dropout).
    threads: how many parts to work on at a time, on a CPU (None: one a core). With several parts it changes no bit of
    the result; a single one leaves the threads to the BLAS. It asks for a loss that changes no state.
    capture: on CuPy, repeat each step as one CUDA graph (see tinydiff/capture.py for what the loss may then not do).
    schedule: epoch, or step with schedule_by="step", -> factor of the learning rate. ema: updated after each step.
    out: a directory for log.jsonl and checkpoint.npz. A record of the log is the mean loss over the images since the
    last one; it is written at the end of each epoch, or every `log_every` steps and at the end; so is the checkpoint,
    or every `save_every` steps.
    resume: go on from the checkpoint. on_record(run): called after each record, for pictures. reference: {epoch: loss}
    of others, printed beside ours. stream: where the progress goes, stderr unless given.

    Ctrl-C finishes the step, saves, says how to go on, and returns; a second one stops at once. Returns the Run.
    Errors: ValueError for arrays of different lengths, or for a checkpoint of other data, batch size or
    seed; FileNotFoundError if there is nothing to resume; FloatingPointError, which names the step,
    when the loss is not finite.
    """
    lengths = [len(a) for a in data]
    if len(set(lengths)) != 1:
        raise ValueError(f"train: the arrays of the data must have one length, not {lengths}")
    counts = {
        "epochs": epochs,
        "microbatch": microbatch,
        "threads": threads,
        "log_every": log_every,
        "save_every": save_every,
    }
    if bad := {name: n for name, n in counts.items() if n is not None and n < 1}:
        raise ValueError(f"train: these must be 1 or more: {bad}")
    if schedule_by not in ("epoch", "step"):
        raise ValueError(f"train: schedule_by must be 'epoch' or 'step', not {schedule_by!r}")
    if microbatch is None and any(layer.needs_whole_batch for _, layer in model.named_modules()):
        microbatch = batch_size
    order = Batches(lengths[0], batch_size, seed=seed, drop_last=False)
    noise, base_lr = Rng(seed).child("training"), optimizer.lr
    files = Files(out, model, optimizer, ema, {"images": lengths[0], "batch_size": batch_size, "seed": seed})
    run = files.load() if resume else files.start()
    steps, stream = epochs * order.steps_per_epoch, stream or sys.stderr
    progress = Progress(run, order, epochs, reference or {}, stream)
    whole = True  # False while the weights are being changed

    def step(rng: Rng, *batch: Array) -> Array:
        nonlocal whole
        value = gradients(loss, optimizer.parameters, batch, rng, microbatch, threads)
        whole = False
        optimizer.step()
        if ema is not None:
            ema.update()
        return value

    advance = backend.capture(step) if capture else step
    with ctrl_c(stream) as interrupt:
        try:
            while run.step < steps and not interrupt.wanted:
                epoch, _ = order.locate(run.step)
                optimizer.lr = base_lr * (schedule(epoch if schedule_by == "epoch" else run.step) if schedule else 1.0)
                batch = [a[order.indices(run.step)] for a in data]
                whole = not capture  # a graph cannot be cut before the weights change
                value = advance(noise.child(run.step), *batch)
                if capture:
                    value = value.copy()  # the next replay overwrites it
                run.step += 1
                progress.stepped(value, len(batch[0]))
                whole = True

                epoch_ends = run.step % order.steps_per_epoch == 0
                if run.step == steps or (run.step % log_every == 0 if log_every else epoch_ends):
                    files.log(progress.record(epoch, optimizer.lr))
                    if on_record is not None:
                        with progress.paused():
                            on_record(run)
                if run.step % save_every == 0 if save_every else epoch_ends:
                    with progress.paused():
                        files.save(run)
        except KeyboardInterrupt:
            if interrupt.twice or not whole:
                raise
        progress.read()
        optimizer.lr = base_lr
        run.finished = run.step >= steps
        files.save(run)
        progress.close(files.out)
    return run


# ---------------------------------------------------------------- what it tells you


class Progress:
    """Reads the losses back, adds them up, and says how it goes: on a terminal a line that renews itself, elsewhere a
    line every half minute; and a line that stays for every record."""

    def __init__(self, run: Run, order: Batches, epochs: int, reference: Mapping[int, float], stream: TextIO):
        self.run, self.order, self.epochs, self.reference, self.stream = run, order, epochs, reference, stream
        self.live = stream.isatty()
        self.pending: list[tuple[Array, int]] = []  # (loss, images) of the steps that have not been read back
        self.images = 0  # by this process, and
        self.seconds = 0.0  # in this time
        self.since = self.read_at = self.shown_at = time.monotonic()
        self.mark = (run.images, run.seconds)

    def stepped(self, loss: Array, images: int) -> None:
        self.pending.append((loss, images))
        now = time.monotonic()
        if now - self.read_at > 0.5:
            latest = self.read()
            if now - self.shown_at > (0.5 if self.live else 30):
                self.shown_at = now
                epoch, position = self.order.locate(self.run.step - 1)
                where = f"epoch {epoch}/{self.epochs}  step {position + 1}/{self.order.steps_per_epoch}"
                self._line(f"{where}  loss {latest:.4g}  {self.speed()}", stays=not self.live)

    def read(self) -> float:
        """Add up the losses of the steps that are still on the device; their mean. Waits for it."""
        if not self.pending:
            return math.nan
        values = backend.to_host(xp.stack([loss for loss, _ in self.pending])).tolist()
        first = self.run.step - len(self.pending)
        # One by one and in float64, so that the sum does not depend on when it was read.
        for step, (value, (_, images)) in enumerate(zip(values, self.pending), start=first):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step} (epoch {self.order.locate(step)[0]}): "
                    "lower the learning rate; or go on from the last checkpoint (resume) "
                    "inside `with tinydiff.detect_anomaly():` to see which op made the first NaN"
                )
            self.run.loss_sum += value * images
            self.run.images += images
        self.images += sum(images for _, images in self.pending)
        self.pending = []
        self.read_at = now = time.monotonic()
        self.seconds += now - self.since
        self.run.seconds += now - self.since
        self.since = now
        return sum(values) / len(values)

    def speed(self) -> str:
        rate = self.images / max(self.seconds, 1e-9)
        epoch, position = self.order.locate(self.run.step)
        left = (self.epochs - epoch) * self.order.n - position * self.order.batch_size
        return f"{rate:.0f} images/s  {clock(left / rate)} left"

    def record(self, epoch: int, lr: float) -> Record:
        """The mean loss since the last record, as a line of the log."""
        self.read()
        run = self.run
        loss = run.loss_sum / run.images
        record = {
            "epoch": epoch,
            "step": run.step,
            "loss": loss,
            "lr": lr,
            "images": run.images,
            "seconds": round(run.seconds, 3),
        }
        run.records.append(record)
        run.loss_sum, run.images = 0.0, 0
        published = f" (published {self.reference[epoch]:g})" if epoch in self.reference else ""
        self._line(
            f"epoch {epoch}  step {run.step}  loss {loss:.4g}{published}  lr {lr:.3g}  {self.speed()}", stays=True
        )
        return record

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training time."""
        self.read()
        yield
        self.since = self.read_at = time.monotonic()

    def close(self, out: Path | None) -> None:
        if self.run.finished:
            return
        epoch, position = self.order.locate(self.run.step)
        kept = (
            f"saved in {out}: go on from there with resume=True (--resume)"
            if out
            else "nothing was saved, as no `out` was given"
        )
        self._line(f"interrupted after step {self.run.step} (epoch {epoch}, {position} batches); {kept}", stays=True)

    def _line(self, text: str, stays: bool) -> None:
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

    def __init__(self, out: Any, model: Any, optimizer: Any, ema: Any, settings: dict[str, int]):
        self.out = None if out is None else Path(out)
        self.parts = {"model": model, "optimizer": optimizer, "ema": ema}
        self.settings = settings
        self.saved_at: int | None = None

    def start(self) -> Run:
        """A new run. What an older one left in the directory is kept under another name."""
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoint.npz", "log.jsonl"):
                if (self.out / name).exists():
                    os.replace(self.out / name, self.out / f"previous-{name}")
        return Run()

    def log(self, record: Record) -> None:
        if self.out is not None:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def save(self, run: Run) -> None:
        if self.out is None or self.saved_at == run.step:
            return
        state = {name: part.state_dict() for name, part in self.parts.items() if part is not None}
        saving.save(self.out / "checkpoint.npz", {"settings": self.settings, "run": asdict(run), **state})
        self.saved_at = run.step

    def load(self) -> Run:
        """The run that was saved, its state put back where it came from, and the log cut to what it had."""
        if self.out is None:
            raise ValueError("train: resume needs `out`, the directory of the run")
        if not (self.out / "checkpoint.npz").exists():
            raise FileNotFoundError(f"nothing to resume: there is no {self.out / 'checkpoint.npz'}")
        try:
            state = saving.load(self.out / "checkpoint.npz")
        except ValueError as error:
            raise CannotResume(str(error)) from error
        if state["settings"] != self.settings:
            changed = [
                f"{k} {state['settings'].get(k)}, not {v}"
                for k, v in self.settings.items()
                if state["settings"].get(k) != v
            ]
            raise CannotResume(f"{self.out}/checkpoint.npz is of another run: it has {', '.join(changed)}")
        if missing := [name for name, part in self.parts.items() if part is not None and name not in state]:
            raise CannotResume(f"{self.out}/checkpoint.npz has no {', '.join(missing)}")
        for name, part in self.parts.items():
            if part is not None:
                try:
                    part.load_state_dict(state[name])
                except ValueError as error:
                    raise CannotResume(f"{self.out}/checkpoint.npz: its {name} is of another run: {error}") from error
        run = Run(**state["run"])
        self.saved_at = run.step
        lines = "".join(json.dumps(record) + "\n" for record in run.records)
        write_atomically(self.out / "log.jsonl", lambda file: file.write(lines.encode()))
        return run


# ---------------------------------------------------------------- Ctrl-C


@dataclass
class Interrupt:
    wanted: bool = False
    twice: bool = False


@contextlib.contextmanager
def ctrl_c(stream: TextIO) -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C only sets `wanted`, so that a step is never cut in the middle; the second raises."""
    interrupt = Interrupt()

    def handler(number: int, frame: Any) -> None:
        if interrupt.wanted:
            interrupt.twice = True
            raise KeyboardInterrupt
        interrupt.wanted = True
        stream.write("\ninterrupt: this step is finished, then saved (Ctrl-C again stops at once)\n")

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread alone
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
