"""Two checkouts of tinydiff in turns, to see what a change costs: python tests/benchmarks/checkouts.py BEFORE AFTER

Each checkout runs its own benchmark cases in a process of its own, and the two take turns, as in `python
tests/benchmarks`. A ratio is the time of AFTER over that of BEFORE in the same round; below 1, the change is faster.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RIVALS = ("tinydiff", "tinydiff plain call")
PAUSE = 0.05  # seconds between two runs, in which the threads of a BLAS go to sleep
LEAST = 0.05  # seconds; what is shorter is repeated


class Checkout:
    """A process that runs the cases of one checkout."""

    def __init__(self, root: Path, threads: int):
        command = [sys.executable, __file__, "--serve", str(root), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin and self.process.stdout
        self.asks, self.answers = self.process.stdin, self.process.stdout
        self.cases: dict[str, list[str]] = json.loads(self.answers.readline())

    def seconds(self, case: str, rival: str, repeats: int) -> float:
        self.asks.write(json.dumps([case, rival, repeats]) + "\n")
        self.asks.flush()
        return json.loads(self.answers.readline())


def serve(root: str, threads: int) -> None:
    """The names of the cases on a line; then, for each line that asks for a case, the seconds of a run."""
    sys.path[:1] = [root, f"{root}/tests/benchmarks"]
    import cases

    every = {c.name: c for c in cases.cases(cases.Options(threads, False)) if not c.reports}
    print(json.dumps({name: [r for r in RIVALS if r in case.rivals] for name, case in every.items()}), flush=True)
    key, run = None, lambda: None
    for line in sys.stdin:
        case, rival, repeats = json.loads(line)
        if key != (case, rival):
            gc.unfreeze()
            key, run = (case, rival), every[case].rivals[rival]()
            run(), run()  # also makes what is made once
            gc.collect()
            gc.freeze()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        print((time.perf_counter() - start) / repeats, flush=True)


def compare(before: Checkout, after: Checkout, case: str, rival: str, rounds: int) -> dict[str, Any]:
    once = min(checkout.seconds(case, rival, 1) for checkout in (before, after))
    repeats = 1 + int(LEAST / once)
    times: dict[Checkout, list[float]] = {before: [], after: []}
    for i in range(rounds):
        for checkout in (before, after) if i % 2 else (after, before):
            times[checkout].append(checkout.seconds(case, rival, repeats))
            time.sleep(PAUSE)
    ratios = [b / a for a, b in zip(*times.values())]
    q1, median, q3 = statistics.quantiles(ratios, n=4)
    ms = {name: 1000 * statistics.median(t) for name, t in zip(("before", "after"), times.values())}
    return {"case": case, "rival": rival, **ms, "q1": q1, "median": median, "q3": q3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks/checkouts.py", description=__doc__)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout, such as git worktree makes")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another one")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="the cases with this in their name, or *")
    parser.add_argument("--rounds", type=int, default=15, help="in which they take turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append a JSON line a case")
    args = parser.parse_args()
    before, after = Checkout(args.before, args.threads), Checkout(args.after, args.threads)
    wanted = [c for c in before.cases if any(fnmatch.fnmatchcase(c, f"*{p}*") for p in args.only or "*")]
    if not wanted:
        parser.error(f"no case has {args.only} in its name; there are {', '.join(before.cases)}")
    print("| ms, median | before | after | ratio (quartiles) |\n| --- | --- | --- | --- |")
    for case in wanted:
        if case in after.cases:
            for rival in before.cases[case]:
                r = compare(before, after, case, rival, args.rounds)
                name = case.replace("/", " ") + rival.removeprefix("tinydiff").replace(" plain call", ", plain call")
                ratio = f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})"
                print(f"| {name} | {r['before']:.4g} | {r['after']:.4g} | {ratio} |", flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(r) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
