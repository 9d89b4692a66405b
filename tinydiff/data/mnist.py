"""MNIST and Fashion-MNIST: 70,000 grey pictures of 28x28, from idx files on disk or from the network.

Read from the top: `mnist` finds the two files of a split, `parse_idx` turns bytes into an array, and
the rest fetches a file from the first mirror that has the right bytes. Nothing here trusts a file or a mirror: what is
read is bounded by what it says it has (and that by LIMIT), and a download in bytes and in time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import os
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from ..backend import Array, active, xp
from ..saving import cache_dir
from .limits import check_size, keep, read_bytes

log = logging.getLogger(__name__)

LIMIT = 2**30  # bytes of an idx file of yours; the largest relative of MNIST, EMNIST by class, has 640 MB
PUBLISHED = 2**26  # bytes of a file that is downloaded, packed or not; the largest has 47 MB
PATIENCE, SLOWEST = 30, 20_000  # a mirror must answer within so many seconds, and then send so many bytes a second

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
ALL_FILES = FILES["train"] + FILES["test"]


class Digits(NamedTuple):
    """One split: `images` uint8 (N, 28, 28), 0 is background and 255 ink; `labels` uint8 (N,), 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


class DownloadError(RuntimeError):
    """No mirror had the file; the message gives the reason for each."""


@dataclass(frozen=True)
class Source:
    """Where a data set is published, and the md5 of each file.

    `md5_of`: which bytes the md5 is of: the idx file itself, whoever compressed it ("idx"), or the gzip file
    as its authors published it ("gz").
    """

    title: str
    mirrors: tuple[str, ...]
    md5: dict[str, str]
    md5_of: Literal["idx", "gz"]

    def digest(self, blob: bytes) -> str:
        """The md5, to be compared with `md5[file]`, of a file's bytes. Errors: ValueError if they unpack to more than
        any published file, or are damaged."""
        found = hashlib.md5(b"" if self.md5_of == "idx" else blob, usedforsecurity=False)
        if self.md5_of == "idx":
            found.update(read_unpacked(unpacked(io.BytesIO(blob)), PUBLISHED))
        return found.hexdigest()


