"""Checkpoints on disk, and weights for other programs. (The name `tinydiff.checkpoint` belongs to the function that
computes again to save memory.)

    save("run.npz", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1000})
    state = load("run.npz")
    model.load_state_dict(state["model"])

The file is an ordinary .npz without pickles: numpy.load(path)["model/conv1.weight"] reads a weight, and the entry
"json" holds all that is not an array. Its last 64 characters, in the comment of the zip, are the SHA-256 of all before
them, so no byte of it can change unnoticed. A checksum says nothing about who wrote the file, so what is inside is
checked as if a stranger had: the size of everything is known, and compared with that of the file, before memory is
asked for.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from . import backend
from .engine import Tensor
from .files import cache_dir, check_ordinary, write_atomically, write_in_little_room
from .operators import array_of

__all__ = ["cache_dir", "load", "load_weights", "save", "save_weights", "write_atomically"]

STRUCTURE = "json"  # the entry for what is not an array
ARRAY = "/array"  # stands in it where an array belongs: {"/array": "model/conv1.weight"}; no key has a "/"
SEAL = b"tinydiff checkpoint 2, sha256 "  # the comment of the zip, before the checksum
MOST_TEXT, MOST_VALUES = 2**28, 2**20  # of the structure, in bytes and in values; see _text


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write nested dicts of arrays, Tensors, numbers, strings, lists and None. Waits for the device.

    The file appears whole or not at all, so that a crash leaves the previous one. On a disk that has no room for both
    it waits elsewhere until the new one is written (files.write_in_little_room).
    Errors: TypeError, which names the entry, for anything else, and for a key that is not a string, is empty, or has a
    "/" in it; ValueError for an array whose path of keys cannot be the name of a file in a zip, above all a long one,
    for a state that is nested too deep, and for so much that is not an array that `load` would refuse it; OSError, with
    the name of the file.
    """
    arrays = _arrays_of(state)

    def write(file: BinaryIO) -> None:
        archive = zipfile.ZipFile(file, "w")
        try:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
        except BaseException:
            archive.fp = None  # else its close could raise another error in place of this one
            raise
        archive.comment = SEAL + bytes(64)
        archive.close()
        _seal(file)

    write_in_little_room(path, write)


def check(state: Mapping[str, Any]) -> None:
    """Could this be saved? Nothing is written. Errors: TypeError and ValueError, as those of `save`."""
    _arrays_of(state)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The saved state, with NumPy arrays in place of arrays and Tensors. Errors: ValueError, which names the file, if
    it is truncated, damaged, or was not written by `save`; MemoryError if a good one is too large for the memory;
    FileNotFoundError, or what else `open` raises."""
    name = os.fspath(path)
    check_ordinary(name)
    with open(name, "rb") as file:
        try:
            return _read(file)
        except MemoryError as error:  # no array is larger than the file
            raise MemoryError(f"there is not enough memory to read {name!r}") from error
        # A damaged file makes zipfile, struct, NumPy and json raise what they like.
        except Exception as error:
            why = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{name!r} is no checkpoint of tinydiff, or it is damaged: {why}") from error


def _seal(file: BinaryIO) -> None:
    """Write the checksum of all that is before it at the end."""
    digest = _digest(file, file.seek(0, os.SEEK_END) - 64)
    file.seek(-64, os.SEEK_END)
    file.write(digest)


def _digest(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of the first bytes of a file, in 64 characters."""
    sha = hashlib.sha256()
    file.seek(0)
    while length and (part := file.read(min(length, 2**20))):
        sha.update(part)
        length -= len(part)
    return sha.hexdigest().encode()


