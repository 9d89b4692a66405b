"""What do more processes give? Images per second, the share of the reduction, and the memory of each rank.

    python tests/benchmarks/scaling.py           two ranks of one core each, beside one rank and two threads; minutes
    python tests/benchmarks/scaling.py --memory   peak memory of a rank: Adam, Sharded, checkpoint, beside the formulas
    python tests/benchmarks/scaling.py --kill 20  kill one of four ranks at random times; is the end quick, and the
                                                  restart exact?
    python tests/benchmarks/scaling.py --sum      seconds to sum 4.5 MB, 100 MB and 3.4 GB between two ranks
    python tests/benchmarks/scaling.py --overlap  a step of a net of 101 MB, with its sums after the backward pass and
                                                  during it

Needs the extra `mpi`. Speed is measured in turns (one rank, two ranks, two threads, and again), because a machine that
others use too is not the same from one minute to the next; the middle of the ratios counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tinydiff import Rng, checkpoint, nn, ops
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.distributed import BUCKET, connected
from tinydiff.microbatch import gradients
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.optim import Adam
from tinydiff.sharded import Sharded

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
BATCH, MICROBATCH = 256, 64


def start(ranks: int, *options: str, cores: int = 2, **more: str) -> list[str]:
    """This file on so many ranks; the lines that rank 0 prints."""
    command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks), sys.executable, str(HERE),
               *options]  # fmt: skip
    if cores == 1:
        command = ["taskset", "-c", "0", *command]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


# ---------------------------------------------------------------- speed


def steps(threads: int, seconds: float) -> None:
    """On each rank: train the tutorial's concat net; rank 0 prints images per second and the share of the sums."""
    with connected("mpi") as ranks:
        if ranks.size > 1 and hasattr(os, "sched_setaffinity"):  # a core for each rank
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[ranks.rank % len(cores)]})
        sde = VESDE(25.0)
        model = ScoreUNet(sde.marginal_std, skips="concat", rng=0)
        optimizer = Adam(model.parameters(), lr=1e-4)
        images = np.random.default_rng(0).random((BATCH, 28, 28, 1), np.float32)
        spent, whole = [], ranks.sum

        def timed(arrays):
            ranks.gather(None)  # the wait for the slower rank is not the sending
            began = time.perf_counter()
            whole(arrays)
            spent.append(time.perf_counter() - began)

        ranks.sum = timed  # type: ignore[method-assign]

        def loss(x0, rng, sample_offset):
            return score_matching_loss(model, x0, sde, rng, sample_offset=sample_offset)

        def step(i):
            optimizer.zero_grad()
            gradients(loss, optimizer.parameters, images, Rng(0).child(i), MICROBATCH, threads, ranks)
            optimizer.step()

        step(0), step(1)
        spent.clear()
        ranks.gather(None)
        began, done = time.perf_counter(), 0
        while ranks.gather(time.perf_counter() - began < seconds)[0]:
            step(done + 2)
            done += 1
        took = time.perf_counter() - began
        if ranks.rank == 0:
            print(json.dumps({"images": done * BATCH / took, "share": sum(spent) / took,
                              "sum": statistics.median(spent) if spent else 0.0}))  # fmt: skip


