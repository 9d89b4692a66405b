"""The transformer's block and its positions; and what cross-attention learns from one vector, or from several."""

from __future__ import annotations

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, Tensor, backend, gradcheck, nn, ops
from tinydiff.backend import to_device, to_host

pytestmark = pytest.mark.usefixtures("each_backend")


def normal(*shape, dtype="float64", seed=0):
    return Tensor(Rng(seed).normal(shape, dtype))


def test_a_block_is_three_sums():
    block = nn.TransformerBlock(8, 2, context_dim=6, rng=0).astype("float64")
    x, context = normal(2, 5, 8), normal(2, 3, 6, seed=1)
    y = x + block.self_attention(block.norm1(x))
    y = y + block.cross_attention(block.norm2(y), context)
    y = y + block.mlp(block.norm3(y))
    np.testing.assert_allclose(block(x, context).numpy(), y.numpy(), rtol=1e-12)


def test_masks_reach_both_attentions():
    block = nn.TransformerBlock(8, 2, context_dim=6, rng=0).astype("float64")
    x, context = normal(2, 5, 8), normal(2, 3, 6, seed=1)
    causal = to_device(np.tri(5, dtype=bool))
    first = to_device(np.array([True, True, False]))
    y = block(x, context, mask=causal, context_mask=first).numpy()
    changed = x.numpy().copy()
    changed[:, 4] += 1  # the last, which no other may attend to
    other = np.concatenate([context.numpy()[:, :2], np.ones((2, 1, 6))], axis=1)
    again = block(Tensor(to_device(changed)), Tensor(to_device(other)), mask=causal, context_mask=first).numpy()
    np.testing.assert_allclose(again[:, :4], y[:, :4], rtol=1e-12)
    assert abs(again[:, 4] - y[:, 4]).max() > 0.1
    assert abs(block(x, Tensor(to_device(other)), mask=causal).numpy() - y).max() > 0.01


def test_the_gradient_of_a_block():
    block = nn.TransformerBlock(4, 2, context_dim=3, hidden=5, rng=0).astype("float64")
    gradcheck(lambda x, c: block(x, c), normal(1, 3, 4), normal(1, 2, 3, seed=1))


@pytest.mark.parametrize("words, learns", [(1, False), (3, True)])
def test_query_and_key_learn_from_several_words_only(words, learns):
    """softmax over one score is 1 whatever the score is, so its derivative is exactly 0: with one vector as context the
    attention is only a bias. With several, the weights depend on query and key."""
    attention = nn.MultiHeadAttention(8, 2, kdim=6, vdim=6, rng=0)
    projections = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    y = attention(normal(2, 5, 8, dtype="float32"), normal(2, words, 6, dtype="float32", seed=1))
    q, k, v = (abs(g.numpy()).max() for g in tinydiff.grad(ops.sum(y * normal(*y.shape, dtype="float32")), projections))
    assert v > 0.1
    assert (q > 1e-3 and k > 1e-3) if learns else (q == 0 and k == 0)


def test_a_context_that_is_not_wanted_or_lacks():
    x, context = normal(2, 5, 8, dtype="float32"), normal(2, 3, 6, dtype="float32")
    with pytest.raises(ValueError, match=r"must be none, but there is one of shape \(2, 3, 6\)"):
        nn.TransformerBlock(8, 2, rng=0)(x, context)
    with pytest.raises(ValueError, match=r"must be \(N, S, 6\), but there is none"):
        nn.TransformerBlock(8, 2, context_dim=6, rng=0)(x)


def test_sinusoidal_positions_are_the_formula():
    table = to_host(nn.SinusoidalPositions(40, 6).table.data)
    for place in (0, 1, 39):
        for i in range(3):
            angle = place / 10000 ** (2 * i / 6)
            assert table[place, 2 * i : 2 * i + 2] == pytest.approx([np.sin(angle), np.cos(angle)], abs=1e-6)


@pytest.mark.parametrize("make", [lambda: nn.LearnedPositions(7, 4, rng=0), lambda: nn.SinusoidalPositions(7, 4)])
def test_positions_are_added_to_shorter_sequences(make):
    positions, x = make(), normal(2, 5, 4, dtype="float32")
    ((name, table),) = positions.named_tensors()
    np.testing.assert_array_equal(positions(x).numpy() - x.numpy(), (x + table[:5]).numpy() - x.numpy())
    assert isinstance(table, nn.Parameter) == (name == "weight")
    for shape in ((2, 8, 4), (2, 5, 3), (5, 4)):
        with pytest.raises(ValueError, match=r"takes \(N, L, 4\) with L at most 7, not"):
            positions(Tensor(backend.xp.zeros(shape, "float32")))


def test_sinusoidal_positions_come_in_pairs():
    with pytest.raises(ValueError, match="embed_dim must be even, not 5"):
        nn.SinusoidalPositions(7, 5)
