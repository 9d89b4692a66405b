"""The C files beside this one, as a library: compiled when one of their functions is first called, and kept.

    library("f")    -> the functions for float, "d" for double; None if they cannot be had: then NumPy goes on

Whatever goes wrong, one line on stderr says so, once. TINYDIFF_CC=0 switches all of this off.

**The compiler** is $CC, or else cc, gcc or clang; $CFLAGS are added to its flags, except what breaks NaN, such as
-ffast-math, which real.h refuses. It has LIMIT seconds. If it does not know this very processor (an old assembler does
not know all that a new one has), it is asked for plain code instead.

**Where.** `${XDG_CACHE_HOME:-~/.cache}/tinydiff/kernels`, a folder into which only this user (or root) can write,
because what lies there is executed. It may be deleted at any time.

**The name** is `kernels-float-MADE-BY-WHOLE.so`, three digests:

* MADE of the sources, of what is written here (calls_in_parts), the flags and the processor. Homes are shared between
  machines, and what is compiled for one processor may end a process on another (SIGILL).
* BY of the compiler, so that a new compiler or another $CC makes a new library. Where there is no compiler at all, as
  on many compute nodes, any BY will do.
* WHOLE of the file's own contents, which are compared before it is loaded. To load a library whose tail is missing
  ends the process (SIGBUS).

A library gets its name in one step when it is complete, so processes that compile at the same time do no harm.

On Windows and macOS this is written from their documentation and has not been run. Windows: a gcc or clang (not cl),
whose library ends in .dll; who may write into the folder is left to the system; one thread does all parts of a call.
macOS: cc is clang, and like any ARM compiler it is given -mcpu=native, because some versions know no -march=native.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ...backend import switch
from ...saving import cache_dir

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c"))
# -O3 turns the loops into vector instructions. Not -ffast-math: NaN and Inf stay what they are, sums keep their order.
# _GNU_SOURCE: for the threads of pool.c and their clock, which are not C11's.
FLAGS = ("-O3", "-std=c11", "-D_GNU_SOURCE", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
MACHINE = platform.machine().lower()
NATIVE = ["-mcpu=native" if MACHINE in ("arm64", "aarch64", "ppc64le") else "-march=native"]
if MACHINE in ("x86_64", "amd64"):
    # For some processors GCC keeps a product and its sum apart in a loop with one sum, and together in the same loop
    # with several. Then the digits of an image would depend on how many stand beside it.
    NATIVE.append("--param=avoid-fma-max-bits=0")
CALLS = "calls.c"  # written here: calls_in_parts
SUFFIX = ".dll" if os.name == "nt" else ".so"
REALS = {"f": "float", "d": "double"}
SLOW, LIMIT = 10, 120  # seconds, after which a line says that it takes long, and after which NumPy goes on
_libraries: dict[str, ctypes.CDLL | None] = {}
_lock = threading.Lock()


class CannotCompile(Exception):
    """The reason is its text."""


def library(char: str) -> ctypes.CDLL | None:
    """The library for float ("f") or double ("d"); None if there is none, which a line on stderr explains once."""
    if char not in _libraries:
        with _lock:  # a second thread waits for what the first finds
            if char not in _libraries:
                _libraries[char] = _found_or_made(REALS[char])
    return _libraries[char]


def stop_looking() -> None:
    """Threads of Python are about to work: those of the libraries (pool.c) shall not look for more work."""
    for loaded in list(_libraries.values()):
        if loaded is not None:
            loaded.stop_looking()


def _new_lock() -> None:
    """In the child of a fork, where the thread that held the old one does not exist."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def _found_or_made(real: str) -> ctypes.CDLL | None:
    if not switch("TINYDIFF_CC"):
        return None
    try:
        folder, compiler = _own_folder(), _compiler()
        name = f"kernels-{real}-{_made_from(real)}"
        kept = sorted(folder.glob(f"{name}-{_about(compiler) if compiler else '*'}-*{SUFFIX}"))
        if path := next(filter(_is_whole, kept), None):
            return _load(path)
        if not compiler:
            raise CannotCompile("no C compiler: neither cc, gcc nor clang is here")
        start = time.monotonic()
        found, names = _load(_compile(compiler, real, folder, name)), ", ".join(path.name for path in SOURCES)
        _say(f"tinydiff: compiled {names} for {real} in {time.monotonic() - start:.1f} s, kept in {folder}")
        return found
    except (CannotCompile, OSError, ValueError, RuntimeError) as reason:
        _say(f"tinydiff: no compiled kernels, NumPy goes on, slower ({reason})")
        return None


