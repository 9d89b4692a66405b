"""Files that others may have written, read in bounded memory; and files of the cache, which may fail without harm.

A device has no end, a pipe may never begin, and a file of a megabyte may unpack to gigabytes (a decompression bomb). So
each reader says how many bytes it takes at most, and looks before it reads.
"""

from __future__ import annotations

import os
import stat
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files import remove_litter, write_atomically


def check_size(path: str | os.PathLike[str], most: int) -> None:
    """Errors: ValueError for what is no ordinary file, or has more than `most` bytes; OSError, as `os.stat` raises."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise ValueError("is not a file, but a folder, a device or a pipe")
    if status.st_size > most:
        raise ValueError(f"has {status.st_size} bytes, more than the limit of {most}")


def read_bytes(path: Path, most: int) -> bytes:
    """The contents of a file of at most `most` bytes. Errors: as check_size, and as `open`."""
    check_size(path, most)
    return path.read_bytes()


def read_npz(path: Path, most: Mapping[str, int | None]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, each of at most so many bytes; None: it must not be compressed.

    Errors: OSError, and whatever else zipfile, zlib and NumPy raise for a damaged file.
    """
    check_size(path, 2**62)
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name, limit in most.items():
            entry = archive.getinfo(f"{name}.npy")
            if limit is None and entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed")
            # No more than this is ever unpacked, whatever follows.
            if limit is not None and entry.file_size > limit + 1024:  # the header of .npy takes some
                raise ValueError(f"{name} has {entry.file_size} bytes, more than the limit of {limit}")
            with archive.open(entry) as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                if file.read(1):  # it must end here, for only at the end of an entry is its checksum compared
                    raise ValueError(f"{name} has more bytes than its shape says")
    return arrays


# ---------------------------------------------------------------- the cache


def keep(path: Path, write: Callable[[BinaryIO], object], what: str) -> None:
    """Write a file of the cache by write(file). If that is not possible (no space, a folder of others, a file where a
    folder should be), a warning says so: it is no reason to refuse what has been made and is good. What killed
    processes left in its folder is removed."""
    try:
        remove_litter(path.parent)
        write_atomically(path, write)
    except OSError as error:
        warnings.warn(f"{what} not cached in {path}: {error}", stacklevel=3)
