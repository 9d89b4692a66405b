"""Glyphs: the pictures show what the labels and captions say, a seed means one set, the cache is safe."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinydiff.data import ATTRIBUTES, VARIETIES, glyphs

module = importlib.import_module("tinydiff.data.glyphs")  # the package's `glyphs` is the function


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def wide():
    return glyphs(6000, cache=False)


def say(data, name):
    return np.array(ATTRIBUTES[name])[data.labels[name]]


def box(image):
    """First and last row, first and last column with ink."""
    rows, columns = np.flatnonzero(image.max(1) > 100), np.flatnonzero(image.max(0) > 100)
    return rows[0], rows[-1], columns[0], columns[-1]


# ---- the shape of the answer


@pytest.mark.parametrize("n", [0, 1, 7])
def test_shapes_and_types(n):
    data = glyphs(n)
    assert data.images.shape == (n, 28, 28) and data.images.dtype == np.uint8
    assert list(data.labels) == list(ATTRIBUTES)
    assert all(labels.shape == (n,) and labels.dtype == np.int64 for labels in data.labels.values())
    assert len(data.captions) == len(data) == n


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_variety_has_all_its_values_and_no_other(variety):
    data = glyphs(2000, variety=variety, cache=False)
    for name, values in ATTRIBUTES.items():
        assert set(say(data, name)) == set(VARIETIES[variety].get(name, values))


def test_digits_are_equally_frequent(wide):
    counts = np.bincount(wide.labels["digit"], minlength=10)
    assert abs(counts - 600).max() < 120  # five standard deviations


@pytest.mark.parametrize("bad", [-1, -20])
def test_errors_quote_the_value(bad):
    with pytest.raises(ValueError, match=f"n must be 0 or more, got {bad}"):
        glyphs(bad)
    with pytest.raises(ValueError, match=f"seed must be 0 or more, got {bad}"):
        glyphs(1, seed=bad)
    with pytest.raises(TypeError, match="n must be an integer, got 2.5"):
        glyphs(2.5)
    with pytest.raises(ValueError, match=r"\['wide', 'plain'\], got 'easy'"):
        glyphs(1, variety="easy")


# ---- determinism


def test_glyph_i_of_a_seed_is_the_same_whatever_n_is():
    many, few = glyphs(1100, seed=3, cache=False), glyphs(1030, seed=3, cache=False)  # two sheets each
    np.testing.assert_array_equal(many.images[:1030], few.images)
    assert many.captions[:1030] == few.captions
    for name in ATTRIBUTES:
        np.testing.assert_array_equal(many.labels[name][:1030], few.labels[name])


def test_seeds_differ():
    assert glyphs(20, seed=0).captions != glyphs(20, seed=1).captions


def test_no_two_pictures_are_alike():
    data = glyphs(1000, variety="plain", cache=False)
    assert len(np.unique(data.images.reshape(1000, -1), axis=0)) == 1000


def test_the_dice_of_seed_0_are_fixed_for_good():
    """If this changes, every model trained on glyphs was trained on something else: raise DRAWING as well."""
    assert glyphs(4).captions == [
        "a small bold serif zero leaning right, at the top left",
        "a small heavy typewriter four, at the bottom left",
        "a heavy typewriter four",
        "a large heavy book four, at the top right",
    ]


# ---- the pictures show what the labels say


def test_nothing_is_clipped_and_edges_are_smooth(wide):
    assert not wide.images[:, [0, -1]].any() and not wide.images[:, :, [0, -1]].any()
    assert (wide.images.reshape(6000, -1).max(1) > 150).all()  # hairlines of a small book face are thin
    assert len(np.unique(wide.images)) > 200


def test_they_fill_the_frame_as_mnist_does():
    data = glyphs(500, variety="plain", cache=False)
    boxes = np.array([box(image) for image in data.images])
    assert 18.5 < (boxes[:, 1] - boxes[:, 0] + 1).mean() < 20.5  # MNIST scales to 20
    middle = (boxes[:, [0, 2]] + boxes[:, [1, 3]]) / 2  # (n, 2)
    assert abs(middle - 13.5).max() <= 1.5


def test_sizes(wide):
    boxes = np.array([box(image) for image in wide.images])
    tall = boxes[:, 1] - boxes[:, 0] + 1
    for size, height in module.HEIGHTS.items():
        assert abs(tall[say(wide, "size") == size] - height).max() < 2.5
        assert abs(tall[say(wide, "size") == size].mean() - height) < 0.5


def test_places(wide):
    boxes = np.array([box(image) for image in wide.images])
    y, x = (boxes[:, 0] + boxes[:, 1]) / 2 - 13.5, (boxes[:, 2] + boxes[:, 3]) / 2 - 13.5
    place = say(wide, "place")
    for word, offset in (("top", -y), ("bottom", y), ("left", -x), ("right", x)):
        there = np.array([word in p for p in place])
        assert offset[there].mean() > 1.7 and offset[there].min() > 0.4
    assert max(abs(x[place == "centre"]).max(), abs(y[place == "centre"]).max()) <= 1.5


def test_slants(wide):
    rows, columns = np.mgrid[:28, :28]
    lean = []  # the shear that the picture's second moments show
    for image in wide.images:
        w = image / image.sum()
        dy, dx = (w * rows).sum() - rows, columns - (w * columns).sum()
        lean.append((w * dx * dy).sum() / (w * dy * dy).sum())
    lean, slant = np.array(lean), say(wide, "slant")
    for digit in range(10):
        of = {s: lean[(slant == s) & (wide.labels["digit"] == digit)].mean() for s in ATTRIBUTES["slant"]}
        for s, expected in {"leaning left": -0.27, "leaning right": 0.27}.items():
            assert of[s] - of["upright"] == pytest.approx(expected, abs=0.06)


def test_weights(wide):
    ink = wide.images.mean((1, 2)) / np.array([module.HEIGHTS[s] for s in say(wide, "size")]) ** 2
    for face in ATTRIBUTES["face"]:
        mean = [ink[(say(wide, "face") == face) & (say(wide, "weight") == w)].mean() for w in ATTRIBUTES["weight"]]
        assert mean[0] * 1.12 < mean[1] and mean[1] * 1.05 < mean[2], (face, mean)


def test_faces_are_different_shapes():
    seen = [
        np.concatenate([outline.vertices.ravel() for outline in module._outlines(module._font(face, weight)[0])])
        for face in ATTRIBUTES["face"]
        for weight in ("regular", "bold")
        if weight == "regular" or module.FONTS[face][1]
    ]
    assert len(seen) == 12
    assert all(a.shape != b.shape or abs(a - b).max() > 0.01 for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("variety, least", [("plain", 1.0), ("wide", 0.9)])
def test_digits_are_distinguished_by_their_nearest_neighbour(variety, least, wide):
    data = wide if variety == "wide" else glyphs(1200, variety=variety, cache=False)
    x = data.images.reshape(len(data), -1).astype(np.float32) / 255
    train, test, digit = x[:-200], x[-200:], data.labels["digit"]
    distance = (train**2).sum(1) - 2 * test @ train.T  # (200, n)
    assert (digit[:-200][distance.argmin(1)] == digit[-200:]).mean() >= least


# ---- captions


@pytest.mark.parametrize(
    "values, caption",
    [
        ("seven serif bold small leaning_left centre", "a small bold serif seven leaning left"),
        ("zero sans regular medium upright centre", "a sans zero"),
        (
            "eight mono heavy large leaning_right top_left",
            "a large heavy mono eight leaning right, at the top left",
        ),
        ("one roman regular medium upright bottom_right", "a roman one, at the bottom right"),
    ],
)
def test_captions(values, caption):
    row = [ATTRIBUTES[name].index(v.replace("_", " ")) for name, v in zip(ATTRIBUTES, values.split(), strict=True)]
    assert module._caption(*row) == caption


def test_captions_distinguish_every_two_combinations(wide):
    rows = {tuple(row) for row in np.stack(list(wide.labels.values()), axis=1).tolist()}
    assert len(set(wide.captions)) == len(rows) > 4000


# ---- the cache


def cache_files():
    return sorted(module.cache_dir("glyphs").iterdir())


def test_the_second_call_reads_the_cache(monkeypatch):
    first = glyphs(30, seed=5)
    monkeypatch.setattr(module, "_draw", None)
    second = glyphs(30, seed=5)
    np.testing.assert_array_equal(first.images, second.images)
    assert first.captions == second.captions and len(cache_files()) == 1
    for other in ({"n": 29, "seed": 5}, {"n": 30, "seed": 6}, {"n": 30, "seed": 5, "variety": "plain"}):
        with pytest.raises(TypeError):  # not in the cache, so it would be drawn
            glyphs(**other)
    for name, other in (("version", lambda package: "0.1"), ("DRAWING", 0)):
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(module, name, other)
            glyphs(30, seed=5)


def test_without_cache_nothing_is_written():
    glyphs(3, cache=False)
    assert not module.cache_dir("glyphs").exists()


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "flipped", "other shape", "other array", "npy"])
def test_a_damaged_cache_is_drawn_again(damage):
    sound = glyphs(30)
    (path,) = cache_files()
    blob = path.read_bytes()
    if damage == "other shape":
        np.savez(path, images=sound.images[:29])
    elif damage == "other array":
        np.savez(path, pictures=sound.images)
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, sound.images)
    else:
        middle = len(blob) // 2
        flipped = blob[:middle] + bytes([blob[middle] ^ 255]) + blob[middle + 1 :]
        bad = {"empty": b"", "garbage": b"garbage" * 99, "truncated": blob[:-300], "flipped": flipped}
        path.write_bytes(bad[damage])
    np.testing.assert_array_equal(glyphs(30).images, sound.images)
    assert cache_files() == [path]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["images"], sound.images)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "tinydiff").write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="glyphs are not cached in"):
        assert len(glyphs(3)) == 3


def test_neither_importing_nor_reading_the_cache_imports_matplotlib():
    glyphs(3)
    code = (
        "import sys, tinydiff.data; before = 'matplotlib' in sys.modules;"
        "tinydiff.data.glyphs(3); print(before, 'matplotlib' in sys.modules)"
    )
    root = str(Path(module.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
