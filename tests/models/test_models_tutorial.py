"""The tutorial's nets: their published sizes, shapes at every batch size, a training step without a wait, clear errors.

That they compute what they should is shown beside PyTorch, in parity/test_nets.py.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, no_grad, ops, optim, tensor
from tinydiff.diffusion import VESDE, score_matching_loss
from tinydiff.models.tutorial import Autoencoder, ConditionalUNet, LatentUNet, ScoreUNet, SpatialTransformer

pytestmark = pytest.mark.usefixtures("each_backend")

SDE = VESDE(25.0)
STD = SDE.marginal_std
NETS: dict[str, Any] = {
    "concat": lambda rng=0: ScoreUNet(STD, rng=rng),
    "add": lambda rng=0: ScoreUNet(STD, skips="add", rng=rng),
    "conditional": lambda rng=0: ConditionalUNet(STD, rng=rng),
    "autoencoder": lambda rng=0: Autoencoder(rng=rng),
    "latent": lambda rng=0: LatentUNet(STD, rng=rng),
}
COUNTS = {"concat": 1_115_297, "add": 1_022_849, "conditional": 2_045_057, "autoencoder": 709, "latent": 285_284}
SCORE_NETS = [name for name in NETS if name != "autoencoder"]

# Attention to a single token, such as the label, always has the weight 1, so query and key have no gradient. The latent
# net has a level of one pixel, whose self-attention is of that kind too.
ONE_TOKEN = {
    "conditional": r"transformer\.(attn_cross\.(query|key)|norm2)\.",
    "latent": r"transformer\.(attn_cross\.(query|key)|norm2)\.|attn3\.transformer\.attn_self\.(query|key)\.",
}


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def inputs(name: str, n: int) -> tuple[Any, ...]:
    """x, and what else the net takes; row i depends only on i."""
    rng = Rng(5)
    x = Tensor(rng.normal((n, 10, 10, 4) if name == "latent" else (n, 28, 28, 1)))
    t = Tensor(rng.uniform(n) * 0.9 + 0.1)
    labels = [7 * i % 10 for i in range(n)]
    return {"concat": (x, t), "add": (x, t), "autoencoder": (x,)}.get(name, (x, t, labels))


@pytest.mark.parametrize("name", NETS)
def test_the_published_number_of_parameters(name: str) -> None:
    net = NETS[name]()
    assert net.count() == COUNTS[name]
    assert f"{COUNTS[name]:,}" in repr(net).splitlines()[0]
    frozen = [key for key, t in net.named_tensors() if not t.requires_grad]
    assert frozen == [] or all(key == "time_embed.0.W" or "running" in key for key in frozen)


@pytest.mark.parametrize("name", NETS)
def test_shapes_and_samples_that_stand_alone(name: str) -> None:
    net = NETS[name]().eval()
    with no_grad():
        together = net(*inputs(name, 3))
        alone = net(*inputs(name, 1))
    assert together.shape == inputs(name, 3)[0].shape and together.dtype == "float32"
    assert alone.shape == inputs(name, 1)[0].shape
    np.testing.assert_allclose(host(alone)[0], host(together)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_a_seed_decides_the_net(name: str) -> None:
    one, same, other = NETS[name](3).state_dict(), NETS[name](Rng(3)).state_dict(), NETS[name](4).state_dict()
    assert all(np.array_equal(host(one[key]), host(same[key])) for key in one)
    drawn = [key for key in one if host(one[key]).std() > 0]
    assert drawn and not any(np.array_equal(host(one[key]), host(other[key])) for key in drawn)


@pytest.mark.parametrize("name", SCORE_NETS)
def test_the_output_is_divided_by_the_marginal_std(name: str) -> None:
    net = NETS[name]()
    with no_grad():
        score = host(net(*inputs(name, 2)))
        net.marginal_std = lambda t: t * 0 + 2
        halved = host(net(*inputs(name, 2)))
    s = host(STD(inputs(name, 2)[1])).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(score * s, halved * 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCORE_NETS)
def test_a_training_step_never_waits_and_reaches_every_parameter(name: str) -> None:
    net = NETS[name]()
    optimizer, ema, rng = optim.Adam(net.parameters(), 1e-3), optim.EMA(net), Rng(1)
    x, _, *rest = inputs(name, 2)
    before = net.state_dict()
    with backend.no_sync():
        optimizer.zero_grad()
        loss = score_matching_loss(net, x.data * 0.3, SDE, rng, **({"labels": rest[0]} if rest else {}))
        loss.backward()
        optim.clip_grad_norm(net.parameters(), 1.0)
        optimizer.step()
        ema.update()
    assert np.isfinite(loss.item())
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.dtype == "float32" and np.isfinite(host(p.grad)).all(), key
        # dense7 shifts channels, and the norm after it, with one channel per group, subtracts that shift again.
        if key != "dense7.weight" and not re.search(ONE_TOKEN.get(name, "^$"), key):
            assert not np.array_equal(host(p), host(before[key])), key


def test_the_autoencoder_trains_without_a_wait_and_learns() -> None:
    net = Autoencoder(rng=0)
    optimizer = optim.Adam(net.parameters(), 1e-2)
    x = ops.sigmoid(inputs("autoencoder", 8)[0])
    losses = []
    for _ in range(8):
        with backend.no_sync():
            optimizer.zero_grad()
            loss = ops.mse_loss(net(x), x)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    latents = net.eval().encode(x)
    assert latents.shape == (8, 10, 10, 4)
    images = host(net.decode(latents))
    assert images.shape == (8, 28, 28, 1) and images.min() >= 0 and images.max() <= 1


def test_the_label_matters_and_may_be_a_list_or_an_array() -> None:
    net = NETS["conditional"]()
    x, t, _ = inputs("conditional", 2)
    with no_grad():
        one, other = host(net(x, t, [1, 1])), host(net(x, t, [1, 2]))
        same = host(net(x, t, np.array([1, 2], np.uint8)))
        device = host(net(x, t, backend.to_device(np.array([1, 2]))))
        for kind in ("int8", "uint16", "int32"):
            assert np.array_equal(host(net(x, t, np.array([1, 2], kind))), other)
        assert np.array_equal(host(net(x, t, 1)), one) and np.array_equal(host(net(x, t, np.int8(1))), one)
    assert np.array_equal(one[0], other[0]) and not np.allclose(one[1], other[1], atol=1e-3)
    assert np.array_equal(other, same) and np.array_equal(other, device)


def test_a_context_of_several_tokens_makes_the_cross_attention_ask() -> None:
    """The fault of the published net is its single token, not the transformer."""
    transformer = SpatialTransformer(8, 6, rng=0).astype("float64")
    x, words = Tensor(Rng(0).normal((2, 3, 3, 8), "float64")), Tensor(Rng(1).normal((2, 4, 6), "float64"))
    sizes = []
    for context in (words[:, :1], words):
        transformer.zero_grad()
        ops.square(transformer(x, context)).sum().backward()
        sizes.append(abs(host(transformer.transformer.attn_cross.query.weight.grad)).max())
    assert sizes[0] < 1e-12 and sizes[1] > 1e-2


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        (
            "concat",
            lambda x, t: (x[:, :27], t),
            ValueError,
            r"ScoreUNet takes \(N, 28, 28, 1\), channels last, not \(2, 27, 28, 1\)",
        ),
        (
            "concat",
            lambda x, t: (ops.transpose(x, axes=(0, 3, 1, 2)), t),
            ValueError,
            r"not \(2, 1, 28, 28\): its convolutions have no padding",
        ),
        ("add", lambda x, t: (x[0], t), ValueError, r"not \(28, 28, 1\)"),
        (
            "add",
            lambda x, t: (x, t[:1]),
            ValueError,
            r"a time for each of the 2 samples of x \(2, 28, 28, 1\), not t \(1,\)",
        ),
        ("add", lambda x, t: (x, t.reshape(2, 1)), ValueError, r"not t \(2, 1\)"),
        (
            "add",
            lambda x, t: (x.astype("float64"), t),
            TypeError,
            r"\(2, 28, 28, 1\) is float64, but the weights are float32",
        ),
        ("add", lambda x, t: (x, t.astype("float64")), TypeError, r"\(2,\) is float64, but the weights are float32"),
        (
            "conditional",
            lambda x, t, y: (x, t, [1, 10]),
            IndexError,
            "a label must be 0 to 9, but runs from 1 to 10",
        ),
        ("conditional", lambda x, t, y: (x, t, np.array([-1, 2])), IndexError, "runs from -1 to 2"),
        ("conditional", lambda x, t, y: (x, t, [1.0, 2.0]), TypeError, r"integers, not float64 of shape \(2,\)"),
        (
            "conditional",
            lambda x, t, y: (x, t, [1]),
            ValueError,
            r"one for each of the 2 samples, or one for all, not of shape \(1,\)",
        ),
        ("conditional", lambda x, t, y: (x, t, 3.0), TypeError, r"integers, not float64 of shape \(\)"),
        ("conditional", lambda x, t, y: (x, t, [True, False]), TypeError, r"integers, not bool of shape \(2,\)"),
        ("conditional", lambda x, t, y: (x, t, 10), IndexError, "runs from 10 to 10"),
        ("conditional", lambda x, t, y: (x[0], t, y), ValueError, r"not \(28, 28, 1\)"),
        ("add", lambda x, t: (x, 0.5), ValueError, "not t 0.5"),
        ("latent", lambda x, t, y: (x[0], t, y), ValueError, r"not \(10, 10, 4\)"),
        (
            "latent",
            lambda x, t, y: (x[:, :, :, :3], t, y),
            ValueError,
            r"LatentUNet takes \(N, 10, 10, 4\), .* not \(2, 10, 10, 3\)",
        ),
        (
            "autoencoder",
            lambda x: (x[:, :, :26],),
            ValueError,
            r"Autoencoder takes \(N, 28, 28, 1\), .* not \(2, 28, 26, 1\)",
        ),
    ],
)
def test_bad_input(name: str, change: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        NETS[name]()(*change(*inputs(name, 2)))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="skips must be 'concat' or 'add', not 'sum'"):
        ScoreUNet(STD, skips="sum")
    for make, match in (
        (lambda: ScoreUNet(STD, (32, 64)), r"ScoreUNet: channels must be 4 positive integers, not \(32, 64\)"),
        (lambda: ConditionalUNet(STD, (32, 64.0, 128, 256)), r"ConditionalUNet: channels\[1\] .* not 64.0"),
        (lambda: ConditionalUNet(STD, classes=0), "ConditionalUNet: classes .* not 0"),
        (lambda: LatentUNet(STD, ()), r"LatentUNet: channels must be 4 positive integers, not \(\)"),
        (lambda: LatentUNet(STD, classes=2.5), "LatentUNet: classes .* not 2.5"),
        (lambda: Autoencoder(4), "Autoencoder: channels must be 3 positive integers, not 4"),
        (lambda: SpatialTransformer(8, 6, rng=0)(tensor(np.zeros((2, 3, 8))), None), r"not \(2, 3, 8\)"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    channels = [4, 4, 4]
    net = Autoencoder(channels, rng=0)
    channels[2] = 5
    assert net.channels == (4, 4, 4)
    with pytest.raises(ValueError, match=r"Autoencoder takes \(N, 10, 10, 4\), .* not \(1, 12, 12, 4\)"):
        Autoencoder(rng=0).decode(tensor(np.zeros((1, 12, 12, 4), np.float32)))
