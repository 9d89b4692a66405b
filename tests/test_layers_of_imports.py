"""The house: imports go down a list, and only the doors and the host side know an array module.

backend, kernels, tensor, tape, ops, gradcheck, ... examples: the lower may not know of the higher.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinydiff"

# From the bottom up. Those of one line may know one another.
HOUSE = [
    ["backend"],
    ["replays"],
    ["kernels"],
    ["rng"],
    ["tensor"],
    ["modes"],
    ["capture"],
    ["tape"],
    ["backward"],
    ["recompute"],
    ["ops"],
    ["numeric", "diagnosis", "gradcheck"],
    ["explain"],
    ["viewer"],
    ["nn"],
    ["optim"],
    ["microbatch"],
    ["profile"],
    ["saving"],
    ["data"],
    ["diffusion"],
    ["models"],
    ["metrics", "interop"],
    ["plot"],
    ["training_log"],
    ["training"],
    ["__main__"],
    ["fast"],
    ["__init__"],
]
LEVEL = {part: level for level, parts in enumerate(HOUSE) for part in parts}

# Down, but for what is imported when it is called: methods of Tensor whose meaning is the tape's, and backend.capture.
UPWARDS = {("tensor", "modes"), ("tensor", "backward"), ("backend", "capture")}

# Who may import NumPy: the doors, what makes or reads numbers on the host and what compares them there, and `fast`,
# which knows NumPy's BLAS.
HOST = {
    "backend",
    "replays",
    "kernels",
    "rng",
    "data",
    "saving",
    "plot",
    "interop",
    "metrics",
    "numeric",
    "diagnosis",
    "gradcheck",
    "fast",
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module, as a part of the house or an outside name, and whether it stands in a function."""
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inner = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            base = [] if node.level == 0 else base[: len(base) - node.level]
            base += (node.module or "").split(".") if node.module else []
            names = [base] if len(base) > 1 or base != ["tinydiff"] else [[*base, name.name] for name in node.names]
            for parts in names:
                yield ".".join(parts), id(node) in inner


FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])


@every_file
def test_imports_go_down(path: Path) -> None:
    here = part_of(path)
    assert here in LEVEL, f"{here} has no place in the house: give it one"
    for name, inside in imports(path):
        if not name.startswith("tinydiff"):
            continue
        there = name.split(".")[1] if "." in name else "__init__"
        if there not in LEVEL:  # `from .. import name` of something that the package itself defines
            there = "__init__"
        if (here, there) in UPWARDS:
            assert inside, f"{here} may import {there} only inside a function"
        else:
            assert LEVEL[there] <= LEVEL[here], f"{here} imports {there}, which is above it"


@every_file
def test_only_the_host_side_imports_an_array_module(path: Path) -> None:
    names = {name.split(".")[0] for name, _ in imports(path)}
    here = part_of(path)
    if here not in HOST:
        assert "numpy" not in names, "use backend.xp"
    if here not in ("backend", "kernels", "fast"):
        assert not names & {"cupy", "cupyx"}
    if here not in ("plot", "data"):
        assert "matplotlib" not in names
    assert not names & {"torch", "jax", "scipy"}


def test_importing_tinydiff_imports_little() -> None:
    """In a fresh process, and with every layer below the examples."""
    code = (
        "import sys, tinydiff; "
        "print(sorted(n for n in ('matplotlib', 'cupy', 'torch', 'PIL', 'tinydiff.plot') if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert done.stdout.strip() == "[]"