@functools.cache
def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


def report() -> list[tuple[str, str, str, str]]:
    """For tinydiff.doctor: (name, "ok", "note" or "WRONG", what there is, what to do)."""
    try:
        compiler = " ".join(_compiler())
    except CannotCompile as reason:
        compiler = str(reason)
    found = [("C compiler", "ok" if compiler else "note", compiler or "none", "")]
    if not switch("TINYDIFF_CC"):
        found.append(("C kernels", "note", "switched off by TINYDIFF_CC=0; NumPy runs, slower", "unset TINYDIFF_CC"))
    elif library("f") is None:
        remedy = "install gcc or clang (see the reason on stderr); without them all works, more slowly"
        found.append(("C kernels", "note", "none; NumPy runs, slower", remedy))
    else:
        found.append(("C kernels", "ok", f"{len(SOURCES)} files compiled, in {cache_dir('kernels')}", ""))
    return found


# ---------------------------------------------------------------- what is there


def _own_folder() -> Path:
    try:
        folder = cache_dir("kernels")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise CannotCompile(f"no folder to keep them in: {error}") from error
    _check_ours(folder, stat.S_ISDIR, "chmod go-w it")
    return folder


def _check_ours(path: Path, is_kind: Callable[[int], bool], remedy: str) -> None:
    """Nobody else can have written it; nor is it a link, a pipe or anything else of another kind."""
    about = path.lstat()
    ours = not hasattr(os, "getuid") or (about.st_uid in (0, os.getuid()) and not about.st_mode & 0o022)
    if not ours or not is_kind(about.st_mode):
        raise CannotCompile(f"{path} does not belong to this user alone: {remedy}")


def _is_whole(path: Path) -> bool:
    """Are its contents those that were written? If not, it is removed."""
    try:
        _check_ours(path, stat.S_ISREG, "remove it")
    except FileNotFoundError:  # another process has just removed it
        return False
    if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
        return True
    with contextlib.suppress(OSError):
        path.unlink()
    return False


