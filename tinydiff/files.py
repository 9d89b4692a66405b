"""Files that are written whole or not at all, that leave no litter, and a directory that one process has for itself.

    write_atomically(path, lambda file: file.write(b"..."))
    with one_at_a_time("runs/a/run.lock"): ...

Who owns a file that is not finished? The process that holds its lock (flock), which the system takes away when that
process ends, however it ends. So a file with a free lock belongs to nobody, and is removed; process numbers would say
less, because they come again, and mean nothing in another container. Where there are no such locks (Windows, some
network drives), nothing is removed, and nobody is kept out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on the disk, or none for this user
MOVED = "tinydiff-moved-"  # a good file that stands elsewhere while a new one is written into its room


class InUse(OSError):
    """Another process, whose number is in the message, has what was asked for."""


# ---------------------------------------------------------------- whole or not at all


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then move it there in one step; the directory is made.

    A reader sees the old file or the new one, never a part, and so does one after a power cut. If `write` raises, the
    temporary file is removed; what a process left that was killed here is removed by the next call. A link is followed.
    Errors: what `write` raises; OSError, with the name of the file.
    """
    moved, target, temporary = _moved_to(Path(path)), _target(Path(path)), ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_litter(target.parent, target.name)
        # In the same directory, because a rename is atomic only within one file system.
        handle, temporary = _temporary(target)
        with contextlib.ExitStack() as held:
            if fcntl is not None:
                held.callback(os.close, os.dup(handle))  # the lock is held until the file has its name
            with os.fdopen(handle, "w+b") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # the bytes before the name: else a power cut could leave an empty file
            mask = os.umask(0)  # there is no other way to read it
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it private
            os.replace(temporary, target)
        _sync_directory(target.parent)
        if moved:
            moved.unlink(missing_ok=True)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        if temporary:
            with contextlib.suppress(FileNotFoundError):  # it has its name already
                os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_in_little_room(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """write_atomically on a disk that has room for the old file or the new one, but not for both: the old one waits on
    another file system (the directory for temporary files, or the memory), and `path` is a link to it meanwhile. So at
    every instant `path` leads to a good file, also if the process is killed.
    Errors: as write_atomically, and then the old file is there as it was."""
    path = Path(path)
    try:
        write_atomically(path, write)
        return
    except OSError as error:
        if error.errno not in FULL or not path.is_file() or _moved_to(path) or not _make_room(path):
            raise
    try:
        write_atomically(path, write)  # over the link
    except BaseException:
        moved = _moved_to(path)
        if moved:
            with contextlib.suppress(OSError):  # no room even for the old one, which then stays where it is
                write_atomically(path, lambda file: _copy(moved, file))
        raise


def _make_room(path: Path) -> bool:
    """Move the file to another file system, and leave a link to it. Was that possible?"""
    target = Path(os.path.realpath(path))
    for place in _places():
        copy, link = "", str(target.with_name(f"{target.name}.{os.urandom(4).hex()}.part"))
        try:
            if os.stat(place).st_dev == os.stat(target.parent).st_dev:
                continue
            handle, copy = tempfile.mkstemp(prefix=_moved_name(target), suffix=f"-{target.name}", dir=place)
            with os.fdopen(handle, "wb") as file:
                _lock(handle)
                os.symlink(copy, link)  # first of all, so that the copy can be found if this process is killed
                _copy(target, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(link, target)
            _sync_directory(target.parent)
            return True
        except OSError:
            for leftover in (copy, link):
                with contextlib.suppress(OSError):
                    os.unlink(leftover)
    return False


def _places() -> tuple[str, str]:
    return tempfile.gettempdir(), "/dev/shm"


def _moved_name(target: Path) -> str:
    """How the name of a file begins that makes room for a new one; so it is found, too, if this process is killed when
    the new one has its place already, and no link leads there any more."""
    return f"{MOVED}{hashlib.blake2b(os.fsencode(target), digest_size=8).hexdigest()}-"


def _moved_to(path: Path) -> Path | None:
    """Where a file waits that made room; None for any other file or link."""
    try:
        found = Path(os.readlink(path))
    except OSError:
        return None
    return found if found.name.startswith(MOVED) else None


def _target(path: Path) -> Path:
    """The file that is written: where a link leads, unless that only made room."""
    return path if _moved_to(path) else Path(os.path.realpath(path))


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as old:
        shutil.copyfileobj(old, file, 2**20)


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line at the end of a file. Errors: OSError, and then the file is as it was: no line is cut."""
    with open(path, "ab", buffering=0) as file:
        before, data = file.seek(0, os.SEEK_END), line.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            file.truncate(before)
            raise


def _temporary(target: Path) -> tuple[int, str]:
    """A new file beside the target, which this process owns."""
    while True:
        handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
        if _lock(handle, wait=True) is None or _is(name, handle):
            return handle, name
        os.close(handle)  # another process took it for litter before it was locked


def remove_litter(folder: Path, name: str | None = None) -> None:
    """Remove what processes left in a folder that were killed while they wrote the file of this name. None: any file;
    that is for folders of the cache, where nobody else has files."""
    if name is not None:
        _remove_moved(Path(os.path.realpath(folder)) / name)
    name = ".+" if name is None else re.escape(name)
    unfinished = re.compile(rf"{name}\.[a-z0-9_]{{8}}\.part|\.{name}\.(\d+)-\d+")  # the second as 0.1.0 called them
    try:
        there = os.listdir(folder)
    except OSError:  # it is not there, or may be written to and not read
        return
    for match in filter(None, map(unfinished.fullmatch, there)):
        if not (match[1] and _is_alive(int(match[1]))):
            path = folder / match[0]
            moved = _moved_to(path)  # of a link that was to take the place of a file
            with contextlib.suppress(OSError):
                if moved and not moved.exists():
                    path.unlink()
                    continue
                handle = os.open(moved or path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    if _lock(handle):
                        path.unlink()
                        if moved:
                            moved.unlink()
                finally:
                    os.close(handle)


def _remove_moved(target: Path) -> None:
    """What made room for a file, and to which no link leads any more."""
    in_use, begin = _moved_to(target), _moved_name(target)
    for place in _places():
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = [name for name in os.listdir(place) if name.startswith(begin)]
        for path in (Path(place) / name for name in names):
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
                try:
                    # Its link may not be there yet: then it is locked.
                    if path != in_use and os.fstat(handle).st_uid == _user() and _lock(handle):
                        path.unlink()
                finally:
                    os.close(handle)


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def remove_litter_of(path: str | os.PathLike[str]) -> None:
    """Remove what processes left that were killed while they wrote this file."""
    target = _target(Path(path))
    remove_litter(target.parent, target.name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- one at a time


def _lock(handle: int, wait: bool = False) -> bool | None:
    """Lock an open file. Was it free? None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return None


def _is(path: str | os.PathLike[str], handle: int) -> bool:
    """Is the open file the one of that name?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def check_ordinary(path: str | os.PathLike[str]) -> None:
    """Errors: ValueError for a device, which has no end, or a pipe, which may never begin; OSError, as os.stat."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # to open a directory has an error of its own
        raise ValueError(f"{os.fspath(path)!r} is not a file, but a device or a pipe")


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Inside, this call has the lock file at `path` for itself; it holds the number of the process. One that was left
    by a process that has ended does not count. what: is in use, for the message.
    Errors: InUse if another process, or another thread, is inside; OSError if the file cannot be made."""
    owner = os.getpid()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        free = _lock(handle)
        if free is False:
            other = os.read(handle, 20).decode(errors="replace").strip() or "that does not say its number"
            os.close(handle)
            raise InUse(f"{what} is in use by process {other}: stop it first, or choose another")
        if free is None or _is(path, handle):
            break
        os.close(handle)  # whoever had it has removed it
    try:
        with contextlib.suppress(OSError):  # a full disk: then it has no number
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        _held.add(handle)
        yield
    finally:
        if os.getpid() == owner:  # a child that was forked inside, and leaves by this way too, has nothing to give back
            _held.discard(handle)
            with contextlib.suppress(OSError):
                os.unlink(path)  # while it is locked: whoever opens it now finds that it has no name
            os.close(handle)


_held: set[int] = set()  # the open files of locks


def _let_go() -> None:
    """In a forked child, which would keep its parent's locks after the parent's end."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# ---------------------------------------------------------------- places


def cache_dir(name: str) -> Path:
    """The directory `${XDG_CACHE_HOME:-~/.cache}/tinydiff/<name>`, for data between runs; it need not exist yet.
    Errors: RuntimeError if there is neither that variable nor a home directory."""
    try:
        base: Any = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise RuntimeError(
            f"there is no home directory to keep files in ({error}): set XDG_CACHE_HOME to a directory"
        ) from error
    return Path(base) / "tinydiff" / name
