"""What does a reader do besides reading? Python tells an audit hook (PEP 578) of every file that it opens, moves or
removes, of every program that it starts, and of every piece of code that it runs.

    with watched(folder): read(folder / "file")     # AssertionError if something was run, or written outside the folder

What a library in another language does by itself (the one of safetensors, when it is given a path) is not seen.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
        "pickle.find_class", "socket.connect", "code.__new__")  # fmt: skip
PATHS = {  # how many of the first arguments are paths that are changed
    "os.remove": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.mkdir": 1, "os.rmdir": 1, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "shutil.move": 2, "shutil.rmtree": 1,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_folder: list[str] = []  # while it is watched
_seen: list[str] = []


def _inside(path: Any) -> bool:
    if isinstance(path, int):  # a file that is open already
        return True
    return os.path.realpath(os.fsdecode(path)).startswith(_folder[0] + os.sep)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _folder:
        return
    if event in RUNS:
        _seen.append(f"{event} {args!r:.100}")
    elif event == "exec":  # the body of a module of Python or of a package is run when it is first imported
        name = args[0].co_filename
        if not name.startswith("<frozen ") and (not os.path.exists(name) or _inside(name)):
            _seen.append(f"exec {name}")
    elif event in ("import", "ctypes.dlopen"):
        name = args[1] if event == "import" else args[0]
        if name and _inside(name):
            _seen.append(f"{event} {name}")
    elif event == "open":
        if args[2] & WRITES and not _inside(args[0]):
            _seen.append(f"open {args[0]!r} to write")
    elif event in PATHS and not all(map(_inside, args[: PATHS[event]])):
        _seen.append(f"{event} {args!r:.200}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    _folder[:], _seen[:] = [os.path.realpath(folder)], []
    try:
        yield
    finally:
        _folder.clear()
    assert not _seen, f"besides reading: {', '.join(_seen)}"


class Peak:
    """Memory of the whole process, in MB: how much more than now it has taken at its highest. Linux; elsewhere 0."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest is now
        self.before = self._of("VmHWM")

    @staticmethod
    def _of(name: str) -> float:
        with contextlib.suppress(OSError):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
        return 0.0

    def more(self) -> float:
        return self._of("VmHWM") - self.before
