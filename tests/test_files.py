"""Files that are whole or not there at all, without litter, on disks that are full; and a directory for one process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinydiff import files
from tinydiff.files import InUse, append_line, one_at_a_time, write_atomically, write_in_little_room

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="file locks, file systems and signals as Linux has them")


def program(code: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **options)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can make a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def write_numbers(count: int, byte: bytes = b"x") -> Any:
    return lambda file: file.write(byte * count)


@linux
def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "x"
    code = (
        f"import os, signal; from tinydiff.files import write_atomically\n"
        f"os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_atomically({str(path)!r}, lambda f: f.write(b'x'))"
    )
    assert program(code).wait() == -signal.SIGKILL
    (litter,) = tmp_path.iterdir()
    (tmp_path / f".x.{os.getpid()}-1").write_text("of a process that lives")
    (tmp_path / ".x.999999999-1").write_text("as version 0.1.0 called them, of one that does not")
    (tmp_path / "x.old.part").write_text("a file of the user's own")
    inside, leave = threading.Event(), threading.Event()

    def slow(file: Any) -> None:
        inside.set()
        assert leave.wait(20)
        file.write(b"slow")

    thread = threading.Thread(target=write_atomically, args=(path, slow))
    thread.start()
    assert inside.wait(20)
    assert not litter.exists()
    write_atomically(path, write_numbers(1))
    assert sorted(p.name.split(".")[0] for p in tmp_path.iterdir()) == ["", "x", "x", "x"]  # x.old.part, and slow's
    leave.set()
    thread.join()
    assert path.read_bytes() == b"slow"
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".x.{os.getpid()}-1", "x", "x.old.part"]


def test_an_interrupt_after_the_rename_is_that_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def interrupted(*names: Any) -> None:
        replace(*names)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", write_numbers(3))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"xxx"]


@linux
def test_bytes_and_names_are_on_the_disk_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = [], os.fsync, os.replace
    is_directory = lambda handle: os.path.isdir(f"/proc/self/fd/{handle}")  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda h: (done.append("directory" if is_directory(h) else "file"), fsync(h)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    write_atomically(tmp_path / "x", write_numbers(3))
    assert done == ["file", "rename", "directory"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "large disk" / "x")
    for size in (1, 2):
        write_atomically(tmp_path / "x", write_numbers(size))
        assert (tmp_path / "x").is_symlink() and (tmp_path / "large disk" / "x").read_bytes() == b"x" * size


@linux
def test_a_full_disk_names_the_file_and_leaves_the_old_one(small_disk: Path) -> None:
    write_atomically(small_disk / "x", write_numbers(20_000))
    with pytest.raises(OSError, match="No space left on device.*disk/x") as found:
        write_atomically(small_disk / "x", write_numbers(100_000, b"y"))
    assert found.value.errno == errno.ENOSPC
    assert [p.read_bytes() for p in small_disk.iterdir()] == [b"x" * 20_000]


@linux
def test_with_room_for_one_but_not_for_two_it_is_still_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, elsewhere = small_disk / "x", small_disk.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    for byte in (b"a", b"b", b"c"):
        write_in_little_room(path, write_numbers(40_000, byte))
        assert path.read_bytes() == byte * 40_000 and not path.is_symlink()
    with pytest.raises(OSError, match="No space left"):
        write_in_little_room(path, write_numbers(80_000))
    assert path.read_bytes() == b"c" * 40_000 and not path.is_symlink()
    seen = []

    def killed_in_the_middle(file: Any) -> None:
        seen.append((path.is_symlink(), path.read_bytes() == b"c" * 40_000))
        file.write(b"d" * 40_000)

    write_in_little_room(path, killed_in_the_middle)
    assert seen == [(False, True), (True, True)], "a good file is there at every instant"
    assert os.listdir(small_disk) == ["x"] and os.listdir(elsewhere) == []


@linux
def test_after_a_kill_in_little_room_the_next_file_takes_its_place(tmp_path: Path) -> None:
    waiting = tmp_path / f"{files.MOVED}1-x"
    waiting.write_bytes(b"good")
    path = tmp_path / "out" / "x"
    path.parent.mkdir()
    path.symlink_to(waiting)
    write_in_little_room(path, write_numbers(2))
    assert path.read_bytes() == b"xx" and not path.is_symlink() and not waiting.exists()


@linux
def test_what_was_killed_while_it_made_room_is_removed(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = small_disk / "x", small_disk.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    write_atomically(path, write_numbers(40_000))
    code = (
        f"import os, signal, shutil, tempfile; from tinydiff.files import write_in_little_room\n"
        f"tempfile.tempdir = {str(elsewhere)!r}\n"
        f"shutil.copyfileobj = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_in_little_room({str(path)!r}, lambda f: f.write(b'y' * 40_000))"
    )
    for copy_is_there in (True, False):  # after a restart of the machine it may be gone
        assert program(code).wait() == -signal.SIGKILL
        (copy,) = elsewhere.iterdir()
        assert len(os.listdir(small_disk)) == 2
        if not copy_is_there:
            copy.unlink()
        write_in_little_room(path, write_numbers(40_000))
        assert os.listdir(small_disk) == ["x"] and os.listdir(elsewhere) == []


def test_a_folder_that_cannot_be_listed_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(folder: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", denied)
    write_atomically(tmp_path / "x", write_numbers(3))
    assert (tmp_path / "x").read_bytes() == b"xxx"


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "log"
    append_line(path, "12345\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, limit[1]))
        with pytest.raises(OSError):
            append_line(path, "67890\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_text() == "12345\n"


@linux
def test_one_at_a_time_and_a_stale_lock_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("999999999\n")  # of a process that was killed
    with one_at_a_time(path, "the run"):
        with pytest.raises(InUse, match=f"the run is in use by process {os.getpid()}: stop it first"):
            with one_at_a_time(path, "the run"):
                pass
    assert not path.exists()
    code = (
        f"import time; from tinydiff.files import one_at_a_time\n"
        f"with one_at_a_time({str(path)!r}, 'x'): print('inside', flush=True); time.sleep(60)"
    )
    other = program(code, stdout=subprocess.PIPE)
    assert other.stdout and other.stdout.readline() == "inside\n"
    with pytest.raises(InUse, match=f"in use by process {other.pid}"):
        with one_at_a_time(path, "the run"):
            pass
    other.kill()
    other.wait()
    other.stdout.close()
    assert path.exists()
    with one_at_a_time(path, "the run"):
        assert path.read_text() == f"{os.getpid()}\n"


def test_many_who_want_it_have_it_one_after_the_other(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    inside, most, done = [0], [0], [0]

    def enter() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                with one_at_a_time(tmp_path / "lock", "it"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.0005)
                    inside[0] -= 1
                    done[0] += 1
                return
            except InUse:
                time.sleep(0.0005)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and done == [8]


def test_a_lock_file_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had it removes it at the end; a lock on a file without a name keeps nobody out."""
    pytest.importorskip("fcntl")
    path, lock, calls = tmp_path / "lock", files._lock, []

    def locked(handle: int, wait: bool = False) -> bool | None:
        if not calls:
            path.unlink()
        calls.append(handle)
        return lock(handle, wait)

    monkeypatch.setattr(files, "_lock", locked)
    with one_at_a_time(path, "it"):
        assert path.read_text() == f"{os.getpid()}\n" and len(calls) == 2


