"""Layers, their initial weights and the optimisers beside PyTorch's: same weights, same input, same adjoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, backend, interop, nn, optim, tensor

torch = pytest.importorskip("torch")
from compare import TOLERANCE, channels_first, close, compare_gradients, host  # noqa: E402  after the check that PyTorch is here

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def same(x: Any, _first: Any = None) -> Any:
    return x


# name: (ours, theirs, shape of the input, is there a channel axis to move)
LAYERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(5, 7), lambda: torch.nn.Linear(5, 7), (3, 4, 5), False),
    "linear without bias": (lambda: nn.Linear(5, 7, False), lambda: torch.nn.Linear(5, 7, False), (3, 5), False),
    "group_norm": (lambda: nn.GroupNorm(4, 8), lambda: torch.nn.GroupNorm(4, 8), (3, 5, 4, 8), True),
    "group_norm of one group": (
        lambda: nn.GroupNorm(1, 8, 1e-2),
        lambda: torch.nn.GroupNorm(1, 8, 1e-2),
        (3, 5, 8),
        True,
    ),
    "group_norm without affine": (
        lambda: nn.GroupNorm(8, 8, affine=False),
        lambda: torch.nn.GroupNorm(8, 8, affine=False),
        (3, 4, 4, 8),
        True,
    ),
    "layer_norm": (lambda: nn.LayerNorm(6, 1e-3), lambda: torch.nn.LayerNorm(6, 1e-3), (3, 4, 6), False),
    "layer_norm without affine": (
        lambda: nn.LayerNorm(6, elementwise_affine=False),
        lambda: torch.nn.LayerNorm(6, elementwise_affine=False),
        (3, 6),
        False,
    ),
    "batch_norm": (
        lambda: nn.BatchNorm2d(4, 1e-3, 0.3),
        lambda: torch.nn.BatchNorm2d(4, 1e-3, 0.3),
        (3, 5, 6, 4),
        True,
    ),
    "batch_norm in evaluation": (
        lambda: nn.BatchNorm2d(4).eval(),
        lambda: torch.nn.BatchNorm2d(4).eval(),
        (3, 5, 6, 4),
        True,
    ),
    "batch_norm without affine": (
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: torch.nn.BatchNorm2d(4, affine=False),
        (3, 5, 6, 4),
        True,
    ),
    "silu": (nn.SiLU, torch.nn.SiLU, (3, 5), False),
    "gelu": (nn.GELU, torch.nn.GELU, (3, 5), False),
    "gelu tanh": (lambda: nn.GELU("tanh"), lambda: torch.nn.GELU("tanh"), (3, 5), False),
    "relu": (nn.ReLU, torch.nn.ReLU, (3, 5), False),
    "sigmoid": (nn.Sigmoid, torch.nn.Sigmoid, (3, 5), False),
    "dropout in evaluation": (lambda: nn.Dropout(0.5).eval(), lambda: torch.nn.Dropout(0.5).eval(), (3, 5), False),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2)),
        lambda: torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.GELU(), torch.nn.Linear(6, 2)),
        (3, 5),
        False,
    ),
}
for options in (
    {},
    {"stride": 2},
    {"padding": 1, "bias": False},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (1, 2), "groups": 2},
    {"stride": 3, "padding": 1, "dilation": 2, "groups": 4},
):
    LAYERS[f"conv2d {options}"] = (
        lambda o=options: nn.Conv2d(4, 8, (3, 2), **o),
        lambda o=options: torch.nn.Conv2d(4, 8, (3, 2), **o),
        (2, 9, 8, 4),
        True,
    )
    single = {k: v if isinstance(v, (int, bool)) else v[1] for k, v in options.items()}
    LAYERS[f"conv1d {single}"] = (
        lambda o=single: nn.Conv1d(4, 8, 3, **o),
        lambda o=single: torch.nn.Conv1d(4, 8, 3, **o),
        (2, 9, 4),
        True,
    )
for options in (
    {},
    {"stride": 2, "output_padding": 1},
    {"stride": 2, "padding": 1, "bias": False},
    {"stride": (3, 2), "padding": (0, 1), "output_padding": (2, 0)},
    {"stride": 2, "groups": 2, "dilation": (2, 1)},
    {"stride": 3, "padding": 1, "output_padding": 1, "groups": 4, "dilation": 2},
):
    LAYERS[f"conv_transpose2d {options}"] = (
        lambda o=options: nn.ConvTranspose2d(8, 4, (3, 2), **o),
        lambda o=options: torch.nn.ConvTranspose2d(8, 4, (3, 2), **o),
        (2, 5, 4, 8),
        True,
    )
LAYERS["conv2d same"] = (
    lambda: nn.Conv2d(4, 8, (4, 3), padding="same", dilation=2),
    lambda: torch.nn.Conv2d(4, 8, (4, 3), padding="same", dilation=2),
    (2, 9, 8, 4),
    True,
)


def randomize(module: Any) -> None:
    """Other values than the initial ones, which are ones and zeros in places; a running variance must stay positive."""
    for i, (name, t) in enumerate(module.named_tensors()):
        values = Rng(50 + i).normal(t.shape, t.dtype) * 0.5
        t.data = values * values + 0.5 if name.endswith("var") else values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, dtype: str) -> None:
    make, make_theirs, shape, has_channels = LAYERS[name]
    first, last = (channels_first, channels_last) if has_channels else (same, same)
    ours, theirs = make().astype(dtype), make_theirs().to(getattr(torch, dtype))
    randomize(ours)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in interop.to_torch(ours).items()})

    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    a, b = tensor(x, requires_grad=True), torch.tensor(first(x), requires_grad=True)
    y, z = ours(a), theirs(b)
    g = np.random.default_rng(1).normal(size=z.shape).astype(dtype)
    y.backward(backend.to_device(last(g)))
    z.backward(torch.tensor(g))

    close(first(y), z, TOLERANCE[dtype], "output")
    close(first(a.grad), b.grad, TOLERANCE[dtype], "gradient of the input")
    state = interop.to_torch(ours)
    for key, value in theirs.state_dict().items():  # batch norm's running statistics have moved
        if not key.endswith("num_batches_tracked"):
            close(state[key], value, TOLERANCE[dtype], key)
    compare_gradients(ours, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_embedding(dtype: str) -> None:
    ours, theirs = nn.Embedding(7, 3, rng=0).astype(dtype), torch.nn.Embedding(7, 3).to(getattr(torch, dtype))
    theirs.load_state_dict({k: torch.tensor(v) for k, v in interop.to_torch(ours).items()})
    index = np.array([[1, 6, 1], [0, 1, 2]])
    y, z = ours(index), theirs(torch.tensor(index))
    g = np.random.default_rng(1).normal(size=z.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(g))
    close(y, z, TOLERANCE[dtype], "output")
    compare_gradients(ours, theirs, TOLERANCE[dtype])


ATTENTION: dict[str, tuple[dict[str, Any], str, str | None]] = {  # options of the layer, which inputs differ, mask
    "self": ({}, "x", None),
    "self without bias": ({"bias": False}, "x", None),
    "cross": ({}, "xy", None),
    "cross with values": ({}, "xyv", None),
    "other widths": ({"kdim": 5, "vdim": 3}, "xkv", None),
    "other widths without bias": ({"kdim": 5, "bias": False}, "xkx", None),
    "masked": ({}, "x", "bool"),
    "masked by addition": ({}, "xy", "float"),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, dtype: str) -> None:
    options, kinds, masked = ATTENTION[name]
    ours = nn.MultiHeadAttention(8, 2, rng=0, **options).astype(dtype)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, **options).to(getattr(torch, dtype))
    randomize(ours)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in interop.to_torch(ours).items()})

    rng = np.random.default_rng(0)
    widths = {"x": 8, "y": 8, "k": ours.kdim, "v": ours.vdim}
    arrays = [
        rng.normal(size=(3, 4 if i == 0 or "x" in kinds[1:] else 5, widths[k])).astype(dtype)
        for i, k in enumerate(kinds)
    ]
    a = [tensor(x, requires_grad=True) for x in arrays]
    b = [torch.tensor(x, requires_grad=True) for x in arrays]
    length = arrays[min(1, len(arrays) - 1)].shape[1]
    allowed = rng.random((4, length)) < 0.6
    allowed[:, 0] = True
    bias = rng.normal(size=(4, length)).astype(dtype)
    mask = {"bool": allowed, "float": bias, None: None}[masked]
    their_mask = {"bool": torch.tensor(~allowed), "float": torch.tensor(bias), None: None}[masked]

    y = ours(*a, mask=None if mask is None else backend.to_device(mask))
    full = [b[0], b[min(1, len(b) - 1)], b[-1]]
    z, _ = theirs(*full, attn_mask=their_mask)
    g = rng.normal(size=z.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(g))
    close(y, z, TOLERANCE[dtype], "output")
    for i, (ours_x, theirs_x) in enumerate(zip(a, b)):
        close(ours_x.grad, theirs_x.grad, TOLERANCE[dtype], f"gradient of input {i}")
    compare_gradients(ours, theirs, TOLERANCE[dtype])


# ---------------------------------------------------------------- initial weights


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("context", [False, True], ids=["encoder", "decoder"])
def test_transformer_block(context: bool, dtype: str) -> None:
    """With a context it is PyTorch's decoder layer; the mask of the keys of each sample is True where theirs is not."""
    kind = torch.nn.TransformerDecoderLayer if context else torch.nn.TransformerEncoderLayer
    theirs = kind(8, 2, 20, 0.0, "gelu", batch_first=True, norm_first=True).to(getattr(torch, dtype))
    ours = nn.TransformerBlock(8, 2, 20, kdim=8 if context else None, rng=0).astype(dtype)
    randomize(ours)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in interop.to_torch(ours).items()})
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(3, n, 8)).astype(dtype) for n in (5, 4)[: 1 + context]]
    masks = [rng.random((3, a.shape[1])) < 0.6 for a in arrays]
    for m in masks:
        m[:, 0] = True
    a = [tensor(x, requires_grad=True) for x in arrays]
    b = [torch.tensor(x, requires_grad=True) for x in arrays]
    names = ("mask", "context_mask")
    y = ours(*a, **{name: backend.to_device(m[:, None, None]) for name, m in zip(names, masks)})
    names = ("tgt_key_padding_mask", "memory_key_padding_mask") if context else ("src_key_padding_mask",)
    z = theirs(*b, **{name: torch.tensor(~m) for name, m in zip(names, masks)})
    g = rng.normal(size=z.shape).astype(dtype)
    y.backward(backend.to_device(g))
    z.backward(torch.tensor(g))
    close(y, z, TOLERANCE[dtype], "output")
    for ours_x, theirs_x in zip(a, b):
        close(ours_x.grad, theirs_x.grad, TOLERANCE[dtype], "gradient of an input")
    compare_gradients(ours, theirs, TOLERANCE[dtype])


