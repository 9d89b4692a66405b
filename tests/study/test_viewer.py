"""The viewer's page: its numbers are the engine's, its checks find wrong rules, and it fits two megabytes."""

from __future__ import annotations

import base64
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinydiff as td
from tinydiff import Rng, Tensor, backend, nn, ops
from tinydiff.__main__ import main
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.models.tutorial import ScoreUNet
from tinydiff.observers import observers
from tinydiff.study.examples import CALLS, example
from tinydiff.study.page_arrays import LEVELS, layout, shown
from tinydiff.study.viewer import save


def data_of(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def page(loss: Any, tmp_path: Path, *args: Any, **options: Any) -> Any:
    return data_of(save(loss, tmp_path / "page.html", *args, **options))


def kept(data: Any, number: int) -> np.ndarray:
    """The elements of an array that the page has, as it has them."""
    a = data["arrays"][number]
    return np.frombuffer(base64.b64decode(a["data"]), f"<f{a['bytes']}").reshape(a["crop"])


class Net(nn.Module):
    """Two layers, of which the second is used twice."""

    def __init__(self) -> None:
        self.first = nn.Linear(3, 4, rng=Rng(0))
        self.second = nn.Linear(4, 4, rng=Rng(1))

    def forward(self, x: Any) -> Any:
        h = ops.tanh(self.first(x))  # (N, 3) -> (N, 4)
        return self.second(ops.tanh(self.second(h)))


def small(dtype: str = "float32") -> tuple[Any, Net]:
    net = Net().astype(dtype)
    x = Rng(2).normal((2, 3), dtype)
    return ops.sum(ops.square(net(x))), net


# ---------------------------------------------------------------- its numbers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_its_gradients_are_those_of_the_engine_bit_for_bit(each_backend: str, tmp_path: Path, dtype: str) -> None:
    loss, net = small(dtype)
    data = page(loss, tmp_path, net)
    assert all(p.grad is None for p in net.parameters())
    loss.backward()  # the graph is still there
    found = {leaf["name"]: kept(data, leaf["g"]) for leaf in data["leaves"]}
    assert set(found) == {name for name, _ in net.named_parameters()}
    for name, p in net.named_parameters():
        assert p.grad is not None and found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], backend.to_host(p.grad._data))
    assert {n["verdict"] for n in data["nodes"]} == {"right"}


def test_every_adjoint_is_that_of_grad(numpy_backend: str, tmp_path: Path) -> None:
    """Of intermediate results too, with the parts that add up to it."""
    x = td.tensor(np.linspace(-1, 1, 6).reshape(2, 3), requires_grad=True)
    b = td.tensor([0.5, -0.25, 1.0], dtype="float64", requires_grad=True)
    y = x * b
    z = ops.exp(y) + y * y
    loss = ops.sum(z)
    data = page(loss, tmp_path, names={"x": x, "b": b, "y": y, "z": z})
    for node in data["nodes"]:
        named = {"y": y, "z": z}.get(node["name"])
        if named is not None:
            (g,) = td.grad(loss, named)
            np.testing.assert_array_equal(kept(data, node["g"]), g.data)
            np.testing.assert_array_equal(kept(data, node["out"]), named.data)
    y_node = next(n for n in data["nodes"] if n["name"] == "y")
    assert len(y_node["from"]) == 3
    parts = [kept(data, data["nodes"][m]["inputs"][i]["to"]) for m, i in y_node["from"]]
    np.testing.assert_allclose(sum(parts), kept(data, y_node["g"]), rtol=1e-15)
    used = [data["nodes"][m]["inputs"][i] for m, i in y_node["from"]]
    assert [(u["part"], u["parts"]) for u in used] == [(1, 3), (2, 3), (3, 3)]
    np.testing.assert_array_equal(kept(data, used[1]["sum"]), parts[0] + parts[1])
    to_b = y_node["inputs"][1]  # the rule gives (2, 3), the engine sums it to (3,)
    np.testing.assert_array_equal(kept(data, to_b["raw"]), kept(data, y_node["g"]) * x.data)
    np.testing.assert_array_equal(kept(data, to_b["to"]), kept(data, to_b["raw"]).sum(axis=0))


