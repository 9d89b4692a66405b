"""The library of the C files: built once, kept in a folder of the user's own; and whatever is wrong with the compiler,
the folder or a file in it, the result is right, with a library or without, and at most one line says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

build = pytest.importorskip("tinydiff.fast.cpu.build")

ROOT = Path(__file__).parents[3]
COMPILER = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
pytestmark = [
    pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="no fast versions: TINYDIFF_FAST=0"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler on this machine"),
    pytest.mark.skipif(os.name == "nt", reason="its compilers are shell scripts"),
]

PROGRAM = """
import sys, numpy as np, tinydiff as td
from tinydiff import ops
from tinydiff.fast.cpu import build
{before}
x = td.tensor(np.random.default_rng(0).normal(size=(3, 5, 5, 8)).astype("float32"), requires_grad=True)
y = ops.group_norm(x, groups=2, silu=True)
g = td.grad((y * y).sum(), x)[0]
print(build.library("f") is not None, float((g * g).sum()))
"""


def environment(folder: Path, **changed: str | None) -> dict[str, str]:
    """None: the variable is not set. Compiled with -O0, which takes a tenth of the time."""
    known = {**os.environ, "XDG_CACHE_HOME": str(folder), "TINYDIFF_BACKEND": "numpy", "PYTHONPATH": str(ROOT)}
    known["CFLAGS"] = "-O0"
    known.pop("TINYDIFF_CC", None)
    return {name: value for name, value in {**known, **changed}.items() if value is not None}


def run(folder: Path, before: str = "", **changed: str | None) -> tuple[bool, float, str]:
    """Was there a library; the norm of a gradient; and what was said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        capture_output=True, text=True, env=environment(folder, **changed), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    there, value = done.stdout.split()
    return there == "True", float(value), done.stderr


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "tinydiff" / "kernels").glob("*"))


