"""The weights of attention to each word: softmax(q k^T), one map per layer and pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, nn, observers
from tinydiff.backend import to_device
from tinydiff.diffusion import Denoiser, KarrasSDE, sample
from tinydiff.models.attention_maps import attention_maps
from tinydiff.models.text import TextEncoder, TextToImage
from tinydiff.models.unet import UNet

pytestmark = pytest.mark.usefixtures("each_backend")
IDS = np.array([[1, 2, 3, 0, 0], [4, 5, 1, 2, 3]])


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def softmax(s: np.ndarray) -> np.ndarray:
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_weights_are_softmax_of_q_k(dropout: float) -> None:
    layer = nn.MultiHeadAttention(8, 2, dropout, kdim=6, vdim=6, rng=0).astype("float64")
    x, context = Tensor(Rng(0).normal((3, 5, 8), "float64")), Tensor(Rng(1).normal((3, 4, 6), "float64"))
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
    with attention_maps(layer) as maps:
        layer(x, context, mask=to_device(mask[:, None, None]))
    bias = host(layer.in_proj_bias)
    q, k = (
        (host(a) @ host(w) + b).reshape(3, -1, 2, 4).swapaxes(1, 2)
        for a, w, b in ((x, layer.q_proj_weight, bias[:8]), (context, layer.k_proj_weight, bias[8:16]))
    )
    right = softmax(np.where(mask[:, None, None], q @ k.swapaxes(2, 3) / 2, -np.inf)).mean(axis=1)
    assert list(maps) == [""]
    np.testing.assert_allclose(host(maps[""][0]), right, rtol=1e-10)


def test_self_attention_leaves_no_map() -> None:
    layer, x = nn.MultiHeadAttention(8, 2, rng=0), Tensor(Rng(0).normal((3, 5, 8)))
    with attention_maps(layer) as maps:
        layer(x)
        layer(x, x)
    assert not maps


def test_one_map_per_layer_and_step_and_each_sums_to_one() -> None:
    net = TextToImage(
        TextEncoder(6, 5, 12, 1, 2, rng=1),
        UNet(1, (8, 16), embedding=12, groups=4, context=12, attention=(0, 1), heads=2, rng=0),
    )
    x, noise = Tensor(Rng(0).normal((2, 8, 8, 1))), Rng(1).normal(2)
    before = host(net(x, noise, tokens=IDS))
    with attention_maps(net) as maps:
        np.testing.assert_array_equal(host(net(x, noise, tokens=IDS)), before)
        net(x, noise, **net.encode(IDS))
    layers = [f"net.{part}.block.multihead_attn" for part in ("down.1", "down.4", "up.1", "up.4")]
    assert list(maps) == layers, "not the self-attention of the net, nor that of the encoder"
    for name, pixels in zip(layers, (16, 4, 4, 16)):
        assert len(maps[name]) == 2
        for weights in maps[name]:
            assert weights.shape == (2, pixels, 5) and str(weights.dtype) == "float32"
            np.testing.assert_allclose(host(weights).sum(axis=2), 1, rtol=1e-5)
            assert not host(weights)[0, :, 3:].any(), "padding is not looked at"
    assert not observers.observers
    net(x, noise, tokens=IDS)
    assert len(maps[layers[0]]) == 2, "nothing is noted afterwards"


def test_while_sampling() -> None:
    net = TextToImage(TextEncoder(6, 5, 8, 1, 2), UNet(1, (8,), embedding=12, groups=4, context=8, heads=2, rng=0))
    with attention_maps(net) as maps:
        sample(Denoiser(net, 0.5), (2, 8, 8, 1), KarrasSDE(), 0, method="ddim", steps=3, eps=0.01, **net.encode(IDS))
    assert {name: len(found) for name, found in maps.items()} == {
        "net.down.1.block.multihead_attn": 4,
        "net.up.1.block.multihead_attn": 4,
    }
