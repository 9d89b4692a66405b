"""The code in the README runs, with the output that it shows."""

from __future__ import annotations

import doctest
from pathlib import Path

from tinydiff.operators import OPS

README = Path(__file__).parents[1] / "README.md"


def test_its_python_session_is_true(numpy_backend: str) -> None:
    try:
        failures, examples = doctest.testfile(str(README), module_relative=False)
    finally:
        OPS.pop("squash", None)  # the op that it defines
    assert examples >= 5 and failures == 0


def test_it_names_the_test_command_for_ci() -> None:
    text = README.read_text()
    assert text.count("<!-- test command -->\n```sh\n") == 1
    command = text.split("<!-- test command -->\n```sh\n")[1].split("```")[0]
    assert "pip install" in command and "pytest" in command and command.count("\n") == 1
