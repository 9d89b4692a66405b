"""Positions and the transformer block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, grad, nn, ops, tensor
from tinydiff.nn.transformer import sinusoids

pytestmark = pytest.mark.usefixtures("each_backend")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(Rng(seed).normal(shape, "float64"))


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def test_sinusoids_are_those_of_the_paper() -> None:
    table = host(sinusoids(7, 6))
    for position in range(7):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[position, 2 * i] == pytest.approx(math.sin(angle), abs=1e-15)
            assert table[position, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-15)


def test_a_step_of_positions_is_a_rotation_of_each_pair() -> None:
    pairs = host(sinusoids(50, 8)).reshape(50, 4, 2) @ [1j, 1]  # cos + i sin
    turns = pairs[3:] / pairs[:-3]
    np.testing.assert_allclose(turns, np.broadcast_to(turns[0], turns.shape), rtol=1e-12)


def test_positions_are_added_and_only_the_learned_ones_are_trained() -> None:
    fixed, learned = nn.SinusoidalPositions(6, 4), nn.LearnedPositions(6, 4, rng=0)
    assert fixed.count() == 0 and learned.count() == 24
    assert set(fixed.state_dict()) == set(learned.state_dict()) == {"table"}
    x = tensor(host(normal(2, 5, 4)), "float32")
    for layer in (fixed, learned):
        np.testing.assert_array_equal(host(layer(x)), host(x) + host(layer.table)[:5])
    learned(x).sum().backward()
    np.testing.assert_array_equal(host(learned.table.grad)[:, 0], [2, 2, 2, 2, 2, 0])


def test_without_positions_the_order_of_tokens_is_unknown() -> None:
    block, x, order = nn.TransformerBlock(8, 2, rng=0).astype("float64"), normal(2, 5, 8), [3, 0, 4, 1, 2]
    places = nn.SinusoidalPositions(5, 8).astype("float64")
    turned = Tensor(backend.to_device(host(x)[:, order]))
    np.testing.assert_allclose(host(block(turned)), host(block(x))[:, order], rtol=1e-10)
    assert abs(host(block(places(turned))) - host(block(places(x)))[:, order]).max() > 1e-2


def test_a_masked_token_is_as_one_that_is_not_there() -> None:
    block = nn.TransformerBlock(8, 2, kdim=6, rng=0).astype("float64")
    x, context = normal(2, 5, 8), normal(2, 4, 6, seed=1)
    seen, heard = (np.arange(n) < n - 1 for n in (5, 4))
    y = block(x, context, mask=backend.to_device(seen), context_mask=backend.to_device(heard))
    np.testing.assert_allclose(host(y)[:, :4], host(block(x[:, :4], context[:, :3])), rtol=1e-10)


def test_a_bias_for_each_distance_is_learned() -> None:
    """A mask that requires a gradient: relative positions, one number for each distance."""
    attention, x = nn.MultiHeadAttention(8, 2, rng=0).astype("float64"), normal(2, 5, 8)
    bias = Tensor(Rng(3).normal((2, 9), "float64"), requires_grad=True)  # (heads, distances from -4 to 4)
    distance = backend.to_device(np.arange(5)[:, None] - np.arange(5) + 4)

    def value() -> Tensor:
        return (attention(x, mask=ops.take(bias, distance, axis=1)) * normal(2, 5, 8, seed=4)).sum()

    (g,) = grad(value(), [bias])
    along, h, before = Rng(5).normal(bias.shape, "float64"), 1e-6, bias.data
    ends = []
    for sign in (1, -1):
        bias.data = before + sign * h * along
        ends.append(value().item())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float((host(g) * host(along)).sum()), rel=1e-7)


def test_dropout_acts_in_training_alone() -> None:
    block, x = nn.TransformerBlock(8, 2, dropout=0.5, rng=0).astype("float64"), normal(2, 5, 8)
    assert not np.array_equal(host(block(x)), host(block(x)))
    block.eval()
    np.testing.assert_array_equal(host(block(x)), host(block(x)))


def test_what_draws_nothing_needs_no_whole_batch() -> None:
    for p, needed in ((0.0, False), (0.1, True)):
        modules = nn.TransformerBlock(8, 2, dropout=p, rng=0).named_modules()
        assert any(m.needs_whole_batch for _, m in modules) == needed


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (lambda: sinusoids(4, 5), "features must be even, not 5"),
        (lambda: nn.SinusoidalPositions(4, 0), "features must be an integer of 2 or more, not 0"),
        (lambda: nn.LearnedPositions(0, 4), "length must be .* not 0"),
        (lambda: nn.LearnedPositions(4, 6)(normal(2, 5, 6)), r"takes x \(N, 4 or less, 6\), not \(2, 5, 6\)"),
        (lambda: nn.TransformerBlock(8, 2)(normal(2, 5, 8), normal(2, 5, 8)), r"no context, not \(2, 5, 8\)"),
        (lambda: nn.TransformerBlock(8, 2, kdim=3)(normal(2, 5, 8)), r"a context \(N, S, 3\), not None"),
        (lambda: nn.TransformerBlock(8, 2, hidden=0), "hidden must be .* not 0"),
    ],
)
def test_bad_arguments_are_quoted(make: Any, quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        make()
