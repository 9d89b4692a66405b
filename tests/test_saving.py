"""Checkpoints: what goes in comes out, a crash leaves the old file, and a bad file says so."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, optim, saving, tensor
from tinydiff.records import read_log

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
        ({"a": {3: 1}}, "keys must be strings without '/' and NUL, and not empty, not 3 in a"),
        ({"a/b": 1}, "not 'a/b' in the state"),
        ({"a": 1, "": {"a": 2}}, "not '' in the state"),
        ({"a": {"": np.ones(1)}}, "not '' in a"),
        ({"a\0b": np.ones(1), "a": np.ones(2)}, r"not 'a\\x00b' in the state"),
        ({"a": np.zeros(2, [("x", object)])}, "'a' cannot be an array of objects"),
        ({"a": np.datetime64(1, "ns")}, "a is a datetime64"),  # its item() would be an int
        (None, "the state must be a dict, not NoneType: None"),
        (5, "the state must be a dict, not int: 5"),
        ("x", "the state must be a dict, not str: 'x'"),
        ([1], r"the state must be a dict, not list: \[1\]"),
        ({"a": np.array([object()])}, "'a' cannot be an array of objects"),
        ({"json": np.ones(2)}, "the name is taken"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        saving.save(tmp_path / "run.npz", state)
    assert os.listdir(tmp_path) == []


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["again"] = [state]
    with pytest.raises(ValueError, match="nested too deep, or contains itself"):
        saving.save(tmp_path / "run.npz", state)
    assert not list(tmp_path.iterdir())


def test_names_that_a_zip_cannot_hold_are_refused(tmp_path: Path) -> None:
    saving.save(tmp_path / "run.npz", {"a": {"b" * 65529: np.ones(1)}})  # 2^16 - 1 with "a/" and ".npy"
    assert list(saving.load(tmp_path / "run.npz")["a"]) == ["b" * 65529]
    for name in ("b" * 65530, "é" * 40_000, "\ud800"):
        with pytest.raises(ValueError):
            saving.save(tmp_path / "run.npz", {"a": {name: np.ones(1)}})
        assert list(saving.load(tmp_path / "run.npz")["a"]) == ["b" * 65529]
    saving.save(tmp_path / "run.npz", {"a": {"b" * 70000: 1}})  # what is no array has no name in the zip
    assert saving.load(tmp_path / "run.npz") == {"a": {"b" * 70000: 1}}


def test_names_that_numpy_would_mix_up_come_back(tmp_path: Path) -> None:
    state = {"a": np.zeros(1), "a.npy": np.ones(2), "a.npy.npy": np.ones(3), "json.npy": np.ones(4), "json": {"a": 5}}
    saving.save(tmp_path / "run.npz", state)
    found = saving.load(tmp_path / "run.npz")
    assert found.pop("json") == {"a": 5}
    assert {name: len(a) for name, a in found.items()} == {"a": 1, "a.npy": 2, "a.npy.npy": 3, "json.npy": 4}


def test_an_array_of_a_dtype_that_npy_does_not_know_is_refused() -> None:
    class Dtype:  # as of ml_dtypes.bfloat16
        hasobject, isbuiltin = False, 2

        def __str__(self) -> str:
            return "bfloat16"

    dtype: Any = Dtype()
    with pytest.raises(TypeError, match=r"'w' is an array of bfloat16.*save array.astype\('float32'\)"):
        saving._check_entry("w", dtype)


def test_arrays_of_bfloat16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'w' is an array of bfloat16"):
        saving.save(tmp_path / "run.npz", {"w": np.ones(3, ml_dtypes.bfloat16)})


def test_what_is_no_path_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        for path in (file.fileno(), None, file):
            with pytest.raises(TypeError):
                saving.load(path)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                saving.save(path, {})  # type: ignore[arg-type]
        assert os.fstat(file.fileno())  # and is not closed


def test_a_state_that_is_no_dict_is_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "run.npz", json=np.frombuffer(b"[1]", np.uint8))
    with pytest.raises(ValueError, match="run.npz' is no checkpoint .* its state is a list, not a dict"):
        saving.load(tmp_path / "run.npz")
    np.savez(tmp_path / "run.npz", json=np.frombuffer(b'{"a": {"/array": "b"}}', np.uint8))
    with pytest.raises(ValueError, match="run.npz' is no checkpoint .* it has no entry 'b'"):
        saving.load(tmp_path / "run.npz")


def test_a_directory_or_a_file_that_must_not_be_read_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IsADirectoryError):
        saving.load(tmp_path)

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied", str(args[0]))

    (tmp_path / "run.npz").write_bytes(b"")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="run.npz"):
        saving.load(tmp_path / "run.npz")


def same(found: Any, state: Any) -> bool:
    if isinstance(state, dict):
        return found.keys() == state.keys() and all(same(found[name], state[name]) for name in state)
    if isinstance(state, np.ndarray):
        return found.dtype == state.dtype and found.shape == state.shape and found.tobytes() == state.tobytes()
    return type(found) is type(state) and found == state


def is_refused_or_right(path: Path, data: bytes, state: Any) -> bool:
    """Does the file load as the state (then False), or not at all (True)?"""
    path.write_bytes(data)
    try:
        found = saving.load(path)
    except ValueError as error:
        assert f"{str(path)!r} is no checkpoint of tinydiff, or it is damaged" in str(error)
        return True
    assert same(found, state)
    return False


def test_any_byte_that_is_damaged_is_noticed(tmp_path: Path) -> None:
    """Or it makes no difference, as the dates of the entries do."""
    state = {"model": {"weight": np.arange(3.0)}, "step": 3, "lr": 0.1, "what": "a run"}
    path = tmp_path / "run.npz"
    saving.save(path, state)
    whole = path.read_bytes()
    refused = 0
    for i in range(len(whole)):
        for flip in (0xFF, 1 << i % 8):
            damaged = bytearray(whole)
            damaged[i] ^= flip
            refused += is_refused_or_right(path, bytes(damaged), state)
    assert refused > len(whole)


def test_bytes_that_are_damaged_in_a_larger_file_are_noticed(tmp_path: Path) -> None:
    state = {"arrays": {f"w{i}": np.arange(1000.0 * i).reshape(10, -1) for i in range(1, 8)}, "step": 3}
    path = tmp_path / "run.npz"
    saving.save(path, state)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for i in rng.integers(0, len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[i] ^= 1 << int(rng.integers(8))
        is_refused_or_right(path, bytes(damaged), state)
    for _ in range(50):  # several at once, and a piece cut out
        damaged = bytearray(whole)
        for i in rng.integers(0, len(whole), 20).tolist():
            damaged[i] = int(rng.integers(256))
        start = int(rng.integers(len(whole)))
        del damaged[start : start + int(rng.integers(3)) * 100]
        is_refused_or_right(path, bytes(damaged), state)


def test_a_damaged_shape_is_no_other_array(tmp_path: Path) -> None:
    """NumPy reads as much as a shape asks for, so a smaller one ended before the checksum was compared."""
    path = tmp_path / "run.npz"
    saving.save(path, {"w": np.zeros((30, 1001), np.float32)})
    whole = path.read_bytes()
    assert whole.count(b"(30, 1001)") == 1
    path.write_bytes(whole.replace(b"(30, 1001)", b"(20, 1001)"))
    with pytest.raises(ValueError, match="run.npz' is no checkpoint of tinydiff, or it is damaged"):
        saving.load(path)


def test_without_a_home_directory_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(RuntimeError, match="no home directory .*: set XDG_CACHE_HOME to a directory"):
        saving.cache_dir("mnist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert saving.cache_dir("mnist") == Path("/somewhere/tinydiff/mnist")


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


# ---------------------------------------------------------------- checkpoints of strangers


def npy(header: str, payload: bytes = b"") -> bytes:
    text = header.encode() + b" " * (-(11 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload


def header(shape: str, descr: str = "'<f4'", order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"


def crafted(path: Path, structure: str, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of these entries, without a checksum of the whole, as the first version wrote them."""
    text = structure.encode()
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that come twice
        for name, data in [("json.npy", npy(header(f"({len(text)},)", "'|u1'"), text)), *entries]:
            archive.writestr(name, data)
    return path


