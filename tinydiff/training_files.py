"""What a run keeps on disk: its log and its checkpoints, so that it can go on as if it had never stopped.

A checkpoint that has once been written stays good: a new one replaces it in one step, and only if every weight in it is
a finite number. If it cannot be written (a full disk), the run says so once, goes on, and tries again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import saving
from .arguments import integer, number
from .data.batches import Batches
from .distributed import ALONE, CannotShare, Ranks
from .files import FULL, append_line, one_at_a_time, remove_litter_of
from .rng import Rng

Record = dict[str, Any]
SAVED = ("step", "records", "finished", "seconds", "loss_sum", "images", "skipped")  # of a TrainState
LINKING = ".linking.part"  # the end of a second name that is not finished
TRY_AGAIN_AFTER = 60.0  # seconds, if a file could not be written


@dataclass
class TrainState:
    """The progress of a run: steps done, the lines of its log, and whether it reached the end."""

    step: int = 0
    records: list[Record] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0  # of training, before and after it was resumed; pictures and saving do not count
    loss_sum: float = 0.0  # over the images since the last record
    images: int = 0  # the number of these images
    skipped: int = 0  # images since the last record whose steps were skipped, because something was not finite
    signal: int = 0  # the signal that ended the run; 0 if none did
    unsaved: str = ""  # what could not be written, and is missing on the disk
    stopped: str = ""  # why on_record ended the run

    def stop(self, why: str = "on_record asked for it") -> None:
        """In on_record: this record is the last one. The run is then saved, and finished; resumed, it goes on."""
        self.stopped = why or "on_record asked for it"

    @property
    def exit_code(self) -> int:
        """For sys.exit: 0 at the end; 128 + the signal, as shells have it (Ctrl-C: 130, SIGTERM: 143); 74 (EX_IOERR)
        if something could not be written."""
        if self.unsaved:
            return 74
        return 0 if self.finished else 128 + (self.signal or 2)


class CannotResume(ValueError):
    """The checkpoint to go on from is damaged, or is not one of this run and this model."""


class Files:
    """log.jsonl and checkpoint.npz in the directory of a run; without a directory, nothing.

    parts: objects with a state_dict, by name; None is left out. settings: must be the same to resume. keep: so many of
    the last checkpoints. best_by: the name of a number in the records; the checkpoint with the lowest one is kept too,
    as best.npz. about: an entry of every checkpoint, which a run that has none of its own keeps as it was.
    ranks: rank 0 alone writes.
    """

    def __init__(
        self,
        out: Any,
        parts: dict[str, Any],
        order: Batches,
        keep: int = 1,
        best_by: str = "",
        about: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ):
        self.out = None if out is None else Path(out)
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.order, self.keep, self.best_by, self.about = order, keep, best_by, about
        self.settings = {"images": order.n, "batch_size": order.batch_size, "seed": order.seed}
        self.ranks, self.writes = ranks, ranks.rank == 0
        # A Sharded gives its state on all ranks together, so what one rank alone would save is not saved.
        self.together = ranks.size > 1 and any(hasattr(part, "ranks") for part in self.parts.values())
        self.tried_at: int | None = None
        self.saved_at: int | None = None
        self.best = math.inf  # the number of best.npz
        self.lines: list[str] = []  # of the log, which could not be written yet
        self.set_aside: list[tuple[Path, Path]] = []  # the files of an older run: where they were, where they are
        self.troubles: dict[str, str] = {}  # what could not be written, and why
        self.failed_at = 0.0
        self.say: Callable[[str], None] = lambda text: None

    @contextlib.contextmanager
    def claimed(self, resume: bool) -> Iterator[None]:
        """Inside, no other run can use the directory. Errors: InUse, with the number of its process, if one does."""
        if self.out is None or not self.writes or resume and not self.out.exists():
            yield
            return
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"train: out must be a directory, but {self.out} is a file")
        self.out.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self.out / "run.lock", f"the directory {self.out}"):
            # Of a run that was killed: now nobody else is here.
            for litter in self.out.glob(f"*{LINKING}"):
                litter.unlink(missing_ok=True)
            for name in ("checkpoint.npz", "starting-checkpoint.npz", "log.jsonl"):
                remove_litter_of(self.out / name)
            yield

    def start(self) -> TrainState:
        """A new run. Its checkpoint of step 0 and its log are written now: what cannot be saved is an error before the
        first step. The files of an older run get other names; after an error they have their own again."""
        state = TrainState()
        if self.out is None:
            return state
        if self.writes:
            self._start(state)
        else:
            self._checked_parts(state)
        self._require_shared()
        self.saved_at = 0
        return state

    def _start(self, state: TrainState) -> None:
        assert self.out is not None
        first = self.out / "starting-checkpoint.npz"
        try:
            self._write(first, state)
            kept = f"previous-{1 + max((n for n, _ in self._kept()), default=0)}-"
            older = [self.out / "checkpoint.npz", self.out / "log.jsonl", self.out / "best.npz", *self._last()]
            if not self._is_of_no_step():
                for path in filter(Path.exists, older):
                    os.replace(path, path.with_name(kept + path.name))
                    self.set_aside.append((path, path.with_name(kept + path.name)))
            os.replace(first, self.out / "checkpoint.npz")
            (self.out / "log.jsonl").touch()
        except BaseException:
            for path, renamed in self.set_aside:
                os.replace(renamed, path)
            first.unlink(missing_ok=True)
            raise

    def _require_shared(self) -> None:
        """Errors: CannotShare, on all ranks, if one of them does not see the folder in which rank 0 writes."""
        assert self.out is not None
        written = self.ranks.gather(os.getpid())[0]  # the number in the lock file of rank 0, which is there now
        try:
            sees = int((self.out / "run.lock").read_text()) == written
        except (OSError, ValueError):
            sees = False
        if blind := [str(rank) for rank, seen in enumerate(self.ranks.gather(sees)) if not seen and rank]:
            raise CannotShare(
                f"train: {self.out} must be a folder that all ranks see, so that the run can go on on any of their "
                f"machines, but what rank 0 writes there is not seen by rank {', '.join(blind)}"
            )

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

    # ---- while it runs

    def log(self, record: Record, own: Record) -> None:
        """Add a line to the log, after those that could not be written before. own: the record without what on_record
        has added. Errors: TypeError or ValueError if that cannot be written; then the record is its own."""
        record.update(own)  # what the run has measured stays
        if self.out is None or not self.writes:
            return
        try:
            saving.check({"record": record})
            _line(record)
        except (TypeError, ValueError):
            record.clear()
            record.update(own)
            raise
        finally:
            self.lines.append(_line(record))
            self._write_lines()

    def _write_lines(self) -> None:
        assert self.out is not None
        with self._tried("log.jsonl"):
            while self.lines:
                append_line(self.out / "log.jsonl", self.lines[0])
                del self.lines[0]

    def save(self, state: TrainState) -> None:
        """Write the checkpoint, unless the one on disk is of this step. An OSError is said, not raised.
        Errors: FloatingPointError, and nothing is written, if a weight is not finite."""
        if self.out is None or state.step in (self.saved_at, self.tried_at):
            return
        self.tried_at = state.step if self.together else None
        path = self.out / "checkpoint.npz"
        if not self.writes:
            self._checked_parts(state)
            self.saved_at = state.step
            return
        parts = self._checked_parts(state) if self.together else None  # with the other ranks: an error must end all
        with self._tried(path.name):
            if self.keep > 1 and self.saved_at and path.exists():
                with contextlib.suppress(OSError):  # the new one is worth more than a name for the old one
                    _link(path, self.out / f"checkpoint-{self.saved_at}.npz")
            self._write(path, state, parts)
            self.saved_at = state.step
            for older in self._may_go()[: 1 - self.keep]:
                older.unlink(missing_ok=True)
            last = state.records[-1] if state.records else {}
            if self.best_by and last.get("step") == state.step and last[self.best_by] < self.best:
                _link(path, self.out / "best.npz")
                self.best = last[self.best_by]

    def try_again(self, state: TrainState, now: bool = False) -> None:
        """Write what could not be written, if that was a minute ago."""
        if self.troubles and (now or time.monotonic() - self.failed_at > TRY_AGAIN_AFTER):
            self._write_lines()
            if not self.together:
                self.save(state)

    @contextlib.contextmanager
    def _tried(self, name: str) -> Iterator[None]:
        """Inside, something is written. If that fails, it is said once, and noted."""
        try:
            yield
        except (OSError, MemoryError) as error:  # a checkpoint needs a copy of everything
            if not self.troubles:
                self.say(f"WARNING: {name} cannot be written: {error}. The training goes on, and tries again")
            self.troubles[name] = str(error)
            self.failed_at = time.monotonic()
        else:
            if self.troubles.pop(name, None) and not self.troubles:
                self.say("everything that could not be written is written now")

    def _last(self) -> list[Path]:
        """The checkpoints before the last one that are kept, the oldest first."""
        assert self.out is not None
        found = [(re.fullmatch(r"checkpoint-(\d+)\.npz", path.name), path) for path in self.out.iterdir()]
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def _may_go(self) -> list[Path]:
        """Of these, the ones that this run may remove. They are somebody else's if it makes none, and before it has
        begun."""
        return self._last() if self.keep > 1 and self.saved_at is not None else []

    def _checked_parts(self, state: TrainState) -> dict[str, Any]:
        """The state of every part. Errors: FloatingPointError if a weight is not finite."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        if flaws := self._flaws(parts):
            there = "" if self.saved_at is None else f"; the checkpoint on disk is still that of step {self.saved_at}"
            raise FloatingPointError(f"step {state.step} is not saved, because {flaws}{there}")
        return parts

    def _write(self, path: Path, state: TrainState, parts: dict[str, Any] | None = None) -> None:
        parts = self._checked_parts(state) if parts is None else parts
        run = {name: getattr(state, name) for name in SAVED}
        while True:
            try:
                about = {} if self.about is None else {"about": self.about}
                saving.save(path, {"settings": self.settings, "run": run, **parts, **about})
                return
            except OSError as error:
                if error.errno not in FULL or not (older := self._may_go()):
                    raise
                older[0].unlink()  # the newest one is worth more than the oldest

    def _flaws(self, parts: dict[str, Any]) -> str:
        """Which arrays are not finite? A buffer of the model may hold an Inf, as a mask does."""
        trained = {name for name, _ in self.parts["model"].named_parameters()}
        wrong = []
        for part, state in parts.items():
            for name, kind in saving.not_finite(state):
                if kind == "NaN" or part != "model" or name in trained:
                    wrong.append(f"{part}/{name} has {kind}")
        return ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")

    # ---- going on

    def load(self) -> TrainState:
        """Resume the saved run: load the state of every part, and cut the log to the records of that time. After an
        error every part is as it was."""
        if self.out is None:
            raise ValueError("train: resume needs `out`, the directory of the run")
        path = self.out / "checkpoint.npz"
        if self.ranks.gather(path.exists())[0]:
            self._require_shared()
        if not path.exists():
            kept = ", ".join(name for _, name in sorted(self._kept()))
            instead = f"; rename one of these to go on with an older run: {kept}" if kept else ""
            raise FileNotFoundError(f"nothing to resume: there is no {path}{instead}")
        if self.writes:
            with contextlib.suppress(OSError):
                (self.out / "starting-checkpoint.npz").unlink(missing_ok=True)  # of a start that was killed
        state, saved = self._read(path)
        lines = "".join(map(_line, state.records))
        log = self.out / "log.jsonl"
        self._load_parts(saved, path, lambda: saving.write_atomically(log, lambda file: file.write(lines.encode()))
                         if self.writes else None)  # fmt: skip
        self.saved_at = state.step
        if self.about is None:
            self.about = saved.get("about")
        if self.best_by:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                self.best = float(saving.load(self.out / "best.npz")["run"]["records"][-1][self.best_by])
        return state

    def roll_back(self) -> int:
        """Load the weights, the optimiser and the averages of the last checkpoint; returns its step."""
        assert self.out is not None
        state, saved = self._read(self.out / "checkpoint.npz")
        self._load_parts(saved, self.out / "checkpoint.npz", lambda: None)
        return state.step

    def _read(self, path: Path) -> tuple[TrainState, dict[str, Any]]:
        """A checkpoint, and the progress in it, which have been checked as far as it goes without the parts."""
        try:
            saved = saving.load(path)
        except ValueError as error:
            raise CannotResume(str(error)) from error
        return self._checked(saved, path), saved

    def _load_parts(self, saved: dict[str, Any], path: Path, then: Callable[[], object]) -> None:
        """Load all parts, or none if one of them refuses its state or `then` fails."""
        before = {name: part.state_dict() for name, part in self.parts.items()}
        try:
            for name, part in self.parts.items():
                try:
                    part.load_state_dict(saved[name])
                except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                    why = error if isinstance(error, ValueError) else repr(error)
                    raise CannotResume(f"{path}: its {name} is of another run: {why}") from error
            # Once more, in the dtypes of this run: 1e300 is no float32.
            if flaws := self._flaws({name: part.state_dict() for name, part in self.parts.items()}):
                raise CannotResume(f"{path}: {flaws}")
            then()
        except BaseException:
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            raise

    def _kept(self) -> list[tuple[int, str]]:
        """The number and the name of each file of an older run."""
        if self.out is None or not self.out.is_dir():
            return []
        name = r"previous-(?:(\d+)-)?(?:checkpoint(?:-\d+)?\.npz|best\.npz|log\.jsonl)"
        found = (re.fullmatch(name, path.name) for path in self.out.iterdir())
        return [(int(match[1] or 0), match[0]) for match in found if match]

    def _checked(self, saved: dict[str, Any], path: Path) -> TrainState:
        """The progress in a checkpoint. Errors: CannotResume unless it is of a run with these settings and parts."""
        if missing := [name for name in ("settings", "run", *self.parts) if name not in saved]:
            raise CannotResume(f"{path} has no {', '.join(missing)}")
        if extra := [name for name in saved if name not in ("settings", "run", "about", *self.parts)]:
            raise CannotResume(f"{path} has {', '.join(extra)}, which this run has not, and would lose")
        settings = saved["settings"] if isinstance(saved["settings"], dict) else {}
        found = {name: settings.get(name) for name in self.settings}
        if changed := [f"{k} {found[k]!r}, not {v}" for k, v in self.settings.items() if repr(found[k]) != repr(v)]:
            raise CannotResume(f"{path} is of another run: it has {', '.join(changed)}")
        try:
            state = _state_of(saved["run"])
            self._check_images(state)
        except ValueError as error:
            raise CannotResume(f"{path} is of another version, or it is no run of train: {error}") from error
        if flaws := self._flaws({name: saved[name] for name in self.parts}):
            raise CannotResume(f"{path}: {flaws}")
        return state

    def _check_images(self, state: TrainState) -> None:
        """Errors: ValueError unless the images since the last record are those of the steps since then."""

        def seen(step: int) -> int:
            epoch, position = self.order.locate(step)
            return epoch * self.order.n + min(position * self.order.batch_size, self.order.n)

        steps = [integer("the step of a record", record.get("step")) for record in state.records]
        if steps != sorted(set(steps)) or steps and steps[-1] > state.step:
            raise ValueError(f"its records are of the steps {str(steps):.200}, at step {state.step}")
        since = seen(state.step) - seen(steps[-1] if steps else 0)
        if since != state.images + state.skipped:
            raise ValueError(
                f"at step {state.step} it must have seen {since} images since its last record, not "
                f"{state.images + state.skipped}"
            )


