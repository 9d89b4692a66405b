"""A seed means one image: alone, among 7 or among 64, with any number of threads, with compiled kernels and without, on
NumPy and on CuPy. Where sums are split in another way, the last digits may differ; nothing else may."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, backend, no_grad
from tinydiff.diffusion import VESDE, sample
from tinydiff.models.unet import UNet

CLOSE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
METHODS = ["heun", "euler_maruyama"]

# Pixels (4, 4) and (2, 6) of samples 0, 33 and 63, by NumPy alone (TINYDIFF_FAST=0): what every other way must give.
EXPECTED: dict[str, list[list[float]]] = {
    "heun": [[-2.602586, -4.536900], [-5.736595, -3.235022], [-2.718727, -4.225961]],
    "euler_maruyama": [[-2.497345, -8.607673], [-10.493643, -7.578803], [-0.946527, -12.990646]],
}


def samples(method: str, n: int = 64, offset: int = 0, **options: Any) -> np.ndarray:
    net = UNet(1, (8, 16), embedding=16, groups=4, rng=0)
    with no_grad():
        for i, p in enumerate(net.parameters()):  # what starts at 0 too: otherwise the net would give 0
            p += 0.1 * Rng(1).child(i).normal(p.shape)
    labels = {"sample_offset": offset, "method": method, "steps": 2, **options}
    return backend.to_host(sample(net, (n, 8, 8, 1), VESDE(5.0), Rng(7), **labels))


def some(x: np.ndarray) -> np.ndarray:
    return x[[0, 33, 63]][:, [4, 2], [4, 6], 0]  # (3, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_means_one_image_in_any_batch_and_thread(each_backend: str, method: str) -> None:
    if each_backend == "strict" and method != "heun":
        pytest.skip("strict is slow, and has the sampler's arithmetic in common with numpy")
    whole = samples(method)
    assert np.isfinite(whole).all() and whole.std() > 0.1 and np.abs(np.diff(whole, axis=0)).min(0).max() > 0.01
    np.testing.assert_allclose(samples(method, 1, 33), whole[33:34], **CLOSE)
    np.testing.assert_allclose(samples(method, 7, 20), whole[20:27], **CLOSE)
    one, two, apart = (samples(method, microbatch=size, threads=t) for size, t in ((16, 1), (16, 2), (7, 2)))
    np.testing.assert_array_equal(one, two)  # the number of threads changes no bit
    np.testing.assert_allclose(one, whole, **CLOSE)
    np.testing.assert_allclose(apart, whole, **CLOSE)
    np.testing.assert_allclose(some(whole), EXPECTED[method], **CLOSE)


@pytest.mark.usefixtures("numpy_backend")
@pytest.mark.parametrize("off", ["TINYDIFF_CC", "TINYDIFF_FAST"])
def test_a_seed_means_one_image_without_compiled_kernels(off: str) -> None:
    if off == "TINYDIFF_CC" and pytest.importorskip("tinydiff.fast.cpu.build").library("f") is None:
        pytest.skip("there are no compiled kernels to do without")
    here = Path(tinydiff.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=True,
        env={**os.environ, "TINYDIFF_BACKEND": "numpy", "PYTHONPATH": str(here), off: "0"},
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == len(METHODS)
    for line, method in zip(done.stdout.splitlines(), METHODS):
        np.testing.assert_allclose(np.array(line.split(), float).reshape(3, 2), EXPECTED[method], **CLOSE)
        np.testing.assert_allclose(some(samples(method)), EXPECTED[method], **CLOSE)


if __name__ == "__main__":
    for method in METHODS:
        print(*some(samples(method)).ravel().tolist())
