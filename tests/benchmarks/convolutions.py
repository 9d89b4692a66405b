"""How near the convolutions in C come to what the processor can do: python tests/benchmarks/convolutions.py

For each layer the GFLOP/s of the convolution, of its gradient by the input and of its gradient by the weight, in one
thread, beside those of PyTorch (channels last, oneDNN), which are in brackets. Products with the padding do not count.
The peak is a loop of multiply-adds in registers (peak.c). All take turns; the fastest of 25 runs is printed. A second
table has, for layers of 3x3 with stride 1, the time by Winograd's method over that without it (medians).
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tinydiff.fast import threads
from tinydiff.fast.cpu import build, compiled, conv
from tinydiff.microbatch import blas_threads
from tinydiff.ops.conv import Geometry

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

RUNS, TURNS, IMAGES = 25, 200_000, 64
LAYERS = [  # H = W, channels in, out, kernel, stride, padding
    (28, 1, 32, 3, 1, 0),  # the tutorial's way down
    (26, 32, 64, 3, 2, 0),
    (12, 64, 128, 3, 2, 0),
    (5, 128, 256, 3, 2, 0),
    (12, 64, 256, 3, 2, 0),  # its way up, where the gradient by the input is the layer
    (26, 32, 128, 3, 2, 0),
    (28, 1, 64, 3, 1, 0),
    (14, 32, 32, 3, 1, 1),  # the quickstart's
    (14, 64, 32, 3, 1, 1),
    (7, 64, 64, 3, 1, 1),
    (14, 64, 32, 1, 1, 0),
    (8, 256, 256, 3, 1, 1),  # more channels
]
WINOGRAD = [(7, 64, 64), (14, 32, 32), (14, 64, 32), (7, 128, 64), (14, 96, 96), (28, 48, 48), (8, 256, 256)]


def fastest(runs: list[Callable[[], object]]) -> list[float]:
    """Seconds of each, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(RUNS):
        for run, found in zip(runs, times):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [min(found) for found in times]


def peak_library(folder: str) -> ctypes.CDLL:
    path = Path(folder) / "peak.so"
    source = Path(__file__).parent / "peak.c"
    command = [
        "cc",
        *build.FLAGS,
        *build.NATIVE,
        "-shared",
        f"-I{build.HERE}",
        "-DREAL=float",
        "-o",
        str(path),
        str(source),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


def multiply_adds(geometry: Geometry, channels: int, out: int) -> int:
    """Of one image; those with zeros of the padding are left out."""
    rows, columns = (
        sum(
            0 <= geometry.stride[a] * i + geometry.dilation[a] * u - geometry.padding[a][0] < geometry.size[a]
            for i in range(geometry.out[a])
            for u in range(geometry.kernel[a])
        )
        for a in (0, 1)
    )
    return rows * columns * channels * out


def main() -> None:
    if compiled.library("f") is None:
        raise SystemExit("there is no library to measure")
    threads._keep_memory()  # as in a training step
    if torch:
        torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        peak = peak_library(folder)
    print("| layer, 64 images | peak | forward | by the input | by the weight |")
    print("| --- | --- | --- | --- | --- |")
    for size, inside, outside, k, stride, padding in LAYERS:
        geometry = Geometry((size, size), (k, k), (stride, stride), ((padding, padding),) * 2, (1, 1), 1)
        x = draw.normal(size=(IMAGES, size, size, inside)).astype("float32")
        w = draw.normal(size=(k, k, inside, outside)).astype("float32")
        y = conv.conv2d_numpy(x, w, None, geometry=geometry)
        runs: list[Any] = [
            lambda: peak.peak(ctypes.c_long(TURNS)),
            partial(conv.conv2d_numpy, x, w, None, geometry=geometry),
            partial(conv.conv2d_input_grad_numpy, y, w, None, geometry=geometry),
            partial(conv.conv2d_weight_grad_numpy, x, y, geometry=geometry),
        ]
        if torch:
            runs += theirs(x, w, y, stride, padding)
        times = fastest(runs)
        flop = 2 * IMAGES * multiply_adds(geometry, inside, outside)
        rates = [f"{flop / t / 1e9:.0f}" for t in times[1:]]
        cells = [f"{mine} ({other})" for mine, other in zip(rates, rates[3:])] if torch else rates
        name = f"{inside}-{outside} on {size}x{size}, {k}x{k}" + f", stride {stride}" * (stride > 1)
        name += ", padded" * (padding > 0)
        print(f"| {name} | {TURNS * 12 * 2 * peak.width() / times[0] / 1e9:.0f} | {' | '.join(cells)} |", flush=True)


def by_winograd() -> None:
    print("| layer, 32 images | forward | by the input | by the weight |")
    print("| --- | --- | --- | --- |")
    for size, inside, outside in WINOGRAD:
        at = Geometry((size, size), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), 1)
        shapes = (32, size, size, inside), (3, 3, inside, outside), (32, size, size, outside)
        x, w, y = (np.random.default_rng(0).normal(size=shape).astype("float32") for shape in shapes)
        runs = [
            partial(conv.conv2d_numpy, x, w, None, geometry=at),
            partial(conv.conv2d_input_grad_numpy, y, w, None, geometry=at),
            partial(conv.conv2d_weight_grad_numpy, x, y, geometry=at),
        ]
        ratios = []
        for run in runs:
            times: dict[str, list[float]] = {"winograd": [], "taps": []}
            for way in [*times] * RUNS:
                with mock.patch.object(conv, "way_of", lambda *given, way=way: way):
                    start = time.perf_counter()
                    run()
                    times[way].append(time.perf_counter() - start)
            ratios.append(f"{np.median(times['winograd']) / np.median(times['taps']):.2f}")
        print(f"| {inside}-{outside} on {size}x{size} | {' | '.join(ratios)} |", flush=True)


def theirs(x: Any, w: Any, y: Any, stride: int, padding: int) -> list[Callable[[], object]]:
    tx, ty = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (x, y))  # views, channels last
    tw = torch.from_numpy(w).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    s, p = [stride] * 2, [padding] * 2

    def backward(by: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(ty, tx, tw, None, s, p, [1, 1], False, [0, 0], 1, by)

    forward = torch.inference_mode()(lambda: torch.nn.functional.conv2d(tx, tw, None, s, p))
    return [forward, backward([True, False, False]), backward([False, True, False])]


if __name__ == "__main__":
    with blas_threads(1):
        main()
        print()
        by_winograd()
