"""Training with too little memory: the error says which microbatch fits, that one does fit, and nothing is lost.

    python tests/trust/memory.py            twelve limits
    python tests/trust/memory.py --long     a hundred

Each run is a process of its own with a limit on its address space (RLIMIT_AS), which begins before the first step or,
in every other run, after the second. The limits go evenly from less than an update needs to more than a whole step.
After an error the checkpoint must load, and the log must have a whole line for each step. With the microbatch that the
message names, the run must go on to its end; and with all the memory again it must do so always.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import re
import resource
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is free is given back, and no thread has memory in advance: so the limit is what it says.
os.environ["TINYDIFF_KEEP_MEMORY"] = "0"

import harness
import numpy as np

from tinydiff import Rng, nn, ops, saving
from tinydiff.optim import Adam
from tinydiff.training import train

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of mallopt(3)
N, BATCH, STEPS = 16384, 4096, 4
X = np.random.default_rng(0).normal(size=(N, 64)).astype(np.float32)
SMALLEST, LARGEST = 4, 50  # megabytes beside what the process has at first
LATE = 2  # the step after which the limit begins in every other run


def train_some(out: Path | None, microbatch: int, **options: Any) -> Any:
    """Steps whose activations take some 50 MB, ten times as much as the weights and what belongs to them."""
    widths = [64, 256, 256, 256, 256, 256]
    layers = [(nn.Linear(n, m, rng=Rng(i)), nn.SiLU()) for i, (n, m) in enumerate(zip(widths, widths[1:]))]
    net = nn.Sequential(*[layer for pair in layers for layer in pair])

    def loss(x: Any, rng: Any, sample_offset: int) -> Any:
        return ops.square(net(x)).mean()

    return train(net, loss, X, Adam(net.parameters()), epochs=1, batch_size=BATCH, microbatch=microbatch, threads=1,
                 stream=io.StringIO(), out=out, log_every=1, save_every=1, **options)  # fmt: skip


def one(out: Path, limit_mb: int, late: bool, done: list[int]) -> str:
    """Train under a limit; how it ended. done: gets the steps that were done, at its end."""

    def limit() -> None:
        gc.collect()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit_mb * 2**20, resource.RLIM_INFINITY))

    def on_record(state: Any) -> None:
        done.append(state.step)
        if late and state.step == LATE:
            limit()

    if not late:
        train_some(None, BATCH)  # OpenBLAS takes its own memory at the first products, and without ends the process
        limit()
    try:
        state = train_some(out, BATCH, on_record=on_record)
        return "it is enough" if state.exit_code == 0 else "enough for the steps, not to save them"
    except MemoryError as error:
        message = str(error)
    if not (out / "checkpoint.npz").exists():
        return "not even the first checkpoint fits"
    if "out of memory" not in message:
        return "too little for the update"
    if "Not even" in message:
        return "not even one sample fits"
    fits = re.search(r"microbatch=(\d+)", message)
    if not fits:
        return f"FAILED: {message}"
    try:
        state = train_some(out, int(fits[1]), on_record=on_record, resume=True)
    except MemoryError as error:
        if "out of memory" in str(error):
            return f"FAILED: {message}; and then: {error}"
        return "the microbatch of the message fits, but not the update, or reading the checkpoint"
    return "it goes on with the microbatch of the message" + ", but cannot save" * (state.exit_code == 74)


def left_behind(out: Path, done: int, end: str) -> list[str]:
    """What is wrong with the files of a run, of which so many steps were done."""
    wrong = []
    saved = saving.load(out / "checkpoint.npz")
    if flaws := saving.not_finite(saved):
        wrong.append(f"a spoiled checkpoint: {flaws}")
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    if steps not in ([*range(1, done + 1)], [*range(1, done)]):  # at the last one there may be no memory for the line
        wrong.append(f"after {done} steps the log has {steps}")
    step = saved["run"]["step"]
    whole = end in ("it is enough", "it goes on with the microbatch of the message")
    if step > done or whole and (step, len(steps)) != (STEPS, STEPS):
        wrong.append(f"a checkpoint of step {step} and {len(steps)} lines after {done} steps: {end}")
    state = train_some(out, BATCH, resume=True)  # with all the memory again
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    if not state.finished or steps != [*range(1, STEPS + 1)]:
        wrong.append(f"resumed with all the memory, it ends with {steps}")
    return wrong


def limited(out: Path, limit: int, late: bool) -> str:
    """`one`, in a thread: the stack of the main thread could not grow any more, which would end the process. The number
    of steps that were done, and how it ended."""
    done, ended = [0], []

    def run() -> None:
        try:
            ended.append(one(out, limit, late, done))
        except BaseException as error:
            ended.append(f"FAILED: {error!r}")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, 2**17)):
        ctypes.CDLL(None).mallopt(option, value)
    threading.stack_size(2**24)  # all of it is there from the start
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return f"{done[-1]} {ended[0]}"


def in_a_child(function: Callable[[], str]) -> str:
    """What the function returns, called in a new process; or how that process ended."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(write, function().encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status or not said:
        return f"0 FAILED: ended by {signal.Signals(-status).name if status < 0 else status}"
    return said


def main() -> int:
    args = harness.arguments(__doc__, 12, 100, "limits")
    counts, failures = Counter[str](), []
    for i in range(args.count):
        limit, late = SMALLEST + round((LARGEST - SMALLEST) * i / (args.count - 1)), i % 2 == 1
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            done, _, end = in_a_child(lambda: limited(out, limit, late)).partition(" ")  # noqa: B023
            wrong = ""
            if (out / "checkpoint.npz").exists():
                wrong = in_a_child(lambda: "; ".join(left_behind(out, int(done), end)) or "nothing")  # noqa: B023
        if end.startswith("FAILED") or wrong not in ("", "nothing"):
            failures.append(f"{i}, {limit} MB: {end}; {wrong}")
        counts[f"{'after step 2' if late else 'from the start'}: {end}"] += 1
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(counts.items()):
        print(f"  {end:100} {count}")
    return harness.report(args, limits=args.count, failures=len(failures))


if __name__ == "__main__":
    sys.exit(main())
