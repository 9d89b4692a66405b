"""Microbatches add up to the batch, come in order, and refuse what would depend on that order."""

from __future__ import annotations

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, microbatch, nn, ops, tensor
from tinydiff.backend import to_host
from tinydiff.microbatch import gradients, over_microbatches

X = to_host(Rng(2).normal((20, 6), "float64"))


def problem():
    """A net and its mean loss over rows of X."""
    net = nn.Sequential(nn.Linear(6, 5, rng=0), nn.SiLU(), nn.Linear(5, 3, rng=1)).astype("float64")
    return net, lambda x, rng, sample_offset: ops.mean(ops.sum(ops.square(net(tensor(x))), axis=1))


@pytest.mark.parametrize("size", [1, 3, 6, 20, 64])
def test_microbatches_add_up_to_the_whole(each_backend, size):
    net, loss = problem()
    whole = loss(X, Rng(0), 0)
    expected = tinydiff.grad(whole, list(net.parameters()))
    next(net.parameters()).grad = tensor(np.full((6, 5), 9.0))  # of an older step: it is replaced, not added to
    value = gradients(loss, list(net.parameters()), [X], Rng(0), size)
    assert float(value) == pytest.approx(whole.item(), rel=1e-12)
    for p, e in zip(net.parameters(), expected):
        np.testing.assert_allclose(p.grad.numpy(), e.numpy(), rtol=1e-10, atol=1e-12)


def test_the_loss_gets_its_sample_offset_and_draws_by_it(each_backend):
    seen = []

    def loss(x, rng, sample_offset):
        seen.append((sample_offset, to_host(rng.normal((len(x), 2), sample_offset=sample_offset))))
        return tensor(x, requires_grad=True).sum()

    for size in (20, 6):
        gradients(loss, [nn.Parameter(np.ones(1))], [X], Rng(7), size, threads=1)
    whole, *parts = seen
    assert [start for start, _ in parts] == [0, 6, 12, 18]
    np.testing.assert_array_equal(np.concatenate([z for _, z in parts]), whole[1])


def test_what_requires_no_gradient_gets_none(each_backend):
    net, loss = problem()
    net[0].weight.requires_grad = False
    gradients(loss, list(net.parameters()), [X], Rng(0), 6)
    assert [p.grad is None for p in net.parameters()] == [True, False, False, False]


def test_microbatches_of_microbatches_do_not_wait_for_each_other(each_backend):
    def inner(rows):
        return list(over_microbatches(lambda part: (rows.start, part.start), 2, 1, threads=2))

    pairs = list(over_microbatches(inner, 4, 1, threads=2))
    assert pairs == [[(i, 0), (i, 1)] for i in range(4)]


@pytest.mark.parametrize(
    "size, threads, message",
    [
        (0, None, "size must be an integer of 1 or more, not 0"),
        (1.5, None, "size .* not 1.5"),
        (float("nan"), None, "size .* not nan"),
        (1, 0, "threads must be an integer of 1 or more, not 0"),
        (1, 1.5, "threads .* not 1.5"),
        (True, 1, "size .* not True"),
    ],
)
def test_bad_sizes_are_errors_at_the_call_and_quoted(each_backend, size, threads, message):
    with pytest.raises(ValueError, match=message):
        over_microbatches(lambda rows: rows, 4, size, threads)
    with pytest.raises(ValueError, match=message):
        gradients(lambda x, rng, sample_offset: x.sum(), [], [X], Rng(0), size, threads)


def test_integers_of_numpy_are_as_good(each_backend):
    for threads in (1, 2):
        parts = list(
            over_microbatches(lambda rows: (rows.start, rows.stop), np.int64(5), np.int32(4), np.int64(threads))
        )
        assert parts == [(0, 4), (4, 5)]
    assert list(over_microbatches(lambda rows: rows.stop, 4, 4, np.int64(2))) == [4]  # its BLAS threads are two


def test_a_count_of_blas_threads_is_checked_before_anything_is_set(each_backend):
    for count in (0, 1.5):
        with pytest.raises(ValueError, match=f"blas_threads: count must be an integer of 1 or more, not {count}"):
            with microbatch.blas_threads(count):
                pass
    with microbatch.blas_threads(np.int64(1)):
        pass


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ((), ValueError, "the batch must be arrays of one length, not no arrays at all"),
        ((X, X[:3]), ValueError, r"the batch must be arrays of one length, not \[20, 3\]"),
        ((X[:0], X[:0]), ValueError, r"the batch is empty: its arrays have shapes \[\(0, 6\), \(0, 6\)\]"),
        (None, TypeError, "the batch must be arrays, not NoneType: None"),
        ((X, 5), TypeError, "the batch must be arrays with an axis of samples, not int: 5"),
        ((np.float64(2),), TypeError, "the batch must be arrays with an axis of samples, not float64"),
        ({"x": X}, TypeError, "the batch must be arrays with an axis of samples, not str: 'x'"),
    ],
)
def test_a_batch_of_anything_but_arrays_of_one_length_is_an_error(each_backend, batch, error, message):
    with pytest.raises(error, match=message):
        gradients(lambda *x, rng, sample_offset: x[0].sum(), [], batch, Rng(0), 4)


