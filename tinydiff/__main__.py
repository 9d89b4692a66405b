"""python -m tinydiff COMMAND: each command is one function here, which declares its arguments and returns what to do.

python -m tinydiff explain softmax
python -m tinydiff view examples/quickstart.py --batch-size 2
python -m tinydiff doctor
python -m tinydiff check matmul
python -m tinydiff train glyphs
python -m tinydiff sample runs/glyphs/checkpoint.npz --label 7
python -m tinydiff eval runs/glyphs/checkpoint.npz
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__, backend
from .commands import Run, evaluate, sample, train

MODELS = ("train", "sample", "eval")  # whose files and words are the user's


class Parser(argparse.ArgumentParser):
    """The parser of all commands. An option that the chosen one has not is answered with the nearest that it has."""

    chosen: argparse.ArgumentParser | None = None

    def error(self, message: str) -> NoReturn:
        if word := re.search(r"argument command: invalid choice: '(.*)' \(choose", message):
            near = difflib.get_close_matches(word[1], COMMANDS, cutoff=0.5)
            super().error(message + (f": did you mean {' or '.join(near)}?" if near else ""))
        unknown = message.removeprefix("unrecognized arguments: ")
        if self.chosen is None or unknown == message:
            super().error(message)
        options = [option for action in self.chosen._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown.split()[0].split("=")[0], options, cutoff=0.6)
        self.chosen.error(f"{message}: did you mean {' or '.join(near)}?" if near else message)


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


def view(parser: argparse.ArgumentParser) -> Run:
    """Run a script, save one of its backward passes as an HTML page to be stepped through, and stop the script."""
    parser.description = f"""{view.__doc__} The script runs as it is, in this process, with the arguments that follow
    it; whatever it does before that pass, such as putting an older run of its folder aside, is done. What is saved is
    the pass as it begins: hooks do not run, and with microbatches it is that of one of them. Choose small batches: the
    rules are checked numerically, which takes longer the larger the arrays are."""
    parser.usage = "%(prog)s [-h] [--out FILE] [--pass N] [--seconds X] SCRIPT [its arguments ...]"
    parser.add_argument("--out", type=Path, default=Path("backward.html"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--pass", type=int, default=1, metavar="N", dest="number",
        help="which backward pass, counted from 1 as they begin (default: the first)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30.0, metavar="X",
        help="for the checks of the rules; the page says which were not reached (default: %(default)s)")  # fmt: skip
    parser.add_argument("script", type=Path, metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="its arguments").required = False

    def run(given: argparse.Namespace) -> int:
        from .study.script import view as view_script

        if given.number < 1:
            parser.error(f"--pass: passes are counted from 1, not {given.number}")
        if not given.seconds >= 0:
            parser.error(f"--seconds must be 0 or more, not {given.seconds}")
        if not given.script.is_file():
            parser.error(f"there is no script {given.script}")
        try:
            given.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out: {error}")
        passes = view_script(given.script, given.arguments, given.out, given.number, seconds=given.seconds)
        if passes < given.number:
            sys.stderr.write(f"{given.script} ended after {passes} backward passes, so nothing is saved\n")
            return 1
        sys.stdout.write(f"{given.out}: backward pass {given.number} of {given.script}; open it in a browser\n")
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


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "train": train, "sample": sample, "eval": evaluate,
    "explain": explain, "view": view, "exercise": exercise, "doctor": doctor, "check": check,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m tinydiff", description="Train and sample models, and look into tinydiff.")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=argparse.ArgumentParser)
    parser.add_argument("--version", action="version", version=f"tinydiff {__version__}")
    given_first = next(iter(sys.argv[1:] if arguments is None else arguments), None)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__, allow_abbrev=False)
        sub.set_defaults(run=command(sub), command=name)
        if name == given_first:
            parser.chosen = sub
    given = parser.parse_args(arguments)
    try:
        backend.active()
    except (ValueError, RuntimeError) as error:  # TINYDIFF_BACKEND names none, or one that cannot run here
        if given.command != "doctor":  # which says it beside the rest
            sys.stderr.write(f"{error}\n")
            return 2
    try:
        code = given.run(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as `| head` makes it, when it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 141  # as a shell reports a program that a closed pipe has ended
    except (OSError, ValueError, RuntimeError, FloatingPointError, MemoryError) as error:
        users = given.command in MODELS or isinstance(error, OSError) and given.command != "view"  # a script's own
        if not users or type(error) is RuntimeError:
            raise
        sys.stderr.write(f"python -m tinydiff {given.command}: {str(error).removeprefix(f'{given.command}: ')}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130  # as a shell reports an interrupted program


def run() -> None:
    """The program `tinydiff`."""
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
