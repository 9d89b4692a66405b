"""The choice of a backend, and the doors between the host and the device."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import backend, ops

ROOT = Path(__file__).parent.parent
FAKE_CUPY = """
import sys, types
cupy = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(is_available=lambda: False, runtime=types.SimpleNamespace(getDeviceCount=count))
sys.modules["cupy"] = cupy
"""


def python(code: str, choice: str | None = None) -> str:
    """What a fresh Python prints; an exception ends as its last line."""
    env = {k: v for k, v in os.environ.items() if k != "TINYDIFF_BACKEND"} | {"PYTHONPATH": str(ROOT)}
    if choice is not None:
        env["TINYDIFF_BACKEND"] = choice
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=100)
    return (run.stdout + run.stderr).strip()


# ---------------------------------------------------------------- the choice


def test_the_import_decides_nothing_and_loads_neither_matplotlib_nor_cupy() -> None:
    seen = python(
        "import sys, tinydiff; print([m for m in ('matplotlib', 'cupy', 'cupyx', 'torch', 'scipy') "
        "if m in sys.modules], tinydiff.backend._active); x = tinydiff.tensor([1.0]) * 2; print(tinydiff.backend.name, "
        "'cupy' in sys.modules)"
    )
    assert seen.splitlines() == ["[] None", "numpy False"]


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'jax': choose one of numpy, cupy"):
        backend.use("jax")
    assert "ValueError: unknown backend 'Cupy': choose one of numpy, cupy (TINYDIFF_BACKEND" in python(
        "import tinydiff; tinydiff.tensor(1.0)", "Cupy"
    )


def test_an_empty_choice_is_numpy() -> None:
    assert python("import tinydiff; print(tinydiff.backend.name)", "") == "numpy"


def test_use_goes_before_the_environment() -> None:
    assert python("import tinydiff; tinydiff.backend.use('numpy'); print(tinydiff.backend.name)", "cupy") == "numpy"


def test_cupy_is_not_installed() -> None:
    code = "import sys; sys.modules['cupy'] = None\nimport tinydiff\n"
    text = python(code + "tinydiff.tensor(1.0)", "cupy")
    assert (
        "RuntimeError: TINYDIFF_BACKEND=cupy, but CuPy is not installed: pip install 'cupy-cuda13x[ctk]' (CUDA 13)"
        in text
    )
    assert "or unset TINYDIFF_BACKEND to run on the CPU" in text
    text = python(
        code + "try: tinydiff.backend.use('cupy')\nexcept RuntimeError: pass\ntinydiff.backend.use('numpy'); "
        "print(tinydiff.backend.name)"
    )
    assert text == "numpy", "after the error one may choose again, but nothing falls back by itself"


def test_cupy_is_installed_but_broken(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libnvrtc.so.13 not found')")
    text = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tinydiff; tinydiff.tensor(1.0)", "cupy")
    assert (
        "CuPy is installed, but it cannot be imported (libnvrtc.so.13 not found)" in text
        and "is not installed" not in text
    )
    (tmp_path / "cupy.py").write_text("import a_part_of_cupy_that_is_missing")
    text = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tinydiff; tinydiff.tensor(1.0)", "cupy")
    assert (
        "cannot be imported (No module named 'a_part_of_cupy_that_is_missing')" in text
        and "is not installed" not in text
    )


def test_cupy_without_a_device() -> None:
    no_driver = "def count(): raise RuntimeError('cudaErrorInsufficientDriver: CUDA driver version is insufficient')\n"
    text = python(no_driver + FAKE_CUPY + "import tinydiff; tinydiff.tensor(1.0)", "cupy")
    assert "CuPy is installed, but no CUDA device can be used here (cudaErrorInsufficientDriver: CUDA driver" in text
    assert (
        "check the driver and CUDA_VISIBLE_DEVICES, or unset TINYDIFF_BACKEND" in text and "not installed" not in text
    )
    text = python("count = lambda: 0\n" + FAKE_CUPY + "import tinydiff; tinydiff.tensor(1.0)", "cupy")
    assert "(the driver answers, but no device is visible)" in text


def test_use_after_the_first_array(numpy_backend: str) -> None:
    td.tensor(1.0)
    backend.use("numpy")  # again is fine
    with pytest.raises(
        RuntimeError, match="the backend is 'numpy' already: choose 'cupy' before the first array is made"
    ):
        backend.use("cupy")
    assert backend.name == "numpy"


def test_names(each_backend: str) -> None:
    assert backend.name == each_backend
    with pytest.raises(AttributeError, match="no attribute 'nmae'"):
        backend.nmae  # noqa: B018  the look-up is the test


def test_xp_follows_the_backend(each_backend: str) -> None:
    array = backend.xp.zeros(3)
    assert backend.active().is_array(array)
    assert backend.xp.float32 is not None and "zeros" in vars(backend.xp), "a name is looked up once"
    with pytest.raises(AttributeError):
        backend.xp.no_such_function  # noqa: B018


# ---------------------------------------------------------------- the doors


def test_in_and_out(each_backend: str) -> None:
    host = np.arange(6, dtype="float32").reshape(2, 3)
    array = backend.to_device(host)
    assert backend.active().is_array(array) and backend.to_device(array) is array
    assert backend.to_device(host, "float64").dtype == "float64"
    assert backend.to_device([[1, 2]], "float32").shape == (1, 2)
    out = backend.to_host(array)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, host)
    assert backend.scalar(array.sum()) == 15.0
    np.testing.assert_array_equal(backend.to_host([1, 2]), [1, 2])


def test_ways_out_are_counted(each_backend: str) -> None:
    x = td.tensor([1.0, 2.0])
    for way in (
        lambda: x.numpy(),
        lambda: x[0].item(),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: str(x),
        lambda: backend.scalar(x.data[0]),
    ):
        before = backend.syncs
        way()
        assert backend.syncs == before + 1
    before = backend.syncs
    ops.exp(x * 2).sum()
    backend.to_host([1.0])
    assert backend.syncs == before


def test_no_sync_forbids_every_way_out(each_backend: str) -> None:
    x = td.tensor([1.0, 2.0])
    ways = {
        "to_host": lambda: backend.to_host(x.data),
        "scalar": lambda: backend.scalar(x.data[0]),
        "numpy": lambda: x.numpy(),
        "item": lambda: x[0].item(),
        "float": lambda: float(x[0]),
        "bool": lambda: bool(x[0]),
        "if": lambda: 1 if x[0] else 0,
        "tolist": lambda: x.tolist(),
        "print": lambda: print(x),
        "format": lambda: f"{x[0]:.3f}",
        "asarray": lambda: np.asarray(x),
    }
    for name, way in ways.items():
        with backend.no_sync(), pytest.raises(RuntimeError, match=r"waits for the device inside backend.no_sync\(\)"):
            way()
        assert name == "print" or way() is not None


def test_no_sync_ends_also_after_an_error_and_nests(each_backend: str) -> None:
    x = td.tensor([1.0])
    with pytest.raises(ZeroDivisionError), backend.no_sync():
        with backend.no_sync():
            pass
        with pytest.raises(RuntimeError):
            x.item()
        raise ZeroDivisionError
    assert x.item() == 1.0


def test_no_sync_belongs_to_the_thread(each_backend: str) -> None:
    x, seen = td.tensor([1.0]), []
    thread = threading.Thread(target=lambda: seen.append(x.item()))
    with backend.no_sync():
        thread.start()
        thread.join()
    assert seen == [1.0]


def test_a_training_step_never_waits(each_backend: str) -> None:
    draw = np.random.default_rng(0)
    w = td.tensor(draw.normal(size=(3, 3, 2, 4)).astype("float32"), requires_grad=True)
    x = td.tensor(draw.normal(size=(2, 6, 6, 2)).astype("float32"))
    labels, rng = backend.to_device(np.array([1, 3])), td.Rng(0)
    with backend.no_sync():
        h = ops.silu(ops.group_norm(ops.conv2d(x, w, padding="same"), groups=2))
        h = ops.dropout(ops.max_pool2d(h, kernel=2), p=0.1, rng=rng).mean((1, 2))
        ops.cross_entropy(h, labels).backward()
        with td.no_grad():
            w -= 0.1 * w.grad
    assert np.isfinite(w.numpy()).all()


# ---------------------------------------------------------------- what an op may compute with


def test_operands() -> None:
    assert backend.operand(None) is None
    for given, kind in (
        (np.float64(2), float),
        (np.float32(2), float),
        (np.int64(2), int),
        (np.bool_(True), bool),
        (2, int),
        (True, bool),
    ):
        assert type(backend.operand(given)) is kind and backend.operand(given) == given
    for wrong in ("2", [1.0], {}, object):
        with pytest.raises(TypeError, match="an op takes Tensors, arrays and numbers, not"):
            backend.operand(wrong)


def test_a_host_array_does_not_meet_one_of_the_device(each_backend: str) -> None:
    host, x = np.ones((2, 3), "float32"), td.tensor(np.ones((2, 3), "float32"), requires_grad=True)
    meetings: dict[str, Any] = {
        "left": lambda: host * x,
        "right": lambda: x * host,
        "matmul": lambda: np.ones((4, 2), "float32") @ x,
        "in place": lambda: x.detach().__iadd__(host),
        "item": lambda: x.detach().__setitem__(slice(None), host),
        "op": lambda: ops.maximum(x, host),
        "index": lambda: ops.embedding(np.array([0]), x),
        "mask": lambda: ops.attention(x, x, x, mask=np.ones((2, 2), bool)),
        "labels": lambda: ops.cross_entropy(x, np.array([0, 1])),
    }
    for name, meet in meetings.items():
        if each_backend == "numpy":
            meet()
            continue
        with pytest.raises(
            TypeError,
            match=rf"a NumPy array of shape \(.*\) met an array of backend '{each_backend}': move it there first, with",
        ):
            meet()
            pytest.fail(name)
