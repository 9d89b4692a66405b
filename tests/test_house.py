"""The house: imports go down a list, in functions too; nothing imports fast/ but the package itself; and only the doors
and the host side know an array module."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinydiff"

# From the ground up: a file imports only from files that stand above it in this list. docs/design.md has it with a line
# for each.
HOUSE = """
locks patient backend summary arguments describing distributed rng observers changes hooks modes shape_dtype operators
engine recompute ops check anomaly functional nn interop optim sharded overlap microbatch profile files saving records
data diffusion models latents trained metrics judging plot stopping watching training_files validating training_log
training recipe commands study doctor check_ops fast __init__ __main__
""".split()
LEVEL = {part: level for level, part in enumerate(HOUSE)}

# Who may import NumPy: the doors, and what makes, reads or compares numbers on the host.
HOST = set("backend summary rng check data saving plot interop metrics latents trained judging recipe".split())
HOST |= set("commands study doctor check_ops fast".split())


def part_of(module: str) -> str:
    """ "tinydiff.nn.conv" -> "nn" """
    return (module.split(".") + ["__init__"])[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_of(path) for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported, in functions too; what is imported for type checkers alone does not count."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    here = path.relative_to(PACKAGE.parent).with_suffix("").parts  # of __init__.py too: its names count from its folder
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level], *(node.module or "").split(".")] if node.level else [node.module]
            whole = ".".join(part for part in base if part)
            for name in node.names:
                yield f"{whole}.{name.name}" if f"{whole}.{name.name}" in MODULES else whole


every_file = pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])


@every_file
def test_imports_go_down(path: Path) -> None:
    here = part_of(module_of(path))
    assert here in LEVEL, f"{here} has no place in the house: give it one"
    for name in imports(path):
        if name.split(".")[0] != "tinydiff" or part_of(name) == here:
            continue
        there = part_of(name)
        assert LEVEL[there] < LEVEL[here], f"{path.name} imports {name}, which is above it"
        assert there != "fast" or here == "__init__", f"{path.name} imports {name}: nothing may know of fast/"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Within a folder too. A folder's __init__ stands for what it gathers."""
    graph = {
        module_of(path): {name for name in imports(path) if name in MODULES and name != module_of(path)}
        for path in FILES
        if path.name != "__init__.py"
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle
    assert set(graph) <= set(order)


def test_the_house_has_no_empty_rooms() -> None:
    assert {part_of(module_of(path)) for path in FILES} == set(HOUSE)


@every_file
def test_only_the_host_side_imports_an_array_module(path: Path) -> None:
    names, here = {name.split(".")[0] for name in imports(path)}, part_of(module_of(path))
    assert "numpy" not in names or here in HOST, "use backend.xp"
    assert not names & {"cupy", "cupyx"} or here in ("backend", "fast")
    assert "matplotlib" not in names or here in ("plot", "data")
    assert not names & {"torch", "jax", "scipy"}


def test_importing_tinydiff_imports_little() -> None:
    """In a fresh process."""
    code = (
        "import sys, tinydiff; "
        "print(sorted(n for n in ('matplotlib', 'cupy', 'torch', 'PIL', 'tinydiff.plot') if n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert done.stdout.strip() == "[]"
