"""How good are samples? Measures that compare them with what was asked for, and with real images.

    judge = glyphs_classifier()                                  # models/classifier_training.py
    seen = judge.predict(samples)                                # samples in [-1, 1]
    conditional_accuracy(seen.probabilities, wanted)             # do they show what was asked for?
    frechet_distance(seen.features, judge.predict(real).features)     # as a set, are they like real images?
    precision_recall(judge.predict(real).features, seen.features)     # is each one real; are all kinds there?
    nearest(samples, train), nearest(test, train)                # are they copies of training images?

Everything here is computed on the host, in float64. No figure means anything by itself: beside a Frechet distance print
the one of real images and of noise (`frechet_scale`), beside the distance to the nearest training image that of images
which cannot be copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .arguments import integer
from .backend import HostArray, to_host
from .operators import array_of
from .rng import Rng, as_rng

# ---------------------------------------------------------------- do they show what was asked for?


class Share(NamedTuple):
    """A share p of n, and its standard error, sqrt(p (1 - p) / n).

    At p = 0 and 1 that error is 0 and says nothing: with 95 % certainty the true share is then within 3 / n of p.
    """

    value: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} +- {100 * self.standard_error:.2f} %"


def share(what: Any) -> Share:
    """The share of True in N booleans. Errors: ValueError for none; TypeError for anything but booleans."""
    values = to_host(array_of(what))
    if values.dtype != bool:
        raise TypeError(f"share takes booleans, not {values.dtype} of shape {values.shape}")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"share takes (N,) booleans, and not none, not {values.shape}")
    p = float(values.mean())
    return Share(p, math.sqrt(p * (1 - p) / len(values)), len(values))


def conditional_accuracy(probabilities: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Share]:
    """For each attribute in `wanted`, the share of samples on which the classifier sees the wanted class; and as "all"
    the share on which it sees all of them.

    probabilities: (N, classes) of each attribute, or logits; others than those in `wanted` are left out. wanted: N
    integers for each, or one for all. The classifier errs too: print its figures on real images beside these.
    Errors: ValueError for attributes that the classifier does not know, an attribute that is called "all", shapes that
    do not fit, NaN, and labels out of range; TypeError for labels that are not integers.
    """
    if not wanted or "all" in wanted or any(name not in probabilities for name in wanted):
        raise ValueError(
            f"conditional_accuracy: the classifier knows {list(probabilities)}, and wanted must be some of them, none "
            f"called 'all', not {list(wanted)}"
        )
    right = {}
    for name, labels in wanted.items():
        p = _rows(f"conditional_accuracy: the probabilities of {name!r}", probabilities[name])
        values = to_host(array_of(labels))
        if values.dtype.kind not in "iu":
            raise TypeError(f"conditional_accuracy: the wanted {name!r} must be integers, not {values.dtype}")
        if values.shape not in ((), (len(p),)):
            raise ValueError(f"conditional_accuracy: {len(p)} samples, but the wanted {name!r} {values.shape}")
        if values.min() < 0 or values.max() >= p.shape[1]:
            raise ValueError(
                f"conditional_accuracy: the wanted {name!r} must be 0 to {p.shape[1] - 1}, but runs from "
                f"{values.min()} to {values.max()}"
            )
        right[name] = p.argmax(axis=1) == values  # (N,)
    lengths = {name: len(r) for name, r in right.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"conditional_accuracy: the numbers of samples differ: {lengths}")
    return {name: share(r) for name, r in {**right, "all": np.all(list(right.values()), axis=0)}.items()}


# ---------------------------------------------------------------- as a set, are they like real images?


def frechet_distance(a: Any, b: Any) -> float:
    """The squared Frechet distance of two sets of features, (N, F) and (M, F), as if each were a Gaussian:

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))

    It is 0 for equal sets, and it depends on the features: compare only figures of one classifier.
    With few samples it is too large, because a covariance that is estimated differs from the true one. For features of
    covariance I, N samples and as many real ones of the same distribution have the expectation F (F + 5) / (2 N), to
    first order in 1 / N; whatever the covariance is, the excess falls as 1 / N. So compare only figures of the same N
    (Chong and Forsyth 2020).
    Errors: ValueError for sets with another number of features, for NaN, and for no more samples than features, of
    which the covariance is singular.
    Source: Heusel et al. 2017, equation 6; Dowson and Landau 1982.
    """
    a, b = (x.astype(float) for x in _same_features("frechet_distance", a, b))
    for x in (a, b):
        if len(x) <= x.shape[1]:
            raise ValueError(
                f"frechet_distance: {len(x)} samples have no full covariance of {x.shape[1]} features: take "
                f"{x.shape[1] + 1} or more, better ten times as many"
            )
    return gaussian_frechet_distance(a.mean(axis=0), _covariance(a), b.mean(axis=0), _covariance(b))


def gaussian_frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """The squared Frechet distance of two Gaussians: means (F,), covariances (F, F), which are symmetric.

    C1 C2 is not symmetric, but S C2 S with S = C1^(1/2) is, and has the same eigenvalues: C1 C2 = S (S C2). So the
    trace of (C1 C2)^(1/2) is the sum of their square roots.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(to_host(array_of(x)), float) for x in (mean1, cov1, mean2, cov2))
    values, vectors = np.linalg.eigh(cov1)  # (F,), (F, F)
    s = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # rounding can make a zero negative
    product = s @ cov2 @ s
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0))  # (F,)
    distance = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots.sum()
    return max(float(distance), 0.0)  # a little below 0 by rounding, if the two are equal


