"""The harnesses, in short. In length, with figures: python tests/trust/kills.py --long, and so on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and file systems as Linux has them")


@linux
@pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="what is kept on disk is the host's affair")
@pytest.mark.parametrize("harness", ["kills", "checkpoints", "descriptions", "disks", "rows", "memory"])
def test_the_harness_finds_nothing(harness: str) -> None:
    # A process of its own, because it forks, which is for programs without threads.
    done = subprocess.run([sys.executable, str(HERE / f"{harness}.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
