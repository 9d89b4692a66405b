"""A U-Net that is told what to draw in words: what reaches what, masks, the null prompt, and that it can learn."""

from __future__ import annotations

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, Tensor, no_grad, ops
from tinydiff.backend import to_device, to_host, xp
from tinydiff.data.tokenizer import Tokenizer
from tinydiff.diffusion import Denoiser, Guided, KarrasSDE, edm_loss, sample
from tinydiff.models.text import TextEncoder, TextUNet, dropped
from tinydiff.models.unet import UNet
from tinydiff.optim import Adam

pytestmark = pytest.mark.usefixtures("each_backend")

TOKENIZER = Tokenizer.of(["a bold seven", "a small two, on top"])


def small(**options) -> TextUNet:
    options = {"embedding": 12, "groups": 4, "heads": 2, "width": 8, **options}
    return TextUNet(TOKENIZER, 1, (8, 16), rng=0, **options)


def awake(net):
    """The net with its zero layers moved, so that it does not return 0."""
    rng = Rng(5)
    for p in net.parameters():
        p.data = p.data + rng.normal(p.shape, p.dtype) * 0.1
    return net


def image(n=2):
    return Tensor(Rng(0).normal((n, 8, 8, 1))), Rng(1).normal(n)


def test_other_words_make_another_picture_and_padding_none():
    net, (x, noise) = awake(small()), image()
    y = net(x, noise, tokens=TOKENIZER.encode(["a bold seven", "a small two"])).numpy()
    other = net(x, noise, tokens=TOKENIZER.encode(["a bold seven", "a bold two"])).numpy()
    np.testing.assert_array_equal(y[0], other[0])
    assert abs(y[1] - other[1]).max() > 1e-3
    longer = Tokenizer(TOKENIZER.words, TOKENIZER.length + 3)  # the same words with more padding behind them
    wide = TextUNet(longer, 1, (8, 16), rng=0, embedding=12, groups=4, heads=2, width=8)
    state = {k: to_host(v) for k, v in net.state_dict().items()}
    state["vocabulary"] = longer.to_bytes()
    places = state["encoder.positions.weight"]
    state["encoder.positions.weight"] = np.concatenate([places, np.ones((3, 8), "float32")])
    wide.load_state_dict(state)
    found = wide(x, noise, tokens=longer.encode(["a bold seven", "a small two"])).numpy()
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-6)


def test_the_order_of_the_words_counts():
    net, (x, noise) = awake(small()), image()
    two = [net(x, noise, tokens=TOKENIZER.encode(p)).numpy() for p in ("bold a seven", "a bold seven")]
    assert abs(two[0] - two[1]).max() > 1e-4


def test_no_tokens_are_the_null_prompt_and_one_prompt_is_for_all():
    net, (x, noise) = awake(small()), image(3)
    np.testing.assert_array_equal(net(x, noise).numpy(), net(x, noise, tokens=TOKENIZER.encode("")).numpy())
    one, three = (net(x, noise, tokens=TOKENIZER.encode(p)).numpy() for p in ("a two", 3 * ["a two"]))
    np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-6)


def test_states_are_what_the_encoder_makes_of_the_tokens():
    net, (x, noise) = awake(small()), image()
    tokens = TOKENIZER.encode(["a two", "a bold seven"])
    given = net(x, noise, tokens=tokens, states=net.encode(tokens))
    np.testing.assert_array_equal(given.numpy(), net(x, noise, tokens=tokens).numpy())
    assert abs(net(x, noise, tokens=tokens, states=net.encode(tokens[::-1])).numpy() - given.numpy()).max() > 1e-4


def test_every_parameter_has_a_gradient_and_it_is_right():
    net = awake(small(attention=(0, 1))).astype("float64")
    x, noise = Tensor(Rng(0).normal((2, 8, 8, 1), "float64")), Rng(1).normal(2, "float64")
    weights, tokens = Rng(2).normal((2, 8, 8, 1), "float64"), TOKENIZER.encode(["a bold seven", "a small two, on top"])

    def value():
        return ops.sum(net(x, noise, tokens=tokens) * weights)

    parameters = dict(net.named_parameters())
    for (name, p), g in zip(parameters.items(), tinydiff.grad(value(), list(parameters.values()))):
        g = g.numpy()
        assert abs(g).max() > 0, name
        at = np.unravel_index(abs(g).argmax(), g.shape)
        before, values = to_host(p.data), []
        for step in (1e-5, -1e-5):
            moved = before.copy()
            moved[at] += step
            p.data = to_device(moved)
            values.append(value().item())
        p.data = to_device(before)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(g[at], rel=1e-5), name


