"""examples/03_score_unet.py from the command line, on a few images: train, go on, sample, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "03_score_unet.py"


@pytest.fixture
def data_dir(tmp_path):
    """24 images in the files of MNIST."""
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), np.uint8)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, array in [
        ("train-images-idx3-ubyte", images),
        ("train-labels-idx1-ubyte", np.arange(24, dtype=np.uint8) % 10),
    ]:
        header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return folder


def run(*arguments, status=0):
    path = os.pathsep.join([str(EXAMPLE.parent.parent), os.environ.get("PYTHONPATH", "")])  # it need not be installed
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("skips, count", [("add", "1,022,849"), ("concat", "1,115,297")])
def test_it_trains_goes_on_and_samples(tmp_path, data_dir, skips, count):
    out = tmp_path / "run"
    options = [
        "--skips",
        skips,
        "--data-dir",
        data_dir,
        "--out",
        out,
        "--batch-size",
        16,
        "--micro-batch",
        8,
        "--steps",
        2,
        "--samples",
        4,
    ]
    text = run(*options, "--epochs", 1)
    assert f"{count} parameters, 24 images" in text and ("(published 1154)" in text) == (skips == "add")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.npz", "log.jsonl", "loss.png", "samples.png"]
    first = (out / "samples.png").read_bytes()
    run(*options, "--sample-only")
    assert (out / "samples.png").read_bytes() == first
    run(*options, "--epochs", 2, "--resume")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["images"]) for r in records] == [(0, 2, 24), (1, 4, 24)]
    assert [r["lr"] for r in records] == pytest.approx([1e-3, 0.98e-3] if skips == "add" else [5e-4, 5e-4])
    assert (out / "samples.png").read_bytes() != first


def test_errors_are_one_or_two_lines(tmp_path):
    for options, message in [
        (["--data-dir", tmp_path], "lacks train-images-idx3-ubyte"),
        (["--sample-only"], "there is no"),
    ]:
        text = run(*options, "--out", tmp_path / "none", status=1)
        assert message in text and "Traceback" not in text
    assert "argument --steps: must be 1 or more, not 0" in run("--steps", 0, status=2)
