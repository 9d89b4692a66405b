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

from tinydiff import backend

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402  which lie in that folder
import fresh  # noqa: E402
import measure  # noqa: E402
import ours  # noqa: E402
import report  # noqa: E402


def test_an_op_in_microbatches_runs_every_row_and_adds_up_what_the_rows_share(each_backend):
    seen = []

    def op(x, w):
        seen.append(x)
        return x * w

    x, w = cases.normal(6, 3), cases.normal(3)
    g = np.random.default_rng(1).standard_normal(x.shape, np.float32)  # the adjoint that a run takes
    run = ours.single_op(op, [x, w], batched=1, threads=1, size=2)
    seen.clear()
    (found,) = run()
    assert len(seen) == (1 if backend.name == "cupy" else 3)
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
    assert calls[-6:] == ["a", "b"] * 3
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
