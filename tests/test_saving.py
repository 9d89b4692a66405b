"""Checkpoints: what goes in comes out, a crash leaves the old file, and a bad file says so."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, optim, saving, tensor

pytestmark = pytest.mark.usefixtures("each_backend")


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    state = {
        "device": Rng(0).normal((2, 3)),
        "tensor": tensor(np.arange(3)),
        "host": np.array([[1.5]], np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar array": np.array(2.0, np.float32),
        "file": np.ones(1),  # a name that numpy.savez cannot take
        "nested": {"a": {"b": [1, 2.5, "three", None, True, {"c": np.ones(2)}]}, "none": {}},
        "big": 2**64 - 1,
        "inf": math.inf,
        "numpy number": np.float32(0.5),
        "text": "µ \n '",
    }
    path = tmp_path / "run.npz"
    saving.save(path, state)
    found = saving.load(path)
    assert list(found) == list(state)
    for name in ("device", "tensor", "host", "empty", "scalar array", "file"):
        value: Any = state[name]
        value = backend.to_host(value._data if isinstance(value, Tensor) else value)
        assert type(found[name]) is np.ndarray and found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    items = found["nested"]["a"]["b"]
    assert items[:5] == [1, 2.5, "three", None, True] and items[5]["c"].tolist() == [1, 1]
    assert found["nested"]["none"] == {} and found["big"] == 2**64 - 1 and found["inf"] == math.inf
    assert found["numpy number"] == 0.5 and found["text"] == state["text"]


def test_it_is_an_ordinary_npz_without_pickles(tmp_path: Path) -> None:
    net = nn.Linear(2, 3, rng=0)
    saving.save(tmp_path / "run", {"model": net.state_dict()})
    assert os.listdir(tmp_path) == ["run"]
    with np.load(tmp_path / "run", allow_pickle=False) as file:
        assert np.array_equal(file["model/weight"], net.weight.numpy())


def test_a_run_goes_on(tmp_path: Path) -> None:
    def parts(seed: int) -> tuple[Any, Any, Any]:
        net = nn.Sequential(nn.Linear(2, 3, rng=seed), nn.SiLU(), nn.Linear(3, 1, rng=seed + 1))
        return net, optim.Adam(net.parameters()), optim.EMA(net)

    def step(net: Any, adam: Any, ema: Any, seed: int) -> None:
        net.zero_grad()
        net(Tensor(Rng(seed).normal((5, 2)))).sum().backward()
        adam.step()
        ema.update()

    first, second = parts(0), parts(10)
    for seed in range(3):
        step(*first, seed)
    net, adam, ema = first
    saving.save(
        tmp_path / "c.npz", {"model": net.state_dict(), "optimizer": adam.state_dict(), "ema": ema.state_dict()}
    )
    state = saving.load(tmp_path / "c.npz")
    for part, name in zip(second, ("model", "optimizer", "ema")):
        part.load_state_dict(state[name])
    for seed in range(3, 6):
        step(*first, seed)
        step(*second, seed)
    for (_, p), (_, q) in zip(first[0].named_parameters(), second[0].named_parameters()):
        assert np.array_equal(p.numpy(), q.numpy())
    for a, b in zip(first[2].averages.values(), second[2].averages.values()):
        assert np.array_equal(backend.to_host(a), backend.to_host(b))


def test_a_crash_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.npz"
    saving.save(path, {"step": 1, "a": np.ones(10)})

    def crash(*args: Any, **options: Any) -> None:
        raise OSError("disk full")

    for module, name in ((np.lib.format, "write_array"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, crash)
            with pytest.raises(OSError, match="disk full"):
                saving.save(path, {"step": 2, "a": np.zeros(10)})
        assert saving.load(path)["step"] == 1
        assert os.listdir(tmp_path) == ["run.npz"]


def test_readers_and_writers_at_once_see_whole_files(tmp_path: Path) -> None:
    path, stop, wrong = tmp_path / "run.npz", threading.Event(), []
    saving.save(path, {"a": np.zeros(5000)})

    def read() -> None:
        while not stop.is_set():
            values = set(saving.load(path)["a"].tolist())
            if len(values) != 1:
                wrong.append(values)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    try:
        for i in range(50):
            saving.save(path, {"a": np.full(5000, float(i))})
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"a": {"b": object()}}, "a/b is a object"),
        ({"a": [{1, 2}]}, "a/0 is a set"),
        ({"a": {3: 1}}, "keys must be strings without '/', not 3 in a"),
        ({"a/b": 1}, "not 'a/b' in the state"),
        ({"a": np.array([object()])}, "'a' cannot be an array of objects"),
        ({"json": np.ones(2)}, "the name is taken"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        saving.save(tmp_path / "run.npz", state)
    assert os.listdir(tmp_path) == []


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        saving.load(tmp_path / "none.npz")
    whole = tmp_path / "whole.npz"
    saving.save(whole, {"a": np.arange(1000.0)})
    data = whole.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    np.savez(tmp_path / "other.npz", a=np.ones(1))
    np.save(tmp_path / "array.npy", np.ones(1))
    for name, content in (
        ("cut", data[:-100]),
        ("short", data[:10]),
        ("empty", b""),
        ("text", b"hello"),
        ("damaged", bytes(damaged)),
    ):
        (tmp_path / name).write_bytes(content)
    for name, why in {"cut": "", "damaged": "", "other.npz": "", "short": "it is no .npz", "empty": "it is no .npz",
                      "text": "it is no .npz", "array.npy": "it is no .npz"}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}' is no checkpoint of tinydiff, or it is damaged: {why}"):
            saving.load(tmp_path / name)
