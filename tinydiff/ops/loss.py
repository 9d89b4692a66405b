"""Losses, and dropout."""

from __future__ import annotations

import math
from typing import Any

from ..backend import operand, xp
from ..engine import Tensor, composite
from ..rng import Rng
from .activation import softplus
from .elementwise import floating, square, where
from .index import take_along_axis
from .reduce import mean, sum
from .shape import expand_dims, squeeze
from .softmax import log_softmax


def _reduced(losses: Any, reduction: str, what: str) -> Any:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{what}: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    return mean(losses) if reduction == "mean" else sum(losses) if reduction == "sum" else losses


def _same_shape(what: str, x: Any, y: Any) -> None:
    shapes = [getattr(a, "shape", None) for a in (x, y)]
    if shapes[0] != shapes[1] or None in shapes:
        described = [f"has shape {s}" if s is not None else f"is {a!r}" for a, s in zip((x, y), shapes)]
        raise ValueError(f"{what}: the prediction {described[0]}, but the target {described[1]}")


@composite
def mse_loss(prediction: Any, target: Any, *, reduction: str = "mean") -> Any:
    """(prediction - target)^2, averaged over all elements."""
    _same_shape("mse_loss", prediction, target)
    return _reduced(square(floating(prediction) - floating(target)), reduction, "mse_loss")


@composite
def cross_entropy(logits: Any, labels: Any, *, reduction: str = "mean") -> Any:
    """-log softmax(logits)[label], averaged: logits (..., classes), labels (...) of integers.

    A label below 0 makes the loss NaN. A label that is too large is an IndexError on NumPy, and makes it NaN on a GPU.
    Errors: TypeError for labels that are not integers, ValueError for shapes that do not fit.
    """
    labels = labels if isinstance(labels, Tensor) else operand(labels)
    if not hasattr(labels, "dtype"):
        raise TypeError(f"cross_entropy: the labels must be an array of integers, not {labels!r}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: the labels must be integers, not {labels.dtype} of shape {labels.shape}")
    if logits.ndim < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"cross_entropy: logits (..., classes) {logits.shape} need labels {logits.shape[:-1]}, not {labels.shape}"
        )
    picked = squeeze(take_along_axis(log_softmax(logits, axis=-1), expand_dims(labels, axis=-1), axis=-1), axis=-1)
    is_class = (labels >= 0) & (labels < logits.shape[-1])  # indexing would count from the end, or wrap
    return _reduced(-where(is_class, picked, math.nan), reduction, "cross_entropy")


@composite
def binary_cross_entropy_with_logits(logits: Any, target: Any, *, reduction: str = "mean") -> Any:
    """-t log p - (1 - t) log(1 - p) with p = sigmoid(logits), written as softplus(x) - t x, which never overflows."""
    _same_shape("binary_cross_entropy_with_logits", logits, target)
    logits, target = floating(logits), floating(target)
    return _reduced(softplus(logits) - target * logits, reduction, "binary_cross_entropy_with_logits")


@composite
def dropout(x: Any, *, p: float, rng: Rng) -> Any:
    """x with each element set to 0 with probability p, and the others divided by 1 - p, which keeps the mean.

    Source: Srivastava et al. 2014. Errors: ValueError for p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), not {p!r}")
    if not isinstance(rng, Rng):
        raise TypeError(f"dropout: rng must be a tinydiff.Rng, which remembers what it drew, not {rng!r}")
    if p == 0:
        return x
    keep = rng.uniform(x.shape) >= p
    return x * xp.where(keep, 1 / (1 - p), 0.0).astype(x.dtype)
