"""The classifier: what it returns, which images it refuses, that it learns, and that its cache is safe."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest

import tinydiff
from tinydiff import Rng, Tensor, backend, data, ops, saving, tensor
from tinydiff.backend import to_device, to_host
from tinydiff.data.augment import random_affine
from tinydiff.models import classifier_training
from tinydiff.models.classifier import Classifier
from tinydiff.models.classifier_training import trained_classifier


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def small(size=(12, 8), in_channels=1, **options) -> Classifier:
    return Classifier(
        {"digit": 10, "face": 3}, size, in_channels, channels=(8, 16), features=5, groups=4, rng=0, **options
    )


def pictures(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)


# ---- the net


@pytest.mark.parametrize("size, channels", [((12, 8), 1), ((10, 6), 3)])
def test_shapes(each_backend, size, channels):
    net, x = small(size, channels), pictures(3, *size, channels)
    logits = net(Tensor(to_device(x)))
    assert {name: z.shape for name, z in logits.items()} == {"digit": (3, 10), "face": (3, 3)}
    fine, coarse = net.activations(Tensor(to_device(x)))
    h, w = size[0] // 2, size[1] // 2
    assert fine.shape == (3, h, w, 8) and coarse.shape == (3, -(-h // 2), -(-w // 2), 16)
    seen = net.predict(x)
    assert isinstance(seen.features, np.ndarray) and seen.features.shape == (3, 5)
    np.testing.assert_allclose(seen.features, to_host(net.features(Tensor(to_device(x))).data), rtol=1e-5, atol=1e-6)
    for name, p in seen.probabilities.items():
        np.testing.assert_allclose(p, to_host(ops.softmax(logits[name], axis=-1).data), rtol=1e-4)


def test_every_parameter_has_a_gradient_and_it_is_right(each_backend):
    net = small((8, 8)).astype("float64")
    x = to_device(pictures(2, 8, 8, 1, dtype="float64"))

    def value():
        return sum(ops.cross_entropy(z, to_device(np.array([1, 2]))) for z in net(Tensor(x)).values())

    parameters = dict(net.named_parameters())
    gradients = tinydiff.grad(value(), list(parameters.values()))
    for (name, p), g in zip(parameters.items(), gradients):
        at = tuple(size // 2 for size in p.shape)
        h, old, found = 1e-6, p.data.copy(), []
        for step in (h, -h):
            moved = to_host(old).copy()
            moved[at] += step
            p.data = to_device(moved)
            found.append(float(to_host(value().data)))
        p.data = old
        assert to_host(g.data)[at] == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-4, abs=1e-7), name


def test_what_an_image_is_said_to_be_does_not_depend_on_the_others(each_backend):
    net, x = small(), pictures(150, 12, 8, 1)
    together, alone = net.predict(x, threads=2), net.predict(x[140:141])
    np.testing.assert_allclose(together.features[140], alone.features[0], rtol=1e-5, atol=1e-6)
    assert len(together.features) == 150


def test_uint8_and_a_missing_axis_mean_the_same_images(each_backend):
    net, greys = small(), np.random.default_rng(0).integers(0, 256, (4, 12, 8), np.uint8)
    x = (greys / 127.5 - 1).astype("float32")
    for other in (greys, greys[..., None], x, tensor(x[..., None])):
        np.testing.assert_allclose(net.predict(other).features, net.predict(x[..., None]).features, rtol=1e-5)
    assert net.predict(greys.astype("uint8")[:1] * 0).features.shape == (1, 5)


# ---- images that are none


def test_images_of_another_range_are_refused(each_backend):
    net, x = small(), pictures(4, 12, 8, 1)
    for call in (net.predict, lambda x: net(Tensor(to_device(x))), lambda x: net.features(Tensor(to_device(x)))):
        if call == net.predict or each_backend == "numpy":
            with pytest.raises(ValueError, match=r"in \[-1, 1\], but these run from 0.0\d+ to 0.9\d+, without one"):
                call((x + 1) / 2)
            with pytest.raises(ValueError, match=r"in \[-1, 1\], but these run from -2.\d+ to 2.\d+: clip or scale"):
                call(x * 3)
            with pytest.raises(ValueError, match="2 of 4 images have a NaN, the first is number 1"):
                call(np.where(np.arange(4).reshape(4, 1, 1, 1) % 2, np.nan, x).astype("float32"))
        call(x)
    assert len(net.activations(Tensor(to_device(x * 3)))) == 2  # for a loss in training, which may be out of range


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: small().predict(np.zeros((2, 8, 12, 1), "float32")), ValueError, r"\(N, 12, 8, 1\).* not .*8, 12, 1"),
        (lambda: small().predict(np.zeros((0, 12, 8, 1), "float32")), ValueError, r"not none.*\(0, 12, 8, 1\)"),
        (lambda: small().predict(np.zeros((2, 12, 8, 1), int)), TypeError, "not int64"),
        (lambda: small().activations(tensor(pictures(2, 6, 8, 1))), ValueError, r"not \(2, 6, 8, 1\)"),
        (lambda: small((2, 8)), ValueError, "at least 4"),
        (lambda: small((9, 8)), ValueError, r"even .* not \(9, 8\)"),
        (lambda: Classifier({}), ValueError, "not {}"),
        (lambda: Classifier({"a/b": 2}), ValueError, "identifiers.* not {'a/b': 2}"),
        (lambda: Classifier({"a": 1}), ValueError, "'a' must be an integer of 2 or more, not 1"),
        (lambda: Classifier({"a": 2}, channels=(12,)), ValueError, "groups=8 must divide each"),
        (lambda: Classifier({"a": 2}, features=0), ValueError, "features must be .* not 0"),
    ],
)  # fmt: skip
def test_errors_quote_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- images moved


def test_a_map_of_half_widths_zero_changes_nothing(each_backend):
    x = to_device(pictures(3, 6, 5, 2))
    y = random_affine(x, Rng(0), angle=0, scale=0, shear=0, shift=0, fill=9.0)
    np.testing.assert_allclose(to_host(y), to_host(x), atol=1e-5)


def test_a_shift_moves_by_so_many_pixels_and_fills_the_rest(each_backend, monkeypatch):
    x = pictures(1, 6, 5, 1)
    u = np.full((1, 6, 1, 1), 0.5, "float32")  # no map, except
    u[0, 4:, 0, 0] = 1.0, 0.75  # twice the half-width minus one: across by all of it, down by half of it
    monkeypatch.setattr(Rng, "uniform", lambda *_a, **_k: to_device(u))
    y = to_host(random_affine(to_device(x), Rng(0), shift=2.0, fill=-1.0))
    np.testing.assert_allclose(y[0, :-1, :-2], x[0, 1:, 2:], atol=1e-5)
    assert (y[0, -1] == -1).all() and (y[0, :, -2:] == -1).all()


def test_the_middle_of_a_blob_goes_where_the_formula_says(each_backend):
    """The picture at p is the old one at A p + b, so a point q goes to A^-1 (q - b)."""
    side, q = 41, np.array([5.0, -7.0])  # x, y from the middle
    g = np.arange(side) - 20.0
    blob = np.exp(-((g[None, :] - q[0]) ** 2 + (g[:, None] - q[1]) ** 2) / 12).astype("float32")
    n = 8
    x = to_device(np.broadcast_to(blob[None, :, :, None], (n, side, side, 1)).copy())
    y = to_host(random_affine(x, Rng(3)))[..., 0].astype(float)
    u = 2 * to_host(Rng(3).uniform((n, 6, 1, 1)))[:, :, 0, 0].astype(float) - 1
    for image, (a, sx, sy, h, bx, by) in zip(y, u * [0.2, 0.12, 0.12, 0.2, 2, 2]):
        turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        matrix = turn @ np.array([[1 + sx, h * (1 + sy)], [0, 1 + sy]])
        expected = np.linalg.solve(matrix, q - [bx, by])
        middle = (image.sum(0) @ g / image.sum(), image.sum(1) @ g / image.sum())
        np.testing.assert_allclose(middle, expected, atol=0.02)


def test_an_image_is_moved_alike_in_any_microbatch(each_backend):
    x = to_device(pictures(7, 6, 6, 1))
    whole, part = random_affine(x, Rng(1)), random_affine(x[4:], Rng(1), sample_offset=4)
    np.testing.assert_array_equal(to_host(whole)[4:], to_host(part))
    assert abs(to_host(whole) - to_host(random_affine(x, Rng(2)))).max() > 0.1


@pytest.mark.parametrize("options, match", [({"scale": 1}, "scale .* not 1"), ({"shift": -1}, "shift .* not -1")])
def test_half_widths_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        random_affine(pictures(1, 4, 4, 1), Rng(0), **options)
    with pytest.raises(ValueError, match=r"uint8 of shape \(1, 4, 4, 1\)"):
        random_affine(np.zeros((1, 4, 4, 1), np.uint8), Rng(0))


# ---- learning


FEW = data.glyphs(1200, 5, variety="plain", cache=False)
QUICK = {"channels": (8, 16), "epochs": 3, "batch_size": 32, "lr": 1e-2, "stream": io.StringIO()}
HEADS = {"digit": 10, "slant": 3}


def learned(n: int = 32, **options) -> Classifier:
    chosen = {name: FEW.labels[name][:n] for name in HEADS}
    return trained_classifier(FEW.images[:n], chosen, HEADS, **{**QUICK, **options})


@pytest.mark.parametrize("augment", [False, True])
def test_it_learns_in_seconds(numpy_backend, augment):
    """95 % of 200 glyphs that it has not seen; of one or the other digit by chance it would be 10 %."""
    seen = learned(1000, epochs=8 if augment else 5, augment=augment, cache=False).predict(FEW.images[1000:])
    right = {name: (seen.probabilities[name].argmax(1) == FEW.labels[name][1000:]).mean() for name in HEADS}
    assert right["digit"] >= 0.95, right
    assert augment or right["slant"] >= 0.95, right


def test_what_is_learned_is_a_function_of_the_seed(each_backend):
    one, two, other = (learned(epochs=1, cache=False, seed=seed).predict(FEW.images[:9]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.features, two.features)
    assert abs(one.features - other.features).max() > 1e-3


def test_progress_has_a_line_per_epoch():
    stream = io.StringIO()
    learned(epochs=2, stream=stream, cache=False)
    first, *lines = stream.getvalue().splitlines()
    assert "digit, slant on 32 images" in first and [line[:9] for line in lines] == ["epoch 1/2", "epoch 2/2"]


@pytest.mark.filterwarnings("ignore:.*encountered")
def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match=r"the loss is nan in epoch \d: lower lr=1e\+30"):
        learned(lr=1e30, epochs=5, cache=False)


@pytest.mark.parametrize(
    "changed, error, match",
    [
        ({"images": FEW.images[:4] / 255}, TypeError, "uint8, not float64"),
        ({"images": FEW.images[:4, 0]}, ValueError, r"not \(4, 28\)"),
        ({"labels": {"face": np.zeros(4, int)}}, ValueError, r"labels \['face'\], but heads \['digit'\]"),
        ({"labels": {"digit": np.zeros(4)}}, TypeError, "'digit' must be integers, not float64"),
        ({"labels": {"digit": np.zeros(3, int)}}, ValueError, r"4 images, .* \(3,\)"),
        ({"labels": {"digit": np.array([0, 1, 10, 2])}}, ValueError, "0 to 9, but run from 0 to 10"),
        ({"epochs": 0}, ValueError, "epochs must be .* not 0"),
        ({"lr": -1}, ValueError, "lr must be .* not -1"),
    ],
)
def test_what_cannot_be_learned(changed, error, match):
    given = {"images": FEW.images[:4], "labels": {"digit": np.arange(4)}, "heads": {"digit": 10}, **QUICK}
    with pytest.raises(error, match=match):
        trained_classifier(**{**given, **changed}, cache=False)


# ---- the cache


def cache_files():
    return sorted(saving.cache_dir("classifier").iterdir())


def test_the_second_call_reads_the_cache(monkeypatch):
    first = learned().state_dict()
    (path,) = cache_files()

    def again(*_arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(classifier_training, "_learn", again)
    second = learned().state_dict()
    assert all((to_host(first[name]) == to_host(second[name])).all() for name in first)
    for other in ({"n": 31}, {"seed": 1}, {"augment": True}, {"epochs": 2}, {"lr": 0.1}, {"batch_size": 31}):
        with pytest.raises(AssertionError, match="trained"):
            learned(**other)
    monkeypatch.setattr(classifier_training, "VERSION", 0)
    with pytest.raises(AssertionError, match="trained"):
        learned()


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "another net"])
def test_a_damaged_cache_is_trained_again(damage):
    sound = learned().state_dict()
    (path,) = cache_files()
    blob = path.read_bytes()
    if damage == "another net":
        saving.save(path, {"model": small().state_dict()})
    else:
        path.write_bytes({"empty": b"", "garbage": b"garbage" * 99, "truncated": blob[:-300]}[damage])
    stream = io.StringIO()
    again = learned(stream=stream).state_dict()
    assert all((to_host(sound[name]) == to_host(again[name])).all() for name in sound)
    assert "trained again" in stream.getvalue() and cache_files() == [path]
    stream = io.StringIO()
    learned(stream=stream)
    assert stream.getvalue() == ""  # it was written anew


def test_without_cache_nothing_is_written():
    learned(cache=False)
    assert not saving.cache_dir("classifier").exists()


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "tinydiff").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="the classifier is not cached in"):
        learned()


def test_the_two_data_sets(monkeypatch, tmp_path):
    """What is asked of trained_classifier for each."""
    asked = []
    monkeypatch.setattr(classifier_training, "trained_classifier", lambda *a, **k: asked.append((a, k)))
    monkeypatch.setattr(data, "mnist", lambda root: (root, "labels"))
    monkeypatch.setattr(classifier_training, "GLYPHS", 20)
    with warnings.catch_warnings():
        classifier_training.mnist_classifier(tmp_path, seed=3)
        classifier_training.glyphs_classifier(cache=False)
    (images, labels, heads), options = asked[0]
    assert (images, labels, heads, options["augment"], options["seed"]) == (
        tmp_path, {"digit": "labels"}, {"digit": 10}, True, 3
    )  # fmt: skip
    (images, labels, heads), options = asked[1]
    assert len(images) == 20 and list(labels) == list(heads) == list(data.ATTRIBUTES) and heads["face"] == 7
    assert not options.get("augment") and options["cache"] is False


def test_it_is_in_evaluation_mode_and_on_the_device(each_backend):
    net = learned(epochs=1)
    assert not net.training and all(backend.active().is_array(p.data) for p in net.parameters())
