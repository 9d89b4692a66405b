"""Training with too little memory: the error says which microbatch fits, and that one does fit.

    python tests/trust/memory.py            some limits
    python tests/trust/memory.py --long     a hundred

Each run is a process of its own with a random limit on its address space (RLIMIT_AS).
"""

from __future__ import annotations

import io
import os
import random
import re
import resource
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import harness
import numpy as np

from tinydiff import Rng, nn, ops, saving
from tinydiff.optim import Adam
from tinydiff.training import train

X = np.random.default_rng(0).normal(size=(2048, 64)).astype(np.float32)


def one(out: str, limit_mb: int) -> str:
    """A step whose activations take some ten MB; how it ended."""
    widths = [64, 512, 512, 512, 512]
    layers = [(nn.Linear(n, m, rng=Rng(i)), nn.SiLU()) for i, (n, m) in enumerate(zip(widths, widths[1:]))]
    net = nn.Sequential(*[layer for pair in layers for layer in pair])
    optimizer = Adam(net.parameters())
    options: dict[str, Any] = {"epochs": 1, "batch_size": 2048, "threads": 1, "stream": io.StringIO(), "out": out}

    def loss(x: Any, rng: Any, sample_offset: int) -> Any:
        return ops.square(net(x)).mean()

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit_mb * 2**20, resource.RLIM_INFINITY))
    try:
        train(net, loss, X, optimizer, microbatch=2048, **options)
        return "enough"
    except MemoryError as error:
        message = str(error)
    if "out of memory" not in message:
        checkpoint = Path(out) / "checkpoint.npz"
        return "FAILED: " + message if checkpoint.exists() else "not even the first checkpoint fits"
    fits = re.search(r"microbatch=(\d+)", message)
    if "Not even" in message:
        return "not even one sample fits"
    if not fits:
        return f"FAILED: {message}"
    try:
        train(net, loss, X, optimizer, microbatch=int(fits[1]), **options)
    except MemoryError as error:
        return f"too little for the update as well: {str(error)[:60]}"
    return "fits with the microbatch of the message"


def child(out: str, limit: int, report: int) -> None:
    """`one`, in a thread: the stack of the main thread could not grow any more, which would end the process."""

    def run() -> None:
        try:
            end = one(out, limit)
        except BaseException as error:
            end = f"FAILED: {error!r}"
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(report, end.encode()[:4000])

    threading.stack_size(2**24)  # all of it is there from the start
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    os._exit(0)


def main() -> int:
    args = harness.arguments(__doc__, 5, 100, "limits")
    rng, counts, failures = random.Random(args.seed), Counter[str](), []
    for i in range(args.count):
        limit = rng.randrange(2, 60)
        with tempfile.TemporaryDirectory() as out:
            read, write = os.pipe()
            process = os.fork()
            if process == 0:
                child(out, limit, write)
            os.close(write)
            with os.fdopen(read) as pipe:
                end = pipe.read()
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if status:
                end = f"FAILED: ended by {signal.Signals(-status).name if status < 0 else status}"
            checkpoint = Path(out) / "checkpoint.npz"
            if checkpoint.exists() and saving.not_finite(saving.load(checkpoint)):
                failures.append(f"{i}: a spoiled checkpoint")
        if end.startswith("FAILED"):
            failures.append(f"{i}, {limit} MB: {end}")
        counts[end.split(":")[0]] += 1
    print(*failures, sep="\n", end="\n" if failures else "")
    for end, count in sorted(counts.items()):
        print(f"  {end:60} {count}")
    return harness.report(args, limits=args.count, failures=len(failures))


if __name__ == "__main__":
    sys.exit(main())
