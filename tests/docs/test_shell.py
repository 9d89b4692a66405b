"""The commands in the README and in docs/ are ones that exist: their files, their options, and the extras of pip.

They are parsed, not run, because most of them train. The Python beside them is run by test_pages.py.
"""

from __future__ import annotations

import argparse
import configparser
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import book
import pytest

from tinydiff import backend
from tinydiff.__main__ import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "steps" / "README.md", *book.pages()]
pytestmark = pytest.mark.skipif(backend.name == "cupy", reason="the pages are written for NumPy")
PROGRAM = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S*/)?(python3?|pytest|pip) ")


def commands(text: str) -> list[str]:
    """Those of the blocks of shell, of indented lines, and of code inside a line."""
    fence = re.compile(r"^ *```(\S*)\n(.*?)^ *```", re.M | re.S)
    lines = [line for kind, body in fence.findall(text) if kind in ("", "sh") for line in joined(body)]
    rest = fence.sub("", text)
    lines += joined("\n".join(re.findall(r"^ {4}(\S.*)$", rest, re.M)))
    lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if PROGRAM.match(part) and "..." not in part]


def joined(body: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", body).splitlines()


class Parsed(BaseException):
    """The arguments have been understood: no need to go on."""


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors: AssertionError, or SystemExit of a program that does not know its arguments."""
    words = [w for w in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", w)]
    program, arguments = words[0].rsplit("/", 1)[-1], words[1:]
    if arguments[:2] == ["-m", "pytest"]:
        program, arguments = "pytest", arguments[2:]
    if program == "pip":
        for extra in re.findall(r"\[(\w+)\]", command):
            config = configparser.ConfigParser()
            config.read(ROOT / "setup.cfg")
            assert extra in config["options.extras_require"], f"setup.cfg has no extra {extra!r}"
    elif program == "pytest":
        for path in (a for a in arguments if a.startswith("tests")):
            assert (ROOT / path.split("::")[0]).exists(), f"there is no {path}"
    elif arguments[0] == "-m":
        if arguments[1] == "tinydiff" and arguments[2:]:
            parses(lambda: main(arguments[2:]), arguments, monkeypatch)
    else:
        script = ROOT / arguments[0]
        assert script.exists(), f"there is no {arguments[0]}"
        if script.parent == ROOT / "examples":
            parses(lambda: runpy.run_path(str(script), run_name="__main__"), arguments, monkeypatch)


def parses(start: Callable[[], Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program, up to the point where its arguments have been read."""
    read = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> NoReturn:
        read(parser, *given, **options)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", arguments)
        patch.syspath_prepend(ROOT / "examples")
        with pytest.raises(Parsed):
            start()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_its_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch, numpy_backend: str) -> None:
    for command in commands(page.read_text()):
        try:
            check(command, monkeypatch)
        except (SystemExit, AssertionError, ValueError) as error:
            pytest.fail(f"{command}: {error}")


@pytest.mark.parametrize(
    "command",
    ["python examples/quickstart.py --epoch 3", "python examples/11_none.py", "pytest tests/test_none.py -k x",
     "python -m tinydiff cheque", "pip install -e '.[tests]'"],
)  # fmt: skip
def test_one_that_does_not_exist_is_found(command: str, monkeypatch: pytest.MonkeyPatch, numpy_backend: str) -> None:
    assert commands(f"```sh\n{command}  # a remark\n```") == [f"{command}  # a remark"]
    with pytest.raises((SystemExit, AssertionError)):
        check(command, monkeypatch)