def _read(file: BinaryIO) -> dict[str, Any]:
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no .npz")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(SEAL) - 64))
    tail = file.read()
    if tail.startswith(SEAL):
        if _digest(file, size - 64) != tail[-64:]:
            raise ValueError("its checksum is wrong, so some of its bytes have changed since it was written")
    # Those of version 0.1.0 have no checksum of the whole: they end with the end of a zip that has no comment.
    elif tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise ValueError("it does not end as a checkpoint does: bytes are missing at its end, or have changed")
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive, size)

        def read(name: str) -> np.ndarray:
            if name not in entries:  # or it was read before: many copies of one array would fill the memory
                raise ValueError(f"it has no entry {name!r}, or more than one place for it")
            return _array(archive, entries.pop(name))

        state = _join(json.loads(_text(read(STRUCTURE)), object_pairs_hook=_distinct), read)
    if not isinstance(state, dict):
        raise ValueError(f"its state is a {type(state).__name__}, not a dict")
    if entries:
        raise ValueError(f"it has entries that belong nowhere: {', '.join(sorted(entries))}"[:200])
    return state


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """What is in the zip, by name. Errors: ValueError unless each entry is as `save` writes it, and all of them fit
    into a file of this size."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name == info.filename or info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its entry {info.filename!r} is no array, or is compressed")
        if name in entries:
            raise ValueError(f"it has two entries {name!r}")
        entries[name] = info
    if sum(info.file_size for info in entries.values()) > size:
        raise ValueError("its entries are larger than the file")
    return entries


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """The array in an entry (.npy). Its declared size must be that of the entry, to the byte, before there is memory
    for it; and the entry is read to its end, because only there zipfile compares its checksum."""
    with archive.open(info) as entry:
        if entry.read(6) != b"\x93NUMPY" or (version := entry.read(2)) not in (b"\1\0", b"\2\0", b"\3\0"):
            raise ValueError(f"its entry {info.filename!r} is no .npy")
        length = int.from_bytes(entry.read(2 if version == b"\1\0" else 4), "little")
        if length > 2**16:
            raise ValueError(f"its entry {info.filename!r} has a header of {length} bytes")
        try:
            header = ast.literal_eval(entry.read(length).decode("utf8" if version == b"\3\0" else "latin1"))
        except (MemoryError, RecursionError) as error:  # brackets in brackets
            raise ValueError(f"the header of its entry {info.filename!r} is nested too deep") from error
        if set(header) != {"descr", "fortran_order", "shape"} or not isinstance(header["fortran_order"], bool):
            raise ValueError(f"the header of its entry {info.filename!r} is {header!r:.200}")
        dtype, shape = np.lib.format.descr_to_dtype(header["descr"]), header["shape"]
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"its entry {info.filename!r} has the shape {shape!r:.200}")
        if dtype.hasobject or not dtype.itemsize:
            raise ValueError(f"its entry {info.filename!r} is of {dtype}, which is not read")
        size, there = math.prod(shape) * dtype.itemsize, info.file_size - entry.tell()
        if size != there:
            raise ValueError(f"its entry {info.filename!r} of shape {shape} needs {size} bytes, but has {there}")
        data: Any = np.empty(size, np.uint8)
        view, done = memoryview(data), 0
        while done < size and (part := entry.read(min(size - done, 2**20))):
            view[done : done + len(part)] = part
            done += len(part)
        if done < size or entry.read(1):
            raise ValueError(f"its entry {info.filename!r} has not as many bytes as it says")
    return np.ndarray(shape, dtype, data, order="F" if header["fortran_order"] else "C")


def _text(array: np.ndarray) -> bytes:
    """The structure as JSON. Errors: ValueError if it would become very many objects for its length, of some 100 bytes
    of memory each. A record of a log has one value in seven bytes; "[[],[],[]" has one in three."""
    text = array.tobytes()
    values = sum(text.count(c) for c in (b",", b":", b"{", b"["))
    if len(text) > MOST_TEXT or values > max(MOST_VALUES, len(text) // 5):
        raise ValueError(f"what is not an array takes {len(text)} bytes in it, for {values} values, which is too much")
    return text


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name comes twice among {', '.join(name for name, _ in pairs)}"[:200])
    return found


def not_finite(state: Any, path: str = "") -> list[tuple[str, str]]:
    """The names of the arrays of a state that hold a NaN or an Inf, and which of both: ("weight", "NaN")."""
    if isinstance(state, Mapping):
        return [flaw for key, part in state.items() for flaw in not_finite(part, f"{path}/{key}" if path else key)]
    if isinstance(state, (list, tuple)):
        return [flaw for i, part in enumerate(state) for flaw in not_finite(part, f"{path}/{i}")]
    array = array_of(state)
    if not isinstance(array, np.ndarray) and not backend.active().is_array(array):
        return []
    array = backend.to_host(array)
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return []
    return [(path, "NaN" if np.isnan(array).any() else "Inf")]


def _arrays_of(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a state by path, and its structure."""
    if not isinstance(state, Mapping):
        raise TypeError(f"save: the state must be a dict, not {type(state).__name__}: {state!r}")
    arrays: dict[str, np.ndarray] = {}
    try:
        structure = json.dumps(_split(state, "", arrays))
    except RecursionError as error:
        raise ValueError("save: the state is nested too deep, or contains itself") from error
    arrays[STRUCTURE] = np.frombuffer(structure.encode(), np.uint8)
    _text(arrays[STRUCTURE])
    return arrays


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
    if not dtype.itemsize:
        raise TypeError(f"save: {path!r} cannot be an array of {dtype}, whose elements have no bytes")
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


