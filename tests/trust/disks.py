"""Training on a disk that becomes full: every step is learned, the last good checkpoint stays, no line is cut.

    python tests/trust/disks.py            some disks
    python tests/trust/disks.py --long     some hundred

Root has real file systems of all sizes from less than one checkpoint to three of them, which another program fills and
frees at random while the run goes on. Any other user has the limit of the system on the size of a file.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness

from tinydiff import saving


def main() -> int:
    args = harness.arguments(__doc__, 10, 300, "disks")
    rng = random.Random(args.seed)
    top = Path(tempfile.mkdtemp(prefix="disks-"))
    whole = harness.Task(500)
    losses = [record["loss"] for record in whole.train(6).records]
    harness.Task(500).train(1, top / "measured")
    size = (top / "measured" / "checkpoint.npz").stat().st_size
    real = (
        os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", top], capture_output=True).returncode
    )
    if real:
        subprocess.run(["umount", top], check=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    failures, counts = [], Counter[str]()
    for i in range(args.count):
        out = top / f"run-{i}"
        out.mkdir()
        room = rng.uniform(0.9, 3.2)
        if real:
            options = f"size={int(size * room / 1024) + 8}k"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", out], check=True)
        try:
            end = one(out, rng, real, size, whole.weights(), losses, failures, i)
        finally:
            if real:
                subprocess.run(["umount", out], check=True)
        counts[end] += 1
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(counts.items()):
        print(f"  {end:60} {count}")
    shutil.rmtree(top, ignore_errors=True)
    how = "file systems of their own" if real else "the limit on the size of a file"
    return harness.report(args, disks=args.count, made_with=how, failures=len(failures))


def one(out: Path, rng: random.Random, real: bool, size: int, weights: bytes, losses: list[float],
        failures: list[str], i: int) -> str:  # fmt: skip
    """A run on a disk that another program fills and frees; how it ended."""
    filler, last, limited = out / "filler", [0], [2 * size]

    def disturb(state: Any) -> None:
        if real:
            with suppress(OSError):
                filler.write_bytes(bytes(int(size * rng.uniform(0, 2.5)))) if rng.random() < 0.6 else filler.unlink()
        else:
            limited[0] = int(size * rng.uniform(0.2, 1.3))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limited[0], resource.RLIM_INFINITY))
        try:
            step = saving.load(out / "checkpoint.npz")["run"]["step"]
            if step < last[0]:
                failures.append(f"{i}: step {step} after {last[0]}")
            last[0] = step
        except (OSError, ValueError) as error:
            failures.append(f"{i}: in the middle: {error}")

    task, stream = harness.Task(500), io.StringIO()
    try:
        run = task.train(6, out, log_every=1, save_every=1, on_record=disturb, keep=rng.choice([1, 1, 3]),
                         stream=stream)  # fmt: skip
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG) or last[0]:
            failures.append(f"{i}: {error!r}")
        return "refused at the start"
    finally:
        if not real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if task.weights() != weights:
        failures.append(f"{i}: the weights are others than on a large disk")
    saved = saving.load(out / "checkpoint.npz")["run"]["step"]
    text = (out / "log.jsonl").read_text()
    lines = [json.loads(line)["step"] for line in text.splitlines()]
    if lines != list(range(1, len(lines) + 1)) or not text.endswith("\n" if lines else ""):
        failures.append(f"{i}: the log has {lines}")
    complete = saved == 18 and len(lines) == 18
    room = shutil.disk_usage(out).free > size + 8192 if real else limited[0] > size + 8192
    if room and not complete:
        failures.append(f"{i}: something is missing, although there is room now")
    if (run.exit_code == 0) != complete or run.exit_code not in (0, 74):
        failures.append(f"{i}: exit code {run.exit_code}, checkpoint of step {saved}, {len(lines)} lines")
    said = "everything saved" if complete else "said that something is missing"
    trouble = "cannot be written" in stream.getvalue()
    return f"{said}, {'some of it later' if trouble else 'without trouble'}" if complete else said


if __name__ == "__main__":
    sys.exit(main())
