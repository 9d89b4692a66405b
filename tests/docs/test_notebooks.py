"""The notebooks run from the first cell to the last, here with few steps; and they are kept without outputs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pages import DOCS, dead_links

from tinydiff import backend

pytestmark = pytest.mark.skipif(backend.name == "cupy", reason="they are for NumPy, as the pages are")
ROOT = DOCS.parent
QUICK = {"STEPS": 10, "IMAGES": 320, "WALKERS": 300}  # in place of what a cell tagged "parameters" has
PICTURES = {"one_dimension": 5, "unet": 4}
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def with_values(source: str, values: dict[str, int]) -> str:
    for name, value in values.items():
        source = re.sub(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.M)
    return source


def execute(notebook: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as `jupyter execute` does; nothing of the user's Jupyter is read or written."""
    (folder / "given.ipynb").write_text(json.dumps(notebook))
    mine = {
        name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")
    }
    env = {**os.environ, **mine, "PYTHONPATH": str(ROOT)}
    env.pop("MPLBACKEND", None)  # so that the pictures go into the notebook
    command = [sys.executable, "-c", "from nbclient.cli import main; main()", "given.ipynb", "--output=done.ipynb"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@every_notebook
def test_it_runs(path: Path, tmp_path: Path, numpy_backend: str) -> None:
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package)
    notebook = json.loads(path.read_text())
    changed = 0
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            before, source = cell["source"], with_values("".join(cell["source"]), QUICK)
            cell["source"] = source
            changed += source != "".join(before)
    assert changed == 1, "no cell is tagged as the one with the parameters"
    done = execute(notebook, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.stem] and not any(o["output_type"] == "error" for o in outputs)


@every_notebook
def test_it_is_kept_without_outputs(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@every_notebook
def test_its_links_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "](" in text and not dead_links(text, path)
