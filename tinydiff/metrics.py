"""How good are the samples of a model? Every figure with what it has to be compared with.

conditional_accuracy    how often a judge finds in a picture what was asked for, each attribute with its standard error
frechet_distance        between the features of two sets of pictures, as if both were normal
precision_recall        how many samples look like real pictures, and how many real pictures look like a sample
nearest, copied         the training picture that is nearest to each sample: is it a copy?

All work on host arrays, in float64, and in blocks of rows where every one meets every other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .arguments import integer, number
from .backend import to_host
from .operators import array_of

BLOCK = 2**24  # distances at a time


class Share(NamedTuple):
    """A share p of n trials, and its standard error, sqrt(p (1 - p) / n).

    At p = 0 and p = 1 that error is 0 and says nothing: the true share may well be 3 / n away (with 95 % certainty it
    is no further).
    """

    value: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} +- {100 * self.error:.2f} %"


def _share(hits: Any) -> Share:
    """The share of True among (N,) booleans."""
    p, n = float(np.mean(hits)), len(hits)
    return Share(p, math.sqrt(p * (1 - p) / n), n)


def accuracy(predicted: Any, wanted: Any) -> Share:
    """The share of predictions (N,) that are what was wanted, (N,); of (N, K), those that are right in all K columns.

    Errors: ValueError for other shapes, or none.
    """
    predicted, wanted = (np.asarray(to_host(array_of(a))) for a in (predicted, wanted))
    if predicted.shape != wanted.shape or predicted.ndim not in (1, 2) or not len(predicted):
        raise ValueError(f"accuracy: predicted {predicted.shape} and wanted {wanted.shape} must be one (N,) or (N, K)")
    return _share((predicted == wanted).reshape(len(wanted), -1).all(axis=1))


def conditional_accuracy(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Share]:
    """For each attribute that was wanted, how often it was found; of several also "all", how often they were all found.

    found: what a judge saw in N pictures, {attribute: (N,)}; wanted: what was asked for. A judge errs too, so print its
    accuracy for real pictures beside that for samples. Errors: those of accuracy; KeyError for an attribute that the
    judge does not know; ValueError for one called "all".
    """
    if "all" in wanted:
        raise ValueError('conditional_accuracy: no attribute can be called "all", the name of all attributes together')
    pairs = {name: (found[name], values) for name, values in wanted.items()}
    shares = {name: accuracy(*pair) for name, pair in pairs.items()}
    if len(pairs) > 1:
        shares["all"] = accuracy(
            *(np.stack([to_host(array_of(a)) for a in each], axis=1) for each in zip(*pairs.values()))
        )
    return shares


def frechet_distance(a: Any, b: Any) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D) and (M, D): the squared Wasserstein
    distance of two normal distributions with those means and covariances.

    C_a C_b has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric, and the trace of the root is the sum of
    their roots. Few samples make the distance too large: of two samples of one standard normal it is about
    D (D + 5) / 4 (1/N + 1/M), of which D (1/N + 1/M) comes from the means. So compare only equal numbers of samples,
    beside the distance of real pictures to other real ones.
    Source: Dowson and Landau 1982; for features of pictures Heusel et al. 2017. Errors: ValueError for features of
    different widths, that are not finite, or of fewer than two pictures.
    """
    a, b = _features("frechet_distance", a, b)
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(axis=0), np.cov(x, rowvar=False).reshape(2 * [x.shape[1]])) for x in (a, b)
    )
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T  # C_a^(1/2)
    product = root @ cov_b @ root
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0))
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum()
    return max(float(distance), 0.0)


def precision_recall(real: Any, samples: Any, k: int = 3) -> tuple[Share, Share]:
    """Precision: the share of samples that lie among the real features; recall: that of real ones among the samples'.

    A point lies among a set if it is within the distance of one of its members to the k-th nearest other member.
    Source: Kynkaanniemi et al. 2019, "Improved precision and recall metric for assessing generative models". Errors: as
    frechet_distance; ValueError if a set has not more than k members.
    """
    real, samples = _features("precision_recall", real, samples)
    integer("precision_recall: k", k, 1, min(len(real), len(samples)) - 1)
    return _share_among(samples, real, k), _share_among(real, samples, k)


def _share_among(points: np.ndarray, members: np.ndarray, k: int) -> Share:
    # The k-th nearest other member: each is itself the nearest, at distance 0.
    radius = np.concatenate([np.partition(d, k, axis=1)[:, k] for _, d in _distances(members, members)])  # (members,)
    return _share(np.concatenate([(d <= radius).any(axis=1) for _, d in _distances(points, members)]))


def nearest(samples: Any, training: Any) -> tuple[np.ndarray, np.ndarray]:
    """(which, how far): for each sample (N, ...) the row of the training pictures that is nearest to it, and their
    distance, the root of the mean squared difference of a number of the picture.

    What counts as a copy? See `copied`. Errors: ValueError for pictures of different shapes, or that are not finite.
    """
    samples, training = (np.asarray(to_host(array_of(a))) for a in (samples, training))
    if samples.shape[1:] != training.shape[1:]:
        raise ValueError(f"nearest: samples {samples.shape} and training pictures {training.shape} differ in shape")
    a, b = _features("nearest", *(x.reshape(len(x), -1) for x in (samples, training)), least=1)
    found = [(d.argmin(axis=1), d.min(axis=1)) for _, d in _distances(a, b)]
    return tuple(np.concatenate(part) for part in zip(*((i, d / math.sqrt(a.shape[1])) for i, d in found)))  # type: ignore[return-value]


def copied(samples: Any, test: Any, level: float = 0.01) -> Share:
    """The share of samples that are nearer to a training picture than all but `level` of the test pictures are.

    samples, test: distances, (N,) and (M,), that `nearest` gave for samples and for test pictures, which nobody has
    copied. So it is about `level` if samples are as new as test pictures, and 1 if all are copies.
    Errors: ValueError for a level outside (0, 1), and for distances that are none or not finite.
    """
    level = number("copied: level", level, "(0, 1)")
    samples, test = (np.asarray(to_host(array_of(a)), np.float64) for a in (samples, test))
    if not (len(samples) and len(test) and np.isfinite(samples).all() and np.isfinite(test).all()):
        raise ValueError(f"copied: {len(samples)} and {len(test)} distances must be finite, and one or more")
    return _share(samples < np.quantile(test, level))


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, the distances of some rows of a to all of b, (rows, M)), from |a|^2 + |b|^2 - 2 a b."""
    squares, step = np.einsum("md,md->m", b, b), max(1, BLOCK // len(b))
    for first in range(0, len(a), step):
        rows = a[first : first + step]
        distances = np.einsum("nd,nd->n", rows, rows)[:, None] + squares - 2 * (rows @ b.T)
        yield first, np.sqrt(np.maximum(distances, 0))


def _features(what: str, *arrays: Any, least: int = 2) -> list[np.ndarray]:
    """As float64, (N, D) each."""
    found = [np.asarray(to_host(array_of(a)), np.float64) for a in arrays]
    shapes = [x.shape for x in found]
    if any(x.ndim != 2 or len(x) < least for x in found) or len({x.shape[1] for x in found}) > 1:
        raise ValueError(f"{what}: there must be {least} or more rows (N, D) of one width in each set, not {shapes}")
    for x, name in zip(found, ("first", "second")):
        if not (finite := np.isfinite(x).all(axis=1)).all():
            bad = np.flatnonzero(~finite)
            raise ValueError(
                f"{what}: {len(bad)} rows of the {name} set are not finite, the first of them row {bad[0]}"
            )
    return found
