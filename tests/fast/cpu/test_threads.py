"""Microbatches over threads: the same numbers as one after the other, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, backend, microbatch, nn, operators, ops, tensor
from tinydiff.diffusion import VESDE, sample
from tinydiff.microbatch import blas_threads, gradients, over_microbatches

fast = pytest.importorskip("tinydiff.fast.threads")

pytestmark = [
    pytest.mark.usefixtures("numpy_backend"),  # a GPU is fed by one thread
    pytest.mark.skipif(os.environ.get("TINYDIFF_FAST") == "0", reason="one thread: TINYDIFF_FAST=0"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_change_no_bit(dtype):
    """Against the plain version, with one thread in the BLAS."""
    net = nn.Sequential(nn.Linear(6, 50, rng=0), nn.SiLU(), nn.Linear(50, 3, rng=1)).astype(dtype)
    x = Rng(2).normal((400, 6), dtype)

    def loss(x, rng, sample_offset):
        z = rng.normal(x.shape, dtype, sample_offset=sample_offset)
        return ops.mean(ops.sum(ops.square(net(tensor(x + z))), axis=1))

    def found(threads):
        value = gradients(loss, list(net.parameters()), [x], Rng(5), 64, threads)
        return [value.tobytes(), *(p.grad.numpy().tobytes() for p in net.parameters())]

    with blas_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbatch.over_microbatches, "versions", {})
        plain = found(None)
    assert found(1) == found(2) == found(4) == found(None) == plain


def blas_count():
    blas = fast._blas()
    if blas is None:
        pytest.skip("NumPy brings another BLAS than OpenBLAS")
    return blas[0]()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_part_is_done_once_by_whoever_is_free(threads):
    first, done = threading.Barrier(threads, timeout=20), []

    def work(i):
        if i < threads:
            first.wait()  # so none of them has done two of these
        done.append((i, threading.get_ident()))
        return i * i

    assert fast.at_once(work, 20, threads) == [i * i for i in range(20)]
    assert sorted(i for i, _ in done) == list(range(20)) and len({thread for _, thread in done}) == threads


@pytest.mark.parametrize("mine", [True, False])
def test_after_an_error_no_part_is_begun_and_none_is_at_work(mine):
    """Of this thread, or of the other."""
    here, both, begun, done = threading.get_ident(), threading.Barrier(2, timeout=20), [], []

    def work(i):
        begun.append(i)
        if i < 2:
            both.wait()
            if (threading.get_ident() == here) == mine:
                raise KeyError("an error")
        time.sleep(0.05)
        done.append(i)

    with pytest.raises(KeyError, match="an error"):
        fast.at_once(work, 1000, 2)
    assert len(done) == len(begun) - 1 < 999


def test_other_threads_are_told_before_these_begin(monkeypatch):
    """Those of C, which would look for work on a core that these need."""
    told = []
    monkeypatch.setattr(fast, "before_threads", [lambda: told.append("stop")])
    fast.at_once(abs, 4, 1)
    assert told == []
    fast.at_once(abs, 4, 2)
    assert told == ["stop"]
    list(over_microbatches(lambda rows: rows, 4, 1, threads=2))
    assert told == ["stop"] * 2


def test_those_of_c_are_told(monkeypatch):
    build, told = pytest.importorskip("tinydiff.fast.cpu.build"), []
    assert build.stop_looking in fast.before_threads
    loaded = types.SimpleNamespace(stop_looking=lambda: told.append("now"))
    monkeypatch.setattr(build, "_libraries", {"f": loaded, "d": None})
    fast.at_once(abs, 4, 2)
    assert told == ["now"]


def test_with_a_blas_that_cannot_be_asked_the_limits_hold(monkeypatch):
    """A single microbatch has all cores, several have one each, and blas_threads(1) leaves one."""
    monkeypatch.setattr(fast, "_blas", lambda: None)
    monkeypatch.setattr(fast, "cores", lambda: 3)

    def found(size):
        return list(over_microbatches(lambda rows: fast.threads_for(2**40), 4, size, 2))

    assert fast.threads_for(2**40) == 3 and found(2) == [1, 1]
    assert list(over_microbatches(lambda rows: fast.threads_for(2**40), 4, 4)) == [3] and found(4) == [2]
    with blas_threads(1):
        assert fast.threads_for(2**40) == 1
        with blas_threads(2):
            assert fast.threads_for(2**40) == 1
    assert fast.threads_for(2**40) == 3


def in_both_threads(work):
    """[work() in this thread, work() in one of the pool], in this order."""
    both, here = threading.Barrier(2, timeout=20), threading.get_ident()

    def of_part(_):
        both.wait()  # so none of them does both parts
        return threading.get_ident() != here, work()

    return [found for _, found in sorted(fast.at_once(of_part, 2, 2), key=lambda pair: pair[0])]


def test_a_thread_of_the_pool_has_no_others():
    """It would wait for itself."""
    if blas_count() == 1:
        pytest.skip("one core, or a BLAS with one thread")
    here, there = in_both_threads(lambda: fast.threads_for(2**40))
    assert there == 1 < here


def test_parts_have_the_numpy_settings_of_their_caller():
    with np.errstate(divide="raise", over="ignore"):
        here, there = in_both_threads(np.geterr)
    assert here == there and there["divide"] == "raise" and there["over"] == "ignore"


@pytest.mark.parametrize(
    "shapes",
    [
        ((300, 400), (400, 500)),
        ((500, 400), (400, 300)),
        ((97, 999), (999, 511)),
        ((1, 4096), (4096, 300)),
        ((3000, 90), (90, 8)),
        ((48, 9000), (9000, 20)),
        ((2, 3, 200, 150), (3, 150, 180)),
        ((40, 60, 30), (40, 30, 60)),
        ((2, 200, 150), (2, 150, 180)),
        ((1, 200, 150), (3, 150, 180)),
        ((0, 60, 30), (0, 30, 60)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-3), ("float64", 1e-11)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_in_parts(shapes, dtype, atol, turned, monkeypatch):
    """Each part has one thread in the BLAS, which then has its own again."""
    count = blas_count()
    x, y = (Rng(i).normal(shape, "float64") for i, shape in enumerate(shapes))
    right, inside, matmul = x @ y, [], np.matmul
    x, y = x.astype(dtype), y.astype(dtype)
    if turned:  # as in the rules: the transpose of an array
        x, y = (np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2) for a in (x, y))

    def watched(a, b, **kwargs):
        inside.extend([blas_count()] * (a.size > 0 < b.size))
        return matmul(a, b, **kwargs)

    monkeypatch.setattr(np, "matmul", watched)
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(fast, "threads_for", lambda *_, threads=threads: threads)
        inside.clear()
        found = fast.matmul(x, y)
        np.testing.assert_allclose(found, right, atol=atol)
        assert found.dtype == dtype and set(inside) <= {1}
        assert len(inside) >= min(threads, 2) or count == 1 or not found.size
    assert blas_count() == count


def test_matrix_products_have_one_thread_inside_microbatches_of_any_depth():
    before = blas_count()

    def inner(rows):
        seen = [blas_count()]
        seen += over_microbatches(lambda part: blas_count(), 2, 1, threads=2)
        return [*seen, blas_count()]

    assert list(over_microbatches(inner, 4, 1, threads=2)) == [[1, 1, 1, 1]] * 4
    assert blas_count() == before


def test_callers_at_the_same_time_leave_the_blas_as_it_was():
    """The first block to begin is the first to end; the old number of threads is back only when both have ended."""
    before = blas_count()
    first, second = blas_threads(1), blas_threads(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_count() == 1
    second.__exit__(None, None, None)
    assert blas_count() == before


def test_blas_has_its_threads_back_afterwards():
    before = blas_count()
    get, set_to = fast._blas()
    set_to(2)
    try:
        inside = list(over_microbatches(lambda rows: get(), 2, 1, threads=2))
        assert inside == [1, 1] and get() == 2
    finally:
        set_to(before)


@pytest.mark.parametrize("leave", ["by an error", "by taking no more"])
def test_nothing_runs_any_more_once_the_microbatches_are_left(leave):
    before, running, started = blas_count(), [], threading.Event()

    def slow(rows):
        if rows.start == 0:
            started.wait(10)
            if leave == "by an error":
                raise ZeroDivisionError
            return 0
        running.append(rows.start)
        started.set()
        time.sleep(0.1)
        running.remove(rows.start)

    parts = over_microbatches(slow, 8, 1, threads=2)
    with pytest.raises(ZeroDivisionError) if leave == "by an error" else contextlib.nullcontext():
        next(parts)
    parts.close()
    assert running == [] and blas_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_threads_of_its_own():
    list(over_microbatches(lambda rows: rows, 2, 1, threads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: a process with threads forks
        child = os.fork()
    if not child:
        os._exit(len(list(over_microbatches(lambda rows: rows, 3, 1, threads=2))))
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 3 and ended[0]


def test_the_size_of_microbatches_does_not_depend_on_the_cores(monkeypatch):
    sizes = [microbatch.microbatch_size(n) for n in (1, 128, 129, 4096)]
    monkeypatch.setattr(fast, "cores", lambda: 64)
    assert sizes == [microbatch.microbatch_size(n) for n in (1, 128, 129, 4096)]


def test_threads_are_used_and_an_error_in_one_is_raised():
    together = threading.Barrier(2, timeout=10)  # passes only if two microbatches are in work at the same time
    list(over_microbatches(lambda rows: together.wait(), 2, 1, threads=2))

    def broken(rows):
        raise ZeroDivisionError(f"in rows {rows.start}")

    with pytest.raises(ZeroDivisionError, match="in rows 0"):
        list(over_microbatches(broken, 4, 1, threads=2))


# ---------------------------------------------------------------- without this folder


SCRIPT = """
import sys, tinydiff
from tinydiff import Rng, nn, ops, tensor
from tinydiff.diffusion import VESDE, sample
from tinydiff.microbatch import blas_threads, gradients, over_microbatches
assert ("tinydiff.fast" in sys.modules) == (sys.argv[1] == "fast"), tinydiff.__path__
net = nn.Linear(3, 2, rng=0)
x = Rng(1).normal((100, 3))
with blas_threads(1):
    value = gradients(lambda x, rng, sample_offset: ops.square(net(tensor(x))).mean(), list(net.parameters()), [x],
                      Rng(2), 16)