def test_the_sum_of_an_element_is_the_chain_rule(numpy_backend: str, tmp_path: Path) -> None:
    a = td.tensor([[1.0, 2.0], [3.0, 4.0]], dtype="float64", requires_grad=True)
    w = td.tensor([[0.5, -1.0], [2.0, 0.25]], dtype="float64", requires_grad=True)
    v = np.array([[1.0, 10.0], [100.0, 1000.0]])
    data = page(a @ w, tmp_path, names={"a": a, "w": w}, grad=v)
    to_w = data["nodes"][0]["inputs"][1]
    check = next(c for c in to_w["checks"] if c["at"] == [0, 1])  # the sum over n of v[n, 1] a[n, 0]
    assert check["value"] == 10 * 1 + 1000 * 3
    assert check["numeric"] == pytest.approx(3010, rel=1e-14)
    assert [(j, g, pytest.approx(d)) for g, d, j in check["terms"]] == [([1, 1], 1000.0, 3.0), ([0, 1], 10.0, 1.0)]
    jacobian = kept(data, to_w["jacobian"])  # of (a w)_nk by w_mk, a_nm, in rows n k and columns m k
    np.testing.assert_allclose(jacobian, np.kron(a.data, np.eye(2)), atol=1e-15)
    np.testing.assert_allclose(v.ravel() @ jacobian, kept(data, to_w["to"]).ravel())


def test_values_that_no_rule_reads_are_computed_again_or_said_to_be_unknown(numpy_backend: str, tmp_path: Path) -> None:
    x = td.tensor([1.0, 2.0], requires_grad=True)
    y = ops.exp(x) + 1  # nothing keeps x + 1
    data = page(ops.sum(y), tmp_path)
    node = next(n for n in data["nodes"] if n["op"] == "add")
    assert node["origin"] == "computed again for this page"
    np.testing.assert_array_equal(kept(data, node["out"]), y.data)
    unknown = page(ops.sum(ops.exp(x) + np.ones(2, np.float32)), tmp_path)  # nothing keeps the constant
    node = next(n for n in unknown["nodes"] if n["op"] == "add")
    assert node["out"] is None and "not kept" in node["origin"] and node["inputs"][1]["array"] is None
    assert node["verdict"] == "right"


# ---------------------------------------------------------------- its checks


@pytest.mark.parametrize("name", sorted(CALLS))
def test_no_right_rule_is_called_wrong(each_backend: str, tmp_path: Path, name: str) -> None:
    for dtype in ("float32", "float64") if each_backend == "numpy" else ("float32",):
        result, names = example(name, dtype)
        grad = None if result.size == 1 else Rng(3).normal(result.shape, str(result.dtype))
        data = page(result, tmp_path, names=names, grad=grad)
        assert [(n["op"], n["verdict"]) for n in data["nodes"] if n["verdict"] != "right"] == []


