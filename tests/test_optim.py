"""Optimisers against their formulas in float64, what they keep, that they never wait for the device;
clipping, EMA, schedules.

Against PyTorch: parity/test_layers.py.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, no_grad, ops, optim, tensor

pytestmark = pytest.mark.usefixtures("each_backend")


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


SHAPES = [(3, 4), (5,), (1, 2, 2), ()]
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda ps: optim.SGD(ps, 0.1),
    "sgd decay": lambda ps: optim.SGD(ps, 0.1, weight_decay=0.3),
    "momentum": lambda ps: optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.3),
    "nesterov": lambda ps: optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.3, nesterov=True),
    "adam": lambda ps: optim.Adam(ps, 0.1, (0.8, 0.95), 1e-3),
    "adam decay": lambda ps: optim.Adam(ps, 0.1, weight_decay=0.3),
    "adamw": lambda ps: optim.AdamW(ps, 0.1, weight_decay=0.3),
}


def parameters(dtype: str = "float64") -> list[nn.Parameter]:
    return [nn.Parameter(Rng(i).normal(shape, dtype)) for i, shape in enumerate(SHAPES)]


def set_gradients(ps: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(ps):
        p.grad = Tensor(Rng(100 + step).child(i).normal(p.shape, p.dtype))


def reference(name: str, p: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """The formulas as they stand in the papers."""
    lr, v, m = 0.1, np.zeros_like(p), np.zeros_like(p)
    (b1, b2), eps = ((0.8, 0.95), 1e-3) if name == "adam" else ((0.9, 0.999), 1e-8)
    for n, g in enumerate(gradients, start=1):
        if name in ("sgd decay", "momentum", "nesterov", "adam decay"):
            g = g + 0.3 * p
        if name in ("sgd", "sgd decay"):
            p = p - lr * g
        elif name in ("momentum", "nesterov"):
            v = 0.9 * v + g
            p = p - lr * (g + 0.9 * v if name == "nesterov" else v)
        else:
            if name == "adamw":
                p = p - lr * 0.3 * p
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - lr * (m / (1 - b1**n)) / (np.sqrt(v / (1 - b2**n)) + eps)
    return p


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_follow_the_formula(name: str) -> None:
    ps = parameters()
    start, seen = [host(p).copy() for p in ps], [[] for _ in ps]
    optimizer = OPTIMIZERS[name](ps)
    for step in range(10):
        set_gradients(ps, step)
        for i, p in enumerate(ps):
            seen[i].append(host(p.grad).copy())
        optimizer.step()
    for p, p0, gradients in zip(ps, start, seen):
        np.testing.assert_allclose(host(p), reference(name, p0, gradients), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_leaves_gradients_alone_keeps_the_dtype_and_never_waits(name: str) -> None:
    ps = parameters("float32")
    optimizer = OPTIMIZERS[name](ps)
    set_gradients(ps, 0)
    before = [host(p.grad).copy() for p in ps]
    arrays = [p.data for p in ps]
    with backend.no_sync():
        optimizer.step()
        optimizer.step()
    for p, g, array in zip(ps, before, arrays):
        assert np.array_equal(host(p.grad), g)
        assert p.dtype == "float32" and p.data is array  # in place


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_noticed_by_the_graph(name: str) -> None:
    p = nn.Parameter(np.ones(3))
    y = (p * p).sum()
    p.grad = tensor(np.ones(3))
    OPTIMIZERS[name]([p]).step()
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_a_gradient_stay_and_do_not_count(name: str) -> None:
    late, other = nn.Parameter(np.ones(3)), nn.Parameter(np.ones(3))
    optimizer, fresh = OPTIMIZERS[name]([late, other]), OPTIMIZERS[name]
    other.grad = tensor(np.ones(3))
    for _ in range(5):
        optimizer.step()
    assert host(late).tolist() == [1, 1, 1]
    late.grad = tensor(np.full(3, 2.0))
    optimizer.step()
    alone = nn.Parameter(np.ones(3))
    alone.grad = tensor(np.full(3, 2.0))
    fresh([alone]).step()
    assert np.array_equal(host(late), host(alone))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_goes_on_where_it_was(name: str) -> None:
    def run(steps: range, ps: list[nn.Parameter], optimizer: optim.Optimizer) -> None:
        for step in steps:
            set_gradients(ps, step)
            optimizer.step()

    ps = parameters()
    optimizer = OPTIMIZERS[name](ps)
    run(range(3), ps, optimizer)
    optimizer.lr = 0.05
    state, values = optimizer.state_dict(), [p.data.copy() for p in ps]
    run(range(3, 6), ps, optimizer)

    again = [nn.Parameter(v) for v in values]
    resumed = OPTIMIZERS[name](again)
    resumed.load_state_dict(state)
    assert resumed.lr == 0.05
    run(range(3, 6), again, resumed)
    for p, q in zip(ps, again):
        assert np.array_equal(host(p), host(q))


def test_a_state_that_does_not_fit_says_where() -> None:
    ps = parameters()
    adam, sgd = optim.Adam(ps), optim.SGD(ps)
    with pytest.raises(ValueError, match="it has 4 parameters, not 3"):
        optim.Adam(ps[:3]).load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3, 4\) needs m, v of that shape, not nothing"):
        adam.load_state_dict({**adam.state_dict(), "state": sgd.state_dict()["state"]})
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(5,\) .*; parameter 1 of shape \(3, 4\)"):
        optim.Adam([ps[1], ps[0], *ps[2:]]).load_state_dict(adam.state_dict())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda ps: optim.SGD(ps, -1), r"SGD: lr must be a number in \[0, inf\), not -1"),
        (lambda ps: optim.SGD(ps, math.nan), "lr"),
        (lambda ps: optim.SGD(ps, momentum=-0.1), "momentum"),
        (lambda ps: optim.SGD(ps, nesterov=True), "nesterov needs a momentum"),
        (lambda ps: optim.SGD(ps, weight_decay=-1), "weight_decay"),
        (lambda ps: optim.Adam(ps, betas=(0.9, 1.0)), r"betas\[1\] must be a number in \[0, 1\), not 1.0"),
        (lambda ps: optim.AdamW(ps, eps=-1e-8), "AdamW: eps"),
        (lambda ps: optim.Adam([]), "none"),
        (lambda ps: optim.Adam([3.0]), "float"),
        (lambda ps: optim.SGD([ps[0] * 2.0]), r"parameter 0 of shape .* is the result of multiply, not a leaf"),
        (lambda ps: optim.EMA(nn.Linear(2, 2), decay=1.0), "decay"),
        (lambda ps: optim.SGD(ps, "0.1"), "SGD: lr must be a number .* not '0.1'"),
        (lambda ps: optim.Adam(ps, betas=(0.9,)), r"Adam: betas must be two numbers, not \(0.9,\)"),
        (lambda ps: optim.Adam(ps, betas=(0.9, 0.99, 0.999)), r"not \(0.9, 0.99, 0.999\)"),
        (lambda ps: optim.AdamW(ps, betas=[]), r"AdamW: betas must be two numbers, not \[\]"),
        (lambda ps: optim.SGD([*ps, ps[1]]), r"parameters 1 and 4 are the same Tensor of shape \(5,\)"),
        (lambda ps: optim.Adam([ps[0], Tensor(ps[1].data)]), r"parameter 1 of shape \(5,\) requires no gradient"),
        (lambda ps: optim.Adam(p for p in [] if p), "generator that has been used up"),
        (lambda ps: optim.clip_grad_norm(ps, math.nan), "not nan"),
        (lambda ps: optim.clip_grad_norm([], 1.0), "none: is this a generator that has been used up"),
        (lambda ps: optim.exponential(-1.5), "exponential: factor .* not -1.5"),
        (lambda ps: optim.exponential(0.5, floor=1.5), "exponential: floor .* not 1.5"),
        (lambda ps: optim.cosine(-5), "cosine: steps .* not -5"),
        (lambda ps: optim.cosine(0), "cosine: steps .* not 0"),
        (lambda ps: optim.cosine(math.nan), "cosine: steps .* not nan"),
        (lambda ps: optim.cosine(5, floor=-0.1), "cosine: floor .* not -0.1"),
        (lambda ps: optim.warmup(-5), "warmup: steps .* not -5"),
        (lambda ps: optim.warmup(0), "warmup: steps .* not 0"),
        (lambda ps: optim.warmup(math.nan), "warmup: steps .* not nan"),
        (lambda ps: optim.clip_grad_norm(ps, 0.0), r"max_norm must be a number in \(0, inf\], not 0.0"),
    ],
)
def test_bad_arguments(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(parameters())


@pytest.mark.parametrize("wrong", [nn.Sequential(nn.Linear(2, 2, rng=0)), None, "weights", {"w": 1}, 3])
def test_what_is_no_list_of_tensors_is_refused_with_what_to_give(wrong: Any) -> None:
    for take in (optim.Adam, lambda given: optim.clip_grad_norm(given, 1.0)):
        with pytest.raises(TypeError, match=r"give model.parameters\(\), not a "):
            take(wrong)


@pytest.mark.parametrize("dtype", ["bool", "int32"])
def test_only_floating_tensors_can_be_optimised(dtype: str) -> None:
    with pytest.raises(TypeError, match=rf"parameter 1 of shape \(2,\) is {dtype}, not floating"):
        optim.SGD([nn.Parameter(np.ones(3)), Tensor(backend.xp.ones(2, dtype))])


def test_an_average_is_of_a_module() -> None:
    with pytest.raises(TypeError, match="EMA takes a module, not a list"):
        optim.EMA(parameters())


def test_a_frozen_parameter_and_a_single_tensor_may_be_given() -> None:
    frozen, alone = nn.Parameter(np.ones(2)), tensor(np.ones(2), requires_grad=True)
    frozen.requires_grad = False
    optim.SGD([frozen], 1.0).step()
    alone.grad = tensor(np.ones(2))
    optim.SGD(alone, 1.0).step()
    assert host(frozen).tolist() == [1, 1] and host(alone).tolist() == [0, 0]


def test_the_learning_rate_is_a_plain_number_also_when_it_is_set() -> None:
    optimizer = optim.Adam(parameters(), np.float64(0.25), (np.float32(0.5), 0.75), weight_decay=np.int64(1))
    assert type(optimizer.lr) is float and {type(b) for b in (*optimizer.betas, optimizer.weight_decay)} == {float}
    optimizer.lr = np.float32(0.5)
    assert type(optimizer.lr) is float and optimizer.lr == 0.5
    with pytest.raises(ValueError, match="Adam: lr .* not nan"):
        optimizer.lr = math.nan
    assert optimizer.lr == 0.5


# ---------------------------------------------------------------- a whole step


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_training_step_never_waits_and_learns(dtype: str) -> None:
    rng = Rng(0)
    net = nn.Sequential(
        nn.Linear(2, 32, rng=rng), nn.SiLU(), nn.Dropout(0.01, rng=rng), nn.Linear(32, 1, rng=rng)
    ).astype(dtype)
    optimizer, ema = optim.Adam(net.parameters(), 1e-2), optim.EMA(net, 0.9)
    x = Tensor(rng.normal((64, 2), dtype))
    target = x[:, :1] * x[:, 1:]
    losses = []
    for _ in range(60):
        with backend.no_sync():
            optimizer.zero_grad()
            loss = ops.mse_loss(net(x), target)
            loss.backward()
            optim.clip_grad_norm(net.parameters(), 1.0)
            optimizer.step()
            ema.update()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert {str(p.dtype) for p in net.parameters()} == {str(a.dtype) for a in ema.averages.values()} == {dtype}


# ---------------------------------------------------------------- clipping


def test_large_gradients_are_clipped_and_not_lost(each_backend: str) -> None:
    """The square of 1e20 is more than float32 holds."""
    p = nn.Parameter(backend.xp.zeros(4, "float32"))
    p.grad = Tensor(backend.xp.full(4, 1e20, "float32"))
    assert optim.clip_grad_norm([p], 1.0).item() == pytest.approx(2e20, rel=1e-6)
    np.testing.assert_allclose(p.grad.numpy(), 0.5, rtol=1e-5)


def test_plain_sgd_takes_no_state_of_another_optimiser() -> None:
    ps = [Tensor(backend.xp.ones(3, "float32"), requires_grad=True)]
    with pytest.raises(ValueError, match=r"this state does not fit SGD of 1 parameters: it is of 'Adam'"):
        optim.SGD(ps, 0.1).load_state_dict(optim.Adam(ps, 0.1).state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"optimizer": "AdamW"}, "it is of 'AdamW'"),
        ({"optimizer": None}, "it is of None"),
        ({"lr": math.nan}, "lr must be a number .* not nan"),
        ({"lr": "0.1"}, "not '0.1'"),
        ({"counts": [1, -1]}, "the count of parameter 1 must be an integer of 0 or more, not -1"),
        ({"counts": [1, 1.5]}, "not 1.5"),
        ({"counts": 2}, "counts must be a list, not 2"),
        ({"state": None}, "state must have arrays by parameter, but is None"),
        ({"state": {"0": {}, "1": None}}, "arrays by name are needed, not a NoneType: None"),
        ({"state": {"0": {}, "1": {}, "2": {}}}, r"it has arrays for \['2'\]"),
        ({"state": {"0": {"m": [1.0], "v": [1.0]}}}, r"m must be an array of floating numbers, not \[1.0\]"),
        ({"state": {"0": {"m": np.ones(3, int)}}}, r"not int64 of shape \(3,\)"),
    ],
)
def test_a_state_is_checked_before_anything_is_changed(change: Any, match: str) -> None:
    ps = [nn.Parameter(np.ones(3)), nn.Parameter(np.ones(2))]
    other, optimizer = optim.Adam(ps, 0.5), optim.Adam(ps, 0.25)
    for p in ps:
        p.grad = tensor(np.ones(p.shape))
    other.step()
    for state in ({**other.state_dict(), **change}, other, {"lr": 0.1}):
        with pytest.raises(ValueError, match=match if type(state) is dict and len(state) > 1 else "it (is no|has no)"):
            optimizer.load_state_dict(state)
    assert optimizer.lr == 0.25 and optimizer.counts == [0, 0] and not host(optimizer.state[0]["m"]).any()
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.lr == 0.5 and optimizer.counts == [1, 1]


def test_clipping_counts_a_parameter_once_and_takes_a_single_one() -> None:
    p = nn.Parameter(np.ones(2))
    for given in ([p, p], p, iter([p])):
        p.grad = tensor(np.array([3.0, 4.0]))
        assert float(host(optim.clip_grad_norm(given, 1.0))) == pytest.approx(5)
        assert np.allclose(host(p.grad), [0.6, 0.8], rtol=1e-5)
    used = iter([p])
    next(used)
    with pytest.raises(ValueError, match="used up"):
        optim.clip_grad_norm(used, 1.0)
    p.grad = tensor(np.array([3.0, 4.0]))
    assert float(host(optim.clip_grad_norm([p], math.inf))) == pytest.approx(5) and host(p.grad).tolist() == [3, 4]


def test_clip_grad_norm() -> None:
    ps = parameters("float32")
    set_gradients(ps, 0)
    ps[1].grad = None
    before = [None if p.grad is None else host(p.grad).copy() for p in ps]
    norm = math.sqrt(sum((g**2).sum() for g in before if g is not None))
    with backend.no_sync():
        found = optim.clip_grad_norm(ps, norm / 4)
    assert found.shape == () and abs(float(host(found)) / norm - 1) < 1e-6
    for p, g in zip(ps, before):
        assert (
            p.grad is None if g is None else np.allclose(host(p.grad), g / 4, rtol=1e-5) and p.grad.dtype == "float32"
        )
    optim.clip_grad_norm(ps, norm)
    assert np.allclose(host(ps[0].grad), before[0] / 4, rtol=1e-5)  # short enough already


def test_clip_grad_norm_of_nothing_and_of_nan() -> None:
    p = nn.Parameter(np.ones(3))
    assert float(host(optim.clip_grad_norm([p], 1.0))) == 0
    p.grad = tensor(np.array([1.0, np.nan, 0.0]))
    assert math.isnan(float(host(optim.clip_grad_norm([p], 1.0))))


# ---------------------------------------------------------------- EMA


def test_ema_follows_its_formula_and_forgets_the_first_weights() -> None:
    net = nn.Linear(1, 1, bias=False, rng=0).astype("float64")
    ema = optim.EMA(net, 0.99)
    expected = host(net.weight).copy()
    for n in range(50):
        with no_grad():
            net.weight += 1.0
        ema.update()
        d = min(0.99, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * host(net.weight)
    assert np.allclose(host(ema.averages["weight"]), expected, rtol=1e-12)
    first = np.prod([min(0.99, (1 + n) / (10 + n)) for n in range(50)])
    assert first < 1e-6  # what the first weights still count


def test_ema_applied_and_given_back() -> None:
    net = nn.Linear(2, 2, rng=0)
    ema = optim.EMA(net)
    trained = host(net.weight) + 1
    with no_grad():
        net.weight += 1.0
    ema.update()
    with pytest.raises(KeyError), ema.applied():
        assert np.array_equal(host(net.weight), host(ema.averages["weight"]))
        assert not np.allclose(host(net.weight), trained)
        raise KeyError
    assert np.array_equal(host(net.weight), trained)
    other = nn.Linear(2, 2, rng=1)
    ema.copy_to(other)
    assert np.array_equal(host(other.weight), host(ema.averages["weight"]))
    ema.update()
    assert not np.allclose(host(other.weight), host(ema.averages["weight"]))


@pytest.mark.parametrize("move", [lambda ema: ema.update(), lambda ema: ema.load_state_dict(ema.state_dict())])
def test_a_graph_made_with_the_averages_notices_that_they_have_moved_on(move: Any) -> None:
    net, x = nn.Linear(2, 2, rng=0), tensor(np.ones((1, 2), np.float32), requires_grad=True)
    ema = optim.EMA(net)
    with ema.applied():
        y = net(x).sum()
    net.weight.data = net.weight.data + 1.0
    move(ema)
    with pytest.raises(RuntimeError, match="was changed in place after it was used"):
        y.backward()


def test_a_clipped_gradient_that_a_graph_needs_is_noticed() -> None:
    x = tensor([1.0, 2.0], requires_grad=True)
    (x * x * x).sum().backward(create_graph=True)
    y = (x.grad * x.grad).sum()
    optim.clip_grad_norm([x], 0.1)
    with pytest.raises(RuntimeError, match="was changed in place after it was used"):
        y.backward()


def test_ema_state() -> None:
    net = nn.Linear(2, 2, rng=0)
    a, b = optim.EMA(net), optim.EMA(nn.Linear(2, 2, rng=1))
    a.update()
    b.load_state_dict(a.state_dict())
    assert b.updates == 1 and np.array_equal(host(a.averages["bias"]), host(b.averages["bias"]))
    with pytest.raises(ValueError, match=r"another module: weight: \(2, 2\), not \(2, 3\), bias: \(2,\), not \(3,\)"):
        optim.EMA(nn.Linear(2, 3)).load_state_dict(a.state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"updates": -1}, "updates must be an integer of 0 or more, not -1"),
        ({"updates": 1.5}, "not 1.5"),
        ({"averages": {"weight": np.full((2, 2), 5.0)}}, r"bias: None, not \(2,\)"),
        ({"averages": {"weight": np.full((2, 2), 5.0), "bias": [5.0, 5.0]}}, "bias must be an array of floating"),
        ({"averages": 3}, "not a int: 3"),
    ],
)
def test_an_averages_state_is_checked_before_anything_is_changed(change: Any, match: str) -> None:
    ema = optim.EMA(nn.Linear(2, 2, rng=0))
    before = host(ema.averages["weight"]).copy()
    with pytest.raises(ValueError, match=match):
        ema.load_state_dict({**ema.state_dict(), "updates": 7, **change})
    for missing in ("updates", "averages"):
        state = ema.state_dict()
        del state[missing]
        with pytest.raises(ValueError, match=f"this state does not fit an EMA: it has no {missing}"):
            ema.load_state_dict(state)
    assert ema.updates == 0 and np.array_equal(host(ema.averages["weight"]), before)


def test_averages_that_do_not_fit_change_nothing() -> None:
    net = nn.Linear(2, 2, rng=0)
    ema, weight, bias = optim.EMA(net), net.weight.data, net.bias.data
    net.bias._data = bias.astype("float64")  # the second of two: the first would have been changed already
    with pytest.raises(ValueError, match=r"bias: \(2,\) float32, not \(2,\) float64"), ema.applied():
        pass
    assert net.weight.data is weight
    for other, match in (
        (nn.Linear(2, 2, bias=False, rng=1), r"bias: \(2,\) float32, not None"),
        (nn.Sequential(nn.Linear(2, 2, rng=1)), r"0.weight: None, not \(2, 2\) float32"),
        (nn.Linear(2, 2, rng=1).astype("float64"), "float32, not .* float64"),
    ):
        before = other.state_dict()
        with pytest.raises(ValueError, match=match):
            ema.copy_to(other)
        assert all(np.array_equal(host(a), host(before[name])) for name, a in other.state_dict().items())


def test_averages_are_taken_away_also_from_a_module_that_was_converted_inside() -> None:
    net = nn.Linear(2, 2, rng=0)
    ema, weight = optim.EMA(net), net.weight.data
    with ema.applied():
        net.astype("float64")
    assert net.weight.data is weight and net.bias.dtype == "float32"


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "schedule",
    [optim.constant(), optim.exponential(0.5, 0.1), optim.cosine(10, 0.1), optim.warmup(3, optim.cosine(10))],
)
def test_schedules_can_be_pickled_and_show_their_arguments(schedule: Any) -> None:
    again = pickle.loads(pickle.dumps(schedule))
    assert [again(n) for n in range(12)] == [schedule(n) for n in range(12)]
    assert eval(repr(schedule), vars(optim)) == schedule


def test_a_schedule_after_the_warmup_can_be_called() -> None:
    with pytest.raises(TypeError, match="then must be a schedule, not 0.5"):
        optim.warmup(10, 0.5)


def test_schedules_take_numpys_numbers() -> None:
    assert type(optim.exponential(np.float32(0.5))(2)) is float
    assert type(optim.cosine(np.int64(4), np.float64(0.5))(1)) is float


def test_schedules() -> None:
    decay = optim.exponential(0.98, floor=0.2)
    assert decay(0) == 1 and decay(10) == 0.98**10 and decay(80) > 0.198 and decay(81) == decay(1000) == 0.2
    schedule = optim.cosine(100, floor=0.1)
    assert schedule(0) == 1 and schedule(50) == pytest.approx(0.55)
    assert schedule(100) == schedule(500) == pytest.approx(0.1)
    rise = optim.warmup(10)
    assert [rise(n) for n in (0, 4, 9, 20)] == [0.1, 0.5, 1, 1]
    both = optim.warmup(10, optim.exponential(0.5))
    assert both(1) == 0.2 * 0.5 and both(20) == 0.5**20
    assert optim.constant()(7) == 1


def test_a_sum_of_squares_is_not_below_zero(numpy_backend: str) -> None:
    p = Tensor(np.ones(3, "float32"), requires_grad=True)
    optimizer = optim.Adam([p], lr=0.1)
    p.grad = Tensor(np.ones(3, "float32"))
    optimizer.step()
    state = optimizer.state_dict()
    state["state"]["0"]["v"] = -state["state"]["0"]["v"]
    with pytest.raises(ValueError, match="parameter 0 has a v below zero"):
        optimizer.load_state_dict(state)
