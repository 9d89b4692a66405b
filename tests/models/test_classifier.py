"""The judge: shapes, gradients, what it refuses, and that it learns from few pictures."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import on_numpy

import tinydiff
from tinydiff import Rng, Tensor, data
from tinydiff.backend import to_device, to_host, xp
from tinydiff.models.classifier import Classifier, judge_loss, shifted
from tinydiff.optim import AdamW

pytestmark = pytest.mark.usefixtures("each_backend")


def pictures(*shape):
    return xp.clip(Rng(0).normal(shape), -1, 1)


def small(size=(9, 12), **options):
    return Classifier(size, {"digit": 10, "size": 3}, channels=(8, 16), width=12, groups=4, rng=0, **options)


def test_a_head_for_each_attribute_reads_the_features():
    judge, x = small(in_channels=3), pictures(5, 9, 12, 3)
    features = judge.features(x)
    assert features.shape == (5, 12)
    logits = judge(x)
    assert {name: y.shape for name, y in logits.items()} == {"digit": (5, 10), "size": (5, 3)}
    np.testing.assert_array_equal(judge.heads["size"](features).numpy(), logits["size"].numpy())


def test_activations_are_what_each_resolution_ends_in():
    judge, x = small(), Tensor(pictures(2, 9, 12, 1))
    fine, coarse = judge.activations(x)
    assert fine.shape == (2, 5, 6, 8) and coarse.shape == (2, 3, 3, 16)
    last = judge.last(coarse.reshape(2, -1))
    np.testing.assert_array_equal(tinydiff.ops.silu(last).numpy(), judge.features(x).numpy())
    np.testing.assert_array_equal(judge.activations(3 * x)[0].shape, fine.shape)  # another scale is not refused
    with pytest.raises(ValueError, match=r"images must be \(N, \(9, 12, 1\)\), not \(2, 9, 13, 1\)"):
        judge.activations(pictures(2, 9, 13, 1))


def test_the_loss_is_the_sum_of_the_cross_entropies():
    judge, x = small(), pictures(4, 9, 12, 1)
    labels = {"digit": np.array([0, 9, 3, 3]), "size": np.array([0, 1, 2, 2])}
    expected = 0.0
    for name, logits in judge(x).items():
        z = logits.numpy().astype("float64")
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        expected -= np.log(p[np.arange(4), labels[name]]).mean()
    loss = judge_loss(judge, x, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, p in judge.named_parameters():
        assert abs(tinydiff.grad(judge_loss(judge, x, labels), [p])[0].numpy()).max() > 0, name


def test_shifted_pictures_are_moved_by_whole_pixels():
    x = Rng(0).normal((50, 6, 5, 2))
    y, host = to_host(shifted(x, 2, Rng(1))), to_host(x)
    wide = np.pad(host, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    found = set()
    for i in range(50):
        places = [(a, b) for a in range(5) for b in range(5) if (wide[i, a : a + 6, b : b + 5] == y[i]).all()]
        assert len(places) == 1
        found |= set(places)
    assert len(found) > 15  # of 25 places
    np.testing.assert_array_equal(to_host(shifted(x[20:], 2, Rng(1), sample_offset=20)), y[20:])


@on_numpy
def test_it_learns_digits_and_sizes_from_few_pictures():
    glyphs = data.glyphs(400, 5, variety="wide", cache=False)
    x, labels = data.to_float(glyphs.images, -1, 1), {name: glyphs.labels[name] for name in ("digit", "size")}
    judge = small((28, 28))
    optimizer = AdamW(judge.parameters(), lr=3e-3)
    for step in range(60):
        rows = (np.arange(50) + 50 * step) % 300
        optimizer.zero_grad()
        judge_loss(judge, to_device(x[rows]), {name: v[rows] for name, v in labels.items()}).backward()
        optimizer.step()
    found = {name: to_host(y.data).argmax(axis=1) for name, y in judge(to_device(x[300:])).items()}
    assert (found["size"] == labels["size"][300:]).mean() > 0.6  # a third by chance
    assert (found["digit"] == labels["digit"][300:]).mean() > 0.5  # a tenth by chance


def test_what_it_finds_is_on_the_host_and_does_not_depend_on_the_other_pictures():
    judge, x = small(), pictures(200, 9, 12, 1)
    found, features = judge.predict(to_host(x))
    assert isinstance(features, np.ndarray) and features.shape == (200, 12)
    np.testing.assert_allclose(features, judge.features(x).numpy(), rtol=1e-4, atol=1e-5)
    for name, logits in judge(x).items():
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_array_equal(found[name], logits.numpy().argmax(axis=1))
    _, alone = judge.predict(Tensor(x[190:191]))
    np.testing.assert_allclose(alone, features[190:191], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: (x + 1) / 2, r"in \[-1, 1\], but run from 0 to 1: if they are in \[0, 1\], give 2 x - 1"),
        (lambda x: 0.6 * x + 0.5, r"from -0.1 to 1.1: if they are in \[0, 1\]"),  # samples overshoot
        (lambda x: (x + 1) * 127.5, r"in \[-1, 1\], but run from 0 to 255$"),
        (lambda x: 3 * x, r"in \[-1, 1\], but run from -3 to 3$"),
        (lambda x: np.where(np.arange(4)[:, None, None, None] % 2, np.nan, x), "2 of 4 images have a NaN, .* number 1"),
    ],
)
def test_pictures_in_another_scale_are_refused(change, message):
    """By `predict` with every backend; elsewhere not on a GPU, where reading the numbers would wait for it."""
    judge, right = small(), to_host(pictures(4, 9, 12, 1))
    wrong = change(right).astype("float32")
    calls = [judge.predict, lambda x: judge(to_device(x)), lambda x: judge.features(to_device(x))]
    for call in calls if tinydiff.backend.name == "numpy" else calls[:1]:
        with pytest.raises(ValueError, match=message):
            call(wrong)
    for call in calls:
        call(1.1 * right)


def test_one_bright_picture_among_others_is_no_picture_in_another_scale():
    x = to_host(pictures(129, 9, 12, 1)).copy()
    x[128:] = 1.0  # a microbatch of its own
    small().predict(x)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: small()(pictures(2, 12, 9, 1)), r"images must be \(N, \(9, 12, 1\)\), not \(2, 12, 9, 1\)"),
        (lambda: small().predict(np.zeros((0, 9, 12, 1))), r"images must be .*, not \(0, 9, 12, 1\)"),
        (lambda: Classifier((28,), {"a": 2}), "size must be 2 positive integers"),
        (lambda: Classifier((28, 28), {"a": 0}), "the number of values of 'a' must be an integer of 1 or more, not 0"),
        (lambda: Classifier((28, 28), {}), "heads must name attributes by identifiers, .*, not {}"),
        (lambda: Classifier((28, 28), {"a/b": 2}), "identifiers, .*, not {'a/b': 2}"),  # it could not be saved
    ],
)
def test_what_it_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_tensor_is_as_good_as_an_array():
    judge, x = small(), pictures(2, 9, 12, 1)
    np.testing.assert_array_equal(judge.features(Tensor(x)).numpy(), judge.features(x).numpy())
