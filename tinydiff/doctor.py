"""What is here, what is in use, how fast it is, and what to do about each problem: `python -m tinydiff doctor`.

Each examination gives findings, (name, state, text, remedy). state: "ok"; "note" for what is right but may surprise;
"WRONG" for what must be mended, and then the exit code is 1.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from . import backend, optim
from .data import mnist
from .diffusion import Denoiser, edm_loss
from .models.unet import UNet
from .operators import OPS
from .rng import Rng
from .saving import cache_dir

Finding = tuple[str, str, str, str]


def examine(out: TextIO, seconds: float = 5.0) -> int:
    """Write all findings; the exit code. An examination that fails is itself a finding."""
    problems = suggestions = 0
    for examination in (versions, the_backend, kernels, threads_and_products, data, lambda: training(seconds)):
        for name, state, text, remedy in _findings(examination):
            out.write(f"{state:5}  {name}: {text}\n" + (f"       to do: {remedy}\n" if remedy else ""))
            out.flush()
            problems += state == "WRONG"
            suggestions += state == "note" and bool(remedy)
    also = f", with {suggestions} suggestion{'s' * (suggestions > 1)}" if suggestions else ""
    out.write(f"all is well{also}\n" if not problems else f"{problems} problem{'s' * (problems > 1)}\n")
    return 1 if problems else 0


def _findings(examination: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from examination()
    except Exception as error:  # whatever it is: the other examinations go on
        name = getattr(examination, "__name__", "training").replace("_", " ").strip("<>")
        yield "training" if name == "lambda" else name, "WRONG", f"{type(error).__name__}: {error}", ""


def versions() -> Iterator[Finding]:
    old = sys.version_info < (3, 10)
    remedy = "use Python 3.10 or newer" if old else ""
    yield "Python", "WRONG" if old else "ok", f"{platform.python_version()}, {platform.platform()}", remedy
    for package, needed in (("numpy", True), ("matplotlib", True), ("pillow", True), ("torch", False)):
        try:
            yield package, "ok", importlib.metadata.version(package), ""
        except importlib.metadata.PackageNotFoundError:
            if needed:
                yield package, "WRONG", "not installed", f"pip install {package}"
            else:
                yield package, "note", "not installed; only comparisons and weights of PyTorch need it", ""
    here = Path(__file__).parent
    yield "tinydiff", "ok", f"{importlib.import_module('tinydiff').__version__}, in {here}", ""


def the_backend() -> Iterator[Finding]:
    try:
        chosen = backend.active()
    except (ValueError, RuntimeError) as error:
        yield "backend", "WRONG", str(error), "do what that says, or choose another TINYDIFF_BACKEND"
        backend.use("numpy")
        yield "backend", "note", "numpy, in its place, for everything that follows", ""
        return
    if chosen.name == "cupy":
        properties = chosen.module.cuda.runtime.getDeviceProperties(0)
        yield "backend", "ok", f"cupy {chosen.module.__version__} on {properties['name'].decode()}", ""
        return
    yield "backend", "ok", chosen.name, ""
    if shutil.which("nvidia-smi"):
        has = importlib.util.find_spec("cupy") is not None
        remedy = "set TINYDIFF_BACKEND=cupy" + ("" if has else ", after pip install 'cupy-cuda13x[ctk]' (CUDA 13)")
        yield "GPU", "note", "there seems to be one, which the backend numpy does not use", remedy
    else:
        yield "GPU", "note", "none seen (no nvidia-smi); everything runs on the CPU", ""


def kernels() -> Iterator[Finding]:
    for report in backend.reports if backend.active().name == "numpy" else ():
        yield from report()
    fast = backend.active().fast
    own = sorted(name for name, op in OPS.items() if fast in getattr(op, "fast_forwards", {}))
    if fast is None or not own:
        yield "fast versions", "note", "none, every op runs as it stands on its page", "unset TINYDIFF_FAST"
    else:
        yield "fast versions", "ok", f"of {len(own)} ops: {', '.join(own)}", ""


def threads_and_products() -> Iterator[Finding]:
    """The cores, the variables that limit the BLAS, and what a product of matrices really gets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    limits = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    yield "cores", "ok", f"{cores} for this process" + (f"; {limits}" if limits else ""), ""
    rate, busy = gemm()
    where = f"about {busy:.1f} threads of the BLAS" if backend.active().name == "numpy" else "on the device"
    few = backend.active().name == "numpy" and cores > 1 and busy < 0.6 * cores
    state, remedy = (
        ("note", "other programs may be busy; else raise the limit of threads, if one is set") if few else ("ok", "")
    )
    yield "matrix products", state, f"{rate / 1e9:.0f} GFLOP/s in float32, 1024 x 1024, {where}", remedy


def gemm(size: int = 1024, seconds: float = 0.3) -> tuple[float, float]:
    """The best rate of a product of matrices of float32, in additions and multiplications per second; and processor
    time over time."""
    a = Rng(0).normal((size, size))
    backend.scalar((a @ a)[0, 0])
    best, begin, used = math.inf, time.perf_counter(), time.process_time()
    while best == math.inf or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        backend.scalar((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best, (time.process_time() - used) / (time.perf_counter() - begin)


def data() -> Iterator[Finding]:
    yield "cache", "ok", f"{cache_dir('mnist').parent}", ""
    folder = os.environ.get("TINYDIFF_DATA")
    if folder:
        try:
            images, _ = mnist(folder, "test")
        except (OSError, ValueError) as error:
            yield (
                "MNIST",
                "WRONG",
                str(error),
                "mend what TINYDIFF_DATA names, or unset it",
            )
        else:
            yield "MNIST", "ok", f"{len(images)} test images in TINYDIFF_DATA={folder}", ""
    elif any(cache_dir("mnist").glob("*.gz")):
        yield "MNIST", "ok", f"downloaded, in {cache_dir('mnist')}", ""
    else:
        yield (
            "MNIST",
            "note",
            "not here; downloaded (11 MB) when first asked for; the quickstart needs none",
            "",
        )


def training(seconds: float = 5.0) -> Iterator[Finding]:
    """A small U-Net learns to remove the noise from pictures of one bar. The loss of a net that knows nothing is 1."""
    net = Denoiser(UNet(1, [16, 32], rng=0), sigma_data=0.5)
    optimizer, rng = optim.Adam(net.parameters(), lr=3e-3), Rng(0)
    pictures = np.zeros((16, 16, 16, 1), "float32") - 0.5
    for i in range(16):
        pictures[i, :, i] = 0.5
    losses: list[float] = []
    x, begin = backend.to_device(pictures), time.perf_counter()
    while len(losses) < 400 and (len(losses) < 2 or time.perf_counter() - begin < seconds):
        loss: Any = edm_loss(net, x, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    took, few = time.perf_counter() - begin, max(1, len(losses) // 5)
    first, last = float(np.mean(losses[:few])), float(np.mean(losses[-few:]))
    text = f"{len(losses)} steps of a small U-Net in {took:.1f} s, the loss fell from {first:.2f} to {last:.2f}"
    if not math.isfinite(last):
        yield "training", "WRONG", f"the loss is {last} after {len(losses)} steps", "python -m tinydiff check"
    elif len(losses) >= 20 and not last < 0.9 * first:
        yield "training", "WRONG", text.replace("fell", "went"), "python -m tinydiff check finds a wrong gradient"
    else:
        enough = len(losses) >= 20
        yield "training", "ok" if enough else "note", text, "" if enough else "allow more --seconds"
