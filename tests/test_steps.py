"""The engine in steps: every file runs and agrees with tinydiff, and what a step calls wrong or slow is so.

They take no arguments, and so are not among the examples of test_examples.py.
"""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinydiff
from tinydiff import ops

pytestmark = pytest.mark.usefixtures("numpy_backend")  # the steps are NumPy's
STEPS = Path(__file__).parent.parent / "examples" / "steps"
FILES = sorted(STEPS.glob("*.py"))
sys.path.insert(0, str(STEPS))  # as Python does for a script


def step(n):
    return importlib.import_module(next(path.stem for path in FILES if path.stem.startswith(f"step{n:02}_")))


PRINTS = {  # what the reader is to check by hand
    1: ["L = add(multiply(2.0, 3.0), 2.0) = 8.0", "by hand:         x̄ = 4.0, ȳ = 2.0", "x̄ = 4.000, ȳ = 2.000"],
    2: ["x̄ = 4.0, ȳ = 2.0", "x̄ = 4, but 6.0", "rules called: 65535, nodes: 16"],
    3: ["x̄ = 4.0, ȳ = 2.0", "rules called: 16, nodes: 16", "rules called: 1000, nodes: 1000", "x̄ = 10000"],
    4: ["z̄     = [ 0.75 -0.5  -0.25]", "the rule = [ 0.75 -0.5  -0.25]"],
    5: ["b̄ = [11. 22. 33.]", "shape (2, 3), and b is (3,)", "[[60.0], [60.0]]"],
    6: ["step 2000   loss 0.000"],
    7: ["as if it were right"],
    8: ["[8.0, 12.0, 12.0, 6.0, 0.0]", "[0.0, 1.0, -0.0, -2.0, 0.0, 16.0]", "[[6.0, 4.0], [4.0, 0.0]]", "0.0, not 12"],
    9: ["88,000 bytes with the engine of step 8", "x y             16,000 bytes", "freed by the first"],
    10: ["w̄ = [[12. 16.]\n     [24. 28.]]", "by patches: True", "-40.0 -40.0 -40.0"],
    11: ["xhat = [-1.  1.]", "x̄ = [0. 0.]", "the op    keeps   4,128", "composed  keeps   8,320"],
    12: ["from noise alone:"],
}


def test_there_are_twelve_and_their_pages_name_them() -> None:
    assert [int(path.stem[4:6]) for path in FILES] == list(PRINTS) == list(range(1, 13))
    for page in (STEPS / "README.md", STEPS.parent.parent / "docs" / "steps.md"):
        assert all(f"{path.name})" in page.read_text() for path in FILES)


@pytest.mark.parametrize("n", [*range(1, 12), pytest.param(12, marks=pytest.mark.slow)])
def test_it_runs_and_prints_what_can_be_checked_by_hand(n, capsys) -> None:
    with np.printoptions():  # which some change, as a script may
        runpy.run_path(str(FILES[n - 1]), run_name="__main__")
    printed = capsys.readouterr().out
    for line in PRINTS[n]:
        assert line in printed


