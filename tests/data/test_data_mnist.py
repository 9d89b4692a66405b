"""MNIST from a directory, from mirrors and from the cache; the mirrors here are a server on 127.0.0.1."""

import dataclasses
import gzip
import hashlib
import importlib
import os
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tinydiff.data import DownloadError, mnist, to_float
from tinydiff.data.mnist import ALL_FILES, FILES, SOURCES, read_idx

module = importlib.import_module("tinydiff.data.mnist")  # the package's `mnist` is the function

REAL = os.environ.get("TINYDIFF_DATA")
needs_mnist = pytest.mark.skipif(not REAL, reason="TINYDIFF_DATA names no directory with the real MNIST files")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test starts with no TINYDIFF_DATA and an empty cache."""
    monkeypatch.delenv("TINYDIFF_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def pictures(n=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)


def write(folder, split="train", data=None, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in zip(FILES[split], data or pictures(), strict=True):
        blob = idx(array)
        (folder / (file + suffix)).write_bytes(gzip.compress(blob) if suffix else blob)
    return folder


# ---- a directory


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_written(tmp_path, split, suffix):
    images, labels = pictures()
    got = mnist(write(tmp_path / "d", split, (images, labels), suffix), split)
    np.testing.assert_array_equal(got.images, images)
    np.testing.assert_array_equal(got.labels, labels)
    assert got.images.dtype == got.labels.dtype == np.uint8
    got.images[0] = 0  # the caller owns the array


def test_a_gz_name_with_plain_content_is_read(tmp_path):
    folder = write(tmp_path / "d")
    for file in FILES["train"]:
        (folder / file).rename(folder / f"{file}.gz")
    assert len(mnist(folder).images) == 5


def test_the_environment_names_the_directory_and_root_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYDIFF_DATA", str(write(tmp_path / "a", data=pictures(3))))
    assert len(mnist().labels) == 3
    assert len(mnist(write(tmp_path / "b", data=pictures(4))).labels) == 4


def test_a_folder_called_by_the_data_set_is_preferred(tmp_path):
    write(tmp_path, data=pictures(3))
    write(tmp_path / "fashion-mnist", data=pictures(4))
    assert len(mnist(tmp_path).labels) == 3
    assert len(mnist(tmp_path, name="fashion-mnist").labels) == 4


def test_missing_files_are_listed_with_what_is_there(tmp_path):
    folder = write(tmp_path / "d", "test")
    (folder / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError) as error:
        mnist(folder, "train")
    for expected in (*ALL_FILES, "notes.txt", str(folder), "the directory "):
        assert expected in str(error.value)


def test_an_empty_or_absent_directory_is_an_error_that_quotes_it(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="There: nothing"):
        mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.*not a directory"):
        mnist(tmp_path / "nowhere")
    monkeypatch.setenv("TINYDIFF_DATA", str(tmp_path / "void"))
    with pytest.raises(FileNotFoundError, match="TINYDIFF_DATA .*void"):
        mnist()


def test_unknown_split_and_name_are_quoted(tmp_path):
    with pytest.raises(ValueError, match="'valid'"):
        mnist(tmp_path, "valid")
    with pytest.raises(ValueError, match="'emnist'"):
        mnist(tmp_path, name="emnist")


# ---- malformed files


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[:-7], r"truncated: a file of shape \(5, 28, 28\) has 3936 bytes, found 3929"),
        (lambda b: b + b"\0\0", r"too long: .* 3936 bytes, found 3938"),
        (lambda b: b[:9], "expected a header of 16 bytes, found 9"),
        (lambda b: b"\0\0\x08\x01" + b[4:], "expected the magic 0x00000803 .* found 0x00000801"),
        (lambda b: b"<html>404</html>", "found 0x3c68746d"),
        (lambda b: b"", "found an empty file"),
        (lambda b: gzip.compress(b)[:-50], "truncated or damaged gzip file"),
        (
            lambda b: gzip.compress(b)[:60] + b"?" * 20 + gzip.compress(b)[80:],
            "truncated or damaged gzip file",
        ),
    ],
)
def test_malformed_idx_files_say_what_was_expected_and_found(tmp_path, damage, message):
    path = write(tmp_path / "d") / FILES["train"][0]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        mnist(tmp_path / "d")
    assert str(path) in str(error.value)


def test_the_two_files_must_belong_together(tmp_path):
    images, labels = pictures()
    with pytest.raises(ValueError, match="5 images.* 4 labels"):
        mnist(write(tmp_path / "a", data=(images, labels[:4])))
    with pytest.raises(ValueError, match=r"\(5, 27, 28\)"):
        mnist(write(tmp_path / "b", data=(images[:, 1:], labels)))
    with pytest.raises(ValueError, match="found 17 at index 3"):
        mnist(write(tmp_path / "c", data=(images, np.array([1, 2, 3, 17, 4], np.uint8))))


def test_one_data_set_is_not_read_as_the_other(tmp_path, monkeypatch):
    folder = write(tmp_path / "d")
    file = FILES["train"][1]
    digest = hashlib.md5((folder / file).read_bytes()).hexdigest()
    posing = dataclasses.replace(SOURCES["mnist"], md5={**SOURCES["mnist"].md5, file: digest})
    monkeypatch.setitem(SOURCES, "mnist", posing)
    assert len(mnist(folder).labels) == 5
    with pytest.raises(ValueError, match="is of MNIST, but Fashion-MNIST was asked for"):
        mnist(folder, name="fashion-mnist")


# ---- mirrors


@pytest.fixture
def server():
    """`server.pages` maps paths to bytes (else 404); `server.asked` lists what was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            blob = server.pages.get(self.path)
            self.send_response(404 if blob is None else 200)
            self.send_header("Content-Length", str(len(blob or b"") + server.promised_too_much))
            self.end_headers()
            self.wfile.write(blob or b"")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.asked, server.promised_too_much = {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["mnist", "fashion-mnist"])
