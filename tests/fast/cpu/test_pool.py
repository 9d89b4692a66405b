"""The threads that share out a call in C: pool_test.c says what is tried. With -fsanitize=thread the compiler watches
every access to memory, so that a race is an error even if it happened to do no harm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

build = pytest.importorskip("tinydiff.fast.cpu.build")

COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
SOURCES = [Path(__file__).parent / "pool_test.c", build.HERE / "pool.c"]
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on this machine"),
    pytest.mark.skipif(sys.platform == "win32", reason="there one thread does all parts"),
]


@pytest.mark.parametrize(
    "flags, arguments",
    [(["-O2"], ["fork"]), (["-O1", "-g", "-fsanitize=thread"], []), (["-g", "-fsanitize=address,undefined"], [])],
    ids=["children", "races", "memory"],
)
def test_every_part_is_done_once_by_so_many_threads(tmp_path: Path, flags: list[str], arguments: list[str]) -> None:
    program = str(tmp_path / "program")
    command = [str(COMPILER), *build.FLAGS, "-Wall", "-Wextra", "-Werror", *flags, f"-I{build.HERE}", "-o", program]
    compiled = subprocess.run([*command, *map(str, SOURCES), "-pthread"], capture_output=True, text=True, check=False)
    if "cannot find" in compiled.stderr and "san" in compiled.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert compiled.returncode == 0, compiled.stderr
    # Sanitizers want to place their memory themselves, which random addresses may prevent.
    still = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*still, program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and "setarch" in done.stderr:  # a container may forbid it
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "all is well\n", done.stdout + done.stderr
