"""The classifier of models/classifier.py beside a twin in plain PyTorch: logits, loss, what each resolution makes of an
image, and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinydiff import backend, nn, tensor
from tinydiff.models.classifier import Classifier, judge_loss

torch = pytest.importorskip("torch")
import twins  # noqa: E402  after the check that PyTorch is here
from compare import TOLERANCE, channels_first, close, compare_gradients, move  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("each_backend")]


def pair(dtype: str) -> tuple[Any, Any, np.ndarray]:
    """A judge of images of odd sides, its twin, and images."""
    heads, channels = {"digit": 5, "colour": 3}, (8, 16)
    ours = Classifier((9, 6), heads, 3, channels, width=10, groups=4, rng=0).astype(dtype)
    theirs = twins.Classifier(heads, 3, channels, 3 * 2, 10, 4).to(getattr(torch, dtype))
    move(theirs, ours)
    return ours, theirs, np.random.default_rng(1).uniform(-1, 1, (4, 9, 6, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_of_the_judge(dtype: str) -> None:
    (ours, theirs, x), tolerance = pair(dtype), TOLERANCE[dtype]
    labels = {"digit": np.array([0, 4, 2, 2]), "colour": np.array([2, 0, 1, 1])}
    a, b = tensor(x, requires_grad=True), torch.tensor(channels_first(x), requires_grad=True)
    logits = theirs(b)
    for name, found in ours(a).items():
        close(found, logits[name], tolerance, name)
    loss = judge_loss(ours, a, labels)
    their_loss = sum(torch.nn.functional.cross_entropy(logits[name], torch.tensor(v)) for name, v in labels.items())
    close(loss, their_loss, tolerance, "loss")
    loss.backward()
    their_loss.backward()
    close(channels_first(a.grad), b.grad, tolerance, "gradient of x")
    compare_gradients(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_activations(dtype: str) -> None:
    (ours, theirs, x), tolerance = pair(dtype), TOLERANCE[dtype]
    a, b = tensor(x, requires_grad=True), torch.tensor(channels_first(x), requires_grad=True)
    found, wanted = ours.activations(a), theirs.activations(b)
    assert len(found) == len(wanted)
    rng = np.random.default_rng(2)
    for y, z in zip(found, wanted):  # the gradients of all of them add up
        close(channels_first(y), z, tolerance, f"activations {y.shape}")
        g = rng.normal(size=y.shape).astype(dtype)
        y.backward(backend.to_device(g), retain_graph=True)
        z.backward(torch.tensor(channels_first(g)), retain_graph=True)
    close(channels_first(a.grad), b.grad, tolerance, "gradient of x")
    compare_gradients(nn.Sequential(*ours.layers), torch.nn.Sequential(*theirs.layers), tolerance)  # the rest has none
