"""Files and mirrors that nobody should trust: right data or one clear error, in bounded memory and time. The cache may
fail without harm, and is rid of what killed processes left."""

import contextlib
import gzip
import hashlib
import importlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tinydiff.data import DownloadError, folder, glyphs, mnist
from tinydiff.data.limits import keep, read_npz
from tinydiff.data.mnist import FILES, Source, read_idx

module = importlib.import_module("tinydiff.data.mnist")

posix = pytest.mark.skipif(os.name != "posix", reason="this system has no such files, signals or locks")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("TINYDIFF_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@contextlib.contextmanager
def at_most(megabytes):
    """Inside, no more than that is allocated at a time, by Python and NumPy."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def gz_bomb(start, megabytes=100):
    found = io.BytesIO()
    with gzip.GzipFile(fileobj=found, mode="wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(megabytes):
            file.write(bytes(2**20))
    return found.getvalue()


SEVEN = idx(np.zeros((7, 28, 28), np.uint8))


# ---- idx files


def test_a_bomb_is_not_unpacked_further_than_its_shape(tmp_path):
    path = tmp_path / FILES["train"][0]
    path.write_bytes(gz_bomb(SEVEN))
    with at_most(4), pytest.raises(ValueError, match=r"idx3-ubyte: too long: .*has 5504 bytes, found at least 71040"):
        read_idx(path, 3)


def test_a_file_that_says_it_is_huge_is_refused(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(gz_bomb(bytes([0, 0, 8, 1, 255, 255, 255, 255])))
    with at_most(4), pytest.raises(ValueError, match=r"labels: a file of shape \(4294967295,\).* the limit of"):
        read_idx(path, 1)
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
    with at_most(4), pytest.raises(ValueError, match="the limit of"):
        read_idx(path, 3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_memory_is_taken_for_what_is_there_and_not_for_what_is_promised(tmp_path, pack):
    path = tmp_path / "labels"
    path.write_bytes(pack(bytes([0, 0, 8, 1]) + (2**29).to_bytes(4, "big") + b"few"))
    with at_most(4), pytest.raises(ValueError, match="labels: truncated: .*has 536870920 bytes, found 11"):
        read_idx(path, 1)


@posix
def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: is not a file"):
            read_idx(path, 3)


def test_a_checksum_of_gzip_is_compared_also_at_the_very_end(tmp_path):
    path = tmp_path / "images"
    blob = bytearray(gzip.compress(SEVEN))
    blob[-8] ^= 1
    path.write_bytes(blob)
    with pytest.raises(ValueError, match="images: truncated or damaged gzip file: CRC"):
        read_idx(path, 3)


# ---- mirrors


@pytest.fixture
def mirror(monkeypatch):
    """A server that answers each request by mirror.answer(connection), and a small data set with its checksums."""
    arrays = np.arange(3 * 784, dtype=np.uint8).reshape(3, 28, 28), np.arange(3, dtype=np.uint8)
    files = {file: idx(array) for file, array in zip(FILES["train"], arrays)}
    md5 = {file: hashlib.md5(files.get(file, b"")).hexdigest() for file in module.ALL_FILES}
    monkeypatch.setitem(module.SOURCES, "mnist", Source("MNIST", (), md5, "idx"))
    listener = socket.create_server(("127.0.0.1", 0))

    class Mirror:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        images = arrays[0]

        @staticmethod
        def answer(connection, file):
            blob = gzip.compress(files[file])
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(blob) + blob)

    def one(connection):
        with connection, contextlib.suppress(OSError):
            request = connection.recv(2**16).split()
            Mirror.answer(connection, request[1].decode().strip("/").removesuffix(".gz"))

    def serve():
        with contextlib.suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    server = threading.Thread(target=serve, daemon=True)
    server.start()
    yield Mirror
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    server.join(5)


def reason(mirror):
    """Why nothing could be had from the mirror."""
    with pytest.raises(DownloadError) as error:
        mnist(mirrors=[mirror.url])
    return str(error.value).splitlines()[1]


def test_a_mirror_that_never_ends(mirror, monkeypatch):
    def answer(connection, _file):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):  # an end, if nobody hangs up
            connection.sendall(bytes(2**16))

    monkeypatch.setattr(module, "PUBLISHED", 2**20)
    mirror.answer = answer
    with at_most(8):
        assert "sends more than 1048576 bytes" in reason(mirror)


def test_a_bomb_from_a_mirror_or_in_the_cache(mirror, monkeypatch):
    bomb, good = gz_bomb(SEVEN), mirror.answer
    monkeypatch.setattr(module, "PUBLISHED", 2**20)
    mirror.answer = lambda connection, _file: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + bomb)
    with at_most(8):
        assert "unpacks to more than 1048576 bytes" in reason(mirror)
    path = module.cache_dir("mnist") / f"{FILES['train'][0]}.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(bomb)
    mirror.answer = good
    with at_most(8):
        np.testing.assert_array_equal(mnist(mirrors=[mirror.url]).images, mirror.images)
    assert path.read_bytes() != bomb


@pytest.mark.parametrize("where", ["in the header", "in the body"])
def test_a_mirror_that_sends_a_byte_now_and_then_is_given_up(mirror, monkeypatch, where):
    def answer(connection, _file):
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if where == "in the body" else b""))
        for _ in range(60):
            time.sleep(0.05)
            connection.sendall(b"x")

    monkeypatch.setattr(module, "PATIENCE", 0.3)
    mirror.answer = answer
    assert "too slow: it sent" in reason(mirror)


def test_a_mirror_that_says_nothing_is_given_up(mirror, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    mirror.answer = lambda connection, _file: time.sleep(1)
    assert "too slow" in reason(mirror) or "timed out" in reason(mirror)


REPLIES = {
    "nothing": b"",
    "no HTTP": b"220 ftp.example.org ready\r\n",
    "a status of letters": b"HTTP/1.1 OK 200\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "continue for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\n\r\n",
    "a redirect to a file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "a redirect to a port of letters": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:port/\r\n\r\n",
    "a redirect to a broken address": b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n",
    "a redirect to an empty host": b"HTTP/1.1 302 Found\r\nLocation: http:///x\r\n\r\n",
    "a length of letters": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    "a length beyond all": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
    "chunks of letters": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    "chunks cut short": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc",
    "a long line": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "a password wanted": b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: \xff\r\n\r\n",
    "bytes that are no text": b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe/\r\n\r\n",
    "a compressed page": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n<html>",
}


@pytest.mark.parametrize("reply", REPLIES)
def test_strange_replies_are_failures_of_the_mirror(mirror, reply):
    mirror.answer = lambda connection, _file: connection.sendall(REPLIES[reply])
    assert mirror.url in reason(mirror)


# ---- the cache


def test_what_cannot_be_cached_is_used_all_the_same(mirror, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="gz is not cached in .*Not a directory"):
        np.testing.assert_array_equal(mnist(mirrors=[mirror.url]).images, mirror.images)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in FILES["train"]:  # a folder where a file should be
        (module.cache_dir("mnist") / f"{file}.gz").mkdir(parents=True)
    with pytest.warns(UserWarning, match="gz is not cached in"):
        np.testing.assert_array_equal(mnist(mirrors=[mirror.url]).images, mirror.images)
    assert not list(tmp_path.rglob("*.part"))


@posix
def test_a_full_disk_is_no_reason_to_refuse_what_was_drawn(tmp_path):
    """A limit on the size of a file is noticed as a full disk is: in the middle of writing."""
    code = """
import resource, sys, warnings
import numpy as np
from PIL import Image
from tinydiff.data import folder, glyphs
Image.fromarray(np.zeros((64, 64, 3), "uint8")).save(sys.argv[1] + "/black.png")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(len(glyphs(2000)), len(folder(sys.argv[1])))
print(*(w.message for w in said))
"""
    (tmp_path / "pictures").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pictures"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.startswith("2000 1\nglyphs are not cached in"), done.stderr
    assert "the pictures are not cached in" in done.stdout and not list(tmp_path.rglob("*.part"))


def test_a_bomb_in_the_cache_is_drawn_again():
    sound = glyphs(30)
    (path,) = module.cache_dir("glyphs").iterdir()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (100 * 2**20,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w") as entry:
            entry.write(header.getvalue())
            for _ in range(100):
                entry.write(bytes(2**20))
    with at_most(20):  # a sheet to draw on takes 3
        np.testing.assert_array_equal(glyphs(30).images, sound.images)


def test_an_array_of_the_cache_that_is_damaged_or_compressed_is_not_read(tmp_path):
    path, array = tmp_path / "a.npz", np.arange(96 * 90, dtype=np.uint8).reshape(96, 90)
    np.savez(path, a=array)
    np.testing.assert_array_equal(read_npz(path, {"a": None})["a"], array)
    np.testing.assert_array_equal(read_npz(path, {"a": array.nbytes})["a"], array)
    with pytest.raises(ValueError, match="more than the limit"):
        read_npz(path, {"a": array.nbytes // 2})
    blob = bytearray(path.read_bytes())
    blob[blob.index(b"(96, 90)") + 1] ^= 8  # "(16, 90)": the array ends before its entry does
    path.write_bytes(blob)
    with pytest.raises(ValueError, match="more bytes than its shape says"):
        read_npz(path, {"a": None})
    np.savez_compressed(path, a=array)
    with pytest.raises(ValueError, match="compressed"):
        read_npz(path, {"a": None})


@posix
def test_pictures_behind_a_pipe_in_the_cache_are_decoded(tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "pictures/black.png")
    folder(tmp_path / "pictures")
    (path,) = module.cache_dir("pictures").iterdir()
    path.unlink()
    os.mkfifo(path)
    assert len(folder(tmp_path / "pictures")) == 1 and path.is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
from tinydiff.data.limits import keep
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
keep(Path(sys.argv[1]), lambda file: file.write(b"x"), "it is")
"""


@posix
def test_what_killed_processes_left_is_removed_by_the_next(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "x"], env=environment)
        assert done.returncode == -signal.SIGKILL and len(list(tmp_path.glob("*.part"))) == 1
    keep(tmp_path / "y", lambda file: file.write(b"y"), "it is")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["y"]


@posix
def test_what_a_living_process_writes_is_left_alone(tmp_path):
    def slowly(file):
        keep(tmp_path / "y", lambda other: other.write(b"y"), "it is")  # as another process may, at the same time
        file.write(b"x")

    keep(tmp_path / "x", slowly, "it is")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"x", "y": b"y"}
