"""Optimisers against their formulas in float64, what they keep, that they never wait for the device;
clipping, EMA, schedules.

Against PyTorch: parity/test_layers.py.
"""

from __future__ import annotations

import math
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
        adam.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(5,\) .*; parameter 1 of shape \(3, 4\)"):
        optim.Adam([ps[1], ps[0], *ps[2:]]).load_state_dict(adam.state_dict())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda ps: optim.SGD(ps, -1), r"lr must be in \[0, inf\), not -1"),
        (lambda ps: optim.SGD(ps, math.nan), "lr"),
        (lambda ps: optim.SGD(ps, momentum=-0.1), "momentum"),
        (lambda ps: optim.SGD(ps, nesterov=True), "nesterov needs a momentum"),
        (lambda ps: optim.SGD(ps, weight_decay=-1), "weight_decay"),
        (lambda ps: optim.Adam(ps, betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), not 1.0"),
        (lambda ps: optim.AdamW(ps, eps=-1e-8), "AdamW: eps"),
        (lambda ps: optim.Adam([]), "none"),
        (lambda ps: optim.Adam([3.0]), "float"),
        (lambda ps: optim.SGD([ps[0] * 2.0]), r"parameter 0 of shape .* is the result of multiply, not a leaf"),
        (lambda ps: optim.EMA(nn.Linear(2, 2), decay=1.0), "decay"),
        (lambda ps: optim.clip_grad_norm(ps, 0.0), "max_norm must be positive, not 0.0"),
    ],
)
def test_bad_arguments(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(parameters())


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


def test_plain_sgd_takes_no_state_of_another_optimiser() -> None:
    ps = [Tensor(backend.xp.ones(3, "float32"), requires_grad=True)]
    with pytest.raises(ValueError, match=r"this state does not fit SGD of 1 parameters: parameter 0"):
        optim.SGD(ps, 0.1).load_state_dict(optim.Adam(ps, 0.1).state_dict())


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


# ---------------------------------------------------------------- schedules


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
