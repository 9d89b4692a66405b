"""The types of the public surface, as a user's own `mypy --strict` sees them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "typed" / "user.py"
ROOT = SCRIPT.parents[2]


def test_a_users_script_under_mypy_strict(tmp_path: Path, numpy_backend: str) -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(tmp_path)]
    options = ["--follow-imports=silent", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(
        [*command, *options, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found = {int(line): text for line, text in re.findall(r"user\.py:(\d+): error: (.*)", done.stdout)}
    wanted = {
        number: line.split("# error: ")[1]
        for number, line in enumerate(SCRIPT.read_text().splitlines(), 1)
        if "# error: " in line
    }
    assert found.keys() == wanted.keys(), done.stdout + done.stderr
    for number, text in wanted.items():
        assert text in found[number]


def test_optim_has_a_list_of_its_names() -> None:
    from tinydiff import optim

    assert all(hasattr(optim, name) for name in optim.__all__)
    assert not {"math", "xp", "Tensor", "Any"} & set(optim.__all__)
    classes = {name for name, value in vars(optim).items() if getattr(value, "__module__", "") == optim.__name__}
    assert {name for name in classes if not name.startswith("_")} - set(optim.__all__) <= {
        "sgd_step", "adam_step", "average_step", "clip_norm", "Schedule",
    }  # fmt: skip
