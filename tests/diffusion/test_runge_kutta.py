"""The adaptive solver by itself: its order, its estimate of the error, and the tables that both rest on."""

import numpy as np
import pytest

from tinydiff import backend
from tinydiff.diffusion.runge_kutta import ERROR, NODES, STAGES, solve


def test_the_tables_are_consistent():
    """Each stage is at the sum of its weights; the two orders agree on a constant derivative."""
    assert [sum(row) for row in STAGES] == pytest.approx(NODES) and sum(ERROR) == pytest.approx(0, abs=1e-15)


def derivative(t, y):
    return -y * y * (1 + t)


def fixed_steps(n):
    """n equal steps from y(0) = 1 to t = 1: where they lead, and the largest estimate of the error of one."""
    y, h, largest = 1.0, 1 / n, 0.0
    for i in range(n):
        k, new = [derivative(i * h, y)], y
        for c, row in zip(NODES, STAGES):
            new = y + h * sum(a * v for a, v in zip(row, k))
            k.append(derivative((i + c) * h, new))
        y, largest = new, max(largest, abs(h * sum(e * v for e, v in zip(ERROR, k))))
    return y, largest


def test_the_method_is_of_order_five_and_its_estimate_of_order_four(numpy_backend):
    """Twice as many steps divide the error at the end by 2^5, and the estimate of one step by 2^5 as well."""
    exact = 1 / (1 + 1 + 1 / 2)  # y = 1 / (1 + t + t^2 / 2)
    ends, estimates = zip(*(fixed_steps(n) for n in (16, 32, 64)))
    errors = [abs(y - exact) for y in ends]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(5, abs=0.3)
    assert np.log2(estimates[1] / estimates[2]) == pytest.approx(5, abs=0.1)
    *_, (_, end) = solve(lambda y, t: derivative(t[:, None], y), np.ones((1, 1)), 0.0, 1.0, rtol=1e-10, atol=1e-10)
    assert end.item() == pytest.approx(exact, rel=1e-9)


def test_it_goes_both_ways_and_each_row_at_its_own_pace(each_backend):
    """y' = -rate y: rows a hundred times as fast need more steps, and all arrive exactly at the end."""
    rate = backend.to_device(np.array([[1.0], [30.0], [100.0]]))
    start = backend.to_device(np.ones((3, 1)))
    seen = list(solve(lambda y, t: -rate * y, start, 0.0, 1.0, rtol=1e-9, atol=1e-12))
    t, y = (backend.to_host(a) for a in seen[-1])
    np.testing.assert_array_equal(t, 1.0)
    np.testing.assert_allclose(y[:, 0], np.exp([-1.0, -30.0, -100.0]), rtol=1e-6, atol=1e-11)
    arrived = [sum(backend.to_host(t)[i] < 1 for t, _ in seen) for i in range(3)]
    assert arrived[0] < arrived[1] < arrived[2] < len(seen)
    *_, (_, back) = solve(lambda y, t: -rate[:1] * y, backend.to_device(y[:1]), 1.0, 0.0, rtol=1e-9, atol=1e-12)
    assert backend.to_host(back) == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_the_relative_tolerance_is_one_of_the_size(numpy_backend, rtol):
    """y' = -y from 1e6: with the absolute tolerance alone, 1e-18 of that, no step would do."""
    *_, (_, y) = solve(lambda y, t: -y, np.full((1, 1), 1e6), 0.0, 1.0, rtol=rtol, atol=1e-12)
    error = abs(y.item() / (1e6 * np.exp(-1)) - 1)
    assert 0.01 * rtol < error < 10 * rtol


def test_numbers_of_numpy_leave_the_dtype_to_the_rows(numpy_backend):
    begin, end, tolerance = np.float64(0.7), np.float64(1e-3), np.float64(1e-4)
    *_, (t, y) = solve(lambda y, t: -y, np.ones((2, 1), np.float32), begin, end, rtol=tolerance, atol=tolerance)
    assert t.dtype == y.dtype == np.float32 and (t == np.float32(1e-3)).all()


def test_a_row_is_the_same_alone(each_backend):
    rate = backend.to_device(np.array([[1.0, 2.0], [30.0, 3.0]]))
    *_, (_, both) = solve(lambda y, t: -rate * y, backend.to_device(np.ones((2, 2))), 0.0, 1.0)
    *_, (_, one) = solve(lambda y, t: -rate[1:] * y, backend.to_device(np.ones((1, 2))), 0.0, 1.0)
    np.testing.assert_array_equal(backend.to_host(both)[1:], backend.to_host(one))


@pytest.mark.parametrize("begin", [1 / 97, 2 / 97, 5 / 97, 0.7])
def test_the_end_is_reached_although_sums_are_rounded(numpy_backend, begin):
    """In float32 begin + (end - begin) need not be end. A derivative of 0 takes steps of 1, 5, 25 and the rest."""
    seen = list(solve(lambda y, t: y * 0, np.ones((1, 1), np.float32), begin, 0.001))
    assert len(seen) == 5 and seen[-1][0][0] == np.float32(0.001)


def test_no_rows_are_no_error(each_backend):
    *_, (t, y) = solve(lambda y, t: -y, backend.to_device(np.ones((0, 2))), 0.0, 1.0)
    assert t.shape == (0,) and y.shape == (0, 2)


def test_bad_arguments_are_quoted():
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=f"steps must be an integer of 1 or more, not {steps}"):
            next(solve(lambda y, t: -y, np.ones((1, 1)), 0.0, 1.0, steps=steps))
    with pytest.raises(ValueError, match=r"rtol must be a number in \(0, inf\), not 0"):
        next(solve(lambda y, t: -y, np.ones((1, 1)), 0.0, 1.0, rtol=0))
