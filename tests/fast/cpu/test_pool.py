"""The threads that share out a call in C: pool_test.c says what is tried. With -fsanitize=thread the compiler watches
every access to memory, so that a race is an error even if it happened to do no harm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

build = pytest.importorskip("tinydiff.fast.cpu.build")

COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
SOURCE = Path(__file__).parent / "pool_test.c"  # which includes pool.c
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on this machine"),
    pytest.mark.skipif(sys.platform == "win32", reason="there one thread does all parts"),
]


@pytest.mark.parametrize(
    "flags, arguments",
    [
        (["-O2"], ["fork"]),
        (["-O1", "-g", "-fsanitize=thread"], []),
        (["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    ],
    ids=["children", "races", "memory"],
)
def test_every_part_is_done_once_by_so_many_threads(tmp_path: Path, flags: list[str], arguments: list[str]) -> None:
    program = str(tmp_path / "program")
    command = [str(COMPILER), *build.FLAGS, "-Wall", "-Wextra", "-Werror", *flags, f"-I{build.HERE}", "-o", program]
    # Without a sanitizer of this very process, which does not go with another one.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD" and not name.endswith("_OPTIONS")}

    def run(words: list[str]) -> Any:
        return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, env=env)

    compiled = run([*command, str(SOURCE), "-pthread"])
    if re.search(r"cannot find .*lib[at]san", compiled.stderr):
        pytest.skip("a sanitizer of the compiler is not installed")
    assert compiled.returncode == 0, compiled.stderr
    # Sanitizers want to place their memory themselves, which random addresses may prevent.
    done = run([*(["setarch", "-R"] if shutil.which("setarch") else []), program, *arguments])
    if done.returncode and "setarch" in done.stderr:  # a container may forbid it
        done = run([program, *arguments])
    assert (done.returncode, done.stdout) == (0, "all is well\n"), done.stdout + done.stderr