def test_it_runs_as_a_script_from_anywhere(tmp_path) -> None:
    command = [sys.executable, str(FILES[10])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "largest difference" in done.stdout, done.stderr


# ---------------------------------------------------------------- what is called wrong, or slow, is so


@pytest.mark.parametrize("n", [1, 5, 10])
def test_recursion_calls_a_rule_for_every_path_and_the_order_one_for_every_node(n, monkeypatch) -> None:
    before, after = step(2), step(3)
    assert before.backward(before.doublings(before.Tensor(1.0), n)) == 2**n - 1
    calls, rule = [], after.add.rule
    monkeypatch.setattr(after.add, "rule", lambda g, *rest: calls.append(g) or rule(g, *rest))
    x = after.Tensor(1.0)
    after.doublings(x, n).backward()
    assert len(calls) == n and x.grad == 2**n


def test_passing_on_all_that_has_arrived_is_wrong_on_a_shared_node_and_right_on_a_tree() -> None:
    s = step(2)
    x = s.Tensor(1.0)
    s.wrong_backward(s.doublings(x, 2))
    assert x.grad == 6.0
    x, y = s.Tensor(2.0), s.Tensor(3.0)
    s.wrong_backward(x * y)
    assert (x.grad, y.grad) == (3.0, 2.0)


def test_weights_of_one_hide_the_wrong_rule_and_random_ones_find_it() -> None:
    s = step(7)
    x = np.random.default_rng(0).normal(size=(3, 4))
    assert s.gradcheck(s.wrong_softmax, x, weights=np.ones((3, 4))) < 1e-15
    assert s.gradcheck(s.wrong_softmax, x) > 0.01
    assert s.gradcheck(s.softmax, x) < 1e-14


def test_without_create_graph_there_is_no_second_derivative() -> None:
    x = step(8).tensor(2.0)
    assert step(8).grad(step(8).grad(x * x * x, [x])[0], [x])[0].data == 0.0
    x = step(9).tensor(2.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not depend"):
        step(9).grad(step(9).grad(x * x * x, [x])[0], [x])
    (first,) = step(9).grad(x * x * x, [x], create_graph=True)
    assert step(9).grad(first, [x])[0].data == 12.0


def test_what_is_kept() -> None:
    s = step(9)
    x, y = (s.tensor(np.ones(1000), requires_grad=True) for _ in range(2))
    kept = [s.kept_bytes(z) for z in (x + y, x * y, s.tanh(x), s.ten_additions(x))]
    assert kept == [0, 16_000, 8_000, 0]
    with s.no_grad():
        assert s.tanh(x * y).node is None
    assert (s.tensor([1.0]) * 2.0).node is None


# ---------------------------------------------------------------- the gradients are tinydiff's


def gradients(engine, functions, f, arrays, adjoint=None):
    """f(functions, *leaves), and its gradients, as arrays."""
    asks = {} if engine in (step(4), step(5), step(6), step(8)) else {"requires_grad": True}  # there all leaves do
    leaves = [engine.tensor(a, **asks) for a in arrays]
    z = f(functions, *leaves)
    z.backward(adjoint)
    return [z.data, *(x.grad if isinstance(x.grad, np.ndarray) else x.grad.data for x in leaves)]


def random(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


CASES = {
    "shared": (lambda f, x, y: f.sum(x * y + x + x * x), [(3, 4), (3, 4)], 4),
    "softmax": (lambda f, x, y: f.sum(f.softmax(x) * y), [(5,), (5,)], 4),
    "broadcast": (lambda f, x, y: f.sum((x - y) * (x + 2.0 * y)), [(3, 1), (2, 1, 4)], 5),
    "reduce": (lambda f, x, y: f.sum(f.sum(x, axis=1) * f.mean(y, axis=(0, 2))), [(2, 3, 3), (3, 3, 4)], 5),
    "net": (lambda f, x, w, v: f.mean(f.tanh(x @ w) @ v), [(5, 3), (3, 4), (4, 2)], 6),
}


WHOLE = [(name, n) for name, (_, _, first) in CASES.items() for n in (4, 5, 6, 8, 9) if n >= first]


@pytest.mark.parametrize(("name", "n"), WHOLE)
def test_gradients_of_the_engine_are_tinydiffs(name, n) -> None:
    f, shapes, _ = CASES[name]
    arrays = random(*shapes)
    for ours, theirs in zip(gradients(step(n), step(n), f, arrays), gradients(tinydiff, ops, f, arrays)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


class Steps:
    """The functions of steps 9 to 11 under one name."""

    tensor = staticmethod(step(9).tensor)

    def __getattr__(self, name):
        return next(getattr(step(n), name) for n in (11, 10, 9) if hasattr(step(n), name))


LAYERS = {
    "conv2d": (lambda f, x, w: f.conv2d(x, w, stride=2, padding=1), [(2, 5, 6, 3), (3, 3, 3, 4)]),
    "conv_transpose2d": (lambda f, y, w: f.conv_transpose2d(y, w, stride=2, padding=1), [(2, 3, 4, 4), (3, 3, 2, 4)]),
    "silu": (lambda f, x: f.silu(x), [(3, 4)]),
    "group_norm": (lambda f, x, w, b: f.group_norm(x, w, b, groups=2), [(2, 3, 3, 4), (4,), (4,)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_layers_are_tinydiffs_and_the_second_ones_too(name) -> None:
    f, shapes = LAYERS[name]
    arrays, found = random(*shapes), []
    for engine, functions, grad in ((step(9), Steps(), step(9).grad), (tinydiff, ops, tinydiff.grad)):
        leaves = [engine.tensor(a, requires_grad=True) for a in arrays]
        z = f(functions, *leaves)
        (adjoint,) = random(z.shape, seed=1)
        first = grad(z, leaves, adjoint, create_graph=True)
        total = functions.sum(first[0] * first[0])
        for g in first[1:]:
            total = total + functions.sum(g * g)
        second = grad(total, leaves)
        found.append([z.data, *(g.data for g in (*first, *second))])
    for ours, theirs in zip(*found):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_norm_without_a_rule_has_the_same_gradient() -> None:
    s, arrays = step(11), random((2, 3, 3, 4), (4,), (4,))
    (adjoint,) = random((2, 3, 3, 4), seed=1)
    found = [
        gradients(step(9), s, lambda f, *xs, norm=norm: f.group_norm(*xs, groups=2, norm=norm), arrays, adjoint)
        for norm in (s.normalize, s.composed_norm)
    ]
    for ours, theirs in zip(*found):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


LOSSES = (
    "import step12_unet as s, numpy as np; rng = np.random.default_rng(0); print(s.train(s.new_weights(rng), rng, 5))"
)


def test_the_unet_has_the_same_losses_on_both_engines() -> None:
    path = os.pathsep.join([str(STEPS), str(STEPS.parent.parent), os.environ.get("PYTHONPATH", "")])
    losses = []
    for options in ([], ["--steps"]):
        command = [sys.executable, "-c", LOSSES, *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        losses.append(eval(done.stdout))
    np.testing.assert_allclose(*losses, rtol=1e-9)
    assert len(losses[0]) == 5


@pytest.mark.slow
def test_the_unet_learns_to_remove_noise() -> None:
    s, rng = step(12), np.random.default_rng(0)
    weights = s.new_weights(rng)
    s.train(weights, rng, 150)
    x0, z = s.pictures(rng, 64), rng.normal(size=(64, 16, 16, 1))
    error = np.mean((s.denoise(weights, x0 + z, np.ones((64, 1, 1, 1))) - x0) ** 2)
    assert error < 0.25, error  # the noise has 1