def test_a_net_without_text_is_what_it_was():
    """The same names, and the same draws."""
    plain = dict(UNet(1, (8, 16), labels={"digit": 3}, embedding=12, groups=4, rng=0).named_parameters())
    assert not [name for name in plain if "attention" in name]
    assert "down.1.weight" in plain and "up.1.weight" in plain  # where the halving and the doubling were


@pytest.mark.parametrize("size, channels", [((32, 32), 3), ((12, 20), 2), ((64, 64), 3)])
def test_any_size_and_any_number_of_channels(size, channels):
    net = awake(TextUNet(TOKENIZER, channels, (8, 16, 16), rng=0, groups=4, heads=2, width=8, patch=1, embedding=12))
    x = Tensor(Rng(0).normal((2, *size, channels)))
    with no_grad():
        y = net(x, Rng(1).normal(2), tokens=TOKENIZER.encode(["a two", "seven"]))
    assert y.shape == x.shape and abs(y.numpy()).max() > 0


def test_dropped_captions_are_the_null_prompt():
    tokens = to_device(TOKENIZER.encode(["a two", "a bold seven", "seven"]))
    found = to_host(dropped(tokens, xp.asarray([True, False, True])))
    np.testing.assert_array_equal(found, TOKENIZER.encode(["a two", "", "seven"]))


def test_it_learns_which_word_is_light_and_which_is_dark():
    """And that no word is in between; guidance goes beyond both."""
    tokenizer = Tokenizer.of(["light", "dark"])
    net = TextUNet(tokenizer, 1, (8,), rng=0, embedding=12, groups=4, heads=2, width=8, patch=1)
    denoiser, adam = Denoiser(net, 1.0), None
    adam = Adam(denoiser.parameters(), lr=1e-2)
    tokens = to_device(tokenizer.encode(["light", "dark"] * 16))
    x0 = to_device(
        np.tile(np.array([1.0, -1.0], "float32"), 16)[:, None, None, None] * np.ones((1, 4, 4, 1), "float32")
    )
    for step in range(60):
        rng = Rng(7).child(step)
        kept = rng.uniform(32) >= 0.2
        adam.zero_grad()
        edm_loss(denoiser, x0, rng, tokens=dropped(tokens, kept)).backward()
        adam.step()

    def mean(prompt, weight=0.0, **options):
        model = Guided(denoiser, weight, **options)
        ids = to_device(tokenizer.encode([prompt] * 4))
        return to_host(sample(model, (4, 4, 4, 1), KarrasSDE(), 0, method="heun", steps=6, eps=0.01, tokens=ids)).mean()

    assert mean("light") > 0.7 and mean("dark") < -0.7
    away = mean("light", 0.5, negative={"tokens": tokenizer.encode("dark")})
    assert away > mean("light", 0.5) > mean("light")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda net, x, t: net(x, t, tokens=[[1, 2]]), r"tokens must be integers \(N, 7\).* not \[\[1, 2\]\]"),
        (lambda net, x, t: net(x, t, tokens=np.ones((2, 3), int)), r"must be integers \(N, 7\).* of shape \(2, 3\)"),
        (lambda net, x, t: net(x, t, tokens=np.ones((2, 7))), r"not float64 of shape \(2, 7\)"),
        (lambda net, x, t: net.unet(x, t), r"the context must be \(N, S, 8\), but there is none"),
        (lambda net, x, t: UNet(1, (8,), groups=4, rng=0)(x, t, context=x), "must be none, but it is of shape"),
        (lambda net, x, t: UNet(1, (8,), groups=4, rng=0, context=4), r"attention=\(\) must be levels from 0 to 0 if"),
        (lambda net, x, t: UNet(1, (8,), groups=4, rng=0, attention=(0,)), r"attention=\(0,\) .* and context=None"),
        (lambda net, x, t: UNet(1, (8,), groups=4, rng=0, attention=(1,), context=4), r"attention=\(1,\) must be"),
        (lambda net, x, t: UNet(1, (8,), groups=4, rng=0, labels={"context": 3}), "'context' cannot be"),
    ],
)
def test_what_does_not_fit_is_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call(small(), *image())


def test_an_encoder_attends_in_both_directions_but_not_to_padding():
    encoder = awake(TextEncoder(len(TOKENIZER), TOKENIZER.length, 8, rng=0, heads=2))
    a, b = (encoder(to_device(TOKENIZER.encode(p))).numpy()[0] for p in ("a bold seven", "a bold two"))
    assert abs(a[0] - b[0]).max() > 1e-4  # the start knows of the last word
