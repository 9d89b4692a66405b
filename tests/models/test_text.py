"""Text conditioning: the tokenizer, the encoder, and the U-Net that listens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import on_numpy

import tinydiff
from tinydiff import Rng, Tensor, backend, ops, saving
from tinydiff.backend import to_device
from tinydiff.diffusion import Counted, Denoiser, Guided, KarrasSDE, edm_loss, sample
from tinydiff.models.text import TextEncoder, TextToImage, Tokenizer, drop_prompts
from tinydiff.models.unet import ResidualBlock, UNet, mean_of_words
from tinydiff.optim import Adam

pytestmark = pytest.mark.usefixtures("each_backend")
CAPTIONS = ["A red seven", "a small, blue nine.", "two green ones on the left"]


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def awake(net: Any) -> Any:
    """The net with its zero layers moved, so that it does not return 0."""
    rng = Rng(5)
    for p in net.parameters():
        p.data = p.data + rng.normal(p.shape, p.dtype) * 0.1
    return net


def small(**options: Any) -> TextToImage:
    encoder = TextEncoder(6, 5, 12, 1, 2, rng=1)
    return TextToImage(encoder, UNet(1, (8, 16), embedding=12, groups=4, context=12, heads=2, rng=0, **options))


IDS = np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [0, 0, 0, 0, 0]])


def image(n: int = 3, seed: int = 0, channels: int = 1) -> Tensor:
    return Tensor(Rng(seed).normal((n, 8, 8, channels), "float64"))


def normal(*shape: int) -> Tensor:
    return Tensor(Rng(0).normal(shape))


NOISE = [0.1, -0.4, 0.7]


def noise() -> Any:
    return to_device(np.array(NOISE))


# ---------------------------------------------------------------- tokenizer


def test_prompts_become_numbers_and_come_back() -> None:
    tokenizer = Tokenizer.fit(CAPTIONS)
    assert tokenizer.words == sorted({*"a red seven small , blue nine . two green ones on the left".split()})
    assert tokenizer.length == 6 and tokenizer.size == len(tokenizer.words) + 1
    ids = tokenizer.encode(["A SMALL   seven", "", "Two, on the left."])
    assert ids.shape == (3, 6) and ids.dtype == np.int64
    assert [tokenizer.words[i - 1] for i in ids[0, :3]] == ["a", "small", "seven"]
    assert not ids[0, 3:].any() and not ids[1].any(), "padding; the null prompt is padding alone"
    assert tokenizer.decode(ids) == ["a small seven", "", "two, on the left."]
    assert tokenizer.decode(to_device(ids[0])) == ["a small seven"]
    np.testing.assert_array_equal(tokenizer.encode("a small seven"), ids[:1])
    assert Tokenizer.fit(CAPTIONS, length=9).encode([]).shape == (0, 9)


def test_an_unknown_word_is_named_with_its_neighbours() -> None:
    tokenizer = Tokenizer.fit(CAPTIONS)
    with pytest.raises(ValueError, match="the word 'sevn' of the prompt 'a Sevn' .* the nearest are 'seven'"):
        tokenizer.encode(["a red seven", "a Sevn"])


def test_an_overlong_prompt_quotes_both_lengths() -> None:
    with pytest.raises(ValueError, match="'a red, red seven' has 5 words and punctuation marks, .* at most 4"):
        Tokenizer.fit(["a red , seven"]).encode("a red, red seven")


def test_what_is_no_vocabulary() -> None:
    for text in ("", "words", "0\na", "3", "1\na\na"):
        with pytest.raises(ValueError, match="Tokenizer"):
            Tokenizer.from_array(np.frombuffer(text.encode(), np.uint8))


def test_numbers_without_a_word_are_refused() -> None:
    with pytest.raises(IndexError, match="must be 0 to 2, but run from 0 to 3"):
        Tokenizer(["a", "b"], 4).decode([[0, 3]])


# ---------------------------------------------------------------- encoder


def test_padding_is_seen_by_nobody_and_order_matters() -> None:
    encoder = TextEncoder(6, 5, 12, 2, 2, rng=0).astype("float64")
    states, seen = encoder(IDS)
    np.testing.assert_array_equal(host(seen), [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    short, _ = encoder(IDS[:1, :3])
    np.testing.assert_allclose(host(states)[:1, :3], host(short), rtol=1e-10)
    turned, _ = encoder(IDS[:1, [1, 0, 2]])
    assert abs(host(turned)[:, [1, 0, 2]] - host(short)).max() > 1e-2
    assert np.isfinite(host(states)).all(), "also those of the null prompt"


def test_dropped_prompts_are_the_null_prompt() -> None:
    ids = np.arange(1, 4001).reshape(1000, 4)
    dropped = host(drop_prompts(ids, 0.3, Rng(0)))
    gone = ~dropped.any(axis=1)
    assert abs(gone.mean() - 0.3) < 5 * np.sqrt(0.21 / 1000)
    np.testing.assert_array_equal(dropped[~gone], ids[~gone])
    np.testing.assert_array_equal(host(drop_prompts(ids[600:], 0.3, Rng(0), sample_offset=600)), dropped[600:])
    np.testing.assert_array_equal(host(drop_prompts(ids, 0, Rng(0))), ids)
    assert not host(drop_prompts(ids, 1, Rng(0))).any()


# ---------------------------------------------------------------- the U-Net that listens


@pytest.mark.parametrize(("size", "channels"), [((28, 28), 1), ((32, 32), 3), ((12, 8), 2)])
def test_any_size_that_can_be_halved_and_any_number_of_channels(size: tuple[int, int], channels: int) -> None:
    net = awake(UNet(channels, (8, 16), embedding=12, groups=4, context=6, attention=(0, 1), heads=2, blocks=2, rng=0))
    x, context = Tensor(Rng(0).normal((2, *size, channels))), Tensor(Rng(1).normal((2, 3, 6)))
    y = net(x, Rng(2).normal(2), context)
    assert y.shape == x.shape and np.isfinite(host(y)).all()
    assert abs(host(y) - host(net(x, Rng(2).normal(2), context * 2))).max() > 1e-3


def test_it_starts_at_zero_and_every_transformer_as_the_identity() -> None:
    net = UNet(1, (8, 16), embedding=12, groups=4, context=6, heads=2, rng=0)
    context = Tensor(Rng(1).normal((2, 3, 6)))
    assert not host(net(Tensor(Rng(0).normal((2, 8, 8, 1))), Rng(2).normal(2), context)).any()
    layer, h = net.down[-1], Tensor(Rng(3).normal((2, 2, 2, 16)))
    np.testing.assert_array_equal(host(layer(h, context)), host(h))


def test_the_skips_carry_what_was_heard() -> None:
    net = awake(UNet(1, (8,), embedding=12, groups=4, context=6, heads=2, rng=0))
    heard, joined = [], []
    net.down[1].register_forward_hook(lambda _layer, _inputs, output: heard.append(host(output)))
    net.up[0].register_forward_hook(lambda _layer, inputs, _output: joined.append(host(inputs[0])))
    net(normal(2, 8, 8, 1), Rng(2).normal(2), normal(2, 3, 6))
    np.testing.assert_array_equal(joined[0][..., 8:], heard[0])


def test_the_words_enter_each_block_by_their_mean() -> None:
    """The mean of those that count, and nothing of the others; of no words at all it is 0, and not 0 / 0."""
    words = Tensor(Rng(0).normal((3, 4, 6), "float64"))
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    found = host(mean_of_words(words, to_device(mask[:, None, None])))
    np.testing.assert_allclose(found[0], host(words)[0, :2].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found[1], host(words)[1].mean(axis=0), rtol=1e-12)
    assert not found[2].any()
    np.testing.assert_allclose(host(mean_of_words(words)), host(words).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(  # one mask for all
        host(mean_of_words(words, to_device(mask[:1, None, None]))), host(words)[:, :2].mean(axis=1), rtol=1e-12
    )
    for pooled in (True, False):  # the attention says nothing as it starts out; the first layer of a block hears
        net = UNet(1, (8, 16), embedding=12, groups=4, context=6, heads=2, pooled=pooled, rng=0).astype("float64")
        net.last.weight.data = Rng(4).normal(net.last.weight.shape, "float64")
        for layer in (*net.down, *net.up, *net.middle):
            if isinstance(layer, ResidualBlock):
                layer.conv2.weight.data = Rng(5).normal(layer.conv2.weight.shape, "float64")
        y, other = (host(net(image(), noise(), words * scale)) for scale in (1, 2))
        assert (abs(y - other).max() > 1e-3) == pooled
    assert UNet(1, (8,), groups=4, pooled=True, rng=0).count() == UNet(1, (8,), groups=4, pooled=False, rng=0).count()


def test_padding_and_a_dropped_prompt_in_the_whole_net() -> None:
    """More padding changes nothing, and a dropped prompt is the null prompt, which is also that of no words given."""
    net = awake(small()).astype("float64")
    longer = host(net(image(), noise(), tokens=IDS))
    np.testing.assert_allclose(host(net(image(), noise(), tokens=IDS[:, :3])), longer, rtol=1e-9)
    dropped = drop_prompts(IDS, 1, Rng(0))
    null = host(net(image(), noise(), tokens=dropped))
    np.testing.assert_allclose(host(net(image(), noise())), null, rtol=1e-9)
    np.testing.assert_allclose(null[2], longer[2], rtol=1e-9)
    assert abs(null[:2] - longer[:2]).max() > 1e-3


def test_a_net_without_text_draws_and_names_what_it_always_did() -> None:
    """So that its checkpoints load, and a seed means the same net."""
    source, with_text = Rng(0), Rng(0)
    net = UNet(rng=source)
    listening = UNet(context=6, rng=with_text)
    assert source.step == 51 and net.count() == 985_876
    assert with_text.step > 51
    assert [name for name, _ in net.named_parameters() if name.startswith("middle.0")] == [
        f"middle.0.{name}" for name in ("norm.weight norm.bias qkv.weight qkv.bias project.weight project.bias").split()
    ]
    assert set(net.state_dict()).isdisjoint(n for n, _ in listening.named_parameters() if "multihead_attn" in n)
    plain = UNet(attention=(1,), heads=2, rng=0)  # self-attention alone, more of it
    assert not any("multihead_attn" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("labels", [None, {"digit": 10}])
@on_numpy
def test_every_parameter_has_a_gradient_and_it_is_right(labels: Any) -> None:
    net = awake(small(labels=labels)).astype("float64")
    condition = {"digit": to_device(np.array([1, -1, 9]))} if labels else {}
    weights = Rng(2).normal((3, 8, 8, 1), "float64")

    def value() -> Any:
        return ops.sum(net(image(), noise(), tokens=IDS, **condition) * weights)

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
        assert difference == pytest.approx(backend.scalar((g.data * direction).sum()), rel=1e-6, abs=1e-7), name


def test_a_single_token_leaves_query_and_key_without_a_gradient_and_several_do_not() -> None:
    """The softmax over one element is the constant 1, whatever the score; so a context of one vector is a bias, and
    neither the question (query) nor the answer (key) can be learned. This was the fault of the published net."""
    net = awake(UNet(1, (8, 16), embedding=12, groups=4, context=6, heads=2, rng=0)).astype("float64")
    words = Tensor(Rng(1).normal((3, 4, 6), "float64"))
    for context, mask in ((words[:, :1], None), (words, [[True, False, False, False]]), (words, None)):
        net.zero_grad()
        mask = None if mask is None else to_device(np.array(mask))
        ops.square(net(image(), noise(), context, mask)).sum().backward()
        for name, p in net.named_parameters():
            if "multihead_attn" in name and ("q_proj" in name or "k_proj" in name or "norm2" in name):
                size = abs(host(p.grad)).max()
                assert size > 1e-4 if context is words and mask is None else size < 1e-15, name


def test_tokens_and_what_they_mean_are_one_condition() -> None:
    net = awake(small()).astype("float64")
    x, means = image(), net.encode(IDS)
    assert set(means) == {"context", "context_mask"} and not isinstance(means["context"], Tensor)
    y = host(net(x, noise(), tokens=IDS))
    np.testing.assert_array_equal(host(net(x, noise(), **means)), y)
    np.testing.assert_allclose(host(net(x, noise()))[2], y[2], rtol=1e-9)  # not given is the null prompt
    one = host(net(x, noise(), tokens=IDS[:1]))  # a prompt for all
    np.testing.assert_allclose(one[0], y[0], rtol=1e-9)
    np.testing.assert_allclose(one, host(net(x, noise(), **net.encode(IDS[:1]))), rtol=1e-9)
    for i in (1, 2):
        assert abs(one[i] - y[i]).max() > 1e-3


def test_sampling_encodes_each_prompt_once_and_in_any_microbatch_the_same() -> None:
    net = awake(small())
    denoiser = Denoiser(net, 0.5)
    words, encodings = net.encode(IDS), []
    net.encoder.register_forward_hook(lambda *_: encodings.append(1))
    options = {"steps": 3, "eps": 0.01}
    whole = host(sample(denoiser, (3, 8, 8, 1), KarrasSDE(), 0, **options, **words))
    assert not encodings
    parts = host(sample(denoiser, (3, 8, 8, 1), KarrasSDE(), 0, microbatch=2, **options, **words))
    by_tokens = host(sample(denoiser, (3, 8, 8, 1), KarrasSDE(), 0, **options, tokens=IDS))
    np.testing.assert_allclose(parts, whole, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(by_tokens, whole, rtol=1e-3, atol=1e-4)
    counted = Counted(Guided(denoiser, 1.0))
    guided = host(sample(counted, (3, 8, 8, 1), KarrasSDE(), 0, **options, **words))
    np.testing.assert_allclose(guided[2], whole[2], rtol=1e-3, atol=1e-3)  # the null prompt, guided away from itself
    assert abs(guided[0] - whole[0]).max() > 1e-3


def test_a_training_step_never_waits_and_teaches_the_encoder() -> None:
    denoiser = Denoiser(awake(small()), sigma_data=0.5)
    optimizer = Adam(denoiser.parameters(), 1e-3)
    x0, before = Rng(0).normal((3, 8, 8, 1)), denoiser.state_dict()
    ids = to_device(IDS)
    with backend.no_sync():
        for tokens in (IDS, drop_prompts(ids, 0.5, Rng(1)), ids):
            optimizer.zero_grad()
            loss = edm_loss(denoiser, x0, Rng(1), tokens=tokens)
            loss.backward()
            optimizer.step()
    assert np.isfinite(loss.item())
    for name in ("net.encoder.embedding.weight", "net.net.last.weight"):
        assert not np.array_equal(host(before[name]), host(denoiser.state_dict()[name]))


@pytest.mark.parametrize(
    ("make", "quoted"),
    [
        (
            lambda: UNet(1, (8, 16), groups=4, context=6, attention=(2,)),
            "a level of .* 0 to 1, not 2",
        ),
        (lambda: UNet(1, (8, 16), groups=4, context=6, attention=()), "no level attends to the context of 6"),
        (lambda: UNet(1, (8, 16), groups=4, context=0), "context must be .* not 0"),
        (lambda: UNet(1, (8, 16), groups=4, context=6, heads=3), "num_heads=3 must divide embed_dim=16"),
        (lambda: UNet(labels={"context": 3}), "which 'context' cannot be"),
        (lambda: small().net(image(), noise()), r"takes a context \(N, S, 12\), but .* are None and None"),
        (lambda: UNet(1, (8, 16), groups=4)(image(), noise(), image()), r"takes no context, but .* \(3, 8, 8, 1\)"),
        (
            lambda: small().net(image(), noise(), Tensor(Rng(0).normal((2, 4, 12)))),
            r"\(3 or 1, S, 12\), not \(2, 4, 12\)",
        ),
        (
            lambda: small().net(image(), noise(), normal(3, 4, 12), to_device(np.ones((3, 5), bool))),
            r"the mask of a context \(3, 4, 12\) has the shape \(3, 5\)",
        ),
        (lambda: small()(image(), noise(), tokens=IDS, **small().encode(IDS)), "but not both"),
        (lambda: small().encode(np.zeros((3, 6), int)), r"tokens must be \(N, 5 or less\), not \(3, 6\)"),
        (lambda: drop_prompts(IDS, 1.5, Rng(0)), r"p must be a number in \[0, 1\], not 1.5"),
        (lambda: Tokenizer(["a"], 0), "length must be .* not 0"),
    ],
)
def test_bad_arguments_are_quoted(make: Any, quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        make()


def test_the_vocabulary_is_kept_with_the_weights(tmp_path):
    tokenizer = Tokenizer.fit(["öl über zwei, 8 äpfel", "8"])
    net = TextToImage(
        TextEncoder(tokenizer.size, tokenizer.length, 8, rng=0), UNet(1, (8,), groups=4, context=8), tokenizer
    )
    saving.save(tmp_path / "a.npz", {"net": net.state_dict()})
    again = Tokenizer.from_array(saving.load(tmp_path / "a.npz")["net"]["vocabulary"])
    assert (again.words, again.length) == (tokenizer.words, tokenizer.length)
    other = Tokenizer.fit(["another vocabulary"], length=tokenizer.length)
    with pytest.raises(ValueError, match="vocabulary"):
        TextToImage(net.encoder, net.net, other).load_state_dict(net.state_dict())
