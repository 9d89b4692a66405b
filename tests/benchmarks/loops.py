"""The loops in C beside the NumPy versions that run without a compiler: python tests/benchmarks/loops.py

The figures are ns per number of the array, the fastest of 15 runs in one thread, which is what they cost when nothing
else is at work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import numpy as np

from tinydiff import ops, optim, rng
from tinydiff.fast.cpu import activation, compiled, norm
from tinydiff.microbatch import blas_threads

RUNS = 15


def fastest(run: Callable[[], object], size: int) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) / size * 1e9


def main() -> None:
    if compiled.library("f") is None:
        raise SystemExit("there is no library to compare with")
    draw = np.random.default_rng(0)
    print("| ns per number, float32 | NumPy, forward | C, forward | NumPy, backward | C, backward |")
    print("| --- | --- | --- | --- | --- |")
    for name, shape, silu in (
        ("group norm + silu, 64 images 26x26x32, 4 groups", (64, 676, 4, 8), True),
        ("group norm + silu, 64 images 12x12x64, 32 groups", (64, 144, 32, 2), True),
        ("group norm, 64 images 26x26x32, 4 groups", (64, 676, 4, 8), False),
    ):
        x, g = (draw.normal(size=shape).astype("float32") for _ in range(2))
        w, b = (draw.normal(size=shape[2] * shape[3]).astype("float32") for _ in range(2))
        _, mean, rstd = norm.norm(x, None, w, b, 1e-5, silu)
        row(
            name, x.size,
            lambda x=x, w=w, b=b, silu=silu: norm.norm(x, None, w, b, 1e-5, silu),
            lambda g=g, x=x, m=mean, r=rstd, w=w, b=b, silu=silu: norm.norm_vjp(g, x, m, r, None, w, b, silu),
        )  # fmt: skip
    x, g, w, b = (draw.normal(size=shape).astype("float32") for shape in ((6400, 128), (6400, 128), 128, 128))
    residuals: dict[bool, object] = {}  # of the forward in NumPy, and of that in C

    def layer_norm() -> object:
        y, residuals[compiled.library("f") is None] = norm.normalize_numpy(x, w, b, axes=(1,), eps=1e-5)
        return y

    def layer_norm_vjp() -> object:
        return norm.normalize_vjp_numpy(
            g, None, x, w, b, residuals=residuals[compiled.library("f") is None], axes=(1,), eps=1e-5
        )

    row("layer norm, 6400 x 128", x.size, layer_norm, layer_norm_vjp)
    x, g = (draw.normal(size=2**20).astype("float32") for _ in range(2))
    row(
        "silu, 2^20", x.size, lambda: activation.silu_numpy(x), lambda: activation.silu_vjp_numpy(g, x, x, residuals=())
    )
    state = [np.zeros_like(x) for _ in range(2)]
    hyperparameters = np.array([[1e-3, 1e-8, 1.0, 0.0, 0.9, 0.999]])
    row("erf, 2^20", x.size, lambda: ops.erf(x), None)
    row("normals, 256 x 4096", 2**20, lambda: rng.random_normal(np.array([1, 2, 3], "uint64"), 256, 4096, 0), None)
    positions, index = x.reshape(64, 256, 64), draw.integers(0, 100, 2**14)
    row("sum over positions, 64 x 256 x 64", x.size, lambda: ops.sum(positions, axis=1), None)
    rows = x.reshape(2**14, 64)
    row(
        "gradient of an embedding, 2^14 x 64", x.size, lambda: ops.scatter_add(rows, index=index, shape=(100, 64)), None
    )
    row("Adam, 2^20", x.size, lambda: optim.adam_step([x], [g], [state[0]], [state[1]], hyperparameters), None)
    row(
        "SGD with momentum, 2^20",
        x.size,
        lambda: optim.sgd_step([x], [g], [state[0]], np.array([0, 0, 0.9]), False),
        None,
    )
    row("average of weights, 2^20", x.size, lambda: optim.average_step([x], [g], np.array([1e-3])), None)
    row("clipping, 2^20", x.size, lambda: optim.clip_norm([g], 1.0), None)


def row(name: str, size: int, forward: Callable[[], object], backward: Callable[[], object] | None) -> None:
    found = []
    for run in (forward, backward):
        if run is None:
            found += ["-", "-"]
            continue
        with mock.patch.object(compiled, "library", lambda char: None):
            found.append(f"{fastest(run, size):.2f}")
        found.append(f"{fastest(run, size):.2f}")
    print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    with blas_threads(1):
        main()