SOURCES = {
    "mnist": Source(
        title="MNIST",
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        md5_of="idx",
    ),
    "fashion-mnist": Source(
        title="Fashion-MNIST",
        mirrors=(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        ),
        # As listed in the README of github.com/zalandoresearch/fashion-mnist.
        md5={
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        md5_of="gz",
    ),
}


def mnist(
    root: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    name: str = "mnist",
    mirrors: Sequence[str] | None = None,
) -> Digits:
    """The images and labels of MNIST (or, with `name="fashion-mnist"`, of Fashion-MNIST).

        images, labels = mnist()              # uint8 (60000, 28, 28), uint8 (60000,)
        images, labels = mnist(split="test")  # 10,000 of them

    The idx files, gzipped or not, are looked for in `root`, else in the directory that the environment
    variable TINYDIFF_DATA names (in either, a folder called `name` is preferred, so that one directory can
    hold both data sets). With neither they are downloaded from `mirrors` to
    `${XDG_CACHE_HOME:-~/.cache}/tinydiff/<name>`, where the next call finds them.

    Files that are downloaded or cached must have the published md5. A directory of yours may hold a subset or
    digits of your own, so there only the structure is verified, and that it is not the other data set.

    Raises FileNotFoundError for a directory without the files, ValueError for a malformed file or an
    unknown `split` or `name`, DownloadError if no mirror has the right bytes.
    Source: LeCun, Cortes, Burges, "The MNIST database"; Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {list(SOURCES)}, got {name!r}")
    if split not in FILES:
        raise ValueError(f"split must be one of {list(FILES)}, got {split!r}")
    source = SOURCES[name]
    mirrors = source.mirrors if mirrors is None else mirrors
    directory = root if root is not None else os.environ.get("TINYDIFF_DATA") or None
    if directory is None:
        image_path, label_path = (cache_dir(name) / f"{file}.gz" for file in FILES[split])
        images = _parsed(image_path, io.BytesIO(_published(image_path, source, mirrors)), ndim=3)
        labels = _parsed(label_path, io.BytesIO(_published(label_path, source, mirrors)), ndim=1)
    else:
        given_by = f"{source.title}: {'the directory' if root is not None else 'TINYDIFF_DATA'}"
        image_path, label_path = _find(Path(directory), split, name, given_by)
        images, labels = read_idx(image_path, ndim=3), read_idx(label_path, ndim=1)
        _refuse_other(label_path, FILES[split][1], source)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_path}: expected images of shape (N, 28, 28), found {images.shape}")
    if len(images) != len(labels):
        raise ValueError(f"{image_path} has {len(images)} images, but {label_path} has {len(labels)} labels")
    if (labels > 9).any():
        raise ValueError(f"{label_path}: labels are 0 to 9, found {labels.max()} at index {labels.argmax()}")
    return Digits(images, labels)


def to_float(images: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """Images as a network takes them: float32 and channels last, x = low + (high - low) images / 255.

    images: uint8 (N, H, W), or any number of axes, which gets its axis of channels; or (N, H, W, C), which has one.
    Arrays of the device too: a loss that begins with it can be given bytes, and a data set be kept in them.
    Raises TypeError if they are not uint8 (then they have been scaled already).
    """
    if images.dtype != np.uint8:
        raise TypeError(f"to_float takes uint8 images, got {images.dtype} of shape {images.shape}")
    module = xp if active().is_array(images) else np  # a data set is on the host with every backend
    # In float64 until the end, so that 0 and 255 become exactly low and high.
    table = (low + (high - low) * (module.arange(256) / 255)).astype("float32")  # (256,)
    x = table[images]
    return x if x.ndim == 4 else x[..., None]  # (N, H, W) -> (N, H, W, 1)


def read_idx(path: str | os.PathLike[str], ndim: int) -> np.ndarray:
    """The uint8 array of `ndim` axes in an idx file, gzipped or not. Raises ValueError if it is malformed, or has more
    than LIMIT bytes."""
    try:
        check_size(path, LIMIT)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    with open(path, "rb") as file:
        return _parsed(path, file, ndim)


def _parsed(path: str | os.PathLike[str], file: BinaryIO, ndim: int) -> np.ndarray:
    try:
        return parse_idx(unpacked(file), ndim)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def parse_idx(file: BinaryIO, ndim: int) -> np.ndarray:
    """The array in an idx file: 0, 0, type (8 is uint8), ndim, each size as a big-endian 32-bit integer, then the
    elements, last axis fastest."""
    start = 4 + 4 * ndim
    header = read_unpacked(file, start, more=True)
    magic = bytes([0, 0, 8, ndim])
    if header[:4] != magic:
        raise ValueError(
            f"expected the magic 0x{magic.hex()} of an idx file of uint8 with {ndim} axes, "
            f"found {'0x' + header[:4].hex() if header else 'an empty file'}"
        )
    if len(header) < start:
        raise ValueError(f"truncated: expected a header of {start} bytes, found {len(header)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4", ndim, offset=4))
    expected = math.prod(shape)
    if start + expected > LIMIT:
        raise ValueError(f"a file of shape {shape} has {start + expected} bytes, more than the limit of {LIMIT}")
    # A little more than it should have, to see its end, where the checksum is compared; a bomb is not unpacked further.
    data = read_unpacked(file, expected + 2**16, more=True)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        found = f"{'at least ' if len(data) == expected + 2**16 else ''}{start + len(data)}"
        raise ValueError(f"{what}: a file of shape {shape} has {start + expected} bytes, found {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)  # which can be written to, as a bytearray can


def unpacked(file: BinaryIO) -> BinaryIO:
    """The file unpacked if it is gzip, else itself. The name is no guide: browsers unpack files and keep it."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[return-value]


def read_unpacked(file: BinaryIO, most: int, more: bool = False) -> bytearray:
    """At most so many bytes. Errors: ValueError if there are `more`, unless that is all right, or they are damaged."""
    data = bytearray()
    try:
        # In parts: asked for all at once, the system would set that much aside for a file of whatever size.
        while len(data) < most and (part := file.read(min(2**20, most - len(data)))):
            data += part
        if more or not file.read(1):
            return data
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"truncated or damaged gzip file: {error}") from error
    raise ValueError(f"unpacks to more than {most} bytes")