def speed(turns: int, seconds: float) -> None:
    kinds = {
        "one rank, one core": (1, "1", 1),
        "two ranks, a core each": (2, "1", 2),
        "one process, two threads": (1, "2", 2),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for turn in range(turns):
        for name, (ranks, threads, cores) in kinds.items():
            (line,) = start(ranks, "--steps", threads, "--seconds", str(seconds), cores=cores)
            found[name].append(json.loads(line))
        print(f"turn {turn + 1} of {turns}: " + ", ".join(f"{n} {r[-1]['images']:.0f}" for n, r in found.items()),
              file=sys.stderr)  # fmt: skip
    print(f"concat net, batch {BATCH} in microbatches of {MICROBATCH}, {turns} turns of {seconds:g} s each\n")
    print("| | images/s | share of the sums | one sum |\n|---|---|---|---|")
    for name, runs in found.items():
        images, share, one = (statistics.median(r[key] for r in runs) for key in ("images", "share", "sum"))
        print(f"| {name} | {images:.0f} | {100 * share:.2f} % | {1000 * one:.2f} ms |")
    one_rank, two, threads = ([r["images"] for r in runs] for runs in found.values())
    for text, other in (("one rank", one_rank), ("two threads", threads)):
        ratios = sorted(a / b for a, b in zip(two, other))
        print(f"\ntwo ranks / {text}: {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})")


# ---------------------------------------------------------------- sums


def sums() -> None:
    with connected("mpi") as ranks:
        for size in (4.5e6, 1e8, 3.4e9):
            parts = [np.ones(int(min(size, 1e8)) // 4, np.float32) for _ in range(max(1, int(size / 1e8)))]
            times = []
            for _ in range(20 if size < 1e9 else 3):
                ranks.gather(None)
                began = time.perf_counter()
                ranks.sum(parts)
                times.append(time.perf_counter() - began)
            if ranks.rank == 0:
                mb = sum(a.nbytes for a in parts) / 1e6
                print(f"{mb:.1f} MB between {ranks.size} ranks: {1000 * statistics.median(times):.2f} ms")


# ---------------------------------------------------------------- memory


class Deep(nn.Module):
    """A chain of linear layers with a silu after each, whose activations or weights are large, as the options say."""

    def __init__(self, width: int, depth: int, recompute: int):
        self.layers = [nn.Linear(width, width, rng=Rng(i)) for i in range(depth)]
        self.recompute = recompute

    def forward(self, x):
        def run(part, x):
            for layer in part:
                x = ops.silu(layer(x))
            return x

        if not self.recompute:
            return run(self.layers, x)
        for start in range(0, len(self.layers), self.recompute):
            x = checkpoint(lambda x, part=self.layers[start : start + self.recompute]: run(part, x), x)
        return x


def peak(width: int, depth: int, rows: int, recompute: int, sharded: int, overlap: int) -> None:
    """On each rank: two steps; rank 0 prints by how many MB the peak is above what the process had before."""
    with connected("mpi", overlap=bool(overlap)) as ranks:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model = Deep(width, depth, recompute)
        optimizer = (Sharded(Adam, model.parameters(), ranks, lr=1e-3) if sharded
                     else Adam(model.parameters(), lr=1e-3))  # fmt: skip
        x = np.ones((rows * ranks.size, width), np.float32)

        def loss(x, rng, sample_offset):
            return (model(x) ** 2).mean()

        for i in range(2):
            optimizer.zero_grad()
            gradients(loss, optimizer.parameters, x, Rng(i), rows, 1, ranks)
            optimizer.step()
        after = ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if ranks.rank == 0:
            print(max(after) / 1e3 * 1.024)


def memory() -> None:
    def measured(ranks: int, *options: int) -> float:
        # Freed memory is given back at once, so that the peak is that of the arrays.
        (line,) = start(ranks, "--peak", *map(str, options), TINYDIFF_KEEP_MEMORY="0", MALLOC_MMAP_THRESHOLD_="65536")
        return float(line)

    width, depth = 1024, 24
    weights = depth * (width * width + width) * 4 / 1e6
    print(f"{depth} layers of {width}x{width}: P = {weights:.0f} MB of weights\n")
    print("| ranks | optimiser | formula, B = 34 MB | MB | measured |\n|---|---|---|---|---|")
    for ranks, sharded, overlap in ((1, 0, 0), (2, 0, 0), (2, 0, 1), (2, 1, 0), (4, 1, 0)):
        sent = " + P" * overlap + " + B" * (ranks > 1)  # what is on its way, and what MPI needs for one bucket
        name = "P + P + 2 P" + (f" / {ranks}" if sharded else "") + sent
        wanted = weights * (2 + 2 / (ranks if sharded else 1) + overlap) + (ranks > 1) * BUCKET / 1e6
        got = measured(ranks, width, depth, 8, 0, sharded, overlap)
        how = ("Sharded" if sharded else "Adam") + ", --overlap" * overlap
        print(f"| {ranks} | {how} | {name} | {wanted:.0f} | {got:.0f} |")
    width, depth, rows = 256, 64, 4096
    one, weights = rows * width * 4 / 1e6, depth * (width * width + width) * 4 / 1e6
    print(f"\n{depth} layers of {width}x{width}, {rows} rows: P = {weights:.1f} MB, a result is A = {one:.1f} MB\n")
    print("| checkpoint | formula | MB | measured |\n|---|---|---|---|")
    for part in (0, 4, 8, 16):
        kept = 2 * depth if not part else depth // part + 2 * part
        name = f"4 P + 2 A {depth}" if not part else f"4 P + A ({depth} / {part} + 2 {part})"
        got = measured(1, width, depth, rows, part, 0, 0)
        print(f"| {f'every {part} layers' if part else 'none'} | {name} | {4 * weights + kept * one:.0f} | {got:.0f} |")


# ---------------------------------------------------------------- overlap


def overlaps() -> None:
    """On each rank: steps in turns, with the sums after the backward pass and during it."""
    with connected("mpi") as ranks:
        model = Deep(1024, 24, 0)
        optimizer = Adam(model.parameters(), lr=1e-3)
        x = np.ones((512 * ranks.size, 1024), np.float32)
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(22):
            ranks.overlap = i % 2 == 1
            optimizer.zero_grad()
            ranks.gather(None)
            began = time.perf_counter()
            gradients(lambda x, rng, sample_offset: (model(x) ** 2).mean(), optimizer.parameters, x, Rng(i), 512, 1,
                      ranks)  # fmt: skip
            times[ranks.overlap].append(time.perf_counter() - began)
            optimizer.step()
        if ranks.rank == 0:
            after, during = (statistics.median(t[1:]) for t in times.values())
            print(f"512 rows a rank, {ranks.size} ranks: forward, backward and sums take {1000 * after:.0f} ms, "
                  f"with sums during the backward pass {1000 * during:.0f} ms")  # fmt: skip


# ---------------------------------------------------------------- death


def kills(count: int) -> None:
    program, rng = ROOT / "tests" / "scale" / "program.py", random.Random(0)
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(ranks: int, out: str, *options: str) -> subprocess.Popen[str]:
        command = [mpiexec, "-n", str(ranks), sys.executable, str(program), out, "--exact", "--steps", "32", *options]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def weights(out: str) -> dict[str, np.ndarray]:
        return dict(np.load(Path(out) / "weights0.npz"))

    with tempfile.TemporaryDirectory() as folder:
        whole = f"{folder}/whole"
        Path(whole).mkdir()
        began = time.monotonic()
        run(4, whole).communicate()
        lasts, wanted, ends, same = time.monotonic() - began, weights(whole), [], 0
        while len(ends) < count:
            out = tempfile.mkdtemp(dir=folder)
            running = run(4, out)
            time.sleep(rng.uniform(0.2, 0.8) * lasts)
            there = subprocess.run(["pgrep", "-f", f"{program} {out} "], capture_output=True, text=True).stdout.split()
            there = [pid for pid in there if int(pid) != running.pid and b"mpiexec" not in cmdline(pid)]
            if running.poll() is not None or not there:
                running.communicate()
                continue  # too early or too late: once more
            os.kill(int(rng.choice(there)), 9)
            killed = time.monotonic()
            running.communicate(timeout=60)
            ends.append(time.monotonic() - killed)
            assert running.returncode != 0, "a job that lost a rank ended with 0"
            ranks = rng.choice((1, 2, 3, 4))
            resume = ["--resume"] if (Path(out) / "run" / "checkpoint.npz").exists() else []
            for old in Path(out).glob("weights*.npz"):
                old.unlink()
            again = run(ranks, out, *resume)
            again.communicate(timeout=300)
            assert again.returncode == 0, f"the restart ended with {again.returncode}"
            got = weights(out)
            same += all(np.array_equal(got[name], wanted[name]) for name in wanted)
            litter = [p.name for p in (Path(out) / "run").iterdir() if p.suffix not in (".npz", ".jsonl")]
            assert not litter, litter
            print(f"killed, ended after {ends[-1]:.2f} s, resumed by {ranks}{'' if resume else ' from the start'}",
                  file=sys.stderr, flush=True)  # fmt: skip
        print(f"{count} jobs lost a rank; they ended after {statistics.median(ends):.2f} s, at most "
              f"{max(ends):.2f} s; {same} of {count} came to the same bits after the restart")  # fmt: skip


def cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"mpiexec"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--turns", type=int, default=7)
    add("--seconds", type=float, default=5.0)
    add("--memory", action="store_true")
    add("--kill", type=int, metavar="N")
    add("--sum", action="store_true")
    add("--steps", type=int, help=argparse.SUPPRESS)
    add("--overlap", action="store_true")
    add("--overlaps", action="store_true", help=argparse.SUPPRESS)
    add("--peak", type=int, nargs=6, help=argparse.SUPPRESS)
    add("--sums", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps:
        steps(args.steps, args.seconds)
    elif args.peak:
        peak(*args.peak)
    elif args.overlaps:
        overlaps()
    elif args.overlap:
        print("\n".join(start(2, "--overlaps")))
    elif args.sums:
        sums()
    elif args.sum:
        print("\n".join(start(2, "--sums")))
    elif args.memory:
        memory()
    elif args.kill:
        kills(args.kill)
    else:
        speed(args.turns, args.seconds)


if __name__ == "__main__":
    main()