ONE = '{"w": {"/array": "w"}}'
FOUR = b"\0\0\x80?"  # 1.0


def test_a_checkpoint_of_the_first_version_loads(tmp_path: Path) -> None:
    path = crafted(tmp_path / "old.npz", ONE, [("w.npy", npy(header("(1,)"), FOUR))])
    assert saving.load(path)["w"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("structure", "entries", "why"),
    [
        (ONE, [("w.npy", npy(header("(1,)"), FOUR)), ("w.npy", npy(header("(1,)"), FOUR))], "two entries 'w'"),
        (ONE, [("w.npy", npy(header("(1,)"), FOUR)), ("x.npy", npy(header("(1,)"), FOUR))], "that belong nowhere: x"),
        (ONE, [("w.npy", b"hello")], "is no .npy"),
        (ONE, [("w.npy", pickle.dumps({"a": 1}))], "is no .npy"),
        (ONE, [("w.pkl", pickle.dumps({"a": 1}))], "'w.pkl' is no array"),
        (ONE, [("w.npy", npy(header("(2,)"), FOUR))], r"shape \(2,\) needs 8 bytes, but has 4"),
        (ONE, [("w.npy", npy(header("(1,)"), FOUR + FOUR))], r"shape \(1,\) needs 4 bytes, but has 8"),
        (ONE, [("w.npy", npy(header("(10**12,)"), FOUR))], ""),
        (ONE, [("w.npy", npy(header("(1000000000000,)"), FOUR))], "needs 4000000000000 bytes, but has 4"),
        (ONE, [("w.npy", npy(header("(18446744073709551616,)"), FOUR))], "bytes, but has 4"),
        (ONE, [("w.npy", npy(header("(-1, -1)"), FOUR))], "the shape"),
        (ONE, [("w.npy", npy(header("(True,)"), FOUR))], "the shape"),
        (ONE, [("w.npy", npy(header("[1]"), FOUR))], "the shape"),
        (ONE, [("w.npy", npy(header("(1000000000000,)", "'<U0'")))], "which is not read"),
        (ONE, [("w.npy", npy(header("(1,)", "'|O'"), pickle.dumps(1)))], "which is not read"),
        (ONE, [("w.npy", npy(header("(1,)", "[('x', '|O')]"), b"\0" * 8))], "which is not read"),
        (ONE, [("w.npy", npy(header("(1,)", "'nonsense'"), FOUR))], ""),
        (ONE, [("w.npy", npy(header("(1,)", order="1"), FOUR))], "the header of its entry"),
        (ONE, [("w.npy", npy("[" * 5000 + "]" * 5000))], ""),
        (ONE, [("w.npy", npy("__import__('os').system('true')"))], ""),
        (f'{{"a": [{", ".join([ONE] * 3)}]}}', [("w.npy", npy(header("(1,)"), FOUR))], "more than one place"),
        (ONE, [], "it has no entry 'w'"),
        ('{"a": 1, "a": 2}', [], "a name comes twice among a, a"),
        ('[{"a": 1}]', [], "its state is a list, not a dict"),
        ("[" * 100_000 + "]" * 100_000, [], "RecursionError"),
        ('{"a": ' * 50_000 + "1" + "}" * 50_000, [], "RecursionError"),
        ('{"a": 1' + "0" * 5000 + "}", [], ""),
        ("[" + "{}," * 2**20 + "0]", [], "which is too much"),
        ("nonsense", [], ""),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_what_a_stranger_may_have_written_is_refused(
    tmp_path: Path, structure: str, entries: list[tuple[str, bytes]], why: str
) -> None:
    path = crafted(tmp_path / "run.npz", structure, entries)
    with pytest.raises(ValueError, match=f"run.npz' is no checkpoint of tinydiff, or it is damaged: .*{why}"):
        saving.load(path)


def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path = crafted(tmp_path / "run.npz", ONE, [("w.npy", bytes(10**6))], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="is compressed"):
        saving.load(path)
    # One megabyte to which a hundred names in the directory of the zip lead.
    many = ", ".join(f'"{i:02}": {{"/array": "{i:02}"}}' for i in range(100))
    entry = npy(header("(250000,)"), bytes(10**6))
    path = crafted(tmp_path / "run.npz", f"{{{many}}}", [(f"{i:02}.npy", entry if i == 0 else b"") for i in range(100)])
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("00.npy")
        for info in archive.infolist()[2:]:
            info.header_offset, info.CRC = first.header_offset, first.CRC
            info.file_size = info.compress_size = first.file_size
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="its entries are larger than the file"):
        saving.load(path)


def test_one_checksum_is_over_everything(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    saving.save(path, {"w": np.zeros(1000)})
    whole = path.read_bytes()
    assert hashlib.sha256(whole[:-64]).hexdigest().encode() == whole[-64:]
    for i in (8, 10, 12, len(whole) - 90, len(whole) - 1):  # flags, method, time: nothing else would notice some
        damaged = bytearray(whole)
        damaged[i] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="run.npz' is no checkpoint of tinydiff, or it is damaged"):
            saving.load(path)
    for cut in (whole[:-1], whole[:-64], whole[:-100], whole + b"\0"):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="run.npz' is no checkpoint of tinydiff, or it is damaged"):
            saving.load(path)