def _find(root: Path, split: str, name: str, given_by: str) -> list[Path]:
    """The paths of a split's images and labels in the user's directory."""
    folder = root / name if (root / name).is_dir() else root
    if not folder.is_dir():
        raise FileNotFoundError(f"{given_by} {os.fspath(root)!r} is not a directory")
    found: dict[str, Path] = {}
    for file in ALL_FILES:
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file():
                found.setdefault(file, path)
    if missing := [file for file in FILES[split] if file not in found]:
        there = sorted(path.name for path in folder.iterdir())
        listing = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
        raise FileNotFoundError(
            f"{given_by} {os.fspath(root)!r} lacks {' and '.join(missing)}. Expected in {folder}, "
            f"with or without .gz: {', '.join(ALL_FILES)}. There: {listing or 'nothing'}"
        )
    return [found[file] for file in FILES[split]]


def _refuse_other(path: Path, file: str, source: Source) -> None:
    """The two data sets have the same file names: reading one as the other must not go unnoticed."""
    if path.stat().st_size > PUBLISHED:
        return
    blob = path.read_bytes()
    for other in SOURCES.values():
        if other is not source and not _damage(blob, file, other):
            raise ValueError(f"{path} is of {other.title}, but {source.title} was asked for")


def _published(path: Path, source: Source, mirrors: Sequence[str]) -> bytes:
    """The bytes of a file from the cache; if it is not there, or damaged, from the first mirror that has it."""
    file = path.name.removesuffix(".gz")
    try:
        blob = read_bytes(path, PUBLISHED)
        if not _damage(blob, file, source):
            return blob
    except (OSError, ValueError):  # it is not there, or is none that was published
        pass
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file}.gz"
        log.info("downloading %s", url)
        blob, failure = _fetch(url)
        failure = failure or _damage(blob, file, source)
        if not failure:
            break
        failures.append(f"\n  {url}: {failure}")
    else:
        raise DownloadError(
            f"{source.title}: {file}.gz could not be downloaded.{''.join(failures)}\n"
            f"Put the files {', '.join(ALL_FILES)} (with or without .gz) in a directory, and pass it to mnist, or as "
            "--data-dir to an example, or set TINYDIFF_DATA to it."
        )
    keep(path, lambda out: out.write(blob), f"{file}.gz is")
    return blob


def _fetch(url: str) -> tuple[bytes, str]:
    """The bytes at `url`, and the reason why they could not be read ("" if they could).

    A thread reads, and this one waits. A timeout of a socket counts anew with every byte, and a mirror may send a byte
    now and then, in the header too; so the time is limited here: PATIENCE seconds, and 1 / SLOWEST for each byte.
    """
    blob, failure, ended = bytearray(), "it was given up", threading.Event()

    def read() -> None:
        nonlocal failure
        import http.client  # here, because these two take a fifth of the time that importing this package may take
        import urllib.request

        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                while len(blob) <= PUBLISHED and not ended.is_set() and (part := response.read1(2**16)):
                    blob.extend(part)
                if len(blob) > PUBLISHED:
                    raise ValueError(f"it sends more than {PUBLISHED} bytes")
                if getattr(response, "length", None):
                    raise http.client.IncompleteRead(bytes(blob), response.length)
            failure = ""
        except Exception as error:  # URLError, timeouts, no URL, cut short; and what a strange reply makes them raise
            failure = f"{type(error).__name__}: {error}"
        ended.set()

    start = said = time.monotonic()
    threading.Thread(target=read, name=f"tinydiff: {url}", daemon=True).start()
    try:
        while not ended.is_set() and (left := start + PATIENCE + len(blob) / SLOWEST - time.monotonic()) > 0:
            ended.wait(min(left, 1))
            if time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                log.warning("%s: %d bytes in %.0f s so far", url, len(blob), said - start)
        if not ended.is_set():
            return b"", f"too slow: it sent {len(blob)} bytes in {time.monotonic() - start:.0f} s"
        return bytes(blob), failure
    finally:
        ended.set()  # the thread stops at its next byte, after Ctrl-C too


def _damage(blob: bytes, file: str, source: Source) -> str:
    """The fault in the bytes of a downloaded file; "" if there is none."""
    try:
        digest = source.digest(blob)
    except ValueError as error:
        return str(error)
    expected = source.md5[file]
    return "" if digest == expected else f"md5 is {digest}, expected {expected} ({len(blob)} bytes)"
