"""Batches: every sample once per epoch, a new order in each epoch, and a step means the same after a restart."""

import numpy as np
import pytest

from tinydiff.data import Batches
from tinydiff.data.batches import permutation


def epoch_of(order, epoch):
    start = epoch * order.steps_per_epoch
    return [order.indices(step) for step in range(start, start + order.steps_per_epoch)]


@pytest.mark.parametrize("n, size", [(10, 5), (10, 3), (10, 10), (10, 11), (1, 1), (1, 64), (257, 64)])
@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_has_each_sample_at_most_once(n, size, drop_last):
    order = Batches(n, size, seed=1, drop_last=drop_last)
    for epoch in range(3):
        batches = epoch_of(order, epoch)
        seen = np.concatenate(batches)
        assert len(set(seen.tolist())) == len(seen) and 0 <= seen.min() and seen.max() < n
        assert all(batch.dtype == np.int64 and len(batch) for batch in batches)
        if drop_last:
            assert all(len(batch) == min(n, size) for batch in batches)
            assert n - len(seen) < size
        else:
            assert sorted(seen.tolist()) == list(range(n))
            assert all(len(batch) == size for batch in batches[:-1])


def test_what_is_dropped_is_others_each_epoch():
    order = Batches(10, 4, drop_last=True)
    dropped = {tuple(sorted(set(range(10)) - set(np.concatenate(epoch_of(order, e)).tolist()))) for e in range(8)}
    assert len(dropped) > 4


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_step_is_the_same_whatever_was_asked_before(drop_last):
    straight = Batches(23, 5, seed=7, drop_last=drop_last)
    expected = [straight.indices(step) for step in range(30)]
    for step in [29, 3, 0, 17, 17, 4, 5, 12]:
        np.testing.assert_array_equal(Batches(23, 5, seed=7, drop_last=drop_last).indices(step), expected[step])
        np.testing.assert_array_equal(straight.indices(step), expected[step])


def test_orders_differ_between_epochs_and_seeds():
    orders = [permutation(50, seed=seed, epoch=epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 16


def test_each_sample_is_as_likely_in_each_position():
    counts = np.zeros((5, 5))
    for epoch in range(2000):
        counts[np.arange(5), permutation(5, seed=0, epoch=epoch)] += 1
    assert abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)  # five standard deviations


def test_the_order_of_seed_0_is_fixed_for_good():
    """If this changes, no training run can be resumed or repeated."""
    assert Batches(10, 10).indices(0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_the_caller_may_write_into_a_batch():
    order = Batches(10, 5)
    order.indices(0)[:] = -1
    assert order.indices(0).min() >= 0


def test_locate():
    order = Batches(10, 3, drop_last=False)
    assert order.steps_per_epoch == 4
    assert [order.locate(step) for step in (0, 3, 4, 9)] == [(0, 0), (0, 3), (1, 0), (2, 1)]


def test_numpy_integers_and_the_largest_seed_work():
    assert len(Batches(np.int64(10), np.int32(4), seed=2**64 - 1).indices(np.int64(5))) == 4


def test_epochs_are_those_of_the_step_even_if_n_is_small():
    order = Batches(3, 64, drop_last=True)
    assert order.steps_per_epoch == 1
    assert sorted(order.indices(11).tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(order.indices(11), permutation(3, seed=0, epoch=11))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, 4), ValueError, "n must be an integer of 1 or more, not 0"),
        ((-3, 4), ValueError, "n must be an integer of 1 or more, not -3"),
        ((4, 0), ValueError, "batch_size must be an integer of 1 or more, not 0"),
        ((4, 2.0), ValueError, "batch_size must be an integer of 1 or more, not 2.0"),
        ((4, 2, -1), ValueError, "seed must be an integer from 0 to .*, not -1"),
        ((4, 2, 2**64), ValueError, "seed .* not 18446744073709551616"),
    ],
)
def test_bad_arguments_are_quoted(arguments, error, message):
    with pytest.raises(error, match=message):
        Batches(*arguments)


def test_a_negative_step_is_an_error():
    with pytest.raises(ValueError, match="step must be an integer of 0 or more, not -1"):
        Batches(4, 2).indices(-1)