@pytest.fixture(scope="session")
def value(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The right result."""
    there, value, said = run(tmp_path_factory.mktemp("none"), TINYDIFF_CC="0")
    assert not there and said == ""
    return value


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert run(folder)[0]
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A folder in which there is a library already."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


def succeeds(found: tuple[bool, float, str], value: float, compiled: bool) -> None:
    """There is a library, the result is right, and nothing is said but that it has been compiled, and, if the machine
    does other work, that it takes long."""
    there, got, said = found
    assert there and got == pytest.approx(value, rel=1e-5)
    slow = r"(tinydiff: .* takes long; .*\n)?"
    line = r"tinydiff: compiled .*norm\.c.* for float in [\d.]+ s, kept in .*/kernels\n"
    assert re.fullmatch(slow + line if compiled else "", said), said


def goes_on(found: tuple[bool, float, str], value: float, why: str) -> None:
    """There is no library, the result is right, and one line says why."""
    there, got, said = found
    assert not there and got == pytest.approx(value, rel=1e-5)
    assert re.fullmatch(rf"tinydiff: no compiled kernels, NumPy goes on, slower \({why}\)\n", said), said


def compiler(folder: Path, script: str) -> str:
    """A program that is given as $CC. In the script $real is a compiler, and $out the file that is to be written."""
    path = folder / "compiler"
    find_out = 'out=; for a; do [ "$last" = -o ] && out=$a; last=$a; done'
    path.write_text(f"#!/bin/sh\nreal={shutil.which(COMPILER or '')}\n{find_out}\n{script}\n")
    path.chmod(0o755)
    return str(path)


# ---------------------------------------------------------------- made once, and found again


def test_a_library_is_made_once_and_found_again(tmp_path: Path, value: float) -> None:
    succeeds(run(tmp_path, CFLAGS=None), value, compiled=True)
    (path,) = kept(tmp_path)  # and nothing else
    state = path.stat()
    assert state.st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
    succeeds(run(tmp_path, CFLAGS=None), value, compiled=False)
    assert path.stat().st_mtime_ns == state.st_mtime_ns


def test_processes_that_compile_at_the_same_time(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(before="")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
        )
        for _ in range(3)
    ]
    said = {process.communicate(timeout=120)[0] for process in started}
    assert len(said) == 1 and said.pop().startswith("True ")
    assert len(kept(tmp_path)) == 1


def test_threads_that_call_the_first_kernel_at_the_same_time(tmp_path: Path, value: float) -> None:
    before = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    assert len(set(map(id, pool.map(lambda _: build.library("f"), range(8))))) == 1
"""
    succeeds(run(tmp_path, before), value, compiled=True)
    found = run(tmp_path, before, CC="false")  # one thread tries, the others hear of it
    goes_on(found, value, "false .* failed: exit status 1")


FORK = """
import os, threading, time
thread = threading.Thread(target=build.library, args=("f",))
thread.start()
while not list(build._own_folder().glob("*.part")):
    time.sleep(0.01)
child = os.fork()
if child:
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0 if build.library("f") else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_a_thread_compiles(tmp_path: Path, value: float) -> None:
    there, got, said = run(tmp_path, FORK, PYTHONWARNINGS="ignore")
    assert there and got == pytest.approx(value, rel=1e-5) and len(kept(tmp_path)) == 1
    assert said.count("tinydiff: compiled") == said.count("\n") == 2  # the child has compiled too


def test_without_a_compiler_one_that_another_machine_has_made_is_loaded(cache: Path, value: float) -> None:
    """As on the compute nodes of a cluster. If there is a compiler, it must be the one that made it."""
    succeeds(run(cache, PATH="/nowhere"), value, compiled=False)
    succeeds(run(cache, CC=compiler(cache, 'exec "$real" "$@"')), value, compiled=True)
    assert len(kept(cache)) == 2


@pytest.mark.parametrize(
    "changed, compiled",
    [
        ({"PYTHONSAFEPATH": "1"}, False),
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, False),
        ({"CFLAGS": "-O0 -DTHIS='a b'"}, True),
        ({"CC": "{cc} -g"}, True),
        ({"CC": "env {cc}"}, True),
    ],
)
def test_what_may_be_set_and_does_no_harm(cache: Path, changed: dict[str, str], compiled: bool, value: float) -> None:
    changed = {name: text.format(cc=COMPILER) for name, text in changed.items()}
    succeeds(run(cache, **changed), value, compiled)
    succeeds(run(cache, **changed), value, compiled=False)


def test_a_folder_with_blanks_and_other_letters(tmp_path: Path, value: float) -> None:
    folder = tmp_path / "Größe 大 'a' [b]*"
    succeeds(run(folder, LC_ALL="C"), value, compiled=True)
    succeeds(run(folder), value, compiled=False)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_each_processor_has_a_library_of_its_own(cache: Path, value: float) -> None:
    """A home may be shared between machines. Here one flag fewer stands for another processor."""
    before = "whole = build._processor; build._processor = lambda: whole().rpartition(' ')[0]"
    succeeds(run(cache, before), value, compiled=True)
    assert len(kept(cache)) == 2


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"XDG_CACHE_HOME": "/dev/null"}, "no folder to keep them in: .*"),
        ({"XDG_CACHE_HOME": None, "HOME": "/dev/null"}, "no folder to keep them in: .*"),
        ({"XDG_CACHE_HOME": "/proc"}, "no folder to keep them in: .*"),
    ],
)
def test_no_folder(tmp_path: Path, changed: dict[str, str | None], why: str, value: float) -> None:
    goes_on(run(tmp_path, **changed), value, why)


def test_without_a_home_that_of_the_user_is_taken(tmp_path: Path, value: float) -> None:
    """HOME may be unset, as in a cron job. Here the user is one without a home, wherever this runs."""
    before = """
import pwd
def nobody(_): raise KeyError("no such user")
pwd.getpwuid = nobody
"""
    goes_on(run(tmp_path, before, XDG_CACHE_HOME=None, HOME=None), value, "no folder .* no home directory .*")


def read_only(folder: Path) -> str:
    """Code after which the folder is read-only: for root by a mount that only this process sees."""
    if os.getuid() != 0:
        for path in (folder, folder / "tinydiff", folder / "tinydiff" / "kernels"):
            path.chmod(0o500)
        return ""
    return f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def do(*arguments):
    if libc.mount(*arguments): print("cannot mount", 0); os._exit(0)
if libc.unshare(0x20000): print("cannot mount", 0); os._exit(0)
do(None, b"/", None, 0x4000 | 0x40000, None)                     # what is mounted here is seen here alone
do({str(folder)!r}.encode(), {str(folder)!r}.encode(), None, 0x1000, None)
do(None, {str(folder)!r}.encode(), None, 0x1000 | 0x20 | 1, None)
"""


def run_read_only(folder: Path, **changed: str | None) -> tuple[bool, float, str]:
    code = "try:\n    " + PROGRAM.format(before=read_only(folder)).replace("\n", "\n    ") + "\nfinally: pass"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(folder, **changed), timeout=120
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("cannot mount"):
        pytest.skip("root may not mount here, and may write everywhere")
    there, value = done.stdout.split()
    return there == "True", float(value), done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts as Linux does")
def test_a_read_only_folder(cache: Path, value: float) -> None:
    succeeds(run_read_only(cache), value, compiled=False)
    goes_on(run_read_only(cache, CFLAGS="-O0 -DOTHER"), value, f"{cache}/tinydiff/kernels cannot be written: .*")


@pytest.mark.parametrize("size, message", [(2**13, "/calls.c cannot be written: .*"), (2**15, " failed: .*")])
def test_no_file_may_grow_as_on_a_full_disk(tmp_path: Path, value: float, size: int, message: str) -> None:
    """Either what is written here does not fit, or what the compiler writes."""
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))"
    there, got, said = run(tmp_path, before)
    assert not there and got == pytest.approx(value, rel=1e-5)
    assert re.fullmatch(rf"tinydiff: no compiled kernels, NumPy goes on, slower \(.*{message}\)\n", said), said
    assert kept(tmp_path) == []


