"""One seed, one image: how far apart are the samples of a seed in batches of 1, 7 and 64, with one and two threads,
with loops in C, without, and without any fast version, on NumPy and, where there is a GPU or an emulator, on CuPy?

    python tests/trust/same_samples.py

Each way runs in a process of its own. The first of them, on the pages' own rules, is what all others are compared with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from test_same_samples import METHODS, samples

from tinydiff import backend

LIMIT = 1e-4  # in samples of up to 100
WAYS = {
    "NumPy, the rules of the pages": {"TINYDIFF_BACKEND": "numpy", "TINYDIFF_FAST": "0"},
    "NumPy, without C": {"TINYDIFF_BACKEND": "numpy", "TINYDIFF_CC": "0"},
    "NumPy, with C": {"TINYDIFF_BACKEND": "numpy"},
    "CuPy": {"TINYDIFF_BACKEND": "cupy"},
}


def one_way(path: str) -> None:
    """All samples, put together from batches of each kind."""
    found = {}
    for method in METHODS:
        found[f"{method}, 64"] = samples(method)
        found[f"{method}, 7"] = np.concatenate([samples(method, min(7, 64 - i), i) for i in range(0, 64, 7)])
        found[f"{method}, 1"] = np.concatenate([samples(method, 1, i) for i in range(64)])
        for size in (7, 16):
            for threads in (1, 2):
                found[f"{method}, microbatch {size}, threads {threads}"] = samples(
                    method, microbatch=size, threads=threads
                )
    build = sys.modules.get("tinydiff.fast.cpu.build")
    compiled = build is not None and any(build._libraries.values())
    np.savez(path, fast=f"{backend.active().fast}, C: {'yes' if compiled else 'no'}", **found)


def main() -> int:
    first, wrong = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for i, (way, variables) in enumerate(WAYS.items()):
            path = f"{folder}/{i}.npz"
            done = subprocess.run(
                [sys.executable, __file__, path], env={**os.environ, **variables}, capture_output=True, text=True
            )
            if done.returncode:
                print(f"{way}: {done.stderr.strip().splitlines()[-1]}")
                wrong += way != "CuPy"
                continue
            with np.load(path) as file:
                found = {name: file[name] for name in file if name != "fast"}
                print(f"{way} (fast versions: {file['fast']}), {len(found)} ways to batch:")
            for method in METHODS:
                mine = {name: x for name, x in found.items() if name.startswith(method)}
                whole = first.setdefault(method, mine[f"{method}, 64"])
                apart, largest = max(float(np.abs(x - whole).max()) for x in mine.values()), np.abs(whole).max()
                one, two = ([mine[f"{method}, microbatch {n}, threads {t}"] for n in (7, 16)] for t in (1, 2))
                bits = all(map(np.array_equal, one, two))
                print(
                    f"  {method:16} {apart:.1e} apart, of {largest:.0f}; threads: {'one' if bits else 'OTHER'} result"
                )
                wrong += not (apart < LIMIT and bits and 1 < largest < 100)
    return wrong


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_way(sys.argv[1])
    else:
        raise SystemExit(main())
