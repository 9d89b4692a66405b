"""Guidance with negative conditions, and in an interval of noise levels, against the formulas; and the labels that are
left out in training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from tinydiff import Rng, Tensor, backend, ops
from tinydiff.backend import to_device
from tinydiff.diffusion import VPSDE, Counted, Denoiser, Guided, KarrasSDE, ScoreModel, drop_labels, inpaint, sample
from tinydiff.diffusion.edit import denoise
from tinydiff.diffusion.process import per_sample
from tinydiff.operators import array_of

pytestmark = pytest.mark.usefixtures("each_backend")
MEANS, VARIANCE = np.array([-2.0, 0.5, 3.0]), 0.09  # of three classes, equally likely


def host(x: Any) -> np.ndarray:
    return backend.to_host(x._data if isinstance(x, Tensor) else x)


def score_of_class(sde: Any) -> Any:
    """The exact score of the classes k (N,), or, without any, of their mixture. x (N, D), each number alone."""

    def score(x: Any, t: Any, k: Any = None) -> Any:
        x = array_of(x)
        t = array_of(t)
        m, s = (per_sample(f(t) + 0 * t, x)[..., None] for f in (sde.marginal_scale, sde.marginal_std))
        mu = to_device(MEANS).astype(x.dtype)
        mu = mu if k is None else mu[to_device(k)][:, None, None]  # (3,) or (N, 1, 1)
        variance = m * m * VARIANCE + s * s  # (N, 1, 1)
        shift = m * mu - x[..., None]  # (N, D, classes)
        return (ops.softmax(-shift * shift / (2 * variance), axis=2) * shift / variance).sum(axis=2)

    return score


def denoiser_of_class() -> Any:
    """The same as a denoiser, by Tweedie's formula."""

    class Exact:
        is_denoiser = True

        def __call__(self, x: Any, sigma: Any, k: Any = None) -> Any:
            x = array_of(x)
            return x + per_sample(sigma, x) ** 2 * score_of_class(KarrasSDE())(x, sigma, k)

    return Exact()


def formula(x: np.ndarray, m: np.ndarray, s: np.ndarray, k: np.ndarray | None) -> np.ndarray:
    """The exact score in plain NumPy, x, m and s (N, 1)."""
    v = m * m * VARIANCE + s * s
    if k is not None:
        return (m * MEANS[k][:, None] - x) / v
    densities = [np.exp(-((x - m * mu) ** 2) / (2 * v)) for mu in MEANS]
    return sum(p * (m * mu - x) / v for p, mu in zip(densities, MEANS)) / sum(densities)


X = np.array([[0.3, -1.0], [2.0, 0.1], [-0.7, 1.5], [0.2, 0.4]])
TIMES = np.array([0.1, 0.4, 0.7, 0.95])
WANTED, UNWANTED = np.array([0, 1, 2, 2]), np.array([1, 2, 0, 1])


@pytest.mark.parametrize("unwanted", [None, UNWANTED], ids=["null", "negative"])
@pytest.mark.parametrize("interval", [None, (0.0, np.inf), (0.5, 3.0)])
def test_the_score_is_that_of_the_formula(unwanted: Any, interval: Any) -> None:
    """Under VPSDE, whose noise level is s / m."""
    sde = VPSDE()
    m, s = (np.array([[f(t)] for t in TIMES]) for f in (sde.marginal_scale, sde.marginal_std))
    negative = None if unwanted is None else {"k": to_device(unwanted)}
    model = Guided(score_of_class(sde), 1.5, negative=negative, interval=interval, process=sde)
    found = host(model(Tensor(to_device(X)), Tensor(to_device(TIMES)), k=to_device(WANTED)))
    w = np.full((4, 1), 1.5)
    if interval is not None:
        w = np.where((s / m > interval[0]) & (s / m <= interval[1]), w, 0)
        assert interval[0] == 0 or 0 < (w > 0).sum() < 4
    right = (1 + w) * formula(X, m, s, WANTED) - w * formula(X, m, s, unwanted)
    np.testing.assert_allclose(found, right, rtol=1e-9)


