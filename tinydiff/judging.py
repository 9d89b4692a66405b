"""The judge of a data set: a classifier that examples/08_classifier.py trains once and keeps in the cache, where
everything that judges samples finds it. Its file is named after the pictures and labels that it learns from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from . import data
from .files import cache_dir
from .latents import digest
from .models.classifier import Classifier
from .rng import Rng
from .saving import load

DATA = ("mnist", "glyphs", "scenes")  # what has a judge


def pictures_to_judge(
    name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images, bytes (n, H, W, C), and the labels of their attributes, {name: (n,)}. No generator has learned from those
    that are drawn. Errors: ValueError for data that have no judge; those of `mnist`."""
    if name == "mnist":
        digits = data.mnist(data_dir, split)
        return digits.images[..., None], {"digit": digits.labels.astype("int64")}
    if name == "scenes":
        scenes = data.scenes(*((20_000, 1_000_001) if split == "train" else (5_000, 1_000_002)))
        return scenes.images, scenes.labels
    if name == "glyphs":
        glyphs = data.glyphs(*((45_000, 1_000_001) if split == "train" else (10_000, 1_000_002)))
        return glyphs.images[..., None], glyphs.labels
    raise ValueError(f"there are judges of {', '.join(DATA)}, not of {name!r}")


def new_judge(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> tuple[Classifier, np.ndarray, dict[str, np.ndarray], Path]:
    """A classifier, not trained yet; the pictures and labels that it learns from; and its file in the cache."""
    images, labels = pictures_to_judge(name, "train", data_dir)
    heads = {attribute: int(values.max()) + 1 for attribute, values in labels.items()}
    channels = (24, 48, 96) if max(images.shape[1:3]) <= 32 else (16, 32, 64, 96)
    judge = Classifier(images.shape[1:3], heads, images.shape[3], channels, rng=Rng(0).child("judge"))
    return judge, images, labels, cache_dir("judges") / f"{name}-{digest(images, *labels.values())}.npz"


def trained_judge(name: str, data_dir: str | os.PathLike[str] | None = None) -> Classifier | None:
    """The judge, if it has been trained. Errors: ValueError for a file that is damaged."""
    judge, _, _, path = new_judge(name, data_dir)
    if not path.exists():
        return None
    judge.load_state_dict(load(path))
    return judge
