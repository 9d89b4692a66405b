"""How a case is measured: its rivals take turns, and the result is the ratio within each round.

A machine with other work is sometimes slow for seconds. Rivals that take turns, A B C A B C ..., are slow together, so
most ratios of one round are fair, and the median over the rounds is not affected by the others.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Run = Callable[[], Any]
SHORTEST = 0.2  # seconds: a measurement shorter than this repeats the run, and takes the mean
PAUSE = (
    0.05  # seconds between rivals: threads of a BLAS spin for a while after their last product, and must not disturb
)


class Unavailable(Exception):
    """Why a rival cannot be measured here. The table says so."""


@dataclass
class Case:
    """What is measured: `rivals` are builders, {name: () -> run}; building is not timed."""

    name: str  # family/what/how large
    rivals: Mapping[str, Callable[[], Run]]
    unit: str = "ms"
    per: float = 1  # what a time is divided by: the ops of a chain, the samples of a batch
    reports: bool = False  # the run returns its own figure, in `unit`, and is not timed
    rounds: int | None = None  # at most, of what hardly varies and takes long
    threads: int | None = None  # of each rival, where the case sets it
    ours: tuple[str, ...] = ("tinydiff",)  # the ratio is of the better of these
    theirs: tuple[str, ...] = ("torch", "torch channels_last", "torch fused")  # to the better of these
    goal: float | None = None  # for the ratio

    @property
    def family(self) -> str:
        return self.name.split("/")[0]


@dataclass
class Result:
    case: Case
    times: dict[str, list[float]] = field(default_factory=dict)  # one value per round, in the case's unit
    unavailable: dict[str, str] = field(default_factory=dict)

    def median(self, rival: str) -> float:
        return statistics.median(self.times[rival])

    def best(self, rivals: tuple[str, ...]) -> str | None:
        return min((r for r in rivals if r in self.times), key=self.median, default=None)

    def ratio(self, theirs: tuple[str, ...]) -> dict[str, float] | None:
        """Of the better of ours to the better of theirs, round by round."""
        a, b = self.best(self.case.ours), self.best(theirs)
        return spread([x / y for x, y in zip(self.times[a], self.times[b])]) if a and b else None

    def record(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The line of the JSON file."""
        case = self.case
        return {
            "case": case.name, "unit": case.unit, "goal": case.goal, "times": self.times,
            "counts": {"tinydiff": self.best(case.ours), "torch": self.best(case.theirs)},
            "ratio": self.ratio(case.theirs), "ratio_to_graph": self.ratio(tuple(f"{r} captured" for r in case.theirs)),
            "unavailable": self.unavailable, **about, **({"threads": case.threads} if case.threads else {}),
            "rounds": max(map(len, self.times.values()), default=0),
        }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def measure(case: Case, pairs: int, wait: Run, apart: Any = None) -> Result:
    """Build the rivals, warm each up, and let them take turns `pairs` times. wait(): until the device is done. apart:
    the process for PyTorch's (apart.py); without it they run in this one."""
    result, runs, repeats = Result(case), {}, {}
    for name, build in case.rivals.items():
        try:
            away = apart is not None and name.startswith("torch") and not case.reports
            runs[name] = apart.run(case.name, name) if away else build()
            runs[name]()  # the first call also makes what is made once
        except Unavailable as reason:
            runs.pop(name, None)
            result.unavailable[name] = str(reason)
            continue
        result.times[name], repeats[name] = [], 1
        if not case.reports:
            once = timed(runs[name], 1, wait)
            while repeats[name] * once < SHORTEST:
                repeats[name] = max(2 * repeats[name], math.ceil(SHORTEST / max(once, 1e-7)))
                once = timed(runs[name], repeats[name], wait)
    gc.collect()
    gc.freeze()  # else Python's collector would go through all objects of both libraries in the time of the next rival
    scale = {"ms": 1e3, "us": 1e6}.get(case.unit, 1) / case.per
    for _ in range(min(pairs, case.rounds or pairs)):
        for name, run in runs.items():
            if case.reports:
                result.times[name].append(run() / case.per)
                continue
            time.sleep(PAUSE)
            run()  # as in a loop, where the caches have what the run before has left, and no thread sleeps
            result.times[name].append(scale * timed(run, repeats[name], wait))
    gc.unfreeze()
    return result


def timed(run: Run, repeats: int, wait: Run) -> float:
    """Seconds per run."""
    if hasattr(run, "seconds"):  # in another process, where it is timed
        return run.seconds(repeats)
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


# ---------------------------------------------------------------- on what


def facts(gpu: str | None) -> dict[str, Any]:
    """The machine, the versions, the date and the command, which are printed with every figure."""
    versions = {"python": platform.python_version()}
    for package in ("numpy", "torch", "cupy-cuda13x", "cupy-cuda12x"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        versions["tinydiff"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no repository, or no git
        from tinydiff import __version__  # here, as fresh.py uses this file, and times that import

        versions["tinydiff"] = __version__
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "machine": {"cpu": cpu(), "system": platform.platform(), "gpu": gpu, "load_before": load},
        "versions": versions,
        "date": f"{date.today()}",
        "command": shlex.join(["python", "tests/benchmarks", *sys.argv[1:]]),
    }


def cpu() -> str:
    """Its model and how many, as the system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{os.cpu_count()} x {platform.processor() or platform.machine()}"
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else f"{os.cpu_count()} x {platform.machine()}"