INITIAL = {
    "linear": (lambda: nn.Linear(64, 80, rng=0), lambda: torch.nn.Linear(64, 80)),
    "conv1d": (lambda: nn.Conv1d(32, 64, 3, groups=2, rng=0), lambda: torch.nn.Conv1d(32, 64, 3, groups=2)),
    "conv2d": (lambda: nn.Conv2d(32, 64, (3, 2), groups=2, rng=0), lambda: torch.nn.Conv2d(32, 64, (3, 2), groups=2)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(64, 32, (3, 2), groups=2, rng=0),
        lambda: torch.nn.ConvTranspose2d(64, 32, (3, 2), groups=2),
    ),
    "embedding": (lambda: nn.Embedding(100, 64, rng=0), lambda: torch.nn.Embedding(100, 64)),
    "attention": (lambda: nn.MultiHeadAttention(64, 4, rng=0), lambda: torch.nn.MultiheadAttention(64, 4)),
    "attention of other widths": (
        lambda: nn.MultiHeadAttention(64, 4, kdim=48, vdim=80, rng=0),
        lambda: torch.nn.MultiheadAttention(64, 4, kdim=48, vdim=80),
    ),
    "group_norm": (lambda: nn.GroupNorm(4, 8), lambda: torch.nn.GroupNorm(4, 8)),
    "layer_norm": (lambda: nn.LayerNorm(8), lambda: torch.nn.LayerNorm(8)),
    "batch_norm": (lambda: nn.BatchNorm2d(8), lambda: torch.nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_have_the_distribution_of_pytorch(name: str) -> None:
    torch.manual_seed(0)
    make, make_theirs = INITIAL[name]
    ours, theirs = interop.to_torch(make()), make_theirs().state_dict()
    assert set(ours) == set(theirs)
    for key, a in ours.items():
        b = theirs[key].numpy()
        assert a.shape == b.shape and a.dtype == b.dtype, key
        if a.size > 2000:
            assert a.std() == pytest.approx(b.std(), rel=0.05), key
            assert abs(a.mean() - b.mean()) < 0.1 * b.std(), key
            if abs(b).max() < 3 * b.std():  # uniform: the bounds are sharp
                assert abs(a).max() == pytest.approx(abs(b).max(), rel=0.01), key
        elif b.std() == 0:
            assert np.array_equal(a, b), key  # ones and zeros
        else:  # biases: few numbers
            assert abs(a).max() == pytest.approx(abs(b).max(), rel=0.25), key


# ---------------------------------------------------------------- optimisers


OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "sgd": (lambda p: optim.SGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "sgd decay": (lambda p: optim.SGD(p, 0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
    "momentum": (
        lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "nesterov": (
        lambda p: optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    "adam": (lambda p: optim.Adam(p), lambda p: torch.optim.Adam(p)),
    "adam with options": (
        lambda p: optim.Adam(p, 0.02, (0.7, 0.95), 1e-4, 0.1),
        lambda p: torch.optim.Adam(p, 0.02, (0.7, 0.95), 1e-4, 0.1),
    ),
    "adamw": (lambda p: optim.AdamW(p), lambda p: torch.optim.AdamW(p)),
    "adamw with options": (
        lambda p: optim.AdamW(p, 0.02, (0.7, 0.95), 1e-4, 0.3),
        lambda p: torch.optim.AdamW(p, 0.02, (0.7, 0.95), 1e-4, 0.3),
    ),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_of_an_optimizer(name: str, clip: float | None) -> None:
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=shape) for shape in ((4, 3), (3,), (2, 3, 2))]
    ours, theirs = [nn.Parameter(a) for a in starts], [torch.nn.Parameter(torch.tensor(a)) for a in starts]
    make, make_theirs = OPTIMIZERS[name]
    one, two = make(ours), make_theirs(theirs)
    for step in range(10):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            g = rng.normal(size=p.shape)
            p.grad, q.grad = (None, None) if i == 1 and step == 4 else (tensor(g), torch.tensor(g))
        if clip:
            norm, their_norm = optim.clip_grad_norm(ours, clip), torch.nn.utils.clip_grad_norm_(theirs, clip)
            assert float(host(norm)) == pytest.approx(float(their_norm), rel=1e-12)
        one.lr *= 0.9
        for group in two.param_groups:
            group["lr"] *= 0.9
        one.step()
        two.step()
    for p, q in zip(ours, theirs):
        np.testing.assert_allclose(host(p), q.detach().numpy(), rtol=1e-12, atol=1e-13)


def test_weights_in_bfloat16() -> None:
    theirs, layer = torch.nn.Linear(2, 3, dtype=torch.bfloat16), nn.Linear(2, 3, rng=0)
    interop.from_torch(layer, theirs.state_dict())
    assert np.array_equal(layer.weight.numpy(), theirs.weight.detach().float().numpy().T)