def test_an_interrupt_inside_the_zip_is_that_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saving.save(tmp_path / "run.npz", {"w": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_what_load_would_refuse_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_VALUES", 1000)
    with pytest.raises(ValueError, match="too much"):
        saving.save(tmp_path / "run.npz", {"a": list(range(1001))})
    with pytest.raises(TypeError, match="'a' cannot be an array of .*whose elements have no bytes"):
        saving.save(tmp_path / "run.npz", {"a": np.zeros(3, "V0")})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_weights_go_out_and_come_back(tmp_path: Path, ending: str) -> None:
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    net, other = (nn.Sequential(nn.Linear(2, 3, rng=seed), nn.Linear(3, 1, rng=seed + 1)) for seed in (0, 2))
    path = tmp_path / f"net{ending}"
    saving.save_weights(path, net.state_dict())
    other.load_state_dict(saving.load_weights(path))
    for p, q in zip(net.parameters(), other.parameters()):
        np.testing.assert_array_equal(p.numpy(), q.numpy())
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).T,
        "b": np.array([True]),
        "c": np.arange(3, dtype=">i2"),
        "d": tensor(2),
    }
    saving.save_weights(path, arrays)
    found = saving.load_weights(path)
    for name, array in {**arrays, "d": np.array(2)}.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == np.shape(array) and found[name].flags.writeable
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"net{ending}' is no "):
        saving.load_weights(path)


