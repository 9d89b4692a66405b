"""The recipes of `python -m tinydiff train` and `eval`: a data set by its name, how it is learned, and how well it was.

With labels it is, step by step, what examples/quickstart.py does; a test compares the weights. With words it trains the
model of examples/text_to_image.py. The examples are to be read; these are for where there are none, as in a wheel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import data, plot, saving
from .backend import to_device
from .data.captions import some
from .diffusion.loss import denoising_loss, edm_loss, log_normal, score_matching_loss
from .diffusion.predict import Denoiser, ScoreModel, drop_labels
from .diffusion.process import KarrasSDE
from .distributed import ALONE, Ranks, digest
from .microbatch import microbatch_size, over_microbatches
from .models.text import TextEncoder, TextToImage, Tokenizer, drop_prompts
from .models.unet import UNet
from .modes import no_grad
from .optim import EMA, Adam, cosine, warmup
from .rng import Rng
from .trained import Trained, noise_of
from .training import TrainState, train

DRAWN = ("glyphs", "scenes")  # here, from a seed
DROPPED = 0.1  # how often the labels or words are left out in training; see drop_labels
MEASURED = 60_000  # pictures for sigma_data, at most
WIDTH = 96  # of the vectors of words
VALIDATED = 256  # pictures for the validation loss; of few, each several times, with another noise each time
NOISE = -0.6, 1.4  # mean and deviation of ln sigma in training: whether strokes hang together is decided at high levels
WORDS_NOISE = 0.0, 1.6  # the same for words: what they mean is decided at higher levels still, thin lines at low ones


class Pictures(NamedTuple):
    images: np.ndarray  # uint8 (N, H, W, C)
    labels: dict[str, np.ndarray]  # int64 (N,) each
    names: dict[str, list[str]]  # of the values of each label
    captions: list[str]
    source: dict[str, Any]  # for a checkpoint, and for held_out
    held: int = 0  # pictures of the folder that are not among these


def pictures(
    name: str,
    *,
    words: bool = False,
    seed: int = 0,
    size: Any = None,
    skip_broken: bool = False,
    data_dir: str | Path | None = None,
    captions: str | bool | None = None,
    classes: str | None = None,
    encoding: str | None = None,
) -> Pictures:
    """What to learn from: "glyphs", "scenes", "mnist", or a folder of your own pictures, of which one in ten is held
    out. words: for captions; then glyphs have all styles. Errors: those of the data; ValueError for a folder whose
    pictures have none of what is wanted."""
    if name in DRAWN:
        variety = "wide" if words or name == "scenes" else "plain"
        source: dict[str, Any] = {"name": name, "seed": seed, "variety": variety}
        return _drawn(source, 20_000 if name == "scenes" or not words else 60_000, seed)
    if name == "mnist":
        return _mnist("train", data_dir)
    source = {"name": str(Path(name).absolute()), "size": size, "skip_broken": skip_broken}
    source |= {"captions": captions, "classes": classes, "encoding": encoding}
    found = _read(name, source)
    source["size"] = list(found.images.shape[1:3])
    if words and not any(found.captions):
        raise ValueError(f"the pictures in {name} have no captions: docs/own_pictures.md says how to give them")
    return _of_folder(found, source, held=False)


def held_out(source: Mapping[str, Any], n: int, data_dir: str | Path | None = None) -> Pictures:
    """Up to n pictures like those that a model of this source has learned from, which it has not seen."""
    name = source.get("name")
    if name in DRAWN:
        return _drawn(source, n, 1_000_002)
    if name == "mnist":
        found = _mnist("test", data_dir)
    elif isinstance(name, str) and Path(name).is_dir():
        found = _of_folder(_read(name, source), source, held=True)
    else:
        raise ValueError(f"there are no pictures {name!r}, which the model has learned from: choose others by --data")
    return found._replace(
        images=found.images[:n], labels={k: v[:n] for k, v in found.labels.items()}, captions=found.captions[:n]
    )


def _read(name: str, source: Mapping[str, Any]) -> data.Pictures:
    return data.folder(
        name,
        size=source.get("size"),
        captions=source.get("captions"),
        classes=source.get("classes"),
        encoding=source.get("encoding") or "utf-8",
        on_error="skip" if source.get("skip_broken") else "raise",
    )


def default_images(shown: Pictures, words: bool) -> int:
    """How many pictures to learn from: what takes some minutes on two cores, for those of 28x28 and larger ones."""
    images = 430_000 if words else 360_000 if shown.source["name"] == "mnist" else 80_000
    return round(images * min(1.0, 28**2 / math.prod(shown.images.shape[1:3])))


def _drawn(source: Mapping[str, Any], n: int, seed: int) -> Pictures:
    if source["name"] == "scenes":
        scenes = data.scenes(n, seed)
        names = {key: list(values) for key, values in data.SCENE.items()}
        return Pictures(scenes.images, scenes.labels, names, scenes.captions, dict(source))
    variety = source.get("variety", "wide")
    glyphs = data.glyphs(n, seed, variety=variety)
    vary = [key for key in data.ATTRIBUTES if len(data.VARIETIES[variety].get(key, data.ATTRIBUTES[key])) > 1]
    labels = {key: glyphs.labels[key] for key in vary}
    names = {key: list(data.ATTRIBUTES[key])[: int(values.max()) + 1] for key, values in labels.items()}
    return Pictures(glyphs.images[..., None], labels, names, glyphs.captions, dict(source))


def _mnist(split: str, data_dir: str | Path | None) -> Pictures:
    digits = data.mnist(data_dir, split)
    names = list(data.ATTRIBUTES["digit"])
    captions = [f"a {names[digit]}" for digit in digits.labels]
    labels = {"digit": digits.labels.astype("int64")}
    return Pictures(digits.images[..., None], labels, {"digit": names}, captions, {"name": "mnist"})


def _of_folder(found: data.Pictures, source: Mapping[str, Any], held: bool) -> Pictures:
    try:
        mask = data.validation_mask(found.files, 0.1)
    except ValueError:  # so few that the hash chose none of them
        mask = np.arange(len(found.files)) == 0
    if mask.all():
        raise ValueError("there must be two pictures or more: one to learn from, one to see what was learned")
    rows = mask if held else ~mask
    captions = [caption for caption, kept in zip(found.captions, rows) if kept]
    labels = {name: values[rows] for name, values in found.labels.items()}
    names = {name: list(found.classes) for name in labels}
    return Pictures(found.images[rows], labels, names, captions, dict(source), int((~rows).sum()))


# ---------------------------------------------------------------- learning


def learn(
    shown: Pictures,
    out: str | Path,
    *,
    words: bool = False,
    images: int = 80_000,
    channels: tuple[int, ...] = (32, 64),
    batch_size: int = 64,
    microbatch: int | None = None,
    threads: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    resume: bool = False,
    say: Callable[[str], object] = lambda text: None,
    ranks: Ranks = ALONE,
    data_dir: str | Path | None = None,
) -> TrainState:
    """Train a denoiser of these pictures, told their labels or their words. images: to learn from, in whole rounds; or
    as many of the pictures as are given. lr: of Adam, by default 2e-3 with words and 1.5e-3 without. out: gets
    checkpoint.npz, which tinydiff.load reads, log.jsonl, with the loss of held-out pictures, and loss.png. Errors:
    ValueError for a run to be resumed that learned from other pictures."""
    rng, shape = Rng(seed).child("model"), shown.images.shape[1:]
    unit = 2 * 2 ** (len(channels) - 1)
    if shape[0] % unit or shape[1] % unit:
        raise ValueError(
            f"a net of {len(channels)} levels needs pictures whose sides are multiples of {unit}, not "
            f"{shape[0]}x{shape[1]}: take fewer channels, or resize the pictures of a folder"
        )
    conditions: list[np.ndarray]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left out of a folder has been listed by `pictures`
        others = held_out(shown.source, VALIDATED, data_dir)
    if words:
        tokenizer = Tokenizer.fit([*shown.captions, *others.captions])
        encoder = TextEncoder(tokenizer.size, tokenizer.length, WIDTH, rng=rng)
        net: Any = TextToImage(encoder, UNet(shape[2], channels, context=WIDTH, positions=True, rng=rng), tokenizer)
        conditions, noise, decay = [tokenizer.encode(shown.captions)], WORDS_NOISE, 0.998
    else:
        counts = {name: len(values) for name, values in shown.names.items()}
        net = UNet(shape[2], channels, labels=counts, rng=rng)
        conditions, noise, decay = list(shown.labels.values()), NOISE, 0.995
    begun = saving.load(Path(out) / "checkpoint.npz") if resume else None
    if begun is not None:  # a run goes on at its own noise levels
        noise = noise_of(begun) or noise
    few = shown.images[:: -(-len(shown.images) // MEASURED)]
    lr = lr or (2e-3 if words else 1.5e-3)
    model = Denoiser(net, sigma_data=float(data.to_float(few, -1, 1).std()))
    ema = EMA(model, decay)
    names = {} if words else shown.names
    told = tokenizer.to_array() if words else np.array([ord(c) for value in shown.names.values() for c in str(value)])
    source = {**shown.source, "digest": int(digest(shown.images, *conditions, told))}
    trained = Trained(model, KarrasSDE(), shape, labels=names, null=words or bool(names), eps=0.002, noise=noise,
                      data=source)  # fmt: skip
    if begun is not None:
        check_resumed(Path(out) / "checkpoint.npz", begun, trained)
    rows = np.resize(Rng(seed).child("validation").permutation(len(others.images)), VALIDATED)
    validation = [others.images[rows], *(values[rows] for values in condition_of(trained, others).values())]

    def loss(x0: Any, *values: Any, rng: Rng, sample_offset: int) -> Any:
        x0 = data.to_float(x0, -1, 1)  # bytes until here, a quarter of the memory
        condition: dict[str, Any]
        if words:
            tokens = drop_prompts(values[0], DROPPED, rng, sample_offset=sample_offset) if model.training else values[0]
            condition = {"tokens": tokens}
        else:
            p = DROPPED if model.training else 0.0
            condition = drop_labels(dict(zip(names, values)), p, rng, sample_offset=sample_offset)
        mean, std = noise
        return edm_loss(model, x0, rng, mean=mean, std=std, sample_offset=sample_offset, **condition)

    arrays = [a[:images] for a in (shown.images, *conditions)]
    n = len(arrays[0])
    epochs = round(images / n)
    steps = epochs * -(-n // batch_size)
    times, held = "once" if epochs == 1 else f"{epochs} times", f"{shown.held:,}" if shown.held else "none"
    say(f"{model.count():,} parameters; {n:,} pictures, each {times}, {held} held out; the run goes to {out}")

    def draw(state: TrainState) -> None:
        plot.loss_curve(state.records, Path(out) / "loss.png", x="step", title=f"EDM loss, {source['name']}",
                        validation_label="validation, averaged weights")  # fmt: skip

    return train(
        model, loss, arrays, Adam(model.parameters(), lr=lr), epochs=epochs, batch_size=batch_size,
        microbatch=microbatch, threads=threads, seed=seed, schedule=warmup(100, cosine(steps)), schedule_by="step",
        ema=ema, out=out, resume=resume, log_every=50, save_every=500, about=trained.about(),
        validation=validation, on_record=draw, ranks=ranks,
    )  # fmt: skip


def check_resumed(path: Path, begun: Mapping[str, Any], trained: Trained) -> None:
    """Errors: ValueError if the run in this checkpoint has learned from other pictures, captions or classes, or if it
    does not say from which, or at which noise levels."""
    where, given = f"{path} cannot go on with these pictures", trained.about()
    kept = begun.get("about")
    if not isinstance(kept, dict) or not isinstance(kept.get("data"), dict) or noise_of(begun) is None:
        raise ValueError(f"{where}: it does not say how it has learned")
    if kept.get("shape") != given["shape"]:
        raise ValueError(f"{where}: it has learned from pictures {kept.get('shape')}, not {given['shape']}")
    if (before := kept["data"].get("name")) != trained.data["name"]:
        raise ValueError(f"{where}: it has learned from {before}, not from {trained.data['name']}")
    if kept.get("labels") != given["labels"] or kept["data"].get("digest") != trained.data["digest"]:
        raise ValueError(f"{where}: they, their captions or their classes are not those that it has learned from")


# ---------------------------------------------------------------- how well?


def condition_of(trained: Trained, shown: Pictures) -> dict[str, Any]:
    """The conditions of pictures, as the model takes them: {name: (N, ...)}.
    Errors: ValueError for a label that these pictures do not have, or whose numbers have other names here than in the
    model, and for words that the model does not know."""
    if trained.tokenizer is not None:
        return {"tokens": trained.tokenizer.encode(shown.captions)}
    found = {}
    for name in trained.labels:
        key = "digit" if name == "labels" else name  # the only name for a label that the tutorial's nets have
        if key not in shown.labels:
            raise ValueError(f"the model is told {name!r}, which these pictures do not have: they have "
                             f"{', '.join(shown.labels) or 'no labels'}")  # fmt: skip
        known, names = trained.labels[name], shown.names[key]
        if known == [str(i) for i in range(len(known))]:  # it was told no names, but how many there are
            known = names[: len(known)]
        if names != known[: len(names)]:
            raise ValueError(f"the model knows {name!r} as {some(known)}, and these pictures have {some(names)}: their "
                             "numbers would mean something else to it")  # fmt: skip
        found[name] = shown.labels[key]
    return found


def validation_loss(trained: Trained, shown: Pictures, seed: int = 0) -> tuple[float, float, str]:
    """The denoising loss of pictures, always with the same noise: its mean, the standard error of that, and its name.

    Of a Denoiser, and of a ScoreModel of EDM's process, the EDM loss; of another ScoreModel the mean squared error of
    its prediction; of any other score, score matching weighted with s(t)^2, summed over a picture."""
    if trained.space is not None:
        x = trained.space.encode(shown.images)
    else:
        x = data.to_float(shown.images, trained.low, trained.high)
    if x.shape[1:] != trained.shape:
        raise ValueError(f"the model makes pictures of {trained.shape}, but these are {x.shape[1:]}")
    condition, rng, (mean, std) = condition_of(trained, shown), Rng(seed).child("validation"), trained.noise
    karras = isinstance(trained.process, KarrasSDE)

    def of(rows: slice) -> float:
        x0, given = to_device(x[rows]), {name: to_device(values[rows]) for name, values in condition.items()}
        model, options = trained.model, {"sample_offset": rows.start, **given}
        if isinstance(model, Denoiser) and karras:
            found = edm_loss(model, x0, rng.copy(), mean=mean, std=std, **options)
        elif isinstance(model, ScoreModel) and not isinstance(model, Denoiser):
            times = log_normal(mean, std) if karras else None
            found = denoising_loss(model, x0, rng.copy(), times=times, **options)
        else:
            found = score_matching_loss(model, x0, trained.process, rng.copy(), **options)
        return len(x0) * found.item()

    size = min(microbatch_size(len(x), math.prod(trained.shape)), max(1, -(-len(x) // 8)))  # eight parts, for the error
    with no_grad():
        parts = np.array(list(over_microbatches(of, len(x), size)))
    counts = np.array([min(size, len(x) - start) for start in range(0, len(x), size)])
    value = parts.sum() / counts.sum()
    spread = ((parts / counts - value) ** 2 * counts).sum() / max(1, len(parts) - 1)
    denoiser = isinstance(trained.model, ScoreModel) and (karras or not isinstance(trained.model, Denoiser))
    return (
        float(value),
        float(math.sqrt(spread / counts.sum())),
        "denoising loss" if denoiser else "score matching loss",
    )
