"""tinydiff beside PyTorch: python tests/benchmarks

Every case runs on both, which take turns, each in a process of its own (apart.py), with the same model, batch and
number of threads. The figure to quote is the median of the ratios within each round: tinydiff over eager PyTorch in the
better of its two memory formats. With TINYDIFF_BACKEND=cupy both run on the GPU. docs/performance.md explains the
tables, which `python tests/benchmarks/report.py RESULTS` makes.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import sys
from pathlib import Path

import apart
import cases
import measure
import ours
import report

from tinydiff import backend
from tinydiff.fast.threads import cores


def main() -> None:
    args = arguments()
    if backend.name == "cupy":
        backend.precision("tf32")  # as PyTorch's side
    options = cases.Options(args.threads, args.compile)
    every = list(cases.cases(options))
    chosen = [c for c in every if not args.only or any(fnmatch.fnmatchcase(c.name, f"*{p}*") for p in args.only)]
    if not chosen:
        sys.exit(f"no case matches {args.only}: see --list")
    if args.list:
        print("\n".join(c.name for c in chosen))
        return
    there = importlib.util.find_spec("torch") is not None
    if not there:
        print("PyTorch is not installed: tinydiff is measured alone", file=sys.stderr)
    away = apart.Apart(args.threads, args.compile) if there else None
    about = {"backend": backend.name, "threads": args.threads, **measure.facts(gpu())}
    records = []
    for case in chosen:
        result = measure.measure(case, args.pairs, ours.wait, away)
        record = result.record(about)
        records.append(record)
        print(report.line(record), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
    if away is not None:
        away.close()
    for line in report.means(records):
        print(line)


def gpu() -> str | None:
    if backend.name != "cupy":
        return None
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--only",
        action="append",
        metavar="PATTERN",
        help="the cases with this in their name, * for anything; may be repeated",
    )
    add("--pairs", type=positive, default=9, help="rounds in which the rivals take turns (default: %(default)s)")
    add("--threads", type=positive, default=cores(), help="of each rival (default: one per core, %(default)s)")
    add("--compile", action="store_true", help="a column for torch.compile (needs a C++ compiler)")
    add("--out", type=Path, metavar="FILE.jsonl", help="append a JSON line a case")
    add("--list", action="store_true", help="name the cases and stop")
    return parser.parse_args()


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


if __name__ == "__main__":
    main()