def test_a_denoiser_is_guided_by_the_noise_level_itself() -> None:
    sigma = np.array([0.3, 0.5, 2.0, 2.5])
    model = Guided(denoiser_of_class(), 0.7, negative={"k": UNWANTED}, interval=(0.5, 2.0), k=WANTED)
    found = host(model(to_device(X), to_device(sigma)))
    w, s = np.array([[0.0], [0.0], [0.7], [0.0]]), sigma[:, None]  # the lower end is outside, the upper one inside
    right = X + s * s * ((1 + w) * formula(X, 1.0, s, WANTED) - w * formula(X, 1.0, s, UNWANTED))
    np.testing.assert_allclose(found, right, rtol=1e-9)
    for number, weight in ((1.0, 0.7), (3.0, 0.0)):
        s = np.full((4, 1), number)
        right = X + s * s * ((1 + weight) * formula(X, 1.0, s, WANTED) - weight * formula(X, 1.0, s, UNWANTED))
        found = model(to_device(X), Tensor(to_device(np.full(4, number))))
        np.testing.assert_allclose(host(found), right, rtol=1e-9)


def test_the_interval_is_decided_without_a_wait() -> None:
    model = Guided(denoiser_of_class(), 0.7, interval=(0.5, 2.0))
    x, sigma = Tensor(to_device(X)), Tensor(to_device(np.array([0.3, 0.5, 2.0, 2.5])))
    with backend.no_sync():
        model(x, sigma)


def test_outside_the_interval_numpy_saves_the_second_evaluation(each_backend: str) -> None:
    inner = Counted(denoiser_of_class())
    model = Guided(inner, 1.0, interval=(0.5, 2.0))
    for sigma in ([0.3] * 4, [1.0] * 4, [0.3, 1.0, 3.0, 3.0]):
        model(to_device(X), to_device(np.array(sigma)))
    assert inner.nfe == (5 if each_backend == "numpy" else 6)


def test_a_score_model_brings_its_process() -> None:
    sde = VPSDE()
    model = ScoreModel(lambda x, t, k=None: x * (1.0 if k is None else 2.0), sde, "noise")
    found, plain = (Guided(model, 1.0, interval=(0.5, high), k=0)(to_device(X), 0.4) for high in (np.inf, 0.6))
    assert 0.6 < sde.marginal_std(0.4) / sde.marginal_scale(0.4)
    s = sde.marginal_std(0.4)
    np.testing.assert_allclose(host(plain), -2 * X / s, rtol=1e-9)
    np.testing.assert_allclose(host(found), -3 * X / s, rtol=1e-9)


def guided(**options: Any) -> Guided:
    return Guided(denoiser_of_class(), 1.0, negative={"k": np.array([0, 1, 2, 0, 1])}, interval=(0.1, 20), **options)


def test_all_conditions_are_split_into_microbatches() -> None:
    """Those of Guided as well as those of `sample`, in Counted too."""
    sde, k, shape, options = KarrasSDE(), np.array([2, 2, 1, 1, 0]), (5, 3), {"steps": 6, "eps": 0.01}
    whole = host(sample(guided(), shape, sde, 0, k=k, **options))
    counted = Counted(guided(k=k))
    bound = host(sample(counted, shape, sde, 0, microbatch=2, threads=1, **options))
    np.testing.assert_allclose(bound, whole, rtol=1e-5, atol=1e-5)
    assert counted.nfe == 3 * 13, "Heun's two evaluations a step, and the last, of each of three parts"
    np.testing.assert_allclose(host(sample(guided(), shape, sde, 0, k=k, microbatch=2, **options)), whole, atol=1e-5)
    others = [
        host(sample(m, shape, sde, 0, k=k, **options)) for m in (denoiser_of_class(), Guided(denoiser_of_class(), 1.0))
    ]
    assert all(abs(whole - other).max() > 1e-2 for other in others)


