"""The types of the public surface, as a user's own `mypy --strict` sees them."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "typed"
ROOT = SCRIPTS.parents[1]
PUBLIC = (
    "",
    "ops",
    "nn",
    "optim",
    "functional",
    "interop",
    "diffusion",
    "data",
    "saving",
    "training",
    "metrics",
    "plot",
)


@pytest.mark.parametrize("name", ["user.py", "everything.py"])
def test_a_users_script_under_mypy_strict(name: str, tmp_path: Path, numpy_backend: str) -> None:
    script = SCRIPTS / name
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, "--cache-dir", str(tmp_path)]
    options = ["--follow-imports=silent", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(
        [*command, *options, str(script)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    found = {int(line): text for line, text in re.findall(rf"{name}:(\d+): error: (.*)", done.stdout)}
    wanted = {
        number: line.split("# error: ")[1]
        for number, line in enumerate(script.read_text().splitlines(), 1)
        if "# error: " in line
    }
    assert found.keys() == wanted.keys(), done.stdout + done.stderr
    for number, text in wanted.items():
        assert text in found[number]


@pytest.mark.parametrize("module", PUBLIC)
def test_the_scripts_leave_no_public_name_out(module: str) -> None:
    """Those of __all__; where there is none, the functions and classes without an underscore."""
    found = importlib.import_module(f"tinydiff.{module}".rstrip("."))
    own = {
        n for n, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__ and not n.startswith("_")
    }
    names = set(getattr(found, "__all__", own))
    used = set()
    for script in SCRIPTS.glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text())):
            used |= {getattr(node, "attr", None), getattr(node, "id", None)}
            used |= {alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
    assert names and not names - used


def test_optim_has_a_list_of_its_names() -> None:
    from tinydiff import optim

    assert all(hasattr(optim, name) for name in optim.__all__)
    assert not {"math", "xp", "Tensor", "Any"} & set(optim.__all__)
    classes = {name for name, value in vars(optim).items() if getattr(value, "__module__", "") == optim.__name__}
    assert {name for name in classes if not name.startswith("_")} - set(optim.__all__) <= {
        "sgd_step", "adam_step", "average_step", "clip_norm", "Schedule",
    }  # fmt: skip
