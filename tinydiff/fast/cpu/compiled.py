"""The C files beside this one, compiled when one of their functions is first called, and called through one door.

    norm = Function("norm", "in x(a,l,c), in shift(a,c)?, ..., out y(a,l,c), ..., real eps, int silu")
    norm(x, shift, ..., y=y, ...)                 -> False if there is no library: then NumPy goes on

The compiler is $CC, or else cc, gcc or clang; $CFLAGS are added to its flags. The library is kept in a folder of the
user's own, under a name made from the sources, the flags, the compiler and the processor, so that it is made once, and
again when one of these changes. TINYDIFF_CC=0 switches all of this off. Without a compiler, or if anything fails, one
line on stderr says so, once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...saving import cache_dir

HERE = Path(__file__).parent
SOURCES = sorted(HERE.glob("*.c"))
# -O3 turns the loops into vector instructions. Not -ffast-math: NaN and Inf stay what they are, sums keep their order.
FLAGS = ("-O3", "-march=native", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC",
         "-shared")  # fmt: skip
REALS = {"f": "float", "d": "double"}
ARRAYS = ("in", "out", "inout")
FUNCTIONS: list[Function] = []
_lock = threading.Lock()


class CannotCompile(Exception):
    """The reason is its text."""


# ---------------------------------------------------------------- building


@functools.cache
def library(char: str) -> ctypes.CDLL | None:
    """The library for float ("f") or double ("d"); None if there is none, which a line on stderr explains once."""
    if os.environ.get("TINYDIFF_CC") == "0":
        return None
    try:
        with _lock:
            return _load(REALS[char])
    except CannotCompile as reason:
        _say_once(f"tinydiff: no compiled kernels, NumPy goes on ({reason})")
        return None


@functools.cache
def _say_once(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


def _load(real: str) -> ctypes.CDLL:
    compiler = _compiler()
    folder = _own_folder()
    path = folder / f"kernels-{real}-{_key(compiler, real)}.so"
    for attempt in range(2):
        if not path.exists():
            _compile(compiler, real, path)
        if not _is_ours(path):
            raise CannotCompile(f"{path} does not belong to this user alone: remove it")
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:  # a damaged file
            if attempt:
                raise CannotCompile(f"{path} cannot be loaded: {error}") from error
            path.unlink(missing_ok=True)
    raise AssertionError


def _compiler() -> list[str]:
    """The command of the compiler."""
    if chosen := os.environ.get("CC"):
        command = shlex.split(chosen)
        if not command or shutil.which(command[0]) is None:
            raise CannotCompile(f"CC={chosen!r} is no command here")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise CannotCompile("no C compiler: neither cc, gcc nor clang is here")


def _flags() -> list[str]:
    return [*FLAGS, *shlex.split(os.environ.get("CFLAGS", ""))]


def _own_folder() -> Path:
    """A folder into which nobody else can write: what lies there is executed."""
    try:
        folder = cache_dir("kernels")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise CannotCompile(f"no folder to keep them in: {error}") from error
    if not _is_ours(folder):
        raise CannotCompile(f"{folder} does not belong to this user alone: chmod go-w it")
    return folder


def _is_ours(path: Path) -> bool:
    try:
        about = path.lstat()
    except OSError:
        return False
    ours = not hasattr(os, "getuid") or about.st_uid == os.getuid()
    return ours and not stat.S_ISLNK(about.st_mode) and not about.st_mode & 0o022


def _key(compiler: list[str], real: str) -> str:
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    about = program.stat()
    texts = [path.read_bytes() for path in (*SOURCES, *sorted(HERE.glob("*.h")))]
    about_build = (compiler, str(program), about.st_size, about.st_mtime_ns, _flags(), real, _processor())
    parts = [*texts, repr(about_build).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(
            line for line in lines if line.split("\t")[0] in ("vendor_id", "model name", "flags", "Features")
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: list[str], real: str, path: Path) -> None:
    start = time.monotonic()
    try:
        handle, part = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise CannotCompile(f"{path.parent} cannot be written: {error}") from error
    try:
        command = [*compiler, *_flags(), f"-DREAL={real}", "-o", part, *map(str, SOURCES), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        if done.returncode:
            raise CannotCompile(f"{shlex.join(command)} failed: {done.stderr.strip()[:500]}")
        os.chmod(part, 0o700)
        os.replace(part, path)  # in one step: another process sees the whole library, or none
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotCompile(f"{shlex.join(compiler)}: {error}") from error
    finally:
        Path(part).unlink(missing_ok=True)
    names = ", ".join(source.name for source in SOURCES)
    _say_once(f"tinydiff: compiled {names} for {real} in {time.monotonic() - start:.1f} s, kept in {path.parent}")


# ---------------------------------------------------------------- calling


class Function:
    """A function of a C file, int name(...), whose arguments are declared in the order of its C signature:

    in x(a,l,c)          an array that is read, of real numbers in C order; its lengths give the numbers a, l, c
    in int64 index(n)    an array of another dtype
    in shift(a,c)?       an array, or None for NULL
    out y(a,l,c)         an array that is written, which shares no memory with the others
    inout p(n)           the same, and its values are read
    int a, real eps      a number; a length among them is taken from the shapes
    """

    def __init__(self, name: str, declaration: str):
        self.name, self.arguments = name, [_argument(text) for text in re.split(r",\s*(?![^(]*\))", declaration)]
        FUNCTIONS.append(self)

    def __call__(self, **given: Any) -> bool:
        """Call it, with every argument by name but the lengths. False if there is no library.
        Errors: TypeError or ValueError for an array of another dtype, shape or layout, or one that shares memory."""
        arrays = {x.name: given[x.name] for x in self.arguments if x.kind in ARRAYS}
        char = next(
            arrays[x.name].dtype.char
            for x in self.arguments
            if x.kind in ARRAYS and x.dtype == "real" and arrays[x.name] is not None
        )
        found = library(char)
        if found is None:
            return False
        numbers = self._checked(arrays, char)
        real = ctypes.c_float if char == "f" else ctypes.c_double
        values: list[Any] = []
        for x in self.arguments:
            if x.kind == "int":
                values.append(ctypes.c_int64(numbers[x.name] if x.name in numbers else given[x.name]))
            elif x.kind == "real":
                values.append(real(given[x.name]))
            else:
                values.append(ctypes.c_void_p(None if given[x.name] is None else given[x.name].ctypes.data))
        if getattr(found, self.name)(*values):  # ctypes releases the GIL meanwhile
            raise MemoryError(f"{self.name}: no memory for its sums")
        return True

    def _checked(self, arrays: dict[str, Any], char: str) -> dict[str, int]:
        """The lengths by name."""
        numbers: dict[str, int] = {}
        for x in self.arguments:
            a = arrays.get(x.name)
            if x.kind not in ARRAYS or (a is None and x.optional):
                continue
            dtype = np.dtype(char if x.dtype == "real" else x.dtype)
            if (
                not isinstance(a, np.ndarray)
                or a.dtype != dtype
                or not a.flags.c_contiguous
                or a.ndim != len(x.lengths)
            ):
                what = f"{a.dtype} {a.shape} strides {a.strides}" if isinstance(a, np.ndarray) else repr(a)
                raise TypeError(
                    f"{self.name}: {x.name} must be a C array ({', '.join(x.lengths)}) of {dtype}, not {what}"
                )
            for length, n in zip(x.lengths, a.shape):
                if numbers.setdefault(length, n) != n:
                    raise ValueError(f"{self.name}: {x.name} {a.shape} has {length} = {n}, but it is {numbers[length]}")
            if x.kind != "in":
                if not a.flags.writeable:
                    raise ValueError(f"{self.name}: {x.name} cannot be written")
                for other, b in arrays.items():
                    if other != x.name and b is not None and np.may_share_memory(a, b):
                        raise ValueError(f"{self.name}: {x.name} shares memory with {other}")
        return numbers


class Argument(NamedTuple):
    kind: str  # in, out, inout, int, real
    name: str
    dtype: str  # of an array: real, or a name of NumPy's
    lengths: tuple[str, ...]
    optional: bool

    @property
    def in_c(self) -> str:
        """As it stands in the signature."""
        if self.kind not in ARRAYS:
            return {"int": "int64_t ", "real": "real "}[self.kind] + self.name
        element = "real" if self.dtype == "real" else f"{self.dtype}_t"
        return f"{'const ' if self.kind == 'in' else ''}{element} *restrict {self.name}"


def _argument(text: str) -> Argument:
    number = re.fullmatch(r"(int|real) (\w+)", text.strip())
    array = re.fullmatch(r"(in|out|inout) (?:(u?int\d+) )?(\w+)\(([\w,]+)\)(\?)?", text.strip())
    if number:
        return Argument(number[1], number[2], "", (), False)
    if array:
        return Argument(array[1], array[3], array[2] or "real", tuple(array[4].split(",")), bool(array[5]))
    raise ValueError(f"no declaration of an argument: {text!r}")
