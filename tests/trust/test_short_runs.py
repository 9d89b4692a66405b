"""Short runs of the programs beside this file, which take --count or --minutes for long ones."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import audit
import mirrors
import readers
import soak

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),
    pytest.mark.skipif(os.environ.get("TINYDIFF_BACKEND") == "cupy", reason="nothing here depends on the backend"),
]


@pytest.mark.parametrize(
    "does",
    [
        lambda path: exec("1"),
        lambda path: eval("1"),
        lambda path: pickle.loads(b"cbuiltins\nlen\n."),
        lambda path: subprocess.run(["true"]),
        lambda path: (path.parent / "b").write_bytes(b""),
        lambda path: os.replace(path, path.parent / "b"),
        lambda path: os.symlink(path, path.parent / "b"),
        lambda path: os.mkdir(path / "../b"),
    ],
)
def test_what_a_reader_may_not_do_is_noticed(does, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_bytes(b"as it should be")
    with audit.watched(folder):
        (folder / "y").write_bytes((folder / "x").read_bytes())
        os.replace(folder / "y", folder / "z")
    with pytest.raises(AssertionError, match="besides reading"), audit.watched(folder):
        does(folder)


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
    memory, grown = soak.soak(0)
    assert memory[-1] - memory[soak.WARM] < soak.GROWTH and set(grown.values()) == {0}
