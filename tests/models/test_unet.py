"""Our own U-Net: shapes, labels, and that every parameter takes part."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import on_numpy

import tinydiff
from tinydiff import Rng, Tensor, backend, ops, tensor
from tinydiff.backend import to_device, to_host
from tinydiff.diffusion import Denoiser, edm_loss
from tinydiff.models.unet import UNet, pixel_positions, pixel_shuffle, pixel_unshuffle
from tinydiff.optim import EMA, Adam, clip_grad_norm

pytestmark = pytest.mark.usefixtures("each_backend")


def small(**options) -> UNet:
    return UNet(1, (8, 16), labels={"digit": 10, "face": 3}, embedding=12, groups=4, rng=0, **options)


def awake(net: UNet) -> UNet:
    """The net with its zero layers moved, so that it does not return 0."""
    rng = Rng(5)
    for p in net.parameters():
        p.data = p.data + rng.normal(p.shape, p.dtype) * 0.1
    return net


def labels(n: int) -> dict:
    return {"digit": to_device(np.arange(n) % 10), "face": to_device(np.arange(n) % 3)}


def test_output_has_the_shape_of_the_input_and_starts_at_zero():
    x = Rng(0).normal((3, 12, 8, 1))
    y = small()(Tensor(x), Rng(1).normal(3), **labels(3))
    assert y.shape == x.shape
    assert abs(to_host(y.data)).max() == 0


def test_pixel_unshuffle_keeps_patches_together_and_has_an_inverse():
    x = tensor(np.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3))
    y = pixel_unshuffle(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(y.numpy()[1, 1, 2].reshape(2, 2, 3), x.numpy()[1, 2:4, 4:6])
    np.testing.assert_array_equal(pixel_shuffle(y, 2).numpy(), x.numpy())


@on_numpy
def test_every_parameter_has_a_gradient_and_it_is_right():
    net = awake(small()).astype("float64")
    x, noise = Tensor(Rng(0).normal((2, 8, 8, 1), "float64")), Rng(1).normal(2, "float64")
    weights = Rng(2).normal((2, 8, 8, 1), "float64")

    def value():
        return ops.sum(net(x, noise, **labels(2)) * weights)

    parameters = dict(net.named_parameters())
    gradients = tinydiff.grad(value(), list(parameters.values()))
    for (name, p), g in zip(parameters.items(), gradients):
        assert float(abs(g.numpy()).max()) > 0, name
        direction, h, before = Rng(3).normal(p.shape, "float64"), 1e-5, p.data
        difference = 0.0
        for sign in (1, -1):
            p.data = before + sign * h * direction
            with tinydiff.no_grad():
                difference += sign * value().item() / (2 * h)
        p.data = before
        assert difference == pytest.approx(backend.scalar((g.data * direction).sum()), rel=1e-6, abs=1e-8), name


def test_a_training_step_never_waits_wherever_its_labels_lie():
    denoiser = Denoiser(small(), sigma_data=0.5)
    optimizer, ema = Adam(denoiser.parameters(), 1e-3), EMA(denoiser)
    before, x0 = denoiser.state_dict(), Rng(0).normal((3, 8, 8, 1))
    with backend.no_sync():
        for condition in (labels(3), {"digit": np.array([1, -1, 9]), "face": np.array([0, 1, 2])}, {}):
            optimizer.zero_grad()
            loss = edm_loss(denoiser, x0, Rng(1), **condition)
            loss.backward()
            clip_grad_norm(denoiser.parameters(), 1.0)
            optimizer.step()
            ema.update()
    assert np.isfinite(loss.item())
    assert not np.array_equal(to_host(before["net.last.weight"]), to_host(denoiser.net.last.weight.data))


def test_a_label_left_out_is_the_null_class_and_labels_matter():
    net = awake(small())
    x, noise = Tensor(Rng(0).normal((4, 8, 8, 1))), Rng(1).normal(4)
    left_out = net(x, noise, digit=labels(4)["digit"]).numpy()
    null_class = net(x, noise, digit=labels(4)["digit"], face=to_device(np.full(4, -1))).numpy()
    np.testing.assert_array_equal(left_out, null_class)
    assert abs(left_out - net(x, noise, **labels(4)).numpy()).max() > 1e-3


@pytest.mark.parametrize(
    ("shape", "options", "quoted"),
    [
        ((2, 10, 8, 1), {}, r"multiples of 4, not \(2, 10, 8, 1\)"),
        ((2, 8, 8, 3), {}, r"\(2, 8, 8, 3\)"),
        ((2, 8, 8, 1), {"colour": np.zeros(2, int)}, "colour"),
        ((2, 8, 8, 1), {"digit": np.zeros(3, int)}, r"\(3,\)"),
    ],
)
def test_bad_input_is_quoted(shape, options, quoted):
    options = {name: to_device(value) for name, value in options.items()}
    with pytest.raises(ValueError, match=quoted):
        small()(Tensor(Rng(0).normal(shape)), Rng(1).normal(2), **options)


@pytest.mark.parametrize(("digits", "quoted"), [([1, 10], "runs from 1 to 10"), ([-2, 3], "runs from -2 to 3")])
def test_a_label_out_of_range_is_not_taken_for_the_null_class(digits, quoted):
    with pytest.raises(IndexError, match=f"'digit' must be 0 to 9, or -1 for the null class, but {quoted}"):
        small()(Tensor(Rng(0).normal((2, 8, 8, 1))), Rng(1).normal(2), digit=np.array(digits))


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"blocks": 0}, "blocks .* not 0"),
        ({"blocks": -1}, "blocks .* not -1"),
        ({"blocks": 1.5}, "blocks .* not 1.5"),
        ({"labels": {5: 10}}, "which 5 cannot be"),
        ({"labels": {"a b": 10}}, "which 'a b' cannot be"),
        ({"labels": {"noise": 10}}, "which 'noise' cannot be"),
        ({"labels": {"digit": 0}}, "the number of values of 'digit' .* not 0"),
        ({"channels": (8.0, 16)}, r"channels\[0\] .* not 8.0"),
        ({"channels": ()}, r"channels must be one or more positive integers, not \(\)"),
        ({"channels": 8}, "channels must be one or more positive integers, not 8"),
        ({"patch": 2.5}, "patch .* not 2.5"),
        ({"embedding": 0}, "embedding .* not 0"),
        ({"groups": 3}, r"groups=3 must divide each of channels=\(8, 16\)"),
        ({"groups": 0}, "groups .* not 0"),
        ({"in_channels": 0}, "in_channels .* not 0"),
        ({"out_channels": 1.5}, "out_channels .* not 1.5"),
    ],
)
def test_bad_arguments_are_quoted(options, quoted):
    with pytest.raises(ValueError, match=f"UNet: .*{quoted}"):
        UNet(**{"channels": (8, 16), "embedding": 12, "groups": 4, **options}, rng=0)


@pytest.mark.parametrize(
    ("shape", "noise", "quoted"),
    [
        ((8, 8, 1), (2,), r"not \(8, 8, 1\)"),
        ((2, 8, 8), (2,), r"not \(2, 8, 8\)"),
        ((1, 2, 8, 8, 1), (1,), r"not \(1, 2, 8, 8, 1\)"),
        ((3, 8, 8, 1), (2,), r"noise must be \(3,\), one for each of x \(3, 8, 8, 1\), not of shape \(2,\)"),
    ],
)
def test_ranks_are_checked(shape, noise, quoted):
    with pytest.raises(ValueError, match=quoted):
        small()(Tensor(Rng(0).normal(shape)), Rng(1).normal(noise))


def test_pixels_of_another_rank_or_size_are_refused():
    with pytest.raises(ValueError, match=r"pixel_unshuffle takes .* multiples of 2, not \(1, 3, 4, 1\)"):
        pixel_unshuffle(Tensor(Rng(0).normal((1, 3, 4, 1))), 2)
    with pytest.raises(ValueError, match=r"pixel_shuffle takes .* a multiple of 4, not \(2, 3, 4\)"):
        pixel_shuffle(Tensor(Rng(0).normal((2, 3, 4))), 2)


def test_labels_come_as_numbers_lists_and_integers_of_any_width():
    net = awake(UNet(1, (8,), labels={"word": 200}, embedding=12, groups=4, rng=0))
    x, noise = Tensor(Rng(0).normal((3, 4, 4, 1))), Rng(1).normal(3)
    expected = {i: net(x, noise, word=to_device(np.full(3, i))).numpy() for i in (7, -1)}
    assert abs(expected[7] - expected[-1]).max() > 1e-3
    ways = [lambda i: i, lambda i: [i] * 3, lambda i: np.int16(i), lambda i: Tensor(to_device(np.full(3, i, np.int8)))]
    ways += [lambda i, kind=kind: np.full(3, i, kind) for kind in ("int8", "int16", "int32", "int64")]
    for i in expected:
        for way in ways:
            np.testing.assert_array_equal(net(x, noise, word=way(i)).numpy(), expected[i])
    np.testing.assert_array_equal(net(x, noise, word=np.full(3, 7, np.uint64)).numpy(), expected[7])


@pytest.mark.parametrize("label", [True, 1.0, [1.0, 2.0], np.array([True, False]), np.zeros(2, np.float32), "one"])
def test_labels_that_are_no_integers_are_refused(label):
    with pytest.raises(TypeError, match="label 'digit' must be integers, not"):
        small()(Tensor(Rng(0).normal((2, 8, 8, 1))), Rng(1).normal(2), digit=label)


def test_with_positions_a_pixel_knows_where_it_is():
    """Far from the border of a constant picture all pixels are alike to convolutions, and to attention in any case."""
    x = Tensor(to_device(np.full((1, 32, 32, 1), 0.7)))
    for positions in (False, True):
        net = awake(UNet(1, (8,), patch=1, embedding=12, groups=4, positions=positions, rng=0)).astype("float64")
        y = to_host(net(x, to_device(np.zeros(1))).data)[0, 12:20, 12:20, 0]
        assert (np.ptp(y) > 1e-3) == positions
    table = to_host(pixel_positions(3, 5, 8))
    assert table.shape == (3, 5, 8)
    np.testing.assert_allclose(table[2, 4], [*sinusoids_of(2), *sinusoids_of(4)])
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        pixel_positions(3, 5, 6)


def sinusoids_of(n):
    return [math.sin(n), math.cos(n), math.sin(n / 100), math.cos(n / 100)]
