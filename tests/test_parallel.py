"""Shards over threads: the same numbers whatever the number of threads."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, nn, ops, parallel, tensor


def problem():
    net = nn.Sequential(nn.Linear(6, 5, rng=0), nn.SiLU(), nn.Linear(5, 3, rng=1)).astype("float64")
    x = Rng(2).normal((20, 6), "float64")
    return list(net.parameters()), lambda rows: ops.sum(ops.square(net(tensor(x[rows]))))


def test_shards_add_up_to_the_whole(each_backend):
    parameters, loss = problem()
    whole = loss(slice(0, 20))
    expected = tinydiff.grad(whole, parameters)
    value, found = parallel.gradients(loss, parameters, 20, 6)
    assert float(value) == pytest.approx(whole.item(), rel=1e-12)
    for g, e in zip(found, expected):
        np.testing.assert_allclose(tinydiff.backend.to_host(g), e.numpy(), rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in parameters)


def test_the_number_of_threads_does_not_change_a_bit():
    parameters, loss = problem()
    one, many = (parallel.gradients(loss, parameters, 20, 3, threads)[1] for threads in (1, 4))
    for a, b in zip(one, many):
        assert tinydiff.backend.to_host(a).tobytes() == tinydiff.backend.to_host(b).tobytes()


def test_shards_of_shards_do_not_wait_for_each_other():
    def inner(rows):
        return list(parallel.over_shards(lambda part: (rows.start, part.start), 2, 1, threads=2))

    pairs = list(parallel.over_shards(inner, 4, 1, threads=2))
    assert pairs == [[(i, 0), (i, 1)] for i in range(4)]


def blas_count():
    blas = parallel._blas()
    if blas is None:
        pytest.skip("NumPy brings another BLAS than OpenBLAS")
    return blas[0]()


def test_matrix_products_have_one_thread_inside_shards_of_any_depth():
    before = blas_count()

    def inner(rows):
        seen = [blas_count()]
        seen += parallel.over_shards(lambda part: blas_count(), 2, 1, threads=2)
        return [*seen, blas_count()]

    assert list(parallel.over_shards(inner, 4, 1, threads=2)) == [[1, 1, 1, 1]] * 4
    assert blas_count() == before


def test_callers_at_the_same_time_leave_the_blas_as_it_was():
    """The first to come is the first to go: what it found is there again only when the other has gone too."""
    before = blas_count()
    first, second = parallel.blas_threads(1), parallel.blas_threads(1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert blas_count() == 1
    second.__exit__(None, None, None)
    assert blas_count() == before


@pytest.mark.parametrize("leave", ["by an error", "by taking no more"])
def test_nothing_runs_any_more_once_the_shards_are_left(leave):
    if tinydiff.backend.active().name != "numpy":
        pytest.skip("a GPU is fed by one thread")
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

    shards = parallel.over_shards(slow, 8, 1, threads=2)
    with pytest.raises(ZeroDivisionError) if leave == "by an error" else contextlib.nullcontext():
        next(shards)
    shards.close()
    assert running == [] and blas_count() == before


def test_bad_sizes_are_errors_at_the_call():
    for size, threads in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="shards need size >= 1 and threads >= 1"):
            parallel.over_shards(lambda rows: rows, 4, size, threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_has_threads_of_its_own():
    list(parallel.over_shards(lambda rows: rows, 2, 1, threads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on: a process with threads forks
        child = os.fork()
    if not child:
        os._exit(len(list(parallel.over_shards(lambda rows: rows, 3, 1, threads=2))))
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 3 and ended[0]


def test_the_size_of_shards_does_not_depend_on_the_cores(monkeypatch):
    sizes = [parallel.shard_size(n) for n in (1, 128, 129, 4096)]
    monkeypatch.setattr(parallel, "cores", lambda: 64)
    assert sizes == [parallel.shard_size(n) for n in (1, 128, 129, 4096)]


def test_results_come_in_order_and_cover_every_row_once():
    shards = list(parallel.over_shards(lambda rows: (rows.start, rows.stop), 10, 4, threads=3))
    assert shards == [(0, 4), (4, 8), (8, 10)]
    assert list(parallel.over_shards(lambda rows: rows, 0, 4)) == []


def test_the_threads_record_if_the_caller_does():
    x = tinydiff.tensor([1.0, 2.0], requires_grad=True)
    for threads in (1, 2):
        recorded = [y.requires_grad for y in parallel.over_shards(lambda rows: x[rows] * 2, 2, 1, threads)]
        with tinydiff.no_grad():
            silent = [y.requires_grad for y in parallel.over_shards(lambda rows: x[rows] * 2, 2, 1, threads)]
        assert recorded == [True, True] and silent == [False, False]


def test_threads_are_used_and_an_error_in_one_is_raised():
    if tinydiff.backend.active().name != "numpy":
        pytest.skip("a GPU is fed by one thread")
    together = threading.Barrier(2, timeout=10)  # passes only if two shards are in work at the same time
    list(parallel.over_shards(lambda rows: together.wait(), 2, 1, threads=2))

    def broken(rows):
        raise ZeroDivisionError(f"in rows {rows.start}")

    with pytest.raises(ZeroDivisionError, match="in rows 0"):
        list(parallel.over_shards(broken, 4, 1, threads=2))


def test_blas_has_its_threads_back_afterwards():
    blas = parallel._blas()
    if blas is None:
        pytest.skip("this NumPy does not bring its own OpenBLAS")
    if tinydiff.backend.active().name != "numpy":
        pytest.skip("a GPU is fed by one thread")
    get, set_to = blas
    before = get()
    set_to(2)
    try:
        inside = list(parallel.over_shards(lambda rows: get(), 2, 1, threads=2))
        assert inside == [1, 1] and get() == 2
    finally:
        set_to(before)


@pytest.mark.filterwarnings("ignore:divide by zero")  # NumPy says so too
def test_anomalies_are_found_in_shards_too():
    x = tensor(np.array([1.0, 0.0]), requires_grad=True)
    with tinydiff.detect_anomaly(), pytest.raises(FloatingPointError, match="divide"):
        parallel.gradients(lambda rows: ops.sum(1 / x[rows]), [x], 2, 1, threads=2)


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (2, 0)])
def test_bad_sizes_are_quoted(size, threads):
    with pytest.raises(ValueError, match=f"size={size}, threads={threads}"):
        list(parallel.over_shards(lambda rows: rows, 4, size, threads))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "layer, message", [(nn.Dropout(0.5, rng=0), "is shared by the shards"), (nn.BatchNorm2d(2), "several shards")]
)
def test_a_state_that_shards_would_share_is_an_error(layer, message, threads):
    def draw(rows):
        return layer(tensor(np.ones((rows.stop - rows.start, 3, 3, 2), np.float32)))

    with pytest.raises(RuntimeError, match=message):
        list(parallel.over_shards(draw, 4, 2, threads))
    assert len(list(parallel.over_shards(draw, 4, 4, threads))) == 1, "one shard is the batch"
    layer.eval()
    assert len(list(parallel.over_shards(draw, 4, 2, threads))) == 2
    layer.train()


def test_a_source_made_in_a_shard_may_draw_there():
    list(parallel.over_shards(lambda rows: Rng(0).normal((2, 3), first=rows.start), 4, 2))
    outer = Rng(0)
    list(parallel.over_shards(lambda rows: outer.child("noise").normal((2, 3), first=rows.start), 4, 2))
