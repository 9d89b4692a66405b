"""One run under each way in which a disk refuses, one after the other: no byte near the end of a file is left out.

    python tests/trust/rows.py            every 23rd byte
    python tests/trust/rows.py --long     every byte

From the second step on, and half of the times only until the fourth,
    files may not be larger than n bytes (RLIMIT_FSIZE), where n is each number near the size of the checkpoint
    files may not be larger than the log and k bytes, for each byte of its next line
    the file system has room for p more pages, as many as the checkpoint has, more and fewer (root only), also where no
    other file system can take the old checkpoint
    the file system is read-only (root only)
At every record the checkpoint must load, and be of no earlier step than before; the log must have whole lines; what is
said must name the cause; once it has gone everything must be saved, and until then the exit code be 74; where there is
room, nothing may be said, and nothing be missing; and the weights must be those of a run on a good disk.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

from tinydiff import files, saving

BYTES = 260  # before the end of a checkpoint: the directory of the zip, and the checksum
PAGE = 4096
ALONE = "room for p pages, and no other disk"
Change = Callable[[Path], object]


def limit(size: int) -> Change:
    return lambda out: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_limit(out: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def limit_on_the_line(k: int) -> Change:
    return lambda out: limit((out / "log.jsonl").stat().st_size + k)(out)


def mount(out: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(out)], check=True)


def read_only(out: Path) -> None:
    """A second mount of it on top, which is read-only: the first has files that are open."""
    mount(out, "--bind", str(out))
    mount(out, "-o", "remount,bind,ro")


def unmount(out: Path) -> None:
    subprocess.run(["umount", out], check=True)


def read_write(out: Path) -> None:
    if os.statvfs(out).f_flag & os.ST_RDONLY:
        unmount(out)


def fill(pages: int) -> Change:
    def begin(out: Path) -> None:
        there = os.statvfs(out)
        assert there.f_bsize == PAGE
        (out / "filler").write_bytes(bytes(PAGE * (there.f_bavail - pages)))

    return begin


def one(out: Path, begin: Change, end: Change, lift: bool, room: bool | None, good: bytes, cause: str
        ) -> tuple[list[str], str]:  # fmt: skip
    """(what is wrong, how it ended). room: is there enough of it? None: near the limit, where either may be."""
    task, stream, wrong, last = harness.Task(), io.StringIO(), [], 0

    def look() -> None:
        nonlocal last
        try:
            step = saving.load(out / "checkpoint.npz")["run"]["step"]
            text = (out / "log.jsonl").read_text()
            steps = [json.loads(line)["step"] for line in text.splitlines()]
        except (OSError, ValueError) as error:
            wrong.append(f"after step {last}: {error!r}")
            return
        if step < last:
            wrong.append(f"step {step} after {last}")
        if steps != list(range(1, len(steps) + 1)) or text and not text.endswith("\n"):
            wrong.append(f"the log has {text[-200:]!r}")
        last = step

    def on_record(state: Any) -> None:
        if state.step == 2:
            begin(out)
        if state.step == 4 and lift:
            end(out)
        look()

    try:
        run = task.train(2, out, log_every=1, save_every=1, on_record=on_record, stream=stream)
        look()
    finally:
        end(out)
    lines = len((out / "log.jsonl").read_text().splitlines())
    said, steps = stream.getvalue(), 2 * harness.STEPS_PER_EPOCH
    trouble = "cannot be written" in said
    if room is not None and (trouble or run.exit_code != 0) == room:
        wrong.append(f"there is {'' if room else 'no '}room, but exit code {run.exit_code}, and it says {said!r}")
    if trouble and cause not in said:
        wrong.append(f"it says {said!r}")
    if task.weights() != good:
        wrong.append("the weights are others than on a good disk")
    if (run.exit_code == 0) != (last == steps and lines == steps) or run.exit_code not in (0, 74):
        wrong.append(f"exit code {run.exit_code} with step {last} and {lines} lines")
    if run.exit_code == 74 and (lift or cause not in run.unsaved):
        wrong.append(f"exit code 74, {'although it was over, ' if lift else ''}for {run.unsaved!r}")
    if not lift and trouble and run.exit_code == 0 and "is written now" not in said:
        wrong.append("it was said that something cannot be written, and not that it is now")
    # The next start goes on from what is there.
    again = harness.Task()
    if (out / "filler").exists():
        (out / "filler").unlink()
    if not again.train(2, out, resume=True, log_every=1).finished or again.weights() != good:
        wrong.append("a run that is resumed ends elsewhere")
    if found := {path.name for path in out.iterdir()} - {"checkpoint.npz", "log.jsonl"}:
        wrong.append(f"litter: {sorted(found)}")
    return wrong, "everything saved" + (
        ", some of it later" if trouble else ""
    ) if run.exit_code == 0 else "exit code 74"


def main() -> int:
    args = harness.arguments(__doc__, 23, 1, "bytes from one row to the next")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    top, step = Path(tempfile.mkdtemp(prefix="rows-")), args.count
    whole = harness.Task()
    whole.train(2, top / "good", log_every=1, save_every=1)
    size = (top / "good/checkpoint.npz").stat().st_size
    line = len((top / "good/log.jsonl").read_text().splitlines()[-1]) + 1
    too_large, full, no_writing = map(os.strerror, (errno.EFBIG, errno.ENOSPC, errno.EROFS))
    rows: list[tuple[str, Change, Change, bool | None, str]] = []
    # A checkpoint grows by a line with each step, of which there are four more.
    rows += [
        ("files of n bytes", limit(n), no_limit, too_large, None if abs(n - size + 2 * line) < 3 * line else n > size)
        for n in range(size - 4 * line - BYTES, size + 2 * line, step)
    ]
    # A checkpoint is larger than the log, so it has no room in any of these.
    rows += [("a part of a line", limit_on_the_line(k), no_limit, too_large, False) for k in range(0, line + 9, step)]
    root = os.geteuid() == 0 and _can_mount(top)
    if root:
        pages = -(-size // PAGE)
        empty = lambda out: (out / "filler").unlink(missing_ok=True)  # noqa: E731
        for p in range(0, 2 * pages + 3, 1 if step == 1 else 5):
            rows += [
                ("room for p pages", fill(p), empty, full, True if p > 1 else None),
                (ALONE, fill(p), empty, full, True if p > pages + 1 else None if p > pages - 2 else False),
            ]
        rows += [("read-only", read_only, read_write, no_writing, False)]
    failures, counts, make_room = [], Counter[str](), files._make_room
    for i, (name, begin, end, cause, room) in enumerate(rows):
        for lift in (False, True):
            out = top / f"{i}-{lift}"
            out.mkdir()
            if root:
                mount(out, "-t", "tmpfs", "-o", "size=4m", "tmpfs")
            try:
                if name == ALONE:
                    files._make_room = lambda path: False
                wrong, how = one(out, begin, end, lift, room, whole.weights(), cause)
            finally:
                files._make_room = make_room
                if root:
                    unmount(out)
            shutil.rmtree(out)
            failures += [f"{i}, {name}, {'until step 4' if lift else 'to the end'}: {text}" for text in wrong]
            counts[f"{name}, {'until step 4' if lift else 'to the end'}: {how}"] += 1
    print(*failures, sep="\n", end="\n" if failures else "")
    for how, count in sorted(counts.items()):
        print(f"  {how:70} {count}")
    shutil.rmtree(top)
    return harness.report(args, rows=2 * len(rows), failures=len(failures))


def _can_mount(top: Path) -> bool:
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", top], capture_output=True).returncode:
        return False
    unmount(top)
    return True


if __name__ == "__main__":
    sys.exit(main())