class FrechetScale(NamedTuple):
    """Between which figures a Frechet distance lies: that of other real images, and that of noise."""

    floor: float
    ceiling: float


def frechet_scale(features: Callable[[Any], Any], real: Any, other: Any, rng: Rng | int) -> FrechetScale:
    """The Frechet distance of `other` real images from the `real` ones, and of as many images of noise.

    features: of images, such as lambda x: classifier.predict(x).features. real, other: disjoint sets of images
    (N, H, W, C) in [-1, 1]; take as many others as there are samples, because of the bias with few. The noise is
    uniform in [-1, 1], each pixel by itself.
    Errors: those of frechet_distance.
    """
    other = to_host(array_of(other))
    noise = 2 * to_host(as_rng(rng).uniform(other.shape)) - 1
    of_real = features(real)
    return FrechetScale(frechet_distance(features(other), of_real), frechet_distance(features(noise), of_real))


def _covariance(x: HostArray) -> HostArray:
    """(N, F) -> (F, F), with N - 1 in the denominator."""
    c = x - x.mean(axis=0)
    return c.T @ c / (len(x) - 1)


# ---------------------------------------------------------------- is each one real; are all kinds there?


class PrecisionRecall(NamedTuple):
    """precision: the share of samples that look real; recall: the share of real images that could be sampled."""

    precision: Share
    recall: Share