def test_a_file_is_no_litter_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fcntl")
    path, replace = tmp_path / "x", os.replace

    def while_another_starts(*names: Any) -> None:
        files.remove_litter(path.parent, path.name)
        replace(*names)

    monkeypatch.setattr(os, "replace", while_another_starts)
    write_atomically(path, write_numbers(3))
    assert path.read_bytes() == b"xxx"


def test_what_made_room_is_found_when_no_link_leads_there_any_more(tmp_path, monkeypatch):
    """As after a kill between the rename and the removal. What is of another file stays."""
    pytest.importorskip("fcntl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(files, "_places", lambda: (str(elsewhere), str(elsewhere)))
    (tmp_path / "run").mkdir()
    mine, other = tmp_path / "run" / "checkpoint.npz", tmp_path / "other" / "checkpoint.npz"
    left, waits, others = (
        elsewhere / f"{files._moved_name(target)}{end}-checkpoint.npz"
        for target, end in ((mine, "abc"), (mine, "def"), (other, "abc"))
    )
    for path in (left, waits, others):
        path.write_bytes(b"old")
    mine.symlink_to(waits)
    files.remove_litter_of(mine)
    assert not left.exists() and waits.exists() and others.exists()
    files.write_atomically(mine, lambda file: file.write(b"new"))
    assert mine.read_bytes() == b"new" and not mine.is_symlink() and not waits.exists() and others.exists()
