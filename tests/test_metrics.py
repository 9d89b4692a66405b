"""Metrics against closed forms, and sets of which the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinydiff import metrics
from tinydiff.metrics import accuracy, conditional_accuracy, copied, frechet_distance, nearest, precision_recall

DRAW = np.random.default_rng(0)


def test_accuracy_and_its_standard_error():
    share = accuracy([1, 2, 3, 4], np.array([1, 2, 3, 0]))
    assert share.value == 0.75 and share.n == 4 and share.error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert str(share) == "75.00 +- 21.65 %"
    both = accuracy([[1, 2], [1, 3], [0, 2]], [[1, 2], [1, 2], [1, 2]])
    assert both.value == pytest.approx(1 / 3)
    # The error is that of many repetitions.
    means = [accuracy(DRAW.random(200) < 0.9, np.ones(200, bool)).value for _ in range(2000)]
    assert np.std(means) == pytest.approx(math.sqrt(0.9 * 0.1 / 200), rel=0.1)


def test_each_attribute_and_all_of_them():
    found = {"digit": np.array([1, 2, 3, 4]), "size": np.array([0, 1, 1, 2]), "slant": np.zeros(4)}
    wanted = {"size": np.array([0, 1, 2, 1]), "digit": np.array([1, 0, 3, 4])}
    shares = conditional_accuracy(found, wanted)
    assert list(shares) == ["size", "digit", "all"]
    assert [share.value for share in shares.values()] == [0.5, 0.75, 0.25]
    assert shares["all"].error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert list(conditional_accuracy(found, {"digit": wanted["digit"]})) == ["digit"]  # no "all" of one
    with pytest.raises(KeyError, match="face"):
        conditional_accuracy(found, {"face": wanted["size"]})


def with_moments(n, mean, covariance):
    """n samples with exactly that mean and covariance."""
    x = DRAW.standard_normal((n, len(mean)))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_covariances_that_commute():
    """|m - n|^2 + sum of (sqrt(a) - sqrt(b))^2 of their eigenvalues."""
    a, b, m, n = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0]), np.zeros(3), np.array([1.0, 0.0, -2.0])
    turn = np.linalg.qr(DRAW.standard_normal((3, 3)))[0]
    x, y = (with_moments(50, turn @ mean, turn @ np.diag(v) @ turn.T) for mean, v in ((m, a), (n, b)))
    assert frechet_distance(x, y) == pytest.approx(5 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_frechet_distance_by_the_eigenvalues_of_the_product():
    """C_a C_b is not symmetric, but its eigenvalues are squares of those of its root."""
    x, y = DRAW.standard_normal((200, 5)) @ DRAW.standard_normal((5, 5)), DRAW.standard_normal((90, 5)) + 0.3
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b) - 2 * roots.sum()
    assert frechet_distance(x.astype("float32"), y.astype("float32")) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_few_samples_is_too_large_by_the_formula():
    found = [frechet_distance(*(DRAW.standard_normal((n, 8)) for n in (400, 800))) for _ in range(200)]
    assert np.mean(found) == pytest.approx(8 * 13 / 4 * (1 / 400 + 1 / 800), rel=0.05)


def test_frechet_distance_of_features_that_do_not_vary():
    x = np.zeros((4, 2))
    assert frechet_distance(x, x + [3.0, 4.0]) == pytest.approx(25)
    assert frechet_distance(x[:, :1], x[:, :1] + 2.0) == pytest.approx(4)


def test_precision_and_recall_of_sets_of_which_the_answer_is_known(monkeypatch):
    real = np.concatenate([DRAW.standard_normal((100, 2)), DRAW.standard_normal((100, 2)) + 100])
    half = real[:100] + 1e-3 * DRAW.standard_normal((100, 2))  # one of two clusters: precise, but half is missing
    far = np.concatenate([half[:50], 1e4 + DRAW.standard_normal((50, 2))])
    for block in (2**24, 500):
        monkeypatch.setattr(metrics, "BLOCK", block)
        precision, recall = precision_recall(real, half)
        assert precision.value == 1 and recall.value == pytest.approx(0.5, abs=0.02)
        precision, _ = precision_recall(real, far)
        assert precision.value == 0.5 and precision.n == 100
    assert [s.value for s in precision_recall(real, real)] == [1, 1]


def test_the_nearest_training_picture(monkeypatch):
    training = DRAW.standard_normal((40, 3, 3, 1)).astype("float32")
    samples = training[[7, 3, 39]] + np.array([0.0, 0.1, -0.2], "float32")[:, None, None, None]
    for block in (2**24, 40):
        monkeypatch.setattr(metrics, "BLOCK", block)
        which, distance = nearest(samples, training)
        assert which.tolist() == [7, 3, 39]
        assert distance == pytest.approx([0, 0.1, 0.2], abs=1e-5)


def test_copies_are_nearer_to_the_training_pictures_than_test_pictures_are():
    training, test, new = DRAW.standard_normal((3, 300, 5, 4))
    copies = training[:90] + 1e-3 * DRAW.standard_normal((90, 5, 4))
    (_, of_test), (_, of_new) = nearest(test, training), nearest(new, training)
    assert copied(nearest(copies, training)[1], of_test).value == 1
    some = nearest(np.concatenate([copies[:30], new[:60] + 9]), training)[1]
    assert copied(some, of_test) == (pytest.approx(1 / 3), pytest.approx(math.sqrt(2 / 9 / 90)), 90)
    assert copied(of_new, of_test, level=0.1).value == pytest.approx(0.1, abs=0.06)  # 3 standard errors of both
    assert copied(of_test, of_test).value == 0.01


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: accuracy([1, 2], [1]), r"predicted \(2,\) and wanted \(1,\)"),
        (lambda: accuracy([], []), r"predicted \(0,\)"),
        (lambda: conditional_accuracy({"all": [1]}, {"all": [1]}), 'no attribute can be called "all"'),
        (lambda: frechet_distance(np.ones((1, 2)), np.ones((3, 2))), r"2 or more rows .* not \[\(1, 2\), \(3, 2\)\]"),
        (lambda: frechet_distance(np.ones((4, 2)), np.ones((3, 3))), r"of one width in each set, not"),
        (lambda: frechet_distance(np.ones((4, 2)), [[1, 2], [np.nan, 1], [np.inf, 1]]),
         "2 rows of the second set are not finite, the first of them row 1"),
        (lambda: precision_recall(np.ones((4, 2)), np.ones((3, 2))), "k must be an integer from 1 to 2, not 3"),
        (lambda: copied([1.0], [1.0], level=1), r"level must be a number in \(0, 1\), not 1"),
        (lambda: nearest(np.ones((4, 2, 2)), np.ones((3, 2, 3))), r"samples \(4, 2, 2\) and training pictures"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
