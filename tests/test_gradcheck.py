"""The checker is checked: gradients that are wrong, each in one of the usual ways, must be found and named.

The broken ops are Ops of their own, outside the registry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, in_use

import tinydiff
from tinydiff import GradcheckError, Tensor, gradcheck, ops, tensor
from tinydiff.backend import xp
from tinydiff.engine import Op

pytestmark = pytest.mark.usefixtures("numpy_backend")
random = np.random.default_rng(4)


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    """In every test, whatever ran before."""
    global random
    random = np.random.default_rng(4)


def N(*shape: int) -> Any:  # noqa: N802
    return np.asarray(random.normal(size=shape))


def made(forward: Any, rule: Any) -> Op:
    """An op with this rule (g, out, *inputs), for better or worse."""
    op = Op(forward)
    op.vjp(rule)
    return op


def tanh(x: Any) -> Any:
    return np.tanh(x)


def absolute(x: Any) -> Any:
    return np.abs(x)


def logarithm(x: Any) -> Any:
    return np.log(x)


def multiply(x: Any, y: Any) -> Any:
    return x * y


def product(x: Any, y: Any) -> Any:
    return x @ y


def gather(x: Any) -> Any:
    return x[INDEX]


def assign(g: Any, _z: Any, x: Any) -> Any:
    """z[index] = g where it has to be z[index] += g."""
    z = xp.zeros(x.shape)
    z[INDEX] = g
    return z


INDEX = np.array([0, 2, 0, 1, 0])
PAIR, SQUARE = (N(3, 4), N(3, 4)), (N(3, 3), N(3, 3))
tanh_rule = lambda g, z, _x: g * (1 - z * z)  # noqa: E731

# name, what the diagnosis begins with, the op, its inputs
BROKEN = [
    ("scaled by 1.001", "constant factor 1.001", made(tanh, lambda g, z, x: 1.001 * tanh_rule(g, z, x)), [N(3, 4)]),
    ("scaled by -1000", "constant factor -1000", made(tanh, lambda g, z, x: -1000 * tanh_rule(g, z, x)), [N(3, 4)]),
    (
        "scaled by 2 / 3",
        "constant factor 0.666667 (2/3)",
        made(tanh, lambda g, z, x: tanh_rule(g, z, x) * 2 / 3),
        [N(3, 4)],
    ),
    ("negated", "sign", made(tanh, lambda g, z, x: -tanh_rule(g, z, x)), [N(3, 4)]),
    ("negated, one element", "sign", made(tanh, lambda g, z, x: -tanh_rule(g, z, x)), [N()]),
    ("zeroed", "zero", made(tanh, lambda g, z, x: g * 0), [N(3, 4)]),
    ("no gradient", "zero", made(tanh, lambda g, z, x: (None,)), [N(3, 4)]),
    ("NaN", "NaN", made(tanh, lambda g, z, x: g * np.nan), [N(3, 4)]),
    ("transposed", "transposed", made(product, lambda g, z, x, y: ((g @ y.T).T, x.T @ g)), SQUARE),
    (
        "transposed, another shape",
        "transposed",
        made(product, lambda g, z, x, y: ((g @ y.T).T, x.T @ g)),
        [N(2, 3), N(3, 2)],
    ),
    (
        "transposed, put in shape",
        "transposed",
        made(tanh, lambda g, z, x: tanh_rule(g, z, x).T.reshape(x.shape)),
        [N(2, 3)],
    ),
    (
        "axes exchanged",
        "transposed: its axes are in the order (1, 0, 2)",
        made(tanh, lambda g, z, x: tanh_rule(g, z, x).swapaxes(0, 1)),
        [N(2, 2, 2)],
    ),
    ("flipped", "flipped along the axes (1,)", made(tanh, lambda g, z, x: tanh_rule(g, z, x)[:, ::-1]), [N(2, 3)]),
    ("exchanged", "exchanged: it is the gradient of input 1", made(multiply, lambda g, z, x, y: (g * x, g * y)), PAIR),
    ("an element occurs twice", "missing accumulation: each wrong element", made(gather, assign), [N(3)]),
    (
        "one of two equal uses",
        "constant factor 0.5 (1/2: missing accumulation",
        made(lambda x: x * x, lambda g, z, x: g * x),
        [N(5)],
    ),
    (
        "one repetition",
        "missing unbroadcast",
        made(multiply, lambda g, z, x, y: (g * y, (g * x)[:1])),
        [N(3, 4), N(1, 4)],
    ),
    (
        "mean of the repetitions",
        "missing unbroadcast",
        made(multiply, lambda g, z, x, y: (g * y, (g * x).mean(0))),
        [N(3, 4), N(4)],
    ),
    (
        "wrong axis",
        "missing unbroadcast",
        made(multiply, lambda g, z, x, y: (g * y, (g * x).sum(0)[:, None])),
        [N(3, 3), N(3, 1)],
    ),
    (
        "one sum of two",
        "missing unbroadcast",
        made(multiply, lambda g, z, x, y: (g * y, (g * x).sum(0)[0])),
        [N(3, 4), N()],
    ),
    ("wrong shape", "missing unbroadcast", made(multiply, lambda g, z, x, y: (g * y, (g * x)[:2])), [N(3, 4), N(4)]),
    (
        "a sum too many",
        "too few elements (a sum over too many axes, or a slice?): the rule of",
        made(tanh, lambda g, z, x: tanh_rule(g, z, x).sum(0)),
        [N(3, 4)],
    ),
    (
        "elements left out",
        "too few elements (a sum over too many axes, or a slice?): the rule of",
        made(tanh, lambda g, z, x: tanh_rule(g, z, x)[:2]),
        [N(3, 4)],
    ),
    ("something else", "no known pattern", made(tanh, lambda g, z, x: g * x), [N(3, 4)]),
]


@pytest.mark.parametrize("begins, op, inputs", [pytest.param(*case[1:], id=case[0]) for case in BROKEN])
def test_a_wrong_rule_is_found_and_named(begins: str, op: Any, inputs: Any) -> None:
    with pytest.raises(GradcheckError) as caught:
        gradcheck(op, *inputs)
    report = caught.value.report
    found = report.diagnosis.split(": ", 1)[1] if report.diagnosis.startswith("input") else report.diagnosis
    assert found.startswith(begins), str(caught.value)
    assert not report.ok and str(report).startswith("WRONG") and found in str(caught.value)


def test_right_rules_pass() -> None:
    for op, inputs in (
        (made(tanh, tanh_rule), [N(3, 4)]),
        (made(product, lambda g, z, x, y: (g @ y.T, x.T @ g)), SQUARE),
        (made(multiply, lambda g, z, x, y: (g * y, g * x)), [N(3, 4), N(1, 4)]),  # the engine sums over the repetitions
    ):
        report = gradcheck(op, *inputs)
        assert report.ok and report.checked == report.elements and set(report.methods) == {"complex step"}
        assert report.worst.relative_error < 1e-10


def test_a_use_that_is_forgotten() -> None:
    """The engine adds up the uses of a Tensor; a rule that forgets one of two inputs has the same effect."""
    forgets = made(multiply, lambda g, z, x, y: (g * y, None))
    x = N(4)
    with pytest.raises(
        GradcheckError,
        match="input 0: missing accumulation: the input is used 3 times, and the gradient of use 2 is not",
    ):
        gradcheck(lambda x: forgets(ops.sin(x), x) + ops.exp(x), x)
    with pytest.raises(GradcheckError, match="input 1: zero"):
        gradcheck(forgets, x, N(4))


def test_an_op_that_the_graph_does_not_contain() -> None:
    with pytest.raises(GradcheckError, match="missing accumulation|zero"):
        gradcheck(lambda x: x * Tensor(xp.exp(x.data)), N(3))
    with pytest.raises(GradcheckError, match="zero"):
        gradcheck(lambda x: ops.exp(x.detach()) + 0 * x, N(3))


def test_only_one_wrong_element() -> None:
    def rule(g: Any, z: Any, x: Any) -> Any:
        wrong = xp.ones(x.shape)
        wrong[1, 2] = 1.001
        return tanh_rule(g, z, x) * wrong

    with pytest.raises(GradcheckError) as caught:
        gradcheck(made(tanh, rule), N(3, 4))
    report = caught.value.report
    assert [e.index for e in report.wrong] == [(1, 2)]
    assert report.worst.input == "input 0" and report.worst.index == (1, 2)
    assert report.worst.analytic / report.worst.numeric == pytest.approx(1.001)
    assert report.worst.relative_error == pytest.approx(0.001, rel=0.01)
    assert "worst: input 0 at (1, 2): analytic" in str(report) and "1 of 12 elements are wrong" in str(report)


def test_only_one_wrong_element_and_it_is_small() -> None:
    """The error is too small to distinguish patterns: a factor of 1 fits all elements, and explains nothing."""

    def rule(g: Any, z: Any, x: Any) -> Any:
        return tanh_rule(g, z, x) * xp.asarray([1, 1, 1.001])

    with pytest.raises(GradcheckError, match="1 of 3 elements are wrong"):
        gradcheck(made(tanh, rule), np.array([0.1, 0.2, 4.0]))


def test_the_adjoint_is_random() -> None:
    """Ones are in the null space of softmax: under them its gradient is zero, and so is that of this wrong rule."""
    wrong = made(lambda x: ops.softmax(x), lambda g, z, x: z * (g - g.mean(-1, keepdims=True)))
    x = tensor(N(2, 3), requires_grad=True)
    assert np.abs(tinydiff.grad(wrong(x), x, np.ones((2, 3)))[0].numpy()).max() < 1e-15
    with pytest.raises(GradcheckError):
        gradcheck(wrong, x)


def test_functions_that_take_gradients_themselves() -> None:
    def gradient(f: Any) -> Any:
        return lambda x: tinydiff.grad(f(x), x, x.data * 0 + 1, create_graph=True)[0]

    for f in (ops.tanh, ops.silu, lambda x: ops.softmax(x) * x, lambda x: ops.layer_norm(x) * x):
        assert gradcheck(gradient(f), N(2, 3), order=2).ok  # third derivatives, in effect


def test_second_order_finds_what_first_order_cannot() -> None:
    """A rule that is right, and whose own gradient is cut off."""
    cut = made(ops.exp.forward, lambda g, z, x: g * (z.detach() if isinstance(z, Tensor) else z))
    assert gradcheck(cut, N(3)).ok
    with pytest.raises(GradcheckError, match="input 0: zero") as caught:
        gradcheck(cut, N(3), order=2)
    assert caught.value.report.order == 2
    with pytest.raises(GradcheckError) as caught:
        gradcheck(made(tanh, lambda g, z, x: -tanh_rule(g, z, x)), N(3), order=2)
    assert caught.value.report.order == 1


# ---------------------------------------------------------------- where the complex step fails


def test_functions_that_are_not_holomorphic() -> None:
    for f in (
        ops.abs,  # |x + ih| has no imaginary part
        lambda x: ops.where(abs(x.data) > 0.5, x * x, ops.abs(x)),
        lambda x: x * float(np.abs(x.numpy()).max()) * 0 + ops.sin(x),
    ):
        report = gradcheck(f, np.array([0.3, -0.7, 1.3, -0.2]))
        assert report.ok and report.checked == 4


def test_a_silent_lie_of_the_complex_step_is_found() -> None:
    real = made(lambda x: x.real**2 + 0j if x.dtype.kind == "c" else x**2, lambda g, z, x: 2 * g * x)
    report = gradcheck(real, N(4))
    assert (
        report.ok
        and report.methods == ["central differences"]
        and "no complex step: along a random direction" in str(report)
    )
    zero = made(lambda x: x.real**2 + 0j if x.dtype.kind == "c" else x**2, lambda g, z, x: 0 * g)
    with pytest.raises(GradcheckError, match="zero"):
        gradcheck(zero, N(4))


def test_a_function_that_refuses_complex_arrays() -> None:
    def real(x: Any) -> Any:
        assert x.dtype.kind == "f"
        return np.sin(x)

    report = gradcheck(made(real, lambda g, z, x: g * ops.cos(x)), N(4))
    assert report.ok and report.methods == ["central differences"] and "AssertionError" in report.notes[0]
    with pytest.raises(GradcheckError, match="constant factor 1.001"):
        gradcheck(made(real, lambda g, z, x: 1.001 * g * ops.cos(x)), N(4))


# ---------------------------------------------------------------- kinks


def test_kinks_are_reported_and_not_called_wrong() -> None:
    report = gradcheck(ops.abs, np.array([0.0, 1.0, -2.0]))
    assert report.ok and report.checked == 2
    assert [(e.index, e.kind) for e in report.kinks] == [((0,), "kink")]
    assert "no derivative at 1 elements, such as input 0 at (0,) (kink)" in str(report)
    assert [e.kind for e in gradcheck(ops.sign, np.array([0.0, 1.0])).kinks] == ["jump"]
    assert [e.kind for e in gradcheck(ops.sqrt, np.array([0.0, 1.0])).kinks] == ["edge"]


def test_a_gradient_outside_of_the_derivatives_of_the_sides_of_a_kink_is_wrong() -> None:
    with pytest.raises(GradcheckError) as caught:
        gradcheck(made(absolute, lambda g, z, x: g * ops.where(x == 0, 1.5, ops.sign(x))), np.array([0.0, 1.0, -2.0]))
    assert [e.index for e in caught.value.report.wrong] == [(0,)]


def test_a_kink_nearby_does_not_disturb() -> None:
    report = gradcheck(ops.abs, np.array([1e-5, -1e-4, 1e-3, 5e-4]))
    assert report.ok and not report.kinks and report.checked == 4


# ---------------------------------------------------------------- what it takes


def test_constants_pass_through() -> None:
    report = gradcheck(lambda i, none, x, k, s: ops.embedding(i, x) * k, np.array([0, 1, 1]), None, N(2, 3), 2, "text")
    assert report.elements == 6 and report.ok
    assert gradcheck(ops.multiply, tensor(N(2)), tensor([2, 3])).elements == 2
    assert gradcheck(ops.exp, N(0, 3)).elements == 0


def test_several_outputs() -> None:
    assert gradcheck(lambda x: ops.split(x, 3), N(6), order=2).ok
    swapped = made(lambda x: x[:2] * 1.0, lambda g, z, x: ops.pad(g, pad_width=((2, 0),)))
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: (swapped(x), x * 2), N(4))


def test_only_float64() -> None:
    with pytest.raises(TypeError, match=r"input 1 of shape \(2,\) is float32"):
        gradcheck(ops.add, N(2), np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="complex128"):
        gradcheck(ops.exp, N(2) + 1j)


def test_what_cannot_be_checked_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to differentiate"):
        gradcheck(lambda i: i, np.array([1, 2]))
    with pytest.raises(ValueError, match="order must be an integer from 1 to 2, not 3"):
        gradcheck(ops.exp, N(2), order=3)
    for bad in (float("nan"), float("inf"), -1e-3, "1", True):
        for name in ("rtol", "atol"):
            with pytest.raises(ValueError, match=f"gradcheck: {name} must be a number .* not {bad!r}"):
                gradcheck(ops.exp, N(2), **{name: bad})
    for bad in (2.5, -1, float("nan"), None):
        with pytest.raises(ValueError, match=f"gradcheck: elements must be an integer of 0 or more, not {bad}"):
            gradcheck(ops.exp, N(2), elements=bad)
    with pytest.raises(ValueError, match="gradcheck: atol must be .* not None"):
        gradcheck(ops.exp, N(2), atol=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be .* not 0.5"):
        gradcheck(ops.exp, N(2), seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gives nan"):
        gradcheck(ops.log, np.array([1.0, -1.0]))
    with pytest.raises(TypeError, match="must return Tensors made from its inputs by ops, not ndarray"):
        gradcheck(lambda x: x.numpy() * 2, N(2))
    rng = tinydiff.Rng(0)
    with pytest.raises(ValueError, match="another result each time"):
        gradcheck(lambda x: ops.dropout(x, p=0.5, rng=rng), N(20))


def test_large_inputs_are_checked_along_directions() -> None:
    report = gradcheck(np_tanh := made(tanh, tanh_rule), N(10, 10), elements=50)
    assert report.ok and report.checked == 0 and "100 elements are more than 50: 16 random directions" in str(report)
    assert gradcheck(np_tanh, N(10, 10)).checked == 100
    for rule, match in [
        (lambda g, z, x: 1.001 * tanh_rule(g, z, x), "constant factor 1.001"),
        (lambda g, z, x: -tanh_rule(g, z, x), "sign"),
        (lambda g, z, x: tanh_rule(g, z, x).T, "no pattern that random directions could show"),
    ]:
        with pytest.raises(GradcheckError, match=match):
            gradcheck(made(tanh, rule), N(10, 10), elements=50)


def test_sizes_from_tiny_to_large() -> None:
    for x in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        assert gradcheck(ops.log, np.array([x])).ok
        assert gradcheck(lambda x: ops.abs(ops.sin(x)) * 1e-8, np.array([x])).ok  # by differences
        with pytest.raises(GradcheckError):
            gradcheck(made(logarithm, lambda g, z, x: 1.001 * g / x), np.array([x]))


@pytest.mark.parametrize("shift", [1e5, 1e10, 1e13])
def test_a_large_output_hides_nothing_from_the_complex_step(shift: float) -> None:
    assert gradcheck(made(lambda x: shift + x, lambda g, z, x: g), N(3)).ok
    for factor in (0.0, 1.001):
        wrong = made(lambda x: shift + x, lambda g, z, x, *, factor=factor: factor * g)
        for elements in (4096, 1):
            with pytest.raises(GradcheckError):
                gradcheck(wrong, N(3), elements=elements)


def test_nothing_is_left_behind() -> None:
    x, calls = tensor(N(3), requires_grad=True), tinydiff.backend.active()
    before = x.numpy().copy()
    gradcheck(ops.exp, x)
    assert (
        x.grad is None and x.node is None and np.array_equal(x.numpy(), before) and tinydiff.backend.active() is calls
    )


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "numpy"])
def test_on_another_backend(name: str) -> None:
    for _ in in_use(name):
        for f, *inputs in (
            (ops.softmax, N(2, 3)),
            (ops.abs, N(3)),
            (lambda x, w: ops.conv2d(x, w, padding=1), N(1, 3, 3, 2), N(2, 2, 2, 1)),
            (lambda x: x * ops.exp(x), tensor(N(3))),
            (ops.sin, N()),
        ):
            assert gradcheck(f, *inputs, order=2).ok
        with pytest.raises(GradcheckError, match="constant factor 0.5"):
            gradcheck(made(lambda x: x * x, lambda g, z, x: g * x), N(3))
        with pytest.raises(GradcheckError, match="missing accumulation: the input is used 2 times"):
            gradcheck(lambda x: made(multiply, lambda g, z, x, y: (g * y, None))(x, ops.sin(x)), N(3))


def test_its_numbers_may_be_those_of_numpy() -> None:
    i, f = np.int64, np.float64
    assert gradcheck(ops.exp, N(2), order=i(2), rtol=f(1e-6), atol=f(1e-9), seed=i(1), elements=i(100)).ok


def test_a_tolerance_of_0_is_not_the_default() -> None:
    wrong = made(lambda x: x * 2.0, lambda g, z, x: g * (2 + 1e-9))
    assert gradcheck(wrong, N(3)).ok
    with pytest.raises(GradcheckError):
        gradcheck(wrong, N(3), rtol=0.0)
