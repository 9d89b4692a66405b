"""Scenes: what the caption says is in the picture, found from the pixels alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinydiff.data import hold_out
from tinydiff.data.scenes import COLOURS, DISTANCES, LAYOUTS, SCENE, SHAPES, SIDE, SIZES, scenes

AREA = {"circle": math.pi, "square": 4 * 0.9**2, "triangle": 2.0, "ring": math.pi * (1 - 0.25), "cross": 0.7 * 3.3}


def test_a_seed_means_the_same_scenes():
    few, many, other = scenes(5, 3), scenes(300, 3), scenes(5, 4)
    np.testing.assert_array_equal(few.images, many.images[:5])
    assert few.captions == many.captions[:5] and few.captions != other.captions
    assert len(many) == 300 and many.images.shape == (300, SIDE, SIDE, 3) and many.images.dtype == np.uint8
    assert scenes(0).images.shape == (0, SIDE, SIDE, 3) and scenes(2, side=32).images.shape == (2, 32, 32, 3)


def test_every_value_is_drawn_alike_often():
    labels = scenes(7000, side=16).labels
    assert list(labels) == list(SCENE)
    for name, values in labels.items():
        share = np.bincount(values, minlength=len(SCENE[name])) / len(values)
        assert len(share) == len(SCENE[name]) and np.abs(share * len(share) - 1).max() < 0.15, name


@pytest.mark.parametrize("name", SHAPES)
def test_the_area_of_a_shape(name):
    """The coverage of the pixels adds up to the area: an independent measure of the distance, and of the edges."""
    r, step = 9.0, 1.0
    centres = np.arange(-20, 20, step, dtype="float32") + 0.37
    x, y = np.meshgrid(centres, centres)
    area = np.clip(0.5 - DISTANCES[name](x, y, np.float32(r)), 0, 1).sum()
    assert area == pytest.approx(AREA[name] * r * r, rel=0.02)
    for x, y in ((0.0, -r), (r, 0.0), (-r, 0.0), (0.0, r)):  # nothing reaches further than r
        assert DISTANCES[name](np.float32(1.2 * x), np.float32(1.2 * y), np.float32(r)) > 0


def parts(image):
    """The pixels that one of the seven colours covers for certain: {colour: bool (H, W)}."""
    palette = np.array(list(COLOURS.values()), float)
    distance = np.abs(image[:, :, None].astype(float) - palette).max(axis=-1)  # (H, W, 7)
    nearest = distance.argmin(axis=-1)
    sure = distance.min(axis=-1) < 16
    return {name: sure & (nearest == i) for i, name in enumerate(COLOURS)}


def test_the_pixels_are_what_the_caption_says():
    data = scenes(200, 1)
    colours, sizes = list(COLOURS), list(SIZES.values())
    seen = 0
    for i, image in enumerate(data.images):
        value = {name: values[i] for name, values in data.labels.items()}
        if value["first_colour"] == value["second_colour"]:
            continue
        seen += 1
        found = parts(image)
        first, second = (found[colours[value[f"{which}_colour"]]] for which in ("first", "second"))
        for where, which in ((first, "first"), (second, "second")):
            wanted = AREA[SHAPES[value[f"{which}_shape"]]] * sizes[value[f"{which}_size"]] ** 2
            assert 0.5 * wanted < where.sum() < 1.25 * wanted, data.captions[i]  # without its edges, with jitter
        (y1, x1), (y2, x2) = (np.argwhere(where).mean(axis=0) for where in (first, second))
        if LAYOUTS[value["layout"]] == "beside":
            assert x2 - x1 > 10 > abs(y2 - y1), data.captions[i]  # the middle of a triangle is a third below its own
        else:
            assert y2 - y1 > 10 > abs(x2 - x1), data.captions[i]
    assert seen > 150


def test_captions_name_the_first_shape_first_or_last():
    data = scenes(2000, 2, side=16)
    for i, caption in enumerate(data.captions):
        value = {name: SCENE[name][values[i]] for name, values in data.labels.items()}
        for word in (" to the left of ", " to the right of ", " above ", " below "):
            if word in caption:
                said = caption.split(word)
                break
        layout = "beside" if "to the" in word else "above"
        if word in (" to the right of ", " below "):
            said.reverse()
        assert layout == value["layout"]
        for text, which in zip(said, ("first", "second")):
            size = value[f"{which}_size"]
            words = [*([] if size == "medium" else [size]), value[f"{which}_colour"], value[f"{which}_shape"]]
            assert text.split()[1:] == words and text.split()[0] == ("an" if words[0] == "orange" else "a")
        first, second = (f"{value[f'{w}_colour']} {value[f'{w}_shape']}" for w in ("first", "second"))
        assert data.combinations[i] == f"{first} {layout} {second}"
    assert {w for c in data.captions for w in c.split()} >= {"a", "an", "left", "right", "above", "below", *COLOURS}


def test_combinations_can_be_held_out():
    data = scenes(4000, 5, side=16)
    held = hold_out(data.combinations, 0.1)
    kept = {c for c, h in zip(data.combinations, held) if not h}
    assert 0.05 < held.mean() < 0.2 and not any(c in kept for c, h in zip(data.combinations, held) if h)


def test_the_edges_are_smooth():
    image = scenes(1, 0).images[0].astype(int)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20  # background, two colours, and what lies between them


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((-1,), ValueError, "scenes: n must be"),
        ((1, -1), ValueError, "scenes: seed must be"),
        ((1.5,), ValueError, "scenes: n must be an integer of 0 or more, not 1.5"),
    ],
)
def test_bad_numbers_are_quoted(arguments, error, message):
    with pytest.raises(error, match=message):
        scenes(*arguments)


def test_a_picture_has_sixteen_pixels_or_more():
    with pytest.raises(ValueError, match="scenes: side must be .*8"):
        scenes(1, side=8)
