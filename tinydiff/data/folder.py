"""A folder of your own pictures as a data set, with captions or classes.

    data = folder("pets", size=64)
    data.images, data.captions[0], data.labels["class"]     # uint8 (N, 64, 64, 3), "a cat", int64 (N,)
    training, validation = data.split(0.1)

Read from the top: `folder` looks which files there are (`_walk`) and which captions they have (captions.py), has the
pictures decoded (`_decoded`; picture_file.py does one), and keeps them in the cache. How to arrange a folder, and what
its errors mean: docs/own_pictures.md.

Everything is one array of bytes: 100,000 pictures of 64x64x3 are 1.2 GB, and no copy of them in floats is made. A
training loop takes the bytes as they are, and `to_float` belongs into its loss, where it converts one batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from ..arguments import integer
from ..saving import cache_dir
from .captions import Fault, captioned, composed, some
from .held_out import validation_mask
from .limits import keep, read_npz
from .picture_file import Size, Unreadable, read_picture, stored_size

DECODING = 1  # raise it if a change makes a file give other pixels, so that old caches are not used
THREADS = min(16, os.cpu_count() or 1)  # each holds one picture in its full size
VISITS = 100  # of one folder, by several links: folders full of links to each other have more ways than can be walked
LISTED = 10  # faults in a message
LOOKED_AT = 200  # pictures, when the captions have faults
BLOCK = 1000  # pictures handed to the threads at a time


@dataclass(frozen=True, repr=False)
class Pictures:
    """Pictures with their captions and classes.

    images: uint8 (N, H, W, C), C = 1 for grey and 3 for colour
    captions: N strings; "" is the null prompt
    labels: {"class": int64 (N,)}, indices into `classes`, if every picture has a class; else {}
    classes: their names, sorted, from the folders or from a column of the table
    files: N paths relative to the folder, with "/" between their parts, in order
    skipped: (file, reason) of what was left out
    """

    images: np.ndarray
    captions: list[str]
    labels: dict[str, np.ndarray]
    classes: tuple[str, ...]
    files: list[str]
    skipped: list[Fault]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Pictures:
        """The pictures of a slice, a mask, or an array of indices: pictures[hold_out(pictures.captions)]."""
        chosen = np.arange(len(self))[rows]
        if chosen.ndim != 1:
            raise TypeError(f"pictures are chosen by a slice, a mask or several indices, not by {rows!r}")
        return Pictures(
            self.images[rows],
            [self.captions[i] for i in chosen],
            {name: labels[rows] for name, labels in self.labels.items()},
            self.classes,
            [self.files[i] for i in chosen],
            self.skipped,
        )

    def split(self, validation: float = 0.1, seed: int = 0) -> tuple[Pictures, Pictures]:
        """(training, validation): about that share of the pictures is for validation. Which ones depends on their file
        names and the seed alone, so a new picture moves no other to the other side. Both are copies.
        Errors: ValueError for a share outside (0, 1), or if one part were empty."""
        mask = validation_mask(self.files, validation, seed)
        return self[~mask], self[mask]

    def __repr__(self) -> str:
        n, height, width, channels = self.images.shape
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"<{n} pictures of {height}x{width}x{channels}{classes}, {len(self.skipped)} left out>"


def folder(
    path: str | os.PathLike[str],
    *,
    size: int | Size | None = None,
    colour: bool | None = None,
    captions: str | os.PathLike[str] | Literal[False] | None = None,
    classes: str | None = None,
    encoding: str = "utf-8",
    background: str | tuple[int, int, int] = "white",
    on_error: Literal["raise", "skip"] = "raise",
    cache: bool = True,
    stream: TextIO | None = None,
) -> Pictures:
    """All pictures in a folder and the folders in it, sorted by name, with their captions.

    size: (height, width), or one number for both. The shorter side of a picture is resized to fit, and what the longer
    one has too much is cropped on both sides. None: the pictures have one size already.
    colour: True for (N, H, W, 3), False for grey (N, H, W, 1); None: grey if all pictures are.
    captions: a table with a column of files and one of captions (see captions.py), relative to where you are or to the
    folder. None takes the first that there is of
        captions.csv or metadata.csv in the folder (or .tsv, or .jsonl)
        a text file beside each picture: cat.txt for cat.png
        the folder in which a picture lies: "a_cat/1.png" is "a cat"
    and if there is none, all captions are "". False does not look for any.
    classes: the column of that table that has the classes, such as "species"; without a column of captions, these are
    the captions. None: the folders are the classes if every picture lies in one, whatever the captions are.
    encoding: of the captions. background: shows where a picture is transparent, a name or (red, green, blue).
    on_error: "raise", or "skip" to leave out what cannot be used, with a warning; all of it is in `.skipped`.
    cache: keep the decoded pictures in `${XDG_CACHE_HOME:-~/.cache}/tinydiff/pictures`, one file for each folder, size,
    colour and background. They are decoded again if the name, length or time of a file has changed.
    stream: where progress is printed if it takes more than some seconds, stderr unless given.

    Hidden files, and files whose names do not end as those of pictures do, are left out in silence. Links are followed.
    Errors: FileNotFoundError or NotADirectoryError for the folder; ValueError, which names the file, for a picture that
    cannot be read, a caption without a picture or a picture without a caption, and for arguments out of range.
    With "skip" also: ValueError for a table that cannot be read at all, for pictures of different sizes if no size was
    given, or if nothing is left.
    """
    root = Path(path)
    if not root.is_dir():
        found = NotADirectoryError if root.exists() else FileNotFoundError
        raise found(f"folder: {os.fspath(path)!r} is {'a file, not a folder' if root.exists() else 'not there'}")
    size = None if size is None else _size(size)
    if not (colour is None or isinstance(colour, bool)):
        raise ValueError(f"folder: colour must be True, False or None, not {colour!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"folder: on_error must be 'raise' or 'skip', not {on_error!r}")
    if not (classes is None or isinstance(classes, str)):
        raise ValueError(f"folder: classes must be the name of a column, or None, not {classes!r}")
    backdrop = _rgb(background)

    skipped: list[Fault] = []
    names = list(_walk(root, skipped))
    by_file = captioned(root, names, captions, classes, encoding, skipped)
    stop = on_error == "raise"
    if stop and skipped:
        if len(skipped) < LISTED:  # then the same message tells which pictures are damaged, of those soon looked at
            skipped += _decoded(root, list(by_file)[:LOOKED_AT], size, colour, backdrop, list(skipped), stream).faults
        _refuse(root, skipped)
    if not by_file and not skipped:
        raise ValueError(f"folder: there is no picture in {root}. There: {some(sorted(os.listdir(root))) or 'nothing'}")

    kept = Path()
    if cache:
        arguments = json.dumps([os.path.abspath(root), size, colour, backdrop])
        kept = cache_dir("pictures") / f"{hashlib.blake2b(arguments.encode(), digest_size=12).hexdigest()}.npz"
    key = _key(root, list(by_file))
    decoded = _load(kept, key, len(by_file)) if cache else None
    if decoded is None:
        decoded = _decoded(root, list(by_file), size, colour, backdrop, [] if stop else None, stream)
        # A failure of the disk, or of permissions, may be gone the next time.
        if cache and decoded.lasting:
            entries: dict[str, Any] = {"key": key, "faults": json.dumps(decoded.faults), "images": decoded.images}
            # Not compressed: photographs hardly shrink, and it takes longer than to decode them again.
            keep(kept, lambda file: np.savez(file, **entries), "the pictures are")
    bad = dict(decoded.faults)
    skipped += decoded.faults
    if stop:
        _refuse(root, skipped)
    files = [file for file in by_file if file not in bad]
    if not files:
        raise ValueError(f"{_listed(root, skipped)}\nand no picture is left")
    if skipped:
        warnings.warn(_listed(root, skipped), stacklevel=2)
    kinds = [by_file[file][1] for file in files]
    known = () if "" in kinds else tuple(sorted(set(kinds)))
    number = {name: i for i, name in enumerate(known)}
    labels = {"class": np.array([number[kind] for kind in kinds], np.int64)} if known else {}
    return Pictures(decoded.images, [by_file[file][0] for file in files], labels, known, files, skipped)


def _size(size: int | Size) -> Size:
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"folder: size must be a number of pixels or (height, width), not {size!r}")
    height, width = (integer("folder: size", side) for side in pair)
    return height, width


def _rgb(background: str | tuple[int, int, int]) -> tuple[int, int, int]:
    if isinstance(background, str):
        from PIL import ImageColor

        try:
            red, green, blue = ImageColor.getrgb(background)[:3]
        except ValueError:
            raise ValueError(
                f"folder: background must be a colour such as 'white' or '#ffffff', not {background!r}"
            ) from None
        return red, green, blue
    if len(background) != 3:
        raise ValueError(f"folder: background must be a colour, (red, green, blue), not {background!r}")
    red, green, blue = (integer("folder: background", value, 0, 255) for value in background)
    return red, green, blue


def _refuse(root: Path, faults: Sequence[Fault]) -> None:
    if faults:
        raise ValueError(_listed(root, faults) + "\non_error='skip' leaves out what cannot be used")


def _listed(root: Path, faults: Sequence[Fault]) -> str:
    """The first of the faults, a line each."""
    lines = [f"\n  {file}: {reason}" for file, reason in faults[:LISTED]]
    more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
    return f"folder: {len(faults)} in {root} cannot be used:{''.join(lines)}{more}"


# ---------------------------------------------------------------- which files there are


def _walk(root: Path, skipped: list[Fault]) -> list[str]:
    """All files that are not hidden, as paths relative to the root with "/", sorted: no file system has its own order.
    A folder that cannot be read is a fault."""
    names: list[str] = []
    visits: Counter[tuple[int, int]] = Counter()
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # not yet read, with the folders around each
    while waiting:
        prefix, above = waiting.pop()
        try:
            status = os.stat(root / prefix)
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link to a folder that it lies in
                continue
            visits[here] += 1
            if visits[here] > VISITS:
                skipped.append((prefix, f"links lead to this folder in more than {VISITS} ways"))
                continue
            entries = list(os.scandir(root / prefix))
        except OSError as error:
            skipped.append((prefix, f"the folder cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":  # what macOS adds to a zip
                continue
            try:
                inside = entry.is_dir()
            except OSError:  # a link to itself: reading it will say so
                inside = False
            if inside:
                waiting.append((f"{prefix}{entry.name}/", (*above, here)))
            else:
                names.append(prefix + entry.name)
    return sorted(names, key=composed)


# ---------------------------------------------------------------- their pixels


@dataclass
class Decoded:
    images: np.ndarray  # of the good files, uint8 (N, H, W, C)
    faults: list[Fault]
    lasting: bool  # would the same files have the same faults?


def _decoded(
    root: Path,
    files: list[str],
    size: Size | None,
    colour: bool | None,
    background: tuple[int, int, int],
    before: list[Fault] | None,
    stream: TextIO | None,
) -> Decoded:
    """Decode the files in threads. before: the faults that were found before these, to raise with them when there are
    so many that a message is full of them; None: do not raise."""

    def read(file: str) -> np.ndarray | Unreadable:
        try:
            return read_picture(root / file, size, colour, background)
        except Unreadable as error:
            return error

    images = np.empty((0, 0, 0, 0), np.uint8)
    faults: list[Fault] = []
    good, lasting, several = 0, True, False
    progress = _Progress(len(files), stream)
    pool = ThreadPoolExecutor(THREADS)
    try:
        with warnings.catch_warnings():
            # Pillow warns of what is odd and yet readable, such as EXIF cut short. What is wrong is an error here.
            warnings.simplefilter("ignore")
            for i, pixels in enumerate(_in_blocks(pool, read, files)):
                progress.at(i + 1)
                if isinstance(pixels, Unreadable):
                    faults.append((files[i], str(pixels)))
                    lasting &= pixels.lasting
                    if before is not None and len(before + faults) == LISTED:
                        _refuse(root, before + faults)
                    continue
                if good == 0:  # the system gives the memory only as it is written to
                    images = np.empty((len(files), *pixels.shape[:2], 3 if colour else 1), np.uint8)
                if pixels.shape[:2] != images.shape[1:3]:
                    several = True
                    break
                if pixels.shape[2] > images.shape[3]:  # the first that has colour
                    images = np.repeat(images, 3, axis=3)  # (N, H, W, 1) -> (N, H, W, 3)
                images[good] = pixels
                good += 1
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing more is begun
    if several:
        also = f"\n{_listed(root, found)}" if (found := (before or []) + faults) else ""
        raise ValueError(_sizes(root, files) + also)
    return Decoded(images[:good], faults, lasting)


def _in_blocks(pool: ThreadPoolExecutor, read: Any, files: list[str]) -> Iterator[Any]:
    """read(file) for each file, in order. One block at a time, so that few results wait to be taken."""
    for start in range(0, len(files), BLOCK):
        yield from pool.map(read, files[start : start + BLOCK])


def _sizes(root: Path, files: list[str]) -> str:
    """What to say of pictures of different sizes."""
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = list(pool.map(lambda file: stored_size(root / file), files))
    counts = Counter(size for size in sizes if size is not None)
    listed = [f"{n} of {height}x{width}" for (height, width), n in counts.most_common()]
    return (
        f"folder: the pictures in {root} have {len(counts)} sizes (height x width): {some(listed)}. size=64 resizes "
        "and crops them all to 64x64"
    )


class _Progress:
    """Says how far it is, and how long it will take; nothing in the first seconds. On a terminal in one line that is
    overwritten, elsewhere in a new line every half minute."""

    def __init__(self, total: int, stream: TextIO | None):
        self.total, self.stream = total, sys.stderr if stream is None else stream  # which may be None too: no console
        self.live = self.stream is not None and self.stream.isatty()
        self.start = time.monotonic()
        self.next = self.start + 3

    def at(self, done: int) -> None:
        now = time.monotonic()
        if self.stream is None or now < self.next and not (done == self.total and self.next > self.start + 3):
            return
        self.next = now + (0.5 if self.live else 30)
        rate = done / max(now - self.start, 1e-9)
        left = f"{(self.total - done) / rate:.0f} s left" if done < self.total else f"{now - self.start:.0f} s"
        start, end = ("\r\033[K", "\n" if done == self.total else "") if self.live else ("", "\n")
        self.stream.write(f"{start}decoding pictures: {done} of {self.total}  {rate:.0f}/s  {left}{end}")
        self.stream.flush()


# ---------------------------------------------------------------- the cache


def _key(root: Path, files: list[str]) -> str:
    """A hash of all that the pixels depend on and that the name of the cache does not say."""
    state: list[Any] = [DECODING, version("pillow")]
    for file in files:
        try:
            status = os.stat(root / file)
            state.append((file, status.st_size, status.st_mtime_ns))
        except OSError:  # a link to nothing, or it was removed a moment ago: reading it will say so
            state.append((file, None, None))
    return hashlib.blake2b(json.dumps(state).encode()).hexdigest()


def _load(path: Path, key: str, n: int) -> Decoded | None:
    """What is in the cache; None if there is nothing, or it is damaged, or of other files."""
    try:
        if str(read_npz(path, {"key": None})["key"]) != key:
            return None
        found = read_npz(path, {"faults": None, "images": None})
        faults = [(name, reason) for name, reason in json.loads(str(found["faults"]))]
        images = found["images"]
    except Exception:  # files, zip, NumPy and json each have errors of their own; after any of them, decode again
        return None
    sound = images.dtype == np.uint8 and images.ndim == 4 and len(images) + len(faults) == n
    return Decoded(images, faults, True) if sound else None
