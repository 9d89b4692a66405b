"""Measurements that need a fresh process: the time of an import, and the peak memory of a training step.

python tests/benchmarks/fresh.py import tinydiff                 prints milliseconds
python tests/benchmarks/fresh.py memory tinydiff concat 256 2    prints MiB
python tests/benchmarks/fresh.py memory "torch channels_last" concat 256 2
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

from measure import Run, Unavailable


def in_fresh_process(*arguments: str) -> Run:
    """A run that starts this file anew, and returns the number that it prints."""

    def run() -> float:
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise Unavailable(" ".join(last) or f"{' '.join(arguments)} ended with status {done.returncode}")
        return float(done.stdout)

    return run


def import_time(module: str) -> float:
    if module in sys.modules:
        sys.exit(f"{module} was imported before it could be timed")
    start = time.perf_counter()
    importlib.import_module(module)
    return 1e3 * (time.perf_counter() - start)


def step_memory(rival: str, name: str, batch: int, threads: int) -> float:
    """MiB by which the peak is higher after two training steps than after the net was made."""
    import ours

    if rival == "tinydiff":
        net = ours.net_of(name)
        before = peak()
        step = ours.training_step(name, batch, threads, net=net)
    else:
        import theirs

        theirs.settings(threads)
        net = theirs.net_of(name)
        before = peak()
        step = theirs.training_step(name, batch, theirs.FORMATS[rival], net=net)
    step(), step()
    return (peak() - before) / 1024


def peak() -> int:
    """The largest resident size of this process so far, KiB. Not getrusage's, which counts the parent's too."""
    status = Path("/proc/self/status")
    if not status.exists():
        sys.exit("the peak of the memory is read from /proc/self/status, which only Linux has")
    return int(status.read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    if sys.argv[1] == "import":
        print(import_time(sys.argv[2]))
    else:
        print(step_memory(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