print(*value.reshape(1).tolist(), *net.weight.grad.numpy().ravel().tolist())
"""


def test_without_the_folder_or_with_it_switched_off_all_works(tmp_path):
    def output(package, how, **environment):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT, how], capture_output=True, text=True, cwd=package,
            env={**os.environ, "TINYDIFF_BACKEND": "numpy", "PYTHONPATH": str(package), **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [float(number) for number in done.stdout.split()]

    here = Path(tinydiff.__file__).parent
    bare = tmp_path / "tinydiff"
    bare.mkdir()
    for part in here.iterdir():
        if part.name not in ("fast", "__pycache__"):
            (bare / part.name).symlink_to(part)
    off = output(here.parent, "off", TINYDIFF_FAST="0")
    assert off == output(tmp_path, "deleted")
    assert off == pytest.approx(output(here.parent, "fast"), rel=1e-5)


def test_the_plain_version_is_what_runs_on_other_backends():
    assert set(over_microbatches.versions) == set(blas_threads.versions) == {"numpy"}
    assert backend.active().fast == "numpy"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_inherits_no_lock_and_no_limit_of_another_thread():
    before = blas_count()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with blas_threads(1), fast._limits_lock:
            inside.set()
            leave.wait(20)

    def in_child():
        ok = fast._limits == [] and blas_count() == before
        ok = ok and [rows.start for rows in over_microbatches(lambda rows: rows, 8, 4, 2)] == [0, 4]
        p = tensor([1.0], requires_grad=True)
        (p * 2).sum().backward()
        return ok and p.grad.item() == 2

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(5)
    with operators._accumulating, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads, which is the point
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends a child that waits for a lock
            os._exit(0 if in_child() else 7)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    leave.set()
    thread.join()
    assert code == 0


def test_ctrl_c_ends_what_takes_long_in_the_other_threads():
    """Samplers ask in each step whether they are still wanted."""
    seen = []

    def model(x, t):
        seen.append(1)
        if len(seen) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        return -x

    with pytest.raises(KeyboardInterrupt):
        sample(model, (8, 2), VESDE(2.0), 0, method="ddpm", steps=5000, microbatch=1, threads=2)
    assert len(seen) < 2000  # of 40,000, and of 10,000 that the two threads had begun
    assert sample(lambda x, t: -x, (4, 2), VESDE(2.0), 0, steps=2, microbatch=1, threads=2).shape == (4, 2)
