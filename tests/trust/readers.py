"""Damaged files for every reader: right data or one clear error with the name of the file, in bounded memory.

    python tests/trust/readers.py --count 20000

A sound file is damaged at random: bits flipped, parts cut out, doubled or replaced by zeros, 255s and digits. Then idx
files, tables of captions and pictures must be read, or refused by a ValueError that names the file; caches must give
the very data that they would without the damage. Case i of a seed can be run again: --seed 0 --only i.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from tinydiff.data import folder, glyphs
from tinydiff.data.captions import read_table
from tinydiff.data.mnist import read_idx

MOST = 64  # MB that a reader may take on top; the sound files have less than 0.1

MARKS = np.frombuffer(b'0123456789",[]{}\n\r\\', np.uint8)


def damaged(blob: bytes, draw: np.random.Generator) -> bytes:
    """A few random changes, or none."""
    found = bytearray(blob)
    for _ in range(draw.integers(0, 4)):
        at = int(draw.integers(0, len(found) + 1))
        # Headers are short and matter most.
        at = min(at, int(draw.integers(0, 64))) if draw.random() < 0.5 else at
        length = int(draw.integers(1, 1 + draw.choice([1, 8, 200])))
        match draw.integers(0, 7):
            case 0 if found:
                found[min(at, len(found) - 1)] ^= 1 << int(draw.integers(8))
            case 1:
                del found[at:]
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + length]
            case 4:
                found[at : at + length] = bytes(length)
            case 5:
                found[at : at + length] = b"\xff" * length
            case _:
                found[at : at + length] = draw.choice(MARKS, length).tobytes()
    return bytes(found)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


DIGITS = np.arange(5 * 784, dtype=np.uint8).reshape(5, 28, 28)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
TABLE = "file,caption\n" + "".join(f'{i}.png,"a cat, number {i}"\n' for i in range(5))
LINES = "".join(json.dumps({"file_name": f"{i}.png", "text": f"a café {i}"}) + "\n" for i in range(5))


def picture(kind):
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, kind)
    return out.getvalue()


def read_picture(path):
    data = folder(path.parent, size=8, cache=False)
    assert data.images.shape[:3] == (1, 8, 8) and data.images.dtype == np.uint8


def read_captions(path):
    rows, faults = read_table(path, "utf-8")
    for row in rows:
        (row.file + row.caption).encode()
    assert all(path.name in where for where, _ in faults)


def read_packed(path):
    assert np.array_equal(read_idx(path, 3), DIGITS), "the checksum of gzip was not compared"


READERS = {
    "images": (idx(DIGITS), lambda path: read_idx(path, 3)),
    "images.gz": (gzip.compress(idx(DIGITS)), read_packed),
    "captions.csv": (TABLE.encode(), read_captions),
    "captions.jsonl": (LINES.encode(), read_captions),
    **{f"a.{kind}": (picture(kind), read_picture) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")},
}
CACHES = ("glyphs", "pictures")


class Cases:
    def __init__(self, root: Path):
        self.root = root
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        (root / "pets").mkdir(parents=True)
        Image.fromarray(PIXELS).save(root / "pets/a.png")
        self.makers = {"glyphs": lambda: glyphs(12).images, "pictures": lambda: folder(root / "pets", size=8).images}
        self.sound, self.blobs, self.paths = {}, {}, {}
        for name, make in self.makers.items():
            self.sound[name] = make()
            (self.paths[name],) = (root / "cache/tinydiff" / name).iterdir()
            self.blobs[name] = self.paths[name].read_bytes()

    def run(self, seed: int, number: int) -> tuple[str, str]:
        """(what was read, how it ended). Errors: AssertionError, with the reason, if it is not as it should be."""
        draw = np.random.default_rng((seed, number))
        name = str(draw.choice([*READERS, *CACHES]))
        blob = damaged(READERS[name][0] if name in READERS else self.blobs[name], draw)
        path = self.paths.get(name) or self.root / f"in {name}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob)
        tracemalloc.start()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name in CACHES:
                    assert np.array_equal(self.makers[name](), self.sound[name]), "the cache gave other data"
                    how = "right"
                else:
                    READERS[name][1](path)
                    how = "read"
        except ValueError as error:
            assert name not in CACHES and path.name in str(error), f"{type(error).__name__}: {error}"
            how = "refused"
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
        assert peak < MOST, f"{len(blob)} bytes took {peak:.0f} MB"
        return name, how


@contextlib.contextmanager
def cases():
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as root:
        try:
            yield Cases(Path(root))
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else [args.only]
    start, wrong, ends = time.monotonic(), 0, Counter()
    with cases() as all_cases:
        for number in numbers:
            try:
                ends[all_cases.run(args.seed, number)] += 1
            except AssertionError as error:
                wrong += 1
                print(f"case {number}: {error}", flush=True)
    for (name, how), count in sorted(ends.items()):
        print(f"{name:15} {how:8} {count}")
    print(f"{len(numbers)} files, {wrong} wrong, {time.monotonic() - start:.0f} s; limit of memory {MOST} MB")
    return wrong > 0


if __name__ == "__main__":
    raise SystemExit(main())
