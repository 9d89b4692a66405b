"""Weights in PyTorch's layouts, without PyTorch: the arrays here are what it would hold. With it: parity/."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tinydiff import backend, interop, nn

pytestmark = pytest.mark.usefixtures("each_backend")


class Net(nn.Module):
    def __init__(self) -> None:
        self.conv = nn.Conv2d(4, 6, (3, 5), groups=2, rng=0)
        self.blocks = [nn.ConvTranspose2d(6, 4, (3, 5), groups=2, bias=False, rng=1), nn.Conv1d(2, 3, 4, rng=2)]
        self.lin = nn.Linear(2, 3, rng=3)
        self.norm = nn.BatchNorm2d(6)
        self.table = nn.Embedding(5, 3, rng=4)
        self.attn = nn.MultiHeadAttention(4, 2, rng=5)
        self.cross = nn.MultiHeadAttention(4, 2, bias=False, kdim=3, vdim=2, rng=6)


SHAPES = {
    "conv.weight": (6, 2, 3, 5), "conv.bias": (6,), "blocks.0.weight": (6, 2, 3, 5), "blocks.1.weight": (3, 2, 4),
    "blocks.1.bias": (3,), "lin.weight": (3, 2), "lin.bias": (3,), "norm.weight": (6,), "norm.bias": (6,),
    "norm.running_mean": (6,), "norm.running_var": (6,), "table.weight": (5, 3), "attn.in_proj_weight": (12, 4),
    "attn.in_proj_bias": (12,), "attn.out_proj.weight": (4, 4), "attn.out_proj.bias": (4,),
    "cross.q_proj_weight": (4, 4), "cross.k_proj_weight": (4, 3), "cross.v_proj_weight": (4, 2),
    "cross.out_proj.weight": (4, 4), "norm.num_batches_tracked": (),
}  # fmt: skip


def test_to_torch_has_its_names_and_layouts() -> None:
    state = interop.to_torch(Net())
    assert {name: a.shape for name, a in state.items()} == SHAPES
    assert all(type(a) is np.ndarray and a.flags.c_contiguous for a in state.values())


def test_each_axis_goes_to_its_place() -> None:
    net = Net()
    net.load_state_dict({n: np.arange(t.size, dtype=np.float32).reshape(t.shape) for n, t in net.named_tensors()})
    theirs, ours = interop.to_torch(net), {n: backend.to_host(a) for n, a in net.state_dict().items()}
    o, i, a, b = 5, 1, 2, 4
    assert theirs["conv.weight"][o, i, a, b] == ours["conv.weight"][a, b, i, o]
    assert theirs["blocks.0.weight"][o, i, a, b] == ours["blocks.0.weight"][a, b, i, o]
    assert theirs["blocks.1.weight"][2, 1, 3] == ours["blocks.1.weight"][3, 1, 2]
    assert theirs["lin.weight"][2, 1] == ours["lin.weight"][1, 2]
    assert theirs["attn.in_proj_weight"][9, 1] == ours["attn.in_proj_weight"][1, 9]
    assert theirs["cross.k_proj_weight"][3, 2] == ours["cross.k_proj_weight"][2, 3]
    assert theirs["table.weight"][4, 1] == ours["table.weight"][4, 1]


def test_there_and_back() -> None:
    net, other = Net(), Net()
    other.load_state_dict({n: a * 0 for n, a in net.state_dict().items()})
    interop.from_torch(other, interop.to_torch(net))
    for name, a in net.state_dict().items():
        assert np.array_equal(backend.to_host(a), backend.to_host(other.state_dict()[name])), name


def test_a_single_layer_has_no_prefix() -> None:
    for layer in (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(2)):
        state = interop.to_torch(layer)
        assert not any(name.startswith(".") for name in state)
        interop.from_torch(layer, state)


class Fake:
    """As a torch tensor on a GPU that requires a gradient: only detach().cpu().numpy() works."""

    def __init__(self, array: np.ndarray, steps: tuple[str, ...] = ("detach", "cpu")):
        self.array, self.steps = array, steps

    def _after(self, step: str) -> Any:
        return Fake(self.array, tuple(s for s in self.steps if s != step))

    def detach(self) -> Any:
        return self._after("detach")

    def cpu(self) -> Any:
        return self._after("cpu")

    def numpy(self) -> np.ndarray:
        assert not self.steps, f"numpy() before {self.steps}"
        return self.array


def test_values_may_be_tensors_of_torch() -> None:
    layer = nn.Linear(2, 3, rng=0)
    w, b = np.arange(6, dtype=np.float64).reshape(3, 2), np.ones(3)
    interop.from_torch(layer, {"weight": Fake(w), "bias": b.tolist()})
    assert np.array_equal(layer.weight.numpy(), w.T) and layer.weight.dtype == "float32"


@pytest.mark.parametrize("kind", ["torch.bfloat16", "torch.float8_e4m3fn"])
def test_what_numpy_has_no_dtype_for_goes_through_float32(kind: str) -> None:
    class Brief(Fake):
        """As a torch tensor of bfloat16: numpy() is a TypeError, float() is a tensor of float32."""

        dtype = kind

        def _after(self, step: str) -> Any:
            return Brief(self.array, tuple(s for s in self.steps if s != step))

        def numpy(self) -> np.ndarray:
            raise TypeError("Got unsupported ScalarType BFloat16")

        def float(self) -> Any:
            return Fake(self.array, self.steps)

    layer = nn.Linear(2, 3, rng=0)
    w = np.arange(6, dtype=np.float32).reshape(3, 2)
    interop.from_torch(layer, {"weight": Brief(w), "bias": Brief(w[:, 0])})
    assert np.array_equal(layer.weight.numpy(), w.T) and layer.bias is not None
    assert np.array_equal(layer.bias.numpy(), w[:, 0])


def test_arrays_of_bfloat16_become_float32() -> None:
    layer = nn.Linear(2, 3, bias=False, rng=0)
    w = np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16)
    interop.from_torch(layer, {"weight": w})
    assert layer.weight.dtype == "float32" and np.array_equal(layer.weight.numpy(), w.T.astype(np.float32))


def test_errors_list_everything_and_nothing_is_changed() -> None:
    net = Net()
    before = {n: backend.to_host(a) for n, a in net.state_dict().items()}
    state = interop.to_torch(net)
    state["lin.weight"] = np.zeros((4, 2), np.float32)
    state["conv.weight"] = np.zeros((6, 2), np.float32)
    del state["table.weight"]
    state["lin.num_batches_tracked"] = np.zeros((), np.int64)
    with pytest.raises(ValueError) as error:
        interop.from_torch(net, state)
    message = str(error.value)
    assert "1 missing: table.weight (5, 3)" in message
    assert "1 unexpected: lin.num_batches_tracked ()" in message  # only batch norms have one
    assert "conv.weight is (6, 2), not (3, 5, 2, 6), lin.weight is (2, 4), not (2, 3)" in message
    for name, a in net.state_dict().items():
        assert np.array_equal(backend.to_host(a), before[name])