WRONG = {
    "half": lambda g, x, y: (g * y, g * x / 2),
    "another sign": lambda g, x, y: (-g * y, g * x),
    "the wrong factor": lambda g, x, y: (g * x, g * x),
    "one element": lambda g, x, y: (g * y + (x == x.max()), g * x),
    "nothing": lambda g, x, y: (g * 0, g * x),
    "NaN": lambda g, x, y: (g * np.nan, g * x),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_rule_is_found_and_no_other(
    numpy_backend: str, tmp_path: Path, op: Any, wrong: str, dtype: str
) -> None:
    product = op(lambda x, y: x * y, lambda g, _z, x, y: WRONG[wrong](g, x, y))
    x, y = (Tensor(Rng(i).normal((40, 30), dtype), True) for i in (0, 1))
    data = page(ops.sum(ops.tanh(product(ops.exp(x), y))), tmp_path)
    assert {n["op"]: n["verdict"] for n in data["nodes"]} == {
        "sum": "right", "tanh": "right", product.name: "wrong", "exp": "" if wrong == "NaN" else "right",
    }  # fmt: skip


def test_a_kink_is_no_error(numpy_backend: str, tmp_path: Path) -> None:
    x = td.tensor([-1.0, 0.0, 2.0], dtype="float64", requires_grad=True)
    data = page(ops.sum(ops.relu(x)), tmp_path)
    assert {n["verdict"] for n in data["nodes"]} == {"right"}
    checks = next(n for n in data["nodes"] if n["op"] == "relu")["inputs"][0]["checks"]
    assert [c["verdict"] for c in checks if c["at"]] == ["right", "kink", "right"]


def test_without_time_nothing_is_checked_and_the_page_says_so(numpy_backend: str, tmp_path: Path) -> None:
    data = page(small()[0], tmp_path, seconds=0.0)
    assert {n["verdict"] for n in data["nodes"]} == {""}


# ---------------------------------------------------------------- the mistake


def test_recursion_passes_on_what_has_arrived_first(numpy_backend: str, tmp_path: Path) -> None:
    """y = x^2, z = y sin y, by hand: y gets sin y through the product, passes on that, and gets y cos y too late."""
    x = td.tensor(1.25, dtype="float64", requires_grad=True)
    y = ops.square(x)
    z = y * ops.sin(y)
    data = page(z, tmp_path, names={"x": x, "y": y, "z": z})
    by_name = {data["nodes"][v["node"]]["name"]: v for v in data["recursion"]["visits"]}
    s, c, u = math.sin(y.item()), math.cos(y.item()), y.item()
    assert (by_name["y"]["got"], by_name["y"]["of"]) == (1, 2)
    assert kept(data, by_name["y"]["g"]) == pytest.approx(s)
    assert kept(data, data["recursion"]["leaves"][0]["g"]) == pytest.approx(2 * 1.25 * s)
    assert kept(data, data["leaves"][0]["g"]) == pytest.approx(2 * 1.25 * (s + u * c))
    assert by_name["y"]["error"] == pytest.approx(abs(u * c / (s + u * c)))
    assert by_name["z"]["error"] == 0


def test_recursion_does_no_harm_to_a_chain_however_long(numpy_backend: str, tmp_path: Path) -> None:
    y = td.tensor([0.5], dtype="float64", requires_grad=True)
    for _ in range(1200):  # more than the recursion limit
        y = y + 0.001
    data = page(y, tmp_path, seconds=0.0)
    assert [v["error"] for v in data["recursion"]["visits"]] == [0] * 1200
    assert data["recursion"]["leaves"][0]["error"] == 0


# ---------------------------------------------------------------- the page as a file


def test_the_tutorials_net_fits_two_megabytes_and_has_one_row_per_module(numpy_backend: str, tmp_path: Path) -> None:
    process = VESDE(25.0)
    net = ScoreUNet(process.marginal_std, rng=Rng(0))
    loss = score_matching_loss(net, Rng(1).normal((2, 28, 28, 1), "float32"), process, Rng(2))
    path = save(loss, tmp_path / "unet.html", seconds=1.5)  # finds the net by itself
    assert path.stat().st_size < 2_000_000
    data = data_of(path)
    rows = [row["path"] for row in data["rows"] if not row["ops"]]
    layers = {name.rpartition(".")[0] for name, _ in net.named_parameters()}
    assert len(rows) == len(set(rows)) and set(rows) == layers
    others = {row["ops"] for row in data["rows"] if row["ops"]}  # between the layers: no reshape stands alone
    assert others == {"divide, sum, square, add, multiply", "concatenate_p", "silu"}
    assert sorted(n for row in data["rows"] for n in row["nodes"]) == list(range(len(data["nodes"])))
    verdicts = [n["verdict"] for n in data["nodes"]]
    assert "wrong" not in verdicts and "right" in verdicts
    late = {data["nodes"][v["node"]]["name"]: (v["got"], v["of"]) for v in data["recursion"]["visits"]}
    assert (1, 7) in late.values()  # the embedded time, which seven layers read
    assert sum(leaf["error"] > 0 for leaf in data["recursion"]["leaves"]) == 17 and len(data["leaves"]) == 39


@pytest.mark.parametrize("shape", [(), (0,), (5,), (100,), (3, 2), (40, 50), (3, 4, 5), (9, 40, 2), (2, 28, 28, 1),
                                   (64, 26, 26, 32), (3, 3, 64, 128), (2, 3, 4, 5, 6), (1, 676, 32, 1)])  # fmt: skip
@pytest.mark.parametrize("kernel", [False, True])
def test_the_first_elements_are_kept_as_they_are(shape: tuple[int, ...], kernel: bool) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for most in LEVELS:
        record = shown(array, kernel, most)
        found = np.frombuffer(base64.b64decode(record["data"]), "<f4").reshape(record["crop"])
        np.testing.assert_array_equal(found, array[tuple(slice(n) for n in record["crop"])])
        assert found.size <= max(most, 4) and bool(record["said"]) == (found.size < array.size)
        axes, crop = layout(shape, kernel, most)
        assert len(set(axes)) == len(axes) == min(len(shape), 4 if len(shape) == 4 else 3)


def test_what_does_not_fit_is_cut_further(numpy_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinydiff.study.viewer.SIZE", 60_000)
    x = Tensor(Rng(0).normal((16, 26, 26, 64), "float32"), True)
    path = save(ops.sum(ops.tanh(x)), tmp_path / "large.html", seconds=0.0)
    record = data_of(path)["arrays"][0]
    assert len(record["data"]) < 20_000
    assert "of 16 images" in record["said"] and "of 64 channels" in record["said"]


def test_text_from_the_program_cannot_end_the_script(numpy_backend: str, tmp_path: Path) -> None:
    x = td.tensor([1.0], requires_grad=True)
    path = save(ops.exp(x), tmp_path / "<b>&.html", names={"</script><b>": x})
    text = path.read_text()
    assert text.count("</script>") == 2 and "<title>&lt;b>&amp;: a backward pass</title>" in text
    assert data_of(path)["leaves"][0]["name"] == "</script><b>"


def test_the_page_asks_for_nothing_from_outside(numpy_backend: str, tmp_path: Path) -> None:
    text = save(small()[0], tmp_path / "page.html").read_text()
    without_data = re.sub(r'id="data">.*?</script>', "", text, flags=re.S)
    assert not re.findall(r"https?:|src=|@import|url\(|<link|fetch\(|XMLHttp", without_data)


def test_checkpoint_is_one_node_and_may_leave_out_an_input(numpy_backend: str, tmp_path: Path) -> None:
    x, y = (td.tensor([n], requires_grad=True) for n in (2.0, 3.0))
    z = td.checkpoint(lambda a, b: a * (b * 2.0).detach(), ops.exp(x), ops.exp(y))
    data = page(ops.sum(z), tmp_path)
    assert [(n["op"], n["verdict"]) for n in data["nodes"]] == [("sum", "right"), ("checkpoint", ""), ("exp", "right")]
    assert len(data["leaves"]) == 1 and sum("to" in x for x in data["nodes"][1]["inputs"]) == 1


def test_it_is_found_by_its_name() -> None:
    assert td.study.save is save


def test_nothing_is_left_behind(numpy_backend: str, tmp_path: Path) -> None:
    """No observer; and hooks have not run."""
    x = td.tensor([1.0], requires_grad=True)
    seen: list[Any] = []
    y = ops.exp(x)
    y.register_hook(seen.append)
    page(ops.sum(y), tmp_path)
    assert not observers and not seen and x.grad is None


def test_the_rule_in_float32_near_saturation_is_not_called_wrong(numpy_backend: str, tmp_path: Path) -> None:
    x = Tensor(np.array([5.0, 8.0, 8.8, 12.0], np.float32), True)  # 1 - y y has lost most of its digits
    data = page(ops.sum(ops.tanh(x) * np.float32(1000)), tmp_path)
    assert {n["verdict"] for n in data["nodes"]} == {"right"}


@pytest.mark.parametrize("options, message", [({"elements": -1}, "elements"), ({"seconds": -1.0}, "seconds")])
def test_options_are_checked(numpy_backend: str, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(small()[0], tmp_path / "page.html", **options)
    with pytest.raises(RuntimeError, match="not computed from any Tensor"):
        save(td.tensor([1.0]), tmp_path / "page.html")


# ---------------------------------------------------------------- python -m tinydiff view


SCRIPT = """
    import sys
    import threading
    import tinydiff as td
    from tinydiff import nn, ops

    print("began with", sys.argv[1:])
    net = nn.Linear(2, 3, rng=0)
    for step in range(3):
        loss = ops.sum(ops.square(net(td.tensor([[1.0, step]]))))
        if "--thread" in sys.argv:
            import concurrent.futures
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            ops.sum(td.checkpoint(lambda x: x * net.bias, loss)).backward()
        print("passed", step)
    if "--fail" in sys.argv:
        sys.exit("it went wrong")
"""


@pytest.mark.parametrize("thread", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_view_saves_the_pass_of_a_script(
    numpy_backend: str, tmp_path: Path, capsys: Any, number: int, thread: bool
) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.html"
    script.write_text(textwrap.dedent(SCRIPT))
    given = ["--pass", str(number), "--out", str(out), str(script), "--out", "its own", *["--thread"] * thread]
    assert main(["view", *given]) == 0
    said = capsys.readouterr().out
    assert "began with ['--out', 'its own'" in said
    assert said.count("passed") == number - 1 and str(out) in said
    data = data_of(out)
    assert {leaf["name"] for leaf in data["leaves"]} == {"weight", "bias"}
    x = next(n["inputs"][0] for n in data["nodes"] if n["op"] == "linear")
    np.testing.assert_array_equal(kept(data, x["array"]), [[1, number - 1]])
    assert not observers


def test_view_says_when_there_is_no_such_pass(numpy_backend: str, tmp_path: Path, capsys: Any) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.html"
    script.write_text(textwrap.dedent(SCRIPT))
    assert main(["view", "--pass", "4", "--out", str(out), str(script), "--fail"]) == 1
    said = capsys.readouterr().err
    assert "it went wrong" in said and "ended after 3 backward passes" in said and not out.exists()


def test_view_does_not_call_a_page_saved_that_is_not(numpy_backend: str, tmp_path: Path, capsys: Any) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.html"
    out.mkdir()  # so that no file can have this name
    script.write_text(
        "import tinydiff as td\n"
        "try:\n    td.tensor([1.0], requires_grad=True).sum().backward()\n"
        "except Exception:\n    pass\n"
    )
    with pytest.raises(OSError, match="out.html"):
        main(["view", "--out", str(out), str(script)])
    assert "open it in a browser" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--pass", "0", __file__], ["--seconds", "-1", __file__], ["no_such_script.py"]])
def test_view_refuses_what_makes_no_sense(capsys: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(["view", *arguments])
    assert "error: " in capsys.readouterr().err


def test_view_without_a_script_asks_for_nothing_else(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["view"])
    assert capsys.readouterr().err.endswith("are required: SCRIPT\n")
