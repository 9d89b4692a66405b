"""The profiler: exact counts on graphs that can be counted by hand; threads; and that it leaves no trace. No time is
asserted, but for what must hold of any clock."""

from __future__ import annotations

import importlib
import threading

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, nn, observers, ops, tensor
from tinydiff.microbatch import gradients

module = importlib.import_module("tinydiff.profile")  # tinydiff.profile is the function


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A machine that need not be measured: 1 GFLOP/s, 2 GB/s."""
    monkeypatch.setattr(module, "machine_rates", lambda threads: (1e9, 2e9))


def rows_of(step, **options):
    report = tinydiff.profile(step, show=False, **options)
    return {row.op: row for row in report.rows}


def leaf(*shape):
    return tensor(np.random.default_rng(0).standard_normal(shape).astype("float32"), requires_grad=True)


# ---------------------------------------------------------------- counted by hand


def test_calls_bytes_and_flop_of_a_small_graph(each_backend):
    """loss = sum tanh(x w): bytes are four times the elements of x 15, w 12, h = x w 20, z = tanh h 20."""
    x, w = leaf(5, 3), leaf(3, 4)
    rows = rows_of(lambda: tinydiff.grad(ops.tanh(x @ w).sum(), (x, w)))
    assert set(rows) == {"matmul", "tanh", "sum"}  # the ops that a rule calls count for its op
    assert all((row.calls, row.backward_calls) == (1, 1) for row in rows.values())
    product, tanh, total = rows["matmul"], rows["tanh"], rows["sum"]
    assert product.moved == 4 * ((15 + 12 + 20) + (20 + 15 + 12 + 15 + 12))  # x, w, h; h̄, x, w, x̄, w̄
    assert product.flop == 2 * 5 * 3 * 4 * 3 and product.kept == 0  # leaves are there anyway
    assert tanh.moved == 4 * ((20 + 20) + (20 + 20 + 20)) and tanh.kept == 4 * 20 and tanh.flop is None
    assert total.moved == 4 * ((20 + 1) + (1 + 20)) and total.kept == 0


def test_only_adjoints_that_are_wanted_count(each_backend):
    x, w = tensor(leaf(5, 3).data), leaf(3, 4)
    (product,) = (row for op, row in rows_of(lambda: tinydiff.grad((x @ w).sum(), w)).items() if op == "matmul")
    assert product.flop == 2 * 5 * 3 * 4 * 2


def test_an_array_that_two_rules_read_is_kept_once_and_a_view_moves_nothing(each_backend):
    if each_backend == "strict":
        pytest.skip("the base of a strict view is a new object in every access, so memory has no identity there")
    x = leaf(6)

    def step():
        h = ops.exp(x)  # kept by exp
        y = ops.reshape(h, shape=(2, 3)) * ops.reshape(h, shape=(2, 3))  # views of h, kept by multiply
        tinydiff.grad(ops.square(y).sum(), x)  # y is kept by square

    rows = rows_of(step)
    assert (rows["exp"].kept, rows["multiply"].kept, rows["square"].kept) == (24, 0, 24)
    assert rows["reshape"].calls == 2 and rows["reshape"].moved == 2 * (24 + 24)  # of the adjoints alone


def test_memory_that_no_array_owns_counts_too(numpy_backend):
    x, constant = leaf(4), np.frombuffer(np.ones(4, "float32").tobytes(), "float32")
    assert constant.base is not None
    assert rows_of(lambda: tinydiff.grad((x * constant).sum(), x))["multiply"].kept == 16


@pytest.mark.parametrize(
    ("op", "shapes", "row", "forward", "backward"),
    [
        # y (2, 4, 4, 6), of 3 x 3 x 2 products each
        (lambda x, w: ops.conv2d(x, w, stride=2, padding=1, groups=2), [(2, 8, 8, 4), (3, 3, 2, 6)],
         "conv2d_p", 2 * 192 * 18, 2),
        # each of the 2 x 3 x 3 x 5 elements of x is spread over 2 x 2 x 4
        (lambda x, w: ops.conv_transpose2d(x, w, stride=2), [(2, 3, 3, 5), (2, 2, 4, 5)],
         "conv2d_input_grad", 2 * 90 * 16, 2),
        # q k^T: 3 x 5 elements of 2 products; p v: 3 x 4 of 5. Back: g v^T 3 x 5 of 4, p^T g 5 x 4 of 3, two of q k^T
        (ops.attention, [(1, 1, 3, 2), (1, 1, 5, 2), (1, 1, 5, 4)], "scaled_dot_product_attention", 2 * (30 + 60), 2),
        (lambda x, y: ops.einsum("nij,jk->nik", x, y), [(2, 3, 4), (4, 5)], "einsum_p", 2 * 2 * 3 * 4 * 5, 2),
    ],
)  # fmt: skip
def test_flop_of_products(each_backend, op, shapes, row, forward, backward):
    inputs = [leaf(*shape) for shape in shapes]
    with tinydiff.no_grad():
        assert rows_of(lambda: op(*inputs))[row].flop == forward
    assert rows_of(lambda: tinydiff.grad(op(*inputs).sum(), inputs))[row].flop == (1 + backward) * forward


def test_a_bias_is_no_product():
    shapes, out = [(2, 8, 8, 4), (3, 3, 4, 6), (6,)], (2, 6, 6, 6)
    two, three = (module._flop("conv2d_p", shapes, out, {}, [True, True, bias]) for bias in (False, True))
    assert two == three == 2 * 2 * 432 * 36


def test_flop_of_the_derivative_of_a_convolution_by_its_weight(each_backend):
    """conv2d_weight_grad has a row of its own only where it is called as an op: in a second derivative."""
    x, w = leaf(1, 4, 4, 1), leaf(3, 3, 1, 1)
    (g,) = tinydiff.grad(ops.square(ops.conv2d(x, w)).sum(), w, create_graph=True)
    rows = rows_of(lambda: tinydiff.grad(g.sum(), w))
    assert rows["conv2d_weight_grad"].backward_calls == 1 and rows["conv2d_weight_grad"].flop == 2 * 4 * 9


def test_what_checkpoint_runs_again_counts_again(each_backend):
    x = leaf(4)
    rows = rows_of(lambda: tinydiff.grad(tinydiff.checkpoint(lambda x: ops.tanh(x), x).sum(), x))
    assert (rows["tanh"].calls, rows["tanh"].backward_calls) == (2, 1)


def test_second_derivatives_belong_to_the_op_whose_rule_they_are(each_backend):
    x = leaf(4)

    def step():
        (g,) = tinydiff.grad(ops.sin(x).sum(), x, create_graph=True)
        assert g.requires_grad

    assert {op: (row.calls, row.backward_calls) for op, row in rows_of(step).items()} == {"sin": (1, 1), "sum": (1, 1)}


# ---------------------------------------------------------------- times


def test_rows_fit_in_the_time_and_the_step_is_run_once_more_than_measured(each_backend):
    net, x, runs = nn.Sequential(nn.Linear(6, 5, rng=0), nn.SiLU(), nn.Linear(5, 1, rng=1)), leaf(8, 6), []

    def step():
        runs.append(0)
        tinydiff.grad(net(x).sum(), x)

    report = tinydiff.profile(step, repeat=3, show=False)
    assert len(runs) == 4 and report.threads == 1 and report.repeat == 3
    assert {row.op: row.calls for row in report.rows}["linear"] == 6  # all repeats together
    assert 0 < sum(row.seconds for row in report.rows) <= report.busy <= report.wall
    assert report.outside == report.wall - report.busy
    assert [row.seconds for row in report.rows] == sorted((row.seconds for row in report.rows), reverse=True)


def test_the_device_is_awaited_after_every_op(each_backend, monkeypatch):
    waits = []
    monkeypatch.setattr(module, "_wait", lambda: waits.append(0))
    x = leaf(4)
    rows = rows_of(lambda: tinydiff.grad(ops.tanh(x).sum(), x))
    assert len(waits) == 1 + 2 * sum(row.calls + row.backward_calls for row in rows.values())  # the rehearsal too


def test_threads_add_up(numpy_backend, op):
    """Both threads are held inside the op until the other has come, so both are in it at once."""
    together = threading.Barrier(2, timeout=60)

    def meet(x):
        together.wait()
        return x * 2

    meet = op(meet, lambda g, _y, _x: g * 2)
    x = leaf(4)

    def loss(_rows, rng, sample_offset):
        return meet(x[sample_offset : sample_offset + 2]).sum() * 2  # which counts half, as two of four rows

    def step():
        gradients(loss, [x], [np.zeros(4)], Rng(0), 2, threads=2)

    report = tinydiff.profile(step, show=False)
    rows = {row.op: row for row in report.rows}
    assert report.threads == 2 and (rows["meet"].calls, rows["meet"].backward_calls) == (2, 2)
    assert rows["meet"].moved == 2 * 4 * (2 + 2 + 2 + 2)
    assert sum(row.seconds for row in report.rows) <= 2 * report.busy and report.busy <= report.wall
    assert x.grad.tolist() == [2, 2, 2, 2]


def test_the_limit_is_the_slower_of_products_and_memory():
    report = module.Report([], 1, 1.0, 0.5, 1, flop_rate=1e9, byte_rate=2e9)
    assert report.limit(module.Row("a", flop=3_000_000_000, moved=2_000_000_000)) == 3
    assert report.limit(module.Row("a", flop=None, moved=8_000_000_000)) == 4


def test_the_table(capsys, each_backend):
    x, w = leaf(5, 3), leaf(3, 4)
    report = tinydiff.profile(lambda: tinydiff.grad((x @ w).sum(), (x, w)), repeat=2)
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    head, *lines = text.splitlines()
    assert head.split()[0] == "op" and head.endswith("limit ms")
    assert [line.split()[:2] for line in lines[:2]] == [[row.op, "1"] for row in report.rows]  # of one step
    assert "1.0 GFLOP/s" in text and "2.0 GB/s" in text and "2 steps measured" in text


def test_the_machine_is_measured(each_backend, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(module, "_SIDE", 32)
    monkeypatch.setattr(module, "_COPY", 1 << 12)
    for threads in (1, 2):
        flop_rate, byte_rate = module.machine_rates(threads)
        assert flop_rate > 0 and byte_rate > 0


# ---------------------------------------------------------------- it leaves no trace


def test_everything_is_put_back_also_after_an_error():
    during = []

    def step():
        during.extend(observers.observers)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tinydiff.profile(step)
    assert len(during) == 1 and not observers.observers
    assert rows_of(lambda: ops.exp(leaf(2)))["exp"].calls == 1  # and it can be used again


def test_an_error_inside_an_op_leaves_the_watch_usable(each_backend):
    def step():
        for _ in range(2):
            with pytest.raises(ValueError):
                ops.reshape(leaf(4), shape=(3,))
        ops.exp(leaf(2))

    rows = rows_of(step)
    assert set(rows) == {"exp"} and rows["exp"].calls == 1


def test_bad_arguments_and_a_profile_within_a_profile():
    with pytest.raises(ValueError, match="repeat must be 1 or more, not 0"):
        tinydiff.profile(lambda: None, repeat=0)
    with pytest.raises(RuntimeError, match="another step is being profiled"):
        tinydiff.profile(lambda: tinydiff.profile(lambda: None))
    assert tinydiff.profile(lambda: None, show=False).rows == []