def test_edits_are_guided_too() -> None:
    sde, known, k = KarrasSDE(), Rng(1).normal((5, 3)), np.array([2, 2, 1, 1, 0])
    mask = to_device(np.array([[True, False, False]]))
    found = [
        host(inpaint(m, known, mask, sde, 0, steps=4, resample=2, k=k, **parts))
        for m, parts in ((guided(), {}), (Guided(denoiser_of_class(), 0.0), {}))
    ]
    assert np.isfinite(found[0]).all() and abs(found[0] - found[1]).max() > 1e-3
    clean = host(denoise(guided(), known, sde, sigma=0.5, k=k))
    x, s = host(known).astype("float64"), np.full((5, 1), 0.5)
    right = x + s * s * (2 * formula(x, 1.0, s, k) - formula(x, 1.0, s, np.array([0, 1, 2, 0, 1])))
    np.testing.assert_allclose(clean, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        ({"interval": 3}, r"interval must be \(low, high\), two noise levels, not 3"),
        ({"interval": (1.0, 2.0, 3.0)}, "two noise levels"),
        ({"interval": (-1.0, 2.0)}, "lower end of the interval must be .* not -1.0"),
        ({"interval": (2.0, 2.0)}, "upper end of the interval must be .* not 2.0"),
        ({"interval": (0.0, float("nan"))}, "upper end .* not nan"),
        ({"interval": (1.0, 2.0)}, r"interval=\(1.0, 2.0\) of noise levels needs the process of the score"),
    ],
)
def test_bad_intervals_are_quoted(options: Any, quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        Guided(lambda x, t: x, 1.0, **options)


def test_a_denoiser_needs_no_process() -> None:
    assert Guided(Denoiser(lambda x, noise: x, 0.5), 1.0, interval=(0.1, 2)).interval == (0.1, 2.0)


# ---------------------------------------------------------------- labels that are left out in training


def test_labels_are_left_out_all_at_once_or_each_by_a_coin():
    n = 40_000
    labels = {"digit": np.arange(n) % 10, "face": np.arange(n) % 2, "slant": np.zeros(n, "int64")}
    found = {name: host(a) for name, a in drop_labels(labels, 0.1, Rng(0)).items()}
    out = np.stack([found[name] == -1 for name in labels])  # (3, n)
    for gone, name in zip(out, labels):
        np.testing.assert_array_equal(found[name][~gone], labels[name][~gone])
    # 0.1 for all at once, and of another 0.1 an eighth for each of the eight sets.
    expected = dict.fromkeys(itertools.product((False, True), repeat=3), 0.1 / 8)
    expected[False, False, False] += 0.8
    expected[True, True, True] += 0.1
    for which, share in expected.items():
        found_share = (out == np.array(which)[:, None]).all(axis=0).mean()
        assert abs(found_share - share) < 5 * math.sqrt(share / n), which


def test_a_single_label_is_left_out_as_often_as_it_is_said():
    (found,) = drop_labels({"digit": np.ones(10_000, "int64")}, 0.2, Rng(1)).values()
    assert abs((host(found) == -1).mean() - 0.2) < 0.02


def test_what_is_left_out_depends_on_the_number_of_the_sample_alone():
    labels = {"digit": np.arange(50), "face": np.arange(50)}
    whole = drop_labels(labels, 0.3, Rng(2))
    part = drop_labels({name: a[20:30] for name, a in labels.items()}, 0.3, Rng(2), sample_offset=20)
    for name in labels:
        np.testing.assert_array_equal(host(part[name]), host(whole[name])[20:30])


def test_what_cannot_be_left_out():
    assert drop_labels({}, 0.1, Rng(0)) == {}
    kept = drop_labels({"digit": np.arange(5), "face": np.arange(5)}, 0, Rng(0))
    assert all((host(a) == np.arange(5)).all() for a in kept.values())
    with pytest.raises(ValueError, match=r"drop_labels: p must be a number in \[0, 0.5\], not 0.6"):
        drop_labels({"digit": np.arange(5)}, 0.6, Rng(0))
    with pytest.raises(ValueError, match=r"must have one shape \(N,\), not \{'digit': \(5,\), 'face': \(4,\)\}"):
        drop_labels({"digit": np.arange(5), "face": np.arange(4)}, 0.1, Rng(0))
    for shape in ((5, 1), ()):
        with pytest.raises(ValueError, match=r"must have one shape \(N,\), not"):
            drop_labels({"digit": np.zeros(shape, "int64")}, 0.1, Rng(0))
    with pytest.raises(TypeError, match=r"label 'digit' must be integers, not float64 of shape \(5,\)"):
        drop_labels({"digit": np.zeros(5)}, 0.1, Rng(0))


def test_labels_of_bytes_have_room_for_the_null_class():
    (found,) = drop_labels({"digit": np.full(1000, 200, "uint8")}, 0.5, Rng(0)).values()
    assert set(host(found).tolist()) == {-1, 200}