def test_a_batch_may_be_a_single_array_or_lists(each_backend):
    net, loss = problem()
    values = [float(gradients(loss, list(net.parameters()), batch, Rng(0), 6)) for batch in ([X], X, (X.tolist(),))]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 8])
def test_the_end_of_an_iterator_in_the_loss_is_not_the_end_of_the_batch(each_backend, threads, size):
    """A StopIteration that leaves the loop over the microbatches would end it in silence, with part of the gradient."""
    p, values = nn.Parameter(np.ones(3, np.float32)), iter([1.0] if size == 1 else [])

    def loss(x, rng, sample_offset):
        return ops.mean(x * p) * next(values)

    with pytest.raises(RuntimeError, match="StopIteration"):
        gradients(loss, [p], (np.ones((8, 3), np.float32),), Rng(0), size, threads)
    assert p.grad is None


def test_results_come_in_order_and_cover_every_row_once(each_backend):
    parts = list(over_microbatches(lambda rows: (rows.start, rows.stop), 10, 4, threads=3))
    assert parts == [(0, 4), (4, 8), (8, 10)]
    assert list(over_microbatches(lambda rows: rows, 0, 4)) == []


def test_they_record_if_the_caller_does(each_backend):
    x = tinydiff.tensor([1.0, 2.0], requires_grad=True)
    for threads in (1, 2):
        recorded = [y.requires_grad for y in over_microbatches(lambda rows: x[rows] * 2, 2, 1, threads)]
        with tinydiff.no_grad():
            silent = over_microbatches(lambda rows: x[rows] * 2, 2, 1, threads)
        assert recorded == [True, True] and [y.requires_grad for y in silent] == [False, False]


def test_while_a_result_is_used_the_mode_is_that_of_the_caller(each_backend):
    with tinydiff.no_grad():
        parts = over_microbatches(lambda rows: rows, 2, 1, threads=1)
    for _ in parts:
        assert tinydiff.grad_enabled() and tinydiff.rng.current_microbatch() is None


@pytest.mark.filterwarnings("ignore:divide by zero")  # NumPy says so too
def test_anomalies_are_found_in_microbatches_too(each_backend):
    x = tensor(np.array([1.0, 0.0]), requires_grad=True)
    loss = lambda rows, rng, sample_offset: ops.sum(1 / x[sample_offset : sample_offset + 1])  # noqa: E731
    with tinydiff.detect_anomaly(), pytest.raises(FloatingPointError, match="divide"):
        gradients(loss, [x], [np.zeros(2)], Rng(0), 1, threads=2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "layer, message",
    [
        (lambda: nn.Dropout(0.5, rng=0), "is shared by the microbatches"),
        (lambda: nn.BatchNorm2d(2), "several microbatches"),
    ],
)
def test_a_state_that_microbatches_would_share_is_an_error(each_backend, layer, message, threads):
    layer = layer()

    def draw(rows):
        return layer(tensor(np.ones((rows.stop - rows.start, 3, 3, 2), np.float32)))

    with pytest.raises(RuntimeError, match=message):
        list(over_microbatches(draw, 4, 2, threads))
    assert len(list(over_microbatches(draw, 4, 4, threads))) == 1, "one microbatch is the batch"
    layer.eval()
    assert len(list(over_microbatches(draw, 4, 2, threads))) == 2


def test_a_source_made_in_a_microbatch_may_draw_there(each_backend):
    list(over_microbatches(lambda rows: Rng(0).normal((2, 3), sample_offset=rows.start), 4, 2))
    outer = Rng(0)
    list(over_microbatches(lambda rows: outer.child("noise").normal((2, 3), sample_offset=rows.start), 4, 2))


def test_the_size_on_a_gpu_is_the_batch_and_on_a_cpu_what_a_cache_holds(each_backend):
    batches = [1, 32, 33, 64, 128, 129, 4096]
    sizes = [microbatch.microbatch_size(n) for n in batches]
    assert sizes == (batches if each_backend == "cupy" else [1, 32, 17, 32, 64, 64, 64])
    for n, expected in ((128, [128, 32, 32]), (256, [256, 16, 16]), (300, [150, 16, 16])):
        images = [microbatch.microbatch_size(n, numbers) for numbers in (10 * 10 * 4, 32 * 32 * 3, 256 * 256 * 3)]
        assert images == ([n] * 3 if each_backend == "cupy" else expected)


def test_a_parameter_that_is_given_twice_counts_once():
    p, x = nn.Parameter(np.ones((2, 3), "float32")), np.arange(24, dtype="float32").reshape(4, 2, 3)

    def loss(x, rng, sample_offset):
        return (p * x).mean(axis=0).sum()

    gradients(loss, [p, p], x, Rng(0), size=2)
    np.testing.assert_array_equal(p.grad.numpy(), x.mean(axis=0))
