"""MNIST and Fashion-MNIST: 70,000 grey pictures of 28x28, from idx files on disk or from the network.

Read from the top: `mnist` finds the two files of a split, `parse_idx` turns bytes into an array, and
the rest fetches a file from the first mirror that has the right bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ..backend import Array, active, xp
from ..saving import cache_dir, write_atomically

log = logging.getLogger(__name__)

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
        """The md5, to be compared with `md5[file]`, of a file's bytes."""
        return hashlib.md5(gunzip(blob) if self.md5_of == "idx" else blob, usedforsecurity=False).hexdigest()


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
        paths = [_download(file, name, source, mirrors) for file in FILES[split]]
    else:
        paths = _find(
            Path(directory), split, name, f"{source.title}: {'the directory' if root is not None else 'TINYDIFF_DATA'}"
        )
    image_path, label_path = paths
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
    """The uint8 array of `ndim` axes in an idx file, gzipped or not. Raises ValueError if it is malformed."""
    try:
        return parse_idx(gunzip(Path(path).read_bytes()), ndim)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def parse_idx(data: bytes, ndim: int) -> np.ndarray:
    """The array in the bytes of an idx file: 0, 0, type (8 is uint8), ndim, each size as a big-endian
    32-bit integer, then the elements, last axis fastest."""
    magic = bytes([0, 0, 8, ndim])
    if data[:4] != magic:
        raise ValueError(
            f"expected the magic 0x{magic.hex()} of an idx file of uint8 with {ndim} axes, "
            f"found {'0x' + data[:4].hex() if data else 'an empty file'}"
        )
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"truncated: expected a header of {start} bytes, found {len(data)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", ndim, offset=4))
    expected = start + math.prod(shape)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{what}: a file of shape {shape} has {expected} bytes, found {len(data)}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()  # a copy can be written to


def gunzip(blob: bytes) -> bytes:
    """`blob` uncompressed, or itself if it is not gzip. The name is no guide: browsers unpack files and keep it."""
    if blob[:2] != b"\x1f\x8b":
        return blob
    try:
        return gzip.decompress(blob)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"truncated or damaged gzip file of {len(blob)} bytes: {error}") from error


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
    blob = path.read_bytes()
    for other in SOURCES.values():
        if other is not source and other.digest(blob) == other.md5[file]:
            raise ValueError(f"{path} is of {other.title}, but {source.title} was asked for")


def _download(file: str, name: str, source: Source, mirrors: Sequence[str]) -> Path:
    """The path of `file` in the cache; if it is not there, or damaged, from the first mirror that has it."""
    path = cache_dir(name) / f"{file}.gz"
    if path.is_file() and not _damage(path.read_bytes(), file, source):
        return path
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
    write_atomically(path, lambda out: out.write(blob))
    return path


def _fetch(url: str) -> tuple[bytes, str]:
    """The bytes at `url`, and the reason why they could not be read ("" if they could)."""
    import http.client  # here, because these two take a fifth of the time that importing this package may take
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read(), ""
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError, timeouts; no URL; cut short
        return b"", f"{type(error).__name__}: {error}"


def _damage(blob: bytes, file: str, source: Source) -> str:
    """The fault in the bytes of a downloaded file; "" if there is none."""
    try:
        digest = source.digest(blob)
    except ValueError as error:
        return str(error)
    expected = source.md5[file]
    return "" if digest == expected else f"md5 is {digest}, expected {expected} ({len(blob)} bytes)"