def _load(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotCompile(f"{path} cannot be loaded: {error}") from error
    names = re.findall(r"^(?:int|void) (\w+)\(", f"{_text()}\n{calls_in_parts()}", re.MULTILINE)
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise CannotCompile(f"{path} has no function {', '.join(missing)}: remove it")
    return found


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _made_from(real: str) -> str:
    texts = [path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h")))]
    return _digest(*texts, calls_in_parts().encode(), repr((NATIVE, _flags(), real, _processor())).encode())


def _processor() -> str:
    """What code for this very processor depends on, and the kind of process that can load it."""
    glibc = "CS_GNU_LIBC_VERSION"
    libc = os.confstr(glibc) if glibc in getattr(os, "confstr_names", ()) else None
    kind = f"{platform.machine()} {struct.calcsize('P')} {sys.platform} {libc}"
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return f"{kind} {platform.version()} {os.environ.get('PROCESSOR_IDENTIFIER')}"  # macOS: with the chip's name
    wanted = {"vendor_id", "cpu family", "model", "model name", "flags"}
    wanted |= {"Features", "CPU implementer", "CPU variant", "CPU part", "cpu", "isa", "uarch", "features"}  # not x86
    return "\n".join([kind, *(line for line in first.splitlines() if line.split(":")[0].strip() in wanted)])


# ---------------------------------------------------------------- compiling


def _compiler() -> list[str]:
    """Its command; empty if there is none. $CC may have arguments, as in "ccache gcc"."""
    if chosen := os.environ.get("CC"):
        command = _words(chosen, "CC")
        if not command or shutil.which(command[0]) is None:
            raise CannotCompile(f"CC={chosen!r} is no command here")
        return command
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def _about(compiler: list[str]) -> str:
    """Changes when one of the programs in its command does."""
    programs = [Path(found).resolve() for word in compiler if (found := shutil.which(word))]
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in programs]
    return _digest(repr((compiler, states)).encode())


def _words(text: str, name: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CannotCompile(f"{name}={text!r}: {error}") from error


def _flags() -> list[str]:
    return [*FLAGS, *_words(os.environ.get("CFLAGS", ""), "CFLAGS")]


def _compile(compiler: list[str], real: str, folder: Path, name: str) -> Path:
    try:
        _remove_leftovers(folder)
        work = Path(tempfile.mkdtemp(suffix=".part", dir=folder))
    except OSError as error:
        raise CannotCompile(f"{folder} cannot be written: {error}") from error
    try:
        _write(work / CALLS, calls_in_parts())
        made = work / f"kernels{SUFFIX}"
        if _make(compiler, [*NATIVE, *_flags(), f"-DREAL={real}"], work, made):
            complaint = _make(compiler, [*_flags(), f"-DREAL={real}"], work, made)  # its assembler may be too old
            if complaint:
                raise CannotCompile(f"{shlex.join([*compiler, *_flags()])} failed: {complaint}")
        path = folder / f"{name}-{_about(compiler)}-{_digest(made.read_bytes())}{SUFFIX}"
        made.chmod(0o700)
        made.replace(path)  # in one step: another process sees the whole library, or none
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise CannotCompile(f"{path} cannot be written: {error}") from error


def _remove_leftovers(folder: Path) -> None:
    """Of processes that were killed while they compiled."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.lstat().st_mtime > 5 * LIMIT:
                shutil.rmtree(part)


def _make(compiler: list[str], flags: list[str], work: Path, made: Path) -> str:
    """The files, all at the same time, and then the library of them. What the compiler said if it failed, or ""."""
    sources = [*SOURCES, work / CALLS]
    objects = [str(work / f"{source.stem}.o") for source in sources]
    compiled = [[*compiler, *flags, f"-I{HERE}", "-c", "-o", o, str(source)] for o, source in zip(objects, sources)]
    linked = [
        *compiler,
        *flags,
        "-shared",
        "-o",
        str(made),
        *objects,
        "-lm",
        *([] if os.name == "nt" else ["-pthread"]),
    ]
    return _run(compiled, work) or _run([linked], work) or ("" if made.is_file() else "it wrote nothing")


def calls_in_parts() -> str:
    """In C, for every function that does one part of a call, name(..., part, parts), the one that has all of them done
    by several threads: name_in_parts(..., parts, threads). How: pool.c."""
    lines = ['#include "real.h"', '#include "pool.h"']
    for name, given in re.findall(r"^int (\w+)\(([^)]*),\s+int64_t part,\s+int64_t parts\)$", _text(), re.MULTILINE):
        given = " ".join(given.split())
        names = re.findall(r"(\w+)(?:,|$)", given)
        lines += [
            f"\nint {name}({given}, int64_t part, int64_t parts);",
            f"struct {name} {{ {given.replace(',', ';')}; }};",
            f"static int part_of_{name}(const void *call, int64_t part, int64_t parts) {{",
            f"    const struct {name} *of = call;",
            f"    return {name}(of->{', of->'.join(names)}, part, parts);\n}}",
            f"int {name}_in_parts({given}, int64_t parts, int64_t threads) {{",
            f"    struct {name} call = {{{', '.join(names)}}};",
            f"    return in_parts(part_of_{name}, &call, parts, threads);\n}}",
        ]
    return "\n".join(lines) + "\n"


def _text() -> str:
    return "\n".join(source.read_text("utf-8") for source in SOURCES)


def _run(commands: list[list[str]], work: Path) -> str:
    """What the first that failed said, or ""."""
    started, start = [], time.monotonic()
    try:
        for i, command in enumerate(commands):
            with open(work / f"{i}.log", "wb") as log:
                # In a session of its own, so that a compiler can be stopped together with what it has started.
                started.append(
                    subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                        env={**os.environ, "TMPDIR": str(work)}, start_new_session=True,
                    )
                )  # fmt: skip
        for i, process in enumerate(started):
            try:
                process.wait(max(0, start + SLOW - time.monotonic()))
            except subprocess.TimeoutExpired:
                who = commands[i][0]
                _say(f"tinydiff: {who} takes long; if it is not done after {LIMIT} s, NumPy goes on without it")
                process.wait(max(0, start + LIMIT - time.monotonic()))
            if process.returncode:
                with open(work / f"{i}.log", "rb") as log:
                    return _complaint(log.read(2**16)) or f"exit status {process.returncode}"
        return ""
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{commands[0][0]} took more than {LIMIT} s") from error
    finally:
        for process in started:
            if process.poll() is None:
                with contextlib.suppress(OSError):  # it has just ended
                    process.kill() if os.name == "nt" else os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _complaint(said: bytes) -> str:
    """The line that matters, or a little of it, without what could confuse a terminal."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")
    return "".join(c if c.isprintable() else "?" for c in line[:300])
