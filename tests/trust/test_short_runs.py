"""Short runs of the programs beside this file, which take --count or --minutes for long ones."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import mirrors
import readers
import soak

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="nothing here depends on the backend"),
]


def test_damaged_files_are_read_or_refused_by_name():
    with readers.cases() as cases:
        for number in range(120):
            try:
                cases.run(0, number)
            except AssertionError as error:
                pytest.fail(f"python tests/trust/readers.py --only {number}: {error}")


def test_damaged_replies_are_the_published_bytes_or_a_reason():
    with mirrors.server() as server:
        for number in range(100):
            try:
                mirrors.run(server, 0, number)
            except AssertionError as error:
                pytest.fail(f"python tests/trust/mirrors.py --only {number}: {error}")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the figures are those of Linux")
def test_rounds_of_work_leave_nothing_behind():
    grown = soak.soak(0)
    assert grown.pop("MB") < soak.GROWTH and set(grown.values()) == {0}