# ---------------------------------------------------------------- weights for other programs


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Any]) -> None:
    """Write the arrays of a state_dict for other programs: to *.safetensors, which needs the package of that name
    (pip install 'tinydiff[weights]'), or to *.npz.
    Errors: ValueError for another ending; TypeError for what is no array; ImportError without the package."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if _split({name: value}, "", arrays) != {name: {ARRAY: name}}:
            raise TypeError(f"save_weights: {name!r} is no array but a {type(value).__name__}")
    if _ending(path) == ".npz":
        save(path, arrays)
        return
    # C order and little-endian, as the format has it; the package writes the bytes as they are.
    plain = {name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()}
    data = _safetensors("numpy").save(plain)
    write_in_little_room(path, lambda file: file.write(data))


def load_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays by name in a file of save_weights, or in a *.safetensors of another program; 16-bit brain floats
    become float32. For layers of PyTorch, whose axes have another order, see interop.
    Errors: ValueError, with the name of the file, for one that is damaged, or of another ending, or whose numbers NumPy
    does not have (8-bit floats); MemoryError, with the name too; ImportError as above."""
    name = os.fspath(path)
    if _ending(path) == ".npz":
        arrays = load(path)
        if other := [key for key, value in arrays.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{name!r} has not only weights: {', '.join(other)}"[:300])
        return arrays
    package = _safetensors("")
    check_ordinary(name)
    try:
        with open(name, "rb") as file:
            found = package.deserialize(file.read())
        if len({key for key, _ in found}) < len(found):
            raise ValueError("two of its arrays have one name")
    except MemoryError as error:
        raise MemoryError(f"there is not enough memory to read {name!r}") from error
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{name!r} is no .safetensors, or it is damaged: {error!r}") from error
    if other := sorted({tensor["dtype"] for _, tensor in found} - {"BF16", *KINDS}):
        raise ValueError(f"{name!r} has numbers of a kind that NumPy does not have: {', '.join(other)}")
    arrays = {}
    found.reverse()
    try:
        while found:  # each is let go of when it has become an array
            key, tensor = found.pop()
            arrays[key] = _tensor(**tensor)
    except ValueError as error:  # a shape that NumPy does not have
        raise ValueError(f"{name!r} is no .safetensors, or it is damaged: {error}") from error
    return arrays


# NumPy's names for the numbers of the format.
KINDS = {
    "BOOL": "?", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "i1", "I16": "<i2", "I32": "<i4",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


def _tensor(dtype: str, shape: list[int], data: Any) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, KINDS[dtype]).reshape(shape).copy()


def _ending(path: str | os.PathLike[str]) -> str:
    ending = Path(path).suffix
    if ending not in (".npz", ".safetensors"):
        raise ValueError(f"weights are kept in .safetensors or .npz, not in {os.fspath(path)!r}")
    return ending


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{module}".rstrip("."))
    except ImportError as error:
        raise ImportError("a .safetensors needs a package: pip install 'tinydiff[weights]'") from error