def test_other_programs_read_and_write_those_weights(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    a = np.arange(6, dtype="float32").reshape(2, 3).T
    saving.save_weights(tmp_path / "a.safetensors", {"a": a})
    np.testing.assert_array_equal(package.load_file(tmp_path / "a.safetensors")["a"], a)
    header = json.dumps({"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    bits = np.array([0x3FC0, 0xC000], "<u2").tobytes()  # 1.5, -2
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits)
    found = saving.load_weights(tmp_path / "b.safetensors")["b"]
    assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0]


def test_every_kind_of_number_comes_back_or_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("safetensors")
    for kind in "?bBhHiIqQefdF":
        a = np.arange(6).reshape(2, 3).astype(kind)
        saving.save_weights(tmp_path / "a.safetensors", {"a": a})
        found = saving.load_weights(tmp_path / "a.safetensors")["a"]
        assert found.dtype == a.dtype and found.tolist() == a.tolist()
    header = json.dumps({"b": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(ValueError, match="b.safetensors' has numbers of a kind that NumPy does not have: F8_E4M3"):
        saving.load_weights(tmp_path / "b.safetensors")

    def no_memory(data: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(package, "deserialize", no_memory)
    with pytest.raises(MemoryError, match="not enough memory to read .*b.safetensors"):
        saving.load_weights(tmp_path / "b.safetensors")


def test_weights_are_arrays_in_a_file_of_a_known_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("w.pt", "w"):
        with pytest.raises(ValueError, match="weights are kept in .safetensors or .npz, not in .*w"):
            saving.save_weights(tmp_path / wrong, {"a": np.ones(1)})
        with pytest.raises(ValueError, match="weights are kept in"):
            saving.load_weights(tmp_path / wrong)
    with pytest.raises(TypeError, match="'a' is no array but a int"):
        saving.save_weights(tmp_path / "w.npz", {"a": 5})
    saving.save(tmp_path / "w.npz", {"step": 3})
    with pytest.raises(ValueError, match="w.npz' has not only weights: step"):
        saving.load_weights(tmp_path / "w.npz")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"pip install 'tinydiff\[weights\]'"):
        saving.save_weights(tmp_path / "w.safetensors", {"a": np.ones(1)})


def test_a_log_of_a_million_steps_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MOST_VALUES", 2**10)  # so that it need not be a million
    record = {"epoch": 12, "step": 12345, "loss": 0.12345678, "lr": 1e-3, "images": 128, "seconds": 123.4}
    saving.save(tmp_path / "run.npz", {"records": [record] * 5000})
    assert saving.load(tmp_path / "run.npz")["records"] == [record] * 5000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_devices_and_pipes_are_refused_and_not_read(tmp_path):
    """A device has no end, and a pipe that nobody writes to no beginning."""
    os.mkfifo(tmp_path / "pipe")
    for target in ("/dev/zero", tmp_path / "pipe"):
        for name in ("x.npz", "x.safetensors", "log.jsonl"):
            path = tmp_path / name
            path.symlink_to(target)
            with pytest.raises(ValueError, match="is not a file, but a device or a pipe"):
                (read_log if name == "log.jsonl" else saving.load_weights)(path)
            path.unlink()


def test_safetensors_of_odd_shapes_or_names_are_errors_with_the_name_of_the_file(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "x.safetensors"
    for shape, size in (([1] * 70, 4), ([0, 2**62, 2**62], 0)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            saving.load_weights(path)
    part = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = ("{" + part % (0, 4) + ", " + part % (4, 8) + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        saving.load_weights(path)


def test_a_log_that_is_none_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"loss": 1.0}\n{"note": "a\xe2\x80\xa8b"}\n')  # U+2028 ends no line of JSON
    assert [sorted(record) for record in read_log(path)] == [["loss"], ["note"]]
    for bad in (b'{"loss": "\xff"}', b"[" * 100_000, b"[1]"):
        path.write_bytes(b'{"loss": 1.0}\n' + bad + b"\n")
        with pytest.raises(ValueError, match=r"log\.jsonl, line 2: "):
            read_log(path)
