"""A training that is killed again and again ends with the very weights of one that was not.

    python tests/trust/kills.py            some kills
    python tests/trust/kills.py --long     1,000

Of five kills two are at random instants, two at random lines of the files that write (so also between a rename and the
line after it), and one is SIGTERM or SIGINT at a random instant, which must save and end with its exit code. The run
saves after every step, or after every third. After every kill the checkpoint must load, be of no earlier step than
before, and be of at least the step that the run had reported as saved; the next start must find nothing wrong with it,
and leave no litter; in the end the weights must be those of a run that was never killed, and the log must have each
line once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

from tinydiff import files, saving, training_files
from tinydiff.training_log import TrainLog

WATCHED = {module.__file__ for module in (files, saving, training_files)}
LONGEST = 60  # seconds that a run may live after its start, most of them without work
SUDDEN = (signal.SIGKILL, signal.SIGPROF)


def kill_at_line(n: int) -> None:
    """Kill this process at its n-th line in the watched files."""
    left = [n]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def litter(out: Path) -> list[str]:
    """What no run that has started leaves there."""
    known = r"checkpoint(-\d+)?\.npz|best\.npz|log\.jsonl|run\.lock"
    return sorted(path.name for path in out.iterdir() if not re.fullmatch(known, path.name))


def kill_after(seconds: float, number: int) -> None:
    """Send this process the signal when it has worked so long: a busy machine makes no difference. SIGKILL cannot be
    asked for; SIGPROF, for which no program has a handler, ends it as suddenly."""
    if number != signal.SIGPROF:
        signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def child(out: Path, epochs: int, save_every: int, end: Callable[[], None], report: int) -> None:
    """Go on with the run, and report that it has begun, every step that is saved, and what goes wrong."""
    say = lambda text: os.write(report, f"{text}\n".encode())  # noqa: E731
    task = harness.Task()
    resume = (out / "checkpoint.npz").exists()
    save, running = training_files.Files.save, TrainLog.running

    @contextlib.contextmanager
    def begun(self: Any) -> Any:
        with running(self):  # which notices signals
            say("begun")
            if found := litter(out):
                say(f"litter after a start: {found}")
            yield

    def saved(self: Any, state: Any) -> None:
        save(self, state)
        say(self.saved_at)

    training_files.Files.save = saved  # type: ignore[method-assign]
    TrainLog.running = begun  # type: ignore[method-assign]
    end()
    try:
        run = task.train(epochs, out, resume=resume, save_every=save_every, keep=2, keep_best=True)
    except Exception as error:
        say(f"{error!r}")
        raise
    os._exit(run.exit_code)


def main() -> int:
    args = harness.arguments(__doc__, 25, 1000, "kills")
    rng = random.Random(args.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    out = Path(tempfile.mkdtemp(prefix="kills-"))
    epochs = 20 * args.count  # so many that no child comes to the end before it is killed
    step, starts, failures, ends, steps = 0, 0, [], Counter[str](), Counter[str]()
    for i in range(args.count):
        if (step + 1) // harness.STEPS_PER_EPOCH >= epochs:
            break
        by_line, asked = i % 5 < 2, i % 5 == 4
        line, seconds = rng.randrange(1, 8000), rng.uniform(0.005, 0.12)
        number = signal.SIGKILL if by_line else signal.SIGPROF
        number = rng.choice([signal.SIGTERM, signal.SIGINT]) if asked else number
        save_every = rng.choice([1, 1, 3])
        read, write = os.pipe()
        if i and i % 100 == 0:
            print(f"{i} kills, {len(failures)} failures, {time.monotonic() - args.began:.0f} s", flush=True)
        process = os.fork()
        if process == 0:
            os.close(read)
            try:
                end = (lambda: kill_at_line(line)) if by_line else (lambda: kill_after(seconds, number))  # noqa: B023
                child(out, epochs, save_every, end, write)
            finally:
                os._exit(1)  # a signal that came before the training began
        os.close(write)
        with os.fdopen(read) as pipe:  # whose other end is closed when the child is dead
            late = threading.Timer(LONGEST, os.kill, (process, signal.SIGKILL))
            late.start()
            lines = [line.rstrip() for line in pipe if line.endswith("\n")]
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        fired = late.finished.is_set()
        late.cancel()
        late.join()  # no thread is there when the next child is forked
        if fired and status == -signal.SIGKILL != -number:
            failures.append(f"{i}: {number} was lost")
        begun, said = "begun" in lines, [int(line) for line in lines if line.isdigit()]
        starts += begun
        failures += [f"{i}: {line}" for line in lines if line != "begun" and not line.isdigit()]
        ends[f"{'line' if by_line else 'instant'}, {signal.Signals(number).name}: ended with {status}"] += 1
        # A signal that comes before the training has begun ends the process as it would any other.
        good = (-number,) if number in SUDDEN else (128 + number,) if begun else (128 + number, -number, 1)
        if status not in good:
            failures.append(f"{i}: {number} ended with {status}, {'after' if begun else 'before'} the run began")
        if not (out / "checkpoint.npz").exists():
            if step:
                failures.append(f"{i}: the checkpoint is gone")
            continue
        try:
            now = saving.load(out / "checkpoint.npz")["run"]["step"]
        except ValueError as error:
            failures.append(f"{i}: {error}")
            break
        if now < max([step, *said]):
            failures.append(f"{i}: step {now} after {max([step, *said])}")
        steps["forward" if now > step else "none"] += 1
        step = now
    last = harness.Task()
    epochs_done = -(-max(step, 1) // harness.STEPS_PER_EPOCH)
    last.train(epochs_done, out, resume=(out / "checkpoint.npz").exists(), keep=2, keep_best=True)
    same = harness.Task()
    records = same.train(epochs_done).records
    if last.weights() != same.weights():
        failures.append("the weights are others than without the kills")
    lines = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    if lines != [record["loss"] for record in records]:
        failures.append("the log is another than without the kills")
    if found := litter(out):
        failures.append(f"litter: {found}")
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(ends.items()):
        print(f"  {end:42} {count}")
    status = harness.report(args, kills=sum(ends.values()), starts_that_came_to_training=starts,
                           kills_after_which_it_had_come_further=steps["forward"], steps_done=step,
                           failures=len(failures))  # fmt: skip
    if not failures:
        shutil.rmtree(out)
    return status


if __name__ == "__main__":
    sys.exit(main())
