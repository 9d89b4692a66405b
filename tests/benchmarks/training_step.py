"""One training step of a net of the tutorial, beside PyTorch's: python tests/benchmarks/training_step.py

Loss, gradients and Adam on a batch of 28x28 images. The two take turns in one process, so that both see the same
machine; the figure to quote is the median of the ratios of neighbours. PyTorch runs eagerly, with memory formats
"contiguous" and "channels_last"; the better of the two counts.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))  # where PyTorch's twins of the nets are

import twins

from tinydiff import Rng, optim
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.models import tutorial
from tinydiff.parallel import cores
from tinydiff.training import gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skips", choices=["concat", "add"], default="concat")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument(
        "--micro-batch", type=int, default=64, help="images at a time in each thread of tinydiff (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(cores())
    images = np.random.default_rng(0).random((args.batch, 28, 28, 1), np.float32)
    rivals = {"tinydiff": ours(args, images)}
    for name, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        rivals[name] = theirs(args, images, memory_format)
    for step in rivals.values():  # warm up
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(args.pairs):
        for name, step in rivals.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    best = min(("contiguous", "channels_last"), key=lambda name: statistics.median(times[name]))
    ratios = sorted(a / b for a, b in zip(times["tinydiff"], times[best]))
    for name, values in times.items():
        print(f"{name:14} median {statistics.median(values):6.0f} ms   from {min(values):.0f} to {max(values):.0f}")
    print(
        f"ratio to {best}: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to "
        f"{ratios[-1]:.2f}, {args.pairs} pairs"
    )
    result = {
        "net": args.skips,
        "batch": args.batch,
        "cores": cores(),
        "torch": torch.__version__,
        "date": f"{date.today()}",
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({**result, "ms": medians, "ratio": statistics.median(ratios)}))


def ours(args: argparse.Namespace, images: np.ndarray) -> Any:
    sde = VESDE()
    net = tutorial.ScoreUNet(sde.marginal_std, skips=args.skips, rng=0)
    adam, parameters = optim.Adam(net.parameters(), lr=1e-3), list(net.parameters())

    def loss(x0: Any, rng: Rng, first: int) -> Any:
        return score_matching_loss(net, x0, sde, rng, first=first)

    def step() -> None:
        gradients(loss, parameters, (images,), Rng(0), args.micro_batch)
        adam.step()

    return step


def theirs(args: argparse.Namespace, images: np.ndarray, memory_format: Any) -> Any:
    torch.manual_seed(0)
    net = twins.UNet(args.skips).to(memory_format=memory_format)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    x0 = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(memory_format=memory_format)
    rate = 2 * np.log(25.0)

    def step() -> None:
        t = torch.rand(len(x0)) * (1 - 1e-5) + 1e-5
        z = torch.randn_like(x0)
        s = torch.sqrt(torch.expm1(t * rate) / rate)[:, None, None, None]
        loss = ((s * net(x0 + s * z, t) + z) ** 2).sum((1, 2, 3)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


if __name__ == "__main__":
    main()