def _state_of(run: Any) -> TrainState:
    """A TrainState from a checkpoint. Errors: ValueError unless it has each field and no other, of the right kind."""
    if isinstance(run, dict):
        run = {"skipped": 0, **run}  # version 0.1.0 had none
    if not isinstance(run, dict) or set(run) != set(SAVED):
        raise ValueError(
            f"its progress must have {sorted(SAVED)}, not {sorted(run) if isinstance(run, dict) else run!r}"
        )
    if not isinstance(run["finished"], bool):
        raise ValueError(f"its finished must be True or False, not {run['finished']!r}")
    if not isinstance(run["records"], list) or not all(isinstance(record, dict) for record in run["records"]):
        raise ValueError(f"its records must be a list of dicts, not {run['records']!r}")
    for record in run["records"]:
        number("the loss of a record", record.get("loss"))
    return TrainState(
        step=integer("its step", run["step"], 0),
        records=run["records"],
        finished=run["finished"] is True,
        seconds=number("its seconds", run["seconds"], "[0, inf)"),
        loss_sum=number("its loss_sum", run["loss_sum"]),
        images=integer("its images", run["images"], 0),
        skipped=integer("its skipped", run["skipped"], 0),
    )


def _line(record: Record) -> str:
    """A record as a line of the log; NumPy's numbers and arrays, which on_record may have added, as Python's, and what
    is not finite as null."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"a record of the log has {value!r}, which cannot be written")

    def finite(value: Any) -> Any:  # JSON has no NaN
        if isinstance(value, dict):
            return {key: finite(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(part) for part in value]
        value = plain(value) if hasattr(value, "tolist") else value
        if isinstance(value, list):
            return finite(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), default=plain) + "\n"


def _link(source: Path, target: Path) -> None:
    """Give a file a second name. The file behind the first one is never written again, only replaced."""
    temporary = target.with_name(target.name + LINKING)
    temporary.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), temporary)  # a name of a link would lead to whatever comes after it
    except OSError as error:
        if error.errno in (*FULL, errno.EROFS, errno.EACCES):
            raise
        shutil.copyfile(source, temporary)  # a file system without such names
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # it stays if the target was this very file


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
