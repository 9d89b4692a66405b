"""Checkpoints that were damaged, or that a stranger has made: refused with one exception, or loaded as they were.

    python tests/trust/checkpoints.py            some hundred of them
    python tests/trust/checkpoints.py --long     some ten thousand

Three kinds: the file of `save` with bits flipped, bytes changed, pieces cut out, doubled or swapped; the same without
the checksum of the whole, as version 0.1.0 wrote it; and, for a stranger who knows the format, damage with a new and
right checksum. The first two must be refused or be the very same state. The third may load as another state of the same
size, and then training must refuse it, or go on with finite weights. Loading may take no more memory than a few times
the file; nothing may be run, and nothing written outside the folder (audit.py).
"""

from __future__ import annotations

import hashlib
import io
import random
import resource
import shutil
import sys
import tempfile
import tracemalloc
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import numpy as np
from audit import Peak, watched

from tinydiff import saving
from tinydiff.training import CannotResume

LIMIT = 24  # times the size of the file, asked of Python
PROCESS = 300  # MB by which the whole process may grow meanwhile


def mutated(data: bytes, rng: random.Random) -> bytes:
    new, n = bytearray(data), len(data)
    # Half of the damage is where the structure is: names, headers, the directory at the end, the JSON.
    marks = [i for mark in (b"PK", b"NUMPY", b"shape", b"{") for i in _all(data, mark)]
    at = lambda: min(n - 1, rng.choice(marks) + rng.randrange(64)) if rng.random() < 0.5 else rng.randrange(n)  # noqa: E731
    kind = rng.randrange(6)
    if kind == 0:
        new[at()] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            new[at()] = rng.randrange(256)
    elif kind == 2:
        start = at()
        del new[start : start + rng.randrange(1, 200)]
    elif kind == 3:
        start = at()
        new[start:start] = new[start : start + rng.randrange(1, 200)]
    elif kind == 4:
        a, b, size = at(), at(), rng.randrange(1, 32)
        new[a : a + size], new[b : b + size] = new[b : b + size], new[a : a + size]
    else:
        start = at()
        new[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"9999", b"\0\0\0\x80"])
    return bytes(new)


def _all(data: bytes, mark: bytes) -> list[int]:
    found, start = [], data.find(mark)
    while start >= 0:
        found.append(start)
        start = data.find(mark, start + 1)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def main() -> int:
    args = harness.arguments(__doc__, 240, 9000, "files")
    rng, warned = random.Random(args.seed), warnings.simplefilter("ignore")
    assert warned is None
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    out = Path(tempfile.mkdtemp(prefix="checkpoints-"))
    harness.Task(16).train(2, out)
    path = out / "checkpoint.npz"
    sealed, state = path.read_bytes(), saving.load(path)
    buffer = io.BytesIO()
    with np.load(path) as arrays:
        np.savez(buffer, **arrays)
    kinds = {"damaged": sealed, "damaged, of 0.1.0": buffer.getvalue(), "of a stranger": sealed}
    failures, counts, most, grown = [], Counter[str](), 0.0, 0.0
    tracemalloc.start()
    for i in range(args.count):
        kind = list(kinds)[i % 3]
        data = kinds[kind]
        while data == kinds[kind]:  # a piece may have been swapped with its like
            data = mutated(data, rng)
        if kind == "of a stranger":
            body = data[: max(0, len(data) - 64)]
            data = body + hashlib.sha256(body).hexdigest().encode()
        path.write_bytes(data)
        tracemalloc.reset_peak()
        process = Peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            with watched(out):
                found = saving.load(path)
            end = "loaded as it was" if same(found, state) else "loaded as another state"
        except ValueError as error:
            end = "refused"
            if str(path) not in str(error):
                failures.append(f"{i}: without the name: {error}")
        except Exception as error:
            end = "another error"
            failures.append(f"{i}, {kind}: {error!r}")
        if end != "refused" and kind == "damaged":
            failures.append(f"{i}: bytes have changed, and it was loaded")
        most = max(most, (tracemalloc.get_traced_memory()[1] - before) / len(data))
        grown = max(grown, process.more())
        if end == "loaded as another state":
            if kind != "of a stranger":
                failures.append(f"{i}, {kind}: loaded as another state")
            task = harness.Task(16)
            weights = task.weights()
            try:
                with watched(out):
                    task.train(3, out, resume=True)
                end += ", and training went on"
                if saving.not_finite(task.model.state_dict()):
                    failures.append(f"{i}: weights that are not finite")
            except CannotResume:
                end += ", which training refused"
                if task.weights() != weights:
                    failures.append(f"{i}: refused, but the weights have changed")
            except Exception as error:
                failures.append(f"{i}: training: {error!r}")
        counts[f"{kind}: {end}"] += 1
    if grown > PROCESS:
        failures.append(f"memory: {grown:.0f} MB more")
    if most > LIMIT:
        failures.append(f"memory: {most:.1f} times the file")
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(counts.items()):
        print(f"  {end:60} {count}")
    shutil.rmtree(out)
    return harness.report(
        args,
        files=args.count,
        most_memory_in_sizes_of_the_file=f"{most:.1f}",
        MB_that_the_process_grew_at_most=f"{grown:.1f}",
        failures=len(failures),
    )


if __name__ == "__main__":
    sys.exit(main())
