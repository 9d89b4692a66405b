"""Checkpoints on disk, and files that are written whole or not at all. (The name `tinydiff.checkpoint` belongs to the
function that computes again to save memory.)

    save("run.npz", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1000})
    state = load("run.npz")
    model.load_state_dict(state["model"])

The file is an ordinary .npz without pickles: numpy.load(path)["model/conv1.weight"] reads a weight, and the entry
"json" holds all that is not an array.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import backend
from .engine import Tensor
from .operators import array_of

STRUCTURE = "json"  # the entry for what is not an array
ARRAY = "/array"  # stands in it where an array belongs: {"/array": "model/conv1.weight"}; no key has a "/"


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write nested dicts of arrays, Tensors, numbers, strings, lists and None. Waits for the device.

    The file appears whole or not at all, so that a crash leaves the previous one.
    Errors: TypeError, which names the entry, for anything else, and for a key that is not a string, is empty, or has a
    "/" in it; ValueError for an array whose path of keys cannot be the name of a file in a zip, above all a long one.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"save: the state must be a dict, not {type(state).__name__}: {state!r}")
    arrays: dict[str, np.ndarray] = {}
    structure = _split(state, "", arrays)
    arrays[STRUCTURE] = np.frombuffer(json.dumps(structure).encode(), np.uint8)

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)

    write_atomically(path, write)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The saved state, with NumPy arrays in place of arrays and Tensors. Errors: ValueError, which names the file, if
    it is truncated, damaged, or was not written by `save`; FileNotFoundError, or what else `open` raises."""
    name = os.fspath(path)
    with open(name, "rb") as file:
        try:
            return _read(file)
        # A damaged file makes zipfile, zlib, struct, NumPy and json raise what they like, MemoryError too.
        except Exception as error:
            why = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{name!r} is no checkpoint of tinydiff, or it is damaged: {why}") from error


def _read(file: BinaryIO) -> dict[str, Any]:
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no .npz")
    with zipfile.ZipFile(file) as archive:
        entries = set(archive.namelist())
        if f"{STRUCTURE}.npy" not in entries:
            raise ValueError(f"it has no entry {STRUCTURE!r}")

        def read(name: str) -> np.ndarray:
            if f"{name}.npy" not in entries:
                raise ValueError(f"it has no entry {name!r}")
            # All bytes before any is understood: only at the end of an entry is its checksum compared.
            data = io.BytesIO(archive.read(f"{name}.npy"))
            return np.lib.format.read_array(data, allow_pickle=False)

        state = _join(json.loads(read(STRUCTURE).tobytes()), read)
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a dict")
    return state


def _split(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with each array replaced by {ARRAY: its path}; the arrays go into `arrays`."""
    if isinstance(value, Mapping):
        for key in value:
            # Keys are parts of the names in the zip: zipfile cuts a name at NUL, and takes os.sep for "/".
            if not isinstance(key, str) or not key or any(c in key for c in {"/", "\0", os.sep}):
                raise TypeError(
                    f"save: keys must be strings without '/' and NUL, and not empty, not {key!r} in "
                    f"{path or 'the state'}"
                )
        return {key: _split(part, f"{path}/{key}" if path else key, arrays) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(part, f"{path}/{i}", arrays) for i, part in enumerate(value)]
    if isinstance(value, np.generic) and value.dtype.kind in "biufU":
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    array = array_of(value)
    if isinstance(value, Tensor) or isinstance(array, np.ndarray) or backend.active().is_array(array):
        arrays[path] = backend.to_host(array)
        _check_entry(path, arrays[path].dtype)
        return {ARRAY: path}
    raise TypeError(f"save: {path} is a {type(value).__name__}, which cannot be saved: {value!r}")


def _check_entry(path: str, dtype: np.dtype) -> None:
    """Refuse an array that would not come back as it is."""
    if path == STRUCTURE:
        raise TypeError(f"save: {path!r} cannot be an array, the name is taken")
    if dtype.hasobject:
        raise TypeError(f"save: {path!r} cannot be an array of objects")
    if dtype.isbuiltin == 2:  # registered by another package, such as ml_dtypes: .npy has no name for it
        raise TypeError(
            f"save: {path!r} is an array of {dtype}, which .npy does not know: save array.astype('float32')"
        )
    if len(f"{path}.npy".encode()) >= 2**16:
        raise ValueError(
            f"save: the name of an array is {len(path)} characters long, too many for a zip: {path[:60]}..."
        )


def _join(value: Any, read: Callable[[str], np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {ARRAY} and isinstance(value[ARRAY], str):
            return read(value[ARRAY])
        return {key: _join(part, read) for key, part in value.items()}
    return [_join(part, read) for part in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- files


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then move it there in one step; the directory is made.

    A reader sees the old file or the new one, never a part; if `write` raises, the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the bytes before the name: else a power cut could leave an empty file under it
        mask = os.umask(0)  # there is no other way to read it
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too must leave nothing behind
        os.unlink(temporary)
        raise


def cache_dir(name: str) -> Path:
    """The directory `${XDG_CACHE_HOME:-~/.cache}/tinydiff/<name>`, for data between runs; it need not exist yet.
    Errors: RuntimeError if there is neither that variable nor a home directory."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise RuntimeError(
            f"there is no home directory to keep files in ({error}): set XDG_CACHE_HOME to a directory"
        ) from error
    return Path(base) / "tinydiff" / name