def published(request, server, monkeypatch):
    """A small data set on the mirror /good, with its checksums in place of the real ones: name, its files."""
    source = SOURCES[request.param]
    blobs = {f: gzip.compress(idx(a)) for f, a in zip(FILES["train"], pictures(), strict=True)}
    md5 = {f: hashlib.md5(gzip.decompress(b) if source.md5_of == "idx" else b).hexdigest() for f, b in blobs.items()}
    monkeypatch.setitem(SOURCES, request.param, dataclasses.replace(source, md5=md5))
    server.pages |= {f"/good/{file}.gz": blob for file, blob in blobs.items()}
    return request.param, blobs


def cached(name):
    folder = module.cache_dir(name)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_downloads_once_and_then_reads_the_cache(tmp_path, server, published):
    name, blobs = published
    for _ in range(2):
        got = mnist(name=name, mirrors=[f"{server.url}/good/"])
        np.testing.assert_array_equal(got.images, pictures()[0])
        np.testing.assert_array_equal(got.labels, pictures()[1])
    assert server.asked == [f"/good/{file}.gz" for file in FILES["train"]]
    assert cached(name) == sorted(f"{file}.gz" for file in blobs)
    assert module.cache_dir(name) == tmp_path / "cache" / "tinydiff" / name


def test_the_next_mirror_is_tried(server, published):
    name, blobs = published
    wrong = gzip.compress(idx(pictures(seed=1)[0]))  # a sound file, but not the published one
    server.pages |= {f"/wrong/{file}.gz": wrong for file in blobs}
    mirrors = [f"{server.url}/absent", f"{server.url}/wrong", f"{server.url}/good"]
    got = mnist(name=name, mirrors=mirrors)
    np.testing.assert_array_equal(got.images, pictures()[0])
    assert server.asked == [f"/{m}/{file}.gz" for file in blobs for m in ("absent", "wrong", "good")]


