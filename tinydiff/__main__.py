"""python -m tinydiff COMMAND: each command is one function here, which declares its arguments and returns what to do.

python -m tinydiff explain softmax
python -m tinydiff doctor
python -m tinydiff check matmul
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from . import backend

Run = Callable[[argparse.Namespace], int]  # returns the exit code


def explain(parser: argparse.ArgumentParser) -> Run:
    """An op: its page in the source, and its rule written out on a small example."""
    parser.add_argument("op", help="its name in tinydiff.ops, such as softmax")

    def run(given: argparse.Namespace) -> int:
        from .operators import OPS
        from .study.explain import page

        if given.op not in OPS:
            near = difflib.get_close_matches(given.op, OPS, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(sorted(OPS))}"
            sys.stderr.write(f"there is no op named {given.op!r}: {hint}\n")
            return 2
        sys.stdout.write(page(given.op))
        return 0

    return run


def doctor(parser: argparse.ArgumentParser) -> Run:
    """What is installed and in use, how fast it is, and what to do about each problem; exit code 1 if there is one."""
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="X", help="for the training (default: %(default)s)"
    )

    def run(given: argparse.Namespace) -> int:
        from .doctor import examine

        if not 0 < given.seconds < float("inf"):
            parser.error(f"--seconds must be more than 0, not {given.seconds}")
        return examine(sys.stdout, given.seconds)

    return run


def check(parser: argparse.ArgumentParser) -> Run:
    """gradcheck of every op, or of those that are named, on the backend in use. Exit code 1 if a rule is wrong."""
    parser.add_argument("ops", nargs="*", metavar="op", help="its name in tinydiff.ops (default: all)")
    parser.add_argument("--order", type=int, choices=(1, 2), default=1, help="2: second derivatives too")

    def run(given: argparse.Namespace) -> int:
        from .check_ops import check_ops, unknown

        if wrong := unknown(given.ops):
            sys.stderr.write(f"{wrong}\n")
            return 2
        return check_ops(given.ops, sys.stdout, order=given.order)

    return run


COMMANDS = (explain, doctor, check)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinydiff", description="Look into tinydiff from the command line.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(run=command(sub), command=command.__name__)
    given = parser.parse_args(arguments)
    try:
        backend.active()
    except (ValueError, RuntimeError) as error:  # TINYDIFF_BACKEND names none, or one that cannot run here
        if given.command != "doctor":  # which says it beside the rest
            sys.stderr.write(f"{error}\n")
            return 2
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())
