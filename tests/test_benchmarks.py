"""The benchmarks measure what they say: the same nets, losses, samplers and ops on both sides, taking turns. No time is
asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, interop

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cases  # noqa: E402  which lie in that folder
import fresh  # noqa: E402
import measure  # noqa: E402
import ours  # noqa: E402
import report  # noqa: E402


@pytest.fixture
def theirs(torch, numpy_backend):
    return cases.torch_side()


# ---------------------------------------------------------------- the same on both sides


def pair(theirs, name):
    """A net and its twin with the same weights, none of them zero."""
    net, twin, rng = ours.net_of(name), theirs.net_of(name), Rng(3)
    for p in net.parameters():
        p.data = rng.normal(p.shape) * (0.1 if p.ndim > 1 else 0.5)
    twin.load_state_dict({key: theirs.torch.tensor(value) for key, value in interop.to_torch(net).items()})
    return net, twin


@pytest.mark.parametrize("name", ["concat", "add", "conditional", "latent", "quickstart", "autoencoder"])
def test_the_twins_have_the_same_loss(theirs, name):
    (net, twin), n = pair(theirs, name), 5
    batch = ours.batch_of(name, n)
    value = ours.loss_of(name, net)(*batch, rng=Rng(7), first=0)

    rng = Rng(7)  # draws as the loss does: uniform, (normal,) noise
    draws = [] if name == "autoencoder" else [rng.uniform(n)]
    draws += [rng.normal((n, 1, 1, 1)).ravel()] if name == "quickstart" else []
    draws += [] if name == "autoencoder" else [rng.normal(batch[0].shape).transpose(0, 3, 1, 2)]
    their_batch = theirs.batch_of(name, n, theirs.torch.contiguous_format)
    their_draws = tuple(theirs.torch.tensor(np.ascontiguousarray(a)) for a in draws)
    assert len(theirs.draw(name, their_batch[0])) == len(their_draws)
    their_value = theirs.loss(name, twin, their_batch, their_draws)
    assert float(value.data) == pytest.approx(their_value.item(), rel=1e-4)


def test_the_quickstarts_net_is_that_of_the_quickstart():
    assert ours.net_of("quickstart").net.count() == 504_228  # docs/results.md


@pytest.mark.parametrize("name", ["euler_maruyama", "heun"])
def test_the_twins_sample_by_the_same_algorithm(theirs, monkeypatch, name):
    """With noise that is a half everywhere both are deterministic."""
    net, twin = pair(theirs, "quickstart" if name == "heun" else "concat")
    monkeypatch.setattr(ours, "net_of", lambda _: net)
    monkeypatch.setattr(theirs, "net_of", lambda _: twin)
    monkeypatch.setattr(Rng, "normal", lambda self, shape, dtype="float32", first=0: np.full(shape, 0.5, dtype))
    monkeypatch.setattr(theirs.torch, "randn_like", lambda x: theirs.torch.full_like(x, 0.5))
    x = np.concatenate(ours.sampler(name, 3, 4, 1)())
    y = theirs.sampler(name, 3, 4, theirs.torch.contiguous_format)().numpy().transpose(0, 2, 3, 1)
    assert abs(x - y).max() < 1e-3 * abs(y).max()


@pytest.mark.parametrize("op", list(cases.all_ops()), ids=lambda op: op.name)
def test_an_op_is_the_same_on_both_sides(theirs, op):
    x = op.mine(*op.inputs(2))
    inputs = [theirs.torch.tensor(np.ascontiguousarray(a)) for a in op.their_inputs(2)]
    y = op.their(theirs.F)(*inputs).numpy()
    y = y.transpose(0, 2, 3, 1) if op.images else y
    assert x.shape == y.shape and abs(x - y).max() < 1e-4 * abs(y).max()


def test_an_op_in_shards_runs_every_row_and_adds_up_what_the_rows_share(each_backend):
    """The gradients of a plain call, taken from the calls that a run makes."""
    found = []

    def op(x, w):
        z = x * w
        found.append((x, w, z) if isinstance(z, Tensor) else None)
        return z

    inputs = [cases.normal(6, 3), cases.normal(3)]
    run = ours.single_op(op, inputs, 1, 1, 2)
    found.clear()
    run()
    shards = 1 if backend.name == "cupy" else 3
    assert len(found) == shards
    np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _, _ in found]), inputs[0])


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
    assert fresh.in_fresh_process("import", "numpy")() > 0
    with pytest.raises(measure.Unavailable, match="No module named 'no_such_module'"):
        fresh.in_fresh_process("import", "no_such_module")()


@pytest.mark.skipif(sys.platform != "linux" or backend.name == "cupy", reason="reads /proc, of a process on the CPU")
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
