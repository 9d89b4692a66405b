"""The training loop, in plain sight. Beside it: what a run prints (training_log.py) and keeps (training_files.py), how
it is asked to stop (stopping.py), who looks whether a step is sound (watching.py), and the loss on data that are not
learned from (validating.py). The forward and backward pass over a batch is microbatch.gradients.

Everything random is a function of the seed and the step: which images are in batch `step` (data.Batches), and which
noise they get (rng.child(step)). So a run that was stopped and resumed ends with the very weights of one that was not.

What is promised when something goes wrong, and how that is tested, is in docs/reliability.md.

The losses stay on the device until the next progress line is printed. The loop waits for one number per step: are its
loss and gradient finite? With nonfinite="late" it waits for none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from . import backend
from .arguments import integer, number
from .backend import Array
from .data.batches import Batches
from .distributed import ALONE, CannotShare, Ranks, code, digest, program, summary_of
from .files import InUse
from .microbatch import arrays_of, gradients, microbatches, size_for_ranks
from .optim import clip_grad_norm, constant
from .records import read_log, write_csv
from .rng import Rng
from .training_files import CannotResume, Files, Sources, TrainState
from .training_log import TrainLog
from .validating import Validation
from .watching import POLICIES, Watch

__all__ = ["CannotResume", "InUse", "TrainState", "gradients", "read_log", "train", "write_csv"]


def train(
    model: Any,
    loss: Callable[..., Any],
    data: Any,
    optimizer: Any,
    *,
    epochs: int,
    batch_size: int,
    microbatch: int | None = None,
    threads: int | None = None,
    validation: Any = None,
    clip_norm: float | None = None,
    capture: bool = False,
    seed: int = 0,
    schedule: Callable[[int], float] | None = None,
    schedule_by: str = "epoch",
    ema: Any = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log_every: int | None = None,
    save_every: int | None = None,
    keep: int = 1,
    keep_best: bool = False,
    about: Mapping[str, Any] | None = None,
    nonfinite: str = "stop",
    most_nonfinite: int = 10,
    on_record: Callable[[TrainState], Any] | None = None,
    reference: Mapping[int, float] | None = None,
    stream: TextIO | None = None,
    ranks: Ranks = ALONE,
) -> TrainState:
    """Minimise the loss over the data; an epoch is all of it once, in a new order.

    data: host arrays of one length, (images, labels, ...), or a single one.
    loss(*batch, rng=rng, sample_offset=i) -> Tensor of shape (): the mean over a batch, or over the microbatch of it
    that starts at sample i. Its arrays are on the device, and each step has an `rng` of its own.
    microbatch: go through a batch in parts of this size and add up the gradients: the same mathematics in less memory.
    None: microbatch_size, or the whole batch if a layer of the model needs it (BatchNorm2d, Dropout).
    threads: how many microbatches to work on at a time, on a CPU (None: one per core). With several microbatches their
    number changes no bit of the result, and the loss must change no state; in a single microbatch they share out each
    large op, and the last digits of a product may depend on how many they are.
    validation: data that are not learned from, arrays like `data`. Every record then has "validation", their mean loss
    by the averaged weights (ema) or, without any, the present ones, always with the same noise and after model.eval():
    a loss that leaves conditions out at random can ask model.training whether it should.
    clip_norm: scale the gradients of a step so that the norm of all together is at most this (optim.clip_grad_norm).
    capture: on CuPy, repeat each step as one CUDA graph (see fast/capture.py for what the loss may then not do).
    schedule: epoch, or step with schedule_by="step", -> factor of the learning rate. ema: updated after each step.
    out: a directory for log.jsonl and checkpoint.npz. Both are there before the first step; those of an older run get
    the names previous-1-checkpoint.npz, previous-1-log.jsonl, and so on. A record of the log is the mean loss over the
    images since the record before; it is written at the end of each epoch, or every `log_every` steps and at the end.
    The checkpoint is written at the end of each epoch, or every `save_every` steps, and at the end.
    keep: so many of the last checkpoints, the older ones as checkpoint-STEP.npz. keep_best: of the checkpoints that are
    written when a record is, also the one with the lowest validation loss, or without validation the lowest loss, as
    best.npz.
    about: what each checkpoint says of its model, Trained(...).about(), so that tinydiff.load can rebuild it.
    nonfinite: what to do about a step whose loss or gradient is NaN or Inf. It never touches the weights, and the op
    that made it is named: the same batch is computed again under detect_anomaly. "stop": save and raise. "skip": leave
    this batch out. "rollback": go on from the weights of the last checkpoint, without the batches since then, which
    would lead to the same place. After `most_nonfinite` such steps the run gives up, as with "stop". "late": look only
    when the losses are printed, never waiting for the device, as captured steps must; the weights may then be spoiled,
    but not the checkpoint. A weight that is not finite is never saved.
    resume: go on from the checkpoint, which also says where the random sources are that the model's modules hold as
    attributes (Dropout). The learning rate is the optimizer's own, so a run may go on with a lower one.
    on_record(state): called after each record, for pictures; state.stop("why") in it ends the run there. reference:
    {epoch: loss} of another training, printed beside this one. stream: where progress is printed, stderr unless given.
    ranks: of distributed.connected: several processes call this with the same arguments and share the microbatches of
    each batch. They begin with the weights of rank 0, which alone prints, writes, and calls on_record. A signal to one
    of them is one to all. `out` must be a folder that all of them see; the run can be resumed by any number of ranks.

    Ctrl-C, SIGTERM and SIGHUP finish the step, save, print how to go on, and return; a second one stops at once.
    Returns the TrainState; sys.exit(state.exit_code) tells a shell how it ended. A file that cannot be written (a full
    disk) is said once and tried again, while the training goes on; what is missing at the end is in state.unsaved.
    After any error what was learned before the step is saved, and the optimiser has its learning rate again.
    Errors: ValueError for arrays of different lengths and numbers out of range; TypeError for data that are no arrays,
    and for a state that cannot be saved; CannotResume for a checkpoint that is damaged or of other data, batch size,
    seed or model, and then nothing is changed; FileNotFoundError if there is nothing to resume; files.InUse, with its
    process number, if another run uses the directory; FloatingPointError, which names the step, when the loss is not
    finite, or the validation loss; MemoryError, which says what microbatch would fit.
    """
    epochs, batch_size = integer("train: epochs", epochs), integer("train: batch_size", batch_size)
    microbatch, threads, log_every, save_every = (
        count if count is None else integer(f"train: {name}", count)
        for name, count in {"microbatch": microbatch, "threads": threads, "log_every": log_every,
                            "save_every": save_every}.items()
    )  # fmt: skip
    if schedule_by not in ("epoch", "step"):
        raise ValueError(f"train: schedule_by must be 'epoch' or 'step', not {schedule_by!r}")
    if nonfinite not in POLICIES:
        raise ValueError(f"train: nonfinite must be one of {', '.join(POLICIES)}, not {nonfinite!r}")
    if keep_best and out is None:
        raise ValueError("train: keep_best=True needs `out`, where the checkpoints are")
    if nonfinite == "rollback" and out is None:
        raise ValueError("train: nonfinite='rollback' needs `out`, where the checkpoints are")
    if capture and nonfinite in ("skip", "rollback"):
        raise ValueError(
            f"train: a captured step cannot look at itself, so nonfinite={nonfinite!r} needs capture=False"
        )
    nonfinite = "late" if capture else nonfinite
    keep, most_nonfinite = integer("train: keep", keep), integer("train: most_nonfinite", most_nonfinite, 0)
    if on_record is not None and not callable(on_record):
        raise TypeError(f"train: on_record must be a function of the TrainState, not {on_record!r}")
    if clip_norm is not None:
        clip_norm = number("train: clip_norm", clip_norm, "(0, inf)")
    reference = {epoch: number(f"train: reference[{epoch!r}]", x) for epoch, x in (reference or {}).items()}
    arrays, n = arrays_of("train: the data", data)
    if microbatch is None and any(layer.needs_whole_batch for _, layer in model.named_modules()):
        microbatch = batch_size
    order = Batches(n, batch_size, seed=seed, drop_last=False)
    threads = ranks.threads if threads is None else threads
    if ranks.size > 1:
        if microbatch is None:
            microbatch = size_for_ranks(min(n, batch_size), math.prod(arrays[0].shape[1:]), ranks)
        _check_ranks(ranks, model, min(n, batch_size), microbatch, capture)
        held_out = () if validation is None else arrays_of("train: the validation data", validation)[0]
        mover = getattr(optimizer, "own", optimizer)  # of a Sharded, the optimiser in it
        plain = {
            name: value
            for name, value in vars(mover).items()
            if isinstance(value, (bool, int, float, tuple)) and value == value
        }
        ranks.require_same(tinydiff=code(), program=program(), backend=backend.active().name, model=summary_of(model),
                           data=digest(*arrays), epochs=epochs, batch_size=batch_size,
                           microbatch=microbatch, threads=threads, seed=seed, resume=resume, exact_sums=ranks.exact,
                           overlap=ranks.overlap, optimizer=type(optimizer).__name__,
                           which_moves=type(mover).__name__, averages=None if ema is None else ema.decay,
                           clip_norm=clip_norm, validation_data=digest(*held_out), log_every=log_every,
                           save_every=save_every, schedule_by=schedule_by, keep=keep, keep_best=keep_best,
                           nonfinite=nonfinite, most_nonfinite=most_nonfinite)  # fmt: skip
        ranks.require_same(**plain)
        averages = [] if ema is None else list(ema.averages.values())
        ranks.broadcast([t._data for _, t in model.named_tensors()] + averages)
    noise, schedule = Rng(seed).child("training"), schedule or constant()
    base_lr = optimizer.lr

    sources = Sources(model)
    files = Files(
        out,
        {"model": model, "optimizer": optimizer, "ema": ema, "sources": sources if sources.named else None},
        order, keep, "" if not keep_best else "loss" if validation is None else "validation",
        about, ranks,
    )  # fmt: skip
    validated = None if validation is None else Validation(
        loss, model, ema, sources, validation, len(arrays), Rng(seed).child("validation"), batch_size, microbatch,
        threads, ranks,
    )  # fmt: skip
    watch = Watch(loss, model, optimizer.parameters, sources, nonfinite, most_nonfinite, microbatch, threads)

    def step(rng: Rng, *batch: Array) -> Array:
        optimizer.zero_grad()  # so the last gradients are not in memory beside the next
        value = gradients(loss, optimizer.parameters, batch, rng, microbatch, threads, ranks)  # forward and backward
        if watch.finite(value):
            if clip_norm is not None:
                clip_grad_norm(optimizer.parameters, clip_norm)
            optimizer.step()
            if ema is not None:
                ema.update()
        return value

    if capture:
        step = backend.capture(step)
    try:
        with files.claimed(resume):
            state = files.load() if resume else files.start()
            log = TrainLog(
                state,
                files,
                watch,
                order,
                epochs,
                log_every,
                save_every,
                validated,
                on_record,
                reference,
                stream,
                ranks,
            )
            with log.running():
                while state.step < log.steps and not log.stopped:
                    epoch, _ = order.locate(state.step)
                    at = epoch if schedule_by == "epoch" else state.step
                    optimizer.lr = base_lr * number(f"train: schedule({at})", schedule(at))
                    batch = [order.rows(a, state.step) for a in arrays]  # on the host
                    if capture:
                        batch = [rows[:] for rows in batch]  # a graph takes arrays
                    rng = noise.child(state.step)
                    with watch.step(rng, batch):
                        value = step(rng, *batch)
                    log.stepped(value, len(batch[0]), optimizer.lr)
    finally:
        optimizer.lr = base_lr
    return state


def _check_ranks(ranks: Ranks, model: Any, batch_size: int, size: int, capture: bool) -> None:
    """Errors: CannotShare for what several ranks cannot do, or if a batch has not a microbatch for each of them."""
    if capture:
        raise CannotShare(f"train: a captured step is of one process, so capture=True cannot have {ranks.size} ranks")
    if whole := [name for name, layer in model.named_modules() if layer.needs_whole_batch]:
        raise CannotShare(
            f"train: layer {whole[0]!r} needs the whole batch in one process (a BatchNorm2d, a Dropout), so "
            f"{ranks.size} ranks cannot share it"
        )
    parts = len(microbatches(batch_size, size))
    if parts < ranks.size:
        raise CannotShare(
            f"train: a batch of {batch_size} in microbatches of {size} is {parts} of them, too few for {ranks.size} "
            f"ranks: choose microbatch={max(1, batch_size // ranks.size)} or less, or fewer ranks"
            if batch_size >= ranks.size
            else f"train: a batch of {batch_size} is too small for {ranks.size} ranks: choose a larger batch_size"
        )
