"""The released Stable Diffusion 1 at its full size with random weights: one evaluation of the U-Net at 64x64 latents,
batch 2, and one decoding to 512x512, in time and in peak memory, beside diffusers on PyTorch.

    python tests/benchmarks/stable_diffusion.py                     all, each in a process of its own, taking turns
    python tests/benchmarks/stable_diffusion.py ours unet 3         one of them: the seconds of each of 3 runs
    python tests/benchmarks/stable_diffusion.py files FOLDER        all nets written in both layouts, and read again
    python tests/benchmarks/stable_diffusion.py lora 50             steps of training a LoRA: their time and the memory

Processor seconds are printed too: other work on the machine changes them less. FOLDER needs room for 9 GB.
"""

from __future__ import annotations

import hashlib
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


def values(shape: Any, seed: int = 0) -> np.ndarray:
    """Small random numbers, cheaper than normal ones."""
    return (np.random.default_rng(seed).random(shape, "float32") - 0.5) / 16


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


def pipeline() -> Any:
    """All of version 1 with random weights, and a vocabulary of its size of made-up words."""
    from tinydiff import nn
    from tinydiff.models.stable_diffusion.autoencoder import Autoencoder
    from tinydiff.models.stable_diffusion.pipeline import StableDiffusion
    from tinydiff.models.stable_diffusion.text_encoder import TextEncoder
    from tinydiff.models.stable_diffusion.tokenizer import BYTES, END, LAST, START, Tokenizer
    from tinydiff.models.stable_diffusion.unet import UNet

    nets, blank = [], nn.Unfilled()
    for make in (TextEncoder, UNet, Autoencoder):
        net: Any = make(rng=blank)
        for i, p in enumerate(net.parameters()):
            p.data = values(p.shape, i)
        nets.append(net)
    bytes_of_words = [c + end for end in ("", LAST) for c in BYTES.values()]
    pieces = [*bytes_of_words, *(f"w{i}{LAST}" for i in range(49408 - 514)), START, END]
    return StableDiffusion(*nets, Tokenizer({piece: i for i, piece in enumerate(pieces)}, []))


def files(folder: Path) -> None:
    """Both layouts written, and each loaded again: are all numbers the same, and what memory and time does it take?"""
    from tinydiff.models.stable_diffusion.weights import load_nets
    from tinydiff.models.stable_diffusion.writing import save_folder, save_single_file

    if sys.argv[3:]:  # a process of its own
        nets: Any = pipeline() if sys.argv[3] == "write" else load_nets(folder / sys.argv[3])
        if sys.argv[3] == "write":
            save_folder(nets, folder / "parts")
            save_single_file(nets, folder / "all.safetensors")
        found = hashlib.sha256()
        for net in (nets.text_encoder, nets.unet, nets.autoencoder):
            for name, p in net.named_parameters():
                found.update(f"{name} {p.shape} {p.dtype}".encode())
                found.update(p.data)
        counts = [net.count() for net in (nets.text_encoder, nets.unet, nets.autoencoder)]
        print(json.dumps({"sha256": found.hexdigest(), "parameters": counts, **used()}))
        return
    for what in ("write", "parts", "all.safetensors"):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "files", folder, what], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        print(what, f"{time.perf_counter() - began:.1f} s", done.stdout.strip(), flush=True)


def lora(steps: int) -> None:
    """Steps of noise_loss at 64x64 latents, batch 1, rank 4, with checkpointing."""
    from types import SimpleNamespace

    from tinydiff import Rng, nn
    from tinydiff.diffusion import ScoreModel
    from tinydiff.models.stable_diffusion.lora import Lora, noise_loss
    from tinydiff.models.stable_diffusion.pipeline import TimedUNet
    from tinydiff.models.stable_diffusion.schedule import ScaledLinearSDE
    from tinydiff.models.stable_diffusion.unet import UNet
    from tinydiff.optim import AdamW

    unet = UNet(rng=nn.Unfilled())
    for i, p in enumerate(unet.parameters()):
        p.data = values(p.shape, i)
    sd = SimpleNamespace(model=ScoreModel(TimedUNet(unet), ScaledLinearSDE(), "noise"))
    unet.checkpointing = True
    taught, rng = Lora(unet, rank=4, rng=0), Rng(0)
    optimizer, context, z = AdamW(taught.parameters(), lr=1e-4), values((1, 77, 768)), values((1, 64, 64, 4)) * 16
    for step in range(steps):
        began, processor = time.perf_counter(), time.process_time()
        loss = noise_loss(sd, z, context, rng.child(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = {"loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - began, 1)}
        print(json.dumps({"step": step, **found, "processor": round(time.process_time() - processor, 1), **used()}),
              flush=True)  # fmt: skip


def used() -> dict[str, float]:
    return {"peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2)}


def main() -> None:
    if sys.argv[1:2] == ["files"]:
        return files(Path(sys.argv[2]))
    if sys.argv[1:2] == ["lora"]:
        return lora(int(sys.argv[2]))
    if len(sys.argv) > 1:
        run = {"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2])
        seconds: list[float] = []
        processor: list[float] = []
        for _ in range(1 + int(sys.argv[3])):  # the first one warms up
            began, before = time.perf_counter(), time.process_time()
            run()
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        print(json.dumps({"seconds": seconds[1:], "processor": processor[1:], "peak": peak}))
        return
    print("| | ours, s | diffusers, s | ratio | of processor seconds | ours, GiB | diffusers, GiB | "
          "ratio |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for what in ("unet", "decode"):
        found: dict[str, list[Any]] = {"ours": [], "theirs": []}
        for _ in range(2):
            for who, runs in found.items():
                done = subprocess.run([sys.executable, __file__, who, what, "2"], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        a, b, c, d = (
            float(np.median([s for run in found[who] for s in run[kind]]))
            for kind in ("seconds", "processor")
            for who in found
        )
        m, n = (max(run["peak"] for run in found[who]) for who in found)
        print(
            f"| {what} | {a:.2f} | {b:.2f} | {a / b:.2f} | {c / d:.2f} | {m:.2f} | {n:.2f} | {m / n:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