def test_without_a_good_mirror_each_is_listed_and_nothing_is_kept(server, published):
    name, blobs = published
    server.pages |= {f"/cut/{file}.gz": blob[:-40] for file, blob in blobs.items()}
    wrong = gzip.compress(idx(pictures(seed=1)[0]))
    server.pages |= {f"/wrong/{file}.gz": wrong for file in blobs}
    mirrors = [f"{server.url}/{m}" for m in ("absent", "cut", "wrong")] + ["http://127.0.0.1:9", "no-url"]
    with pytest.raises(DownloadError) as error:
        mnist(name=name, mirrors=mirrors)
    lines = str(error.value).splitlines()[1:6]
    reasons = ("404", "md5|truncated", "md5 is", "URLError|refused", "unknown url")
    for line, mirror, reason in zip(lines, mirrors, reasons, strict=True):
        assert line.startswith(f"  {mirror}/{FILES['train'][0]}.gz: ")
        assert any(r in line for r in reason.split("|")), line
    assert "TINYDIFF_DATA" in str(error.value)
    assert cached(name) == []


def test_a_connection_that_breaks_off_is_a_failure(server, published):
    server.promised_too_much = 10
    with pytest.raises(DownloadError, match="IncompleteRead"):
        mnist(name=published[0], mirrors=[f"{server.url}/good"])
    assert cached(published[0]) == []


def test_a_damaged_cache_is_fetched_again(server, published):
    name, blobs = published
    mnist(name=name, mirrors=[f"{server.url}/good"])
    path = module.cache_dir(name) / f"{FILES['train'][0]}.gz"
    path.write_bytes(path.read_bytes()[:100])
    got = mnist(name=name, mirrors=[f"{server.url}/good"])
    np.testing.assert_array_equal(got.images, pictures()[0])
    assert path.read_bytes() == blobs[FILES["train"][0]]
    assert len(server.asked) == 3  # the sound labels were not fetched again


def test_an_interrupted_write_leaves_nothing_behind(server, published, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mnist(name=published[0], mirrors=[f"{server.url}/good"])
    assert cached(published[0]) == []


def test_the_usual_mirrors_are_several():
    for source in SOURCES.values():
        assert len(source.mirrors) >= 2 and set(source.md5) == set(ALL_FILES)


# ---- the real files, and floats


@needs_mnist
@pytest.mark.parametrize("split, n, first", [("train", 60_000, [5, 0, 4, 1, 9]), ("test", 10_000, [7, 2, 1, 0, 4])])
def test_the_real_mnist(split, n, first):
    images, labels = mnist(REAL, split)
    assert images.shape == (n, 28, 28) and labels.shape == (n,)
    assert labels[:5].tolist() == first
    assert images.min() == 0 and images.max() == 255


@needs_mnist
def test_the_real_mnist_has_the_published_checksums(server):
    folder = next(f for f in (os.path.join(REAL, "mnist"), REAL) if os.path.isdir(f))
    for file in ALL_FILES:
        path = next(p for p in (f"{folder}/{file}.gz", f"{folder}/{file}") if os.path.exists(p))
        with open(path, "rb") as opened:
            server.pages[f"/{file}.gz"] = opened.read()
    assert len(mnist(split="test", mirrors=[server.url]).labels) == 10_000
    assert len(mnist(split="train", mirrors=[server.url]).labels) == 60_000
    with pytest.raises(ValueError, match="is of MNIST"):
        mnist(REAL, name="fashion-mnist")


def test_read_idx_takes_any_shape(tmp_path):
    for array in (np.zeros((0, 28, 28), np.uint8), np.arange(24, dtype=np.uint8).reshape(2, 3, 4)):
        (tmp_path / "a").write_bytes(idx(array))
        got = read_idx(tmp_path / "a", ndim=3)
        np.testing.assert_array_equal(got, array)
        assert got.shape == array.shape


def test_to_float_is_channels_last_and_exact_at_the_ends():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    x = to_float(images)
    assert x.shape == (1, 16, 16, 1) and x.dtype == np.float32
    np.testing.assert_array_equal(x.ravel(), np.arange(256, dtype=np.float32) / np.float32(255))
    y = to_float(images, -1, 1)
    assert y.min() == -1 and y.max() == 1 and y.dtype == np.float32
    with pytest.raises(TypeError, match=r"float32 of shape \(1, 16, 16, 1\)"):
        to_float(x)
