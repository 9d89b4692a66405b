"""The benchmarks: rivals take turns, lines become tables. No time is asserted. That both sides compute the same is
asserted in tests/parity/test_benchmark_twins.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinydiff import backend, overlap

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402  which lie in that folder
import cost_model as cost  # noqa: E402
import fresh  # noqa: E402
import measure  # noqa: E402
import ours  # noqa: E402
import report  # noqa: E402


@pytest.mark.parametrize("size", [2, None])
def test_an_op_runs_every_row_and_adds_up_what_the_rows_share(each_backend, size):
    """In microbatches, or, as always with CuPy, in one plain call, which gives the gradient of x too."""
    seen = []

    def op(x, w):
        seen.append(x)
        return x * w

    x, w = cases.normal(6, 3), cases.normal(3)
    g = np.random.default_rng(1).standard_normal(x.shape, np.float32)  # the adjoint that a run takes
    run = ours.single_op(op, [x, w], batched=1, threads=1, size=size)
    seen.clear()
    plain = backend.name == "cupy" or size is None
    *of_x, found = run()
    assert len(seen) == (1 if plain else 3) and len(of_x) == plain
    np.testing.assert_array_equal(np.concatenate([part.numpy() for part in seen]), x)
    np.testing.assert_allclose(backend.to_host(found), (g * x).sum(0), rtol=1e-5)


# ---------------------------------------------------------------- how it is measured


def test_rivals_take_turns_and_one_that_is_not_to_be_had_says_why(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    calls = []

    def missing():
        raise measure.Unavailable("not here")

    rivals = {"tinydiff": lambda: lambda: calls.append("a"), "torch": lambda: lambda: calls.append("b"), "x": missing}
    result = measure.measure(measure.Case("a/b", rivals), 3, lambda: None)
    assert calls[-12:] == ["a", "a", "b", "b"] * 3  # of each two, the first is not timed
    assert result.unavailable == {"x": "not here"} and [len(t) for t in result.times.values()] == [3, 3]


def test_the_ratio_is_that_of_neighbours_to_the_better_format():
    times = {"tinydiff": [1.0, 2.0, 30.0], "torch": [9.0, 9.0, 9.0], "torch channels_last": [2.0, 8.0, 10.0]}
    result = measure.Result(measure.Case("a/b", {}), times)
    record = result.record({})
    assert record["counts"] == {"tinydiff": "tinydiff", "torch": "torch channels_last"}
    assert record["ratio"] == {"median": 0.5, "q1": 0.375, "q3": 1.75, "min": 0.25, "max": 3.0}
    assert measure.geometric_mean([1.0, 4.0]) == pytest.approx(2)


# ---------------------------------------------------------------- the command


def command(*arguments):
    path = os.pathsep.join([str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_writes_lines_of_which_the_report_makes_tables(tmp_path):
    out = tmp_path / "results.jsonl"
    options = ["--only", "softmax", "--only", "tiny/*gradient of x", "--pairs", 1, "--threads", 1, "--out", out]
    text = command(BENCHMARKS, *options)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["case"] for r in records] == ["softmax/4096 x 256", "tiny/x w + b on 4 numbers, gradient of x"]
    for r in records:
        assert r["case"] in text and r["rounds"] == 1 and r["date"] and "--pairs 1" in r["command"]
        assert r["machine"]["cpu"] and r["versions"]["numpy"] == np.__version__
        assert len(r["times"]["tinydiff"]) == 1 and r["times"]["tinydiff"][0] > 0
        assert r["ratio"] or "torch" in r["unavailable"]
    tables = command(BENCHMARKS / "report.py", out)
    assert "| softmax 4096 x 256 |" in tables and "| tiny x w + b on 4 numbers, gradient of x |" in tables

    page = report.PAGE.read_text()
    written = report.replaced(page, report.sections(records))
    assert "| softmax 4096 x 256 |" in written and report.replaced(written, report.sections(records)) == written


def test_what_needs_a_fresh_process_gets_one():
    for name in ("tinydiff", "numpy"):
        assert fresh.in_fresh_process("import", name)() > 0
    with pytest.raises(measure.Unavailable, match="measure was imported before"):
        fresh.in_fresh_process("import", "measure")()
    with pytest.raises(measure.Unavailable, match="No module named 'no_such_module'"):
        fresh.in_fresh_process("import", "no_such_module")()


@pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TINYDIFF_BACKEND") == "cupy",
    reason="reads /proc, of a process on the CPU",
)
def test_the_memory_of_a_step_is_that_of_its_process_alone():
    """The parent, this one, may be large: its peak must not hide that of the child."""
    ballast = np.ones(2**25)  # 256 MiB
    small, large = (fresh.in_fresh_process("memory", "tinydiff", "concat", str(n), "1")() for n in (1, 32))
    assert ballast.size and 0 < small < large < 256


def test_the_page_has_a_place_for_every_table():
    page = report.PAGE.read_text()
    for marker in [*report.SECTIONS, *(f"{marker}-gpu" for marker in ("nets", "ops", "tiny"))]:
        assert "| new |" in report.replaced(page, {marker: "| new |"})
    with pytest.raises(ValueError, match="no place for 'none'"):
        report.replaced(page, {"none": ""})


def test_every_family_of_the_report_has_cases():
    names = [c.name for c in cases.cases(cases.Options(threads=1, compiled=False))]
    assert len(names) == len(set(names))
    wanted = {family for families in report.SECTIONS.values() for family in families}
    if backend.name == "cupy":
        wanted -= {"scaling", "memory"}
    assert {name.split("/")[0] for name in names} == wanted


def test_two_checkouts_take_turns(tmp_path):
    """Here the same one twice: which is faster is not asserted."""
    root, out = str(BENCHMARKS.parents[1]), tmp_path / "out.jsonl"
    command = [sys.executable, BENCHMARKS / "checkouts.py", root, root, "--only", "tiny", "--rounds", "2", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heads, _, *lines = done.stdout.splitlines()
    assert heads == "| ms, median | before | after | ratio (quartiles) |"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(records) == 2
    for record in records:
        assert record["case"].startswith("tiny/") and 0 < record["before"] < 1000 and 0.001 < record["median"] < 1000


# ---------------------------------------------------------------- the model of cost

NET = cost.Network("by hand", latency=1.0, bandwidth=100.0, adding=50.0)


def test_sums_over_four_ranks_by_hand():
    # ring: 6 messages of 200 bytes, 1 + 2 s each, 3 of them added in 4 s. doubling: 2 rounds of 1 + 8 + 16 s.
    # halving: 4 latencies, 600 bytes sent twice, and added once.
    assert cost.ring(800, 4, NET) == 6 * 3 + 3 * 4
    assert cost.doubling(800, 4, NET) == 2 * 25
    assert cost.halving(800, 4, NET) == 4 + 12 + 12
    assert cost.allreduce(800, 4, NET) == 28
    assert cost.allreduce(0, 4, NET) == 2  # only latencies: doubling has the fewest
    assert cost.allreduce(800, 1, NET) == 0
    assert cost.allreduce(600, 3, NET) == 4 * 3 + 2 * 4  # halving is for powers of two


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_ring_sends_as_much_as_a_ring_that_is_played(ranks):
    """Every rank sends one part to the next, which adds it, until each part is whole somewhere; then they go round."""
    held = np.random.default_rng(0).integers(0, 99, (ranks, ranks, 5)).astype(float)  # (rank, part, numbers)
    whole, sent, seconds = held.sum(0), 0, 0.0
    for turn in range(2 * (ranks - 1)):
        parts = [(r, (r - turn) % ranks) for r in range(ranks)]
        messages = [held[r, p].copy() for r, p in parts]
        for (r, p), message in zip(parts, messages):
            adds = turn < ranks - 1
            held[(r + 1) % ranks, p] = message + (held[(r + 1) % ranks, p] if adds else 0)
        sent += messages[0].nbytes
        seconds += NET.latency + messages[0].nbytes / NET.bandwidth + adds * messages[0].nbytes / NET.adding
    assert (held == whole).all()
    size = whole.nbytes
    assert sent == pytest.approx(2 * (ranks - 1) / ranks * size)
    assert cost.ring(size, ranks, NET) == pytest.approx(seconds)


def test_sums_within_machines_first():
    inside = cost.Network("inside", latency=0.0, bandwidth=1000.0)
    # 2 ranks a machine swap 400 of 800 bytes twice, 0.8 s; 4 machines then sum 400 bytes each, 300 of them twice.
    outside = cost.Network("outside", latency=0.0, bandwidth=100.0)
    assert cost.hierarchical(800, 8, 2, inside, outside) == pytest.approx(0.8 + 6)
    assert cost.hierarchical(800, 2, 2, inside, outside) == pytest.approx(0.8)


def test_what_is_left_of_the_sending():
    assert cost.exposed(10, 8, buckets=1) == 10
    assert cost.exposed(2.5, 8, buckets=4) == 4  # of 10 s 6 are hidden in three quarters of the backward pass
    assert cost.exposed(2.5, 100, buckets=4) == 2.5  # the last bucket
    assert cost.exposed(0, 8, buckets=4) == 0


def test_the_model_has_the_buckets_of_the_code():
    assert cost.BUCKETS == overlap.MOST


def test_a_step_by_hand():
    costs = cost.Costs([(1, 2.0), (5, 10.0)], [(1, 1.0), (5, 9.0)], 5, 800, sum=0.5, pack=0.25, update=3.0)
    # 13 images are microbatches of 5, 5 and 3: 19 + 19 + (6 + 5) s, and two sums
    assert costs.step(13, 1, NET) == 19 + 19 + 11 + 1 + 3
    # 4 ranks have 4 images at most: 8 + 7 s; 28 s of sending
    assert costs.step(13, 4, NET) == 15 + 28 + 0.25 + 3
    # in two buckets, of 16 s each: half of the backward pass of 7 s is hidden
    assert costs.step(13, 4, NET, buckets=2) == 15 + 28.5 + 0.25 + 3
    assert costs.step(13, 4, NET, factor=0.5) == 15 + 16 + 0.25 + 3
    assert cost.efficiency(16, 4, 8, weak=False) == 0.5 and cost.efficiency(16, 20, 8, weak=True) == 0.8
    assert cost.last_good([(1, 16.0), (2, 9.0), (4, 8.0), (8, 5.0)], weak=False) == "4"


def test_the_roofline_takes_the_slower_of_products_and_bytes():
    assert cost.roofline([{"flop": 100, "moved": 10}, {"flop": 0, "moved": 30}], 10.0, 5.0) == 10 + 6


@pytest.mark.parametrize("name, method", [("concat", "euler_maruyama"), ("quickstart", "heun")])
def test_evaluations_of_a_sampler_are_counted_right(name, method, monkeypatch):
    net, seen = ours.net_of(name), []
    forward = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda *args, **named: seen.append(1) or forward(*args, **named))
    ours.sampler(method, 2, 3, threads=1)()
    assert len(seen) == cost.evaluations_of(name, 3)


def test_the_released_step_is_computing_sending_and_the_update():
    rows = [{"flop": cost.PEAK * cost.REACHED, "moved": 0}]  # one second of products for an image
    alone = cost.released_step(rows, 2, 1, cost.SLOW)
    update = 28 * 859_520_964 / 3.35e12
    assert alone == pytest.approx(3 * 2 + update)
    sending = 2 * 63 / 64 * 4 * 859_520_964 / 12.5e9 + 2 * 63 * 1e-5  # one ring of 64, by one card
    assert cost.released_step(rows, 2, 64, cost.SLOW, flat=True) == pytest.approx(alone + sending)


def test_what_was_measured_becomes_a_prediction():
    machine = {"engine": 0.25, "byte_rate": 100.0, "latency": 1.0, "bandwidth": 100.0, "adding": 50.0}
    alone = [{"images": n, "calls": 8, "forward": f, "backward": b, "draws": 0.5} for n, f, b in ((1, 1, 2), (4, 4, 8))]
    net = {"parameters": 25, "sizes": [4, 4, 1], "alone": alone, "adam": 3.0, "sum": 0.125}
    one = [{"machine": machine, "nets": {"a": net}}]
    # microbatches of 4: 4 + 8 s of ops, 0.5 of random numbers, 8 calls of 0.25; of 1: 3 + 0.5 + 2; two sums
    assert cost.predicted(one, "a") == 2 * 14.5 + 5.5 + 0.25 + 3
    slower = {"machine": machine, "nets": {"a": {**net, "adam": 5.0}}}
    # 100 bytes by doubling: 1 + 1 + 2 s; packed and unpacked: 400 bytes at 100 a second; Adam's mean is 4 s
    assert cost.predicted([*one, slower], "a") == 2 * 14.5 + 5.5 + 0.25 + 4 + 4 + 4
