"""Training a classifier, and keeping it: the second call with the same data reads it from the cache.

    judge = mnist_classifier()                            # {"digit": 10}
    judge = glyphs_classifier()                           # one head for each of data.ATTRIBUTES
    judge = trained_classifier(images, {"digit": labels}, {"digit": 10}, augment=True)

Everything is a function of the data, the arguments and the seed, so the file in the cache is named by a digest of them.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .. import data, saving
from ..arguments import integer, number
from ..backend import Array, to_host, xp
from ..data.augment import random_affine
from ..data.batches import Batches
from ..microbatch import gradients
from ..ops import cross_entropy
from ..optim import AdamW, cosine, warmup
from ..rng import Rng
from .classifier import Classifier, to_unit

VERSION = 1  # raise it if a change makes the same arguments give other weights, so that old caches are not used
GLYPHS = 60_000  # drawn to train on; a seed for them that no data set of the examples has
GLYPHS_SEED = 1_000_001


def mnist_classifier(
    root: str | os.PathLike[str] | None = None, *, seed: int = 0, cache: bool = True, stream: TextIO | None = None
) -> Classifier:
    """A classifier of the ten digits, trained on the training images of MNIST. root: as in data.mnist."""
    images, labels = data.mnist(root)
    return trained_classifier(
        images, {"digit": labels}, {"digit": 10}, augment=True, seed=seed, cache=cache, stream=stream
    )


def glyphs_classifier(*, seed: int = 0, cache: bool = True, stream: TextIO | None = None) -> Classifier:
    """A classifier of every attribute of data.glyphs, trained on its "wide" variety. (Their place, size and slant are
    attributes too, so nothing is moved in training.)

    No classifier knows every face: the regular digits of sans and mono have the same shape, up to a width that the
    jitter hides, so that about one in four of them is taken for the other. Of all faces about 97.5 % can be right.
    """
    drawn = data.glyphs(GLYPHS, GLYPHS_SEED)
    heads = {name: len(values) for name, values in data.ATTRIBUTES.items()}
    return trained_classifier(drawn.images, drawn.labels, heads, seed=seed, cache=cache, stream=stream)


def trained_classifier(
    images: Any,
    labels: Mapping[str, Any],
    heads: Mapping[str, int],
    *,
    augment: bool = False,
    epochs: int = 4,
    batch_size: int = 128,
    lr: float = 2e-3,
    channels: Sequence[int] = (32, 64, 128),
    features: int = 64,
    seed: int = 0,
    threads: int | None = None,
    cache: bool = True,
    stream: TextIO | None = None,
) -> Classifier:
    """A Classifier that has learned the labels of the images, from the cache if it has learned them before.

    images: uint8 (N, H, W) or (N, H, W, C). labels: for each attribute N integers from 0 to heads[attribute] - 1.
    augment: move the images in training (data/augment.py), if that does not change the labels. lr: after a warmup of
    100 steps, falling to 0 by half a cosine. With `cache` the weights are kept in
    `${XDG_CACHE_HOME:-~/.cache}/tinydiff/classifier`; a damaged file there is trained again, and one that cannot be
    written is a warning. stream: where progress is printed, stderr unless given.
    Errors: TypeError for images that are not uint8, or labels that are not integers; ValueError for shapes that do not
    fit, labels out of range, and those of Classifier; FloatingPointError if the loss is not finite.
    """
    images, labels = _checked(images, labels, heads)
    channels = tuple(channels)
    number("trained_classifier: lr", lr, "(0, inf)")
    size, depth = images.shape[1:3], images.shape[3]
    rng = Rng(seed).child("classifier")
    net = Classifier(heads, size, depth, channels=channels, features=features, rng=rng.child("weights"))
    options = (VERSION, dict(heads), augment, epochs, batch_size, lr, channels, features, seed)
    path = saving.cache_dir("classifier") / f"{_digest(images, labels, options)}.npz"
    say = _printer(stream)
    if cache and _load(path, net, say):
        return net.eval()
    say(f"training a classifier of {', '.join(heads)} on {len(images)} images, once")
    _learn(net, images, labels, augment, epochs, batch_size, lr, rng.child("steps"), seed, threads, say)
    if cache:
        _save(path, net)
    return net.eval()


def _learn(
    net: Classifier,
    images: Array,
    labels: Mapping[str, Array],
    augment: bool,
    epochs: int,
    batch_size: int,
    lr: float,
    rng: Rng,
    seed: int,
    threads: int | None,
    say: Any,
) -> None:
    order = Batches(len(images), batch_size, seed=seed)
    steps = integer("trained_classifier: epochs", epochs) * order.steps_per_epoch
    optimizer, schedule = AdamW(net.parameters(), lr, weight_decay=0.05), warmup(100, cosine(steps))

    def loss(images: Array, *labels: Array, rng: Rng, sample_offset: int) -> Any:
        """The sum over attributes of the mean cross-entropy."""
        x = to_unit(images)
        if augment:
            x = random_affine(x, rng, fill=-1.0, sample_offset=sample_offset)
        logits = net(x)
        return sum(cross_entropy(logits[name], found) for name, found in zip(net.heads, labels))

    start, losses = time.monotonic(), []
    for step in range(steps):
        optimizer.lr = lr * schedule(step)
        rows = order.indices(step)
        optimizer.zero_grad()
        batch = [images[rows], *(labels[name][rows] for name in net.heads)]
        losses.append(gradients(loss, optimizer.parameters, batch, rng.child(step), threads=threads))
        optimizer.step()
        if (step + 1) % order.steps_per_epoch == 0:
            mean, seconds = float(to_host(xp.stack(losses)).mean()), time.monotonic() - start
            losses, epoch = [], (step + 1) // order.steps_per_epoch
            if not abs(mean) < float("inf"):
                raise FloatingPointError(f"trained_classifier: the loss is {mean} in epoch {epoch}: lower lr={lr}")
            left = seconds * (steps - step - 1) / (step + 1)
            say(f"epoch {epoch}/{epochs}  loss {mean:.4f}  {seconds:.0f} s, {left:.0f} s left")


def _checked(images: Any, labels: Mapping[str, Any], heads: Mapping[str, int]) -> tuple[Array, dict[str, Array]]:
    """uint8 (N, H, W, C), and int64 (N,) of each head in the order of the heads, on the host."""
    images = to_host(images)
    if images.dtype != "uint8":
        raise TypeError(f"trained_classifier: images must be uint8, not {images.dtype} of shape {images.shape}")
    if images.ndim not in (3, 4) or not len(images):
        raise ValueError(
            f"trained_classifier: images must be (N, H, W) or (N, H, W, C), and not none, not {images.shape}"
        )
    if set(labels) != set(heads):
        raise ValueError(f"trained_classifier: labels {sorted(labels)}, but heads {sorted(heads)}")
    found = {}
    for name, classes in heads.items():
        values = to_host(labels[name])
        if values.dtype.kind not in "iu":
            raise TypeError(f"trained_classifier: labels of {name!r} must be integers, not {values.dtype}")
        if values.shape != (len(images),):
            raise ValueError(f"trained_classifier: {len(images)} images, but labels of {name!r} {values.shape}")
        if values.min() < 0 or values.max() >= classes:
            raise ValueError(
                f"trained_classifier: labels of {name!r} must be 0 to {classes - 1}, but run from {values.min()} to "
                f"{values.max()}"
            )
        found[name] = values.astype("int64")
    return images[..., None] if images.ndim == 3 else images, found


# ---------------------------------------------------------------- the cache


def _digest(images: Array, labels: Mapping[str, Array], options: Any) -> str:
    digest = hashlib.blake2b(f"{options!r} {images.shape}".encode(), digest_size=16)
    for name, array in {"": images, **labels}.items():
        digest.update(name.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _load(path: Path, net: Classifier, say: Any) -> bool:
    """Have the weights been read?"""
    if not path.is_file():
        return False
    try:
        net.load_state_dict(saving.load(path)["model"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        say(f"a classifier in the cache is of no use, and is trained again: {error}")
        return False
    return True


def _save(path: Path, net: Classifier) -> None:
    try:
        saving.save(path, {"model": net.state_dict()})
    except OSError as error:  # a read-only home is no reason to refuse the classifier: it is trained already
        warnings.warn(f"the classifier is not cached in {path}: {error}", stacklevel=3)


def _printer(stream: TextIO | None) -> Any:
    """Prints a line of progress, if there is anywhere to print it (sys.stderr is None without a console)."""
    out = sys.stderr if stream is None else stream

    def say(line: str) -> None:
        if out is not None:
            print(line, file=out, flush=True)

    return say
