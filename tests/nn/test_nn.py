"""Modules: how their state is found, saved and shown, and what each layer computes, draws and refuses."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, Tensor, backend, changes, nn, ops, optim, tensor

pytestmark = pytest.mark.usefixtures("each_backend")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(Rng(seed).normal(shape))


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


class Block(nn.Module):
    def __init__(self, rng: Rng):
        self.lin = nn.Linear(3, 3, rng=rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


class Net(nn.Module):
    """Every way to hold state: an attribute, a list, a dict, nested, shared, a buffer, a private one."""

    def __init__(self, seed: int = 0):
        rng = Rng(seed)
        self.scale = nn.Parameter(np.full((1,), 2.0, np.float32))
        self.blocks = [Block(rng), (Block(rng), nn.SiLU())]
        self.heads = {"a": nn.Linear(3, 2, rng=rng), "b": nn.Linear(3, 1, bias=False, rng=rng)}
        self.shared = self.heads["a"]
        self.count_seen = Tensor(backend.xp.zeros((2,), "float32"))
        self._private = nn.Linear(3, 3, rng=rng)
        self.name, self.sizes, self.nothing = "net", (3, 2), None

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.blocks[0], self.blocks[1][0]):
            x = block(x) * self.scale
        return self.heads["a"](x)


NAMES = [
    "scale",
    "blocks.0.lin.weight", "blocks.0.lin.bias", "blocks.1.0.lin.weight", "blocks.1.0.lin.bias",
    "heads.a.weight", "heads.a.bias", "heads.b.weight", "shared.weight", "shared.bias", "count_seen",
]  # fmt: skip


# ---------------------------------------------------------------- the walk


def test_state_is_found_in_the_order_of_definition() -> None:
    assert [name for name, _ in Net().named_tensors()] == NAMES
    assert list(Net().state_dict()) == NAMES


def test_parameters_come_once_and_without_buffers() -> None:
    net = Net()
    assert [name for name, _ in net.named_parameters()] == NAMES[:-1]
    assert len(list(net.parameters())) == 8
    assert net.count() == 1 + 12 + 12 + 8 + 3
    net.scale.requires_grad = False
    assert net.count() == 12 + 12 + 8 + 3


def test_a_parameter_assigned_later_is_found() -> None:
    net = Net()
    net.late = nn.Parameter(np.zeros(2, np.float32))
    assert [name for name, _ in net.named_parameters()][-1] == "late"
    del net.late
    assert "late" not in net.state_dict()


def test_modules_and_modes() -> None:
    net = Net()
    kinds = [type(module).__name__ for _, module in net.named_modules()]
    assert kinds == ["Net", "Block", "Linear", "Block", "Linear", "SiLU", "Linear", "Linear", "Linear"]
    assert net.eval() is net and not any(module.training for _, module in net.named_modules())
    assert net.train().blocks[1][0].lin.training


def test_zero_grad() -> None:
    net = Net()
    net(normal(4, 3)).sum().backward()
    assert net.scale.grad is not None and net.shared.weight.grad is not None
    net.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_astype_converts_parameters_and_buffers_and_comes_back() -> None:
    net = Net()
    assert net.astype("float64") is net
    assert {str(t.dtype) for _, t in net.named_tensors()} == {"float64"}
    y = net(normal(4, 3).astype("float64"))
    assert y.dtype == "float64"
    y.sum().backward()
    assert net.scale.grad.dtype == "float64"
    net.astype("float32")
    assert net.scale.grad is None and net.scale.dtype == "float32"


def test_deepcopy_is_independent() -> None:
    net = Net()
    other = copy.deepcopy(net)
    x = normal(4, 3)
    assert np.array_equal(host(net(x)), host(other(x)))
    other.scale.data = other.scale.data * 2
    assert host(net.scale) == 2 and host(other.scale) == 4
    assert other.shared is other.heads["a"]


def doubled(x: Any) -> Any:
    return x * 2


def test_a_trained_module_comes_back_from_a_copy_and_from_a_pickle() -> None:
    net, x = nn.Sequential(Net(), doubled, nn.Dropout(0.5, rng=1), nn.BatchNorm2d(2)).eval(), normal(4, 2, 2, 3)
    net(x).sum().backward()
    copies = [copy.deepcopy(net)]
    if backend.name != "strict":  # whose arrays refuse to be pickled
        copies.append(pickle.loads(pickle.dumps(net)))
    expected = host(net(x))
    for other in copies:
        assert not other.training and other[1] is doubled and other[0].shared is other[0].heads["a"]
        assert np.array_equal(host(other(x)), expected)
        assert np.array_equal(host(other[0].scale.grad), host(net[0].scale.grad))
        other[0].scale.data = other[0].scale.data * 2
    assert np.array_equal(host(net(x)), expected)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_no_hooks(copied: Any) -> None:
    """They belong to the module that they were registered on; and a lambda could not be pickled."""
    net, seen = nn.Sequential(nn.SiLU()), []
    net.register_forward_hook(lambda *call: seen.append(call))
    other = copied(net)
    other(normal(2, 3))
    assert seen == []
    other.register_forward_hook(lambda *call: seen.append(call))
    net(normal(2, 3))
    assert len(seen) == 1


def test_a_parameter_has_a_copy_of_its_data() -> None:
    array = backend.to_device(np.ones(2, np.float32))
    a, b = nn.Parameter(array), nn.Parameter(array)
    c = nn.Parameter(a)
    with tinydiff.no_grad():
        a += 1.0
    assert [host(p).tolist() for p in (a, b, c, array)] == [[2, 2], [1, 1], [1, 1], [1, 1]]


def test_a_parameter_made_from_a_read_only_array_can_be_trained(numpy_backend: str) -> None:
    array = np.ones(2, np.float32)
    array.flags.writeable = False
    p = nn.Parameter(array)
    p.grad = tensor(np.ones(2, np.float32))
    optim.SGD([p], 1.0).step()
    assert host(p).tolist() == [0, 0]


class Holder(nn.Module):
    def __init__(self, **parts: Any):
        vars(self).update(parts)


WALKS = {
    "parameters": lambda net: list(net.parameters()),
    "named_modules": lambda net: list(net.named_modules()),
    "state_dict": lambda net: net.state_dict(),
    "load_state_dict": lambda net: net.load_state_dict({}),
    "zero_grad": lambda net: net.zero_grad(),
    "count": lambda net: net.count(),
    "eval": lambda net: net.eval(),
    "astype": lambda net: net.astype("float64"),
    "repr": repr,
    "EMA": optim.EMA,
}


@pytest.mark.parametrize("walk", WALKS)
def test_a_module_that_holds_itself_is_named(walk: str) -> None:
    child, ring = Holder(), []
    parent = Holder(child=child, other=[nn.SiLU()])
    child.parent = parent
    ring.append(ring)
    for net, match in (
        (parent, "Holder: 'child.parent' leads back to ''"),
        (Holder(inner=[parent]), "Holder: 'inner.0.child.parent' leads back to 'inner.0', a Holder"),
        (Holder(ring=ring), "'ring.0' leads back to 'ring', a list"),
    ):
        with pytest.raises(ValueError, match=match):
            WALKS[walk](net)


def test_a_module_that_holds_itself_in_private_is_no_circle() -> None:
    parent = Holder(child=Holder(lin=nn.Linear(2, 2, rng=0)))
    parent.child._parent = parent
    assert list(parent.state_dict()) == ["child.lin.weight", "child.lin.bias"]
    again = copy.deepcopy(parent)
    assert again.child._parent is again


@pytest.mark.parametrize("walk", WALKS)
def test_two_parts_of_one_path_are_refused(walk: str) -> None:
    p, q = nn.Parameter(np.zeros(2, np.float32)), nn.Parameter(np.ones(2, np.float32))
    for parts, path in (
        ({"b.c": p, "b": {"c": q}}, "x.b.c"),
        ({1: p, "1": q}, "x.1"),
        ({1: Holder(w=p), "1": Holder(v=q)}, "x.1"),
        ({"b.c": p, "b": Holder(c=q)}, "x.b.c"),
    ):
        with pytest.raises(ValueError, match=f"Holder has two parts of the path '{path}'"):
            WALKS[walk](Holder(x=parts))


def test_a_parameter_must_be_floating() -> None:
    with pytest.raises(TypeError, match=r"int64 of shape \(2,\)"):
        nn.Parameter(np.arange(2))


def test_a_module_without_forward_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Module has no forward"):
        nn.Module()(1)


# ---------------------------------------------------------------- state


def test_state_dict_is_a_copy() -> None:
    net = Net()
    state = net.state_dict()
    with tinydiff.no_grad():
        net.scale *= 3
    assert host(state["scale"]) == 2


def test_load_state_dict_restores_the_function() -> None:
    a, b, x = Net(1), Net(2), normal(4, 3)
    assert not np.allclose(host(a(x)), host(b(x)))
    b.load_state_dict(a.state_dict())
    assert np.array_equal(host(a(x)), host(b(x)))
    with tinydiff.no_grad():
        b.scale *= 3
    assert host(a.scale) == 2


def test_load_state_dict_takes_host_arrays_and_casts() -> None:
    net = Net()
    state = {name: host(a).astype(np.float64) for name, a in net.state_dict().items()}
    state["scale"] = np.array([5.0])
    net.load_state_dict(state)
    assert host(net.scale) == 5 and net.scale.dtype == "float32"
    state["scale"][0] = 6
    assert host(net.scale) == 5


def test_load_state_dict_lists_all_that_is_wrong_and_changes_nothing() -> None:
    net = Net()
    state = net.state_dict()
    before = host(net.scale).copy()
    state["scale"] = state["scale"] + 1
    state["heads.b.weight"] = np.zeros((1, 3), np.float32)
    del state["blocks.0.lin.weight"], state["blocks.0.lin.bias"]
    state["extra"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    assert str(error.value) == (
        "this state does not fit Net: 2 missing: blocks.0.lin.weight (3, 3), blocks.0.lin.bias (3,); 1 unexpected: "
        "extra (7,); 1 wrongly shaped: heads.b.weight is (1, 3), not (3, 1)"
    )
    assert np.array_equal(host(net.scale), before)


@pytest.mark.parametrize("value", [None, "weights", np.array(["a", "b"]), np.ones(2, complex)])
def test_a_state_of_no_real_numbers_changes_nothing(value: Any) -> None:
    net = nn.Linear(2, 2, rng=0)
    before = host(net.weight).copy()
    with pytest.raises(ValueError, match="1 of another kind: bias is .*, not float32"):
        net.load_state_dict({"weight": np.zeros((2, 2)), "bias": value})
    assert np.array_equal(host(net.weight), before)
    with pytest.raises(ValueError, match="this state does not fit Linear: it is a list"):
        net.load_state_dict([before])


def test_loading_is_noticed_by_the_graph() -> None:
    net = Net()
    y = net(normal(4, 3)).sum()
    net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_loading_copies_into_the_arrays_that_are_there() -> None:
    """So that a captured step, an optimiser and a view go on with what was loaded."""
    net = Net(1)
    arrays = {name: t.data for name, t in net.named_tensors()}
    before = next(changes.clock)
    view = net.scale[0:1]
    other = Net(2).state_dict()
    other["scale"] = np.array([7.0])
    net.load_state_dict(other)
    for name, t in net.named_tensors():
        assert t.data is arrays[name] and changes.changes[id(t.data)][0] > before
        assert np.array_equal(host(t), host(other[name]))
    assert host(view) == 7


# ---------------------------------------------------------------- hooks


def test_a_hook_sees_the_inputs_and_the_output_and_may_replace_it() -> None:
    net, x, seen = Net(), normal(4, 3), []
    plain = host(net(x))
    one = net.heads["a"].register_forward_hook(lambda module, inputs, output: seen.append((module, inputs, output)))
    assert np.array_equal(host(net(x)), plain)
    ((module, inputs, output),) = seen
    assert module is net.heads["a"] and len(inputs) == 1 and inputs[0].shape == (4, 3)
    assert np.array_equal(host(output), plain)

    two = net.heads["a"].register_forward_hook(lambda module, inputs, output: output * 2)
    three = net.heads["a"].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert np.array_equal(host(net(x)), 2 * plain)
    assert np.array_equal(host(seen[1][2]), plain) and np.array_equal(host(seen[2]), 2 * plain), "in their order"
    for handle in (two, one, two):  # removed twice: nothing happens
        handle.remove()
    assert np.array_equal(host(net(x)), plain) and len(seen) == 4
    three.remove()
    net(x)
    assert len(seen) == 4


def test_hooks_leave_no_trace_in_the_state_nor_in_other_modules() -> None:
    net, seen = Net(), []
    other = copy.deepcopy(net)
    handle = net.register_forward_hook(lambda *call: seen.append(call))
    assert list(net.state_dict()) == NAMES and not nn.Module._forward_hooks
    other(normal(2, 3)), Net()(normal(2, 3))
    assert seen == []
    net(normal(2, 3))
    assert len(seen) == 1
    handle.remove()


def test_a_hook_may_remove_itself_and_gradients_flow_through_a_replacement() -> None:
    layer = nn.Linear(3, 1, rng=0)

    def once(module: Any, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * 3

    handle = layer.register_forward_hook(once)
    x = normal(2, 3)
    layer(x).sum().backward()
    tripled = host(layer.weight.grad).copy()
    layer.zero_grad()
    layer(x).sum().backward()
    assert np.allclose(tripled, 3 * host(layer.weight.grad))


# ---------------------------------------------------------------- Sequential, print


def test_sequential() -> None:
    net = nn.Sequential(nn.Linear(3, 4, rng=0), ops.tanh, nn.Linear(4, 2, rng=1))
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert len(net) == 3 and net[1] is ops.tanh and net[-1].out_features == 2
    x = normal(5, 3)
    assert np.array_equal(host(net(x)), host(net[2](ops.tanh(net[0](x)))))
    with pytest.raises(TypeError, match="not int: 3"):
        nn.Sequential(nn.SiLU(), 3)


def test_print_shows_a_tree_with_counts() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, bias=False, rng=0), nn.GroupNorm(4, 8), nn.Sequential(nn.SiLU()))
    rows = [
        ("Sequential", 88),
        ("  0: Conv2d(1, 8, 3, stride=2, bias=False)", 72),
        ("  1: GroupNorm(4, 8)", 16),
        ("  2: Sequential", 0),
    ]
    rows.append(("    0: SiLU", 0))
    assert repr(net) == "\n".join(f"{text:42} {count:12}" for text, count in rows)
    assert "blocks.1.0: Block" in repr(Net()) and "heads.b: Linear(3, 1, bias=False)" in repr(Net())


# ---------------------------------------------------------------- initialisation


LAYERS = {
    "linear": (lambda rng: nn.Linear(40, 50, rng=rng), 40),
    "conv1d": (lambda rng: nn.Conv1d(16, 40, 5, groups=2, rng=rng), 40),
    "conv2d": (lambda rng: nn.Conv2d(16, 40, (3, 5), groups=4, rng=rng), 60),
    "conv_transpose2d": (lambda rng: nn.ConvTranspose2d(40, 16, (3, 5), groups=4, rng=rng), 60),
}


@pytest.mark.parametrize("name", LAYERS)
def test_default_weights_are_uniform_with_the_fan_in_of_pytorch(name: str) -> None:
    make, fan_in = LAYERS[name]
    layer, bound = make(Rng(3)), 1 / math.sqrt(fan_in)
    w = host(layer.weight)
    assert w.dtype == np.float32
    assert 0.98 * bound < abs(w).max() <= bound
    assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.05
    assert abs(w.mean()) < 0.05 * bound * 2
    assert abs(host(layer.bias)).max() <= bound


@pytest.mark.parametrize("name", LAYERS)
def test_a_seed_decides_the_weights(name: str) -> None:
    make, _ = LAYERS[name]
    one, same, other = (host(make(rng).weight) for rng in (7, Rng(7), 8))
    assert np.array_equal(one, same) and not np.allclose(one, other)
    assert not np.allclose(host(make(None).weight), host(make(None).weight))


def test_layers_made_from_one_source_differ() -> None:
    rng = Rng(0)
    assert not np.allclose(host(nn.Linear(4, 4, rng=rng).weight), host(nn.Linear(4, 4, rng=rng).weight))


def test_embedding_and_frequencies_are_normal() -> None:
    w = host(nn.Embedding(100, 64, rng=0).weight)
    assert abs(w.std() - 1) < 0.03 and abs(w.mean()) < 0.05
    f = nn.FourierFeatures(512, scale=30, rng=0)
    assert abs(host(f.W).std() / 30 - 1) < 0.15
    assert list(f.state_dict()) == ["W"] and f.count() == 0


def test_attention_is_xavier_with_zero_biases() -> None:
    a = nn.MultiHeadAttention(64, 4, rng=0)
    bound = math.sqrt(6 / (64 + 192))
    w = host(a.in_proj_weight)
    assert 0.98 * bound < abs(w).max() <= bound
    assert not host(a.in_proj_bias).any() and not host(a.out_proj.bias).any()


# ---------------------------------------------------------------- layers


def test_linear() -> None:
    layer, x = nn.Linear(3, 2, rng=0), normal(4, 5, 3)
    assert np.allclose(host(layer(x)), host(x) @ host(layer.weight) + host(layer.bias), atol=1e-6)
    assert nn.Linear(3, 2, bias=False).bias is None


@pytest.mark.parametrize(
    ("layer", "x", "shape"),
    [
        (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1), (3, 9, 2), (3, 5, 4)),
        (lambda: nn.Conv2d(2, 4, 3, stride=2, padding="same"), (3, 9, 8, 2), (3, 5, 4, 4)),
        (lambda: nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0), groups=2), (3, 9, 8, 2), (3, 5, 8, 4)),
        (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 4, 2), (3, 10, 8, 4)),
        (lambda: nn.GroupNorm(2, 4), (3, 5, 4), (3, 5, 4)),
        (lambda: nn.LayerNorm(4), (3, 5, 4), (3, 5, 4)),
        (lambda: nn.BatchNorm2d(4), (3, 5, 5, 4), (3, 5, 5, 4)),
        (lambda: nn.MultiHeadAttention(4, 2), (3, 5, 4), (3, 5, 4)),
        (lambda: nn.FourierFeatures(6), (3,), (3, 6)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shape_and_dtype(layer: Any, x: Any, shape: Any, dtype: str) -> None:
    module = layer().astype(dtype)
    y = module(Tensor(Rng(0).normal(x, dtype), requires_grad=True))
    assert y.shape == shape and y.dtype == dtype
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.dtype == dtype for p in module.parameters())


def test_modules_take_arrays_of_the_device() -> None:
    x = Rng(0).normal((4, 3))
    assert np.array_equal(host(nn.Linear(3, 2, rng=0)(x)), host(nn.Linear(3, 2, rng=0)(Tensor(x))))


def test_activations_are_the_ops() -> None:
    x = normal(3, 4)
    for layer, op in ((nn.SiLU(), ops.silu), (nn.ReLU(), ops.relu), (nn.Sigmoid(), ops.sigmoid), (nn.GELU(), ops.gelu)):
        assert np.array_equal(host(layer(x)), host(op(x)))
    assert np.array_equal(host(nn.GELU("tanh")(x)), host(ops.gelu(x, approximate="tanh")))


def test_batch_norm_follows_the_statistics_and_uses_them_in_evaluation() -> None:
    norm, x = nn.BatchNorm2d(3, momentum=0.25), normal(8, 4, 4, 3)
    values = host(x) * [1, 2, 3] + [0, -1, 5]
    x = tensor(values.astype(np.float32))
    y = host(norm(x))
    assert np.allclose(y.mean((0, 1, 2)), 0, atol=1e-5) and np.allclose(y.std((0, 1, 2)), 1, atol=1e-3)
    mean, var = values.mean((0, 1, 2)), values.var((0, 1, 2), ddof=1)
    assert np.allclose(host(norm.running_mean), 0.25 * mean, atol=1e-5)
    assert np.allclose(host(norm.running_var), 0.75 + 0.25 * var, atol=1e-4)
    norm.eval()
    alone = np.concatenate([host(norm(x[i : i + 1])) for i in range(8)])
    assert np.allclose(alone, host(norm(x)), atol=1e-6)
    assert np.allclose(alone, (values - 0.25 * mean) / np.sqrt(0.75 + 0.25 * var + 1e-5), atol=1e-4)
    assert np.allclose(host(norm.running_mean), 0.25 * mean, atol=1e-5)
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


def test_batch_norm_changes_its_statistics_in_place() -> None:
    """So that a captured step finds them where they were."""
    norm = nn.BatchNorm2d(3)
    arrays, before = (norm.running_mean.data, norm.running_var.data), next(changes.clock)
    norm(normal(4, 2, 2, 3))
    assert norm.running_mean.data is arrays[0] and norm.running_var.data is arrays[1]
    assert changes.changes[id(arrays[0])][0] > before and host(norm.running_mean).any()
    assert not norm.running_mean.requires_grad


def test_dropout_only_while_training_and_each_layer_its_own_mask() -> None:
    rng = Rng(0)
    a, b = nn.Dropout(0.5, rng=rng), nn.Dropout(0.5, rng=rng)
    x = tensor(np.ones((64, 64), np.float32))
    first, second, other = host(a(x)), host(a(x)), host(b(x))
    assert set(np.unique(first)) == {0, 2} and abs(first.mean() - 1) < 0.05
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(host(a.eval()(x)), host(x))
    with pytest.raises(ValueError, match="not 1.0"):
        nn.Dropout(1.0)


def test_embedding_picks_rows_and_checks_what_it_can() -> None:
    table = nn.Embedding(10, 4, rng=0)
    w = host(table.weight)
    for index in ([1, 9, 1], np.array([1, 9, 1]), tensor(np.array([1, 9, 1])), backend.to_device(np.array([1, 9, 1]))):
        assert np.array_equal(host(table(index)), w[[1, 9, 1]])
    table([1, 9, 1]).sum().backward()
    assert host(table.weight.grad)[:, 0].tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    for index in ([0, 10], [-1, 0], np.array([[10]])):
        with pytest.raises(IndexError, match="rows 0 to 9"):
            table(index)
    with pytest.raises(TypeError, match="float32"):
        table(np.zeros(2, np.float32))


def test_fourier_features() -> None:
    layer, x = nn.FourierFeatures(8, scale=3, rng=0), normal(5)
    angle = 2 * np.pi * host(x)[:, None] * host(layer.W)
    assert np.allclose(host(layer(x)), np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=1e-4)


def test_attention_ways_to_call_agree() -> None:
    a, x, y = nn.MultiHeadAttention(8, 2, rng=0), normal(2, 5, 8), normal(2, 3, 8, seed=1)
    assert np.allclose(host(a(x)), host(a(x, x.detach())), atol=1e-6)
    assert np.allclose(host(a(x, y)), host(a(x, y, y.detach())), atol=1e-6)
    mask = backend.to_device(np.array([True, False, True]))
    kept = tensor(host(y)[:, [0, 2]])
    assert np.allclose(host(a(x, y, mask=mask)), host(a(x, kept)), atol=1e-6)


def test_attention_dropout_acts_on_the_weights() -> None:
    a, x = nn.MultiHeadAttention(8, 2, dropout=0.5, rng=0), normal(2, 5, 8)
    still = host(a.eval()(x))
    drops = np.stack([host(a.train()(x)) for _ in range(400)])
    assert not np.allclose(drops[0], drops[1])
    assert np.allclose(drops.mean(0), still, atol=0.15)
    none = nn.MultiHeadAttention(8, 2, rng=0)
    none.load_state_dict(a.state_dict())
    assert np.array_equal(host(none(x)), still)


def test_padding_valid_is_none() -> None:
    x = normal(2, 7, 6, 3)
    none, valid = nn.Conv2d(3, 4, 3, rng=0), nn.Conv2d(3, 4, 3, padding="valid", rng=0)
    assert np.array_equal(host(none(x)), host(valid(x)))
    assert nn.Conv1d(3, 4, 3, padding="valid", rng=0)(normal(2, 7, 3)).shape == (2, 5, 4)


def test_sizes_may_be_numpys_and_one_per_axis() -> None:
    three = np.int64(3)
    layer = nn.Conv2d(three, np.int32(4), three, stride=[np.int64(2), 1], rng=0)
    assert type(layer.in_channels) is type(layer.kernel_size) is int and layer.stride == (2, 1)
    assert layer(normal(2, 7, 6, 3)).shape == (2, 3, 4, 4)
    assert nn.Conv1d(3, 4, (3,), stride=(2,), rng=0)(normal(2, 7, 3)).shape == (2, 3, 4)
    assert type(nn.GroupNorm(2, 4, eps=np.float64(1e-5)).eps) is float


NAN = math.nan


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.GroupNorm(2, 4, eps=-1), "GroupNorm: eps .* not -1"),
        (lambda: nn.GroupNorm(2, 4, eps=NAN), "GroupNorm: eps .* not nan"),
        (lambda: nn.GroupNorm(2, 4, eps=[1]), r"GroupNorm: eps .* not \[1\]"),
        (lambda: nn.GroupNorm(2.0, 4), "num_groups .* not 2.0"),
        (lambda: nn.GroupNorm(1, 0), "num_channels .* not 0"),
        (lambda: nn.LayerNorm((6,)), r"LayerNorm: features .* not \(6,\)"),
        (lambda: nn.LayerNorm(0), "LayerNorm: features .* not 0"),
        (lambda: nn.LayerNorm(4, eps=-1), "LayerNorm: eps .* not -1"),
        (lambda: nn.BatchNorm2d(2.5), "num_features .* not 2.5"),
        (lambda: nn.BatchNorm2d(2, eps=NAN), "BatchNorm2d: eps .* not nan"),
        (lambda: nn.BatchNorm2d(2, momentum=-1), "momentum .* not -1"),
        (lambda: nn.BatchNorm2d(2, momentum=2), "momentum .* not 2"),
        (lambda: nn.BatchNorm2d(2, momentum=NAN), "momentum .* not nan"),
        (lambda: nn.Conv2d(3, 4, 3, stride=0), "Conv2d: stride .* not 0"),
        (lambda: nn.Conv1d(3, 4, 3, stride=0), "Conv1d: stride .* not 0"),
        (lambda: nn.Conv2d(3, 4, 3, dilation=-1), "dilation .* not -1"),
        (lambda: nn.Conv2d(3, 4, 3, padding="full"), "padding .* not 'full'"),
        (lambda: nn.Conv1d(3, 4, 3, padding=-1), "padding .* not -1"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, padding="same"), "ConvTranspose2d: padding .* not 'same'"),
        (lambda: nn.Conv2d(3, 4, 0), "kernel_size .* not 0"),
        (lambda: nn.Conv2d(3, 4, 2.5), "kernel_size .* not 2.5"),
        (lambda: nn.Conv2d(0, 4, 3), "in_channels .* not 0"),
        (lambda: nn.ConvTranspose2d(3, 2.5, 3), "out_channels .* not 2.5"),
        (lambda: nn.Conv2d(4, 4, 3, groups=0), "groups .* not 0"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, output_padding=1), "output_padding=1 must be smaller than stride=1"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, stride=(2, 1), output_padding=1), r"smaller than stride=\(2, 1\)"),
        (lambda: nn.GELU("nonsense"), "GELU: approximate must be 'none' or 'tanh', not 'nonsense'"),
        (lambda: nn.Linear(0, 2), "Linear: in_features .* not 0"),
        (lambda: nn.Linear(2, 2.5), "Linear: out_features .* not 2.5"),
        (lambda: nn.Embedding(0, 2), "num_embeddings .* not 0"),
        (lambda: nn.Embedding(2, 2.5), "embedding_dim .* not 2.5"),
        (lambda: nn.Dropout(NAN), "Dropout: p .* not nan"),
        (lambda: nn.Dropout("0.5"), "Dropout: p .* not '0.5'"),
        (lambda: nn.FourierFeatures(2.5), "features .* not 2.5"),
        (lambda: nn.FourierFeatures(2, scale=NAN), "scale .* not nan"),
        (lambda: nn.MultiHeadAttention(4.0, 2), "embed_dim .* not 4.0"),
        (lambda: nn.MultiHeadAttention(4, 0), "num_heads .* not 0"),
        (lambda: nn.MultiHeadAttention(4, 2, kdim=0), "kdim .* not 0"),
        (lambda: nn.MultiHeadAttention(4, 2, vdim=2.5), "vdim .* not 2.5"),
        (lambda: nn.MultiHeadAttention(4, 2, NAN), "p .* not nan"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_the_constructor(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


# ---------------------------------------------------------------- errors, at the call, with the shapes


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: nn.Linear(3, 2)(normal(4, 5)), ValueError, r"Linear\(3, 2\) takes x \(\.\.\., 3\), not \(4, 5\)"),
        (lambda: nn.Linear(3, 2)(normal(4, 3).astype("float64")), TypeError,
         r"\(4, 3\) is float64, but the weights are float32: .* or module.astype\('float64'\)"),
        (lambda: nn.Linear(3, 2)(normal(4, 3).astype("int64")), TypeError,
         r"is int64, .* convert with x.astype\('float32'\)$"),
        (lambda: nn.Linear(3, 2).astype("int64"), TypeError, "parameters are floating numbers, not 'int64'"),
        (lambda: nn.Conv2d(3, 2, 3)(normal(4, 8, 8, 2)), ValueError, r"\(4, 8, 8, 2\)"),
        (lambda: nn.Conv2d(3, 2, 3)(normal(4, 8, 3)), ValueError, r"\(4, 8, 3\)"),
        (lambda: nn.Conv2d(3, 2, 3)(normal(4, 2, 8, 3)), ValueError, "empty"),
        (lambda: nn.Conv2d(3, 2, (3, 3, 3)), ValueError, r"kernel_size .* not \(3, 3, 3\)"),
        (lambda: nn.Conv1d(3, 2, 0), ValueError, "not 0"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2), ValueError, "groups=2 must divide in_channels=3 and out_channels=4"),
        (lambda: nn.GroupNorm(3, 4), ValueError, "num_groups=3 must divide num_channels=4"),
        (lambda: nn.GroupNorm(2, 4)(normal(2, 5)), ValueError, r"4 channels .* not \(2, 5\)"),
        (lambda: nn.LayerNorm(4)(normal(2, 5)), ValueError, r"not \(2, 5\)"),
        (lambda: nn.BatchNorm2d(4)(normal(2, 4)), ValueError, r"4 axes or more, channels last, not \(2, 4\)"),
        (lambda: nn.BatchNorm2d(4)(normal(1, 1, 1, 4)), ValueError, r"\(1, 1, 1, 4\) has one value per channel"),
        (lambda: nn.FourierFeatures(5), ValueError, "not 5"),
        (lambda: nn.FourierFeatures(4)(normal(2, 1)), ValueError, r"\(2, 1\)"),
        (lambda: nn.MultiHeadAttention(6, 4), ValueError, "num_heads=4 must divide embed_dim=6"),
        (lambda: nn.MultiHeadAttention(6, 2)(normal(2, 5)), ValueError,
         r"query must be \(2, length, 6\), not \(2, 5\)"),
        (lambda: nn.MultiHeadAttention(6, 2)(normal(2, 5, 6), normal(3, 4, 6)), ValueError, r"key .* not \(3, 4, 6\)"),
        (lambda: nn.MultiHeadAttention(6, 2)(normal(2, 5, 6), normal(2, 4, 6), normal(2, 3, 6)), ValueError,
         "differ in length"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        call()
