"""The released Stable Diffusion 1 at its full size with random weights: one evaluation of the U-Net at 64x64 latents,
batch 2, and one decoding to 512x512, in time and in peak memory, beside diffusers on PyTorch.

    python tests/benchmarks/stable_diffusion.py                     all, each in a process of its own, taking turns
    python tests/benchmarks/stable_diffusion.py ours unet 3         one of them: the seconds of each of 3 runs
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent.parent))


def values(shape: Any) -> np.ndarray:
    """Small random numbers, cheaper than normal ones."""
    return (np.random.default_rng(0).random(shape, "float32") - 0.5) / 16


def ours(what: str) -> Callable[[], Any]:
    from tinydiff import Tensor, nn, no_grad
    from tinydiff.models.stable_diffusion.autoencoder import Autoencoder
    from tinydiff.models.stable_diffusion.unet import UNet

    net: Any = (UNet if what == "unet" else Autoencoder)(rng=nn.Unfilled()).eval()
    for p in net.parameters():
        p.data = values(p.shape)
    x, steps, words = values((2, 64, 64, 4)), np.full(2, 500.0), Tensor(values((2, 77, 768)))
    with no_grad():
        run = (lambda: net(Tensor(x), steps, words)) if what == "unet" else (lambda: net.decode(Tensor(x[:1])))
    return no_grad()(run)


def theirs(what: str) -> Callable[[], Any]:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.set_grad_enabled(False)
    with torch.device("meta"):
        net: Any = (
            UNet2DConditionModel(cross_attention_dim=768)
            if what == "unet"
            else AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            )  # fmt: skip
        )
    net = net.to_empty(device="cpu").eval()
    for p in net.parameters():
        p.copy_(torch.from_numpy(values(tuple(p.shape))))
    x, words = torch.from_numpy(values((2, 4, 64, 64))), torch.from_numpy(values((2, 77, 768)))
    if what == "unet":
        return lambda: net(x, 500, words).sample
    return lambda: net.decode(x[:1]).sample


def main() -> None:
    if len(sys.argv) > 1:
        run, seconds = {"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2]), []
        for _ in range(1 + int(sys.argv[3])):  # the first one warms up
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(json.dumps({"seconds": seconds[1:], "first": seconds[0], "peak": peak}))
        return
    print("| | ours, s | diffusers, s | ratio | ours, GiB | diffusers, GiB | ratio |\n|---|---|---|---|---|---|---|")
    for what in ("unet", "decode"):
        found: dict[str, list[Any]] = {"ours": [], "theirs": []}
        for _ in range(2):
            for who, runs in found.items():
                done = subprocess.run([sys.executable, __file__, who, what, "2"], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        a, b = (float(np.median([s for run in found[who] for s in run["seconds"]])) for who in found)
        m, n = (max(run["peak"] for run in found[who]) for who in found)
        print(f"| {what} | {a:.2f} | {b:.2f} | {a / b:.2f} | {m:.2f} | {n:.2f} | {m / n:.2f} |", flush=True)


if __name__ == "__main__":
    main()
