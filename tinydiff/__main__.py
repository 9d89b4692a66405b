"""python -m tinydiff COMMAND: each command is one function here, which declares its arguments and returns what to do.

python -m tinydiff explain softmax
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

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


def exercise(parser: argparse.ArgumentParser) -> Run:
    """A rule to write: the op without its derivation. Without a name, the list of all exercises."""
    parser.add_argument("name", nargs="?", help="such as multiply, or the number of one")
    parser.add_argument("--hints", action="store_true", help="with all its hints")
    parser.add_argument("--solution", action="store_true", help="with the rule that stands in tinydiff/ops")

    def run(given: argparse.Namespace) -> int:
        from .study.exercise import exercise as show
        from .study.exercise import exercises

        if given.name is None:
            print(exercises())
            return 0
        try:
            found = show(int(given.name) if given.name.isdecimal() else given.name)
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        for _ in found.sheet.hints if given.hints else ():
            found.hint()
        if given.solution:
            found.solution()
        else:
            print(f"\nIn Python:  ex = tinydiff.exercise({found.name!r});  print(ex.check(rule));  ex.hint()")
        return 0

    return run


COMMANDS = (explain, exercise)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tinydiff", description="Look into tinydiff from the command line.")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        sub = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(run=command(sub))
    given = parser.parse_args(arguments)
    return given.run(given)


if __name__ == "__main__":
    sys.exit(main())
