"""The kernels give the same on 64-bit ARM, to rounding: other_processor.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

other_processor = pytest.importorskip("other_processor")

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(
    not other_processor.is_available(),
    reason="gcc-aarch64-linux-gnu and qemu-user are not installed",
)
@pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="no fast versions: TINYDIFF_FAST=0")
@pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="the kernels are for NumPy")
def test_every_kernel_gives_the_same_on_arm(tmp_path: Path) -> None:
    calls = tmp_path / "calls.pickle"
    path = os.pathsep.join([str(ROOT / "tests" / "fast" / "cpu"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "CALLS": str(calls), "TINYDIFF_BACKEND": "numpy"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_processor", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *other_processor.FILES], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert other_processor.compare(calls) == []
