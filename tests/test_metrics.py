"""The measures of samples, each on sets whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinydiff import Rng, metrics, tensor
from tinydiff.backend import to_device


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- shares


def test_a_share_has_the_standard_error_of_a_binomial():
    """Against the spread of many shares of 50, each True with probability 0.3."""
    many = random().random((20_000, 50)) < 0.3
    values = [metrics.share(row).value for row in many]
    assert np.std(values) == pytest.approx(math.sqrt(0.3 * 0.7 / 50), rel=0.02)
    found = metrics.share(np.arange(50) < 15)
    assert found == (0.3, pytest.approx(math.sqrt(0.3 * 0.7 / 50)), 50)
    assert str(found) == "30.00 +- 6.48 %"


def test_conditional_accuracy_per_attribute_and_of_all_together(each_backend):
    digit = np.eye(3)[[0, 1, 2, 2]]
    size = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]])
    seen = {"digit": to_device(digit), "size": tensor(size), "face": np.ones((4, 2))}
    found = metrics.conditional_accuracy(seen, {"digit": np.array([0, 1, 2, 0]), "size": [0, 1, 1, 1]})
    assert {name: s.value for name, s in found.items()} == {"digit": 0.75, "size": 0.75, "all": 0.5}
    assert found["all"].standard_error == pytest.approx(0.25) and found["all"].n == 4
    assert metrics.conditional_accuracy(seen, {"size": 1})["all"].value == 0.5  # one for all


# ---- the Frechet distance


@pytest.mark.parametrize("singular, tolerance", [(False, 1e-12), (True, 1e-8)])
def test_gaussians_with_commuting_covariances_have_a_closed_form(singular, tolerance):
    """In the common eigenbasis each axis is a Gaussian of its own: (m1 - m2)^2 + (s1 - s2)^2. Where a variance is 0,
    rounding leaves about 1e-17 of it, whose root is larger than 1e-9."""
    rng = random()
    basis, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    s1, s2, m1, m2 = rng.random(7), rng.random(7), rng.normal(size=7), rng.normal(size=7)
    if singular:
        s1[0] = s2[1] = 0
    found = metrics.gaussian_frechet_distance(m1, basis * s1**2 @ basis.T, m2, basis * s2**2 @ basis.T)
    assert found == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=tolerance)


def test_other_gaussians_agree_with_the_square_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(5):
        a, b = random(seed).normal(size=(2, 6, 9))
        c1, c2, m = a @ a.T, b @ b.T, random(seed + 9).normal(size=6)
        expected = (m**2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
        assert metrics.gaussian_frechet_distance(m, c1, 0 * m, c2) == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_sets(each_backend):
    x = random().normal(size=(40, 5)).astype("float32")
    assert metrics.frechet_distance(to_device(x), tensor(x)) == pytest.approx(0, abs=1e-12)
    moved = x.astype(float) * 3 + [1, 0, 0, 2, 0]
    # about the mean m, the covariance C becomes 9 C, which commutes with it: tr(C) (3 - 1)^2
    m, c = x.astype(float).mean(axis=0), np.cov(x.astype(float).T)
    expected = ((2 * m + [1, 0, 0, 2, 0]) ** 2).sum() + 4 * np.trace(c)
    assert metrics.frechet_distance(x, moved) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(moved, x) == pytest.approx(expected, rel=1e-10)


def test_the_bias_of_few_samples_is_as_the_docstring_says():
    """F (F + 5) / (2 N) = 0.42 for F = 10 and N = 180, within 5 %."""
    found = [metrics.frechet_distance(*random(seed).normal(size=(2, 180, 10))) for seed in range(200)]
    assert np.mean(found) == pytest.approx(10 * 15 / 360, rel=0.05)


def test_the_scale_has_real_images_at_the_bottom_and_noise_at_the_top(each_backend):
    images = np.tanh(3 * random().normal(size=(4000, 3))).reshape(4000, 3, 1, 1)
    floor, ceiling = metrics.frechet_scale(lambda x: x.reshape(len(x), 3), images[:2000], images[2000:], Rng(0))
    assert 0 < floor < 0.01 < 0.2 < ceiling  # F (F + 5) / (2 N) = 0.006 for covariances of 1, and these are smaller
    assert floor == pytest.approx(metrics.frechet_distance(images[:2000, :, 0, 0], images[2000:, :, 0, 0]), rel=1e-9)


# ---- precision and recall


def test_precision_is_of_the_samples_and_recall_of_the_real_ones(each_backend):
    """Two clusters of real points, samples on one of them only: all are real, but half of what is real is missing."""
    rng = random()
    real = np.concatenate([rng.random((50, 3)), rng.random((50, 3)) + 100])
    same, half = real + 1e-9, rng.random((60, 3)) * 0.5 + 0.25
    for rows in (1024, 7):  # in blocks too
        assert [s.value for s in metrics.precision_recall(tensor(real), same, rows=rows)] == [1, 1]
        precision, recall = metrics.precision_recall(real, to_device(half), rows=rows)
        assert precision.value > 0.95 and recall.value <= 0.5 and precision.n == 60 and recall.n == 100
        assert [s.value for s in metrics.precision_recall(real, half + 50, rows=rows)] == [0, 0]
        found = metrics.precision_recall(real, np.concatenate([same, real + 50]), rows=rows)
        assert [s.value for s in found] == [0.5, 1]


@pytest.mark.parametrize("k, inside", [(1, [True, False, False]), (2, [True, True, False])])
def test_the_ball_reaches_to_the_kth_neighbour_and_its_edge_is_inside(k, inside):
    """Around 0, 1, 3 on a line the radii are 1, 1, 2 for k = 1, and 3, 2, 3 for k = 2."""
    real = np.array([[0.0], [1.0], [3.0]]) + 1000
    points = np.array([[-1.0], [-3.0], [6.1]]) + 1000
    np.testing.assert_array_equal(metrics._inside(points, real, k, 2), inside)


# ---- the nearest training image


def test_the_nearest_image_and_its_distance(each_backend):
    rng = random()
    train, images = rng.random((31, 4, 3, 1)), rng.random((9, 4, 3, 1))
    images[4] = train[17]
    d = np.sqrt(((images[:, None] - train) ** 2).sum(axis=(2, 3, 4)))  # (9, 31)
    for rows in (1024, 5):
        found = metrics.nearest(to_device(images), tensor(train), rows=rows)
        np.testing.assert_array_equal(found.which, d.argmin(axis=1))
        np.testing.assert_allclose(found.distance, d.min(axis=1), rtol=1e-12)
        assert found.which[4] == 17 and found.distance[4] == 0
    twice = np.zeros((6, 2))
    assert metrics.nearest(twice[:1], twice, rows=2).which == [0]  # of equally near ones the first


def test_pixels_of_uint8_do_not_wrap():
    found = metrics.nearest(np.uint8([[0, 0]]), np.uint8([[255, 255], [3, 4]]))
    assert (found.which[0], found.distance[0]) == (1, 5)


def test_copies_are_nearer_than_test_images():
    rng = random()
    train, test, new = rng.normal(size=(3, 300, 20))
    scale = metrics.nearest(test, train)
    assert metrics.copied(metrics.nearest(train[:50] + 1e-3, train), scale).value == 1
    assert metrics.copied(metrics.nearest(new, train), scale, level=0.1).value == pytest.approx(0.1, abs=0.06)


# ---- errors


def with_nan() -> np.ndarray:
    x = np.zeros((5, 2))
    x[[3, 4]] = np.nan, np.inf
    return x


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: metrics.share([]), TypeError, "float64"),
        (lambda: metrics.share(np.zeros(0, bool)), ValueError, r"\(0,\)"),
        (lambda: metrics.conditional_accuracy({"a": np.ones((2, 3))}, {"b": [0, 0]}), ValueError,
         r"knows \['a'\].* not \['b'\]"),
        (lambda: metrics.conditional_accuracy({"a": np.ones((2, 3))}, {"a": [0, 3]}), ValueError,
         "0 to 2, but runs from 0 to 3"),
        (lambda: metrics.conditional_accuracy({"a": np.ones((2, 3))}, {"a": [0]}), ValueError, r"2 samples.*\(1,\)"),
        (lambda: metrics.conditional_accuracy({"a": np.ones((2, 3))}, {"a": [0.0, 1.0]}), TypeError, "float64"),
        (lambda: metrics.conditional_accuracy({"a": np.ones((2, 3)), "b": np.ones((3, 3))}, {"a": 0, "b": 0}),
         ValueError, "{'a': 2, 'b': 3}"),
        (lambda: metrics.frechet_distance(np.ones((9, 4)), np.ones((4, 4))), ValueError, "4 samples .* take 5 or more"),
        (lambda: metrics.frechet_distance(np.ones((9, 4)), np.ones((9, 3))), ValueError, "has 4 .* second 3"),
        (lambda: metrics.frechet_distance(np.ones((9, 2)), with_nan()), ValueError,
         "the second set: 2 of 5 rows have a NaN or an infinity, the first is row 3"),
        (lambda: metrics.frechet_distance(np.ones(9), np.ones(9)), ValueError, r"must be \(N, F\).*not \(9,\)"),
        (lambda: metrics.frechet_distance(np.ones((2, 2), complex), np.ones((2, 2))), TypeError, "complex128"),
        (lambda: metrics.precision_recall(np.ones((4, 1)), np.ones((3, 1))), ValueError, "3 points have no 3 neigh"),
        (lambda: metrics.precision_recall(np.ones((4, 1)), np.ones((4, 1)), 0), ValueError, "k must be .* not 0"),
        (lambda: metrics.nearest(np.ones((4, 2, 2)), np.ones((4, 2, 3))), ValueError, "has 4 numbers .* second 6"),
        (lambda: metrics.nearest(np.ones((4, 2)), np.ones((4, 2)), rows=0), ValueError, "rows must be .* not 0"),
        (lambda: metrics.nearest(with_nan(), np.ones((4, 2))), ValueError, "2 of 5 rows"),
    ],
)  # fmt: skip
def test_errors_quote_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()
