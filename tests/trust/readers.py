"""Damaged files for every reader: right data or one clear error with the name of the file, in bounded memory.

    python tests/trust/readers.py --count 20000

A sound file is damaged at random: bits flipped, parts cut out, doubled or replaced by zeros, 255s and digits. Then idx
files, tables of captions, pictures, weights (safetensors, alone or as a LoRA) and the files of a tokenizer must be
read, or refused by a ValueError that names the file; caches must give the very data that they would without the damage.
Nothing may be run, and nothing written outside the folder (audit.py). Case i of a seed can be run again: --seed 0
--only i.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from audit import Peak, watched
from PIL import Image

from tinydiff import nn
from tinydiff.data import folder, glyphs
from tinydiff.data.captions import read_table
from tinydiff.data.mnist import read_idx
from tinydiff.latents import LatentSpace, cached_latents
from tinydiff.models.stable_diffusion.lora import Lora
from tinydiff.models.stable_diffusion.tokenizer import BYTES, END, LAST, START, Tokenizer
from tinydiff.saving import load_weights

MOST = 64  # MB that a reader may ask Python for; the sound files have less than 0.1
PROCESS = 300  # MB by which the whole process may grow meanwhile

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


def safetensors(arrays):
    """The format by hand: the length of the header in 8 bytes, the header as JSON, the bytes of the arrays."""
    header, at = {}, 0
    for name, a in arrays.items():
        kind = {"f4": "F32", "f2": "F16", "i4": "I32"}[a.dtype.str[1:]]
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values())


DRAW = np.random.default_rng(1)
WEIGHTS = {"layer.weight": DRAW.normal(size=(6, 5)).astype("f4"), "b": np.arange(7, dtype="i4"),
           "half": DRAW.normal(size=(3, 1, 2)).astype("f2")}  # fmt: skip


class Cross(nn.Module):
    """The part of a U-Net that a LoRA changes."""

    def __init__(self):
        self.attn2 = {"to_q": nn.Linear(4, 6, rng=0), "to_k": nn.Linear(8, 6, rng=0)}


MATRICES = {
    f"unet.attn2.to_{name}.lora_{part}.weight": DRAW.normal(size=shape).astype("f4")
    for name, inside in (("q", 4), ("k", 8))
    for part, shape in (("A", (2, inside)), ("B", (6, 2)))
}
PIECES = [*(c + end for c in BYTES.values() for end in ("", LAST)), "ca", "cat" + LAST, START, END]
WORDS = {
    "vocab.json": json.dumps({piece: i for i, piece in enumerate(PIECES)}).encode(),
    "merges.txt": f"#version: 0.2\nc a\nca t{LAST}\n".encode(),
    "tokenizer_config.json": json.dumps({"model_max_length": 77, "pad_token": {"content": "!"}}).encode(),
}


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


def read_weights(path):
    """Compared with the bytes at the offsets of the header."""
    blob, found = path.read_bytes(), load_weights(path)
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header.pop("__metadata__", None)
    assert found.keys() == header.keys()
    for name, a in found.items():
        at, end = header[name]["data_offsets"]
        assert list(a.shape) == header[name]["shape"] and a.itemsize * math.prod(a.shape) in (end - at, 2 * (end - at))
        assert a.tobytes() == blob[start + at : start + end] or header[name]["dtype"] == "BF16"


def read_lora(path):
    net = Cross()
    lora = Lora.load(net, path)
    lora.remove()
    for name, pair in lora.layers.items():
        layer = net.attn2[name.removeprefix("attn2.")]
        inside, outside = layer.in_features, layer.out_features
        assert pair.lora_A.shape[0] == inside and pair.lora_B.shape == (pair.lora_A.shape[1], outside)


def read_words(path):
    for name, blob in WORDS.items():
        if name != path.name:
            (path.parent / name).write_bytes(blob)
    ids = Tokenizer.from_folder(path.parent).encode("a cat, 2 cats")
    assert ids.shape[0] == 1 and ids.dtype == np.int64


READERS = {
    "images": (idx(DIGITS), lambda path: read_idx(path, 3)),
    "images.gz": (gzip.compress(idx(DIGITS)), read_packed),
    "captions.csv": (TABLE.encode(), read_captions),
    "captions.jsonl": (LINES.encode(), read_captions),
    **{f"a.{kind}": (picture(kind), read_picture) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")},
    "w.safetensors": (safetensors(WEIGHTS), read_weights),
    "lora.safetensors": (safetensors(MATRICES), read_lora),
    **{name: (blob, read_words) for name, blob in WORDS.items()},
}
CACHES = ("glyphs", "pictures", "latents")


class Halves(nn.Module):
    """An autoencoder without weights: every other pixel."""

    def encode(self, x):
        return x[:, ::2, ::2]

    def decode(self, z):
        return z


class Cases:
    def __init__(self, root: Path):
        self.root = root
        Cross()  # its random numbers compile the kernels, into the usual cache
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        (root / "pets").mkdir(parents=True)
        Image.fromarray(PIXELS).save(root / "pets/a.png")
        space = LatentSpace(Halves(), (6, 6, 3))
        images = np.random.default_rng(2).integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)
        space.measure(images)
        self.makers = {
            "glyphs": lambda: glyphs(12).images,
            "pictures": lambda: folder(root / "pets", size=8).images,
            "latents": lambda: cached_latents(space, images),
        }
        self.sound, self.blobs, self.paths = {}, {}, {}
        self.most = 0.0  # MB by which the process has grown in a case
        for name, make in self.makers.items():
            self.sound[name] = make()
            (self.paths[name],) = (root / "cache/tinydiff" / name).iterdir()
            self.blobs[name] = self.paths[name].read_bytes()
        for name, (blob, read) in READERS.items():  # what is sound is read, and what is imported late, is there
            path = self.path(name)
            path.write_bytes(blob)
            read(path)

    def path(self, name):
        path = self.paths.get(name) or self.root / f"in {name}" / name
        path.parent.mkdir(exist_ok=True)
        return path

    def run(self, seed: int, number: int) -> tuple[str, str]:
        """(what was read, how it ended). Errors: AssertionError, with the reason, if it is not as it should be."""
        draw = np.random.default_rng((seed, number))
        name = str(draw.choice([*READERS, *CACHES]))
        blob = damaged(READERS[name][0] if name in READERS else self.blobs[name], draw)
        path = self.path(name)
        path.write_bytes(blob)
        process = Peak()
        tracemalloc.start()
        try:
            with warnings.catch_warnings(), watched(self.root):
                warnings.simplefilter("ignore")
                if name in CACHES:
                    assert np.array_equal(self.makers[name](), self.sound[name]), "the cache gave other data"
                    how = "right"
                else:
                    READERS[name][1](path)
                    how = "read"
        except ValueError as error:
            assert name not in CACHES and path.name in str(error), f"{name}: {type(error).__name__}: {error}"
            how = "refused"
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
        grown = process.more()
        self.most = max(self.most, grown)
        assert grown < PROCESS, f"{name}: {len(blob)} bytes, and the process took {grown:.0f} MB more"
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
    np.seterr(all="ignore")
    with cases() as all_cases:
        for done, number in enumerate(numbers):
            if done and done % 500 == 0:
                print(f"{done} files, {wrong} wrong, {time.monotonic() - start:.0f} s", flush=True)
            try:
                ends[all_cases.run(args.seed, number)] += 1
            except AssertionError as error:
                wrong += 1
                print(f"case {number}: {error}", flush=True)
    for (name, how), count in sorted(ends.items()):
        print(f"{name:15} {how:8} {count}")
        grown = all_cases.most
    print(f"{len(numbers)} files, {wrong} wrong, {time.monotonic() - start:.0f} s")
    print(f"the process grew by {grown:.0f} MB at most")
    return wrong > 0


if __name__ == "__main__":
    raise SystemExit(main())
