"""Training, sampling, saving and reading, over and over in one process: do memory, open files or threads grow?

    python tests/trust/soak.py --minutes 60

The first tenth of the time is for caches to fill. The memory of the last tenth (median) may be 2 % more than that of
the second tenth, and a round with the seed of an earlier one must give the same bits. Each round trains a small net
anew, in threads, and resumes it; samples with it; saves and loads; draws glyphs; reads a folder of pictures from its
cache and from the files; keeps a graph; and raises errors in the middle of an op, of a backward pass and of a
microbatch. Linux only: the figures are those of /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import tinydiff as td
from tinydiff import Rng, changes, modes, nn, observers, ops, optim, saving
from tinydiff.data import folder, glyphs, to_float
from tinydiff.diffusion import VESDE, sample, score_matching_loss
from tinydiff.microbatch import over_microbatches
from tinydiff.models.unet import UNet
from tinydiff.training import train

GROWTH = 24  # MB of memory in a run of some seconds, which has no tenths worth comparing
PERCENT = 2  # of memory in a long one
WARM = 4  # rounds, in which each seed comes at least once
SEEDS = 3


def state() -> dict[str, int]:
    """What is open. It may not grow at all."""
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),  # those of the BLAS too
        "changes": len(changes.changes),
        "observers": len(observers.observers),
    }


def megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def round_of_work(root: Path, number: int) -> str:
    """A hash of what came out."""
    data = glyphs(64, number).images
    net = UNet(1, (8, 16), embedding=16, groups=4, rng=number)
    process = VESDE(5.0)

    def loss(x, *, rng, sample_offset):
        return score_matching_loss(net, to_float(x), process, rng, sample_offset=sample_offset)

    out = root / "run"
    for epochs in (1, 2):
        train(
            net, loss, (data,), optim.Adam(net.parameters()), epochs=epochs, batch_size=32, microbatch=8, threads=2,
            out=out, resume=epochs == 2, stream=io.StringIO(),
        )  # fmt: skip
    assert {path.name for path in out.iterdir()} == {"checkpoint.npz", "log.jsonl"}
    for path in out.iterdir():
        path.unlink()
    images = sample(net, (8, 28, 28, 1), process, Rng(number), steps=2, microbatch=4, threads=2)
    saving.save(root / "net.npz", net.state_dict())
    net.load_state_dict(saving.load(root / "net.npz"))
    for cache in (True, False):
        folder(root / "pets", size=8, cache=cache)

    x = td.tensor(np.ones(100), requires_grad=True)
    (g,) = td.grad((x * x).sum(), x, create_graph=True)
    td.grad((g * g).sum(), x)
    y = x * x
    with td.no_grad():
        x += 1.0
    with contextlib.suppress(RuntimeError):  # an input has changed
        y.sum().backward()
    with contextlib.suppress(ValueError):
        ops.matmul(x, td.tensor(np.ones((3, 3))))
    with contextlib.suppress(ZeroDivisionError):
        list(over_microbatches(lambda rows: 1 // rows.start, 8, 2, 2))
    with contextlib.suppress(ValueError):
        folder(root / "bad", size=8)
    with contextlib.suppress(ZeroDivisionError), td.detect_anomaly():
        nn.Linear(2, 2, rng=0)(x.reshape((50, 2)).astype("float32"))
        1 / 0  # noqa: B018
    return hashlib.sha256(b"".join(a.tobytes() for a in (images, *net.state_dict().values()))).hexdigest()


def soak(seconds: float, say=print) -> tuple[list[float], dict[str, int]]:
    """(MB after each round, how much each figure has grown since the first rounds)"""
    sample(
        UNet(1, (8, 16), embedding=16, groups=4, rng=0), (1, 8, 8, 1), VESDE(5.0), 0, steps=1
    )  # compiles the kernels
    with tempfile.TemporaryDirectory() as name:
        root, before = Path(name), os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        for pets in ("pets", "bad"):
            (root / pets).mkdir()
            Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(root / pets / "a.png")
        (root / "bad/b.png").write_bytes(b"no picture")
        memory, results, first = [], {}, {}
        try:
            start = said = time.monotonic()
            while len(memory) < WARM + 2 or time.monotonic() - start < seconds:
                seed = len(memory) % SEEDS
                found = round_of_work(root, seed)
                assert results.setdefault(seed, found) == found, f"round {len(memory)} gave other bits than {seed}"
                first = state() if len(memory) == WARM else first
                memory.append(megabytes())
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"{said - start:5.0f} s, {len(memory)} rounds: {memory[-1]:.2f} MB, {state()}")
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
    last = state()
    say(f"{len(memory)} rounds in {time.monotonic() - start:.0f} s, {time.process_time():.0f} s of processors")
    say(f"after {WARM} rounds: {first}, at the end: {last}")
    assert modes.grad_enabled()
    return memory, {what: last[what] - first[what] for what in first}


def percent(memory: list[float]) -> float:
    """How much more the last tenth took than the second."""
    tenth = len(memory) // 10
    return 100 * (median(memory[-tenth:]) / median(memory[tenth : 2 * tenth]) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    args = parser.parse_args()
    memory, grown = soak(args.minutes * 60, lambda text: print(text, flush=True))
    print(f"memory: {min(memory):.1f} to {max(memory):.1f} MB; opened and not closed: {grown}")
    if len(memory) < 100:
        return memory[-1] - memory[WARM] > GROWTH or any(n > 0 for n in grown.values())
    print(f"the last tenth of the rounds took {percent(memory):+.2f} % more memory than the second tenth")
    return percent(memory) > PERCENT or any(n > 0 for n in grown.values())


if __name__ == "__main__":
    raise SystemExit(main())