def precision_recall(real: Any, fake: Any, k: int = 3, *, rows: int = 1024) -> PrecisionRecall:
    """Around each point of a set lies a ball that reaches to its k-th nearest neighbour in the set; their union is an
    estimate of where the set's distribution is. Precision is the share of `fake` inside the union of `real`, recall
    the share of `real` inside the union of `fake`.

    real, fake: features (N, F) and (M, F). Both figures depend on N and M (balls of few points are large): compare only
    figures of the same numbers. rows: distances are computed for so many points at a time, so that memory stays small.
    Errors: ValueError for k that is not an integer of 1 or more, no more than k points, other numbers of features, NaN.
    Source: Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    k, rows = integer("precision_recall: k", k), integer("precision_recall: rows", rows)
    real, fake = _same_features("precision_recall", real, fake)
    for x in (real, fake):
        if len(x) <= k:
            raise ValueError(f"precision_recall: {len(x)} points have no {k} neighbours each: take {k + 1} or more")
    middle = real.mean(axis=0, dtype=float)  # distances of points far from 0 would lose digits
    real, fake = real - middle, fake - middle
    return PrecisionRecall(share(_inside(fake, real, k, rows)), share(_inside(real, fake, k, rows)))


def _inside(points: HostArray, of: HostArray, k: int, rows: int) -> HostArray:
    """Is each of the points (N, F) in one of the balls of the set (M, F)? (N,)"""
    radii = np.empty(len(of))  # squared
    for part in _blocks(len(of), rows):
        d = _squared_distances(of[part], of)  # (rows, M)
        d[np.arange(len(d)), np.arange(len(of))[part]] = np.inf  # no point is its own neighbour
        radii[part] = np.partition(d, k - 1, axis=1)[:, k - 1]
    # The same distance computed in two ways differs in its last digits; on the edge is inside.
    radii += 1e-12 * (of**2).sum(axis=1)
    return np.concatenate(
        [(_squared_distances(points[part], of) <= radii).any(axis=1) for part in _blocks(len(points), rows)]
    )


# ---------------------------------------------------------------- are they copies?


class Nearest(NamedTuple):
    """For each of N images, which of the others is nearest, int64 (N,), and how far it is, float64 (N,)."""

    which: HostArray
    distance: HostArray


def nearest(images: Any, train: Any, *, rows: int = 1024) -> Nearest:
    """The nearest training image of each image, and its distance, sqrt(sum of squared differences).

    images, train: (N, ...) and (M, ...) in the same range; pixels, or features. Of several that are equally near it is
    the first. The scale for a distance is that of test images, nearest(test, train): they are no copies. Samples that
    are often nearer than those are. (`copied` puts it into one number.)
    rows: as many of either at a time. Errors: ValueError for none, for other shapes, and for NaN.
    """
    rows = integer("nearest: rows", rows)
    x, y = _same_features("nearest", _flat(images), _flat(train))
    best, at = np.full(len(x), np.inf), np.zeros(len(x), np.int64)
    for column in _blocks(len(y), rows):
        for row in _blocks(len(x), rows):
            # Pixels become float64 here, a block at a time: of all training images they would fill the memory.
            d = _squared_distances(x[row].astype(float), y[column].astype(float))  # (rows, rows)
            found = d.argmin(axis=1)
            smallest = d[np.arange(len(d)), found]
            nearer = smallest < best[row]
            best[row] = np.where(nearer, smallest, best[row])
            at[row] = np.where(nearer, found + column.start, at[row])
    for row in _blocks(len(x), rows):  # once more, as a sum of squares, which is exactly 0 for a copy
        best[row] = np.sqrt(((x[row].astype(float) - y[at[row]]) ** 2).sum(axis=1))
    return Nearest(at, best)


def copied(samples: Nearest, test: Nearest, level: float = 0.01) -> Share:
    """The share of samples that are nearer to a training image than all but `level` of the test images are.

    It is about `level` if samples are as new as test images, and 1 if all are copies.
    """
    return share(samples.distance < np.quantile(test.distance, level))


# ---------------------------------------------------------------- sets of points


def _blocks(n: int, rows: int) -> list[slice]:
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _squared_distances(x: HostArray, y: HostArray) -> HostArray:
    """|x|^2 - 2 x . y + |y|^2: (N, F), (M, F) -> (N, M). A product of matrices is far quicker than differences."""
    d = (x**2).sum(axis=1)[:, None] - 2 * (x @ y.T) + (y**2).sum(axis=1)
    return np.maximum(d, 0)


def _flat(x: Any) -> HostArray:
    x = to_host(array_of(x))
    return x.reshape(len(x), math.prod(x.shape[1:])) if x.ndim > 1 else x  # (N, ...) -> (N, F)


def _rows(what: str, x: Any) -> HostArray:
    """(N, F) on the host. Errors: TypeError for what is no array of real numbers; ValueError for another rank, none,
    NaN and infinity."""
    x = to_host(array_of(x))
    if x.dtype.kind not in "fiu":
        raise TypeError(f"{what} must be real numbers, not {x.dtype}")
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{what} must be (N, F), and not none, not {x.shape}")
    if (bad := np.flatnonzero(~np.isfinite(x).all(axis=1))).size:
        raise ValueError(f"{what}: {bad.size} of {len(x)} rows have a NaN or an infinity, the first is row {bad[0]}")
    return x


def _same_features(what: str, a: Any, b: Any) -> tuple[HostArray, HostArray]:
    a, b = _rows(f"{what}: the first set", a), _rows(f"{what}: the second set", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{what}: the first set has {a.shape[1]} numbers per row, the second {b.shape[1]}")
    return a, b
