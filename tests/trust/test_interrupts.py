"""A short run of interrupts.py, beside this file."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tinydiff

pytest.importorskip("tinydiff.fast.threads")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no such timer")
def test_exceptions_at_random_instants_hang_nothing_and_leave_no_limit():
    path = Path(__file__).with_name("interrupts.py")
    done = subprocess.run(
        [sys.executable, path, "--minutes", "0.07"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TINYDIFF_BACKEND": "numpy", "PYTHONPATH": str(Path(tinydiff.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exceptions, 0 left a limit of the BLAS") == 8
    assert done.stdout.count(", 0 no_grad") >= 6  # all but `with no_grad():` itself
