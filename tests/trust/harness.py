"""What the harnesses share: a small training whose end is known, and their command line."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # and so no threads, which a fork would leave behind

import numpy as np

from tinydiff import Rng, nn, ops
from tinydiff.optim import EMA, Adam
from tinydiff.training import train

N, BATCH, STEPS_PER_EPOCH = 20, 8, 3
X = np.random.default_rng(0).normal(size=(N, 6)).astype(np.float32)


class Task:
    """A net with everything that a checkpoint keeps: buffers, random sources, two moments, an average."""

    def __init__(self, width: int = 64) -> None:
        self.model = nn.Sequential(nn.Linear(6, width, rng=Rng(1)), nn.SiLU(), nn.Dropout(0.1, rng=Rng(2)),
                                   nn.Linear(width, 6, rng=Rng(3)))  # fmt: skip
        self.optimizer = Adam(self.model.parameters(), lr=0.01)
        self.ema = EMA(self.model, 0.9)

    def loss(self, x: Any, rng: Rng, sample_offset: int) -> Any:
        noised = x + 0.1 * rng.normal(x.shape, sample_offset=sample_offset)
        return ops.square(self.model(noised) - x).mean()

    def train(self, epochs: int, out: Any = None, **options: Any) -> Any:
        options = {"stream": io.StringIO(), "ema": self.ema, "threads": 1} | options
        return train(self.model, self.loss, X, self.optimizer, epochs=epochs, batch_size=BATCH, out=out, **options)

    def weights(self) -> bytes:
        arrays = [*self.model.state_dict().values(), *self.ema.state_dict()["averages"].values()]
        return b"".join(a.tobytes() for a in arrays)


def arguments(doc: str | None, short: int, long: int, what: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help=f"{long} {what} instead of {short}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.count, args.began = long if args.long else short, time.monotonic()
    return args


def report(args: argparse.Namespace, **figures: Any) -> int:
    """Print the figures; the exit status is the number of failures."""
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):44} {value}")
    print(f"{'seconds':44} {time.monotonic() - args.began:.0f}")
    return min(100, figures["failures"])