def test_a_full_disk(tmp_path: Path, value: float) -> None:
    goes_on(
        run(
            tmp_path, CC=compiler(tmp_path, "echo half > $out; echo 'fatal error: No space left on device' >&2; exit 1")
        ),
        value,
        ".*/compiler .* failed: fatal error: No space left on device",
    )
    assert kept(tmp_path) == []


# ---------------------------------------------------------------- files in it


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "its tail is missing": whole[: len(whole) // 3],
            "one byte differs": whole[:-1] + bytes([whole[-1] ^ 1]),
        }[how]
    )


@pytest.mark.parametrize("how", ["empty", "its tail is missing", "one byte differs"])
def test_a_damaged_library_is_made_again(cache: Path, how: str, value: float) -> None:
    (path,) = kept(cache)
    damage(path, how)
    succeeds(run(cache), value, compiled=True)
    assert len(kept(cache)) == 1
    succeeds(run(cache), value, compiled=False)


def of_another_machine(library: Path) -> bytes:
    """The number of the machine stands in bytes 18 and 19 of an ELF file; 0xF3 is RISC-V."""
    whole = library.read_bytes()
    return whole[:18] + b"\xf3\x00" + whole[20:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF files")
def test_a_library_of_another_machine(cache: Path, value: float) -> None:
    (path,) = kept(cache)
    foreign = of_another_machine(path)
    path.unlink()
    path = path.with_name(f"{path.stem.rpartition('-')[0]}-{build._digest(foreign)}.so")
    path.write_bytes(foreign)
    path.chmod(0o700)
    goes_on(run(cache), value, f"{path} cannot be loaded: .*")


@pytest.mark.parametrize(
    "which", ["folder for all", "library for all", "library of another", "link", "folder is a link", "folder", "pipe"]
)
def test_what_others_could_have_put_there_is_not_loaded(cache: Path, which: str, value: float) -> None:
    (path,) = kept(cache)
    if which == "library of another":
        if os.getuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(path, 12345, 12345)
    elif "for all" in which:
        (path if "library" in which else path.parent).chmod(0o777)
    else:
        target = path.parent if which == "folder is a link" else path
        target.rename(cache / "elsewhere")
        if "link" in which:
            target.symlink_to(cache / "elsewhere")
        else:
            target.mkdir(mode=0o700) if which == "folder" else os.mkfifo(target, 0o600)
    goes_on(run(cache), value, ".* does not belong to this user alone: (remove it|chmod go-w it)")


# ---------------------------------------------------------------- the compiler


@pytest.mark.parametrize(
    "changed, why",
    [
        ({"CC": "no-such-compiler"}, "CC='no-such-compiler' is no command here"),
        ({"CC": "'"}, "CC=.*: No closing quotation"),
        ({"CFLAGS": "'"}, "CFLAGS=.*: No closing quotation"),
        ({"CFLAGS": "--no-such-flag"}, "cc .* failed: .*no-such-flag.*"),
        ({"CC": "false"}, "false .* failed: exit status 1"),
        ({"CC": "true"}, "true .* failed: it wrote nothing"),
        ({"CC": "/"}, "CC='/' is no command here"),
        ({"PATH": "/nowhere"}, "no C compiler: neither cc, gcc nor clang is here"),
    ],
)
def test_no_compiler(tmp_path: Path, changed: dict[str, str], why: str, value: float) -> None:
    goes_on(run(tmp_path, **changed), value, why.replace("cc", str(COMPILER)))


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations"])
def test_flags_that_break_nan_are_refused(tmp_path: Path, flag: str, value: float) -> None:
    goes_on(run(tmp_path, CFLAGS=flag), value, ".* failed: .*NaN, Inf and the order of sums are to stay.*")


@pytest.mark.parametrize(
    "script, why",
    [
        ("printf 'b\\001\\033[31m\\377\\nerror: \\033[2J\\377' >&2; exit 1", r"\S+ .* failed: error: \?\[2J."),
        ("yes 'error: no' | head -100000 >&2; exit 1", r"\S+ .* failed: error: no"),
        ("kill -SEGV $$", r"\S+ .* failed: exit status -11"),
        ("echo text > $out", r"\S+ cannot be loaded: .*"),
        ("echo 'int x;' | \"$real\" -x c -fPIC -shared -o $out -", r"\S+ has no function .*norm.*: remove it"),
        (": > $out", r"\S+ cannot be loaded: .*"),
    ],
)
def test_a_broken_compiler(tmp_path: Path, script: str, why: str, value: float) -> None:
    for _ in range(2):  # what it has left behind does no harm either
        goes_on(run(tmp_path, CC=compiler(tmp_path, script)), value, why)


def test_an_assembler_that_does_not_know_this_processor(tmp_path: Path, value: float) -> None:
    native = build.NATIVE[0]
    script = f'case "$*" in *{native}*) echo "Error: no such instruction" >&2; exit 1;; esac; exec "$real" "$@"'
    succeeds(run(tmp_path, CC=compiler(tmp_path, script)), value, compiled=True)


def alive(number: Path) -> bool:
    try:
        os.kill(int(number.read_text()), 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{number.read_text().strip()}/stat").read_text().split()[2]


def test_a_compiler_that_hangs_is_stopped_with_what_it_has_started(tmp_path: Path, value: float) -> None:
    script = f"sleep 1000 & echo $! > {tmp_path}/number; wait"
    there, got, said = run(tmp_path, "build.SLOW, build.LIMIT = 0.5, 1.5", CC=compiler(tmp_path, script))
    assert not there and got == pytest.approx(value, rel=1e-5)
    assert re.fullmatch(
        r"tinydiff: \S+ takes long; if it is not done after 1.5 s, NumPy goes on without it\n"
        r"tinydiff: no compiled kernels, NumPy goes on, slower \(\S+ took more than 1.5 s\)\n",
        said,
    ), said
    assert kept(tmp_path) == [] and not alive(tmp_path / "number")


def test_a_process_that_is_killed_while_it_compiles(tmp_path: Path, value: float) -> None:
    """Its compiler too. What is left behind does no harm, and is removed when it is old."""
    script = f"echo half > $out; echo $$ >> {tmp_path}/number; exec sleep 1000"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before="")], env=environment(tmp_path, CC=compiler(tmp_path, script))
    )
    while not (tmp_path / "number").exists() or not (tmp_path / "number").read_text().strip():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    for number in (tmp_path / "number").read_text().split():
        os.kill(int(number), signal.SIGKILL)
    (part,) = kept(tmp_path)
    assert part.suffix == ".part" and stat.S_ISDIR(part.stat().st_mode)

    succeeds(run(tmp_path), value, compiled=True)
    assert part in kept(tmp_path)  # it could belong to a process that still compiles
    succeeds(run(tmp_path), value, compiled=False)
    os.utime(part, (0, 0))
    succeeds(run(tmp_path, CFLAGS="-O0 -DOTHER"), value, compiled=True)
    assert part not in kept(tmp_path) and len(kept(tmp_path)) == 2


def test_nobody_listens(tmp_path: Path) -> None:
    code = PROGRAM.format(before="sys.stderr.close()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(tmp_path), timeout=120)
    assert done.stdout.startswith(b"True ")


@pytest.mark.parametrize("name", ["TINYDIFF_CC", "TINYDIFF_KEEP_MEMORY"])
def test_the_switch_is_0_or_1(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before="")],
        capture_output=True, text=True, env=environment(tmp_path, **{name: "no"}), timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and f"ValueError: {name} must be 0 or 1, not 'no'" in done.stderr
